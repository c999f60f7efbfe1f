"""Long work in many processes that a kill does not undo: results in order, and a journal.

What is written is only ever appended to, by one process. Now and then the journal, replaced whole,
says how far the work is and how long each file was then; after a kill the files are cut back to
that, and the work goes on from there.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

# ---- workers -------------------------------------------------------------------------------------


def begin_worker(work: Callable) -> None:
    """Keep the work, leave Ctrl-C to the parent, and end with it, however it ends."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work_on(item: object) -> object:
    return _work(item)


def ordered(work: Callable, items: Iterable, workers: int) -> Iterator:
    """Yield work(item) for each item, in order, from `workers` processes, two items each ahead."""
    if workers == 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")  # nothing of this process is copied
    pool, waiting = ProcessPoolExecutor(workers, context, begin_worker, (work,)), deque()
    try:
        for item in items:
            waiting.append(pool.submit(work_on, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        advice = "run the same command again to go on, with fewer --workers if memory was short"
        raise ValueError(f"a worker process was killed: {advice}") from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---- what is done --------------------------------------------------------------------------------


def check_settings(folder: Path, before: dict, now: dict, late: Iterable[str] = ()) -> None:
    """Raise ValueError if a folder was begun with other settings, or from other files."""
    names = sorted({*before, *now} - {*late})
    if other := [name for name in names if before.get(name) != now.get(name)]:
        raise ValueError(
            f"{folder} was made with other settings ({', '.join(other)}): choose another --out, "
            "delete it, or repeat the command that made it"
        )


class Journal:
    """The state of a folder that is being made: on disk it is always that of one moment."""

    def __init__(self, folder: Path, settings: dict, late: Iterable[str] = ()):
        """Go on where the folder was left, or begin. Raises ValueError for other settings, but of
        `late` ones, before the stage that is the first to need them."""
        self.folder, self.path = folder, folder / "journal.json"
        self.state = {"settings": settings, "stage": "clean", "done": 0, "lengths": {}}
        if self.path.exists():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
            free = () if self.state["stage"] == "encode" else late
            check_settings(folder, self.state["settings"], settings, free)
            self.state["settings"] = settings
        folder.mkdir(parents=True, exist_ok=True)
        for file in filter(Path.is_file, folder.iterdir()):
            length = self.state["lengths"].get(file.name)
            if length is not None:
                os.truncate(file, length)
            elif file != self.path:
                file.unlink()

    def commit(self, **state) -> None:
        """Force all files onto the disk, then the journal that says how long they are."""
        paths = [p for p in self.folder.iterdir() if p.suffix in (".bin", ".jsonl", ".keys")]
        for path in paths:
            with open(path, "ab") as file:
                os.fsync(file.fileno())
        self.state |= {**state, "lengths": {path.name: path.stat().st_size for path in paths}}
        beside = self.path.with_suffix(".new")
        with open(beside, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.state))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
