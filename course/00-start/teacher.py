"""Typical wrong answers and questions of lesson 0."""

from course.lessons import Fault, Wrong

WRONG = {
    "size": (
        Wrong("n / 2**30:", "n / 1e9:", "a gibibyte is 2**30 bytes"),
        Wrong("if n < 2**30", "if n <= 2**30", "from 1 GiB on the unit is GiB"),
        Wrong(".3g", ".3f", "small sizes have three digits, not three decimals"),
    ),
}

FAULTS = (
    Fault(
        "tinyfm/common/units.py",
        "size",
        "n / 2**30:",
        "n / 2**20:",
        "python train.py gpt2-124m --dry-run predicts a memory of thousands of GiB. For small "
        "models the prediction looks right.",
        "Sizes from 1 GiB on are divided by 2**20, the number of bytes of a mebibyte.",
    ),
)

QUESTIONS = [
    (
        "What does a virtual environment protect, and from what?",
        "Each project has its own packages and versions. Installing for one project changes "
        "neither another project nor the system's Python.",
    ),
    (
        "A model with 4,096 tokens is untrained. What loss in nats per token do you expect, and "
        "what does it mean if the first loss is 20?",
        "About ln 4096 = 8.32, since it should give all tokens about the same probability. A loss "
        "of 20 means that it is confidently wrong: the initialisation is broken.",
    ),
    (
        "The loss in training falls and the validation loss rises. What happens?",
        "The model overfits: it learns what is particular to the training text.",
    ),
    (
        "Why does the run report bits per byte beside the loss?",
        "The loss per token depends on how long tokens are. Bits per byte do not, so they can be "
        "compared between tokenizers.",
    ),
    (
        "Why are near duplicates left out before the text is split?",
        "A copy of a training text in the validation text would be known by heart, and the score "
        "would measure memory.",
    ),
]
