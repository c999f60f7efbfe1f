"""How much do longer vocabularies shorten a text, which texts, and what does learning one cost?

Merges are learned from the documentation of Python's language (its help topics), from sources of
its standard library, or from both, and measured on pages and files that were held out.
"""

from __future__ import annotations

import math
import random
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

from tinyfm import bpe

VARIANTS = ("prose", "code", "both", "half of the prose")
UNITS = {
    "prose_512": "bytes per token",
    "prose_4096": "bytes per token",
    "code_4096": "bytes per token",
    "bits_per_token_257": "bits per token",
    "bits_per_token_4096": "bits per token",
    "bits_per_byte_257": "bits per byte",
    "bits_per_byte_4096": "bits per byte",
    "english_tokens": "tokens",
    "greek_tokens": "tokens",
}
SIZES = (257, 320, 512, 1024, 2048, 4096)  # of the vocabulary
MODULES = (
    "argparse ast calendar configparser csv dataclasses difflib doctest enum fractions functools"
)
MODULES += " inspect mailbox pdb pprint random shutil statistics subprocess tarfile textwrap typing"
ENGLISH = "The weather is fine today, and we are going to the sea."
GREEK = (
    "\u039f \u03ba\u03b1\u03b9\u03c1\u03cc\u03c2 \u03b5\u03af\u03bd\u03b1\u03b9 "
    "\u03ba\u03b1\u03bb\u03cc\u03c2 \u03c3\u03ae\u03bc\u03b5\u03c1\u03b1 \u03ba\u03b1\u03b9 "
    "\u03c0\u03b7\u03b3\u03b1\u03af\u03bd\u03bf\u03c5\u03bc\u03b5 \u03c3\u03c4\u03b7 "
    "\u03b8\u03ac\u03bb\u03b1\u03c3\u03c3\u03b1."
)  # the same sentence
SLOW_MERGES = (25, 50, 100, 200)
FAST_MERGES = (25, 50, 100, 200, 400, 800, 1600, 3200)


def split(documents: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Three quarters of the documents to learn from, and one quarter to measure on."""
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    cut = 3 * len(shuffled) // 4
    return shuffled[:cut], shuffled[cut:]


def sources() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES.split()]


def count_chunks(texts: Sequence[str]) -> dict[bytes, int]:
    words = Counter(chain.from_iterable(map(bpe.CHUNK.findall, texts)))
    return {word.encode("utf-8"): count for word, count in words.items()}


def encode(chunks: dict[bytes, int], merges: Sequence[bpe.Pair]) -> Counter:
    """How often each token occurs in a text, given as chunks with their counts."""
    rules = bpe.make_rules(merges)
    tokens = Counter()
    for chunk, count in chunks.items():
        for token in bpe.apply_merges(list(chunk), rules):
            tokens[token] += count
    return tokens


def n_bytes(chunks: dict[bytes, int]) -> int:
    return sum(len(chunk) * count for chunk, count in chunks.items())


def unigram_bits(seen: Counter, tokens: Counter, vocab_size: int) -> float:
    """Mean of -log2 p of the tokens, where p is how often a token was seen, with one added."""
    total = seen.total() + vocab_size
    bits = sum(count * -math.log2((seen[i] + 1) / total) for i, count in tokens.items())
    return bits / tokens.total()


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(seed: int, variant: str) -> dict:
    prose, prose_test = split([topics[name] for name in sorted(topics)], seed)
    code, code_test = split(sources(), seed)
    texts = {"prose": prose, "code": code, "both": prose + code}
    texts["half of the prose"] = prose[: len(prose) // 2]
    chunks = count_chunks(texts[variant])
    held_out = {"prose": count_chunks(prose_test), "code": count_chunks(code_test)}
    merges = bpe.learn_merges(chunks, SIZES[-1] - 257)
    print(f"learned {len(merges):,} merges from {n_bytes(chunks):,} bytes", flush=True)

    # A smaller vocabulary is the beginning of a larger one.
    result = {name: [] for name in ("vocabulary", "prose", "code", "token_bits", "byte_bits")}
    for size in SIZES:
        some = merges[: size - 257]
        tokens = {kind: encode(text, some) for kind, text in held_out.items()}
        for kind, text in held_out.items():
            result[kind].append(n_bytes(text) / tokens[kind].total())
        bits = unigram_bits(encode(chunks, some), tokens["prose"], 257 + len(some))
        result["vocabulary"].append(257 + len(some))
        result["token_bits"].append(bits)
        result["byte_bits"].append(bits / result["prose"][-1])
        print(f"vocabulary {size}: {result['prose'][-1]:.2f} bytes per token", flush=True)

    # What each merge costs: a pass over the text, or its own occurrences.
    result["slow"] = [seconds(bpe.learn_merges_slowly, chunks, n) for n in SLOW_MERGES]
    result["fast"] = [seconds(bpe.learn_merges, chunks, n) for n in FAST_MERGES]

    result["prose_512"] = result["prose"][SIZES.index(512)]
    result["prose_4096"] = result["prose"][-1]
    result["code_4096"] = result["code"][-1]
    for name in ("token", "byte"):
        result[f"bits_per_{name}_257"] = result[f"{name}_bits"][0]
        result[f"bits_per_{name}_4096"] = result[f"{name}_bits"][-1]
    result["english_tokens"] = len(bpe.encode(ENGLISH, merges))
    result["greek_tokens"] = len(bpe.encode(GREEK, merges))
    for sentence in (ENGLISH, GREEK):
        assert bpe.decode(bpe.encode(sentence, merges), merges) == sentence
    return result


def draw(figure, results) -> None:
    left, middle, right = figure.subplots(1, 3)
    for number, result in enumerate(results):

        def label(text: str, first: bool = number == 0) -> str | None:
            return text if first else None

        sizes = result["vocabulary"]
        left.plot(sizes, result["prose"], "o-", color="C0", label=label("prose"))
        left.plot(sizes, result["code"], "s--", color="C1", label=label("code"))
        middle.plot(sizes, result["token_bits"], "o-", color="C2", label=label("per token"))
        middle.plot(sizes, result["byte_bits"], "s--", color="C3", label=label("per byte"))
    # A busy machine makes times longer, never shorter: the fastest of the results counts.
    slow = [min(times) for times in zip(*(result["slow"] for result in results))]
    fast = [min(times) for times in zip(*(result["fast"] for result in results))]
    right.plot(SLOW_MERGES, slow, "o-", color="C0", label="definition")
    right.plot(FAST_MERGES, fast, "s--", color="C1", label="linked list")
    for axes in (left, middle):
        axes.set(xscale="log", xlabel="vocabulary (tokens)")
        axes.set_xticks([256, 1024, 4096], ["256", "1,024", "4,096"])
        axes.minorticks_off()
    left.set(title="held-out text", ylabel="bytes per token", ylim=(0, None))
    middle.set(title="unigram model", ylabel="bits", ylim=(0, None))
    right.set(title="learning", xlabel="merges", ylabel="seconds", xscale="log", yscale="log")
    right.set_xticks([30, 300, 3000], ["30", "300", "3,000"])
    right.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    right.minorticks_off()
    for axes in (left, middle, right):
        axes.legend()
