"""The course's frame, on a lesson of two functions that a test makes."""

import csv
import json
import re
import subprocess
import sys

import pytest

from course import __main__ as command
from course import book, check, cut, faults, grade, handout, lessons
from course.compare import agree
from course.lessons import Lesson, read, write

SOURCE = '''
class Counter:
    def twice(self, x):
        """Two x."""
        # a comment
        y = x + x

        return y


def shout(text: str) -> str:
    """Text in capitals."""
    return text.upper()


def bare(x): return x
'''

EXERCISES = """
from course.lessons import Exercise

TITLE = "Duration in words"
NEEDS = ()
EXERCISES = (
    Exercise("size", "tinyfm/common/units.py", 2, "Divide by 2 to the power 20 or 30."),
    Exercise("duration", "tinyfm/common/units.py", 1, "Seconds, minutes, hours or days."),
)
"""
CHECKS = """
from course.lessons import checks
from tinyfm.common.units import duration, size


@checks("size")
def test_a_gibibyte_is_1024_mebibytes():
    assert size(2**30) == "1.00 GiB", f"expected 1.00 GiB, got {size(2**30)}"


@checks("duration")
def test_a_minute_has_sixty_seconds():
    assert duration(0.5) == duration(0.5), "the same twice"
    assert isinstance(duration(90.0), str), f"expected words, got {duration(90.0)!r}"
"""
TEACHER = """
from course.lessons import Fault

FAULTS = (Fault("tinyfm/common/units.py", "size", "n / 2**30", "n / 2**29", "wrong sizes", "2^30"),)
QUESTIONS = (("How many bytes has a GiB?", "2^30."),)
"""
EXPERIMENT = """
UNITS = {"answer": "minutes"}
VARIANTS = ("first", "second")


def measure(seed, variant):
    from tinyfm.common.units import size

    return {"answer": 40.0 + seed, "curve": [1.0, 2.0], "text": len(size(2**30))}


def draw(figure, results):
    figure.add_subplot().plot(results[0]["curve"])
"""


# ---- cutting ------------------------------------------------------------------------------------


def test_a_body_is_cut_out_and_put_back():
    for name in ("Counter.twice", "shout"):
        body = cut.take_body(SOURCE, name)
        hole = cut.put_body(SOURCE, name, 'raise NotImplementedError("later")')
        assert cut.is_open(hole, name)
        assert not cut.is_open(SOURCE, name)
        assert cut.put_body(hole, name, body) == SOURCE
    assert cut.take_body(SOURCE, "Counter.twice").startswith("# a comment\ny = x + x\n")


def test_a_body_on_the_line_of_its_signature():
    assert cut.take_body(SOURCE, "bare") == "return x\n"
    assert cut.take_body('def f(x): """Doc."""; return x', "f") == "return x\n"
    with pytest.raises(ValueError, match="bare has no docstring"):
        cut.put_body(SOURCE, "bare", "return 1")


def test_only_the_docstring_is_left():
    source = 'def f(x):\n    """Doc."""\n'
    assert cut.take_body(source, "f").strip() == ""
    assert cut.put_body(source, "f", "return 1\n") == source + "    return 1\n"


@pytest.mark.parametrize("name", ["missing", "Counter", "Counter.missing", "shout.inner"])
def test_a_function_that_is_not_there(name):
    with pytest.raises(ValueError, match=name.split(".")[0]):
        cut.find_function(SOURCE, name)


def test_an_edit_must_fit_once():
    assert "x * x" in cut.edit(SOURCE, "Counter.twice", "x + x", "x * x")
    with pytest.raises(ValueError, match="0 times in shout"):
        cut.edit(SOURCE, "shout", "x + x", "x * x")


# ---- a small lesson -----------------------------------------------------------------------------


@pytest.fixture
def lesson(monkeypatch, tmp_path) -> Lesson:
    """A lesson 98 in a copy of the repository, which stands for the real one."""
    root = tmp_path / "repository"
    root.mkdir()
    check.copy_tree(root)
    for folder in (root / "course").glob("[0-9]*"):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    folder = root / "course" / "98-words"
    files = {
        "exercises.py": EXERCISES,
        "checks.py": CHECKS,
        "teacher.py": TEACHER,
        "experiment.py": EXPERIMENT.replace(', "text": len(size(2**30))', ""),
        "lesson.md": "# 98. Words\n",
    }
    for name, text in files.items():
        write(folder / name, text)
    for module in (lessons, check, handout, grade, command, book):
        monkeypatch.setattr(module, "ROOT", root)
    for module in (lessons, handout, book):
        monkeypatch.setattr(module, "COURSE", root / "course")
    monkeypatch.setattr("course.experiment.ROOT", root)
    monkeypatch.chdir(tmp_path)
    return lessons.find_lesson(98)


