"""English and its translation, string by string: the catalogues of programs.

Programs show messages in the user's language. They find them in catalogues, which translators have
written: files NAME.mo, as GNU gettext defines them. They are on the disk of most Linux machines,
below /usr/share/locale. Two packages hold more; with them alone, the data are the same everywhere:

    pip download --no-deps --only-binary :all: gramps==6.0.8 -d data/cache/packages
    pip download --no-deps --only-binary :all: wagtail==8.0.1 -d data/cache/packages
    python -m data.translations de

A .mo file has two tables of strings in the same order (the manual of gettext, section "MO Files"):

    magic  0  number N  offset of table 1  offset of table 2  ...    seven integers of 32 bits
    table 1: N times (length, offset) of an English string;  table 2: of its translation

The English string may start with a context and the sign 4. Where there is a plural, both are rows
of forms, separated by zeros; only the first form, singular, is used here.

A pair is used once for each English string, without the signs that mark a key ("_Open"). Left out
are strings without a letter, equal in both languages (most are names), or longer than MAX_CHARS.
Near duplicates are left out before the split. It is by the words of the English string alone, so
that "Open file" and "Open file..." are in one split. Held-out strings that repeat training text are
left out (splits.py): programs repeat sentences with another name in them.

Licence: that of each program, most GPL or LGPL; gramps GPL-2.0-or-later, wagtail BSD-3-Clause.
"""

import hashlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data import command, dedupe, wheels
from data.report import Report, counted
from data.splits import SPLITS, TEST, VAL, repeating, split_of

GRAMPS = wheels.Package(
    name="gramps",
    version="6.0.8",
    archive="gramps-6.0.8-py3-none-any.whl",
    sha256="56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c",
    licence="GPL-2.0-or-later",
)
WAGTAIL = wheels.Package(
    name="wagtail",
    version="8.0.1",
    archive="wagtail-8.0.1-py3-none-any.whl",
    sha256="1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
    licence="BSD-3-Clause",
)
PACKAGES = (GRAMPS, WAGTAIL)
SYSTEM = Path("/usr/share/locale")
HELD_OUT = 0.1  # share of the strings, half for validation and half for test
MAX_CHARS = 400
MAX_FILE_BYTES = 1 << 24  # the largest catalogue of a Debian system has 1.2 MB
MAGIC = 0x950412DE
LANGUAGE = re.compile(r"[a-z]{2,3}(_[A-Z]{2})?(@[a-z]+)?")
CHARSET = re.compile(r"charset=([\w-]+)")
KEY_MARK = re.compile(r"(?<!\w)(_|&(?!\w+;))(?=[^\W_])")  # of _Open and &Open, not of &amp;
INDEX_MB = 16


class Pair(NamedTuple):
    """An English string and its translation."""

    source: str
    target: str
    program: str  # name of the catalogue
    split: str


# ---- a catalogue -> strings ----------------------------------------------------------------------


def parse(content: bytes) -> dict[str, str]:
    """{English string: translation} of a .mo file.

    Raises ValueError if it is none, is cut short, or has another encoding than it says.
    """
    if len(content) < 28:
        raise ValueError("no catalogue, shorter than its header")
    order = "<" if struct.unpack("<I", content[:4])[0] == MAGIC else ">"
    magic, _, count, *tables = struct.unpack(f"{order}5I", content[:20])
    if magic != MAGIC:
        raise ValueError("no catalogue of gettext")

    def strings(table: int) -> list[bytes]:
        if table + 8 * count > len(content):
            raise ValueError("cut short")
        places = struct.unpack_from(f"{order}{2 * count}I", content, table)
        ends = [length + start for length, start in zip(places[::2], places[1::2])]
        if max(ends, default=0) > len(content):
            raise ValueError("cut short")
        return [content[start:end] for start, end in zip(places[1::2], ends)]

    pairs = dict(zip(strings(tables[0]), strings(tables[1])))
    header = CHARSET.search(pairs.pop(b"", b"").decode("latin-1"))
    charset = header[1] if header else "utf-8"
    found = {}
    try:
        for source, target in pairs.items():
            without_context = source.rpartition(b"\x04")[2]
            english = without_context.split(b"\0")[0].decode("utf-8")
            found[english] = target.split(b"\0")[0].decode(charset)
    except (UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"not {charset}") from error
    return found


