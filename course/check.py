"""Check exercises: each body alone, in a copy of the repository, in a child process.

Each exercise is checked with the repository's own bodies around it, so that a mistake in one is
not blamed on another. The copy is what is imported: tables that bind a function when a module
loads (SAMPLERS in ddpm.py, say) hold the student's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

from course import cut
from course.lessons import ROOT, Exercise, Lesson, read

COPIED = ("tinyfm", "data", "course", "train.py", "sample.py", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "cache", "*.pyc", "site", "expected.json")
SECONDS = 60  # for the checks of one exercise
ALL_SECONDS = 1800  # of processor time for one child


@dataclass(frozen=True)
class Job:
    """Files to put in place of the repository's, and the checks to run on them."""

    files: dict[str, str]
    lesson: Lesson
    exercise: str | None  # None: all checks of the lesson, up to the first that fails


@dataclass(frozen=True)
class Result:
    """What became of one exercise."""

    state: str  # "passed", "differs" or "open"
    reasons: tuple[str, ...] = ()  # which property broke, and how


def copy_tree(folder: Path) -> None:
    """Copy the code of the repository into folder."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=LEFT_OUT)
        elif source.exists():
            shutil.copy(source, folder / name)


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of the repository's code that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="tinyfm-course-"))
    try:
        copy_tree(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Child:
    """A process that answers jobs (child.py)."""

    def __init__(self, tree: Path):
        environment = dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1")
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the checks need pytest alone
        command = [sys.executable, "-m", "course.child", str(ALL_SECONDS)]
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip
        self.answers: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.answers.get()  # "ready": the time of a check begins after the imports

    def _read(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")  # the child has ended

    def ask(self, job: Job, seconds: float) -> list[list[str]]:
        """The outcomes of a job. Raises TimeoutError, or ChildProcessError if the child ends."""
        line = json.dumps(
            {"files": job.files, "lesson": job.lesson.folder.name, "exercise": job.exercise}
        )
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.answers.get(timeout=seconds)
        except BrokenPipeError:
            answer = ""
        except Empty:
            raise TimeoutError from None
        if not answer:
            raise ChildProcessError
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def checker(seconds: float = SECONDS) -> Iterator[Callable[[Job], Result]]:
    """A function that gives the result of a job. A child that hangs or dies is replaced.

    Raises ValueError if pytest, which runs the checks, is missing.
    """
    if importlib.util.find_spec("pytest") is None:
        raise ValueError("the checks need a package: pip install pytest")
    child = None

    def run(job: Job) -> Result:
        nonlocal child
        child = child or Child(tree)
        try:
            return summarise(child.ask(job, seconds))
        except TimeoutError:
            reason = f"it did not end within {seconds:.0f} seconds"
        except ChildProcessError:
            reason = "the process ended: too much memory, or an exit"
        child.close()
        child = None
        restore(tree, job)
        return Result("differs", (reason,))

    with copied_tree() as tree:
        try:
            yield run
        finally:
            if child:
                child.close()


def run_jobs(jobs: list[Job], seconds: float = SECONDS) -> Iterator[Result]:
    """The result of each job, see `checker`."""
    with checker(seconds) as run:
        yield from map(run, jobs)


def restore(tree: Path, job: Job) -> None:
    """Put the repository's files back into a tree whose child was stopped."""
    for path in job.files:
        shutil.copy(ROOT / path, tree / path)


def summarise(outcomes: list[list[str]]) -> Result:
    failed = [(name, message) for name, outcome, message in outcomes if outcome != "passed"]
    if not outcomes:
        return Result("differs", ("no check was run",))
    if not failed:
        return Result("passed")
    return Result("differs", tuple(f"{property_of(n)}: {message}" for n, message in failed))


def property_of(test: str) -> str:
    """A test's name as words: test_a_query_sees_itself -> "a query sees itself"."""
    name, bracket, case = test.partition("[")
    return name.removeprefix("test_").replace("_", " ") + (f" [{case}" if bracket else "")


def job_for(lesson: Lesson, exercise: Exercise, source: str) -> Job:
    """The check of one exercise with the body that source has for it."""
    body = cut.take_body(source, exercise.name)
    text = cut.put_body(read(ROOT / exercise.module), exercise.name, body)
    return Job({exercise.module: text}, lesson, exercise.name)


def check_lesson(lesson: Lesson, folder: Path) -> Iterator[tuple[Exercise, Result]]:
    """Check the student's modules in folder (as `start` wrote them), exercise by exercise.

    If the folder is the repository (a handout), there are no other bodies to put around each.
    """
    waiting: list[tuple[Exercise, Result | Job]] = []
    for exercise in lesson.exercises:
        path = folder / exercise.module
        if not path.is_file():
            waiting.append((exercise, Result("open", (f"{path} is missing",))))
            continue
        try:
            source = read(path)
            if cut.is_open(source, exercise.name):
                waiting.append((exercise, Result("open")))
            elif folder == ROOT:
                waiting.append((exercise, Job({}, lesson, exercise.name)))
            else:
                waiting.append((exercise, job_for(lesson, exercise, source)))
        except SyntaxError as error:
            reason = f"{path}, line {error.lineno}: {error.msg}"
            waiting.append((exercise, Result("differs", (reason,))))
        except (ValueError, RecursionError) as error:
            waiting.append((exercise, Result("differs", (f"{path}: {error}",))))
    results = run_jobs([item for _, item in waiting if isinstance(item, Job)])
    for exercise, item in waiting:
        yield exercise, next(results) if isinstance(item, Job) else item


def digest(path: Path) -> str:
    """The beginning of a file's SHA-256, to see which file was checked."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
