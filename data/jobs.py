"""Long work in many processes that survives a kill: results in order, and a journal.

A single process writes, and it only appends. From time to time it replaces the journal, which says
how much of the work is done and how long each file was at that time. After a kill, the files are
cut back to these lengths, and the work continues from there.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

# ---- workers -------------------------------------------------------------------------------------


def exit_after(process) -> None:
    """Wait until another process has ended, then end this one."""
    process.join()
    os._exit(1)


def begin_worker(work: Callable) -> None:
    """Prepare a worker process, which will call `work`.

    It ignores Ctrl-C, which its parent handles. It ends when its parent does, even if that is
    killed.
    """
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=exit_after, args=(parent,), daemon=True).start()


def work_on(item: object) -> object:
    """Call the worker's `work`."""
    return _work(item)


def in_order(
    submit: Callable[[object], Future], items: Iterable, ahead: Callable[[], int]
) -> Iterator:
    """Yield the result of submit(item) for each item, in the order of the items.

    At most ahead() items are read in advance.
    """
    waiting = deque()
    for item in items:
        waiting.append(submit(item))
        while len(waiting) > ahead():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def in_processes(work: Callable, items: Iterable, workers: int) -> Iterator:
    """Yield work(item) for each item, in the order of the items, from `workers` processes.

    At most two items per worker are read in advance. Raises ValueError if a worker is killed.
    """
    if workers == 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")  # copies nothing of this process
    pool = ProcessPoolExecutor(workers, context, begin_worker, (work,))
    try:
        yield from in_order(partial(pool.submit, work_on), items, lambda: 2 * workers)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed: run the same command again to continue, with fewer "
            "--workers if there was too little memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---- the journal ---------------------------------------------------------------------------------


def check_settings(folder: Path, before: dict, now: dict, late: Iterable[str] = ()) -> None:
    """Raise ValueError if a folder was started with other settings, or from other files.

    The settings named in `late` may differ.
    """
    names = sorted({*before, *now} - {*late})
    different = [name for name in names if before.get(name) != now.get(name)]
    if different:
        raise ValueError(
            f"{folder} was made with other settings ({', '.join(different)}): choose another "
            "--out, delete it, or repeat the command that made it"
        )


def read_journal(path: Path) -> dict:
    """The state in a journal. Raises ValueError that names the file if it is malformed."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        match state:
            case {
                "settings": dict(),
                "stage": str(),
                "done": int(done),
                "lengths": dict(lengths),
            } if done >= 0:
                sizes_fit = all(type(size) is int and size >= 0 for size in lengths.values())
                if sizes_fit and all(Path(name).name == name for name in lengths):
                    return state
        raise ValueError("an entry is missing or of another kind")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): delete the folder {path.parent} and start again"
        ) from error


class Journal:
    """The state of a folder that is being made.

    The state on disk is always a consistent one: how much was done at one moment, and how long
    the files were at that moment.
    """

    def __init__(self, folder: Path, settings: dict, late: Iterable[str] = ()):
        """Start a folder, or return it to the last state on disk.

        Raises ValueError if the folder was started with other settings, or if a file is missing or
        shorter than it was. The settings named in `late`, which only the last stage ("encode")
        uses, may differ until that stage.
        """
        self.folder = folder
        self.path = folder / "journal.json"
        self.state = {"settings": settings, "stage": "clean", "done": 0, "lengths": {}}
        if self.path.exists():
            self.state = read_journal(self.path)
            may_differ = () if self.state["stage"] == "encode" else late
            check_settings(folder, self.state["settings"], settings, may_differ)
            self.state["settings"] = settings
        folder.mkdir(parents=True, exist_ok=True)
        self.check_lengths()
        # Cut each file to its length then, and remove the files that did not exist then.
        for file in filter(Path.is_file, folder.iterdir()):
            length = self.state["lengths"].get(file.name)
            if length is not None:
                os.truncate(file, length)
            elif file != self.path:
                file.unlink()

    def check_lengths(self) -> None:
        """Raise ValueError if a file is shorter than at the last commit: a part of it is lost."""
        for name, length in self.state["lengths"].items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else 0
            if size < length or not path.is_file():
                raise ValueError(
                    f"{path} has {size:,} bytes, and had {length:,} when {self.path.name} was "
                    f"written: delete the folder {self.folder} and start again"
                )

    def commit(self, **state) -> None:
        """Update the state: force all files onto the disk, then replace the journal."""
        paths = [p for p in self.folder.iterdir() if p.suffix in (".bin", ".jsonl", ".keys")]
        for path in paths:
            with open(path, "ab") as file:
                os.fsync(file.fileno())
        lengths = {path.name: path.stat().st_size for path in paths}
        self.state |= {**state, "lengths": lengths}
        replacement = self.path.with_suffix(".new")
        with open(replacement, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.state))
            file.flush()
            os.fsync(file.fileno())
        os.replace(replacement, self.path)
