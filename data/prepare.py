"""Prepare a text corpus of any size for training: clean it, drop duplicates, make it token ids.

    python data/prepare.py my-texts/ "part-*.parquet" --out data/cache/mine --workers 8
    python train.py gpt --data.path data/cache/mine

There are two passes. Between them lies the spool, a file with the documents that are kept, one
a line, as JSON. Worker processes do the costly work:

    1. rows -> batches of 1 MiB  ==workers==>  parse, filter, mask, MinHash  -> new? -> spool
    2. spool -> train a tokenizer on a sample; groups of 1 MiB  ==workers==>  token ids -> shards

The results of the workers arrive in the order of the input. Only the main process decides which
documents are duplicates, and only it writes. So the bytes of the result depend on the input and the
settings, not on the number of workers, nor on where they are: in this process, in others (jobs.py),
or with --cluster on many machines (cluster.py).

After a kill, the same command continues. All files are written by appending, in the folder
OUT.part. Every few batches, a journal records how many batches are done and how long each file is.
To continue, the files are cut back to these lengths, and the batches that are done are read again,
but not parsed. No document is lost or used twice, and the result has the same bytes as without a
kill. When all is complete, OUT.part is renamed to OUT.

The memory does not depend on the size of the input. It is that of a few batches per worker, and
that of the index which recognizes duplicates (--index-mb, see dedupe.py). A plain file of more
than 4 MiB is cut into several documents, at line ends. The spool takes as much disk space as the
text. Left out: the identification of languages.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

if not __package__:  # run as a script: import from the repository's root, not from data/
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
import tyro
from tqdm import tqdm

from data import cluster, dedupe, files, reading
from data.cleaning import batches, clean_batch
from data.filters import FILTERS, MASKS, OFF_BY_DEFAULT, Tally
from data.jobs import Journal, check_settings, in_processes
from data.report import Report, counted, named
from data.splits import SPLITS
from tinyfm import tokenizer as tokenizers
from tinyfm.batches import shards
from tinyfm.common import schema
from tinyfm.common.config import Address, DataPaths, Name, NewFolder
from tinyfm.common.console import run_command
from tinyfm.common.folders import hold, lock_beside
from tinyfm.common.options import parse

FORMAT = 2  # of the result; a folder with another number is not continued
COMMIT_EVERY = 16  # batches, or groups of the second pass
SPOOL = "documents.jsonl"  # the documents that are kept
KEYS = "documents.keys"  # their keys, by which duplicates are recognized
MEASURED_CHARS = 50_000_000  # of a text whose overlap is measured at once, by one process
MOST = {"workers": 1024, "sample_mb": 1 << 20, "index_mb": 1 << 20}  # larger numbers are errors
LATE = ("tokenizer", "vocab_size", "sample_mb", "val_fraction")  # settings of the second pass only
KINDS = ("sentencepiece", "sentencepiece-unigram", "bpe", "bytes")


@dataclass(frozen=True)
class PrepareConfig:
    """Settings: the text to read, what to keep of it, and how to turn it into tokens."""

    # text files (plain, .jsonl, .jsonl.zst, .parquet), folders, or globs in quotes
    paths: tyro.conf.Positional[DataPaths]
    out: NewFolder  # folder to make; train.py takes it as --data.path
    workers: int = os.cpu_count() or 1  # number of worker processes, without --cluster
    # cluster of Ray whose machines are to work: auto, or HOST:PORT of its head
    cluster: Address = ""
    field: Name = "text"  # JSON field, or column of a parquet file, that has the text
    # sentencepiece, sentencepiece-unigram, bpe, bytes, or a run or folder with a saved tokenizer
    tokenizer: Name = "sentencepiece"
    vocab_size: int = 4096  # number of tokens, if a tokenizer is trained
    sample_mb: int = 4  # megabytes of text, evenly spread, to train the tokenizer on
    # share of the documents held out, half for validation and half for test
    val_fraction: float = 0.01
    # quality rules that a document must pass, see filters.py; without names, none
    filters: tuple[Literal[tuple(FILTERS)], ...] = tuple(
        name for name in FILTERS if name not in OFF_BY_DEFAULT
    )
    # kinds of private data to replace by [email], [card] and so on; without names, none
    masks: tuple[Literal[tuple(MASKS)], ...] = tuple(MASKS)
    # duplicates to drop: exact copies, or also documents that are nearly equal
    dedupe: Literal["near", "exact", "none"] = "near"
    # MiB of memory to recognize duplicates; a million documents need about 40
    index_mb: int = 64

    def __post_init__(self):
        for name, most in MOST.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} {value}: it must be 1 to {most}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction}: it must be between 0 and 1")
        if not self.paths or not self.out:
            raise ValueError(
                "give at least one file or folder to read, and --out, a folder to make"
            )


def by_workers(config: PrepareConfig, work: Callable, items: Iterable) -> Iterator:
    """Yield work(item) for each item, in the order of the items. The workers do it."""
    if config.cluster:
        return cluster.in_tasks(work, items)
    return in_processes(work, items, config.workers)


# ---- first pass: rows -> the documents that are kept ---------------------------------------------


def read_seen(path: Path, index_mb: int, width: int) -> dedupe.Seen:
    """The index of the documents so far: made from the file of their keys, `width` each."""
    seen = dedupe.Seen(index_mb)
    if path.exists():
        with open(path, "rb") as file:
            while True:
                block = np.fromfile(file, "<u8", width << 12)
                if len(block) == 0:
                    break
                seen.add(block)
    return seen


def clean(config: PrepareConfig, paths: list[Path], left_out: Tally, journal: Journal) -> None:
    """The first pass: fill the spool. Raises ValueError if no document is left.

    left_out: counts of what was not even opened.
    """
    spool = journal.folder / SPOOL
    keys = journal.folder / KEYS

    # The state, as it was at the last commit.
    near = config.dedupe == "near"
    width = dedupe.KEYS if near else 1
    seen = read_seen(keys, config.index_mb, width)
    state = journal.state
    tally = Tally(**state["tally"]) if "tally" in state else left_out
    chars = state.get("chars", 0)

    # Clean the batches that are not done.
    work = partial(
        clean_batch, field=config.field, filters=config.filters, masks=config.masks, near=near
    )
    notes: Counter[str] = Counter()
    rest = islice(batches(paths, config.field, notes), state["done"], None)
    bar = tqdm(desc="reading", unit=" documents", initial=tally.found, leave=False, disable=None)
    for done, (counts, kept) in enumerate(by_workers(config, work, rest), state["done"] + 1):
        tally.add(counts)
        reasons = [None] * len(kept)
        if config.dedupe != "none" and kept:
            reasons = seen.add_new(np.stack([document.keys for document in kept]))
        with open(spool, "ab") as spool_file, open(keys, "ab") as keys_file:
            for document, reason in zip(kept, reasons):
                if reason:
                    tally.drop(reason, [document.name])
                    continue
                if config.dedupe != "none":
                    keys_file.write(document.keys.tobytes())
                tally.used += 1
                chars += document.chars
                spool_file.write(document.line)
        bar.update(counts.found)
        if done % COMMIT_EVERY == 0:
            journal.commit(done=done, tally=dataclasses.asdict(tally), chars=chars)
    bar.close()

    if not tally.used:
        shutil.rmtree(journal.folder)
        raise ValueError(
            f"no document of {', '.join(config.paths)} is left: {'; '.join(tally.lines())}"
        )
    for note, count in notes.items():
        tally.change(note, count)
    percent = round(100 * seen.lost(width), 1)
    if percent >= 0.1:
        tally.change(
            "% of new documents taken for duplicates at the end: raise --index-mb", percent
        )
    journal.commit(stage="learn", done=0, tally=dataclasses.asdict(tally), chars=chars)


# ---- second pass: documents -> token ids ---------------------------------------------------------


def open_tokenizer(config: PrepareConfig) -> tokenizers.Tokenizer | None:
    """The tokenizer that the config names, or None for a kind that must first be trained."""
    if config.tokenizer == "bytes":
        return tokenizers.ByteTokenizer()
    if config.tokenizer in KINDS:
        return None
    folder = Path(config.tokenizer)
    latest = folder / "latest"
    if latest.is_file():  # a run: its newest checkpoint has the tokenizer
        folder = folder / latest.read_text(encoding="utf-8").strip()
    elif (folder / "tokenizer").is_dir():  # a folder that this program made
        folder = folder / "tokenizer"
    if not folder.is_dir():
        kinds = ", ".join(KINDS)
        raise ValueError(f"--tokenizer {config.tokenizer!r} is no folder and no kind ({kinds})")
    return tokenizers.load(folder)


def encode(config: PrepareConfig, fixed: tokenizers.Tokenizer | None, journal: Journal) -> dict:
    """The second pass: train a tokenizer unless one is `fixed`, and write the shards.

    Returns their manifest.
    """
    folder = journal.folder
    state = journal.state
    tally = Tally(**state["tally"])

    def documents() -> Iterator[tuple[str, str]]:
        """(split, text) of the documents."""
        return shards.split_documents(
            folder / SPOOL, tally.used, state["chars"], config.val_fraction
        )

    # The tokenizer.
    if state["stage"] == "learn":
        tokenizer = fixed
        if tokenizer is None:
            texts = (text for split, text in documents() if split == "train")
            sample_bytes = config.sample_mb * 1_000_000
            tokenizer = tokenizers.train(config.tokenizer, texts, config.vocab_size, sample_bytes)
        tokenizer.save(folder / "tokenizer")
        journal.commit(stage="encode", manifest=shards.begin_manifest())
    tokenizer = tokenizers.load(folder / "tokenizer")

    # The groups that are not done.
    manifest = state["manifest"]
    work = partial(shards.encode_group, tokenizer)
    rest = islice(shards.groups(documents()), state["done"], None)
    bar = tqdm(desc="encoding", total=state["chars"], unit_scale=True, leave=False, disable=None)
    bar.update(sum(manifest["utf8_bytes"].values()))
    for done, encoded in enumerate(by_workers(config, work, rest), state["done"] + 1):
        shards.add_group(folder, encoded, tokenizer.vocab_size, manifest)
        bar.update(encoded.chars)
        if done % COMMIT_EVERY == 0:
            journal.commit(done=done, manifest=manifest)
    bar.close()

    written = sum(manifest["documents"].values())
    if written < tally.used:
        problem = f"{folder} has {written:,} of {counted(tally.used, 'documents')} that were kept"
        raise ValueError(f"{problem}: delete the folder and start again")
    manifest["settings"] = state["settings"]
    if state["chars"] <= MEASURED_CHARS:
        manifest["overlap"], _ = shards.measure_overlap(documents, whole=False)
    shards.end_shards(folder, tokenizer, manifest, "; ".join(tally.lines()))
    return manifest


# ---- what a journal may say ----------------------------------------------------------------------


class Cleaning(TypedDict):
    """The state in the first pass."""

    settings: dict[str, Any]
    done: int


class TallyState(TypedDict):
    """A Tally in a journal."""

    found: int
    used: int
    dropped: dict[str, tuple[int, list[str]]]
    changed: dict[str, float]


class Learning(Cleaning):
    """The state after the first pass."""

    tally: TallyState
    chars: int


class Begun(TypedDict):
    """The counts of a manifest that is not complete."""

    format: int
    documents: shards.Counts
    utf8_bytes: shards.Counts


class Encoding(Learning):
    """The state in the second pass."""

    manifest: Begun


STAGES = {"clean": Cleaning, "learn": Learning, "encode": Encoding}


def check_journal(journal: Journal) -> None:
    """Raise ValueError that names the file if a journal that was read is malformed."""
    where = str(journal.path)
    stage = schema.check(journal.state["stage"], Literal[tuple(STAGES)], f"{where}: stage")
    kind = STAGES[stage]
    if stage == "clean" and "tally" in journal.state:
        kind = Learning
    schema.check(journal.state, kind, where)


# ---- both passes ---------------------------------------------------------------------------------


def find_paths(config: PrepareConfig) -> tuple[list[Path], Tally]:
    """The files to read, each once, and counts of what is left out.

    The files in the folder that is being made are left out silently.
    """
    report = Report()
    found = dict.fromkeys(path for name in config.paths for path in reading.find(name, report))
    out = Path(config.out).resolve()
    own = {out, out.with_name(f"{out.name}.part")}
    paths = [path for path in found if not own & {*path.resolve().parents}]
    files.check_libraries(paths)
    tally = Tally(found=report.found)
    for reason, names in report.skipped.items():
        tally.drop(reason, names, len(names))
    plain = files.plain_tables(paths, config.field)
    if plain:
        what = named(len(plain), "tables")
        tally.change(f"{what} without {config.field!r}, read as plain text", len(plain))
    return paths, tally


def settings_of(
    config: PrepareConfig, paths: list[Path], fixed: tokenizers.Tokenizer | None
) -> dict:
    """Everything that the result depends on, in the types that JSON has."""
    settings = {"format": FORMAT, "files": reading.fingerprint(paths)} | dataclasses.asdict(config)
    for name in ("paths", "out", "workers", "cluster"):
        del settings[name]
    if fixed:
        del settings["vocab_size"], settings["sample_mb"]
        settings["tokenizer"] = fixed.fingerprint()
    return json.loads(json.dumps(settings))


def prepare(config: PrepareConfig) -> Path:
    """Make the folder `config.out`, or complete it; return it.

    Raises ValueError if the input or a setting cannot be used, or another process makes the folder.
    """
    start = time.perf_counter()
    out = Path(config.out)
    paths, left_out = find_paths(config)
    fixed = open_tokenizer(config)
    settings = settings_of(config, paths, fixed)
    out.parent.mkdir(parents=True, exist_ok=True)
    workers = cluster.connected(config.cluster) if config.cluster else nullcontext()
    with workers, hold(lock_beside(out), out):
        manifest = complete(config, paths, left_out, fixed, settings)

    tokens = sum(shard["tokens"] for split in SPLITS for shard in manifest[split])
    megabytes = sum(manifest["utf8_bytes"].values()) / 1e6
    seconds = time.perf_counter() - start
    print(f"{out}: {megabytes:.1f} MB of text, {counted(tokens, 'tokens')}, {seconds:.1f} s")
    print("  " + "\n  ".join(manifest["report"].split("; ")))
    if "overlap" in manifest:
        print(f"  {shards.describe_overlap(manifest, removed=0)}")
    else:
        print(f"  what training has of the held-out text: python -m tinyfm.evaluate overlap {out}")
    return out


def complete(
    config: PrepareConfig,
    paths: list[Path],
    left_out: Tally,
    fixed: tokenizers.Tokenizer | None,
    settings: dict,
) -> dict:
    """Make the folder, or what is left of it to make; return its manifest."""
    out = Path(config.out)
    if out.exists() and not (out / "manifest.json").exists():
        raise ValueError(f"{out} was not made by this program: choose another --out")
    if out.exists():
        manifest = shards.read_manifest(out)
        check_settings(out, manifest.get("settings", {}), settings)
    else:
        part = out.with_name(f"{out.name}.part")
        journal = Journal(part, settings, LATE)
        check_journal(journal)
        if journal.state["stage"] == "clean":
            clean(config, paths, left_out, journal)
        manifest = encode(config, fixed, journal)
        os.replace(part, out)
    for name in (SPOOL, KEYS, "journal.json"):
        (out / name).unlink(missing_ok=True)
    return manifest


def main() -> int | str:
    try:
        prepare(parse(PrepareConfig, __doc__, "python data/prepare.py"))
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except MemoryError:
        return "error: too little memory; use a smaller --index-mb, or fewer --workers"
    except KeyboardInterrupt:
        return "stopped; run the same command again to continue"
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, lasting=True))
