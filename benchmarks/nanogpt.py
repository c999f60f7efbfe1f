"""Side by side with nanoGPT (https://github.com/karpathy/nanoGPT), on this machine, in one run.

    python benchmarks/nanogpt.py shakespeare NANOGPT input.txt   # quality per second
    python benchmarks/nanogpt.py throughput NANOGPT              # the same model, tokens per second

NANOGPT is a clone of it; input.txt is tiny Shakespeare. "shakespeare" runs nanoGPT's published CPU
recipe with its own code, timed as a whole process, then our `train.py` as a whole process: first
with settings that pass nanoGPT's final validation loss early, then for about its full time. Both
losses are bits per byte of the same last tenth of the text (nanoGPT's in nats a character, and the
text is ASCII). "throughput" builds the GPT-2 124M shape in both and alternates training steps.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RECIPE = (
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
FULL = (  # several passes, so dropout
    "--data.val-fraction 0.1 --train.micro-batch-size 0 "
    "--model.vocab-size 2048 --model.context-length 64 --model.n-layer 2 --model.n-head 2 "
    "--model.d-model 256 --model.dropout 0.1 --optim.lr 0.01 --optim.warmup-steps 10 "
    "--train.batch-size 32 --train.eval-every 0"
)


def header() -> None:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = next(iter(re.findall(r"model name\s*: (.*)", text)), model)
    print(f"{datetime.date.today()}  {model}, {os.cpu_count()} cores, torch {torch.__version__}")


def run_nanogpt(clone: Path, text: Path, work: Path) -> tuple[float, float]:
    """(final bits per byte, seconds of the whole process) of its CPU recipe."""
    copy = work / "nanogpt"
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    data = copy / "data/shakespeare_char"
    shutil.copy(text, data / "input.txt")
    (data / "requests.py").touch()  # imported by prepare.py, not needed with the text in place
    prepare = [sys.executable, "prepare.py"]
    subprocess.run(prepare, cwd=data, check=True, stdout=subprocess.DEVNULL)
    begun = time.perf_counter()
    command = [sys.executable, "train.py", *RECIPE.split()]
    output = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - begun
    nats = float(re.findall(r"val loss ([\d.]+)", output)[-1])
    return nats / math.log(2), seconds


def run_ours(text: Path, work: Path, options: str) -> tuple[float, float, float]:
    """(final bits per byte, seconds until that was known, seconds of the whole process)."""
    out, cache = work / "run", work / "cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    paths = ["--data.path", str(text), "--data.cache", str(cache), "--out", str(out)]
    begun, clock = time.time(), time.perf_counter()
    command = [sys.executable, "train.py", "gpt", *paths, *options.split()]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - clock
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
    last = [row for row in rows if "val_bpb" in row][-1]
    return last["val_bpb"], last["time"] - begun, seconds


def shakespeare(clone: Path, text: Path, rounds: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for _ in range(rounds):
            target, limit = run_nanogpt(clone, text, work)
            early, until, whole = run_ours(text, work, EARLY)
            print(f"nanoGPT {target:.3f} bits per byte in {limit:.1f} s")
            print(f"  ours {early:.3f} after {until:.1f} s, {until / limit:.3f} of its time; "
                  f"the process ends after {whole:.1f} s")  # fmt: skip
            steps = 60
            for _ in range(2):  # how many steps fit into its time?
                full, until_full, _ = run_ours(text, work, f"{FULL} --train.steps {steps}")
                if steps == 60:
                    steps = int(60 * (0.95 * limit - 3) / (until_full - 3))
            print(f"  ours in {until_full:.1f} s ({steps} steps): {full:.3f} bpb")
            rows.append((target, limit, early, until, full, until_full))
    target, limit, early, until, full, until_full = map(statistics.median, zip(*rows))
    print(f"medians of {rounds}: nanoGPT {target:.3f} bits per byte in {limit:.1f} s")
    ratio = statistics.median(row[3] / row[1] for row in rows)
    print(f"  to reach it: {until:.1f} s ({early:.3f} bits per byte): {ratio:.3f} of its time")
    print(f"  in its time: {full:.3f} bits per byte after {until_full:.1f} s")


def throughput(clone: Path, steps: int) -> None:
    """GPT-2 124M, 4 rows of 256 tokens, forward, backward and AdamW; steps alternate."""
    from tinyfm.common.device import bfloat16_is_fast, keep_freed_memory
    from tinyfm.gpt import GPT
    from tinyfm.recipes.registry import PRESETS
    from tinyfm.training.optim import OptimConfig, build_optimizers

    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    peer = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = peer
    spec.loader.exec_module(peer)
    keep_freed_memory()  # for both
    torch.manual_seed(0)
    tokens = torch.randint(0, 50257, (4, 257))
    theirs = peer.GPT(peer.GPTConfig(block_size=1024, vocab_size=50257, dropout=0.0))
    with contextlib.redirect_stdout(None):
        their_optimizer = theirs.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    ours = GPT(PRESETS["gpt2-124m"].run.model)
    our_optimizers = build_optimizers(ours, OptimConfig(optimizer="adamw"))

    def nanogpt() -> None:
        theirs(tokens[:, :-1], tokens[:, 1:].contiguous())[1].backward()
        their_optimizer.step()
        their_optimizer.zero_grad(set_to_none=True)

    def tinyfm(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = ours.loss({"tokens": tokens})[0]
        loss.backward()
        for optimizer in our_optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    runs = {"nanoGPT float32": nanogpt, "tinyfm float32": lambda: tinyfm(torch.float32)}
    if bfloat16_is_fast(torch.device("cpu")):
        runs["tinyfm bfloat16"] = lambda: tinyfm(torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(steps + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if step:  # the first one warms up
                seconds[name].append(time.perf_counter() - begun)
    base = statistics.median(seconds["nanoGPT float32"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name}: {4 * 256 / median:7.0f} tokens/s, {base / median:.2f} of nanoGPT")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("shakespeare", "throughput"))
    parser.add_argument("nanogpt", type=Path)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    header()
    if given.what == "shakespeare":
        shakespeare(given.nanogpt, given.text.resolve(), given.rounds)
    else:
        throughput(given.nanogpt, 4 * given.rounds)
