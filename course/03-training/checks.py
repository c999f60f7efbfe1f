"""Checks of lesson 3: values worked out by hand, and properties that the mathematics promises."""

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from course.compare import agree, shown, waves
from course.lessons import checks
from tinyfm.batches.order import shuffle
from tinyfm.common.seeds import row_generators
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training.muon import NEWTON_SCHULZ, Muon, orthogonalise
from tinyfm.training.optim import EMA, OptimConfig, hidden_matrices, lr_factor, scale_and_clip
from tinyfm.training.trainer import TrainConfig, Trainer, weighted

# ---- shuffle ------------------------------------------------------------------------------------


@checks("shuffle")
def test_an_epoch_reads_each_row_once():
    rows = shuffle(np.arange(21), 7, seed=3).reshape(3, 7)
    for epoch, part in enumerate(rows.tolist()):
        message = f"7 rows, seed 3, epoch {epoch}: expected each of 0 to 6 once, got {part}"
        assert sorted(part) == list(range(7)), message


@checks("shuffle")
def test_each_epoch_has_an_order_of_its_own():
    first, second = shuffle(np.arange(200), 100, seed=0).reshape(2, 100)
    assert (first != second).any(), "100 rows, seed 0: epochs 0 and 1 have the same order"
    assert (first != np.arange(100)).any(), "100 rows, seed 0: epoch 0 is not shuffled"


@checks("shuffle")
def test_another_seed_gives_another_order():
    orders = [shuffle(np.arange(100), 100, seed).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1], "100 rows: seeds 0 and 1 give the same order"


@checks("shuffle")
def test_any_part_can_be_computed_alone():
    """A resumed run, or another process, asks for some samples only, and in any order."""
    whole = shuffle(np.arange(21), 7, seed=3)
    for part in ([0], [12], [5, 6, 7, 8], [20, 2, 13]):
        got = shuffle(np.array(part), 7, seed=3).tolist()
        expected = whole[part].tolist()
        assert got == expected, f"samples {part}: expected {expected} as in the whole, got {got}"


@checks("shuffle")
def test_the_order_is_that_of_earlier_runs():
    """A run that an earlier version began must go on in its order."""
    got = shuffle(np.arange(16), 8, seed=0).tolist()
    assert got == ORDER, f"16 samples of 8 rows, seed 0: expected {ORDER}, got {got}"


# As the first version of `shuffle` computed it.
ORDER = [6, 7, 2, 0, 5, 4, 1, 3, 1, 2, 5, 4, 7, 3, 0, 6]

# ---- weighted -----------------------------------------------------------------------------------


@checks("weighted")
def test_a_loss_is_multiplied_by_its_number_of_targets():
    product, weight = weighted(torch.tensor(2.0), {"weight": torch.tensor(10)}, rows=4)
    agree(product, 20, "mean loss 2, 10 targets in 4 rows")
    agree(weight, 10, "the weight")


@checks("weighted")
def test_without_a_weight_the_rows_count():
    product, weight = weighted(torch.tensor(2.0), {}, rows=4)
    agree(product, 8, "mean loss 2, 4 rows")
    agree(weight, 4, "the weight")


@checks("weighted")
def test_weighted_parts_give_the_mean_of_the_whole():
    a, n = weighted(torch.tensor(2.0), {"weight": 10}, rows=4)
    b, m = weighted(torch.tensor(3.0), {"weight": 30}, rows=4)
    agree((a + b) / (n + m), 2.75, "loss 2 on 10 targets and loss 3 on 30, together")


@checks("weighted")
def test_the_weight_is_a_float32_tensor():
    for value in (3, 3.0, torch.tensor(3)):
        _, weight = weighted(torch.tensor(1.0), {"weight": value}, rows=4)
        message = f"weight {value!r}: expected a float32 tensor, got {weight!r}"
        assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float32, message


@checks("weighted")
def test_the_gradient_is_multiplied_too():
    loss = torch.tensor(2.0, requires_grad=True)
    weighted(loss, {"weight": 10}, rows=4)[0].backward()
    agree(loss.grad, 10, "gradient of loss * weight by the loss, weight 10")


