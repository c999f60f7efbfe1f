"""Preparing text beside its tokenizer alone, and training beside its loader.

    python benchmarks/prepare.py [--megabytes 1000] [--workers 2] [--folder FOLDER]

Writes synthetic text (words drawn by Zipf's law, documents of a few KB, one in fifty of them a
duplicate, another a near duplicate) to .jsonl, .jsonl.zst and .parquet, prepares it in a process of
its own, whose memory is watched, and prints MB/s of text: of all of it, and of the library
sentencepiece on the same documents in as many processes as there are workers, each of them with a
share, and of one. Then it trains the default GPT for some steps on the result and prints the share
of the time that went into waiting for batches, the first left out.
"""

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

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece

from data import files

ROOT = Path(__file__).parents[1]
VOCABULARY, PART_BYTES = 50_000, 50_000_000
SAMPLE_BYTES = 20_000_000  # that the tokenizer alone is timed on
TRAIN_STEPS = 20


def synthetic(megabytes: float) -> Iterator[str]:
    """Documents of about that much text in all."""
    draw = np.random.default_rng(0)
    letters = draw.choice(list("etaoinshrdlcumwfgypbvkxjqz"), (VOCABULARY, 12))
    lengths = draw.integers(2, 12, VOCABULARY)
    words = np.array(["".join(row[:n]) for row, n in zip(letters, lengths)])
    size, before = 0, ""
    while size < megabytes * 1e6:
        picks = np.minimum(draw.zipf(1.2, draw.integers(100, 900)), VOCABULARY) - 1
        lines = np.array_split(words[picks], max(1, len(picks) // 15))
        text = ".\n".join(map(" ".join, lines))
        kind = draw.integers(50)
        if before and kind < 2:
            text = before if kind else before.replace(".\n", ".\nAlmost\n", 1)
        yield text
        size, before = size + len(text), text


def write_parts(folder: Path, megabytes: float) -> None:
    """The documents in files of PART_BYTES, of three kinds in turn."""

    def write(number: int, texts: list[str]) -> None:
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

    texts, size, number = [], 0, 0
    for text in synthetic(megabytes):
        texts.append(text)
        size += len(text)
        if size >= PART_BYTES:
            write(number, texts)
            texts, size, number = [], 0, number + 1
    if texts:
        write(number, texts)


def memory_of(process: int) -> int:
    """Bytes of a process and its children, shared pages divided among them (Linux)."""
    total = 0
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
        total += 1024 * int(rollup.split("\nPss:")[1].split()[0])
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8")
        total += sum(map(memory_of, map(int, children.split())))
    except (OSError, IndexError):  # it has just ended
        pass
    return total


def prepare(folder: Path, workers: int) -> tuple[float, int]:
    """Seconds that it took, and the most memory in bytes."""
    command = [sys.executable, "data/prepare.py", str(folder / "in"), "--out", str(folder / "out")]
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--workers", str(workers)], cwd=ROOT)
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            peak = max(peak, memory_of(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - begin
    ended.set()
    watcher.join()
    if status:
        sys.exit(f"prepare.py ended with {status}")
    return seconds, peak


def encode_alone(model: str, texts: list[str]) -> float:
    """Seconds in which the library encodes the texts, in one thread."""
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    begin = time.perf_counter()
    for text in texts:
        library.encode(text)
    return time.perf_counter() - begin


def alone(folder: Path, workers: int) -> tuple[float, float]:
    """MB/s of the library on the first SAMPLE_BYTES: in one process, and in all at once."""
    texts, size = [], 0
    for text in files.documents(str(folder / "in")):
        texts.append(text)
        size += len(text.encode("utf-8"))
        if size >= SAMPLE_BYTES:
            break
    model = str(folder / "out" / "tokenizer" / "tokenizer.model")
    one = size / 1e6 / encode_alone(model, texts)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        shares = [(model, texts[i::workers]) for i in range(workers)]
        pool.starmap(encode_alone, [(model, texts[:1])] * workers)  # started, before the clock is
        begin = time.perf_counter()
        pool.starmap(encode_alone, shares)
        return one, size / 1e6 / (time.perf_counter() - begin)


def loader_share(folder: Path) -> tuple[float, float]:
    """Milliseconds a batch, and its share of a training step of the default GPT."""
    import torch

    from tinyfm.batches.text import TextConfig, TextData
    from tinyfm.gpt import GPT
    from tinyfm.recipes import registry

    run = registry.get_preset("gpt").run
    config = TextConfig(path=str(folder / "out"))
    sizes = (run.model.vocab_size, run.model.context_length, run.train.batch_size)
    data, model = TextData.prepare(config, *sizes, seed=0), GPT(run.model)
    optimizer = torch.optim.AdamW(model.parameters())
    waited = worked = 0.0
    for step in range(TRAIN_STEPS + 1):
        begin = time.perf_counter()
        batch = data.batch(step)
        ready = time.perf_counter()
        loss, *_ = model.loss(batch, torch.Generator())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:  # the first of all warms up
            waited, worked = waited + ready - begin, worked + time.perf_counter() - ready
    return 1000 * waited / TRAIN_STEPS, waited / (waited + worked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prepare-", dir=options.folder))
    try:
        (folder / "in").mkdir()
        write_parts(folder / "in", options.megabytes)
        seconds, peak = prepare(folder, options.workers)
        one, together = alone(folder, options.workers)
        speed = options.megabytes / seconds
        n = options.workers
        print(f"prepare, {n} workers        {speed:7.2f} MB/s, {peak / 1e6:.0f} MB of memory")
        print(f"sentencepiece, 1 process  {one:7.2f} MB/s   prepare is {speed / one:.2f}x")
        print(f"sentencepiece, {n} processes{together:7.2f} MB/s   {speed / together:.2f}x")
        milliseconds, share = loader_share(folder)
        print(f"loader: {milliseconds:.2f} ms a batch, {share:.2%} of a training step")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
