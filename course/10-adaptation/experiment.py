"""What does each way of adapting gain on new texts, and what does it lose on the old ones?

A small GPT learns prose, the documentation of Python. Each method then trains it on programs, the
sources of Python's standard library. A LoRA can also be added in part: its weight is varied.
"""

from __future__ import annotations

import copy
import math
import pydoc_data.topics
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyfm import adapt
from tinyfm.adapt import AdapterConfig
from tinyfm.adapt.lora import set_weights
from tinyfm.adapt.soft_prompt import prepend, prompt_ids
from tinyfm.gpt import GPT, GPTConfig

VARIANTS = ("rank 4", "rank 1", "rank 2", "rank 8", "rank 16")
METHODS = ("full", "lora", "prompt", "bias")
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of the LoRA, after training
UNITS = {
    "base_prose": "bits per byte",
    "base_code": "bits per byte",
    **{f"{method}_{kind}": "bits per byte" for method in METHODS for kind in ("prose", "code")},
    **{f"{method}_trained": "parameters" for method in METHODS},
    "lora_share": "% of the gain of all weights",
    "half_gain": "% of the LoRA's gain",
    "half_loss": "% of the LoRA's loss",
    "merged_difference": "logit",
}
MODULES = ("argparse", "configparser", "difflib", "doctest", "inspect", "pathlib", "pydoc")
MODULES += ("subprocess", "tarfile", "turtle", "typing", "zipfile")
CONFIG = GPTConfig(256, context_length=72, n_layer=3, n_head=2, d_model=64)
ROWS = 16  # of a batch
BYTES = 64  # of a row, and the next one
STEPS = 500  # on prose
ADAPT_STEPS = 120  # on programs
LEARNING_RATES = {"full": 1e-3, "lora": 5e-3, "prompt": 3e-2, "bias": 1e-2}


def prose() -> bytes:
    topics = pydoc_data.topics.topics
    return "".join(topics[name] for name in sorted(topics)).encode()


def programs() -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    files = []
    for name in MODULES:
        path = folder / f"{name}.py"
        files.append(path if path.is_file() else folder / name / "__init__.py")
    return b"".join(path.read_bytes() for path in files)


def split(text: bytes) -> tuple[Tensor, Tensor]:
    """A training and a test part: of every 20 pieces of 4,096 bytes, the last is for the test."""
    pieces = [text[i : i + 4096] for i in range(0, len(text), 4096)]
    parts = (b"".join(p for i, p in enumerate(pieces) if (i % 20 == 19) == test) for test in (0, 1))
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)


def batches(text: Tensor, generator: torch.Generator, steps: int):
    """Random rows (ROWS, BYTES + 1) of a text."""
    for _ in range(steps):
        start = torch.randint(0, len(text) - BYTES, (ROWS, 1), generator=generator)
        yield {"tokens": text[start + torch.arange(BYTES + 1)]}


def train(model: nn.Module, text: Tensor, steps: int, lr: float, seed: int, say: str) -> None:
    """AdamW; the learning rate rises over 20 steps and then falls as a cosine, to a tenth."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.0)
    ids = prompt_ids(model)
    model.train()
    for step, batch in enumerate(batches(text, generator, steps)):
        wave = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * wave
        loss, _ = model.loss(prepend(batch, ids) if ids else batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 60 == 59:
            print(
                f"{say}: step {step + 1}, {loss.item() / math.log(2):.2f} bits per byte", flush=True
            )


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor) -> float:
    """Of a test text, cut into rows: the mean of up to 12 batches."""
    model.eval()
    count = min(12, len(text) // (ROWS * (BYTES + 1)))
    rows = text[: count * ROWS * (BYTES + 1)].view(count, ROWS, BYTES + 1)
    ids = prompt_ids(model)
    total = 0.0
    for tokens in rows:
        batch = {"tokens": tokens}
        total += model.loss(prepend(batch, ids) if ids else batch)[0].item()
    return total / len(rows) / math.log(2)


def measure(seed: int, variant: str) -> dict:
    rank = int(variant.split()[1])
    torch.manual_seed(seed)
    prose_train, prose_test = split(prose())
    code_train, code_test = split(programs())
    base = GPT(CONFIG)
    train(base, prose_train, STEPS, 3e-3, seed, "base")
    result = {
        "base_prose": bits_per_byte(base, prose_test),
        "base_code": bits_per_byte(base, code_test),
    }
    config = AdapterConfig(rank=rank, alpha=2 * rank, prompt_tokens=8)
    for method in METHODS:
        model = copy.deepcopy(base)
        adapt.apply(model, method, config)
        result[f"{method}_trained"] = adapt.trained(model)[0]
        train(model, code_train, ADAPT_STEPS, LEARNING_RATES[method], seed, method)
        result[f"{method}_prose"] = bits_per_byte(model, prose_test)
        result[f"{method}_code"] = bits_per_byte(model, code_test)
        if method == "lora":
            result |= in_part(model, prose_test, code_test)
    gain = result["base_code"] - result["lora_code"]
    result["lora_share"] = 100 * gain / (result["base_code"] - result["full_code"])
    return result


@torch.no_grad()
def in_part(model: GPT, prose_test: Tensor, code_test: Tensor) -> dict:
    """The LoRA of a model with other weights, and how far the merged model is from it."""
    on_prose = []
    on_code = []
    for weight in WEIGHTS:
        set_weights(model, {"default": weight})
        on_prose.append(bits_per_byte(model, prose_test))
        on_code.append(bits_per_byte(model, code_test))
    none, half, whole = (WEIGHTS.index(weight) for weight in (0.0, 0.5, 1.0))
    gain = (on_code[none] - on_code[half]) / (on_code[none] - on_code[whole])
    loss = (on_prose[half] - on_prose[none]) / (on_prose[whole] - on_prose[none])

    set_weights(model, {"default": 1.0})
    tokens = code_test[: 4 * BYTES].view(4, BYTES)
    adapted = model(tokens)
    adapt.merge(model)
    difference = (model(tokens) - adapted).abs().max().item()
    return {
        "weighted_prose": on_prose,
        "weighted_code": on_code,
        "half_gain": 100 * gain,
        "half_loss": 100 * loss,
        "merged_difference": difference,
    }


NAMES = {"full": "all weights", "lora": "LoRA", "prompt": "soft prompt", "bias": "gains of norms"}


def draw(figure, results) -> None:
    axes = figure.subplots()
    for i, result in enumerate(results):
        first = i == 0
        axes.plot(
            result["weighted_prose"],
            result["weighted_code"],
            color="C1",
            alpha=0.6,
            linewidth=1.5,
            marker=".",
            label=f"LoRA with weights {WEIGHTS[0]:g} to {WEIGHTS[-1]:g}" if first else None,
        )
        points = [("base", "the base", "C6", "s")]
        points += [(m, NAMES[m], f"C{k}", "o") for k, m in enumerate(METHODS)]
        for name, label, colour, marker in points:
            axes.plot(
                [result[f"{name}_prose"]],
                [result[f"{name}_code"]],
                marker,
                color=colour,
                markersize=9,
                label=label if first else None,
            )
    axes.set_xlabel("prose, what the base had learnt (bits per byte; left is better)")
    axes.set_ylabel("programs, the new task\n(bits per byte; lower is better)")
    axes.legend(loc="upper right")
