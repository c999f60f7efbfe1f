"""Text-to-image: equality with a tiny StableDiffusionPipeline of diffusers, training, editing."""

import json
import shutil
from dataclasses import asdict, replace

import diffusers
import pytest
import torch
import transformers
from conftest import assert_equal_weights, count_parameters, edit_json, generators, normal
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from test_clip_tokenizer import MERGES_TXT, VOCAB, write_published
from torch.nn.functional import avg_pool2d
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tinyfm import text2image, tokenizer
from tinyfm.autoencoder import AutoencoderConfig
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.hub import stable_diffusion
from tinyfm.hub.tokenizers import clip_spec
from tinyfm.text2image import TextToImage, TextToImageConfig
from tinyfm.tokenizer import ClipTokenizer

diffusers.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers'

N = len(VOCAB)
LENGTH = 20
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SCHEDULERS = {
    "ddim": DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
    "dpm++": DPMSolverMultistepScheduler(**SCHEDULE),
    "ddpm": DDPMScheduler(**SCHEDULE, clip_sample=False),
}
PROMPTS = ["a photo of the cat", "naïve cats catch " * 9]  # the second is too long
OURS = TextToImageConfig(
    DiffusionConfig(
        image_size=8,
        in_channels=4,
        channels=(8, 16),
        attend=(False, True),
        n_block=1,
        groups=4,
        n_head=2,
        d_context=16,
        clip=False,
        out_channels=4,
    ),
    AutoencoderConfig(image_size=16, channels=(8, 16), groups=4, latent_mean=0.3, latent_scale=1.7),
    CLIPConfig(
        stem="patch", vocab_size=300, context_length=12, text_layer=1, text_width=16, text_head=2
    ),
)


