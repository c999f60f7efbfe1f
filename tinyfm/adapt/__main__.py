"""Compare ways to adapt a model:  python -m tinyfm.adapt compare RUN [--data.path reviews.csv] ...

One trained model learns one classification task in every way, from few labels and from many:

    zero-shot     the likelihoods of the class names are compared; nothing is trained
    few-shot      the same, after labelled examples in the prompt
                  (a GPT only); each query and seed draws other ones
    head          a linear map of frozen features: a linear probe
    bias          the head, and all biases and gains of norms; the table says which the model has
    lora RANK     the head, and a LoRA of this rank on every hidden matrix
    full          all weights
    from scratch  all weights of a model that was not pretrained: shows the value of pretraining

Each is trained with the settings of `train.py --task classify --adapt ...`. All are scored on the
same examples: all of test, by which nothing is chosen. A first table shows the costs: the number of
trained parameters, the peak memory of a training step (calc/trace.py), the size of the saved
weights, and the CPU time. A second one shows the accuracy: the median of the seeds, its interval of
95% over the test examples (evaluate/metrics.py), and the range of the seeds. Of texts, the last
line says how much of test the base has read (evaluate/overlap.py). Results are kept in
OUT/results.jsonl and are measured again only if the recipe or the examples have changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import torch

from data.report import named
from data.splits import TEST
from tinyfm import adapt
from tinyfm.batches.labelled import TaskConfig, TaskData
from tinyfm.calc import trace
from tinyfm.common import schema
from tinyfm.common.config import FolderPath, GivenRun, Names, Numbers
from tinyfm.common.console import run_command
from tinyfm.common.figures import new_figure
from tinyfm.common.options import parse
from tinyfm.evaluate import overlap
from tinyfm.evaluate.metrics import Measured
from tinyfm.recipes import constitution, policies, registry, run_dir
from tinyfm.recipes.base import OpenRun, Run
from tinyfm.recipes.classify import score_untrained
from tinyfm.training.trainer import Trainer

METHODS = ("head", "bias", "lora 1", "lora 4", "full", "from scratch")
MOST_SEEDS = 1000  # each trains all methods
SHOTS = 4  # labelled examples in the prompt of "few-shot", if they fit
SCORING = "test-1"  # a new name measures all results again


@dataclass(frozen=True)
class Options:
    run: GivenRun  # folder of a run of family gpt, clip, autoencoder or ddpm

    # The task to learn. The default for pictures is scripts.
    data: TaskConfig = field(default_factory=TaskConfig)

    labels: Numbers = (100, 1000, 0)  # numbers of labels to train on; 0 = all
    steps: Numbers = (40, 60, 90)  # training steps, for each number of labels
    batch_size: int = 16  # rows in a step
    seeds: int = 3  # number of seeds; their median and range are shown
    methods: Names = METHODS  # methods that train; "lora N" may have any rank N
    # folder for results.jsonl and compare.png (default: runs/compare-FAMILY)
    out: FolderPath = ""


Row = dict[str, Any]  # a line of results.jsonl


# ---- one method ---------------------------------------------------------------------------------


def run_of(options: Options, opened: OpenRun, method: str, labels: int, seed: int) -> Run:
    """The run that trains with a method. Raises ValueError for an unknown method or family."""
    name, _, rank = method.partition(" ")
    is_lora = name == "lora" and rank.isdigit()
    if method not in METHODS and not is_lora:
        raise ValueError(f"there is no method {method!r}: use {', '.join(METHODS)}, or a rank")
    from_scratch = method == "from scratch"

    # The preset of the family's classification task, with this model.
    how = "full" if from_scratch else name
    family = opened.run.base_family
    run = registry.get_preset(family, "classify", how).run
    run = replace(run, model=opened.run.model, adapt=how)

    # The data: the preset's task, unless one was given.
    given = options.data.path != TaskConfig.path
    path = options.data.path if given else run.data.path
    data = replace(options.data, labels=labels, path=path)
    if opened.tokenizer:
        data = replace(data, tokenizer=str(opened.folder))

    # The training.
    steps = options.steps[options.labels.index(labels)]
    train = replace(run.train, steps=steps, batch_size=options.batch_size, seed=seed, eval_every=0)
    run = replace(run, data=data, train=train)
    if how == "lora":
        run = replace(run, adapter=replace(run.adapter, rank=int(rank), alpha=float(rank)))
    if from_scratch:
        # The optimizer settings are those of pretraining, and there is no run to start from.
        return replace(run, optim=registry.get_preset(family).run.optim)
    return replace(run, init_from=options.run)


def describe(accuracy: Measured) -> Row:
    """The fields of a row for an accuracy on the test examples."""
    return {
        "accuracy": float(accuracy),
        "low": None if math.isnan(accuracy.low) else accuracy.low,
        "high": None if math.isnan(accuracy.high) else accuracy.high,
        "n": accuracy.n,
        "examples": accuracy.about,
    }


def train_one(run: Run, opened: OpenRun) -> Row:
    """Train as `run` says; return the accuracy on test and the costs."""
    start = time.process_time()
    data = run.open_data()
    run = replace(run, **run.facts_of(data))
    torch.manual_seed(run.train.seed)
    model = run_dir.build_start(run, opened if run.init_from else None)
    trained, _ = adapt.trained(model)
    peak = max(trace.step_bytes(model, run.optim, run.train.batch_size))

    # Nobody reads the trainer's validation loss here, so it gets a single batch.
    brief = copy.copy(data)
    brief.val_batches = lambda rows: islice(data.val_batches(rows), 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, brief, run.train, run.optim, Path(folder))
        trainer.fit()
        (weights,) = Path(folder).glob("step-*/model.safetensors")
        stored = weights.stat().st_size

    with trainer.autocast():
        scores = run.score(model.eval(), data, TEST)
    # The first question's: "accuracy", or "accuracy QUESTION" if there are several.
    accuracy = next(value for name, value in scores.items() if name.startswith("accuracy"))
    return {
        **describe(accuracy),
        "trained": trained,
        "peak_bytes": peak,
        "stored_bytes": stored,
        "seconds": time.process_time() - start,
    }


def classify_untrained(opened: OpenRun, data: TaskData, shots: int) -> Row:
    """Zero-shot or few-shot classification of the test examples: nothing is trained."""
    start = time.process_time()
    scores = score_untrained(opened, data, shots)
    row = {
        **describe(scores["accuracy"]),
        "trained": 0,
        "peak_bytes": 0,
        "stored_bytes": 0,
        "seconds": time.process_time() - start,
    }
    if shots:
        row["shots"] = scores[f"examples that fitted, of {shots}"]
        row["without"] = scores["prompts without an example"]
    return row


# ---- all methods --------------------------------------------------------------------------------


def cases(options: Options, untrained: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(seed, number of labels, method) of all measurements.

    A method without training appears with the first number of labels only, as it does not learn
    from labels. Zero-shot uses no examples either, so it has one seed.
    """
    for seed in range(options.seeds):
        for labels in options.labels:
            for method in (*untrained, *options.methods):
                if method in untrained and labels != options.labels[0]:
                    continue
                if method == "zero-shot" and seed > 0:
                    continue
                yield seed, labels, method


