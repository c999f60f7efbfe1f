"""Has this document, or almost the same one, been seen before? In memory of a fixed size.

The similarity of two documents is that of their sets of shingles. A shingle is a run of five words.
The similarity of two sets is their Jaccard index:

    J(A, B) = |A and B| / |A or B|

Take a random order of all shingles. The first shingle of A and the first shingle of B are the same
one with probability J (Broder 1997). MinHash stores, for each of 112 random orders, the smallest
hash of a shingle. These numbers are cut into b = 14 bands of r = 8. Documents that agree in all
numbers of at least one band are called near duplicates, which happens with probability

    1 - (1 - J^r)^b        J 0.6: 21 %    0.7: 56 %    0.8: 92 %    0.9: 99.9 %

This is the setting of FineWeb (Penedo et al. 2024). A random order of the 32-bit hashes h is that
of a h + b modulo 2^32, with a drawn odd number a and a drawn number b.

A table of all bands would grow with the corpus. A Bloom filter (Bloom 1970; LSHBloom, Khan et al.
2024, uses it for this purpose) does not. It is an array of m bits. To add a key, set k = 8 bits, at
places that the key decides. A key has been seen if all of its bits are set. After n keys, a new key
appears to have been seen with probability

    p = (1 - e^(-k n / m))^k

A document has 15 keys: its exact text, and 14 bands. So a share of about 1 - (1 - p)^15 of the new
documents is lost. With 64 MiB that is 0.1 % after some 1.6 million documents; `Seen.lost` computes
it. The keys of each document that is kept, 120 bytes, are also written to a file. After a kill, the
array is filled again from that file, and has the same bits as before.

Left out: a comparison of the documents that share a band. Also, languages that put no spaces
between words: there a "word" is a whole clause, so that only long copies are found.
"""

import functools
import hashlib
import math
import re
import zlib

import numpy as np

SHINGLE_WORDS = 5
BANDS = 14
BAND_ROWS = 8  # numbers of a band
BITS = 8  # bits that a key sets in the Bloom filter
KEYS = 1 + BANDS  # of a document: one for its exact text, then one for each band
BLOCK = 1 << 12  # shingles that are hashed at a time; a long document has a million
PART_CHARS = 1 << 20  # words of a long text that are in memory at a time
WORD = re.compile(r"\w+")
BORDER = re.compile(r"\W")


# ---- a document -> its keys ----------------------------------------------------------------------


def hash_words(text: str) -> np.ndarray:
    """A hash of each word, without case or punctuation: uint64 (n,)."""
    parts = [np.zeros(0, dtype=np.uint64)]
    start = 0
    while start < len(text):
        border = BORDER.search(text, start + PART_CHARS)  # not inside a word
        end = border.end() if border else len(text)
        words = WORD.findall(text[start:end].lower())
        parts.append(np.fromiter(map(zlib.crc32, map(str.encode, words)), dtype=np.uint64))
        start = end
    return np.concatenate(parts)


def hash_runs(words: np.ndarray, length: int) -> np.ndarray:
    """A hash of each run of `length` words; words (n,) -> uint64 (max(0, n - length + 1),).

    It is a polynomial in the multiplier of splitmix64, whose coefficients are the words.
    """
    count = max(0, len(words) - length + 1)
    mixed = np.zeros(count, dtype=np.uint64)
    for i in range(length):  # the next word of all runs at once
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed += words[i : i + count]
    return mixed * np.uint64(0x94D049BB133111EB)


def shingles(text: str) -> np.ndarray:
    """A hash of each run of five words: uint32 (T,), T >= 1.

    A text of fewer words is a single run, padded with zeros.
    """
    words = hash_words(text)
    if len(words) < SHINGLE_WORDS:
        words = np.append(words, np.zeros(SHINGLE_WORDS - len(words), dtype=np.uint64))
    return (hash_runs(words, SHINGLE_WORDS) >> np.uint64(32)).astype(np.uint32)


@functools.cache
def draw_orders() -> tuple[np.ndarray, np.ndarray]:
    """The numbers a and b of each random order: two arrays uint32 (BANDS * BAND_ROWS,)."""
    draw = np.random.default_rng(0)
    a = draw.integers(1 << 31, size=BANDS * BAND_ROWS, dtype=np.uint32) * np.uint32(2)
    b = draw.integers(1 << 32, size=BANDS * BAND_ROWS, dtype=np.uint32)
    return a + np.uint32(1), b


