"""Can a model copy what it has seen once? How many layers does it need, and how far must it see?

Each row repeats a random passage until it is full: after the first round a reader who looks back
knows each next token. A passage is new in every row, so nothing can be learnt by heart, and its
length varies, so the place to look at is not at a fixed distance. Three models are compared: one
layer, two layers, and two layers whose attention reaches back by fewer tokens than a passage has.
"""

import math
import time

import torch

from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training.optim import OptimConfig, build_optimizers, lr_factor, set_lr

TOKENS = 48  # of a row
SHORTEST = 12  # passage
LONGEST = 24
WINDOW = 8
STEPS = 400
EVERY = 20  # steps between two measurements
ROWS = 32
MODELS = {
    "one_layer": {"n_layer": 1},
    "two_layers": {"n_layer": 2},
    "short_sight": {"n_layer": 2, "window": WINDOW},
}
LABELS = {
    "one_layer": "one layer",
    "two_layers": "two layers",
    "short_sight": f"two layers, window {WINDOW}",
}
UNITS = {
    "one_layer_repeat": "nats per token",
    "two_layers_repeat": "nats per token",
    "short_sight_repeat": "nats per token",
    "two_layers_new": "nats per token",
    "uniform_guess": "nats per token",
}
VARIANTS = ("32 tokens", "24 tokens", "28 tokens", "40 tokens")  # sizes of the vocabulary


def draw_rows(vocab_size: int, rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of a repeated passage: {"tokens": (rows, TOKENS + 1), "mask": the repeated targets}.

    The first token of the second round is no target that counts: nothing announces it.
    """
    length = torch.randint(SHORTEST, LONGEST + 1, (rows, 1), generator=generator)
    fresh = torch.randint(vocab_size, (rows, TOKENS + 1), generator=generator)
    place = torch.arange(TOKENS + 1)
    tokens = fresh.gather(1, place % length)
    return {"tokens": tokens, "mask": place[1:] > length}


@torch.no_grad()
def evaluate(model: GPT, batch: dict[str, torch.Tensor]) -> float:
    return model.loss(batch)[0].item()


def train(name: str, vocab_size: int, seed: int) -> tuple[list[float], float]:
    """Losses on the repeated tokens, every EVERY steps; the last one on the first round."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size, TOKENS, n_head=2, d_model=64, **MODELS[name])
    model = GPT(config)
    optim = OptimConfig()
    optimizers = build_optimizers(model, optim)
    generator = torch.Generator().manual_seed(seed)
    held_out = draw_rows(vocab_size, 256, torch.Generator().manual_seed(1000 + seed))
    curve = [evaluate(model, held_out)]
    said = time.monotonic()
    for step in range(STEPS):
        batch = draw_rows(vocab_size, ROWS, generator)
        loss, _ = model.loss({"tokens": batch["tokens"]})
        loss.backward()
        set_lr(optimizers, lr_factor(step, STEPS, optim))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            curve.append(evaluate(model, held_out))
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{LABELS[name]}: step {step + 1} of {STEPS}, {curve[-1]:.2f} nats", flush=True)
    first_round = {"tokens": held_out["tokens"], "mask": ~held_out["mask"]}
    return curve, evaluate(model, first_round)


def measure(seed: int, variant: str) -> dict:
    vocab_size = int(variant.split()[0])
    result = {"uniform_guess": math.log(vocab_size)}
    for name in MODELS:
        curve, new = train(name, vocab_size, seed)
        result[f"{name}_repeat"] = curve[-1]
        result[f"{name}_curve"] = curve
        if name == "two_layers":
            result["two_layers_new"] = new
    return result


def draw(figure, results: list[dict]) -> None:
    axes = figure.subplots()
    steps = range(0, STEPS + 1, EVERY)
    colours = {name: f"C{i}" for i, name in enumerate(MODELS)}
    for name, colour in colours.items():
        for i, result in enumerate(results):
            label = LABELS[name] if i == 0 else None
            axes.plot(steps, result[f"{name}_curve"], color=colour, label=label, linewidth=1.5)
    guess = results[0]["uniform_guess"]
    axes.axhline(guess, color="black", linestyle=":", linewidth=1.5, label="uniform guess")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss on repeated tokens [nats per token]")
    axes.set_xlim(0, STEPS)
    axes.set_ylim(0, 1.2 * guess)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.3), framealpha=0.9)
    rows = "one line a seed" if len(results) > 1 else "one seed"
    axes.set_title(f"Who can copy a passage it has seen once? ({rows})", loc="left")
