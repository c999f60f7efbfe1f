"""VQ-VAE: equality with VQModel of diffusers and the quantiser of EnCodec, quantisation and revival
by hand, errors."""

from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import assert_equal_weights, count_parameters, edit_json, normal, random_weights
from diffusers import VQModel
from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

from tinyfm.vq import (
    VQVAE,
    Quantizer,
    VQConfig,
    count_codes,
    find_nearest,
    find_nearest_slowly,
    follow_averages,
    perplexity,
    split_cells,
    straight_through,
)

diffusers.logging.set_verbosity_error()
SIZES = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": (8, 16), "layers_per_block": 2, "norm_num_groups": 4,
    "num_vq_embeddings": 30, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
TINY = VQConfig(
    image_size=8, channels=(8, 16), groups=4, latent_channels=4, n_code=16, attention=False
)


@pytest.fixture(scope="module", params=[{}, {"mid_block_add_attention": False}])
def published(request, tmp_path_factory):
    """A model of diffusers, and a folder that it was saved to."""
    model = random_weights(lambda: VQModel(**SIZES | request.param), matrices=0.05)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return model, folder


# ---- against diffusers --------------------------------------------------------------------------


def assert_same(ours, theirs):
    """Equal codes, pictures and terms of the loss.

    The quantiser of diffusers has beta on the term of the codebook, unless legacy is False.
    """
    theirs.quantize.legacy = False
    images = normal(2, 3, 16, 24).clamp(-1, 1)
    with torch.no_grad():
        z = theirs.encode(images).latents
        _, loss, (_, _, codes) = theirs.quantize(z)
        expected = theirs(images).sample
        _, metrics = ours.loss({"images": images})
        torch.testing.assert_close(ours.to_vectors(images), z, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.encode(images).flatten(), codes)
        torch.testing.assert_close(ours.decode(ours.encode(images)), expected, atol=1e-4, rtol=1e-4)
    assert len(codes.unique()) > 3 and expected.std() > 0.05
    quantisation = (metrics["codebook"] + 0.25 * metrics["commitment"]) * 2 / z.numel()
    torch.testing.assert_close(quantisation, loss, rtol=1e-4, atol=0)
    reconstruction = (expected - images).square().sum() / 4
    torch.testing.assert_close(metrics["reconstruction"], reconstruction, rtol=1e-4, atol=0)


def test_codes_and_pictures_of_a_published_folder(published):
    theirs, folder = published
    ours = VQVAE.from_pretrained(folder)
    assert not ours.training
    assert count_parameters(ours) == theirs.num_parameters()
    assert_same(ours, theirs)


def test_export_loads_in_diffusers_and_returns_bit_for_bit(published, tmp_path):
    _, folder = published
    ours = VQVAE.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    exported, info = VQModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, exported)
    again = VQVAE.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_equal_weights(again, ours)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'; .*VQModel"),
        ({"norm_type": "spatial"}, "norm_type is 'spatial'; supported: 'group'"),
        ({"vq_embed_dim": 8}, "vq_embed_dim is 8; supported: latent_channels, 4"),
        ({"num_vq_embeddings": 31}, "tensors do not fit config.json"),
    ],
)
def test_folders_that_the_config_cannot_express(fields, message, published, tmp_path):
    VQVAE.from_pretrained(published[1]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **fields)
    with pytest.raises(ValueError, match=message) as error:
        VQVAE.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_several_codebooks_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match=r"n_book is 2; .*--model.n-book 1"):
        VQVAE(replace(TINY, n_book=2)).save_pretrained(tmp_path)


@torch.no_grad()
def test_residual_codes_of_sounds_are_those_of_encodec():
    """Q = 3 codebooks, for vectors along one axis; the first two alone for a lower bandwidth."""
    torch.manual_seed(0)
    ours = Quantizer(replace(TINY, n_book=3))
    config = SimpleNamespace(codebook_size=16, codebook_dim=4, frame_rate=75, num_quantizers=3)
    theirs = EncodecResidualVectorQuantizer(config)
    for layer, book in zip(theirs.layers, ours.codebooks):
        layer.codebook.embed.copy_(book.weight)
    z = 0.2 * normal(2, 4, 50)
    codes = theirs.encode(z)  # (Q, B, T)
    assert torch.equal(ours.encode(z), codes.transpose(0, 1))
    assert min(len(book.unique()) for book in codes) > 8
    torch.testing.assert_close(ours.decode(codes.transpose(0, 1)), theirs.decode(codes))
    fewer = theirs.encode(z, bandwidth=2 * 4 * 75 / 1000)
    assert torch.equal(ours.encode(z)[:, :2], fewer.transpose(0, 1))


