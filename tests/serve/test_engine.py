"""The engine: requests from several threads, queues with an end, cancellation, asyncio."""

import asyncio
import queue
import threading

import pytest
import torch

from tinyfm.generate import Sampling, stream_text
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.serve import engine as engines
from tinyfm.serve.engine import Busy, Done, Engine, TextRequest, Token
from tinyfm.tokenizer import ByteTokenizer

LONG = Sampling(1 << 39, temperature=0)  # the likeliest token, again and again
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(257, 64, 1, 2, d_model=16, zero_init=False)).eval()


@pytest.fixture
def engine(model):
    engine = Engine(max_rows=2, max_waiting=2)
    engine.add("tiny", model, TOKENIZER)
    yield engine
    engine.close(0)
    assert not engine.thread.is_alive()


class Inbox:
    """Receives the events of a text."""

    def __init__(self):
        self.events: queue.Queue = queue.Queue()

    def __call__(self, event) -> None:
        self.events.put(event)

    def next(self):
        return self.events.get(timeout=20)

    def all(self) -> list:
        found = [self.next()]
        while not isinstance(found[-1], Done):
            found.append(self.next())
        return found


def ask(engine: Engine, text: str, sampling: Sampling, **options) -> tuple[Inbox, engines.Handle]:
    inbox = Inbox()
    request = TextRequest(TOKENIZER.encode(text), sampling, **options)
    return inbox, engine.submit("tiny", request, inbox)


def block(engine: Engine) -> threading.Event:
    """Keep the engine's thread waiting until the event is set."""
    go, started = threading.Event(), threading.Event()
    engine.call(lambda: started.set() or go.wait(20))
    assert started.wait(20)
    return go


def test_text_of_many_threads_is_that_of_sample_py(engine, model):
    s = Sampling(30, temperature=1.0, seed=3)
    prompts = ["The"] * 4
    free = list(zip(*stream_text(model, TOKENIZER, prompts, s)))
    stops = ("".join(free[0])[9:11], "never")
    rows = list(zip(*stream_text(model, TOKENIZER, prompts, s, stops)))
    engine.max_waiting = 9
    found = {}

    def client(i: int) -> None:
        inbox, _ = ask(engine, "The", s, index=i, stop_strings=stops)
        found[i] = inbox.all()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    reasons = set()
    for i, row in enumerate(rows):
        assert "".join(event.text for event in found[i]) == "".join(row)
        reasons.add(found[i][-1].reason)
    assert reasons == {"stop", "length"}


def test_probabilities_and_echo(engine):
    inbox, _ = ask(engine, "caf\u00e9", Sampling(2, 0), top=3, echo=True)
    *tokens, done = inbox.all()
    assert done == Done("", "length")
    assert [token.prompt for token in tokens] == [True] * 5 + [False] * 2
    assert "".join(token.text for token in tokens[:5]) == "caf\u00e9"
    assert tokens[0].logprob is None and tokens[0].top == ()
    for token in tokens[1:]:
        best = [logprob for _, logprob in token.top]
        assert len(best) == 3 and best == sorted(best, reverse=True) and token.logprob <= best[0]
    assert tokens[-1].top[0] == (tokens[-1].id, tokens[-1].logprob)  # temperature 0


def test_a_second_prompt_reports_what_was_cached(engine):
    first = ask(engine, "The cat sat on the mat", Sampling(2))[0].all()
    second = ask(engine, "The cat sat on the rug", Sampling(2))[0].all()
    assert first[-1].cached == 0 and second[-1].cached > 8


