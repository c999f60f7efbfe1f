"""Text of any size -> shards to train on, in many processes, and on again after a kill.

    python data/prepare.py my-texts/ "part-*.parquet" --out data/cache/mine --workers 8
    python train.py gpt --data.path data/cache/mine

Two passes; a spool, the kept documents as lines of JSON, lies between them:

    rows -> batches of 1 MiB  ==workers==>  parse, filter, mask, MinHash  -> seen before? -> spool
    spool -> a tokenizer from a sample -> groups of 1 MiB  ==workers==>  token ids -> shards

The workers' results come back in the order of the input, and only this process decides what is a
duplicate and writes. So the bytes depend on the input and the settings, not on the workers.

After a kill: everything is written by appending, in OUT.part. Every few batches a journal, replaced
whole, says how many batches are done and how long each file was then. The same command cuts the
files back to that, reads over the batches that are done without parsing them, and goes on. So no
document is lost or taken twice, and the bytes are those of a run without a kill. OUT appears when
it is complete.

Memory does not depend on the input: a batch or two for each worker, and --index-mb for what has
been seen (see dedupe.py). A plain file of more than 4 MiB is cut at line ends into documents.
The spool takes as much disk as the text. Left out: several machines, and languages told apart.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

if not __package__:  # as a script: look for modules in the repository, not beside this file
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
import tyro
from tqdm import tqdm

from data import dedupe, files
from data.filters import FILTERS, MASKS, Tally, failed, mask
from data.jobs import Journal, check_settings, ordered
from tinyfm import tokenizer as tokenizers
from tinyfm.batches import shards

FORMAT = 1  # of the result: with another number a folder is not gone on with
BATCH_BYTES, DOCUMENT_BYTES = 1 << 20, 1 << 22
COMMIT_EVERY = 16  # batches, or groups of tokens
SPOOL, KEYS = "documents.jsonl", "documents.keys"  # what is kept, and how to know it again
CONTINUATION = bytes(range(0x80, 0xC0))  # of a letter of several bytes in UTF-8
LATE = ("tokenizer", "vocab_size", "sample_mb", "val_fraction")  # settings of the second pass alone
KINDS = ("sentencepiece", "sentencepiece-unigram", "bpe", "bytes")


@dataclass(frozen=True)
class PrepareConfig:
    """Which text to read, what to keep of it, and how it becomes tokens."""

    paths: tyro.conf.Positional[tuple[str, ...]]  # files, folders, or "globs"
    out: str  # folder to make; --data.path takes it
    workers: int = os.cpu_count() or 1  # processes
    field: str = "text"  # which field of JSON, or column of parquet, is the text
    tokenizer: str = "sentencepiece"  # a kind, or a folder with a saved tokenizer, or a run
    vocab_size: int = 4096  # of a tokenizer that learns from the text
    sample_mb: int = 4  # how much of the text, evenly spread, it learns from
    val_fraction: float = 0.01  # share of the documents held out for validation
    # quality rules that a document must pass, see filters.py; stop-words is another, for English
    filters: tuple[Literal[tuple(FILTERS)], ...] = tuple(FILTERS)[:-1]
    masks: tuple[Literal[tuple(MASKS)], ...] = tuple(MASKS)  # private data
    dedupe: Literal["near", "exact", "none"] = "near"  # which duplicates to drop
    index_mb: int = 64  # memory for what was seen: a million documents need about 40

    def __post_init__(self):
        for name in ("workers", "sample_mb", "index_mb"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} {getattr(self, name)}: it must be at least 1")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction}: it must be between 0 and 1")
        if not self.paths or not self.out:
            raise ValueError(
                "give at least one file or folder to read, and --out, a folder to make"
            )


# ---- first pass: rows -> documents that are kept -------------------------------------------------


def plain_rows(path: Path) -> Iterator[files.Row]:
    """A plain file, in pieces of at most DOCUMENT_BYTES that end at a line's end if they can."""
    with open(path, "rb") as file:
        start, rest = 0, b""
        while piece := rest + file.read(DOCUMENT_BYTES - len(rest)):
            cut = len(piece)
            if cut == DOCUMENT_BYTES:
                letter = max(cut - 4, len(piece.rstrip(CONTINUATION)) - 1)  # not within one
                cut = piece.rfind(b"\n") + 1 or piece.rfind(b" ") + 1 or letter
            name = f"{path.as_posix()}, from byte {start}" if start else path.as_posix()
            yield files.Row(name, "text", piece[:cut])
            if b"\0" in piece[: files.HEAD_BYTES]:
                return  # no text; do not read on in a film
            start, rest = start + cut, piece[cut:]


