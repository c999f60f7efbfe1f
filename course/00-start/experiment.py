"""Does this machine compute what ours computes? A very small model learns to predict bytes.

The text is the documentation of Python's language, which is installed with Python.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from pydoc_data.topics import topics

import torch

from tinyfm.gpt import GPT, GPTConfig

VARIANTS = ("400 steps", "300 steps", "500 steps", "600 steps")
UNITS = {
    "untrained": "bits per byte",
    "counting": "bits per byte",
    "trained": "bits per byte",
}
CONFIG = GPTConfig(256, context_length=64, n_layer=2, n_head=2, d_model=64)
ROWS = 16  # of a batch
RATE = 4e-3


def split(seed: int) -> tuple[bytes, bytes]:
    """Nine of ten pages to learn from, and the others to measure on."""
    pages = [topics[name].encode() for name in sorted(topics)]
    random.Random(seed).shuffle(pages)
    cut = len(pages) // 10
    return b"".join(pages[cut:]), b"".join(pages[:cut])


def rows(text: bytes) -> torch.Tensor:
    """The text in rows (N, context_length + 1)."""
    T = CONFIG.context_length + 1
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return data[: len(data) // T * T].view(-1, T)


@torch.no_grad()
def bits_per_byte(model: GPT, tokens: torch.Tensor) -> float:
    losses = [model.loss({"tokens": part})[0].item() * len(part) for part in tokens.split(64)]
    return sum(losses) / len(tokens) / math.log(2)


def counting_bits(text: bytes, held_out: bytes) -> float:
    """Bits per byte of a model that knows how often each byte occurs, and nothing else."""
    counts = Counter(text)
    total = len(text) + 256  # each byte is counted once more, so that none has probability 0
    return sum(-math.log2((counts[b] + 1) / total) for b in held_out) / len(held_out)


def measure(seed: int, variant: str) -> dict:
    steps = int(variant.split()[0])
    text, held_out = split(seed)
    data, validation = rows(text), rows(held_out)[:256]
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    result = {"steps": [0], "curve": [bits_per_byte(model, validation)]}
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * min(step / 20, 1.05 - step / steps)
        batch = data[torch.randint(0, len(data), (ROWS,), generator=generator)]
        loss, _ = model.loss({"tokens": batch})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            result["steps"].append(step)
            result["curve"].append(bits_per_byte(model, validation))
            print(f"step {step}/{steps}  {result['curve'][-1]:.3f} bits per byte", flush=True)
    result["untrained"] = result["curve"][0]
    result["counting"] = counting_bits(text, held_out)
    result["trained"] = result["curve"][-1]
    return result


def draw(figure, results) -> None:
    axes = figure.subplots()
    for number, result in enumerate(results):

        def label(text: str, first: bool = number == 0) -> str | None:
            return text if first else None

        axes.plot(result["steps"], result["curve"], "o-", color="C0", label=label("model"))
        axes.axhline(result["counting"], ls="--", color="C1", label=label("counting bytes"))
    axes.set(xlabel="step", ylabel="bits per byte of held-out text", ylim=(0, None))
    axes.legend()