def test_the_queue_has_an_end(engine):
    running = [ask(engine, "a", LONG) for _ in range(2)]
    for inbox, _ in running:
        inbox.next()
    waiting = [ask(engine, "b", Sampling(1)) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests"):
        ask(engine, "c", Sampling(1))
    waiting[0][1].cancel()
    assert waiting[0][0].all() == [Done("", "cancelled")]  # though no row is free
    running[0][1].cancel()
    assert running[0][0].all()[-1].reason == "cancelled"
    assert waiting[1][0].all()[-1].reason == "length"  # it got the free row
    assert isinstance(running[1][0].next(), Token)


def test_a_client_that_fails_is_cancelled_and_harms_no_other(engine):
    def gone(event) -> None:
        raise ConnectionError

    engine.submit("tiny", TextRequest([1], LONG), gone)
    ask(engine, "a", LONG)[0].next()
    inbox, _ = ask(engine, "b", Sampling(3))  # waits for a free row
    assert len(inbox.all()) == 4


def test_a_failing_model_ends_its_texts_alone(engine, model, monkeypatch):
    def fail() -> None:
        raise MemoryError("full")

    engine.add("broken", model, TOKENIZER)
    monkeypatch.setattr(engine.models["broken"].batch, "step", fail)
    inbox = Inbox()
    engine.submit("broken", TextRequest([1], Sampling(3)), inbox)
    assert inbox.all() == [Done("", "cancelled", "MemoryError: full")]
    assert len(ask(engine, "a", Sampling(3))[0].all()) == 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [257]}, "id 257, outside 0 to 256"),
        ({"prompt": [1], "top": 21}, "top is 21; use 0 to 20"),
    ],
)
def test_mistakes(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.submit("tiny", TextRequest(sampling=Sampling(), **request_), print)
    with pytest.raises(KeyError):
        engine.submit("other", TextRequest([1], Sampling()), print)


def test_calls_run_in_the_engines_thread(engine):
    ask(engine, "a", LONG)
    assert engine.call(threading.get_ident).result(20) == engine.thread.ident
    assert engine.call(torch.is_inference_mode_enabled).result(20)
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(20)
    go = block(engine)
    futures = [engine.call(int) for _ in range(2)]
    with pytest.raises(Busy):
        engine.call(int)
    go.set()
    assert [future.result(20) for future in futures] == [0, 0]


def test_long_work_goes_on_between_tokens(engine):
    order: queue.Queue = queue.Queue()
    ended: queue.Queue = queue.Queue()
    go = block(engine)
    engine.submit("tiny", TextRequest([1], Sampling(3)), lambda event: order.put("text"))
    engine.iterate(lambda: iter("abc"), order.put, ended.put)
    go.set()
    assert ended.get(timeout=20) is None
    found = [order.get(timeout=20) for _ in range(7)]
    assert found[:4] == ["text", "a", "text", "b"]

    def broken():
        yield 1
        raise ValueError("no")

    engine.iterate(broken, order.put, ended.put)
    assert isinstance(ended.get(timeout=20), ValueError) and order.get(timeout=20) == 1
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    def gone(error) -> None:
        raise RuntimeError("the event loop is closed")

    engine.iterate(lambda: iter(()), order.put, gone)  # harms nobody
    handle = engine.iterate(endless, order.put, ended.put)
    assert order.get(timeout=20) == 0
    handle.cancel()
    assert ended.get(timeout=20) is None and closed.is_set()


def test_asyncio(engine, monkeypatch):
    async def read() -> None:
        assert [i async for i in engines.items(engine, lambda: iter([1, 2]))] == [1, 2]
        with pytest.raises(ZeroDivisionError):
            await anext(engines.items(engine, lambda: (1 / i for i in [0])))
        assert await engines.call(engine, divmod, 7, 2) == (3, 1)

        # The work is cancelled with the task that waits, and for a client that reads too slowly.
        endless = engines.items(engine, lambda: iter(int, 1))

        async def count() -> int:
            return len([item async for item in endless])

        task = asyncio.create_task(count())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert endless.handle.cancelled
        monkeypatch.setattr(engines, "MOST_UNREAD", 5)
        slow = engines.items(engine, lambda: iter(int, 1))
        while engine.iterations:
            await asyncio.sleep(0.01)
        with pytest.raises(Busy, match="does not read"):
            async for _ in slow:
                pass

    asyncio.run(read())


def test_closing_finishes_what_runs_and_cancels_what_is_too_long(model):
    for sampling, reason in ((Sampling(20), "length"), (LONG, "cancelled")):
        engine = Engine()
        engine.add("tiny", model, TOKENIZER)
        inbox, _ = ask(engine, "a", sampling)
        inbox.next()
        engine.close(20 if reason == "length" else 0.05)
        assert inbox.all()[-1].reason == reason
        assert not engine.thread.is_alive()
        with pytest.raises(Busy, match="closing"):
            ask(engine, "b", sampling)


def test_closing_refuses_calls_that_wait(model):
    engine = Engine()
    go = block(engine)
    future = engine.call(int)
    closing = threading.Thread(target=engine.close, args=(0,))
    closing.start()
    while not engine.ending:
        pass
    go.set()
    closing.join(20)
    with pytest.raises(Busy, match="closing"):
        future.result(20)
