"""Cost and scaling laws: what the student writes in tinyfm/calc/ and tinyfm/common/gpus.py."""

from course.lessons import Exercise

TITLE = "Cost and scaling laws"
NEEDS = (2, 3)

LEDGERS = "tinyfm/calc/ledgers.py"
MEMORY = "tinyfm/calc/memory.py"
LAWS = "tinyfm/calc/scaling_laws.py"

EXERCISES = (
    Exercise(
        "Layer.macs",
        LEDGERS,
        1,
        "A matrix of w weights that is applied at P positions costs w P multiply-adds. Vectors "
        "cost nothing here. Products between activations are counted already.",
    ),
    Exercise(
        "busy_hours",
        "tinyfm/common/gpus.py",
        1,
        "GPU.peak gives FLOP/s. Only a share of it, the MFU, does useful work. Keep the check of "
        "that share.",
    ),
    Exercise(
        "mlp",
        LEDGERS,
        3,
        "Yield one Layer named mlp. What each token passes are weights; experts that it does not "
        "pass are parameters too, but are never multiplied, so they are vectors.",
    ),
    Exercise(
        "cache_bytes",
        MEMORY,
        2,
        "stack.cache is for one token and one block, stack.cross_cache for one row and one block. "
        "A window limits the tokens that are kept. network.shape.get gives 0 or None without one.",
    ),
    Exercise(
        "state_memory",
        MEMORY,
        3,
        "Write down the bytes of weights, gradients and optimizer on one GPU first. Then ask of "
        "each from which stage on it is divided. Frozen parameters have a weight only.",
    ),
    Exercise(
        "Parametric.optimum",
        LAWS,
        2,
        "The module's docstring has N. D follows from it, as the whole budget is spent.",
    ),
    Exercise(
        "regress",
        LAWS,
        3,
        "For one alpha the law is a straight line in u = e^(-alpha x): its slope is the covariance "
        "of u and the losses over the variance of u. Use axis 1 for the points, axis 0 for alphas.",
    ),
)
