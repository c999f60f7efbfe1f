"""Runs on disk: what a run was is in its config.json, to compare as it goes on, and to open it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tinyfm import checkpoint, files
from tinyfm.families import FAMILIES
from tinyfm.run import Run
from tinyfm.tokenizer import Tokenizer


def to_record(preset: str, run: Run, fingerprint: str = "") -> dict[str, Any]:
    """All that is needed to rebuild a run, as plain values for config.json."""
    parts = {name: dataclasses.asdict(getattr(run, name)) for name in run.parts}
    record = {"preset": preset, "family": run.family, **parts}
    if fingerprint:  # of the tokens; not known before the data are prepared
        record["data_fingerprint"] = fingerprint[:16]
    return json.loads(json.dumps(record))


def write_run_files(folder: Path, record: dict[str, Any], run: Run, data: Any) -> None:
    """What a checkpoint holds beside weights, so that its folder alone is enough to sample."""
    files.write_json(folder / "config.json", record)
    run.write_files(folder, data)


def check_directory(out: Path, resume: bool) -> None:
    """Raise ValueError if a run can neither begin nor go on there."""
    if resume and not out.exists():
        raise ValueError(f"there is no run {out} to resume; leave out --resume to begin it")
    begun = out.exists() and {p.name for p in out.iterdir() if p.stat().st_size} - {"config.json"}
    if begun and not resume:
        raise ValueError(f"{out} exists: go on with --resume, choose another --out, or remove it")


# What may differ when a run goes on: it changes where and how fast, not what is computed.
FREE = {"train.device", "train.dtype", "train.compile", "train.micro_batch_size", "train.keep",
        "train.log_every", "train.eval_every", "train.tensorboard", "train.patience",
        "data.cache"}  # fmt: skip


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


@dataclass(frozen=True)
class OpenRun:
    run: Run  # its configs
    model: nn.Module
    tokenizer: Tokenizer | None  # of a family that reads text
    folder: Path  # the checkpoint that was read
    meta: dict[str, Any]  # its step and scores
    weights: str  # "ema" or "model"


def read_run(record: dict[str, Any]) -> Run:
    """The run that a config.json describes. Raises TypeError or KeyError if it does not fit, and
    ValueError for an unknown family."""
    if record["family"] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"the run is of family {record['family']!r}, none of {known}")
    kind = FAMILIES[record["family"]]
    defaults = kind()
    return kind(**{part: type(getattr(defaults, part))(**record[part]) for part in kind.parts})


def open_run(path: str, raw: bool = False) -> OpenRun:
    """Load the newest checkpoint of a run directory, or a checkpoint folder, on the CPU.

    The averaged weights if there are any, unless raw. Raises ValueError if it is not whole.
    """
    folder = checkpoint.find(path)
    record = files.read_json(folder / "config.json")
    try:
        run = read_run(record)
        model = run.build_model()
    except (TypeError, KeyError) as error:
        problem = f"{folder}/config.json is not of this version: {error}"
        raise ValueError(f"{problem}; use the code that wrote it") from error
    run = dataclasses.replace(run, **dict.fromkeys(run.needs, str(folder)))  # all is in there
    weights = "ema" if (folder / "ema.safetensors").exists() and not raw else "model"
    files.load_model(model, files.load_tensors(folder, weights))
    meta = files.read_json(folder / "meta.json")
    return OpenRun(run, model.eval(), run.read_tokenizer(folder), folder, meta, weights)
