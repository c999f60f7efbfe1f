"""The lessons' pages: numbers and code that are woven in, a site, and notebooks.

A page is Markdown that reads well as it stands. Its quotes and numbers are not typed: a marker in
a comment says where each comes from, and `python -m course weave` writes them from there. A
test fails where a page and its sources differ.

    <!-- code tinyfm/gpt.py rotate -->   a function or class, up to the next <!-- end -->
    <!-- expected -->                    the table of what the experiment gave, up to <!-- end -->
    1.72<!-- =test_bpb .2f -->           the mean of a measure over the seeds, in this format;
    1.71<!-- =test_bpb.min .2f -->       the smallest, .max the largest
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from course import experiment
from course.lessons import COURSE, ROOT, Lesson, all_lessons, read, write

BLOCK = re.compile(r"(<!-- (code|expected)((?: [^\n]*)?) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"([-\d.,]+)(<!-- =(\w+)(?:\.(min|max))? (\S+) -->)")
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
SOURCE = re.compile(r"\]\(\.\./\.\./([\w/.]+\.py)\)")  # a link from a lesson's page to a module
EXTRAS = "pip install -r course/requirements.txt"


# ---- weaving ------------------------------------------------------------------------------------


def quote(path: str, name: str) -> str:
    """The source of a function or class, as a block of code.

    Raises ValueError if the module has none of that name.
    """
    source = read(ROOT / path)
    node = ast.parse(source)
    for part in name.split("."):
        inside = [n for n in node.body if getattr(n, "name", "") == part]
        if not inside:
            raise ValueError(f"{path} has no {name}")
        node = inside[-1]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = source.splitlines()[first - 1 : node.end_lineno]
    shift = node.col_offset
    return "```python\n" + "\n".join(line[shift:] for line in lines) + "\n```\n"


def expected_table(lesson: Lesson) -> str:
    """Mean, smallest and largest value of each measure, as recorded."""
    expected = experiment.read_expected(lesson)
    if expected is None:
        return "Not recorded yet.\n"
    units = experiment.load(lesson).UNITS
    about = expected["recorded"]
    lines = ["| measure | mean | smallest | largest | unit |", "|---|---|---|---|---|"]
    for name in experiment.scalar_names(expected["results"][0]):
        values = experiment.values_of(expected["results"], name)
        cells = [statistics.fmean(values), min(values), max(values)]
        numbers = " | ".join(experiment.short(value) for value in cells)
        lines.append(f"| {name} | {numbers} | {units[name]} |")
    seeds = ", ".join(map(str, about["seeds"]))
    lines.append(
        f"\nRecorded {about['date']} at commit {about['commit']} ({about['machine']}, torch "
        f"{about['torch']}): seeds {seeds}, {about['seconds a seed']} seconds each."
    )
    return "\n".join(lines) + "\n"


def weave(lesson: Lesson) -> str:
    """The text of the lesson's page with its quotes and numbers written from their sources."""
    text = read(lesson.folder / "lesson.md")
    expected = experiment.read_expected(lesson)

    def block(match: re.Match) -> str:
        kind, words = match[2], match[3].split()
        inside = expected_table(lesson) if kind == "expected" else quote(*words)
        return match[1] + inside + match[4]

    def number(match: re.Match) -> str:
        _, marker, name, end, form = match.groups()
        if expected is None:
            return match[0]
        values = experiment.values_of(expected["results"], name)
        pick = {"min": min, "max": max}.get(end, statistics.fmean)
        return format(pick(values), form) + marker

    return NUMBER.sub(number, BLOCK.sub(block, text))


def weave_all() -> list[Path]:
    """Write each page whose text changed; returns them."""
    changed = []
    for lesson in all_lessons():
        path = lesson.folder / "lesson.md"
        text = weave(lesson)
        if text != read(path):
            write(path, text)
            changed.append(path)
    return changed


# ---- code blocks and notebooks ------------------------------------------------------------------


def without_quotes(text: str) -> str:
    return BLOCK.sub("", text)


def examples(lesson: Lesson) -> list[tuple[str, str | None]]:
    """The page's blocks of Python that are to be run: (code, what it prints or None)."""
    text = without_quotes(read(lesson.folder / "lesson.md"))
    return [(match[1], match[2]) for match in EXAMPLE.finditer(text)]


