"""For teachers: wrong answers that the checks must find, bugs to plant, and exam questions."""

from course.lessons import Fault, Wrong

WRONG = {
    "sigmoid_loss": (
        Wrong("torch.where(positive, z, -z)", "torch.where(positive, -z, z)", "signs swapped"),
        Wrong(".sum()", ".mean()", "a mean over pairs instead of the sum"),
        Wrong(
            "F.logsigmoid(torch.where(positive, z, -z))",
            "torch.sigmoid(torch.where(positive, z, -z)).log()",
            "ln of a probability that was rounded to 0",
        ),
        Wrong("torch.where(positive, z, -z)", "z", "negatives are taken for positives"),
    ),
    "softmax_loss": (
        Wrong(" / positive.sum(1)", "", "several positives are added, not averaged"),
        Wrong("logsumexp(1)", "logsumexp(0)", "softmax over the rows instead of the columns"),
        Wrong("at_positives).sum()", "at_positives).mean()", "a mean over rows"),
        Wrong("z.masked_fill(~positive, 0)", "(z * positive)", "0 times -inf is nan"),
        Wrong("z.logsumexp(1)", "z.exp().sum(1).log()", "exp overflows"),
    ),
    "log_weights": (
        Wrong("(n_pairs - 1)", "n_pairs", "the positive is counted among the data's negatives"),
        Wrong("(known.sum() - 1)", "known.sum()", "the positive is counted among the columns"),
        Wrong("known.sum()", "len(ids)", "empty columns are counted"),
        Wrong(".clamp(min=1)", "", "columns count less than once"),
        Wrong("count.log()", "count", "no ln: added to logits, it must be the ln of a factor"),
    ),
    "class_logits": (
        Wrong(".logsumexp(0)", ".mean(0)", "the mean of logits, a product of probabilities"),
        Wrong(".logsumexp(0)", ".amax(0)", "the best template alone"),
        Wrong(".logsumexp(0)", ".exp().sum(0)", "probabilities instead of logits, and overflow"),
        Wrong("scale * x", "x", "the scale is forgotten"),
    ),
    "nearest_neighbours": (
        Wrong("topk(k)", "topk(k, largest=False)", "the farthest neighbours"),
        Wrong(
            "near.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)",
            "near[:, 0]",
            "no votes: the nearest alone",
        ),
        Wrong(
            "near.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)",
            "near.mode(1).values",
            "of equal counts the smallest class wins, not the nearest",
        ),
        Wrong("votes.argmax", "votes.argmin", "the rarest class wins"),
    ),
    "recall": (
        Wrong("z >= best[rows, None] - TIE", "z > best[rows, None] + TIE", "ties count as found"),
        Wrong("rank < k", "rank <= k", "off by one: recall at k + 1"),
        Wrong(") & wrong)", "))", "an image's own captions count as wrong"),
        Wrong('"amax"', '"amin"', "the worst caption of an image instead of the best"),
        Wrong("own - TIE).sum(1) - 1", "own - TIE).sum(1)", "an image is its own rival"),
    ),
}

FAULTS = (
    Fault(
        "tinyfm/clip.py",
        "TextTower.forward",
        "end = (tokens == end_id).int().argmax(1)",
        "end = torch.full_like(tokens[:, 0], tokens.size(1) - 1)",
        "The vector of a caption is another one if it stands in a batch with a longer caption.",
        "The state is read at the last position instead of the first end token. It has read the "
        "padding too, and how much of it there is depends on the longest caption.",
    ),
    Fault(
        "tinyfm/clip.py",
        "CLIP.encode_image",
        "dim=-1",
        "dim=0",
        "Zero-shot classification of one picture alone gives nonsense; in large batches it seems "
        "to work. Image vectors do not have length 1.",
        "The vectors are normalised along the batch instead of along their own entries.",
    ),
    Fault(
        "tinyfm/clip.py",
        "contrast",
        "positive = x_ids[:, None] == y_ids",
        "positive = torch.eye(len(x), len(y), dtype=torch.bool, device=x.device)",
        "On data in which many pictures share a caption, training pushes pictures of the same "
        "caption apart. On data in which each caption is unique, all is well.",
        "Only the pair itself counts as positive. An equal caption in the batch is taken for a "
        "negative, although it is just as right.",
    ),
    Fault(
        "tinyfm/evaluate/zero_shot.py",
        "embed_texts",
        "torch.from_numpy(np.argsort(order))",
        "torch.from_numpy(order)",
        "Training goes well, but zero-shot classification is near chance, except where all names "
        "have the same number of tokens.",
        "The captions are sorted by length to save padding. To undo a sorting takes the inverse "
        "permutation, argsort(order), not order again.",
    ),
)

QUESTIONS = [
    (
        "What is the InfoNCE loss of a model that embeds everything alike, with a batch of 64?",
        "All logits are equal, so each row is a guess among 64: ln 64 = 4.16 nats.",
    ),
    (
        "Why does CLIP learn the scale, and what would a scale of 1 do?",
        "Cosines lie in [-1, 1]. With scale 1 the softmax over n texts can hardly leave 1 / n: "
        "even a perfect row (1 against -1) of 64 has probability e / (e + 63 / e) = 0.10.",
    ),
    (
        "Two images in a batch have the same caption. What goes wrong if only the diagonal is "
        "positive?",
        "Each is pushed away from the other's caption, which is the same text: the loss asks for "
        "the impossible and cannot fall below ln 2 for these rows.",
    ),
    (
        "Why is the sum of probabilities over templates better here than the mean of the vectors?",
        "The templates name styles. A picture has one style; one template fits and carries nearly "
        "the whole sum. The mean of 12 styles' vectors is the vector of no style.",
    ),
    (
        "Can a CLIP batch be split into micro-batches whose gradients are added? Why, or why not?",
        "No. Each row's loss compares it with all rows of the batch, so a micro-batch has fewer "
        "negatives and another loss. One can embed in parts, but must form the logits at once.",
    ),
    (
        "A linear probe reaches 90%, zero-shot 70% on the same images. What may differ?",
        "The probe has seen labelled examples of each class and uses the features before the "
        "projection. Zero-shot knows only names, and depends on how they are worded.",
    ),
]
