"""Text-to-image: a tiny StableDiffusionPipeline of diffusers is the oracle, offline."""

import json
import re
import shutil
from dataclasses import asdict, replace

import diffusers
import pytest
import torch
import transformers
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
    DiffusionConfig(image_size=8, in_channels=4, channels=(8, 16), attend=(False, True), n_block=1,
                    groups=4, n_head=2, d_context=16, clip=False, out_channels=4),
    AutoencoderConfig(image_size=16, channels=(8, 16), groups=4, latent_mean=0.3, latent_scale=1.7),
    CLIPConfig(stem="patch", vocab_size=300, context_length=12, text_layer=1, text_width=16,
               text_head=2),
)  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(n, first=0):
    return [torch.Generator().manual_seed(i) for i in range(first, first + n)]


def shake(model, matrices=0.03, rest=0.2):
    """Make all weights random, also those of norms, biases and layers that start at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (rest if p.ndim == 1 else matrices))
    return model.eval()


def make_ours(config=OURS, **diffusion):
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
        vocab_size=N, hidden_size=24, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=N - 2,
        eos_token_id=N - 1, pad_token_id=N - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        attention_head_dim=4, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(  # trained at another size than the U-Net's, as some are
        block_out_channels=(8, 16), down_block_types=2 * ("DownEncoderBlock2D",),
        up_block_types=2 * ("UpDecoderBlock2D",), norm_num_groups=4, sample_size=512,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=shake(vae), text_encoder=shake(CLIPTextModel(text)), unet=shake(unet),
        tokenizer=CLIPTokenizer.from_pretrained(root, model_max_length=LENGTH),
        scheduler=SCHEDULERS["ddim"], safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(root / "saved")
    return pipe, root / "saved"


def drawn_by(kind, pipe, sampler, **inputs):
    """Images in [-1, 1] by a pipeline of class `kind`, with the parts of `pipe`."""
    parts = pipe.components | {"scheduler": SCHEDULERS[sampler]}
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    images = 2 * pipe(PROMPTS, output_type="pt", **inputs).images - 1
    assert (images.abs() < 1).float().mean() > 0.9  # else clamping would hide errors
    assert (images[0] - images[1]).abs().max() > 0.3
    return images


def assert_close(x, y, tolerance=1e-4):
    torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_published_folder_draws_the_same(published, sampler, guidance):
    pipe, folder = published
    model, noise = TextToImage.from_pretrained(folder), random(2, 4, 8, 12)
    assert not model.training
    expected = drawn_by(StableDiffusionPipeline, pipe, sampler, guidance_scale=guidance,
                        latents=noise, num_inference_steps=8, generator=generators(2))  # fmt: skip
    drawn = model.generate(PROMPTS, noise, 8, guidance, sampler, generators=generators(2),
                           size=(16, 24))  # fmt: skip
    assert_close(drawn, expected)


def test_negative_prompts_as_in_diffusers(published):
    pipe, folder = published
    model, negative = TextToImage.from_pretrained(folder), ["a cat", "it !!"]
    expected = drawn_by(StableDiffusionPipeline, pipe, "dpm++", negative_prompt=negative,
                        num_inference_steps=5, generator=generators(2), height=16,
                        width=16)  # fmt: skip
    drawn = model.generate(PROMPTS, None, 5, 7.5, "dpm++", negative=negative,
                           generators=generators(2))  # fmt: skip
    assert_close(drawn, expected)


@pytest.mark.parametrize("sampler, strength", [("ddim", 0.58), ("dpm++", 1.0)])
def test_image_to_image_as_in_diffusers(published, sampler, strength):
    pipe, folder = published
    images = random(2, 3, 16, 16).clamp(-1, 1)
    expected = drawn_by(StableDiffusionImg2ImgPipeline, pipe, sampler, image=(images + 1) / 2,
                        strength=strength, num_inference_steps=50 if strength < 1 else 6,
                        generator=generators(2))  # fmt: skip
    drawn = TextToImage.from_pretrained(folder).generate(
        PROMPTS, None, 50 if strength < 1 else 6, sampler=sampler, generators=generators(2),
        init_images=images, strength=strength)  # fmt: skip
    assert_close(drawn, expected)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_inpainting_as_in_diffusers(published, sampler):
    """Compare inside the mask; outside, diffusers returns what the autoencoder decodes."""
    pipe, folder = published
    images, mask = random(2, 3, 16, 16).clamp(-1, 1), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 6:14] = 1
    expected = drawn_by(StableDiffusionInpaintPipeline, pipe, sampler, image=(images + 1) / 2,
                        mask_image=mask.expand(2, 1, 16, 16), strength=0.6, height=16, width=16,
                        num_inference_steps=10, generator=generators(2))  # fmt: skip
    drawn = TextToImage.from_pretrained(folder).generate(
        PROMPTS, None, 10, 7.5, sampler, generators=generators(2), init_images=images, mask=mask,
        strength=0.6)  # fmt: skip
    assert_close(torch.where(mask > 0, drawn, 0), torch.where(mask > 0, expected, 0))
    assert torch.equal(torch.where(mask > 0, 0, drawn), torch.where(mask > 0, 0, images))


def test_export_loads_in_diffusers_and_returns_bit_for_bit(published, tmp_path):
    pipe, folder = published
    model = TextToImage.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    theirs, noise = StableDiffusionPipeline.from_pretrained(tmp_path), random(2, 4, 8, 8)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    for name in ("unet", "vae", "text_encoder"):
        old, new = (getattr(x, name).state_dict() for x in (pipe, theirs))
        assert old.keys() == new.keys() and all(torch.equal(old[n], t) for n, t in new.items())
    expected = drawn_by(StableDiffusionPipeline, theirs, "ddim", latents=noise,
                        num_inference_steps=4)  # fmt: skip
    again = TextToImage.from_pretrained(tmp_path)
    assert again.config.clip == model.config.clip
    assert again.config.diffusion == model.config.diffusion
    assert_close(again.generate(PROMPTS, noise, 4), expected)
    assert torch.equal(again.generate(PROMPTS, noise, 4), model.generate(PROMPTS, noise, 4))


def test_files_of_older_versions(published, tmp_path):
    """The names of the text encoder start with text_model, and its end token is given as 2."""
    model = TextToImage.from_pretrained(published[1])
    model.save_pretrained(tmp_path)
    names = stable_diffusion.layout.read_tensors(tmp_path / "text_encoder")
    assert all(name.startswith("text_model.") for name in names)
    path = tmp_path / "text_encoder" / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": 2}
    path.write_text(json.dumps(raw), encoding="utf-8")
    again = TextToImage.from_pretrained(tmp_path)
    assert again.config.clip.end_token == -2
    assert torch.equal(again.encode_text(PROMPTS), model.encode_text(PROMPTS))


STABLE_DIFFUSION = TextToImageConfig(  # 1.4
    {"image_size": 64, "in_channels": 4, "channels": [320, 640, 1280, 1280], "n_head": 8,
     "attend": [True, True, True, False], "d_context": 768, "groups": 32, "clip": False},
    {"image_size": 512, "in_channels": 3, "channels": [128, 256, 512, 512], "n_block": 2,
     "groups": 32, "latent_scale": 0.18215},
    {"vocab_size": 49408, "context_length": 77, "text_layer": 12, "text_width": 768,
     "text_head": 12},
)  # fmt: skip


def test_published_sizes(tmp_path):
    with torch.device("meta"):
        model = TextToImage(STABLE_DIFFUSION)
        theirs = CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12))  # fmt: skip
    parts = (model.diffusion.unet, model.autoencoder, model.text_tower)
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]
    found = {name: p.shape for name, (_, p) in stable_diffusion.tower_tensors(model).items()}
    assert found == {f"text_model.{name}": p.shape for name, p in theirs.named_parameters()}
    theirs.config.save_pretrained(tmp_path)
    config = stable_diffusion.read_text_config(CLIPConfig, tmp_path)
    text = {name: value for name, value in asdict(config).items() if name.startswith("text")}
    assert text.items() <= asdict(STABLE_DIFFUSION.clip).items()
    assert (config.activation, config.end_token) == ("quick_gelu", 49407)


# ---- folders that diffusers cannot read ---------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"prediction": "flow"}, {"learned_null": False}])
def test_a_model_that_diffusers_cannot_express_returns(tmp_path, fields):
    model = make_ours(**fields)
    model.autoencoder.latent_mean.fill_(0.7)  # as if measured in training
    model.save_pretrained(tmp_path)
    again = TextToImage.from_pretrained(tmp_path)
    noise = random(2, 4, 8, 8)
    assert not (tmp_path / "model_index.json").exists()  # diffusers has no such pipeline
    assert again.config.diffusion == model.config.diffusion
    assert torch.equal(again.generate(PROMPTS, noise, 3), model.generate(PROMPTS, noise, 3))
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


def test_a_model_that_diffusers_can_express(tmp_path):
    config = replace(OURS, autoencoder=replace(OURS.autoencoder, latent_mean=0.0, in_channels=3),
                     clip=replace(OURS.clip, vocab_size=N))  # fmt: skip
    model = make_ours(config, learned_null=False, spacing="leading", offset=1)
    model.save_pretrained(tmp_path, ClipTokenizer(clip_spec(VOCAB, MERGES_TXT)))
    theirs, noise = StableDiffusionPipeline.from_pretrained(tmp_path), random(2, 4, 8, 8)
    assert theirs.tokenizer.model_max_length == 12
    model = TextToImage.from_pretrained(tmp_path)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(PROMPTS, latents=noise, num_inference_steps=4, output_type="pt").images
    assert_close((model.generate(PROMPTS, noise, 4) + 1) / 2, expected)
    model.autoencoder.latent_mean.fill_(0.5)
    model.save_pretrained(tmp_path / "mean")
    assert not (tmp_path / "mean" / "model_index.json").exists()
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
    drawn, expected = (m.generate(PROMPTS, random(2, 4, 8, 8), 4, 3.0) for m in (model, exact))
    assert drawn.dtype == torch.float32
    assert (drawn - expected).abs().mean() < 0.05


def test_folders_are_kept_and_refused(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model already"):
        ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="diffusers has no plain autoencoder"):
        plain = replace(OURS, autoencoder=replace(OURS.autoencoder, variational=False))
        make_ours(plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=f"the tokenizer has {N} tokens, the model 300"):
        ours.save_pretrained(tmp_path / "new", ClipTokenizer(clip_spec(VOCAB, MERGES_TXT)))
    assert not (tmp_path / "plain").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "file, fields, message",
    [
        ("text_encoder/config.json", {"model_type": "clip"}, "model_type is 'clip'; .*clip_text_"),
        ("text_encoder/config.json", {"intermediate_size": 5}, "intermediate_size is 5; .*96, 4 t"),
        ("text_encoder/config.json", {"eos_token_id": [1]}, r"eos_token_id is \[1\]; .*one id"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "16 tensors .* missing"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}, "pad_token is '!'; supported: '<|"),
        ("tokenizer/tokenizer_config.json", {"pad_token": {"content": "!"}}, "pad_token is '!'"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, "is 77, but .* reads 20"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, "diffusion.clip is True"),
        ("unet/config.json", {"cross_attention_dim": 32}, "tensors do not fit config.json"),
    ],
)
def test_folders_that_this_model_cannot_express(published, tmp_path, file, fields, message):
    shutil.copytree(published[1], tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / file).read_text(encoding="utf-8")) | fields
    (tmp_path / file).write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        TextToImage.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# ---- training ------------------------------------------------------------------------------------


def test_only_the_denoiser_learns(ours):
    ours.train()
    assert ours.diffusion.training and ours.diffusion.unet.training
    assert not ours.text_tower.training and not ours.autoencoder.training
    batch = {"images": random(3, 1, 16, 16).clamp(-1, 1), "tokens": ours.tokenize(["a", "b", ""])}
    loss, metrics = ours.loss(batch, generators(3))
    loss.backward()
    learns = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert learns == {f"diffusion.{name}" for name, _ in ours.diffusion.named_parameters()}
    assert metrics.keys() == {"loss_t0", "loss_t1", "loss_t2", "loss_t3"}


@pytest.mark.parametrize("learned", [True, False])
@torch.no_grad()
def test_latents_encoded_beforehand_give_the_same_loss(learned):
    model = make_ours(learned_null=learned, context_dropout=0.5)
    images, tokens = random(4, 1, 16, 16).clamp(-1, 1), model.tokenize([*PROMPTS, "", "a"])
    expected = model.loss({"images": images, "tokens": tokens}, generators(4))[0]
    made = {"latents": model.encode_images(images), "context": model.encode_text(tokens)}
    if not learned:
        made["null_context"] = model.encode_text("")
    model.tokenizer = None
    assert torch.equal(model.loss(made, generators(4))[0], expected)
    if not learned:
        with pytest.raises(ValueError, match="a text needs a tokenizer"):
            model.loss({"images": images, "tokens": tokens}, generators(4))
    assert model.loss(model.example_batch(2), generators(2))[0].isfinite()


@torch.no_grad()
def test_the_parts_compute_what_their_families_do(ours):
    """The text tower is CLIP's, latents are standardised, and a draw has the encoder's variance."""
    images, tokens = random(2, 1, 16, 16).clamp(-1, 1), ours.tokenize(PROMPTS)
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

IMAGES = random(3, 1, 16, 24).clamp(-1, 1)
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
def test_a_picture_does_not_depend_on_its_batch(task, sampler):
    model = make_ours(prediction="flow" if sampler == "heun" else "v", dropout=0.5).train()
    prompts, options = ["a", "b", ""], TASKS[task] | {"sampler": sampler, "steps": 4}
    together = model.generate(prompts, generators=generators(3), **options)
    assert together.shape == (3, 1, 16, 24) and together.abs().max() <= 1
    alone = model.generate(["b"], generators=generators(1, 1), **rows_of(options, slice(1, 2)))
    assert_close(together[1:2], alone, 1e-4)
    assert (together[0] - together[1]).abs().max() > 0.05
    assert model.diffusion.training  # the mode of before; sampling itself used no dropout


def test_without_pictures_it_is_diffusion_on_latents():
    ours = make_ours(variance="large")
    latents = ours.diffusion.sample(2, 5, "ddpm", 3.0, ours.encode_text(PROMPTS), generators(2))
    drawn = ours.generate(PROMPTS, None, 5, 3.0, "ddpm", generators=generators(2))
    assert_close(drawn, ours.decode(latents).detach(), 1e-4)
    torch.manual_seed(0)
    by_seed = [ours.generate(PROMPTS, steps=2) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(ours.generate(PROMPTS, steps=2), by_seed[0])
    assert not torch.equal(*by_seed)


def test_tokens_and_one_row_for_all(ours):
    noise, tokens = random(1, 4, 8, 8), ours.tokenize(PROMPTS)
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
    default, same = (ours.generate("a", generators=generators(1), **options, **more)
                     for more in ({}, {"strength": 0.8}))  # fmt: skip
    assert torch.equal(default, same)


def test_a_mask_keeps_pixels_exactly(ours):
    drawn = ours.generate(["a"] * 3, generators=generators(3), steps=3, **TASKS["mask"])
    known = (MASK == 0).expand_as(drawn)
    assert torch.equal(drawn[known], IMAGES[known])
    assert (drawn - IMAGES)[~known].abs().mean() > 0.1
    nothing = ours.generate("a", steps=3, init_images=IMAGES[:1], mask=torch.zeros(1, 1, 16, 24))
    assert torch.equal(nothing, IMAGES[:1])


def test_latents_outside_a_mask_are_kept(ours):
    z, given = ours.encode_images(IMAGES), TASKS["mask"]
    correct_x0, _ = ours.corrections(given, z)
    kept = (correct_x0(torch.full_like(z, 9.0)) == z).all(dim=1)[0]
    expected = torch.ones(8, 12, dtype=torch.bool)
    expected[1:5, 2:] = False  # each position with a pixel to draw
    assert torch.equal(kept, expected)


def test_the_first_state(ours):
    """With a mask it is noise alone, so that nothing shows through, unless strength is below 1."""
    noise, path = random(3, 4, 8, 12), ours.diffusion.path(10)
    for task, strength, left in (("mask", None, 10), ("mask", 0.5, 5), ("image", None, 8)):
        given = TASKS[task] | {"latents": noise}
        x, rest, z = ours.first_state(given, 16, 24, path, strength, generators(3))
        assert rest == path[10 - left :]
        _, alpha, sigma = rest[0]
        torch.testing.assert_close(x, noise if left == 10 else alpha * z + sigma * noise)


@pytest.mark.parametrize("h, w", [(2, 3), (16, 24), (8, 4)])
def test_the_enlarged_image_has_the_means_of_the_small_one(ours, h, w):
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


class Same(torch.nn.Module):
    """An encoder or decoder that returns its input."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return x


