"""The files that tokenizers are published in, read and written.

    tokenizer.json          Hugging Face's format. Its "model" holds the vocabulary and the merges.
                            "added_tokens", "normalizer" and "pre_tokenizer" say what happens to a
                            text before the merges are applied: see text_steps.py
    vocab.txt               BERT's WordPiece as it was first published: a token a line
    vocab.json, merges.txt  GPT-2, RoBERTa, Qwen2 and CLIP as they were first published; converted
                            to a tokenizer.json here, so that there is one reader for all
    added_tokens.json       further tokens and their ids, beside these two or a tokenizer.model
    tokenizer_config.json   written for the library transformers; it also names the tokens that
                            start, end and pad a text

A parsed tokenizer.json is called a spec here. read_spec and read_clip_spec turn it into a
Vocabulary, or raise ValueError for what they do not support. The algorithms are in bpe.py and
tokenizer.py. SentencePiece's tokenizer.model is read by its own library; sentencepiece_spec
converts it to a spec, to be written as a tokenizer.json.

Two kinds of BPE are read. Byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek, Falcon, StarCoder, Phi,
BLOOM, Command R) has the bytes for its alphabet. BPE on characters (Llama 2, Mistral, Gemma) writes
a space as U+2581, and spells a character without a token in bytes, <0x00> ... <0xFF>; that of GPT-1
drops spaces, marks the ends of words and has no such bytes. So are WordPiece (BERT) and Unigram
(ALBERT, T5, XLM-R); their algorithms are in pieces.py.

Left out: WordLevel, and the post_processor, which puts special tokens around a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyfm.bpe import Pair, Rules
from tinyfm.common import schema
from tinyfm.hub.pieces import UNKNOWN_PENALTY, Unigram, WordPiece
from tinyfm.hub.text_steps import (
    BYTE_OF,
    CHAR_OF,
    QWEN2_PATTERN,
    SPACE,
    AddedToken,
    Normalizer,
    Splitter,
    check_start,
    flatten,
    read_normalizers,
    read_splitters,
    write_bytes,
)

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

START = "<|startoftext|>"  # stands before a text; CLIP's only
EOT = "<|endoftext|>"  # stands between documents
UNKNOWN = "<unk>"  # GPT-1's only special token
END_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # in published vocabularies
MASK_NAMES = ("[MASK]", "<mask>")  # hides a token from an encoder
CLS_NAMES = ("[CLS]", "<s>")  # stands before a text that an encoder reads
PAD_NAMES = ("[PAD]", "<pad>")  # fills up such a text's row
INSIDE = "##"  # before a token of WordPiece inside a word
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END_OF_WORD = "</w>"  # marks a token that ends a word, in the vocabularies of CLIP and GPT-1
BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}  # how SentencePiece writes a byte
HIGHEST_ID = (1 << 22) - 1  # of a token; the largest published vocabularies have 2**18
LONGEST_TOKEN = 200  # characters of a token of WordPiece and Unigram; published ones have 16
LONGEST_WORD = 10_000  # characters of a word of WordPiece; published ones have 100

# ---- read a tokenizer.json -----------------------------------------------------------------------


class Merges(NamedTuple):
    """The model of a tokenizer.json of the type BPE."""

    rules: Rules  # pair of ids -> (rank, new id)
    unknown: int | None  # id for characters without a token; None = they are left out
    fuse_unknown: bool  # a row of such characters is one token
    byte_fallback: bool  # a character without a token is spelled in bytes, <0x00> ... <0xFF>
    ignore_merges: bool  # a chunk that is a token becomes that token, merges or not (Llama 3)
    end_of_word: str  # written behind the last character of a chunk (GPT-1); "" = nothing


class Vocabulary(NamedTuple):
    """A tokenizer.json, in the form that encoding needs."""

    ids: dict[str, int]  # ordinary tokens, as they are written in the file
    model: Merges | WordPiece | Unigram
    added: list[AddedToken]  # found in the text before it is split
    normalizers: list[Normalizer]
    splitters: list[Splitter]  # each splits further what the one before it left
    by_bytes: bool  # tokens are written in GPT-2's characters for bytes
    drop_space: bool  # decoding drops the space in front, which encoding added


def check_id(name: str, i: Any) -> int:
    """Return the id of a token. Raises ValueError if it is no whole number in range."""
    if type(i) is not int or not 0 <= i <= HIGHEST_ID:
        raise ValueError(f"the id of token {name[:40]!r} is {i!r}; use 0 ... {HIGHEST_ID}")
    return i


def check_ids(ids: Iterable[tuple[str, Any]]) -> None:
    """Raise ValueError if an id is out of range, or if two tokens share one. ids: (token, id)."""
    names: dict[int, str] = {}
    for name, i in ids:
        first = names.setdefault(check_id(name, i), name)
        if first != name:
            raise ValueError(f"tokens {first[:40]!r} and {name[:40]!r} share the id {i}")


def read_added(raw: Any) -> list[AddedToken]:
    """The added tokens of a tokenizer.json. Raises ValueError for one that is malformed."""
    if not isinstance(raw, list):
        raise ValueError(f"added_tokens is {type(raw).__name__}, not a list")
    tokens = []
    for fields in raw:
        if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
            raise ValueError(f"added token {str(fields)[:80]} has no content")
        known = {name: fields[name] for name in AddedToken._fields if name in fields}
        flags = [known[name] for name in AddedToken._fields[2:] if name in known]
        if any(type(flag) is not bool for flag in flags):
            raise ValueError(f"added token {fields['content'][:40]!r} has a flag that is no bool")
        check_id(fields["content"], fields.get("id"))
        tokens.append(AddedToken(**known))
    return tokens


def read_merge(merge: Any) -> tuple[str, str]:
    """The two tokens of a merge, "a b" or ["a", "b"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    match parts:
        case [str(first), str(second)]:
            return first, second
    raise ValueError(f"merge {str(merge)[:80]!r} is not two tokens")


def read_rules(merges: Any, ids: dict[str, int]) -> Rules:
    """The rules of a model's merges. Raises ValueError for a token that the vocabulary lacks."""
    if not isinstance(merges, list):
        raise ValueError(f"merges is {type(merges).__name__}, not a list")
    rules = {}
    for rank, merge in enumerate(merges):
        a, b = read_merge(merge)
        if not {a, b, a + b} <= ids.keys():
            raise ValueError(f"the vocabulary lacks a token of the merge {(a, b)}")
        rules[ids[a], ids[b]] = (rank, ids[a + b])
    return rules


def drops_space(decoder: Any) -> bool:
    """Whether a decoder drops the space in front of a text."""
    match decoder:
        case {"type": "Sequence", "decoders": [*steps]}:
            return any(map(drops_space, steps))
        case {"type": "Strip", "content": " ", "start": 1}:
            return True
        case {"type": "Metaspace"}:
            return decoder.get("prepend_scheme", "always") != "never"
    return False


def model_of(spec: dict) -> dict[str, Any]:
    """The model of a tokenizer.json. Raises ValueError if there is none."""
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError("tokenizer.json has no model with a vocab")
    return model


def kind_of(model: dict) -> str:
    """The type of a model; files of older versions do not name it."""
    if "type" in model:
        return model["type"]
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece"


def read_vocab(model: dict) -> dict[str, Any]:
    """Token -> id. A Unigram model lists its tokens with their scores."""
    kind, vocab = kind_of(model), model["vocab"]
    if kind != "Unigram":
        return schema.check(vocab, dict[str, Any], "the vocab of the model")
    pairs = schema.check(vocab, list[tuple[str, float]], "the vocab of the model")
    return {token: i for i, (token, _) in enumerate(pairs)}


def read_unknown(model: dict, vocab: dict[str, int]) -> int | None:
    """The id of what has no token. Raises ValueError if the vocabulary lacks it."""
    if kind_of(model) == "Unigram":
        unknown = schema.check(model.get("unk_id"), int | None, "unk_id")
        if unknown is not None and unknown not in range(len(model["vocab"])):
            raise ValueError(f"unk_id is {unknown!r}; the vocabulary has {len(model['vocab'])} ids")
        return unknown
    unknown = model.get("unk_token")
    if unknown is not None and unknown not in vocab:
        raise ValueError(f"the vocabulary lacks the unk_token {unknown!r}")
    return None if unknown is None else vocab[unknown]


def read_bpe(model: dict, ids: dict[str, int], unknown: int | None) -> Merges:
    """A model of the type BPE. Raises ValueError for an option that is not supported."""
    for option in ("continuing_subword_prefix", "dropout"):
        if model.get(option):
            raise ValueError(f"a BPE model with {option} is not supported")
    suffix = model.get("end_of_word_suffix") or ""
    if suffix and model.get("byte_fallback"):
        raise ValueError("a BPE model with end_of_word_suffix and byte_fallback is not supported")
    return Merges(
        rules=read_rules(model.get("merges"), ids),
        unknown=unknown,
        fuse_unknown=bool(model.get("fuse_unk")),
        byte_fallback=bool(model.get("byte_fallback")),
        ignore_merges=bool(model.get("ignore_merges")),
        end_of_word=schema.check(suffix, str, "end_of_word_suffix"),
    )


def longest_token(ids: dict[str, int]) -> int:
    """Characters of the longest token. Raises ValueError if it is too long."""
    longest = max(ids, key=len, default="")
    if len(longest) > LONGEST_TOKEN:
        raise ValueError(
            f"token {longest[:40]!r} has {len(longest):,} characters; the limit is {LONGEST_TOKEN}"
        )
    return len(longest)


def read_word_piece(model: dict, ids: dict[str, int], unknown: int | None) -> WordPiece:
    """A model of the type WordPiece. Raises ValueError for a field that cannot be used."""
    if unknown is None:
        raise ValueError("a WordPiece model needs an unk_token")
    longest = model.get("max_input_chars_per_word", 100)
    if type(longest) is not int or not 0 < longest <= LONGEST_WORD:
        raise ValueError(f"max_input_chars_per_word is {longest!r}; use 1 ... {LONGEST_WORD}")
    prefix = model.get("continuing_subword_prefix", "##")
    if not isinstance(prefix, str):
        raise ValueError(f"continuing_subword_prefix is {prefix!r}, no text")
    return WordPiece(ids, unknown, prefix, longest, longest_token(ids))


def read_unigram(model: dict, ids: dict[str, int], unknown: int | None) -> Unigram:
    """A model of the type Unigram."""
    longest_token(ids)
    longest: dict[str, int] = {}
    scores = {}
    for token, score in model["vocab"]:
        if token in ids and token:
            scores[token] = score
            longest[token[0]] = max(len(token), longest.get(token[0], 0))
    lowest = min((score for _, score in model["vocab"]), default=0.0)
    by_bytes = bool(model.get("byte_fallback"))
    return Unigram(ids, scores, unknown, lowest - UNKNOWN_PENALTY, by_bytes, longest)


MODELS = {"BPE": read_bpe, "WordPiece": read_word_piece, "Unigram": read_unigram}


def read_spec(spec: dict) -> Vocabulary:
    """Read a tokenizer.json, such as GPT-2's, Llama's, Qwen's, Gemma's, BERT's and T5's.

    Raises ValueError for what cannot be followed exactly here. Its post_processor, which puts
    special tokens around a text, is ignored.
    """
    model = model_of(spec)
    kind = kind_of(model)
    if kind not in MODELS:
        raise ValueError(f"the model is {str(kind)[:40]}; those that are read: {', '.join(MODELS)}")
    vocab = read_vocab(model)
    added = read_added(spec.get("added_tokens") or [])
    check_ids([*vocab.items(), *((token.content, token.id) for token in added)])
    for token in added:
        if vocab.get(token.content, token.id) != token.id:
            raise ValueError(
                f"token {token.content!r} has the id {token.id} in added_tokens and "
                f"{vocab[token.content]} in the vocabulary"
            )
    # Special tokens are never made by the model.
    specials = {token.content for token in added if token.special}
    ids = {token: i for token, i in vocab.items() if token not in specials}
    normalizers = read_normalizers(spec.get("normalizer"))
    splitters = read_splitters(spec.get("pre_tokenizer"))
    check_start(spec.get("normalizer"), spec.get("pre_tokenizer"))
    return Vocabulary(
        ids=ids,
        model=MODELS[kind](model, ids, read_unknown(model, vocab)),
        added=added,
        normalizers=normalizers,
        splitters=splitters,
        by_bytes=write_bytes in splitters,
        drop_space=kind == "WordPiece" or drops_space(spec.get("decoder")),
    )


def token_content(token: str, vocabulary: Vocabulary) -> bytes:
    """The bytes that a token of a Vocabulary stands for."""
    if vocabulary.by_bytes:
        if BYTE_OF.keys() >= set(token):
            return bytes(BYTE_OF[char] for char in token)
        return token.encode("utf-8")  # no text becomes this token
    if isinstance(vocabulary.model, WordPiece):
        inside = token.removeprefix(vocabulary.model.prefix)
        starts_word = "" if inside != token else " "
        return f"{starts_word}{inside}".encode()
    end_of_word = getattr(vocabulary.model, "end_of_word", "")
    if end_of_word and token.endswith(end_of_word):
        return f"{token.removesuffix(end_of_word)} ".encode()
    if vocabulary.model.byte_fallback and token in BYTE_TOKENS:
        return bytes([BYTE_TOKENS[token]])
    return token.replace(SPACE, " ").encode("utf-8")


# ---- make a tokenizer.json -----------------------------------------------------------------------

# Write bytes as characters. As a pre-tokenizer it also splits by GPT-2's pattern.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def make_spec(model: dict, specials: dict[str, int], **steps: dict | None) -> dict:
    """The content of a tokenizer.json from its model and, by name, the steps before and after."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, "special": True} | flags for name, i in specials.items()]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **empty, "added_tokens": added, **steps, "model": model}


def bpe_spec(vocab: dict[str, int], merges: Sequence, specials: dict[str, int]) -> dict:
    """The tokenizer.json of byte-level BPE with GPT-2's pattern. Its tokens and merges are written
    in GPT-2's characters."""
    model = {"type": "BPE", "vocab": vocab | specials, "merges": merges}
    return make_spec(model, specials, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL)


def learned_spec(merges: Sequence[Pair]) -> dict:
    """The tokenizer.json of the merges that bpe.train learned; the last id is EOT."""
    tokens = [*CHAR_OF]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    pairs = [[tokens[a], tokens[b]] for a, b in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    return bpe_spec(vocab, pairs, {EOT: len(tokens)})


def alphabet_spec(alphabet: str) -> dict:
    """The tokenizer.json of tokens that are characters, as BPE without merges; the last id is
    EOT."""
    vocab = {char: i for i, char in enumerate(alphabet)}
    specials = {EOT: len(alphabet)}
    model = {"type": "BPE", "vocab": vocab | specials, "merges": []}
    return make_spec(model, specials, pre_tokenizer=None, decoder={"type": "Fuse"})


def word_piece_spec(
    tokens: Sequence[str],
    lowercase: bool,
    strip_accents: bool | None = None,
    cut_chinese: bool = True,
    specials: dict[str, int] | None = None,
) -> dict:
    """The tokenizer.json of WordPiece, split and cleaned as BERT's.

    tokens: in the order of their ids, after BERT_SPECIALS; or with specials, which says the ids of
    those among the tokens, all of them. strip_accents: None = if the text is put in lower case.
    """
    if specials is None:
        tokens = [*BERT_SPECIALS, *tokens]
        specials = {name: i for i, name in enumerate(BERT_SPECIALS)}
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": INSIDE,
        "max_input_chars_per_word": 100,
        "vocab": {token: i for i, token in enumerate(tokens)},
    }
    return make_spec(
        model,
        specials,
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": cut_chinese,
            "strip_accents": strip_accents,
            "lowercase": lowercase,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=surround(specials, "[CLS]", "[SEP]"),
        decoder={"type": "WordPiece", "prefix": INSIDE, "cleanup": False},
    )


def surround(ids: dict[str, int], start: str, end: str) -> dict | None:
    """The post_processor that puts two special tokens around a text; a second text is segment 1."""
    if not {start, end} <= ids.keys():
        return None
    row = []
    for kind, name, segment in (
        ("SpecialToken", start, 0),
        ("Sequence", "A", 0),
        ("SpecialToken", end, 0),
        ("Sequence", "B", 1),
        ("SpecialToken", end, 1),
    ):
        row.append({kind: {"id": name, "type_id": segment}})
    described = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (start, end)}
    return {
        "type": "TemplateProcessing",
        "single": row[:3],
        "pair": row,
        "special_tokens": described,
    }


