"""Preparing a corpus: tables, filters, duplicates, workers, kills at any point; and tars."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, call
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from data import (
    captioned,
    cleaning,
    cluster,
    dedupe,
    files,
    filters,
    jobs,
    prepare,
    reading,
    tables,
    tars,
)
from data.report import Report
from data.splits import SPLITS
from tinyfm import tokenizer as tokenizers
from tinyfm.batches import shards
from tinyfm.batches.pairs import PairConfig, PairData
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.common import folders
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.recipes import registry

WORDS = ["ocean", "lantern", "whisper", "granite", "orchard", "velvet", "compass", "harbor"]


def document(seed: int, words: int = 80) -> str:
    """A text that no other seed gives, and that passes the filters."""
    draw = random.Random(seed)
    made = []
    for _ in range(words):
        made.append(draw.choice(WORDS) + draw.choice("abcdefgh") * draw.randint(0, 2))
    return "\n".join(" ".join(made[i : i + 10]) for i in range(0, words, 10))


def json_lines(documents) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode("utf-8")


def pack(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def write_all_kinds(folder: Path, documents: list[str]) -> Path:
    """Write the documents to files of every kind."""
    folder.mkdir()
    parts = [documents[i::4] for i in range(4)]
    (folder / "a.jsonl").write_bytes(json_lines(parts[0]))
    (folder / "b.jsonl.zst").write_bytes(pack(json_lines(parts[1])))
    pyarrow.parquet.write_table(pyarrow.table({"text": parts[2]}), folder / "c.parquet")
    for i, text in enumerate(parts[3]):
        (folder / f"d{i:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def run(*arguments) -> int:
    """Run prepare.py, with a small index and the byte tokenizer."""
    options = ("--workers", 1, "--tokenizer", "bytes", "--index-mb", 1)
    return call(prepare, *options, *arguments)


def content(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of all files in a folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def texts_of(folder: Path) -> Counter:
    """The documents of a folder that was prepared with the byte tokenizer."""
    parts = []
    for split in SPLITS:
        stored = shards.Shards(folder, split)
        ids = stored.read(0, len(stored))
        rows = np.split(ids, np.flatnonzero(ids == 256))
        parts += [bytes(row[1:].tolist()).decode("utf-8") for row in rows if len(row) > 1]
    return Counter(parts)


# ---- tables --------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    documents = [document(i) for i in range(12)]
    folder = write_all_kinds(tmp_path / "in", documents)
    report = Report()
    assert sorted(files.documents(str(folder), report)) == sorted(documents)
    assert str(report) == "12 found, 12 used"
    dictionary = pyarrow.array(documents[:3] * 2).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": dictionary}), folder / "c.parquet")
    assert [*files.documents(str(folder / "c.parquet"))] == documents[:3] * 2


def test_broken_lines_are_skipped_and_reported(tmp_path):
    lines = [
        b'{"text": "one"}',
        b"",
        b'{"body": 1, "id": 2}',
        b"[1]",
        b'{"text": 3}',
        b"nope",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800 half"}',
        b'{"text": " "}',
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    report = Report()
    assert [*files.documents(str(tmp_path), report)] == ["one", "\ufffd half", "last"]
    numbers = {}
    for reason, names in report.skipped.items():
        numbers[reason] = [name.split(":")[-1] for name in names]
    assert numbers == {
        "no field 'text' among body, id": ["3"],
        "not a JSON object": ["4"],
        "the field 'text' is not text": ["5"],
        "not JSON": ["6", "10"],
        "not UTF-8, convert it": ["7"],
        "empty": ["9"],
    }


def test_broken_files_give_what_they_can_and_a_reason(tmp_path):
    whole = pack(json_lines(random.Random(i).randbytes(500).hex() for i in range(3000)))
    table = pyarrow.table({"body": ["a"], "n": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    pyarrow.parquet.write_table(table.rename_columns(["b", "text"]), tmp_path / "d.parquet")
    contents = {
        "a.jsonl.zst": whole[: len(whole) // 2],
        "b.jsonl.zst": b"no Zstandard",
        "e.parquet": b"PAR1",
        "f.parquet": b"",
    }
    for name, broken in contents.items():
        (tmp_path / name).write_bytes(broken)
    report = Report()
    assert 500 < len([*files.documents(str(tmp_path), report)]) < 3000
    reasons = {
        names[0][-11:].rpartition("/")[2]: reason for reason, names in report.skipped.items()
    }
    assert "Truncated" in reasons["a.jsonl.zst"]
    assert "Unknown frame" in reasons["b.jsonl.zst"]
    assert reasons["c.parquet"] == "no column 'text' among body, n"
    assert reasons["d.parquet"] == "the column 'text' holds int64, not text"
    assert {"e.parquet", "f.parquet"} < reasons.keys()


def test_files_that_expand_without_end_take_no_memory(tmp_path, monkeypatch):
    bomb = pack(b"a" * (1 << 24))
    assert len(bomb) < 2000
    monkeypatch.setattr(reading, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1 << 18)
    (tmp_path / "a.jsonl.zst").write_bytes(bomb)
    with pytest.raises(ValueError, match="expands more than 500-fold"):
        list(files.documents(str(tmp_path)))
    endless = json_lines(["x" * (1 << 19), "short"])
    (tmp_path / "a.jsonl.zst").write_bytes(pack(endless))
    report = Report()
    assert [*files.documents(str(tmp_path), report)] == ["short"]
    assert [*report.skipped.values()] == [[f"{tmp_path.as_posix()}/a.jsonl.zst:1"]]
    assert [*reading.byte_lines(io.BytesIO(b"1\n" + b"2" * (1 << 19)))] == [b"1\n", None]


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"need pyarrow, run: pip install -r data/requirements"):
        list(files.documents(str(tmp_path)))


# ---- filters and masks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("words", document(0, 49)),
        ("word-length", "ab " * 60),
        ("word-length", "abcdefghijkl " * 60),
        ("letters", "word word word 123 " * 20),
        ("symbols", "#tag " + document(0) + " word# then... more…" * 5),
        ("bullets", "\n".join(f"- item number {i} of a list" for i in range(20))),
        ("ellipses", "\n".join(f"read more of item {i} here...\na line of {i}" for i in range(15))),
        ("repetition", document(0) + "\nthe same line once more" * 9),
        ("stop-words", document(0)),
    ],
)
def test_each_filter_drops_the_text_it_is_made_for(name, text):
    assert filters.failed(text, (name,)).startswith(f"{name}, not ")
    assert filters.failed(document(1) + " the cat and the dog of", (name,)) is None


def test_masks_replace_private_data_and_nothing_else():
    text = (
        "a.b+c@mail.example.org, +49 (30) 1234-5678, 212-555-0100, (212) 555-0100. 8.8.8.8, "
        "4111 1111 1111 1111, 4111111111111111."
    )
    for name, count in {"email": 1, "card": 2, "ip": 1, "phone": 3}.items():
        text, found = filters.mask(text, name)
        assert found == count
    assert text == "[email], [phone], [phone], [phone]. [ip], [card], [card]."
    plain = (
        "10.0.0.1 v1.2.3.4.5 999.1.1.1 4111111111111112 2024-01-02 a@b 1 + 1 = 2, 0.12345678901234"
    )
    assert all(filters.mask(plain, name) == (plain, 0) for name in filters.MASKS)


@pytest.mark.parametrize("evil", ["a", "a.-", "1", "1-", "+1 ", "1.", "a@", "1234 ", "a@b.", "("])
def test_masks_take_linear_time(evil):
    """A pattern with quadratic time would need about a minute for this length."""
    text = evil * (200_000 // len(evil)) + "@"  # without an "@", mask does not look for e-mail
    start = time.process_time()
    found = [filters.mask(text, name) for name in filters.MASKS]
    assert time.process_time() - start < 5
    assert found == [(text, 0)] * len(filters.MASKS)


def test_a_tally_has_a_bound():
    tally = filters.Tally()
    for i in range(1000):
        tally.add(filters.Tally(found=1, dropped={f"reason {i}": [1, [f"name {i}"]]}))
    assert tally.found == sum(count for count, _ in tally.dropped.values()) == 1000
    assert len(tally.dropped) == filters.MAX_REASONS + 1
    assert "960 dropped: other reasons (name 40, name 41, name 42, ...)" in tally.lines()


# ---- duplicates ----------------------------------------------------------------------------------


def test_minhash_agrees_with_the_jaccard_index(monkeypatch):
    """Over many orders, documents agree in a share J of the smallest places."""
    monkeypatch.setattr(dedupe, "BANDS", 512)
    dedupe.draw_orders.cache_clear()
    words = document(0, 400).split()
    for changed in (20, 60, 150):
        other = " ".join(words[:-changed] + document(1, changed).split())
        one, two = (set(dedupe.shingles(text).tolist()) for text in (" ".join(words), other))
        exact = len(one & two) / len(one | two)
        agree = (dedupe.minhash(" ".join(words)) == dedupe.minhash(other)).mean()
        assert abs(agree - exact) < 0.03
    dedupe.draw_orders.cache_clear()


def test_minhash_is_the_smallest_place_in_each_order():
    text = document(2, 50)
    a, b = dedupe.draw_orders()
    places = [[(int(h) * int(x) + int(y)) % 2**32 for h in dedupe.shingles(text)]
              for x, y in zip(a, b)]  # fmt: skip
    assert dedupe.minhash(text).tolist() == [min(row) for row in places]
    assert all(x % 2 for x in a)  # an even number would not give an order


def test_a_long_document_is_hashed_in_blocks(monkeypatch):
    text = document(3, 3000)
    whole = dedupe.keys_of(text, near=True)
    monkeypatch.setattr(dedupe, "BLOCK", 64)
    monkeypatch.setattr(dedupe, "PART_CHARS", 100)
    assert (dedupe.keys_of(text, near=True) == whole).all()
    assert len(whole) == dedupe.KEYS


def test_duplicates_are_found_and_others_are_not():
    seen = dedupe.Seen(1)
    for i in range(300):
        keys = dedupe.keys_of(document(i), near=True)
        assert seen.look_up(keys) is None
        seen.add(keys)
    again = dedupe.keys_of(document(7), near=True)
    assert seen.look_up(again) == "an exact duplicate"
    words = document(8, 300).split()
    seen.add(dedupe.keys_of(" ".join(words), near=True))
    words[100] = "changed"
    assert seen.look_up(dedupe.keys_of(" ".join(words), near=True)) == "a near duplicate"
    assert seen.look_up(dedupe.keys_of(" ".join(words), near=False)) is None
    assert dedupe.keys_of("", near=True)[1] == dedupe.keys_of("...", near=True)[1]  # no words


def test_documents_that_are_added_at_once_are_compared_in_turn():
    rows = np.stack([dedupe.keys_of(document(i % 7), near=True) for i in range(10)])
    rows[2, 3] = rows[1, 3]  # a band
    one, many = dedupe.Seen(1), dedupe.Seen(1)
    expected = []
    for keys in rows:
        expected.append(one.look_up(keys))
        if expected[-1] is None:
            one.add(keys)
    assert many.add_new(rows[:4]) + many.add_new(rows[4:]) == expected
    assert expected[2] == "a near duplicate" and expected.count("an exact duplicate") == 2
    assert (one.table == many.table).all() and one.count == many.count


def test_the_numbers_of_the_lesson_hold():
    table = re.findall(r"(0\.\d): +([\d.]+) %", dedupe.__doc__)
    assert len(table) == 4
    for jaccard, percent in table:
        found = 100 * (1 - (1 - float(jaccard) ** dedupe.BAND_ROWS) ** dedupe.BANDS)
        assert abs(found - float(percent)) < 0.5
    seen = dedupe.Seen(64)
    seen.count = int(1.6e6 * dedupe.KEYS)
    assert seen.lost(dedupe.KEYS) == pytest.approx(0.001, rel=0.01)
    seen = dedupe.Seen(40)
    seen.count = 10**6 * dedupe.KEYS
    assert seen.lost(dedupe.KEYS) < 0.002


def test_a_full_index_loses_as_many_as_it_says():
    draw, seen = np.random.default_rng(0), dedupe.Seen(1)
    keys = draw.integers(0, 2**63, (40_000, 20), dtype=np.uint64)
    seen.add(keys.reshape(-1))
    new = draw.integers(0, 2**63, (1500, 20), dtype=np.uint64)
    assert seen.lost(20) > 0.1
    assert abs(np.mean([seen.look_up(own) is not None for own in new]) - seen.lost(20)) < 0.04


# ---- prepare -------------------------------------------------------------------------------------


def test_documents_arrive_once_and_the_report_says_what_did_not(tmp_path, capsys):
    documents = [document(i) for i in range(150)]
    words = document(5, 400).split()
    near = [" ".join(words), " ".join(words[:200] + ["changed"] + words[200:])]
    private = document(900) + "\nask me@example.org"
    listed = [*documents, documents[3], *near, private, "too short", "1234 567 " * 40]
    (tmp_path / "a.jsonl").write_bytes(json_lines(listed) + b"{broken\n")
    assert run(tmp_path / "a.jsonl", "--out", tmp_path / "out") == 0
    masked = private.replace("me@example.org", "[email]")
    assert texts_of(tmp_path / "out") == Counter([*documents, near[0], masked])
    said = capsys.readouterr().out
    for part in (
        "157 found, 152 used",
        "1 dropped: an exact duplicate (",
        "jsonl:151)",
        "1 dropped: a near duplicate (",
        "jsonl:153)",
        "1 dropped: not JSON (",
        "1 dropped: words, not at least 50 words (",
        "1 dropped: letters, not",
        "1 [email] masked",
        "in 13-word runs that training also has: ",
    ):
        assert part in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert sum(manifest["documents"].values()) == 152
    assert not (tmp_path / "out.part").exists()
    before = content(tmp_path / "out")
    assert before.keys() == {
        "manifest.json",
        "tokenizer/bytes.json",
        "train-00000.bin",
        "val-00000.bin",
        "test-00000.bin",
    }
    assert run(tmp_path / "a.jsonl", "--out", tmp_path / "out") == 0  # it exists already
    assert content(tmp_path / "out") == before


SMALL = {
    (cleaning, "BATCH_BYTES"): 3000,
    (prepare, "COMMIT_EVERY"): 3,
    (shards, "GROUP_PIECES"): 2,
    (shards, "PIECE_CHARS"): 500,
    (shards, "SHARD_BYTES"): 20_000,
}
# The functions that write, or stand between two writes: a process is killed when it calls one.
KILL_POINTS = (
    (os, "replace"),
    (os, "fsync"),
    (shards, "append"),
    (Path, "unlink"),
    (filters.Tally, "add"),
    (shards, "end_shards"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Files of all kinds, in which two documents occur twice."""
    documents = [document(i) for i in range(120)]
    return write_all_kinds(tmp_path_factory.mktemp("corpus") / "in", documents + documents[:2])


