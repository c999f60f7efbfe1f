"""Tokenizers: text to integers and back, in three steps behind one interface.

1. Bytes. UTF-8 writes any text with 256 symbols: nothing is unknown, but the rows of ids are long.
2. Byte-level BPE (Radford et al. 2019, GPT-2). The most frequent pair of tokens becomes a token of
   its own, again and again: see bpe.py, and for CLIP's, which changes the text, clip_tokenizer.py.
3. SentencePiece (Kudo and Richardson 2018), the default. A library that builds pieces from
   characters, with a space written as U+2581, and spells in bytes what it has no piece for. The
   pieces come from BPE, or from a unigram model (Kudo 2018), whose encoding is the most probable
   way to cut the text into pieces s_1 ... s_n:  argmax sum_i log p(s_i).

A token stands for fixed bytes in all three: to decode is to look up. decode(encode(text)) == text.
Left out: WordPiece, subword sampling, and SentencePiece models that normalise the text, as T5's do.
"""

import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import sentencepiece

from tinyfm import bpe

EOT = "<|endoftext|>"  # stands between documents
END_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>")  # what published vocabularies call it
FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "bytes.json")


def replace_surrogates(text: str) -> str:
    """Half a UTF-16 pair is no character, and UTF-8 cannot hold it: it becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """What all have in common: ids 0 ... vocab_size - 1, `eot` to end a text, `bot` to start one.

    A subclass passes on the bytes of each id and the specials, text -> id. Its `_encode` turns text
    into ids, `_files` is what it saves, `_spec` its tokenizer.json. `bot` is None, save in CLIP's.
    """

    def __init__(self, table: Sequence[bytes], specials: dict[str, int]):
        ends = [name for name in END_NAMES if name in specials]
        if not ends:
            raise ValueError(f"none of the special tokens {[*specials]} ends a text; add {EOT}")
        self.vocab_size, self.specials, self.eot = len(table), specials, specials[ends[0]]
        self._table, self._end, self.bot = list(table), ends[0], None
        for text, i in specials.items():
            self._table[i] = text.encode("utf-8")
        longest_first = sorted(specials, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Ids of a text. Special tokens in it are read as such only if specials is True, so that
        nobody can end a document from within. A lone surrogate is encoded as U+FFFD."""
        if not specials:
            return self._encode(replace_surrogates(text))
        parts = self._special.split(text)  # text, special, text, ..., text
        rows = self.encode_batch(parts[::2])
        for row, name in zip(rows, parts[1::2]):
            row.append(self.specials[name])
        return list(chain.from_iterable(rows))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, specials their own text."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids. Raises ValueError for one that is not in the vocabulary."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, i: int) -> bytes:
        """Bytes of one token, perhaps only a part of a character."""
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is not in the vocabulary, 0 ... {self.vocab_size - 1}")
        return self._table[i]

    def save(self, folder: str | Path) -> None:
        """Write the files that `load` reads."""
        bpe.write_files(folder, self._files)

    def save_pretrained(self, folder: str | Path) -> None:
        """Also write a tokenizer.json, for the tokenizers and transformers libraries."""
        bpe.write_files(folder, self._files | bpe.hugging_face_files(self._spec(), self._end))

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what determines the ids."""
        return hashlib.sha256(b"".join(self._files.values())).hexdigest()

    def __reduce__(self):  # sent to worker processes as its files
        return from_files, (self._files,)


# ---- 1. bytes ------------------------------------------------------------------------------------


class ByteTokenizer(Tokenizer):
    """The id of a byte is the byte."""

    def __init__(self):
        super().__init__([bytes([b]) for b in range(256)] + [b""], {EOT: 256})
        self._files = {"bytes.json": b"{}"}  # nothing to say

    def _encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def _spec(self) -> dict:
        return bpe.learned_spec([], EOT)  # BPE that has learned nothing yet


# ---- 2. byte-level BPE ---------------------------------------------------------------------------


class BPETokenizer(Tokenizer):
    """Byte-level BPE as a parsed tokenizer.json describes it: ours, GPT-2's, Llama 3's, Qwen's."""

    def __init__(self, spec: dict):
        self._spec = lambda: spec
        self._vocabulary = vocabulary = bpe.read_spec(spec)
        ids, specials = vocabulary.ids, vocabulary.specials
        table = {i: token for token, i in ids.items()}
        size = 1 + max(*ids.values(), *specials.values())
        super().__init__([table.get(i, b"") for i in range(size)], specials)
        self._files = bpe.hugging_face_files(spec, self._end)
        self._memory = bpe.Memory(self._encode_chunk)

    def _encode_chunk(self, chunk: str) -> list[int]:
        ids, word = self._vocabulary.ids, chunk.encode("utf-8")
        if self._vocabulary.ignore_merges and word in ids:
            return [ids[word]]
        singles = [ids[word[i : i + 1]] for i in range(len(word))]
        return bpe.apply_merges(singles, self._vocabulary.rules)

    def _encode(self, text: str) -> list[int]:
        form = self._vocabulary.normalizer
        chunks = iter([unicodedata.normalize(form, text) if form else text])
        for pattern in self._vocabulary.patterns:  # split also gives what lies between matches
            chunks = filter(None, chain.from_iterable(map(pattern.split, chunks)))
        return list(chain.from_iterable(map(self._memory.__getitem__, chunks)))


