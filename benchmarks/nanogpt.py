"""Compare training with nanoGPT (https://github.com/karpathy/nanoGPT) on this machine.

    python benchmarks/nanogpt.py bytes NANOGPT input.txt
    python benchmarks/nanogpt.py shakespeare NANOGPT input.txt
    python benchmarks/nanogpt.py throughput NANOGPT

NANOGPT is a clone of it; input.txt is tiny Shakespeare. Training reads the first nine tenths of the
text. All losses are bits per byte of the whole last tenth, computed here from the final weights.

bytes: like with like. nanoGPT's published CPU recipe runs on bytes, with nanoGPT's code. Ours has
the same vocabulary, network and number of parameters, context, batch, steps, schedule, windows at
random and number format (float32), and once the same optimizer, AdamW with the same rates; then
Muon with the rates of the `gpt` preset. What still differs: initial weights and random draws, and
GELU, of which ours is the approximation of GPT-2. All are timed as whole processes.

shakespeare: quality per second, each library in its own way. nanoGPT's recipe runs on characters.
Then our `train.py` runs: first with settings that pass nanoGPT's final loss early, then for almost
its full time. It differs in all that a user chooses: tokens, so that a context of 64 is about three
times as long a text; 1.2 and 2.7 million parameters against 0.8; AdamW and Muon; bfloat16 where the
processor has it. The printed table says so.

throughput: tokens per second. Both build the GPT-2 124M shape and take training steps by turns.

--record also writes the table of bytes or shakespeare into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from timing import by_turns, describe_machine, record, seconds_of, training_step

from tinyfm.common import files
from tinyfm.common.device import bfloat16_is_fast, keep_freed_memory
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.registry import find_preset
from tinyfm.recipes.run_dir import open_run
from tinyfm.training import checkpoint
from tinyfm.training.optim import OptimConfig, build_optimizers
from tinyfm.training.trainer import TrainConfig, Trainer

RECIPE = (  # of nanoGPT's README, for a CPU; the final weights are saved
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --always_save_checkpoint=True"
)
ROWS, CONTEXT, STEPS = 12, 64, 2000  # batch_size, block_size and max_iters of the recipe
EVAL_BATCHES = 40  # that nanoGPT reads in an evaluation: eval_iters of each split
SAME_NETWORK = GPTConfig(
    vocab_size=257,
    context_length=CONTEXT,
    n_layer=4,
    n_head=4,
    d_model=128,
    mlp="gelu",
    norm="layernorm",
    norm_eps=1e-5,
    qk_norm=False,
    position="learned",
    tied=True,
    zero_init=False,
)
SCHEDULE = {"schedule": "cosine", "warmup_steps": 100, "final_lr": 0.1}  # of the recipe
OPTIMIZERS = {  # AdamW as in the recipe; Muon with the rates of the gpt preset
    "adamw": OptimConfig("adamw", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, **SCHEDULE),
    "muon": OptimConfig("muon", lr=0.012, muon_lr=0.02, weight_decay=0.1, **SCHEDULE),
}
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


class Result(NamedTuple):
    bpb: float  # of the final weights: bits per byte of the last tenth of the text
    seconds: float  # of the whole process; for train.py, until its last evaluation was known
    parameters: int


def split(text: bytes) -> tuple[bytes, bytes]:
    """(training, validation): nanoGPT's prepare.py holds out the last tenth."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def windows(ids: Sequence[int], length: int, rows: int) -> Iterator[dict[str, Tensor]]:
    """All ids, `rows` windows at a time: {"tokens": (B, length + 1), "mask": (B, length)}.

    Each id but the first is a target once: a last window that would be too short starts earlier,
    and its mask leaves out the targets of the window before.
    """
    array = torch.as_tensor(ids, dtype=torch.long)
    wanted = torch.arange(0, len(array) - 1, length)
    starts = wanted.clamp(max=len(array) - 1 - length)
    tokens = array[starts[:, None] + torch.arange(length + 1)]
    mask = starts[:, None] + torch.arange(length) >= wanted[:, None]
    for part in range(0, len(tokens), rows):
        yield {"tokens": tokens[part : part + rows], "mask": mask[part : part + rows]}


