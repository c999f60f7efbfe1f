"""Run directories: a checkpoint is complete or absent, verified when read, and safe to share.

A run can be killed at any moment, also while it saves. Therefore a checkpoint is written under
another name, and one rename makes it visible. It contains the hash of every file in it:

    run/.tmp-PROCESS-step-000500/  all files, then manifest.json with their SHA-256, forced to disk
    run/step-000500/               the same folder, renamed: a checkpoint
        model.safetensors  ema.safetensors    weights: names and numbers, no code
        meta.json, config.json, tokenizer     plain files
        state/                                the training state: optimizers and counters
        manifest.json                         size and SHA-256 of every other file
    run/latest                     the name of the newest checkpoint, replaced last

A step that is saved again replaces its checkpoint. No system replaces a folder in one step, so the
old one is first renamed to .tmp-PROCESS-old-step-000500. If the process is killed then, the old one
still counts: `find` finds it, and `recover` gives it back its name.

One process owns a run directory (common/folders.py), so what others left there has no owner.

The training state is what a run needs besides its weights to resume bit for bit. It is stored by
torch.distributed.checkpoint (DCP): every rank writes its part, and any number of ranks can read it
back. DCP's index is a pickle, and a pickle can run code when it is read; unpickle.py reads it so
that it cannot. Sampling, evaluating and exporting never open state/.

Under torchrun every rank calls `save`, on one shared file system. Rank 0 writes the weights and
the manifest, each rank writes its part of state/, and an error on one rank is raised on all ranks.
`Saver` does this in the background: training waits for a copy in memory, not for the disk.

Left out: remote storage, and signatures. (A manifest reveals damage, but not forgery.)
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tinyfm.common.files import (
    CheckpointError,
    fsync,
    read_json,
    read_record,
    save_tensors,
    write_json,
    write_text,
)
from tinyfm.common.folders import TEMPORARY, is_running, temporary_name
from tinyfm.common.schema import check
from tinyfm.training import distributed

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{6,})")
OLD_FOLDER = re.compile(rf"{re.escape(TEMPORARY)}(?:\d+-)?old-(step-\d{{6,}})")
TRIES = 5  # of reading a run from which another process removes checkpoints meanwhile


# ---- verify --------------------------------------------------------------------------------------


def _manifest_entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def make_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file in a folder, by relative name.

    Hashing runs in threads, because it releases Python's lock.
    """
    paths = [p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(_manifest_entry, paths))
    return {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries)}


def verify(folder: Path) -> None:
    """Check every file against the manifest. CheckpointError names the first that differs."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    listed = read_json(folder / MANIFEST)
    found = make_manifest(folder)
    if not isinstance(listed, dict):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is not a table of files")
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) == found.get(name):
            continue
        if name not in found:
            problem = "missing"
        elif name not in listed:
            problem = "not in the manifest"
        else:
            problem = "truncated or altered"
        raise CheckpointError(f"{folder} is damaged: {name} is {problem}")


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint is complete and undamaged."""
    with suppress(CheckpointError):
        verify(folder)
        return True
    return False


# ---- find and prune ------------------------------------------------------------------------------