class Result(TypedDict):
    """What a line of results.jsonl holds at least."""

    what: list[Any]
    method: str
    labels: int
    accuracy: float
    low: float | None
    high: float | None
    n: int
    examples: str
    trained: int
    peak_bytes: int
    stored_bytes: int
    seconds: float


def read_results(path: Path) -> list[Row]:
    """The rows of a results.jsonl. Lines that a kill cut, or that are no rows, are left out."""
    content = path.read_bytes() if path.is_file() else b""
    rows = []
    damaged = 0
    for line in content.splitlines():
        try:
            rows.append(schema.check(schema.parse_json(line), Result, path.name))
        except ValueError:
            damaged += 1
    if damaged:
        print(f"{damaged} lines of {path} cannot be read: measured again", file=sys.stderr)
    if content and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return rows


def measure_all(options: Options, opened: OpenRun, out: Path) -> Iterator[Row]:
    """Yield a row for each case, from OUT/results.jsonl or measured and added to it."""
    path = out / "results.jsonl"
    known = {json.dumps(row["what"]): row for row in read_results(path)}
    # The key of a measurement: a hash of all settings it depends on, of the base, and the examples.
    base = adapt.base_hash(opened.model)
    examples = run_of(options, opened, "head", options.labels[0], 0).open_data().fingerprint
    untrained = opened.run.UNTRAINED
    for seed, labels, method in cases(options, untrained):
        if method in untrained:
            run = run_of(options, opened, "head", labels, seed)
            settings = asdict(run.data)
        else:
            run = run_of(options, opened, method, labels, seed)
            settings = asdict(run)
        recipe = json.dumps(settings) + base + examples + SCORING
        recipe = hashlib.sha256(recipe.encode()).hexdigest()[:16]
        what = [method, labels, seed, run.data.path, recipe]
        key = json.dumps(what)
        if key not in known:
            if method in untrained:
                shots = SHOTS if method == "few-shot" else 0
                row = classify_untrained(opened, run.open_data(), shots)
            else:
                row = train_one(run, opened)
            name = f"head, {adapt.kinds_of_bias(opened.model)}" if method == "bias" else method
            known[key] = {"what": what, "method": name, "labels": labels, **row}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[key]) + "\n")
        yield known[key]


