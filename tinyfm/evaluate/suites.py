"""Suites: published questions, asked in several ways, and what to compare the answers with.

A score of a suite depends on more than the model. Three choices are the examiner's, and each moves
it by points, so all are varied here and printed:

    the wording   three prompt formats for the same questions
    the rule      by which a model that only knows probabilities chooses an answer y to x:
                      total    ln p(y | x)
                      byte     ln p(y | x) / bytes of y, as longer answers are less probable
                      pmi      ln p(y | x) - ln p(y), as some answers are probable without the
                               question: pointwise mutual information (Holtzman et al. 2021)
    the questions those drawn; hence an interval (Wilson 1927) over the questions

The headline of a suite was fixed before anything was measured: the format "question" and the rule
"byte", so that it is not the best of nine. Beside it stand the lowest and the highest score of the
formats by the same rule. "total", "byte" and "pmi" are acc, acc_bytes and acc_mutual_info of
lm-evaluation-harness, and give its answers on the same questions.

A score means something next to chance, and next to answers that read no question: always the most
common answer, always the longest choice.

Word problems ask for a number: the first one that the model writes, at temperature 0. Functions to
complete are run with the tests that come with them (sandbox.py). Of n samples for a function, c of
which pass, the probability that at least one of k passes is estimated without bias (Chen et al.
2021, eq. 1) by

    pass@k = 1 - C(n - c, k) / C(n, k)

The mean win rate (Liang et al. 2022, HELM) compares several models: the share of the other models
that a model beats, a tie counting half, averaged over the suites. It depends on the models beside
it. Its interval is a bootstrap over the questions of each suite, the same ones for all models.

Left out: examples in the prompt, answers reasoned step by step, and suites as a whole being drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from data.report import counted
from data.splits import Overlap
from data.suites import NUMBER, Example, Problem, Program, Question, full_text
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.evaluate import likelihood, metrics, sandbox
from tinyfm.evaluate.metrics import Measured
from tinyfm.generate import Sampling, TextStream, row_generator, stream
from tinyfm.tokenizer import Tokenizer

ROWS = 32  # texts that a model writes at once
NUMBER_TOKENS = 16  # of an answer to a word problem
CODE_TOKENS = 200  # of a function, if the context has as many twice
TEMPERATURE = 0.8  # of several samples of a function; a single one is the most probable
DRAWS = 2000  # samples of the bootstrap
# A function ends where something else starts at the left margin (Chen et al. 2021, section 2.1).
CODE_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
LETTERS = "ABCDEFGH"
RULES = ("total", "byte", "pmi")


@dataclass(frozen=True)
class Result:
    """What a model got in a suite: shares of rightness, one for each question."""

    values: dict[str, dict[str, np.ndarray]]  # format -> rule -> (n,) from 0 to 1
    rule: str  # of the headline, in the first format
    cut: int  # questions that are too long for the context, and lose their start

    @property
    def headline(self) -> np.ndarray:
        return next(iter(self.values.values()))[self.rule]


def measured(values: np.ndarray) -> Measured:
    """The mean of values from 0 to 1, with Wilson's interval.

    Of values between 0 and 1, such as a share of samples, it is wider than it need be.
    """
    n = len(values)
    # The sum of many fractions may pass n by a rounding error.
    return Measured(float(values.mean()), metrics.wilson(min(values.sum(), n), n), n)


# ---- questions with choices ----------------------------------------------------------------------


def with_letters(question: Question) -> tuple[str, list[str]]:
    letters = LETTERS[: len(question.choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, question.choices)]
    return "\n".join([question.text, *lines, "Answer:"]), list(letters)


# Format -> (context, choices) of a question. A space stands between the two.
CHOICE_FORMATS: dict[str, Callable[[Question], tuple[str, Sequence[str]]]] = {
    "question": lambda question: (f"Question: {question.text}\nAnswer:", question.choices),
    "plain": lambda question: (question.text, question.choices),
    "letters": with_letters,
}


def score_choices(
    model: Any, tokenizer: Tokenizer, asked: Sequence[tuple[str, Sequence[str]]]
) -> tuple[list[dict[str, np.ndarray]], int]:
    """({rule: scores of the choices} of each (context, choices), how many of them are cut).

    Each text is scored once, however often it is asked for.
    """
    pairs = [(context, f" {choice}") for context, choices in asked for choice in choices]
    alone = [("", ending) for _, ending in pairs]
    unique = list(dict.fromkeys(pairs + alone))
    # A choice is scored in one window, with as much of its context as it leaves room for.
    room = model.config.context_length - len(prompt_ids(model))
    found = dict(zip(unique, likelihood.score(model, tokenizer, unique, stride=room)))
    scores = []
    cut = 0
    for context, choices in asked:
        own = [found[context, f" {choice}"] for choice in choices]
        total = np.array([score.log_likelihood for score in own])
        before = np.array([found["", f" {choice}"].log_likelihood for choice in choices])
        size = np.array([len(choice.encode("utf-8", "replace")) for choice in choices])
        scores.append({"total": total, "byte": total / size, "pmi": total - before})
        # The last token of a choice is not read.
        tokens = len(tokenizer.encode(context)) + max(score.tokens for score in own) - 1
        cut += tokens > room
    return scores, cut


def measure_choices(model: Any, tokenizer: Tokenizer, questions: Sequence[Question]) -> Result:
    """Choose the answers of questions in each format, by each rule."""
    values = {}
    cuts = []
    for name, ask in CHOICE_FORMATS.items():
        scores, cut = score_choices(model, tokenizer, [ask(question) for question in questions])
        cuts.append(cut)
        values[name] = {}
        for rule in RULES:
            best = np.array([int(row[rule].argmax()) for row in scores])
            right = best == [question.answer for question in questions]
            values[name][rule] = right.astype(float)
    return Result(values, "byte", cuts[0])


# ---- word problems -------------------------------------------------------------------------------

PROBLEM_FORMATS = {
    "question": "Question: {}\nAnswer:",
    "plain": "{}",
    "sentence": "{}\nThe answer is",
}


def write(
    model: Any,
    tokenizer: Tokenizer,
    contexts: Sequence[str],
    sampling: Sampling,
    stops: Sequence[str] = (),
    first: int = 0,
) -> list[str]:
    """Continue each context up to a stop string or the end of the text.

    A context is cut on its left: it leaves room for the new tokens, but keeps at least half of the
    model's context length. first: number of the first context; each has its own random stream.
    """
    front = prompt_ids(model)  # a soft prompt stands before everything that the model reads
    room = room_for(model, sampling.max_new_tokens)
    ids = [tokenizer.encode(context) or [tokenizer.eot] for context in contexts]
    rows = [front + row[-room:] for row in ids]
    streams = [TextStream(stops) for _ in rows]
    texts = [""] * len(rows)
    never = tokenizer.without_token(model.config.vocab_size)
    generators = [row_generator(sampling.seed, first + i) for i in range(len(rows))]
    for step in stream(model, rows, sampling, never=never, generators=generators):
        for i, token in enumerate(step):
            data = b"" if token is None else tokenizer.token_bytes(token)
            texts[i] += streams[i].feed(data, token is None)
        if all(own.stopped for own in streams):
            break
    return [text + own.feed(b"", final=True) for text, own in zip(texts, streams)]


def room_for(model: Any, new_tokens: int) -> int:
    """Tokens of a context that the model reads before it writes so many new ones."""
    length = model.config.context_length
    return max(length - new_tokens, length // 2) - len(prompt_ids(model))


def write_all(
    model: Any,
    tokenizer: Tokenizer,
    contexts: Sequence[str],
    sampling: Sampling,
    stops: Sequence[str] = (),
) -> tuple[list[str], int]:
    """(`write` of any number of contexts, how many of these are cut)."""
    texts = []
    for i in range(0, len(contexts), ROWS):
        texts += write(model, tokenizer, contexts[i : i + ROWS], sampling, stops, i)
    room = room_for(model, sampling.max_new_tokens)
    return texts, sum(len(tokenizer.encode(context)) > room for context in contexts)


def first_number(text: str) -> Decimal | None:
    """ " 1,200 apples, or 7" -> 1200; None without a number."""
    found = NUMBER.search(text.replace(",", ""))
    return Decimal(found[0]) if found else None


def measure_problems(model: Any, tokenizer: Tokenizer, problems: Sequence[Problem]) -> Result:
    """Let a model answer word problems in each format; the first number that it writes counts."""
    sampling = Sampling(NUMBER_TOKENS, temperature=0.0, stop_tokens=(tokenizer.eot,))
    values = {}
    cuts = []
    for name, form in PROBLEM_FORMATS.items():
        contexts = [form.format(problem.text) for problem in problems]
        texts, cut = write_all(model, tokenizer, contexts, sampling)
        cuts.append(cut)
        right = [first_number(t) == Decimal(p.answer) for t, p in zip(texts, problems)]
        values[name] = {"exact": np.array(right, dtype=float)}
    return Result(values, "exact", cuts[0])


# ---- functions -----------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k samples passes, if c of n did; k is at most n."""
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


