"""Measure encoder-decoders: pronunciation, translation, and how fast they train.

    python benchmarks/seq2seq.py words [--steps N] [--seeds 3]
    python benchmarks/seq2seq.py translation [--steps N] [--seeds 3]
    python benchmarks/seq2seq.py speed [--rows 64]

words: the preset is trained with each seed, for its own number of steps or for N, and pronounces
all test words of the CMU dictionary, without stress. A word is wrong unless it is one of its
pronunciations; so the published figures count, too. They are of another version and another random
split of the same dictionary, and their systems were trained until they got no better. Further
options are those of train.py, for a larger model: --model.d-model 512.

translation: the same on English strings of programs and their German translation. Beside it stands
what needs no model: the translation of the training string that is most like the test string, by
chrF. On a machine whose system has no German catalogues, the data are those of the packages.

speed: training steps with T5-small's shape, of transformers' T5ForConditionalGeneration and of the
same model here, by turns, in float32 and bfloat16, with AdamW. Rows are strings and translations of
unequal length, filled up to the longest one, the same on both sides. The tokens that count are real
ones. What differs: transformers computes padding.

Runs are kept in --work, and what is there already is not run again. --record also writes the table
into README.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.encoder import train
from benchmarks.results import measure
from benchmarks.timing import by_turns, describe_machine, record, training_step
from data.splits import TEST, TRAIN, VAL
from tinyfm.batches.text_pairs import TextPairConfig, TextPairData, collate
from tinyfm.common.device import keep_freed_memory
from tinyfm.evaluate.metrics import count_ngrams
from tinyfm.recipes.seq2seq import guess_scores
from tinyfm.seq2seq import Seq2Seq, Seq2SeqConfig
from tinyfm.training.log import METRICS, read_metrics

BEAMS = 4
PUBLISHED = {  # of cmusphinx/g2p-seq2seq, README: share of words wrong, CMUdict without stress
    "published: a Transformer, 2 layers of 256": "about 31",
    "published: a WFST (Phonetisaurus)": "33.9",
}
TRANSLATION = (
    *("--data.path", "translation", "--data.language", "de"),
    *("--model.vocab-size", "4096", "--model.context-length", "128", "--train.steps", "1500"),
)


# ---- trained models ------------------------------------------------------------------------------


def train_seeds(work: Path, what: str, options: argparse.Namespace, more: list[str]) -> list[Path]:
    """A run of each seed."""
    common = ["seq2seq", *more, "--train.eval-every", "0"]
    if options.steps:
        common += ["--train.steps", str(options.steps)]
    return [
        train(work / f"{what}-{seed}", *common, "--train.seed", str(seed))
        for seed in range(options.seeds)
    ]


def took(runs: list[Path]) -> str:
    """How long training was: "4,000 steps each, in 10.1 to 10.4 minutes"."""
    logs = [read_metrics(run / METRICS) for run in runs]
    minutes = sorted((rows[-1]["time"] - rows[0]["time"]) / 60 for rows in logs)
    return f"{logs[0][-1]['step']:,} steps each, in {minutes[0]:.1f} to {minutes[-1]:.1f} minutes"


def cell(found: list[dict], name: str, factor: float, digits: int = 1) -> str:
    """A measure of all seeds, and the interval of the median one: "31.2, 31.5 (30.4 to 32.0)"."""
    values = [each["scores"][name]["reached"] for each in found]
    middle = found[values.index(statistics.median_low(values))]
    interval = middle["intervals"][name]["reached"]
    values += [interval["low"], interval["high"]]
    *shown, low, high = [f"{factor * value:.{digits}f}" for value in values]
    return f"{', '.join(shown)} ({low} to {high})"


def rows_of(runs: list[Path], names: tuple[str, ...]) -> tuple[list[str], str]:
    """Rows of a table: the measures of the runs, greedily and with BEAMS; and what was counted."""
    lines = []
    about = ""
    for label, words in (("greedy", []), (f"{BEAMS} beams", ["--beams", str(BEAMS)])):
        found = [measure(str(run), words) for run in runs]
        cells = " | ".join(cell(found, name, 100) for name in names)
        lines.append(f"| seq2seq, {label} | {cells} |")
        about = found[0]["intervals"][names[0]]["reached"]["of"]
    return lines, about


def compare_words(options: argparse.Namespace, more: list[str]) -> str:
    """The table of words and phones that are wrong."""
    runs = train_seeds(Path(options.work), "words", options, more)
    lines, about = rows_of(runs, ("test_words_wrong", "test_phones_wrong"))
    lines += [f"| {name} | {value} |  |" for name, value in PUBLISHED.items()]
    head = ["| on test, wrong, in % | words | phones |", "|---|---|---|"]
    return "\n".join([f"{took(runs)}; {about} of test\n", *head, *lines]) + "\n"


# ---- translation without a model -----------------------------------------------------------------


def nearest(sources: list[str], known: list[str]) -> list[int]:
    """The number of the most like known text for each source, by shared runs of three letters.

    Like: the cosine between the counts of these runs, weighted by ln(n / texts that have it).
    """
    there: dict[str, list[tuple[int, int]]] = {}  # run -> texts that have it, and how often
    for number, text in enumerate(known):
        for run, count in count_ngrams(text.lower(), 3).items():
            there.setdefault(run, []).append((number, count))
    places = {run: np.array(texts).T for run, texts in there.items()}  # (2, n) each
    weights = {run: math.log(len(known) / len(texts)) for run, texts in there.items()}
    squares = np.zeros(len(known))
    for run, (numbers, counts) in places.items():
        squares[numbers] += (weights[run] * counts) ** 2
    norms = np.sqrt(squares) + 1e-9
    found = []
    for source in sources:
        likeness = np.zeros(len(known))
        for run, count in count_ngrams(source.lower(), 3).items():
            if run in places:
                numbers, counts = places[run]
                likeness[numbers] += weights[run] ** 2 * count * counts
        found.append(int((likeness / norms).argmax()))
    return found


def baseline(data: TextPairData) -> dict:
    """The translations of the nearest training strings, measured, in the form of `measure`."""
    training, test = data.splits[TRAIN].pairs, data.splits[TEST].pairs
    numbers = nearest([pair.source for pair in test], [pair.source for pair in training])
    guesses = [training[number].targets[0] for number in numbers]
    scores = guess_scores("translation", guesses, [pair.targets for pair in test])
    return {
        "scores": {f"test_{name}": {"reached": float(value)} for name, value in scores.items()},
        "intervals": {
            f"test_{name}": {"reached": {"low": value.low, "high": value.high}}
            for name, value in scores.items()
        },
    }


def compare_translation(options: argparse.Namespace, more: list[str]) -> str:
    """The table of exact matches and chrF."""
    runs = train_seeds(Path(options.work), "translation", options, [*TRANSLATION, *more])
    names = ("test_exact", "test_chrf")
    lines, about = rows_of(runs, names)
    data = open_strings(Seq2SeqConfig(vocab_size=4096, context_length=128), 1)
    cells = " | ".join(cell([baseline(data)], name, 100) for name in names)
    lines.append(f"| the nearest training string's | {cells} |")
    head = ["| English to German, on test | exact, % | chrF, of 100 |", "|---|---|---|"]
    about = f"{took(runs)}; {about} of test; {data.description}\n"
    return "\n".join([about, *head, *lines]) + "\n"


# ---- speed ---------------------------------------------------------------------------------------


def open_strings(model: Seq2SeqConfig, batch_size: int) -> TextPairData:
    """English and German strings."""
    return TextPairData.prepare(TextPairConfig("translation"), model, batch_size, seed=0)


def compare_speed(options: argparse.Namespace) -> str:
    """The table of tokens per second and ratios."""
    from transformers import T5Config, T5ForConditionalGeneration

    layers, width, heads, context = options.layers, options.width, options.heads, options.context
    config = Seq2SeqConfig(
        vocab_size=options.vocabulary, context_length=context, n_layer=layers, n_head=heads,
        d_model=width, d_ff=4 * width, mlp="relu", tied=True, logit_scale=0, zero_init=False,
        label_smoothing=0, dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = Seq2Seq(config).train()
    theirs = T5ForConditionalGeneration(
        T5Config(
            vocab_size=options.vocabulary, d_model=width, d_kv=width // heads, d_ff=4 * width,
            num_layers=layers, num_heads=heads, dropout_rate=0.1,
            decoder_start_token_id=0, pad_token_id=0,
        )
    ).train()  # fmt: skip
    small = SimpleNamespace(vocab_size=4096, context_length=context, start_id=0, end_id=1)
    data = open_strings(small, options.rows)
    own = data.splits[VAL]
    order = np.random.default_rng(0).permutation(len(own.pairs))
    in_batch = {
        "any rows": order[: options.rows],
        "rows of like length": np.array(
            sorted(order[: 8 * options.rows], key=lambda i: len(own.sources[i]))
        )[4 * options.rows :][: options.rows],
    }
    lines = [
        "| format | rows | model | real tokens/s | times transformers |",
        "|---|---|---|---|---|",
    ]
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        for reads, rows in in_batch.items():
            batch = collate(
                [own.sources[i] for i in rows], [own.targets[i][0] for i in rows], start=0
            )
            labels = {
                "input_ids": batch["source"],
                "attention_mask": batch["mask"].long(),
                "labels": batch["targets"],
            }
            real = int(batch["mask"].sum() + (batch["targets"] >= 0).sum())
            share = real / (batch["mask"].numel() + batch["targets"].numel())
            if dtype == torch.float32:
                shares.append(f"of {reads} {share:.0%} of the tokens are real")
            works = {}
            for name, model, loss_of in (
                ("transformers", theirs, lambda labels=labels: theirs(**labels).loss),
                ("tinyfm", ours, lambda batch=batch: ours.loss(batch)[0]),
            ):
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
                works[name] = training_step(loss_of, [optimizer], dtype)
            seconds = by_turns(works, options.repeats)
            kind = str(dtype).removeprefix("torch.")
            for name, each in seconds.items():
                ratio = seconds["transformers"] / each
                lines.append(f"| {kind} | {reads} | {name} | {real / each:,.0f} | {ratio:.2f} |")
    return f"{options.rows} rows; {'; '.join(shares)}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("words", "translation", "speed"))
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--work", default="runs/seq2seq-benchmark", help="folder of the runs")
    parser.add_argument("--rows", type=int, default=64, help="speed: pairs in a batch")
    parser.add_argument("--context", type=int, default=128, help="speed: longest row")
    parser.add_argument("--layers", type=int, default=6, help="speed: layers")
    parser.add_argument("--width", type=int, default=512, help="speed: width of the states")
    parser.add_argument("--heads", type=int, default=8, help="speed: heads")
    parser.add_argument("--vocabulary", type=int, default=32_128, help="speed: number of tokens")
    parser.add_argument("--repeats", type=int, default=5, help="speed: number of timed rounds")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    options, more = parser.parse_known_args()
    keep_freed_memory()
    if options.what == "words":
        table = compare_words(options, more)
    elif options.what == "translation":
        table = compare_translation(options, more)
    else:
        table = compare_speed(options)
    text = f"{describe_machine()}\n\n{table}"
    print(text)
    if options.record:
        record(f"seq2seq {options.what}", text)


if __name__ == "__main__":
    main()
