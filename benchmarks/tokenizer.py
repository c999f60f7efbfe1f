"""Compare the speed of our tokenizers with that of other libraries, on one text and one machine.

    python benchmarks/tokenizer.py [--text FILE] [--minbpe FOLDER] [--vocab-size 1024]

It prints the speed of training our BPE and karpathy/minbpe (a checkout, --minbpe), whose merges
must equal ours; of encoding with our BPE and with the libraries tokenizers and tiktoken (if it is
installed), with the same vocabulary; and of SentencePiece. An encoding time is the best of three
runs. "cold" is one run in which our BPE sees every word for the first time. Ratios are to ours:
above 1 is faster. The default text is Python's language reference.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tokenizers

from tinyfm import bpe
from tinyfm import tokenizer as ours


def seconds(work: Callable[[], object], runs: int = 3) -> float:
    """The time of the fastest run."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def language_reference() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def compare_training(text: str, vocab_size: int, minbpe: Path) -> None:
    sys.path.insert(0, str(minbpe))
    from minbpe import RegexTokenizer

    peer = RegexTokenizer(bpe.GPT2_PATTERN)
    theirs = seconds(lambda: peer.train(text, vocab_size - 1), runs=1)
    everything = len(text.encode("utf-8"))
    mine = seconds(lambda: ours.train("bpe", [text], vocab_size, sample_bytes=everything))
    merges = bpe.train([text], vocab_size)
    same = list(peer.merges) == merges
    print(f"BPE training   ours {mine:8.2f} s   minbpe {theirs:8.2f} s   {theirs / mine:6.0f}x")
    print(f"               all {len(merges)} merges equal: {same}")


def compare_encoding(text: str, tokenizer: ours.BPETokenizer) -> None:
    megabytes = len(text.encode("utf-8")) / 1e6
    spec = json.dumps(tokenizer._spec())
    library = tokenizers.Tokenizer.from_str(spec)
    ids = tokenizer.encode(text)
    rows = {
        "ours, cold": seconds(lambda: ours.BPETokenizer(json.loads(spec)).encode(text), 1),
        "ours": seconds(lambda: tokenizer.encode(text)),
        "tokenizers": seconds(lambda: library.encode(text).ids),
    }
    equal = {"tokenizers": library.encode(text).ids == ids}
    try:
        import tiktoken
    except ImportError:
        print("tiktoken is not installed; left out")
    else:
        ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size - 1)}
        peer = tiktoken.Encoding(
            "ours", pat_str=bpe.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        rows["tiktoken"] = seconds(lambda: peer.encode_ordinary(text))
        equal["tiktoken"] = peer.encode_ordinary(text) == ids
    for name, took in rows.items():
        note = f"   same ids: {equal[name]}" if name in equal else ""
        speed = f"{megabytes / took:6.2f} MB/s   {rows['ours'] / took:5.2f}x"
        print(f"BPE encoding   {name:12} {speed}{note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 file; default: Python's reference")
    parser.add_argument("--minbpe", type=Path, help="a checkout of karpathy/minbpe")
    parser.add_argument("--vocab-size", type=int, default=1024)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8") if options.text else language_reference()
    megabytes = len(text.encode("utf-8")) / 1e6
    print(f"{megabytes:.2f} MB of text, vocabulary of {options.vocab_size}")
    if options.minbpe:
        compare_training(text, options.vocab_size, options.minbpe)
    for kind in ("bpe", "sentencepiece", "sentencepiece-unigram"):
        start = time.perf_counter()
        tokenizer = ours.train(kind, [text], options.vocab_size)
        trained = time.perf_counter() - start
        encoded = seconds(lambda t=tokenizer: t.encode(text))
        ids = tokenizer.encode(text)
        decoded = seconds(lambda t=tokenizer, ids=ids: t.decode(ids))
        print(
            f"{kind:22} train {trained:5.2f} s   encode {megabytes / encoded:6.2f} MB/s   "
            f"decode {megabytes / decoded:6.2f} MB/s   {1e6 * megabytes / len(ids):.2f} bytes/token"
        )
        if kind == "bpe":
            compare_encoding(text, tokenizer)
    for name, extreme in (("one letter", "a" * 1_000_000), ("spaces", " " * 1_000_000)):
        for kind in ("bpe", "sentencepiece"):
            tokenizer = ours.train(kind, [text], options.vocab_size)
            took = seconds(lambda t=tokenizer, e=extreme: t.encode(e), 1)
            print(f"1 MB of {name:10} {kind:22} encode {took:5.2f} s")


if __name__ == "__main__":
    main()