def passes(program: Program, body: str) -> bool:
    """Whether a function with this body passes its tests. Runs the code: see sandbox.py."""
    code = f"{program.text}{body}\n\n{program.tests}\n\ncheck({program.entry})\n"
    return sandbox.run(code) == "passed"


def measure_programs(
    model: Any, tokenizer: Tokenizer, programs: Sequence[Program], samples: int = 1, seed: int = 0
) -> Result:
    """Let a model complete functions, and run them with their tests.

    pass@k is measured for each k of 1, 10 and 100 that `samples` reaches.
    """
    sampling = Sampling(
        max_new_tokens=min(CODE_TOKENS, model.config.context_length // 2),
        temperature=TEMPERATURE if samples > 1 else 0.0,
        stop_tokens=(tokenizer.eot,),
        seed=seed,
    )
    contexts = [program.text for program in programs for _ in range(samples)]
    bodies, cut = write_all(model, tokenizer, contexts, sampling, CODE_ENDS)
    counts = []
    for i, program in enumerate(programs):
        own = bodies[i * samples : (i + 1) * samples]
        counts.append(sum(passes(program, body) for body in own))
    values = {}
    for k in (1, 10, 100):
        if k <= samples:
            values[f"pass@{k}"] = np.array([pass_at_k(samples, c, k) for c in counts])
    return Result({"prompt": values}, "pass@1", cut // samples)


# ---- what to compare with ------------------------------------------------------------------------


def baselines(examples: Sequence[Example]) -> dict[str, float]:
    """{words: share of right answers} of chance and of answers that read no question.

    Of functions: of one that returns nothing, and of the published ones, which shows that the tests
    can be passed. It runs them.
    """
    n = len(examples)
    if isinstance(examples[0], Question):
        places = Counter(question.answer for question in examples)
        place, most = places.most_common(1)[0]
        longest = [
            max(range(len(q.choices)), key=lambda i, q=q: len(q.choices[i])) == q.answer
            for q in examples
        ]
        return {
            "chance": sum(1 / len(question.choices) for question in examples) / n,
            f"always {LETTERS[place]}": most / n,
            "the longest choice": sum(longest) / n,
        }
    if isinstance(examples[0], Problem):
        numbers = Counter(problem.answer for problem in examples)
        number, most = numbers.most_common(1)[0]
        return {f"always {number}": most / n}
    return {
        "return None": sum(passes(program, "    return None\n") for program in examples) / n,
        "the published functions": sum(passes(p, p.solution) for p in examples) / n,
    }


def measure(
    model: Any, tokenizer: Tokenizer, examples: Sequence[Example], samples: int, seed: int
) -> Result:
    """Examine a model in a suite; samples and seed are for functions."""
    if isinstance(examples[0], Question):
        return measure_choices(model, tokenizer, examples)
    if isinstance(examples[0], Problem):
        return measure_problems(model, tokenizer, examples)
    return measure_programs(model, tokenizer, examples, samples, seed)


# ---- several models ------------------------------------------------------------------------------


def win_rates(scores: np.ndarray) -> np.ndarray:
    """(M,) mean win rates of M models, from their scores in S suites: (..., S, M) -> (..., M)."""
    ours = scores[..., :, None]  # (..., S, M, 1)
    theirs = scores[..., None, :]  # (..., S, 1, M)
    wins = (ours > theirs) + 0.5 * (ours == theirs)
    others = scores.shape[-1] - 1
    # A model ties with itself, which does not count.
    return ((wins.sum(-1) - 0.5) / others).mean(-2)


def mean_win_rates(suites: Sequence[Sequence[np.ndarray]], seed: int = 0) -> list[Measured]:
    """The mean win rate of each model, with an interval of 95%.

    suites: for each suite the values (n,) of each model, of the same n questions. A bootstrap draws
    questions; the suites stay.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for values in suites:
        table = np.stack(values)  # (M, n)
        n = table.shape[1]
        weights = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)  # (draws, n)
        drawn.append(weights @ table.T / n)  # (draws, M)
    rates = win_rates(np.array([[own.mean() for own in values] for values in suites]))
    low, high = np.quantile(win_rates(np.stack(drawn, 1)), (0.025, 0.975), axis=0)
    about = counted(len(suites), "suites")
    return [
        Measured(float(rate), (a, b), len(suites), about) for rate, a, b in zip(rates, low, high)
    ]


# ---- contamination -------------------------------------------------------------------------------


def contamination(
    suites: dict[str, Sequence[Example]], training: Any
) -> dict[str, tuple[int, int]]:
    """{suite: (questions with a run of 13 words that training text has, questions so long)}.

    training: its texts. The questions count with all their choices.
    """
    overlap = Overlap([full_text(example) for own in suites.values() for example in own])
    for text in training:
        overlap.read(text)
    counts = overlap.count()
    found = {}
    start = 0
    for name, own in suites.items():
        covered, words = counts[start : start + len(own)].T
        found[name] = (int((covered > 0).sum()), int((words > 0).sum()))
        start += len(own)
    return found
