"""Know before you train: parameters, memory, FLOPs, time and cost of a model.

python -m tinyfm.calc gpt3-175b                                   # a published system
python -m tinyfm.calc gpt3-175b --gpu h100 --gpus 1024 --tokens 300e9
python -m tinyfm.calc llama3-8b --fit 24GiB                       # does it fit, and how?
python -m tinyfm.calc --compare gpt2 bloom-176b sd1-unet --plot memory.png
python -m tinyfm.calc runs/gpt                                    # a run of one's own, or a preset
python -m tinyfm.calc optimal 5.76e23                             # how to spend so many FLOPs
python -m tinyfm.calc fit runs/sweep-* --held-out runs/sweep-large    # a law of one's own runs

Published systems are counted by closed forms (ledgers.py, systems.py), modules of our own by
running them on tensors without memory (measure.py); memory.py adds up bytes, gpus.py hours and
dollars. Here they are put together and printed. torch is imported only for what is our own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinyfm.calc import memory, report, systems
from tinyfm.calc.estimate import measured, micro_batch
from tinyfm.calc.memory import Layout, Network, Training
from tinyfm.calc.report import Parser, Report
from tinyfm.common import gpus
from tinyfm.common.gpus import Assumptions
from tinyfm.recipes.run_dir import rebuild

if TYPE_CHECKING:
    pass

# ---- a module about to be trained ---------------------------------------------------------------
# ---- what the command line asks about -----------------------------------------------------------


def own(name: str, run) -> tuple[Network, Training]:
    """A run of one's own: its network, and how it trains. In float32, with 16-bit products."""

    with torch.device("meta"):
        model = run.build_model()
    if not hasattr(model, "example_batch"):
        raise ValueError(f"{type(model).__name__} has no example_batch(rows): nothing to measure")
    rows, several = micro_batch(model, run.train)
    dtype = torch.float32 if run.train.dtype == "float32" else torch.bfloat16
    network = measured(name, model, run.optim, rows, several, run.train.micro_batch_size, dtype)
    network = replace(network, trained=run.train.steps * run.train.batch_size * network.row)
    return network, Training(rows, "fp32", run.optim.optimizer)


def find(name: str, context: int = 0) -> tuple[Network, Training | None]:
    """A published system, a run directory or a preset, by name. ValueError if there is none."""
    if name in systems.rows():
        return systems.get(name, context), None
    if context:
        raise ValueError(f"--context is for published systems; {name!r} is none")
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} is not a run directory: it has no config.json")
        return own(name, rebuild(path / "config.json"))
    from tinyfm.recipes import registry

    if name in registry.PRESETS:
        return own(name, registry.get_preset(name).run)
    hint = systems.nearest(name, [*systems.rows(), *registry.PRESETS])
    if path.parent.name:
        hint = "a run is there once train.py has begun it"
    raise ValueError(f"there is no system, preset or run directory {name!r}; {hint}")


def choose_dtype(asked: str, gpu: gpus.GPU | None) -> str:
    """The format asked for; else bf16, or the first that the GPU has."""
    if asked and gpu:
        gpu.peak(asked)  # raises if it has none
    return asked or (next(iter(gpu.peaks)) if gpu else "bf16")


def make_report(name: str, options: argparse.Namespace) -> Report:
    """Raises ValueError for what does not exist or cannot be laid out."""
    gpu = gpus.get(options.gpu) if options.gpu else None
    assumed = Assumptions(
        options.gpus, choose_dtype(options.dtype, gpu), options.mfu, options.availability,
        options.price, options.pue,
    )  # fmt: skip
    network, training = find(name, options.context)
    training = training or Training(dtype=assumed.dtype, fused=not options.unfused)
    asked = {key: getattr(options, key) for key in ("rows", "optimizer", "checkpoint")}
    training = replace(training, **{key: value for key, value in asked.items() if value})
    zero = options.zero if options.zero is not None else 3 if options.gpus > 1 else 0
    layout = Layout(options.gpus, options.tensor, options.pipeline, zero, options.sequence)
    units = options.tokens or network.trained
    flops, bill = units * network.flops_per_row() / network.row, None
    if gpu and units:
        busy = gpus.busy_hours(flops, gpu, assumed.dtype, assumed.mfu)
        bill = gpus.bill(busy, gpu, assumed.gpus, assumed.availability, assumed.price, assumed.pue)
    return Report(
        network, training, layout, memory.training_memory(network, training, layout),
        memory.serving_memory(network, network.row, 1, assumed.dtype), units, flops, assumed, gpu,
        bill,
    )  # fmt: skip


