"""Tokenizers turn text into integers and back: four kinds behind one interface.

1. Bytes. UTF-8 writes any text with 256 symbols: nothing is unknown, but the rows of ids are long.
   Where a text consists of known signs, such as the samples of a sound, each sign is a token.
2. Byte-level BPE (Radford et al. 2019, GPT-2). The most frequent pair of neighbouring tokens
   becomes a new token, again and again; bpe.py has the algorithm. CLIP's variant changes the text
   and marks the ends of words.
3. SentencePiece (Kudo and Richardson 2018), the default. A library that builds pieces from
   characters, writes a space as U+2581, and spells a character that has no piece in bytes. The
   pieces come from BPE or from a unigram model (Kudo 2018), whose encoding is the most probable way
   to cut the text into pieces s_1 ... s_n:  argmax sum_i log p(s_i).

4. WordPiece (Schuster and Nakajima 2012), for encoders such as BERT. The text is cut at spaces and
   punctuation, and a word into the longest pieces that fit; those inside a word are written ##ing.

In all four a token stands for fixed bytes, so that decoding is a table look-up. For all but
WordPiece and CLIP's decode(encode(text)) == text.

Published tokenizers of kinds 2, 3 and 4 are read too (hub/tokenizers.py); their ids are those of
the library that they were published for. Some of them change the text: they put a space in front,
compose its letters, or write it in lower case. decode then gives the changed text.

Left out: subword sampling, and a tokenizer.model that normalises the text, as T5's does; its
tokenizer.json is read.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import regex
import sentencepiece

from tinyfm import bpe
from tinyfm.hub.pieces import in_bytes
from tinyfm.hub.text_steps import (
    CHAR_OF,
    SPACE,
    AddedToken,
    AddedTokens,
    lower,
    split_all,
    write_bytes,
    written,
)
from tinyfm.hub.tokenizers import (
    BYTE_TOKENS,
    CLIP_CONTEXT_LENGTH,
    CLIP_PATTERN,
    CLS_NAMES,
    END_NAMES,
    END_OF_WORD,
    EOT,
    INSIDE,
    MASK_NAMES,
    PAD_NAMES,
    START,
    UNKNOWN,
    Vocabulary,
    added_tokens_files,
    alphabet_spec,
    check_ids,
    clip_files,
    encoder_spec,
    export_files,
    hugging_face_files,
    is_tiktoken,
    kind_of,
    learned_spec,
    marks_word_ends,
    model_of,
    published_spec,
    read_clip_spec,
    read_companions,
    read_spec,
    sentencepiece_spec,
    token_content,
    vocab_and_merges_files,
    word_piece_spec,
    write_files,
)

# ---- the interface -------------------------------------------------------------------------------


def replace_surrogates(text: str) -> str:
    """Replace lone UTF-16 surrogates, which are no characters and not valid in UTF-8, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """The interface: ids are 0 ... vocab_size - 1, and the special token `eot` ends a text.

    `bot` starts a text; it is None for all but CLIP's. Those of encoders also have the ids `cls`,
    which starts a row, `pad`, which fills it up, and `mask`, which hides a token; else these are
    None. A subclass gives the bytes of each id and the tokens that are found in a text as a whole,
    to this constructor, and defines four methods:

        _encode(text, first)   the ids of a text without such tokens; first: it starts the text
        _files()        name -> content of the files that `save` writes, which determine the ids
        _spec()         its tokenizer.json
        __reduce__()    its class and the arguments of its constructor, to pickle it for a process
    """

    chat_template = ""  # how transformers writes a conversation; set before save_pretrained

    def __init__(self, table: Sequence[bytes], added: Sequence[AddedToken], end: str | None = None):
        """table: bytes of each id. end: the token that ends a text, if it has no usual name.

        Raises ValueError if no special token ends a text.
        """
        names = [token.content for token in added]
        ends = [name for name in (*END_NAMES, end) if name in names]
        if not ends:
            raise ValueError(f"none of the special tokens {names[:9]} ends a text; add {EOT}")
        self._end = ends[0]
        # The token that ends a text is always special: a text from outside must not contain it.
        added = [
            token._replace(special=token.special or token.content == self._end) for token in added
        ]
        self.vocab_size = len(table)
        self.specials = {token.content: token.id for token in added if token.special}
        self.eot = self.specials[self._end]
        self.bot = None
        self.mask = self._first_special(MASK_NAMES)
        self.cls = None if self.mask is None else self._first_special(CLS_NAMES)
        self.pad = None if self.mask is None else self._first_special(PAD_NAMES)
        self._table = list(table)
        for token in added:
            self._table[token.id] = token.content.encode("utf-8")
        self._added = AddedTokens(token for token in added if not token.normalized)

    def _first_special(self, names: Sequence[str]) -> int | None:
        """The id of the first special token with one of these names."""
        return next((self.specials[name] for name in names if name in self.specials), None)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a text. A lone surrogate is encoded as U+FFFD.

        Special tokens in the text are encoded as such only if specials is True. By default they
        are ordinary characters, so that a text from outside cannot end a document. Other added
        tokens, which some published vocabularies have, are always found.
        """
        ids = []
        for piece, token, start in self._added.cut(replace_surrogates(text), specials):
            if token is None:
                ids += self._encode_piece(piece, start == 0, specials)
            else:
                ids.append(token)
        return ids

    def _encode_piece(self, text: str, first: bool, specials: bool) -> list[int]:
        """The ids of the text between two added tokens."""
        return self._encode(text, first)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Bytes that are not UTF-8 become U+FFFD, a special token its name."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids. Raises ValueError for an id that is not in the vocabulary."""
        return b"".join(map(self.token_bytes, ids))

    def without_token(self, vocab_size: int) -> list[int]:
        """The ids below vocab_size, a model's, that stand for no token.

        Vocabularies are padded, and some have gaps before their added tokens.
        """
        gaps = [i for i, content in enumerate(self._table) if not content]
        return gaps + list(range(self.vocab_size, vocab_size))

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one token, perhaps only a part of a character."""
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token id {i} is not in the vocabulary, 0 ... {self.vocab_size - 1}")
        return self._table[i]

    def save(self, folder: str | Path) -> None:
        """Write the files that `load` reads."""
        write_files(folder, self._files())

    def save_pretrained(self, folder: str | Path, captions: int = 0, texts: int = 0) -> None:
        """Also write a tokenizer.json, for the libraries tokenizers and transformers.

        captions: context length of a text tower; the library then builds the rows of
        `encode_captions`. texts: that of a classifier. Without either, it pads on the left, as a
        model that continues texts needs it.
        """
        files = export_files(self._spec(), self._end, captions, texts, self.chat_template)
        write_files(folder, self._files() | files)

    def without_template(self) -> Tokenizer:
        """The same tokenizer, which puts no special tokens around a text in transformers either."""
        return self

    def for_encoder(self, mask: int) -> Tokenizer:
        """The same tokenizer for an encoder that was trained here: a text starts after the end of
        another, and [MASK] has the id `mask`, unless the vocabulary has a mask itself."""
        return from_spec(encoder_spec(self._spec(), self._end, mask), self._end)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the files that determine the ids."""
        return hashlib.sha256(b"".join(self._files().values())).hexdigest()