def course(monkeypatch, *words) -> str | int | None:
    """python -m course WORDS."""
    monkeypatch.setattr(sys, "argv", ["course", *map(str, words)])
    return command.main()


def fill(path, name: str, body: str) -> None:
    write(path, cut.put_body(read(path), name, body))


def states(lesson, folder, seconds=60) -> dict[str, check.Result]:
    return {e.name: result for e, result in check.check_lesson(lesson, folder)}


def test_a_student_works_through_a_lesson(lesson, monkeypatch, capsys, tmp_path):
    real = read(lessons.ROOT / "tinyfm/common/units.py")
    path = tmp_path / "work/98/tinyfm/common/units.py"
    assert "start 98" in course(monkeypatch, "check", 98)
    course(monkeypatch, "start", 98)
    text = read(path)
    assert "# Exercise 98.1 (2 points). Divide by 2 to the power 20 or 30." in text
    assert course(monkeypatch, "check", 98) == 1
    fill(path, "size", cut.take_body(real, "size"))
    fill(path, "duration", "return 7")
    capsys.readouterr()
    assert course(monkeypatch, "check", 98) == 1
    out = capsys.readouterr().out
    assert "size                             passed   2 of 2" in out
    assert "a minute has sixty seconds: expected words, got 7" in out
    assert check.digest(path) in out, "the file that was checked is named by its hash"
    course(monkeypatch, "start", 98)
    assert "return 7" in read(path), "start keeps what is there"
    course(monkeypatch, "update", 98)
    assert "return 7" in read(path), "update keeps the student's bodies"
    fill(path, "duration", cut.take_body(real, "duration"))
    assert course(monkeypatch, "check", 98) == 0
    course(monkeypatch)
    assert "2 of 2 passed" in capsys.readouterr().out


HARM = {  # body -> part of the reason
    "import os; os._exit(0)": "the process ended",
    "raise SystemExit(0)": "SystemExit",
    "import subprocess; subprocess.run(['ls'])": "may not start a program",
    "import os; os.system('ls')": "may not start a program",
    "open('/tinyfm-escape', 'w')": "may not write to /tinyfm-escape",
    "import os; os.remove('/etc/hosts')": "may not change /etc/hosts",
    "import socket; socket.create_connection(('10.0.0.1', 80), 1)": "may not connect",
    "return bytearray(1 << 40)": "MemoryError",
    "return input()": "OSError",
    "import pytest; pytest.skip('no')": "no",
}


def test_a_body_that_does_harm_is_refused(lesson):
    right = read(lessons.ROOT / "tinyfm/common/units.py")
    sources = [cut.put_body(right, "size", body) for body in HARM]
    jobs = [check.job_for(lesson, lesson.exercises[0], source) for source in [*sources, right]]
    *harmed, last = check.run_jobs(jobs)
    for result, reason in zip(harmed, HARM.values(), strict=True):
        assert result.state == "differs"
        assert reason in result.reasons[0]
    assert last.state == "passed", "the next one is not harmed"


def test_a_body_that_does_not_end(lesson):
    right = read(lessons.ROOT / "tinyfm/common/units.py")
    endless = cut.put_body(right, "size", "while True: pass")
    job = check.job_for(lesson, lesson.exercises[0], endless)
    (result,) = check.run_jobs([job], seconds=2)
    assert result.reasons == ("it did not end within 2 seconds",)


def test_files_that_are_no_python(lesson, tmp_path):
    path = tmp_path / "tinyfm/common/units.py"
    write(path, 'def size(n):\n    """Doc."""\n    return (\n')
    found = states(lesson, tmp_path)
    assert "line 3" in found["size"].reasons[0]
    write(path, "x = 1\n")
    assert "no function size" in states(lesson, tmp_path)["size"].reasons[0]
    path.unlink()
    assert states(lesson, tmp_path)["size"].state == "open"


