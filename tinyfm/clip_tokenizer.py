"""CLIP's tokenizer: byte-level BPE on lower-case words, in which the end of a word is marked.

Radford et al. 2021, section 2.4. Four things differ from the BPE of tokenizer.py and GPT-2:

1. The text is cleaned: Unicode's composed form (NFC), lower case. What is lost does not come back:
   decode gives the words, lower-case, with one space after each.
2. White space only separates. A word is a run of letters, one digit, a run of other characters, or
   an English ending such as 's; no space belongs to it.
3. The last byte of a word carries "</w>", so that "cat" and the beginning of "catch" differ:

       "The CAT's"  ->  the cat 's  ->  t h e</w>  c a t</w>  ' s</w>  ->  the</w> cat</w> 's</w>

   The alphabet is thus 256 bytes inside a word and 256 that end one; the merges follow.
4. The text tower reads  start token, ids, end token, and gives its summary of the text
   at the end token: a text that is too long must lose something else.

The ids are those of transformers' CLIPTokenizer. Left out, as there: the repair of broken Unicode
and of HTML entities with which OpenAI's own code begins. Left out here: the token to pad with that
published files name, which is the end token for OpenAI's models and Stable Diffusion 1; and special
tokens in other letters: transformers takes <|STARTOFTEXT|> for the start.
"""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import regex

from tinyfm import bpe
from tinyfm.tokenizer import EOT, BPETokenizer

START, END_OF_WORD = "<|startoftext|>", b"</w>"
CONTEXT_LENGTH = 77  # of OpenAI's models; it goes with the files, as pipelines cut texts by it

# ---- the steps before the merges -----------------------------------------------------------------

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# A special's name in ordinary text is cut off from what follows, then cut by GPT-2's pattern. Older
# files have WORDS alone here; transformers reads them in this way all the same.
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|" + WORDS
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
COLLAPSE = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
NORMALIZER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, COLLAPSE, {"type": "Lowercase"}]}
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Removed", "invert": True}


def clean(text: str) -> str:
    """Composed and lower-case. White space need not be collapsed: the split drops all of it."""
    # str.lower gives the sigma at the end of a word another form; CLIPTokenizer does not.
    return unicodedata.normalize("NFC", text).replace("Σ", "σ").lower()


def is_clip(spec: dict) -> bool:
    """Whether a tokenizer.json prepares a text as CLIP's do."""
    splits = [SPLIT | {"pattern": {"Regex": pattern}} for pattern in (PATTERN, WORDS)]
    match spec.get("pre_tokenizer"):
        case {"pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False}]}:
            return split in splits and spec.get("normalizer") == NORMALIZER
    return False


# ---- the tokenizer -------------------------------------------------------------------------------


class ClipTokenizer(BPETokenizer):
    """CLIP's byte-level BPE as a parsed tokenizer.json describes it.

    `bot` starts a row of ids, `eot` ends it. The bytes of a token that ends a word end in a space.
    """

    def __init__(self, spec: dict):
        """Raises ValueError for BPE with ends of words that is not CLIP's."""
        plain = {"model": spec["model"] | {"end_of_word_suffix": None}, "normalizer": None}
        # A special that is a byte is one to pad with, "!" in Stable Diffusion 2, and stays a byte.
        added = [t for t in spec.get("added_tokens") or [] if t["content"] not in bpe.BYTE_OF]
        super().__init__(spec | plain | {"pre_tokenizer": BYTES, "added_tokens": added})
        ends = {bytes([b]) + END_OF_WORD for b in range(256)} - self._vocabulary.ids.keys()
        lacking = [*({START, EOT} - self.specials.keys()), *sorted(ends)]
        if lacking or not is_clip(spec):
            reason = f"the vocabulary lacks {lacking[0]}" if lacking else "it splits differently"
            raise ValueError(f"BPE with ends of words, but not byte-level as CLIP's: {reason}")
        self.bot, self._spec = self.specials[START], lambda: spec
        config = dict.fromkeys(("eos_token", "unk_token", "pad_token"), EOT)
        config |= {"bos_token": START, "model_max_length": CONTEXT_LENGTH}
        config |= {"tokenizer_class": "CLIPTokenizer"}
        self._files = bpe.hugging_face_files(spec, EOT)
        self._files["tokenizer_config.json"] = json.dumps(config).encode("utf-8")
        for token, i in self._vocabulary.ids.items():
            if token.endswith(END_OF_WORD):
                self._table[i] = token.removesuffix(END_OF_WORD) + b" "

    def _encode_chunk(self, chunk: str) -> list[int]:
        vocabulary, row = self._vocabulary, []
        for word in vocabulary.patterns[0].findall(chunk):  # several only in a special's name
            content = word.encode("utf-8")
            symbols = [content[i : i + 1] for i in range(len(content))]
            symbols[-1] += END_OF_WORD
            row += bpe.apply_merges([vocabulary.ids[s] for s in symbols], vocabulary.rules)
        return row

    def _encode(self, text: str) -> list[int]:
        rows = map(self._memory.__getitem__, regex.findall(PATTERN, clean(text)))
        return [i for row in rows for i in row]

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned words of the ids with a space between; specials as their own text."""
        return super().decode(ids).strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the layout of published models, for the tokenizers and transformers libraries."""
        model = self._spec()["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        files = {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        }
        encoded = {name: content.encode("utf-8") for name, content in files.items()}
        bpe.write_files(folder, self._files | encoded)


# ---- published files -----------------------------------------------------------------------------


def clip_spec(vocab: dict[str, int], merges_txt: str) -> dict:
    """The tokenizer.json of CLIP's vocab.json and merges.txt."""
    specials = {name: vocab[name] for name in (START, EOT) if name in vocab}
    model = {"type": "BPE", "unk_token": EOT, "continuing_subword_prefix": ""}
    model |= {"end_of_word_suffix": END_OF_WORD.decode(), "vocab": vocab}
    model["merges"] = bpe.read_merges(merges_txt)
    edges = {name: [text, specials.get(text)] for name, text in (("sep", EOT), ("cls", START))}
    flags = {"trim_offsets": False, "add_prefix_space": False}
    return bpe.make_spec(
        model,
        specials,
        normalizer=NORMALIZER,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, BYTES]},
        post_processor={"type": "RobertaProcessing"} | edges | flags,
        decoder=BYTES,
    )


def from_files(files: dict[str, bytes]) -> ClipTokenizer | None:
    """The tokenizer that files, name -> content, hold if it marks ends of words, else None."""
    if END_OF_WORD not in files.get("tokenizer.json", files.get("vocab.json", b"")):
        return None  # without parsing what may be megabytes
    if "tokenizer.json" in files:
        spec = json.loads(files["tokenizer.json"])
        return ClipTokenizer(spec) if spec["model"].get("end_of_word_suffix") else None
    vocab = json.loads(files["vocab.json"])
    if "merges.txt" not in files or "a</w>" not in vocab:
        return None
    return ClipTokenizer(clip_spec(vocab, files["merges.txt"].decode("utf-8")))
