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


@pytest.mark.parametrize("lesson", **BY_NAME)
def test_the_repository_passes_every_check(lesson):
    """The module passes; each hole and each typical wrong answer fails, and says why."""
    sources = sources_of(lesson)
    passing = []
    failing = []
    for exercise in lesson.exercises:
        source = sources[exercise.module]
        passing.append((exercise.name, check.job_for(lesson, exercise, source)))
        hole = cut.put_body(source, exercise.name, lesson.hole(exercise))
        assert cut.is_open(hole, exercise.name)
        failing.append((f"{exercise.name}: hole", check.job_for(lesson, exercise, hole)))
        wrong_answers = lesson.teacher.WRONG[exercise.name]
        assert len(wrong_answers) >= 3, f"{exercise.name} has fewer than three wrong answers"
        for wrong in wrong_answers:
            assert wrong.why
            mistaken = cut.edit(source, exercise.name, wrong.old, wrong.new)
            job = check.job_for(lesson, exercise, mistaken)
            failing.append((f"{exercise.name}: {wrong.old!r} -> {wrong.new!r}", job))
    jobs = [job for _, job in passing + failing]
    labels = [label for label, _ in passing + failing]
    results = dict(zip(labels, check.run_jobs(jobs), strict=True))
    refused = {name: results[name].reasons for name, _ in passing if results[name].reasons}
    assert not refused, "the repository's code fails its checks"
    accepted = [label for label, _ in failing if results[label].state == "passed"]
    assert not accepted, "wrong answers pass"
    silent = [label for label, _ in failing if not any(map(str.strip, results[label].reasons))]
    assert not silent


@pytest.mark.parametrize("lesson", **BY_NAME)
def test_every_planted_fault_shows(lesson):
    """Each fault can be planted, and fails a check of the lesson."""
    jobs = []
    for fault in lesson.teacher.FAULTS:
        assert fault.symptom
        assert fault.answer
        text = faults.planted(fault, read(ROOT / fault.module))
        jobs.append(check.Job({fault.module: text}, lesson, None))
    for fault, result in zip(lesson.teacher.FAULTS, check.run_jobs(jobs), strict=True):
        assert result.state == "differs", f"no check sees {fault.old!r} -> {fault.new!r}"


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
