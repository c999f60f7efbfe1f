"""Files of strangers: which are read, what their tables say, and what cannot be trusted."""

import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from debs import tar_of

from data import captioned, files, labelled, parquet, pictures, prepare, reading, tables, tars
from data.report import MAX_NAMES, MAX_REASONS, Report
from tinyfm.batches import chat
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.recipes import clip


def write(path: Path, content: str | bytes) -> Path:
    if isinstance(content, str):
        content = content.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def rows_of(path: Path) -> tuple[list[dict], Report]:
    report = Report()
    return [fields for _, fields in tables.records(path, report)], report


# ---- tables --------------------------------------------------------------------------------------


FORMS = {
    "t.csv": "text,label\na,x\n",
    "semicolons.csv": "text;label\na;x\n",
    "marked.csv": "\ufefftext, label \r\na,x\r\n",
    "mac.csv": "text,label\ra,x\r",
    "t.tsv": "text\tlabel\na\tx\n",
    "t.jsonl": '{"text": "a", "label": "x"}\n',
    "marked.jsonl": '\ufeff{"text": "a", "label": "x"}\n',
    "array.json": '[\n {"text": "a",\n  "label": "x"}\n]\n',
    "array.jsonl": '[{"text": "a", "label": "x"}]',
    "lines.json": '{"text": "a", "label": "x"}\n',
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_form_of_table_gives_the_same_row(tmp_path, name, packing):
    content = FORMS[name].encode("utf-8")
    if packing == ".gz":
        content = gzip.compress(content)
    if packing == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    found, report = rows_of(write(tmp_path / f"{name}{packing}", content))
    assert found == [{"text": "a", "label": "x"}]
    assert (report.found, report.skipped, report.notes) == (1, {}, [])


def test_a_parquet_file_gives_its_rows(tmp_path):
    table = pyarrow.table({"text": ["a", None], "score": [float("nan"), 1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    found, _ = rows_of(tmp_path / "t.parquet")
    assert found == [{"text": "a", "score": None}, {"text": None, "score": 1.0}]


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    lines = ["text\tlabel", '" a quote in front\tx', 'a 5" disk\ty', '"quoted"\tz']
    found, _ = rows_of(write(tmp_path / "t.tsv", "\n".join(lines)))
    assert [row["text"] for row in found] == ['" a quote in front', 'a 5" disk', '"quoted"']


def test_a_quote_that_swallows_rows_of_a_csv_is_refused_or_reported(tmp_path):
    rows = [f"text {i},x" for i in range(20)]
    rows[3] = '" a quote in front,x'
    never_closed = write(tmp_path / "a.csv", "\n".join(["text,label", *rows]))
    with pytest.raises(ValueError, match=r"a\.csv cannot be read: lines 5 to 2\d: .* \.tsv"):
        rows_of(never_closed)
    rows[9] = 'a 5" disk,y'
    with pytest.raises(ValueError, match=r"lines 5 to 11: "):
        rows_of(write(tmp_path / "a.csv", "\n".join(["text,label", *rows])))
    rows[9] = 'closed by chance",y'
    found, report = rows_of(write(tmp_path / "a.csv", "\n".join(["text,label", *rows])))
    assert len(found) == 14
    assert "1 row of several lines, the longest 7 lines from line 5" in str(report)


def test_cells_have_any_length_and_several_lines(tmp_path):
    long = "w " * 3_000_000
    found, report = rows_of(write(tmp_path / "t.csv", f'text,label\n{long},x\n"a\nb, ""c""",y\n'))
    assert [row["text"] for row in found] == [long, 'a\nb, "c"']
    assert "1 row of several lines" in str(report)


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'label' occurs twice"):
        rows_of(write(tmp_path / "t.csv", "text,label,label\na,x,y\n"))


def test_a_key_that_occurs_twice_is_named(tmp_path):
    row = '{"text": "a", "label": "x", "label": "y"}'
    found, report = rows_of(write(tmp_path / "t.jsonl", f'{row}\n{{"text": "b"}}\n'))
    assert found == [{"text": "b"}]
    (reason,) = report.skipped
    assert "'label' occurs twice" in reason
    with pytest.raises(ValueError, match=r"t\.json cannot be read: .*'label' occurs twice"):
        rows_of(write(tmp_path / "t.json", f"[{row}]"))
    documents = Report()
    with pytest.raises(ValueError, match="'label' occurs twice"):
        list(files.documents(str(write(tmp_path / "d.jsonl", row)), documents))


def test_missing_values_are_no_labels(tmp_path):
    lines = ['{"text": "a", "label": NaN}', '{"text": "b", "label": null}', '{"text": NaN}']
    lines += [f'{{"text": "{c}", "label": "x"}}' for c in "cd"]
    report = Report()
    assert len(labelled.text_rows(write(tmp_path / "t.jsonl", "\n".join(lines)), report)) == 2
    assert {why: len(names) for why, names in report.skipped.items()} == {
        "no label": 2,
        "no text": 1,
    }
    cells = "text,label\na,nan\nb,NaN\nc,null\nd,x\ne,x\n"
    report = Report()
    assert len(labelled.text_rows(write(tmp_path / "t.csv", cells), report)) == 2
    assert len(report.skipped["no label"]) == 3


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0bfive"
    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    path = write(tmp_path / "t.jsonl", line + line.replace("one", "1"))
    assert [row["text"] for row in rows_of(path)[0]] == [text, text.replace("one", "1")]
    assert [*files.documents(str(path))] == [text, text.replace("one", "1")]
    tsv = write(tmp_path / "t.tsv", f"text\tlabel\n{text}\tx\n")
    assert rows_of(tsv)[0] == [{"text": text, "label": "x"}]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json"])
def test_bytes_of_another_encoding_are_counted_or_refused(tmp_path, name):
    """A few are replaced and counted; with many, the file (or the line) is refused."""

    def content(word: str, rows: int) -> bytes:
        filler = "plain words " * 12
        table = [{"text": f"{filler}{i}", "label": "x"} for i in range(rows)]
        table[0]["label"] = word
        if name == "t.json":
            return json.dumps(table, ensure_ascii=False).encode("cp1252")
        if name == "t.jsonl":
            lines = [json.dumps(row, ensure_ascii=False) for row in table]
        else:
            mark = "," if name == "t.csv" else "\t"
            lines = [f"text{mark}label", *(f"{row['text']}{mark}{row['label']}" for row in table)]
        return "\n".join(lines).encode("cp1252")

    found, report = rows_of(write(tmp_path / name, content("n\u00e9gatif", 9)))
    assert found[0]["label"] == "n\ufffdgatif"
    assert report.notes == [f"1 invalid byte replaced in {name} (save it as UTF-8)"]
    many = write(tmp_path / name, content("\u00e9" * 400, 9))
    if name == "t.jsonl":
        found, report = rows_of(many)
        assert report.skipped == {"not UTF-8, convert it": ["t.jsonl:1"]}
    else:
        # The runs of invalid bytes are one each, but each stands between other characters.
        with pytest.raises(ValueError, match="not UTF-8, convert it"):
            rows_of(write(tmp_path / name, content("\u00e9e" * 400, 9)))


# ---- every reader of text counts what it replaces ------------------------------------------------

LONG = "plain words " * 30 + "n\u00e9gatif"


def table_of(name: str, row: dict) -> bytes:
    """Two rows in cp1252, as a table of that name; the second is plain."""
    table = [row, {key: value.replace("\u00e9", "e") for key, value in row.items()}]
    if name.endswith(".json"):
        return json.dumps(table, ensure_ascii=False).encode("cp1252")
    if name.endswith(".jsonl"):
        lines = [json.dumps(fields, ensure_ascii=False) for fields in table]
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        lines = [mark.join(fields) for fields in (row.keys(), *(f.values() for f in table))]
    return "\n".join(lines).encode("cp1252")


def read_documents(path, capsys) -> str:
    report = Report()
    assert "n\ufffdgatif" in "".join(files.documents(str(path), report))
    return str(report)


def read_labels(path, capsys) -> str:
    report = Report()
    rows = labelled.text_rows(path, report)
    assert any("\ufffd" in row.source for row in rows)
    return str(report)


def read_captions(path, capsys) -> str:
    report = Report()
    pairs = captioned.pairs(path, report)
    assert any("\ufffd" in caption for pair in pairs for caption in pair.captions)
    return str(report)


def read_chat(path, capsys) -> str:
    report = Report()
    assert [*chat.read_files(str(path), report)]
    return str(report)


def read_questions(path, capsys) -> str:
    evaluate.read_choices(str(path))
    return capsys.readouterr().err


def read_names(path, capsys) -> str:
    with pytest.raises(ValueError) as caught:
        clip.read_labels(str(path))
    return str(caught.value)


def prepare_text(path, capsys) -> str:
    config = prepare.PrepareConfig(
        (str(path),), str(path.parent / "made"), 1, tokenizer="bytes", filters=(), dedupe="none"
    )
    prepare.prepare(config)
    return capsys.readouterr().out


TEXT = {"text": LONG, "label": "x"}
PICTURE = {"path": "1.png", "caption": LONG}
WINDOWS = LONG.encode("cp1252")
CHAT = {"instruction": "a", "input": "b", "output": LONG}
# Reader, and the files that it reads; the first one's folder, if a name has a slash.
READERS = [
    *((read_documents, {f"t{suffix}": table_of(suffix, TEXT)}) for suffix in
      (".csv", ".tsv", ".json", ".jsonl")),
    (read_documents, {"t.csv.gz": gzip.compress(table_of(".csv", TEXT))}),
    (read_documents, {"t.txt": WINDOWS}),
    (read_documents, {"notes/t.md": WINDOWS, "notes/u": b"plain"}),
    *((prepare_text, {f"t{suffix}": table_of(suffix, TEXT)}) for suffix in (".csv", ".jsonl")),
    (prepare_text, {"t.txt": WINDOWS}),
    *((read_labels, {f"t{suffix}": table_of(suffix, TEXT)}) for suffix in
      (".csv", ".tsv", ".json", ".jsonl")),
    *((read_captions, {f"t{suffix}": table_of(suffix, PICTURE)}) for suffix in
      (".csv", ".tsv", ".json", ".jsonl")),
    (read_captions, {"p/1.png": b"", "p/1.txt": WINDOWS}),
    (read_captions, {"p/1.png": b"", "p/metadata.csv": table_of(
        ".csv", {"file_name": "1.png", "text": LONG})}),
    (read_captions, {"p/1.png": b"", "p/metadata.jsonl": table_of(
        ".jsonl", {"file_name": "1.png", "text": LONG})}),
    (read_captions, {"t.tar": tar_of({"1.png": b"", "1.txt": WINDOWS})}),
    (read_captions, {"t.tar": tar_of({"1.png": b"", "1.json": json.dumps(
        {"caption": LONG}, ensure_ascii=False).encode("cp1252")})}),
    *((read_chat, {f"t{suffix}": table_of(suffix, CHAT)}) for suffix in
      (".csv", ".json", ".jsonl")),
    (read_questions, {"t.jsonl": json.dumps(
        {"context": LONG, "choices": ["a", "b"], "answer": 0}, ensure_ascii=False
    ).encode("cp1252")}),
    (read_names, {"names.txt": WINDOWS}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("read", "contents"), READERS, ids=lambda value: getattr(value, "__name__", None)
)
def test_every_reader_of_text_counts_the_bytes_that_it_replaces(tmp_path, capsys, read, contents):
    paths = [write(tmp_path / name, content) for name, content in contents.items()]
    path = paths[0] if paths[0].parent == tmp_path else paths[0].parent
    assert "invalid byte" in read(path, capsys)


def test_captions_that_cannot_be_read_are_counted_with_the_reason(tmp_path):
    short = "caf\u00e9".encode("cp1252")  # one character of four is too many
    pictures_of = {"1.png": b"", "1.txt": short, "2.png": b"", "2.json": b"{", "3.png": b""}
    report = Report()
    with pytest.raises(ValueError, match="no image with a caption"):
        captioned.pairs(write(tmp_path / "t.tar", tar_of(pictures_of)), report)
    assert "1 caption in t.tar not read: not UTF-8, convert it" in str(report)
    assert "1 caption in t.tar not read: not JSON" in str(report)


def test_an_array_is_read_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_CHARS", 7)
    items = [{"text": f'item {i} \\ "q" [', "n": [i, {"a": "}"}]} for i in range(50)]
    path = write(tmp_path / "t.json", json.dumps([*items, 7], indent=1))
    found, report = rows_of(path)
    assert found == items
    assert report.skipped == {"not a JSON object": ["t.json:51"]}
    assert [*files.documents(str(path))] == [item["text"] for item in items]
    two = '[{"a": 1},\n {"b": 2}]\n[{"c": 3}]'
    for broken in ('[{"a": 1} {"b": 2}]', '[{"a": 1}, {"b": ', '[{"a": 1}, nope]', "[" * 5000, two):
        with pytest.raises(ValueError, match=r"t\.json cannot be read: "):
            rows_of(write(tmp_path / "t.json", broken))


def test_an_empty_array_is_no_text(tmp_path):
    path = write(tmp_path / "t.json", "[ ]\n")
    with pytest.raises(ValueError, match=r"no text in .*t\.json': 0 found"):
        list(files.documents(str(path)))


def test_tables_for_pretraining_have_a_text_column_or_a_note(tmp_path):
    write(tmp_path / "a.csv", 'id,text\n1,"one, 1"\n2,two\n')
    write(tmp_path / "b.json", '[{"text": "three"}, {"text": 4}]')
    write(tmp_path / "c.tsv", "id\ttext\n1\tfour\n2\n")
    write(tmp_path / "d.csv", "id,body\n1,five\n")
    write(tmp_path / "e.json", '{"name": "no table"}')
    write(tmp_path / "f.txt.gz", gzip.compress(b"six"))
    report = Report()
    found = [*files.documents(str(tmp_path), report)]
    plain = ["id,body\n1,five\n", '{"name": "no table"}']
    assert found == ["one, 1", "two", "three", "four", *plain, "six"]
    assert "read as plain text: 2 tables without 'text' (d.csv)" in str(report)
    assert sorted(report.skipped) == [
        "not as many cells as the header",
        "the field 'text' is not text",
    ]


# ---- limits --------------------------------------------------------------------------------------


def test_a_table_that_expands_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "FREE_BYTES", 1 << 17)
    monkeypatch.setattr(reading, "MAX_EXPANSION", 50)
    bomb = b'{"text": "a"}\n' * 60_000
    for name, content in {
        "a.jsonl.gz": gzip.compress(bomb),
        "a.csv.gz": gzip.compress(b"text\n" + b"a\n" * 600_000),
        "a.json.zst": pyarrow.compress(b"[" + b" " * (1 << 21), codec="zstd", asbytes=True),
        "a.txt.gz": gzip.compress(bytes(b"a" * (1 << 21))),
    }.items():
        path = write(tmp_path / name, content)
        with pytest.raises(ValueError, match="expands more than 50-fold"):
            rows_of(path)
        report = Report()
        with_some = write(tmp_path / "some" / "b.txt", "text")
        path.rename(with_some.parent / name)
        assert "text" in [*files.documents(str(with_some.parent), report)]
        assert "expands more than 50-fold" in report.skipped
        (with_some.parent / name).unlink()


def test_a_parquet_file_that_expands_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "FREE_BYTES", 1 << 20)
    text = "a" * (1 << 20)
    endless = pyarrow.table({"text": pyarrow.nulls(2_000_000, pyarrow.string())})
    large = pyarrow.table({"text": [text + str(i) for i in range(8)]})
    repeated = pyarrow.table({"text": pyarrow.array([text] * 64).dictionary_encode()})
    for table in (endless, large, repeated):
        path = tmp_path / "t.parquet"
        pyarrow.parquet.write_table(table, path, compression="zstd")
        assert path.stat().st_size < 10_000
        with pytest.raises(ValueError, match="expands more than 500-fold"):
            rows_of(path)
        assert [*tables.rows(path)][-1].content == b"expands more than 500-fold"


def test_a_parquet_file_that_claims_less_than_its_pages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "FREE_BYTES", 1 << 20)
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"text": ["a" * 3_000_000]})
    options = {"use_dictionary": False, "write_statistics": False, "compression": "zstd"}
    pyarrow.parquet.write_table(table, path, **options)
    whole = path.read_bytes()
    size = pyarrow.parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    numbers = []
    for number in (2 * size, 1000):  # in four bytes each, as the file writes them
        digits = [number >> shift & 127 for shift in (0, 7, 14, 21)]
        numbers.append(bytes([128 | digit for digit in digits[:3]] + digits[3:]))
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(whole[:footer] + whole[footer:].replace(*numbers))
    claimed = pyarrow.parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    assert claimed == 500

    def refused(*arguments, **named):
        raise AssertionError("a page was unpacked")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", refused)
    with pytest.raises(ValueError, match="expands more than 500-fold"):
        rows_of(path)


