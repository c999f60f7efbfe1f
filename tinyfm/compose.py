"""Runs whose model is made of other runs' models: find those, or train them first.

Which ones a run needs stands in its type: `needs`, option -> preset. An option that is not given
means OUT-OPTION, as in runs/text2image-clip, which is begun, gone on with, or taken as it is. What
was taken is in the run's own checkpoints: resumed or opened, it needs the others no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from data import captioned
from data.report import Report
from tinyfm import checkpoint, files, presets, records
from tinyfm.pairs import GLYPHS
from tinyfm.presets import Preset
from tinyfm.records import OpenRun
from tinyfm.run import Run

Train = Callable[[str, Preset, Run], int]  # (name, preset, run) -> exit status, 0 if it is done


def part_run(run: Run, option: str) -> Run:
    """The run of a part, on the same pictures, device and seed. Its `out` is a new one, or goes
    on."""
    part, out = presets.get_preset(run.needs[option]).run, f"{run.out}-{option}"
    same = {name: getattr(run.data, name) for name in ("path", "color", "val_fraction", "cache")}
    same |= {"template": run.data.template} if option == "clip" else {}
    where = {name: getattr(run.train, name) for name in ("seed", "device", "dtype")}
    channels = "channels" if option == "clip" else "in_channels"
    sizes = {"image_size": run.model.autoencoder.image_size,
             channels: 3 if run.data.color else run.model.autoencoder.in_channels}  # fmt: skip
    return replace(
        part, model=replace(part.model, **sizes), data=replace(part.data, **same),
        train=replace(part.train, **where), out=out, resume=Path(out).exists(),
    )  # fmt: skip


def fit_batch(part: Run) -> Run:
    """The run of a part, on few pictures of one's own in batches that are halved until two of them
    are there. Raises ValueError if there are no pictures, or none with the captions it needs."""
    if part.data.path in GLYPHS:
        return part
    found = len(captioned.pairs(part.data.path, Report(), part.data.template))
    rows, batch_size = int((1 - part.data.val_fraction) * found), part.train.batch_size
    while batch_size > max(2, rows // 2):
        batch_size //= 2
    return replace(part, train=replace(part.train, batch_size=batch_size))


def open_part(option: str, folder: str) -> OpenRun:
    """A trained part. Raises ValueError for a folder without one."""
    part = records.open_run(folder)
    if (found := part.run.family) != option:
        raise ValueError(f"--{option} {folder} is a run of family {found}, not {option}")
    return part


def fit(run: Run, autoencoder, clip) -> Run:
    """The run with the configs of its parts, the denoiser's sizes following from theirs."""
    sizes = {"image_size": autoencoder.image_size // autoencoder.factor,
             "in_channels": autoencoder.latent_channels, "d_context": clip.text_width}  # fmt: skip
    diffusion = replace(run.model.diffusion, **sizes)
    return replace(run, model=type(run.model)(diffusion, autoencoder, clip))


def prepare(run: Run, train: Train, say: Callable[[str], None]) -> tuple[Run, dict[str, OpenRun]]:
    """The run as it can begin, and the parts it takes, {} where it goes on or needs none.

    Raises ValueError for a part that is no such run, or cannot be trained, before any is trained;
    SystemExit with the status of a part's training that was stopped.
    """
    if not run.needs:
        return run, {}
    if run.resume:
        folder = checkpoint.find(run.out)
        record = records.read_run(files.read_json(folder / "config.json"))
        own = dict.fromkeys(run.needs, str(folder))
        return replace(fit(run, record.model.autoencoder, record.model.clip), **own), {}
    given = {option: getattr(run, option) for option in run.needs if getattr(run, option)}
    parts = {option: open_part(option, folder) for option, folder in given.items()}
    if "autoencoder" in parts:  # what is trained beside it is on pictures as it takes them
        run = fit(run, parts["autoencoder"].run.model, run.model.clip)
    new = {option: part_run(run, option) for option in run.needs if option not in parts}
    if run.dry_run:
        models = {option: part.run.model for option, part in parts.items()}
        return fit(run, **models, **{option: part.model for option, part in new.items()}), {}
    for option, part in {option: fit_batch(part) for option, part in new.items()}.items():
        preset = run.needs[option]
        say(f"--- the {option}, in {part.out}")
        if status := train(preset, presets.get_preset(preset), part):
            raise SystemExit(status)
        parts[option] = open_part(option, part.out)
    own = {option: str(part.folder) for option, part in parts.items()}
    return replace(fit(run, **{name: part.run.model for name, part in parts.items()}), **own), parts


def fill(model: nn.Module, parts: dict[str, OpenRun]) -> None:
    """Give the model the weights of its parts, if there are any."""
    if parts:
        model.autoencoder.load_state_dict(parts["autoencoder"].model.state_dict())
        model.text_tower.load_state_dict(parts["clip"].model.text_tower.state_dict())
