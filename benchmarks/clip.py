"""How fast CLIP trains beside transformers, and what the contrastive loss costs in memory.

    python benchmarks/clip.py speed [--batch 16] [--repeats 5]
    python benchmarks/clip.py memory [--batch 8192] [--rows 512]

speed: images/s of whole training steps (forward, loss, backward, fused AdamW) at the shape of
ViT-B/32, 224 x 224 pixels and 32 tokens a caption, with the same random weights in both, by turns;
medians. memory: the symmetric loss of --batch unit vectors of width 512, forward and backward, with
all similarities at once and --rows rows at a time: the most bytes of tensors alive, beyond the
vectors. transformers must be installed (tests/requirements.txt).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from generation import processor

from tinyfm import machine
from tinyfm.clip import CLIP, CLIPConfig, contrast, softmax_loss
from tinyfm.measure import Peak

VIT_B_32 = CLIPConfig(
    image_size=224, channels=3, patch_size=32, stem="patch", image_layer=12, image_width=768,
    image_head=12, vocab_size=49408, context_length=77, text_layer=12, text_width=512, text_head=8,
    embed_dim=512, activation="quick_gelu", augment=0.0,
)  # fmt: skip
TOKENS = 32


def step(loss_of, optimizer, dtype: torch.dtype) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def speed(batch: int, repeats: int) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    machine.keep_freed_memory()
    ours = CLIP(VIT_B_32).train()
    with TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).train()
    images = torch.rand(batch, 3, 224, 224) * 2 - 1
    tokens = torch.randint(0, 49405, (batch, TOKENS))
    tokens[:, -1] = 49407
    rows = {"images": images, "tokens": tokens, "labels": torch.arange(batch)}
    losses = {
        "transformers": lambda: theirs(tokens, images, return_loss=True).loss,
        "tinyfm": lambda: ours.loss(rows)[0],
    }
    models = {"transformers": theirs, "tinyfm": ours}
    adams = {k: torch.optim.AdamW(m.parameters(), 1e-5, fused=True) for k, m in models.items()}
    print(f"ViT-B/32, batch {batch}, 224 x 224, {TOKENS} tokens, {repeats} repeats")
    for dtype in (torch.float32, torch.bfloat16):
        times = {name: [] for name in losses}
        for i in range(repeats + 1):
            for name, loss in losses.items():
                elapsed = step(loss, adams[name], dtype)
                if i:
                    times[name].append(elapsed)
        rates = {name: batch / statistics.median(found) for name, found in times.items()}
        shown = ", ".join(f"{name} {rate:.2f} images/s" for name, rate in rates.items())
        print(f"{dtype}: {shown}: {rates['tinyfm'] / rates['transformers']:.2f}x")


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