def test_the_sizes_of_pages_are_those_of_the_file(tmp_path):
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"text": [f"text {i % 50} " * 9 for i in range(9000)], "n": range(9000)})
    for options in ({}, {"use_dictionary": False}, {"data_page_version": "2.0"}):
        pyarrow.parquet.write_table(table, path, data_page_size=4000, **options)
        group = pyarrow.parquet.read_metadata(path).row_group(0)
        for i in range(2):
            column = group.column(i)
            found = parquet.page_bytes(path, column)
            # The file's number includes the headers of the pages.
            assert 0.9 * column.total_uncompressed_size < found <= column.total_uncompressed_size


@pytest.mark.parametrize(
    "forged",
    [b"", bytes([0x1C] * 40), bytes([0x1B, 0]), bytes([0x19, 0xF1]) + b"\xff" * 8 + b"\x01"],
    ids=["nothing", "nested", "a map", "a list of 2**61"],
)
def test_a_forged_page_header_ends(forged):
    """The last one claims more values than bytes: reading ends with the bytes."""
    with pytest.raises(ValueError):
        parquet.read_thrift(io.BytesIO(forged))


def test_a_damaged_gz_gives_what_it_has_and_a_reason(tmp_path):
    whole = gzip.compress(
        b"".join(json.dumps({"text": os.urandom(99).hex()}).encode() + b"\n" for _ in range(2000))
    )
    report = Report()
    path = write(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2])
    assert 500 < len([*files.documents(str(path), report)]) < 2000
    assert "damaged" in next(iter(report.skipped))
    with pytest.raises(ValueError, match="damaged"):
        rows_of(path)