def test_a_fault_is_planted_and_found(lesson, monkeypatch, capsys, tmp_path):
    assert "no fault is planted" in course(monkeypatch, "break", 98, "--guess", "a:b")
    course(monkeypatch, "break", 98)
    out = capsys.readouterr().out
    assert "wrong sizes" in out
    folder = tmp_path / "work/break-98"
    assert "n / 2**29" in read(folder / "tinyfm/common/units.py")
    assert not list(folder.glob("course/*/teacher.py"))
    assert course(monkeypatch, "break", 98, "--guess", "tinyfm/common/units.py:duration") == 1
    assert course(monkeypatch, "break", 98, "--guess", "tinyfm/common/units.py:size") == 0
    assert "yes. 2^30" in capsys.readouterr().out
    assert "faults 1 to 1, not 2" in course(monkeypatch, "break", 98, "--number", 2)
    (folder / faults.SECRET).unlink()
    assert "move it away" in course(monkeypatch, "break", 98)


def test_an_experiment_with_the_students_code(lesson, monkeypatch, capsys, tmp_path):
    course(monkeypatch, "start", 98)
    course(monkeypatch, "record", 98)
    assert course(monkeypatch, "run", 98) is None
    out = capsys.readouterr().out
    assert "98.1, 98.2 are open" in out
    assert "expected 41" in out
    assert "as expected" in out
    assert (tmp_path / "work/98/figure.svg").exists()
    course(monkeypatch, "run", 98, "--student", 7, "--seed", 90)
    answer = json.loads(read(tmp_path / "work/98/answer.json"))
    assert answer["variant"] == "second"
    assert answer["measured"]["answer"] == 130
    assert "grading runs it again" in capsys.readouterr().out
    course(monkeypatch, "figures", tmp_path / "figures")
    assert (tmp_path / "figures/98-words.png").exists()


# ---- teachers -----------------------------------------------------------------------------------


def test_grades(lesson, monkeypatch, capsys, tmp_path):
    real = read(lessons.ROOT / "tinyfm/common/units.py")
    module = "tinyfm/common/units.py"
    own = cut.put_body(real, "size", 'return "1.00 GiB"')
    write(tmp_path / "class/=ada" / module, real)
    write(tmp_path / "class/bob/work/98" / module, own)
    write(tmp_path / "class/carl/98" / module, own.replace("1.00", " 1.00"))
    write(tmp_path / "class/dora" / module, own.replace("return", "return  "))
    write(tmp_path / "class/eve" / module, "def size(n):\n  return (")
    (tmp_path / "class/fay").mkdir()
    course(monkeypatch, "record", 98)
    right = {"variant": "first", "seed": 1, "measured": {"answer": 41.0, "curve": [1.0, 2.0]}}
    wrong = {"variant": "first", "seed": 1, "measured": {"answer": 60.0}}
    write(tmp_path / "class/bob/work/98/answer.json", json.dumps(right))
    write(tmp_path / "class/dora/answer.json", json.dumps(wrong))
    course(monkeypatch, "grade", tmp_path / "class", 98, "--experiment", 4)
    with (tmp_path / "grades.csv").open(encoding="utf-8-sig") as file:
        rows = {(row["student"], row["name"]): row for row in csv.DictReader(file)}
    points = {key: float(row["points"]) for key, row in rows.items()}
    assert points["'=ada", "size"] == 2, "a name is no formula"
    assert rows["'=ada", "size"]["reason"] == "the same code as the repository's"
    assert points["bob", "size"] == 2
    assert rows["bob", "size"]["reason"] == "the same code as dora"
    assert points["carl", "size"] == 0
    assert "expected 1.00 GiB" in rows["carl", "size"]["reason"]
    assert "line 2" in rows["eve", "size"]["reason"]
    assert points["fay", "size"] == 0
    assert points["bob", "experiment"] == 4
    assert points["dora", "experiment"] == 0
    assert "answer is 60" in rows["dora", "experiment"]["reason"]
    assert "answer.json" in rows["carl", "experiment"]["reason"]
    assert "bob" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert "holds no folders" in course(monkeypatch, "grade", tmp_path / "empty", 98)


