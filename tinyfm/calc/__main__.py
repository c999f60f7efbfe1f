"""Know before you train: parameters, memory, FLOPs, time and cost of a model.

    python -m tinyfm.calc gpt3-175b                   # a published system
    python -m tinyfm.calc gpt3-175b --gpu h100 --gpus 1024 --tokens 300e9
    python -m tinyfm.calc llama3-8b --fit 24GiB       # does it fit, and how?
    python -m tinyfm.calc --compare gpt2 bloom-176b sd1-unet --plot memory.png
    python -m tinyfm.calc runs/gpt                    # your run, or a preset
    python -m tinyfm.calc cluster llama-1b --gpus 64  # simulate FSDP2
    python -m tinyfm.calc optimal 5.76e23             # divide a budget of FLOPs
    python -m tinyfm.calc budget 10m                  # what ten minutes here buy
    python -m tinyfm.calc sweep                       # fit a scaling law
    python -m tinyfm.calc fit runs/a runs/b ... --held-out runs/c  # of your own

Published systems are counted by closed forms (ledgers.py, systems.py), modules of this repository
by running them on tensors without memory (trace.py). memory.py adds up bytes, gpus.py hours and
dollars, and report.py prints them.
"""

# Only this file of calc/ looks up names: of systems, run directories and presets. It imports torch
# and the recipes inside functions, where they are needed: a question about a published system is
# answered at once.

from __future__ import annotations

import argparse
import inspect
import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyfm.calc import memory, report, systems
from tinyfm.calc.memory import Layout, Training
from tinyfm.calc.network import Network
from tinyfm.calc.report import Estimate
from tinyfm.common import gpus
from tinyfm.common.console import fill, run_command
from tinyfm.common.gpus import GPU, Assumptions

if TYPE_CHECKING:
    from torch import nn

    from tinyfm.calc.systems import System
    from tinyfm.gpt import GPTConfig
    from tinyfm.recipes.base import Run
    from tinyfm.training.optim import OptimConfig

HELD_OUT = "sweep-large"  # the preset that `sweep` predicts

# ---- names --------------------------------------------------------------------------------------


def look_up(name: str, context: int = 0) -> tuple[Network, Training | None]:
    """The network of a name, and how it trains if that is known.

    The name is a published system, a run directory or a preset. Raises ValueError for any other
    one, with the nearest names.
    """
    if name in systems.rows():
        return systems.get(name, context), None
    if context:
        raise ValueError(f"--context is for published systems; {name!r} is none")
    return measure_run(name, find_run(name))


def find_run(name: str) -> Run:
    """The run of a run directory or a preset. Raises ValueError if there is neither."""
    from tinyfm.recipes import registry

    if Path(name).is_dir():
        return read_run_directory(name)
    presets = registry.all_presets()
    if name in presets:
        return presets[name].run
    if Path(name).parent.name:  # it looks like a path
        hint = "train.py makes a run directory when it starts a run"
    else:
        hint = systems.nearest(name, [*systems.rows(), *presets])
    raise ValueError(f"there is no system, preset or run directory {name!r}; {hint}")


def read_run_directory(folder: str) -> Run:
    """The run that a directory's config.json records. Raises ValueError if there is none."""
    from tinyfm.recipes import run_dir

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run directory: it has no config.json")
    return run_dir.read_run(path)


def measure_run(name: str, run: Run) -> tuple[Network, Training]:
    """The network of a run, and how it trains: weights in float32, products as it says."""
    import torch

    from tinyfm.calc import estimate

    with torch.device("meta"):
        model = run.build_model()
    if not hasattr(model, "example_batch"):
        raise ValueError(f"{type(model).__name__} has no example_batch(rows): nothing to measure")
    rows, several = estimate.micro_batch(model, run.train)
    dtype = torch.float32 if run.train.dtype == "float32" else torch.bfloat16
    at_once = run.train.micro_batch_size
    network = estimate.measured(name, model, run.optim, rows, several, at_once, dtype)
    units = run.train.steps * run.train.batch_size * network.row
    return replace(network, trained=units), Training(rows, "fp32", run.optim.optimizer)


