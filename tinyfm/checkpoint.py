"""Run directories: a checkpoint is whole or not there, is verified, and is safe to share.

A run can be killed at any instant, also while it saves. So a checkpoint is written under another
name and appears by one rename, with the hash of every file in it:

    run/.tmp-step-000500/  all files, then manifest.json with their SHA-256, all fsynced; renamed to
    run/step-000500/       a checkpoint; then `latest`, a text file with its name, is replaced
        model.safetensors  ema.safetensors    weights: names and numbers, no code
        meta.json, config.json, tokenizer     plain files
        state/                                optimizers, counters: see training_state.py
        manifest.json                         size and SHA-256 of every file above

Share everything but state/, which holds a pickle. Under torchrun every rank calls `save`, on one
shared file system: rank 0 writes the weights and the manifest, each rank its part of state/, and
one rank's error is raised on all. saver.py does that beside the training.
Left out: remote storage, signatures (a manifest finds damage, not lies).
"""

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tinyfm import distributed, training_state
from tinyfm.common.files import (
    TEMPORARY,
    CheckpointError,
    fsync,
    read_json,
    save_tensors,
    write_json,
    write_text,
)

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{6,})")


# ---- checkpoints that are there: verify, find, prune ----


def _seal(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _seals(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of a folder by relative name, in threads: hashing lets go of Python's lock."""
    files = [p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        seals = pool.map(_seal, files)
        return {path.relative_to(folder).as_posix(): seal for path, seal in zip(files, seals)}


def verify(folder: Path) -> None:
    """Check every file against the manifest; CheckpointError names the first that differs."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    listed, found = read_json(folder / MANIFEST), _seals(folder)
    if not isinstance(listed, dict):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is not a table of files")
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            change = "truncated or altered" if name in listed else "not in the manifest"
            change = change if name in found else "missing"
            raise CheckpointError(f"{folder} is damaged: {name} is {change}")


def _is_whole(folder: Path) -> bool:
    with suppress(CheckpointError):
        verify(folder)
        return True
    return False


def _step_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, whole or damaged: the one `latest` names, then by falling step."""
    pointer = run / "latest"
    latest = pointer.read_text(encoding="utf-8", errors="replace") if pointer.is_file() else ""
    order = {}
    for folder in run.iterdir():
        match = STEP_FOLDER.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            order[folder] = (folder.name == latest.strip(), int(match[1]))
        elif match:
            warnings.warn(f"{folder} is ignored: it has no {MANIFEST}", stacklevel=3)
    return sorted(order, key=order.__getitem__, reverse=True)


def find(run: str | Path) -> Path:
    """The newest checkpoint of a run directory (or `run`, if itself a step folder), verified.

    Raises CheckpointError if there is none, or if it is damaged: then naming the newest whole one.
    """
    run = Path(run)
    if not run.is_dir():
        raise CheckpointError(f"there is no run directory {run}; correct the path or train first")
    if STEP_FOLDER.fullmatch(run.name) or (run / MANIFEST).is_file():
        verify(run)
        return run
    folders = _step_folders(run)
    if not folders:
        raise CheckpointError(f"{run} holds no complete checkpoint; remove it and train again")
    try:
        verify(folders[0])
    except CheckpointError as error:
        advice = "no other checkpoint is whole: train again, into another directory"
        if whole := next(filter(_is_whole, folders[1:]), None):
            damaged = " and ".join(str(folder) for folder in folders[: folders.index(whole)])
            advice = f"move or delete {damaged}; then --resume goes on from {whole}"
        raise CheckpointError(f"{error}; {advice}") from error
    return folders[0]


def _remove(folder: Path) -> None:
    """Remove a checkpoint, renamed first: a kill half-way leaves no half checkpoint."""
    shutil.rmtree(folder.rename(folder.with_name(TEMPORARY + folder.name)))


def prune(run: str | Path, keep_last: int = 2, best: int | None = None) -> list[Path]:
    """Remove old checkpoints, on one rank, and return them.

    The newest `keep_last` stay, step `best`, and the newest that verifies, which is the only good
    one if those are damaged. A folder without a manifest is not ours and stays too.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; keep at least 1 checkpoint")
    folders = _step_folders(Path(run))
    spare = [f for f in folders[keep_last:] if best is None or f.name != f"step-{best:06d}"]
    whole = next(filter(_is_whole, folders), None) if spare else None
    removed = [folder for folder in spare if whole and folder != whole]
    for folder in removed:
        _remove(folder)
    return removed


# ---- saving ----


def _clear(run: Path) -> None:
    """Remove the folders that killed or failed saves left behind."""
    for folder in run.glob(TEMPORARY + "*"):
        shutil.rmtree(folder, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> None:
    """Seal a folder that is written and give it its name."""
    write_json(temporary / MANIFEST, _seals(temporary))
    for path in [*temporary.rglob("*"), temporary]:
        fsync(path)
    if final.exists():  # this run went back to an earlier step, which is what a kill here leaves
        final.rename(final.with_name(f"{TEMPORARY}old-{final.name}"))
    temporary.rename(final)
    write_text(final.parent / "latest", final.name + "\n")


def save(
    run: str | Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    write: Callable[[Path], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write run/step-NNNNNN and point `latest` at it; return its path.

    tensors: {"model": model.state_dict(), "ema": ...}, each a NAME.safetensors (read on rank 0).
    state: from `training_state.collect`. meta: plain values for meta.json, such as losses.
    write(folder) may add files, such as the tokenizer's. group: ranks that save; None = all.
    Raises CheckpointError after any failure; the earlier checkpoints are untouched.
    """
    run = Path(run)
    final = run / f"step-{step:06d}"
    temporary = run / (TEMPORARY + final.name)

    def write_shared() -> None:
        run.mkdir(parents=True, exist_ok=True)
        _clear(run)
        if final.exists() and not (final / MANIFEST).is_file():
            raise FileExistsError(f"{final} is in the way and is not a checkpoint")
        temporary.mkdir()
        for name, values in tensors.items():
            save_tensors(temporary, name, values)
        write_json(temporary / "meta.json", {"step": step, **(meta or {})})
        if write:
            write(temporary)

    try:
        distributed.on_first_rank(write_shared, group)
        if state:
            training_state.write(temporary / "state", state, group)
        distributed.on_first_rank(lambda: _publish(temporary, final), group)
    except Exception as error:
        reason = f"step {step} could not be saved in {run}: {type(error).__name__}: {error}"
        advice = "make room or remove that cause, then resume; earlier checkpoints are untouched"
        raise CheckpointError(f"{reason}; {advice}") from error
    finally:
        if distributed.rank() == 0:
            _clear(run)
    return final
