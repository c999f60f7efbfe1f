"""What a tokenizer.json does to a text before its model sees it: three steps, as functions.

    added tokens      are cut out of the text, such as <|endoftext|>, <extra> or a run of spaces
    the normalizer    changes the text between them: Unicode's normal forms, replacements
    the pre-tokenizer splits it into chunks, which no token crosses

Each step follows the library `tokenizers`, whose files these are. A pattern in a file comes from a
stranger, and a short one can take longer than the age of the universe: "(a+)+$" on a row of a's.
So every search has a time limit.

Left out: a few normalizers and pre-tokenizers that no published model here needs. A file with one
of them is refused by its name.
"""

from __future__ import annotations

import base64
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import regex

from tinyfm.bpe import GPT2_PATTERN

Normalizer = Callable[[str], str]
Splitter = Callable[[str, bool], list[str]]  # (text, whether it starts the whole text) -> chunks

SPACE = "\u2581"  # how SentencePiece writes a space

# ---- bytes written as characters -----------------------------------------------------------------

# JSON holds text, but tokens are bytes. GPT-2 writes each byte as a visible character: as itself
# where it prints, else as one from U+0100 on. A space is thus written as U+0120.
VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
HIDDEN = [b for b in range(256) if b not in VISIBLE]
CHAR_OF = [chr(b if b in VISIBLE else 256 + HIDDEN.index(b)) for b in range(256)]
BYTE_OF = {char: b for b, char in enumerate(CHAR_OF)}


def written(text: str) -> str:
    """The UTF-8 bytes of a text, in GPT-2's characters."""
    return "".join(CHAR_OF[b] for b in text.encode("utf-8"))


# ---- patterns ------------------------------------------------------------------------------------

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# Those searches take linear time, so they need no limit, which would halve the speed.
KNOWN_PATTERNS = {GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN}

LONGEST_PATTERN = 20_000  # characters; the longest published one has some hundred
SECONDS = 0.5  # for a search, and one more for each 100,000 characters


def has_nested_class(source: str) -> bool:
    """Whether a class of characters stands inside another, as in "[^a[bc]]"."""
    depth = 0
    for match in regex.finditer(r"\\.|\[:\w+:\]|\[|\]", source, regex.DOTALL):
        if match[0] == "[":
            depth += 1
        elif match[0] == "]":
            depth = max(0, depth - 1)
        if depth > 1:
            return True
    return False


# What \w stands for in Oniguruma, in a class of characters and outside of one.
IN_CLASS = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}"
WORD_CHARS = IN_CLASS + r"\u00b2\u00b3\u00b9\u00bc-\u00be"


def with_its_words(source: str) -> str:
    r"""A pattern for Oniguruma with its meaning of \w written out; in a class \W stays as it is."""
    parts = []
    done = 0
    depth = 0
    for match in regex.finditer(r"\\.|\[:\w+:\]|\[|\]", source, regex.DOTALL):
        replaced = match[0]
        if match[0] == "[":
            depth += 1
        elif match[0] == "]":
            depth = max(0, depth - 1)
        elif match[0] == r"\w":
            replaced = IN_CLASS if depth else f"[{WORD_CHARS}]"
        elif match[0] == r"\W" and not depth:
            replaced = f"[^{WORD_CHARS}]"
        parts += [source[done : match.start()], replaced]
        done = match.end()
    return "".join([*parts, source[done:]])


