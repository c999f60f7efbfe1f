"""Pairs and revised answers by written principles:  python -m tinyfm.adapt constitution RUN ...

    python -m tinyfm.adapt constitution runs/code --principles data/principles.jsonl

The run, a GPT, writes --drafts answers to each prompt. The principles of a file judge them
(adapt/constitution.py has the form of the file and the judges). What is written:

    pairs.jsonl            for --task dpo or reward: prompt, chosen, rejected
    pairs-answers.jsonl    to fine-tune on: texts that break no principle

Only prompts of the training split are answered: those that are held out stay unread. A printed
report says how many drafts break each principle, and how far its judge agrees with people: with the
examples in the file, and for a reward model, with held-out pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data import ratings
from data.report import counted
from data.splits import TEST, TRAIN
from tinyfm.adapt.constitution import (
    OF_PYTHON,
    Principle,
    best_and_worst,
    find_check,
    read_principles,
)
from tinyfm.adapt.preference import Answer
from tinyfm.adapt.rewards import Judge, Parses
from tinyfm.batches.preference import FUNCTIONS, PromptConfig, PromptData
from tinyfm.common.config import DataPath, FilePath, GivenRun
from tinyfm.evaluate.metrics import Measured, proportion
from tinyfm.recipes import history, run_dir
from tinyfm.recipes.base import OpenRun
from tinyfm.recipes.preference import AT_ONCE, answer_prompts, check_judge, over_batches

MOST_DRAFTS = 1000  # of one prompt


@dataclass(frozen=True)
class Options:
    run: GivenRun  # folder of a run of family gpt, dpo or grpo
    principles: FilePath = ""  # file of principles; data/principles.jsonl has some for functions
    # prompts: functions (of Python's standard library), films or other rated sentences, or your
    # own jsonl with {"prompt": "..."} a line
    data: DataPath = FUNCTIONS
    # judge your own prompts together with their answers, as beginnings of one text; those of
    # functions and sentences always are
    whole: bool = False
    out: FilePath = "pairs.jsonl"  # file of pairs to write; answers go to NAME-answers.jsonl
    overwrite: bool = False  # replace these files
    drafts: int = 8  # answers to each prompt
    prompts: int = 500  # largest number of prompts
    max_new_tokens: int = 64  # largest number of tokens of an answer
    seed: int = 0  # seed of the drafts

    @property
    def files(self) -> tuple[Path, Path]:
        """Of the pairs, and of the answers."""
        pairs = Path(self.out)
        return pairs, pairs.with_name(f"{pairs.stem}-answers.jsonl")


# ---- judges --------------------------------------------------------------------------------------


class Judges:
    """The judges of principles, as functions of answers.

    whole: they read a prompt and its answer as one text, not the answer alone.
    """

    def __init__(self, principles: Sequence[Principle], whole: bool):
        """Open the reward models. Raises ValueError for a run of another kind."""
        self.principles = list(principles)
        self.whole = whole
        self.runs: dict[str, OpenRun] = {}
        self.models: dict[str, Judge] = {}
        for one in self.principles:
            if find_check(one.judge) is None and one.judge not in self.runs:
                opened = run_dir.open_run(one.judge)
                check_judge(opened, f"the judge {one.judge}")
                self.runs[one.judge] = opened
                self.models[one.judge] = Judge(opened.model, opened.tokenizer, whole)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that leaves a reward model no room to read an answer."""
        for judge in self.models.values():
            for prompt in prompts:
                judge.start(prompt)

    def keeps(self, one: Principle, answers: Sequence[Answer]) -> np.ndarray:
        """Whether each answer keeps a principle, bool (n,)."""
        if one.judge in self.models:
            judge = self.models[one.judge]
            parts = [judge(answers[i : i + AT_ONCE]) for i in range(0, len(answers), AT_ONCE)]
            return np.array([reward for part in parts for reward in part]) > 0
        check = find_check(one.judge)
        texts = [answer.before + answer.text if self.whole else answer.text for answer in answers]
        return np.array([check(text) for text in texts], dtype=bool)

    def all(self, answers: Sequence[Answer]) -> np.ndarray:
        """Whether each answer keeps each principle, bool (principles, n)."""
        return np.stack([self.keeps(one, answers) for one in self.principles])

    def ends_with_function(self, path: str) -> bool:
        """Whether answers to these prompts are the rest of a function, not of a line."""
        return path == FUNCTIONS or any(one.judge in OF_PYTHON for one in self.principles)

    def describe(self) -> None:
        """Print the principles, and how far their judges agree with people."""
        for number, one in enumerate(self.principles, 1):
            print(f"{number}. {one.principle}\n   judge: {one.judge}{self.agreement(one)}")

    def agreement(self, one: Principle) -> str:
        """How far a judge agrees with people, in words, after a semicolon; "" if nothing says."""
        said = []
        examples = [Answer([], [], "", text, True) for text in (*one.keeps, *one.breaks)]
        if examples:
            expected = np.arange(len(examples)) < len(one.keeps)
            right = int((self.keeps(one, examples) == expected).sum())
            said.append(f"{right} of {counted(len(examples), 'examples')} right")
        if one.judge in self.runs:
            said.append(agreement_with_people(self.runs[one.judge], one.judge))
        return "".join(f"; {text}" for text in said)


