"""Launch: from the options of train.py to a trained run.

`resolve` turns a preset and options into a plan, in one pass: is the run new or resumed, which run
does it start from, which one teaches it, which parts must be trained first, what do the data add.
Nothing is trained and no model built before the plan stands. `describe` puts it into words for
--dry-run; `train` carries it out.

A run may start from another of its family, its base (--init-from): it takes the base's weights,
sizes and tokenizer. A GPT may learn from another's predictions, its teacher's. Some models have
parts that are other runs: text2image takes an autoencoder and a CLIP, dalle a VQ-VAE. Parts that
are not given are trained first, in OUT-OPTION, such as runs/text2image-clip. Bases and teachers are
never trained automatically. A run's checkpoints hold all weights it took: to resume or to open it,
the other runs are not needed.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfm import adapt
from tinyfm.calc import estimate
from tinyfm.common import device as devices
from tinyfm.common import files, units
from tinyfm.recipes import budget, registry, run_dir
from tinyfm.recipes.base import OpenRun, Preset, Run
from tinyfm.recipes.budget import Dial
from tinyfm.training import checkpoint, distributed
from tinyfm.training.log import read_metrics
from tinyfm.training.trainer import Trainer

# ---- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run as it will be trained."""

    name: str  # of the preset
    preset: Preset
    run: Run  # final: nothing replaces it later
    base: OpenRun | None = None
    teacher: OpenRun | None = None
    # By option: trained runs that supply parts, and plans of the parts to train first.
    given: dict[str, OpenRun] = field(default_factory=dict)
    first: dict[str, Plan] = field(default_factory=dict)
    # The opened data; None in a dry run, or if they need a part that is still to be trained.
    data: Any = None
    part: bool = False  # whether it is trained as a part of another run
    dial: Dial | None = None  # of a run with a budget


def resolve(
    name: str,
    preset: Preset,
    run: Run,
    world: distributed.World,
    part: bool = False,
    started: float | None = None,
) -> Plan:
    """The plan for a run with these options. preset: the run's, before the user's options. started:
    time.perf_counter() at which the command began.

    Raises ValueError for options that do not fit together, or runs that do not fit, before anything
    is trained.
    """
    if distributed.joined():
        options = {"preset": name, **run_dir.flatten(asdict(run))}
        distributed.check_alike(options | distributed.software(), world)
    changes = {}
    if not run.dry_run:
        out = Path(run.out)
        changes["resume"] = run_dir.check_directory(out, run.resume)
        if world.first and out.exists():
            run_dir.check_free(out)
        if changes["resume"]:
            run = run_dir.find_data(run, out)
        device = devices.choose_device(run.train.device)
        devices.choose_dtype(run.train.dtype, device)  # refuses what this machine does not have
    dial = None
    if run.budget is not None:
        dial = budget.turn(name, preset, run, started or time.perf_counter())
        run = dial.run
    elif run.gpu:
        raise ValueError(f"--gpu {run.gpu} is what a budget in dollars is spent on: add --budget")
    base = None
    if run.init_from:
        base = run_dir.open_base(run.init_from)
        changes |= from_base(run, base)
    elif run.adapt != "full":
        raise ValueError(f"--adapt {run.adapt} changes a trained model: add --init-from RUN")
    teacher = None
    if getattr(run, "teacher", ""):
        teacher = run_dir.open_run(run.teacher)
        changes |= from_teacher(run, preset.run, teacher, changes)
    elif getattr(run, "distil", None) != getattr(preset.run, "distil", None):
        raise ValueError("--distil.* says how to learn from a teacher: add --teacher RUN")
    given = {}
    first = {}
    if run.PARTS:
        source = run.out if changes.get("resume") else run.init_from
        if source:
            changes |= own_parts(run, changes, source)
        else:
            given, first = plan_parts(name, run, world)
            changes |= from_parts(run, given, first)
    run = replace(run, **changes)
    data = None
    if not run.dry_run and not first:
        data = open_data(run, world)
        run = replace(run, **run.facts_of(data))
    return Plan(name, preset, run, base, teacher, given, first, data, part, dial)


def open_data(run: Run, world: distributed.World) -> Any:
    with distributed.first_rank_first(world):  # the first rank prepares and caches them
        return run.open_data()


def start_from(run: Run, path: str) -> Run:
    """A preset's run with the sizes and the tokenizer of a base, before the user's options.

    So each option that asks for another value is seen, even for the preset's. A base of another
    family changes nothing: `from_base` refuses it.
    """
    folder = checkpoint.find(path)
    base = run_dir.read_run(folder / "config.json")
    if not run.starts_from(base):
        return run
    run = replace(run, model=run.sized_by(base))
    if hasattr(run.data, "tokenizer"):
        run = replace(run, data=replace(run.data, tokenizer=str(folder)))
    return run


# Fields of a model's config that a run may choose for itself.
NO_SIZES = ("dropout", "frozen")


