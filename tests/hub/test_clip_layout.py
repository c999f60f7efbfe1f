"""CLIP in the Hugging Face layout: equality with transformers on random weights, both ways."""

import json
import math
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import transformers
from conftest import assert_equal_weights, count_parameters, random_weights
from PIL import Image
from PIL.Image import open as open_image
from safetensors.torch import load_file, save_file
from test_clip_tokenizer import MERGES_TXT, VOCAB
from torch.nn.functional import normalize
from transformers import AutoTokenizer
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPImageProcessor as TheirProcessor
from transformers import CLIPModel as TheirModel

from data import pictures
from tinyfm import tokenizer
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.common.folders import TEMPORARY
from tinyfm.hub import clip
from tinyfm.hub.tokenizers import clip_spec
from tinyfm.tokenizer import ClipTokenizer, encode_captions

transformers.logging.set_verbosity_error()
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 12, "bos_token_id": 95,
    "eos_token_id": 96, "pad_token_id": 96,
}  # fmt: skip
IMAGE = {
    "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
OURS = CLIPConfig(
    image_size=16,
    channels=3,
    patch_size=4,
    stem="patch",
    image_layer=2,
    image_width=32,
    image_head=2,
    vocab_size=97,
    context_length=12,
    text_layer=3,
    text_width=48,
    text_head=4,
    embed_dim=20,
    activation="gelu",
    norm_eps=1e-5,
    loss="infonce",
    max_scale=100.0,
)


def both(**fields) -> dict:
    """The configs of both towers, with the same changed fields."""
    return {"text_config": TEXT | fields, "vision_config": IMAGE | fields}


VARIANTS = {
    "quick_gelu": both(hidden_act="quick_gelu"),
    "gelu": both(hidden_act="gelu", layer_norm_eps=1e-3),
    "grey": {"text_config": TEXT, "vision_config": IMAGE | {"num_channels": 1, "patch_size": 8}},
    "older": {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE},
    "other-mlps": {
        "text_config": TEXT | {"intermediate_size": 56},
        "vision_config": IMAGE | {"intermediate_size": 200},
    },
    "low-end-token": {"text_config": TEXT | {"eos_token_id": 5}, "vision_config": IMAGE},
}


def reference(parts: dict) -> TheirModel:
    return random_weights(lambda: TheirModel(TheirConfig(**parts, projection_dim=24)))


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tmp_path_factory):
    """A model of transformers, and the folder it was saved to."""
    model = reference(VARIANTS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(tmp_path):
    reference(VARIANTS["gelu"]).save_pretrained(tmp_path / "gelu")
    return tmp_path / "gelu"


def edit(folder, part, **fields):
    """Change fields of config.json, or of one part of it; the value `...` removes a field."""
    path = folder / "config.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    raw = whole[part] if part else whole
    for name, value in fields.items():
        if value is ...:
            raw.pop(name, None)
        else:
            raw[name] = value
    path.write_text(json.dumps(whole), encoding="utf-8")


def inputs(end: int, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and rows of tokens. The end token stands at places 2 to 11, other tokens follow it."""
    g = torch.Generator().manual_seed(1)
    images = 2 * torch.rand(6, channels, 16, 16, generator=g) - 1
    tokens = torch.randint(6, 95, (6, 12), generator=g)
    tokens[torch.arange(6), torch.tensor([2, 5, 8, 11, 3, 7])] = end
    return images, tokens


@torch.no_grad()
def assert_same(ours: CLIP, theirs: TheirModel, images, tokens, pixels=None, tolerance=1e-4):
    """Embeddings and logits are equal. The rows differ, so a wrong row would be noticed.

    pixels: the images as `theirs` takes them; by default the same.
    """
    out = theirs(input_ids=tokens, pixel_values=images if pixels is None else pixels)
    x = ours.encode_image(images)
    y = ours.encode_text(tokens)
    assert (x[0] - x[1]).norm() > 0.05 and (y[0] - y[1]).norm() > 0.05
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(x, out.image_embeds, **close)
    torch.testing.assert_close(y, out.text_embeds, **close)
    torch.testing.assert_close(ours(images, tokens), out.logits_per_image, **close)


def end_of(theirs) -> int:
    """The end token of a model; 2 in older files stands for the highest id of a row."""
    end = theirs.config.text_config.eos_token_id
    return 96 if end == 2 else end


# ---- against transformers ------------------------------------------------------------------------


def test_a_published_folder(published):
    theirs, folder = published
    ours = CLIP.from_pretrained(folder)
    assert not ours.training
    assert_same(ours, theirs, *inputs(end_of(theirs), ours.config.channels))
    assert count_parameters(ours) == theirs.num_parameters()


def test_export_loads_in_transformers_and_returns_bit_for_bit(published, tmp_path):
    theirs, folder = published
    ours = CLIP.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    exported, info = TheirModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, exported, *inputs(end_of(theirs), ours.config.channels))
    assert_equal_weights(exported, theirs)
    again = CLIP.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_equal_weights(again, ours)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "quick_gelu", "norm_eps": 1e-3},
        {"channels": 1, "patch_size": 16},
        {"end_token": 5},
        {"end_token": -2},
        {"memory": 4},
    ],
)
def test_export_of_our_own_configs(tmp_path, changes):
    torch.manual_seed(0)
    ours = CLIP(replace(OURS, **changes)).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    end = changes.get("end_token", -1)
    images, tokens = inputs(5 if end == 5 else 96, ours.config.channels)
    if end == -1:  # the last token of a row ends it: pad with the end token
        tokens[(tokens == 96).cumsum(1) > 0] = 96
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if end == -1 else "error")
        ours.save_pretrained(tmp_path)
    assert_same(ours, TheirModel.from_pretrained(tmp_path), images, tokens)
    torch.testing.assert_close(CLIP.from_pretrained(tmp_path)(images, tokens), ours(images, tokens))


def test_each_tower_loads_alone(tmp_path):
    ours = CLIP(replace(OURS, end_token=96)).eval()
    images, tokens = inputs(96)
    ours.save_pretrained(tmp_path)
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    text = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path)
    with torch.no_grad():
        x = normalize(vision(images).image_embeds)
        y = normalize(text(tokens).text_embeds)
        torch.testing.assert_close(x, ours.encode_image(images))
        torch.testing.assert_close(y, ours.encode_text(tokens))


def test_a_large_scale(folder, tmp_path):
    """transformers does not clamp the scale: we raise ours on loading, and save the clamped one."""
    stored = load_file(folder / "model.safetensors")
    stored["logit_scale"] = torch.tensor(math.log(250.0))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    ours = CLIP.from_pretrained(folder)
    assert ours.config.max_scale == pytest.approx(250)
    assert_same(ours, TheirModel.from_pretrained(folder), *inputs(96))
    ours.config = replace(ours.config, max_scale=3.0)
    ours.save_pretrained(tmp_path / "out")
    theirs = TheirModel.from_pretrained(tmp_path / "out")
    assert theirs.logit_scale.exp().item() == pytest.approx(3)
    assert_same(ours, theirs, *inputs(96))


def test_half_precision(folder, tmp_path):
    TheirProcessor().save_pretrained(folder)
    ours = CLIP.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    images, tokens = inputs(96)
    exact = CLIP.from_pretrained(folder)
    for name, x in (("encode_image", images), ("encode_text", tokens)):
        vectors = getattr(ours, name)(x)
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors, getattr(exact, name)(x), atol=0.05, rtol=0)
    ours.save_pretrained(tmp_path / "half")
    assert TheirModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


# ---- published sizes -----------------------------------------------------------------------------

WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
# Parameters, and the fields of the published config.json that are not defaults.
PUBLISHED = {
    "ViT-B/32": (151_277_313, {"vision_config": {"patch_size": 32}}),
    "ViT-B/16": (149_620_737, {"vision_config": {"patch_size": 16}}),
    "laion ViT-bigG/14": (2_539_567_105, {
        "projection_dim": 1280,
        "text_config": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
            "num_hidden_layers": 32, "hidden_act": "gelu"},
        "vision_config": {
            "hidden_size": 1664, "intermediate_size": 8192, "num_attention_heads": 16,
            "num_hidden_layers": 48, "patch_size": 14, "hidden_act": "gelu"}}),
    "ViT-L/14": (427_616_513, {"text_config_dict": WIDE, "projection_dim": 768, "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14}}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    parameters, raw = PUBLISHED[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "clip"} | raw), encoding="utf-8")
    config = clip.read_config(CLIPConfig, tmp_path)
    with torch.device("meta"):
        ours = CLIP(config)
        theirs = TheirModel(TheirConfig.from_pretrained(tmp_path))
    assert count_parameters(ours) == parameters == theirs.num_parameters()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in clip.their_tensors(ours).items()}
    assert expected == shapes
    activation = raw["vision_config"].get("hidden_act", "quick_gelu")
    assert (config.activation, config.norm_eps, config.end_token) == (activation, 1e-5, 49407)


# ---- pixels --------------------------------------------------------------------------------------


def photo(path, seed=0, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (23, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def prepare(path, config) -> torch.Tensor:
    """A picture as our training data has it: (1, C, H, W) in [-1, 1]."""
    image = pictures.read(path, config.image_size, config.channels)
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1


OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
OLD = {"do_normalize": True, "feature_extractor_type": "CLIPFeatureExtractor", "size": 16}
NEW = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}}
DEFAULT = {"image_mean": (0.5,), "image_std": (0.5,)}
PROCESSORS = {  # files of several versions, and the mean and std that they give
    "older": ({"preprocessor_config.json": OLD | {n: list(v) for n, v in OPENAI.items()}}, OPENAI),
    "without-numbers": ({"preprocessor_config.json": OLD}, OPENAI),
    "not-normalised": (
        {"preprocessor_config.json": OLD | {"do_normalize": False}},
        {"image_mean": (0.0,), "image_std": (1.0,)},
    ),
    "newer": (
        {"processor_config.json": NEW, "preprocessor_config.json": OLD},
        {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.5,)},
    ),
    "none": ({}, DEFAULT),
    "empty": ({"processor_config.json": {"processor_class": "CLIPProcessor"}}, DEFAULT),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_mean_and_std_of_a_folder(folder, kind):
    files, expected = PROCESSORS[kind]
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    config = CLIP.from_pretrained(folder).config
    assert {name: getattr(config, name) for name in expected} == expected
    assert CLIPConfig(**json.loads(json.dumps(asdict(config)))) == config  # JSON has lists


def test_pictures_through_their_processor(folder, tmp_path):
    """The processor of a published folder with its own mean and std, and that of our export."""
    square = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    TheirProcessor(**square).save_pretrained(folder)
    ours = CLIP.from_pretrained(folder)
    _, tokens = inputs(96)
    ours.save_pretrained(tmp_path / "out")
    paths = [photo(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    images = torch.cat([prepare(path, ours.config) for path in paths])
    for place in (folder, tmp_path / "out"):
        processor = TheirProcessor.from_pretrained(place)
        pixels = processor([open_image(p) for p in paths], return_tensors="pt")["pixel_values"]
        assert pixels.min() < -1.2  # not in [-1, 1]
        assert_same(ours, TheirModel.from_pretrained(place), images, tokens, pixels)
    assert CLIP.from_pretrained(tmp_path / "out").config == ours.config


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_through_the_exported_processor(tmp_path, channels):
    model = CLIP(replace(OURS, channels=channels, end_token=96))
    model.save_pretrained(tmp_path)
    path = photo(tmp_path / "photo.png", mode="L" if channels == 1 else "RGB")
    processor = TheirProcessor.from_pretrained(tmp_path)
    pixels = processor(open_image(path), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, prepare(path, model.config), atol=1e-5, rtol=0)


def test_other_pixel_ranges_are_refused(folder):
    cases = [
        ({"do_rescale": False}, r"gelu: rescale_factor is .*1/255"),
        ({"rescale_factor": 1 / 127.5}, r"gelu: rescale_factor is .*1/255"),
        ({"image_std": [0.5, 0.1]}, r"gelu: image_std is \(0.5, 0.1\); give 1 number, or 3"),
    ]
    for fields, message in cases:
        content = json.dumps(OLD | fields)
        (folder / "preprocessor_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            CLIP.from_pretrained(folder)


# ---- texts ---------------------------------------------------------------------------------------

CAPTIONS = ["a photo of the cat", "cats catch", "naïve 中文"]


def test_export_with_the_tokenizer_of_clip(tmp_path):
    """Rows of the tokenizer of transformers, padding included, have the same vectors in both."""
    ours_tokenizer = ClipTokenizer(clip_spec(VOCAB, MERGES_TXT))
    size = ours_tokenizer.vocab_size
    model = CLIP(replace(OURS, vocab_size=size)).eval()
    model.save_pretrained(tmp_path, ours_tokenizer)
    theirs = TheirModel.from_pretrained(tmp_path)
    text = theirs.config.text_config
    assert text.eos_token_id == text.pad_token_id == ours_tokenizer.eot == size - 1
    assert text.bos_token_id == ours_tokenizer.bot
    rows = AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS, padding=True, return_tensors="pt")
    tokens, _ = encode_captions(ours_tokenizer, CAPTIONS, 12)
    assert torch.equal(rows["input_ids"], torch.from_numpy(tokens))
    assert_same(model, theirs, inputs(0)[0][:3], rows["input_ids"])
    assert CLIP.from_pretrained(tmp_path).config.end_token == ours_tokenizer.eot


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "bytes"])
def test_export_with_a_tokenizer_of_ours(tmp_path, kind):
    """The end token of SentencePiece has a low id: it is not the highest of its row."""
    learnt = tokenizer.train(kind, CAPTIONS * 20, 257 if kind == "bytes" else 264)
    model = CLIP(replace(OURS, vocab_size=300, context_length=32)).eval()
    model.save_pretrained(tmp_path, learnt)
    tokens = torch.from_numpy(encode_captions(learnt, CAPTIONS, 32)[0])
    images = inputs(0)[0][:3]
    theirs = TheirModel.from_pretrained(tmp_path)
    for ours in (model, CLIP.from_pretrained(tmp_path)):
        assert_same(ours, theirs, images, tokens)
    assert tokenizer.load(tmp_path).encode(CAPTIONS[0]) == learnt.encode(CAPTIONS[0])


def test_an_end_token_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="end token 2"):
        CLIP(replace(OURS, end_token=2)).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="257 tokens, the model 97"):
        CLIP(OURS).save_pretrained(tmp_path / "out", tokenizer.train("bytes", [], 257))
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="without a tokenizer, .* highest id"):
        CLIP(OURS).save_pretrained(tmp_path / "out")


# ---- other forms of published folders ------------------------------------------------------------


def test_stored_buffers_and_shards(folder, tmp_path):
    stored = load_file(folder / "model.safetensors")
    for part in ("text_model", "vision_model"):
        stored[f"{part}.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    expected = CLIP.from_pretrained(folder)
    TheirModel.from_pretrained(folder).save_pretrained(tmp_path / "s", max_shard_size="100KB")
    assert len([*(tmp_path / "s").glob("model-*.safetensors")]) > 2
    assert_equal_weights(CLIP.from_pretrained(tmp_path / "s"), expected)


def test_an_older_config(folder):
    """A second name for a part takes precedence; a part may be null; some fields have no effect."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw |= {"text_config_dict": raw["text_config"], "text_config": {"vocab_size": 5}}
    raw |= {"vision_config_dict": None, "initializer_factor": 2.0, "torch_dtype": "float16"}
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert_same(CLIP.from_pretrained(folder), TheirModel.from_pretrained(folder), *inputs(96))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("", {"model_type": "siglip"}, "model_type is 'siglip'; supported: 'clip'"),
        ("", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("", {"projection_dim": "24"}, "projection_dim is '24'; .*type int"),
        ("", {"projection_dim": 23}, r"visual_projection.weight is \(24, 48\), not \(23, 48\)"),
        (
            "text_config",
            {"hidden_act": "quick_gelu"},
            "text_config.hidden_act is 'quick_gelu'; .*'gelu'.*`activation`",
        ),
        ("text_config", {"layer_norm_eps": 1e-6}, "text_config.layer_norm_eps is 1e-06; .* 0.001"),
        ("text_config", {"intermediate_size": 96}, r"fc1.weight is \(128, 32\), not \(96, 32\)"),
        ("text_config", {"intermediate_size": 0}, "text_config.intermediate_size is 0"),
        ("text_config", {"eos_token_id": [1, 96]}, r"text_config.eos_token_id is \[1, 96\]"),
        ("text_config", {"num_hidden_layers": 3}, "16 in all: text_model.encoder.layers.2"),
        ("vision_config", {"num_hidden_layers": 2}, "vision_model.encoder.layers.2.*unexpected"),
        ("vision_config", {"image_size": [16, 16]}, r"vision_config.image_size is \[16, 16\]"),
        ("vision_config", {"patch_size": 5}, "image_size 16 .*patch_size 5; use"),
        ("vision_config", {"num_channels": 4}, "channels is 4; use 1"),
        ("vision_config", {"hidden_size": None}, "vision_config.hidden_size is None"),
        ("vision_config", {"image_size": ...}, "position_embedding.weight is .*17, 48.*3137, 48"),
    ],
)
def test_refused_config(folder, part, fields, message):
    edit(folder, part, **fields)
    with pytest.raises(ValueError, match=message) as error:
        CLIP.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_refused_activation(folder):
    for part in clip.PARTS:
        edit(folder, part, hidden_act="relu")
    with pytest.raises(ValueError, match="activation is 'relu'"):
        CLIP.from_pretrained(folder)


def test_refused_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle.*CLASS.from_pretrained"):
        CLIP.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stem": "conv"}, "CLIPModel .*stem 'patch', not 'conv'"),
        ({"loss": "siglip"}, "CLIPModel .*loss 'infonce', not 'siglip'"),
        ({"loss": "simclr", "stem": "conv"}, "'patch', not 'conv'; .*'infonce', not 'simclr'"),
    ],
)
def test_refused_export(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        CLIP(replace(OURS, **changes)).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_overwritten_by_accident(tmp_path):
    model = CLIP(replace(OURS, end_token=96))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="overwrite"):
        model.save_pretrained(tmp_path)
    CLIP(replace(OURS, end_token=96, image_layer=1)).save_pretrained(tmp_path, overwrite=True)
    assert CLIP.from_pretrained(tmp_path).config.image_layer == 1
    assert not [*tmp_path.glob(f"{TEMPORARY}*")]