# ---- quantisation -------------------------------------------------------------------------------


def test_the_fast_search_finds_what_the_slow_one_finds():
    x = normal(200, 5)
    codebook = normal(30, 5, seed=1)
    assert torch.equal(find_nearest(x, codebook), find_nearest_slowly(x, codebook))
    assert torch.equal(find_nearest(codebook, codebook), torch.arange(30))


def test_the_gradient_goes_straight_through():
    z = normal(2, 3).requires_grad_()
    e = normal(2, 3, seed=1).requires_grad_()
    y = straight_through(z, e)
    assert torch.allclose(y, e)
    slope = normal(2, 3, seed=2)
    (y * slope).sum().backward()
    assert torch.equal(z.grad, slope)
    assert e.grad is None


def test_gradients_of_the_terms_by_hand():
    """The codebook term moves the codes alone, 2 n (e - mean) each; the commitment z alone."""
    torch.manual_seed(0)
    quantizer = Quantizer(TINY)
    z = normal(3, 4, 5).requires_grad_()  # places along one axis, as those of a sound
    _, codes, codebook, commitment = quantizer(z)
    assert codes.shape == (3, 1, 5)
    x = z.detach().movedim(1, -1).flatten(0, 1)  # (n, Z)
    book = quantizer.codebooks[0].weight
    (by_code,) = torch.autograd.grad(codebook, book)
    for k in range(16):
        chosen = x[codes.flatten() == k]
        expected = 2 * (book[k] - chosen).sum(0)
        torch.testing.assert_close(by_code[k], expected, atol=1e-5, rtol=1e-5)
    (by_z,) = torch.autograd.grad(commitment, z)
    expected = 2 * (z - quantizer.decode(codes))
    torch.testing.assert_close(by_z, expected.detach(), atol=1e-5, rtol=1e-5)


def test_each_codebook_quantises_what_is_left():
    torch.manual_seed(0)
    quantizer = Quantizer(replace(TINY, n_book=3))
    z = 0.2 * normal(2, 4, 3, 3)
    codes = quantizer.encode(z)
    assert codes.shape == (2, 3, 3, 3)
    left = z
    errors = []
    for q, book in enumerate(quantizer.codebooks):
        nearest = find_nearest_slowly(left.movedim(1, -1).reshape(-1, 4), book.weight)
        assert torch.equal(codes[:, q].flatten(), nearest)
        left = left - book(codes[:, q]).movedim(-1, 1)
        errors.append(left.square().sum().item())
    torch.testing.assert_close(z - quantizer.decode(codes), left)
    assert errors == sorted(errors, reverse=True)


def test_perplexity_and_counts():
    codes = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [3, 3]]])[:, None]  # (B, 1, h, w)
    assert count_codes(codes, 5).tolist() == [[2, 2, 1, 3, 0]]
    assert perplexity(torch.tensor([3.0, 3, 3, 0])).item() == pytest.approx(3)
    assert perplexity(torch.tensor([5.0, 0])).item() == pytest.approx(1)


def test_codes_that_follow_averages():
    """Appendix A.1 of the paper, by hand; nothing moves in evaluation mode."""
    torch.manual_seed(0)
    codebook = normal(3, 2)
    counts = torch.ones(3)
    sums = codebook.clone()
    x = torch.tensor([[1.0, 0], [3, 0]])
    expected = codebook.clone()
    expected[1] = (0.9 * codebook[1] + 0.1 * x.sum(0)) / (0.9 + 0.1 * 2)
    follow_averages(codebook, counts, sums, x, torch.tensor([1, 1]), 0.9)
    torch.testing.assert_close(codebook, expected)
    model = VQVAE(replace(TINY, ema_decay=0.9))
    before = model.quantizer.codebooks[0].weight.clone()
    model.eval().loss({"images": normal(2, 1, 8, 8)})
    assert torch.equal(model.quantizer.codebooks[0].weight, before)
    loss, metrics = model.train().loss({"images": normal(2, 1, 8, 8)})
    assert not torch.equal(model.quantizer.codebooks[0].weight, before)
    without = metrics["reconstruction"] + 0.25 * metrics["commitment"]
    assert loss.item() == pytest.approx(without.item())