def from_base(run: Run, base: OpenRun) -> dict[str, Any]:
    """What a run takes from its base: the sizes, the tokenizer, and a hash of the weights.

    Raises ValueError if the base is of another family, or an option asks for another size or
    tokenizer than the base has.
    """
    if not run.starts_from(base.run):
        raise ValueError(
            f"--init-from {run.init_from} is a run of family {base.run.family}, "
            f"not {run.base_family}"
        )
    model = run.sized_by(base.run)
    for name, value in vars(run.model).items():
        inherited = getattr(model, name)
        if value == inherited:
            continue
        if name not in NO_SIZES:
            raise ValueError(
                f"--model.{name.replace('_', '-')} {value}: sizes come from {run.init_from}, "
                f"which has {inherited}; remove this option"
            )
        model = replace(model, **{name: value})
    changes = {"model": model, "base_hash": adapt.base_hash(base.model)}
    if hasattr(run.data, "tokenizer"):
        if run.data.tokenizer != str(base.folder):
            raise ValueError(
                f"--data.tokenizer {run.data.tokenizer}: the tokenizer comes from "
                f"{run.init_from}; remove this option"
            )
        changes["data"] = replace(run.data, tokenizer=str(base.folder))
    return changes


def from_teacher(run: Run, usual: Run, teacher: OpenRun, changes: dict[str, Any]) -> dict[str, Any]:
    """The teacher's tokenizer, unless the run has one already: both must read alike."""
    if teacher.run.base_family != run.base_family:
        raise ValueError(
            f"--teacher {run.teacher} is a run of family {teacher.run.base_family}; use one of "
            f"family {run.base_family}"
        )
    data = changes.get("data", run.data)
    if data.tokenizer != usual.data.tokenizer:
        return {}
    return {"data": replace(data, tokenizer=str(teacher.folder))}


# ---- runs with parts ----------------------------------------------------------------------------


def own_parts(run: Run, changes: dict[str, Any], source: str) -> dict[str, Any]:
    """The parts of a run that is resumed or starts from a base: they are in its checkpoint."""
    folder = checkpoint.find(source)
    saved = run_dir.read_run(folder / "config.json")
    run = replace(run, model=changes.get("model", run.model))
    model = run.with_parts(**{option: getattr(saved.model, option) for option in run.PARTS})
    return {"model": model, **dict.fromkeys(run.PARTS, str(folder))}


def open_part(option: str, folder: str) -> OpenRun:
    """A trained part. Raises ValueError for a folder without one."""
    part = run_dir.open_run(folder)
    if part.run.family != option:
        raise ValueError(f"--{option} {folder} is a run of family {part.run.family}, not {option}")
    return part


def plan_parts(
    preset: str, run: Run, world: distributed.World
) -> tuple[dict[str, OpenRun], dict[str, Plan]]:
    """The parts that are given, opened, and plans for the others. preset: the run's."""
    given = {}
    for option in run.PARTS:
        if getattr(run, option):
            given[option] = open_part(option, getattr(run, option))
    configs = {option: part.run.model for option, part in given.items()}
    if len(given) < len(run.PARTS) and not run.dry_run:
        run.check_parts()
    first = {}
    for option in run.PARTS:
        if option not in given:
            name = f"{preset}-{option}"
            usual = registry.find_preset(name)
            part = run.part_run(option, usual.run, configs)
            part = replace(part, dry_run=run.dry_run)
            first[option] = resolve(name, usual, part, world, part=True)
    return given, first


def from_parts(run: Run, given: dict[str, OpenRun], first: dict[str, Plan]) -> dict[str, Any]:
    """The sizes that follow from the parts, and the folders to find them in."""
    configs = {option: part.run.model for option, part in given.items()}
    folders = {option: str(part.folder) for option, part in given.items()}
    for option, plan in first.items():
        configs[option] = plan.run.model
        folders[option] = plan.run.out
    return {"model": run.with_parts(**configs), **folders}


