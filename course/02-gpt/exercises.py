"""The exercises of lesson 2, from the inside of a layer to the loss of the whole model."""

from course.lessons import Exercise

TITLE = "Attention and the GPT"
NEEDS = (1,)
GPT = "tinyfm/gpt.py"

EXERCISES = (
    Exercise(
        "attention_mask",
        GPT,
        2,
        "Begin with the distance query - key as a matrix (T, S), then add one condition at a time. "
        "The padding turns the matrix into one per row of the batch.",
    ),
    Exercise(
        "Attention.attend",
        GPT,
        3,
        "Write the formula of the docstring, then what it leaves out: the mask of None, the groups "
        "(repeat_interleave), dropout on the weights, a mask of numbers. Or let "
        "F.scaled_dot_product_attention do it.",
    ),
    Exercise(
        "rope_frequencies",
        GPT,
        1,
        "torch.arange(0, K, 2) / K gives the exponents. The last line hands over to "
        "slow_long_waves, if there is something to extend.",
    ),
    Exercise(
        "rotate",
        GPT,
        1,
        "chunk(2, dim=-1) gives the two halves; each pair (a, b) turns by its angle.",
    ),
    Exercise(
        "Attention.project",
        GPT,
        2,
        "rearrange from einops splits the channels into heads in one line. With learned positions "
        "there is nothing to rotate. Return all three in the dtype of v.",
    ),
    Exercise(
        "MLP.forward",
        GPT,
        1,
        "Four kinds, four returns. F.silu, F.gelu and F.relu are given.",
    ),
    Exercise(
        "Block.after_attention",
        GPT,
        2,
        "Put the heads side by side first: (B, N, T, K) -> (B, T, N K). Then two lines, each of "
        "the form x = x + update.",
    ),
    Exercise(
        "GPT.loss",
        GPT,
        3,
        "F.cross_entropy wants (B T, V) and (B T); it skips targets of -100. Sum first, and divide "
        "by the number of targets that count. ChunkedLoss only saves memory: leave it out.",
    ),
)
