"""The prices of adaptation:  python -m tinyfm.adapt compare RUN [--data.path reviews.csv] ...

One trained model, one task, and all ways to make the one do the other, on few labels and on many:

    zero-shot     the names of the classes are compared with the example; nothing is trained
    few-shot      the same, after labelled examples in the context (a GPT only)
    head          a linear map of frozen features: a linear probe
    bias          also biases and the gains of norms
    lora RANK     also a change of low rank to every hidden matrix
    full          all weights
    from scratch  all weights, of a model that was never pretrained: what pretraining is worth

Each is trained by the trainer with the settings of `train.py --task classify --adapt ...`, and
measured on the same held-out examples. For each stand beside the accuracy: how many numbers are
trained, the peak bytes of a training step (measure.py), the bytes of what has to be kept, and the
processor's seconds. What was measured is kept in OUT/results.jsonl, and not measured again, unless
the recipe has changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
import tyro

from tinyfm import adapt
from tinyfm.batches.labelled import TaskConfig, TaskData
from tinyfm.calc import trace
from tinyfm.common.figures import new_figure
from tinyfm.recipes import registry, run_dir
from tinyfm.recipes.base import OpenRun, Run
from tinyfm.recipes.classify import score_untrained
from tinyfm.training.trainer import Trainer

METHODS = ("head", "bias", "lora 1", "lora 4", "full", "from scratch")


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]  # a run of family gpt, clip, autoencoder or ddpm
    data: TaskConfig = field(default_factory=TaskConfig)  # scripts, for a model of pictures
    labels: tuple[int, ...] = (100, 1000, 0)  # how many to train on; 0 = all
    steps: tuple[int, ...] = (40, 60, 90)  # of training, for each of these
    batch_size: int = 16  # rows in a step
    seeds: int = 3  # of which the median is told, and the range
    methods: tuple[str, ...] = METHODS
    out: str = ""  # folder for results.jsonl and compare.png; runs/compare-FAMILY if not given


Row = dict[str, float | int | str]


# ---- one way ------------------------------------------------------------------------------------


def run_of(options: Options, opened: OpenRun, method: str, labels: int, seed: int) -> Run:
    """The run of a method. Raises ValueError for a method or a family that there is not."""
    name, _, rank = method.partition(" ")
    if method not in METHODS and not (name == "lora" and rank.isdigit()):
        raise ValueError(f"there is no method {method!r}: use {', '.join(METHODS)}, or a rank")
    how = "full" if method == "from scratch" else name
    family = opened.run.base_family
    run = registry.get_preset(family, "classify", how).run
    steps = options.steps[options.labels.index(labels)]
    given = options.data.path != TaskConfig.path
    data = replace(options.data, labels=labels, path=(options if given else run).data.path)
    if opened.tokenizer:
        data = replace(data, tokenizer=str(opened.folder))
    train = replace(run.train, steps=steps, batch_size=options.batch_size, seed=seed, eval_every=0)
    begun = {} if method == "from scratch" else {"init_from": options.run}
    width = {"rank": int(rank), "alpha": float(rank)} if how == "lora" else {}
    if method == "from scratch":  # as the preset pretrains
        run = replace(run, optim=registry.get_preset(family).run.optim)
    adapter = replace(run.adapter, **width)
    return replace(
        run, model=opened.run.model, data=data, train=train, adapt=how, adapter=adapter, **begun
    )


def train_one(run: Run, opened: OpenRun) -> Row:
    """Train as `run` says; what it reaches on what is held out, and what it costs."""
    begun = time.process_time()
    data = run.open_data()
    run = replace(run, **run.facts_of(data))
    torch.manual_seed(run.train.seed)
    model = run_dir.build_start(run, opened if run.init_from else None)
    trained, _ = adapt.trained(model)
    peak = max(trace.step_bytes(model, run.optim, run.train.batch_size))
    brief = copy.copy(data)  # the trainer follows a loss that nobody reads here: one batch of it
    brief.val_batches = lambda rows: islice(data.val_batches(rows), 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, brief, run.train, run.optim, Path(folder))
        trainer.fit()
        (weights,) = Path(folder).glob("step-*/model.safetensors")
        stored = weights.stat().st_size
    with trainer.autocast():
        scores = run.score(model.eval(), data)
    accuracy = next(value for name, value in scores.items() if name.startswith("accuracy"))
    seconds = time.process_time() - begun
    return {"accuracy": accuracy, "trained": trained, "peak_bytes": peak, "stored_bytes": stored,
            "seconds": seconds}  # fmt: skip


def ask(opened: OpenRun, data: TaskData, shots: int) -> Row:
    """Zero-shot or few-shot: nothing is trained."""
    begun = time.process_time()
    accuracy = score_untrained(opened, data, shots)["accuracy"]
    seconds = time.process_time() - begun
    return {"accuracy": accuracy, "trained": 0, "peak_bytes": 0, "stored_bytes": 0,
            "seconds": seconds}  # fmt: skip


# ---- all of them --------------------------------------------------------------------------------


def measure_all(options: Options, opened: OpenRun, out: Path) -> Iterator[Row]:
    """A row of each method, number of labels and seed, as it is there."""
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {json.dumps(row["what"]): row for row in map(json.loads, lines)}
    base = adapt.base_hash(opened.model)
    asked = opened.run.UNTRAINED
    for seed in range(options.seeds):
        for labels in options.labels:
            for method in (*asked, *options.methods):
                if method in asked and labels != options.labels[0]:
                    continue  # it does not learn from labels
                if method == "zero-shot" and seed:
                    continue
                trained = method if method in options.methods else "head"
                run = run_of(options, opened, trained, labels, seed)
                recipe = json.dumps(asdict(run.data if method in asked else run)) + base
                recipe = hashlib.sha256(recipe.encode()).hexdigest()[:16]
                what = [method, labels, seed, run.data.path, recipe]
                if (key := json.dumps(what)) not in known:
                    if method in asked:
                        row = ask(opened, run.open_data(), 4 if method == "few-shot" else 0)
                    else:
                        row = train_one(run, opened)
                    known[key] = {"what": what, "method": method, "labels": labels, **row}
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(known[key]) + "\n")
                yield known[key]


def to_table(rows: list[Row], labels: tuple[int, ...]) -> str:
    """A line for each method: its costs, and its median accuracy, with the range, by labels."""
    heads = [f"{n or 'all'} labels" for n in labels]
    lines = [f"{'':13}{'trained':>10}{'step':>10}{'to keep':>10}{'CPU s':>7}"
             + "".join(f"{head:>22}" for head in heads)]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        last = [row for row in own if row["labels"] == own[-1]["labels"]]
        cells = [
            f"{last[0]['trained']:>10,}", f"{last[0]['peak_bytes'] / 1e6:>7.1f} MB",
            f"{last[0]['stored_bytes'] / 1e6:>7.2f} MB",
            f"{statistics.median(row['seconds'] for row in last):>7.0f}",
        ]  # fmt: skip
        for n in labels:
            found = [100 * row["accuracy"] for row in own if row["labels"] == n]
            text = f"{statistics.median(found):.1f}" if found else ""
            text += f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""
            cells.append(f"{text:>22}")
        lines.append(f"{method:13}{''.join(cells)}")
    return "\n".join(lines)


def draw(rows: list[Row], labels: tuple[int, ...], title: str, path: Path) -> None:
    """Accuracy by number of labels, a line for each method, and the range of its seeds."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    places = range(len(labels))
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [
            [100 * row["accuracy"] for row in rows if (row["method"], row["labels"]) == (method, n)]
            for n in labels
        ]
        if not all(found):  # asked, not trained: the same for any number of labels
            value = statistics.median(found[0])
            axes.axhline(value, linestyle=":", color="0.4")
            axes.annotate(method, (len(labels) - 1, value), fontsize=8, ha="right", va="bottom")
            continue
        (line,) = axes.plot(places, [statistics.median(own) for own in found], "o-", label=method)
        axes.fill_between(places, [min(own) for own in found], [max(own) for own in found],
                          color=line.get_color(), alpha=0.15)  # fmt: skip
    axes.set_xticks(places, [f"{n or 'all'} labels" for n in labels])
    axes.set(ylabel="held-out examples right, %", title=title)
    axes.legend(fontsize=8)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int | str:
    """python -m tinyfm.adapt compare ...: the exit status, or the message of an error."""
    command, *arguments = sys.argv[1:] if arguments is None else arguments or [""]
    if command != "compare":
        return "usage: python -m tinyfm.adapt compare RUN ..."
    try:
        options = tyro.cli(Options, args=arguments, description=__doc__)
        if len(options.steps) != len(options.labels):
            counts = f"{len(options.steps)} --steps, {len(options.labels)} --labels"
            raise ValueError(f"{counts}: give as many of the one as of the other")
        opened = run_dir.open_base(options.run)
        for method in options.methods:  # an unknown one is told now
            run_of(options, opened, method, options.labels[0], 0)
        out = Path(options.out or f"runs/compare-{opened.run.family}")
        out.mkdir(parents=True, exist_ok=True)
        rows = list(measure_all(options, opened, out))
        print(to_table(rows, options.labels))
        draw(rows, options.labels, f"{rows[0]['what'][3]}, from {options.run}", out / "compare.png")
        print(out / "compare.png")
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
