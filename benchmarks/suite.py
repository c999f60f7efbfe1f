"""What the tests cost:  python benchmarks/suite.py [ROOM ...] [--record]

Runs the tests as README.md does, and then each room of tests/ alone in one process, as one does
while changing it. A ROOM is a folder of tests/; without one, all rooms, and the files beside them.
Prints a table of rooms and the ten slowest tests; --record writes both into README.md.

A test's seconds are those of its setup, which may be that of other tests too, its call, and its
teardown. In the whole run, tests in several processes share the cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing

ROOT = timing.PAGE.parent.parent
SLOWEST = 10
LESSONS = "lessons"  # the files in tests/ that are in no room
Test = tuple[str, str, float]  # room, name, seconds


def read_report(path: Path) -> list[Test]:
    """The tests of a report in pytest's JUnit format."""
    tests = []
    for case in ElementTree.parse(path).iter("testcase"):
        module = case.get("classname").split(".")  # tests, perhaps a room, file
        room = module[1] if len(module) > 2 else LESSONS
        tests.append((room, f"{module[-1]}.py::{case.get('name')}", float(case.get("time"))))
    return tests


def run(paths: list[str], *options: str) -> tuple[float, list[Test]]:
    """(seconds in all, the tests) of pytest on these paths. Exits if a test fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        words = [sys.executable, "-m", "pytest", *paths, *options, f"--junitxml={report}"]
        start = time.perf_counter()
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}\nthe tests fail: {' '.join(words[2:])}")
        return seconds, read_report(report)


def rooms_of(names: list[str]) -> dict[str, list[str]]:
    """{room: the paths of its tests} of rooms in tests/. Exits at a name that is no room."""
    tests = ROOT / "tests"
    rooms = {path.parent.name: [f"tests/{path.parent.name}"] for path in tests.glob("*/test_*.py")}
    rooms[LESSONS] = [f"tests/{path.name}" for path in tests.glob("test_*.py")]
    for name in names:
        if name not in rooms:
            raise SystemExit(f"there is no room {name} in tests/: choose from {', '.join(rooms)}")
    return {name: sorted(rooms[name]) for name in names or sorted(rooms)}


def table(whole: float, tests: list[Test], alone: dict[str, float]) -> str:
    """The table of rooms, the longest alone first, and that of the slowest tests."""
    together = defaultdict(list)
    for room, _, seconds in tests:
        together[room].append(seconds)
    lines = [
        f"{timing.describe_machine()}; {len(tests):,} tests in {whole:.0f} s\n",
        "| room | tests | s, summed over the whole run | s, alone in one process |",
        "|---|---|---|---|",
    ]
    for room in sorted(alone, key=alone.get, reverse=True):
        count, total = len(together[room]), sum(together[room])
        lines.append(f"| {room} | {count:,} | {total:.0f} | {alone[room]:.0f} |")
    lines += ["", "| slowest tests | s |", "|---|---|"]
    for room, name, seconds in sorted(tests, key=lambda test: -test[2])[:SLOWEST]:
        place = name if room == LESSONS else f"{room}/{name}"
        lines.append(f"| `{place}` | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", help="folders of tests/ (all)")
    parser.add_argument("--record", action="store_true", help="write the tables into README.md")
    options = parser.parse_args()
    rooms = rooms_of(options.rooms)
    paths = [path for own in rooms.values() for path in own]
    whole, tests = run(paths, "-n", "auto", "--dist", "worksteal")
    alone = {}
    for room, own in rooms.items():
        alone[room], _ = run(own)
        print(f"{room}: {alone[room]:.0f} s", flush=True)
    text = table(whole, tests, alone)
    print(text)
    if options.record:
        timing.record("suite", text)


if __name__ == "__main__":
    main()
