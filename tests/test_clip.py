"""CLIP: losses against plain formulas, batches in parts and on two ranks, augmentation, towers."""

import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import assert_equal_weights, generators, run_two_ranks
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tinyfm.clip import CLIP, CLIPConfig, augment, contrast, log_weights, softmax_loss
from tinyfm.common.files import load_model
from tinyfm.training.optim import OptimConfig, build_optimizers, lr_factor, scale_and_clip, set_lr

LOSSES = ("infonce", "siglip", "simclr")
KINDS = (*LOSSES, "memory")
V, T, B, END = 40, 10, 8, 7  # END is neither the highest id nor the lowest
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def small(**options) -> CLIPConfig:
    sizes = {
        "image_size": 8,
        "channels": 1,
        "patch_size": 4,
        "stem": "patch",
        "image_layer": 2,
        "image_width": 24,
        "image_head": 3,
        "vocab_size": V,
        "context_length": T,
        "text_layer": 2,
        "text_width": 16,
        "text_head": 2,
        "embed_dim": 12,
        "augment": 0.5,
        "loss": "infonce",
        "activation": "gelu",
        "temperature": 0.07,
        "max_scale": 100.0,
    }
    return CLIPConfig(**(sizes | options))


def make(seed: int = 0, **options) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(small(**options))


def make_kind(kind: str) -> CLIP:
    """A model with one of the losses, or one whose memory holds two batches already."""
    if kind in LOSSES:
        return make(loss=kind, stem="conv")
    model = make(memory=12, rivals="all", stem="conv")
    model.n_pairs = 1000
    generator = torch.Generator().manual_seed(2)
    for i in range(2):  # some ids equal labels of make_batch()
        x, y = torch.nn.functional.normalize(torch.randn(2, B, 12, generator=generator), dim=-1)
        model.memory.add(x, y, torch.arange(B) + B * i - 2)
    return model


def make_batch(rows: int = B, seed: int = 0, channels: int = 1) -> dict[str, torch.Tensor]:
    """Random pairs. Of 8 rows, 1 and 6 share a caption, and so do 2, 3 and 7."""
    g = torch.Generator().manual_seed(seed)
    images = 2 * torch.rand(rows, channels, 8, 8, generator=g) - 1
    tokens = torch.randint(8, V, (rows, T), generator=g)
    labels = torch.tensor([0, 1, 2, 2, 4, 5, 1, 2]) if rows == B else torch.arange(rows)
    tokens[torch.arange(T) >= 3 + torch.arange(rows)[:, None] % 6] = END
    return {"images": images, "tokens": tokens[labels], "labels": labels}


def streams(rows: int = B) -> list[torch.Generator]:
    """The generators of the rows of a batch."""
    return generators(rows, seed=1)


def gradients(model: CLIP, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max()
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-5, atol=1e-5 * max(1, scale), msg=name
        )
    assert max(g.abs().max() for g in theirs.values()) > 0.01


# ---- the losses against plain formulas -----------------------------------------------------------