def percent(share: Measured) -> str:
    return f"{share:.0%} ({share.low:.0%} to {share.high:.0%})"


def agreement_with_people(judge: OpenRun, path: str) -> str:
    """What the reward model at `path` says of the test pairs of the data it learned from, in words.

    Nothing is measured if these are others today: training may have read what is now test.
    """
    try:
        data = history.open_data_of(judge, path)
        rated = ratings.rows(data.config.path) if data.config.path in ratings.SETS else []
    except (ValueError, OSError) as error:
        return f"not measured on people's pairs: {error}"
    if not data.splits[TEST]:
        return "not measured on people's pairs: none are test"
    batches = data.split_batches(TEST, judge.run.train.batch_size)
    better, worse = over_batches(judge.model.pair_rewards, judge.model, batches).T
    said = (
        f"of {counted(len(better), 'test pairs')} it orders "
        f"{percent(proportion(better > worse, 'pairs'))} as people do; above 0 are "
        f"{(better > 0).mean():.0%} of the better answers and {(worse > 0).mean():.0%} of the worse"
    )
    if rated:
        own = [row for row in rated if row.split == TEST]
        said += f"; a rater has the sign of the others' mean in {ratings.agreement(own):.0%}"
    return said


# ---- drafts --------------------------------------------------------------------------------------


def open_writer(path: str) -> OpenRun:
    """A GPT that continues texts. Raises ValueError for a run of another kind."""
    opened = run_dir.open_base(path)
    run = opened.run
    if run.base_family != "gpt" or run.has_heads or run.task == "chat":
        raise ValueError(
            f"{path} is a run of family {run.family}: give one that continues texts, of family "
            "gpt, dpo or grpo"
        )
    return opened


def open_prompts(path: str, opened: OpenRun, max_new_tokens: int) -> PromptData:
    """The prompts that leave room for an answer. Raises ValueError if there is no room."""
    context = opened.model.config.context_length
    if max_new_tokens >= context:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the context of "
            f"{context}: use a smaller number"
        )
    config = PromptConfig(path=path)
    return PromptData(config, opened.tokenizer, context - max_new_tokens, batch_size=1, seed=0)


