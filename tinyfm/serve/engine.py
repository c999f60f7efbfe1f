"""The engine: one thread that owns all models and does all their work.

Requests come from other threads. Texts of one model are written together, token by token
(batching.py); between two tokens the thread does other short work (`call`) and one step of long
work (`iterate`, such as a drawing; drawings are made one after the other). So no text waits for the
end of a long request, and no lock guards a model. Queues are bounded: a request that finds one full
raises `Busy`.

    engine = Engine()
    engine.add("gpt", model, tokenizer)
    engine.submit("gpt", TextRequest(ids, Sampling()), print)    # prints each Token, then Done
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tinyfm import generate
from tinyfm.batching import Batch, Drawn, Text, pack_weights
from tinyfm.tokenizer import Tokenizer

MOST_ALTERNATIVES = 20
MOST_UNREAD = 10_000  # events or items that are kept for a client which does not read them


@dataclass(frozen=True)
class TextRequest:
    """A prompt to continue. The tokens are those of `sample.py -n` with the same seed, row `index`
    (but for rounding: see batching.py).

    The end-of-text token ends the text, and so do the stop tokens of `sampling` and the strings.
    """

    prompt: list[int]  # token ids, not empty, with those of a soft prompt in front
    sampling: generate.Sampling
    index: int = 0  # random stream of the seed
    stop_strings: tuple[str, ...] = ()
    top: int = 0  # number of likeliest tokens that are reported with each token
    echo: bool = False  # report the tokens of the prompt first

    def __post_init__(self):
        if not 0 <= self.top <= MOST_ALTERNATIVES:
            raise ValueError(f"top is {self.top}; use 0 to {MOST_ALTERNATIVES}")


@dataclass(frozen=True)
class Token:
    """A token of the text, or of an echoed prompt.

    logprob: ln p of the token in the model's own distribution, before temperature and filters; None
    for the first token of a prompt, which nothing predicts.
    """

    id: int
    text: str  # what became certain with it: empty while a character or a stop string may be open
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob) of the likeliest tokens, best first
    prompt: bool = False


@dataclass(frozen=True)
class Done:
    """The end of a text."""

    text: str  # what was held back until the end
    reason: Literal["stop", "length", "cancelled"]
    error: str = ""  # a sentence, if the request failed
    cached: int = 0  # tokens of the prompt that were found in the prefix cache


Event = Token | Done


class Busy(Exception):
    """Too many requests wait already, or the engine is closing."""


class Handle:
    """A request that can be cancelled, from any thread. It then ends before the next token."""

    def __init__(self, wake: Callable[[], None]):
        self.cancelled = False
        self._wake = wake

    def cancel(self) -> None:
        self.cancelled = True
        self._wake()


@dataclass(eq=False)
class Writing:
    """A text request on its way through the engine."""

    request: TextRequest
    handle: Handle
    on_event: Callable[[Event], None]
    tokenizer: Tokenizer
    text: Text = field(init=False)

    def __post_init__(self):
        request = self.request
        self.text = Text(request.prompt, request.sampling, request.index, request.echo)
        self.out = generate.TextStream(request.stop_strings)
        self.prompt_out = generate.TextStream()
        self.ended = False

    def send(self, event: Event) -> None:
        """Hand an event over. A receiver that raises has gone away."""
        try:
            self.on_event(event)
        except Exception:
            self.handle.cancelled = True
        self.ended = isinstance(event, Done)

    def end(self, reason: Literal["stop", "length", "cancelled"], error: str = "") -> None:
        rest = self.out.feed(b"", final=True)
        self.send(Done(rest, reason, error, self.text.cached))

    def receive(self, result: Drawn | Exception) -> None:
        """Report what the batch did for this text, and its end if it has come."""
        if self.ended:
            return
        if isinstance(result, Exception):
            self.end("cancelled", f"{type(result).__name__}: {result}")
        elif result.prompt:
            self.send_prompt_token(result.token, result.logprobs)
        else:
            self.send_token(result.token, result.logprobs)

    def send_prompt_token(self, token: int, logprobs: torch.Tensor | None) -> None:
        self.prompt_left -= 1
        piece = self.prompt_out.feed(self.bytes_of(token), final=self.prompt_left == 0)
        self.send(self.make_token(token, piece, logprobs, prompt=True))

    def send_token(self, token: int, logprobs: torch.Tensor) -> None:
        sampling = self.request.sampling
        if token in sampling.stop_tokens or token == self.tokenizer.eot:
            self.end("stop")
            return
        piece = self.out.feed(self.bytes_of(token))
        self.send(self.make_token(token, piece, logprobs))
        if self.out.stopped:
            self.end("stop")
        elif len(self.text.tokens) - self.text.prompt_length >= sampling.max_new_tokens:
            self.end("length")

    def send_unpredicted(self) -> None:
        """Report the tokens of an echoed prompt that have no log-probability."""
        self.prompt_left = len(self.request.prompt)
        for token in self.request.prompt[: self.text.start + 1]:
            self.send_prompt_token(token, None)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none for a soft prompt's, which the tokenizer does not know."""
        return self.tokenizer.token_bytes(token) if token < self.tokenizer.vocab_size else b""

    def make_token(
        self, token: int, piece: str, logprobs: torch.Tensor | None, prompt: bool = False
    ) -> Token:
        if logprobs is None:
            return Token(token, piece, None, (), prompt)
        top: tuple[tuple[int, float], ...] = ()
        if self.request.top:
            best = logprobs.topk(min(self.request.top, len(logprobs)))
            top = tuple(zip(best.indices.tolist(), best.values.tolist()))
        return Token(token, piece, logprobs[token].item(), top, prompt)


