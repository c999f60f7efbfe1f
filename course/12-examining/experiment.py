"""By how much does an examination flatter, if its questions leak, and how often is its interval
wrong?

A classifier reads a passage of code and names the package of Python's library that it is from. It
is naive Bayes: a language model of single words for each package. The experiment splits the same
passages twice, passage by passage and file by file. Then it examines the classifier on few files
drawn at random, again and again, to see how often an interval of 95% contains the truth. At last it
chooses the best of many classifiers by their scores on such a sample.
"""

import zlib

import numpy as np

from data.dedupe import WORD
from data.packages import LENGTH, find_packages
from data.report import Report
from data.splits import TRAIN, split_of
from data.stdlib import library_folder
from tinyfm.evaluate.metrics import clustered_wilson, wilson

VARIANTS = ("20 passages", "5 passages", "10 passages", "40 passages")  # of a file, at most
UNITS = {
    "accuracy_by_passage": "%",
    "accuracy_by_file": "%",
    "leak": "% points",
    "coverage_independent": "%",
    "coverage_clustered": "%",
    "optimism_of_2": "% points",
    "optimism_of_50": "% points",
}
WORDS = 1 << 12  # words are hashed to so many features
SMOOTHING = 0.1  # added to each count, so that no word is impossible
FILES = 5  # a package needs as many
LEFT_OUT = ("encodings", "distutils")  # tables; and code that newer versions of Python lack
FOLDS = 5
SAMPLES = (5, 10, 20, 40, 80)  # files of an examination
EXAMINED = 20  # files of the examination whose coverage is in the table
CANDIDATES = (1, 2, 5, 10, 20, 50)
DRAWS = 1000


