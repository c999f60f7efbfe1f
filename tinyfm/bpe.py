"""Byte pair encoding: learn merges, apply them, and the files that vocabularies are published in.

Start from the bytes of a text and repeat: make the most frequent pair of neighbours one new token,
everywhere (Gage 1994; Sennrich et al. 2016, algorithm 1; on bytes: Radford et al. 2019, GPT-2).

    a a a b d a a a b a c  ->  X a b d X a b a c  ->  Y b d Y b a c  ->  Z d Z a c
                   X = a a             Y = X a             Z = Y b

To encode, replay the merges in the order learned. A pattern splits the text into chunks of about a
word first, and no token crosses a chunk: "dog." and "dog!" shall share "dog".

Done literally, each merge costs a pass over the text. Both functions below instead keep the tokens
in a linked list and the candidates in a heap, so that a merge costs only its own occurrences.

The second half reads and writes tokenizer.json, the format of Hugging Face's libraries.
Left out: merges across chunks, dropout of merges. Marked ends of words: see clip_tokenizer.py.
"""

import heapq
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import regex
from sentencepiece import SentencePieceProcessor

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WALL = -1  # stands beside the first and the last token of a chunk; also marks a place merged away


# ---- the algorithm -------------------------------------------------------------------------------


def lay_out(words: dict[bytes, int]) -> tuple[list[int], list[int]]:
    """All chunks in one row, walls around each, and how often the chunk at each place occurs."""
    ids, weight = [WALL], [0]
    for word, count in words.items():
        ids += [*word, WALL]
        weight += [count] * (len(word) + 1)
    return ids, weight


