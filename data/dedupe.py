"""Has this document been seen before, or almost? In memory of a fixed size.

Two documents are alike as their sets of shingles are, all runs of five words: by the Jaccard index

    J(A, B) = |A and B| / |A or B|

Under a random order of all shingles, the smallest of A and the smallest of B are the same one with
probability J (Broder 1997). MinHash keeps the smallest under each of 112 orders. They are cut into
b = 14 bands of r = 8, and documents that agree in a whole band are called near duplicates, which is
so with probability

    1 - (1 - J^r)^b        J 0.6: 21 %    0.7: 56 %    0.8: 92 %    0.9: 99.9 %

the setting of FineWeb (Penedo et al. 2024). The library datasketch computes the minima.

A table of all bands would grow with the corpus. A Bloom filter (Bloom 1970; for this purpose
LSHBloom, Khan et al. 2024) does not: k = 8 bits, chosen by the key, are set in an array of m bits,
and a key has been seen if all its bits are set. After n keys a new one looks seen with probability

    p = (1 - e^(-k n / m))^k

so that about 1 - (1 - p)^15 of the new documents are lost (14 bands, and one key of the exact
text). At 64 MiB that is 0.1 % after some 1.6 million kept documents; `Seen.lost` tells.
The keys of what is kept, 120 bytes a document, also go to a file: from there the array is made
again after a kill, bit for bit.

Left out: to compare the candidates themselves, and words of languages that put no space between
them, whose shingles are of clauses, so that only larger copies are found.
"""

import functools
import hashlib
import math
import re
import zlib

import numpy as np

from data.files import extra

SHINGLE_WORDS, BANDS, BAND_ROWS, BITS = 5, 14, 8, 8
KEYS = 1 + BANDS  # of a document: its exact text, then its bands
BLOCK = 1 << 12  # shingles at a time; a long document has a million
WORD = re.compile(r"\w+")


def shingles(text: str) -> np.ndarray:
    """A hash of each run of five words, lower case, without punctuation: uint32 (T,), T >= 1.

    A text of fewer words is one run, filled up with nothing.
    """
    words = map(zlib.crc32, map(str.encode, WORD.findall(text.lower())))
    hashes = np.fromiter(words, dtype=np.uint64)
    hashes = np.pad(hashes, (0, max(0, SHINGLE_WORDS - len(hashes))))
    count = len(hashes) - SHINGLE_WORDS + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for i in range(SHINGLE_WORDS):
        mixed = (mixed ^ hashes[i : i + count]) * np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(32)).astype(np.uint32)


@functools.cache
def sketch():
    """A MinHash without shingles; to make its orders anew for each document would be slow."""
    return extra("datasketch").MinHash(BANDS * BAND_ROWS, hashfunc=int, scheme="affine32")


def digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def keys_of(text: str, near: bool) -> np.ndarray:
    """The text's own key and, if asked, those of its bands: uint64 (KEYS,) or (1,)."""
    keys = [digest(b"text" + text.encode("utf-8"))]
    if near:
        minhash, found = sketch(), shingles(text)
        minhash.clear()
        for start in range(0, len(found), BLOCK):
            minhash.update_batch(found[start : start + BLOCK].tolist())
        bands = minhash.hashvalues.astype("<u4").reshape(BANDS, BAND_ROWS)
        keys += [digest(b"%d band" % i + band.tobytes()) for i, band in enumerate(bands)]
    return np.array(keys, dtype="<u8")


class Seen:
    """The keys of the documents so far, as a Bloom filter of `megabytes` MiB."""

    def __init__(self, megabytes: int):
        self.bits = np.uint64(megabytes << 23)
        self.table, self.count = np.zeros(megabytes << 20, dtype=np.uint8), 0

    def places(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Byte and bit in it of each of the keys' bits: two arrays (n, BITS).

        Two hashes make as many as one likes: h1 + i h2 (Kirsch and Mitzenmacher 2006).
        """
        step = ((keys * np.uint64(0x94D049BB133111EB)) >> np.uint64(20)) | np.uint64(1)
        place = (keys[:, None] + np.arange(BITS, dtype=np.uint64) * step[:, None]) % self.bits
        return place >> np.uint64(3), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)

    def add(self, keys: np.ndarray) -> None:
        place, bit = self.places(keys)
        np.bitwise_or.at(self.table, place, bit)
        self.count += len(keys)

    def find(self, keys: np.ndarray) -> str | None:
        """What a document with these keys is of one that was added; None if it is new."""
        place, bit = self.places(keys)
        seen = ((self.table[place] & bit) > 0).all(axis=1)
        if seen[0]:
            return "an exact duplicate"
        return "a near duplicate" if seen.any() else None

    def lost(self, keys: int) -> float:
        """The share of new documents, of `keys` keys each, that would be taken for duplicates."""
        false = (1 - math.exp(-BITS * self.count / int(self.bits))) ** BITS
        return 1 - (1 - false) ** keys