@pytest.fixture
def small(monkeypatch):
    """Make batches, groups and shards so small that there are many."""
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses no written bytes


def killed_at(point: int, config: prepare.PrepareConfig) -> bool:
    """Run prepare(config) in a process that is killed by signal 9 at the call number `point` of
    KILL_POINTS. Returns whether it was killed, or ended before.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        return status == signal.SIGKILL
    try:
        left = iter(range(point))

        def counted(real):
            def call(*arguments, **named):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return call

        for module, name in KILL_POINTS:
            setattr(module, name, counted(getattr(module, name)))
        prepare.prepare(config)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_kill_at_any_point_changes_nothing(corpus, small, tmp_path):
    """Each run is killed several times, and ends with the bytes of an uninterrupted run."""
    settings = {"paths": (str(corpus),), "workers": 1, "tokenizer": "bytes", "index_mb": 1}
    whole = prepare.prepare(prepare.PrepareConfig(out=str(tmp_path / "whole"), **settings))
    assert len(list(whole.glob("train-*"))) > 3
    draw = random.Random(time.time_ns())
    for run in range(4):
        config = prepare.PrepareConfig(out=str(tmp_path / f"{run}"), **settings)
        points = []
        while not points or killed_at(points[-1], config):
            points.append(draw.randrange(20, 120))
            assert len(points) < 60
        assert len(points) > 1
        assert content(tmp_path / f"{run}") == content(whole), points


def interrupted_part(corpus: Path, folder: Path, monkeypatch) -> tuple[list, Path]:
    """The arguments of a preparation that stopped in its second pass, and its folder."""
    arguments = [corpus, "--out", folder / "out"]
    with monkeypatch.context() as patch:
        calls = iter(range(3))
        real = shards.add_group

        def stop_later(*given):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            real(*given)

        patch.setattr(shards, "add_group", stop_later)
        patch.setattr(prepare, "COMMIT_EVERY", 1)
        assert run(*arguments) == 1
    return arguments, folder / "out.part"


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.keys", "train-00000.bin"])
@pytest.mark.parametrize("harm", ["missing", "shorter"])
def test_a_part_that_lost_bytes_is_refused(
    corpus, small, tmp_path, monkeypatch, capsys, name, harm
):
    arguments, part = interrupted_part(corpus, tmp_path, monkeypatch)
    whole = (part / name).read_bytes()
    if harm == "missing":
        (part / name).unlink()
    else:
        (part / name).write_bytes(whole[:-1])
    assert run(*arguments) == 1
    assert re.search(
        rf"{name} has .* had {len(whole):,} .*delete the folder", capsys.readouterr().err
    )
    (part / name).write_bytes(whole)
    assert run(*arguments) == 0


@pytest.mark.parametrize(
    "change",
    [
        "[]",
        "{",
        {"done": -1},
        {"done": 1e300},
        {"stage": "cooking"},
        {"lengths": {"../x.bin": 1}},
        {"lengths": {"train-00000.bin": "many"}},
        {"tally": {"found": 1}},
        {"tally": None},
        {"manifest": {}},
        {"chars": "many"},
    ],
)
def test_a_malformed_journal_names_its_file(corpus, small, tmp_path, monkeypatch, capsys, change):
    arguments, part = interrupted_part(corpus, tmp_path, monkeypatch)
    journal = part / "journal.json"
    if isinstance(change, str):
        journal.write_text(change, encoding="utf-8")
    else:
        state = json.loads(journal.read_text(encoding="utf-8"))
        journal.write_text(json.dumps(state | change), encoding="utf-8")
    assert run(*arguments) == 1
    assert re.search(r"error: .*journal\.json", capsys.readouterr().err)


def test_a_folder_has_one_owner(corpus, tmp_path):
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    with folders.hold(folders.lock_beside(out), out):
        other = subprocess.run(
            [sys.executable, "data/prepare.py", corpus, "--out", out, "--tokenizer", "bytes"],
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
        )
    assert other.returncode == 1
    assert f"{out} is being written by process {os.getpid()}" in other.stderr
    assert [path.name for path in out.parent.iterdir()] == []


def test_what_is_not_read_is_in_the_report(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(document(i), encoding="utf-8")
    (folder / "table.csv").write_text(f"id,body\n{document(5)}", encoding="utf-8")
    (folder / "out").symlink_to(ROOT / "README.md")
    os.mkfifo(folder / "pipe")
    assert run(folder, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    for part in (
        "6 found, 4 used",
        "1 dropped: a link that leads out of the folder",
        "1 dropped: a pipe, a socket or a device",
        "1 table without 'text', read as plain text",
    ):
        assert part in said


def test_workers_change_nothing_and_end_with_their_parent(corpus, small, tmp_path):
    """Two workers, whose parent is killed once, and a tokenizer that is trained."""
    options = [str(corpus), "--index-mb", "1", "--vocab-size", "300"]
    assert call(prepare, *options, "--out", tmp_path / "one", "--workers", "1") == 0
    changes = "".join(f"{m.__name__}.{n} = {v}\n" for (m, n), v in SMALL.items())
    script = (
        f"import data.prepare, tinyfm.batches.shards, sys\n{changes}sys.exit(data.prepare.main())"
    )
    command = [sys.executable, "-c", script, *options, "--out", str(tmp_path / "two")]
    command += ["--workers", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as first:
        while not (tmp_path / "two.part" / "journal.json").exists():
            time.sleep(0.01)
        first.kill()
        first.stdout.read()  # returns when no worker is left that holds the pipe open
    assert not (tmp_path / "two").exists()
    subprocess.run(command, cwd=ROOT, check=True, timeout=100, stdout=subprocess.DEVNULL)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_results_come_in_order_and_few_items_are_read_in_advance():
    """Also while that number changes, as machines join and leave."""
    submitted = []
    ahead = 1

    def submit(item: int) -> Future:
        submitted.append(item)
        future = Future()
        future.set_result(item)
        return future

    read_in_advance = []
    results = jobs.in_order(submit, range(8), lambda: ahead)
    for number, result in enumerate(results):
        assert result == number
        read_in_advance.append(len(submitted) - 1 - result)
        ahead = 3 if result in (1, 2) else 1
    assert read_in_advance == [1, 1, 3, 3, 2, 1, 1, 0]


@pytest.fixture
def machines(monkeypatch):
    """A Ray cluster of three machines in small, each with one worker process."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short path, for its sockets
        monkeypatch.setenv("RAY_TMPDIR", folder)
        part = {"num_cpus": 1, "include_log_monitor": False}
        for chance in (2, 1, 0):  # a busy machine may miss Ray's 30 seconds, which are fixed
            started = Cluster()
            try:
                for more in ({"no_monitor": True}, {}, {}):
                    started.add_node(**part, **more)
                break
            except Exception:
                started.shutdown()
                if not chance:
                    raise
        yield started
        started.shutdown()