# ---- Trainer.backward ---------------------------------------------------------------------------


class Line(nn.Module):
    """The loss is w times the weighted mean of x. Its gradient by w is the weighted mean of x."""

    outer = ()

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.drawn = []  # one random number of each row

    def loss(self, batch, generators):
        self.drawn += [torch.rand((), generator=g).item() for g in generators]
        weight = batch["weight"].sum()
        return self.w * (batch["x"] * batch["weight"]).sum() / weight, {"weight": weight}


class Numbers:
    """x = 1, 2, 3, 4 in step 0, ten times that in step 1, and so on."""

    def __init__(self, weights=(1.0, 1.0, 1.0, 1.0)):
        self.weights = torch.tensor(weights)
        self.asked = []

    def batch(self, step, rows=slice(None)):
        self.asked.append((step, rows.start, rows.stop))
        x = torch.tensor([1.0, 2.0, 3.0, 4.0]) * 10**step
        return {"x": x[rows], "weight": self.weights[rows]}

    def val_batches(self, rows):
        yield self.batch(0, slice(0, 4))

    def metrics(self, loss):
        return {}


def trainer_of(size: int, data=None, model=None, **optim) -> Trainer:
    """A trainer of Line on Numbers whose micro-batches have `size` rows."""
    config = TrainConfig(
        steps=10, batch_size=4, micro_batch_size=size, seed=5, device="cpu", dtype="float32"
    )
    settings = OptimConfig(**{"optimizer": "adamw", "weight_decay": 0.0, "clip": 0.0} | optim)
    return Trainer(model or Line(), data or Numbers(), config, settings, Path("unused"))


@checks("Trainer.backward")
@pytest.mark.parametrize("size", [4, 2, 1, 3])
def test_gradients_and_sums_add_up_however_the_batch_is_cut(size):
    trainer = trainer_of(size)
    sums = trainer.backward(0)
    agree(sums, [20, 4], f"x = 1 2 3 4, w = 2, {size} rows at once: sums of loss * weight, weight")
    agree(trainer.model.w.grad, 10, f"gradient with {size} rows at once: 1 + 2 + 3 + 4")


@checks("Trainer.backward")
@pytest.mark.parametrize("size", [4, 2, 1])
def test_rows_of_unequal_weight_count_by_their_weight(size):
    trainer = trainer_of(size, Numbers(weights=(1.0, 5.0, 2.0, 0.5)))
    sums = trainer.backward(0)
    agree(sums, [38, 8.5], "weights 1 5 2 0.5, w = 2: 2 (1 + 10 + 6 + 2), and 8.5")
    agree(trainer.model.w.grad, 19, f"gradient with {size} rows at once: 1 + 10 + 6 + 2")


@checks("Trainer.backward")
def test_each_row_is_read_once_and_of_this_step():
    data = Numbers()
    trainer_of(2, data).backward(3)
    expected = [(3, 0, 2), (3, 2, 4)]
    assert data.asked == expected, f"(step, first, end): expected {expected}, got {data.asked}"


@checks("Trainer.backward")
def test_a_row_draws_the_same_numbers_however_the_batch_is_cut():
    expected = [torch.rand((), generator=g).item() for g in row_generators(5, 3, range(4))]
    for size in (4, 2):
        trainer = trainer_of(size)
        trainer.backward(3)
        agree(trainer.model.drawn, expected, f"first random number of each row, {size} at once")


@checks("Trainer.backward")
def test_the_sums_have_no_graph():
    assert not trainer_of(2).backward(0).requires_grad, "the sums must be detached"


@checks("Trainer.backward")
def test_processes_exchange_gradients_in_the_last_micro_batch_only():
    trainer = trainer_of(1)
    told = []

    @contextlib.contextmanager
    def exchanging(last):
        told.append(last)
        yield

    trainer.call.exchanging = exchanging
    trainer.backward(0)
    expected = [False, False, False, True]
    assert told == expected, f"exchanging(last=...): expected {expected}, got {told}"


# ---- lr_factor ----------------------------------------------------------------------------------


