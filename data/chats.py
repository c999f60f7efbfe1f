"""Questions and answers about the standard library: a small real instruction set, no download.

Each conversation is about one documented function or class. The answers are read from the source
code, which is never imported:

    user: What does filecmp.cmp do?       assistant: Compare two files.
    user: Which arguments does it take?   assistant: f1, f2, shallow
    user: In which module is it?          assistant: It is in the module filecmp.

In a quarter of the conversations a system message asks for short answers. The choice, order and
wording of the questions are drawn by a generator whose seed is the name of the function. So they
are the same on every machine with the same Python.

The splits are those of data/docs.py: what is said about a class or function is held out here if its
documentation is held out there. So a model that was trained on `docs` has not read the answers. A
few are left out because training has the same sentence about another function, or too many of its
words in 13-word runs.

    python -m data.chats
"""

import ast
import inspect
import json
import platform
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data import command, splits
from data.docs import SKIPPED, definition_of, docstrings, name_in
from data.report import Report, show
from data.splits import TRAIN, split_of
from data.stdlib import HELD_OUT, library_folder, module_name, python_files

MAX_ANSWER_CHARS = 200
SENTENCE = re.compile(r".+?[.!?](?=\s|$)")
SHORT = "Answer as briefly as you can."
SHORT_SHARE = 0.25  # of the conversations
WHAT = ("What does {} do?", "What is {}?", "Explain {}.", "Tell me what {} is for.")
WHERE = ("In which module is {}?", "Where do I find {}?", "What do I import for {}?")
ARGUMENTS = ("Which arguments does {} take?", "What are the arguments of {}?")

Messages = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]


def one_line(text: str) -> str:
    return " ".join(text.split())


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line; the whole paragraph if none ends."""
    paragraph = one_line(inspect.cleandoc(docstring).strip().split("\n\n")[0])
    found = SENTENCE.match(paragraph)
    return found[0] if found else paragraph


def argument_names(signature: str) -> list[str]:
    """`self, a, *, b=1, **rest` -> a, b, rest"""
    arguments = ast.parse(f"def f({signature}): 0").body[0].args
    listed = [
        *arguments.posonlyargs,
        *arguments.args,
        arguments.vararg,
        *arguments.kwonlyargs,
        arguments.kwarg,
    ]
    names = [argument.arg for argument in listed if argument]
    return [name for name in names if name not in ("self", "cls")]


def conversation(heading: str, meaning: str, module: str) -> Messages:
    """One to three questions about the function or class of a heading of data/docs.py."""
    name = name_in(heading)
    draw = random.Random(name)
    short = draw.random() < SHORT_SHARE

    # The possible exchanges: each is several wordings of a question, and the answer.
    place = module if short else f"It is in the module {module}."
    exchanges = [(WHAT, meaning), (WHERE, place)]
    if not heading.startswith("class "):
        arguments = ", ".join(argument_names(heading.partition("(")[2][:-1]))
        none = "none" if short else "It takes none."
        exchanges.append((ARGUMENTS, arguments or none))

    messages = []
    if short:
        messages.append({"role": "system", "content": SHORT})
    chosen = draw.sample(exchanges, draw.randint(1, len(exchanges)))
    for i, (questions, answer) in enumerate(chosen):
        subject = name if i == 0 else "it"
        question = draw.choice(questions).format(subject)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def version() -> str:
    """A name for the exact conversations: it changes if they do."""
    return f"chats-3 python-{platform.python_version()}"


class Entry(NamedTuple):
    """A docstring of the standard library."""

    heading: str
    docstring: str
    module: str
    split: str


def library_entries(report: Report) -> Iterator[Entry]:
    """Yield the docstrings of all modules, with the split of the definition each belongs to."""
    root = library_folder()
    for path in python_files(root, SKIPPED):
        module = module_name(path, root, "")
        try:
            found = docstrings(path.read_bytes(), module)
        except (SyntaxError, ValueError) as error:
            report.skip(f"does not parse: {type(error).__name__}", module)
            continue
        for heading, docstring in found:
            split = split_of(definition_of(heading, module), HELD_OUT)
            yield Entry(heading, docstring, module, split)


def said_in(messages: Messages) -> str:
    """What the assistant says in a conversation."""
    return "\n".join(m["content"] for m in messages if m["role"] == "assistant")


def conversations(report: Report | None = None) -> Iterator[dict[str, str | Messages]]:
    """Yield a conversation for each public function, method and class with a docstring:

    {"split": "train", "val" or "test", "messages": [...]}
    """
    if report is None:
        report = Report()
    found = {}  # name -> (split, messages)
    meanings = set()
    entries = list(library_entries(report))
    training = [entry.docstring for entry in entries if entry.split == TRAIN]
    read_in_training = one_line(" ".join(training))
    for heading, docstring, module, split in entries:
        if heading.startswith("module "):
            continue
        name = name_in(heading)
        meaning = first_sentence(docstring)
        report.found += 1
        if name.startswith("_") or "._" in name:
            report.skip("private", name)
        elif not 0 < len(meaning) <= MAX_ANSWER_CHARS:
            report.skip(f"no sentence of at most {MAX_ANSWER_CHARS} characters", name)
        elif meaning in meanings or name in found:
            report.skip("explained as another is", name)
        elif split != TRAIN and meaning in read_in_training:
            report.skip("held out, but training has the explanation too", name)
        else:
            meanings.add(meaning)
            found[name] = (split, conversation(heading, meaning, module))

    # Held-out answers that are in the training text of `docs`, though in other words around them.
    shares = []
    for held_out in splits.HELD_OUT:
        names = [name for name, (split, _) in found.items() if split == held_out]
        counts = splits.overlap_of([said_in(found[name][1]) for name in names], training)
        places = splits.overlapping(counts)
        for i in places:
            report.skip("held out, but docs has 13-word runs of it in training", names[i])
            del found[names[i]]
        shares.append(splits.share_of(np.delete(counts, places, axis=0)))
    report.note(
        f"{shares[0]:.2%} of validation and {shares[1]:.2%} of test in 13-word runs that the "
        "training text of docs has about the library"
    )
    report.used += len(found)
    for split, messages in found.values():
        yield {"split": split, "messages": messages}


def look() -> None:
    """Print the size of the data set and its first conversation."""
    report = Report()
    show((json.dumps(talk, indent=1) + "\n" for talk in conversations(report)), report)


if __name__ == "__main__":
    command.run("chats", __doc__, look)