@torch.no_grad()
def bits_per_byte(
    logits_of: Callable[[Tensor], Tensor], ids: Sequence[int], n_bytes: int, length: int
) -> float:
    """Bits to predict all ids but the first, per byte that these stand for, in windows of `length`.

    logits_of: (B, T) -> (B, T, V).
    """
    nats = 0.0
    for batch in windows(ids, length, rows=64):
        logits = logits_of(batch["tokens"][:, :-1].contiguous()).float()
        targets = batch["tokens"][:, 1:].masked_fill(~batch["mask"], -100)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return nats / math.log(2) / n_bytes


def copy_nanogpt(clone: Path, work: Path, seed: int) -> Path:
    """A copy of the clone whose train.py has another seed; it has none among its options."""
    copy = work / "nanogpt"
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    source = (clone / "train.py").read_text(encoding="utf-8")
    if source.count("manual_seed(1337") != 1:
        raise SystemExit(f"{clone / 'train.py'} sets its seed in another way; use commit 3adf61e")
    source = source.replace("manual_seed(1337", f"manual_seed({1337 + seed}")
    (copy / "train.py").write_text(source, encoding="utf-8")
    return copy


def prepare_bytes(folder: Path, text: bytes) -> None:
    """A data set of nanoGPT with a vocabulary of 257: bytes, and one id that does not occur."""
    folder.mkdir(exist_ok=True)
    for name, part in zip(("train", "val"), split(text)):
        np.frombuffer(part, dtype=np.uint8).astype(np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": SAME_NETWORK.vocab_size}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def prepare_characters(folder: Path, text: Path) -> None:
    """Run nanoGPT's own preparation."""
    shutil.copy(text, folder / "input.txt")
    (folder / "requests.py").touch()  # prepare.py imports it, but needs it only for a download
    command = [sys.executable, "prepare.py"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def run_nanogpt(clone: Path, text: Path, work: Path, seed: int, dataset: str) -> Result:
    """Run nanoGPT's CPU recipe in a copy of the clone, on bytes or on characters."""
    copy = copy_nanogpt(clone, work, seed)
    folder = copy / "data" / dataset
    if dataset == "shakespeare_char":
        prepare_characters(folder, text)
    else:
        prepare_bytes(folder, text.read_bytes())
    command = [sys.executable, "-W", "ignore", "train.py", *RECIPE.split(), f"--dataset={dataset}"]
    seconds = seconds_of(
        lambda: subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
    )
    saved = torch.load(copy / "out-shakespeare-char/ckpt.pt", weights_only=True)
    peer = import_model_file(copy)
    with contextlib.redirect_stdout(None):
        model = peer.GPT(peer.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    ids = np.fromfile(folder / "val.bin", dtype=np.uint16).astype(np.int64)
    bpb = bits_per_byte(lambda x: model(x, x)[0], ids, len(ids) - 1, CONTEXT)
    return Result(bpb, seconds, count_parameters(model))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- like with like ------------------------------------------------------------------------------


class RandomWindows:
    """Bytes as nanoGPT reads them: each row starts anywhere in the training text."""

    unit = "tokens"
    units_per_row = CONTEXT

    def __init__(self, text: bytes, seed: int):
        self.train, self.val = (
            torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in split(text)
        )
        self.seed = seed

    def batch(self, step: int, rows: slice) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_000 * self.seed + step)
        starts = torch.randint(len(self.train) - CONTEXT, (ROWS,), generator=generator)[rows]
        return {"tokens": self.train[starts[:, None] + torch.arange(CONTEXT + 1)]}

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """As much as nanoGPT reads in an evaluation."""
        for i, batch in enumerate(windows(self.val, CONTEXT, rows)):
            if i < EVAL_BATCHES:
                yield batch

    def metrics(self, nats: float) -> dict[str, float]:
        return {"val_bpb": nats / math.log(2)}


def train_same(text: Path, optimizer: str, seed: int, steps: int, out: Path) -> None:
    """Train our GPT as the recipe trains nanoGPT's; the weights are in `out` afterwards."""
    torch.manual_seed(seed)
    config = TrainConfig(
        steps, ROWS, seed=seed, eval_every=250, log_every=100, device="cpu", dtype="float32"
    )
    data = RandomWindows(text.read_bytes(), seed)
    Trainer(GPT(SAME_NETWORK), data, config, OPTIMIZERS[optimizer], out).fit()


def run_same(text: Path, work: Path, optimizer: str, seed: int) -> Result:
    """Run train_same as a process."""
    out = work / "same"
    shutil.rmtree(out, ignore_errors=True)
    arguments = (text, optimizer, seed, STEPS, out)
    process = multiprocessing.get_context("spawn").Process(target=train_same, args=arguments)

    def run() -> None:
        process.start()
        process.join()

    seconds = seconds_of(run)
    if process.exitcode:
        raise SystemExit(f"our training ended with exit status {process.exitcode}")
    model = GPT(SAME_NETWORK).eval()
    files.load_model(model, files.load_tensors(checkpoint.find(out)))
    _, ids = split(text.read_bytes())
    bpb = bits_per_byte(model, list(ids), len(ids) - 1, CONTEXT)
    return Result(bpb, seconds, count_parameters(model))


def compare_bytes(clone: Path, text: Path, rounds: int) -> str:
    """The table of `bytes`, as Markdown."""
    found = {"nanoGPT, AdamW": [], "tinyfm, AdamW": [], "tinyfm, Muon": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed in range(rounds):
            found["nanoGPT, AdamW"].append(
                run_nanogpt(clone, text, work, seed, "shakespeare_bytes")
            )
            for name, optimizer in (("tinyfm, AdamW", "adamw"), ("tinyfm, Muon", "muon")):
                found[name].append(run_same(text, work, optimizer, seed))
            shown = ", ".join(
                f"{name} {own[-1].bpb:.3f} in {own[-1].seconds:.1f} s"
                for name, own in found.items()
            )
            print(f"seed {seed}: {shown}", flush=True)
    sizes = {name: own[0].parameters for name, own in found.items()}
    if len(set(sizes.values())) > 1:
        raise SystemExit(f"the networks have different sizes, so this is no comparison: {sizes}")

    held_out = len(split(text.read_bytes())[1])
    lines = [
        f"{describe_machine()}; bytes, {max(sizes.values()):,} parameters, context {CONTEXT}, "
        f"{STEPS:,} steps of {ROWS} rows, float32, not compiled, on both sides; {rounds} seeds",
        "",
        f"| | bits per byte of all {held_out:,} held-out bytes: mean (range) | seconds, median |",
        "|---|---|---|",
    ]
    for name, own in found.items():
        bpb = [result.bpb for result in own]
        seconds = statistics.median(result.seconds for result in own)
        mean = statistics.fmean(bpb)
        lines.append(f"| {name} | {mean:.3f} ({min(bpb):.3f} to {max(bpb):.3f}) | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


# ---- each in its own way -------------------------------------------------------------------------


def run_ours(text: Path, work: Path, options: str) -> Result:
    """Run train.py with an empty cache, so that it prepares the text and its tokenizer too."""
    out = work / "run"
    cache = work / "cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    paths = ["--data.path", str(text), "--data.cache", str(cache), "--out", str(out)]
    command = [sys.executable, "train.py", "gpt", *paths, *options.split()]
    start = time.time()  # the clock of metrics.jsonl
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    metrics = (out / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in metrics.splitlines()]
    known_after = [row["time"] for row in rows if "val_bpb" in row][-1] - start

    # The evaluation of the run reads a part of the last tenth; here it is read whole.
    opened = open_run(str(out))
    _, held_out = split(text.read_bytes())
    tokenizer = opened.tokenizer
    ids = [tokenizer.eot, *tokenizer.encode(held_out.decode("utf-8"))]  # it starts a document
    model = opened.model.eval()
    bpb = bits_per_byte(model, ids, len(held_out), model.config.context_length)
    return Result(bpb, known_after, count_parameters(model))


def steps_in(limit: float, text: Path, work: Path) -> int:
    """The number of steps of FULL that take almost `limit` seconds."""
    trial = run_ours(text, work, f"{FULL} --train.steps {TRIAL_STEPS}")
    return int(TRIAL_STEPS * (0.95 * limit - START_UP) / (trial.seconds - START_UP))


def medians(results: list[Result]) -> Result:
    return Result(*map(statistics.median, zip(*results)))


def compare_quality(clone: Path, text: Path, rounds: int) -> str:
    """The table of `shakespeare`, as Markdown."""
    peers, earlies, fulls = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed in range(rounds):
            options = f"--train.seed {seed}"
            peers.append(run_nanogpt(clone, text, work, seed, "shakespeare_char"))
            earlies.append(run_ours(text, work, f"{EARLY} {options}"))
            steps = steps_in(peers[-1].seconds, text, work)
            fulls.append(run_ours(text, work, f"{FULL} {options} --train.steps {steps}"))
            print(
                f"seed {seed}: nanoGPT {peers[-1].bpb:.3f} bits per byte in "
                f"{peers[-1].seconds:.1f} s; ours {earlies[-1].bpb:.3f} after "
                f"{earlies[-1].seconds:.1f} s, {fulls[-1].bpb:.3f} after {fulls[-1].seconds:.1f} s "
                f"({steps} steps)",
                flush=True,
            )

    dtype = "bfloat16" if bfloat16_is_fast(torch.device("cpu")) else "float32"
    ours = f"64 tokens, about 190 characters | {dtype} | Muon and AdamW"
    lines = [
        f"{describe_machine()}; medians of {rounds} seeds; not compiled on either side",
        "",
        "| | parameters | context | format | optimizer | bits per byte of the whole last tenth "
        "| seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    differences = {
        "nanoGPT, CPU recipe": (peers, "64 characters | float32 | AdamW"),
        "tinyfm, to pass nanoGPT": (earlies, ours),
        "tinyfm, in nanoGPT's time": (fulls, ours),
    }
    for name, (results, how) in differences.items():
        own = medians(results)
        lines.append(
            f"| {name} | {own.parameters:,.0f} | {how} | {own.bpb:.3f} | {own.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


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
    kinds = ("bytes", "shakespeare", "throughput")
    parser.add_argument("what", choices=kinds, help="what to compare")
    parser.add_argument("nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("text", type=Path, nargs="?", help="tiny Shakespeare; not for throughput")
    parser.add_argument(
        "--rounds", type=int, default=3, help="seeds; throughput times 4 steps in each round"
    )
    parser.add_argument("--record", action="store_true", help="write into benchmarks/README.md")
    options = parser.parse_args()
    if not (options.nanogpt / "model.py").is_file():
        parser.error(
            f"{options.nanogpt} is no clone of nanoGPT: there is no model.py in it; "
            "git clone https://github.com/karpathy/nanoGPT"
        )
    if options.what == "throughput":
        print(describe_machine())
        compare_throughput(options.nanogpt, 4 * options.rounds)
        return
    if options.text is None:
        parser.error(f"{options.what} needs a text: give the path of tiny Shakespeare's input.txt")
    compare = compare_bytes if options.what == "bytes" else compare_quality
    table = compare(options.nanogpt, options.text.resolve(), options.rounds)
    print(table)
    if options.record:
        record(f"nanogpt {options.what}", table)


if __name__ == "__main__":
    main()