def test_estimates_match_the_small_image():
    """Latents match as far as the autoencoder allows: exactly, with one that loses nothing."""
    config = TextToImageConfig(
        replace(OURS.diffusion, in_channels=1, out_channels=0),
        AutoencoderConfig(image_size=8, channels=(4,), latent_channels=1, groups=4,
                          variational=False, latent_mean=0.2, latent_scale=0.5),
        OURS.clip,
    )  # fmt: skip
    model = make_ours(config)
    model.autoencoder.encoder = model.autoencoder.decoder = Same()
    small = avg_pool2d(IMAGES[:, :, :8, :8], 4)
    correct_x0, _ = model.corrections({"upscale": small}, None)
    x0 = correct_x0(model.autoencoder.standardise(0.9 * random(3, 1, 8, 8).clamp(-1, 1)))
    assert_close(avg_pool2d(model.decode(x0), 4), small, 1e-5)
    plain = Diffusion(config.diffusion).denoiser(torch.zeros(3, 12, 16))
    denoise = text2image.with_correction(plain, correct_x0)
    x = random(3, 1, 8, 8)
    with torch.no_grad():
        x0, eps = denoise(x, 500, 0.6, 0.8)
    assert_close(0.6 * x0 + 0.8 * eps, x, 1e-5)


# ---- bad input -----------------------------------------------------------------------------------

