"""Files of strangers -> bytes and text, with limits: the lowest layer of all readers.

Files may come from strangers. So a folder is searched for regular files inside it, and for nothing
else. A file may be compressed (.gz, .zst), but a small one that expands to a huge one is read up to
a limit. Text is UTF-8; a few invalid bytes are replaced and counted, and with many of them the file
is refused. Another encoding is never guessed: almost any bytes are valid cp1252, also Polish, Greek
or Japanese text, which would become nonsense without an error.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from data.download import sha256_of
from data.report import Report

HEAD_BYTES = 1 << 16  # the start of a file, which shows whether it is binary
# Typing errors and old encodings leave a few invalid bytes. With more of them, the whole file is in
# another encoding.
MAX_REPLACED_FRACTION = 0.01
NOT_UTF8 = "not UTF-8, convert it"
REPLACEMENT = "\ufffd"  # stands for invalid bytes
ESCAPED = re.compile("[\udc80-\udcff]+")  # invalid bytes, as "surrogateescape" decodes them
BYTE_ORDER_MARK = "\ufeff"  # some editors write it at the start of a file
MAX_LINE_BYTES = 1 << 22  # a longer document is skipped
TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"
MAX_CELL_CHARS = (
    1 << 26
)  # of a table without documents: a longer cell shows that a quote is missing
PIECE_CHARS = 1 << 20  # decoded at a time
SKIP_FOLDERS = {"__pycache__", "node_modules"}
PACKED = (".gz", ".zst")
# Text becomes five to ten times smaller by compression, but 32,000 equal bytes can become one.
MAX_EXPANSION = 500
FREE_BYTES = 1 << 26  # a file that expands to less may expand by any factor


def extra(module: str) -> ModuleType:
    """Import a library that only some data need.

    If it is missing, raises ValueError with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        advice = "pip install -r data/requirements.txt"
        raise ValueError(f"these data need {module.split('.')[0]}, run: {advice}") from error


def reason_of(error: Exception) -> str:
    """The reason why a file was not read: of an OSError, without the path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---- which files ---------------------------------------------------------------------------------


def made_here(folder: str, names: set[str]) -> str | None:
    """What a folder with these names in it is, if it holds what programs wrote; otherwise None.

    Such a folder is not read as data: a run in "." would train the next one.
    """
    if "CACHEDIR.TAG" in names:
        return "a cache"
    if names & {"train-00000.bin", "train.images"} and "manifest.json" in names:
        return "a prepared folder"
    if "journal.json" in names and folder.endswith(".part"):
        return "a prepared folder that is not complete"
    weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if weights and names & {"config.json", "meta.json", "judge.json"}:
        return "a model"
    if "config.json" in names:
        config = os.path.join(folder, "config.json")
        if os.path.isfile(config):
            with open(config, "rb") as file:
                start = file.read(HEAD_BYTES)
            if b'"preset"' in start and b'"family"' in start:
                return "a run"
    if names & {"adapter_config.json", "model_index.json"}:
        return "a model"
    return None


def not_regular(path: Path, top: str, real: str) -> str | None:
    """The reason why a path is not read; None for a regular file below `top`.

    real: its real path; top: that of the folder.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "a link to nothing" if path.is_symlink() else reason_of(error)
    if not Path(real).is_relative_to(top):
        return "a link that leads out of the folder"
    if stat.S_ISDIR(mode):
        return "a link to a folder"
    if not stat.S_ISREG(mode):
        return "a pipe, a socket or a device"
    return None


def regular(paths: list[Path], top: str, report: Report) -> list[Path]:
    """Those paths that are regular files below `top`, each file once, sorted.

    The report has the others. top: the real path of a folder.
    """
    folders: dict[Path, str] = {}  # their real paths
    entries = set()  # a glob comes to the same name again where links make a loop
    found: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path.as_posix())):
        if path.parent not in folders:
            folders[path.parent] = os.path.realpath(path.parent)
        entry = os.path.join(folders[path.parent], path.name)
        if entry in entries:
            continue
        entries.add(entry)
        real = os.path.realpath(entry) if path.is_symlink() else entry
        reason = not_regular(path, top, real)
        if reason is None and real in found:
            reason = "a link to a file that is read already"
        if reason:
            report.found += 1
            report.skip(reason, path.as_posix())
        else:
            found[real] = path
    return sorted(found.values(), key=Path.as_posix)


def below(folder: str, report: Report) -> list[Path]:
    """The regular files in a folder and all below it; the report has what was left out.

    Hidden files and folders are left out silently.
    """
    paths = []
    problems: list[OSError] = []
    for here, subfolders, names in os.walk(folder, onerror=problems.append):
        kind = made_here(here, {*subfolders, *names})
        if kind:
            report.skip(f"{kind}, no data", here)
            subfolders.clear()
            continue
        subfolders[:] = [s for s in subfolders if s[0] != "." and s not in SKIP_FOLDERS]
        links = [name for name in subfolders if os.path.islink(os.path.join(here, name))]
        paths += [Path(here, name) for name in [*names, *links] if name[0] != "."]
    for error in problems:
        report.skip(reason_of(error), str(error.filename))
    return regular(paths, os.path.realpath(folder), report)


def find(path: str, report: Report | None = None) -> list[Path]:
    """The files that `path` (a file, a folder or a glob) names, sorted.

    The report has what was left out, such as links that lead out of the folder. Raises ValueError
    if there is no file.
    """
    if report is None:
        report = Report()
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = below(path, report)
    else:
        plain = glob.escape(path) == path
        top = os.path.dirname(re.split(r"[*?\[]", path)[0]) or "."
        matches = [Path(name) for name in glob.glob(path, recursive=True)]
        files = [match for match in matches if match.is_symlink() or not match.is_dir()]
        found = regular(files, os.path.realpath(path if plain else top), report)
    if not found:
        seen = f" ({report})" if report.skipped else ""
        raise ValueError(
            f"no file matches {path!r}{seen}: give a text file, a folder with text files, "
            f'a glob in quotes such as "notes/*.txt", or the name of a data set'
        )
    return found


