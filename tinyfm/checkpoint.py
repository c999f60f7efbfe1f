"""Run directories: a checkpoint is whole or not there, is verified, and is safe to share.

A run can be killed at any instant, also while it saves. The remedy is old: write under another
name, force the bytes onto the disk, then rename, which a file system does wholly or not at all.
("All File Systems Are Not Created Equal", Pillai et al., OSDI 2014: what breaks without a step.)

    run/.tmp-step-000500/  all files, then manifest.json with their SHA-256, all fsynced; renamed to
    run/step-000500/       a checkpoint; then `latest`, a text file with its name, is replaced
        model.safetensors  ema.safetensors    weights: names and numbers, no code
        meta.json, tokenizer files            plain text
        state/                                optimizers, counters: torch.distributed.checkpoint
        manifest.json                         size and SHA-256 of every file above

Share everything but state/, which holds pickles, and a pickle can run code when read: resume only
runs of your own. The rest is safetensors and JSON, and nothing falls back to a pickle.
Under torchrun every rank calls `save` and `load_state`, on one shared file system: rank 0 writes
the weights and the manifest, each rank its part of state/, and one rank's error is raised on all.
Left out: saving in the background, remote storage, signatures (a manifest finds damage, not lies).
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"  # prefix of whatever is being written or removed; the next save clears it away
STEP_FOLDER = re.compile(r"step-(\d{6,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or trusted: what, where, and what to do."""


# ---- text files, replaced as a whole ----


def _fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, out of memory onto the disk."""
    if os.name == "nt":
        return  # Windows opens no folders, and syncs only what was opened for writing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    """Replace a small file: whoever reads it sees all of the old text or all of the new."""
    beside = path.with_name(TEMPORARY + path.name)
    beside.write_text(text, encoding="utf-8")
    _fsync(beside)
    os.replace(beside, path)
    _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file. Plain types only: TypeError for an array scalar, ValueError for NaN."""
    _write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file. Raises CheckpointError: missing, malformed, NaN, or a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; restore it") from error


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
        raise CheckpointError(f"{run} holds no complete checkpoint; train without --resume")
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


def _rank() -> int | None:
    """This process's rank; None when there is only one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else None


def _on_rank_0(work: Callable[[], None]) -> None:
    """Run `work` on rank 0 alone; every rank waits for it, and fails if it failed."""
    problem: Exception | None = None
    if not _rank():
        try:
            work()
        except Exception as error:
            problem = error
    if _rank() is not None:
        message = [problem and repr(problem)]
        dist.broadcast_object_list(message, src=0)
        problem = problem or (message[0] and RuntimeError(f"rank 0: {message[0]}"))
    if problem:
        raise problem


def _dcp(verb: str, tree: dict[str, Any], folder: Path) -> None:
    """dcp.save or dcp.load; its error, which `except Exception` would miss, becomes its cause."""
    import torch.distributed.checkpoint as dcp  # here, as it is slow to import

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            getattr(dcp, verb)(tree, checkpoint_id=folder)
        except dcp.api.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def _clear(run: Path) -> None:
    """Remove the folders that killed or failed saves left behind."""
    for folder in run.glob(TEMPORARY + "*"):
        shutil.rmtree(folder, ignore_errors=True)


def _store_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of several names for one memory (an embedding that is also the output layer) keep the first.

    Nothing is lost: the model that loads them shares that memory itself, see `load_model`.
    """
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr() or name, tensor.dtype, tensor.shape, tensor.stride())
        kept.setdefault(place, (name, tensor.detach().contiguous()))
    return dict(kept.values())


def _publish(temporary: Path, final: Path) -> None:
    """Seal a folder that is written and give it its name."""
    write_json(temporary / MANIFEST, _seals(temporary))
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    if final.exists():  # this run went back to an earlier step, which is what a kill here leaves
        final.rename(final.with_name(f"{TEMPORARY}old-{final.name}"))
    temporary.rename(final)
    _write_text(final.parent / "latest", final.name + "\n")


def save(
    run: str | Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any] | None = None,
    meta: dict[str, Any] | None = None,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Write run/step-NNNNNN and point `latest` at it; return its path.

    tensors: {"model": model.state_dict(), "ema": ...}, each a NAME.safetensors (read on rank 0).
    state: from `training_state`. meta: plain values for meta.json, such as validation losses.
    write(folder) may add files, such as the tokenizer's.
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
            save_file(_store_once(values), temporary / f"{name}.safetensors", {"format": "pt"})
        write_json(temporary / "meta.json", {"step": step, **(meta or {})})
        if write:
            write(temporary)

    try:
        _on_rank_0(write_shared)
        if state:
            _dcp("save", state, temporary / "state")
        _on_rank_0(lambda: _publish(temporary, final))
    except Exception as error:
        reason = f"step {step} could not be saved in {run}: {type(error).__name__}: {error}"
        advice = "make room or remove that cause, then resume; earlier checkpoints are untouched"
        raise CheckpointError(f"{reason}; {advice}") from error
    finally:
        if not _rank():
            _clear(run)
    return final


def training_state(
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


# ---- loading ----


def load_tensors(folder: str | Path, name: str = "model") -> dict[str, Tensor]:
    """Read NAME.safetensors onto the CPU. Raises CheckpointError: missing, foreign or malformed."""
    path = Path(folder) / f"{name}.safetensors"
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        problem = f"{path} is not a readable safetensors file: {error}"
        advice = "restore it; a pickle (torch.save) is never opened here, convert it first"
        raise CheckpointError(f"{problem}; {advice}") from error


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a model, before DDP or FSDP2 wraps it; all or none.

    A name may be missing if the model keeps it in the memory of one that is there, as tied weights.
    Raises ValueError with the first names that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    filled = {own[name].data_ptr() for name in own.keys() & tensors.keys()}
    problems = [f"{name} is unexpected" for name in tensors if name not in own]
    for name, tensor in own.items():
        if name not in tensors and tensor.data_ptr() not in filled:
            problems.append(f"{name} is missing")
        elif name in tensors and tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            problems.append(f"{name} is {shapes}")
    if problems:
        problem = f"{len(problems)} weights do not fit the model: {', '.join(problems[:3])}"
        raise ValueError(f"{problem}; build the model from the config saved with them")
    model.load_state_dict(tensors, strict=False)


def load_state(
    folder: str | Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    counters: dict[str, Any],
) -> None:
    """Fill optimizers and counters in place from state/, which must be of a run of your own.

    Call as `training_state` was, on any number of ranks. DCP fills a template: `counters` has the
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
