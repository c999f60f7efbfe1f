"""What each exercise of lesson 9 must satisfy. Values worked out by hand stand in comments."""

import pytest
import torch
import torch.nn.functional as F

from course.compare import agree
from course.lessons import checks
from tinyfm.autoencoder import AutoencoderConfig
from tinyfm.clip import CLIPConfig
from tinyfm.ddpm import DiffusionConfig
from tinyfm.text2image import (
    TextToImage,
    TextToImageConfig,
    last_steps,
    match_means,
    with_correction,
)
from tinyfm.tokenizer import ByteTokenizer

END = 256
CONFIG = TextToImageConfig(
    DiffusionConfig(
        image_size=4, in_channels=2, channels=(8, 16), attend=(False, True), n_block=1, groups=4,
        n_head=2, d_context=16, clip=False, diffusion_steps=50,
    ),
    AutoencoderConfig(image_size=8, channels=(8, 16), latent_channels=2, groups=4, latent_mean=0.3),
    CLIPConfig(8, image_layer=1, vocab_size=257, context_length=6, text_layer=1, text_width=16),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> TextToImage:
    """A small system with random weights, also where they start at 0."""
    torch.manual_seed(0)
    system = TextToImage(CONFIG)
    with torch.no_grad():
        for p in system.parameters():
            p.add_(0.1 * torch.randn_like(p))
    system.tokenizer = ByteTokenizer()
    return system.eval()


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- the path -----------------------------------------------------------------------------------

PATH = [(t, 0.1 * (10 - t), 0.1 * t) for t in range(10, -1, -1)]  # 10 steps, 11 states


@checks("last_steps")
def test_a_share_of_the_steps_remains():
    # 10 steps: 0.3 of them are 3, from the state of t = 3 to that of t = 0.
    for strength, first in ((1.0, 10), (0.3, 3), (0.39, 3), (0.1, 1)):
        found = last_steps(PATH, strength)
        assert found[0][0] == first, f"strength {strength} starts at t = {first}: {found[0][0]}"
        assert found[-1] == PATH[-1], f"every path ends at {PATH[-1]}, not at {found[-1]}"
        steps = len(found) - 1
        assert steps == first, f"strength {strength} of 10 steps is {first} steps, not {steps}"


@checks("last_steps")
def test_a_strength_that_leaves_no_step_is_refused():
    for strength in (0.0, -0.5, 1.5, 0.09):
        with pytest.raises(ValueError, match=str(strength)):
            last_steps(PATH, strength)


# ---- texts --------------------------------------------------------------------------------------


@checks("TextToImage.encode_text")
def test_a_context_has_the_full_length(model):
    tokens = torch.tensor([[5, END], [7, END]])
    found = model.encode_text(tokens)
    assert found.shape == (2, 6, 16), f"(2, 6, 16) is expected, not {tuple(found.shape)}"
    assert found.dtype == torch.float32, f"contexts are float32, not {found.dtype}"


@checks("TextToImage.encode_text")
def test_end_tokens_fill_a_short_row(model):
    found = model.encode_text(torch.tensor([[5, END]]))
    filled = torch.tensor([[5, END, END, END, END, END]])
    agree(found, model.text_tower.states(filled), "the states of 5 and five end tokens")


@checks("TextToImage.encode_text")
def test_a_context_does_not_depend_on_its_batch(model):
    alone = model.encode_text(torch.tensor([[5, END]]))
    beside = model.encode_text(torch.tensor([[5, END, END, END], [5, 6, 7, END]]))
    agree(beside[:1], alone, "the context of a text beside a longer one")


@checks("TextToImage.encode_text")
def test_a_text_and_its_tokens_are_the_same(model):
    agree(model.encode_text("ab"), model.encode_text(model.tokenize("ab")), "the context of 'ab'")


@checks("TextToImage.null_context")
def test_negative_prompts_come_first(model):
    agree(model.null_context("ab"), model.encode_text("ab"), "the context of a negative prompt")


@checks("TextToImage.null_context")
def test_a_model_that_learned_a_null_context_needs_none(model):
    assert CONFIG.diffusion.learned_null
    found = model.null_context()
    assert found is None, f"the model learned its null context, so None is expected, not {found}"


@checks("TextToImage.null_context")
def test_without_a_learned_one_it_is_the_empty_text(model):
    object.__setattr__(CONFIG.diffusion, "learned_null", False)
    try:
        found = model.null_context()
    finally:
        object.__setattr__(CONFIG.diffusion, "learned_null", True)
    assert found is not None, "without a learned null context the empty text is needed, not None"
    agree(found, model.encode_text(""), "the context of an empty text")


# ---- corrections --------------------------------------------------------------------------------


def guess(x, t, alpha, sigma):
    """A denoiser that estimates x_0 = 0.5 everywhere."""
    x0 = torch.full_like(x, 0.5)
    return x0, (x - alpha * x0) / sigma


@checks("with_correction")
def test_the_noise_follows_from_the_corrected_estimate():
    x = torch.ones(1, 1, 1, 1)
    corrected = with_correction(guess, lambda x0: x0 + 0.5)
    x0, eps = corrected(x, 7, 0.8, 0.6)
    agree(x0.item(), 1.0, "x_0 = 0.5 + 0.5")
    # 1 = 0.8 * 1 + 0.6 eps.
    agree(eps.item(), 1 / 3, "the eps of x = 1, x_0 = 1, alpha = 0.8 and sigma = 0.6")


@checks("with_correction")
def test_x_is_what_the_two_make():
    x = images(2)
    x0, eps = with_correction(guess, lambda x0: 2 * x0 - 0.3)(x, 7, 0.3, 0.9)
    agree(0.3 * x0 + 0.9 * eps, x, "alpha x_0 + sigma eps")


@checks("with_correction")
def test_no_correction_changes_nothing():
    x = images(2)
    for found, expected in zip(with_correction(guess, lambda x0: x0)(x, 7, 0.6, 0.8),
                               guess(x, 7, 0.6, 0.8)):  # fmt: skip
        agree(found, expected, "x_0 and eps without a correction")


@checks("with_correction")
def test_the_denoiser_gets_all_it_needs():
    seen = []

    def watch(x, t, alpha, sigma):
        seen.append((t, alpha, sigma))
        return guess(x, t, alpha, sigma)

    with_correction(watch, lambda x0: x0)(images(1), 7, 0.6, 0.8)
    assert seen == [(7, 0.6, 0.8)], f"denoise should see t, alpha and sigma once: {seen}"


@checks("match_means")
def test_a_block_moves_to_the_mean_of_its_pixel():
    block = torch.tensor([[[[-1.0, 0.0], [0.0, 1.0]]]])
    # Mean 0, wanted 0.5: half of the way to white, so -1 -> 0, 0 -> 0.5, 1 -> 1.
    lighter = match_means(block, torch.tensor([[[[0.5]]]]))
    agree(lighter, [[[[0.0, 0.5], [0.5, 1.0]]]], "a block of mean 0 that should have mean 0.5")
    # Wanted -0.5: half of the way to black.
    darker = match_means(block, torch.tensor([[[[-0.5]]]]))
    agree(darker, [[[[-1.0, -0.5], [-0.5, 0.0]]]], "a block of mean 0 that should have mean -0.5")


@checks("match_means")
def test_all_blocks_get_their_means_and_no_pixel_leaves_the_range():
    drawn = images(3)
    small = torch.rand(3, 1, 2, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = match_means(drawn, small)
    agree(F.avg_pool2d(found, (4, 2)), small, "the means of blocks of 4 x 2")
    assert found.abs().max() <= 1 + 1e-6, f"pixels lie in [-1, 1], not {found.abs().max():.3f}"


@checks("match_means")
def test_blocks_that_fit_and_black_blocks_stay():
    drawn = images(1)
    agree(match_means(drawn, F.avg_pool2d(drawn, 4)), drawn, "an image whose means fit already")
    black = torch.full((1, 1, 4, 4), -1.0)
    agree(match_means(black, torch.full((1, 1, 2, 2), -1.0)), black, "black that should be black")


@checks("match_means")
def test_one_small_image_serves_all():
    drawn = images(3)
    small = torch.zeros(1, 1, 2, 2)
    agree(F.avg_pool2d(match_means(drawn, small), 4), torch.zeros(3, 1, 2, 2), "the means of all")


def masks() -> torch.Tensor:
    """Of 8 x 8 pixels a single one, at (3, 5), is to be drawn again."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3, 5] = 1
    return mask


@checks("TextToImage.keep_known")
def test_known_pixels_stay_and_the_others_are_drawn(model):
    picture, drawn = images(1), images(1, seed=1)
    _, correct_images = model.keep_known(picture, masks(), torch.zeros(1, 2, 4, 4))
    found = correct_images(drawn)
    expected = picture.clone()
    expected[..., 3, 5] = drawn[..., 3, 5]
    agree(found, expected, "the picture with one pixel from the drawing")


@checks("TextToImage.keep_known")
def test_a_latent_position_is_known_if_all_its_pixels_are(model):
    z, x0 = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    correct_x0, _ = model.keep_known(images(1), masks(), z)
    found = correct_x0(x0)
    # Pixel (3, 5) belongs to the position (1, 2) of a latent whose factor is 2.
    expected = z.clone()
    expected[..., 1, 2] = 1
    agree(found, expected, "z everywhere but at position (1, 2)")


@checks("TextToImage.keep_known")
def test_a_mask_above_a_half_counts_as_one(model):
    z, x0 = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    correct_x0, correct_images = model.keep_known(images(1), 0.6 * torch.ones(1, 1, 8, 8), z)
    agree(correct_x0(x0), x0, "with a mask of 0.6 everything is drawn again")
    drawn = images(1, seed=1)
    agree(correct_images(drawn), drawn, "with a mask of 0.6 every pixel is drawn again")


@checks("TextToImage.enlarge")
def test_an_enlarged_image_has_the_means_of_the_small_one(model):
    small = torch.zeros(1, 1, 4, 4)
    _, correct_images = model.enlarge(small)
    agree(F.avg_pool2d(correct_images(images(2)), 2), small.expand(2, -1, -1, -1), "block means")


@checks("TextToImage.enlarge")
@torch.no_grad()
def test_an_estimate_that_fits_stays_as_it_is(model):
    """The autoencoder is untrained, so encoding what it decodes does not give x_0 back."""
    x0 = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    small = F.avg_pool2d(model.decode(x0), 2)
    correct_x0, _ = model.enlarge(small)
    agree(correct_x0(x0), x0, "an estimate whose means are right already", 1e-4)


@checks("TextToImage.enlarge")
@torch.no_grad()
def test_an_estimate_moves_by_the_difference_of_two_encodings(model):
    x0 = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    small = torch.full((1, 1, 2, 2), 0.5)
    drawn = model.decode(x0)
    wanted = x0 + model.encode_images(match_means(drawn, small)) - model.encode_images(drawn)
    correct_x0, _ = model.enlarge(small)
    agree(correct_x0(x0), wanted, "x_0 + E(matched) - E(drawn)", 1e-4)


# ---- what holds them together -------------------------------------------------------------------

TOKENS = torch.tensor([[5, END], [7, END]])


def draw(model, seeds=(0, 1), tokens=TOKENS, **options) -> torch.Tensor:
    options = {"steps": 4, "guidance": 2.0, **options}
    own = [torch.Generator().manual_seed(seed) for seed in seeds]
    return model.generate(tokens, generators=own, **options)


def test_an_image_does_not_depend_on_its_batch(model):
    alone = draw(model, (1,), TOKENS[1:])
    agree(draw(model)[1:], alone, "the second image, drawn alone", 1e-4)


def test_inpainting_keeps_the_known_pixels_exactly(model):
    picture = images(1)
    found = draw(model, init_images=picture, mask=masks())
    outside = masks().expand(2, -1, -1, -1) == 0
    difference = (found - picture)[outside].abs().max()
    assert difference == 0, f"known pixels differ by up to {difference:.3g}"


def test_the_last_latent_holds_what_is_known(model, monkeypatch):
    decoded = []
    real = model.decode

    def watch(latents):
        decoded.append(latents)
        return real(latents)

    monkeypatch.setattr(model, "decode", watch)
    picture = images(1)
    draw(model, (0,), TOKENS[:1], init_images=picture, mask=masks())
    # The latent of the picture is drawn from the encoder first, by the same generator.
    z = model.encode_images(picture, [torch.Generator().manual_seed(0)])
    known = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    known[..., 1, 2] = False
    agree(decoded[-1][known], z[known], "the known part of the latent that is decoded")


def test_every_step_corrects_its_estimate(model, monkeypatch):
    seen = []
    real = model.corrections

    def watched(given, z):
        correct_x0, correct_images = real(given, z)

        def count(x0):
            seen.append(x0)
            return correct_x0(x0)

        return count, correct_images

    monkeypatch.setattr(model, "corrections", watched)
    draw(model, (0,), TOKENS[:1], init_images=images(1), mask=masks(), steps=4)
    assert len(seen) >= 4, f"4 steps correct at least 4 estimates, not {len(seen)}"


def test_inpainting_begins_with_noise_alone(model):
    """With a mask over everything nothing of the picture shows."""
    mask = torch.ones(1, 1, 8, 8)
    one = draw(model, init_images=images(1), mask=mask)
    two = draw(model, init_images=-images(1), mask=mask)
    agree(one, two, "the drawing under a mask over everything, from two pictures", 1e-4)


def test_an_upscaled_image_has_the_means_of_the_small_one(model):
    small = images(1)[..., :4, :4]
    found = draw(model, upscale=small, size=(8, 8))
    agree(F.avg_pool2d(found, 2), small.expand(2, -1, -1, -1), "block means after sampling", 1e-4)


def test_a_weak_edit_changes_less_than_a_strong_one(model):
    picture = images(1)
    z = model.encode_images(picture)
    path = model.diffusion.path(10, "ddim")
    starts = []
    for strength in (0.2, 0.9):
        x, rest, _ = model.first_state(
            {"init_images": picture}, 8, 8, path, strength, generators(1)
        )
        _, alpha, sigma = rest[0]
        assert len(rest) - 1 == int(10 * strength)
        starts.append((alpha, sigma))
        assert x.shape == z.shape
    assert starts[0][0] > starts[1][0], f"a weak edit starts with more of the image: {starts}"


def test_latents_are_standardised_and_restored(model):
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = model.decode(latents)
    expected = model.autoencoder.decode(latents / 1.0 + 0.3).clamp(-1, 1)
    agree(drawn, expected, "the image of a latent whose mean was 0.3 before", 1e-4)
    mean, _ = model.autoencoder.encode(images(1))
    agree(model.encode_images(images(1)), mean - 0.3, "the latent of an image", 1e-4)


def test_frozen_parts_stay_in_evaluation_mode(model):
    model.train()
    modes = {part.training for part in (model.text_tower, model.autoencoder)}
    model.eval()
    assert modes == {False}, "the text tower and the autoencoder are frozen and never train"
