"""The functions of Python's standard library that say what they do: prompts for a code model.

Each function and method with a docstring gives a prompt, its signature and docstring, and the rest
of its body is what a model may write. Methods are moved to the left, as if they stood alone. The
functions of one definition at the top of a file are in its split, that of data/stdlib.py, so that a
model that was trained on the source code never read those that are held out.

    python -m data.functions
"""

import ast
import io
import re
import warnings
from collections.abc import Iterator

from data import command, stdlib
from data.report import Report, counted
from data.splits import SPLITS, Document


def prompts_of(source: str) -> Iterator[tuple[str, str]]:
    """(name, signature and docstring) of each function that has a docstring and more of a body.

    The prompt ends with the line end behind the docstring. Raises SyntaxError if the source is no
    Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings
        tree = ast.parse(source)
    lines = io.StringIO(source, newline=None).readlines()  # cut as Python does, not at form feeds
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        if ast.get_docstring(node) and node.body[0].lineno > node.lineno:
            prompt = "".join(lines[node.lineno - 1 : node.body[0].end_lineno])
            # A docstring may begin further left than its function: those lines stay.
            yield node.name, re.sub(rf"(?m)^[ \t]{{{node.col_offset}}}", "", prompt)


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the prompts, each text once."""
    if report is None:
        report = Report()
    seen = set()
    for document in stdlib.documents():
        try:
            found = list(prompts_of(document.text))
        except (SyntaxError, ValueError) as error:
            report.skip(f"no Python: {type(error).__name__}", document.name)
            continue
        for name, prompt in found:
            report.found += 1
            if prompt in seen:
                report.skip("the same as another", name)
                continue
            seen.add(prompt)
            report.used += 1
            yield Document(prompt, document.split, f"{document.name} {name}")


def look() -> None:
    """Print the number of prompts in each split, and a few of them."""
    report = Report()
    found = list(documents(report))
    for document in found[:: len(found) // 3][:3]:
        print(f"--- {document.name}\n{document.text}")
    counts = [f"{sum(d.split == split for d in found):,} {split}" for split in SPLITS]
    print(f"{counted(len(found), 'prompts')} ({', '.join(counts)}); {report}")


if __name__ == "__main__":
    command.run("functions", __doc__, look)
