"""The exercises of lesson 9: from texts to contexts, and four ways of editing an image."""

from course.lessons import Exercise

TITLE = "Text to image, and editing"
NEEDS = (6, 7, 8)
MODULE = "tinyfm/text2image.py"

EXERCISES = (
    Exercise(
        "last_steps",
        MODULE,
        1,
        "A path of n steps has n + 1 states. int() rounds down, and a slice from the end keeps the "
        "last state.",
    ),
    Exercise(
        "TextToImage.encode_text",
        MODULE,
        2,
        "A text is tokenized first, tokens are taken as they are. The end token is the last of "
        "each row. self.text_tower.states gives the contexts.",
    ),
    Exercise(
        "TextToImage.null_context",
        MODULE,
        1,
        "Three cases, in the order of the docstring.",
    ),
    Exercise(
        "with_correction",
        MODULE,
        2,
        "Return a function with the arguments of denoise. Only its x_0 is used; solve "
        "x = alpha x_0 + sigma eps for the eps that belongs to the corrected one.",
    ),
    Exercise(
        "match_means",
        MODULE,
        3,
        "F.avg_pool2d gives the means of the blocks. Decide for each block whether it must become "
        "lighter (goal 1) or darker (goal -1), and which share of the way its mean has to go; "
        "F.interpolate gives each pixel the numbers of its block.",
    ),
    Exercise(
        "TextToImage.keep_known",
        MODULE,
        2,
        "Two inner functions, each a torch.where. A maximum over blocks says whether any pixel of "
        "a latent's position is unknown.",
    ),
    Exercise(
        "TextToImage.enlarge",
        MODULE,
        2,
        "match_means does the work on images. An estimate has to be decoded first; then add the "
        "encoding of the matched image minus that of the unmatched one.",
    ),
)
