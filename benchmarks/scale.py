"""What several processes gain, what a rank holds, and what saving and fault handling cost.

    python benchmarks/scale.py [--steps 30] [--d-model 256] [--n-layer 4]

On a CPU, one thread a process, the same GPT and global batch:
- rows a second of DDP and of FSDP2 on two processes over those of one: 2 would be perfect
- bytes of weights and averages, and the highest memory, of each rank
- how long training waits for a checkpoint, over the time to write it, and how slow steps are then
- what a step spends on signals, on what is not finite and on counting it
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tinyfm.common import device
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training import distributed
from tinyfm.training.distributed import local
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig, Trainer

ROWS, WARMUP = 16, 3


class Tokens:
    """Random tokens: what they say does not matter here."""

    unit, units_per_row = "rows", 1

    def __init__(self, config: GPTConfig):
        self.config = config

    def batch(self, step: int, part: slice) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(step)
        shape = (ROWS, self.config.context_length + 1)
        return {"tokens": torch.randint(self.config.vocab_size, shape, generator=g)[part]}


def make(options: argparse.Namespace, out: Path, world: distributed.World) -> Trainer:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=options.n_layer, d_model=options.d_model)
    where = {"device": "cpu", "dtype": "float32", "parallel": options.parallel}
    train, optim = TrainConfig(10**6, ROWS, ROWS // 2, **where), OptimConfig("adamw")
    return Trainer(GPT(config), Tokens(config), train, optim, out, world=world)


def time_steps(trainer: Trainer, steps: int) -> float:
    """Median seconds of a step."""
    seconds = []
    for step in range(WARMUP + steps):
        begin = time.perf_counter()
        trainer.update(step)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[WARMUP:])


def held_bytes(trainer: Trainer) -> int:
    """Of the weights and the optimizers' averages on this rank."""
    averages = [t for o in trainer.optimizers for s in o.state.values() for t in s.values()]
    return sum(local(t).nbytes for t in [*trainer.model.parameters(), *averages])


def time_saving(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Of one checkpoint: the wait for it, the time to write it, and what steps take meanwhile."""
    trainer.save()
    trainer.saver.wait()  # the first one loads what writes it
    steps, begin = 0, time.perf_counter()
    trainer.save()
    stalled = time.perf_counter() - begin
    while trainer.saver.thread.is_alive():
        trainer.update(steps)
        steps += 1
    written = time.perf_counter() - begin - stalled
    return {"stall_s": stalled, "write_s": written, "slower": written / max(1, steps) / seconds}


def time_faults(trainer: Trainer) -> float:
    """Seconds a step for what makes it safe: all but the sums it needs anyway."""
    n = 1000
    begin = time.perf_counter()
    for _ in range(n):
        sums = trainer.signals.total(torch.zeros(2))
        trainer.signals.agree(sums.tolist()[-1])
        trainer.guard.passes(1.0, 1.0)
    return (time.perf_counter() - begin) / n


def rank(options: argparse.Namespace) -> None:
    """One process of a measurement; the first prints what it found."""
    torch.set_num_threads(1)
    world = distributed.start()
    trainer = make(options, Path(options.out), world)
    seconds = time_steps(trainer, options.steps)
    found = {"rows_per_s": ROWS / seconds, "held": held_bytes(trainer),
             "peak": device.peak_memory_bytes(trainer.device)}  # fmt: skip
    found |= time_saving(trainer, seconds)
    found["faults"] = time_faults(trainer) / seconds
    distributed.total(torch.zeros(1))  # nobody leaves before the others are done
    if world.first:
        print(json.dumps(found), flush=True)
    os._exit(0)  # gloo's threads now and then abort an orderly exit


def measure(parallel: str, processes: int, words: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), __file__, *words,
                   "--parallel", parallel, "--out", out]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=4)
    for name in ("--parallel", "--out"):  # of one process of a measurement
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        rank(options)
    one = {}
    for parallel, processes in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
        found = measure(parallel, processes, sys.argv[1:])
        one = one or found
        name = f"{parallel} on {processes}" if processes > 1 else "one process"
        print(
            f"{name:12} {found['rows_per_s']:6.1f} rows/s = "
            f"{found['rows_per_s'] / one['rows_per_s']:.2f} x; a rank holds "
            f"{found['held'] / 2**20:.1f} MiB, peak {found['peak'] / 2**20:.0f} MiB; a checkpoint "
            f"stalls {1e3 * found['stall_s']:.0f} ms of {1e3 * found['write_s']:.0f} ms = "
            f"{found['stall_s'] / found['write_s']:.1%}, steps meanwhile take "
            f"{found['slower']:.2f} x; faults {found['faults']:.3%} of a step", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