# ---- table and figure ---------------------------------------------------------------------------


def label_names(labels: Sequence[int]) -> list[str]:
    """The numbers of labels in words: "100 labels", or "all labels" for 0."""
    return [f"{n or 'all'} {named(n, 'labels')}" for n in labels]


def methods_in(rows: list[Row]) -> list[str]:
    """The methods of the rows, each once, in their order."""
    return list(dict.fromkeys(row["method"] for row in rows))


def found_in(rows: list[Row], method: str, labels: int) -> list[Row]:
    """The rows of a method with a number of labels, one for each seed, by accuracy."""
    found = [row for row in rows if row["method"] == method and row["labels"] == labels]
    return sorted(found, key=lambda row: row["accuracy"])


def percentages(rows: list[Row], method: str, labels: int) -> list[float]:
    """The accuracies of a method with a number of labels, in percent, one for each seed."""
    return [100 * row["accuracy"] for row in found_in(rows, method, labels)]


def costs_table(rows: list[Row]) -> str:
    """A line for each method: its costs with the most labels that it was trained on."""
    lines = [f"{'':22}{'trained':>12}{'step':>10}{'to keep':>11}{'CPU s':>7}"]
    for method in methods_in(rows):
        own = [row for row in rows if row["method"] == method]
        last = [row for row in own if row["labels"] == own[-1]["labels"]]
        trained = last[0]["trained"]
        peak = last[0]["peak_bytes"] / 1e6
        stored = last[0]["stored_bytes"] / 1e6
        seconds = statistics.median(row["seconds"] for row in last)
        lines.append(f"{method:22}{trained:>12,}{peak:>7.1f} MB{stored:>8.2f} MB{seconds:>7.0f}")
    return "\n".join(lines)


