"""Compare training with nanoGPT (https://github.com/karpathy/nanoGPT) on this machine.

    python benchmarks/nanogpt.py shakespeare NANOGPT input.txt
    python benchmarks/nanogpt.py throughput NANOGPT

NANOGPT is a clone of it; input.txt is tiny Shakespeare.

shakespeare: quality per second. nanoGPT's published CPU recipe runs with nanoGPT's code, timed as a
whole process. Then our `train.py` runs as a whole process: first with settings that pass nanoGPT's
final validation loss early, then for almost its full time. Both losses are bits per byte of the
same last tenth of the text. nanoGPT's is in nats per character, and the text is ASCII.

throughput: tokens per second. Both build the GPT-2 124M shape and take training steps by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from timing import by_turns, describe_machine, seconds_of, training_step

from tinyfm.common.device import bfloat16_is_fast, keep_freed_memory
from tinyfm.gpt import GPT
from tinyfm.recipes.registry import find_preset
from tinyfm.training.optim import OptimConfig, build_optimizers

RECIPE = (  # of nanoGPT's README, for a CPU
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
EARLY = (  # a fifth of the text, once
    "--data.val-fraction 0.1 --train.micro-batch-size 0 "
    "--model.vocab-size 3072 --model.context-length 64 --model.n-layer 2 --model.n-head 2 "
    "--model.d-model 128 --optim.lr 0.015 --optim.warmup-steps 2 --optim.decay-fraction 0.8 "
    "--train.steps 26 --train.batch-size 32 --train.eval-every 0"
)
FULL = (  # several passes over the text, so dropout helps
    "--data.val-fraction 0.1 --train.micro-batch-size 0 "
    "--model.vocab-size 2048 --model.context-length 64 --model.n-layer 2 --model.n-head 2 "
    "--model.d-model 256 --model.dropout 0.1 --optim.lr 0.01 --optim.warmup-steps 10 "
    "--train.batch-size 32 --train.eval-every 0"
)
TRIAL_STEPS = 60  # of FULL, to measure its speed
START_UP = 3  # seconds of FULL before its first step, roughly
B, T, V = 4, 256, 50257  # throughput: rows, tokens in a row, vocabulary


# ---- quality per second -------------------------------------------------------------------------


class PeerResult(NamedTuple):
    bpb: float  # final bits per byte of the validation text
    seconds: float  # of the whole process


class OwnResult(NamedTuple):
    bpb: float  # final bits per byte of the validation text
    known_after: float  # seconds from the start until this score was known
    seconds: float  # of the whole process


def run_nanogpt(clone: Path, text: Path, work: Path) -> PeerResult:
    """Run nanoGPT's CPU recipe in a copy of the clone."""
    copy = work / "nanogpt"
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    data = copy / "data/shakespeare_char"
    shutil.copy(text, data / "input.txt")
    (data / "requests.py").touch()  # prepare.py imports it, but needs it only for a download
    prepare = [sys.executable, "prepare.py"]
    subprocess.run(prepare, cwd=data, check=True, stdout=subprocess.DEVNULL)

    start = time.perf_counter()
    command = [sys.executable, "train.py", *RECIPE.split()]
    done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    nats = float(re.findall(r"val loss ([\d.]+)", done.stdout)[-1])
    return PeerResult(nats / math.log(2), seconds)


def run_ours(text: Path, work: Path, options: str) -> OwnResult:
    """Run train.py with an empty cache, so that it prepares the text and its tokenizer too."""
    out = work / "run"
    cache = work / "cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    paths = ["--data.path", str(text), "--data.cache", str(cache), "--out", str(out)]
    command = [sys.executable, "train.py", "gpt", *paths, *options.split()]
    start = time.time()  # the clock of metrics.jsonl
    seconds = seconds_of(
        lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    )
    metrics = (out / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in metrics.splitlines()]
    last = [row for row in rows if "val_bpb" in row][-1]
    return OwnResult(last["val_bpb"], last["time"] - start, seconds)


def steps_in(limit: float, text: Path, work: Path) -> int:
    """The number of steps of FULL that take almost `limit` seconds."""
    trial = run_ours(text, work, f"{FULL} --train.steps {TRIAL_STEPS}")
    return int(TRIAL_STEPS * (0.95 * limit - START_UP) / (trial.known_after - START_UP))


