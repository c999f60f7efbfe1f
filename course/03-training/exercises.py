"""The exercises of lesson 3, in the order in which a training step needs them."""

from course.lessons import Exercise

TITLE = "The training loop"
NEEDS = (2,)
ORDER = "tinyfm/batches/order.py"
MUON = "tinyfm/training/muon.py"
OPTIM = "tinyfm/training/optim.py"
TRAINER = "tinyfm/training/trainer.py"

EXERCISES = (
    Exercise(
        "shuffle",
        ORDER,
        2,
        "The samples asked for may lie in several epochs, in any order. Treat them epoch by epoch: "
        "np.unique lists the epochs, a comparison finds the samples of each.",
    ),
    Exercise(
        "weighted",
        TRAINER,
        1,
        "torch.as_tensor makes a tensor of a number, and changes the dtype of a tensor.",
    ),
    Exercise(
        "Trainer.backward",
        TRAINER,
        3,
        "self.micro_batches() lists the rows, as ranges; self.data.batch wants a slice. "
        "row_generators gives the generators. Each backward() adds to the gradients there are.",
    ),
    Exercise(
        "lr_factor",
        OPTIM,
        2,
        "First the warmup. Then compute a share that falls from 1 to 0, by one of two formulas; "
        "at the end map it to the range from 1 to final_lr.",
    ),
    Exercise(
        "scale_and_clip",
        OPTIM,
        2,
        "total_norm gives the norm, before scaling. One factor does both; change the gradients in "
        "place: torch._foreach_mul_([local(g) for g in grads], factor).",
    ),
    Exercise(
        "hidden_matrices",
        OPTIM,
        1,
        'The name "blocks.0.mlp.up.weight" has five parts. None of them may be in model.outer.',
    ),
    Exercise(
        "orthogonalise",
        MUON,
        3,
        "@ multiplies each matrix of a stack. Take care that each matrix is divided by its own "
        "norm, and that a tall matrix comes back tall.",
    ),
    Exercise(
        "EMA.update",
        OPTIM,
        1,
        "The smaller of two decays. lerp_ moves a tensor towards another by a share, in place.",
    ),
)
