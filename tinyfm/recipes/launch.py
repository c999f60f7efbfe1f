"""Runs whose model is made of other runs' models: find those, or train them first.

Which ones a run needs stands in its type: `needs`, option -> preset. An option that is not given
means OUT-OPTION, as in runs/text2image-clip, which is begun, gone on with, or taken as it is. What
was taken is in the run's own checkpoints: resumed or opened, it needs the others no more.

Any run may begin from another of its family, its base (`init_from`), and a GPT may learn from the
predictions of another, its teacher: those are never trained by the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from tinyfm import adapt
from tinyfm.common import files
from tinyfm.recipes import registry, run_dir
from tinyfm.recipes.base import OpenRun, Preset, Run
from tinyfm.recipes.text2image import check_batch, fit, fit_batch, part_run
from tinyfm.training import checkpoint

Train = Callable[[str, Preset, Run], int]  # (name, preset, run) -> exit status, 0 if it is done


def open_part(option: str, folder: str) -> OpenRun:
    """A trained part. Raises ValueError for a folder without one."""
    part = run_dir.open_run(folder)
    if (found := part.run.family) != option:
        raise ValueError(f"--{option} {folder} is a run of family {found}, not {option}")
    return part


def as_base(run: Run, usual: Run, base: OpenRun) -> Run:
    """The run with the sizes and the tokenizer of its base.

    Raises ValueError if the base is of another family, or an option that differs from `usual`, the
    preset's, asks for another size or tokenizer than the base has.
    """
    if base.run.base_family != run.base_family or "classes" in base.run.facts:
        family = f"a run of family {base.run.family}, not {run.base_family}"
        raise ValueError(f"--init-from {run.init_from} is {family}")
    model = base.run.model
    for name, value in vars(run.model).items():
        if value == getattr(usual.model, name) or value == getattr(model, name):
            continue
        if name != "dropout":
            raise ValueError(
                f"--model.{name.replace('_', '-')} {value}: {run.init_from} has "
                f"{getattr(model, name)}, and what begins from it has its sizes; leave that out"
            )
        model = replace(model, dropout=value)
    data = run.data
    if hasattr(data, "tokenizer"):
        if data.tokenizer not in (usual.data.tokenizer, str(base.folder)):
            advice = f"it is that of {run.init_from}; leave that out"
            raise ValueError(f"--data.tokenizer {data.tokenizer}: {advice}")
        data = replace(data, tokenizer=str(base.folder))
    return replace(run, model=model, data=data, base_hash=adapt.base_hash(base.model))


def open_others(run: Run, usual: Run) -> tuple[Run, dict[str, OpenRun]]:
    """The run as it begins from its base, if any; base and teacher, opened."""
    others = {}
    if run.init_from:
        others["base"] = run_dir.open_base(run.init_from)
        run = as_base(run, usual, others["base"])
    elif run.adapt != "full":
        raise ValueError(f"--adapt {run.adapt} changes a trained model: say which, --init-from RUN")
    if getattr(run, "teacher", ""):
        teacher = others["teacher"] = run_dir.open_run(run.teacher)
        if (found := teacher.run.base_family) != run.base_family:
            raise ValueError(f"--teacher {run.teacher} is a run of family {found}, no GPT")
        if run.data.tokenizer == usual.data.tokenizer:  # both must read alike
            data = replace(run.data, tokenizer=str(teacher.folder))
            run = replace(run, data=data)
    return run, others


def prepare(
    run: Run, usual: Run, train: Train, say: Callable[[str], None]
) -> tuple[Run, dict[str, OpenRun]]:
    """The run as it can begin, and the runs it takes, by option, base or teacher.

    Raises ValueError for a part that is no such run, or cannot be trained, before any is trained;
    SystemExit with the status of a part's training that was stopped.
    """
    run, others = open_others(run, usual)
    if not run.needs:
        return run, others
    if run.resume or "base" in others:
        folder = checkpoint.find(run.out if run.resume else run.init_from)
        record = run_dir.read_run(files.read_json(folder / "config.json"))
        own = dict.fromkeys(run.needs, str(folder))
        return replace(fit(run, record.model.autoencoder, record.model.clip), **own), others
    given = {option: getattr(run, option) for option in run.needs if getattr(run, option)}
    parts = {option: open_part(option, folder) for option, folder in given.items()}
    if "autoencoder" in parts:  # what is trained beside it is on pictures as it takes them
        run = fit(run, parts["autoencoder"].run.model, run.model.clip)
    new = {option: part_run(run, option) for option in run.needs if option not in parts}
    if run.dry_run:
        models = {option: part.run.model for option, part in parts.items()}
        return fit(run, **models, **{option: part.model for option, part in new.items()}), {}
    if new:
        check_batch(run)
    for option, part in {option: fit_batch(part) for option, part in new.items()}.items():
        preset = run.needs[option]
        say(f"--- the {option}, in {part.out}")
        if status := train(preset, registry.get_preset(preset), part):
            raise SystemExit(status)
        parts[option] = open_part(option, part.out)
    own = {option: str(part.folder) for option, part in parts.items()}
    return replace(fit(run, **{name: part.run.model for name, part in parts.items()}), **own), parts


def build(run: Run, others: dict[str, OpenRun], data: Any) -> nn.Module:
    """The model as its training begins, with the weights of the runs it takes."""
    model = run_dir.begin(run, others.get("base"))
    if "clip" in others:
        model.autoencoder.load_state_dict(others["autoencoder"].model.state_dict())
        model.text_tower.load_state_dict(others["clip"].model.text_tower.state_dict())
    if "teacher" in others:
        run.learn_from(model, data, others["teacher"])
    return model
