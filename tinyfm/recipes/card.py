"""What the model card of a run says, from the run's own record (hub/card.py writes it).

Its settings are in config.json, its speed in metrics.jsonl, and its scores on held-out data in
evaluation.json, which `python -m tinyfm.evaluate RUN` writes. If the record lacks a fact, the card
says so.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypedDict

from data import passages, ratings, words
from data.report import counted
from tinyfm.batches.text import MODALITIES, TextConfig, is_prepared
from tinyfm.calc import estimate
from tinyfm.common import files
from tinyfm.hub.card import Card, model_index, table
from tinyfm.recipes.base import OpenRun
from tinyfm.recipes.run_dir import EVALUATION
from tinyfm.training.log import METRICS, read_metrics

WATTS = 100.0  # drawn by a computer in training; an assumption that every card states

# Named data: what they are, and their licence.
RATED = "sentences that about 20 people rated each"
FONTS = "drawings of the characters of matplotlib's fonts"
FONT_LICENCE = "Bitstream Vera's licence (DejaVu), SIL Open Font License 1.1 (STIX)"
PYTHON = "PSF-2.0"
DATA = {
    "docs": (
        "documentation of Python, numpy and torch, as it is installed",
        f"{PYTHON} (Python), BSD-3-Clause (numpy and torch)",
    ),
    "passages": ("passages of Wikipedia", passages.PACKAGE.licence),
    "stdlib": ("source code of Python's standard library", PYTHON),
    "functions": ("functions of Python's standard library, to be completed", PYTHON),
    "packages": ("source code of Python's standard library, with the package as class", PYTHON),
    "words": ("English words and how they are spoken", words.PACKAGE.licence),
    "translation": ("texts of programs and their translations", "GPL and others, by program"),
    "chats": ("questions and answers made from Python's documentation", PYTHON),
    "shakespeare": ("plays by Shakespeare", "public domain"),
    "glyphs": (f"{FONTS}, with their names", FONT_LICENCE),
    "letters": (f"{FONTS}, those of letters, with their names", FONT_LICENCE),
    "scripts": (f"{FONTS}, with the script as class", FONT_LICENCE),
    "characters": (f"{FONTS}, with the character as class", FONT_LICENCE),
} | {
    name: (f"{name}: {RATED}", ratings.PACKAGE.licence)
    for name in ("films", "products", "editorials", "tweets")
} | {
    name: (source.MODALITY.about, source.PACKAGE.licence) for name, source in MODALITIES.items()
}  # fmt: skip


# Named data without a split: --data.val-fraction holds out a share, as of the trainer's own data.
SHARED_OUT = ("shakespeare",)


# ---- the parts -----------------------------------------------------------------------------------


class Interval(TypedDict):
    low: float | None  # None where there are too few examples
    high: float | None
    of: str  # what it is over, such as "513 documents"


class Evaluation(TypedDict):
    """What evaluation.json says."""

    run: dict  # step and weights
    scores: dict[str, dict[str, float | None]]  # measure -> column -> value
    intervals: dict[str, dict[str, Interval]]
    options: dict  # of the command, where they change what is measured


def read_evaluation(opened: OpenRun) -> Evaluation | None:
    """What evaluate measured of these weights; None if it has not, or of other weights.

    Raises ValueError for a file that is damaged.
    """
    path = opened.folder.parent / EVALUATION
    if not path.is_file():
        return None
    try:
        found = files.read_record(path, Evaluation)
    except ValueError as error:
        raise ValueError(f"{error}; delete the file, and evaluate the run again") from error
    measured = (found["run"].get("step"), found["run"].get("weights"))
    return found if measured == (opened.meta["step"], opened.weights) else None


def describe_data(opened: OpenRun) -> str:
    """Source, licence and splits."""
    run = opened.run
    record = files.read_json(opened.folder / "config.json")
    path = run.data.path
    own = Path(path).name or path  # no folders of this machine
    what, licence = DATA.get(path, (f"the trainer's own data, `{own}`", "not recorded"))
    splits = "as the record of the data source says"
    if path in DATA and path not in SHARED_OUT:
        splits = f"by a fixed rule, which stands in tinyfm's `data/` for `{path}`"
    elif is_prepared(path):
        splits = "as `data/prepare.py` drew them"
    elif hasattr(run.data, "val_fraction"):
        share = run.data.val_fraction
        splits = f"a share of {share:g} is held out, half of it for validation and half for test"
    lines = [
        f"- Data: {what}.",
        f"- Licence of the data: {licence}.",
        f"- Splits: training, validation and test, {splits}.",
        f"- Fingerprint of the data: `{record.get('data_fingerprint', 'not recorded')}`.",
    ]
    return "\n".join(lines)


def describe_results(opened: OpenRun, evaluation: Evaluation | None) -> str:
    """A table with intervals; or the scores of validation, and how to measure test."""
    if not evaluation:
        rows = [[k, f"{v:.4g}"] for k, v in opened.meta.items() if k != "step"]
        missing = (
            "Not measured on test data. (`python -m tinyfm.evaluate RUN` measures it; then export "
            "the run again.) Known are the scores of validation in training, without intervals:"
        )
        return f"{missing}\n\n{table(['measure', 'value'], rows)}"
    rows = []
    for measure, values in evaluation["scores"].items():
        own = evaluation["intervals"].get(measure, {}).get("reached")
        interval = "none"
        if own and own["low"] is not None and own["high"] is not None:
            interval = f"{own['low']:.4g} to {own['high']:.4g}"
        over = own["of"] if own else ""
        start = values.get("before", values.get("untrained"))
        rows.append([measure, show(start), show(values.get("reached")), interval, over])
    head = ["measure", "before training", "reached", "95% interval", "over"]
    text = table(head, rows)
    text += "\n\nAn interval is over examples, not over seeds: this is one run, of one seed."
    if evaluation["options"]:
        text += f" Measured with the options {evaluation['options']}."
    return text


def show(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def read_speeds(opened: OpenRun) -> tuple[str, dict[int, float]]:
    """(the unit of the data, {step: units per second}), by metrics.jsonl; the unit "" without any.

    Tokens, texts, pairs, ...: the model may count in another unit than its data.
    """
    unit = ""
    speeds = {}
    for row in read_metrics(opened.folder.parent / METRICS):
        for name, value in row.items():
            if name.endswith("_per_s") and value > 0 and row["step"] <= opened.meta["step"]:
                unit = name.removesuffix("_per_s")
                speeds[row["step"]] = value
    return unit, speeds


def units_in_row(opened: OpenRun, unit: str) -> int:
    """Units of the data in a row of a batch; 0 if the record does not say how many."""
    if unit != "tokens":
        return 1 if unit else 0
    windows = isinstance(opened.run.data, TextConfig)  # other rows of tokens differ in length
    return opened.model.config.context_length if windows else 0


def training_hours(speeds: dict[int, float], units_per_step: int) -> float:
    """Hours of the training steps up to each step of `speeds`, in units per second."""
    seconds = 0.0
    last = 0
    for step in sorted(speeds):
        seconds += (step - last) * units_per_step / speeds[step]
        last = step
    return seconds / 3600


def describe_cost(opened: OpenRun, watts: float) -> str:
    """Settings, FLOPs, hours and energy."""
    run = opened.run
    step = opened.meta["step"]
    unit, speeds = read_speeds(opened)
    units_per_step = run.train.batch_size * units_in_row(opened, unit)
    read = f"- {counted(step, 'steps')} of {counted(run.train.batch_size, 'rows')}"
    if units_per_step:
        read += f": {counted(step * units_per_step, unit)} in all, with repetitions"
    lines = [
        f"{read}.",
        f"- Optimizer {run.optim.optimizer}, learning rate {run.optim.lr:g}, seed "
        f"{run.train.seed}; all settings are in the run's config.json.",
    ]
    cost = None
    try:
        cost = estimate.training_cost(opened.model, run.optim, run.train.batch_size)
    except Exception:  # as in estimate.describe: a calculation that fails stops no export
        lines.append("- FLOPs: not known.")
    if cost:
        flops = f"{cost.flops_per_step * step:.3g}" if cost.flops_per_step else "not known"
        lines.append(f"- {counted(cost.parameters, 'parameters')}; FLOPs, calculated: {flops}.")
    hours = training_hours(speeds, units_per_step)
    if hours:
        lines.append(
            f"- {hours:.3g} hours of training steps, without evaluations. Energy: "
            f"{hours * watts / 1000:.2g} kWh, if the computer drew {watts:g} W on average, which "
            "is an assumption: the run does not record its power."
        )
    else:
        lines.append("- Hours and energy: not recorded.")
    before = [run.init_from, getattr(run, "teacher", ""), *(getattr(run, p) for p in run.PARTS)]
    if any(before):
        lines.append("- The runs that it started from or learned from are not counted.")
    return "\n".join(lines)


# ---- the card ------------------------------------------------------------------------------------


def describe(opened: OpenRun, name: str, base: str = "", watts: float = WATTS) -> Card:
    """The card of a run that is exported under a name. base: of an adapter that is exported alone.

    Raises ValueError for watts below 0, and for a damaged evaluation.json.
    """
    if not 0 <= watts < math.inf:
        raise ValueError(f"--watts is {watts}; it must be at least 0")
    run = opened.run
    about = run.ABOUT
    evaluation = read_evaluation(opened)
    head = {"license": "unknown", "library_name": "peft" if base else about.library}
    if about.task:
        head["pipeline_tag"] = about.task
    if base:
        head["base_model"] = base
    head["tags"] = ["tinyfm", run.family]
    if evaluation:
        scores = {k: row.get("reached") for k, row in evaluation["scores"].items()}
        scores = {k: v for k, v in scores.items() if v is not None}
        data = Path(run.data.path).name or run.data.path
        head["model-index"] = model_index(name, about.task or run.family, data, scores)
    start = ""
    if run.init_from:
        start = f" It started from the run `{Path(run.init_from).name}` (--adapt {run.adapt})."
    weights = "averaged weights" if opened.weights == "ema" else "weights"
    kind = (type(run).__doc__ or run.family).splitlines()[0].rstrip(".")
    sections = {
        "Model": f"A run of tinyfm, family `{run.family}`: {kind[0].lower()}{kind[1:]}. Exported "
        f"are the {weights} of step {opened.meta['step']}.{start}",
        "Intended use": about.use or "Not stated by the recipe of this family.",
        "Limits": (about.limits or "Not stated by the recipe of this family.")
        + " It was not tested for bias, safety or harm. It is small, and made to learn from.",
        "Training data": describe_data(opened),
        "Results": describe_results(opened, evaluation),
        "Training and its cost": describe_cost(opened, watts),
        "Licence": "The run does not record a licence of the weights. tinyfm, the code, is under "
        "the MIT licence; the licence of the data stands above.",
    }
    return Card(name, head, sections)