def cut(text: str) -> list[str]:
    """Passages of whole lines, about LENGTH characters each, that do not overlap."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if len(found[-1]) + len(line) > LENGTH:
            found.append("")
        found[-1] += line
    return [passage for passage in found if len(passage) >= LENGTH // 2]


def read_passages(most: int) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Counts of words (n, WORDS), packages (n,), and the file and the text of each passage."""
    counts = []
    labels = []
    files = []
    texts = []
    sources = find_packages(library_folder(), Report())
    packages = [
        name for name in sorted(sources) if len(sources[name]) >= FILES and name not in LEFT_OUT
    ]
    for label, package in enumerate(packages):
        for name, text in sorted(sources[package].items()):
            passages = cut(text)
            for i in range(0, len(passages), max(1, -(-len(passages) // most))):
                words = [zlib.crc32(w.encode()) % WORDS for w in WORD.findall(passages[i].lower())]
                counts.append(np.bincount(words, minlength=WORDS).astype(np.float32))
                labels.append(label)
                files.append(name)
                texts.append(passages[i])
    return np.array(counts), np.array(labels), files, texts


def fit(counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """ln p of each word in each package, (packages, WORDS), from passages to learn from."""
    is_label = np.eye(labels.max() + 1, dtype=np.float32)[labels]  # (n, packages)
    sums = is_label.T @ counts + SMOOTHING
    return np.log(sums / sums.sum(1, keepdims=True))


def guess(counts: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """The package that makes each passage most probable, (n,)."""
    return (counts @ log_p.T).argmax(1)


def accuracy(counts: np.ndarray, labels: np.ndarray, names: list[str]) -> float:
    """In per cent, on the passages whose name is held out."""
    test = np.array([split_of(name, 0.3) != TRAIN for name in names])
    log_p = fit(counts[~test], labels[~test])
    return 100 * float((guess(counts[test], log_p) == labels[test]).mean())


def examine_all(
    counts: np.ndarray, labels: np.ndarray, place: np.ndarray, kept: np.ndarray, seed: int
) -> np.ndarray:
    """Whether each passage is guessed right by classifiers that have not read its file: (k, n).

    place: the number of each passage's file. kept: the words that each classifier looks at, bool
    (k, WORDS).
    """
    fold = np.random.default_rng(seed).permutation(place.max() + 1) % FOLDS
    right = np.zeros((len(kept), len(labels)), dtype=bool)
    for i in range(FOLDS):
        test = fold[place] == i
        log_p = fit(counts[~test], labels[~test])
        own = counts[test]
        for k, words in enumerate(kept):
            right[k, test] = guess(own, log_p * words) == labels[test]
    return right


def measure(seed: int, variant: str) -> dict:
    counts, labels, files, texts = read_passages(int(variant.split()[0]))
    names, place = np.unique(files, return_inverse=True)
    print(
        f"{len(labels)} passages of {len(names)} files in {labels.max() + 1} packages", flush=True
    )
    by_passage = accuracy(counts, labels, [f"{seed} {text}" for text in texts])
    by_file = accuracy(counts, labels, [f"{seed} {name}" for name in files])
    print(f"by passage {by_passage:.1f}%, by file {by_file:.1f}%", flush=True)

    # All files are the population; an examination draws some of them.
    rng = np.random.default_rng(seed)
    every_word = np.ones((1, WORDS), dtype=bool)
    right = examine_all(counts, labels, place, every_word, seed)[0]
    truth = right.mean()
    rows = [np.flatnonzero(place == i) for i in range(len(names))]
    covered = {"independent": [], "clustered": []}
    for size in SAMPLES:
        hits = np.zeros(2)
        for _ in range(DRAWS):
            drawn = rng.integers(len(names), size=size)
            own = right[np.concatenate([rows[i] for i in drawn])]
            cluster = np.repeat(np.arange(size), [len(rows[i]) for i in drawn])
            intervals = (wilson(float(own.sum()), len(own)), clustered_wilson(own, cluster))
            hits += [low <= truth <= high for low, high in intervals]
        for name, hit in zip(covered, hits):
            covered[name].append(100 * hit / DRAWS)
        print(f"{size} files: intervals of 95% contain the truth in {hits / DRAWS}", flush=True)

    # Candidates that each look at a random half of the words: none is better than another.
    kept = rng.random((max(CANDIDATES), WORDS)) < 0.5
    candidates = examine_all(counts, labels, place, kept, seed).astype(float)  # (k, n)
    sums = np.stack([candidates[:, own].sum(1) for own in rows], axis=1)  # (k, files)
    sizes = np.array([len(own) for own in rows])
    truths = candidates.mean(1)
    optimism = np.zeros(len(CANDIDATES))
    for _ in range(DRAWS):
        drawn = rng.integers(len(names), size=EXAMINED)
        scores = sums[:, drawn].sum(1) / sizes[drawn].sum()
        order = rng.permutation(len(scores))
        for i, k in enumerate(CANDIDATES):
            best = order[:k][scores[order[:k]].argmax()]
            optimism[i] += 100 * (scores[best] - truths[best]) / DRAWS
    print(f"optimism {optimism.round(2)}", flush=True)
    at = SAMPLES.index(EXAMINED)
    return {
        "accuracy_by_passage": by_passage,
        "accuracy_by_file": by_file,
        "leak": by_passage - by_file,
        "coverage_independent": covered["independent"][at],
        "coverage_clustered": covered["clustered"][at],
        "optimism_of_2": optimism[CANDIDATES.index(2)],
        "optimism_of_50": optimism[CANDIDATES.index(50)],
        "covered_independent": covered["independent"],
        "covered_clustered": covered["clustered"],
        "optimism": optimism.tolist(),
    }


def draw(figure, results) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 3, 3))
    for result in results:
        pair = (result["accuracy_by_passage"], result["accuracy_by_file"])
        left.plot((0, 1), pair, "o-", color="C0", lw=1)
    left.set(xlim=(-0.4, 1.4), ylim=(0, 100), ylabel="accuracy (%)", title="Leak")
    left.set_xticks((0, 1), ("split by\npassage", "split by\nfile"))
    for name, color in (("independent", "C1"), ("clustered", "C2")):
        for i, result in enumerate(results):
            label = f"as {name}" if i == 0 else None
            middle.plot(SAMPLES, result[f"covered_{name}"], "o-", color=color, lw=1, label=label)
    middle.axhline(95, color="black", lw=1, ls="--", label="as promised")
    middle.set(xscale="log", ylim=(0, 100), xlabel="files in the examination")
    middle.set(ylabel="intervals with the truth (%)", title="Intervals of 95%")
    middle.set_xticks(SAMPLES, [str(size) for size in SAMPLES])
    middle.minorticks_off()
    middle.legend(loc="lower right")
    for result in results:
        right.plot(CANDIDATES, result["optimism"], "o-", color="C3", lw=1)
    right.set(xscale="log", xlabel="candidates to choose from", title="The best of several")
    right.set(ylabel="score less truth (% points)")
    right.set_xticks(CANDIDATES, [str(k) for k in CANDIDATES])
    right.minorticks_off()