def test_a_long_line_is_skipped_and_takes_no_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        file.seek(50_000_000)
        file.write(b'"}\n{"text": "short"}\n')
    report = Report()
    assert [*files.documents(str(path), report)] == ["short"]
    assert list(report.skipped) == ["longer than 4 MiB"]


def test_a_report_has_a_bound():
    report = Report()
    for i in range(MAX_NAMES + 5):
        report.skip("one reason", f"row {i}")
        report.note(f"note {i}")
    for i in range(100):
        report.skip(f"reason {i}", "a")
    assert len(report.skipped["one reason"]) == MAX_NAMES
    assert len(report.skipped) == MAX_REASONS + 1
    said = str(report)
    assert f"{MAX_NAMES + 5:,} skipped: one reason (row 0, row 1, row 2, ...)" in said
    assert f"{MAX_NAMES + 5 - MAX_REASONS:,} more notes" in said


# ---- folders -------------------------------------------------------------------------------------


def skipped(report: Report) -> dict[str, list[str]]:
    return {why: sorted(Path(name).name for name in names) for why, names in report.skipped.items()}


def test_only_regular_files_inside_a_folder_are_read(tmp_path):
    folder = tmp_path / "in"
    write(folder / "a.txt", "inside")
    write(tmp_path / "secret.txt", "outside")
    write(tmp_path / "other" / "b.txt", "outside")
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    (folder / "file").symlink_to(tmp_path / "secret.txt")
    (folder / "folder").symlink_to(tmp_path / "other")
    (folder / "loop").symlink_to(folder)
    (folder / "again.txt").symlink_to("a.txt")
    for path in (str(folder), str(folder / "**")):
        report = Report()
        assert [*files.documents(path, report)] == ["inside"]
        found = skipped(report)
        assert found.pop("a link to a folder", ["loop"]) == ["loop"]  # a glob leaves it out
        assert found.pop("a pipe, a socket or a device") == ["pipe"]
        assert found.pop("a link to nothing") == ["dangling"]
        outside = found.pop("a link that leads out of the folder")
        assert {"file"} <= {*outside} <= {"file", "folder", "b.txt"}
        assert "again.txt" in found.pop("a link to a file that is read already")
        assert not found
    with pytest.raises(ValueError, match=r"no file matches .*pipe.*a pipe, a socket or a device"):
        [*files.documents(str(folder / "pipe"))]