def batches(paths: list[Path], field: str) -> Iterator[list[files.Row]]:
    """The rows of all files, about BATCH_BYTES at a time."""
    batch, size = [], 0
    for path in paths:
        table = files.is_table(path)
        for row in files.rows(path, field) if table else files.to_the_end(path, plain_rows(path)):
            batch.append(row)
            size += len(row.content) + 100  # a row that is almost empty costs something too
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class Kept(NamedTuple):
    """A document that passed all filters."""

    name: str
    line: bytes  # of the spool
    chars: int
    keys: np.ndarray  # by which a duplicate is known


class Clean(NamedTuple):
    """What a worker does with a batch."""

    field: str
    filters: tuple[str, ...]
    masks: tuple[str, ...]
    near: bool

    def __call__(self, batch: list[files.Row]) -> tuple[Tally, list[Kept]]:
        tally, kept = Tally(found=len(batch)), []
        for row in batch:
            try:
                text, replaced = files.parse(row, self.field)
            except ValueError as error:
                tally.drop(str(error), [row.name])
                continue
            if replaced:
                tally.change("with invalid bytes replaced")
            if reason := failed(text, self.filters):
                tally.drop(reason, [row.name])
                continue
            for name in self.masks:
                text, count = mask(text, name)
                if count:
                    tally.change(f"[{name}] masked", count)
            line = json.dumps(text, ensure_ascii=False).encode("utf-8") + b"\n"
            kept.append(Kept(row.name, line, len(text), dedupe.keys_of(text, self.near)))
        return tally, kept


def clean(config: PrepareConfig, paths: list[Path], journal: Journal) -> None:
    """The first pass: fill the spool. Raises ValueError if no document is left."""
    spool, keys = journal.folder / SPOOL, journal.folder / KEYS
    near, state, seen = config.dedupe == "near", journal.state, dedupe.Seen(config.index_mb)
    width = dedupe.KEYS if near else 1
    if keys.exists():
        with open(keys, "rb") as file:
            while len(block := np.fromfile(file, "<u8", width << 12)):
                seen.add(block)
    tally, chars = Tally(**state.get("tally", {})), state.get("chars", 0)
    rest = islice(batches(paths, config.field), state["done"], None)
    work = Clean(config.field, config.filters, config.masks, near)
    bar = tqdm(desc="reading", unit=" documents", initial=tally.found, leave=False, disable=None)
    for done, (counts, kept) in enumerate(ordered(work, rest, config.workers), state["done"] + 1):
        tally.add(counts)
        with open(spool, "ab") as lines, open(keys, "ab") as own:
            for document in kept:
                if config.dedupe != "none":
                    if reason := seen.find(document.keys):
                        tally.drop(reason, [document.name])
                        continue
                    seen.add(document.keys)
                    own.write(document.keys.tobytes())
                tally.used, chars = tally.used + 1, chars + document.chars
                lines.write(document.line)
        bar.update(counts.found)
        if done % COMMIT_EVERY == 0:
            journal.commit(done=done, tally=dataclasses.asdict(tally), chars=chars)
    bar.close()
    if not tally.used:
        shutil.rmtree(journal.folder)
        raise ValueError(
            f"no document of {', '.join(config.paths)} is left: {'; '.join(tally.lines())}"
        )
    if (percent := round(100 * seen.lost(width), 1)) >= 0.1:
        tally.change(
            "% of new documents taken for duplicates at the end: raise --index-mb", percent
        )
    journal.commit(stage="learn", done=0, tally=dataclasses.asdict(tally), chars=chars)


# ---- second pass: documents -> token ids ---------------------------------------------------------


def open_tokenizer(config: PrepareConfig) -> tokenizers.Tokenizer | None:
    """The tokenizer that the config names; None if it is a kind that learns from the text."""
    folder = Path(config.tokenizer)
    if config.tokenizer in KINDS:
        return tokenizers.train("bytes", [], 257) if config.tokenizer == "bytes" else None
    if (latest := folder / "latest").is_file():  # a run: its newest checkpoint has it
        folder = folder / latest.read_text(encoding="utf-8").strip()
    elif (folder / "tokenizer").is_dir():  # made by this program
        folder = folder / "tokenizer"
    if not folder.is_dir():
        kinds = ", ".join(KINDS)
        raise ValueError(f"--tokenizer {config.tokenizer!r} is no folder and no kind ({kinds})")
    return tokenizers.load(folder)


