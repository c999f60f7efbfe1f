"""Run directories: a checkpoint is whole or not there, is verified, and is safe to share.

A run can be killed at any instant, also while it saves. So a checkpoint is written under another
name and appears by one rename, with the hash of every file in it:

    run/.tmp-step-000500/  all files, then manifest.json with their SHA-256, all fsynced; renamed to
    run/step-000500/       a checkpoint; then `latest`, a text file with its name, is replaced
        model.safetensors  ema.safetensors    weights: names and numbers, no code
        meta.json, config.json, tokenizer     plain files
        state/                                optimizers, counters: below
        manifest.json                         size and SHA-256 of every file above

Share everything but state/, which holds a pickle. Under torchrun every rank calls `save`, on one
shared file system: rank 0 writes the weights and the manifest, each rank its part of state/, and
one rank's error is raised on all. saver.py does that beside the training.
Left out: remote storage, signatures (a manifest finds damage, not lies).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tinyfm.common.files import (
    TEMPORARY,
    CheckpointError,
    fsync,
    read_json,
    save_tensors,
    write_json,
    write_text,
)
from tinyfm.training import distributed

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
    state: from `collect_state`. meta: plain values for meta.json, such as losses.
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
            write_state(temporary / "state", state, group)
        distributed.on_first_rank(lambda: _publish(temporary, final), group)
    except Exception as error:
        reason = f"step {step} could not be saved in {run}: {type(error).__name__}: {error}"
        advice = "make room or remove that cause, then resume; earlier checkpoints are untouched"
        raise CheckpointError(f"{reason}; {advice}") from error
    finally:
        if distributed.rank() == 0:
            _clear(run)
    return final


# FOLDED: merge this into the module's docstring
# What a run needs beside its weights to go on bit for bit: optimizers and counters.
#
# Kept by torch.distributed.checkpoint (DCP): every rank writes its part, and any number of ranks can
# read it back. DCP's index is a pickle, and a pickle can run code when it is read: this is for going
# on with runs of your own. What is shared of a run needs none of it.


# FOLDED: merge this into the module's docstring
# Saving beside the training, which waits for a copy in memory and not for the disk.


def _dcp(
    verb: str, tree: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """dcp.save or dcp.load; its error, which `except Exception` would miss, becomes its cause."""
    import torch.distributed.checkpoint as dcp  # here, as it is slow to import

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            getattr(dcp, verb)(tree, checkpoint_id=folder, process_group=group)
        except dcp.api.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def collect_state(
    model: nn.Module, optimizers: Sequence[Optimizer], counters: dict[str, Any]
) -> dict[str, Any]:
    """What a run needs beside the weights to go on bit for bit; every rank calls this.

    counters: plain values and tensors by name, such as the step and random generators' states.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    states = {}
    for index, optimizer in enumerate(optimizers):
        fresh = not optimizer.state
        states[str(index)] = get_optimizer_state_dict(model, optimizer)
        if fresh:  # then DCP made a state, by a trial step: saving must not change the training
            optimizer.state.clear()
            states[str(index)]["state"] = {}
    return {"optimizers": states, "counters": counters}


def write_state(
    folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None
) -> None:
    """Write what `collect_state` returned; every rank of the group calls this, and writes its part."""
    _dcp("save", state, folder, group)


def restore_state(
    folder: str | Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    counters: dict[str, Any],
) -> None:
    """Fill optimizers and counters in place from state/, which must be of a run of your own.

    Call as `collect_state` was, on any number of ranks. DCP fills a template: `counters` has the
    names that were saved, and fresh optimizers take a trial step with lr 0 and zero gradients.
    Raises CheckpointError if the saved state is not of this model and these optimizers.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import state_dict as dcp

    folder = Path(folder) / "state"
    states = {str(i): dcp.get_optimizer_state_dict(model, o) for i, o in enumerate(optimizers)}
    try:
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        left = {name for name in saved if name.startswith("optimizers.") and ".state." in name}
        for index, template in states.items():
            for name, slots in list(template["state"].items()):
                names = {f"optimizers.{index}.state.{name}.{slot}" for slot in slots}
                if not names & left:  # this parameter never had a gradient, hence no state
                    del template["state"][name]
                left -= names
        if left:
            raise ValueError(f"{min(left)} is unexpected")
        _dcp("load", {"optimizers": states, "counters": counters}, folder)
        for state, optimizer in zip(states.values(), optimizers):
            options = dcp.StateDictOptions(strict=False)
            dcp.set_optimizer_state_dict(model, optimizer, state, options=options)
    except Exception as error:
        advice = "resume with the model, optimizers and counters it was saved with"
        raise CheckpointError(f"{folder} does not fit this run: {error}; {advice}") from error


def copy_to_cpu(tree: Any) -> Any:
    """Nested dicts and lists with all their tensors copied to CPU memory, shards as shards."""
    if isinstance(tree, dict):
        return {name: copy_to_cpu(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copy_to_cpu(value) for value in tree]
    return tree.detach().to("cpu", copy=True) if isinstance(tree, Tensor) else tree


class Saver:
    """One save at a time, in a thread of its own, on all ranks.

    What it writes must be copies, or it would be of several steps. Its messages between ranks have
    a group of their own, as training sends others at the same time. A kill leaves what was there.
    """

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.group = None
        if dist.is_available() and dist.is_initialized():  # a slow disk is no reason to give up
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def start(self, work: Callable[[dist.ProcessGroup | None], None]) -> None:
        """Begin work(group), which every rank begins, once the work before is done."""
        self.wait()

        def run() -> None:
            try:
                work(self.group)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the save under way is done. Raises what went wrong in it."""
        if self.thread:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error:
            raise error

    close = wait
