"""Byte pair encoding (BPE): learn merges from a text, then use them to encode any text.

Start from the bytes of a text and repeat: find the most frequent pair of neighbouring tokens, and
replace it everywhere by one new token (Gage 1994; Sennrich et al. 2016, algorithm 1; on bytes:
Radford et al. 2019, GPT-2).

    a a a b d a a a b a c  ->  X a b d X a b a c  ->  Y b d Y b a c  ->  Z d Z a c
                   X = a a             Y = X a             Z = Y b

Bytes are the tokens 0 ... 255. The merges are a list of pairs in the order in which they were
learned; the pair at rank r = 0, 1, ... becomes token 256 + r. To encode a text, replay the merges
in that order. To decode, write out the bytes that each token stands for.

A pattern first splits the text into chunks of about a word, and no token crosses the border of a
chunk. Otherwise "dog." and "dog!" would become two tokens that do not share "dog".

Learning and encoding are each written twice. The first version is the definition, in which every
merge costs a pass over the text. The second keeps the tokens in a linked list and the candidate
pairs in a heap, so that a merge costs only its own occurrences. Both give the same result.

Left out: merges across chunks, and BPE dropout. The formats in which merges are published are read
by hub/tokenizers.py, and tokenizer.py makes them a Tokenizer with special tokens.
"""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

import regex

Pair = tuple[int, int]  # two neighbouring tokens

# A contraction, or letters, digits or other characters with at most one space in front, or spaces.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHUNK = regex.compile(GPT2_PATTERN)


# ---- learn merges: the definition ----------------------------------------------------------------


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """The ids with every occurrence of the pair, from left to right, replaced by the token `new`.

    Occurrences do not overlap: a a a becomes X a. The given list is not changed.
    """
    merged = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def learn_merges_slowly(chunks: Mapping[bytes, int], n_merges: int) -> list[Pair]:
    """Count all pairs, merge the most frequent one everywhere, and repeat.

    chunks: each chunk with how often it occurs in the text; pairs inside a chunk count that often.
    Returns up to n_merges pairs, in the order learned; the one at rank r makes token 256 + r. Of
    equally frequent pairs, the one that comes first in the text wins. It ends early when every
    chunk is one token.
    """
    rows = [list(chunk) for chunk in chunks]
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for row, occurrences in zip(rows, chunks.values()):
            for pair in pairwise(row):
                counts[pair] += occurrences
        if not counts:
            break  # every chunk is one token
        best = max(counts, key=counts.get)  # the first of equals, as a dict keeps its order
        new = 256 + len(merges)
        rows = [merge(row, best, new) for row in rows]
        merges.append(best)
    return merges


# ---- learn merges: fast --------------------------------------------------------------------------

WALL = -1  # stands before and after each chunk, and at a place whose token was merged away


def lay_out(chunks: Mapping[bytes, int]) -> tuple[list[int], list[int]]:
    """Put all chunks in one row with walls between. Return the tokens and, for each place, how
    often its chunk occurs in the text."""
    ids = [WALL]
    occurrences = [0]
    for chunk, count in chunks.items():
        ids += [*chunk, WALL]
        occurrences += [count] * (len(chunk) + 1)
    return ids, occurrences


class LinkedTokens:
    """The tokens of all chunks in a linked list, with the count and the places of each pair.

    ids[i]              the token at place i, or WALL
    left[i], right[i]   the places of its two neighbours
    counts[pair]        how often the pair occurs in the text
    places[pair]        the places of its first token, ascending; some are outdated, as one of the
                        two tokens was merged with another neighbour since
    """

    def __init__(self, chunks: Mapping[bytes, int]):
        """chunks: each chunk with how often it occurs in the text."""
        self.ids, self.occurrences = lay_out(chunks)
        n = len(self.ids)
        self.left = list(range(-1, n - 1))
        self.right = list(range(1, n + 1))
        self.counts: dict[Pair, int] = defaultdict(int)
        self.places: dict[Pair, deque[int]] = defaultdict(deque)
        for i in range(n - 1):
            self.add(i, i + 1)

    def add(self, i: int, j: int) -> None:
        """Count the pair of the neighbouring places i and j."""
        pair = (self.ids[i], self.ids[j])
        if WALL not in pair:
            self.counts[pair] += self.occurrences[i]
            self.places[pair].append(i)  # ascending, as every pass goes from left to right

    def remove(self, i: int, j: int) -> None:
        """The pair of the neighbouring places i and j no longer occurs there."""
        pair = (self.ids[i], self.ids[j])
        if WALL not in pair:
            self.counts[pair] -= self.occurrences[i]

    def key(self, pair: Pair) -> tuple[int, int, Pair]:
        """(-count, first place, pair): the smallest key is that of the most frequent pair, and of
        equally frequent ones that of the first in the text. The place is -1 if there is none."""
        ids = self.ids
        where = self.places[pair]
        while where and (ids[where[0]], ids[self.right[where[0]]]) != pair:
            where.popleft()  # outdated
        first = where[0] if where else -1
        return -self.counts[pair], first, pair

    def merge(self, pair: Pair, new: int) -> set[Pair]:
        """Replace the pair everywhere, from left to right, by the token `new`.

        At each of its places i, with the neighbour j = right[i], the new token takes place i and a
        WALL place j, which leaves the list. The two pairs with the neighbours outside are removed,
        and those of the new token are added. Return the pairs that were added; some may hold WALL,
        and those have no count.
        """
        ids = self.ids
        left = self.left
        right = self.right
        added = set()
        for i in self.places.pop(pair):
            j = right[i]
            if (ids[i], ids[j]) != pair:
                continue  # outdated; in a a a, the second pair ends with the first
            before = left[i]
            after = right[j]
            self.remove(before, i)
            self.remove(j, after)
            ids[i] = new
            ids[j] = WALL
            right[i] = after
            left[after] = i
            self.add(before, i)
            self.add(i, after)
            added.add((ids[before], new))
            added.add((new, ids[after]))
        return added