def encode(config: PrepareConfig, fixed: tokenizers.Tokenizer | None, journal: Journal) -> dict:
    """The second pass: a tokenizer, the shards and their manifest, which is returned."""
    folder, state = journal.folder, journal.state
    tally = Tally(**state["tally"])
    splits = (folder / SPOOL, tally.used, state["chars"], config.val_fraction)
    if state["stage"] == "learn":
        texts = (text for split, text in shards.split_documents(*splits) if split == "train")
        learn = partial(tokenizers.train, config.tokenizer, texts, config.vocab_size)
        (fixed or learn(config.sample_mb * 1_000_000)).save(folder / "tokenizer")
        journal.commit(stage="encode", manifest=shards.begin_manifest())
    tokenizer, manifest = tokenizers.load(folder / "tokenizer"), state["manifest"]
    rest = islice(shards.groups(shards.split_documents(*splits)), state["done"], None)
    work = partial(shards.encode_group, tokenizer)
    bar = tqdm(desc="encoding", total=state["chars"], unit_scale=True, leave=False, disable=None)
    bar.update(sum(manifest["utf8_bytes"].values()))
    for done, encoded in enumerate(ordered(work, rest, config.workers), state["done"] + 1):
        shards.add_group(folder, encoded, tokenizer.vocab_size, manifest)
        bar.update(encoded.chars)
        if done % COMMIT_EVERY == 0:
            journal.commit(done=done, manifest=manifest)
    bar.close()
    manifest |= {"settings": state["settings"]}
    shards.end_shards(folder, tokenizer, manifest, "; ".join(tally.lines()))
    return manifest


# ---- all of it -----------------------------------------------------------------------------------


def find_paths(config: PrepareConfig) -> list[Path]:
    """The files to read, each once. What lies in the folder that is made is not read again."""
    found = dict.fromkeys(path for name in config.paths for path in files.find(name))
    out = Path(config.out).resolve()
    own = {out, out.with_name(f"{out.name}.part")}
    paths = [path for path in found if not own & {*path.resolve().parents}]
    files.check_libraries(paths)
    return paths


def settings_of(config: PrepareConfig, paths: list[Path], fixed) -> dict:
    """All that the result depends on, as JSON has it."""
    settings = {"format": FORMAT, "files": files.fingerprint(paths)} | dataclasses.asdict(config)
    for name in ("paths", "out", "workers"):
        del settings[name]
    if fixed:
        del settings["vocab_size"], settings["sample_mb"]
        settings["tokenizer"] = fixed.fingerprint()
    return json.loads(json.dumps(settings))


def prepare(config: PrepareConfig) -> Path:
    """Make the folder, or go on with it; return it. Raises ValueError for what cannot be used."""
    begin, out = time.perf_counter(), Path(config.out)
    paths, fixed = find_paths(config), open_tokenizer(config)
    settings = settings_of(config, paths, fixed)
    if out.exists() and not (out / "manifest.json").exists():
        raise ValueError(f"{out} was not made by this program: choose another --out")
    if out.exists():
        manifest = shards.read_manifest(out)
        check_settings(out, manifest.get("settings", {}), settings)
    else:
        if config.dedupe == "near":
            files.extra("datasketch")  # or refuse now, rather than in a worker
        part = out.with_name(f"{out.name}.part")
        journal = Journal(part, settings, LATE)
        if journal.state["stage"] == "clean":
            clean(config, paths, journal)
        manifest = encode(config, fixed, journal)
        os.replace(part, out)
    for name in (SPOOL, KEYS, "journal.json"):
        (out / name).unlink(missing_ok=True)
    tokens = sum(shard["tokens"] for split in ("train", "val") for shard in manifest[split])
    megabytes, seconds = sum(manifest["utf8_bytes"].values()) / 1e6, time.perf_counter() - begin
    print(f"{out}: {megabytes:.1f} MB of text, {tokens:,} tokens, {seconds:.1f} s")
    print("  " + "\n  ".join(manifest["report"].split("; ")))
    return out


def main() -> int | str:
    try:
        prepare(tyro.cli(PrepareConfig, description=__doc__))
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return "stopped; the same command goes on"
    return 0


if __name__ == "__main__":
    sys.exit(main())
