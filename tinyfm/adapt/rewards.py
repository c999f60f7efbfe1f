"""Rewards of answers (preference.py): one that is checked, and one that a reward model gives.

A reward that is checked cannot be deceived about what it checks. A model may still find an answer
that nobody meant: the shortest function that compiles is `pass`. So look at the answers too, and at
how varied they are.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

import torch

from tinyfm.adapt.preference import Answer, RewardModel, pad_rows
from tinyfm.tokenizer import Tokenizer

# What the parser and the compiler raise for a text that is no Python.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


def parse_function(source: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """One function that compiles, with more of a body than a docstring; None for anything else.

    It is compiled and never executed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            tree = ast.parse(source)
            compile(tree, "<answer>", "exec")
    except NOT_PYTHON:
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    function = tree.body[0]
    if len(function.body) == (ast.get_docstring(function) is not None):
        return None
    return function


def is_function(source: str) -> bool:
    """Whether `parse_function` finds one."""
    return parse_function(source) is not None


class Parses:
    """1 if what follows a signature and docstring makes a function that Python's compiler accepts.

    The answer ends before the first line that is not indented. If its tokens are used up before,
    its last line, which may be unfinished, does not count.
    """

    name = "parses"
    end = re.compile(rb"\n(?=\S)")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        rewards = []
        for answer in answers:
            text = answer.text
            if not answer.ended:
                text = text[: text.rfind("\n") + 1]
            rewards.append(float(is_function(answer.before + text)))
        return rewards


class Judge:
    """The reward of a reward model, which reads an answer with its own tokenizer.

    whole: the prompt is the beginning of what is judged, as of a sentence. Texts that are too long
    for the model lose their end.
    """

    name = "positive"
    end = re.compile(rb"\n")

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, whole: bool = True):
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.whole = whole

    def start(self, before: str) -> list[int]:
        """The ids in front of what is judged. Raises ValueError if they leave no room for it."""
        ids = [self.tokenizer.eot, *self.tokenizer.encode("" if self.whole else before)]
        most = self.model.config.context_length
        if len(ids) >= most:
            raise ValueError(
                f"the prompt {before[:40]!r} has {len(ids)} tokens for the judge, and its context "
                f"{most}, so it would not read the answer: use shorter prompts, or a judge with a "
                "longer context"
            )
        return ids

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        rows = []
        starts = []
        most = self.model.config.context_length
        for answer in answers:
            start = self.start(answer.before)
            text = answer.before + answer.text if self.whole else answer.text
            row = [*start, *self.tokenizer.encode(text), self.tokenizer.eot]
            rows.append(row[:most])
            starts.append(len(start))
        return self.model(*pad_rows(rows, starts).values()).tolist()
