"""What a lesson consists of, and where its files lie.

A lesson is a folder NN-name of this folder:

    lesson.md       what the student reads
    exercises.py    TITLE, NEEDS and EXERCISES: the functions to write
    checks.py       tests of each exercise, marked by @checks("function")
    experiment.py   what the student measures                              (experiment.py)
    expected.json   what it gave here, over several seeds                  (experiment.py)
    teacher.py      WRONG: typical wrong answers, which the checks must find; FAULTS: bugs to plant
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from course import cut

ROOT = Path(__file__).resolve().parent.parent
COURSE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Exercise:
    """A function of a module that the student writes."""

    name: str  # "rotate" or "Attention.attend"
    module: str  # path from the repository's root, with "/": "tinyfm/gpt.py"
    points: int
    hint: str


@dataclass(frozen=True)
class Wrong:
    """A typical wrong answer: the right body with one piece of text replaced."""

    old: str
    new: str
    why: str  # the property that it breaks


@dataclass(frozen=True)
class Fault:
    """A bug to find by experiment: one function with one piece of text replaced."""

    module: str
    function: str
    old: str
    new: str
    symptom: str  # what the student is told
    answer: str  # why this is the cause


def checks(name: str) -> Callable:
    """Mark a test as a check of the exercise called name."""

    def mark(test: Callable) -> Callable:
        test.exercise = name
        return test

    return mark


def load_file(path: Path) -> ModuleType:
    """The module in a file, whatever the name of its folder."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Lesson:
    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name[:2])

    @property
    def name(self) -> str:
        return self.folder.name[3:]

    @cached_property
    def definition(self) -> ModuleType:
        return load_file(self.folder / "exercises.py")

    @property
    def title(self) -> str:
        return self.definition.TITLE

    @property
    def needs(self) -> tuple[int, ...]:
        """Numbers of the lessons that this one builds on."""
        return self.definition.NEEDS

    @property
    def exercises(self) -> tuple[Exercise, ...]:
        return self.definition.EXERCISES

    @cached_property
    def teacher(self) -> ModuleType:
        """Wrong answers and faults. Raises ValueError in a student's copy, which has none."""
        path = self.folder / "teacher.py"
        if not path.is_file():
            raise ValueError(f"{path} is missing; this needs the whole repository, not a handout")
        return load_file(path)

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that its exercises are cut from."""
        return list(dict.fromkeys(exercise.module for exercise in self.exercises))

    def label(self, exercise: Exercise) -> str:
        """The exercise's number, such as "2.3"."""
        return f"{self.number}.{self.exercises.index(exercise) + 1}"

    def cut_holes(self, source: str, module: str) -> str:
        """The source of a module without the bodies that this lesson asks for."""
        for exercise in self.exercises:
            if exercise.module == module:
                source = cut.put_body(source, exercise.name, self.hole(exercise))
        return source

    def hole(self, exercise: Exercise) -> str:
        """What stands in the module in place of the body."""
        label = self.label(exercise)
        points = f"{exercise.points} point" + ("s" if exercise.points > 1 else "")
        words = f"Exercise {label} ({points}). {exercise.hint}".split()
        lines = ["#"]
        for word in words:
            if len(lines[-1]) + 1 + len(word) > 88:
                lines.append("#")
            lines[-1] += " " + word
        lines.append(f'raise NotImplementedError("exercise {label}: write {exercise.name}")')
        return "\n".join(lines) + "\n"


def read(path: Path) -> str:
    """The text of a file; lines end in \\n on every system."""
    return path.read_text(encoding="utf-8")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def all_lessons() -> list[Lesson]:
    """The lessons, in their order."""
    folders = sorted(path.parent for path in COURSE.glob("[0-9][0-9]-*/exercises.py"))
    return [Lesson(folder) for folder in folders]


def find_lesson(number: int) -> Lesson:
    """Raises ValueError if there is no lesson of that number."""
    lessons = {lesson.number: lesson for lesson in all_lessons()}
    if number not in lessons:
        numbers = ", ".join(map(str, lessons))
        raise ValueError(f"there is no lesson {number}; there are {numbers}")
    return lessons[number]