def cell(found: list[Row]) -> str:
    """Such as "58.4 (51.0 to 65.4), seeds 57.2 to 59.1": the interval is that of the median."""
    if not found:
        return ""
    middle = found[(len(found) - 1) // 2]
    text = f"{100 * middle['accuracy']:.1f}"
    if middle["low"] is not None:
        text += f" ({100 * middle['low']:.1f} to {100 * middle['high']:.1f})"
    if len(found) > 1:
        text += f", seeds {100 * found[0]['accuracy']:.1f} to {100 * found[-1]['accuracy']:.1f}"
    return text


def accuracy_table(rows: list[Row], labels: tuple[int, ...]) -> str:
    """What was measured, and a line for each method with a cell for each number of labels."""
    cells = {
        method: [cell(found_in(rows, method, n)) for n in labels] for method in methods_in(rows)
    }
    width = 2 + max(len(text) for line in cells.values() for text in line)
    about = f"accuracy in percent on test, {rows[0]['examples']}, with intervals of 95%"
    first = 2 + max(map(len, cells))
    lines = [about, " " * first + "".join(f"{name:{width}}" for name in label_names(labels))]
    for method, line in cells.items():
        lines.append(f"{method:{first}}" + "".join(f"{text:{width}}" for text in line))
    few = [row for row in rows if "shots" in row]
    if few:
        fitted = statistics.mean(row["shots"] for row in few)
        without = statistics.mean(row["without"] for row in few)
        lines.append(
            f"few-shot: on average {fitted:.1f} of {SHOTS} examples fitted into the prompt; "
            f"{without:.0%} of the prompts had none"
        )
    return "\n".join(line.rstrip() for line in lines)


def draw(rows: list[Row], labels: tuple[int, ...], title: str, path: Path) -> None:
    """Draw the accuracy by number of labels: a line for each method, and the range of its seeds.

    A method without training is a dotted horizontal line.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    places = range(len(labels))
    for method in methods_in(rows):
        found = [percentages(rows, method, n) for n in labels]
        if not all(found):  # measured with the first number of labels only: nothing is trained
            value = statistics.median(found[0])
            axes.axhline(value, linestyle=":", color="0.4")
            axes.annotate(method, (len(labels) - 1, value), fontsize=8, ha="right", va="bottom")
            continue
        medians = [statistics.median(values) for values in found]
        lowest = [min(values) for values in found]
        highest = [max(values) for values in found]
        (line,) = axes.plot(places, medians, "o-", label=method)
        axes.fill_between(places, lowest, highest, color=line.get_color(), alpha=0.15)
    axes.set_xticks(places, label_names(labels))
    axes.set(ylabel="test examples right, %", title=title)
    axes.legend(fontsize=8)
    figure.savefig(path)


# ---- the command --------------------------------------------------------------------------------


def read_by_base(opened: OpenRun, data: TaskData) -> str:
    """A line on how much of the test texts the base has read, without labels."""
    unknown = "base: what it has read of test was not measured, as its text"
    try:
        base = opened.run.open_data()
    except (ValueError, OSError) as error:
        return f"{unknown} cannot be read: {error}"
    if not run_dir.is_data_of(opened, base):
        return f"{unknown} has changed"
    _, test = overlap.measure(data, {"task": data, "base": base})
    share = test.runs["base"]
    return f"base: {share:.1%} of the words of test are in 13-word runs that its training text has"


def compare(options: Options) -> None:
    """Measure all cases, print the table, and draw the figure."""
    if len(options.steps) != len(options.labels):
        raise ValueError(
            f"{len(options.steps)} --steps for {len(options.labels)} --labels: give one number of "
            "steps for each number of labels"
        )
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise ValueError(f"--seeds {options.seeds}: use 1 to {MOST_SEEDS}")
    opened = run_dir.open_base(options.run)
    for method in options.methods:  # an unknown method is an error before anything is trained
        run_of(options, opened, method, options.labels[0], 0)
    out = Path(options.out or f"runs/compare-{opened.run.family}")
    out.mkdir(parents=True, exist_ok=True)
    rows = list(measure_all(options, opened, out))
    print(costs_table(rows))
    print()
    print(accuracy_table(rows, options.labels))
    data = run_of(options, opened, "head", options.labels[0], 0).open_data()
    if data.tokenizer:
        print(read_by_base(opened, data))
    task = rows[0]["what"][3]
    draw(rows, options.labels, f"{task}, from {options.run}", out / "compare.png")
    print(out / "compare.png")


COMMANDS = {  # the options, the text of --help, and what carries them out
    "compare": (Options, __doc__, compare),
    "constitution": (constitution.Options, constitution.__doc__, constitution.constitution),
    "policies": (policies.Options, policies.__doc__, policies.policies),
}


def main(arguments: Sequence[str] | None = None) -> int | str:
    """Run `compare ...` or another of COMMANDS; return the exit status, or what went wrong."""
    name, *words = list(sys.argv[1:] if arguments is None else arguments) or [""]
    start = "python -m tinyfm.adapt"
    if name not in COMMANDS:
        return "usage: " + "\n       ".join(f"{start} {known} RUN ..." for known in COMMANDS)
    options, about, carry_out = COMMANDS[name]
    try:
        carry_out(parse(options, about, f"{start} {name}", words))
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, lasting=True))
