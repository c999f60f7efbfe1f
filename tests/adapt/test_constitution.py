"""Principles: what each check says of right and wrong texts, files of them, and pairs of drafts."""

import warnings

import pytest
from conftest import ROOT

from tinyfm.adapt.constitution import OF_PYTHON, best_and_worst, find_check, read_principles
from tinyfm.adapt.preference import Answer

IMPORTS = "def f(p):\n    import os.path as q\n    return q.join(p)\n"
NESTED = "def f(x):\n    def g(y):\n        return x + y + z\n    z = 1\n    return g\n"
OUTSIDE = "def f(x):\n    def g(y):\n        return x + y + z\n    return g\n"
WRITES_GLOBAL = "def f():\n    global n\n    n = 1\n\n\ndef g():\n    return n\n"


@pytest.mark.parametrize(
    ("judge", "text", "kept"),
    [
        ("compiles", "def f():\n    return 1\n", True),
        ("compiles", "def f():\n    return (\n", False),
        ("docstring", 'def f():\n    """One."""\n    return 1\n', True),
        ("docstring", "def f():\n    return 1\n", False),
        ("docstring", '"""No function."""\n', False),
        ("defined", "def f(x, *a, **k):\n    return len(x) + sum(a)\n", True),
        ("defined", IMPORTS, True),
        ("defined", NESTED, True),
        ("defined", OUTSIDE, False),
        ("defined", WRITES_GLOBAL, True),
        ("defined", "def f(x=y):\n    return x\n", False),
        ("defined", "def f(self):\n    return super().f() or __file__\n", True),
        ("defined", "def f(x):\n    return [i for i in x if j]\n", False),
        ("defined", "def f(:\n", False),
        ("line-length 5", "12345\n1234", True),
        ("line-length 5", "12345\n123456", False),
        ("words 2", "one  two\n", True),
        ("words 2", "one two three", False),
        ("contains [Pp]lease", "Yes, please.", True),
        ("contains ^b$", "abc", False),
        ("lacks b", "abc", False),
        ("lacks b", "ac", True),
    ],
)
def test_what_a_check_says(judge, text, kept):
    assert find_check(judge)(text) is kept


@pytest.mark.parametrize("judge", OF_PYTHON)
def test_a_check_of_python_warns_of_nothing(judge):
    """The text is the model's: a warning about an escape in it, \\d, is no news to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_check(judge)('def f():\n    """\\d"""\n    return 1\n')


def test_the_examples_of_the_shipped_principles_are_judged_right():
    principles = read_principles(str(ROOT / "data" / "principles.jsonl"))
    assert sum(len(one.keeps) + len(one.breaks) for one in principles) > 8
    for one in principles:
        check = find_check(one.judge)
        assert all(map(check, one.keeps)) and not any(map(check, one.breaks)), one.principle


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no principle: write one"),
        ("compiles", r"line 1 is no JSON .*: write \{"),
        ('{"principle": "a"}', "line 1: .*judge"),
        ('{"principle": " ", "judge": "compiles"}', "line 1: the principle is empty"),
        ('{"principle": "a", "judge": "compile"}', "no judge 'compile': use compiles, "),
        ('{"principle": "a", "judge": "compiles 3"}', "compiles takes no '3'"),
        ('{"principle": "a", "judge": "words"}', "'words' has no number: .* 'words 60'"),
        ('{"principle": "a", "judge": "words -1"}', "has no number"),
        ('{"principle": "a", "judge": "lacks"}', "'lacks' has no pattern"),
        ('{"principle": "a", "judge": "lacks ("}', r"'\(' is no regular expression"),
        ('{"principle": "a", "judge": "compiles", "keep": []}', "there is no field keep"),
        ('{"principle": "a", "judge": "compiles", "keeps": "x"}', "keeps is .*expected a list"),
    ],
)
def test_a_file_that_is_none_of_principles(line, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_principles(str(path))


def drafts(*texts: str) -> list[Answer]:
    return [Answer([], [], "p", text, True) for text in texts]


def test_the_best_and_the_worst_are_the_first_of_their_score():
    a, b, c, d = own = drafts("a", "b", "c", "d")
    assert best_and_worst(own, [1, 3, 3, 0]) == (b, d)
    assert best_and_worst(own, [0, 0, 2, 2]) == (c, a)
    assert best_and_worst(own, [1, 1, 1, 1]) is None
    assert best_and_worst(drafts("a"), [5]) is None
    assert best_and_worst(drafts("a", " "), [5, 1]) is None  # a pair needs two answers
    assert best_and_worst(drafts("a", "a"), [5, 1]) is None