def _step_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, damaged ones included, newest first.

    The one that `latest` names comes first, then the others from the highest step down. (After a
    run was resumed from an earlier step, the highest step is not the newest.)
    """
    pointer = run / "latest"
    latest = ""
    if pointer.is_file():
        latest = pointer.read_text(encoding="utf-8", errors="replace").strip()
    order = {}
    for folder in run.iterdir():
        name = folder.name
        old = OLD_FOLDER.fullmatch(name)
        if old and not (run / old[1]).exists():  # killed while it was being replaced
            name = old[1]
        match = STEP_FOLDER.fullmatch(name)
        if match and (folder / MANIFEST).is_file():
            order[folder] = (name == latest, int(match[1]))
        elif match and folder.is_dir():
            warnings.warn(f"{folder} is ignored: it has no {MANIFEST}", stacklevel=3)
    return sorted(order, key=order.__getitem__, reverse=True)


def find(run: str | Path) -> Path:
    """The newest checkpoint of a run directory, verified. `run` may itself be a checkpoint.

    Raises CheckpointError if there is no checkpoint, or if the newest is damaged. The message then
    names the newest undamaged one, and says how to resume from it.
    """
    run = Path(run)
    if not run.is_dir():
        raise CheckpointError(f"there is no run directory {run}; correct the path or train first")
    if STEP_FOLDER.fullmatch(run.name) or (run / MANIFEST).is_file():
        verify(run)
        return run
    for _ in range(TRIES):
        folders = _step_folders(run)
        if not folders:
            raise CheckpointError(no_checkpoint(run))
        with suppress(FileNotFoundError):  # removed while it is read: a newer one has replaced it
            return _check_newest(folders)
    raise CheckpointError(f"{run} changes too fast to be read: try again later")


def _check_newest(folders: list[Path]) -> Path:
    """The first of these checkpoints, verified. Raises as `find`, and FileNotFoundError if the
    first has been removed meanwhile."""
    try:
        verify(folders[0])
    except (CheckpointError, OSError) as error:
        if not folders[0].exists():
            raise FileNotFoundError(folders[0]) from error
        whole = next(filter(_is_whole, folders[1:]), None)
        if whole:
            damaged = " and ".join(str(folder) for folder in folders[: folders.index(whole)])
            advice = f"move or delete {damaged}; then --resume continues from {whole}"
        else:
            advice = "no other checkpoint is whole: train again, into another directory"
        raise CheckpointError(f"{error}; {advice}") from error
    return folders[0]


def read_meta(folder: Path) -> dict[str, float]:
    """The step and the scores of a checkpoint. Raises ValueError for a malformed file."""
    meta = read_record(folder / "meta.json", dict[str, float])
    check(meta.get("step"), int, f"{folder / 'meta.json'}: step")
    return meta


def no_checkpoint(run: Path) -> str:
    """An error message for a folder without a checkpoint; it names the runs inside, if any."""
    inside = sorted({path.parent.parent.name for path in run.glob(f"*/step-*/{MANIFEST}")})
    if inside:
        shown = ", ".join(inside[:20])
        return f"{run} is a folder of runs: {shown}; give one of them, such as {run / inside[0]}"
    if (run / "config.json").is_file():
        return f"{run} holds no complete checkpoint: train it again, into another folder"
    return f"{run} holds no complete checkpoint: give the folder of a run, as train.py --out did"


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill leaves no half checkpoint.

    Of a symbolic link only the link is removed. An error is a warning: tidying up is no reason to
    end a run.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder.rename(temporary_name(folder)))
    except OSError as error:
        warnings.warn(f"the old checkpoint {folder} could not be removed: {error}", stacklevel=3)


def prune(run: str | Path, keep_last: int = 2, best: int | None = None) -> list[Path]:
    """Remove old checkpoints and return their paths. Only one rank calls this.

    Kept are the newest `keep_last`, the one of step `best`, and the newest valid one (which is
    older than all those if they are damaged). A folder without a manifest was not written here,
    and is kept too.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; keep at least 1 checkpoint")
    folders = _step_folders(Path(run))
    old = folders[keep_last:]
    if best is not None:
        old = [folder for folder in old if folder.name != f"step-{best:06d}"]
    if not old:
        return []
    whole = next(filter(_is_whole, folders), None)
    if whole is None:
        return []
    removed = [folder for folder in old if folder != whole]
    for folder in removed:
        _remove(folder)
    return removed


# ---- the training state: optimizers and counters -------------------------------------------------


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Around a call of DCP: raise the original error instead of DCP's wrapper around it.

    The wrapper is not an Exception, so `except Exception` would not catch it. (BaseException is its
    base class.) A warning about a run of one process is suppressed.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))  # of the first rank that failed
            raise cause from error


def collect_state(
    model: nn.Module, optimizers: Sequence[Optimizer], counters: dict[str, Any]
) -> dict[str, Any]:
    """The training state, for `write_state`. Every rank calls this.

    counters: plain values and tensors by name, such as the step or states of random generators.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    states = {}
    for index, optimizer in enumerate(optimizers):
        fresh = not optimizer.state
        states[str(index)] = get_optimizer_state_dict(model, optimizer)
        if fresh:
            # For an optimizer without a state DCP takes a trial step, to create one. Undo this:
            # saving must not change the training.
            optimizer.state.clear()
            states[str(index)]["state"] = {}
    return {"optimizers": states, "counters": counters}


def write_state(
    folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None
) -> None:
    """Write the result of `collect_state`. Each rank of the group writes its part."""
    import torch.distributed.checkpoint as dcp  # imported here because it loads slowly

    with _dcp_errors():
        dcp.save(state, checkpoint_id=folder, process_group=group)


def restore_state(
    folder: str | Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    counters: dict[str, Any],
) -> None:
    """Fill optimizers and counters in place from folder/state. No code in it is run.

    Every rank calls this, with the same arguments as `collect_state`; the number of ranks may
    differ. DCP fills a template: `counters` has the names that were saved, and for a fresh
    optimizer DCP creates the state by a trial step with lr 0 and zero gradients.

    Raises CheckpointError if the saved state is not of this model and these optimizers.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    from tinyfm.training.unpickle import Planner, Reader

    folder = Path(folder) / "state"
    states = {}
    for index, optimizer in enumerate(optimizers):
        states[str(index)] = get_optimizer_state_dict(model, optimizer)
    try:
        # Compare the template with the names that were saved.
        saved = Reader(folder).read_metadata().state_dict_metadata
        unused = {name for name in saved if name.startswith("optimizers.") and ".state." in name}
        for index, template in states.items():
            for name, slots in list(template["state"].items()):
                names = {f"optimizers.{index}.state.{name}.{slot}" for slot in slots}
                if not names & unused:  # this parameter never had a gradient, hence no state
                    del template["state"][name]
                unused -= names
        if unused:
            raise ValueError(f"{min(unused)} is unexpected")

        # Fill the template, and hand it to the optimizers.
        with _dcp_errors():
            tree = {"optimizers": states, "counters": counters}
            dcp.load(tree, storage_reader=Reader(folder), planner=Planner())
        for state, optimizer in zip(states.values(), optimizers):
            options = StateDictOptions(strict=False)
            set_optimizer_state_dict(model, optimizer, state, options=options)
    except Exception as error:
        advice = "resume with the model, optimizers and counters it was saved with"
        raise CheckpointError(f"{folder} does not fit this run: {error}; {advice}") from error


