"""Debugging exercises: a copy of the code with one bug, to be found by experiment.

The copy says nowhere what was changed. A diff with the repository would, and would teach nothing.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

from course import check, cut
from course.lessons import Fault, Lesson, read, write

SECRET = "fault.sha256"  # which fault was planted, as a hash: a guess can be checked, not read


def place(fault: Fault) -> str:
    """What a student names: "tinyfm/gpt.py:rotate"."""
    return f"{fault.module}:{fault.function}"


def digest(folder: Path, guess: str) -> str:
    return hashlib.sha256(f"{folder.resolve()} {guess}".encode()).hexdigest()


def planted(fault: Fault, source: str) -> str:
    """The module with the bug in it."""
    return cut.edit(source, fault.function, fault.old, fault.new)


def plant(lesson: Lesson, folder: Path, number: int | None) -> str:
    """Copy the code into folder with one fault of the lesson; returns the symptom.

    number: from 1; None picks one by chance. Raises ValueError if there is no such fault.
    """
    faults = lesson.teacher.FAULTS
    if number is not None and not 1 <= number <= len(faults):
        raise ValueError(f"lesson {lesson.number} has faults 1 to {len(faults)}, not {number}")
    fault = faults[number - 1] if number else random.choice(faults)
    if folder.exists():
        if not (folder / SECRET).exists():
            raise ValueError(f"{folder} is no earlier debugging exercise; move it away")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    check.copy_tree(folder)
    for teacher in folder.glob("course/*/teacher.py"):
        teacher.unlink()
    write(folder / fault.module, planted(fault, read(folder / fault.module)))
    write(folder / SECRET, digest(folder, place(fault)) + "\n")
    return fault.symptom


def answer_guess(lesson: Lesson, folder: Path, guess: str) -> tuple[bool, str]:
    """Whether the fault is in the function guessed ("tinyfm/gpt.py:rotate"), and what to print.

    Raises ValueError if no fault was planted in folder.
    """
    path = folder / SECRET
    if not path.is_file():
        raise ValueError(f"no fault is planted: python -m course break {lesson.number}")
    guess = guess.replace("\\", "/")
    if digest(folder, guess) != read(path).strip():
        form = "" if ":" in guess else "; name a file and a function: tinyfm/generate.py:complete"
        return False, f"no, the fault is not in {guess}{form}"
    found = [fault for fault in lesson.teacher.FAULTS if place(fault) == guess]
    source = read(folder / found[0].module)
    for fault in found:
        if fault.new in cut.take_body(source, fault.function) or len(found) == 1:
            return True, f"yes. {fault.answer}"
    return True, "yes"
