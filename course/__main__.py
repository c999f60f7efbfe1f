"""The course.

    python -m course                    the lessons, what each needs, and how far you are
    python -m course start 2            write work/02/: the modules with holes to fill
    python -m course check 2            check your code, exercise by exercise
    python -m course run 2              the lesson's experiment, with your code in it
    python -m course break 2            plant a bug to find; --guess FILE:FUNCTION answers
    python -m course update 2           cut the holes again, in a newer tinyfm; keeps your code
    python -m course site OUT           the lessons as a site that needs no network
    python -m course notebook 2         a lesson as a notebook: work/02/lesson.ipynb
    python -m course figures OUT        all figures, as SVG and PNG

For teachers:

    python -m course grade DIR 2        a table of points for a folder of submissions
    python -m course handout OUT        the repository with holes, without the answers
    python -m course exam OUT           exam questions, and their answers apart
    python -m course record 2           measure the experiment with several seeds
    python -m course weave              write code and numbers into the lessons' pages
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from course import book, check, cut, experiment, faults, grade, handout
from course.lessons import ROOT, Lesson, all_lessons, find_lesson, read, write
from tinyfm.common import console

CHECKED = "checked.json"  # what the last check of a lesson found


def work_folder(options: argparse.Namespace, lesson: Lesson) -> Path:
    """Where a student's modules of a lesson lie."""
    if handout.is_handout():
        return ROOT
    return Path(options.work) / f"{lesson.number:02}"


def list_lessons(options: argparse.Namespace) -> str:
    lines = []
    for lesson in all_lessons():
        lines.append(f"{lesson.number:2}  {lesson.title}{progress(options, lesson)}")
        needs = ", ".join(map(str, lesson.needs)) or "nothing"
        page = (lesson.folder / "lesson.md").relative_to(ROOT).as_posix()
        points = sum(exercise.points for exercise in lesson.exercises)
        count = f"exercises: {len(lesson.exercises)}, points: {points}; " if points else ""
        lines.append(f"    {count}needs {needs}; read {page}")
    lines.append("python -m course start N begins lesson N; python -m course --help has the rest")
    return "\n".join(lines)


def progress(options: argparse.Namespace, lesson: Lesson) -> str:
    path = Path(options.work) / f"{lesson.number:02}" / CHECKED
    if not path.is_file():
        return ""
    states = json.loads(read(path)).values()
    return f"   {sum(state == 'passed' for state in states)} of {len(states)} passed"


def start(options: argparse.Namespace) -> str:
    lesson = find_lesson(options.lesson)
    page = (lesson.folder / "lesson.md").relative_to(ROOT)
    if handout.is_handout():
        return f"read {page}, and write in {', '.join(lesson.modules)}"
    folder = work_folder(options, lesson)
    lines = []
    for module in lesson.modules:
        path = folder / module
        if path.exists():
            lines.append(f"{path} is kept as it is; remove it to begin again")
            continue
        write(path, lesson.cut_holes(read(ROOT / module), module))
        lines.append(f"{path} has holes")
    for exercise in lesson.exercises:
        lines.append(f"  {lesson.label(exercise):5} {exercise.name:32} {exercise.module}")
    lines.append(f"read {page}; then python -m course check {lesson.number}")
    return "\n".join(lines)


def check_exercises(options: argparse.Namespace) -> int:
    lesson = find_lesson(options.lesson)
    folder = work_folder(options, lesson)
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: python -m course start {lesson.number}")
    states = {}
    earned = 0
    for exercise, result in check.check_lesson(lesson, folder):
        label = lesson.label(exercise)
        states[label] = result.state
        points = exercise.points if result.state == "passed" else 0
        earned += points
        print(f"{label:5} {exercise.name:32} {result.state:8} {points} of {exercise.points}")
        for reason in result.reasons:
            print(f"      {reason}")
    total = sum(exercise.points for exercise in lesson.exercises)
    print(f"{earned} of {total} points")
    for module in lesson.modules:
        if (folder / module).is_file():
            print(f"checked {folder / module}, SHA-256 {check.digest(folder / module)}...")
    write(Path(options.work) / f"{lesson.number:02}" / CHECKED, json.dumps(states) + "\n")
    return 0 if earned == total else 1


def run(options: argparse.Namespace) -> str:
    lesson = find_lesson(options.lesson)
    folder = Path(options.work) / f"{lesson.number:02}"
    bodies = None if handout.is_handout() else folder
    return "\n".join(experiment.run(lesson, bodies, folder, options.student, options.seed))


def break_code(options: argparse.Namespace) -> str | int:
    lesson = find_lesson(options.lesson)
    folder = Path(options.work) / f"break-{lesson.number:02}"
    if options.guess:
        right, text = faults.answer_guess(lesson, folder, options.guess)
        print(text)
        return 0 if right else 1
    symptom = faults.plant(lesson, folder, options.number)
    return (
        f"{folder} is a copy of the code with one fault in it. The symptom:\n\n  {symptom}\n\n"
        f"Find it there by experiments, not by a diff. Then name the file and the function:\n"
        f"python -m course break {lesson.number} --guess FILE:FUNCTION"
    )


def update(options: argparse.Namespace) -> str:
    lesson = find_lesson(options.lesson)
    folder = work_folder(options, lesson)
    if handout.is_handout():
        raise ValueError("in a handout your code is in tinyfm/ itself; merge the new version")
    lines = []
    for module in lesson.modules:
        path = folder / module
        old = read(path)
        new = lesson.cut_holes(read(ROOT / module), module)
        kept = 0
        for exercise in lesson.exercises:
            if exercise.module == module and not cut.is_open(old, exercise.name):
                new = cut.put_body(new, exercise.name, cut.take_body(old, exercise.name))
                kept += 1
        write(path.with_suffix(".before.py"), old)
        write(path, new)
        lines.append(f"{path}: {kept} of your bodies kept; the old file is {path.stem}.before.py")
    return "\n".join(lines)