# ---- the command line ---------------------------------------------------------------------------


def count(text: str) -> int:
    """A whole number of at least 1; 300e9 and 1_000 are numbers too."""
    value = amount(text)
    if value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(value)


def amount(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m tinyfm.calc", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="a published system, a run directory or a preset")
    add("--list", action="store_true", help="all published systems")
    add("--compare", action="store_true", help="a table of several names")
    add("--json", action="store_true", help="print JSON")
    add("--plot", metavar="PNG", help="draw the memory of training, by term")
    add("--fit", metavar="24GiB", help="does training fit into that memory of a GPU, and how?")
    add("--gpu", help=f"one of {', '.join(gpus.GPUS)}")
    add("--gpus", type=count, default=1, help="how many (default 1)")
    add("--tokens", type=amount, help="to train on, or images; what was published, if not given")
    add("--context", type=count, default=0, help="tokens of a row, if not the published number")
    add("--rows", type=count, help="rows of a micro-batch (default 1)")
    add("--dtype", default="", help="bf16 (default), fp16 or fp32")
    add("--optimizer", help="adamw (default) or muon")
    add("--checkpoint", help="activation checkpointing: none (default), selective or full")
    add("--unfused", action="store_true", help="attention that stores its scores")
    add("--zero", type=int, help="0 = DDP, 1, 2, 3 = FSDP2 (default where there are more GPUs)")
    add("--tensor", type=count, default=1, help="GPUs that share each matrix (default 1)")
    add("--sequence", action="store_true", help="these also share what lies between matrices")
    add("--pipeline", type=count, default=1, help="GPUs that share the blocks (default 1)")
    add("--mfu", type=amount, default=0.4, help="share of the peak that is reached (default 0.4)")
    add("--availability", type=amount, default=1.0, help="share of the time it runs (default 1)")
    add("--price", type=amount, help="USD a GPU-hour; a dated price, if not given")
    add("--pue", type=amount, default=1.1, help="energy of the building over GPUs' (default 1.1)")
    options = parser.parse_args(argv)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for what is asked together and cannot be, or would not be heard."""
    if not options.list and not options.names:
        raise ValueError("name a system, a preset or a run directory; --list shows the systems")
    if len(options.names) > 1 and not options.compare:
        raise ValueError(f"{len(options.names)} names: add --compare for a table of them")
    if options.list and options.names:
        raise ValueError(f"--list shows all systems; leave out {' '.join(options.names)}")
    if options.compare and (options.json or options.fit):
        raise ValueError("--compare prints a table; ask for --json or --fit of one name at a time")
    if options.fit and options.json:
        raise ValueError("--fit answers in words; leave out --json")
    for name in ("rows", "checkpoint", "zero"):
        if options.fit and getattr(options, name) is not None:
            raise ValueError(f"--fit finds the layout and the rows; leave out --{name}")
    if options.fit and options.tensor * options.pipeline > 1:
        raise ValueError("--fit lays out DDP and FSDP2; leave out --tensor and --pipeline")


def read_budget(argv: list[str]) -> float:
    parser = Parser("python -m tinyfm.calc optimal")
    parser.add_argument("flops", type=amount, help="to spend on training")
    return parser.parse_args(argv).flops


def answer(argv: list[str]) -> str:
    """What is asked for, as text. Raises ValueError for what cannot be answered."""
    if argv[:1] == ["fit"]:
        from tinyfm.calc import sweep

        return sweep.fit_runs(argv[1:])
    if argv[:1] == ["optimal"]:
        from tinyfm.calc import scaling_laws

        return scaling_laws.optima_text(read_budget(argv[1:]))
    options = read_arguments(argv)
    if options.list:
        found = map(systems.get, systems.rows())
        return "\n".join(f"{s.name:18} {s.parameters:>15,}  {s.source}" for s in found)
    reports = [make_report(name, options) for name in options.names]
    if options.plot:
        report.plot(reports, options.plot)
    if options.compare:
        return report.table(reports)
    if options.fit:
        return report.fit_text(reports[0], options.fit)
    if options.json:
        return json.dumps(report.to_json(reports[0]), indent=2)
    return report.to_text(reports[0])


def main() -> int | str:
    try:
        print(answer(sys.argv[1:]))
    except (ValueError, OSError) as error:
        return f"error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