# ---- 1. bytes ------------------------------------------------------------------------------------


class ByteTokenizer(Tokenizer):
    """The id of a byte is the byte."""

    def __init__(self):
        super().__init__([bytes([b]) for b in range(256)] + [b""], [AddedToken(EOT, 256)])

    def __reduce__(self):
        return type(self), ()

    def _encode(self, text: str, first: bool) -> list[int]:
        return list(text.encode("utf-8"))

    def _files(self) -> dict[str, bytes]:
        return {"bytes.json": b"{}"}  # its name says all

    def _spec(self) -> dict:
        return learned_spec([])  # BPE without merges


class CharacterTokenizer(Tokenizer):
    """The id of a character is its place in an alphabet, which is given; others have no id."""

    def __init__(self, alphabet: str):
        """Raises ValueError for a character that is twice in the alphabet."""
        self.alphabet = alphabet
        self._ids = {char: i for i, char in enumerate(alphabet)}
        if len(self._ids) < len(alphabet):
            raise ValueError("a character is twice in the alphabet; leave one out")
        end = len(alphabet)
        super().__init__([char.encode() for char in alphabet] + [b""], [AddedToken(EOT, end)])

    def __reduce__(self):
        return type(self), (self.alphabet,)

    def _encode(self, text: str, first: bool) -> list[int]:
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            first, last = self.alphabet[0], self.alphabet[-1]
            raise ValueError(
                f"{error.args[0]!r} has no token: the alphabet has {len(self.alphabet)} characters "
                f"from {first!r} to {last!r}"
            ) from None

    def _files(self) -> dict[str, bytes]:
        return {"alphabet.txt": self.alphabet.encode()}

    def _spec(self) -> dict:
        return alphabet_spec(self.alphabet)


