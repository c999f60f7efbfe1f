"""How many bits does a hidden byte cost, by what the model may look at?

Three small models learn the documentation of Python, byte by byte, from the same rows: a GPT, an
encoder and an XLNet. Then bytes of held-out text are hidden, from one in sixteen to all but one.
The encoder guesses each of them alone. The XLNet does that too, or it guesses them one after the
other, each time with the ones before in sight. Last, it reads the text forwards and backwards.
"""

import math
import pydoc_data.topics

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.batches.masked import MaskedConfig, Vocabulary, hide
from tinyfm.batches.permuted import PermutedConfig, draw_order
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.tokenizer import ByteTokenizer
from tinyfm.training.optim import OptimConfig, build_optimizers, lr_factor, scale_and_clip, set_lr
from tinyfm.xlnet import XLNet, XLNetConfig

VARIANTS = ("15% hidden", "5% hidden", "30% hidden", "60% hidden")  # in the encoder's training
UNITS = {
    "gpt_forwards": "bits per byte",
    "xlnet_forwards": "bits per byte",
    "xlnet_backwards": "bits per byte",
    "encoder_eighth": "bits per byte",
    "xlnet_eighth": "bits per byte",
    "encoder_half": "bits per byte",
    "xlnet_half": "bits per byte",
    "xlnet_half_in_turn": "bits per byte",
}
BYTES = ByteTokenizer()
V = 258  # 256 bytes, the end of a text, the mask
T = 64  # bytes of a row
ROWS = 16  # of a batch
STEPS = 600
TESTED = 128  # rows of test
HIDDEN = (4, 8, 16, 32, 48, 63)  # bytes of a test row
SIZES = {"n_layer": 2, "n_head": 2, "d_model": 64}
OPTIM = OptimConfig(lr=0.012, muon_lr=0.02, warmup_steps=10, decay_fraction=0.6)


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train and to test on: of 20 pieces of 4,096 bytes, the last is for the test."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics)).encode()
    pieces = [text[i : i + 4096] for i in range(0, len(text), 4096)]
    parts = (b"".join(p for i, p in enumerate(pieces) if (i % 20 == 19) == test) for test in (0, 1))
    return tuple(np.frombuffer(part, dtype=np.uint8).astype(np.int64) for part in parts)


# ---- batches, each a function of the step's random numbers --------------------------------------


def plain(rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
    """For the GPT: the end of a text before each row, so that all T bytes are predicted."""
    return {"tokens": F.pad(torch.from_numpy(rows), (1, 0), value=BYTES.eot)}


def masked(share: float):
    """For the encoder."""
    config = MaskedConfig(hidden=share)
    vocabulary = Vocabulary(BYTES, V)
    everywhere = np.ones(T, dtype=bool)

    def batch(rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        pairs = [hide(row, everywhere, vocabulary, config, rng) for row in rows]
        tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*pairs))
        return {"tokens": tokens, "targets": targets}

    return batch