@dataclass(eq=False)
class Iteration:
    """Long work, done one item at a time."""

    function: Callable[[], Iterator]
    on_item: Callable[[Any], None]
    on_end: Callable[[BaseException | None], None]
    handle: Handle
    items: Iterator | None = None

    def advance(self) -> bool:
        """Do the next step; returns whether there may be another one."""
        error = None
        try:
            if not self.handle.cancelled:
                if self.items is None:
                    self.items = self.function()
                self.on_item(next(self.items))
                return True
        except StopIteration:
            pass
        except Exception as raised:
            error = raised
        with contextlib.suppress(Exception):  # the generator's own end may fail
            if isinstance(self.items, Generator):
                self.items.close()
        with contextlib.suppress(Exception):  # who waited has gone away
            self.on_end(error)
        return False


class TextModel:
    """A model with the texts that it writes and those that wait for a row."""

    def __init__(self, model, tokenizer: Tokenizer, prefix_bytes: int):
        never = tokenizer.without_token(model.config.vocab_size)
        self.tokenizer = tokenizer
        self.batch = Batch(model, never, prefix_bytes)
        self.waiting: deque[Writing] = deque()
        self.running: dict[Text, Writing] = {}

    def remove(self, writing: Writing) -> None:
        self.batch.texts.remove(writing.text)
        del self.running[writing.text]