@pytest.mark.skipif(os.name == "nt", reason="Ray has no clusters on Windows")
def test_a_cluster_that_loses_a_machine_changes_nothing(
    corpus, small, machines, tmp_path, monkeypatch, capsys
):
    """The shards and the manifest are those of one process, byte for byte."""
    options = [corpus, "--vocab-size", 300, "--tokenizer", "sentencepiece"]
    assert run(*options, "--out", tmp_path / "one") == 0
    (head,) = machines.head_node.all_processes["raylet"]
    head = head.process.pid
    clean_batch = prepare.clean_batch

    def is_first(kind: str) -> bool:
        try:
            (tmp_path / kind).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    # It is defined in here so that it is sent as code: the workers cannot import the tests.
    def clean_and_kill(batch, **settings):
        machine = os.getppid()
        if machine != head and is_first("a worker is lost"):
            os.kill(os.getpid(), signal.SIGKILL)
        if machine != head and is_first("a machine is lost"):
            os.kill(machine, signal.SIGKILL)
        return clean_batch(batch, **settings)

    monkeypatch.setattr(prepare, "clean_batch", clean_and_kill)
    assert run(*options, "--out", tmp_path / "three", "--cluster", machines.address) == 0
    assert (tmp_path / "a worker is lost").exists() and (tmp_path / "a machine is lost").exists()
    assert content(tmp_path / "three") == content(tmp_path / "one")
    assert "cluster: 3 machines, 3 cores" in capsys.readouterr().out

    monkeypatch.setattr(cluster, "RETRIES", 0)
    with cluster.connected(machines.address):
        with pytest.raises(ValueError, match="lost the workers of a task 1 times: run the same"):
            list(cluster.in_tasks(lambda item: os.kill(os.getpid(), signal.SIGKILL), "x"))
        with pytest.raises(ValueError, match="invalid literal for int"):
            list(cluster.in_tasks(int, ["1", "x"]))


