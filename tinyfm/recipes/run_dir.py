"""Runs on disk: what a run was is in its config.json, to compare as it goes on, and to open it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tinyfm import adapt
from tinyfm.common import files
from tinyfm.recipes.base import OpenRun, Preset, Run
from tinyfm.recipes.registry import FAMILIES
from tinyfm.training import checkpoint


def to_record(preset: str, run: Run, fingerprint: str = "") -> dict[str, Any]:
    """All that is needed to rebuild a run, as plain values for config.json."""
    default, whole = type(run)(), dataclasses.asdict(run)
    facts = [name for name in run.facts if getattr(run, name) != getattr(default, name)]
    record = {"preset": preset, "family": run.family}
    record |= {name: whole[name] for name in (*run.parts, *facts)}
    if fingerprint:  # of the tokens; not known before the data are prepared
        record["data_fingerprint"] = fingerprint[:16]
    return json.loads(json.dumps(record))


def write_run_files(folder: Path, record: dict[str, Any], run: Run, data: Any) -> None:
    """What a checkpoint holds beside weights, so that its folder alone is enough to sample."""
    files.write_json(folder / "config.json", record)
    run.write_files(folder, data)


def check_directory(out: Path, resume: bool) -> bool:
    """Whether a run goes on there or begins. Raises ValueError if it can do neither.

    Started again by torchrun --max-restarts, nobody is asked: it goes on from a checkpoint, if any.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        if not (saved := any(out.glob("step-*/manifest.json"))):
            (out / "metrics.jsonl").unlink(missing_ok=True)  # it begins anew
        return saved
    if resume and not out.exists():
        raise ValueError(f"there is no run {out} to resume; leave out --resume to begin it")
    begun = out.exists() and {p.name for p in out.iterdir() if p.stat().st_size} - {"config.json"}
    if begun and not resume:
        raise ValueError(f"{out} exists: go on with --resume, choose another --out, or remove it")
    return resume


# What may differ when a run goes on: it changes where and how fast, not what is computed.
FREE = {"train.device", "train.dtype", "train.compile", "train.micro_batch_size", "train.keep",
        "train.log_every", "train.eval_every", "train.tensorboard", "train.patience",
        "train.parallel", "train.shard_size", "train.activation_checkpointing", "data.cache",
        "init_from"}  # fmt: skip


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In which options two records make different runs, in words."""
    old, new = flatten(old), flatten(new)
    return [
        f"{key} was {old.get(key)} and is {new.get(key)}"
        for key in sorted((old.keys() | new.keys()) - FREE)
        if old.get(key) != new.get(key)
    ]


def check_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    """Raise ValueError with the differences, if a run is not the one that its folder began."""
    if different := differences(old, new):
        raise ValueError(
            f"{out} is another run: {'; '.join(different[:5])}. "
            "Give the options it began with, or another --out without --resume"
        )


# ---- opening a trained run ----------------------------------------------------------------------


def read_run(record: dict[str, Any]) -> Run:
    """The run that a config.json describes. Raises TypeError or KeyError if it does not fit, and
    ValueError for an unknown family."""
    if record["family"] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"the run is of family {record['family']!r}, none of {known}")
    kind = FAMILIES[record["family"]]
    defaults = kind()
    values = {name: record[name] for name in (*kind.parts, *kind.facts) if name in record}
    for name, value in values.items():
        if dataclasses.is_dataclass(default := getattr(defaults, name)):
            values[name] = type(default)(**value)
    return kind(**values)


def open_base(path: str) -> OpenRun:
    """A run to begin from; what adapted it, if it was, becomes part of its weights."""
    base = open_run(path)
    adapt.merge(base.model)
    return base


def begin(run: Run, base: OpenRun | None = None) -> nn.Module:
    """The model as its training begins: new, or as its base is, made ready for what adapts it."""
    model = run.build_model()
    if base:
        files.load_model(run.trunk(model), base.model.state_dict())
    if run.init_from:
        adapt.apply(model, run.adapt, run.adapter)
    return model


def open_same_base(run: Run) -> OpenRun:
    """What a run began from. Raises ValueError if it is gone, or has other weights by now."""
    base = open_base(run.init_from)
    if (own := adapt.base_hash(base.model)) != run.base_hash:
        raise ValueError(f"its weights are of hash {own[:16]} now, not {run.base_hash[:16]}")
    return base


def find_base(run: Run, folder: Path) -> OpenRun | None:
    """That of a run which is kept as a change to it; None for one that is whole by itself."""
    if run.adapt == "full":
        return None
    try:
        return open_same_base(run)
    except ValueError as error:
        advice = "put back what it was trained from, or give that to sample.py with --adapter"
        raise ValueError(f"{folder} adapts {run.init_from}: {error}; {advice} {folder}") from error


def open_run(path: str, raw: bool = False) -> OpenRun:
    """Load the newest checkpoint of a run directory, or a checkpoint folder, on the CPU.

    The averaged weights if there are any, unless raw. Raises ValueError if it is not whole.
    """
    folder = checkpoint.find(path)
    record = files.read_json(folder / "config.json")
    try:
        run = read_run(record)
    except files.MALFORMED as error:
        problem = f"{folder}/config.json is not of this version: {error}"
        raise ValueError(f"{problem}; use the code that wrote it") from error
    run = dataclasses.replace(run, **dict.fromkeys(run.needs, str(folder)))  # all is in there
    if run.init_from and hasattr(run.data, "tokenizer"):  # so is that of its base
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=str(folder)))
    model = begin(run, find_base(run, folder))
    weights = "ema" if (folder / "ema.safetensors").exists() and not raw else "model"
    files.load_model(model, files.load_tensors(folder, weights))
    meta = files.read_json(folder / "meta.json")
    return OpenRun(run, model.eval(), run.read_tokenizer(folder), folder, meta, weights)


def add_adapters(opened: OpenRun, paths: Sequence[str]) -> None:
    """Adapt an open run by what other runs have trained from it; several LoRAs add up.

    Raises ValueError for a run that is no adapter, or one of another base.
    """
    for i, path in enumerate(paths):
        folder = checkpoint.find(path)
        run = read_run(files.read_json(folder / "config.json"))
        if run.adapt == "full" or run.base_family != opened.run.family or "classes" in run.facts:
            raise ValueError(f"{path} is no adapter for a run of family {opened.run.family}")
        tensors, own = files.load_tensors(folder), f"adapter{i}"
        try:
            adapt.load_adapter(opened.model, tensors, run.adapt, run.adapter, own, run.base_hash)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def verdict(preset: Preset, run: Run, baseline: dict, scores: dict) -> str:
    """One line: untrained, reached, usual."""
    name = next((key for key in scores if not key.startswith("val_loss")), "val_loss")
    reached = scores[name]
    train = dataclasses.replace(run.train, seed=preset.run.train.seed)  # any seed is as usual
    run = dataclasses.replace(run, train=train)
    same = not differences(to_record("", preset.run), to_record("", run))
    usual = f"usual for this preset: {preset.usual}" if same and preset.usual else ""
    usual = usual or "no usual value: this is not a preset as it stands"
    untrained = f"{baseline[name]:.3f}" if name in baseline else "unknown"
    before = "before" if run.init_from else "untrained"
    return f"{name}: {untrained} {before}, {reached:.3f} reached; {usual}"


def rebuild(path: Path):
    """The run that a config.json describes, as a value of its run type."""
    from tinyfm.common import files

    try:
        return read_run(files.read_json(path))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is not of this version: {error}") from error