# ---- save ----------------------------------------------------------------------------------------


def recover(run: Path, owned: bool = True) -> None:
    """Clean up after killed or failed saves.

    A checkpoint that was being replaced gets its name back; everything else that is temporary is
    removed. owned: this process is the only one that writes the run; otherwise what belongs to
    other running processes is left alone.
    """
    for path in run.glob(f"{TEMPORARY}*"):
        process = path.name.removeprefix(TEMPORARY).partition("-")[0]
        if not owned and process != str(os.getpid()) and is_running(process):
            continue
        old = OLD_FOLDER.fullmatch(path.name)
        if old and not (run / old[1]).exists():
            path.rename(run / old[1])
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _publish(temporary: Path, final: Path) -> None:
    """Add the manifest to a folder that is otherwise complete, and rename it."""
    write_json(temporary / MANIFEST, make_manifest(temporary))
    for path in [*temporary.rglob("*"), temporary]:
        fsync(path)
    if final.is_symlink():
        final.unlink()
    elif final.exists():  # the run was resumed from an earlier step, or from this one
        final.rename(temporary_name(final.with_name(f"old-{final.name}")))
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
    """Write run/step-NNNNNN and point `latest` at it; return its path. Every rank calls this.

    tensors: {"model": model.state_dict(), "ema": ...}, each written to NAME.safetensors by rank 0.
    state: the result of `collect_state`. meta: plain values for meta.json, such as losses.
    write(folder): adds files, such as the tokenizer's. group: the ranks that save; None = all.

    Raises CheckpointError after any failure; the earlier checkpoints are then untouched.
    """
    run = Path(run)
    final = run / f"step-{step:06d}"

    def write_shared() -> Path:
        temporary = temporary_name(final)
        run.mkdir(parents=True, exist_ok=True)
        recover(run, owned=False)
        if final.exists() and not (final / MANIFEST).is_file():
            raise FileExistsError(f"{final} is in the way and is not a checkpoint")
        temporary.mkdir()
        for name, values in tensors.items():
            save_tensors(temporary, name, values)
        write_json(temporary / "meta.json", {"step": step, **(meta or {})})
        if write:
            write(temporary)
        return temporary

    try:
        temporary = distributed.on_first_rank(write_shared, group)
        if state:
            write_state(temporary / "state", state, group)
        distributed.on_first_rank(lambda: _publish(temporary, final), group)
    except Exception as error:
        problem = f"step {step} could not be saved in {run}: {type(error).__name__}: {error}"
        advice = "make room or remove that cause, then resume; earlier checkpoints are untouched"
        raise CheckpointError(f"{problem}; {advice}") from error
    finally:
        if distributed.rank() == 0:
            recover(run, owned=False)
    return final


# ---- save in the background ----------------------------------------------------------------------


def copy_to_cpu(tree: Any) -> Any:
    """Nested dicts and lists with all tensors copied to CPU memory. Shards stay shards."""
    if isinstance(tree, dict):
        return {name: copy_to_cpu(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [copy_to_cpu(value) for value in tree]
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    return tree


class Saver:
    """Saves in a background thread, one save at a time, on all ranks.

    The thread must be given copies: training changes the originals while it writes. Its messages
    between ranks use a process group of their own, because training sends messages at the same
    time. If the process is killed during a save, the earlier checkpoints are untouched.
    """

    def __init__(self):
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.group = None
        if distributed.joined():  # with a long timeout: a slow disk must not end the run
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def start(self, work: Callable[[dist.ProcessGroup | None], None]) -> None:
        """Start work(group) in the background, after the previous work. Every rank calls this."""
        self.wait()

        def run() -> None:
            try:
                work(self.group)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait until the current save is done. Raises its error, if it failed; once only."""
        if self.thread:
            self.thread.join()
        error = self.error
        self.thread = None
        self.error = None
        if error:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        """Wait for the last save, unless another rank is lost: the save would wait for it too."""
        if error is None or not distributed.is_lost(error):
            self.wait()