def test_names_of_any_bytes_are_read_and_shown_without_harm(tmp_path):
    for name in (b"caf\xe9.txt", b"new\nline.txt", b"\x1b[31mred.txt"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"text")
    bad = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"bad\xe9.bin")))
    bad.write_bytes(b"\0")
    report = Report()
    assert len([*files.documents(str(tmp_path), report)]) == 3
    assert str(report).isprintable()
    assert "bad?.bin" in str(report)
    assert files.version(str(tmp_path)).startswith("files-")


def test_what_programs_wrote_is_no_data(tmp_path):
    write(tmp_path / "notes.txt", "mine")
    write(tmp_path / "app" / "config.json", '{"mine": 1}')
    write(tmp_path / "runs" / "x" / "config.json", '{"preset": "gpt", "family": "gpt"}')
    write(tmp_path / "runs" / "x" / "metrics.jsonl", '{"text": "loss"}')
    write(
        tmp_path / "data" / "cache" / "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55"
    )
    write(tmp_path / "data" / "cache" / "old.txt", "a download")
    write(tmp_path / "mine" / "manifest.json", "{}")
    write(tmp_path / "mine" / "train-00000.bin", "ids")
    write(tmp_path / "mine.part" / "journal.json", "{}")
    write(tmp_path / "mine.part" / "documents.jsonl", '{"text": "again"}')
    write(tmp_path / "exported" / "config.json", "{}")
    write(tmp_path / "exported" / "model.safetensors", "weights")
    write(tmp_path / "exported" / "merges.txt", "a b")
    report = Report()
    found = [path.relative_to(tmp_path).as_posix() for path in reading.find(str(tmp_path), report)]
    assert found == ["app/config.json", "notes.txt"]
    assert skipped(report) == {
        "a run, no data": ["x"],
        "a cache, no data": ["cache"],
        "a prepared folder, no data": ["mine"],
        "a prepared folder that is not complete, no data": ["mine.part"],
        "a model, no data": ["exported"],
    }
    with pytest.raises(ValueError, match=r"no file matches .*a run, no data"):
        reading.find(str(tmp_path / "runs" / "x"))