def shake(model, matrices=0.03):
    """Add random numbers to all weights, also to those that start at one or zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim == 1 else matrices))
    return model.eval()


def make_ours(config=OURS, **diffusion):
    """A model with random weights and a byte tokenizer; fields of its diffusion may be changed."""
    diffusion = replace(config.diffusion, **diffusion)
    model = shake(TextToImage(replace(config, diffusion=diffusion)), 0.1)
    model.tokenizer = tokenizer.train("bytes", [], 257)
    return model


@pytest.fixture
def ours():
    return make_ours()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny Stable Diffusion 1, and the folder that it was saved to."""
    root = tmp_path_factory.mktemp("sd")
    write_published(root)
    text = CLIPTextConfig(
        vocab_size=N,
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=N - 2,
        eos_token_id=N - 1,
        pad_token_id=N - 1,
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(  # its sample_size is not that of the U-Net, as in some published folders
        block_out_channels=(8, 16),
        down_block_types=2 * ("DownEncoderBlock2D",),
        up_block_types=2 * ("UpDecoderBlock2D",),
        norm_num_groups=4,
        sample_size=512,
    )
    pipe = StableDiffusionPipeline(
        vae=shake(vae),
        text_encoder=shake(CLIPTextModel(text)),
        unet=shake(unet),
        tokenizer=CLIPTokenizer.from_pretrained(root, model_max_length=LENGTH),
        scheduler=SCHEDULERS["ddim"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(root / "saved")
    return pipe, root / "saved"


def drawn_by(kind, pipe, sampler, **inputs):
    """Images in [-1, 1] that a pipeline of class `kind` draws with the parts of `pipe`."""
    parts = pipe.components | {"scheduler": SCHEDULERS[sampler]}
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    images = 2 * pipe(PROMPTS, output_type="pt", **inputs).images - 1
    assert (images.abs() < 1).float().mean() > 0.9  # clamping would hide errors
    assert (images[0] - images[1]).abs().max() > 0.3
    return images


def assert_close(x, y, tolerance=1e-4):
    torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


# ---- against diffusers ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_published_folder_draws_the_same(published, sampler, guidance):
    pipe, folder = published
    model = TextToImage.from_pretrained(folder)
    noise = normal(2, 4, 8, 12)
    assert not model.training
    expected = drawn_by(
        StableDiffusionPipeline,
        pipe,
        sampler,
        guidance_scale=guidance,
        latents=noise,
        num_inference_steps=8,
        generator=generators(2),
    )
    drawn = model.generate(
        PROMPTS, noise, 8, guidance, sampler, generators=generators(2), size=(16, 24)
    )
    assert_close(drawn, expected)


def test_negative_prompts_as_in_diffusers(published):
    pipe, folder = published
    model = TextToImage.from_pretrained(folder)
    negative = ["a cat", "it !!"]
    expected = drawn_by(
        StableDiffusionPipeline,
        pipe,
        "dpm++",
        negative_prompt=negative,
        num_inference_steps=5,
        generator=generators(2),
        height=16,
        width=16,
    )
    drawn = model.generate(
        PROMPTS, None, 5, 7.5, "dpm++", negative=negative, generators=generators(2)
    )
    assert_close(drawn, expected)


@pytest.mark.parametrize("sampler, strength", [("ddim", 0.58), ("dpm++", 1.0)])
def test_image_to_image_as_in_diffusers(published, sampler, strength):
    pipe, folder = published
    model = TextToImage.from_pretrained(folder)
    images = normal(2, 3, 16, 16).clamp(-1, 1)
    steps = 50 if strength < 1 else 6
    expected = drawn_by(
        StableDiffusionImg2ImgPipeline,
        pipe,
        sampler,
        image=(images + 1) / 2,
        strength=strength,
        num_inference_steps=steps,
        generator=generators(2),
    )
    drawn = model.generate(
        PROMPTS,
        None,
        steps,
        sampler=sampler,
        generators=generators(2),
        init_images=images,
        strength=strength,
    )
    assert_close(drawn, expected)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_inpainting_as_in_diffusers(published, sampler):
    """Equal inside the mask. Outside, we keep the pixels; diffusers returns decoded latents."""
    pipe, folder = published
    model = TextToImage.from_pretrained(folder)
    images = normal(2, 3, 16, 16).clamp(-1, 1)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 6:14] = 1
    expected = drawn_by(
        StableDiffusionInpaintPipeline,
        pipe,
        sampler,
        image=(images + 1) / 2,
        mask_image=mask.expand(2, 1, 16, 16),
        strength=0.6,
        height=16,
        width=16,
        num_inference_steps=10,
        generator=generators(2),
    )
    drawn = model.generate(
        PROMPTS,
        None,
        10,
        7.5,
        sampler,
        generators=generators(2),
        init_images=images,
        mask=mask,
        strength=0.6,
    )
    assert_close(torch.where(mask > 0, drawn, 0), torch.where(mask > 0, expected, 0))
    assert torch.equal(torch.where(mask > 0, 0, drawn), torch.where(mask > 0, 0, images))


def test_export_loads_in_diffusers_and_returns_bit_for_bit(published, tmp_path):
    pipe, folder = published
    model = TextToImage.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    noise = normal(2, 4, 8, 8)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    for part in ("unet", "vae", "text_encoder"):
        assert_equal_weights(getattr(theirs, part), getattr(pipe, part))
    expected = drawn_by(
        StableDiffusionPipeline, theirs, "ddim", latents=noise, num_inference_steps=4
    )
    again = TextToImage.from_pretrained(tmp_path)
    assert again.config.clip == model.config.clip
    assert again.config.diffusion == model.config.diffusion
    assert_close(again.generate(PROMPTS, noise, 4), expected)
    assert torch.equal(again.generate(PROMPTS, noise, 4), model.generate(PROMPTS, noise, 4))


def test_files_of_older_versions(published, tmp_path):
    """Names of the text encoder start with text_model, and config.json calls its end token 2."""
    model = TextToImage.from_pretrained(published[1])
    model.save_pretrained(tmp_path)
    names = stable_diffusion.layout.read_tensors(tmp_path / "text_encoder")
    assert all(name.startswith("text_model.") for name in names)
    edit_json(tmp_path / "text_encoder" / "config.json", eos_token_id=2)
    again = TextToImage.from_pretrained(tmp_path)
    assert again.config.clip.end_token == -2
    assert torch.equal(again.encode_text(PROMPTS), model.encode_text(PROMPTS))


STABLE_DIFFUSION = TextToImageConfig(  # 1.4
    {
        "image_size": 64,
        "in_channels": 4,
        "channels": [320, 640, 1280, 1280],
        "n_head": 8,
        "attend": [True, True, True, False],
        "d_context": 768,
        "groups": 32,
        "clip": False,
    },
    {
        "image_size": 512,
        "in_channels": 3,
        "channels": [128, 256, 512, 512],
        "n_block": 2,
        "groups": 32,
        "latent_scale": 0.18215,
    },
    {
        "vocab_size": 49408,
        "context_length": 77,
        "text_layer": 12,
        "text_width": 768,
        "text_head": 12,
    },
)


def test_published_sizes(tmp_path):
    with torch.device("meta"):
        model = TextToImage(STABLE_DIFFUSION)
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        theirs = CLIPTextModel(CLIPTextConfig(**sizes))
    assert count_parameters(model.diffusion.unet) == 859_520_964
    assert count_parameters(model.autoencoder) == 83_653_863
    assert count_parameters(model.text_tower) == 123_060_480
    found = {name: p.shape for name, (_, p) in stable_diffusion.tower_tensors(model).items()}
    assert found == {f"text_model.{name}": p.shape for name, p in theirs.named_parameters()}
    theirs.config.save_pretrained(tmp_path)
    config = stable_diffusion.read_text_config(CLIPConfig, tmp_path)
    text = {name: value for name, value in asdict(config).items() if name.startswith("text")}
    assert text.items() <= asdict(STABLE_DIFFUSION.clip).items()
    assert (config.activation, config.end_token) == ("quick_gelu", 49407)


# ---- folders with and without an equal in diffusers ----------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"prediction": "flow"}, {"learned_null": False}])
def test_a_folder_of_a_model_that_diffusers_cannot_express(tmp_path, fields):
    model = make_ours(**fields)
    model.autoencoder.latent_mean.fill_(0.7)  # as if measured in training
    model.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path)
    noise = normal(2, 4, 8, 8)
    assert not (tmp_path / "model_index.json").exists()  # diffusers has no such pipeline
    assert again.config.diffusion == model.config.diffusion
    assert torch.equal(again.generate(PROMPTS, noise, 3), model.generate(PROMPTS, noise, 3))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in again.named_parameters() if p.requires_grad] == trained


