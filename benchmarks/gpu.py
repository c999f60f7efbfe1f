"""What one GPU shows in ten minutes:  benchmarks/gpu.sh [--record]

    parity       logits and gradients on the GPU against those on the CPU, in float32
    default      the default run: its seconds and its score
    mfu          training at the shapes of GPT-2 124M and 1.5B: share of the GPU's peak
    generation   tokens a second of GPT-2 124M, compiled or not
    pictures     training DDPM's U-Net of CIFAR-10 (Ho et al. 2020, 36M parameters): pictures/s
    sharded      FSDP2 on one rank against no sharding: the same loss
    memory       predicted over measured peak of a step

Every part runs in a process with a time limit. A part that fails is a row of the table that says
so; nothing is left out silently. Training uses bfloat16 and torch.compile. The exit status is 1 if
a part failed. `--tiny --device cpu` tries the script itself, with models that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import timing
from benchmarks.memory import ExampleData
from tinyfm.calc import estimate
from tinyfm.common import device as devices
from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT
from tinyfm.recipes import registry
from tinyfm.recipes.base import Run
from tinyfm.training.trainer import Trainer

SECONDS = {  # limits; together ten minutes
    "parity": 30, "default": 120, "mfu": 240, "generation": 60, "pictures": 60, "sharded": 45,
    "memory": 45,
}  # fmt: skip
CIFAR = {
    "in_channels": 3, "patch_size": 1, "n_block": 2, "groups": 32,
    "channels": (128, 256, 256, 256), "attend": (False, True, False, False), "n_head": 1,
}  # fmt: skip
TINY_GPT = {"n_layer": 2, "n_head": 2, "d_model": 32, "context_length": 32, "vocab_size": 257}


@dataclass(frozen=True)
class Settings:
    device: str
    tiny: bool


def preset_run(name: str, settings: Settings, rows: int) -> Run:
    """A preset with `rows` rows a step; tiny if only the script is tried."""
    run = registry.find_preset(name).run
    train = replace(run.train, device=settings.device, batch_size=rows, micro_batch_size=0)
    train = replace(train, compile=not settings.tiny, steps=100_000)
    if settings.tiny:
        small = {**TINY_GPT, "n_kv_head": 0} if name.startswith("gpt") else {}
        run = replace(run, model=replace(run.model, **small))
    return replace(run, train=train)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def training_speed(run: Run, settings: Settings) -> tuple[float, Trainer]:
    """(seconds of a step, the trainer): the mean of some steps after those that compile."""
    warm, steps = (1, 2) if settings.tiny else (8, 20)
    model = run.build_model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, ExampleData(model), run.train, run.optim, Path(folder))
        for step in range(warm):
            trainer.update(step)
        synchronise(trainer.device)
        start = time.perf_counter()
        for step in range(warm, warm + steps):
            trainer.update(step)
        synchronise(trainer.device)
        return (time.perf_counter() - start) / steps, trainer


# ---- the parts: each returns rows (what, value, aim) --------------------------------------------

Rows = list[tuple[str, str, str]]


def parity(settings: Settings) -> Rows:
    """Largest differences from float64 on the CPU, relative to the largest value."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rows = []
    for name in ("gpt", "ddpm"):
        torch.manual_seed(0)
        run = preset_run(name, settings, rows=4)
        model = run.build_model().eval()
        for p in model.parameters():  # some start at zero, which would hide errors
            p.data += 0.02 * torch.randn_like(p)
        batch = model.example_batch(4)
        found = []
        for device, dtype in (("cpu", torch.float64), (settings.device, torch.float32)):
            copy = run.build_model().eval()
            copy.load_state_dict(model.state_dict())
            copy.to(device, dtype)
            moved = {
                key: x.to(device, dtype if x.is_floating_point() else None)
                for key, x in batch.items()
            }
            generators = [torch.Generator().manual_seed(i) for i in range(4)]
            loss, _ = copy.loss(moved, generators)
            loss.backward()
            gradients = [p.grad.double().cpu().flatten() for p in copy.parameters()]
            found.append((loss.double().item(), torch.cat(gradients)))
        (loss, gradient), (our_loss, ours) = found
        loss_error = abs(our_loss - loss) / abs(loss)
        error = ((ours - gradient).norm() / gradient.norm()).item()
        rows.append((f"{name}: loss, relative error", f"{loss_error:.1e}", "1e-5"))
        rows.append((f"{name}: gradient, relative error", f"{error:.1e}", "1e-4"))
    return rows


def default(settings: Settings) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "train.py", "gpt", "--out", f"{folder}/run"]
        words += ["--train.device", settings.device]
        if settings.tiny:
            words += ["--train.steps", "2", "--data.path", "tests/conftest.py"]
            words += ["--data.tokenizer", "bytes", "--model.vocab-size", "257"]
            words += ["--model.n-layer", "1", "--model.d-model", "32", "--model.n-head", "2"]
        start = time.perf_counter()
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        metrics = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        scores = [row for row in map(json.loads, metrics) if "val_bpb" in row]
    reached = f"{scores[-1]['val_bpb']:.3f}"
    return [("seconds, with data", f"{seconds:.0f}", ""), ("val_bpb", reached, "1.68")]