def test_a_version_follows_the_content_alone(tmp_path):
    path = write(tmp_path / "one" / "a.txt", "one")
    before = files.version(str(path))
    os.utime(path, (1, 1))
    assert files.version(str(path)) == before
    assert files.version(str(write(tmp_path / "two" / "b.txt", "one"))) == before
    times = path.stat()
    path.write_text("two", encoding="utf-8")  # of the same size and time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files.version(str(path)) != before
    assert files.version(str(write(tmp_path / "two" / "b.csv", "one"))) != before


def test_a_picture_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a pipe, a socket or a device"):
        pictures.decode(tmp_path / "a.png", 8, 3)


# ---- tars ----------------------------------------------------------------------------------------


def header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def test_a_tar_that_claims_more_than_it_has_ends_at_once(tmp_path):
    picture = (
        header("1.png", 4) + b"\x89PNG" + bytes(508) + header("1.txt", 5) + b"a fox" + bytes(507)
    )
    for size in (1 << 40, 1 << 20, 100):
        path = write(tmp_path / "a.tar", picture + header("2.png", size))
        report = Report()
        assert [sample.captions for sample in tars.samples(path, report)] == [("a fox",)]
        assert any("not a whole, unpacked tar" in reason for reason in report.skipped)


@pytest.mark.parametrize("size", range(-4096, 0, 512))
def test_a_tar_whose_sizes_lead_back_ends(tmp_path, size):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("1.png", "2.png"):
            member = tarfile.TarInfo(name)
            member.pax_headers = {"size": str(size)} if name == "2.png" else {}
            tar.addfile(member)
    report = Report()
    assert len([*tars.samples(path, report)]) == 1
    assert any("size below zero" in reason for reason in report.skipped)


def test_ranges_of_tars_have_a_limit():
    with pytest.raises(ValueError, match="10,000,000,000 files, more than 100,000: give a glob"):
        tars.find("a-{0..9999999999}.tar")
    with pytest.raises(ValueError, match="more than 100,000"):
        tars.find("{0..999}-{0..999}-{0..999}.tar")
    with pytest.raises(ValueError, match="empty: give the smaller number first"):
        tars.find("a-{3..1}.tar")


def test_members_that_cannot_be_used_are_counted(tmp_path):
    path = tmp_path / "a.tar"
    contents = {
        "1.png": b"p",
        "1.PNG": b"p",
        "1.txt": b"\xef\xbb\xbfone\n\ntwo",
        "README": b"",
        "._1.png": b"p",
        "2.png": b"p",
        "2.json": b'{"caption": ["\\ud800", NaN, "b"]}',
    }
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    report = Report()
    assert [sample.captions for sample in tars.samples(path, report)] == [
        ("one", "two"), ("\ufffd", "b"),
    ]  # fmt: skip
    counts = Counter({why: len(names) for why, names in report.skipped.items()})
    assert counts == {
        "hidden, or without an extension": 2,
        "a second file of that name and extension": 1,
    }