def check_prompting(options: Any) -> None:
    """Raise ValueError for what `constitution` and `policies` both need."""
    if not options.principles:
        raise ValueError("which principles? give a file, as in --principles data/principles.jsonl")
    for name in ("prompts", "max_new_tokens"):
        value = getattr(options, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def draw_rounds(
    opened: OpenRun, prompts: Sequence[list[int]], rounds: int, seed: int, most: int, code: bool
) -> list[list[Answer]]:
    """`rounds` answers of at most `most` tokens to each prompt: a list of all answers, a round.

    code: an answer ends where its function does, otherwise with its line.
    """
    end = Parses.end if code else Judge.end
    numbers = tqdm(range(rounds), "drafts", leave=False, disable=None)
    return [
        answer_prompts(opened.model, opened.tokenizer, prompts, seed, most, end, i) for i in numbers
    ]


class Judged(NamedTuple):
    """A draft, and which principles it keeps."""

    answer: Answer
    keeps: np.ndarray  # bool (principles,)

    @property
    def score(self) -> int:
        return int(self.keeps.sum())


def judge_drafts(rounds: Sequence[Sequence[Answer]], judges: Judges) -> list[list[Judged]]:
    """The finished drafts of each prompt that say something, judged.

    A draft that was cut is another answer, and an empty one, which keeps many principles, is none.
    """
    keeps = [judges.all(answers).T for answers in rounds]  # (prompts, principles) each
    drafts = []
    for i in range(len(rounds[0])):
        own = zip((answers[i] for answers in rounds), (found[i] for found in keeps))
        drafts.append([Judged(*one) for one in own if one[0].ended and one[0].text.strip()])
    return drafts


def choose(drafts: Sequence[Judged]) -> tuple[dict[str, str] | None, dict[str, str] | None]:
    """(the pair, the revised answer) of the drafts of a prompt; None for one that there is not."""
    found = best_and_worst([one.answer for one in drafts], [one.score for one in drafts])
    pair = None
    if found:
        better, worse = found
        pair = {"prompt": better.before, "chosen": better.text, "rejected": worse.text}
    best = max(drafts, key=lambda one: one.score)
    revised = None
    if best.keeps.all():
        revised = {"text": best.answer.before + best.answer.text}
    return pair, revised


# ---- the command ---------------------------------------------------------------------------------


def report(drafts: Sequence[Sequence[Judged]]) -> str:
    """How many finished drafts break each principle, of all and of the best ones."""
    every = np.array([one.keeps for own in drafts for one in own])
    best = np.array([max(own, key=lambda one: one.score).keeps for own in drafts if own])
    lines = ["share that breaks each principle: of finished drafts, and of the best of each prompt"]
    for number, (of_all, of_best) in enumerate(zip(every.T, best.T), 1):
        lines.append(f"{number}. {1 - of_all.mean():6.1%} {1 - of_best.mean():6.1%}")
    return "\n".join(lines)


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def check_options(options: Options) -> None:
    """Raise ValueError for numbers out of range, and for files that cannot be written."""
    check_prompting(options)
    if not 2 <= options.drafts <= MOST_DRAFTS:
        raise ValueError(f"--drafts is {options.drafts}; use 2 to {MOST_DRAFTS}")
    if options.files[0].suffix != ".jsonl":
        raise ValueError(f"--out {options.out}: give a name that ends in .jsonl")
    for path in options.files:
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} exists: choose another --out, or add --overwrite")
        if not path.parent.is_dir():
            raise ValueError(f"--out {path}: there is no folder {path.parent}; make it first")


def constitution(options: Options) -> None:
    """Draw, judge, report, and write. Raises ValueError if no pair is found."""
    check_options(options)
    principles = read_principles(options.principles)
    opened = open_writer(options.run)
    data = open_prompts(options.data, opened, options.max_new_tokens)
    judges = Judges(principles, options.whole or data.whole)
    prompts = data.prompts(TRAIN)[: options.prompts]
    judges.check_prompts([data.tokenizer.decode(ids[1:]) for ids in prompts])
    judges.describe()

    code = judges.ends_with_function(data.path)
    rounds = draw_rounds(
        opened, prompts, options.drafts, options.seed, options.max_new_tokens, code
    )
    drafts = judge_drafts(rounds, judges)
    finished = [own for own in drafts if own]
    print(
        f"{counted(len(prompts), 'prompts')} of {data.path}, {options.drafts} drafts each; "
        f"{sum(map(len, drafts)):,} drafts say something and finished within "
        f"{options.max_new_tokens} tokens"
    )
    if finished:
        print(report(finished))
    found = [choose(own) for own in finished]
    pairs = [pair for pair, _ in found if pair]
    answers = [answer for _, answer in found if answer]
    if not pairs:
        raise ValueError(
            "no prompt has two finished drafts of which one breaks fewer principles: use more "
            "--drafts, more --max-new-tokens, or other principles"
        )
    first, second = options.files
    write_jsonl(first, pairs)
    print(f"{counted(len(pairs), 'pairs')} in {first}")
    second.unlink(missing_ok=True)
    if answers:
        write_jsonl(second, answers)
        print(f"{counted(len(answers), 'answers')} that break no principle in {second}")
    else:
        print("each draft breaks a principle, so there is no answer to fine-tune on")
    print(
        f"next: python train.py gpt --task dpo --init-from {options.run} --data.path {first} "
        "--out runs/constitution"
    )