# ---- 2. byte-level BPE ---------------------------------------------------------------------------


class ChunkCache(dict):
    """chunk -> ids, computed when a chunk is first looked up.

    Words recur. Long chunks rarely do, and would fill the memory, so they are not kept.
    """

    def __init__(self, encode: Callable[[str], list[int]]):
        self.encode = encode

    def __missing__(self, chunk: str) -> list[int]:
        """The ids of a chunk that is looked up for the first time, or was too long to keep."""
        ids = self.encode(chunk)
        if len(chunk) < 64:
            if len(self) >= 1 << 16:
                self.clear()
            self[chunk] = ids
        return ids


class PublishedTokenizer(Tokenizer):
    """A parsed tokenizer.json with a model of WordPiece or Unigram: BERT's, ALBERT's, T5's."""

    def __init__(self, spec: dict, end: str | None = None):
        """end: the token that ends a text, if it has no usual name.

        Raises ValueError for what is not supported: see read_spec.
        """
        self._tokenizer_json = spec
        self._given_end = end
        self._vocabulary = vocabulary = self._read(spec)
        ids = vocabulary.ids
        size = 1 + max([*ids.values(), *(token.id for token in vocabulary.added)])
        table = [b""] * size
        for token, i in ids.items():
            table[i] = token_content(token, vocabulary)
        super().__init__(table, vocabulary.added, end)
        normalised = [token for token in vocabulary.added if token.normalized]
        self._added_after = AddedTokens(normalised, self._normalize)
        # Chunks of byte-level BPE are kept as text until they are looked up.
        self._splitters = list(vocabulary.splitters)
        self._writes_bytes = self._splitters[-1:] == [write_bytes]
        if self._writes_bytes:
            self._splitters.pop()
        self._ids_of_chunk = ChunkCache(self._encode_chunk)

    def __reduce__(self):
        return type(self), (self._tokenizer_json, self._given_end)

    def _read(self, spec: dict) -> Vocabulary:
        return read_spec(spec)

    def without_template(self) -> Tokenizer:
        return type(self)(self._tokenizer_json | {"post_processor": None}, self._given_end)

    def words(self, text: str) -> list[str]:
        """The chunks of a text, normalised, that are cut into tokens one by one."""
        return split_all(self._splitters, self._normalize(text), True)

    def _encode_chunk(self, chunk: str) -> list[int]:
        if self._writes_bytes:
            chunk = written(chunk)
        return self._vocabulary.model.encode(chunk)

    def _normalize(self, text: str) -> str:
        for normalize in self._vocabulary.normalizers:
            text = normalize(text)
        return text

    def _encode(self, text: str, first: bool) -> list[int]:
        chunks = split_all(self._splitters, text, first)
        return list(chain.from_iterable(map(self._ids_of_chunk.__getitem__, chunks)))

    def _encode_piece(self, text: str, first: bool, specials: bool) -> list[int]:
        ids = []
        for piece, token, start in self._added_after.cut(self._normalize(text), specials):
            if token is None:
                ids += self._encode(piece, first and start == 0)
            else:
                ids.append(token)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        if getattr(self._vocabulary.model, "end_of_word", ""):
            text = text.removesuffix(" ")
        return text.removeprefix(" ") if self._vocabulary.drop_space else text

    def _files(self) -> dict[str, bytes]:
        return hugging_face_files(self._tokenizer_json, self._end)

    def _spec(self) -> dict:
        return self._tokenizer_json