class Pattern:
    """A pattern of a tokenizer.json, searched for with a time limit."""

    def __init__(self, source: str):
        """Raises ValueError for a pattern that cannot be read, or that means something else here.

        The files are written for the library Oniguruma. There ^ and $ match at every line, and a
        class of characters may hold others.
        """
        if not isinstance(source, str) or not 0 < len(source) <= LONGEST_PATTERN:
            raise ValueError(f"pattern {str(source)[:80]!r} is no text of reasonable length")
        flags = regex.MULTILINE
        foreign = ("&&", "\\h")
        if has_nested_class(source):
            flags |= regex.VERSION1
            foreign += ("--", "||", "~~", "(?i")
        found = [part for part in foreign if part in source]
        if found:
            raise ValueError(f"pattern {source[:80]!r} has {found[0]}, which is not supported")
        self.source = source
        try:
            self.compiled = regex.compile(source, flags)
            self.in_group = regex.compile(f"({source})", flags)
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise ValueError(f"pattern {source[:80]!r} cannot be read: {error}") from error

    def search(self, find: Callable[..., Iterable], text: str) -> list:
        """find(text), a search by the compiled pattern, as a list.

        Raises ValueError if it exceeds the time limit.
        """
        if self.source in KNOWN_PATTERNS:
            return list(find(text))
        limit = SECONDS + len(text) / 100_000
        try:
            return list(find(text, timeout=limit))
        except TimeoutError as error:
            raise ValueError(
                f"pattern {self.source[:80]!r} takes over {limit:.1f} s on {len(text)} characters; "
                "do not use this tokenizer.json, or replace the pattern"
            ) from error

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each match, from left to right."""
        return [match.span() for match in self.search(self.compiled.finditer, text)]

    def isolate(self, text: str) -> list[str]:
        """The matches and the text between them, in order, without empty ones."""
        if self.in_group.groups > 1:  # groups of the pattern would be returned too
            parts = []
            done = 0
            for start, end in self.spans(text):
                parts += [text[done:start], text[start:end]]
                done = end
            parts.append(text[done:])
        else:
            parts = self.search(self.in_group.split, text)  # the same, faster
        return [part for part in parts if part]


def read_pattern(pattern: dict) -> Pattern:
    """The pattern of a step: {"String": a text} or {"Regex": a pattern}."""
    match pattern:
        case {"String": str(text)}:
            return Pattern(regex.escape(text))
        case {"Regex": str(source)}:
            return Pattern(with_its_words(source))
    raise ValueError(f"pattern {str(pattern)[:80]} is neither a String nor a Regex")


# ---- added tokens --------------------------------------------------------------------------------


class AddedToken(NamedTuple):
    """A token that is found in the text before anything else happens to it."""

    content: str
    id: int
    special: bool = True  # found only if the caller asks for special tokens
    normalized: bool = False  # looked for in the normalised text
    single_word: bool = False  # only where no letter or digit touches it
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # takes the white space after it


WORD = regex.compile(r"\w")
WHITE = regex.compile(r"\s")
WHITES = regex.compile(r"\s*")


class AddedTokens:
    """Cuts added tokens out of a text: the leftmost one, and of those the longest."""

    def __init__(self, tokens: Iterable[AddedToken], normalize: Normalizer | None = None):
        """normalize: applied to the tokens' contents, for those that are looked for after it."""
        self.tokens = {}
        for token in tokens:
            content = normalize(token.content) if normalize else token.content
            if content:
                self.tokens[content] = token
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.pattern = regex.compile("|".join(map(regex.escape, longest_first)))
        self.always = any(not token.special for token in self.tokens.values())

    def cut(self, text: str, specials: bool) -> Iterator[tuple[str, int | None, int]]:
        """Yield (piece of text, None, its place) and ("", id of a token, its place) in order.

        specials: whether special tokens count; otherwise they are text.
        """
        if not self.tokens or not (specials or self.always):
            if text:
                yield text, None, 0
            return
        done = 0
        for match in self.pattern.finditer(text):
            token = self.tokens[match[0]]
            start, end = match.span()
            if token.special and not specials:
                continue
            if token.single_word:
                touched = start > 0 and WORD.match(text, start - 1)
                if touched or WORD.match(text, end):
                    continue
            if token.lstrip:
                while start > done and WHITE.match(text, start - 1):
                    start -= 1
            if token.rstrip:
                end = WHITES.match(text, end).end()
            if done < start:
                yield text[done:start], None, done
            yield "", token.id, start
            done = end
        if done < len(text):
            yield text[done:], None, done


# ---- normalizers ---------------------------------------------------------------------------------


def lower(text: str) -> str:
    """Lower case, letter by letter: str.lower gives the sigma at the end of a word another form."""
    return text.replace("Σ", "σ").lower()


