"""Do small runs predict the loss of a larger one, and how should a budget be divided?

Six GPTs of growing width are trained on the source code of Python's library, each on 40 bytes for
every parameter of its block. A power law is fitted to their losses, and a larger run tests it. Then
one budget of FLOPs is spent in six ways: from a small model that reads much to a large one that
reads little.
"""

import time

import numpy as np
import torch
from torch import Tensor

from data import stdlib
from data.splits import TRAIN, VAL
from tinyfm.calc.scaling_laws import fit_power_law
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training.optim import OptimConfig, build_optimizers, lr_factor, scale_and_clip, set_lr

VARIANTS = ("context 64", "context 16", "context 32", "context 128")
UNITS = {
    "exponent": "none",
    "floor": "nats a byte",
    "predicted": "nats a byte",
    "measured": "nats a byte",
    "error": "%",
    "loss_best": "nats a byte",
    "loss_width_8": "nats a byte",
    "loss_width_64": "nats a byte",
    "best_ratio": "bytes a parameter",
}
WIDTHS = (8, 12, 16, 20, 24, 32)  # the law is fitted to these
HELD_OUT = 40  # and tested by this one
DIVIDED = (8, 12, 16, 24, 40, 64)  # widths that spend the same budget
BUDGET = 5e9  # FLOPs
RATIO = 40  # bytes of training for each parameter of the block
BATCH = 256  # bytes in a step of the smallest models
EVALUATED = 60_000  # bytes of validation
OPTIM = OptimConfig(lr=0.012, muon_lr=0.017, warmup_steps=10)


def read_library(context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of context + 1 bytes for training and for validation, int64 (n, context + 1).

    The last byte of a row is the first of the next one in the text. Rows are in random order; the
    seed decides that of training.
    """
    found = list(stdlib.documents())
    rows = []
    for split, order in ((TRAIN, seed), (VAL, 0)):
        text = "".join(document.text for document in found if document.split == split)
        tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        cut = tokens.unfold(0, context + 1, context)  # (n, context + 1)
        shuffled = torch.randperm(len(cut), generator=torch.Generator().manual_seed(order))
        rows.append(cut[shuffled].long())
    train, val = rows
    return train, val[: EVALUATED // context]


def make_model(width: int, context: int) -> GPT:
    return GPT(GPTConfig(256, context, n_layer=1, n_head=2, d_model=width, d_ff=3 * width))


def parameters_of_block(model: GPT) -> int:
    return sum(p.numel() for p in model.blocks.parameters())


def train(
    width: int, tokens: int, data: tuple[Tensor, Tensor], context: int, seed: int
) -> tuple[int, float]:
    """(FLOPs of training, loss in nats a byte) of a GPT that reads each of `tokens` bytes once."""
    start = time.monotonic()
    torch.manual_seed(seed)
    model = make_model(width, context)
    rows, val = data
    batch = round(BATCH / context * max(1, width / 16) ** 1.3)  # rows
    steps = tokens // (context * batch)
    optimizers = build_optimizers(model, OPTIM)
    for step in range(steps):
        set_lr(optimizers, lr_factor(step, steps, OPTIM))
        loss, _ = model.loss({"tokens": rows[step * batch : (step + 1) * batch]})
        model.zero_grad()
        loss.backward()
        scale_and_clip(model, 1.0, OPTIM.clip)
        for optimizer in optimizers:
            optimizer.step()
    with torch.inference_mode():
        parts = [model.loss({"tokens": part})[0] for part in val.chunk(8)]
    loss = float(torch.stack(parts).mean())
    flops = steps * batch * model.flops_per_row()
    seconds = time.monotonic() - start
    print(f"width {width}, {tokens:,} bytes: {flops:.2g} FLOPs, loss {loss:.3f}, {seconds:.0f} s")
    return flops, loss


def measure(seed: int, variant: str) -> dict:
    context = int(variant.split()[1])
    data = read_library(context, seed)
    runs = []
    for width in (*WIDTHS, HELD_OUT):
        tokens = RATIO * parameters_of_block(make_model(width, context))
        runs.append(train(width, tokens, data, context, seed))
    flops = [spent for spent, _ in runs]
    losses = [loss for _, loss in runs]
    law = fit_power_law(np.array(flops[:-1], dtype=float), np.array(losses[:-1]))
    predicted = float(law.loss(flops[-1]))

    divided = []
    ratios = []
    for width in DIVIDED:
        model = make_model(width, context)
        tokens = int(BUDGET / model.flops_per_row() * context)
        ratios.append(tokens / parameters_of_block(model))
        _, loss = train(width, tokens, data, context, seed)
        divided.append(loss)
    return {
        "exponent": law.alpha,
        "floor": law.E,
        "predicted": predicted,
        "measured": losses[-1],
        "error": 100 * (predicted / losses[-1] - 1),
        "loss_best": min(divided),
        "loss_width_8": divided[0],
        "loss_width_64": divided[-1],
        "best_ratio": ratios[int(np.argmin(divided))],
        "flops": flops,
        "losses": losses,
        "ratios": ratios,
        "divided": divided,
    }


def draw(figure, results) -> None:
    left, right = figure.subplots(1, 2)
    for i, result in enumerate(results):
        flops = np.array(result["flops"], dtype=float)
        losses = np.array(result["losses"])
        law = fit_power_law(flops[:-1], losses[:-1])
        along = np.geomspace(flops[0] / 1.5, flops[-1] * 1.5)
        first = i == 0  # one entry of the legend for all seeds
        left.plot(along, law.loss(along), color="C0", lw=1, label="fitted law" if first else None)
        label = "fitted to" if first else None
        left.plot(flops[:-1], losses[:-1], "o", color="C0", ms=5, label=label)
        label = "held out" if first else None
        left.plot(flops[-1:], losses[-1:], "s", color="C1", ms=7, label=label)
        right.plot(result["ratios"], result["divided"], "o-", color="C2", lw=1, ms=5)
    lowest = np.min([result["divided"] for result in results], axis=0)
    for width, ratio, loss in zip(DIVIDED, results[0]["ratios"], lowest):
        where = {"textcoords": "offset points", "xytext": (0, -16), "ha": "center", "fontsize": 10}
        right.annotate(f"{width}", (ratio, loss), **where)
    left.set(xlabel="training compute (FLOPs)", ylabel="validation loss (nats a byte)")
    left.set(xscale="log", title="A law, and a test of it")
    right.set(xlabel="training bytes for each parameter", ylabel="validation loss (nats a byte)")
    right.set(xscale="log", title="One budget; numbers are widths")
    right.margins(y=0.12)
    left.legend()
