"""The process that runs checks: `python -m course.child` in a copy of the repository.

It says "ready", then reads one job a line from its standard input, {"files": {path: text},
"lesson": folder, "exercise": name or null}. For each it puts the files in place, imports everything
again, runs the lesson's checks of that exercise (if null, all checks up to the first that fails),
puts the files back, and answers with one line on its standard output: [[test, outcome, message],
...].
"""

from __future__ import annotations

import json
import linecache
import os
import sys
from pathlib import Path

import pytest

from course import fence

OURS = ("tinyfm", "data", "train", "sample", "checks")  # modules that a job may have changed


class Reporter:
    """A plugin of pytest: chooses the tests of one exercise, and collects what they say."""

    def __init__(self, exercise: str | None):
        self.exercise = exercise
        self.results: list[list[str]] = []

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.exercise:
            exercise_of = [getattr(item.function, "exercise", "") for item in items]
            items[:] = [i for i, name in zip(items, exercise_of) if name == self.exercise]

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.results.append(["import", "failed", last_line(str(report.longrepr))])

    def pytest_runtest_makereport(self, item, call) -> None:
        if call.excinfo is not None:
            self.results.append([item.name, "failed", explain(call.excinfo)])
        elif call.when == "call":
            self.results.append([item.name, "passed", ""])


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no message"


def explain(excinfo) -> str:
    """An exception in one or a few lines: an assertion's message, or type, text and place."""
    error = excinfo.value
    text = str(error).strip()
    if isinstance(error, AssertionError):
        return text.split("\nassert ")[0].strip() or "the assertion does not hold"
    where = [frame for frame in excinfo.traceback if "tinyfm" in str(frame.path)]
    place = f", in {where[-1].name}: {line_of(where[-1])}".rstrip() if where else ""
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}{place}"


def line_of(frame) -> str:
    """The line that a frame of pytest's tracebacks is in; its `statement` parses the whole file."""
    path = str(frame.path)
    linecache.checkcache(path)
    return linecache.getline(path, frame.lineno + 1).strip()


def forget_ours() -> None:
    """Make Python import the modules of this repository again."""
    for name in list(sys.modules):
        if name.split(".")[0] in OURS:
            del sys.modules[name]


def run_job(job: dict) -> list[list[str]]:
    before = {}
    for path, text in job["files"].items():
        before[path] = Path(path).read_text(encoding="utf-8")
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    forget_ours()
    reporter = Reporter(job["exercise"])
    tests = str(Path("course") / job["lesson"] / "checks.py")
    options = ["-q", "--no-header", "--no-summary", "--tb=native", "-p", "no:cacheprovider"]
    options += ["-p", "no:unraisableexception"]  # it collects garbage twice, in 0.3 seconds
    if not job["exercise"]:
        options.append("--exitfirst")
    try:
        pytest.main([*options, tests], plugins=[reporter])
    finally:
        for path, text in before.items():
            Path(path).write_text(text, encoding="utf-8", newline="\n")
    return reporter.results


def main() -> None:
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the checks print is not an answer
    sys.dont_write_bytecode = True  # a file that changes twice in a second must be read twice
    fence.limit(int(sys.argv[1]))
    import torch  # noqa: F401  before the fence, as it loads libraries; each job needs it

    jobs = os.fdopen(os.dup(0), encoding="utf-8")
    fence.enclose(Path.cwd())
    print("ready", file=results, flush=True)
    for line in jobs:
        print(json.dumps(run_job(json.loads(line))), file=results, flush=True)


if __name__ == "__main__":
    main()