def factors(steps: int, at: list[int], **options) -> list[float]:
    return [lr_factor(step, steps, OptimConfig(**options)) for step in at]


@checks("lr_factor")
def test_the_warmup_begins_above_zero_and_ends_at_the_peak():
    got = factors(100, [0, 1, 8, 9], warmup_steps=10)
    agree(got, [0.1, 0.2, 0.9, 1.0], "steps 0, 1, 8, 9 of a warmup of 10")


@checks("lr_factor")
def test_wsd_stays_and_falls_in_a_line():
    got = factors(100, [10, 60, 70, 80, 99], warmup_steps=10, decay_fraction=0.4)
    expected = [1, 1, 0.75, 0.5, 0.025]
    agree(got, expected, "steps 10, 60, 70, 80, 99 of 100, falling over the last 40")


@checks("lr_factor")
def test_the_fall_does_not_begin_before_the_warmup_ends():
    got = factors(100, [19, 20, 60, 80], warmup_steps=20, decay_fraction=1.0)
    agree(got, [1, 1, 0.5, 0.25], "steps 19, 20, 60, 80 of 100, warmup 20, decay_fraction 1")


@checks("lr_factor")
def test_cosine_is_half_a_wave():
    """A quarter, a half and three quarters of the way: (1 + cos(45, 90, 135 degrees)) / 2."""
    got = factors(120, [20, 45, 70, 95], warmup_steps=20, schedule="cosine")
    agree(got, [1, 0.853553, 0.5, 0.146447], "steps 20, 45, 70, 95 of 120, warmup 20")


@checks("lr_factor")
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_end_is_the_final_rate(schedule):
    got = factors(100, [0, 99, 100], warmup_steps=2, schedule=schedule, final_lr=0.2)
    message = f"{schedule}, final_lr 0.2: step 99 of 100 must be near 0.2, got {got[1]:.3f}"
    assert 0.2 < got[1] < 0.23, message
    agree([got[0], got[2]], [0.5, 0.2], f"{schedule}, final_lr 0.2, warmup 2: steps 0 and 100")


@checks("lr_factor")
def test_the_middle_of_the_fall_is_between_the_peak_and_the_final_rate():
    got = factors(100, [80], warmup_steps=10, decay_fraction=0.4, final_lr=0.2)
    agree(got, [0.6], "half of the fall from 1 to 0.2")


@checks("lr_factor")
def test_no_fall_and_no_warmup_are_allowed():
    got = factors(10, [0, 5, 9], warmup_steps=0, decay_fraction=0.0)
    agree(got, [1, 1, 1], "no warmup, no fall")


# ---- scale_and_clip -----------------------------------------------------------------------------


def with_gradients(*values: float) -> nn.Module:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in values])
    for p, value in zip(model, values):
        p.grad = torch.tensor([value])
    return model


CLIPPED = [
    (1.0, 10.0, 5.0, [3.0, 4.0], "smaller than the limit: unchanged, not stretched"),
    (1.0, 1.0, 5.0, [0.6, 0.8], "larger than the limit: shrunk to norm 1, same direction"),
    (0.1, 1.0, 0.5, [0.3, 0.4], "smaller than the limit once it is scaled"),
    (2.0, 5.0, 10.0, [3.0, 4.0], "larger than the limit once it is scaled"),
    (2.0, 0.0, 10.0, [6.0, 8.0], "clip 0: scaled only"),
]


@checks("scale_and_clip")
@pytest.mark.parametrize("scale, clip, norm, grads, why", CLIPPED, ids=range(len(CLIPPED)))
def test_gradients_three_and_four_by_hand(scale, clip, norm, grads, why):
    model = with_gradients(3.0, 4.0)
    got = scale_and_clip(model, scale, clip)
    what = f"gradients 3 and 4, scale {scale:g}, clip {clip:g} ({why})"
    agree(got, norm, f"returned norm, {what}", 1e-4)
    agree([p.grad.item() for p in model], grads, f"new gradients, {what}", 1e-4)


