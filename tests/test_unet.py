"""The U-Net: equality with the U-Nets of diffusers on random weights, properties, errors."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import assert_equal_weights, count_parameters, edit_json, random_weights
from diffusers import UNet2DConditionModel, UNet2DModel
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tinyfm.hub import diffusion, layout
from tinyfm.unet import UNet, UNetConfig, Upsample, repeat_and_convolve, time_features

diffusers.logging.set_verbosity_error()
PLAIN = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (16, 32, 32), "norm_num_groups": 8, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
DDPM = {
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
    "norm_eps": 1e-6,
}  # fmt: skip
CONTEXT = {
    "sample_size": 16, "layers_per_block": 2, "block_out_channels": (16, 32, 32),
    "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
VARIANTS = {
    "ddpm": (UNet2DModel, PLAIN | DDPM),
    "ddpm-heads": (UNet2DModel, PLAIN | {"layers_per_block": 1}),
    "stable-diffusion-1": (UNet2DConditionModel, CONTEXT),
    "stable-diffusion-2": (
        UNet2DConditionModel,
        CONTEXT | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True},
    ),
    "inpainting": (UNet2DConditionModel, CONTEXT | {"in_channels": 9, "layers_per_block": 1}),
}
TINY = UNetConfig(image_size=8, channels=(16, 32), attend=(False, True), n_block=1, groups=8)


def reference(cls, fields):
    return random_weights(lambda: cls(**fields), matrices=0.03)


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tmp_path_factory):
    """A model of diffusers, and the folder that it was saved to."""
    model = reference(*VARIANTS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def inputs(config):
    """Images, times, and a context (None for a model that takes none)."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, config["in_channels"], 16, 8, generator=g)
    t = torch.tensor([0, 500, 999])
    width = config.get("cross_attention_dim")
    context = None if width is None else torch.randn(3, 5, width, generator=g)
    return x, t, context


@torch.no_grad()
def assert_same(ours, theirs):
    x, t, context = inputs(theirs.config)
    if context is None:
        expected = theirs(x, t).sample
    else:
        expected = theirs(x, t, context).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, context), expected, atol=1e-4, rtol=1e-4)


# ---- against diffusers ---------------------------------------------------------------------------


def test_predictions_of_a_published_folder(published):
    theirs, folder = published
    ours = UNet.from_pretrained(folder)
    assert not ours.training
    assert_same(ours, theirs)
    assert count_parameters(ours) == theirs.num_parameters()


def test_export_loads_in_diffusers_and_returns_bit_for_bit(published, tmp_path):
    theirs, folder = published
    ours = UNet.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    exported, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, exported)
    again = UNet.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_equal_weights(again, ours)


