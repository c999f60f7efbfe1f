"""Each lesson: its holes, checks, wrong answers, faults, pages and figures."""

import contextlib
import io
import json

import pytest
from conftest import ROOT

from course import book, check, cut, experiment, faults
from course.lessons import Lesson, all_lessons, read

LESSONS = all_lessons()
BY_NAME = {"argvalues": LESSONS, "ids": [lesson.folder.name for lesson in LESSONS]}
EXPECTED = [lesson for lesson in LESSONS if experiment.expected_path(lesson).exists()]


def sources_of(lesson: Lesson) -> dict[str, str]:
    return {module: read(ROOT / module) for module in lesson.modules}


def wrong_answers(exercise, lesson: Lesson, every: bool) -> list:
    """Wrong answers of an exercise: all with --all-wrong-answers, else one of every second."""
    found = lesson.teacher.WRONG[exercise.name]
    assert len(found) >= 3, f"{exercise.name} has fewer than three wrong answers"
    assert all(wrong.why for wrong in found)
    if every:
        return list(found)
    place = lesson.exercises.index(exercise)
    return [] if place % 2 else [found[place % len(found)]]


@pytest.fixture(scope="module")
def run():
    """Runs a job. A child process is shared by all lessons, as it loads torch and pytest."""
    with check.checker() as run:
        yield run


@pytest.mark.parametrize("lesson", **BY_NAME)
def test_checks_accept_the_repository_and_nothing_else(lesson, run, request):
    """The module passes; each hole, typical wrong answer and planted fault fails, and says why."""
    every = request.config.getoption("--all-wrong-answers")
    sources = sources_of(lesson)
    failing = {}
    for exercise in lesson.exercises:
        source = sources[exercise.module]
        hole = cut.put_body(source, exercise.name, lesson.hole(exercise))
        assert cut.is_open(hole, exercise.name)
        failing[f"{exercise.name}: hole"] = check.job_for(lesson, exercise, hole)
        for wrong in wrong_answers(exercise, lesson, every):
            mistaken = cut.edit(source, exercise.name, wrong.old, wrong.new)
            label = f"{exercise.name}: {wrong.old!r} -> {wrong.new!r}"
            failing[label] = check.job_for(lesson, exercise, mistaken)
    for number, fault in enumerate(lesson.teacher.FAULTS, start=1):
        assert fault.symptom
        assert fault.answer
        text = faults.planted(fault, read(ROOT / fault.module))
        failing[f"fault {number}"] = check.Job({fault.module: text}, lesson, None)
    whole = check.Job({}, lesson, None)
    assert not run(whole).reasons, "the repository's code fails its checks"
    for label, job in failing.items():
        result = run(job)
        assert result.state == "differs", f"no check fails: {label}"
        assert any(map(str.strip, result.reasons)), f"no reason is given: {label}"


@pytest.mark.parametrize("lesson", **BY_NAME)
def test_pages_agree_with_their_sources(lesson):
    """python -m course weave would change nothing, and no page shows the body of a hole."""
    text = read(lesson.folder / "lesson.md")
    assert book.weave(lesson) == text, "run python -m course weave"
    holes = {exercise.name for exercise in lesson.exercises}
    quoted = {match[3].split()[1] for match in book.BLOCK.finditer(text) if match[2] == "code"}
    assert not holes & quoted
    for part in ("## Predict", "## Experiment", "## What can go wrong", "## Further reading"):
        assert part in text, f"{lesson.folder.name}/lesson.md has no {part}"


@pytest.mark.parametrize("lesson", **BY_NAME)
def test_examples_print_what_the_page_says(lesson, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    blocks = book.examples(lesson)
    assert blocks, "a lesson has a worked example"
    for code, wanted in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, f"{lesson.folder.name}/lesson.md", "exec"), names)
        assert wanted is None or out.getvalue() == wanted


@pytest.mark.parametrize("lesson", EXPECTED, ids=[lesson.folder.name for lesson in EXPECTED])
def test_figures_are_drawn_from_what_was_recorded(lesson, tmp_path):
    expected = experiment.read_expected(lesson)
    module = experiment.load(lesson)
    assert len(expected["results"]) == len(expected["recorded"]["seeds"]) >= 3
    names = set(experiment.scalar_names(expected["results"][0]))
    assert names == set(module.UNITS)
    experiment.draw(module, expected["results"], tmp_path / "figure")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "<svg" in read(tmp_path / "figure.svg")
    first = expected["results"][0]
    lines = experiment.comparison(module, first, expected)
    assert len(lines) == len(names)
    json.dumps(first)


def test_numbers_and_holes_are_unique():
    numbers = [lesson.number for lesson in LESSONS]
    assert len(set(numbers)) == len(numbers)
    holes = [(e.module, e.name) for lesson in LESSONS for e in lesson.exercises]
    assert len(set(holes)) == len(holes), "a function is an exercise of two lessons"
    for lesson in LESSONS:
        assert all(earlier in numbers and earlier < lesson.number for earlier in lesson.needs)