@checks("scale_and_clip")
def test_a_parameter_without_a_gradient_is_left_out():
    model = with_gradients(3.0, 4.0, 7.0)
    model[2].grad = None
    agree(scale_and_clip(model, 1.0, 1.0), 5, "norm of the gradients 3, 4 and None")
    assert model[2].grad is None, f"expected None, got {model[2].grad}"


@checks("scale_and_clip")
def test_gradients_of_zero_stay_zero():
    model = with_gradients(0.0, 0.0)
    agree(scale_and_clip(model, 1.0, 1.0), 0, "norm of zeros")
    agree([p.grad.item() for p in model], [0, 0], "gradients of zero")


# ---- hidden_matrices ----------------------------------------------------------------------------


class Mixed(nn.Module):
    """Parameters of all kinds, some of them below the name "head"."""

    outer = ("head",)

    def __init__(self):
        super().__init__()
        self.ahead = nn.Linear(2, 3)
        self.kernel = nn.Conv2d(2, 2, 3)
        self.inner = nn.ModuleDict({"norm": nn.LayerNorm(2), "head": nn.Linear(2, 4)})
        self.head = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 6))


def names_of(model: nn.Module, found: list) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in found]


@checks("hidden_matrices")
def test_matrices_are_found_and_vectors_are_not():
    model = GPT(GPTConfig(8, 4, n_layer=1, n_head=1, d_model=4))
    got = names_of(model, hidden_matrices(model))
    layers = ("attention.q", "attention.k", "attention.v", "attention.out")
    layers += ("mlp.gate", "mlp.up", "mlp.down")
    expected = [f"blocks.0.{layer}.weight" for layer in layers]
    assert got == expected, f"a GPT of one layer: expected {expected}, got {got}"


@checks("hidden_matrices")
def test_a_name_of_outer_counts_at_any_depth_and_as_a_whole():
    model = Mixed()
    got = names_of(model, hidden_matrices(model))
    assert got == ["ahead.weight"], f'outer = ("head",): expected ahead.weight only, got {got}'


@checks("hidden_matrices")
def test_kernels_are_taken_if_asked_for():
    model = Mixed()
    got = names_of(model, hidden_matrices(model, kernels=True))
    expected = ["ahead.weight", "kernel.weight"]
    assert got == expected, f"kernels=True: expected {expected}, got {got}"


# ---- orthogonalise ------------------------------------------------------------------------------


