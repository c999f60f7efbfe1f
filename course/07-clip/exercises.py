from course.lessons import Exercise

TITLE = "CLIP and zero-shot classification"
NEEDS = (2,)
CLIP = "tinyfm/clip.py"
ZERO_SHOT = "tinyfm/evaluate/zero_shot.py"
EXERCISES = (
    Exercise(
        "sigmoid_loss",
        CLIP,
        1,
        "sigmoid(-z) is the probability of a negative. F.logsigmoid is exact where "
        "log(sigmoid(z)) overflows.",
    ),
    Exercise(
        "softmax_loss",
        CLIP,
        2,
        "-ln softmax of a column is the row's logsumexp minus the logit. An empty column has the "
        "logit -inf, and 0 times -inf is nan: mask instead of multiplying.",
    ),
    Exercise(
        "log_weights",
        CLIP,
        2,
        "Count the columns that are not empty. One of them is the positive.",
    ),
    Exercise(
        "class_logits",
        ZERO_SHOT,
        2,
        "Probabilities are added, so logits are combined by logsumexp over the templates.",
    ),
    Exercise(
        "nearest_neighbours",
        ZERO_SHOT,
        2,
        "topk gives the nearest first. Compare the k classes with each other to count votes; "
        "argmax returns the first of equal counts.",
    ),
    Exercise(
        "recall",
        ZERO_SHOT,
        3,
        "For each image: its best caption's similarity, and how many captions of OTHER images come "
        "within TIE of it or nearer. That number is the rank; it is below k if the image is found.",
    ),
)