def minhash(text: str) -> np.ndarray:
    """The smallest place of a shingle in each random order: uint32 (BANDS * BAND_ROWS,).

    Order i puts the shingle h at the place a_i h + b_i modulo 2^32, with the numbers of
    `draw_orders`. The places of at most BLOCK shingles are in memory at a time.
    """
    a, b = draw_orders()
    found = shingles(text)
    smallest = np.full(len(a), 0xFFFFFFFF, dtype=np.uint32)
    for start in range(0, len(found), BLOCK):
        places = found[start : start + BLOCK, None] * a + b  # modulo 2^32
        np.minimum(smallest, places.min(axis=0), out=smallest)
    return smallest


def digest(content: bytes) -> int:
    """A hash in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def keys_of(text: str, near: bool) -> np.ndarray:
    """The key of the exact text and, if `near`, those of its bands: uint64 (1,) or (KEYS,)."""
    keys = [digest(b"text" + text.encode("utf-8"))]
    if near:
        bands = minhash(text).astype("<u4").reshape(BANDS, BAND_ROWS)
        keys += [digest(b"%d band" % i + band.tobytes()) for i, band in enumerate(bands)]
    return np.array(keys, dtype="<u8")


# ---- the keys so far -----------------------------------------------------------------------------


class Seen:
    """The keys of the documents so far, in a Bloom filter of `megabytes` MiB."""

    def __init__(self, megabytes: int):
        self.bits = np.uint64(megabytes << 23)  # the filter's size
        self.table = np.zeros(megabytes << 20, dtype=np.uint8)  # 8 bits in each byte
        self.count = 0  # keys added

    def places(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bits of keys (..., n): the byte and, as a mask, the bit in it; each (..., n, BITS).

        Two hashes h1 and h2 are enough for any number of places: h1 + i h2 (Kirsch and
        Mitzenmacher 2006). A key is a hash, so it serves as h1.
        """
        step = ((keys * np.uint64(0x94D049BB133111EB)) >> np.uint64(20)) | np.uint64(1)
        place = (keys[..., None] + np.arange(BITS, dtype=np.uint64) * step[..., None]) % self.bits
        byte = place >> np.uint64(3)
        bit = np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)
        return byte, bit

    def add_at(self, byte: np.ndarray, bit: np.ndarray) -> None:
        """Set the bits of keys: their places (n, BITS)."""
        np.bitwise_or.at(self.table, byte, bit)
        self.count += len(byte)

    def look_up_at(self, byte: np.ndarray, bit: np.ndarray) -> str | None:
        """As `look_up`, with the places (n, BITS) of the keys."""
        seen = ((self.table[byte] & bit) > 0).all(axis=1)
        if seen[0]:
            return "an exact duplicate"
        if seen.any():
            return "a near duplicate"
        return None

    def add(self, keys: np.ndarray) -> None:
        """Set the bits of keys (n,)."""
        self.add_at(*self.places(keys))

    def look_up(self, keys: np.ndarray) -> str | None:
        """The kind of duplicate that a document with these keys is; None if it is new."""
        return self.look_up_at(*self.places(keys))

    def add_new(self, documents: np.ndarray) -> list[str | None]:
        """Look up the keys of documents (n, KEYS), one after the other, and add those of new ones.

        Returns for each what `look_up` says. The places of all keys are computed at once, which
        takes half the time.
        """
        reasons = []
        for byte, bit in zip(*self.places(documents)):
            reason = self.look_up_at(byte, bit)
            if reason is None:
                self.add_at(byte, bit)
            reasons.append(reason)
        return reasons

    def lost(self, keys: int) -> float:
        """The share of new documents, with `keys` keys each, that look like duplicates by now."""
        false = (1 - math.exp(-BITS * self.count / int(self.bits))) ** BITS
        return 1 - (1 - false) ** keys


def add_new(seen: Seen, text: str) -> str | None:
    """Add a text if it is new; otherwise return the kind of duplicate that it is.

    Texts of a few words are compared as they are: "good" and "not good" are no duplicates.
    """
    keys = keys_of(text, near=len(WORD.findall(text)) >= SHINGLE_WORDS)
    reason = seen.look_up(keys)
    if reason is None:
        seen.add(keys)
    return reason