def test_a_folder_of_a_model_that_diffusers_can_express(tmp_path):
    config = replace(
        OURS,
        autoencoder=replace(OURS.autoencoder, latent_mean=0.0, in_channels=3),
        clip=replace(OURS.clip, vocab_size=N),
    )
    model = make_ours(config, learned_null=False, spacing="leading", offset=1)
    model.save_pretrained(tmp_path, ClipTokenizer(clip_spec(VOCAB, MERGES_TXT)))
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    noise = normal(2, 4, 8, 8)
    assert theirs.tokenizer.model_max_length == 12
    model = TextToImage.from_pretrained(tmp_path)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPTS, latents=noise, num_inference_steps=4, output_type="pt").images
    assert_close((model.generate(PROMPTS, noise, 4) + 1) / 2, expected)

    # Latents with a mean that is not 0: diffusers cannot express them.
    model.autoencoder.latent_mean.fill_(0.5)
    model.save_pretrained(tmp_path / "mean")
    assert not (tmp_path / "mean" / "model_index.json").exists()

    # No tokenizer.
    model = make_ours(config)
    model.tokenizer = None
    with pytest.warns(UserWarning, match="without a tokenizer"):
        model.save_pretrained(tmp_path, overwrite=True)
    assert not (tmp_path / "model_index.json").exists()
    assert TextToImage.from_pretrained(tmp_path).tokenizer is None


def test_half_precision(published):
    model = TextToImage.from_pretrained(published[1], dtype=torch.bfloat16)
    exact = TextToImage.from_pretrained(published[1])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    noise = normal(2, 4, 8, 8)
    drawn = model.generate(PROMPTS, noise, 4, 3.0)
    expected = exact.generate(PROMPTS, noise, 4, 3.0)
    assert drawn.dtype == torch.float32
    assert (drawn - expected).abs().mean() < 0.05