# ---- 3. SentencePiece ----------------------------------------------------------------------------

SPACE = "\u2581"  # how SentencePiece writes a space
# The library is several times faster on short texts. We may cut before a space that follows another
# character, as no piece of ours goes on there, and cut a literal U+2581 out, to spell it in bytes.
SECTION = re.compile(f"{SPACE}|(?s:[^{SPACE}]{{0,1000}}[^ {SPACE}]+)| +[^ {SPACE}]*")
OPTIONS = {
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,  # keep the text
    "add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "byte_fallback": True,
    "required_chars": SPACE,  # also where the text has none
    "unk_id": 0, "eos_id": 1, "eos_piece": EOT, "bos_id": -1, "split_digits": True,
    "num_threads": 1, "minloglevel": 2, "character_coverage": 1.0,  # 1 thread: one order of sums
}  # fmt: skip


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, given as the content of its tokenizer.model."""

    def __init__(self, model: bytes):
        self._library = library = sentencepiece.SentencePieceProcessor(model_proto=model)
        names = [library.id_to_piece(i) for i in range(library.get_piece_size())]
        table = [name.replace(SPACE, " ").encode("utf-8") for name in names]
        for b in range(256):
            table[library.piece_to_id(f"<0x{b:02X}>")] = bytes([b])
        specials = {name: i for i, name in enumerate(names) if library.is_control(i)}
        super().__init__(table, specials)
        self._files = {"tokenizer.model": model}
        self._space_bytes = [library.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode("utf-8")]
        probe = " a  \u00bd"  # spaces to lose, a character to normalise or not to know
        phrases = any(SPACE in name.lstrip(SPACE) for name in names)
        if phrases or self.decode(library.encode(probe)) != probe:
            reasons = "normalises, puts a space in front, or lacks bytes or has phrases as pieces"
            raise ValueError(f"tokenizer.model would change the text, as it {reasons}; train one")

    def _encode(self, text: str) -> list[int]:
        sections = SECTION.findall(text)
        rows = zip(sections, self._library.encode(sections))
        spelled = (self._space_bytes if section == SPACE else row for section, row in rows)
        return list(chain.from_iterable(spelled))

    def _spec(self) -> dict:
        return bpe.sentencepiece_spec(self._library, self.specials)


# ---- train and load ------------------------------------------------------------------------------


def sample(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """At most sample_bytes of UTF-8, evenly spread over the documents, in one pass and that memory.

    Of their pieces every stride-th is kept. When those grow too many, every second is dropped and
    the stride doubles. Pieces of one document are joined again.
    """
    kept, size, stride, length = [], 0, 1, min(4096, 1 + sample_bytes // 256)
    pieces = (
        (number, document[start : start + length].encode("utf-8", "replace"))
        for number, document in enumerate(documents)
        for start in range(0, len(document), length)
    )
    for seen, (number, piece) in enumerate(pieces):
        if seen % stride == 0:
            kept.append((number, piece))
            size += len(piece)
        while size > sample_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(len(piece) for _, piece in kept)
    groups = groupby(kept, key=lambda numbered: numbered[0])
    return [b"".join(piece for _, piece in group).decode("utf-8") for _, group in groups]


def train_sentencepiece(texts: Sequence[str], vocab_size: int, model_type: str) -> Tokenizer:
    """model_type: "bpe" or "unigram". The rarest characters, without which 99.95 % of the text can
    be written, are left to the bytes, and more of them where they would crowd the vocabulary."""
    counts = Counter(chain.from_iterable(texts))
    for reserved in ("\0", "\t", SPACE, "\u2585"):  # the trainer skips any text with one of these
        del counts[reserved]
    total, covered, alphabet, room = counts.total(), 0, " ", vocab_size - 258
    room -= " " not in counts  # it is a piece all the same
    for char, count in counts.most_common(max(1, min(room, max(128, room // 2)))):
        if covered < 0.9995 * total:
            alphabet, covered = alphabet + re.escape(char), covered + count
    known = re.compile(f"[{alphabet}]{{1,1000}}")  # short enough for the trainer's limit on a line
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(known.findall, texts)), model_writer=model,
            model_type=model_type, vocab_size=vocab_size,
            seed_sentencepiece_size=4 * vocab_size,  # unigram: the default, a million, is slow
            **OPTIONS,
        )  # fmt: skip
    except RuntimeError as error:
        limit = re.search(r"(<=|vs) (\d+)", str(error))
        hint = f"use at {'most' if limit[1] == '<=' else 'least'} {limit[2]}" if limit else error
        raise ValueError(f"vocab_size {vocab_size} does not suit the text: {hint}") from error
    return SentencePieceTokenizer(model.getvalue())


def train(
    kind: str, documents: Iterable[str], vocab_size: int, sample_bytes: int = 2_000_000
) -> Tokenizer:
    """A tokenizer with vocab_size ids, learned from a sample of the documents; always the same one.

    kind: "sentencepiece" (its BPE), "sentencepiece-unigram", "bpe" or "bytes". Raises ValueError
    when the vocabulary is too small for bytes and specials, or larger than the text allows.
    """
    least = {"sentencepiece": 258, "sentencepiece-unigram": 258, "bpe": 257, "bytes": 257}
    if kind not in least:
        raise ValueError(f"no tokenizer is called {kind!r}; choose one of {', '.join(least)}")
    if vocab_size < least[kind] or (kind == "bytes" and vocab_size > 257):
        bound = "exactly" if kind == "bytes" else "at least"
        raise ValueError(f"vocab_size {vocab_size}: {kind} needs {bound} {least[kind]} ids")
    if kind == "bytes":
        return ByteTokenizer()
    if isinstance(documents, str):
        raise ValueError("documents is a single string; pass a list of texts, such as [text]")
    texts = sample(documents, sample_bytes)
    if not texts:
        raise ValueError("there is no text to learn a tokenizer from: the documents are empty")
    if kind == "bpe":
        return BPETokenizer(bpe.train(texts, vocab_size, EOT))
    return train_sentencepiece(texts, vocab_size, "unigram" if "unigram" in kind else "bpe")


def from_files(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer that files, name -> content, hold: the first of FILES decides."""
    from tinyfm import clip_tokenizer  # here, as it builds on this module

    if "tokenizer.model" in files:
        return SentencePieceTokenizer(files["tokenizer.model"])
    if clip := clip_tokenizer.from_files(files):
        return clip
    if "tokenizer.json" in files:
        return BPETokenizer(json.loads(files["tokenizer.json"]))
    if "vocab.json" in files and "merges.txt" in files:
        return BPETokenizer(bpe.gpt2_spec(files["vocab.json"], files["merges.txt"], END_NAMES))
    if "bytes.json" in files:
        return ByteTokenizer()
    raise ValueError(f"no tokenizer: looked for {', '.join(FILES)}; found {[*files]}")


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder, ours or a published one. Raises ValueError if there is none."""
    paths = [Path(folder) / name for name in FILES]
    try:
        return from_files({path.name: path.read_bytes() for path in paths if path.is_file()})
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from error


def encode_captions(
    tokenizer: Tokenizer, captions: list[str], context_length: int
) -> tuple[np.ndarray, int]:
    """The rows a text tower reads, (B, T) int64, and how many captions were cut to fit.

    A row is the start token, if the tokenizer has one, as much of the caption as context_length
    allows, then the end token as often as it takes; T is the longest row's length. Raises
    ValueError if there is no room for any text.
    """
    start = [] if tokenizer.bot is None else [tokenizer.bot]
    room = context_length - len(start) - 1
    if room < 1:
        least = len(start) + 2
        raise ValueError(f"context_length {context_length} has no room for text: use >= {least}")
    encoded = tokenizer.encode_batch(captions)
    cut = sum(len(ids) > room for ids in encoded)
    encoded = [start + ids[:room] for ids in encoded]
    tokens = np.full((len(encoded), 1 + max(map(len, encoded), default=0)), tokenizer.eot)
    for row, ids in zip(tokens, encoded):
        row[: len(ids)] = ids
    return tokens, cut