def ranked_merges(scores: dict[str, float]) -> list[list[str]]:
    """The merges of SentencePiece's BPE, the best score first: any two pieces may make a third."""
    merges = []
    for name in sorted(scores, key=scores.get, reverse=True):
        for cut in range(1, len(name)):
            if name[:cut] in scores and name[cut:] in scores:
                merges.append([name[:cut], name[cut:]])
    return merges


def sentencepiece_spec(
    library: SentencePieceProcessor, specials: dict[str, int], prefix_space: bool = False
) -> dict:
    """The tokenizer.json of a SentencePiece model that does not normalise.

    prefix_space: whether the model puts a space in front of a text.

    It gives the same ids, with two exceptions: a literal U+2581 in the text becomes a space, and of
    two equally probable unigram segmentations the other may be taken.
    """
    names = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    scores = {}  # of the ordinary pieces
    for i, name in enumerate(names):
        if not (library.is_byte(i) or library.is_control(i) or library.is_unknown(i)):
            scores[name] = library.get_score(i)
    # The scores of a unigram model are log p; those of BPE are ranks, which are whole.
    if any(score % 1 for score in scores.values()):
        vocab = [[name, library.get_score(i)] for i, name in enumerate(names)]
        model = {
            "type": "Unigram",
            "unk_id": library.unk_id(),
            "vocab": vocab,
            "byte_fallback": True,
        }
        # The library finds the piece of a byte by its name: keep "<0x41>" in a text from being it.
        pattern = {"Regex": r"<(?=(0x[0-9A-F]{2}|unk|\|endoftext\|)>)"}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    else:
        model = {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": ranked_merges(scores),
            "unk_token": names[library.unk_id()],
            "byte_fallback": True,
        }
        split = None
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if prefix_space:
        prepend = {"type": "Prepend", "prepend": "▁"}
        normalizer = {"type": "Sequence", "normalizers": [prepend, normalizer]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return make_spec(
        model,
        specials,
        normalizer=normalizer,
        pre_tokenizer=split,
        decoder={"type": "Sequence", "decoders": decoders},
    )


# ---- vocab.json and merges.txt -------------------------------------------------------------------

# Classes of transformers that split by GPT-2's pattern, as such a folder does by default.
LIKE_GPT2 = ("GPT2", "Roberta", "Bart", "CodeGen", "Longformer", "CLIP", "PreTrained")
NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")  # of special tokens in a config


class Companions(NamedTuple):
    """What the files beside a vocabulary say."""

    kind: str  # the class of transformers, without "Tokenizer"; "" if unknown
    end: str | None  # the token that ends a text
    specials: list[str]  # names of special tokens
    added: list[AddedToken]  # from added_tokens.json and tokenizer_config.json
    prefix_space: bool  # whether a space is put in front of a text


def token_name(token: Any) -> str | None:
    """The name of a token in a config: a text, or an object with the text and its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_companions(files: dict[str, bytes]) -> Companions:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json, if present."""
    config = read_object(files, "special_tokens_map.json")
    config |= read_object(files, "tokenizer_config.json")
    specials = [token_name(config.get(f"{name}_token")) for name in NAMES]
    further = config.get("additional_special_tokens") or []
    specials += map(token_name, further if isinstance(further, list) else [])
    specials = [name for name in dict.fromkeys(specials) if name]
    tokens = {}
    for name, i in read_object(files, "added_tokens.json").items():
        tokens[name] = AddedToken(name, check_id(name, i), name in specials)
    described = config.get("added_tokens_decoder") or {}
    if not isinstance(described, dict):
        raise ValueError("tokenizer_config.json: added_tokens_decoder is not an object")
    for i, fields in described.items():
        if not i.isdecimal() or not isinstance(fields, dict):
            raise ValueError(f"tokenizer_config.json: added_tokens_decoder has {i[:40]!r}")
        for token in read_added([fields | {"id": int(i)}]):
            tokens[token.content] = token
    kind = str(config.get("tokenizer_class") or "")
    return Companions(
        kind=kind.removesuffix("Fast").removesuffix("Tokenizer"),
        end=token_name(config.get("eos_token")),
        specials=specials,
        added=list(tokens.values()),
        prefix_space=config.get("add_prefix_space") is True,
    )


def read_merges(text: str) -> list[str]:
    """The pairs of a merges.txt, "a b" each, without the line that names its version."""
    return [line for line in text.split("\n") if line and not line.startswith("#version")]


def gpt2_spec(vocab: dict[str, int], merges_txt: str, companions: Companions) -> dict:
    """The tokenizer.json of a vocab.json and merges.txt, as GPT-2 was first published."""
    merges = read_merges(merges_txt)
    if any(merge.endswith(END_OF_WORD) for merge in merges):
        raise ValueError("merges.txt marks ends of words with </w>: it is not byte-level BPE")
    specials = {name: vocab[name] for name in END_NAMES if name in vocab}
    specials |= {name: vocab[name] for name in companions.specials if name in vocab}
    spec = bpe_spec(vocab, merges, specials)
    if companions.kind == "Qwen2":
        pattern = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated"}
        steps = [pattern | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        spec["normalizer"] = {"type": "NFC"}
    elif companions.kind and companions.kind not in LIKE_GPT2:
        raise ValueError(
            f"tokenizer_class is {companions.kind}Tokenizer, whose way to split a text is not in "
            "vocab.json and merges.txt: add its tokenizer.json"
        )
    elif companions.prefix_space:
        spec["pre_tokenizer"] = BYTE_LEVEL | {"add_prefix_space": True}
    if companions.kind == "Roberta":
        names = {"cls": "<s>", "sep": "</s>"}
        ends = {kind: [name, specials.get(name)] for kind, name in names.items()}
        space = {"add_prefix_space": companions.prefix_space, "trim_offsets": True}
        spec["post_processor"] = {"type": "RobertaProcessing"} | ends | space
    described = {token.content: token for token in companions.added}
    entries = [token for token in spec["added_tokens"] if token["content"] not in described]
    entries += [token._asdict() for token in described.values()]
    spec["added_tokens"] = sorted(entries, key=lambda token: token["id"])
    return spec


def gpt1_spec(vocab: dict[str, int], merges_txt: str) -> dict:
    """The tokenizer.json of a vocab.json and merges.txt, as GPT-1 was first published."""
    model = {
        "type": "BPE",
        "unk_token": UNKNOWN,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": END_OF_WORD,
        "vocab": vocab,
        "merges": read_merges(merges_txt),
    }
    return make_spec(
        model,
        {UNKNOWN: vocab[UNKNOWN]},
        normalizer={"type": "BertNormalizer", "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "BPEDecoder", "suffix": END_OF_WORD},
    )


# ---- BERT's vocab.txt ----------------------------------------------------------------------------

LIKE_BERT = ("Bert", "DistilBert", "Electra", "PreTrained")


def vocab_txt_spec(vocab_txt: str, companions: Companions, config: dict) -> dict:
    """The tokenizer.json of a vocab.txt, as BERT was first published: a token a line.

    config: tokenizer_config.json, which says whether the text is put in lower case. Raises
    ValueError for another class of transformers, and for a vocabulary without [UNK].
    """
    if companions.kind and companions.kind not in LIKE_BERT:
        raise ValueError(
            f"tokenizer_class is {companions.kind}Tokenizer, whose way to split a text is not in "
            "vocab.txt: add its tokenizer.json"
        )
    lines = vocab_txt.replace("\r\n", "\n").removesuffix("\n").split("\n")
    ids = {token: i for i, token in enumerate(lines)}  # the last of equal lines counts, as there
    names = [*BERT_SPECIALS, *companions.specials]
    spec = word_piece_spec(
        lines,
        lowercase=config.get("do_lower_case", True) is True,
        strip_accents=schema.check(config.get("strip_accents"), bool | None, "strip_accents"),
        cut_chinese=config.get("tokenize_chinese_chars", True) is True,
        specials={name: ids[name] for name in names if name in ids},
    )
    described = {token.content: token for token in companions.added}
    entries = [token for token in spec["added_tokens"] if token["content"] not in described]
    spec["added_tokens"] = entries + [token._asdict() for token in described.values()]
    return spec


# ---- CLIP's tokenizer.json -----------------------------------------------------------------------

CLIP_CONTEXT_LENGTH = 77  # of OpenAI's models; pipelines read in the files where to cut a text
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The name of a special token in ordinary text is cut off from what follows, then split by GPT-2's
# pattern. Older files have only CLIP_WORDS here; transformers reads them like this all the same.
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|" + CLIP_WORDS

COLLAPSE = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
CLIP_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [{"type": "NFC"}, COLLAPSE, {"type": "Lowercase"}],
}
CLIP_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": CLIP_PATTERN},
    "behavior": "Removed",
    "invert": True,
}


def marks_word_ends(spec: dict) -> bool:
    """Whether the tokens of a tokenizer.json are bytes, and carry CLIP's mark where they end a
    word."""
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or model.get("end_of_word_suffix") != END_OF_WORD:
        return False
    return any(step["type"] == "ByteLevel" for step in flatten(spec.get("pre_tokenizer")))


def is_clip(spec: dict) -> bool:
    """Whether a tokenizer.json cleans and splits a text as CLIP's do."""
    splits = [
        CLIP_SPLIT | {"pattern": {"Regex": pattern}} for pattern in (CLIP_PATTERN, CLIP_WORDS)
    ]
    match spec.get("pre_tokenizer"):
        case {"pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False}]}:
            return split in splits and spec.get("normalizer") == CLIP_NORMALIZER
    return False


def read_clip_spec(spec: dict) -> Vocabulary:
    """Read a tokenizer.json of CLIP's. In its vocabulary a token may end in END_OF_WORD.

    The vocabulary and the merges are read like those of any byte-level BPE. The steps before the
    merges must be CLIP's, which ClipTokenizer has in code. Raises ValueError if they are not.
    """
    # A special token that is one byte is for padding, "!" in Stable Diffusion 2, and stays a byte.
    added = [
        token
        for token in spec.get("added_tokens") or []
        if not isinstance(token, dict) or token.get("content") not in BYTE_OF
    ]
    model = spec.get("model")
    plain = {
        "model": model | {"end_of_word_suffix": None, "unk_token": None},
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "added_tokens": added,
    }
    vocabulary = read_spec(plain)
    refusal = "BPE with ends of words, but not byte-level as CLIP's"
    specials = {token.content for token in vocabulary.added}
    for name in (START, EOT):
        if name not in specials:
            raise ValueError(f"{refusal}: the special tokens lack {name}; add it to added_tokens")
    for char, b in BYTE_OF.items():
        for token in (char, char + END_OF_WORD):
            if token not in vocabulary.ids:
                end = token.removeprefix(char).encode("utf-8")
                raise ValueError(f"{refusal}: the vocabulary lacks {bytes([b]) + end}")
    if not is_clip(spec):
        raise ValueError(f"{refusal}: its normalizer or pre_tokenizer splits differently")
    return vocabulary


def clip_spec(vocab: dict[str, int], merges_txt: str) -> dict:
    """The tokenizer.json of CLIP's vocab.json and merges.txt."""
    specials = {name: vocab[name] for name in (START, EOT) if name in vocab}
    model = {
        "type": "BPE",
        "unk_token": EOT,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": END_OF_WORD,
        "vocab": vocab,
        "merges": read_merges(merges_txt),
    }
    surround = {
        "type": "RobertaProcessing",
        "sep": [EOT, specials.get(EOT)],
        "cls": [START, specials.get(START)],
        "trim_offsets": False,
        "add_prefix_space": False,
    }
    return make_spec(
        model,
        specials,
        normalizer=CLIP_NORMALIZER,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [CLIP_SPLIT, BYTE_LEVEL]},
        post_processor=surround,
        decoder=BYTE_LEVEL,
    )


# ---- files ---------------------------------------------------------------------------------------


def read_object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in a file; {} if it is absent. Raises ValueError if it is no object."""
    if name not in files:
        return {}
    try:
        value = schema.parse_json(files[name], non_finite=True)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}") from error
    return schema.check(value, dict[str, Any], name)


def published_spec(files: dict[str, bytes], companions: Companions) -> dict | None:
    """The spec that files, name -> content, hold in tokenizer.json, in vocab.json and merges.txt,
    or in vocab.txt. None if they hold none of these."""
    if "tokenizer.json" in files:
        return read_object(files, "tokenizer.json")
    if "vocab.json" in files and "merges.txt" in files:
        vocab = read_object(files, "vocab.json")
        merges_txt = files["merges.txt"].decode("utf-8")
        if "a" + END_OF_WORD in vocab:
            is_gpt1 = UNKNOWN in vocab and START not in vocab
            return gpt1_spec(vocab, merges_txt) if is_gpt1 else clip_spec(vocab, merges_txt)
        return gpt2_spec(vocab, merges_txt, companions)
    if "vocab.txt" in files:
        config = read_object(files, "tokenizer_config.json")
        return vocab_txt_spec(files["vocab.txt"].decode("utf-8"), companions, config)
    return None


def to_json(value: dict) -> bytes:
    """JSON in UTF-8, without escapes for letters of other alphabets."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def hugging_face_files(spec: dict, end: str) -> dict[str, bytes]:
    """The files of a tokenizer.json by name; end is the end-of-text token."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,  # else decoding would lose spaces
    }
    return {"tokenizer.json": to_json(spec), "tokenizer_config.json": to_json(config)}


def encoder_spec(spec: dict, end: str, mask: int) -> dict:
    """The tokenizer.json for an encoder that was trained here: end stands before each text.

    mask: the id of [MASK], if the tokenizer has no mask itself. The mask takes the space before it.
    """
    added = list(spec["added_tokens"])
    if not any(token["content"] in MASK_NAMES for token in added):
        added.append(AddedToken(MASK_NAMES[0], mask, special=True, lstrip=True)._asdict())
    ids = {token["content"]: token["id"] for token in added}
    row = [{"SpecialToken": {"id": end, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": row,
        "pair": [*row, row[0], {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end: {"id": end, "ids": [ids[end]], "tokens": [end]}},
    }
    return spec | {"added_tokens": added, "post_processor": template}


def encoder_tokens(spec: dict, end: str) -> dict[str, str]:
    """Names of the special tokens of an encoder's tokenizer, for its config; {} without a mask."""
    specials = [token["content"] for token in spec["added_tokens"]]
    kinds = {"mask_token": MASK_NAMES, "cls_token": CLS_NAMES, "pad_token": PAD_NAMES}
    names = {"sep_token": end}
    for kind, usual in kinds.items():
        found = [name for name in usual if name in specials]
        if found:
            names[kind] = found[0]  # as Tokenizer chooses
    return names if "mask_token" in names else {}


def export_files(
    spec: dict, end: str, captions: int = 0, texts: int = 0, chat_template: str = ""
) -> dict[str, bytes]:
    """The same files for the rows that a model was trained on.

    The end token also pads, unless the tokenizer is an encoder's. captions: context length of a
    text tower, whose rows are a text, the end token, and padding. texts: context length of a
    classifier or an encoder, whose rows are a text and padding. Without either, padding comes
    first, as for a model that continues its rows. chat_template: how transformers writes a
    conversation, in Jinja.
    """
    config = json.loads(hugging_face_files(spec, end)["tokenizer_config.json"])
    config |= {"pad_token": end, "padding_side": "right" if captions or texts else "left"}
    config |= encoder_tokens(spec, end)
    config["model_input_names"] = ["input_ids", "attention_mask"]
    if captions or texts:
        config["model_max_length"] = captions or texts
    if captions:
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        pair = {"Sequence": {"id": "B", "type_id": 0}}
        end_token = {"SpecialToken": {"id": end, "type_id": 0}}
        spec = spec | {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [text, end_token],
                "pair": [text, end_token, pair, end_token],
                "special_tokens": {end: {"id": end, "ids": [ids[end]], "tokens": [end]}},
            }
        }
    if chat_template:
        config["chat_template"] = chat_template
    return {"tokenizer.json": to_json(spec), "tokenizer_config.json": to_json(config)}