def plain_loss(model: CLIP, batch, row_generators) -> torch.Tensor:
    """The loss from the embeddings, pair by pair, in float64."""
    images = batch["images"]
    s = model.logit_scale.double().exp()
    if model.config.loss == "simclr":
        first = augment(images, row_generators, 1.0)
        second = augment(images, row_generators, 1.0)
        v = torch.cat([model.encode_image(first), model.encode_image(second)]).double()
        n = len(v)
        total = 0
        for i in range(n):
            others = [j for j in range(n) if j != i]
            z = torch.stack([s * (v[i] @ v[j]) for j in others])
            total = total - z.log_softmax(0)[others.index((i + n // 2) % n)]
        return total / n
    x = model.encode_image(images).double()
    y = model.encode_text(batch["tokens"]).double()
    labels = batch["labels"].tolist()
    total = 0
    for i in range(len(x)):
        positives = [j for j in range(len(x)) if labels[j] == labels[i]]
        if model.config.loss == "siglip":
            for j in range(len(x)):
                sign = 1 if j in positives else -1
                z = s * (x[i] @ y[j]) + model.logit_bias.double()
                total = total + (1 + (-sign * z).exp()).log()
            continue
        for a, b in ((x, y), (y, x)):
            log_p = torch.stack([s * (a[i] @ b[j]) for j in range(len(x))]).log_softmax(0)
            total = total - sum(log_p[j] for j in positives) / len(positives) / 2
    return total / len(x)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_the_plain_formula(loss):
    model = make(loss=loss, augment=0.0)
    batch = make_batch()
    ours, metrics = model.loss(batch, streams())
    theirs = plain_loss(model, batch, streams())
    assert metrics == {} and theirs > 0.5
    torch.testing.assert_close(ours.double(), theirs, **CLOSE)
    assert_same_gradients(gradients(model, ours), gradients(model, theirs))


def test_with_different_captions_the_loss_is_the_published_one():
    """Radford et al. 2021, figure 3: the mean of two cross-entropies with labels 0, 1, 2, ..."""
    model = make()
    batch = make_batch(6)
    z = model(batch["images"], batch["tokens"])
    labels = torch.arange(6)
    entropies = [torch.nn.functional.cross_entropy(logits, labels) for logits in (z, z.T)]
    torch.testing.assert_close(model.loss(batch)[0], sum(entropies) / 2, **CLOSE)


def test_a_negative_counts_as_many():
    """Of 16 pairs, each of the 5 negatives in the batch counts three times; in evaluation, once."""
    model = make(rivals="all")
    plain = make()
    batch = make_batch(6)
    plain.load_state_dict(model.state_dict())
    model.n_pairs = 1 + 3 * 5
    z = model(batch["images"], batch["tokens"]).double()
    total = 0
    for rows in (z, z.T):
        for i, row in enumerate(rows):
            others = torch.cat((row[:i], row[i + 1 :])).repeat(3)
            total = total - torch.cat((row[i : i + 1], others)).log_softmax(0)[0]
    torch.testing.assert_close(model.loss(batch)[0].double(), total / 12, **CLOSE)
    expected = plain.loss(batch)[0]
    assert model.eval().loss(batch)[0] == expected
    model.train().n_pairs = 3  # fewer pairs than rows: nothing to estimate
    assert model.loss(batch)[0] == expected


@pytest.mark.parametrize(
    "batch, expected", [("random", 0.31), ("runs", 2.71), ("runs, weighted by chance", 0.65)]
)
def test_what_the_weighted_negatives_estimate(batch, expected):
    """The figures of clip.py. M vectors stand on a circle, and image and text i are the same one.

    The softmax over all M has a loss of 0.67. A random batch misses most of the near texts. In runs
    of neighbours every near text is there, and counts as if it stood for many: that is no estimate,
    unless each negative is weighted by 1 / (its chance to be in the batch).
    """
    M, n, run = 4096, 256, 16
    angle = torch.arange(M, dtype=torch.float64) * (2 * math.pi / M)
    x = torch.stack((angle.cos(), angle.sin()), dim=1)
    scale = torch.tensor(7e5)  # the logit of a next neighbour is 0.8 below that of the positive
    everything = torch.arange(M)
    true = contrast(softmax_loss, x, x, everything, everything, scale, rows=512)
    assert true.item() == pytest.approx(0.67, abs=0.005)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        if batch == "random":
            ids = torch.randperm(M, generator=generator)[:n]
        else:
            starts = run * torch.randperm(M // run, generator=generator)[: n // run]
            ids = (starts[:, None] + torch.arange(run)).flatten()
        log_weight = log_weights(ids, M)
        if batch == "runs, weighted by chance":
            log_weight = torch.where(
                ids[:, None] // run == ids // run, 0.0, math.log((M - run) / (n - run))
            )
        loss = contrast(softmax_loss, x[ids], x[ids], ids, ids, scale, log_weight=log_weight)
        losses.append(loss.item())
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=0.04)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Random pairs with different captions, except that all batches share the first caption."""
    found = [make_batch(6, seed=i) for i in range(count)]
    for i, batch in enumerate(found):
        batch["labels"] = torch.tensor([0, *range(1 + 5 * i, 6 + 5 * i)])
    return found


@pytest.mark.parametrize("rivals", ["batch", "all"])
def test_the_memory_adds_the_latest_rows_as_columns(rivals):
    """It has ten rows: six of the last batch and four of the one before. With memory_after 2, the
    third batch is the first that is stored.
    """
    model = make(memory=10, memory_after=2, rivals=rivals, augment=0.0)
    plain = make(rivals=rivals, augment=0.0)
    plain.load_state_dict(model.state_dict(), strict=False)
    model.n_pairs = plain.n_pairs = 100
    past = []
    for i, batch in enumerate(batches(6)):
        x = model.encode_image(batch["images"])
        y = model.encode_text(batch["tokens"])
        own = (x, y, batch["labels"])
        all_x, all_y, all_labels = (torch.cat(parts)[:16] for parts in zip(own, *past))
        s = model.scale()
        weight = (100 - 1) / (len(all_x) - 1) if rivals == "all" else 1  # of a negative
        total = 0
        for a, b in ((x, all_y), (y, all_x)):
            same = batch["labels"][:, None] == all_labels
            z = (s * a @ b.T).double()
            z = z + math.log(weight) * ~same
            total = total - ((z.log_softmax(1) * same).sum(1) / same.sum(1)).mean() / 2
        ours = model.loss(batch)[0]
        torch.testing.assert_close(ours.double(), total, **CLOSE)
        if not past:
            torch.testing.assert_close(ours, plain.loss(batch)[0], **CLOSE)
        if i >= 2:
            past = [[tensor.detach() for tensor in own], *past]  # the newest first
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain.eval()
    model.eval()
    # Evaluation neither reads the memory nor changes it.
    assert model.loss(batch)[0] == plain.loss(batch)[0]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_memory_is_saved_and_loaded():
    first = make(memory=10)
    second = make(1, memory=10)
    *early, last = batches(4)
    for batch in early:
        first.loss(batch, streams(6))
    load_model(second, first.state_dict())
    loss = first.loss(last, streams(6))[0]
    assert torch.equal(second.loss(last, streams(6))[0], loss)
    assert loss != make().loss(last, streams(6))[0]  # without a memory
    assert_equal_weights(first, second)


def test_rows_that_are_not_finite_are_not_stored():
    model = make(memory=20)
    first, second, third = batches(3)
    model.loss(first, streams(6))
    second["images"] = second["images"].index_fill(0, torch.tensor([2]), math.nan)
    assert model.loss(second, streams(6))[0].isnan()  # the trainer would skip this step
    assert (model.memory.ids >= 0).tolist() == [True, True, False, *[True] * 9, *[False] * 8]
    assert model.loss(third, streams(6))[0].isfinite()


def test_equal_captions_are_not_negatives():
    """With one caption for all images, every text is a positive, and the loss is ln B."""
    model = make()
    batch = make_batch()
    batch["tokens"][:] = batch["tokens"][0].clone()
    batch["labels"][:] = 3
    x = model.encode_image(batch["images"])
    y = model.encode_text(batch["tokens"])
    loss = contrast(softmax_loss, x, y, batch["labels"], batch["labels"], model.scale())
    assert loss.item() == pytest.approx(math.log(B), abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_and_autocast_are_near_float32(loss):
    model = make(loss=loss, stem="conv")
    batch = make_batch()
    with torch.no_grad():
        model.logit_scale.fill_(4.5)  # logits up to 90, which bfloat16 rounds to multiples of 0.5
    exact = model.loss(batch, streams())[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.loss(batch, streams())[0]
    half = model.bfloat16().loss(batch, streams())[0]
    assert exact.dtype == mixed.dtype == half.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0)


# ---- a batch in parts gives the loss and gradients of one batch ---------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_rows_at_once_changes_no_gradient(kind, rows):
    model = make_kind(kind)
    batch = make_batch()
    whole = model.loss(batch, streams())[0]
    expected = gradients(model, whole)
    model = make_kind(kind)
    model.rows_at_once = rows
    parts = model.loss(batch, streams())[0]
    torch.testing.assert_close(parts, whole, **CLOSE)
    assert_same_gradients(gradients(model, parts), expected)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returned."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_the_whole_matrix_of_logits_is_never_made():
    n = 256
    rows = 16
    x, y = torch.randn(2, n, 4).requires_grad_().unbind()
    ids = torch.arange(n)
    sizes = []
    for size in (0, rows):
        with Largest() as largest:
            contrast(softmax_loss, x, y, ids, ids, torch.ones(()), rows=size).backward()
        sizes.append(largest.numbers)
    assert sizes == [n * n, n * rows]


def test_towers_keep_one_part_at_a_time():
    """The forward pass saves activations of all rows; in parts, only their inputs and vectors."""
    model = make()
    batch = make_batch()

    def saved_numbers(rows):
        sizes = {}

        def record(tensor):
            sizes.setdefault(tensor.data_ptr(), tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            model.rows_at_once = rows
            model.in_parts(model.encode_image, batch["images"])
        weights = {p.data_ptr() for p in model.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    assert saved_numbers(2) < saved_numbers(0) / 10


# Each rank takes half of the batch and prints its losses. Rank 0 writes the gradients of DDP.
RANK = """
import os, sys
import torch
from safetensors.torch import save_file
from test_clip import KINDS, B, make_batch, make_kind, streams
from tinyfm.training import distributed, parallel

torch.set_num_threads(1)
world = distributed.start()
rows = slice(world.rows(B).start, world.rows(B).stop)
batch = {name: tensor[rows] for name, tensor in make_batch().items()}
for kind in KINDS:
    for part in (0, 3):
        model = make_kind(kind)
        model.rank, model.gather, model.rows_at_once = world.rank, distributed.gather, part
        call = parallel.Parallel(model, world)
        value, _ = call(batch, streams()[rows])
        value.backward()
        print(value.item(), flush=True)
        if world.first:
            grads = {name: p.grad for name, p in model.named_parameters()}
            save_file(grads, f"{sys.argv[1]}/{kind}-{part}.safetensors")
print(model.memory.x.abs().sum().item(), model.memory.ids.sum().item(), flush=True)
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # a normal exit sometimes crashes in gloo's threads, which this test is not about
"""


def test_two_ranks_give_the_gradients_of_one_batch(tmp_path):
    outputs = run_two_ranks(RANK, tmp_path)
    values = [list(map(float, out.split())) for out, _ in outputs]
    assert [len(row) for row in values] == [10, 10], outputs[0][1] + outputs[1][1]
    for i, kind in enumerate(KINDS):
        model = make_kind(kind)
        whole, _ = model.loss(make_batch(), streams())
        expected = gradients(model, whole)
        for place, part in ((2 * i, 0), (2 * i + 1, 3)):
            mean = (values[0][place] + values[1][place]) / 2
            assert mean == pytest.approx(whole.item(), rel=1e-5)
            assert values[0][place] != values[1][place]
            assert_same_gradients(load_file(tmp_path / f"{kind}-{part}.safetensors"), expected)
    memory = [model.memory.x.abs().sum().item(), model.memory.ids.sum().item()]
    assert values[0][8:] == values[1][8:] == pytest.approx(memory, rel=1e-5)


def test_evaluation_does_not_communicate():
    def gather(rows):
        raise RuntimeError("gather was called")

    model = make().eval()
    batch = make_batch()
    model.gather = gather
    assert model.loss(batch)[0].isfinite()
    with pytest.raises(RuntimeError, match="gather was called"):
        model.train().loss(batch)


# ---- augmentation --------------------------------------------------------------------------------


def test_augmentation_of_strength_zero_is_the_identity():
    images = make_batch(channels=3)["images"]
    torch.testing.assert_close(augment(images, streams(), 0.0), images, **CLOSE)


def test_an_augmented_image_depends_on_its_own_generator_alone():
    images = make_batch(channels=3)["images"]
    views = augment(images, streams(), 1.0)
    alone = torch.cat([augment(images[i : i + 1], streams()[i : i + 1], 1.0) for i in range(B)])
    torch.testing.assert_close(alone, views, **CLOSE)
    same = augment(images[:1].expand(B, -1, -1, -1), streams(), 1.0)
    distances = torch.pdist(same.flatten(1))
    assert distances.min() > 0.5
    assert views.abs().max() <= 1
    row_generators = streams()
    first = augment(images, row_generators, 1.0)
    second = augment(images, row_generators, 1.0)
    assert not torch.equal(first, second)  # the generators have advanced


def test_the_range_of_contrast_and_shift():
    """A constant channel shows the contrast. A ramp from -1 to 1 shows how far the middle moved."""
    n = 500
    ramp = (torch.arange(16) + 0.5) / 8 - 1
    image = 0.5 * torch.stack((torch.ones(16, 16), ramp.expand(16, 16)))
    views = augment(image.expand(n, -1, -1, -1), generators(n), 1.0)
    middle = views[:, :, 7:9, 7:9].mean((2, 3)) / 0.5
    contrast = middle[:, 0]
    shift = middle[:, 1] / middle[:, 0] / 2  # as a share of the image's width
    assert 0.6 <= contrast.min() < 0.62 and 1.38 < contrast.max() <= 1.4
    assert 0.12 < shift.abs().max() <= 1 / 8 + 1e-4 and abs(shift.mean()) < 0.02


def test_training_augments_and_evaluation_does_not():
    model = make()
    batch = make_batch()
    plain = model.loss(batch)[0]
    assert abs(model.loss(batch, streams())[0] - plain) > 1e-3
    assert model.eval().loss(batch, streams())[0] == plain
    assert make(augment=0.0).loss(batch, streams())[0] == plain


# ---- the towers ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_token_changes_no_state_before_it():
    model = make()
    tokens = make_batch()["tokens"]
    states = model.text_tower.states(tokens)
    for t in (0, 4, T - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        difference = (model.text_tower.states(changed) - states).abs().amax(-1)
        assert difference[:, :t].sum() == 0
        assert (difference[:, t:] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("end_token", [-1, END])
def test_padding_changes_nothing(end_token):
    model = make(end_token=end_token)
    tokens = make_batch()["tokens"]
    vectors = model.encode_text(tokens)
    for row, vector in zip(tokens, vectors):
        length = int((row == END).int().argmax()) + 1
        for padded in (length, length + 1):
            torch.testing.assert_close(model.encode_text(row[None, :padded])[0], vector, **CLOSE)
        if length > 2:
            cut = row[None, : length - 1].clone()
            cut[:, -1] = END
            assert (model.encode_text(cut)[0] - vector).norm() > 1e-3


@torch.no_grad()
def test_padding_of_all_rows_costs_nothing():
    """The blocks read only as many tokens as the longest text has."""
    tower = make(end_token=END).text_tower
    tokens = torch.full((3, 2 * T), END)
    tokens[0, :4] = 9
    tokens[1, :2] = 9
    read = []
    tower.blocks[0].register_forward_hook(lambda block, inputs, output: read.append(output.size(1)))
    tower(tokens)
    assert read == [5]


@pytest.mark.parametrize("end_token", [-1, -2, 0, END])
def test_the_example_batch_has_texts_of_full_length(end_token):
    tower = make(end_token=end_token).text_tower
    read = []
    tower.blocks[0].register_forward_hook(lambda block, inputs, output: read.append(output.size(1)))
    tower(make(end_token=end_token).example_batch(2)["tokens"])
    assert read == [T]


@torch.no_grad()
def test_the_token_that_ends_a_text():
    tokens = torch.tensor([[3, 9, 5, 8, 5, 9]])
    for end_token, place in ((-1, 1), (-2, 1), (5, 2), (8, 3), (3, 0)):
        tower = make(end_token=end_token).text_tower
        torch.testing.assert_close(tower(tokens), tower.states(tokens)[:, place], **CLOSE)


@torch.no_grad()
def test_one_position_alone_equals_that_position_among_all():
    model = make()
    batch = make_batch()
    at = torch.arange(B) % 5
    towers = ((model.text_tower, batch["tokens"]), (model.image_tower, batch["images"]))
    for tower, inputs in towers:
        alone = tower.states(inputs, at)
        states = tower.states(inputs)
        torch.testing.assert_close(alone[:, 0], states[torch.arange(B), at], **CLOSE)
    torch.testing.assert_close(model.image_tower(batch["images"]), states[:, 0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_vectors_have_unit_length_and_rows_are_independent(stem):
    model = make(stem=stem, channels=3)
    batch = make_batch(channels=3)
    for name, rows in (("encode_image", batch["images"]), ("encode_text", batch["tokens"])):
        encode = getattr(model, name)
        vectors = encode(rows)
        assert vectors.shape == (B, 12)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(B), **CLOSE)
        torch.testing.assert_close(torch.cat([encode(row[None]) for row in rows]), vectors, **CLOSE)
    z = model(batch["images"], batch["tokens"])
    assert z.shape == (B, B)
    cosine = model.encode_image(batch["images"])[2] @ model.encode_text(batch["tokens"])[5]
    torch.testing.assert_close(z[2, 5], cosine / 0.07, **CLOSE)


@torch.no_grad()
def test_the_tower_normalises_pixels_by_its_config():
    images = make_batch(channels=3)["images"]
    mean = (0.5, 0.4, 0.3)
    std = (0.2, 0.25, 0.3)
    model = make(channels=3, image_mean=mean, image_std=std)
    pixels = (images + 1) / 2
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = make(channels=3).encode_image(pixels)
    torch.testing.assert_close(model.encode_image(images), expected, **CLOSE)
    assert not any("mean" in name for name in model.state_dict())


@torch.no_grad()
def test_the_scale_is_clamped():
    model = make(max_scale=20.0)
    batch = make_batch()
    assert model.scale().item() == pytest.approx(1 / 0.07)
    model.logit_scale.fill_(9.0)
    assert model.scale().item() == pytest.approx(20)
    assert model(batch["images"], batch["tokens"]).abs().max() <= 20


def test_a_scale_that_reached_its_bound_can_fall_again():
    """First all pairs are right, and the scale grows; then all are wrong, and it should fall."""
    model = make(max_scale=15.0, augment=0.0)
    x = torch.eye(12)
    ids = torch.arange(12)
    optimizer = torch.optim.SGD([model.logit_scale], lr=0.5)
    scales = []
    for step in range(40):
        y = x if step < 20 else x.roll(1, 0)
        contrast(softmax_loss, x, y, ids, ids, model.scale()).backward()
        model.logit_scale.grad.sign_()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        scales.append(model.logit_scale.exp().item())
    assert scales[19] == pytest.approx(15)
    assert scales[-1] < 1
    frozen = make(max_scale=15.0)
    frozen.logit_scale.data.fill_(9.0)
    frozen.requires_grad_(False)
    frozen.after_step()
    assert frozen.logit_scale.item() == 9  # weights that are not trained do not change


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_every_parameter_learns(loss, stem):
    model = make(loss=loss, stem=stem)
    assert hasattr(model, "text_tower") == (loss != "simclr")
    loss, _ = model.loss(make_batch(), streams())
    for name, gradient in gradients(model, loss).items():
        if name.endswith(".k.bias"):
            continue  # it adds the same number to all scores of a row, so it cannot learn
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_random_pairs_are_memorised(loss):
    """Images and texts are unrelated: only seen pairs can be learnt, new ones stay at chance."""
    model = make(loss=loss, augment=0.0, image_width=48, text_width=48)
    batch = make_batch(32)
    config = OptimConfig(lr=0.01, warmup_steps=5, weight_decay=0.0)
    steps = 50
    optimizers = build_optimizers(model, config)
    first = model.loss(batch)[0].item()
    for step in range(steps):
        set_lr(optimizers, lr_factor(step, steps, config))
        model.loss(batch)[0].backward()
        scale_and_clip(model, 1.0, config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        z = model(batch["images"], batch["tokens"])
        other = make_batch(32, seed=1)
        other_z = model(other["images"], other["tokens"])
    diagonal = torch.arange(32)
    assert model.loss(batch)[0] < 0.05 < 1 < first
    assert (z.argmax(1) == diagonal).all() and (z.argmax(0) == diagonal).all()
    assert (other_z.argmax(1) == diagonal).float().mean() < 0.2


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_one_is_refused(loss):
    for model in (make(loss=loss), make(loss=loss).eval()):
        with pytest.raises(ValueError, match="2 rows or more"):
            model.loss(make_batch(1), streams(1))


@pytest.mark.parametrize("shape", [(1, 8, 9), (3, 8, 8), (1, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    message = f"{re.escape(str(shape))}.*{re.escape('(1, 8, 8)')}"
    with pytest.raises(ValueError, match=message):
        make().encode_image(torch.zeros(2, *shape))


def test_texts_that_cannot_be_encoded():
    with pytest.raises(ValueError, match=r"11 tokens .*context_length 10"):
        make().encode_text(torch.arange(11)[None])
    with pytest.raises(ValueError, match="no text tower"):
        make(loss="simclr").encode_text(torch.zeros(2, 5, dtype=torch.long))


MISTAKES = [
    ({"image_layer": 0}, "image_layer is 0; .*at least 1"),
    ({"vocab_size": -2}, "vocab_size is -2; .*at least 1"),
    ({"embed_dim": 0}, "embed_dim is 0"),
    ({"context_length": 1}, "context_length is 1; .*at least 2"),
    ({"augment": -0.1}, "augment is -0.1; .*at least 0"),
    ({"memory": -1}, "memory is -1; .*at least 0"),
    ({"end_token": -3}, "end_token is -3; .*at least -2"),
    ({"image_width": 25}, "image_width 25 .*image_head 3; use 24"),
    ({"text_width": 17}, "text_width 17 .*text_head 2; use 16"),
    ({"image_size": 10}, "image_size 10 .*patch_size 4; use 8"),
    ({"image_size": 9, "patch_size": 3, "stem": "conv"}, "patch_size is 3; .*power of 2"),
    ({"channels": 4}, "channels is 4; use 1 .* 3"),
    ({"image_mean": (0.5, 0.5)}, r"image_mean is \(0.5, 0.5\); give 1 number"),
    ({"channels": 3, "image_std": ()}, r"image_std is \(\); give 1 number, or 3"),
    ({"image_std": (0.0,)}, r"image_std is \(0.0,\); .*above 0"),
    ({"temperature": 0.0}, "temperature is 0.0; .*above 0"),
    ({"max_scale": -1.0}, "max_scale is -1.0; .*above 0"),
    ({"loss": "triplet"}, "loss is 'triplet'; use one of"),
    ({"stem": "linear"}, "stem is 'linear'; use one of"),
    ({"activation": "relu"}, "activation is 'relu'; use one of"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_mistakes_in_a_config(options, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**options)
    assert "\n" not in str(error.value)


def test_a_config_is_equal_after_json():
    """JSON has lists, which become tuples."""
    config = small(channels=3, image_mean=(0.1, 0.2, 0.3))
    assert replace(config, image_mean=[0.1, 0.2, 0.3]) == config
    assert CLIPConfig(**{**vars(config), "image_std": [0.5]}) == config