def learn_merges(words: dict[bytes, int], n_merges: int) -> list[tuple[int, int]]:
    """Up to n_merges pairs of ids; pair number r becomes token 256 + r. Fewer if none is left.

    words: chunk -> how often it occurs, in order of first appearance; of equals, the pair that is
    first in the text wins. A pair's count only falls and its first place only moves on once its
    tokens exist, so an outdated key in the heap surfaces too early, never too late, and is renewed.
    """
    ids, weight = lay_out(words)
    left, right = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
    counts, places = defaultdict(int), defaultdict(deque)

    def add(i: int, j: int, sign: int) -> None:  # the pair at neighbours i, j comes or goes
        pair = ids[i], ids[j]
        if WALL not in pair:
            counts[pair] += sign * weight[i]
            if sign > 0:
                places[pair].append(i)  # ascending, because every pass goes from left to right

    def key(pair: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
        where = places[pair]
        while where and (ids[where[0]], ids[right[where[0]]]) != pair:
            where.popleft()  # merged into another token since
        return -counts[pair], where[0] if where else -1, pair

    for i in range(len(ids) - 1):
        add(i, i + 1, +1)
    heap, merges = sorted(map(key, counts)), []  # a sorted list is a heap
    while heap and len(merges) < n_merges:
        pair = heap[0][2]
        if heap[0] != key(pair):
            heapq.heapreplace(heap, key(pair))
            continue
        if counts[pair] == 0:
            break  # every chunk has become one token
        heapq.heappop(heap)
        new, fresh = 256 + len(merges), set()
        merges.append(pair)
        for i in places.pop(pair):
            j = right[i]
            if (ids[i], ids[j]) != pair:
                continue  # in a a a, the second pair went with the first
            before, after = left[i], right[j]
            add(before, i, -1), add(j, after, -1)
            ids[i], ids[j], right[i], left[after] = new, WALL, after, i
            add(before, i, +1), add(i, after, +1)
            fresh |= {(ids[before], new), (new, ids[after])}
        for pair in fresh & counts.keys():
            heapq.heappush(heap, key(pair))
    return merges


def apply_merges(ids: list[int], rules: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Merge as long as a rule, pair -> (rank, new id), applies: lowest rank first, then leftmost.

    O(n log n) for n ids.
    """
    n = len(ids)
    ids = [*ids, WALL]  # ids[n], and from the other side ids[-1]
    left, right = list(range(-1, n)), list(range(1, n + 2))
    # The number rank * n + place sorts as the two do, and faster than a tuple.
    heap = sorted(rules[pair][0] * n + i for i, pair in enumerate(pairwise(ids)) if pair in rules)
    while heap:
        rank, i = divmod(heapq.heappop(heap), n)
        j = right[i]
        rule = rules.get((ids[i], ids[j]))
        if rule is None or rule[0] != rank:
            continue  # one of the two was merged with another neighbour since
        before, after = left[i], right[j]
        ids[i], ids[j], right[i], left[after] = rule[1], WALL, after, i
        for place, pair in ((before, (ids[before], ids[i])), (i, (ids[i], ids[after]))):
            if pair in rules:
                heapq.heappush(heap, rules[pair][0] * n + place)
    return [token for token in ids if token != WALL]


class Memory(dict):
    """chunk -> ids, computed at the first look-up. Words recur; long chunks hardly do, and would
    fill the memory, so they are not kept."""

    def __init__(self, encode: Callable[[str], list[int]]):
        self.encode = encode

    def __missing__(self, chunk: str) -> list[int]:
        ids = self.encode(chunk)
        if len(chunk) < 64:
            if len(self) >= 1 << 16:
                self.clear()
            self[chunk] = ids
        return ids


# ---- tokenizer.json ------------------------------------------------------------------------------

# JSON holds text, tokens are bytes: GPT-2 writes each byte as a visible character, itself where it
# prints, else one from 256 on. A space is thus written as U+0120.
VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
HIDDEN = [b for b in range(256) if b not in VISIBLE]
CHAR_OF = [chr(b if b in VISIBLE else 256 + HIDDEN.index(b)) for b in range(256)]
BYTE_OF = {char: b for b, char in enumerate(CHAR_OF)}


class Vocabulary(NamedTuple):
    """What a tokenizer.json of byte-level BPE says."""

    ids: dict[bytes, int]  # ordinary tokens
    rules: dict[tuple[int, int], tuple[int, int]]  # pair of ids -> (rank, new id)
    specials: dict[str, int]  # found in the text before it is split; never made by merges
    patterns: list[regex.Pattern]  # each splits further what the last one left
    normalizer: str | None  # a Unicode normal form, such as Qwen's NFC
    ignore_merges: bool  # a chunk that is a token becomes that token, merges or not (Llama 3)


def to_bytes(token: str) -> bytes:
    if not BYTE_OF.keys() >= set(token):
        raise ValueError(f"token {token!r} is not written in GPT-2's characters for bytes")
    return bytes(BYTE_OF[char] for char in token)


def split_patterns(step: dict | None) -> list[str]:
    """The patterns in the pre_tokenizer of a tokenizer.json."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return [pattern for inner in steps for pattern in split_patterns(inner)]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [GPT2_PATTERN] if step.get("use_regex", True) else []
        case {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}:
            return [p]
    raise ValueError(f"pre-tokenizer {step} is not supported; byte-level BPE is the only kind read")


def read_spec(spec: dict) -> Vocabulary:
    """A parsed tokenizer.json. Raises ValueError where following it exactly is not possible here.

    Its post_processor, which puts specials around a text, is not followed.
    """
    model, added = spec["model"], spec.get("added_tokens") or []
    other = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
    if model.get("type", "BPE") != "BPE" or any(map(model.get, other)):
        raise ValueError(f"a {model.get('type')} model that is not byte-level BPE, the kind read")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"normalizer {normalizer} is not supported, only Unicode's normal forms")
    for token in added:
        if any(map(token.get, ("lstrip", "rstrip", "single_word"))):
            raise ValueError(f"special token {token} depends on its surroundings: not supported")
    patterns = [regex.compile(f"({p})") for p in split_patterns(spec.get("pre_tokenizer"))]
    if any(pattern.groups > 1 for pattern in patterns):
        raise ValueError(f"split patterns {patterns} have groups that capture: write (?: ) instead")
    specials = {token["content"]: token["id"] for token in added}
    ids = {to_bytes(token): i for token, i in model["vocab"].items() if token not in specials}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(to_bytes(a), to_bytes(b)) for a, b in pairs]
    missing = {bytes([b]) for b in range(256)} - ids.keys()
    strange = [pair for pair in merges if not {*pair, b"".join(pair)} <= ids.keys()]
    if missing or strange:
        raise ValueError(f"the vocabulary lacks {min(missing) if missing else strange[0]}")
    rules = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(merges)}
    whole_words = model.get("ignore_merges", False)
    return Vocabulary(ids, rules, specials, patterns, normalizer, whole_words)