def replacer(pattern: dict, content: str) -> Normalizer:
    """A function that replaces what a pattern matches."""
    match pattern:
        case {"String": str(old)} if old:
            return lambda text: text.replace(old, content)
    searched = read_pattern(pattern)

    def replace(text: str) -> str:
        parts = []
        done = 0
        for start, end in searched.spans(text):
            parts += [text[done:start], content]
            done = end
        return "".join([*parts, text[done:]])

    return replace


def stripper(left: bool, right: bool) -> Normalizer:
    """A function that removes white space from the ends."""

    def strip(text: str) -> str:
        start, end = 0, len(text)
        if left:
            start = WHITES.match(text).end()
        if right:
            while end > start and WHITE.match(text, end - 1):
                end -= 1
        return text[start:end]

    return strip


MARKS = regex.compile(r"\p{M}")  # they combine with the letter before them
ACCENTS = regex.compile(r"\p{Mn}")  # those that take no space of their own; BERT strips these alone


# Blocks of Chinese characters, as BERT's code has them.
CHINESE = regex.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)
NO_TEXT = regex.compile(r"[\0\ufffd]|[^\t\n\r\P{C}]")  # controls, and what is not assigned


def bert_normalizers(step: dict) -> list[Normalizer]:
    """BERT's steps: drop controls, part Chinese characters, strip accents, write in lower case."""
    lowercase = step.get("lowercase", True)
    strip = step.get("strip_accents")
    found: list[Normalizer] = []
    if step.get("clean_text", True):
        found.append(lambda text: WHITE.sub(" ", NO_TEXT.sub("", text)))
    if step.get("handle_chinese_chars", True):
        found.append(lambda text: CHINESE.sub(r" \g<0> ", text))
    if strip or (strip is None and lowercase):
        found.append(lambda text: ACCENTS.sub("", unicodedata.normalize("NFD", text)))
    if lowercase:
        found.append(lower)
    return found


CLUSTER = regex.compile(r"\X")  # what a reader sees as one character


class CharacterMap:
    """SentencePiece's table of replacements, such as those of NFKC (a precompiled_charsmap).

    It is a double-array trie (Aoe 1989) over UTF-8, four bytes a unit, and the replacements, each
    of which ends in a zero byte. The trie leads from the bytes of a text to a place among them.
    """

    def __init__(self, packed: str):
        """packed: the table in base64. Raises ValueError if it is malformed."""
        content = base64.b64decode(packed, validate=True)
        size = int.from_bytes(content[:4], "little")
        if size % 4 or not 4 <= size <= len(content) - 4:
            raise ValueError("a precompiled_charsmap is cut short")
        self.units = struct.unpack_from(f"<{size // 4}I", content, 4)
        self.replacements = content[4 + size :]
        self.found: dict[str, str | None] = {}

    def unit(self, place: int) -> int:
        if place >= len(self.units):
            raise ValueError("a precompiled_charsmap leads out of its table")
        return self.units[place]

    def look_up(self, text: str) -> str | None:
        """The replacement of the shortest start of a text that has one."""
        place = 0
        unit = self.unit(place)
        for b in text.encode("utf-8"):
            place ^= (unit >> 10) << ((unit & 1 << 9) >> 6)  # to the children of this node
            place ^= b
            unit = self.unit(place)
            if b == 0 or unit & (1 << 31 | 0xFF) != b:  # the label of the child
                return None
            if unit >> 8 & 1:  # a replacement ends here
                leaf = place ^ (unit >> 10) << ((unit & 1 << 9) >> 6)
                start = self.unit(leaf) & (1 << 31) - 1
                return self.replacements[start:].split(b"\0", 1)[0].decode("utf-8")
        return None

    def replace(self, text: str) -> str:
        """A short cluster is replaced as a whole, or else each of its characters."""
        parts = []
        for cluster in CLUSTER.findall(text):
            whole = self.cached(cluster) if len(cluster.encode("utf-8")) < 6 else None
            if whole is not None:
                parts.append(whole)
                continue
            for char in cluster:
                single = self.cached(char)
                parts.append(char if single is None else single)
        return "".join(parts)

    def cached(self, text: str) -> str | None:
        """`look_up`, once for each text."""
        if text not in self.found:
            if len(self.found) >= 1 << 16:
                self.found.clear()
            self.found[text] = self.look_up(text)
        return self.found[text]