def iterate(s: float, steps: int) -> float:
    """What Newton-Schulz makes of a singular value."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@checks("orthogonalise")
def test_one_step_on_a_diagonal_matrix():
    """diag(0.6, 0.8) has norm 1. 0.6 a + 0.216 b + 0.07776 c = 1.1933, and 0.9765 from 0.8."""
    got = orthogonalise(torch.diag(torch.tensor([0.6, 0.8]))[None], steps=1)[0]
    agree(got, [[1.1933, 0], [0, 0.9765]], "diag(0.6, 0.8) after one step", 0.02)


@checks("orthogonalise")
def test_five_steps_on_a_diagonal_matrix():
    """diag(3, 1) is first divided by its norm, sqrt(10)."""
    got = orthogonalise(torch.diag(torch.tensor([3.0, 1.0]))[None])[0]
    expected = [iterate(3 / math.sqrt(10), 5), iterate(1 / math.sqrt(10), 5)]
    agree(got.diagonal(), expected, "diagonal of diag(3, 1) after five steps", 0.04)


@checks("orthogonalise")
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)], ids=["square", "wide", "tall"])
def test_directions_stay_and_sizes_become_equal(shape):
    M = waves(*shape) + torch.eye(*shape)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    got = orthogonalise(M[None])[0].float()
    assert got.shape == M.shape, f"expected the shape {shape}, got {tuple(got.shape)}"
    along = (U.T @ got @ Vh.T).diagonal()
    message = f"lengths along the singular directions must be about 1, got {shown(along)}"
    assert along.min() > 0.6 and along.max() < 1.3, message
    rest = (got - (U * along) @ Vh).abs().max()
    assert rest < 0.1, f"the result has other directions than the matrix, by {rest:.2f}"


@checks("orthogonalise")
def test_the_size_of_a_matrix_does_not_matter():
    """Each matrix of a stack is divided by its own norm."""
    M = waves(3, 5)
    small, large = orthogonalise(torch.stack((M, 1000 * M)))
    agree(large, small, "a matrix, and 1000 times the same matrix, in one stack", 0.03)


@checks("orthogonalise")
def test_a_matrix_of_zeros_stays_zero():
    got = orthogonalise(torch.zeros(1, 2, 3))
    agree(got, torch.zeros(1, 2, 3), "a stack of one matrix of zeros")


# ---- EMA.update ---------------------------------------------------------------------------------


def average_after(half_life: float, steps: list[int]) -> float:
    """An average that starts at 0, of a weight that is 1, after the updates of these steps."""
    model = with_gradients(0.0)
    ema = EMA(model, half_life)
    model[0].data.fill_(1.0)
    for step in steps:
        ema.update(model, step)
    agree(model[0].detach(), [1], "the weight itself, which no average changes")
    return ema.average["0"].item()


@checks("EMA.update")
def test_half_of_the_past_is_forgotten_in_a_half_life():
    agree(average_after(1.0, [1000]), 0.5, "half-life 1, one step")
    agree(average_after(2.0, [1000, 1001]), 0.5, "half-life 2, two steps")
    agree(average_after(20.0, list(range(1000, 1020))), 0.5, "half-life 20, twenty steps", 1e-4)


@checks("EMA.update")
def test_the_first_steps_forget_faster():
    """decay is the smaller of 2^(-1/1000) and 1/10 in step 0, 2/11 in step 1."""
    agree(average_after(1000.0, [0]), 0.9, "half-life 1000, step 0")
    agree(average_after(1000.0, [0, 1]), 1 - 0.1 * 2 / 11, "half-life 1000, steps 0 and 1")


# ---- the parts around the exercises -------------------------------------------------------------


def test_each_step_has_the_gradient_of_its_mean_loss():
    trainer = trainer_of(2)
    loss, norm = trainer.update(0)
    agree([loss, norm], [5, 2.5], "x = 1 2 3 4, w = 2: the mean loss, and the mean of x")
    _, norm = trainer.update(1)
    agree(norm, 25, "x = 10 20 30 40: the mean of x, and nothing of the step before")


def test_evaluating_is_done_in_evaluation_mode():
    class Watched(Line):
        def loss(self, batch, generators):
            self.mode = self.training
            return super().loss(batch, generators)

    trainer = trainer_of(4, model=Watched())
    trainer.evaluate()
    assert trainer.model.mode is False, "the model was evaluated in training mode"
    assert trainer.model.training, "after an evaluation the model must train again"


def test_after_two_swaps_weights_and_average_are_as_before():
    model = with_gradients(0.0)
    ema = EMA(model, half_life=10)
    model[0].data.fill_(1.0)
    ema.swap(model)
    agree([model[0].item(), ema.average["0"].item()], [0, 1], "weight and average, swapped")
    ema.swap(model)
    agree([model[0].item(), ema.average["0"].item()], [1, 0], "weight and average, swapped twice")


def test_muon_decays_and_steps():
    """Without a gradient only the decay acts. A matrix with 4 times as many rows as columns steps
    twice as far. Its two singular values are equal, so each is sqrt(1/2) of the norm."""
    W = nn.Parameter(torch.ones(2, 2))
    W.grad = torch.zeros(2, 2)
    Muon([W], lr=0.1, weight_decay=0.5).step()
    agree(W, torch.full((2, 2), 0.95), "ones after a step without gradient, lr 0.1, decay 0.5")
    W = nn.Parameter(torch.zeros(8, 2))
    W.grad = torch.cat((torch.eye(2), torch.zeros(6, 2)))
    Muon([W], lr=0.1).step()
    expected = -0.1 * 2 * iterate(math.sqrt(0.5), 5)  # a matrix 4 times as tall steps twice as far
    agree(W[0, 0], expected, "first number of a tall matrix after one step, lr 0.1", 0.02)
