"""Examine GPTs with published questions:  python -m tinyfm.evaluate suites RUN [RUN ...]

The suites are files in packages, which a printed command fetches; data/suites.py lists them. Each
question is asked in three formats, and answered by three rules (evaluate/suites.py). Beside each
score stand chance, answers that read no question, an interval of 95% over the questions, how many
of these do not fit into the context, how many are in the training text, and what the run cost.

    python -m tinyfm.evaluate suites runs/gpt --limit 200        # 200 questions of each suite
    python -m tinyfm.evaluate suites runs/a runs/b --json        # and which run wins how often
    python -m tinyfm.evaluate suites runs/gpt --names humaneval --run-code

humaneval runs the code that the model writes, in a child process that can only compute; read
evaluate/sandbox.py before you allow it.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from data import suites as sources
from data.report import Report, counted
from data.splits import TRAIN
from tinyfm import quantize
from tinyfm.calc import estimate
from tinyfm.common import device as devices
from tinyfm.common import units
from tinyfm.common.config import GivenRuns, Name, Names, Quantize
from tinyfm.common.options import parse
from tinyfm.evaluate import overlap, sandbox, suites
from tinyfm.evaluate.metrics import Measured
from tinyfm.evaluate.suites import Result
from tinyfm.recipes import card, history, run_dir
from tinyfm.recipes.base import OpenRun

UNKNOWN = "not known"


@dataclass(frozen=True)
class Options:
    runs: GivenRuns = ()  # folders of runs, or of their checkpoints
    # suites: mmlu, openbookqa, piqa, commonsenseqa, siqa, asdiv, humaneval (default: all but the
    # last, and that one with --run-code)
    names: Names = ()
    limit: int = 0  # questions of each suite, drawn by --seed; 0 = all
    seed: int = 0  # seed of the draw of questions, and of the samples of humaneval
    run_code: bool = False  # humaneval: run what the model writes (Linux alone)
    samples: int = 1  # humaneval: functions to write for each question
    device: Name = "auto"  # device to compute on: cpu, cuda, mps, or auto
    quantize: Quantize = "none"  # format of the matrices: examine each run in it, too
    json: bool = False  # print JSON

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the suites, each once."""
        if self.names:
            return tuple(dict.fromkeys(self.names))
        return tuple(n for n in sources.NAMES if n != sources.PROGRAMS or self.run_code)