# ---- revival ------------------------------------------------------------------------------------


def test_dead_codes_move_next_to_those_with_the_largest_gradients():
    codebook = normal(5, 3)
    before = codebook.clone()
    gradient = torch.zeros(5, 3)
    gradient[1, 0] = 2.0
    gradient[3, 1] = -5.0
    split_cells(codebook, gradient, torch.tensor([0, 2, 4]))
    step = 0.01 * before.std()
    torch.testing.assert_close(codebook[0], before[3] + step * torch.tensor([0.0, 1, 0]))
    torch.testing.assert_close(codebook[2], before[1] - step * torch.tensor([1.0, 0, 0]))
    for k in (1, 3, 4):  # the third dead code finds no other with a gradient
        assert torch.equal(codebook[k], before[k])


def train_steps(model, parts, steps=6):
    """Train on random pictures, each batch cut into so many parts."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        for images in normal(8, 1, 8, 8, seed=step).chunk(parts):
            loss, _ = model.loss({"images": images})
            (loss / parts).backward()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()


def test_revival_does_not_depend_on_micro_batches():
    models = []
    for parts in (1, 4):
        torch.manual_seed(0)
        models.append(VQVAE(replace(TINY, dead_after=2)))
        train_steps(models[-1], parts)
    torch.manual_seed(0)
    untouched = VQVAE(replace(TINY, dead_after=0))
    train_steps(untouched, 1)
    one, four, none = (m.quantizer.codebooks[0].weight for m in (*models, untouched))
    torch.testing.assert_close(one, four, atol=1e-5, rtol=1e-4)
    assert torch.equal(models[0].quantizer.idle, models[1].quantizer.idle)
    moved = (one - none).abs().amax(1) > 0.01
    assert 0 < moved.sum() < 16
    assert not untouched.quantizer.idle.any()


def test_codes_are_moved_after_the_steps_without_use():
    torch.manual_seed(0)
    quantizer = Quantizer(replace(TINY, dead_after=3))
    book = quantizer.codebooks[0].weight
    before = book.detach().clone()
    for step in range(1, 4):
        book.grad = torch.zeros(16, 4)
        book.grad[:4] = normal(4, 4, seed=step)  # the first four are used
        quantizer.revive()
        assert torch.equal(book, before) == (step < 3)
    moved = (book != before).any(1)
    assert moved.tolist() == 4 * [False] + 4 * [True] + 8 * [False]
    assert not quantizer.idle.any()  # those that found no place wait again


def test_it_learns_and_uses_its_codes():
    """Four pictures of four vectors each, from a codebook of which one code is used at first."""
    torch.manual_seed(0)
    model = VQVAE(replace(TINY, dead_after=5))
    with torch.no_grad():
        model.quantizer.codebooks[0].weight[1:] += 100
    images = normal(4, 1, 8, 8, seed=3).clamp(-1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    assert len(model.encode(images).unique()) == 1
    terms = []
    for _ in range(100):
        loss, metrics = model.loss({"images": images})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        terms.append(metrics["reconstruction"].item())
    assert len(model.encode(images).unique()) > 8
    assert terms[-1] < 0.3 * terms[0]


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_code": 1}, "n_code is 1; .*at least 2"),
        ({"n_book": 0}, "n_book is 0; .*at least 1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; .*below 1"),
        ({"channels": (8, 18)}, "18 channels cannot be divided by groups 4"),
        ({"image_size": 9}, "9 x 9 .*halved 1 times"),
    ],
)
def test_configs_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


def test_codes_and_images_that_do_not_fit():
    model = VQVAE(TINY)
    for code in (16, -1):
        with pytest.raises(ValueError, match=f"no code {code}: the codebook has 0 to 15"):
            model.decode(torch.full((1, 1, 4, 4), code))
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\); they must be \(B, 1, places"):
        model.decode(torch.zeros(1, 2, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"3 channels .*takes 1 channel \(grey"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="9 x 8 cannot be halved"):
        model.loss({"images": torch.zeros(1, 1, 9, 8)})
