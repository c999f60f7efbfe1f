"""What a class gets: the repository with the holes cut, and without the answers.

In a handout there is nothing beside the holes to compare with, so a student writes in tinyfm/
itself, and `check` tests these files as they are.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from course.lessons import COURSE, ROOT, all_lessons, read, write

MARK = "HANDOUT"  # a file in course/ that says so
ANSWERS = ("teacher.py", "answers.md", "teaching.md")


def is_handout() -> bool:
    return (COURSE / MARK).exists()


def tracked_files() -> list[str]:
    """The repository's files, as git lists them. Raises ValueError without git."""
    try:
        words = ["git", "-C", str(ROOT), "ls-files", "-z"]
        names = subprocess.run(words, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"a handout is made in a clone with git: {error}") from None
    return [name for name in names.split("\0") if name]


def write_handout(out: Path) -> int:
    """Write the handout; returns the number of holes.

    Raises ValueError if out exists, so that nothing is lost.
    """
    if is_handout():
        raise ValueError("this is a handout already; make one in the whole repository")
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder")
    for name in tracked_files():
        if Path(name).name in ANSWERS and name.startswith("course/"):
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name)
    count = 0
    for lesson in all_lessons():
        for module in lesson.modules:
            # A module may have holes of several lessons, so each starts from what is written.
            write(out / module, lesson.cut_holes(read(out / module), module))
        count += len(lesson.exercises)
    write(out / "course" / MARK, "The bodies of the exercises are cut out of tinyfm/.\n")
    return count
