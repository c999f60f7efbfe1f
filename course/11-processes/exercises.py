"""The exercises of lesson 11: shares of the work, exchanged gradients, checkpoints."""

from course.lessons import Exercise

TITLE = "Many processes: DDP, FSDP2, shards, faults, checkpoints"
NEEDS = (2,)
DISTRIBUTED = "tinyfm/training/distributed.py"
MUON = "tinyfm/training/muon.py"

EXERCISES = (
    Exercise(
        "World.rows",
        DISTRIBUTED,
        1,
        "Every rank takes an equally large block; the blocks follow each other by rank.",
    ),
    Exercise(
        "shard_heights",
        MUON,
        1,
        "-(-a // b) is a / b, rounded up. A rank that comes after the last row holds 0 rows, never "
        "fewer.",
    ),
    Exercise(
        "World.share",
        DISTRIBUTED,
        2,
        "Item number i goes to rank i modulo size. Only at the end do you know whether the last "
        "round was full; remember the last item. With no items there is nothing to repeat.",
    ),
    Exercise(
        "Gather.backward",
        DISTRIBUTED,
        2,
        "dist.all_reduce changes its argument in place, and autograd may still need it: clone "
        "first. chunk(number of ranks) cuts it into the rows of each rank.",
    ),
    Exercise(
        "Parallel.exchanging",
        "tinyfm/training/parallel.py",
        2,
        "Three cases: sharded, to be exchanged now, and to be kept for later. DDP exchanges unless "
        "it is inside module.no_sync(); FSDP2 has set_requires_gradient_sync(bool).",
    ),
    Exercise(
        "verify",
        "tinyfm/training/checkpoint.py",
        2,
        "make_manifest(folder) says what is there, read_json(folder / MANIFEST) what should be. Go "
        "through the names of both, sorted; a manifest may be damaged itself, and be no dict.",
    ),
    Exercise(
        "orthogonalise_shards",
        MUON,
        3,
        "Rank r gets deal(n, size)[r] matrices. Each rank sends its own rows of them, and receives "
        "everyone's rows of its matrices; `exchange` needs to know how many numbers that is. "
        "Put the rows together along dim 1, orthogonalise, split along dim 1, and send back.",
    ),
)