class BPETokenizer(PublishedTokenizer):
    """BPE as a parsed tokenizer.json describes it: ours, GPT-2's, Llama's, Qwen's, Gemma's."""

    def __init__(self, spec: dict, end: str | None = None):
        """Arguments and errors are those of a PublishedTokenizer."""
        super().__init__(spec, end)
        self._merges = self._vocabulary.model
        self._byte_ids = [self._vocabulary.ids.get(char) for char in CHAR_OF]
        self._whole_alphabet = None not in self._byte_ids

    def _symbols(self, chunk: str) -> list[int]:
        """The ids that the merges start from: one for each character, where it has a token."""
        ids = []
        known, merges = self._vocabulary.ids, self._merges
        after_unknown = False
        chars = list(chunk)
        chars[-1] += merges.end_of_word  # a chunk is never empty
        for char in chars:
            if char in known:
                found = [known[char]]
            else:
                found = in_bytes(char, known) if merges.byte_fallback else []
            is_unknown = not found and merges.unknown is not None
            if is_unknown and not (after_unknown and merges.fuse_unknown):
                found = [merges.unknown]
            after_unknown = is_unknown
            ids += found
        return ids

    def _encode_chunk(self, chunk: str) -> list[int]:
        merges = self._merges
        if self._writes_bytes and self._whole_alphabet and not merges.ignore_merges:
            symbols = [self._byte_ids[b] for b in chunk.encode("utf-8")]  # the usual case
            return bpe.apply_merges(symbols, merges.rules)
        if self._writes_bytes:
            chunk = written(chunk)
        if merges.ignore_merges and chunk in self._vocabulary.ids:
            return [self._vocabulary.ids[chunk]]
        return bpe.apply_merges(self._symbols(chunk), merges.rules)


# ---- CLIP's variant of byte-level BPE ------------------------------------------------------------

# Radford et al. 2021, section 2.4. Four things differ from GPT-2's BPE:
#
# 1. The text is cleaned: Unicode's composed form (NFC), and lower case. This cannot be undone:
#    decode gives lower-case words with one space after each.
# 2. White space only separates. A word is a run of letters, one digit, a run of other characters,
#    or an English ending such as 's; no space belongs to it.
# 3. The last byte of a word carries "</w>", so that "cat" and the start of "catch" differ:
#
#        "The CAT's"  ->  the cat 's  ->  t h e</w>  c a t</w>  ' s</w>  ->  the</w> cat</w> 's</w>
#
#    The alphabet is thus 256 bytes inside a word and 256 bytes that end one; the merges follow.
# 4. The text tower reads  start token, ids, end token, and its summary of the text is its output at
#    the end token. A text that is too long therefore loses its last words, not the end token.
#
# The ids are those of transformers' CLIPTokenizer. Left out, as there: the repair of broken Unicode
# and of HTML entities with which OpenAI's code starts. Left out here: the padding token that
# published files name, which is the end token for OpenAI's models and Stable Diffusion 1; and
# special tokens in other letters: transformers reads <|STARTOFTEXT|> as the start token.


def clean(text: str) -> str:
    """Composed and lower-case. White space need not be collapsed: the split drops all of it."""
    return lower(unicodedata.normalize("NFC", text))


