"""The API, by the clients that people use: openai, LangChain, and plain HTTP."""

import asyncio
import base64
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import httpx
import numpy as np
import processes
import pytest
import small_runs
import torch
from conftest import ROOT, call
from langchain_openai import ChatOpenAI
from openai import BadRequestError, NotFoundError, OpenAI
from PIL import Image

import sample
import train
from tinyfm import generate
from tinyfm.adapt import chat
from tinyfm.adapt.heads import mean_state
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.common import sheets
from tinyfm.evaluate import zero_shot
from tinyfm.generate import Sampling
from tinyfm.serve import __main__ as command
from tinyfm.serve import vectors

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
QUESTION = [{"role": "user", "content": "Is it so?"}]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    (folder / "notes.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def server(pictures, tmp_path_factory):
    runs = small_runs.build_runs(tmp_path_factory.mktemp("runs"))
    with small_runs.serving(runs, pictures=str(pictures)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def post(server):
    """POST a body to a route; returns the answer's JSON."""

    def send(route, **body):
        answer = httpx.post(server.url + route, json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return send


def text_of(run, prompt, seed, n=1, **sampling):
    """What sample.py writes: n texts after a prompt."""
    texts = [""] * n
    settings = Sampling(seed=seed, **sampling)
    stream = generate.stream_text(
        run.model, run.tokenizer, [prompt] * n, settings, (), prompt_ids(run.model)
    )
    for parts in stream:
        texts = [text + part for text, part in zip(texts, parts)]
    return texts


def image_of(entry):
    data = base64.b64decode(entry.b64_json)
    return np.array(Image.open(io.BytesIO(data), formats=["PNG"]))


def to_base64(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# ---- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "soft"])
def test_completions_are_the_texts_of_sample_py(client, server, name):
    settings = {"temperature": 0.9, "top_p": 0.95}
    found = client.completions.create(
        model=name, prompt="It was", n=3, seed=5, max_tokens=20, **settings,
        extra_body={"top_k": 40, "min_p": 0.001, "repetition_penalty": 1.1},
    )  # fmt: skip
    expected = text_of(
        server.runs[name], "It was", 5, 3, max_new_tokens=20, **settings,
        top_k=40, min_p=0.001, repetition_penalty=1.1,
    )  # fmt: skip
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.usage.prompt_tokens == 6  # of the text, without the soft prompt
    assert found.usage.total_tokens == 6 + found.usage.completion_tokens


def test_a_stream_has_the_text_of_the_whole_and_ends_as_clients_expect(client, server):
    asked = {"model": "gpt", "prompt": "It was", "n": 2, "seed": 1, "max_tokens": 9}
    whole = client.completions.create(**asked)
    body = asked | {"stream": True, "stream_options": {"include_usage": True}, "colour": 7}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "colour" in chunks[0]["warnings"][0]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole.usage.completion_tokens
    for i, expected in enumerate(whole.choices):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == i]
        assert "".join(choice["text"] for choice in own) == expected.text
        reasons = [choice["finish_reason"] for choice in own]
        assert reasons == [None] * (len(own) - 1) + [expected.finish_reason]


def test_a_chat_is_that_of_adapt_chat(client, server):
    run = server.runs["chat"]
    settings = Sampling(max_new_tokens=12, seed=3)
    expected = "".join(chat.reply(run.model, run.tokenizer, QUESTION, settings))
    asked = {"model": "chat", "messages": QUESTION, "seed": 3, "max_completion_tokens": 12}
    found = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == expected
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert parts[0].delta.role == "assistant"
    assert "".join(part.delta.content or "" for part in parts) == expected
    parted = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    again = client.chat.completions.create(**asked | {"messages": parted})
    assert again.choices[0].message.content == expected


def test_a_long_chat_forgets_its_start_and_says_so(post):
    turns = [{"role": role, "content": "word"} for role in ("user", "assistant") * 5]
    found = post("/v1/chat/completions", messages=[*turns, *QUESTION], max_tokens=5, seed=0)
    assert "oldest exchanges" in found["warnings"][0]


def test_langchain_talks_to_it(server):
    model = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="chat", max_tokens=8, seed=2
    )
    answer = model.invoke("Is it so?")
    assert answer.content == "".join(part.content for part in model.stream("Is it so?"))
    assert answer.usage_metadata["output_tokens"] > 0


def test_log_probabilities_are_the_models(client, server):
    run = server.runs["gpt"]
    found = client.completions.create(
        model="gpt", prompt="abc", max_tokens=4, seed=0, logprobs=2, echo=True, temperature=0
    )
    (choice,) = found.choices
    data = choice.logprobs
    ids = torch.tensor([list(b"abc")])
    with torch.inference_mode():
        expected = run.model(ids).log_softmax(-1)[0]
    assert data.token_logprobs[0] is None and data.tokens[:3] == ["a", "b", "c"]
    assert data.token_logprobs[1:3] == pytest.approx(
        [expected[0, ord("b")].item(), expected[1, ord("c")].item()], abs=1e-4
    )
    assert [*data.top_logprobs[3].values()] == pytest.approx(
        expected[2].topk(2).values.tolist(), abs=1e-4
    )
    scored = client.completions.create(
        model="gpt", prompt="abc", max_tokens=0, logprobs=2, echo=True
    )
    assert scored.choices[0].text == "abc"
    assert scored.choices[0].logprobs.token_logprobs[:3] == data.token_logprobs[:3]
    assert len(scored.choices[0].logprobs.tokens) == 3
    own = client.chat.completions.create(
        model="chat", messages=QUESTION, max_tokens=3, logprobs=True, top_logprobs=2, seed=0
    )
    for entry in own.choices[0].logprobs.content:
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        assert len(entry.top_logprobs) == 2


def test_a_stop_string_ends_a_text_before_it(client, server):
    (whole,) = text_of(server.runs["gpt"], "It was", 5, max_new_tokens=30)
    stop = whole[4:6]
    found = client.completions.create(
        model="gpt", prompt="It was", seed=5, max_tokens=30, stop=[stop, "never there"]
    )
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_without_a_seed_texts_differ_and_can_come_again(client):
    asked = {"model": "gpt", "prompt": "It was", "max_tokens": 20}
    first, second = (client.completions.create(**asked) for _ in range(2))
    assert first.choices[0].text != second.choices[0].text
    again = client.completions.create(**asked, seed=first.seed)
    assert again.choices[0].text == first.choices[0].text


def test_several_prompts_as_texts_and_as_ids(client):
    texts = client.completions.create(
        model="gpt", prompt=["ab", "cd"], n=2, seed=1, max_tokens=5, echo=True
    )
    ids = client.completions.create(
        model="gpt", prompt=[[97, 98], [99, 100]], n=2, seed=1, max_tokens=5, echo=True
    )
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ids.choices]
    assert [choice.text[:2] for choice in texts.choices] == ["ab", "ab", "cd", "cd"]


def test_what_a_run_cannot_do_is_refused_with_advice(client):
    with pytest.raises(BadRequestError, match="--task chat"):
        client.chat.completions.create(model="gpt", messages=QUESTION)
    with pytest.raises(NotFoundError, match="gpt, chat"):
        client.completions.create(model="gpt-5", prompt="a")
    assert {model.id for model in client.models.list()} == {*small_runs.BUILDERS}
    assert client.models.retrieve("chat").abilities == ["chat", "complete", "embed"]


def test_a_wrong_method_is_told_the_right_one(server):
    answer = httpx.get(f"{server.url}/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert "use POST" in answer.json()["error"]["message"]
    assert httpx.post(f"{server.url}/v1/models", json={}).status_code == 405
    assert httpx.get(f"{server.url}/api/next").headers["allow"] == "POST"
    assert httpx.get(f"{server.url}/v1/nothing").status_code == 404
    assert httpx.post(f"{server.url}/v1/completions/", json={}).status_code == 404  # no redirect


def test_a_client_that_goes_away_frees_its_rows(server):
    engine = server.engine.models["gpt"]
    body = json.dumps({"prompt": "It was", "n": 8, "max_tokens": 30_000, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}"
    for stream in (body, body.replace("true", "false")):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            kind = "Content-Type: application/json"
            sent = f"{head.replace(str(len(body)), str(len(stream)))}\r\n{kind}\r\n\r\n{stream}"
            connection.sendall(sent.encode())
            wait_until(lambda: len(engine.running) == 8)
        wait_until(lambda: not engine.running and not engine.waiting)


def wait_until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# ---- vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "soft", "encoder", "clip"])
def test_embeddings_are_unit_vectors_of_each_text_alone(client, server, name):
    run = server.runs[name]
    texts = ["a cat", "the dog ran"]
    found = client.embeddings.create(model=name, input=texts)  # in base64, as openai does
    with torch.inference_mode():
        if name == "clip":
            expected = zero_shot.embed_texts(run.model, run.tokenizer, texts)
        else:
            rows = [torch.tensor([[*run.front, *text.encode()]]) for text in texts]
            masks = [torch.arange(row.size(1))[None] >= len(run.front) for row in rows]
            states = [
                mean_state(run.model, {"tokens": row, "mask": mask})
                for row, mask in zip(rows, masks)
            ]
            expected = torch.nn.functional.normalize(torch.cat(states), dim=1)
    rows = torch.tensor([entry.embedding for entry in found.data])
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    numbers = client.embeddings.create(model=name, input=texts[1], encoding_format="float")
    assert numbers.data[0].embedding == pytest.approx(rows[1].tolist(), abs=1e-6)
    with pytest.raises(BadRequestError, match="takes 1 to"):
        client.embeddings.create(model=name, input="a" * 100)


def test_an_embedder_has_several_widths_and_reads_the_start(post, client, server):
    long = "where does a cat sleep at night?"
    found = post("/v1/embeddings", model="embedder", input=[long, "a cat"], dimensions=8)
    ids = torch.tensor([list(long.encode()[:16])])
    with torch.inference_mode():
        expected = server.runs["embedder"].model(ids, torch.tensor([16]), 8)[0]
    assert found["data"][0]["embedding"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found["warnings"] == ["1 of 2 texts were cut to the 16 tokens it reads"]
    whole = client.embeddings.create(model="embedder", input="a cat").data[0].embedding
    assert len(whole) == 32
    with pytest.raises(BadRequestError, match="widths 8, 32"):
        client.embeddings.create(model="embedder", input="a cat", dimensions=9)


def test_classifiers_answer_each_question(post, server):
    found = post("/v1/classify", model="reviews", input="well made")
    run = server.runs["reviews"]
    tokens = torch.tensor([list(b"well made")])
    with torch.inference_mode():
        expected = run.model.predict({"tokens": tokens, "mask": torch.ones_like(tokens).bool()})
    assert [answer["question"] for answer in found["answers"]] == ["label", "tone"]
    for answer in found["answers"]:
        names = small_runs.CLASSES[answer["question"]]
        p = dict(zip(names, expected[answer["question"]][0].tolist()))
        assert {c["label"]: pytest.approx(c["probability"]) for c in answer["classes"]} == p
    red = to_base64(Image.new("RGB", (9, 9), "red"))
    by_picture = post("/v1/classify", model="scripts", image=f"data:image/png;base64,{red}")
    assert len(by_picture["answers"][1]["classes"]) == 3


def test_clip_names_a_picture_and_finds_pictures(post, server, pictures):
    labels = ["red", "blue paper"]
    form = {"image": (pictures / "red.png").read_bytes()}
    answer = httpx.post(f"{server.url}/v1/classify", files=form, data={"model": "clip"})
    assert answer.status_code == 400 and "labels" in answer.text
    red = base64.b64encode(form["image"]).decode()
    found = post("/v1/classify", model="clip", image=red, labels=labels)
    shares = [one["probability"] for one in found["answers"][0]["classes"]]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    by_text = post("/v1/search", query="a red one", n=2)
    assert len(by_text["data"]) == 2 and by_text["data"][0]["score"] >= by_text["data"][1]["score"]
    files = {"image": form["image"], "n": (None, "1")}
    by_picture = httpx.post(f"{server.url}/v1/search", files=files).json()["data"]
    assert [entry["caption"] for entry in by_picture] == ["red.png"]
    assert by_picture[0]["score"] == pytest.approx(1, abs=1e-5)
    assert by_picture[0]["image"].startswith("data:image/png;base64,")


def test_a_search_waits_for_its_pictures_and_leaves_the_work_to_others(monkeypatch):
    async def search_twice():
        done = asyncio.Event()
        built = []

        async def build_index(engine, run, folder):
            built.append(run.name)
            await done.wait()
            return "pictures"

        monkeypatch.setattr(vectors, "build_index", build_index)
        indexes = vectors.Indexes(None)
        run = SimpleNamespace(name="clip")
        first, second = (asyncio.create_task(indexes.get(run)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        done.set()
        return await second, built

    assert asyncio.run(search_twice()) == ("pictures", ["clip"])


def test_the_vectors_of_a_runs_own_pictures_are_kept(server, tmp_path, monkeypatch):
    run = server.runs["clip"]
    images = np.random.default_rng(0).integers(0, 256, (70, 3, 8, 8), dtype=np.uint8)
    split = SimpleNamespace(images=images, captions=[(f"picture {i}",) for i in range(70)])
    data = SimpleNamespace(splits={"train": split}, fingerprint="of these")
    monkeypatch.setattr(run.opened.run, "open_data", lambda: data, raising=False)
    config = SimpleNamespace(cache=str(tmp_path))
    monkeypatch.setattr(run.opened.run, "data", config, raising=False)
    first = asyncio.run(vectors.build_index(server.engine, run, ""))
    expected = zero_shot.embed_images(run.model, images)
    torch.testing.assert_close(first.vectors, expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(zero_shot, "embed_images", None)  # not needed again
    again = asyncio.run(vectors.build_index(server.engine, run, ""))
    assert torch.equal(again.vectors, first.vectors) and again.captions[69] == "picture 69"
    assert np.array_equal(again.image(69), images[69].transpose(1, 2, 0))


# ---- pictures -----------------------------------------------------------------------------------


def pixels_of(images):
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def test_drawings_are_those_of_sample_py(client, server):
    found = client.images.generate(
        model="text2image", prompt="a cat", n=2,
        extra_body={"steps": 3, "seed": 4, "sampler": "euler", "guidance": 2.0},
    )  # fmt: skip
    model = server.runs["text2image"].model
    expected = sheets.illustrate(model, ["a cat"] * 2, 4, steps=3, sampler="euler", guidance=2.0)
    assert np.array_equal(np.stack([*map(image_of, found.data)]), pixels_of(expected))
    found = client.images.generate(model="ddpm", prompt="", extra_body={"steps": 2, "seed": 4})
    sheet = sheets.samples(server.runs["ddpm"].model, 1, "dpm++", 2, 4)
    assert np.array_equal(image_of(found.data[0]), pixels_of(sheet.images)[0])


def test_an_edit_keeps_what_the_mask_keeps(client, pictures):
    image = np.array(Image.open(pictures / "red.png", formats=["PNG"]))
    clear = Image.new("RGBA", (8, 8), "black")  # opaque: keep
    clear.paste((0, 0, 0, 0), (0, 0, 4, 8))
    white = Image.new("L", (8, 8), 0)
    white.paste(255, (0, 0, 4, 8))
    results = []
    for mask in (clear, white):
        file = io.BytesIO()
        mask.save(file, "PNG")
        found = client.images.edit(
            model="text2image", image=(pictures / "red.png").read_bytes(),
            mask=("mask.png", file.getvalue()), prompt="a cat", size="auto", n=1,
            extra_body={"steps": 2, "seed": 1, "sampler": "euler"},
        )  # fmt: skip
        results.append(image_of(found.data[0]))
        assert np.array_equal(results[-1][:, 4:], image[:, 4:])
        assert not np.array_equal(results[-1][:, :4], image[:, :4])
    assert np.array_equal(*results)


# ---- the page of this room ----------------------------------------------------------------------


def examples(language):
    """The code blocks of that language in serve/README.md, for the server of these tests."""
    text = (ROOT / "tinyfm" / "serve" / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_examples_of_the_readme_run(server, pictures, capsys):
    url = "http://127.0.0.1:8000"
    (code,) = examples("py")
    exec(code.replace(url, server.url), {})
    assert capsys.readouterr().out.endswith("a vector of 16 numbers\n")
    lines = [line for block in examples("sh") for line in block.splitlines()]
    curls = [line for line in lines if line.startswith("curl")]
    assert len(curls) == 5
    for curl in curls:
        words = shlex.split(curl.replace(url, server.url))
        words = [word.replace("=@q", "=@red").replace("=@mask", "=@blue") for word in words]
        done = subprocess.run([*words, "-f"], cwd=pictures, capture_output=True, text=True)
        assert done.returncode == 0 and '"error"' not in done.stdout, done.stdout


def test_a_word_that_training_did_not_read_is_named(server, post):
    words = server.runs["clip"].opened.folder / zero_shot.WORDS
    words.write_text('["red", "one"]', encoding="utf-8")
    found = post("/v1/search", query="a red zebra", n=1)
    assert found["warnings"] == ["no training caption has 'a', 'zebra'"]
    words.unlink()


# ---- the command --------------------------------------------------------------------------------


def test_the_command_serves_a_run_and_ends_in_order(tiny_run, tmp_path, capsys):
    process = processes.start(
        ["-m", "tinyfm.serve", tiny_run, "--port", 0, "--grace", 0.2], tmp_path, ROOT, {}
    )
    try:
        process.wait_for("serving at", 60)
        out, _ = process.said()
        url = out.split("serving at ")[1].split()[0]
        assert (
            call(sample, tiny_run, "--prompt", "The", "-n", 2, "--seed", 3, "--max-new-tokens", 9)
            == 0
        )
        texts = capsys.readouterr().out.removesuffix("\n").split("\n----\n")
        asked = {"prompt": "The", "n": 2, "seed": 3, "max_tokens": 9, "echo": True}
        found = httpx.post(f"{url}v1/completions", json=asked, timeout=60).json()
        assert [choice["text"] for choice in found["choices"]] == texts
        assert httpx.get(url).status_code == 200
        endless = {"prompt": "The", "max_tokens": 30_000, "stream": True, "n": 4}
        with httpx.stream("POST", f"{url}v1/completions", json=endless, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(process.running.pid, signal.SIGTERM)
            assert [*lines][-2:] == ["data: [DONE]", ""]  # its last event says what happened
        assert process.wait(20) == 0, process.said()
    finally:
        process.running.kill()


@pytest.mark.usefixtures("no_forecast")
def test_an_adapted_run_is_served_with_its_base_or_as_itself(options, tiny_run, tmp_path, capsys):
    lora = tmp_path / "lora"
    adapted = ["--init-from", tiny_run, "--adapt", "lora", "--optim.lr", 0.1, "--out", lora]
    assert call(train, *options[12:], *adapted) == 0  # without the sizes, which are the base's
    capsys.readouterr()
    asked = (lora, "--prompt", "The", "--seed", 2, "--max-new-tokens", 9)
    assert call(sample, *asked) == 0
    expected = capsys.readouterr().out.removesuffix("\n")
    base, with_lora, itself = (
        command.open_runs(command.Options((str(run),), adapter=adapters))[0]
        for run, adapters in ((tiny_run, ()), (tiny_run, (str(lora),)), (lora, ()))
    )
    texts = [
        "The" + text_of(run, "The", 2, max_new_tokens=9)[0] for run in (base, with_lora, itself)
    ]
    assert texts[0] != expected and texts[1:] == [expected, expected]
    with pytest.raises(ValueError, match="--pictures needs"):
        command.open_runs(command.Options((str(tiny_run),), pictures=str(tmp_path)))
    with pytest.raises(ValueError, match="no folder"):
        command.Options((str(tiny_run),), pictures=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="fits none"):
        command.open_runs(command.Options((str(tiny_run),), adapter=(str(tiny_run),)))