# Families of systems that are GPTs, and their style in recipes/gpt.py.
GPT_STYLES = {
    "gpt": "gpt2", "bloom": "bloom", "llama": "llama", "falcon": "falcon", "palm": "palm",
}  # fmt: skip
# Names of GPTConfig's fields, and of the columns of systems.csv.
GPT_SIZES = {
    "n_layer": "layers",
    "n_head": "heads",
    "n_kv_head": "kv_heads",
    "d_ff": "d_ff",
    "d_model": "d_model",
    "d_head": "d_head",
    "vocab_size": "vocab",
    "context_length": "context",
}


def gpt_config(system: System) -> GPTConfig:
    """The config of our GPT that is this published system, but for multipliers, which cost nothing.

    Raises ValueError for a system that is no GPT, and for a mixture of experts.
    """
    from tinyfm.gpt import GPTConfig
    from tinyfm.recipes.gpt import STYLES

    c = system.shape
    if system.family not in GPT_STYLES:
        families = ", ".join(GPT_STYLES)
        problem = f"{system.name} is of family {system.family}"
        raise ValueError(f"{problem}; use a system of one of these: {families}")
    if c["experts"] > 1:
        raise ValueError(f"{system.name} is a mixture of experts, which our GPT is not")
    style = GPT_STYLES[system.family]
    if style == "gpt2" and not c["final_norm"]:
        style = "gpt1"
    if style == "falcon" and c["norms"] == 2:
        style = "falcon-40b"
    sizes = {field: c[column] for field, column in GPT_SIZES.items()}
    options = {"tied": c["head"] == "tied", "qk_norm": bool(c["qk_norm"]), "window": c["window"]}
    return GPTConfig(**STYLES[style] | sizes | options)


def find_trainable(name: str) -> tuple[nn.Module, OptimConfig, int]:
    """(model on the "meta" device, its optimizer, rows of a batch), for a job on a cluster.

    The name is a preset, or a published system that is a GPT; such a system has no batch, so its
    rows are 0. Raises ValueError for any other name.
    """
    import torch

    from tinyfm.gpt import GPT
    from tinyfm.recipes import registry
    from tinyfm.training.optim import OptimConfig

    if name not in systems.rows():
        run = registry.get_preset(name).run
        with torch.device("meta"):
            return run.build_model(), run.optim, run.train.batch_size
    config = gpt_config(systems.get(name))
    with torch.device("meta"):
        return GPT(config), OptimConfig("adamw"), 0


# ---- an estimate --------------------------------------------------------------------------------


def choose_dtype(given: str, gpu: GPU | None) -> str:
    """The given number format; without one, bf16 or the first that the GPU has.

    Raises ValueError if there is no such format, or the GPU does not have it.
    """
    if given and given not in gpus.DTYPE_BYTES:
        raise ValueError(f"dtype is {given!r}; use {' or '.join(gpus.DTYPE_BYTES)}")
    if given and gpu:
        gpu.peak(given)
    if given:
        return given
    return next(iter(gpu.peaks)) if gpu else "bf16"


