"""The exercises of lesson 1: byte pair encoding, first as it is defined, then fast."""

from course.lessons import Exercise

TITLE = "Text to tokens"
NEEDS = (0,)
BPE = "tinyfm/bpe.py"
EXERCISES = (
    Exercise(
        "merge",
        BPE,
        1,
        "Walk through the list with an index that moves on by two after a match and by one "
        "otherwise.",
    ),
    Exercise(
        "decode",
        BPE,
        1,
        "Build a list that holds the bytes of token 0, 1, 2 and so on. Join the bytes of all ids "
        "before you decode: a character may be spread over several tokens.",
    ),
    Exercise(
        "learn_merges_slowly",
        BPE,
        2,
        "A Counter keeps its keys in the order in which they came, and max returns the first of "
        "equal keys. itertools.pairwise gives the neighbours.",
    ),
    Exercise(
        "apply_merges_slowly",
        BPE,
        2,
        "Work on a copy. The tuple (rank, place) is smallest for the lowest rank and, of equal "
        "ranks, for the leftmost place.",
    ),
    Exercise(
        "LinkedTokens.merge",
        BPE,
        3,
        "Iterate over self.places.pop(pair), and skip the places that are outdated. Remove the two "
        "old pairs outside before you change ids; add the two new ones once the links are set.",
    ),
    Exercise(
        "learn_merges",
        BPE,
        2,
        "Look at heap[0]. If its key is outdated, replace it by the current key and look again; "
        "stop when the best pair no longer occurs.",
    ),
    Exercise(
        "apply_merges",
        BPE,
        3,
        "Put a WALL behind the last id, so that every place has a right neighbour. As a key, "
        "rank * n + place sorts like (rank, place), and divmod takes it apart again.",
    ),
)
