"""Technical English that is already on your disk: the documentation of Python, numpy and torch.

This is the default text, because it needs no download. It consists of Python's language reference
(the topics of `help()`) and of the docstrings of the standard library, numpy and torch. To import
all these modules would be slow and would run their code. So `ast` parses each file, and the
docstrings are read from the syntax tree.

A document is a topic, a module's docstring, a function's, or those of a class and all of its
methods. Each docstring has a heading: the dotted name and signature. An exact copy of an earlier
docstring is left out. A share of HELD_OUT of the documents is validation and test, see splits.py.

    python -m data.docs
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import warnings
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from data import command
from data.report import Report, show
from data.splits import Document, split_of
from data.stdlib import HELD_OUT, SKIP_FOLDERS, library_folder, module_name, python_files

PACKAGES = ("numpy", "torch")
SKIPPED = SKIP_FOLDERS | {"testing", "_vendor"}
# Functions of torch and numpy written in C get their docstring from a call: add_docstr(f, "...").
ATTACHERS = {"add_docstr", "add_docstr_all", "add_newdoc"}
# A line such as "    {input}", a template that is filled in only when the package is imported.
PLACEHOLDER = re.compile(r"^ *\{\w+\} *\n", re.MULTILINE)

Entry = tuple[str, str]  # heading, docstring


# ---- a source file -> its docstrings -------------------------------------------------------------


def attached_docstring(call: ast.expr) -> Entry | None:
    """Read `add_docstr(torch.abs, "...")` or numpy's `add_newdoc("module", "name", "...")`.

    Strings with several lines are the docstring; those of one line are the name.
    """
    if not isinstance(call, ast.Call) or not call.args:
        return None
    function = getattr(call.func, "id", getattr(call.func, "attr", None))
    if function not in ATTACHERS:
        return None
    nodes = [n for n in ast.walk(call) if isinstance(n, ast.Constant) and type(n.value) is str]
    nodes.sort(key=lambda n: (n.lineno, n.col_offset))
    strings = [n.value for n in nodes]
    text = "".join(s for s in strings if "\n" in s)
    name = ".".join(s for s in strings if "\n" not in s) or ast.unparse(call.args[0])
    return name, PLACEHOLDER.sub("", text)


def entries_of(body: list[ast.stmt], prefix: str) -> Iterator[Entry]:
    """Yield the documented classes, methods and functions of a body, in the order of the source."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield f"{prefix}.{node.name}({ast.unparse(node.args)})", docstring
        elif isinstance(node, ast.ClassDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                bases = ", ".join(map(ast.unparse, node.bases))
                yield f"class {prefix}.{node.name}({bases})", docstring
            yield from entries_of(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            yield from entries_of(node.body, prefix)
        elif isinstance(node, ast.Expr):
            entry = attached_docstring(node.value)
            if entry:
                yield entry


def docstrings(source: bytes, module: str) -> list[Entry]:
    """The (heading, docstring) pairs of one source file.

    Raises SyntaxError or ValueError for a source that this Python cannot parse.
    """
    # A syntax tree is many small objects without a cycle, so the garbage collector would search
    # it for nothing, again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escape sequences in other people's code
            tree = ast.parse(source)
        entries = []
        head = ast.get_docstring(tree, clean=False)
        if head:
            entries.append((f"module {module}", head))
        entries.extend(entries_of(tree.body, module))
        return entries
    finally:
        if collecting:
            gc.enable()


# ---- packages and topics -> documents ------------------------------------------------------------


def name_in(heading: str) -> str:
    """`class json.JSONDecoder(object)` -> json.JSONDecoder"""
    return heading.removeprefix("class ").split("(")[0]


def definition_of(heading: str, module: str) -> str:
    """The definition at the top of the module that an entry belongs to, which is held out whole.

    `json.decoder.JSONDecoder.decode(self, s)` in json.decoder -> json.decoder:JSONDecoder. The
    module's own docstring belongs to the module.
    """
    if heading.startswith("module "):
        return module
    name = name_in(heading)
    if name.startswith(f"{module}."):
        return f"{module}:{name[len(module) + 1 :].split('.')[0]}"
    # Attached to something defined elsewhere: numpy.ndarray.T -> numpy:ndarray.
    package, *rest = name.split(".")
    return f"{package}:{rest[0]}" if rest else module


def package_documents(
    root: Path, package: str, seen: set[bytes], report: Report
) -> Iterator[Document]:
    """Yield the documents of each file below `root` that has a new docstring.

    `seen` has the hashes of the docstrings so far, and is extended.
    """
    for path in python_files(root, SKIPPED):
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            continue  # almost certainly no docstring; and parsing is what takes the time
        report.found += 1
        module = module_name(path, root, package)
        try:
            entries = docstrings(source, module)
        except (SyntaxError, ValueError) as error:
            report.skip(f"does not parse: {type(error).__name__}", module)
            continue
        found = False
        named = [(definition_of(heading, module), heading, text) for heading, text in entries]
        for definition, group in groupby(named, itemgetter(0)):
            sections = []
            for _, heading, docstring in group:
                text = inspect.cleandoc(docstring).strip()
                digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
                if text and digest not in seen:
                    seen.add(digest)
                    sections.append(f"{heading}\n\n{text}\n")
            if sections:
                found = True
                yield Document("\n".join(sections), split_of(definition, HELD_OUT), definition)
        if found:
            report.used += 1
        else:
            report.skip("no docstring of its own", module)


def reference_topics(report: Report) -> Iterator[Document]:
    """Yield the chapters of the language reference, as `help("TOPIC")` prints them."""
    path = library_folder() / "pydoc_data" / "topics.py"
    if not path.exists():
        report.skip("not installed", "the language reference")
        return
    tree = ast.parse(path.read_bytes())
    # The file is a single assignment, `topics = {"TOPIC": "text", ...}`.
    table = next(n.value for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign))
    for name, topic in ast.literal_eval(table).items():
        report.found += 1
        report.used += 1
        name = f"topic {name}"
        yield Document(topic.strip() + "\n", split_of(name, HELD_OUT), name)


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    parts = ["docs-2", f"python-{platform.python_version()}"]
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            parts.append(f"{package}-{importlib.metadata.version(package)}")
    return " ".join(parts)


def documents(
    report: Report | None = None, packages: tuple[str, ...] = PACKAGES
) -> Iterator[Document]:
    """Yield the documents: the language reference, the standard library, then each package."""
    if report is None:
        report = Report()
    seen: set[bytes] = set()
    yield from reference_topics(report)
    yield from package_documents(library_folder(), "", seen, report)
    for package in packages:
        spec = importlib.util.find_spec(package)  # a top-level name, so nothing is imported
        if spec is None or not spec.submodule_search_locations:
            report.skip("not installed", package)
            continue
        root = Path(spec.submodule_search_locations[0])
        yield from package_documents(root, package, seen, report)


def look() -> None:
    """Print the size of the data set and the start of its first document."""
    report = Report()
    show((document.text for document in documents(report)), report)


if __name__ == "__main__":
    command.run("docs", __doc__, look)
