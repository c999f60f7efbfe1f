"""How fast CLIP trains beside transformers, and what the contrastive loss costs in memory.

    python benchmarks/clip.py speed [--batch 16] [--repeats 5]
    python benchmarks/clip.py memory [--batch 8192] [--rows 512]

speed: images/s of whole training steps (forward, loss, backward, fused AdamW) at the shape of
ViT-B/32, 224 x 224 pixels, with the same random weights and inputs in both, by turns; medians. Once
with captions of 8 to 24 tokens in rows of 77, as CLIP's own tokenizer fills them up, and once with
rows of 32 tokens that are all text. memory: the symmetric loss of --batch unit vectors of width
512, forward and backward, with all similarities at once and --rows rows at a time: the most bytes
of tensors alive, beyond the vectors. transformers must be installed (tests/requirements.txt).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from generation import processor

from tinyfm.calc.trace import Peak
from tinyfm.clip import CLIP, CLIPConfig, contrast, softmax_loss
from tinyfm.common import device

VIT_B_32 = CLIPConfig(
    image_size=224, channels=3, patch_size=32, stem="patch", image_layer=12, image_width=768,
    image_head=12, vocab_size=49408, context_length=77, text_layer=12, text_width=512, text_head=8,
    embed_dim=512, activation="quick_gelu", augment=0.0,
)  # fmt: skip
END = 49407  # id of the end token
# tokens of a row; of its text, from and below
KINDS = {"8 to 24 tokens in rows of 77": (77, 8, 25), "32 tokens": (32, 32, 33)}


def captions(kind: str, batch: int) -> torch.Tensor:
    """Random ids (batch, T), each row filled up with the end token."""
    rows, least, most = KINDS[kind]
    tokens, lengths = torch.randint(END - 1, (batch, rows)), torch.randint(least, most, (batch, 1))
    return tokens.masked_fill(torch.arange(rows) >= lengths - 1, END)


def step(loss_of, optimizer, dtype: torch.dtype) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def peer_loss(model, tokens, images):
    return model(tokens, images, return_loss=True).loss


def own_loss(model, rows):
    return model.loss(rows)[0]


def speed(batch: int, repeats: int) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    device.keep_freed_memory()
    ours = CLIP(VIT_B_32).train()
    with TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).train()
    images = torch.rand(batch, 3, 224, 224) * 2 - 1
    models = {"transformers": theirs, "tinyfm": ours}
    adams = {k: torch.optim.AdamW(m.parameters(), 1e-5, fused=True) for k, m in models.items()}
    print(f"ViT-B/32, batch {batch}, 224 x 224, {repeats} repeats")
    for kind in KINDS:
        tokens = captions(kind, batch)
        rows = {"images": images, "tokens": tokens, "labels": torch.arange(batch)}
        losses = {
            "transformers": partial(peer_loss, theirs, tokens, images),
            "tinyfm": partial(own_loss, ours, rows),
        }
        for dtype in (torch.float32, torch.bfloat16):
            times = {name: [] for name in losses}
            for i in range(repeats + 1):
                for name, loss in losses.items():
                    elapsed = step(loss, adams[name], dtype)
                    if i:
                        times[name].append(elapsed)
            rates = {name: batch / statistics.median(found) for name, found in times.items()}
            shown = ", ".join(f"{name} {rate:.2f} images/s" for name, rate in rates.items())
            print(f"{kind}, {dtype}: {shown}: {rates['tinyfm'] / rates['transformers']:.2f}x")


def memory(batch: int, rows: int) -> None:
    torch.manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(batch, 512), dim=-1) for _ in range(2))
    x, y, ids, scale = x.requires_grad_(), y.requires_grad_(), torch.arange(batch), torch.tensor(14)
    ways, peaks, gradients = [(x, y), (y, x)], [], []
    for size in (0, rows):
        x.grad = y.grad = None
        with Peak() as peak:
            losses = [contrast(softmax_loss, *way, ids, ids, scale, rows=size) for way in ways]
            (sum(losses) / 2).backward()
        peaks.append(peak.most / 2**20)
        gradients.append(torch.cat((x.grad, y.grad)))
    worst = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
    print(f"loss of {batch} x {batch} pairs of width 512: {peaks[0]:.0f} MiB at once, "
          f"{peaks[1]:.0f} MiB with {rows} rows at a time: {peaks[1] / peaks[0]:.2f} of it; "
          f"gradients differ by {worst:.1e} of the largest")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--batch", type=int, default=0, help="images; 16, or 8192 for memory")
    parser.add_argument("--rows", type=int, default=512, help="rows of similarities at a time")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; medians are shown")
    args = parser.parse_args()
    print(f"{date.today()}, {processor()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    if args.what == "speed":
        speed(args.batch or 16, args.repeats)
    else:
        memory(args.batch or 8192, args.rows)


if __name__ == "__main__":
    main()
