"""Compare data/prepare.py with its tokenizer alone, and the loader with training.

    python benchmarks/prepare.py [--megabytes 1000] [--workers 2] [--folder FOLDER]

Writes synthetic text as .jsonl, .jsonl.zst and .parquet. Its words follow Zipf's law, and its
documents have a few KB; one in fifty is a duplicate of the one before, and another one a near
duplicate. The text is prepared in a new process, whose memory is watched.

Prints MB of text per second: of data/prepare.py, and of the library sentencepiece alone on the same
documents, in one process, and in as many as there are workers, each with a part of them. Then the
default GPT trains for some steps on the result. Prints the share of the time that is spent waiting
for batches, without the first step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import files

VOCABULARY = 50_000  # words of the synthetic text
PART_BYTES = 50_000_000  # of each file
SAMPLE_BYTES = 20_000_000  # of the text that the library alone is timed on
TRAIN_STEPS = 20


# ---- the text -----------------------------------------------------------------------------------


def synthetic_documents(megabytes: float) -> Iterator[str]:
    """Documents with about that much text in total."""
    rng = np.random.default_rng(0)
    letters = rng.choice(list("etaoinshrdlcumwfgypbvkxjqz"), (VOCABULARY, 12))
    lengths = rng.integers(2, 12, VOCABULARY)
    words = np.array(["".join(row[:n]) for row, n in zip(letters, lengths)])
    size = 0
    previous = ""
    while size < megabytes * 1e6:
        picks = np.minimum(rng.zipf(1.2, rng.integers(100, 900)), VOCABULARY) - 1
        lines = np.array_split(words[picks], max(1, len(picks) // 15))
        text = ".\n".join(map(" ".join, lines))
        kind = rng.integers(50)
        if previous and kind == 0:  # a near duplicate
            text = previous.replace(".\n", ".\nAlmost\n", 1)
        elif previous and kind == 1:  # a duplicate
            text = previous
        yield text
        size += len(text)
        previous = text


def write_file(folder: Path, number: int, texts: list[str]) -> None:
    """Write documents as file `number`; the three formats take turns."""
    path = folder / f"part-{number:04d}"
    if number % 3 == 0:
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=1000)
        return
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode("utf-8")
    if number % 3 == 1:
        path.with_suffix(".jsonl").write_bytes(lines)
    else:
        packed = pyarrow.compress(lines, codec="zstd", asbytes=True)
        path.with_suffix(".jsonl.zst").write_bytes(packed)


def write_text(folder: Path, megabytes: float) -> None:
    """Write the synthetic text in files of about PART_BYTES."""
    texts = []
    size = 0
    number = 0
    for text in synthetic_documents(megabytes):
        texts.append(text)
        size += len(text)
        if size >= PART_BYTES:
            write_file(folder, number, texts)
            texts = []
            size = 0
            number += 1
    if texts:
        write_file(folder, number, texts)


# ---- preparing it -------------------------------------------------------------------------------


def memory_of(process: int) -> int:
    """Bytes of a process and its children; shared pages count in parts (Linux only)."""
    total = 0
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
        total += 1024 * int(rollup.split("\nPss:")[1].split()[0])
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8")
        for child in children.split():
            total += memory_of(int(child))
    except (OSError, IndexError):  # it has just ended
        pass
    return total


def time_prepare(folder: Path, workers: int) -> tuple[float, int]:
    """(seconds that data/prepare.py takes, its peak memory in bytes)."""
    command = [sys.executable, "data/prepare.py", str(folder / "in"), "--out", str(folder / "out")]
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--workers", str(workers)], cwd=ROOT)
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            peak = max(peak, memory_of(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    if status:
        sys.exit(f"data/prepare.py ended with status {status}")
    return seconds, peak


# ---- the library alone --------------------------------------------------------------------------


def encode(model: str, texts: list[str]) -> float:
    """Seconds in which the library encodes the texts, in one thread."""
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    start = time.perf_counter()
    for text in texts:
        library.encode(text)
    return time.perf_counter() - start


def time_library(folder: Path, workers: int) -> tuple[float, float]:
    """MB/s of the library on the first SAMPLE_BYTES: (in one process, in all together)."""
    texts = []
    size = 0
    for text in files.documents(str(folder / "in")):
        texts.append(text)
        size += len(text.encode("utf-8"))
        if size >= SAMPLE_BYTES:
            break
    model = str(folder / "out" / "tokenizer" / "tokenizer.model")
    one = size / 1e6 / encode(model, texts)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(encode, [(model, texts[:1])] * workers)  # starting them is not timed
        parts = [(model, texts[i::workers]) for i in range(workers)]
        start = time.perf_counter()
        pool.starmap(encode, parts)
        together = size / 1e6 / (time.perf_counter() - start)
    return one, together


# ---- the loader ---------------------------------------------------------------------------------


def time_loader(folder: Path) -> tuple[float, float]:
    """(milliseconds for a batch, its share of a training step of the default GPT)."""
    import torch

    from tinyfm.batches.text import TextConfig, TextData
    from tinyfm.gpt import GPT
    from tinyfm.recipes.registry import find_preset

    run = find_preset("gpt").run
    data = TextData.prepare(
        TextConfig(path=str(folder / "out")),
        run.model.vocab_size,
        run.model.context_length,
        run.train.batch_size,
        seed=0,
    )
    model = GPT(run.model)
    optimizer = torch.optim.AdamW(model.parameters())
    waiting = 0.0
    working = 0.0
    for step in range(TRAIN_STEPS + 1):
        start = time.perf_counter()
        batch = data.batch(step)
        ready = time.perf_counter()
        loss, _ = model.loss(batch, torch.Generator())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done = time.perf_counter()
        if step > 0:  # the first one warms up
            waiting += ready - start
            working += done - ready
    return 1000 * waiting / TRAIN_STEPS, waiting / (waiting + working)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=1000, help="size of the text")
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    n = options.workers
    folder = Path(tempfile.mkdtemp(prefix="prepare-", dir=options.folder))
    try:
        (folder / "in").mkdir()
        write_text(folder / "in", options.megabytes)
        seconds, peak = time_prepare(folder, n)
        speed = options.megabytes / seconds
        one, together = time_library(folder, n)
        print(f"prepare, {n} workers        {speed:7.2f} MB/s, {peak / 1e6:.0f} MB of memory")
        print(f"sentencepiece, 1 process  {one:7.2f} MB/s   prepare is {speed / one:.2f}x")
        print(f"sentencepiece, {n} processes{together:7.2f} MB/s   {speed / together:.2f}x")
        milliseconds, share = time_loader(folder)
        print(f"loader: {milliseconds:.2f} ms a batch, {share:.2%} of a training step")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