def test_saves_that_are_refused(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model already"):
        ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no plain autoencoder"):
        plain = replace(OURS, autoencoder=replace(OURS.autoencoder, variational=False))
        make_ours(plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=f"{N} tokens, the model 300"):
        ours.save_pretrained(tmp_path / "new", ClipTokenizer(clip_spec(VOCAB, MERGES_TXT)))
    assert not (tmp_path / "plain").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "file, fields, message",
    [
        (
            "text_encoder/config.json",
            {"model_type": "clip"},
            "model_type is 'clip'; .*clip_text_model",
        ),
        ("text_encoder/config.json", {"intermediate_size": 5}, r"fc1.* not \(5, 24\)"),
        ("text_encoder/config.json", {"eos_token_id": [1]}, r"eos_token_id is \[1\]; .*one id"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "16 in all: .* missing"),
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": "!"},
            r"pad_token is '!'; supported: '<\|",
        ),
        ("tokenizer/tokenizer_config.json", {"pad_token": {"content": "!"}}, "pad_token is '!'"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, "is 77, but .* reads 20"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "diffusion.clip is True"),
        ("unet/config.json", {"cross_attention_dim": 32}, "tensors do not fit config.json"),
    ],
)
def test_folders_that_this_model_cannot_express(published, tmp_path, file, fields, message):
    shutil.copytree(published[1], tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / file, **fields)
    with pytest.raises(ValueError, match=message) as error:
        TextToImage.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# ---- training ------------------------------------------------------------------------------------


def test_only_the_denoiser_learns(ours):
    ours.train()
    assert ours.diffusion.training and ours.diffusion.unet.training
    assert not ours.text_tower.training and not ours.autoencoder.training
    batch = {"images": normal(3, 1, 16, 16).clamp(-1, 1), "tokens": ours.tokenize(["a", "b", ""])}
    loss, metrics = ours.loss(batch, generators(3))
    loss.backward()
    learns = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert learns == {f"diffusion.{name}" for name, _ in ours.diffusion.named_parameters()}
    assert metrics.keys() == {"loss_t0", "loss_t1", "loss_t2", "loss_t3"}


@pytest.mark.parametrize("learned", [True, False])
@torch.no_grad()
def test_encoded_latents_give_the_same_loss(learned):
    model = make_ours(learned_null=learned, context_dropout=0.5)
    images = normal(4, 1, 16, 16).clamp(-1, 1)
    tokens = model.tokenize([*PROMPTS, "", "a"])
    expected = model.loss({"images": images, "tokens": tokens}, generators(4))[0]
    encoded = {"latents": model.encode_images(images), "context": model.encode_text(tokens)}
    if not learned:
        encoded["null_context"] = model.encode_text("")
    model.tokenizer = None
    assert torch.equal(model.loss(encoded, generators(4))[0], expected)
    if not learned:
        with pytest.raises(ValueError, match="a text needs a tokenizer"):
            model.loss({"images": images, "tokens": tokens}, generators(4))
    assert model.loss(model.example_batch(2), generators(2))[0].isfinite()


@torch.no_grad()
def test_the_parts_compute_the_same_as_alone(ours):
    """The text tower is CLIP's, latents are standardised, and a draw has the encoder's variance."""
    images = normal(2, 1, 16, 16).clamp(-1, 1)
    tokens = ours.tokenize(PROMPTS)
    clip = CLIP(OURS.clip)
    clip.text_tower.load_state_dict(ours.text_tower.state_dict())
    states = ours.encode_text(tokens)
    summary = states[torch.arange(2), (tokens == 256).int().argmax(1)]
    assert_close(clip.text_tower(tokens), summary, 1e-5)
    mean, logvar = ours.autoencoder.encode(images)
    assert_close(ours.encode_images(images), (mean - 0.3) * 1.7, 1e-5)
    drawn = ours.encode_images(images, generators(2)) - ours.encode_images(images)
    eps = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators(2)])
    assert_close(drawn, 1.7 * (logvar / 2).exp() * eps, 1e-4)