def state_of(path: Path) -> str | None:
    """The SHA-256 of a file's content; None if it is missing."""
    return sha256_of(path) if path.is_file() else None


def fingerprint(found: list[Path]) -> str:
    """A hash of all that the documents depend on: the files' contents, order, and kinds."""
    digest = hashlib.sha256()
    for path in found:
        kind = "".join(path.suffixes[-2:]).lower()
        digest.update(f"{sha256_of(path)} {kind}\0".encode("utf-8", "surrogateescape"))
    return f"files-3 {digest.hexdigest()}"


# ---- compressed files ----------------------------------------------------------------------------


def unpacked_name(path: Path) -> str:
    """The name of a file in lower case, without .gz or .zst: what it is once it is unpacked."""
    name = path.name.lower()
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return name


class Unpacked(io.RawIOBase):
    """The content of a compressed file, up to a limit. Raises ValueError where it is damaged."""

    def __init__(self, stream: BinaryIO, limit: int):
        self.stream = stream
        self.left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            # `read` would lose what it has got when it comes to the damage.
            content = self.stream.read1(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"damaged: {error}") from error
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"expands more than {MAX_EXPANSION}-fold")
        buffer[: len(content)] = content
        return len(content)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read; a .gz or .zst is unpacked on the way.

    The decompressor of .zst uses a window of up to 128 MiB, as `zstd` does.
    """
    with open(path, "rb") as file:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=file)
        elif suffix == ".zst":
            stream = extra("pyarrow").CompressedInputStream(file, "zstd")
        else:
            yield file
            return
        limit = MAX_EXPANSION * path.stat().st_size + FREE_BYTES
        yield io.BufferedReader(Unpacked(stream, limit), 1 << 20)


# ---- bytes -> text -------------------------------------------------------------------------------


def check_head(head: bytes) -> None:
    """Raise ValueError, with the reason, if a file that starts so is not text."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("UTF-16, save it as UTF-8")
    if b"\0" in head:
        raise ValueError("binary, it has NUL bytes")


def check_replaced(replaced: int, chars: int) -> None:
    """Raise ValueError if so many of the characters were invalid that the encoding is another."""
    if replaced > MAX_REPLACED_FRACTION * chars:
        raise ValueError(NOT_UTF8)


def without_marks(text: str) -> str:
    """The text without byte order marks: files that were joined have them at starts of lines."""
    return text.removeprefix(BYTE_ORDER_MARK).replace(f"\n{BYTE_ORDER_MARK}", "\n")


def decode(source: bytes) -> tuple[str, int]:
    """Turn bytes into (text, number of invalid sequences replaced); newlines become "\\n".

    Raises ValueError with the reason if the bytes are not UTF-8 text.
    """
    check_head(source)
    text = source.decode("utf-8", "replace")
    replaced = text.count(REPLACEMENT) - source.count(REPLACEMENT.encode("utf-8"))
    check_replaced(replaced, len(text))
    text = without_marks(text.replace("\r\n", "\n").replace("\r", "\n"))
    if not text.strip():
        raise ValueError("empty")
    return text, replaced


def read(path: Path) -> tuple[str, int]:
    """`decode` of a file. Only the first bytes of a large binary file are read."""
    with open_file(path) as file:
        source = file.read(HEAD_BYTES)
        if b"\0" not in source:  # with a NUL byte, `decode` refuses it anyway
            source += file.read()
    return decode(source)


def byte_lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines of a stream; None for a line longer than MAX_LINE_BYTES.

    A line ends at "\\n" alone. A long line is never in memory as a whole.
    """
    too_long = False  # whether the current line is
    while line := stream.readline(MAX_LINE_BYTES):
        ends = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
        if ends:
            yield None if too_long else line
        too_long = not ends
    if too_long:
        yield None


def is_valid(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, and so no invalid bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class TextFile:
    """The text of a file, a part at a time, with invalid bytes as "surrogateescape" decodes them.

    chars, invalid: how many characters were read so far, and how many runs of invalid bytes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.chars = 0
        self.invalid = 0

    def count(self, text: str) -> str:
        """Count a part of the text, and return it."""
        self.chars += len(text)
        if "\0" in text:
            raise ValueError("binary, it has NUL bytes")
        if not is_valid(text):
            self.invalid += len(ESCAPED.findall(text))
        return text.replace(BYTE_ORDER_MARK, "")

    def parts(self, lines: bool) -> Iterator[str]:
        """Yield the lines, of any kind of line end; or else pieces of PIECE_CHARS.

        Raises ValueError if the file is no text, and at its end if too much of it is invalid.
        """
        with open_file(self.path) as file:
            check_head(file.peek(HEAD_BYTES))
            text = io.TextIOWrapper(file, "utf-8", "surrogateescape")
            while True:
                part = text.readline(MAX_CELL_CHARS) if lines else text.read(PIECE_CHARS)
                if len(part) == MAX_CELL_CHARS:
                    raise ValueError(f"a line of more than {MAX_CELL_CHARS >> 20} MiB")
                if not part:
                    break
                yield self.count(part)
        check_replaced(self.invalid, self.chars)


def replace_invalid(text: str) -> str:
    """The text with U+FFFD for each run of invalid bytes, and for half a surrogate pair."""
    if is_valid(text):
        return text
    text = ESCAPED.sub(REPLACEMENT, text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