class Engine:
    """See the module. All methods may be called from any thread."""

    def __init__(
        self, max_rows: int = 16, max_waiting: int = 256, prefix_bytes: int = 256 * 1024 * 1024
    ):
        """max_rows: texts that one model writes at once. max_waiting: bound of each queue.
        prefix_bytes: memory for the keys and values of recent prompts, of each model."""
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.prefix_bytes = prefix_bytes
        self.models: dict[str, TextModel] = {}
        self.calls: deque[tuple[Future, Callable, tuple]] = deque()
        self.iterations: deque[Iteration] = deque()
        self.changed = threading.Condition()  # guards all that is above, but the batches
        self.closing = False
        self.ending = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    # ---- from other threads ----

    def add(self, name: str, model, tokenizer: Tokenizer) -> None:
        """Serve a language model under this name; on a CPU it is changed by `pack_weights`."""
        pack_weights(model)
        with self.changed:
            self.models[name] = TextModel(model, tokenizer, self.prefix_bytes)

    def submit(self, name: str, request: TextRequest, on_event: Callable[[Event], None]) -> Handle:
        """Let a model write a text. on_event is called in the engine's thread; Done comes last.

        Raises KeyError for an unknown name, ValueError for a bad prompt, and Busy.
        """
        served = self.models[name]
        generate.check_prompts([request.prompt], served.batch.model.config.vocab_size)
        writing = Writing(request, Handle(self._wake), on_event, served.tokenizer)
        with self.changed:
            self._check_room(sum(len(served.waiting) for served in self.models.values()))
            served.waiting.append(writing)
            self.changed.notify()
        return writing.handle

    def call(self, function: Callable, *args) -> Future:
        """Do short work, such as an embedding, in the engine's thread. Raises Busy."""
        future: Future = Future()
        with self.changed:
            self._check_room(len(self.calls))
            self.calls.append((future, function, args))
            self.changed.notify()
        return future

    def iterate(
        self,
        function: Callable[[], Iterator],
        on_item: Callable[[Any], None],
        on_end: Callable[[BaseException | None], None],
    ) -> Handle:
        """Do long work: one next() of function() at a time, between tokens. Raises Busy.

        Works are done one after the other. on_item receives each item, on_end the error or None,
        both in the engine's thread.
        """
        work = Iteration(function, on_item, on_end, Handle(self._wake))
        with self.changed:
            self._check_room(len(self.iterations))
            self.iterations.append(work)
            self.changed.notify()
        return work.handle

    def close(self, timeout: float) -> None:
        """Take no more work, finish what there is, and cancel what takes over `timeout` seconds."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(timeout)
        with self.changed:
            self.ending = True
            self.changed.notify()
        self.thread.join(timeout + 10)

    def _check_room(self, waiting: int) -> None:
        if self.closing:
            raise Busy("the server is closing")
        if waiting >= self.max_waiting:
            raise Busy(f"{waiting} requests wait already; try again later")

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify()

    # ---- in the engine's thread ----

    @torch.inference_mode()
    def _run(self) -> None:
        while self._wait_for_work():
            self._answer_call()
            for served in list(self.models.values()):
                self._write(served)
            self._advance()

    def _wait_for_work(self) -> bool:
        """Sleep until there is work; returns False when the engine is closed."""
        with self.changed:
            while True:
                if self.ending:
                    self._cancel_all()
                texts = any(served.waiting or served.running for served in self.models.values())
                if self.calls or self.iterations or texts:
                    return True
                if self.closing:
                    return False
                self.changed.wait()

    def _cancel_all(self) -> None:
        for future, _, _ in self.calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(Busy("the server is closing"))
        self.calls.clear()
        for work in self.iterations:
            work.handle.cancelled = True
        for served in self.models.values():
            for writing in [*served.waiting, *served.running.values()]:
                writing.handle.cancelled = True

    def _answer_call(self) -> None:
        with self.changed:
            if not self.calls:
                return
            future, function, args = self.calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    def _write(self, served: TextModel) -> None:
        """Let texts leave and join, and write one token of each."""
        for writing in [*served.running.values()]:
            if writing.handle.cancelled:
                served.remove(writing)
                writing.end("cancelled")
        for writing in self._next_waiting(served):
            if writing.handle.cancelled:
                writing.end("cancelled")
                continue
            served.running[writing.text] = writing
            served.batch.add(writing.text)
            if writing.request.echo:
                served.batch.place(writing.text)
                writing.send_unpredicted()
        if not served.running:
            return
        try:
            results = served.batch.step()
        except Exception as error:  # of no single text
            results = [(text, error) for text in served.running]
        for text, result in results:
            served.running[text].receive(result)
        for writing in [*served.running.values()]:
            if writing.ended:
                served.remove(writing)

    def _next_waiting(self, served: TextModel) -> list[Writing]:
        """The cancelled texts that wait, and as many others as there are free rows."""
        with self.changed:
            free = self.max_rows - len(served.running)
            found = [writing for writing in served.waiting if writing.handle.cancelled]
            others = [writing for writing in served.waiting if not writing.handle.cancelled]
            served.waiting = deque(others[free:])
            return found + others[:free]

    def _advance(self) -> None:
        """Do one step of the oldest long work, and end those that are cancelled."""
        with self.changed:
            works = [work for work in self.iterations if work.handle.cancelled]
            works += [work for work in self.iterations if not work.handle.cancelled][:1]
        for work in works:
            if not work.advance():
                with self.changed:
                    self.iterations.remove(work)


# ---- for asyncio --------------------------------------------------------------------------------


class Arrivals:
    """What the engine sends, as an asynchronous iterator. Its last entry is marked.

    Ending the iteration early (`cancel`, or the cancellation of the task that waits) cancels the
    request.
    """

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[Any, bool, BaseException | None]] = asyncio.Queue()
        self.handle: Handle | None = None
        self.ended = False

    def put(self, value: Any, last: bool = False, error: BaseException | None = None) -> None:
        """Called in the engine's thread. Raises Busy if too much is unread, which ends the work."""
        if self.queue.qsize() > MOST_UNREAD and not last:
            raise Busy("the client does not read")
        self.loop.call_soon_threadsafe(self.queue.put_nowait, (value, last, error))

    def cancel(self) -> None:
        if self.handle is not None:
            self.handle.cancel()

    def __aiter__(self) -> Arrivals:
        return self

    async def __anext__(self) -> Any:
        if self.ended:
            raise StopAsyncIteration
        try:
            value, self.ended, error = await self.queue.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if error is not None:
            raise error
        if value is None:
            raise StopAsyncIteration
        return value


def items(engine: Engine, function: Callable[[], Iterator]) -> Arrivals:
    """Start long work at once; iterate over its items, none of which is None. Raises Busy.

    An error of the work is raised by the iteration.
    """
    arrivals = Arrivals()
    arrivals.handle = engine.iterate(
        function, arrivals.put, lambda error: arrivals.put(None, True, error)
    )
    return arrivals


async def call(engine: Engine, function: Callable, *args) -> Any:
    """The result of short work, awaited. Raises Busy, and what the function raises."""
    return await asyncio.wrap_future(engine.call(function, *args))