def read_normalizers(step: dict | None) -> list[Normalizer]:
    """The functions of a normalizer, in order. Raises ValueError for one that is not supported."""
    match step:
        case None:
            return []
        case {"type": "Sequence", "normalizers": [*steps]}:
            return [function for inner in steps for function in read_normalizers(inner)]
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
            return [lambda text: unicodedata.normalize(form, text)]
        case {"type": "Lowercase"}:
            return [lower]
        case {"type": "Replace", "pattern": pattern, "content": str(content)}:
            return [replacer(pattern, content)]
        case {"type": "Prepend", "prepend": str(prefix)}:
            return [lambda text: prefix + text if text else text]
        case {"type": "Strip", "strip_left": bool(left), "strip_right": bool(right)}:
            return [stripper(left, right)]
        case {"type": "StripAccents"}:
            return [lambda text: MARKS.sub("", text)]
        case {"type": "BertNormalizer"}:
            return bert_normalizers(step)
        case {"type": "Precompiled", "precompiled_charsmap": str(packed)}:
            return [CharacterMap(packed).replace]
    kind = step.get("type") if isinstance(step, dict) else step
    raise ValueError(
        f"normalizer {kind} is not supported; those that are: Sequence, NFC, NFD, NFKC, NFKD, "
        "Lowercase, Replace, Prepend, Strip, StripAccents, BertNormalizer, Precompiled"
    )


# ---- pre-tokenizers ------------------------------------------------------------------------------

PUNCTUATION = r"[!-/:-@\[-`{-~]|\p{P}"


def join_chunks(parts: list[tuple[str, bool]], behavior: str) -> list[str]:
    """Chunks of the parts of a text, (part, whether it is a match), as a Split joins them.

    For all behaviors but Isolated, in which every part is a chunk.
    """
    if behavior == "Removed":
        return [part for part, is_match in parts if not is_match]
    chunks: list[str] = []
    if behavior == "MergedWithNext":
        before = False
        for part, is_match in reversed(parts):
            if is_match and not before and chunks:
                chunks[-1] = part + chunks[-1]
            else:
                chunks.append(part)
            before = is_match
        return chunks[::-1]
    before = False
    for part, is_match in parts:
        if behavior == "Contiguous":
            joined = is_match == before
        else:
            joined = is_match and not before
        if joined and chunks:
            chunks[-1] += part
        else:
            chunks.append(part)
        before = is_match
    return chunks


BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


def splitter(pattern: Pattern, behavior: str, invert: bool = False) -> Splitter:
    """A function that splits a text at the matches of a pattern.

    invert: the text between the matches counts as the matches. Raises ValueError for an unknown
    behavior.
    """
    if behavior not in BEHAVIORS:
        raise ValueError(f"behavior {behavior!r} of a Split is none of {', '.join(BEHAVIORS)}")
    if behavior == "Isolated":
        return lambda text, first: pattern.isolate(text)

    def split(text: str, first: bool) -> list[str]:
        parts = []
        done = 0
        for start, end in pattern.spans(text):
            if done < start:
                parts.append((text[done:start], invert))
            parts.append((text[start:end], not invert))
            done = end
        if done < len(text):
            parts.append((text[done:], invert))
        chunks = [chunk for chunk in join_chunks(parts, behavior) if chunk]
        if behavior == "Removed" and parts and parts[0][1]:
            chunks.insert(0, "")  # for the start of the text
        return chunks

    return split


def byte_level(prefix_space: bool, use_regex: bool) -> Splitter:
    """GPT-2's step: split by its pattern. The chunks are still text; see `written`."""
    by_pattern = splitter(Pattern(GPT2_PATTERN), "Isolated")

    def split(text: str, first: bool) -> list[str]:
        if prefix_space and not text.startswith(" "):
            text = " " + text
        return by_pattern(text, first) if use_regex else [text]

    return split