def grade_folder(options: argparse.Namespace) -> str:
    lesson = find_lesson(options.lesson)
    begun = time.monotonic()
    rows = list(grade.grade(Path(options.folder), lesson, options.again, options.experiment))
    totals = grade.write_csv(rows, lesson, Path(options.out))
    for student, (points, of) in totals.items():
        print(f"{student:32} {points:g} of {of:g}")
    return f"wrote {options.out} in {time.monotonic() - begun:.0f} s"


def draw_figures(options: argparse.Namespace) -> str:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for lesson in all_lessons():
        expected = experiment.read_expected(lesson)
        if expected:
            path = out / lesson.folder.name
            experiment.draw(experiment.load(lesson), expected["results"], path)
            drawn.append(f"{path}.svg and .png")
    return "wrote " + ", ".join(drawn)


def record(options: argparse.Namespace) -> str:
    lesson = find_lesson(options.lesson)
    experiment.record(lesson, options.seeds)
    return f"wrote {experiment.expected_path(lesson)}; now python -m course weave"


def weave(options: argparse.Namespace) -> str:
    changed = book.weave_all()
    return "\n".join(f"wrote {path}" for path in changed) or "all pages are up to date"


def write_notebook(options: argparse.Namespace) -> str:
    lesson = find_lesson(options.lesson)
    path = Path(options.work) / f"{lesson.number:02}" / "lesson.ipynb"
    book.notebook(lesson, path)
    return f"wrote {path}"


def build_site(options: argparse.Namespace) -> str:
    book.site(Path(options.out))
    return f"wrote {Path(options.out) / 'index.html'}"


def write_exam(options: argparse.Namespace) -> str:
    out = Path(options.out)
    questions = []
    answers = []
    for lesson in all_lessons():
        heading = f"## {lesson.number}. {lesson.title}\n"
        questions.append(heading)
        answers.append(heading)
        for number, (question, answer) in enumerate(lesson.teacher.QUESTIONS, start=1):
            questions.append(f"{number}. {question}\n")
            answers.append(f"{number}. {question}\n\n    {answer}\n")
    write(out / "questions.md", "# Questions\n\n" + "\n".join(questions))
    write(out / "answers.md", "# Questions and answers\n\n" + "\n".join(answers))
    return f"wrote {out / 'questions.md'} and {out / 'answers.md'}"


def make_handout(options: argparse.Namespace) -> str:
    count = handout.write_handout(Path(options.out))
    return f"wrote {options.out}: {count} holes, no answers"


def read_arguments(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m course", description=__doc__, formatter_class=raw)
    parser.add_argument("--work", default="work", metavar="FOLDER", help="your folder (work)")
    parser.set_defaults(answer=list_lessons)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, answer, about: str, lesson: bool = False) -> argparse.ArgumentParser:
        child = commands.add_parser(name, help=about, description=about)
        child.set_defaults(answer=answer)
        if lesson:
            child.add_argument("lesson", type=int, metavar="N", help="number of the lesson")
        return child

    command("start", start, "write the modules with holes", lesson=True)
    command("check", check_exercises, "check your code", lesson=True)
    child = command("run", run, "run the experiment with your code", lesson=True)
    child.add_argument("--student", type=int, help="your number: it selects the variant")
    child.add_argument("--seed", type=int, default=0, help="seed of the experiment (0)")
    child = command("break", break_code, "plant a bug to find", lesson=True)
    child.add_argument("--number", type=int, help="which of the lesson's bugs; default: by chance")
    child.add_argument("--guess", metavar="FILE:FUNCTION", help="where you think it is")
    command("update", update, "cut the holes again, and keep your code", lesson=True)
    command("notebook", write_notebook, "write the lesson as a notebook", lesson=True)
    child = command("grade", grade_folder, "grade a folder of submissions")
    child.add_argument("folder", metavar="DIR", help="holds a folder a student")
    child.add_argument("lesson", type=int, metavar="N", help="number of the lesson")
    child.add_argument("--out", default="grades.csv", help="the table (grades.csv)")
    about = "points for the experiment (0: do not grade it)"
    child.add_argument("--experiment", type=float, default=0, metavar="POINTS", help=about)
    about = "run each student's experiment again to compare"
    child.add_argument("--again", action="store_true", help=about)
    child = command("record", record, "measure the experiment with several seeds", lesson=True)
    child.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command("weave", weave, "write code and numbers into the pages")
    for name, answer, about in (
        ("site", build_site, "build the site"),
        ("figures", draw_figures, "draw all figures"),
        ("handout", make_handout, "write the repository with holes"),
        ("exam", write_exam, "write exam questions, and their answers apart"),
    ):
        command(name, answer, about).add_argument("out", metavar="OUT", help="the folder to write")
    return parser.parse_args(argv)


def main() -> str | int | None:
    options = read_arguments(sys.argv[1:])
    try:
        answer = options.answer(options)
    except subprocess.CalledProcessError as error:
        return f"the process ended with status {error.returncode}; its messages stand above"
    except (ValueError, OSError, SyntaxError) as error:
        return f"course: {error}"
    if isinstance(answer, str):
        print(answer)
        return None
    return answer


if __name__ == "__main__":
    sys.exit(console.run_command(main))