def require(package: str) -> None:
    """Raises ValueError with the command to type if a package of the course is missing."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"this needs {package}: {EXTRAS}")


def notebook(lesson: Lesson, path: Path) -> None:
    """Write the lesson as a notebook: its blocks of Python are the cells to run."""
    require("nbformat")
    import nbformat

    text = read(lesson.folder / "lesson.md")
    quotes = [match.span() for match in BLOCK.finditer(text)]
    cells = []
    last = 0
    root = "import os, sys\n\nwhile not os.path.isdir('tinyfm'):\n    os.chdir('..')\n"
    cells.append(nbformat.v4.new_code_cell(root + "sys.path.insert(0, os.getcwd())"))
    for match in EXAMPLE.finditer(text):
        if any(first <= match.start() < end for first, end in quotes):
            continue
        cells.append(nbformat.v4.new_markdown_cell(text[last : match.start()].strip()))
        cells.append(nbformat.v4.new_code_cell(match[1].rstrip()))
        last = match.end()
    cells.append(nbformat.v4.new_markdown_cell(text[last:].strip()))
    cells = [cell for cell in cells if cell.source]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    write(path, nbformat.writes(book) + "\n")


# ---- the site -----------------------------------------------------------------------------------

SETTINGS = """
site_name: tinyfm, the course
use_directory_urls: false
theme:
  name: material
  font: false
  features: [navigation.footer, navigation.top, content.code.copy, toc.follow]
  palette:
    - media: "(prefers-color-scheme: light)"
      scheme: default
      primary: indigo
    - media: "(prefers-color-scheme: dark)"
      scheme: slate
      primary: indigo
markdown_extensions:
  - tables
  - attr_list
  - admonition
  - pymdownx.superfences
  - pymdownx.highlight
  - pymdownx.arithmatex: {generic: true}
plugins: []
hooks: [mathematics.py]
"""
HOOK = '''"""Formulas become MathML, which browsers show without a script or a network."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\\\([(\\[])(.*?)\\\\[)\\]]</\\1>', re.DOTALL)


def on_page_content(text, **_):
    def show(match):
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]), display=display)

    return FORMULA.sub(show, text)
'''


def with_sources(text: str, docs: Path) -> str:
    """A page whose links to the repository's code lead to copies of it in docs/source."""

    def copy(match: re.Match) -> str:
        name = f"source/{match[1]}.txt"  # browsers show .txt, and download .py
        write(docs / name, read(ROOT / match[1]))
        return f"](../{name})"

    return SOURCE.sub(copy, text)


def site(out: Path) -> None:
    """Build the site into out. It needs no network, neither to build nor to read."""
    for package in ("mkdocs", "material", "latex2mathml"):
        require(package)
    if out.exists() and not (out / "index.html").exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files that are no site; name another folder")
    source = out.parent / f".{out.name}-source"
    shutil.rmtree(source, ignore_errors=True)
    try:
        docs = source / "docs"
        pages = [("index.md", COURSE / "README.md"), ("glossary.md", COURSE / "glossary.md")]
        for lesson in all_lessons():
            pages.append((f"{lesson.folder.name}/lesson.md", lesson.folder / "lesson.md"))
            for figure in lesson.folder.glob("*.svg"):
                (docs / lesson.folder.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(figure, docs / lesson.folder.name)
        for name, path in pages:
            write(docs / name, with_sources(read(path), docs))
        menu = ["nav:", "  - Start: index.md"]
        menu += [
            f'  - "{lesson.number}. {lesson.title}": {lesson.folder.name}/lesson.md'
            for lesson in all_lessons()
        ]
        menu.append("  - Glossary: glossary.md")
        write(source / "mkdocs.yml", SETTINGS + "\n".join(menu) + "\n")
        write(source / "mathematics.py", HOOK)
        words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file"]
        words += [str(source / "mkdocs.yml"), "--site-dir", str(out.resolve())]
        # Otherwise the theme prints an advertisement for its successor.
        environment = dict(os.environ, NO_MKDOCS_2_WARNING="1")
        subprocess.run(words, check=True, env=environment)
    finally:
        shutil.rmtree(source, ignore_errors=True)