def added_tokens_files(added: Iterable[AddedToken], end: str) -> dict[str, bytes]:
    """The files that say which tokens stand beside a tokenizer.model, and which ends a text."""
    described = {str(token.id): token._asdict() for token in added}
    config = {"eos_token": end, "added_tokens_decoder": described}
    return {"tokenizer_config.json": to_json(config)}


def is_tiktoken(model: bytes) -> bool:
    """Whether a tokenizer.model is tiktoken's: lines of a token in base64 and its rank."""
    words = model.split(b"\n", 1)[0].split(b" ")
    return len(words) == 2 and words[1].strip().isdigit()


def clip_files(spec: dict, context_length: int) -> dict[str, bytes]:
    """The same files for CLIP's tokenizer, for which transformers has a class."""
    config = {
        "eos_token": EOT,
        "unk_token": EOT,
        "pad_token": EOT,
        "bos_token": START,
        "model_max_length": context_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {"tokenizer.json": to_json(spec), "tokenizer_config.json": to_json(config)}


def vocab_and_merges_files(spec: dict) -> dict[str, bytes]:
    """The vocab.json and merges.txt of a tokenizer.json, for readers of the first layout."""
    model = spec["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    merges_txt = "\n".join(["#version: 0.2", *merges, ""])
    return {"vocab.json": to_json(model["vocab"]), "merges.txt": merges_txt.encode("utf-8")}


def write_files(folder: str | Path, files: dict[str, bytes]) -> None:
    """Write files, name -> content, into a folder, which is made if it does not exist."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)