def metaspace(replacement: str, scheme: str, cut: bool) -> Splitter:
    """SentencePiece's step: write spaces as U+2581, put one in front, and split before each.

    scheme: put one in front "always", "never", or only at the start of the whole text, "first".
    """
    if scheme not in ("always", "never", "first"):
        raise ValueError(f"prepend_scheme is {scheme!r}; supported: always, never, first")
    before_each = splitter(Pattern(regex.escape(replacement)), "MergedWithNext")

    def split(text: str, first: bool) -> list[str]:
        text = text.replace(" ", replacement)
        wanted = scheme == "always" or (scheme == "first" and first)
        if wanted and not text.startswith(replacement):
            text = replacement + text
        return before_each(text, first) if cut else [text]

    return split


def write_bytes(text: str, first: bool) -> list[str]:
    """A step that only writes a chunk in GPT-2's characters."""
    return [written(text)]


def read_splitters(step: dict | None) -> list[Splitter]:
    """The functions of a pre-tokenizer, in order. Raises ValueError for one that is not supported.

    A ByteLevel becomes two: its split, and `write_bytes`.
    """
    match step:
        case None:
            return []
        case {"type": "Sequence", "pretokenizers": [*steps]}:
            return [function for inner in steps for function in read_splitters(inner)]
        case {"type": "ByteLevel"}:
            prefix_space = step.get("add_prefix_space", True)
            return [byte_level(prefix_space, step.get("use_regex", True)), write_bytes]
        case {"type": "Split", "pattern": pattern, "behavior": behavior}:
            return [splitter(read_pattern(pattern), behavior, step.get("invert", False))]
        case {"type": "Digits"}:
            behavior = "Isolated" if step.get("individual_digits") else "Contiguous"
            return [splitter(Pattern(r"\p{N}"), behavior)]
        case {"type": "Punctuation"}:
            return [splitter(Pattern(PUNCTUATION), step.get("behavior", "Isolated"))]
        case {"type": "WhitespaceSplit"}:
            return [splitter(Pattern(r"\s"), "Removed")]
        case {"type": "BertPreTokenizer"}:
            words = splitter(Pattern(r"\s"), "Removed")
            return [words, splitter(Pattern(PUNCTUATION), "Isolated")]
        case {"type": "Whitespace"}:
            return [splitter(Pattern(r"\w+|[^\w\s]+"), "Removed", invert=True)]
        case {"type": "Metaspace"}:
            older = "always" if step.get("add_prefix_space", True) else "never"
            scheme = step.get("prepend_scheme", older)
            replacement = step.get("replacement", SPACE)
            return [metaspace(replacement, scheme, step.get("split", True))]
    kind = step.get("type") if isinstance(step, dict) else step
    raise ValueError(
        f"pre-tokenizer {kind} is not supported; those that are: Sequence, ByteLevel, Split, "
        "Digits, Punctuation, Whitespace, WhitespaceSplit, Metaspace, BertPreTokenizer"
    )


def flatten(step: dict | None) -> Iterator[dict]:
    """The steps of a normalizer or pre-tokenizer; those of a Sequence one by one.

    Raises ValueError for one that has no type.
    """
    if step is None:
        return
    if not isinstance(step, dict) or "type" not in step:
        raise ValueError(f"a normalizer or pre-tokenizer has a step without a type: {step!s:.80}")
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step.get("normalizers") or step.get("pretokenizers") or []:
        yield from flatten(inner)


KEEP_THE_START = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")


def check_start(normalizer: dict | None, pre_tokenizer: dict | None) -> None:
    """Raise ValueError if it matters which chunk starts the text, and a normalizer may move it.

    The library follows the place of each character through the normalizers. That is left out here.
    """
    wanted = [s for s in flatten(pre_tokenizer) if s.get("prepend_scheme") == "first"]
    moved = [s["type"] for s in flatten(normalizer) if s["type"] not in KEEP_THE_START]
    if wanted and moved:
        raise ValueError(
            f"a Metaspace with prepend_scheme first cannot follow the normalizer {moved[0]} here"
        )


def split_all(splitters: Sequence[Splitter], text: str, first: bool) -> list[str]:
    """The chunks of a text after all steps.

    An empty chunk stands where the start of the text was removed: no other chunk starts it.
    """
    chunks = [text]
    for split in splitters:
        after = []
        for i, chunk in enumerate(chunks):
            after += split(chunk, first and i == 0) if chunk else [chunk]
        chunks = after
    return [chunk for chunk in chunks if chunk]