def test_a_context_does_not_depend_on_the_batch(ours):
    together = ours.encode_text(["a", PROMPTS[0], ""])
    assert together.shape == (3, 12, 16)
    assert_close(together[:1], ours.encode_text("a"), 1e-6)
    assert_close(together[2:], ours.encode_text(torch.tensor([[256]])), 1e-6)


def test_a_prompt_that_is_too_long_is_cut(ours):
    rows = ours.tokenize(["x" * 50, "x"])
    assert rows.tolist() == [11 * [120] + [256], [120] + 11 * [256]]
    assert torch.equal(*ours.encode_text(["x" * 50, "x" * 11]))
    with pytest.raises(ValueError, match="13 tokens exceed context_length 12"):
        ours.encode_text(torch.zeros(1, 13, dtype=torch.long))


# ---- drawing -------------------------------------------------------------------------------------

IMAGES = normal(3, 1, 16, 24).clamp(-1, 1)
MASK = torch.zeros(1, 1, 16, 24)
MASK[..., 3:9, 5:] = 1  # its edges lie inside positions of the latent
TASKS = {
    "text": {"size": (16, 24)},
    "image": {"init_images": IMAGES},
    "mask": {"init_images": IMAGES, "mask": MASK.bool()},
    "small": {"upscale": avg_pool2d(IMAGES, 8), "size": (16, 24)},
}


def rows_of(options, rows):
    """The options with only these rows of the tensors that have one row per image."""
    chosen = dict(options)
    for name, x in options.items():
        if isinstance(x, torch.Tensor) and len(x) > 1:
            chosen[name] = x[rows]
    return chosen


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "heun"])
def test_an_image_does_not_depend_on_its_batch(task, sampler):
    model = make_ours(prediction="flow" if sampler == "heun" else "v", dropout=0.5).train()
    options = TASKS[task] | {"sampler": sampler, "steps": 4}
    together = model.generate(["a", "b", ""], generators=generators(3), **options)
    assert together.shape == (3, 1, 16, 24) and together.abs().max() <= 1
    second = slice(1, 2)
    alone = model.generate(["b"], generators=generators(3)[second], **rows_of(options, second))
    assert_close(together[1:2], alone, 1e-4)
    assert (together[0] - together[1]).abs().max() > 0.05
    assert model.diffusion.training  # as before; sampling itself uses no dropout