def mfu(settings: Settings) -> Rows:
    rows = []
    for name, size, aim in (("gpt2-124m", 64, "45%"), ("gpt2-1.5b", 16, "50%")):
        run = preset_run(name, settings, rows=2 if settings.tiny else size)
        seconds, trainer = training_speed(run, settings)
        tokens = run.train.batch_size * run.model.context_length / seconds
        rows.append((f"{name}: tokens/s", f"{tokens:,.0f}", ""))
        peak = estimate.peak_flops(trainer.device, trainer.dtype)
        share = "peak unknown"
        if peak:
            flops = run.train.batch_size * trainer.model.flops_per_row()
            share = f"{flops / seconds / peak:.1%}"
        rows.append((f"{name}: share of the peak", share, aim))
        del trainer
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def generation(settings: Settings) -> Rows:
    n = 4 if settings.tiny else 256
    run = preset_run("gpt2-124m", settings, rows=1)
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    model = GPT(run.model).eval().to(settings.device, dtype)
    sampling = Sampling(max_new_tokens=n, temperature=0)
    rows = []
    for count in (1, 32):
        prompts = [[1, 2, 3, 4]] * count
        complete(model, prompts, sampling)
        start = time.perf_counter()
        complete(model, prompts, sampling)
        speed = count * n / (time.perf_counter() - start)
        rows.append((f"tokens/s, {count} rows", f"{speed:,.0f}", ""))
    return rows


def pictures(settings: Settings) -> Rows:
    run = preset_run("ddpm", settings, rows=4 if settings.tiny else 512)
    shape = {"in_channels": 3} if settings.tiny else CIFAR
    run = replace(run, model=replace(run.model, **shape))
    seconds, _ = training_speed(run, settings)
    return [("pictures/s", f"{run.train.batch_size / seconds:,.0f}", "6,000")]


def sharded(settings: Settings) -> Rows:
    losses = []
    for parallel in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            words += ["--nproc_per_node=1", "train.py", "gpt", "--out", f"{folder}/run"]
            words += ["--data.path", "tests/conftest.py", "--data.tokenizer", "bytes"]
            words += ["--model.vocab-size", "257", "--model.n-layer", "2", "--train.steps", "3"]
            words += ["--train.log-every", "1", "--train.dtype", "float32"]
            words += ["--train.parallel", parallel, "--train.device", settings.device]
            if settings.tiny:
                words += ["--train.batch-size", "4", "--model.context-length", "32"]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            text = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row][-1])
    difference = abs(losses[1] - losses[0]) / losses[0]
    return [("loss after 3 steps, relative difference", f"{difference:.1e}", "1e-5")]


def memory(settings: Settings) -> Rows:
    """Of GPT-2 124M, with two micro-batches, not compiled (see memory.py)."""
    run = preset_run("gpt2-124m", settings, rows=4 if settings.tiny else 32)
    train = replace(run.train, micro_batch_size=run.train.batch_size // 2, compile=False)
    run = replace(run, train=train)
    model = run.build_model()
    device = devices.choose_device(settings.device)
    predicted, _ = estimate.predict_peak(model, run.optim, train)
    if device.type != "cuda":
        return [("predicted, GiB", f"{predicted / 2**30:.3f}", ""), ("measured", "no GPU", "")]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, ExampleData(model), train, run.optim, Path(folder))
        for step in range(3):
            trainer.update(step)
    measured = torch.cuda.max_memory_allocated()
    gib = f"{measured / 2**30:.2f}"
    ratio = f"{predicted / measured:.3f}"
    return [("measured peak, GiB", gib, ""), ("predicted / measured", ratio, "0.9 to 1.1")]


PARTS = {
    "parity": parity, "default": default, "mfu": mfu, "generation": generation,
    "pictures": pictures, "sharded": sharded, "memory": memory,
}  # fmt: skip


# ---- all of them --------------------------------------------------------------------------------


def run_part(name: str, settings: Settings) -> Rows:
    """The rows of one part, measured in a new process; a row that says why if it fails."""
    words = [sys.executable, __file__, "--part", name, "--device", settings.device]
    words += ["--tiny"] * settings.tiny
    limit = SECONDS[name] * (10 if settings.tiny else 1)
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return [("FAILED", f"not done in {limit} s", "")]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return [("FAILED", lines[-1].replace("|", "/"), "")]
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{timing.describe_machine()}, {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = Settings(options.device, options.tiny)
    if options.part:  # the new process of one part
        print(json.dumps(PARTS[options.part](settings)))
        return 0
    failed = False
    lines = [describe() + "\n", "| part | what | measured | aim |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for name in PARTS:
        for what, value, aim in run_part(name, settings):
            failed |= what == "FAILED"
            lines.append(f"| {name} | {what} | {value} | {aim} |")
            print(lines[-1], flush=True)
    if options.record:
        timing.record("gpu", "\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