def learn_merges(chunks: Mapping[bytes, int], n_merges: int) -> list[Pair]:
    """Learn up to n_merges merges; fewer if every chunk becomes one token before.

    chunks: each chunk with how often it occurs, in the order of first appearance. Of pairs that are
    equally frequent, the one that comes first in the text wins. The merge at rank r = 0, 1, ...
    makes token 256 + r.

    The heap sorts pairs by LinkedTokens.key. Once both tokens of a pair exist, its count can only
    fall and its first place can only move to the right. An outdated key therefore reaches the top
    of the heap too early, never too late: it is then replaced by the current one.
    """
    tokens = LinkedTokens(chunks)
    heap = sorted(map(tokens.key, tokens.counts))  # a sorted list is a heap
    merges = []
    while heap and len(merges) < n_merges:
        pair = heap[0][2]
        key = tokens.key(pair)
        if heap[0] != key:
            heapq.heapreplace(heap, key)
            continue
        if tokens.counts[pair] == 0:
            break  # every chunk is one token
        heapq.heappop(heap)
        added = tokens.merge(pair, 256 + len(merges))
        merges.append(pair)
        for candidate in added & tokens.counts.keys():
            heapq.heappush(heap, tokens.key(candidate))
    return merges


def train(texts: Iterable[str], vocab_size: int) -> list[Pair]:
    """Learn the merges of a vocabulary of vocab_size ids: bytes, merges, and one special token.

    Raises ValueError if the texts allow fewer merges, and names the largest possible vocab_size.
    """
    words = Counter(chain.from_iterable(map(CHUNK.findall, texts)))
    chunks = {word.encode("utf-8"): count for word, count in words.items()}
    n_merges = vocab_size - 256 - 1  # one id is left for the token that ends a text
    merges = learn_merges(chunks, n_merges)
    if len(merges) < n_merges:
        most = 256 + len(merges) + 1
        raise ValueError(f"vocab_size {vocab_size} does not suit the text: use at most {most}")
    return merges


# ---- apply merges --------------------------------------------------------------------------------

# Published vocabularies number their tokens in other ways, so that a rule names the new token.
Rules = Mapping[Pair, tuple[int, int]]  # pair -> (rank, new token)


def make_rules(merges: Sequence[Pair]) -> Rules:
    """The rules of learned merges."""
    return {pair: (rank, 256 + rank) for rank, pair in enumerate(merges)}


def apply_merges_slowly(ids: list[int], rules: Rules) -> list[int]:
    """Find the pair of the lowest rank, of equals the leftmost, merge it there, and repeat.

    rules: pair -> (rank, new token). The given list is not changed.
    """
    ids = list(ids)
    while True:
        ranked = [(rules[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in rules]
        if not ranked:
            return ids
        _, i = min(ranked)
        _, new = rules[ids[i], ids[i + 1]]
        ids[i : i + 2] = [new]


def apply_merges(ids: list[int], rules: Rules) -> list[int]:
    """The result of apply_merges_slowly in O(n log n) steps for n ids.

    The tokens stand in a linked list, as in LinkedTokens. A heap holds the places where a rule
    applies, by rank, then place. A place that is outdated when it reaches the top is skipped.
    """
    n = len(ids)
    ids = [*ids, WALL]  # ids[n] is the wall after the last token; ids[-1], before the first
    left = list(range(-1, n))
    right = list(range(1, n + 2))
    # A key rank * n + place sorts like the tuple (rank, place), and faster.
    heap = sorted(rules[pair][0] * n + i for i, pair in enumerate(pairwise(ids)) if pair in rules)
    while heap:
        rank, i = divmod(heapq.heappop(heap), n)
        j = right[i]
        rule = rules.get((ids[i], ids[j]))
        if rule is None or rule[0] != rank:
            continue  # outdated: one of the two tokens was merged with another neighbour
        before = left[i]
        after = right[j]
        ids[i] = rule[1]
        ids[j] = WALL
        right[i] = after
        left[after] = i
        for place, pair in ((before, (ids[before], ids[i])), (i, (ids[i], ids[after]))):
            if pair in rules:
                heapq.heappush(heap, rules[pair][0] * n + place)
    return [token for token in ids if token != WALL]


# ---- encode and decode ---------------------------------------------------------------------------


def encode(text: str, merges: Sequence[Pair]) -> list[int]:
    """The ids of a text under learned merges. BPETokenizer adds special tokens and a cache."""
    rules = make_rules(merges)
    ids = []
    for chunk in CHUNK.findall(text):
        ids += apply_merges(list(chunk.encode("utf-8")), rules)
    return ids


def decode(ids: Iterable[int], merges: Sequence[Pair]) -> str:
    """The text of the ids; bytes that are not UTF-8 become U+FFFD.

    Token 256 + r stands for the bytes of the two tokens of merges[r], one after the other.
    """
    token_bytes = [bytes([b]) for b in range(256)]
    for a, b in merges:
        token_bytes.append(token_bytes[a] + token_bytes[b])
    return b"".join(token_bytes[i] for i in ids).decode("utf-8", errors="replace")
