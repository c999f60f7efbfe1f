"""Helpers of the benchmarks: the machine in words, a training step, and the times of functions."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

Work = Callable[[], object]
PAGE = Path(__file__).with_name("README.md")


def processor() -> str:
    """The name that Linux gives the processor; on other systems, the one that Python gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> str:
    """The date, processor, number of threads, version of torch, and commit, in one line."""
    threads = torch.get_num_threads()
    about = f"{date.today()}, {processor()}, {threads} threads, torch {torch.__version__}"
    asked = ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return f"{about}, commit {found.stdout.strip()}" if found.returncode == 0 else about


def record(mark: str, text: str, page: Path = PAGE) -> None:
    """Write text into the page of recorded results, between `<!-- mark -->` and `<!-- end -->`."""
    content = page.read_text(encoding="utf-8")
    start = content.index(f"<!-- {mark} -->\n") + len(f"<!-- {mark} -->\n")
    end = content.index("<!-- end -->", start)
    page.write_text(content[:start] + text + content[end:], encoding="utf-8")


def seconds_of(work: Work) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def by_turns(works: dict[str, Work], repeats: int) -> dict[str, float]:
    """Median seconds of each function.

    Every round calls each function once, so that a machine which slows down slows all of them. A
    first round, which is not timed, warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(repeats + 1):
        for name, work in works.items():
            elapsed = seconds_of(work)
            if round_number > 0:
                times[name].append(elapsed)
    return {name: statistics.median(elapsed) for name, elapsed in times.items()}


def training_step(
    loss_of: Callable[[], torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    dtype: torch.dtype,
) -> Work:
    """A function that takes one training step on the CPU, with matrix products in `dtype`."""

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def main() -> None:
    """Write what stdin says into the block of the page that the argument names (see all.sh)."""
    printed = sys.stdin.read().strip("\n")
    if describe_machine() not in printed:
        printed = f"{describe_machine()}\n{printed}"
    record(sys.argv[1], textwrap.indent(printed, "    ") + "\n")


if __name__ == "__main__":
    main()
