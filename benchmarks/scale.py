"""Measure training with several processes, and the cost of checkpoints and of fault handling.

    python benchmarks/scale.py [--steps 30] [--d-model 256] [--n-layer 4]

On a CPU, with one thread per process, always the same GPT and global batch. Prints for one process,
and for two processes under DDP and under FSDP2:

- rows per second, over those of one process; 2 would be perfect
- the bytes of weights and optimizer averages that a rank holds, and its peak memory
- how long training waits for a checkpoint, over the time to write it, and the time of the steps
  meanwhile, over that of other steps
- the share of a step that is spent on signals and on skipping steps that are not finite
"""

from __future__ import annotations

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import seconds_of

from tinyfm.common import device
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training import distributed
from tinyfm.training.distributed import local
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig, Trainer

ROWS = 16  # of the global batch
WARMUP = 3  # steps that are not timed
FAULT_CHECKS = 1000  # timed calls of the fault handling
MiB = 2**20


class RandomTokens:
    """Data for the trainer: random tokens, as their values do not matter here."""

    unit = "rows"
    units_per_row = 1

    def __init__(self, config: GPTConfig):
        self.config = config

    def batch(self, step: int, part: slice) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        shape = (ROWS, self.config.context_length + 1)
        tokens = torch.randint(self.config.vocab_size, shape, generator=generator)
        return {"tokens": tokens[part]}


# ---- one rank -----------------------------------------------------------------------------------


def make_trainer(options: argparse.Namespace, world: distributed.World) -> Trainer:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=options.n_layer, d_model=options.d_model)
    train = TrainConfig(
        steps=10**6,
        batch_size=ROWS,
        micro_batch_size=ROWS // 2,
        device="cpu",
        dtype="float32",
        parallel=options.parallel,
    )
    optim = OptimConfig("adamw")
    out = Path(options.out)
    return Trainer(GPT(config), RandomTokens(config), train, optim, out, world=world)


def time_steps(trainer: Trainer, steps: int) -> float:
    """Median seconds of a step."""
    times = [seconds_of(lambda step=step: trainer.update(step)) for step in range(WARMUP + steps)]
    return statistics.median(times[WARMUP:])


def held_bytes(trainer: Trainer) -> int:
    """Bytes of the weights and of the optimizers' averages on this rank."""
    tensors = list(trainer.model.parameters())
    for optimizer in trainer.optimizers:
        for averages in optimizer.state.values():
            tensors += averages.values()
    return sum(local(tensor).nbytes for tensor in tensors)


def time_saving(trainer: Trainer, step_seconds: float) -> dict[str, float]:
    """Save a checkpoint while training continues: times and the slowdown of the steps."""
    trainer.save()
    trainer.saver.wait()  # the first checkpoint loads the code that writes it
    steps = 0
    start = time.perf_counter()
    trainer.save()
    stalled = time.perf_counter() - start
    while trainer.saver.thread.is_alive():
        trainer.update(steps)
        steps += 1
    written = time.perf_counter() - start - stalled
    return {
        "stall_s": stalled,
        "write_s": written,
        "slower": written / max(1, steps) / step_seconds,
    }


def time_faults(trainer: Trainer) -> float:
    """Seconds per step for the fault handling; the sums that a step needs anyway are included."""
    start = time.perf_counter()
    for _ in range(FAULT_CHECKS):
        sums = trainer.signals.total(torch.zeros(2))
        trainer.signals.agree(sums.tolist()[-1])
        trainer.guard.passes(1.0, 1.0)
    return (time.perf_counter() - start) / FAULT_CHECKS


def run_rank(options: argparse.Namespace) -> None:
    """One process of a measurement; the first rank prints the results as JSON."""
    torch.set_num_threads(1)
    world = distributed.start()
    trainer = make_trainer(options, world)
    seconds = time_steps(trainer, options.steps)
    results = {
        "rows_per_s": ROWS / seconds,
        "held": held_bytes(trainer),
        "peak": device.peak_memory_bytes(trainer.device),
    }
    results |= time_saving(trainer, seconds)
    results["faults"] = time_faults(trainer) / seconds
    distributed.total(torch.zeros(1))  # wait for the other ranks
    if world.first:
        print(json.dumps(results), flush=True)
    os._exit(0)  # an orderly exit is sometimes aborted by gloo's threads


# ---- all measurements ---------------------------------------------------------------------------


def measure(parallel: str, processes: int, options: list[str]) -> dict[str, float]:
    """Start the processes of one measurement; return the results of the first rank."""
    launcher = [sys.executable]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [*torchrun, f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as out:
        command = [*launcher, __file__, *options, "--parallel", parallel, "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"a measurement failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def to_text(name: str, results: dict[str, float], rows_per_s_of_one: float) -> str:
    r = results
    return (
        f"{name:12} {r['rows_per_s']:6.1f} rows/s = {r['rows_per_s'] / rows_per_s_of_one:.2f} x; "
        f"a rank holds {r['held'] / MiB:.1f} MiB, peak {r['peak'] / MiB:.0f} MiB; "
        f"a checkpoint stalls {1e3 * r['stall_s']:.0f} ms of {1e3 * r['write_s']:.0f} ms = "
        f"{r['stall_s'] / r['write_s']:.1%}, steps meanwhile take {r['slower']:.2f} x; "
        f"faults {r['faults']:.3%} of a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--d-model", type=int, default=256, help="width of the GPT")
    parser.add_argument("--n-layer", type=int, default=4, help="layers of the GPT")
    # For one process of a measurement.
    parser.add_argument("--parallel", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        run_rank(options)

    given = sys.argv[1:]
    one = measure("ddp", 1, given)
    print(to_text("one process", one, one["rows_per_s"]), flush=True)
    for parallel in ("ddp", "fsdp"):
        two = measure(parallel, 2, given)
        print(to_text(f"{parallel} on 2", two, one["rows_per_s"]), flush=True)


if __name__ == "__main__":
    main()