def make_estimate(name: str, options: argparse.Namespace) -> Estimate:
    """Compute everything about a name under these options.

    Raises ValueError for a name or a GPU that does not exist, and an impossible layout.
    """
    gpu = gpus.get(options.gpu) if options.gpu else None
    assumed = Assumptions(
        gpus=options.gpus,
        dtype=choose_dtype(options.dtype, gpu),
        mfu=options.mfu,
        availability=options.availability,
        price=options.price,
        watts=options.watts,
        pue=options.pue,
    )

    # The network, and how it is trained: as its run says, unless an option says otherwise.
    network, training = look_up(name, options.context)
    if training is None:
        # Of training in FP8 only the products are: what is kept stays in bf16 (Micikevicius et al.
        # 2022).
        kept = "bf16" if assumed.dtype == "fp8" else assumed.dtype
        training = Training(dtype=kept, fused=not options.unfused)
    for field in ("rows", "optimizer", "checkpoint"):
        value = getattr(options, field)
        if value:
            training = replace(training, **{field: value})
    zero = options.zero
    if zero is None:
        zero = 3 if options.gpus > 1 else 0
    layout = Layout(options.gpus, options.tensor, options.pipeline, zero, options.sequence)

    # The whole training, and its time and cost on that GPU.
    units = options.tokens or network.trained
    flops = units * network.flops_per_row() / network.row
    bill = None
    if gpu and units:
        busy = gpus.busy_hours(flops, gpu, assumed.dtype, assumed.mfu)
        bill = gpus.bill(
            busy,
            gpu,
            assumed.gpus,
            assumed.availability,
            assumed.price,
            assumed.watts,
            assumed.pue,
        )
    return Estimate(
        network=network,
        training=training,
        layout=layout,
        memory=memory.training_memory(network, training, layout),
        serving=memory.serving_memory(network, network.row, 1, assumed.dtype),
        block_bytes=memory.block_bytes(network, training, layout),
        units=units,
        flops=flops,
        assumed=assumed,
        gpu=gpu,
        bill=bill,
    )


