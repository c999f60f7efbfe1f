"""Compare the training speed of CLIP with transformers; measure the memory of the contrastive loss.

    python benchmarks/clip.py speed [--batch 16] [--repeats 5]
    python benchmarks/clip.py memory [--batch 8192] [--rows 512]

speed: images/s of whole training steps (forward, loss, backward, fused AdamW) at the shape of
ViT-B/32, 224 x 224 pixels. Both libraries have the same random weights and inputs and take turns;
the medians are printed. Once with captions of 8 to 24 tokens in rows of 77, as CLIP's own
tokenizer pads them, and once with rows of 32 tokens that are all text.

memory: the symmetric loss of --batch pairs of unit vectors of width 512, forward and backward,
once with all similarities in memory and once with --rows rows of them at a time. Prints the peak
of the bytes of tensors, without the vectors themselves.

transformers must be installed (tests/requirements.txt).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import by_turns, describe_machine, training_step

from tinyfm.calc.trace import Peak
from tinyfm.clip import CLIP, CLIPConfig, contrast, softmax_loss
from tinyfm.common import device

VIT_B_32 = CLIPConfig(
    image_size=224,
    channels=3,
    patch_size=32,
    stem="patch",
    image_layer=12,
    image_width=768,
    image_head=12,
    vocab_size=49408,
    context_length=77,
    text_layer=12,
    text_width=512,
    text_head=8,
    embed_dim=512,
    activation="quick_gelu",
    augment=0.0,
)
END = 49407  # id of the end token
WIDTH = 512  # of the vectors that `memory` compares
CAPTIONS = {  # kind -> (tokens in a row, fewest tokens of text, most tokens of text)
    "8 to 24 tokens in rows of 77": (77, 8, 24),
    "32 tokens": (32, 32, 32),
}


def draw_captions(kind: str, batch: int) -> torch.Tensor:
    """Random token ids (B, T); every row is padded with the end token."""
    length, fewest, most = CAPTIONS[kind]
    tokens = torch.randint(END - 1, (batch, length))
    text_lengths = torch.randint(fewest, most + 1, (batch, 1))
    return tokens.masked_fill(torch.arange(length) >= text_lengths - 1, END)


def peer_loss(model, tokens: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return model(tokens, images, return_loss=True).loss


def own_loss(model: CLIP, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss, _ = model.loss(batch)
    return loss


def compare_speed(batch: int, repeats: int) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    device.keep_freed_memory()

    # The same weights in both.
    ours = CLIP(VIT_B_32).train()
    with TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).train()
    images = torch.rand(batch, 3, 224, 224) * 2 - 1
    our_optimizer = torch.optim.AdamW(ours.parameters(), 1e-5, fused=True)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), 1e-5, fused=True)

    print(f"ViT-B/32, batch {batch}, 224 x 224, {repeats} repeats")
    for kind in CAPTIONS:
        tokens = draw_captions(kind, batch)
        rows = {"images": images, "tokens": tokens, "labels": torch.arange(batch)}
        their_loss = partial(peer_loss, theirs, tokens, images)
        our_loss = partial(own_loss, ours, rows)
        for dtype in (torch.float32, torch.bfloat16):
            steps = {
                "transformers": training_step(their_loss, [their_optimizer], dtype),
                "tinyfm": training_step(our_loss, [our_optimizer], dtype),
            }
            times = by_turns(steps, repeats)
            rates = {name: batch / elapsed for name, elapsed in times.items()}
            shown = ", ".join(f"{name} {rate:.2f} images/s" for name, rate in rates.items())
            ratio = rates["tinyfm"] / rates["transformers"]
            print(f"{kind}, {dtype}: {shown}: {ratio:.2f}x")


def measure_memory(batch: int, rows: int) -> None:
    torch.manual_seed(0)
    x = F.normalize(torch.randn(batch, WIDTH), dim=-1).requires_grad_()
    y = F.normalize(torch.randn(batch, WIDTH), dim=-1).requires_grad_()
    ids = torch.arange(batch)
    scale = torch.tensor(14)

    peaks = []  # MiB
    gradients = []
    for rows_at_once in (0, rows):  # 0 = all
        x.grad = None
        y.grad = None
        with Peak() as peak:
            x_to_y = contrast(softmax_loss, x, y, ids, ids, scale, rows=rows_at_once)
            y_to_x = contrast(softmax_loss, y, x, ids, ids, scale, rows=rows_at_once)
            ((x_to_y + y_to_x) / 2).backward()
        peaks.append(peak.most / 2**20)
        gradients.append(torch.cat((x.grad, y.grad)))

    whole, in_parts = peaks
    difference = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
    print(
        f"loss of {batch} x {batch} pairs of width {WIDTH}: {whole:.0f} MiB at once, "
        f"{in_parts:.0f} MiB with {rows} rows at a time: {in_parts / whole:.2f} of it; "
        f"gradients differ by {difference:.1e} of the largest"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "memory"), help="what to measure")
    parser.add_argument("--batch", type=int, default=0, help="pairs; default: 16 or, memory, 8192")
    parser.add_argument("--rows", type=int, default=512, help="rows of similarities at a time")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed rounds")
    options = parser.parse_args()
    print(describe_machine())
    if options.what == "speed":
        compare_speed(options.batch or 16, options.repeats)
    else:
        measure_memory(options.batch or 8192, options.rows)


if __name__ == "__main__":
    main()
