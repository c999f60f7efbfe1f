"""What a text stands for when it is no prose: a molecule, a tune, a level, an episode, a series.

Such a source has, besides documents() and version(), a MODALITY: it says which texts are valid,
which are the same, and how they are drawn. With it any model that writes texts can be measured:

    valid     share of the texts that mean something: fault(text) finds nothing
    unique    share of different ones among the valid texts
    novel     share of these that training does not have

These are the definitions of MOSES (Polykovskiy et al. 2020, section 4). The same is counted on
real, held-out documents. Valid alone proves little: a model that repeats one training text is
perfect in it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from data.report import NAMES_SHOWN, Report, counted, show
from data.splits import TRAIN


def itself(text: str) -> Hashable:
    """A text without the white space around it."""
    return text.strip()


@dataclass(frozen=True)
class Modality:
    """What the texts of a source stand for."""

    about: str  # such as "drug-like molecules"
    unit: str  # such as "molecules"
    meaning: str  # of valid, in words
    fault: Callable[[str], str]  # what is wrong with a text; "" if it is valid
    longest: int  # characters of a text that is written, at most
    alphabet: str = ""  # all signs of its texts, if they are made for them: each becomes a token
    readable: bool = True  # whether people can read its texts, so that sample.py prints them
    samples: int = 400  # texts that evaluate writes
    markov_order: int = 10  # tokens that a Markov model looks back, at most
    key: Callable[[str], Hashable] = itself  # equal for valid texts that stand for the same
    # Whether training, the second argument, has each of these valid texts, or a large part of it.
    # None: it has one with the same key.
    copied: Callable[[Sequence[str], Iterable[str]], list[bool]] | None = None
    # What describes a text: {"share of right bars": (9, 10), "bars": (10, 1)}. Of many texts, each
    # is the sum of the first numbers over that of the second ones. Empty if nothing can be said.
    describe: Callable[[str], dict[str, tuple[float, float]]] = lambda text: {}
    # The text that a user's prompt stands for. Raises ValueError for one that starts no valid text.
    read_prompt: Callable[[str], str] = lambda prompt: prompt
    # What texts that continue such a prompt say in its own terms; "" for nothing.
    answer: Callable[[str, Sequence[str]], str] = lambda prompt, texts: ""
    # If the rest of a document is to be forecast: how many characters are given of it, the errors
    # of several guesses at a whole document, and forecasts without a model: {name: the guesses from
    # what is given, and the training documents}.
    given: int = 0
    errors: Callable[[str, Sequence[str]], dict[str, float]] = lambda document, guesses: {}
    rivals: dict[str, Callable[[str, Sequence[str]], list[str]]] = field(default_factory=dict)
    # Episodes that a model plays: {"success, LEVEL": whether it reaches the goal of each}. What the
    # model writes after each text so far is its action. Players without a model: {name: the same}.
    games: dict[str, Callable[[Callable[[Sequence[str]], Sequence[str]]], list[bool]]] = field(
        default_factory=dict
    )
    players: dict[str, Callable[[], dict[str, list[bool]]]] = field(default_factory=dict)
    # The texts, as long as one that is written, into which a real document is cut to be compared.
    pieces: Callable[[str], list[str]] = lambda text: [text]
    # Draw or play valid texts: write files named as the given path, with these endings.
    draw: Callable[[Sequence[str], Path], None] = lambda texts, path: None
    endings: tuple[str, ...] = ()

    def known(self, texts: Sequence[str], training: Iterable[str]) -> list[bool]:
        """Whether training has each of these valid texts."""
        if self.copied is not None:
            return self.copied(texts, training)
        keys = {self.key(text) for text in training}
        return [self.key(text) in keys for text in texts]


def runs(parts: str | tuple, length: int) -> set[str | tuple]:
    """All runs of `length` neighbours among the letters of a text, or other parts."""
    return {parts[i : i + length] for i in range(len(parts) - length + 1)}


def share_runs(
    texts: Sequence[str | tuple], training: Iterable[str | tuple], n: int, varied: int = 1
) -> list[bool]:
    """Whether each text has n neighbouring parts that also are neighbours in training.

    varied: of these n, at least so many must differ.
    """
    own = [{run for run in runs(text, n) if len(set(run)) >= varied} for text in texts]
    wanted = set().union(*own)
    found = set()
    for text in training:
        found |= wanted & runs(text, n)
    return [not found.isdisjoint(parts) for parts in own]


def look(source: ModuleType) -> None:
    """Print the size of a source, its first document, and how many held-out ones are valid."""
    own = source.MODALITY
    report = Report()
    held_out = []

    def texts() -> Iterator[str]:
        for document in source.documents(report):
            if document.split != TRAIN:
                held_out.extend(own.pieces(document.text))
            yield document.text

    show(texts(), report)
    faults = Counter(map(own.fault, held_out))
    share = faults.pop("", 0) / max(1, len(held_out))
    held = counted(len(held_out), f"held-out {own.unit}")
    print(f"--- valid: {share:.2%} of {held}: {own.meaning}")
    for reason, count in faults.most_common(NAMES_SHOWN):
        print(f"{count:,} times: {reason}")