def test_files_from_before_2023(tmp_path):
    """In these files the attention weights have other names, and config.json has fewer fields."""
    theirs = reference(*VARIANTS["ddpm"])
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for old, new in diffusion.OLD.items():
        tensors = {name.replace(f".{new}.", f".{old}."): t for name, t in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    keep = [*DDPM, *PLAIN, "_class_name"]
    path.write_text(json.dumps({name: raw[name] for name in keep}), encoding="utf-8")
    assert_same(UNet.from_pretrained(tmp_path), theirs)


@torch.no_grad()
def test_half_precision(tmp_path):
    """Weights in bfloat16; the features of the time t stay exact."""
    theirs = reference(*VARIANTS["stable-diffusion-1"]).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    x, t, context = inputs(theirs.config)
    expected = theirs(x.bfloat16(), t, context.bfloat16()).sample
    torch.testing.assert_close(
        ours(x.bfloat16(), t, context.bfloat16()), expected, atol=0.1, rtol=0.1
    )


# Of Google, CompVis and Stability AI: parameters, class, fields of config.json.
PUBLISHED = {
    "ddpm-cifar10-32": (35_746_307, UNet2DModel, DDPM | {
        "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}),
    "stable-diffusion-v1-4": (859_520_964, UNet2DConditionModel, {
        "sample_size": 64, "cross_attention_dim": 768}),
    "stable-diffusion-2": (865_910_724, UNet2DConditionModel, {
        "sample_size": 96, "cross_attention_dim": 1024, "use_linear_projection": True,
        "attention_head_dim": (5, 10, 20, 20)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, cls, fields = PUBLISHED[name]
    with torch.device("meta"):
        theirs = cls(**fields)
        raw = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
        raw = json.loads(json.dumps(raw))
        ours = UNet(diffusion.read_unet(cls.__name__, raw, UNetConfig))
    assert count_parameters(ours) == parameters == theirs.num_parameters()
    names = diffusion.unet_names(ours.config)
    found = {layout.translate(n, names): p.numel() for n, p in ours.named_parameters()}
    assert found == {name: p.numel() for name, p in theirs.named_parameters()}


# ---- properties ----------------------------------------------------------------------------------


def test_an_untrained_model_predicts_zero_and_every_weight_learns():
    torch.manual_seed(0)
    model = UNet(TINY)
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor([3, 700])
    assert model(x, t).abs().max() == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    start = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(4):  # layers that start at zero pass gradients on only after their first step
        (model(x, t) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name]), name


@torch.no_grad()
def test_rows_do_not_depend_on_each_other():
    """Each row alone, with one time for the whole batch, predicts the same."""
    torch.manual_seed(0)
    model = UNet(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(3, 1, 8, 16)
    t = torch.tensor([3, 700, 41])
    alone = torch.cat([model(x[i : i + 1], t[i]) for i in range(3)])
    torch.testing.assert_close(model(x, t), alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(x, t), model(x, t.flip(0)), atol=1e-3)


def test_training_in_bfloat16_stays_close_to_float32():
    config = replace(TINY, attend=(True, True), d_context=12)
    torch.manual_seed(0)
    model = UNet(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 1, 8, 8)
    t = torch.tensor([3, 700])
    context = torch.randn(2, 4, 12)
    full = model(x, t, context)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t, context)
    assert half.dtype == torch.bfloat16
    assert (half - full).std() < 0.02 * full.std()
    half.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_upsampling_equals_the_obvious_way_at_4_of_9_products():
    torch.manual_seed(0)
    layer = Upsample(6)
    x = torch.randn(2, 6, 5, 3, requires_grad=True)
    g = torch.randn(2, 6, 10, 6)
    results = []
    products = []
    for upsample in (layer, lambda x: repeat_and_convolve(x, layer.weight, layer.bias)):
        with FlopCounterMode(display=False) as counter:
            y = upsample(x)
        gradients = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
        results.append((y, *gradients))
        products.append(counter.get_total_flops())
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)
    assert products[0] * 9 == products[1] * 4


def test_a_patch_is_a_pixel_of_many_channels():
    """The same network, on images whose patches the test turns into pixels, predicts the same."""
    torch.manual_seed(0)
    inside = UNet(replace(TINY, in_channels=4))
    patched = UNet(replace(TINY, image_size=16, patch_size=2))
    assert patched.config.factor == 4
    with torch.no_grad():
        for p in inside.parameters():
            p.add_(0.1 * torch.randn_like(p))
    patched.load_state_dict(inside.state_dict())
    x = torch.randn(2, 1, 16, 8)
    t = torch.tensor([3.0, 900.0])
    pixels = rearrange(x, "B 1 (h p) (w q) -> B (p q) h w", p=2, q=2)
    expected = rearrange(inside(pixels, t), "B (p q) h w -> B 1 (h p) (w q)", p=2, q=2)
    torch.testing.assert_close(patched(x, t), expected)
    with pytest.raises(ValueError, match=r"16 x 6 .*halved 2 times; .*nearest"):
        patched(x[..., :6], t)


def test_time_features_differ_for_all_times():
    features = time_features(torch.arange(1000), 32, 0, cos_first=True).double()
    assert torch.pdist(features).min() > 0.1
    slowest = time_features(torch.ones(1), 32, 1, cos_first=False)[0, 15]
    torch.testing.assert_close(slowest.item(), 1e-4, rtol=1e-4, atol=0)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"channels": (16, 24)}, "24 channels .*n_head 16"),
        ({"channels": (16, 36)}, "36 channels .*groups 8"),
        ({"d_head": 12}, "32 channels .*d_head 12"),
        ({"attend": (True,)}, "one value a level"),
        ({"channels": (), "attend": ()}, "one value a level"),
        ({"n_block": 0}, "n_block is 0"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": 3}, "patch_size is 3; .*power of two"),
        ({"d_context": -1}, "d_context is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"image_size": 9}, "9 x 9 .*halved 1 times; .*8 x 8"),
        ({"channels": (7, 14), "groups": 7, "n_head": 1}, "the first level has 7 channels"),
    ],
)
def test_configs_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **{"n_block": 2, "n_head": 16, **fields})


def test_inputs_that_do_not_fit():
    model = UNet(UNetConfig(in_channels=3))
    t = torch.zeros(1)
    with pytest.raises(ValueError, match=r"30 x 37 .*halved 2 times; .*32 x 36"):
        model(torch.zeros(1, 3, 30, 37), t)
    with pytest.raises(ValueError, match=r"1 channel .*takes 3 channels \(colour"):
        model(torch.zeros(1, 1, 32, 32), t)
    with pytest.raises(ValueError, match=r"\(1, 4, 8\); .*takes none"):
        model(torch.zeros(1, 3, 32, 32), t, torch.zeros(1, 4, 8))
    model = UNet(UNetConfig(d_context=6))
    with pytest.raises(ValueError, match=r"3 channels .*takes 1 channel \(grey"):
        model(torch.zeros(1, 3, 32, 32), t)
    with pytest.raises(ValueError, match="needs a context"):
        model(torch.zeros(1, 1, 32, 32), t)
    with pytest.raises(ValueError, match=r"\(1, 4, 8\); .*takes \(B, T, 6\)"):
        model(torch.zeros(1, 1, 32, 32), t, torch.zeros(1, 4, 8))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"_class_name": "UNet1DModel"}, "_class_name is 'UNet1DModel'; .*UNet2DModel"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; supported: 'silu'"),
        ({"add_attention": False}, "add_attention is False; supported: True"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10; supported: None"),
        ({"layers_per_block": [1, 2, 3]}, "layers_per_block is .*type int"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types is .* supported: .*AttnUpBlock2D"),
        ({"downsample_padding": 2}, "downsample_padding is 2; supported: 0 or 1"),
        ({"block_out_channels": [16, 32, 64]}, "tensors do not fit config.json"),
    ],
)
def test_folders_that_this_model_cannot_express(fields, message, tmp_path):
    reference(*VARIANTS["ddpm"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **fields)
    with pytest.raises(ValueError, match=message) as error:
        UNet.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_heads_that_diffusers_cannot_express(tmp_path):
    with pytest.raises(ValueError, match=r"heads of one width, not \[4, 8\]; set d_head"):
        UNet(replace(TINY, attend=(True, True))).save_pretrained(tmp_path)
    uneven = reference(UNet2DConditionModel, CONTEXT | {"attention_head_dim": (2, 8, 8)})
    uneven.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attention_head_dim is .*heads of one width"):
        UNet.from_pretrained(tmp_path)


def test_diffusers_has_no_patches(tmp_path):
    with pytest.raises(ValueError, match=r"patch_size is 2; .*--model.patch-size 1"):
        UNet(replace(TINY, patch_size=2)).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten_by_accident(tmp_path):
    UNet(TINY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model already"):
        UNet(TINY).save_pretrained(tmp_path)
    UNet(TINY).save_pretrained(tmp_path, overwrite=True)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="diffusion_pytorch_model"):
        UNet.from_pretrained(tmp_path)