def make_spec(model: dict, specials: dict[str, int], **steps: dict | None) -> dict:
    """The content of a tokenizer.json from its model and, by name, the steps before and after."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, "special": True} | flags for name, i in specials.items()]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **empty, "added_tokens": added, **steps, "model": model}


def bpe_spec(vocab: dict[str, int], merges: Sequence, specials: dict[str, int]) -> dict:
    """The tokenizer.json of byte-level BPE with GPT-2's pattern; tokens in its characters."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {"type": "BPE", "vocab": vocab | specials, "merges": merges}
    return make_spec(model, specials, pre_tokenizer=byte_level, decoder=byte_level)


def learned_spec(pairs: list[tuple[int, int]], eot: str) -> dict:
    """The tokenizer.json of the merges that learn_merges found; eot is the last id."""
    tokens = [*CHAR_OF]
    for a, b in pairs:
        tokens.append(tokens[a] + tokens[b])
    merges = [[tokens[a], tokens[b]] for a, b in pairs]
    return bpe_spec({token: i for i, token in enumerate(tokens)}, merges, {eot: len(tokens)})


def train(texts: Sequence[str], vocab_size: int, eot: str) -> dict:
    """The tokenizer.json of vocab_size ids learned from texts: bytes, merges, and eot last."""
    words = Counter(chain.from_iterable(map(regex.compile(GPT2_PATTERN).findall, texts)))
    n_merges = vocab_size - 257
    pairs = learn_merges({word.encode("utf-8"): n for word, n in words.items()}, n_merges)
    if len(pairs) < n_merges:
        most = 257 + len(pairs)
        raise ValueError(f"vocab_size {vocab_size} does not suit the text: use at most {most}")
    return learned_spec(pairs, eot)


def read_merges(text: str) -> list[str]:
    """The pairs of a merges.txt, "a b" each, without the line that tells its version."""
    return [line for line in text.split("\n") if line and not line.startswith("#version")]


def gpt2_spec(vocab_json: bytes, merges_txt: bytes, end_names: Sequence[str]) -> dict:
    """The tokenizer.json of a vocab.json and merges.txt, as GPT-2 was first published."""
    vocab, merges = json.loads(vocab_json), read_merges(merges_txt.decode("utf-8"))
    if any(merge.endswith("</w>") for merge in merges):
        raise ValueError("merges.txt marks ends of words with </w>; it is not byte-level BPE")
    return bpe_spec(vocab, merges, {name: vocab[name] for name in end_names if name in vocab})


def sentencepiece_spec(library: SentencePieceProcessor, specials: dict[str, int]) -> dict:
    """The tokenizer.json of a SentencePiece model that does not normalise; unknown is id 0.

    It gives the same ids, with two exceptions: a literal U+2581 in the text becomes a space, and of
    two equally probable unigram segmentations the other may be taken.
    """
    names = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    other = (library.is_byte, library.is_control, library.is_unknown)
    ordinary = [i for i in range(len(names)) if not any(test(i) for test in other)]
    scores = {names[i]: library.get_score(i) for i in ordinary}
    split = None
    if any(score % 1 for score in scores.values()):  # unigram, log p; of BPE, ranks
        vocab = [[name, library.get_score(i)] for i, name in enumerate(names)]
        # Pieces are found by their text there, so keep a "<0x41>" in the text from being the byte.
        pattern = {"Regex": r"<(?=(0x[0-9A-F]{2}|unk|\|endoftext\|)>)"}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}
    else:  # a piece is merged from any two others, by its rank
        ranked = sorted(scores, key=scores.get, reverse=True)
        splits = ((name[:cut], name[cut:]) for name in ranked for cut in range(1, len(name)))
        merges = [[a, b] for a, b in splits if a in scores and b in scores]
        model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}}
        model |= {"merges": merges, "unk_token": names[0], "byte_fallback": True}
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return make_spec(
        model,
        specials,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        pre_tokenizer=split,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def hugging_face_files(spec: dict, end: str | None) -> dict[str, bytes]:
    """Files by name for the libraries tokenizers and transformers; end is the end-of-text token."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    config["clean_up_tokenization_spaces"] = False  # else decoding would lose spaces
    files = {"tokenizer.json": spec, "tokenizer_config.json": config}
    return {n: json.dumps(f, ensure_ascii=False).encode("utf-8") for n, f in files.items()}


def write_files(folder: str | Path, files: dict[str, bytes]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)
