"""The files that tokenizers are published in, read and written.

    tokenizer.json          Hugging Face's format. Its "model" holds the vocabulary and the merges,
                            "added_tokens" the special tokens. "normalizer" and "pre_tokenizer" say
                            how a text is changed and split before the merges are applied.
    vocab.json, merges.txt  GPT-2 and CLIP as they were first published; converted to a
                            tokenizer.json here, so that there is one reader for all
    tokenizer_config.json   written for the library transformers

A parsed tokenizer.json is called a spec here. read_spec and read_clip_spec turn it into a
Vocabulary, or raise ValueError for what they do not support. The algorithms are in bpe.py and
tokenizer.py. SentencePiece's tokenizer.model is read by its own library; sentencepiece_spec
converts it to a spec, to be written as a tokenizer.json.

Left out: WordPiece; a tokenizer.json with a Unigram model or with BPE on characters, as
SentencePiece models are exported; and the post_processor, which puts special tokens around a text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import regex

from tinyfm.bpe import GPT2_PATTERN, Pair, Rules

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

START = "<|startoftext|>"  # stands before a text; CLIP's only
EOT = "<|endoftext|>"  # stands between documents
END_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>")  # its names in published vocabularies
END_OF_WORD = "</w>"  # CLIP's only: marks a token that ends a word


# ---- bytes written as characters -----------------------------------------------------------------

# JSON holds text, but tokens are bytes. GPT-2 writes each byte as a visible character: as itself
# where it prints, else as one from U+0100 on. A space is thus written as U+0120.
VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
HIDDEN = [b for b in range(256) if b not in VISIBLE]
CHAR_OF = [chr(b if b in VISIBLE else 256 + HIDDEN.index(b)) for b in range(256)]
BYTE_OF = {char: b for b, char in enumerate(CHAR_OF)}


def to_bytes(token: str) -> bytes:
    """The bytes of a token that is written in GPT-2's characters."""
    if not BYTE_OF.keys() >= set(token):
        raise ValueError(f"token {token!r} is not written in GPT-2's characters for bytes")
    return bytes(BYTE_OF[char] for char in token)


# ---- read a tokenizer.json -----------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """A tokenizer.json of byte-level BPE, in the form that encoding needs."""

    ids: dict[bytes, int]  # ordinary tokens
    rules: Rules  # pair of ids -> (rank, new id)
    specials: dict[str, int]  # found in the text before it is split; never made by merges
    patterns: list[regex.Pattern]  # each splits further what the one before it left
    normalizer: str | None  # a Unicode normal form, such as Qwen's NFC
    ignore_merges: bool  # a chunk that is a token becomes that token, merges or not (Llama 3)


def split_patterns(step: dict | None) -> list[str]:
    """The patterns in the pre_tokenizer of a tokenizer.json."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return [pattern for inner in steps for pattern in split_patterns(inner)]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [GPT2_PATTERN] if step.get("use_regex", True) else []
        case {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}:
            return [p]
    raise ValueError(f"pre-tokenizer {step} is not supported; only byte-level BPE is read")


def read_patterns(step: dict | None) -> list[regex.Pattern]:
    """The compiled patterns of a pre_tokenizer, each in a group so that `split` keeps matches."""
    patterns = [regex.compile(f"({pattern})") for pattern in split_patterns(step)]
    if any(pattern.groups > 1 for pattern in patterns):
        raise ValueError(f"split patterns {patterns} have groups that capture: write (?: ) instead")
    return patterns


def read_model(model: dict, specials: dict[str, int]) -> tuple[dict[bytes, int], Rules]:
    """The ids and the rules of a Vocabulary, from the model of a tokenizer.json."""
    ids = {to_bytes(token): i for token, i in model["vocab"].items() if token not in specials}
    for b in range(256):
        if bytes([b]) not in ids:
            raise ValueError(f"the vocabulary lacks the byte {bytes([b])}")
    rules = {}
    for rank, merge in enumerate(model["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        a = to_bytes(first)
        b = to_bytes(second)
        if not {a, b, a + b} <= ids.keys():
            raise ValueError(f"the vocabulary lacks a token of the merge {(a, b)}")
        rules[ids[a], ids[b]] = (rank, ids[a + b])
    return ids, rules


def read_spec(spec: dict) -> Vocabulary:
    """Read a tokenizer.json of byte-level BPE, such as GPT-2's, Llama 3's and Qwen's.

    Raises ValueError for what cannot be followed exactly here. Its post_processor, which puts
    special tokens around a text, is ignored.
    """
    model = spec["model"]
    added = spec.get("added_tokens") or []
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise ValueError(f"a {kind} model is not byte-level BPE, the only kind that is read")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
        if model.get(option):
            raise ValueError(f"a model with {option} is not byte-level BPE, the only kind read")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(
            f"normalizer {normalizer} is not supported; only Unicode's normal forms are"
        )
    for token in added:
        if any(map(token.get, ("lstrip", "rstrip", "single_word"))):
            raise ValueError(f"special token {token} depends on its surroundings: not supported")
    patterns = read_patterns(spec.get("pre_tokenizer"))
    specials = {token["content"]: token["id"] for token in added}
    ids, rules = read_model(model, specials)
    return Vocabulary(
        ids, rules, specials, patterns, normalizer, ignore_merges=model.get("ignore_merges", False)
    )


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


def ranked_merges(scores: dict[str, float]) -> list[list[str]]:
    """The merges of SentencePiece's BPE, the best score first: any two pieces may make a third."""
    merges = []
    for name in sorted(scores, key=scores.get, reverse=True):
        for cut in range(1, len(name)):
            if name[:cut] in scores and name[cut:] in scores:
                merges.append([name[:cut], name[cut:]])
    return merges