# ---- carrying it out ----------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """The plan in words: what training costs, what it takes from other runs, the settings as JSON.

    With --json: JSON alone.
    """
    run = plan.run
    settings = run_dir.to_record(plan.name, run)
    with torch.device("meta"):  # shapes without memory: any size fits
        model = run_dir.build_start(run)
        if run.json:
            costs = asdict(estimate.forecast(model, run.optim, run.train))
            return json.dumps({"costs": costs, "settings": settings}, indent=2)
        lines = [estimate.describe(model, run.optim, run.train)]
    if plan.dial:
        lines.insert(0, str(plan.dial))
    if plan.base:
        lines.append(f"starts from {plan.base.folder}")
    if plan.teacher:
        lines.append(f"learns from {plan.teacher.folder}")
    for option, part in plan.given.items():
        lines.append(f"takes the {option} from {part.folder}")
    for option, part in plan.first.items():
        lines.append(f"first trains the {option}, in {part.run.out}")
    return "\n".join([*lines, json.dumps(settings, indent=2)])


def build_model(plan: Plan, data: Any) -> nn.Module:
    """The model as training starts, with the weights of the runs that the plan takes."""
    run = plan.run
    try:
        model = run_dir.build_start(run, plan.base)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise ValueError(
            "there is too little memory for the weights: use smaller sizes of the model"
        ) from error
    if plan.given or plan.first:
        trained = {option: open_part(option, part.run.out) for option, part in plan.first.items()}
        run.take_parts(model, **plan.given, **trained)
    if plan.teacher:
        run.learn_from(model, data, plan.teacher)
    return model


def make_trainer(
    plan: Plan, model: nn.Module, data: Any, record: dict[str, Any], world: distributed.World
) -> Trainer:
    run = plan.run

    def write(folder: Path) -> None:
        """Add to a checkpoint what its folder alone needs for sampling."""
        files.write_json(folder / "config.json", record)
        run.write_files(folder, data)

    device = devices.choose_device(run.train.device)
    return Trainer(
        model,
        data,
        run.train,
        run.optim,
        Path(run.out),
        write=write,
        score=lambda model: run.score(model, data),
        show=lambda model, folder, step: run.show(model, data, folder, step),
        world=world,
        usual=plan.preset.usual_range() if run_dir.is_preset(plan.preset, run) else (),
        peak_flops=estimate.peak_flops(device, devices.choose_dtype(run.train.dtype, device)),
    )


def resume_command(plan: Plan, world: distributed.World) -> str:
    """The command that continues a run after it was stopped."""
    if plan.part:
        return "the command that started it"
    start = "python"
    if world.size > 1:
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world.size)
        where = f"--standalone --nproc_per_node={world.size}" if one_machine else "(as before)"
        start = f"torchrun {where}"
    return f"{start} train.py --resume --out {shlex.quote(plan.run.out)}"


def train(plan: Plan, world: distributed.World) -> int:
    """Carry a plan out. Returns the exit status: 0, or 128 + the signal that stopped training."""
    out = Path(plan.run.out)
    with run_dir.own(out, plan.run.resume, world):
        status = train_owned(plan, world)
        if world.first and not status:
            (out / run_dir.JOB).unlink(missing_ok=True)
        return status


def train_owned(plan: Plan, world: distributed.World) -> int:
    """The same, in a folder that no other process writes."""
    started = time.perf_counter()
    run = plan.run
    out = Path(run.out)

    def say(line: str) -> None:
        if world.first:
            print(line)

    if plan.dial:
        say(str(plan.dial))
    for option, part in plan.first.items():
        say(f"--- the {option}, in {part.run.out}")
        status = train(part, world)
        if status:
            return status
    data = plan.data or open_data(run, world)
    distributed.check_alike({"fingerprint of the data": data.fingerprint}, world)
    record = run_dir.to_record(plan.name, run, data.fingerprint)
    torch.manual_seed(run.train.seed)
    model = build_model(plan, data)
    costs = estimate.describe(model, run.optim, run.train)
    trainer = make_trainer(plan, model, data, record, world)
    run.use_others(trainer.model, data, lambda: plan.base, run_dir.open_run)
    # Resume, or note the settings in the new folder.
    if run.resume:
        run_dir.check_same(files.read_json(out / "config.json"), record, run)
        folder = trainer.resume()
        complete = trainer.counters["step"] == run.train.steps
        say(f"the run is complete: {folder}" if complete else f"resumed from {folder}")
    elif world.first:
        files.write_json(out / "config.json", record)
    with trainer.call.whole():
        run.get_ready(trainer.model, data)
    device = devices.describe_device(trainer.device)
    say(f"{data.description}\n{costs}\n{device}, {trainer.dtype}")
    # Train.
    dial = plan.dial
    if dial and dial.budget.kind == "seconds":
        dial = budget.correct(dial, trainer)
        run = dial.run
        trainer.train = run.train
        record |= run_dir.to_record(plan.name, run)
        files.write_json(out / "config.json", record)
        if run != plan.run:
            say(dial.correction(plan.run.train.steps))
    scores = trainer.fit()
    if trainer.signals.agreed:
        step = trainer.counters["step"]
        say(f"stopped at step {step} and saved; continue with {resume_command(plan, world)}")
        return 128 + trainer.signals.agreed
    # Report.
    rows = read_metrics(out / "metrics.jsonl")
    untrained = next((row for row in rows if not row["step"]), {})
    say(run_dir.verdict(plan.preset, run, untrained, scores))
    if dial:
        say(dial.outcome(scores["val_bpb"]))
    seconds = time.perf_counter() - started
    line = f"{seconds:.0f} s in all"
    peak = devices.peak_memory_bytes(trainer.device)
    if peak:
        line += f", at most {units.size(peak)} of memory"
    say(f"{line}; in {out}: loss.png, samples/, and the checkpoint step-{run.train.steps:06d}/")
    if not plan.part:
        say(f"next: python sample.py {out}, or python -m tinyfm.evaluate {out}")
    return 0
