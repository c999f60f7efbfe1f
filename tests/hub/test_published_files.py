"""Folders of weights as others publish them, and as strangers may forge them."""

import json
import time

import pytest
import torch
from conftest import assert_equal_weights, edit_json, random_weights
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tinyfm.gpt import GPT
from tinyfm.hub import layout
from tinyfm.unet import UNet

LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
UNET = {
    "sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    config = AutoConfig.for_model("llama", **LLAMA)
    random_weights(lambda: AutoModelForCausalLM.from_config(config)).save_pretrained(
        tmp_path / "llama"
    )
    return tmp_path / "llama"


# ---- as they are published -----------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_unet_in_several_files_or_in_half_precision(sharded, variant, tmp_path):
    theirs = random_weights(lambda: UNet2DModel(**UNET))
    words = {"variant": variant, "max_shard_size": "60KB" if sharded else "1GB"}
    if variant:
        theirs.half()
    theirs.save_pretrained(tmp_path, **words)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not sharded
    ours = UNet.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    t = torch.tensor([3, 500])
    with torch.no_grad():
        expected = theirs.float()(images, t).sample
        torch.testing.assert_close(ours(images, t), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", ["10KB", "1GB"])
def test_a_gpt_of_which_only_half_precision_is_published(size, llama, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(llama).half()
    theirs.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=size)
    theirs.float().save_pretrained(tmp_path / "same")
    expected = GPT.from_pretrained(tmp_path / "same")
    assert_equal_weights(GPT.from_pretrained(tmp_path / "half"), expected)


# ---- as strangers forge them ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2 * 10**9},
        {"hidden_size": 10**18},
        {"vocab_size": 2**62},
        {"intermediate_size": 10**12},
        {"max_position_embeddings": 10**12},
        {"num_attention_heads": 0},
        {"head_dim": 10**9},
        {"num_key_value_heads": -1},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 1.5},
        {"rms_norm_eps": "1e-5"},
        {"rope_parameters": {"rope_theta": [1], "rope_type": "default"}},
        {"layer_types": 7},
    ],
)
def test_sizes_that_no_weights_have_are_refused_at_once(fields, llama):
    edit_json(llama / "config.json", **fields)
    start = time.perf_counter()
    if fields == {"layer_types": 7}:
        edit_json(llama / "config.json", model_type="mistral")
    with pytest.raises(ValueError, match=str(llama)):
        GPT.from_pretrained(llama)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("text", ["[" * 10**5, '{"num_hidden_layers": 1e999}', "[]", "7", "{"])
def test_a_config_that_is_no_object_is_refused(text, llama):
    (llama / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        GPT.from_pretrained(llama)


def shard(folder) -> dict:
    """Cut the weights of a folder into two files; return the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    places = {}
    for k, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, folder / f"part{k}.safetensors")
        places |= dict.fromkeys(part, f"part{k}.safetensors")
    (folder / "model.safetensors").unlink()
    return {"weight_map": places}


def test_a_tensor_that_two_files_hold_is_refused(llama):
    index = shard(llama)
    path = llama / "model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    assert GPT.from_pretrained(llama).config.n_layer == 2
    first = load_file(llama / "part0.safetensors")
    second = load_file(llama / "part1.safetensors")
    name = min(first)
    save_file(second | {name: first[name] + 1}, llama / "part1.safetensors")
    with pytest.raises(ValueError, match=f"part1.safetensors and another file both hold {name}"):
        GPT.from_pretrained(llama)


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", 7, "part0.bin"])
def test_an_index_names_files_of_its_folder_only(place, llama):
    index = shard(llama)
    index["weight_map"]["lm_head.weight"] = place
    (llama / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json.*weight_map"):
        layout.read_tensors(llama)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.bool])
def test_numbers_of_another_kind_are_refused(dtype, llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight has numbers of type torch"):
        GPT.from_pretrained(llama)


def test_weights_that_are_no_numbers_are_refused(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        GPT.from_pretrained(llama)
