"""A constitution: written principles say which of a model's own answers are better.

Constitutional AI (Bai et al. 2022) needs few human labels. A large model reads a principle, such as
"choose the answer that is less harmful", criticises its own answer in words, and rewrites it; the
rewritten answers are for fine-tuning (their section 3). Then it says which of two answers fits a
principle better, and these pairs are preferences (section 4).

A model of a few million parameters can do neither: it follows no instruction, and cannot criticise
in words. What remains is the idea: preferences come from rules that everybody can read. Here a
principle is a sentence with a judge, which is a check by a program, or a reward model
(preference.py):

    {"principle": "Python accepts the function.", "judge": "compiles"}
    {"principle": "No line is longer than 60 characters.", "judge": "line-length 60"}
    {"principle": "The sentence is positive.", "judge": "runs/reward"}

Instead of a critique and a revision, the model writes several drafts of each answer. All principles
judge each draft. Of the drafts of a prompt that are finished and not empty,

    chosen = one that breaks the fewest principles,     rejected = one that breaks the most

are a pair, if these numbers differ. A draft that breaks none is a revised answer. So this is best
of n (preference.py), and the reward is the number of principles that are kept.

The sentence is for people: only its judge is computed, and the two may disagree. So a principle can
have examples by hand, of texts that keep it and of texts that break it:

    {..., "keeps": ["def f(x):\\n    return x\\n"], "breaks": ["def f(x):\\n    return y\\n"]}

The command (recipes/constitution.py) says how many of them the judge gets right, and of a reward
model, how many held-out pairs of people.

Left out: critiques in words, weights of principles, principles that compare two answers.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tinyfm.adapt.preference import Answer
from tinyfm.adapt.rewards import NOT_PYTHON, is_function, parse_function
from tinyfm.common import schema

MODULE_NAMES = {*dir(builtins), "__file__", "__class__"}  # super() reads the last one

# ---- checks --------------------------------------------------------------------------------------
# Each takes a text and says whether it keeps the principle. Nothing is executed.


def has_docstring(source: str) -> bool:
    """Whether this is one function that compiles, with a docstring."""
    function = parse_function(source)
    return function is not None and ast.get_docstring(function) is not None


def names_are_defined(source: str) -> bool:
    """Whether each name that the source reads is a builtin, or is bound somewhere in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            module = symtable.symtable(source, "<answer>", "exec")
    except NOT_PYTHON:
        return False
    bound = set(MODULE_NAMES)
    read = set()
    tables = [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if not symbol.is_global():
                continue
            if symbol.is_assigned() or symbol.is_imported():
                bound.add(symbol.get_name())
            if symbol.is_referenced():
                read.add(symbol.get_name())
    return read <= bound


def lines_within(most: int, text: str) -> bool:
    return all(len(line) <= most for line in text.splitlines())


def words_within(most: int, text: str) -> bool:
    return len(text.split()) <= most


def contains(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.search(text) is not None


def lacks(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.search(text) is None


OF_PYTHON = {"compiles": is_function, "docstring": has_docstring, "defined": names_are_defined}
WITH_NUMBER = {"line-length": lines_within, "words": words_within}
WITH_PATTERN = {"contains": contains, "lacks": lacks}
CHECKS = "compiles, docstring, defined, line-length N, words N, contains REGEX, lacks REGEX"


def find_check(judge: str) -> Callable[[str], bool] | None:
    """The check that a judge names; None if it names none, and may be a run.

    Raises ValueError for a check without the number or the regular expression that it needs.
    """
    name, _, argument = judge.partition(" ")
    if name in OF_PYTHON:
        if argument:
            raise ValueError(f"{name} takes no {argument!r}: leave it out")
        return OF_PYTHON[name]
    if name in WITH_NUMBER:
        if not argument.isdecimal():
            raise ValueError(f"{judge!r} has no number: write it behind, as in '{name} 60'")
        return partial(WITH_NUMBER[name], int(argument))
    if name in WITH_PATTERN:
        if not argument:
            raise ValueError(f"{judge!r} has no pattern: write it behind, as in '{name} [Pp]lease'")
        try:
            return partial(WITH_PATTERN[name], re.compile(argument))
        except re.error as error:
            raise ValueError(f"{argument!r} is no regular expression: {error}") from error
    return None


# ---- principles ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Principle:
    """A line of a file of principles."""

    principle: str  # what an answer must be, in a sentence
    judge: str  # one of CHECKS, or a run of --task reward, whose reward must be above 0
    keeps: tuple[str, ...] = ()  # texts that keep it
    breaks: tuple[str, ...] = ()  # texts that break it

    def __post_init__(self):
        if not self.principle.strip():
            raise ValueError("the principle is empty: say in a sentence what an answer must be")
        if find_check(self.judge) is None and not Path(self.judge).exists():
            raise ValueError(
                f"there is no judge {self.judge!r}: use {CHECKS}, or the folder of a run of "
                "--task reward"
            )


def read_principles(path: str) -> list[Principle]:
    """The principles of a file, one in each line. Raises ValueError with the line."""
    text = Path(path).read_bytes()
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = schema.parse_json(line)
        except ValueError as error:
            form = '{"principle": "a sentence", "judge": "compiles"}'
            raise ValueError(f"{where} is no JSON ({error}): write {form}") from error
        found.append(schema.check(value, Principle, where))
    if not found:
        raise ValueError(f"{path} has no principle: write one in each line")
    return found


# ---- pairs ---------------------------------------------------------------------------------------


def best_and_worst(
    answers: Sequence[Answer], scores: Sequence[float]
) -> tuple[Answer, Answer] | None:
    """The first answers with the highest and with the lowest score.

    None if these scores are equal, and if one of the two says nothing or both say the same.
    """
    best = answers[max(range(len(answers)), key=lambda i: scores[i])]
    worst = answers[min(range(len(answers)), key=lambda i: scores[i])]
    if max(scores) == min(scores) or best.text == worst.text:
        return None
    if not best.text.strip() or not worst.text.strip():
        return None
    return best, worst