def check(options: Options) -> None:
    """Raise ValueError for options that make no sense, before anything is opened."""
    if not options.runs:
        raise ValueError("name a run to examine: python -m tinyfm.evaluate suites runs/gpt")
    twice = [run for run in options.runs if options.runs.count(run) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice: name each run once")
    if options.limit < 0 or options.samples < 1 or options.seed < 0:
        given = f"--limit is {options.limit}, --seed {options.seed}, --samples {options.samples}"
        raise ValueError(f"{given}; they must be at least 0, 0 and 1")
    unknown = [name for name in options.names if name not in sources.NAMES]
    if unknown:
        raise ValueError(f"there is no suite {unknown[0]!r}: use {', '.join(sources.NAMES)}")
    if sources.PROGRAMS in options.names and not options.run_code:
        raise ValueError(
            f"{sources.PROGRAMS} runs code that the model writes: read "
            "tinyfm/evaluate/sandbox.py, then allow it with --run-code"
        )
    if options.samples > 1 and sources.PROGRAMS not in options.chosen:
        raise ValueError(f"--samples is for {sources.PROGRAMS}, which needs --run-code")


# ---- reading -------------------------------------------------------------------------------------


def draw(name: str, limit: int, seed: int) -> list[sources.Example]:
    """The questions of a suite, or `limit` of them, in the order of the file."""
    report = Report()
    examples = sources.load(name, report)
    if report.skipped:
        print(f"{name}: {report}", file=sys.stderr)
    if limit and limit < len(examples):
        places = np.random.default_rng(seed).permutation(len(examples))[:limit]
        examples = [examples[i] for i in sorted(places)]
    return examples


def open_writer(path: str) -> OpenRun:
    """A run to examine. Raises ValueError for one that is no language model."""
    opened = run_dir.open_run(path)
    if "choices" not in opened.run.QUESTIONS:
        raise ValueError(
            f"{path} is a run of family {opened.run.family}: the suites are for runs of family gpt"
        )
    return opened


def count_known(path: str, examples: dict[str, list]) -> dict[str, tuple[int, int]]:
    """`suites.contamination` by the training text of a run and of those before it.

    {} if that is not known; stderr has the reason.
    """
    try:
        data = [overlap.plain_data(own) for own in history.open_training_data(path).values()]
        texts = (text for own in data for text in overlap.read_texts(own, TRAIN))
        return suites.contamination(examples, texts)
    except (ValueError, OSError) as error:
        print(f"warning: what {path} has read is not known: {error}", file=sys.stderr)
        return {}


def resources(opened: OpenRun) -> dict[str, str]:
    """What a run and those it started from cost; evaluation is not counted."""
    try:
        chain = history.open_bases(opened)
    except (ValueError, OSError) as error:
        print(f"warning: a cost is not known: {error}", file=sys.stderr)
        return {"training data": UNKNOWN, "training FLOPs": UNKNOWN}
    flops = 0
    read: dict[str, int] = {}
    is_known = True
    for own in chain:
        rows = own.meta["step"] * own.run.train.batch_size
        unit, _ = card.read_speeds(own)
        units = card.units_in_row(own, unit)
        is_known = is_known and units > 0
        read[unit] = read.get(unit, 0) + rows * units
        cost = estimate.training_cost(own.model, own.run.optim, own.run.train.batch_size)
        flops += own.meta["step"] * cost.flops_per_step
    data = UNKNOWN
    if is_known:
        data = ", ".join(counted(n, unit) for unit, n in read.items())
    return {"training data": data, "training FLOPs": f"{flops:.3g}"}


# ---- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A model in the table."""

    name: str  # its run, and the format of its weights
    facts: dict[str, str]  # what it is and cost
    results: dict[str, Result]
    known: dict[str, tuple[int, int]]  # suite -> questions in its training text, of how many


def examine(path: str, examples: dict[str, list], options: Options) -> list[Column]:
    """A column for a run, and with --quantize another one."""
    opened = open_writer(path)
    known = count_known(path, examples)
    cost = resources(opened)
    forms: dict[str, nn.Module] = {path: opened.model}
    if options.quantize != "none":
        smaller = copy.deepcopy(opened.model)
        run_dir.quantize_run(opened, smaller, options.quantize)
        forms[f"{path} {options.quantize}"] = smaller
    parameters = sum(p.numel() for p in opened.model.parameters())
    columns = []
    for name, model in forms.items():
        model.to(devices.choose_device(options.device))
        size = units.size(quantize.count_bytes(model))
        results = {}
        for suite, own in examples.items():
            print(f"{name}: {suite}", file=sys.stderr)
            results[suite] = suites.measure(
                model, opened.tokenizer, own, options.samples, options.seed
            )
        facts = {"parameters": f"{parameters:,}", "weights": size, **cost}
        columns.append(Column(name, facts, results, known))
    return columns


def wins(columns: Sequence[Column]) -> list[Measured]:
    """The mean win rates of the columns, by the headlines; none of a single column."""
    if len(columns) < 2:
        return []
    names = columns[0].results
    return suites.mean_win_rates(
        [[column.results[name].headline for column in columns] for name in names]
    )


# ---- printing ------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """0.271 -> "27.1"; with an interval "27.1 (23.3 to 31.2)"."""
    text = f"{100 * value:.1f}"
    if isinstance(value, Measured):
        text += f" ({100 * value.low:.1f} to {100 * value.high:.1f})"
    return text


def suite_rows(name: str, columns: Sequence[Column], beside: dict[str, float]) -> list[list[str]]:
    """The rows of a suite: what to compare with, scores by each rule, their spread, what is cut."""
    rows = [[f"  {words}", *[percent(share)] * len(columns)] for words, share in beside.items()]
    results = [column.results[name] for column in columns]
    first, *others = results[0].values
    for rule in results[0].values[first]:
        mark = " *" if rule == results[0].rule else ""
        values = [suites.measured(result.values[first][rule]) for result in results]
        rows.append([f"  {rule}{mark}", *map(percent, values)])
    if others:
        cells = []
        for result in results:
            scores = [rules[result.rule].mean() for rules in result.values.values()]
            cells.append(f"{percent(min(scores))} to {percent(max(scores))}")
        rows.append([f"  {1 + len(others)} formats, by {results[0].rule}", *cells])
    rows.append(["  cut to fit the context", *(f"{result.cut:,}" for result in results)])
    cells = []
    for column in columns:
        cells.append("{:,} of {:,}".format(*column.known[name]) if column.known else UNKNOWN)
    rows.append(["  in the training text", *cells])
    return rows


def to_text(
    columns: Sequence[Column], examples: dict[str, list], beside: dict[str, dict[str, float]]
) -> str:
    """The table."""
    rows = [["", *(column.name for column in columns)]]
    for fact in columns[0].facts:
        rows.append([fact, *(column.facts[fact] for column in columns)])
    for name, own in examples.items():
        rows.append([f"{name}, {counted(len(own), 'questions')}"])
        rows += suite_rows(name, columns, beside[name])
    rates = wins(columns)
    if rates:
        rows.append(["mean win rate", *map(percent, rates)])
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    ]
    return "\n".join([*lines, "", *NOTES])


