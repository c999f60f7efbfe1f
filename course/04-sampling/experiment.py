"""What does the temperature trade for what, and what does the cache save?

A small GPT learns the bytes of Python's documentation. It then continues pages that were held out,
at several temperatures. Words that the documentation nowhere has are misspelled; runs of eight
characters that recur within a text are repetition.
"""

from __future__ import annotations

import math
import random
import re
import time
from dataclasses import replace
from pydoc_data.topics import topics
from statistics import median

import torch

from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT, GPTConfig

VARIANTS = ("all tokens", "top-p 0.9", "top-k 5", "min-p 0.1")
UNITS = {
    "loss": "bits per byte",
    "words_cool": "% of words",
    "words_plain": "% of words",
    "words_hot": "% of words",
    "repeats_greedy": "% of runs",
    "repeats_plain": "% of runs",
    "positions_cached": "positions",
    "positions_again": "positions",
}
FILTERS = {
    "all tokens": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 5": {"top_k": 5},
    "min-p 0.1": {"min_p": 0.1},
}
CONFIG = GPTConfig(256, context_length=96, n_layer=2, n_head=3, d_model=96)
ROWS = 8  # of a batch
STEPS = 400
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PROMPTS = 24
PROMPT_BYTES = 16
NEW = 80  # tokens to generate
LENGTHS = (20, 50, 100, 200)  # new tokens, for the times


def split(seed: int) -> tuple[bytes, list[bytes]]:
    """Text to train on, and held-out pages; all pages of the documentation in random order."""
    pages = [topics[name].encode() for name in sorted(topics)]
    random.Random(seed).shuffle(pages)
    held_out = [page for page in pages[:20] if len(page) >= 400]
    return b"".join(pages[20:]), held_out


def train(model: GPT, text: bytes, seed: int) -> None:
    """AdamW; the rate rises over 20 steps and then falls as a cosine, to a tenth."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    T = CONFIG.context_length
    for step in range(STEPS):
        wave = 0.55 + 0.45 * math.cos(math.pi * step / STEPS)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * wave
        starts = torch.randint(0, len(data) - T, (ROWS, 1), generator=generator)
        loss, _ = model.loss({"tokens": data[starts + torch.arange(T + 1)]})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            bits = loss.item() / math.log(2)
            print(f"step {step + 1} of {STEPS}, {bits:.2f} bits per byte", flush=True)


@torch.no_grad()
def bits_per_byte(model: GPT, pages: list[bytes]) -> float:
    """The mean over the last bytes of each page, as many as fit into the context."""
    rows = torch.tensor([list(page[-CONFIG.context_length :]) for page in pages])
    return model.loss({"tokens": rows})[0].item() / math.log(2)


def share_of_words(texts: list[str], known: set[str]) -> float:
    """Percentage of the words of three letters or more that are known; a last one may be cut, and
    does not count."""
    words = [word for text in texts for word in re.findall(r"[A-Za-z]{3,}(?=[^A-Za-z])", text)]
    return 100 * sum(word.lower() in known for word in words) / max(1, len(words))


def share_of_repeats(rows: list[list[int]], n: int = 8) -> float:
    """Percentage of the runs of n tokens that occurred before in the same row."""
    runs = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    return 100 * (1 - sum(len(set(r)) for r in runs) / sum(map(len, runs)))


def count_positions(model: GPT, prompt: list[int], use_cache: bool) -> int:
    """Positions that go through the model to generate NEW tokens."""
    count = 0
    hidden = model.hidden

    def counting(tokens, cache):
        nonlocal count
        count += tokens.size(1)
        return hidden(tokens, cache)

    model.hidden = counting
    complete(model, [prompt], Sampling(max_new_tokens=NEW), use_cache)
    del model.hidden  # the method of the class counts again
    return count


def milliseconds_per_token(prompt: list[int], use_cache: bool) -> list[float]:
    """For each of LENGTHS; of an untrained model of the same size with room for them."""
    model = GPT(replace(CONFIG, context_length=512))
    times = []
    for n in (LENGTHS[0], *LENGTHS):  # the first one warms up
        start = time.perf_counter()
        complete(model, [prompt], Sampling(max_new_tokens=n, temperature=0), use_cache)
        times.append(1000 * (time.perf_counter() - start) / n)
    return times[1:]


def measure(seed: int, variant: str) -> dict:
    text, pages = split(seed)
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    train(model, text, seed)
    model.eval()
    known = {word.lower() for page in topics.values() for word in re.findall("[A-Za-z]+", page)}
    r = random.Random(seed)
    prompts = []
    for i in range(PROMPTS):
        page = pages[i % len(pages)]
        start = r.randint(0, len(page) - PROMPT_BYTES)
        prompts.append(list(page[start : start + PROMPT_BYTES]))

    result = {"loss": bits_per_byte(model, pages), "words": [], "repeats": []}
    settings = Sampling(max_new_tokens=NEW, seed=seed, **FILTERS[variant])
    for temperature in TEMPERATURES:
        rows = complete(model, prompts, replace(settings, temperature=temperature))
        texts = [bytes(row).decode("utf-8", errors="replace") for row in rows]
        result["words"].append(share_of_words(texts, known))
        result["repeats"].append(share_of_repeats(rows))
        print(f"temperature {temperature}: {texts[0][:60]!r}", flush=True)
    for name, temperature in (("cool", 0.5), ("plain", 1.0), ("hot", 1.5)):
        result[f"words_{name}"] = result["words"][TEMPERATURES.index(temperature)]
    result["repeats_greedy"] = result["repeats"][0]
    result["repeats_plain"] = result["repeats"][TEMPERATURES.index(1.0)]

    prompt = prompts[0]
    result["positions_cached"] = count_positions(model, prompt, True)
    result["positions_again"] = count_positions(model, prompt, False)
    result["ms_cached"] = milliseconds_per_token(prompt, True)
    result["ms_again"] = milliseconds_per_token(prompt, False)
    return result


def draw(figure, results) -> None:
    left, right = figure.subplots(1, 2)
    for number, result in enumerate(results):

        def label(text: str, first: bool = number == 0) -> str | None:
            return text if first else None

        left.plot(TEMPERATURES, result["words"], "o-", color="C0", label=label("known words"))
        left.plot(TEMPERATURES, result["repeats"], "s--", color="C1", label=label("repetition"))
    # Times differ on a busy machine: the median of the results is shown.
    again = [median(times) for times in zip(*(result["ms_again"] for result in results))]
    cached = [median(times) for times in zip(*(result["ms_cached"] for result in results))]
    right.plot(LENGTHS, again, "s--", color="C3", label="read again")
    right.plot(LENGTHS, cached, "o-", color="C2", label="cache")
    left.set(xlabel="temperature", ylabel="% of words, % of runs", ylim=(0, 105))
    right.set(xlabel="new tokens", ylabel="milliseconds per token", ylim=(0, None))
    left.legend()
    right.legend()