# ---- options ------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong options, instead of ending the program."""

    def __init__(self, command: str, about: str):
        width = min(shutil.get_terminal_size().columns, 100)
        super().__init__(
            command,
            description=fill(inspect.cleandoc(about), width),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise ValueError(message)


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


N = {"type": count, "metavar": "N"}
X = {"type": amount, "metavar": "X"}


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m tinyfm.calc", __doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="a published system, a run directory or a preset")
    # What to print.
    add("--list", action="store_true", help="list all published systems")
    add("--compare", action="store_true", help="print a table of several names")
    add("--json", action="store_true", help="print JSON")
    add("--plot", metavar="PNG", help="draw the memory of training, by term")
    add("--fit", metavar="24GiB", help="does training fit into that memory of a GPU, and how?")
    # The job.
    add("--gpu", metavar="NAME", help=f"GPU to train on, one of {', '.join(gpus.GPUS)}")
    add("--gpus", **N, default=1, help="number of GPUs (default 1)")
    add(
        "--tokens",
        **X,
        help="tokens, or images, to train on (default as published)",
    )
    add(
        "--context",
        **N,
        default=0,
        help="tokens of a row (default as published)",
    )
    add("--rows", **N, help="rows of a micro-batch (default 1)")
    add(
        "--dtype",
        metavar="NAME",
        default="",
        help="number format: bf16 (default), fp16, fp32 or fp8",
    )
    add("--optimizer", metavar="NAME", help="adamw (default) or muon")
    add(
        "--checkpoint",
        metavar="NAME",
        help="activation checkpointing: none (default), selective or full",
    )
    add("--unfused", action="store_true", help="use attention that stores its scores")
    # The layout on several GPUs.
    add(
        "--zero",
        type=int,
        metavar="N",
        help="ZeRO stage: 0 = DDP, 1, 2, or 3 = FSDP2 (default on many GPUs)",
    )
    add(
        "--tensor",
        **N,
        default=1,
        help="GPUs that divide each matrix (default 1)",
    )
    add("--sequence", action="store_true", help="these also divide activations between matrices")
    add(
        "--pipeline",
        **N,
        default=1,
        help="groups that divide the blocks (default 1)",
    )
    # Assumptions about time and cost.
    add(
        "--mfu",
        **X,
        default=0.4,
        help="share of the peak that is reached (default 0.4)",
    )
    add(
        "--availability",
        **X,
        default=1.0,
        help="share of the time it runs (default 1)",
    )
    add(
        "--price",
        **X,
        help="USD a GPU-hour (default a dated price of the GPU)",
    )
    add(
        "--watts",
        **X,
        help="W of a GPU and its share of the server (default at most)",
    )
    add(
        "--pue",
        **X,
        default=1.1,
        help="energy of the building over that of its computers (default 1.1)",
    )
    options = parser.parse_args(argv)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that are incompatible, or would be ignored."""
    if not options.list and not options.names:
        raise ValueError("name a system, a preset or a run directory; --list shows the systems")
    if len(options.names) > 1 and not options.compare:
        raise ValueError(f"{len(options.names)} names: add --compare for a table of them")
    if options.list and options.names:
        raise ValueError(f"--list shows all systems; leave out {' '.join(options.names)}")
    if options.compare and (options.json or options.fit):
        raise ValueError("--compare prints a table; use --json and --fit with one name at a time")
    if options.fit and options.json:
        raise ValueError("--fit answers in words; leave out --json")
    for name in ("rows", "checkpoint", "zero"):
        if options.fit and getattr(options, name) is not None:
            raise ValueError(f"--fit finds the layout and the rows; leave out --{name}")
    if options.fit and options.tensor * options.pipeline > 1:
        raise ValueError("--fit compares DDP and FSDP2; leave out --tensor and --pipeline")


# ---- commands -----------------------------------------------------------------------------------


def answer(argv: list[str]) -> str:
    """The output of a command line, as text. Raises ValueError and OSError."""
    commands = {
        "budget": answer_budget,
        "cluster": answer_cluster,
        "fit": answer_fit,
        "optimal": answer_optimal,
        "sweep": answer_sweep,
    }
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    options = read_arguments(argv)
    if options.list:
        return list_systems()
    estimates = [make_estimate(name, options) for name in options.names]
    if options.plot:
        from data.pictures import check_free

        check_free(options.plot)
        report.plot(estimates, options.plot)
    if options.compare:
        return report.table(estimates)
    (estimate,) = estimates
    if options.fit:
        budget = memory.read_bytes(options.fit)
        fit = memory.check_fit(estimate.network, budget, estimate.training, options.gpus)
        return report.fit_text(estimate.network, fit, options.fit)
    if options.json:
        return json.dumps(report.to_json(estimate), indent=2)
    return report.to_text(estimate)


def list_systems() -> str:
    found = [systems.get(name) for name in systems.rows()]
    lines = [f"{system.name:18} {system.parameters:>15,}  {system.source}" for system in found]
    return "\n".join(lines)


def answer_budget(argv: list[str]) -> str:
    """Plan a run for a budget, as train.py --budget does, without training it.

    BUDGET is a time of this machine (90s, 10m, 2h), FLOPs (1e13 FLOP), tokens (20M tokens), or
    dollars for a rented GPU (5 dollars).
    """
    parser = Parser("python -m tinyfm.calc budget", answer_budget.__doc__)
    parser.add_argument("budget", nargs="+", metavar="BUDGET", help="what may be spent")
    parser.add_argument("--preset", metavar="NAME", default="gpt", help="preset (default gpt)")
    parser.add_argument("--gpu", metavar="NAME", default="", help="GPU that dollars are spent on")
    options = parser.parse_args(argv)
    started = time.perf_counter()

    from tinyfm.recipes import budget, registry

    preset = registry.find_preset(options.preset)
    run = replace(preset.run, budget=" ".join(options.budget), gpu=options.gpu)
    return str(budget.turn(options.preset, preset, run, started))


def answer_cluster(argv: list[str]) -> str:
    """Simulate training with FSDP2 on many GPUs: memory, communication and time of a step."""
    parser = Parser("python -m tinyfm.calc cluster", answer_cluster.__doc__)
    add = parser.add_argument
    add("name", metavar="NAME", help="a preset, or a published system that is a GPT")
    add("--gpus", **N, default=64, help="number of GPUs (default 64)")
    add(
        "--shard-size",
        type=int,
        metavar="N",
        default=0,
        help="GPUs that share one copy; 0 = all (default)",
    )
    add(
        "--rows",
        type=int,
        metavar="N",
        default=0,
        help="rows of the batch on each GPU; 0 = its share (default)",
    )
    add(
        "--gpu",
        metavar="NAME",
        default="h100",
        help=f"one of {', '.join(gpus.GPUS)} (default h100)",
    )
    options = parser.parse_args(argv)
    gpu = gpus.get(options.gpu)
    model, optim, batch = find_trainable(options.name)
    rows = options.rows or max(1, batch // options.gpus)

    from tinyfm.calc import cluster

    job = cluster.simulate(model, optim, rows, options.gpus, gpu, options.shard_size)
    return cluster.to_text(options.name, job, options.gpus, gpu, options.shard_size)


def fit_and_draw(folders: list[str], held_out: list[str], picture: Path) -> str:
    """The law of the runs in these folders, as text; a picture of it goes to `picture`."""
    from data.pictures import check_free
    from tinyfm.calc import sweep

    def read(folders: list[str]) -> list[sweep.Point]:
        return [sweep.read_point(Path(folder), read_run_directory(folder)) for folder in folders]

    check_free(picture)
    found = sweep.fit(read(folders), read(held_out))
    sweep.plot(found, picture)
    return f"{sweep.to_text(found)}\ndrawn in {picture}"


def answer_fit(argv: list[str]) -> str:
    """Fit a scaling law to finished runs, and draw it. With --held-out: predict larger ones."""
    parser = Parser("python -m tinyfm.calc fit", answer_fit.__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="directories of finished runs on the same data")
    add("--held-out", nargs="+", default=[], metavar="RUN", help="larger runs, to predict")
    add("--plot", metavar="PNG", default="", help="picture (default scaling.png next to the runs)")
    options = parser.parse_args(argv)
    # A pattern such as runs/sweep-* may match the runs that are held out too.
    apart = {Path(folder).resolve() for folder in options.held_out}
    folders = [folder for folder in options.runs if Path(folder).resolve() not in apart]
    picture = Path(options.plot or Path(options.runs[0]).parent / "scaling.png")
    return fit_and_draw(folders, options.held_out, picture)


MOST_RUNS = 1000  # of each size


def answer_sweep(argv: list[str]) -> str:
    """Measure a scaling law.

    Train the presets sweep-1, sweep-2 ... and sweep-large, each with several seeds, fit a law to
    all but the last, and compare its prediction. The same command continues after a stop.
    """
    parser = Parser("python -m tinyfm.calc sweep", answer_sweep.__doc__)
    add = parser.add_argument
    add("--seeds", **N, default=3, help="runs of each size (default 3)")
    add(
        "--at-once",
        **N,
        default=2,
        help="runs at a time, one thread each (default 2)",
    )
    add("--out", default="runs/sweep", help="folder for the runs (default runs/sweep)")
    add("options", nargs="*", metavar="OPTIONS", help="options of train.py for all runs, after --")
    options = parser.parse_args(argv)
    for name in ("seeds", "at_once"):
        value = getattr(options, name)
        if value > MOST_RUNS:
            raise ValueError(f"--{name.replace('_', '-')} {value}: use at most {MOST_RUNS}")

    from tinyfm.calc import sweep
    from tinyfm.recipes import registry

    # The longest first, so that both threads are busy to the end.
    names = [name for name in registry.all_presets() if name.startswith("sweep-")][::-1]
    out = Path(options.out)
    jobs = [
        sweep.Job(out / f"{name}-seed-{seed}", (name, "--train.seed", str(seed), *options.options))
        for name in names
        for seed in range(options.seeds)
    ]
    sweep.train_all(jobs, options.at_once)
    folders = [str(job.folder) for job in jobs if job.words[0] != HELD_OUT]
    held_out = [str(job.folder) for job in jobs if job.words[0] == HELD_OUT]
    return fit_and_draw(folders, held_out, out / "scaling.png")


def answer_optimal(argv: list[str]) -> str:
    """Divide a budget of FLOPs between parameters and tokens, by published laws."""
    parser = Parser("python -m tinyfm.calc optimal", answer_optimal.__doc__)
    parser.add_argument("flops", type=amount, metavar="FLOPS", help="FLOPs to spend on training")
    options = parser.parse_args(argv)

    from tinyfm.calc import scaling_laws

    return scaling_laws.optima_text(options.flops)


def main() -> int | str:
    try:
        text = answer(sys.argv[1:])
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    print(text)
    return 0


if __name__ == "__main__":
    trains = sys.argv[1:2] == ["sweep"]  # also if nobody reads its output
    sys.exit(run_command(main, lasting=trains))