def compare_quality(clone: Path, text: Path, rounds: int) -> None:
    peers, earlies, fulls, ratios = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for _ in range(rounds):
            peer = run_nanogpt(clone, text, work)
            early = run_ours(text, work, EARLY)
            ratio = early.known_after / peer.seconds
            print(f"nanoGPT {peer.bpb:.3f} bits per byte in {peer.seconds:.1f} s")
            print(
                f"  ours {early.bpb:.3f} after {early.known_after:.1f} s, {ratio:.3f} of its "
                f"time; the process ends after {early.seconds:.1f} s"
            )
            steps = steps_in(peer.seconds, text, work)
            full = run_ours(text, work, f"{FULL} --train.steps {steps}")
            print(f"  ours in {full.known_after:.1f} s ({steps} steps): {full.bpb:.3f} bpb")
            peers.append(peer)
            earlies.append(early)
            fulls.append(full)
            ratios.append(ratio)

    peer = PeerResult(*map(statistics.median, zip(*peers)))
    early = OwnResult(*map(statistics.median, zip(*earlies)))
    full = OwnResult(*map(statistics.median, zip(*fulls)))
    ratio = statistics.median(ratios)
    print(f"medians of {rounds}: nanoGPT {peer.bpb:.3f} bits per byte in {peer.seconds:.1f} s")
    print(
        f"  to reach it: {early.known_after:.1f} s ({early.bpb:.3f} bits per byte): "
        f"{ratio:.3f} of its time"
    )
    print(f"  in its time: {full.bpb:.3f} bits per byte after {full.known_after:.1f} s")


# ---- tokens per second --------------------------------------------------------------------------


def import_model_file(clone: Path) -> ModuleType:
    """nanoGPT's model.py, as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compare_throughput(clone: Path, repeats: int) -> None:
    """GPT-2 124M: forward, backward and AdamW, by turns."""
    peer = import_model_file(clone)
    keep_freed_memory()  # for both
    torch.manual_seed(0)
    tokens = torch.randint(0, V, (B, T + 1))
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:].contiguous()

    theirs = peer.GPT(peer.GPTConfig(block_size=1024, vocab_size=V, dropout=0.0))
    with contextlib.redirect_stdout(None):
        their_optimizer = theirs.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    ours = GPT(find_preset("gpt2-124m").run.model)
    our_optimizers = build_optimizers(ours, OptimConfig(optimizer="adamw"))

    def their_loss() -> torch.Tensor:
        _, loss = theirs(inputs, targets)
        return loss

    def our_loss() -> torch.Tensor:
        loss, _ = ours.loss({"tokens": tokens})
        return loss

    float32 = torch.float32
    steps = {
        "nanoGPT float32": training_step(their_loss, [their_optimizer], float32),
        "tinyfm float32": training_step(our_loss, our_optimizers, float32),
    }
    if bfloat16_is_fast(torch.device("cpu")):
        steps["tinyfm bfloat16"] = training_step(our_loss, our_optimizers, torch.bfloat16)
    times = by_turns(steps, repeats)
    base = times["nanoGPT float32"]
    for name, elapsed in times.items():
        print(f"{name}: {B * T / elapsed:7.0f} tokens/s, {base / elapsed:.2f} of nanoGPT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("shakespeare", "throughput"), help="what to compare")
    parser.add_argument("nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("text", type=Path, nargs="?", help="tiny Shakespeare, for shakespeare")
    parser.add_argument(
        "--rounds", type=int, default=3, help="repetitions; throughput times 4 steps in each"
    )
    options = parser.parse_args()
    if not (options.nanogpt / "model.py").is_file():
        parser.error(
            f"{options.nanogpt} is no clone of nanoGPT: there is no model.py in it; "
            "git clone https://github.com/karpathy/nanoGPT"
        )
    if options.what == "shakespeare" and options.text is None:
        parser.error("shakespeare needs a text: give the path of tiny Shakespeare's input.txt")

    print(describe_machine())
    if options.what == "shakespeare":
        compare_quality(options.nanogpt, options.text.resolve(), options.rounds)
    else:
        compare_throughput(options.nanogpt, 4 * options.rounds)


if __name__ == "__main__":
    main()
