"""For teachers: wrong answers that the checks of lesson 11 must find, bugs to plant, questions."""

from course.lessons import Fault, Wrong

WRONG = {
    "World.rows": (
        Wrong("self.rank * share, (self.rank + 1)", "0, 1", "every rank reads other rows"),
        Wrong("(self.rank + 1) * share", "(self.rank + 1) * share - 1", "the last row is lost"),
        Wrong(
            "range(self.rank * share, (self.rank + 1) * share)",
            "range(self.rank, batch_size, self.size)",
            "a rank reads neighbouring rows, not every n-th one",
        ),
    ),
    "shard_heights": (
        Wrong("-(-rows // size)", "rows // size", "the height is rounded up, or rows are lost"),
        Wrong("max(0, rows - r * full)", "rows - r * full", "no rank has fewer than 0 rows"),
        Wrong("min(full, max(0, rows - r * full))", "full", "the last parts may be lower"),
    ),
    "World.share": (
        Wrong("self.rank:\n        yield place, item, True", "0:\n        yield place, item, True",
              "item i goes to rank i modulo size"),
        Wrong("yield place, item, False", "yield place, item, True", "a repeat must not count"),
        Wrong("place % self.size < self.rank", "place % self.size <= self.rank",
              "the rank that took the last item does not take it again"),
        Wrong("if together and place >= 0", "if place >= 0", "repeats are for joint work alone"),
    ),
    "Gather.backward": (
        Wrong("dist.all_reduce(gradient)", "pass", "every rank's loss depends on these rows"),
        Wrong("[rank()]", "[0]", "each rank keeps the gradient of its own rows"),
        Wrong("gradient = gradient.clone(memory_format=torch.contiguous_format)", "pass",
              "the gradient that came in must stay as it is"),
    ),
    "Parallel.exchanging": (
        Wrong("if last:\n", "if True:\n", "scalars are averaged once, in the last micro-batch"),
        Wrong(".div_(self.world.size)", "", "gradients are averaged, not summed"),
        Wrong("elif last or", "elif not last or", "DDP exchanges in the last micro-batch"),
        Wrong("set_requires_gradient_sync(last)", "set_requires_gradient_sync(True)",
              "FSDP2 exchanges once a step as well"),
    ),
    "verify": (
        Wrong("if listed.get(name) == found.get(name)", "if name in found and name in listed",
              "a file of the same name may have another content"),
        Wrong("listed.keys() | found.keys()", "listed.keys()", "an additional file is damage"),
        Wrong("listed.keys() | found.keys()", "found.keys()", "a missing file is damage"),
        Wrong("not isinstance(listed, dict)", "False", "the manifest itself may be damaged"),
        Wrong("sorted(listed.keys() | found.keys())",
              "sorted(listed.keys() | found.keys(), reverse=True)", "the first file is named"),
    ),
    "orthogonalise_shards": (
        Wrong("counts[r] * heights[rank] * columns", "counts[rank] * heights[r] * columns",
              "rank r is sent my rows of its matrices"),
        Wrong("zip(parts, shapes)], dim=1)", "zip(parts, shapes)], dim=1).flip(1)",
              "the rows stand in the order of the ranks"),
        Wrong("if counts[rank]:\n    whole = orthogonalise(whole)", "if False:\n    pass",
              "the matrices are orthogonalised"),
        Wrong("whole.split(heights, dim=1)", "whole.mT.split(heights, dim=2)",
              "the rows go back as they came, not transposed"),
        Wrong("exchange(M.bfloat16().flatten(), outward, inward, group)",
              "exchange(M.bfloat16().flatten(), inward, outward, group)",
              "what is sent and what is received are not the same numbers"),
    ),
}  # fmt: skip

FAULTS = (
    Fault(
        "tinyfm/training/checkpoint.py",
        "_step_folders",
        "reverse=True",
        "reverse=False",
        "A run has checkpoints of steps 100, 200 and 300 and is resumed. It begins at step 100.",
        "The checkpoints are sorted from the oldest on, and `find` takes the first.",
    ),
    Fault(
        "tinyfm/training/distributed.py",
        "Signals.total",
        "new_tensor([self.received])",
        "new_tensor([0])",
        "Two processes train together. The scheduler sends SIGTERM to one of them. Neither stops.",
        "The signal is not added to the sum, so the ranks never hear of it.",
    ),
    Fault(
        "tinyfm/training/checkpoint.py",
        "prune",
        'folder.name != f"step-{best:06d}"',
        'folder.name == f"step-{best:06d}"',
        "A run keeps its last two checkpoints and its best one. At its end the best one is gone, "
        "and all the older ones are there.",
        "The comparison is the wrong way round: of the old ones the best alone is removed.",
    ),
    Fault(
        "tinyfm/training/muon.py",
        "deal",
        "(r < n % size)",
        "0",
        "A sharded model on two ranks trains with Muon as long as it has an even number of "
        "matrices of each shape. With an odd number the first step ends with an error about "
        "the sizes of what is exchanged.",
        "n // size leaves n % size matrices that no rank orthogonalises.",
    ),
    Fault(
        "tinyfm/training/distributed.py",
        "check_alike",
        "first.get(name) != own.get(name)",
        "name not in own",
        "One of two machines was started with another learning rate. Both train without an error; "
        "later their losses differ.",
        "Only names are compared, not values: a rank with other values passes.",
    ),
)

QUESTIONS = [
    (
        "Four ranks train with a global batch of 32 rows. A rank crashes, and the run is resumed "
        "on two ranks. Does the result change?",
        "No, up to rounding. The batch of a step is a function of seed and step, each rank now "
        "reads 16 rows of it, and the average of the gradients is the same sum in another order.",
    ),
    (
        "A model of P parameters trains with AdamW in float32 on n ranks. How many bytes of "
        "weights, gradients and optimizer state does a rank hold with DDP, and with FSDP2?",
        "DDP: 4 numbers a parameter, 16 P bytes. FSDP2: 16 P / n, and for a moment the gathered "
        "weights of one block.",
    ),
    (
        "Why does accumulation over k micro-batches exchange gradients only in the last one? "
        "Would the result be wrong otherwise?",
        "A sum of averages is the average of sums, so the result is the same; but it would be "
        "exchanged k times instead of once.",
    ),
    (
        "A student calls model.loss instead of the wrapped module. What happens, and how would "
        "you notice?",
        "DDP never sees a forward pass and exchanges nothing: each rank trains its own model on "
        "its own rows. No error. The ranks' weights differ after a step; compare a checksum.",
    ),
    (
        "Why is a checkpoint written under another name and then renamed?",
        "A rename within a file system happens as a whole or not at all. A process that is killed "
        "while it writes leaves a folder that no reader takes for a checkpoint.",
    ),
    (
        "A process receives SIGTERM. Why may it not simply stop after its step?",
        "The others would wait for it for ever in the next exchange. All ranks must learn of it in "
        "the same step: the signal travels in a sum that they compute anyway.",
    ),
    (
        "CLIP compares the rows of all ranks. What is lost if the gathered rows carry no gradient "
        "back to other ranks?",
        "A rank's loss depends on every rank's rows. Without the sum, rows get only the gradient "
        "of their own rank's loss: the direction differs from that of one process with the batch.",
    ),
]