NOTES = (
    "Scores are percent of the answers that are right, with an interval of 95% over the questions.",
    "* is the headline, fixed beforehand: it counts for the formats and for the mean win rate.",
    "In the training text: questions with 13 words in a row from it, of those that are so long.",
)


def to_json(
    columns: Sequence[Column], examples: dict[str, list], beside: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """What --json prints: shares from 0 to 1, with their intervals."""

    def interval(value: Measured) -> dict[str, float]:
        return {"value": float(value), "low": value.low, "high": value.high}

    models = {}
    for column in columns:
        found = {}
        for name, result in column.results.items():
            found[name] = {
                "scores": {
                    form: {rule: interval(suites.measured(v)) for rule, v in rules.items()}
                    for form, rules in result.values.items()
                },
                "headline": interval(suites.measured(result.headline)),
                "cut": result.cut,
                "in_training": column.known.get(name),
            }
        models[column.name] = {"facts": column.facts, "suites": found}
    for column, rate in zip(columns, wins(columns)):
        models[column.name]["mean_win_rate"] = interval(rate)
    return {
        "suites": {
            name: {"questions": len(own), "beside": beside[name]} for name, own in examples.items()
        },
        "models": models,
    }


def show(words: list[str]) -> int:
    """Carry out `suites` with its options. Raises ValueError for bad ones."""
    options = parse(Options, __doc__, "python -m tinyfm.evaluate suites", words)
    check(options)
    reason = sandbox.missing() if options.run_code else ""
    if reason:
        raise ValueError(f"--run-code: {reason}. Leave it out, or use a container with Linux")
    examples = {name: draw(name, options.limit, options.seed) for name in options.chosen}
    for path in options.runs:
        open_writer(path)  # before the first of them is examined for minutes
    beside = {name: suites.baselines(own) for name, own in examples.items()}
    columns = [column for path in options.runs for column in examine(path, examples, options)]
    if options.json:
        print(json.dumps(to_json(columns, examples, beside), indent=2))
    else:
        print(to_text(columns, examples, beside))
    return 0
