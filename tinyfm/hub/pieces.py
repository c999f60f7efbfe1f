"""WordPiece and Unigram: two ways, other than merges, to cut a chunk of text into tokens.

    WordPiece  BERT's (Schuster and Nakajima 2012; Devlin et al. 2018). From left to right, take the
               longest token that fits. A token inside a word is written with a prefix:
               "unaffable" -> un ##aff ##able. A word that cannot be cut is unknown as a whole.
    Unigram    ALBERT's, T5's and XLM-R's (Kudo 2018). Each token has a score, its log p. Of all
               ways to cut the text, take the most probable:  argmax sum_i log p(s_i).

Both follow the library `tokenizers`, also in what happens to a character without a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

UNKNOWN_PENALTY = 10.0  # an unknown character scores this much less than the worst token


def in_bytes(text: str, ids: dict[str, int]) -> list[int]:
    """The ids of <0x00> ... <0xFF> that spell a text; none if one of them has no id."""
    spelled = [ids.get(f"<0x{b:02X}>") for b in text.encode("utf-8")]
    return [] if None in spelled else spelled


class WordPiece(NamedTuple):
    """The model of a tokenizer.json of the type WordPiece."""

    ids: dict[str, int]
    unknown: int  # the id of a word that cannot be cut
    prefix: str  # of tokens inside a word
    longest: int  # characters; a longer word is unknown
    longest_token: int

    def encode(self, word: str) -> list[int]:
        """The ids of a word: the longest token that fits, again and again."""
        if len(word) > self.longest:
            return [self.unknown]
        found = []
        start = 0
        while start < len(word):
            prefix = self.prefix if start else ""
            end = min(len(word), start + self.longest_token)
            while end > start and prefix + word[start:end] not in self.ids:
                end -= 1
            if end == start:
                return [self.unknown]
            found.append(self.ids[prefix + word[start:end]])
            start = end
        return found


class Unigram(NamedTuple):
    """The model of a tokenizer.json of the type Unigram."""

    ids: dict[str, int]
    scores: dict[str, float]  # token -> log p
    unknown: int | None  # the id of a row of characters without a token
    unknown_score: float
    byte_fallback: bool  # such characters are spelled in bytes, <0x00> ... <0xFF>
    longest: dict[str, int]  # first character -> length of the longest token that it starts

    def cut(self, text: str) -> list[str]:
        """The most probable way to cut a text (Viterbi's algorithm).

        best[end] is the highest score of the text up to `end`, and starts[end] is where the last
        token of that way starts. Rows of characters without a token are joined.
        """
        best = [0.0] + [float("-inf")] * len(text)
        starts = [0] * (len(text) + 1)
        for start in range(len(text)):
            known = False
            last = min(len(text), start + self.longest.get(text[start], 0))
            for end in range(start + 1, last + 1):
                score = self.scores.get(text[start:end])
                if score is None:
                    continue
                known = known or end == start + 1
                if best[start] + score > best[end]:
                    best[end] = best[start] + score
                    starts[end] = start
            if not known and best[start] + self.unknown_score > best[start + 1]:
                best[start + 1] = best[start] + self.unknown_score
                starts[start + 1] = start
        return [*self.joined(text, starts)][::-1]

    def joined(self, text: str, starts: list[int]) -> Iterator[str]:
        """Yield the tokens of the best way from the last to the first."""
        end = len(text)
        unknown_end = 0  # of a row of unknown characters
        while end > 0:
            start = starts[end]
            if self.ids.get(text[start:end], self.unknown) != self.unknown:
                if unknown_end:
                    yield text[end:unknown_end]
                    unknown_end = 0
                yield text[start:end]
            else:
                unknown_end = unknown_end or end
            end = start
        if unknown_end:
            yield text[:unknown_end]

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises ValueError for an unknown character if none stands for it."""
        found = []
        for token in self.cut(text):
            if token in self.ids:
                found.append(self.ids[token])
                continue
            spelled = in_bytes(token, self.ids) if self.byte_fallback else []
            if spelled:
                found += spelled
            elif self.unknown is not None:
                found.append(self.unknown)
            else:
                raise ValueError(f"{token[:40]!r} has no token, and the model has no unk_id")
        return found
