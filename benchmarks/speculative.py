"""Speculative decoding: what drafts gain, and whether greedy texts stay the same.

    python benchmarks/speculative.py code RUN              n-grams
    python benchmarks/speculative.py draft RUN SMALLER     a smaller run with the same tokenizer
        [--prompts 12] [--tokens 120] [--draft-tokens 2 4 8] [--repeats 3] [--record]

RUN was trained on `stdlib`. The prompts are the beginnings of functions and classes of its test
split, which training never read. All texts are greedy, one after the other, in float32. Plain
decoding, the same with weights packed for few rows, `--compile`, and the drafts take turns in this
process; times are medians. Speculative decoding packs the weights, so the second row shows what
that alone gains.

Prints tokens per second, tokens per pass, the share of proposed tokens that were accepted, and how
many texts are equal to those of plain decoding, to the last token. --record writes the table into
README.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from data import stdlib
from data.splits import TEST
from tinyfm.compiled import compile_decoding
from tinyfm.generate import Sampling, stream
from tinyfm.recipes import run_dir
from tinyfm.recipes.base import OpenRun
from tinyfm.speculative import Counts, packed_twin
from tinyfm.speculative import stream as speculate

Rows = list[list[int]]


def prompts_of(opened: OpenRun, n: int, length: int) -> Rows:
    """The first `length` tokens of n definitions that training did not read, from all over."""
    rows = []
    for document in stdlib.documents():
        if document.split == TEST and len(document.text) > length:
            ids = opened.tokenizer.encode(document.text)[:length]
            if len(ids) == length:
                rows.append([opened.tokenizer.eot, *ids])
    if len(rows) < n:
        raise ValueError(f"only {len(rows)} definitions of the test split have {length} tokens")
    return rows[:: len(rows) // n][:n]


@dataclass
class Way:
    """A way to write all texts: what it wrote last, and how its drafts did."""

    write: Any  # generate.stream, or one like it
    model: Any
    counts: Counts = field(default_factory=Counts)
    rows: Rows = field(default_factory=list)

    def __call__(self, prompts: Rows, sampling: Sampling) -> None:
        vars(self.counts).update(vars(Counts()))
        self.rows = []
        for prompt in prompts:
            steps = self.write(self.model, [prompt], sampling)
            self.rows.append([token for (token,) in steps])


def ways_of(opened: OpenRun, smaller: OpenRun | None, n_drafts: list[int]) -> dict[str, Way]:
    """Plain, packed and compiled decoding, and one way for each number of draft tokens."""
    model = opened.model
    compiled = run_dir.open_run(str(opened.folder)).model
    compile_decoding(compiled)
    ways = {
        "plain": Way(stream, model),
        "plain, packed weights": Way(stream, packed_twin(model)),
        "plain, compiled": Way(stream, compiled),
    }
    kind = "a smaller model" if smaller else "n-grams"
    draft = smaller.model if smaller else None
    for n in n_drafts:
        counts = Counts()
        write = partial(speculate, draft=draft, n_draft=n, pack=True, counts=counts)
        ways[f"{kind}, {n} tokens at a time"] = Way(write, model, counts)
    return ways


def table(ways: dict[str, Way], times: dict[str, float], tokens: int) -> str:
    """Markdown: a row a way."""
    lines = [
        "| decoding | tokens/s | over plain | tokens a pass | accepted | equal texts |",
        "|---|---|---|---|---|---|",
    ]
    plain = ways["plain"]
    for name, way in ways.items():
        cells = [name, f"{tokens / times[name]:.0f}", f"{times['plain'] / times[name]:.2f}"]
        if way.counts.passes:
            counts = way.counts
            cells.append(f"{counts.written / counts.passes:.2f}")
            cells.append(f"{counts.accepted / max(1, counts.proposed):.0%}")
        else:
            cells += ["1", ""]
        equal = sum(a == b for a, b in zip(way.rows, plain.rows))
        cells.append(f"{equal} of {len(plain.rows)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("code", "draft"), help="with n-grams, or a smaller run")
    parser.add_argument("run", help="a run that was trained on stdlib")
    parser.add_argument("smaller", nargs="?", help="a smaller run with the same tokenizer")
    parser.add_argument("--prompts", type=int, default=12, help="number of texts")
    parser.add_argument("--tokens", type=int, default=120, help="new tokens of each text")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed rounds")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    given = parser.parse_args()
    if (given.part == "draft") != bool(given.smaller):
        parser.error("draft needs two runs, code one: the model, and a smaller one")
    if min(given.prompts, given.tokens, given.repeats, *given.draft_tokens) < 1:
        parser.error("the numbers must be at least 1")
    opened = run_dir.open_run(given.run)
    smaller = run_dir.open_run(given.smaller) if given.smaller else None
    length = opened.model.config.context_length - given.tokens - 1
    if length < 1:
        parser.error(f"--tokens {given.tokens} leaves no room for a prompt in the context")
    prompts = prompts_of(opened, given.prompts, length)
    sampling = Sampling(max_new_tokens=given.tokens, temperature=0)
    ways = ways_of(opened, smaller, given.draft_tokens)
    works = {name: partial(way, prompts, sampling) for name, way in ways.items()}
    times = timing.by_turns(works, given.repeats)
    sizes = [sum(p.numel() for p in each.model.parameters()) for each in (opened, smaller) if each]
    head = f"{timing.describe_machine()}; {' and '.join(f'{n:,}' for n in sizes)} parameters, "
    head += f"{given.prompts} prompts of {length + 1} tokens, {given.tokens} new ones each, greedy"
    text = f"{head}\n\n{table(ways, times, given.prompts * given.tokens)}\n"
    print(text)
    if given.record:
        timing.record(f"speculative {given.part}", text)


if __name__ == "__main__":
    main()
