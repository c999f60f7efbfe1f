"""One GPT for all modalities, or one for each? Bits per byte at equal tokens of each modality.

    python benchmarks/together.py [--of molecules tunes ...] [--seeds 3] [--steps 500] [--record]

Each modality (data/modality.py) gives the same number of training bytes, documents in the order of
a hash. A GPT learns from each of these texts alone, in --steps steps; another one, of the same
size, from all M texts mixed, in M times as many. So both have read as much of each modality. They
are compared on its test documents. A difference above 0 says that the others were in the way, one
below 0 that they helped. Its interval is that of the median seed, over documents.

The sources name the packages that they need. Runs are kept in --work, and what is there already is
not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.encoder import train
from benchmarks.timing import describe_machine, record
from data.report import Report
from data.splits import SPLITS, TRAIN, Document, number_of, split_of
from tinyfm.batches.shards import build
from tinyfm.batches.text import MODALITIES, TextData
from tinyfm.evaluate import likelihood
from tinyfm.evaluate.metrics import Measured, ratio_of_sums
from tinyfm.recipes import run_dir
from tinyfm.tokenizer import ByteTokenizer

HELD_OUT_SHARE = 0.1  # of sources that leave the split to a hash
HELD_OUT_BYTES = 200_000  # of validation and of test, of each modality, at most
ROWS = 16  # of a batch that is scored
Texts = dict[str, list[str]]  # of each split


# ---- texts --------------------------------------------------------------------------------------


def read(documents: Iterable[Document]) -> Texts:
    """The documents of each split, in the order of their hashes."""
    found: Texts = {split: [] for split in SPLITS}
    for document in documents:
        split = document.split or split_of(document.name or document.text, HELD_OUT_SHARE)
        found[split].append(document.text)
    return {split: sorted(texts, key=number_of) for split, texts in found.items()}


def count_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def first_bytes(texts: list[str], most: int) -> list[str]:
    """The first documents, as many as have at most so many bytes, and at least one."""
    sizes = np.cumsum([len(text.encode("utf-8")) for text in texts])
    return texts[: max(1, int(np.searchsorted(sizes, most, side="right")))]


def share_out(sources: dict[str, Texts], most: int) -> dict[str, Texts]:
    """The same number of training bytes of each source: `most`, or those of the smallest one."""
    most = min(most, *(count_bytes(texts[TRAIN]) for texts in sources.values()))
    limits = {split: most if split == TRAIN else HELD_OUT_BYTES for split in SPLITS}
    return {
        name: {split: first_bytes(texts[split], limits[split]) for split in SPLITS}
        for name, texts in sources.items()
    }


def mix(sources: dict[str, Texts]) -> Texts:
    """The documents of all sources, in the order of their hashes."""
    return {
        split: sorted((text for own in sources.values() for text in own[split]), key=number_of)
        for split in SPLITS
    }


def prepare(folder: Path, texts: Texts) -> str:
    """A folder with the shards of these texts, a byte a token; built if it does not exist."""
    if not folder.exists():
        documents = (Document(text, split) for split in SPLITS for text in texts[split])
        build(folder, documents, Report(), lambda _: ByteTokenizer(), 0.0, has_words=False)
    return str(folder.resolve())


# ---- runs and measures --------------------------------------------------------------------------


@torch.inference_mode()
def bits_by_document(run: Path, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """(bits, bytes) of each test document that a run predicts."""
    opened = run_dir.open_run(str(run))
    config = opened.model.config
    data = TextData(Path(folder), config.vocab_size, config.context_length, ROWS, seed=0)
    nats = likelihood.score_targets(opened.model, data.split_batches("test", ROWS))
    split = data.split("test")
    return np.add.reduceat(nats, split.starts) / math.log(2), split.bytes


def train_and_compare(work: Path, names: list[str], options, more: list[str]) -> dict:
    """{modality: of each seed (bits per byte alone, together, the difference with its interval)}"""
    sources = {name: read(MODALITIES[name].documents(report=Report())) for name in names}
    texts = share_out(sources, options.bytes)
    folders = {name: prepare(work / f"text-{name}", texts[name]) for name in names}
    together = prepare(work / "text-together", mix(texts))
    found: dict[str, list[tuple[float, float, Measured]]] = {name: [] for name in names}
    for seed in map(str, range(options.seeds)):
        common = ["tunes", "--train.seed", seed, "--train.eval-every", "0", *more]
        steps = str(len(names) * options.steps)
        words = [*common, "--data.path", together, "--train.steps", steps]
        all_of_them = train(work / f"together-{seed}", *words)
        for name in names:
            words = [*common, "--data.path", folders[name], "--train.steps", str(options.steps)]
            alone, size = bits_by_document(train(work / f"{name}-{seed}", *words), folders[name])
            joint, _ = bits_by_document(all_of_them, folders[name])
            means = [float(bits.sum() / size.sum()) for bits in (alone, joint)]
            found[name].append((*means, ratio_of_sums(joint - alone, size, "documents")))
    return found


def table(found: dict[str, list[tuple[float, float, Measured]]]) -> str:
    lines = [
        "| modality | alone, bits per byte of test | together | difference | 95% interval |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in found.items():
        alone, together, differences = zip(*seeds)
        middle = differences[differences.index(statistics.median_low(differences))]
        cells = [", ".join(f"{value:.3f}" for value in values) for values in (alone, together)]
        cells.append(", ".join(f"{value:+.3f}" for value in differences))
        cells.append(f"{middle.low:+.3f} to {middle.high:+.3f} ({middle.about})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    # Samples of sounds have tokens of their own; the others share the bytes.
    names = [name for name, source in MODALITIES.items() if not source.MODALITY.alphabet]
    add("--of", nargs="+", choices=names, default=names, help="modalities")
    add("--seeds", type=int, default=3, help="number of seeds")
    add("--steps", type=int, default=500, help="of training on one modality, 2048 tokens each")
    add("--bytes", type=int, default=1_000_000, help="training bytes of each modality, at most")
    add("--work", default="runs/together", help="folder of texts and runs")
    add("--record", action="store_true", help="write the table into README.md")
    options, more = parser.parse_known_args()
    if len(set(options.of)) < 2:
        parser.error("name at least two modalities")
    if min(options.seeds, options.steps, options.bytes) < 1:
        parser.error("use at least 1")
    found = train_and_compare(Path(options.work), options.of, options, more)
    steps = f"{options.steps} steps alone, {len(options.of) * options.steps} together"
    text = f"{describe_machine()}; {steps}\n\n{table(found)}\n"
    print(text)
    if options.record:
        record("together", text)


if __name__ == "__main__":
    main()