def test_without_images_it_is_diffusion_on_latents():
    ours = make_ours(variance="large")
    latents = ours.diffusion.sample(2, 5, "ddpm", 3.0, ours.encode_text(PROMPTS), generators(2))
    drawn = ours.generate(PROMPTS, None, 5, 3.0, "ddpm", generators=generators(2))
    assert_close(drawn, ours.decode(latents).detach(), 1e-4)
    torch.manual_seed(0)
    by_seed = [ours.generate(PROMPTS, steps=2) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(ours.generate(PROMPTS, steps=2), by_seed[0])
    assert not torch.equal(*by_seed)


def test_tokens_as_prompts_and_one_noise_for_all(ours):
    noise = normal(1, 4, 8, 8)
    tokens = ours.tokenize(PROMPTS)
    expected = ours.generate(PROMPTS, noise.repeat(2, 1, 1, 1), 3)
    ours.tokenizer = None
    assert torch.equal(ours.generate(tokens, noise, 3), expected)


def test_more_strength_changes_an_image_more(ours):
    options = {"steps": 10, "init_images": IMAGES[:1]}
    distances = []
    for strength in (0.1, 0.5, 1.0):
        drawn = ours.generate("a", generators=generators(1), strength=strength, **options)
        near = ours.decode(ours.encode_images(IMAGES[:1], generators(1)))
        distances.append((drawn - near).abs().mean().item())
    assert distances[0] < distances[1] < distances[2]
    default = ours.generate("a", generators=generators(1), **options)
    same = ours.generate("a", generators=generators(1), strength=0.8, **options)
    assert torch.equal(default, same)


def test_a_mask_keeps_pixels_exactly(ours):
    drawn = ours.generate(["a"] * 3, generators=generators(3), steps=3, **TASKS["mask"])
    known = (MASK == 0).expand_as(drawn)
    assert torch.equal(drawn[known], IMAGES[known])
    assert (drawn - IMAGES)[~known].abs().mean() > 0.1
    nothing = ours.generate("a", steps=3, init_images=IMAGES[:1], mask=torch.zeros(1, 1, 16, 24))
    assert torch.equal(nothing, IMAGES[:1])


def test_latents_outside_a_mask_are_kept(ours):
    z = ours.encode_images(IMAGES)
    correct_x0, _ = ours.corrections(TASKS["mask"], z)
    kept = (correct_x0(torch.full_like(z, 9.0)) == z).all(dim=1)[0]
    expected = torch.ones(8, 12, dtype=torch.bool)
    expected[1:5, 2:] = False  # positions with a pixel to draw
    assert torch.equal(kept, expected)


def test_the_first_state(ours):
    """With a mask it is pure noise, so that no image shows through, unless strength is below 1."""
    noise = normal(3, 4, 8, 12)
    path = ours.diffusion.path(10)
    for task, strength, left in (("mask", None, 10), ("mask", 0.5, 5), ("image", None, 8)):
        given = TASKS[task] | {"latents": noise}
        x, rest, z = ours.first_state(given, 16, 24, path, strength, generators(3))
        assert rest == path[10 - left :]
        _, alpha, sigma = rest[0]
        torch.testing.assert_close(x, noise if left == 10 else alpha * z + sigma * noise)


@pytest.mark.parametrize("h, w", [(2, 3), (16, 24), (8, 4)])
def test_an_enlarged_image_has_the_means_of_the_small_one(ours, h, w):
    small = avg_pool2d(IMAGES, (16 // h, 24 // w))
    small[0] = 1.0  # only white pixels have this mean
    small[1, :, 0] = -1.0
    drawn = ours.generate(["a"] * 3, steps=3, upscale=small, size=(16, 24))
    assert drawn.abs().max() <= 1 and drawn.isfinite().all()
    assert_close(avg_pool2d(drawn, (16 // h, 24 // w)), small, 1e-5)


def test_images_with_the_right_means_do_not_change():
    small = avg_pool2d(IMAGES, 4)
    assert_close(text2image.match_means(IMAGES, small), IMAGES, 1e-6)
    black = -torch.ones(1, 1, 4, 4)
    assert torch.equal(text2image.match_means(black, -torch.ones(1, 1, 1, 1)), black)


class Identity(torch.nn.Module):
    """An encoder or decoder that returns its input."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return x


def test_estimates_match_the_small_image():
    """Latents match as well as the autoencoder allows: exactly if it loses nothing."""
    config = TextToImageConfig(
        replace(OURS.diffusion, in_channels=1, out_channels=0),
        AutoencoderConfig(
            image_size=8,
            channels=(4,),
            latent_channels=1,
            groups=4,
            variational=False,
            latent_mean=0.2,
            latent_scale=0.5,
        ),
        OURS.clip,
    )
    model = make_ours(config)
    model.autoencoder.encoder = Identity()
    model.autoencoder.decoder = Identity()
    small = avg_pool2d(IMAGES[:, :, :8, :8], 4)
    correct_x0, _ = model.corrections({"upscale": small}, None)
    x0 = correct_x0(model.autoencoder.standardise(0.9 * normal(3, 1, 8, 8).clamp(-1, 1)))
    assert_close(avg_pool2d(model.decode(x0), 4), small, 1e-5)
    plain = Diffusion(config.diffusion).denoiser(torch.zeros(3, 12, 16))
    denoise = text2image.with_correction(plain, correct_x0)
    x = normal(3, 1, 8, 8)
    with torch.no_grad():
        x0, eps = denoise(x, 500, 0.6, 0.8)
    assert_close(0.6 * x0 + 0.8 * eps, x, 1e-5)


# ---- bad input -----------------------------------------------------------------------------------

SQUARE = IMAGES[:1, :, :, :16]
HOLE = MASK[..., :16]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": 0.0, "init_images": SQUARE}, "strength is 0.0; .*above 0"),
        ({"strength": 1.5, "init_images": SQUARE}, "strength is 1.5; .*at most"),
        ({"strength": -1, "init_images": SQUARE, "mask": HOLE}, "strength is -1; .*above 0"),
        ({"strength": float("nan"), "init_images": SQUARE}, "strength is nan"),
        ({"strength": 0.2, "init_images": SQUARE}, "strength is 0.2; .*one of 4 steps"),
        ({"strength": 0.5}, "strength is 0.5.*no image.*; give"),
        ({"init_images": SQUARE, "mask": MASK}, r"mask of \(1, 1, 16, 24\) must be .*1, 16, 16\)"),
        ({"init_images": SQUARE, "mask": HOLE[0]}, r"mask of \(1, 16, 16\) must be"),
        ({"mask": HOLE}, "a mask needs init_images"),
        ({"init_images": SQUARE, "upscale": SQUARE}, "upscale .*init_images; leave one out"),
        ({"guidance": -1.0}, "guidance is -1.0; .*0 or above"),
        ({"steps": 1001}, "1001 steps .*; use 1 to 1000"),
        ({"sampler": "euler"}, "euler .*flow; .*predicts v"),
        ({"init_images": normal(1, 3, 16, 16)}, r"3 channels .*takes 1 channel \(grey"),
        (
            {"init_images": normal(2, 1, 16, 16)},
            r"init_images of \(2, 1, 16, 16\) must be .*1, 16, 16\)",
        ),
        ({"init_images": SQUARE, "size": (16, 32)}, r"init_images of .*1, 16, 32\)"),
        ({"init_images": SQUARE[0]}, r"init_images of \(1, 16, 16\) must be"),
        ({"upscale": normal(1, 3, 8, 8)}, r"3 channels \(colour\)"),
        ({"upscale": normal(1, 1, 5, 8)}, "upscale of 5 x 8 .*16 x 16"),
        ({"upscale": normal(1, 1, 32, 32)}, "upscale of 32 x 32 .*16 x 16"),
        ({"size": (16, 18)}, "16 x 18 .*halved 2 times; .*16 x 16"),
        ({"latents": normal(1, 4, 16, 16)}, r"latents of .*4, 8, 8\)"),
        ({"generators": generators(2)}, "1 prompts?, 2 generators"),
        ({"negative": ["a", "b"]}, "2 negative prompts; give one"),
        ({"prompts": []}, "there are 0 prompts"),
    ],
)
def test_inputs_that_do_not_fit(ours, options, message):
    with pytest.raises(ValueError, match=message) as error:
        ours.generate(**{"prompts": ["a"], "steps": 4} | options)
    assert "\n" not in str(error.value)


def test_grey_images_to_a_colour_model(published):
    model = TextToImage.from_pretrained(published[1])
    message = r"1 channel .*takes 3 channels \(colour"
    with pytest.raises(ValueError, match=message):
        model.generate("a", init_images=SQUARE)
    with pytest.raises(ValueError, match=message):
        model.loss({"images": SQUARE, "tokens": model.tokenize("a")}, generators(1))


def test_a_text_needs_a_tokenizer(ours):
    ours.tokenizer = None
    with pytest.raises(ValueError, match="a text needs a tokenizer"):
        ours.generate("a cat")


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("autoencoder", {"latent_channels": 3}, "diffusion.in_channels is 4; .*3: autoencoder"),
        ("autoencoder", {"image_size": 32}, "diffusion.image_size is 8; .*16: autoencoder"),
        ("clip", {"text_width": 32}, "diffusion.d_context is 16; .*32: clip.text_width"),
        ("diffusion", {"clip": True}, "diffusion.clip is True; .*False"),
        ("clip", {"loss": "simclr"}, "no text tower; use 'infonce'"),
    ],
)
def test_parts_that_do_not_fit(part, fields, message):
    with pytest.raises(ValueError, match=message):
        replace(OURS, **{part: replace(getattr(OURS, part), **fields)})


def test_a_config_is_equal_after_json():
    for config in (OURS, TextToImageConfig()):
        assert TextToImageConfig(**json.loads(json.dumps(asdict(config)))) == config
