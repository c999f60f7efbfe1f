"""Grade submissions: files in, a table out.

DIR holds a folder a student. In it lie the student's modules as `start` wrote them
(tinyfm/gpt.py), alone or inside the lesson's folder (02/tinyfm/gpt.py, work/02/tinyfm/gpt.py), and
perhaps the answer.json of the experiment. Only the bodies of the exercises are taken, so tests
cannot be changed; each student's run in a process with limits (fence.py).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from course import check, cut, experiment
from course.lessons import ROOT, Exercise, Lesson, read

COLUMNS = ("student", "lesson", "exercise", "name", "points", "of", "reason")


@dataclass(frozen=True)
class Row:
    student: str
    exercise: str  # "2.3", or "2 experiment"
    name: str
    points: float
    of: float
    reason: str


def modules_in(folder: Path, lesson: Lesson) -> Path:
    """The folder of a submission that holds tinyfm/."""
    inside = f"{lesson.number:02}"
    for place in (folder / inside, folder / "work" / inside):
        if place.is_dir():
            return place
    return folder


def read_body(path: Path, name: str) -> str:
    """The code of a function without comments and layout, or "" if it cannot be read."""
    try:
        source = read(path)
        return "" if cut.is_open(source, name) else cut.plain_code(source, name)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return ""


def find_twins(folders: list[Path], lesson: Lesson, exercise: Exercise) -> dict[Path, str]:
    """Whose code is the same, for each folder: "the repository's" or other students' names."""
    bodies = {
        folder: read_body(modules_in(folder, lesson) / exercise.module, exercise.name)
        for folder in folders
    }
    original = cut.plain_code(read(ROOT / exercise.module), exercise.name)
    notes = {}
    for folder, body in bodies.items():
        if not body:
            continue
        twins = [other.name for other, theirs in bodies.items() if theirs == body]
        twins.remove(folder.name)
        if body == original:
            notes[folder] = "the same code as the repository's"
        elif twins:
            notes[folder] = f"the same code as {', '.join(twins)}"
    return notes


def grade_experiment(folder: Path, lesson: Lesson, again: bool) -> tuple[float, str]:
    """(share of the points, reason) for the answer.json of a submission.

    again: measure the student's variant with the repository's code, and compare; else compare with
    what was recorded, which is there for the first variant only.
    """
    path = modules_in(folder, lesson) / "answer.json"
    try:
        answer = json.loads(read(path))
        variant, seed, measured = answer["variant"], int(answer["seed"]), answer["measured"]
        names = experiment.scalar_names(measured)
        numbers = {name: float(measured[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return 0, f"answer.json: {error}"
    module = experiment.load(lesson)
    if variant not in module.VARIANTS:
        return 0, f"answer.json: there is no variant {variant!r}"
    expected = experiment.read_expected(lesson)
    results = expected["results"] if expected else []
    if again:
        with check.copied_tree() as tree:
            own = experiment.run_in(tree, lesson, seed, variant)
        results = [own]
    elif variant != module.VARIANTS[0] or not results:
        return 0, f"the variant {variant} was not recorded: grade with --again"
    wanted = experiment.scalar_names(results[0])
    if missing := [name for name in wanted if name not in numbers]:
        return 0, f"answer.json lacks {', '.join(missing)}"
    wrong = []
    for name in wanted:
        low, high = experiment.prediction_interval(experiment.values_of(results, name))
        if not low <= numbers[name] <= high:
            wrong.append(f"{name} is {numbers[name]:.4g}, expected {low:.4g} to {high:.4g}")
    return 1 - len(wrong) / len(wanted), "; ".join(wrong)


def grade(folder: Path, lesson: Lesson, again: bool, points: float) -> Iterator[Row]:
    """The rows of all students of a folder.

    points: for the experiment; 0 = do not grade it. Raises ValueError if there is no student.
    """
    students = sorted(path for path in folder.iterdir() if path.is_dir())
    if not students:
        raise ValueError(f"{folder} holds no folders; each student's files lie in one")
    twins = {e.name: find_twins(students, lesson, e) for e in lesson.exercises}
    for student in students:
        for exercise, result in check.check_lesson(lesson, modules_in(student, lesson)):
            reasons = list(result.reasons) or ([result.state] if result.state != "passed" else [])
            if student in twins[exercise.name]:
                reasons.append(twins[exercise.name][student])
            earned = exercise.points if result.state == "passed" else 0
            label = lesson.label(exercise)
            reason = " | ".join(reasons)
            yield Row(student.name, label, exercise.name, earned, exercise.points, reason)
        if points:
            share, reason = grade_experiment(student, lesson, again)
            label = f"{lesson.number} experiment"
            yield Row(student.name, label, "experiment", share * points, points, reason)


def plain_cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula, on one line."""
    text = " ".join(text.split())
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def write_csv(rows: list[Row], lesson: Lesson, path: Path) -> dict[str, tuple[float, float]]:
    """Write one line an exercise; returns each student's (points, of)."""
    totals: dict[str, tuple[float, float]] = {}
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row in rows:
            cells = [plain_cell(row.student), lesson.number, row.exercise, row.name]
            table.writerow([*cells, f"{row.points:g}", f"{row.of:g}", plain_cell(row.reason)])
            points, of = totals.get(row.student, (0, 0))
            totals[row.student] = (points + row.points, of + row.of)
    return totals