def sentencepiece_spec(library: SentencePieceProcessor, specials: dict[str, int]) -> dict:
    """The tokenizer.json of a SentencePiece model that does not normalise; unknown is id 0.

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
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}
        # The library finds the piece of a byte by its name: keep "<0x41>" in a text from being it.
        pattern = {"Regex": r"<(?=(0x[0-9A-F]{2}|unk|\|endoftext\|)>)"}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    else:
        model = {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": ranked_merges(scores),
            "unk_token": names[0],
            "byte_fallback": True,
        }
        split = None
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return make_spec(
        model,
        specials,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        pre_tokenizer=split,
        decoder={"type": "Sequence", "decoders": decoders},
    )


# ---- GPT-2's vocab.json and merges.txt ----------------------------------------------------------


def read_merges(text: str) -> list[str]:
    """The pairs of a merges.txt, "a b" each, without the line that names its version."""
    return [line for line in text.split("\n") if line and not line.startswith("#version")]


def gpt2_spec(vocab: dict[str, int], merges_txt: str) -> dict:
    """The tokenizer.json of a vocab.json and merges.txt, as GPT-2 was first published."""
    merges = read_merges(merges_txt)
    if any(merge.endswith(END_OF_WORD) for merge in merges):
        raise ValueError("merges.txt marks ends of words with </w>: it is not byte-level BPE")
    return bpe_spec(vocab, merges, {name: vocab[name] for name in END_NAMES if name in vocab})


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
    """Whether the tokens of a tokenizer.json carry CLIP's mark where they end a word."""
    return spec["model"].get("end_of_word_suffix") == END_OF_WORD


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
    added = [token for token in spec.get("added_tokens") or [] if token["content"] not in BYTE_OF]
    plain = {
        "model": spec["model"] | {"end_of_word_suffix": None},
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "added_tokens": added,
    }
    vocabulary = read_spec(plain)
    refusal = "BPE with ends of words, but not byte-level as CLIP's"
    for name in (START, EOT):
        if name not in vocabulary.specials:
            raise ValueError(f"{refusal}: the special tokens lack {name}; add it to added_tokens")
    for b in range(256):
        end = bytes([b]) + END_OF_WORD.encode("utf-8")
        if end not in vocabulary.ids:
            raise ValueError(f"{refusal}: the vocabulary lacks {end}")
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


def published_spec(files: dict[str, bytes]) -> dict | None:
    """The spec that files, name -> content, hold in tokenizer.json, or in vocab.json and
    merges.txt. None if they hold neither."""
    if "tokenizer.json" in files:
        return json.loads(files["tokenizer.json"])
    if "vocab.json" in files and "merges.txt" in files:
        vocab = json.loads(files["vocab.json"])
        merges_txt = files["merges.txt"].decode("utf-8")
        if "a" + END_OF_WORD in vocab:
            return clip_spec(vocab, merges_txt)
        return gpt2_spec(vocab, merges_txt)
    return None


def to_json(value: dict) -> bytes:
    """JSON in UTF-8, without escapes for letters of other alphabets."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def hugging_face_files(spec: dict, end: str) -> dict[str, bytes]:
    """Files by name for the libraries tokenizers and transformers; end is the end-of-text token."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,  # else decoding would lose spaces
    }
    return {"tokenizer.json": to_json(spec), "tokenizer_config.json": to_json(config)}


def clip_files(spec: dict) -> dict[str, bytes]:
    """The same files for CLIP's tokenizer, for which transformers has a class."""
    config = {
        "eos_token": EOT,
        "unk_token": EOT,
        "pad_token": EOT,
        "bos_token": START,
        "model_max_length": CLIP_CONTEXT_LENGTH,
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