class ClipTokenizer(BPETokenizer):
    """CLIP's byte-level BPE as a parsed tokenizer.json describes it.

    `bot` starts a row of ids, `eot` ends it. The bytes of a token that ends a word end in a space.
    """

    def __init__(self, spec: dict, end: str | None = None):
        """Raises ValueError for BPE with ends of words that is not CLIP's."""
        super().__init__(spec, end)
        self.bot = self.specials[START]
        self._end_ids = [self._vocabulary.ids[char + END_OF_WORD] for char in CHAR_OF]
        for token, i in self._vocabulary.ids.items():
            if token.endswith(END_OF_WORD):
                word = token_content(token.removesuffix(END_OF_WORD), self._vocabulary)
                self._table[i] = word + b" "

    def _read(self, spec: dict) -> Vocabulary:
        return read_clip_spec(spec)

    def without_template(self) -> Tokenizer:
        return self  # the tokens that it puts around a text are those of training

    def _encode_chunk(self, chunk: str) -> list[int]:
        ids = []
        # A chunk is one word, but for the name of a special token, which is split further.
        for word in bpe.CHUNK.findall(chunk):
            *inside, last = word.encode("utf-8")
            symbols = [self._byte_ids[b] for b in inside]
            symbols.append(self._end_ids[last])
            ids += bpe.apply_merges(symbols, self._merges.rules)
        return ids

    def _encode(self, text: str, first: bool) -> list[int]:
        words = regex.findall(CLIP_PATTERN, clean(text))
        return list(chain.from_iterable(map(self._ids_of_chunk.__getitem__, words)))

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned words of the ids with a space between; special tokens become their name."""
        return super().decode(ids).strip()

    def save_pretrained(self, folder: str | Path, captions: int = 0, texts: int = 0) -> None:
        """Write both published layouts, for the libraries tokenizers and transformers.

        captions: the context length; by default that of OpenAI's models. texts: not used.
        """
        spec = self._spec()
        files = clip_files(spec, captions or CLIP_CONTEXT_LENGTH)
        write_files(folder, files | vocab_and_merges_files(spec))

    def _files(self) -> dict[str, bytes]:
        return clip_files(self._spec(), CLIP_CONTEXT_LENGTH)


def encode_captions(
    tokenizer: Tokenizer, captions: list[str], context_length: int
) -> tuple[np.ndarray, int]:
    """The rows that a text tower reads, (B, T) int64, and the number of captions that were cut.

    A row is the start token, if the tokenizer has one; the caption, cut to fit into context_length;
    and the end token, repeated up to T, the length of the longest row. Raises ValueError if
    context_length leaves no room for text.
    """
    start = [] if tokenizer.bot is None else [tokenizer.bot]
    room = context_length - len(start) - 1
    if room < 1:
        least = len(start) + 2
        raise ValueError(f"context_length {context_length} has no room for text: use >= {least}")
    encoded = tokenizer.encode_batch(captions)
    n_cut = sum(len(ids) > room for ids in encoded)
    rows = [start + ids[:room] for ids in encoded]
    longest = max(map(len, rows), default=0)
    tokens = np.full((len(rows), longest + 1), tokenizer.eot, dtype=np.int64)  # (B, T)
    for token_row, row in zip(tokens, rows):
        token_row[: len(row)] = row
    return tokens, n_cut


# ---- 3. SentencePiece ----------------------------------------------------------------------------

# The library is several times faster on short texts, so we cut a text into sections. A cut before a
# space that follows another character is safe, because no piece of ours continues there. A literal
# U+2581 is a section by itself, and is spelled in bytes.
SECTION = re.compile(f"{SPACE}|(?s:[^{SPACE}]{{0,1000}}[^ {SPACE}]+)| +[^ {SPACE}]*")
FEW = 8  # sections: for a list the library starts threads, which fewer do not repay
OPTIONS = {
    # Do not change the text.
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    # Have a piece for every text: the bytes, and the space, also if the training text has none.
    "byte_fallback": True,
    "character_coverage": 1.0,
    "required_chars": SPACE,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    # Special tokens: unknown, never used, and the end of a text.
    "unk_id": 0,
    "eos_id": 1,
    "eos_piece": EOT,
    "bos_id": -1,
    # One thread, so that sums are added in one order and the result is always the same.
    "num_threads": 1,
    "minloglevel": 2,
}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, given as the content of its tokenizer.model.

    It may put a space in front of each text, as Llama 2's does; decode drops it again. Other
    changes to a text, such as a normal form, are refused.
    """

    def __init__(self, model: bytes, added: Sequence[AddedToken] = (), end: str | None = None):
        """added: further tokens, from an added_tokens.json.

        Raises ValueError for a model that would change the text.
        """
        self._model = model
        self._further = list(added)
        self._given_end = end
        self._library = library = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = library.get_piece_size()
        names = [library.id_to_piece(i) for i in range(size)]
        controls = [AddedToken(names[i], i) for i in range(size) if library.is_control(i)]
        known = {token.content for token in controls}
        further = [token for token in added if token.content not in known]
        check_ids([*zip(names, range(size)), *((token.content, token.id) for token in further)])
        table = [name.replace(SPACE, " ").encode("utf-8") for name in names]
        for name, b in BYTE_TOKENS.items():
            table[library.piece_to_id(name)] = bytes([b])
        table += [b""] * (1 + max([size - 1, *(token.id for token in further)]) - size)
        super().__init__(table, controls + further, end)
        self._space_ids = [library.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode("utf-8")]

        # Spaces that the model may drop, and a character that it may normalise or not know.
        probe = " a  \u00bd"
        self._prefix = library.decode(library.encode("a")) != super().decode(library.encode("a"))
        has_phrases = any(SPACE in name.lstrip(SPACE) for name in names)
        self._in_sections = not (self._prefix or has_phrases)
        if self.decode(library.encode(probe)) != probe:
            raise ValueError(
                "tokenizer.model would change the text, as it normalises it or lacks bytes as "
                "pieces; train a tokenizer, or use one with a tokenizer.json"
            )

    def __reduce__(self):
        return type(self), (self._model, self._further, self._given_end)

    def _encode(self, text: str, first: bool) -> list[int]:
        if not self._in_sections:
            return self._library.encode(text)
        sections = SECTION.findall(text)
        found: Iterable[list[int]]
        if len(sections) < FEW:
            found = map(self._library.encode, sections)
        else:
            found = self._library.encode(sections)
        ids = []
        for section, section_ids in zip(sections, found):
            ids += self._space_ids if section == SPACE else section_ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._prefix else text

    def is_lossless(self) -> bool:
        """Whether decode(encode(text)) is the text, as it is for those that are trained here."""
        return self._in_sections

    def _files(self) -> dict[str, bytes]:
        files = {"tokenizer.model": self._model}
        if self._further:
            files |= added_tokens_files(self._further, self._end)
        return files

    def _spec(self) -> dict:
        spec = sentencepiece_spec(self._library, self.specials, self._prefix)
        described = [token["content"] for token in spec["added_tokens"]]
        further = [token for token in self._further if token.content not in described]
        spec["added_tokens"] += [token._asdict() for token in further]
        return spec


