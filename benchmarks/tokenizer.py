"""Compare the speed of our tokenizers with that of other libraries, on the same text.

    python benchmarks/tokenizer.py [--text FILE] [--minbpe FOLDER] [--vocab-size 1024]

Prints the speed

- of training our BPE and that of karpathy/minbpe (--minbpe, a clone), whose merges must be equal
- of encoding with our BPE and with the libraries tokenizers and tiktoken, with the same vocabulary;
  tiktoken is left out if it is not installed
- of SentencePiece
- of encoding 1 MB of one letter and 1 MB of spaces

An encoding time is the best of three runs; "cold" is one run in which our BPE sees every word for
the first time. A ratio is the speed over ours: above 1 is faster. The default text is Python's
language reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import Work, seconds_of

from tinyfm import bpe
from tinyfm import tokenizer as ours
from tinyfm.tokenizer import BPETokenizer, Tokenizer

KINDS = ("bpe", "sentencepiece", "sentencepiece-unigram")
EXTREMES = {"one letter": "a" * 1_000_000, "spaces": " " * 1_000_000}


def best_seconds(work: Work, runs: int = 3) -> float:
    """Seconds of the fastest run."""
    return min(seconds_of(work) for _ in range(runs))


def language_reference() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def compare_training(text: str, vocab_size: int, clone: Path) -> None:
    sys.path.insert(0, str(clone))
    from minbpe import RegexTokenizer

    peer = RegexTokenizer(bpe.GPT2_PATTERN)
    theirs = seconds_of(lambda: peer.train(text, vocab_size - 1))  # it has no end-of-text token
    size = len(text.encode("utf-8"))
    mine = best_seconds(lambda: ours.train("bpe", [text], vocab_size, sample_bytes=size))
    merges = bpe.train([text], vocab_size)
    equal = list(peer.merges) == merges
    print(f"BPE training   ours {mine:8.2f} s   minbpe {theirs:8.2f} s   {theirs / mine:6.0f}x")
    print(f"               all {len(merges)} merges equal: {equal}")


def compare_encoding(text: str, tokenizer: BPETokenizer) -> None:
    ids = tokenizer.encode(text)
    spec = json.dumps(tokenizer._spec())

    # Seconds of each, and whether a peer's ids are equal to ours.
    library = tokenizers.Tokenizer.from_str(spec)
    times = {
        "ours, cold": seconds_of(lambda: BPETokenizer(json.loads(spec)).encode(text)),
        "ours": best_seconds(lambda: tokenizer.encode(text)),
        "tokenizers": best_seconds(lambda: library.encode(text).ids),
    }
    equal = {"tokenizers": library.encode(text).ids == ids}
    try:
        import tiktoken
    except ImportError:
        print("tiktoken is not installed; left out")
    else:
        # The last token, end of text, has no bytes.
        ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size - 1)}
        peer = tiktoken.Encoding(
            "ours", pat_str=bpe.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        times["tiktoken"] = best_seconds(lambda: peer.encode_ordinary(text))
        equal["tiktoken"] = peer.encode_ordinary(text) == ids

    megabytes = len(text.encode("utf-8")) / 1e6
    for name, elapsed in times.items():
        line = f"{megabytes / elapsed:6.2f} MB/s   {times['ours'] / elapsed:5.2f}x"
        if name in equal:
            line += f"   same ids: {equal[name]}"
        print(f"BPE encoding   {name:12} {line}")


def measure(kind: str, text: str, vocab_size: int) -> Tokenizer:
    """Print the speed of one of our tokenizers; return it."""
    trained = []
    training = seconds_of(lambda: trained.append(ours.train(kind, [text], vocab_size)))
    tokenizer = trained[0]
    encoding = best_seconds(lambda: tokenizer.encode(text))
    ids = tokenizer.encode(text)
    decoding = best_seconds(lambda: tokenizer.decode(ids))
    size = len(text.encode("utf-8"))
    print(
        f"{kind:22} train {training:5.2f} s   encode {size / 1e6 / encoding:6.2f} MB/s   "
        f"decode {size / 1e6 / decoding:6.2f} MB/s   {size / len(ids):.2f} bytes/token"
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 file; default: Python's reference")
    parser.add_argument("--minbpe", type=Path, help="a clone of karpathy/minbpe")
    parser.add_argument("--vocab-size", type=int, default=1024, help="number of tokens")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8") if options.text else language_reference()
    megabytes = len(text.encode("utf-8")) / 1e6
    print(f"{megabytes:.2f} MB of text, vocabulary of {options.vocab_size}")

    if options.minbpe:
        compare_training(text, options.vocab_size, options.minbpe)
    for kind in KINDS:
        tokenizer = measure(kind, text, options.vocab_size)
        if kind == "bpe":
            compare_encoding(text, tokenizer)
    for name, extreme in EXTREMES.items():
        for kind in ("bpe", "sentencepiece"):
            tokenizer = ours.train(kind, [text], options.vocab_size)
            elapsed = seconds_of(partial(tokenizer.encode, extreme))
            print(f"1 MB of {name:10} {kind:22} encode {elapsed:5.2f} s")


if __name__ == "__main__":
    main()
