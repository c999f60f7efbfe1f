"""The exercises of lesson 4: one draw, then many draws at the cost of one position each."""

from course.lessons import Exercise

TITLE = "Sampling and the cache"
NEEDS = (1, 2)
GENERATE = "tinyfm/generate.py"
EXERCISES = (
    Exercise(
        "keep_min_p",
        GENERATE,
        1,
        "Compare each probability with a share of the largest one in its row. masked_fill writes "
        "-inf where a mask is True.",
    ),
    Exercise(
        "penalise_repeats",
        GENERATE,
        1,
        "Work on a copy, row by row. Index a row of logits with the tokens of the text, each of "
        "them once; torch.where chooses between a product and a quotient.",
    ),
    Exercise(
        "keep_nucleus",
        GENERATE,
        2,
        "Sort, and look at the sum of all probabilities in front of a token. sort also returns the "
        "index of each value, with which scatter brings a mask back into the order of the tokens.",
    ),
    Exercise(
        "choose",
        GENERATE,
        3,
        "Compute in float32 and subtract the largest logit first. A cumulative sum turns the draw "
        "into a search; rounding may leave its last value a little below or above 1.",
    ),
    Exercise(
        "visible_from",
        GENERATE,
        1,
        "How many whole steps must the start move so that the rest fits? A context of 1 needs a "
        "step of 1.",
    ),
    Exercise(
        "KVCache.update",
        GENERATE,
        3,
        "Allocate both tensors of a layer when it is called for the first time. A prompt may be "
        "longer than the slots: store only its latest positions, but return all of it. Later the "
        "position self.length goes into the slot of that number mod S.",
    ),
    Exercise(
        "KVCache.key_positions",
        GENERATE,
        2,
        "The new token has position self.length. Slot s holds the latest position p, at most that "
        "one, for which p mod S is s.",
    ),
)