SQUARE = IMAGES[:1, :, :, :16]
HOLE = MASK[..., :16]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": 0.0, "init_images": SQUARE}, "strength is 0.0; it must be above 0, at most"),
        ({"strength": 1.5, "init_images": SQUARE}, "strength is 1.5; it must be above 0, at most"),
        ({"strength": -1, "init_images": SQUARE, "mask": HOLE}, "strength is -1; it must be above"),
        ({"strength": float("nan"), "init_images": SQUARE}, "strength is nan"),
        ({"strength": 0.2, "init_images": SQUARE}, "strength is 0.2; .*enough for one of 4 steps"),
        ({"strength": 0.5}, "strength is 0.5, but no image is given; give"),
        ({"init_images": SQUARE, "mask": MASK}, r"mask of \(1, 1, 16, 24\) must be \(1 or 1, 1, "),
        ({"init_images": SQUARE, "mask": HOLE[0]}, r"mask of \(1, 16, 16\) must be"),
        ({"mask": HOLE}, "a mask needs init_images"),
        ({"init_images": SQUARE, "upscale": SQUARE}, "upscale excludes init_images; leave one out"),
        ({"guidance": -1.0}, "guidance is -1.0; it must be 0 or above"),
        ({"steps": 1001}, "1001 steps do not fit a schedule of 1000; use 1 to 1000"),
        ({"sampler": "euler"}, "euler follows a flow; this model predicts v"),
        ({"init_images": random(1, 3, 16, 16)}, r"images have 3 channels \(colour\), the model ta"),
        ({"init_images": random(2, 1, 16, 16)}, r"init_images of \(2, 1, 16, 16\) must be \(1 or"),
        ({"init_images": SQUARE, "size": (16, 32)}, r"init_images of .*\(1 or 1, 1, 16, 32\)"),
        ({"init_images": SQUARE[0]}, r"init_images of \(1, 16, 16\) must be"),
        ({"upscale": random(1, 3, 8, 8)}, r"images have 3 channels \(colour\)"),
        ({"upscale": random(1, 1, 5, 8)}, "upscale of 5 x 8 does not divide 16 x 16"),
        ({"upscale": random(1, 1, 32, 32)}, "upscale of 32 x 32 does not divide 16 x 16"),
        ({"size": (16, 18)}, "16 x 18 cannot be halved 2 times; .* is 16 x 16"),
        ({"latents": random(1, 4, 16, 16)}, r"latents of .* must be \(1 or 1, 4, 8, 8\)"),
        ({"generators": generators(2)}, "1 prompts, 2 generators and 1 negative"),
        ({"negative": ["a", "b"]}, "1 generators and 2 negative prompts; give one"),
        ({"prompts": []}, "there are 0 prompts"),
    ],
)
def test_inputs_that_do_not_fit(ours, options, message):
    with pytest.raises(ValueError, match=message) as error:
        ours.generate(**{"prompts": ["a"], "steps": 4} | options)
    assert "\n" not in str(error.value)