# ---- train ---------------------------------------------------------------------------------------


def cut_into_pieces(documents: Iterable[str], length: int) -> Iterator[tuple[int, str]]:
    """Pairs of a document's number and a piece of it of at most `length` characters."""
    for number, document in enumerate(documents):
        for start in range(0, len(document), length):
            yield number, document[start : start + length]


def sample_documents(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """At most sample_bytes of UTF-8, evenly spread over the documents.

    It takes one pass and the memory of the sample. Every stride-th piece of the documents is kept.
    When the kept pieces grow too many, every second one is dropped and the stride doubles. Pieces
    of one document are joined again.
    """
    length = min(4096, 1 + sample_bytes // 256)
    kept = []  # (number of the document, piece in UTF-8)
    size = 0
    stride = 1
    for seen, (number, piece) in enumerate(cut_into_pieces(documents, length)):
        if seen % stride == 0:
            content = piece.encode("utf-8", "replace")
            kept.append((number, content))
            size += len(content)
        while size > sample_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(len(content) for _, content in kept)
    groups = groupby(kept, key=lambda numbered: numbered[0])
    return [b"".join(content for _, content in group).decode("utf-8") for _, group in groups]


def choose_alphabet(texts: Sequence[str], vocab_size: int) -> list[str]:
    """The characters that SentencePiece gets to see; the bytes spell all others.

    These are the most frequent characters that make up 99.95 % of the text, fewer where they would
    crowd the vocabulary, and always the space.
    """
    counts = Counter(chain.from_iterable(texts))
    for reserved in ("\0", "\t", SPACE, "\u2585"):  # the trainer skips any text with one of these
        del counts[reserved]
    total = counts.total()
    room = vocab_size - 258  # without the bytes and two special tokens
    if " " not in counts:
        room -= 1  # it becomes a piece all the same
    most = max(1, min(room, max(128, room // 2)))
    alphabet = [" "]
    covered = 0
    for char, count in counts.most_common(most):
        if covered >= 0.9995 * total:
            break
        alphabet.append(char)
        covered += count
    return alphabet


def train_sentencepiece(texts: Sequence[str], vocab_size: int, model_type: str) -> Tokenizer:
    """Train a SentencePiece model. model_type: "bpe" or "unigram"."""
    known = "".join(map(re.escape, choose_alphabet(texts, vocab_size)))
    lines = re.compile(f"[{known}]{{1,1000}}")  # shorter than the longest that the trainer takes
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(lines.findall, texts)),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            seed_sentencepiece_size=4 * vocab_size,  # of unigram; the default, a million, is slow
            **OPTIONS,
        )
    except RuntimeError as error:
        hint = str(error)
        if limit := re.search(r"(<=|vs) (\d+)", hint):
            bound = "most" if limit[1] == "<=" else "least"
            hint = f"use at {bound} {limit[2]}"
        raise ValueError(f"vocab_size {vocab_size} does not suit the text: {hint}") from error
    return SentencePieceTokenizer(model.getvalue())


def symbols_of(word: str) -> list[str]:
    """The characters of a word as WordPiece writes them: c ##a ##t."""
    return [word[0], *(INSIDE + char for char in word[1:])]


def train_word_piece(texts: Sequence[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train WordPiece: special tokens, then characters, then merges, the most frequent first.

    The merges are BPE's (bpe.py), on characters. Only the names of the new tokens are kept: to
    encode, the longest token that fits is taken. Schuster and Nakajima (2012) merge the pair that
    raises the likelihood of the text most, of the highest n(ab) / (n(a) n(b)); the library
    `tokenizers` takes the most frequent, as here.
    """
    empty = PublishedTokenizer(word_piece_spec([], lowercase))
    words = Counter(chain.from_iterable(map(empty.words, texts)))

    # The alphabet: the most frequent characters. A word with another one stays unknown.
    room = vocab_size - empty.vocab_size
    counts = Counter()
    for word, count in words.items():
        counts.update(dict.fromkeys(word, count))
    known = {char for char, _ in counts.most_common(max(1, min(1000, room // 2)))}
    words = {word: count for word, count in words.items() if known.issuperset(word)}
    alphabet = [*dict.fromkeys(chain.from_iterable(map(symbols_of, words)))]

    # bpe.py numbers new tokens from 256 on, and WALL is -1. So characters are -2, -3, ...
    numbers = {symbol: -2 - i for i, symbol in enumerate(alphabet)}
    chunks = {tuple(map(numbers.get, symbols_of(word))): count for word, count in words.items()}
    names = {number: symbol for symbol, number in numbers.items()}
    # Two merges may spell the same token, ab + ##c and a + ##bc, so a few more are learned.
    for rank, (a, b) in enumerate(bpe.learn_merges(chunks, room + room // 8)):
        names[256 + rank] = names[a] + names[b].removeprefix(INSIDE)
    tokens = [*dict.fromkeys(names.values())]
    if len(tokens) < room:
        most = empty.vocab_size + len(tokens)
        raise ValueError(f"vocab_size {vocab_size} does not suit the text: use at most {most}")
    return PublishedTokenizer(word_piece_spec(tokens[:room], lowercase))


# Kind -> its smallest vocabulary: the bytes, the end of a text and, of SentencePiece, unknown; of
# WordPiece, five special tokens and a few characters.
SMALLEST = {
    "sentencepiece": 258,
    "sentencepiece-unigram": 258,
    "bpe": 257,
    "bytes": 257,
    "wordpiece": 64,
    "wordpiece-cased": 64,
}

MOST_IDS = 1 << 24  # many more than any published vocabulary has


def train(
    kind: str, documents: Iterable[str], vocab_size: int, sample_bytes: int = 2_000_000
) -> Tokenizer:
    """Learn a tokenizer with vocab_size ids from a sample of the documents; always the same one.

    kind: "sentencepiece" (its BPE), "sentencepiece-unigram", "bpe", "bytes", "wordpiece", which
    writes the text in lower case and without accents, or "wordpiece-cased". Raises ValueError when
    the vocabulary is too small for bytes and special tokens, or larger than the text allows.
    """
    if kind not in SMALLEST:
        raise ValueError(f"no tokenizer is called {kind!r}; choose one of {', '.join(SMALLEST)}")
    least = SMALLEST[kind]
    if kind == "bytes" and vocab_size != least:
        raise ValueError(f"vocab_size {vocab_size}: {kind} needs exactly {least} ids")
    if not least <= vocab_size <= MOST_IDS:
        limits = f"at least {least} ids and at most {MOST_IDS}"
        raise ValueError(f"vocab_size {vocab_size}: {kind} needs {limits}")
    if kind == "bytes":
        return ByteTokenizer()
    if isinstance(documents, str):
        raise ValueError("documents is a single string; pass a list of texts, such as [text]")
    texts = sample_documents(documents, sample_bytes)
    if not texts:
        raise ValueError("there is no text to learn a tokenizer from: the documents are empty")
    if kind == "bpe":
        return BPETokenizer(learned_spec(bpe.train(texts, vocab_size)))
    if kind in ("wordpiece", "wordpiece-cased"):
        return train_word_piece(texts, vocab_size, lowercase=kind == "wordpiece")
    model_type = "unigram" if kind == "sentencepiece-unigram" else "bpe"
    return train_sentencepiece(texts, vocab_size, model_type)


# ---- load ----------------------------------------------------------------------------------------

FILES = (
    "tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "bytes.json",
    "alphabet.txt",
)  # fmt: skip
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Files of published tokenizers that are not read, and what to do.
NOT_READ = {
    "spiece.model": "transformers writes a tokenizer.json for it: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    "source.spm": "Marian has a SentencePiece model for each of its two languages; "
    "encode with transformers' MarianTokenizer, and pass the ids to the model",
}


def from_spec(spec: dict, end: str | None) -> Tokenizer:
    """The tokenizer of a parsed tokenizer.json. end: the token that ends a text, if it has no usual
    name."""
    if marks_word_ends(spec):
        return ClipTokenizer(spec, end)
    if model_of(spec).get("end_of_word_suffix"):
        end = end or UNKNOWN  # GPT-1 has no token that ends a text
    kind = BPETokenizer if kind_of(model_of(spec)) == "BPE" else PublishedTokenizer
    return kind(spec, end)


def from_files(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer in files, name -> content: the first of FILES decides on its kind.

    A tokenizer.json counts before a tokenizer.model that another library wrote: that of tiktoken
    lacks the split pattern, and a SentencePiece model may lack the added tokens.
    """
    companions = read_companions(files)
    added, end = companions.added, companions.end
    model = files.get("tokenizer.model")
    spec = published_spec(files, companions)
    if model is not None and is_tiktoken(model) and spec is None:
        raise ValueError("tokenizer.model is tiktoken's, without a split: add its tokenizer.json")
    if model is not None and not is_tiktoken(model):
        try:
            pieces = SentencePieceTokenizer(model, added, end)
            if spec is None or pieces.is_lossless():
                return pieces
        except (ValueError, RuntimeError):
            if spec is None:
                raise
    if spec is not None:
        return from_spec(spec, end)
    if "bytes.json" in files:
        return ByteTokenizer()
    if "alphabet.txt" in files:
        return CharacterTokenizer(files["alphabet.txt"].decode())
    raise ValueError(f"no tokenizer: looked for {', '.join(FILES)}; found {[*files]}")


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder, ours or a published one. Raises ValueError if there is none."""
    paths = [Path(folder) / name for name in FILES + COMPANIONS]
    try:
        return from_files({path.name: path.read_bytes() for path in paths if path.is_file()})
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        problem = str(error)
        for name, advice in NOT_READ.items():
            if (Path(folder) / name).is_file():
                problem = f"{name} is not read; {advice}"
        raise ValueError(f"{folder}: {problem}") from error