def test_a_handout_has_holes_and_no_answers(lesson, monkeypatch, capsys, tmp_path):
    root = lessons.ROOT
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    out = tmp_path / "handout"
    course(monkeypatch, "handout", out)
    assert "2 holes" in capsys.readouterr().out
    assert not list(out.rglob("teacher.py"))
    assert cut.is_open(read(out / "tinyfm/common/units.py"), "size")
    assert "exists" in course(monkeypatch, "handout", out)
    real = read(root / "tinyfm/common/units.py")
    fill(out / "tinyfm/common/units.py", "size", cut.take_body(real, "size"))
    words = [sys.executable, "-m", "course", "check", "98"]
    done = subprocess.run(words, cwd=out, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "size                             passed   2 of 2" in done.stdout
    assert "duration                         open     0 of 1" in done.stdout
    broken = subprocess.run([*words[:3], "break", "98"], cwd=out, capture_output=True, text=True)
    assert "whole repository" in broken.stderr


def test_an_exam_has_its_answers_apart(lesson, monkeypatch, tmp_path):
    course(monkeypatch, "exam", tmp_path / "exam")
    assert "How many bytes" in read(tmp_path / "exam/questions.md")
    assert "2^30." not in read(tmp_path / "exam/questions.md")
    assert "2^30." in read(tmp_path / "exam/answers.md")


@pytest.mark.parametrize(
    "got, message",
    [
        (None, "the mean: got None; .*return"),
        ([1.0, 2.0], r"the mean: expected the shape \(\), got \(2,\)"),
        (2.5, "the mean: expected 2, got 2.5"),
    ],
)
def test_a_comparison_says_what_came(got, message):
    with pytest.raises(AssertionError, match=message):
        agree(got, 2.0, "the mean")


@pytest.mark.parametrize("words", [["start", "77"], ["check", "-1"], ["break", "77"]])
def test_a_lesson_that_is_not_there(lesson, monkeypatch, words):
    assert "there are 98" in course(monkeypatch, *words)


# ---- pages --------------------------------------------------------------------------------------


def test_pages_are_woven_from_their_sources(lesson, monkeypatch, tmp_path):
    page = """# 98. Words

The answer is 7<!-- =answer .1f --> at most 0<!-- =answer.max .0f -->.

<!-- code tinyfm/common/units.py size -->
old
<!-- end -->

```python
print(6 * 7)
```

```text
42
```

<!-- expected -->
<!-- end -->
"""
    write(lesson.folder / "lesson.md", page)
    course(monkeypatch, "record", 98)
    course(monkeypatch, "weave")
    text = read(lesson.folder / "lesson.md")
    assert "The answer is 41.0<!-- =answer .1f --> at most 42<!-- =answer.max .0f -->" in text
    assert "def size(" in text
    assert "| answer | 41 | 40 | 42 | minutes |" in text
    assert book.weave(lesson) == text
    assert book.examples(lesson) == [("print(6 * 7)\n", "42\n")]
    course(monkeypatch, "notebook", 98)
    cells = json.loads(read(tmp_path / "work/98/lesson.ipynb"))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["code", "markdown", "code", "markdown"]
    write(lesson.folder / "lesson.md", page.replace("units.py size", "units.py missing"))
    assert "no missing" in course(monkeypatch, "weave")


def test_the_site_needs_no_network(lesson, monkeypatch, tmp_path):
    """Its pages show formulas without a script, and load nothing from elsewhere."""
    write(lesson.folder / "lesson.md", "# 98. Words\n\nWith $x_1$:\n\n$$\\frac{1}{n}$$\n")
    with (lesson.folder / "lesson.md").open("a", encoding="utf-8") as file:
        file.write("\n[units](../../tinyfm/common/units.py)\n")
    write(lesson.folder / "figure.svg", "<svg/>")
    for name in ("README.md", "glossary.md"):
        write(lessons.COURSE / name, f"# {name}\n")
    course(monkeypatch, "site", tmp_path / "site")
    page = read(tmp_path / "site/98-words/lesson.html")
    assert page.count("<math") == 2
    assert "<mfrac>" in page
    assert (tmp_path / "site/98-words/figure.svg").exists()
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", page)
    assert loaded == []
    assert 'href="../source/tinyfm/common/units.py.txt"' in page
    assert "def size(" in read(tmp_path / "site/source/tinyfm/common/units.py.txt")
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine/letter.txt", "Dear")
    assert "another folder" in course(monkeypatch, "site", tmp_path / "mine")


def test_a_notebook_runs(lesson, monkeypatch, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    page = (
        "# 98. Words\n\n```python\nfrom tinyfm.common.units import size\n\nprint(size(2e6))\n```\n"
    )
    write(lesson.folder / "lesson.md", page)
    course(monkeypatch, "notebook", 98)
    book = nbformat.read(tmp_path / "work/98/lesson.ipynb", as_version=4)
    NotebookClient(book, resources={"metadata": {"path": lessons.ROOT}}).execute()
    outputs = [o.text for cell in book.cells for o in cell.get("outputs", [])]
    assert outputs == ["2 MB\n"]