def test_grey_images_to_a_colour_model(published):
    model = TextToImage.from_pretrained(published[1])
    with pytest.raises(ValueError, match=r"1 channel \(grey\), the model takes 3 channels \(colou"):
        model.generate("a", init_images=SQUARE)
    with pytest.raises(ValueError, match=r"1 channel \(grey\), the model takes 3 channels \(colou"):
        model.loss({"images": SQUARE, "tokens": model.tokenize("a")}, generators(1))


def test_a_text_needs_a_tokenizer(ours):
    ours.tokenizer = None
    with pytest.raises(ValueError, match="a text needs a tokenizer"):
        ours.generate("a cat")


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("autoencoder", {"latent_channels": 3}, "diffusion.in_channels is 4; it must be 3: autoe"),
        ("autoencoder", {"image_size": 32}, "diffusion.image_size is 8; it must be 16: "),
        ("clip", {"text_width": 32}, "diffusion.d_context is 16; it must be 32: clip.text_width"),
        ("diffusion", {"clip": True}, "diffusion.clip is True; it must be False"),
        ("clip", {"loss": "simclr"}, "trains no text tower; use 'infonce'"),
    ],
)
def test_parts_that_do_not_fit(part, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(OURS, **{part: replace(getattr(OURS, part), **fields)})


def test_a_config_returns_from_json():
    for config in (OURS, TextToImageConfig()):
        assert TextToImageConfig(**json.loads(json.dumps(asdict(config)))) == config