def permuted(rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
    """For the XLNet: the last part of a random order, long or short, is predicted."""
    everywhere = np.ones(T, dtype=bool)
    orders = []
    for _ in rows:
        config = PermutedConfig(one_in=int(rng.choice((1, 2, 3, 6))))
        orders.append(draw_order(everywhere, config, rng))
    return ordered(torch.from_numpy(rows), torch.from_numpy(np.stack(orders)))


def ordered(tokens: Tensor, order: Tensor) -> dict[str, Tensor]:
    return {"tokens": tokens, "order": order, "targets": tokens.where(order > 0, -100)}


# ---- training and measures ----------------------------------------------------------------------


def train(model: nn.Module, text: np.ndarray, batch, seed: int) -> None:
    """Muon and AdamW at the rates of the presets, on the same rows for each model."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(text) - T, size=(STEPS, ROWS, 1))
    optimizers = build_optimizers(model, OPTIM)
    name = type(model).__name__
    for step in range(STEPS):
        set_lr(optimizers, lr_factor(step, STEPS, OPTIM))
        loss, _ = model.loss(batch(text[starts[step] + np.arange(T)], rng))
        loss.backward()
        scale_and_clip(model, 1.0, OPTIM.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 200 == 199:
            print(f"{name}: step {step + 1}, {loss.item() / math.log(2):.2f} bits", flush=True)


def bits(logits: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(logits, targets).item() / math.log(2)


@torch.no_grad()
def bits_of_order(model: XLNet, rows: Tensor, order: Tensor) -> float:
    """Per byte whose order is above 0."""
    batch = ordered(rows, order)
    places, logits = model.predictions(batch)
    return bits(logits, batch["targets"].flatten()[places])


@torch.no_grad()
def bits_of_masks(model: Encoder, rows: Tensor, there: Tensor) -> float:
    """Per byte that is hidden, all of them by the mask."""
    return bits(model(rows.masked_fill(there, V - 1))[there], rows[there])


def measure(seed: int, variant: str) -> dict:
    torch.manual_seed(seed)
    share = int(variant.split("%")[0]) / 100
    text, test = read_text()
    gpt = GPT(GPTConfig(V, T + 1, **SIZES))
    encoder = Encoder(EncoderConfig(V, T, **SIZES))
    xlnet = XLNet(XLNetConfig(V, T, **SIZES))
    train(gpt, text, plain, seed)
    train(encoder, text, masked(share), seed)
    train(xlnet, text, permuted, seed)
    for model in (gpt, encoder, xlnet):
        model.eval()

    # What is hidden is the same for all models and seeds.
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(test) - T, size=(TESTED, 1))
    rows = torch.from_numpy(test[starts + np.arange(T)])
    turns = torch.from_numpy(np.stack([rng.permutation(T) for _ in range(TESTED)]))
    curves = {"encoder": [], "xlnet": [], "xlnet_in_turn": []}
    for count in HIDDEN:
        order = (turns - (T - 1 - count)).clamp(min=0)  # the last `count` of each permutation
        curves["encoder"].append(bits_of_masks(encoder, rows, order > 0))
        curves["xlnet"].append(bits_of_order(xlnet, rows, (order > 0).long()))
        curves["xlnet_in_turn"].append(bits_of_order(xlnet, rows, order))
    forwards = torch.arange(T).expand(TESTED, T)
    with torch.no_grad():
        logits = gpt(F.pad(rows, (1, 0), value=BYTES.eot)[:, :-1])
    eighth, half = HIDDEN.index(T // 8), HIDDEN.index(T // 2)
    return {
        "gpt_forwards": bits(logits[:, 1:].flatten(0, 1), rows[:, 1:].flatten()),
        "xlnet_forwards": bits_of_order(xlnet, rows, forwards),
        "xlnet_backwards": bits_of_order(xlnet, rows, forwards.flip(1)),
        "encoder_eighth": curves["encoder"][eighth],
        "xlnet_eighth": curves["xlnet"][eighth],
        "encoder_half": curves["encoder"][half],
        "xlnet_half": curves["xlnet"][half],
        "xlnet_half_in_turn": curves["xlnet_in_turn"][half],
        **{f"{name}_curve": curve for name, curve in curves.items()},
    }


NAMES = {
    "encoder": "encoder, each alone",
    "xlnet": "XLNet, each alone",
    "xlnet_in_turn": "XLNet, one after the other",
}


def draw(figure, results) -> None:
    axes = figure.subplots()
    shares = [100 * count / T for count in HIDDEN]
    for i, result in enumerate(results):
        for k, (name, label) in enumerate(NAMES.items()):
            axes.plot(
                shares,
                result[f"{name}_curve"],
                marker=".",
                color=f"C{k}",
                alpha=0.7,
                label=None if i else label,
            )
        for k, name in enumerate(("gpt_forwards", "xlnet_forwards", "xlnet_backwards")):
            label = name.replace("gpt", "GPT,").replace("xlnet", "XLNet,").replace("_", " ")
            axes.plot(
                [100],
                [result[name]],
                "o><"[k],
                color=f"C{k + 3}",
                markersize=8,
                clip_on=False,
                label=None if i else label,
            )
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the text that is hidden (%)")
    axes.set_ylabel("bits per hidden byte (lower is better)")
    axes.legend(loc="upper left")
