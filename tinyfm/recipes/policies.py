"""Policies side by side:  python -m tinyfm.adapt policies RUN ... --principles FILE

    python -m tinyfm.adapt policies runs/dpo runs/grpo --principles data/principles.jsonl

The runs, of --task dpo or grpo, with all weights or a LoRA, started from one base. Each of them and
the base answer the same held-out prompts, those of test, with the same random numbers. In a row:

    keeps all     the share of answers that are finished and keep all principles, with its interval
                  of 95% over the prompts
    finished      the share that ended within --max-new-tokens
    breaks 1 ...  the share of the finished ones that breaks each principle
    KL            to the base, in nats an answer
    distinct      different pairs of tokens over all pairs
    bits          per byte of the base's own test text: what a run has forgotten is above the base's

Nothing is trained. A reward model as a judge (adapt/constitution.py) gives the share of answers
with a reward above 0. It should not be the one that a run was trained with, which errs in that
run's favour: a warning names such a run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.report import counted
from data.splits import TEST
from tinyfm.adapt.constitution import read_principles
from tinyfm.adapt.preference import distinct, kl_of_answers
from tinyfm.batches.preference import FUNCTIONS
from tinyfm.common.config import DataPath, FilePath, GivenRuns
from tinyfm.evaluate import likelihood
from tinyfm.evaluate.metrics import proportion
from tinyfm.gpt import GPT
from tinyfm.recipes import history, run_dir
from tinyfm.recipes.base import OpenRun, Run
from tinyfm.recipes.constitution import (
    Judges,
    check_prompting,
    draw_rounds,
    open_prompts,
    open_writer,
    percent,
)
from tinyfm.recipes.preference import AT_ONCE


@dataclass(frozen=True)
class Options:
    runs: GivenRuns  # folders of runs of family dpo or grpo, from one base
    principles: FilePath = ""  # file of principles; data/principles.jsonl has some for functions
    # prompts: functions (of Python's standard library), films or other rated sentences, or your
    # own jsonl with {"prompt": "..."} a line
    data: DataPath = FUNCTIONS
    # judge your own prompts together with their answers, as beginnings of one text; those of
    # functions and sentences always are
    whole: bool = False
    prompts: int = 200  # largest number of prompts
    max_new_tokens: int = 64  # largest number of tokens of an answer
    seed: int = 0  # seed of the answers


def open_policies(paths: Sequence[str]) -> tuple[OpenRun, dict[str, OpenRun]]:
    """(the base, {name: run}). Raises ValueError for runs that have none, or not the same."""
    if not paths:
        raise ValueError("which runs? give one or more of --task dpo or grpo")
    opened = {path: open_writer(path) for path in paths}
    first = opened[paths[0]].run
    for path, one in opened.items():
        if not one.run.task:
            raise ValueError(f"{path} is a run of family {one.run.family}: give one of dpo or grpo")
        if one.run.base_hash != first.base_hash:
            raise ValueError(
                f"{path} started from other weights than {paths[0]}: compare runs of one base"
            )
    return run_dir.open_same_base(first), opened


def warn_of_own_judges(opened: dict[str, OpenRun], judges: Judges) -> None:
    """Say which runs are judged by the reward model that they were trained with."""
    names = {Path(name).resolve() for name in judges.runs}
    for path, one in opened.items():
        judge = getattr(one.run.data, "judge", "")
        if judge and Path(judge).resolve() in names:
            print(
                f"warning: {path} was trained with the judge {judge}, which errs in that run's "
                "favour: use another reward model",
                file=sys.stderr,
            )


def read_own_text(base: OpenRun) -> Any:
    """The data that a base was trained on, or None: it reads other things, or they have changed."""
    if base.run.family != "gpt":
        return None
    try:
        data = history.open_data_of(base, str(base.folder))
    except (ValueError, OSError):
        return None
    return data if len(data.split(TEST).starts) else None


def bits_per_byte(model: GPT, data: Any) -> str:
    """Of the test text of the base's data."""
    if data is None:
        return "-"
    nats = likelihood.score_targets(model, data.split_batches(TEST, AT_ONCE))
    return f"{nats.sum() / math.log(2) / data.split(TEST).bytes.sum():.3f}"


def describe(run: Run) -> str:
    """How a run was trained, such as "dpo, lora 4"."""
    rank = f" {run.adapter.rank}" if run.adapt == "lora" else ""
    return f"{run.task}, {run.adapt}{rank}"


def policies(options: Options) -> None:
    """Measure, and print the table."""
    check_prompting(options)
    principles = read_principles(options.principles)
    base, opened = open_policies(options.runs)
    data = open_prompts(options.data, base, options.max_new_tokens)
    judges = Judges(principles, options.whole or data.whole)
    prompts = data.prompts(TEST)[: options.prompts]
    if not prompts:
        raise ValueError(f"{options.data} has no prompts of test: give more prompts")
    judges.check_prompts([data.tokenizer.decode(ids[1:]) for ids in prompts])
    warn_of_own_judges(opened, judges)
    judges.describe()
    print(f"answers to {counted(len(prompts), 'prompts')} of test, of {data.path}")
    own_text = read_own_text(base)
    names = {"the base": base}
    names |= {f"{path} ({describe(one.run)})": one for path, one in opened.items()}
    width = max(map(len, names)) + 2
    breaks = "".join(f"{f'breaks {i}':>10}" for i in range(1, len(principles) + 1))
    columns = f"{'finished':>10}{breaks}{'KL':>8}{'distinct':>10}{'bits':>8}"
    print(f"{'':{width}}{'keeps all':18}{columns}")
    code = judges.ends_with_function(data.path)
    for name, one in names.items():
        (answers,) = draw_rounds(one, prompts, 1, options.seed, options.max_new_tokens, code)
        keeps = judges.all(answers)
        finished = np.array([answer.ended for answer in answers])
        share = proportion(keeps.all(0) & finished, "prompts")
        broken = 1 - keeps[:, finished].mean(1) if finished.any() else [math.nan] * len(keeps)
        cells = "".join(f"{value:10.1%}" for value in (finished.mean(), *broken))
        kl = kl_of_answers(one.model, base.model, answers).mean()
        varied = distinct([answer.tokens for answer in answers])
        bits = bits_per_byte(one.model, own_text)
        print(f"{name:{width}}{percent(share):18}{cells}{kl:8.2f}{varied:10.2f}{bits:>8}")
