"""The three shapes: what the student writes for encoders, XLNet and encoder-decoders."""

from course.lessons import Exercise

TITLE = "The three shapes"
NEEDS = (2,)

XLNET = "tinyfm/xlnet.py"

EXERCISES = (
    Exercise(
        "query_mask",
        XLNET,
        1,
        "content_mask is almost it: but there are queries at some places only, and a query must "
        "not see its own token. gather takes the orders of the places.",
    ),
    Exercise(
        "hide",
        "tinyfm/batches/masked.py",
        2,
        "choose_words needs the number of the word of each place: words begin where "
        "vocabulary.starts_word says, so a cumulative sum counts them. One random number for each "
        "hidden token decides what it reads. Do not change the ids that you were given.",
    ),
    Exercise(
        "hide_spans",
        "tinyfm/batches/spans.py",
        2,
        "Go along the window with one place that says how far it is written. What is kept goes to "
        "the source, what is hidden to the target, and a sentinel to both.",
    ),
    Exercise(
        "Block.forward",
        "tinyfm/seq2seq.py",
        2,
        "self.update adds what a function of states makes of them, with the norm in its place. "
        "Attention is called with queries from x, and with keys and values from keys_values, "
        "extend or look_up.",
    ),
    Exercise(
        "Encoder.electra_loss",
        "tinyfm/encoder.py",
        3,
        "self.predictions gives flat places and logits; place // T is its row. The original text "
        "is the tokens, with the targets put back. detect gives logits, for "
        "binary_cross_entropy_with_logits.",
    ),
    Exercise(
        "shift",
        XLNET,
        3,
        "Write down by_key for T = 2 and R = 4 with numbered entries, and read the needed ones in "
        "the order in which they stand in memory. flatten and unflatten do the rest.",
    ),
)
