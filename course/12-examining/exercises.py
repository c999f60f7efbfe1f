"""Examining honestly: what the student writes in data/ and tinyfm/evaluate/."""

from course.lessons import Exercise

TITLE = "Examining honestly"
NEEDS = (2,)

METRICS = "tinyfm/evaluate/metrics.py"
SPLITS = "data/splits.py"

EXERCISES = (
    Exercise(
        "split_of",
        SPLITS,
        1,
        "hashlib.sha256 takes bytes, and int.from_bytes makes a number of eight of them. The "
        "module's docstring says which numbers go where.",
    ),
    Exercise(
        "bits_per_byte",
        METRICS,
        1,
        "A log-likelihood is negative and in nats; a bit is ln 2 nats.",
    ),
    Exercise(
        "is_near",
        "data/near.py",
        1,
        "The difference of two uint8 has to fit into a uint8: 3 - 5 gives 254. LEVELS is the limit "
        "on the mean difference where black to white is 255.",
    ),
    Exercise(
        "windows",
        "tinyfm/evaluate/likelihood.py",
        2,
        "Go along context + ids with one place that says how far is scored. A window ends at the "
        "last id that it scores, and its inputs end one id earlier.",
    ),
    Exercise(
        "wilson",
        METRICS,
        2,
        "NormalDist().inv_cdf gives the z of a level, with half of what is left on each side. "
        "Mind which n is squared. Rounding must not put an end below 0 or above 1.",
    ),
    Exercise(
        "minhash",
        "data/dedupe.py",
        2,
        "Order i puts a shingle h at the place a[i] h + b[i]; arrays of uint32 do the modulo by "
        "themselves. Take BLOCK shingles at a time, or a long document fills the memory.",
    ),
    Exercise(
        "Overlap.count",
        SPLITS,
        3,
        "self.found says of each of the sorted self.known whether training has it; "
        "np.searchsorted finds the place of a run there. A word is covered if any of the 13 runs "
        "that contain it was found.",
    ),
    Exercise(
        "clustered_wilson",
        METRICS,
        3,
        "np.unique with return_inverse numbers the clusters, np.bincount with weights sums over "
        "them. Take care of one example per cluster, of a single cluster, and of p = 0 or 1.",
    ),
)