def test_a_cluster_that_cannot_be_used_is_refused(corpus, tmp_path, monkeypatch, capsys):
    options = (corpus, "--out", tmp_path / "out", "--cluster")
    for address in ("127.0.0.1:1", "nonsense"):
        assert run(*options, address) == 1
        assert f"--cluster {address}: no cluster answers" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(*options, "auto") == 1
    assert "run: pip install ray" in capsys.readouterr().err


def test_both_ways_to_start_it(tmp_path):
    for start in (["data/prepare.py"], ["-m", "data.prepare"]):
        command = [sys.executable, *start, str(tmp_path / "no"), "--out", str(tmp_path / "out")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
        assert done.returncode == 1
        assert done.stderr.startswith("error: no file matches"), done.stderr


def test_other_settings_are_refused(corpus, tmp_path, capsys):
    assert run(corpus, "--out", tmp_path / "out") == 0
    assert run(corpus, "--out", tmp_path / "out", "--dedupe", "exact") == 1
    assert (
        f"{tmp_path / 'out'} was made with other settings (dedupe): choose"
        in capsys.readouterr().err
    )
    (tmp_path / "more.txt").write_text("more", encoding="utf-8")
    assert run(corpus, tmp_path / "more.txt", "--out", tmp_path / "out") == 1
    assert "made with other settings (files)" in capsys.readouterr().err
    assert run(corpus, "--out", corpus) == 1
    assert "was not made by this program" in capsys.readouterr().err
    for wrong in (["--workers", "0"], ["--val-fraction", "1"], ["--tokenizer", "no-such"]):
        assert run(corpus, "--out", tmp_path / "new", *wrong) > 0
        assert wrong[0] in capsys.readouterr().err


def test_a_corpus_without_a_usable_document_is_refused_with_the_reasons(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n' * 3 + b'{"text": "short"}\n')
    assert run(tmp_path / "a.jsonl", "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no document of ") and said.count("\n") == 1
    assert "4 found, 0 used; 3 dropped: no field 'text' among body" in said
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert run(tmp_path / "a.jsonl", "--out", tmp_path / "out") == 1
    assert "0 found" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit_the_text_can_be_changed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(document(0, 300), encoding="utf-8")
    command = (prepare, tmp_path / "a.txt", "--out", tmp_path / "out", "--workers", 1)
    assert call(*command, "--val-fraction", "0.3") == 1
    assert "vocab_size 4096 does not suit the text: use at most" in capsys.readouterr().err
    assert call(*command, "--vocab-size", "300", "--masks", "ip") == 1
    assert "other settings (masks)" in capsys.readouterr().err
    assert call(*command, "--vocab-size", "300") == 0
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["vocab_size"] == manifest["settings"]["vocab_size"] == 300
    assert not (tmp_path / "out.part").exists()


def test_the_folder_that_is_made_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text(document(0, 300), encoding="utf-8")
    for _ in range(2):
        assert run(tmp_path, "--out", tmp_path / "out") == 0
    assert sum(shards.read_manifest(tmp_path / "out")["documents"].values()) == 3  # parts of one


def test_another_field_and_no_filters(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n{"body": "y"}\n{"body": "y"}\n')
    options = ("--field", "body", "--filters", "--dedupe", "none", "--val-fraction", "0.67")
    assert run(tmp_path / "a.jsonl", "--out", tmp_path / "out", *options) == 0
    assert texts_of(tmp_path / "out") == Counter({"x": 1, "y": 2})


def test_a_long_plain_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "DOCUMENT_BYTES", 1000)
    text = "".join(f"line {i} ünïcode\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    rows = [*cleaning.plain_rows(tmp_path / "a.txt")]
    assert b"".join(row.content for row in rows).decode("utf-8") == text
    assert all(row.content.endswith(b"\n") and len(row.content) <= 1000 for row in rows)
    assert rows[1].name.endswith(f"a.txt, from byte {len(rows[0].content)}")
    (tmp_path / "b.txt").write_bytes(b"a" + "ü".encode() * 2001)  # no line end and no space
    assert all(tables.parse(row)[1] == 0 for row in cleaning.plain_rows(tmp_path / "b.txt"))
    (tmp_path / "c.txt").write_bytes(b"\0" * 5000)
    assert len([*cleaning.plain_rows(tmp_path / "c.txt")]) == 1
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (row,) = next(cleaning.batches([tmp_path / "gone.txt"], "text", Counter()))
    assert (row.kind, row.content) == ("unreadable", b"No such file or directory")


def test_a_prepared_folder_is_used_without_a_second_preparation(corpus, tmp_path, capsys):
    assert run(corpus, "--out", tmp_path / "out", "--val-fraction", "0.1") == 0
    config = {"path": str(tmp_path / "out"), "cache": str(tmp_path / "cache")}
    sizes = {"vocab_size": 257, "context_length": 16, "batch_size": 2, "seed": 0}
    data = TextData.prepare(TextConfig(**config), **sizes)
    assert data.batch(0)["tokens"].shape == (2, 17)
    assert not (tmp_path / "cache").exists()
    assert (
        TextData.prepare(TextConfig(**config, tokenizer="bytes"), **sizes).split("test").utf8_bytes
    )
    tokenizers.train("bpe", [document(0)], 270).save(tmp_path / "other")
    other = TextConfig(**config, tokenizer=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="made with another tokenizer: leave out"):
        TextData.prepare(other, **{**sizes, "vocab_size": 270})
    assert call(evaluate, "overlap", tmp_path / "out") == 0
    assert "test (" in capsys.readouterr().out
    for again in (tmp_path / "out", tmp_path / "other"):
        config = prepare.PrepareConfig((str(corpus),), str(tmp_path), tokenizer=str(again))
        assert prepare.open_tokenizer(config).vocab_size in (257, 270)


def test_the_default_vocabulary_is_that_of_the_default_model():
    config = prepare.PrepareConfig(("x",), "y")
    assert config.vocab_size == registry.get_preset("gpt").run.model.vocab_size


def test_the_tokenizer_of_a_run_can_be_used(tiny_run):
    config = prepare.PrepareConfig(("x",), "y", tokenizer=str(tiny_run))
    assert prepare.open_tokenizer(config).vocab_size == 257


# ---- tars ----------------------------------------------------------------------------------------


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def picture(*color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shard_files(tmp_path) -> str:
    for shard in range(4):
        with tarfile.open(tmp_path / f"shards-{shard:03d}.tar", "w", encoding="utf-8") as tar:
            for i in range(3):
                add(tar, f"{shard}{i}.png", picture(shard * 60, i * 80, 9))
                said = {"caption": f"picture {shard} {i}"}
                add(tar, f"{shard}{i}.json", json.dumps(said).encode())
            add(tar, f"{shard}9.PNG", picture(shard, 255, 255))
            add(tar, f"{shard}9.txt", f"text {shard}\nand another\n".encode())
    return str(tmp_path / "shards-{000..003}.tar")


def test_pictures_and_captions_come_out_of_tars(shard_files, tmp_path):
    report = Report()
    records = [*captioned.records(shard_files, 8, 3, report)]
    assert str(report) == "16 found, 16 used"
    found = {record.captions: tuple(record.image[0, 0].tolist()) for record in records}
    assert found[("picture 2 1",)] == (120, 80, 9)
    assert found[("text 3", "and another")] == (3, 255, 255)
    config = PairConfig(path=shard_files, tokenizer="bytes", cache=str(tmp_path / "cache"))
    data = PairData.prepare(config, 8, 3, 257, 20, batch_size=4, seed=0)
    assert data.batch(0)["images"].shape == (4, 3, 8, 8)
    assert PairData.prepare(config, 8, 3, 257, 20, 4, 0).fingerprint == data.fingerprint


class Names(IterableDataset):
    """The names of the samples that a rank and a worker read."""

    def __init__(self, path: str):
        self.path = path

    def __iter__(self):
        return (sample.name for sample in tars.samples(self.path, Report(), split=True))


def test_ranks_and_workers_share_the_tars_without_repeats(shard_files, monkeypatch):
    everything = [sample.name for sample in tars.samples(shard_files, Report())]
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert [s.name for s in tars.samples(shard_files, Report())] == everything  # no split
        for worker in range(2):
            monkeypatch.setenv("WORKER", str(worker))
            monkeypatch.setenv("NUM_WORKERS", "2")
            parts.append([*Names(shard_files)])
            monkeypatch.delenv("WORKER")
    assert all(len(part) == 4 for part in parts)
    assert sorted(name for part in parts for name in part) == sorted(everything)
    monkeypatch.delenv("RANK")
    loader = DataLoader(Names(shard_files), batch_size=None, num_workers=2)
    assert sorted(loader) == sorted(everything)


def test_unsafe_or_unusable_members_of_a_tar_are_skipped_and_reported(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", encoding="utf-8") as tar:
        for name in ("../out", "/root", "ok"):
            add(tar, f"{name}.png", picture(1, 2, 3))
            add(tar, f"{name}.txt", b"a caption")
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "bare.png", picture(1, 2, 3))
        add(tar, "ok.png", picture(3, 2, 1))
        add(tar, "broken.png", b"no picture")
        add(tar, "broken.txt", b"a caption")
        add(tar, "number.png", picture(1, 2, 3))
        add(tar, "number.json", b'{"caption": 7}')
        add(tar, "alone.txt", b"a caption")
    report = Report()
    records = [*captioned.records(tmp_path / "a.tar", 8, 3, report)]
    assert [(record.captions, record.image[0, 0].tolist()) for record in records] == [
        (("a caption",), [1, 2, 3])
    ]
    reasons = {}
    for reason, names in report.skipped.items():
        for name in names:
            reasons[name.removeprefix("a.tar/")] = reason
    assert reasons.pop("broken.png").startswith("not an image")
    outside = "its name leads out of the folder"
    assert reasons == {
        "../out.png": outside,
        "../out.txt": outside,
        "/root.png": outside,
        "/root.txt": outside,
        "link.png": "a link, a device or a sparse file",
        "ok.png": "a second file of that name",
        "bare.png": "no caption",
        "number.png": "no caption",
        "alone": "no picture of that name, or not beside it",
    }


def test_files_that_are_no_complete_tar(shard_files, tmp_path, monkeypatch):
    whole = Path(shard_files.replace("{000..003}", "000")).read_bytes()
    for name, part in {"cut": whole[:3500], "junk": b"junk" * 200, "empty": b""}.items():
        (tmp_path / f"{name}.tar").write_bytes(part)
        report = Report()
        found = [*tars.samples(tmp_path / f"{name}.tar", report)]
        assert len(found) == (2 if name == "cut" else 0)
        assert next(iter(report.skipped)).startswith("not a whole, unpacked tar")
    monkeypatch.setattr(tars, "MAX_BYTES", 60)
    report = Report()
    assert not [*tars.samples(tmp_path / "shards-000.tar", report)]  # only the captions are small
    assert "larger than 0 MiB" in report.skipped
    with pytest.raises(ValueError, match=r"there is no file .*shards-004\.tar"):
        tars.find(shard_files.replace("003", "004"))
    for command in ("pipe:touch made.tar", "http://localhost/a.tar"):
        with pytest.raises(ValueError, match="there is no file"):
            [*tars.samples(command, Report())]