def without_key_mark(text: str) -> str:
    """Remove the sign before the letter of a key, if there is one: "_Open" -> "Open"."""
    if len(KEY_MARK.findall(text)) == 1:
        text = KEY_MARK.sub("", text)
    return text


# ---- which catalogues ----------------------------------------------------------------------------


def package_catalogues(language: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the catalogues in those of PACKAGES that were fetched."""
    ending = f"/{language}/LC_MESSAGES/"
    for package in PACKAGES:
        if package.path.exists():
            for name in sorted(wheels.names(package)):
                if ending in name and name.endswith(".mo"):
                    yield f"{package.name}/{name}", wheels.read(package, name)


def system_catalogues(language: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of those on this machine."""
    for path in sorted(SYSTEM.joinpath(language, "LC_MESSAGES").glob("*.mo")):
        if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
            yield path.name, path.read_bytes()


def catalogues(language: str, system: bool) -> dict[str, bytes]:
    """Name -> content of all catalogues of a language, with those of this machine if `system`.

    Raises ValueError, with a command, if there is none.
    """
    if not LANGUAGE.fullmatch(language):
        raise ValueError(f"{language!r} is no language: give a code such as de, fr or pt_BR")
    found = dict(package_catalogues(language))
    if system:
        found |= dict(system_catalogues(language))
    if not found:
        where = f"{SYSTEM}/{language} or in " if system else ""
        raise ValueError(f"no catalogue of {language!r} in {where}a package: {GRAMPS.command}")
    return found


def version(language: str, system: bool = True) -> str:
    """A name for the exact pairs: it changes if they do."""
    digest = hashlib.sha256()
    for name, content in catalogues(language, system).items():
        digest.update(name.encode() + hashlib.sha256(content).digest())
    return f"translations-1 {language} {digest.hexdigest()}"


# ---- strings -> pairs ----------------------------------------------------------------------------


def reason_to_skip(source: str, target: str) -> str | None:
    """Why a string is not used; None if it is."""
    if not target.strip():
        return "not translated"
    if max(len(source), len(target)) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if not re.search(r"[^\W\d_]{2}", source):
        return "no word"
    if source == target:
        return "the same in both languages"
    return None


def rows(language: str, report: Report | None = None, system: bool = True) -> list[Pair]:
    """The pairs of English and a language, such as "de" or "pt_BR".

    system: whether to read the catalogues of this machine too. Raises ValueError, with a command,
    if there is no catalogue.
    """
    if report is None:
        report = Report()
    found = []
    seen = dedupe.Seen(INDEX_MB)
    for name, content in catalogues(language, system).items():
        program = Path(name).stem
        try:
            strings = parse(content)
        except ValueError as error:
            report.found += 1
            report.skip(f"catalogue: {error}", name)
            continue
        for english, translation in strings.items():
            report.found += 1
            source = " ".join(without_key_mark(english).split())
            target = " ".join(without_key_mark(translation).split())
            reason = reason_to_skip(source, target)
            if reason is None:
                reason = dedupe.add_new(seen, source)
            if reason:
                report.skip(reason, f"{program}: {source[:40]}")
                continue
            words = " ".join(dedupe.WORD.findall(source.lower()))
            found.append(Pair(source, target, program, split_of(words, HELD_OUT)))
    removed, shares = repeating([pair.source for pair in found], [pair.split for pair in found])
    for i in sorted(removed):
        report.skip("held out, but training has 13-word runs of it", found[i].source[:40])
    report.note(f"{shares[VAL]:.2%} of validation and {shares[TEST]:.2%} of test in such runs")
    found = [pair for i, pair in enumerate(found) if i not in removed]
    report.used += len(found)
    return found


def look(language: str) -> None:
    """Print a few pairs and the size of each split."""
    report = Report()
    found = rows(language, report)
    for pair in found[:: max(1, len(found) // 8)]:
        print(f"{pair.program}: {pair.source}\n    {pair.target}")
    print(report)
    for split in SPLITS:
        print(f"{split}: {counted(sum(pair.split == split for pair in found), 'pairs')}")


if __name__ == "__main__":
    command.run("translations", __doc__, look, "LANGUAGE")
