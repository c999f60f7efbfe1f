"""For teachers: typical wrong answers, bugs to plant, and questions of lesson 12."""

from course.lessons import Fault, Wrong

WRONG = {
    "split_of": (
        Wrong("u < held_out / 2", "u < held_out", "nothing is left for test"),
        Wrong("/ 2**64", "/ 2**63", "u must be below 1; only half as much is held out"),
        Wrong('digest[:8], "big"', 'digest[:8], "little"', "the splits of others are other ones"),
        Wrong(
            'hashlib.sha256(name.encode("utf-8")).digest()',
            'hash(name).to_bytes(8, "big", signed=True)',
            "Python's hash of a text differs from process to process",
        ),
    ),
    "bits_per_byte": (
        Wrong("-log_likelihood", "log_likelihood", "bits are not negative"),
        Wrong(" / math.log(2)", "", "these are nats"),
        Wrong("/ math.log(2)", "* math.log(2)", "a bit is fewer nats, so there are more bits"),
    ),
    "is_near": (
        Wrong(
            "np.maximum(image, other) - np.minimum(image, other)",
            "np.abs(image - other)",
            "uint8 wraps around: 8 - 10 is 254",
        ),
        Wrong("LEVELS * image.size", "LEVELS", "the mean is limited, not the sum"),
        Wrong("LEVELS * image.size", "NEAR * image.size", "NEAR is for pixels from -1 to 1"),
        Wrong("differences.sum()", "differences.max()", "the mean counts, not the worst pixel"),
        Wrong("image.size", "len(image)", "the first axis holds channels"),
    ),
    "windows": (
        Wrong("done = len(context)", "done = 0", "the context is given, not to be predicted"),
        Wrong("end - length - 1", "end - length", "one token of context is lost"),
        Wrong("whole[start : end - 1]", "whole[start:end]", "the model reads the last answer"),
        Wrong("tuple(whole[done:end])", "tuple(whole[start + 1 : end])", "tokens are scored twice"),
    ),
    "wilson": (
        Wrong("(1 + level) / 2", "level", "an interval leaves out both tails"),
        Wrong(
            "middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)",
            "middle = p",
            "the middle lies nearer to one half than the share does",
        ),
        Wrong("z**2 / (4 * n**2)", "z**2 / (4 * n)", "n is squared under the root"),
        Wrong("math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))", "math.sqrt(p * (1 - p) / n)",
              "the standard error is that at the ends, not that at p"),
    ),
    "minhash": (
        Wrong("places.min(axis=0)", "places.max(axis=0)", "this is the largest of each block"),
        Wrong("range(0, len(found), BLOCK)", "range(0, BLOCK, BLOCK)", "only one block is read"),
        Wrong(" * a + b", " + a + b", "a sum keeps the order of the shingles the same"),
        Wrong(", out=smallest", "", "the minima are computed and thrown away"),
    ),
    "Overlap.count": (
        Wrong("np.ones(RUN_WORDS)", "np.ones(1)", "a run covers 13 words, not only its first"),
        Wrong(" > 0", "", "a word in several runs is counted several times"),
        Wrong("len(covered)", "len(runs)", "a document has 12 words more than runs"),
        Wrong("if len(runs):", "if True:", "a document of fewer than 13 words has no run"),
    ),
    "clustered_wilson": (
        Wrong("weights=right - p", "weights=right", "deviations from the share, not sums"),
        Wrong("max(1.0, variance / (p * (1 - p) / n))", "variance / (p * (1 - p) / n)",
              "clusters that happen to be even do not add examples"),
        Wrong("p * n / deff, n / deff, level, student_t(level, count - 1)",
              "p * n / deff, n / deff, level", "few clusters give a poor variance: t, not z"),
        Wrong("count / (count - 1) *", "", "k deviations from their own mean leave k - 1"),
        Wrong("p * n / deff, n / deff", "p * n, n", "fewer independent examples than examples"),
    ),
}  # fmt: skip

FAULTS = (
    Fault(
        "tinyfm/evaluate/likelihood.py",
        "score_ids",
        "model.eval()",
        "model.train()",
        "A model with dropout is asked for the log-likelihood of the same text twice, and gives "
        "two answers. Both are worse than its validation loss promised.",
        "Scoring leaves the model in training mode, so dropout is on. Always call eval() first.",
    ),
    Fault(
        "data/dedupe.py",
        "Seen.look_up_at",
        "if seen.any():",
        "if seen.all():",
        "Exact copies are found as before. But a document of 400 words in which one word was "
        "changed counts as new.",
        "One band that agrees is enough for a near duplicate: any, not all. The key of the exact "
        "text, which differs, is among the keys, so all never holds for a near one.",
    ),
    Fault(
        "tinyfm/evaluate/metrics.py",
        "calibration_error",
        "np.abs(gap).sum()",
        "abs(gap.sum())",
        "A classifier that is right in all cases where it says 60%, and in 60% of the cases where "
        "it says 100%, is reported with a calibration error of 0.",
        "The gap is taken without its sign in each bin, before the sum. Otherwise too much "
        "confidence in one bin cancels too little in another.",
    ),
    Fault(
        "data/splits.py",
        "overlapping",
        "np.argsort(-shares",
        "np.argsort(shares",
        "After the removal of overlaps half of the held-out documents are gone, and those that "
        "training has word for word are still there.",
        "The largest shares come first; without the minus the cleanest documents are removed.",
    ),
)

QUESTIONS = [
    (
        "A benchmark has 500 questions on 25 articles, 20 each. Model A answers 72%, model B 75%. "
        "What would you want to know before you call B better?",
        "How alike the answers within an article are: with a design effect of 5 there are only 100 "
        "independent questions, and the interval of each is about 9 points on both sides. Better "
        "still: both models' answers on the same questions, whose differences vary less.",
    ),
    (
        "Why does this repository split by a hash of a document's name, and not by a shuffle "
        "with a fixed seed?",
        "A document that is added or removed changes a shuffle of all others: test documents move "
        "into training. A hash decides about each document alone, on every machine.",
    ),
    (
        "A model is compared at three learning rates by its test loss, and the best is reported. "
        "What is wrong, and how large is the harm?",
        "The best of several noisy scores is too good on average: the choice uses up the test set. "
        "It grows with the number of candidates and with the standard error. Choose on validation.",
    ),
    (
        "Perplexity falls from 30 to 15 when the tokenizer is changed to one with half as many "
        "bytes in a token. Is the model better?",
        "One cannot say: smaller tokens are easier each. Bits per byte divide by the length of the "
        "text itself, which no tokenizer changes.",
    ),
    (
        "A judge network scores real drawings at 94% and a generator's at 96%. Is the generator "
        "better than reality?",
        "No: the judge makes mistakes on real drawings. Above its own score on real ones it "
        "measures how typical a drawing is. Report both numbers together.",
    ),
    (
        "With 14 bands of 8 numbers, how likely are two documents of Jaccard similarity 0.8 to be "
        "called near duplicates?",
        "A band agrees with probability 0.8^8 = 0.168, so at least one of 14 does with "
        "1 - (1 - 0.168)^14 = 0.92.",
    ),
]
