"""GPTs in the Hugging Face layout: equality with transformers on random weights, both ways."""

import json
import os
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import assert_equal_weights, count_parameters, edit_json, random_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import logits_process

from tinyfm import generate, tokenizer
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.hub import gpt
from tinyfm.recipes.gpt import STYLES

transformers.logging.set_verbosity_error()
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {
    "vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GPT1 = GPT2 | {"n_embd": 32}
BLOOM = {
    "vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 4,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FALCON = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}  # fmt: skip
COHERE = SIZES | {
    "num_key_value_heads": 2, "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
}  # fmt: skip
# PaLM has no class; its block is Cohere's with one key/value head, which does not fill the width.
PALM = COHERE | {"num_key_value_heads": 1, "head_dim": 8, "logit_scale": 1.0}
QWEN3_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
VARIANTS = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 80}),
    "llama": ("llama", SIZES),
    "llama-tied": ("llama", SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", SIZES | {"num_key_value_heads": 1, "head_dim": 16}),
    "llama3-rope": ("llama", SIZES | {"rope_parameters": LLAMA3}),
    "llama-biases": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", SIZES | {"sliding_window": 7, "num_key_value_heads": 2}),
    "mistral": ("mistral", SIZES | {"sliding_window": None, "head_dim": 8}),
    "qwen3-wide-heads": ("qwen3", SIZES | {"num_key_value_heads": 2, "head_dim": 32}),
    "qwen3-tied": ("qwen3", SIZES | {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-window": ("qwen3", SIZES | {"head_dim": 12} | QWEN3_WINDOW),
    "gpt1": ("openai-gpt", GPT1),
    "gpt3": ("gpt2", GPT2 | {"n_embd": 96, "n_head": 6, "n_positions": 128}),
    "bloom": ("bloom", BLOOM),
    "bloom-six-heads": ("bloom", BLOOM | {"n_head": 6, "tie_word_embeddings": False}),
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", FALCON_40B | {"ffn_hidden_size": 80}),
    "falcon-11b": ("falcon", FALCON_40B | {"num_ln_in_parallel_attn": 1, "bias": True}),
    "palm": ("cohere", PALM),
    "command-r": ("cohere", COHERE),
    "granite": (
        "granite",
        SIZES | MULTIPLIERS | {"num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True},
    ),
}


def reference(model_type: str, fields: dict):
    config = AutoConfig.for_model(model_type, **fields)
    return random_weights(lambda: AutoModelForCausalLM.from_config(config))


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tmp_path_factory):
    """A model of transformers, and the folder it was saved to."""
    model = reference(*VARIANTS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def llama(tmp_path):
    """A folder with a small Llama of transformers."""
    reference("llama", SIZES).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def tokens(*shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(ours, theirs, tolerance=1e-5):
    x = tokens(3, 40)
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=tolerance, rtol=tolerance)


# ---- against transformers ------------------------------------------------------------------------


def test_logits_of_a_published_folder(published):
    theirs, folder = published
    ours = GPT.from_pretrained(folder)
    assert not ours.training
    assert_same_logits(ours, theirs)
    assert count_parameters(ours) == theirs.num_parameters()


def test_export_loads_in_transformers_and_returns_bit_for_bit(published, tmp_path):
    theirs, folder = published
    ours = GPT.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    exported, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    if theirs.config.model_type != "mistral" or theirs.config.sliding_window:
        assert type(exported) is type(theirs)  # a Mistral without a window is a Llama
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, exported)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    again = GPT.from_pretrained(tmp_path)
    assert gpt.resolve(again.config) == gpt.resolve(ours.config)
    assert_equal_weights(again, ours)
    assert not list(tmp_path.glob(".tmp-*"))


def theirs_complete(theirs, prompts, **settings):
    """The greedy continuation of transformers, which pads prompts on the left."""
    longest = max(map(len, prompts))
    padding = [[0] * (longest - len(row)) for row in prompts]
    ids = torch.tensor([pad + row for pad, row in zip(padding, prompts)])
    mask = torch.tensor([pad + [1] * len(row) for pad, row in zip(padding, prompts)])
    settings |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return theirs.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()


WITH_CACHE = [
    "gpt2", "llama3-rope", "mistral-window", "qwen3-wide-heads", "gpt1", "bloom-six-heads",
    "falcon-7b", "falcon-40b", "palm", "granite",
]  # fmt: skip


@pytest.mark.parametrize("variant", WITH_CACHE)
def test_greedy_tokens(variant, tmp_path):
    theirs = reference(*VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    greedy = generate.Sampling(8, temperature=0)
    prompts = [row.tolist() for row in tokens(3, 14)]
    plain = generate.complete(ours, prompts, greedy)
    assert plain == theirs_complete(theirs, prompts)
    penalised = generate.complete(ours, prompts, replace(greedy, repetition_penalty=3.0))
    assert penalised == theirs_complete(theirs, prompts, repetition_penalty=3.0) != plain
    prompts = [prompts[0], prompts[1][:3], prompts[2][:9]]
    assert generate.complete(ours, prompts, greedy) == theirs_complete(theirs, prompts)


@pytest.mark.parametrize(
    "ours, warper",
    [
        ({"top_k": 5}, logits_process.TopKLogitsWarper(5)),
        ({"top_p": 0.7}, logits_process.TopPLogitsWarper(0.7)),
        ({"top_p": 0.01}, logits_process.TopPLogitsWarper(0.01)),
        ({"min_p": 0.1}, logits_process.MinPLogitsWarper(0.1)),
    ],
)
def test_filters_equal_transformers_warpers(ours, warper):
    logits = 3 * torch.randn(50, 97, generator=torch.Generator().manual_seed(2))
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | ours
    filtered = generate.filter_logits(logits, **settings)
    assert torch.equal(filtered, warper(None, logits))
    assert filtered.isinf().any()


# ---- published sizes -----------------------------------------------------------------------------

ROTARY = {"hidden_act": "silu", "num_hidden_layers": 32, "num_attention_heads": 32}
# Parameters, and the fields of the published config.json that matter here.
PUBLISHED = {
    "gpt2": (124_439_808, {
        "model_type": "gpt2", "activation_function": "gelu_new", "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "vocab_size": 50257}),
    "llama-2-7b": (6_738_415_616, ROTARY | {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "vocab_size": 32000}),
    "llama-3.1-8b": (8_030_261_248, ROTARY | {
        "model_type": "llama", "attention_bias": False, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256}),
    "mistral-7b-v0.1": (7_241_732_096, ROTARY | {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 32000}),
    "qwen3-0.6b": (596_049_920, {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936}),
    "gpt1": (116_534_784, {
        "model_type": "openai-gpt", "afn": "gelu", "n_ctx": 512, "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 512, "layer_norm_epsilon": 1e-5, "vocab_size": 40478}),
    "bloom-176b": (176_247_271_424, {
        "model_type": "bloom", "apply_residual_connection_post_layernorm": False,
        "layer_norm_epsilon": 1e-5, "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112,
        "offset_alibi": 100, "pretraining_tp": 4, "seq_length": 2048, "vocab_size": 250880}),
    "falcon-7b": (6_921_720_704, {
        "model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 4544,
        "layer_norm_epsilon": 1e-5, "multi_query": True, "new_decoder_architecture": False,
        "num_attention_heads": 71, "num_hidden_layers": 32, "num_kv_heads": 71,
        "parallel_attn": True, "vocab_size": 65024}),
    "falcon-40b": (41_303_293_952, {
        "model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 8192,
        "layer_norm_epsilon": 1e-5, "multi_query": True, "new_decoder_architecture": True,
        "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8,
        "parallel_attn": True, "vocab_size": 65024}),
    # Chowdhery et al. 2022, Table 1, as a Cohere: the paper's 540.35B and a gain for each norm.
    "palm-540b": (540_354_281_472 + 119 * 18432, {
        "model_type": "cohere", "head_dim": 256, "hidden_size": 18432, "intermediate_size": 73728,
        "logit_scale": 1.0, "max_position_embeddings": 2048, "num_attention_heads": 48,
        "num_hidden_layers": 118, "num_key_value_heads": 1, "rope_theta": 10000.0,
        "use_qk_norm": False, "vocab_size": 256000}),
    "command-r": (34_980_831_232, {
        "model_type": "cohere", "hidden_act": "silu", "hidden_size": 8192,
        "intermediate_size": 22528, "layer_norm_eps": 1e-5, "logit_scale": 0.0625,
        "max_position_embeddings": 8192, "num_attention_heads": 64, "num_hidden_layers": 40,
        "num_key_value_heads": 64, "rope_theta": 8000000.0, "use_qk_norm": False,
        "vocab_size": 256000}),
    "granite-3.0-8b": (8_170_835_968, {
        "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 12800, "logits_scaling": 16.0, "max_position_embeddings": 4096,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": True,
        "vocab_size": 49152}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    parameters, raw = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    architecture, config = gpt.read_config(GPTConfig, tmp_path)
    with torch.device("meta"):
        ours = GPT(config)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert count_parameters(ours) == parameters == theirs.num_parameters()
    _, tensors = gpt.their_tensors(ours, architecture)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    if config.tied:
        del shapes["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes


def test_published_settings_that_no_shape_shows(tmp_path):
    def read(name):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][1]), encoding="utf-8")
        return gpt.read_config(GPTConfig, tmp_path)[1]

    assert read("mistral-7b-v0.1").window == 4096
    assert read("qwen3-0.6b").rope_theta == 1e6
    assert (read("llama-3.1-8b").rope_factor, read("llama-2-7b").rope_factor) == (8.0, 1.0)
    assert read("gpt2").dropout == 0.1
    assert (read("gpt1").block, read("gpt1").mlp) == ("post-norm", "gelu")  # "gelu" is tanh there
    assert read("falcon-7b").mlp == "exact-gelu"
    assert (read("command-r").logit_scale, read("granite-3.0-8b").logit_scale) == (1 / 16, 1 / 16)
    assert read("granite-3.0-8b").attention_scale == 1 / 128


# ---- other forms of published folders ------------------------------------------------------------


def test_shards_and_half_precision(tmp_path):
    stored = reference("qwen3", SIZES | {"head_dim": 16}).bfloat16()
    stored.save_pretrained(tmp_path, max_shard_size="40KB")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_logits(ours, theirs)
    half = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_logits(half, theirs, tolerance=0.1)
    half.save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    next(iter(tmp_path.glob("model-0*.safetensors"))).unlink()
    with pytest.raises(ValueError, match=r"model-0000\d-of-0000\d.safetensors"):
        GPT.from_pretrained(tmp_path)


def test_the_published_file_of_gpt2(tmp_path):
    """Its names have no prefix, it has no head, and it stores the buffers of the causal mask."""
    theirs = reference("gpt2", GPT2)
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored = {name.removeprefix("transformer."): t.clone() for name, t in stored.items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    stored["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_a_file_that_stores_more_than_weights(llama):
    """It has rotary frequencies, and the head of a tied model."""
    stored = load_file(llama / "model.safetensors")
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, llama / "model.safetensors", {"format": "pt"})
    edit_json(llama / "config.json", tie_word_embeddings=True)
    model = GPT.from_pretrained(llama)
    assert model.head.weight is model.token_embedding.weight
    assert_same_logits(model, AutoModelForCausalLM.from_pretrained(llama))
    stored["lm_head.weight"][0] += 1
    save_file(stored, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight differs"):
        GPT.from_pretrained(llama)


def test_a_model_does_not_need_its_files_after_loading(llama):
    model = GPT.from_pretrained(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    os.truncate(llama / "model.safetensors", 0)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    batch = {"tokens": tokens(2, 9)}
    model.loss(batch)[0].backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported: qwen3, llama"),
        ({"model_type": "cohere2"}, "'cohere2' .Cohere2ForCausalLM has a window .*; supported:"),
        ({"model_type": ...}, "model_type is None"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported: qwen3"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'Llama.*; supported: a list"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"mlp_bias": True}, "mlp_bias is True; supported: False"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear.*supported: default"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one for all layers"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": ...}, "whole heads"),
        ({"rope_scaling": "linear"}, "rope_parameters is 'linear'; .*object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"hidden_size": ...}, "hidden_size is None; .*type int"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_attention_heads": 5}, "not divisible"),
        ({"num_hidden_layers": 3}, "llama: tensors .*config.json, 9 in all: model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is unexpected"),
        ({"intermediate_size": 65}, r"gate_proj.weight is \(64, 48\), not \(65, 48\)"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
    ],
)
def test_refused_config(llama, fields, message):
    edit_json(llama / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(llama)


@pytest.mark.parametrize(
    "variant, fields, message",
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "architectures .*Sequence"),
        ("gpt1", {"afn": "relu"}, "afn is 'relu'; supported: 'gelu'"),
        ("gpt1", {"architectures": ["OpenAIGPTDoubleHeadsModel"]}, "Double.*OpenAIGPTLMHeadModel"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("falcon-7b", {"alibi": True}, "alibi is True; supported: False"),
        ("falcon-7b", {"multi_query": False}, "multi_query is False; supported: True"),
        ("falcon-40b", {"parallel_attn": False}, "parallel_attn is False; supported: True"),
        ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3; supported"),
        ("falcon-40b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("command-r", {"use_qk_norm": True}, "use_qk_norm is True; supported: False"),
        ("command-r", {"rope_parameters": ...}, "rope_theta is None"),
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier is 0.0; .*above 0"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling is 0.0; supported: .*above 0"),
        ("granite", {"residual_multiplier": -1.0}, "residual_scale is -1.0; it must be above 0"),
        ("mistral-window", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("mistral-window", {"use_sliding_window": False}, "use_sliding_window is False"),
        ("qwen3-tied", {"attention_bias": True}, "attention_bias is True; supported: False"),
        ("qwen3-window", {"layer_types": ["full_attention", "sliding_attention"]}, "one type"),
        ("qwen3-window", {"layer_types": ..., "max_window_layers": 1}, "one type for all layers"),
    ],
)
def test_refused_config_of_other_architectures(tmp_path, variant, fields, message):
    reference(*VARIANTS[variant]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_refused_weights(llama):
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is not a readable"):
            GPT.from_pretrained(llama)
    path.write_bytes(whole)
    stored = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, path)
    with pytest.raises(ValueError, match=r"1 in all: .*layers.1.mlp.up_proj.weight is missing"):
        GPT.from_pretrained(llama)
    path.rename(llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle.*save_pretrained\(new_folder\)"):
        GPT.from_pretrained(llama)
    (llama / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        GPT.from_pretrained(llama)


# ---- export --------------------------------------------------------------------------------------

LIKE_GPT2 = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
SMALL = GPTConfig(
    vocab_size=300, context_length=64, n_layer=2, n_head=4, d_model=32, zero_init=False
)


@pytest.mark.parametrize(
    "changes, architecture",
    [
        ({}, "Qwen3ForCausalLM"),
        ({"window": 4, "n_kv_head": 2}, "Qwen3ForCausalLM"),
        ({"qk_norm": False, "rope_factor": 4.0, "rope_original_context": 16}, "LlamaForCausalLM"),
        ({"qk_norm": False, "window": 4}, "MistralForCausalLM"),
        ({"qk_norm": False, "n_head": 5, "d_head": 6}, "MistralForCausalLM"),
        (STYLES["granite"], "GraniteForCausalLM"),
        (STYLES["palm"] | {"n_kv_head": 1, "d_head": 6}, "CohereForCausalLM"),
        (STYLES["falcon"] | {"n_kv_head": 2}, "FalconForCausalLM"),
    ],
)
def test_export_of_our_own_configs(tmp_path, changes, architecture):
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **changes))
    model.save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(exported).__name__ == architecture
    assert_same_logits(model, exported)
    assert_same_logits(model, lambda x: exported(x, use_cache=False))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mlp": "relu2"}, "Qwen3ForCausalLM.*mlp 'swiglu', not 'relu2'"),
        ({"bias": True}, "Qwen3ForCausalLM.*bias False, not True"),
        (LIKE_GPT2, "GPT2LMHeadModel.*bias True, not False"),
        (LIKE_GPT2 | {"bias": True, "n_kv_head": 2}, "n_kv_head 4, not 2"),
        (STYLES["bloom"] | {"d_ff": 100}, "BloomForCausalLM.*d_ff 128, not 100"),
        (STYLES["falcon"] | {"position": "alibi"}, "FalconForCausalLM.*position 'rope', not"),
        (STYLES["palm"] | {"bias": True}, "CohereForCausalLM.*bias False, not True"),
        ({"qk_norm": False, "block": "parallel"}, "Llama.*block 'pre-norm', not 'parallel'"),
    ],
)
def test_refused_export(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(replace(SMALL, **changes)).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


TEXT = "the cat sat on the mat, and the dog — über 12.5 words\n\tate <|endoftext|> it. 猫\n" * 20


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece", "sentencepiece-unigram"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_export_with_a_tokenizer(tmp_path, kind, qk_norm):
    ours = tokenizer.train(kind, [TEXT], 257 if kind == "bytes" else 280)
    model = GPT(replace(SMALL, qk_norm=qk_norm))
    model.save_pretrained(tmp_path, ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = TEXT.replace("<|endoftext|>", "")
    assert theirs.encode(plain, add_special_tokens=False) == ours.encode(plain)
    assert theirs.decode(ours.encode(plain)) == plain
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.generation_config.eos_token_id == exported.config.eos_token_id == ours.eot
    assert theirs.eos_token_id == ours.eot
    assert tokenizer.load(tmp_path).encode(TEXT) == ours.encode(TEXT)


def test_an_incomplete_export_does_not_load(tmp_path, monkeypatch):
    model = GPT(SMALL)
    ours = tokenizer.train("bytes", [TEXT], 257)
    with pytest.raises(ValueError, match="257 tokens, the model 200"):
        GPT(replace(SMALL, vocab_size=200)).save_pretrained(tmp_path, ours)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    model.save_pretrained(tmp_path, ours)
    with pytest.raises(ValueError, match="overwrite"):
        model.save_pretrained(tmp_path)
    other = GPT(replace(SMALL, n_layer=1))
    real = os.replace

    def fail(source, target):
        if "model.safetensors" in str(target):
            raise OSError("disk full")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            other.save_pretrained(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"config.json"):
        GPT.from_pretrained(tmp_path)
    other.save_pretrained(tmp_path, overwrite=True)
    assert GPT.from_pretrained(tmp_path).config.n_layer == 1
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("bias", [False, True])
def test_the_first_stage_of_bark_is_a_gpt_by_config(bias):
    """From text to semantic tokens. It reads more kinds of tokens than it writes."""
    sizes = {"block_size": 24, "num_layers": 2, "num_heads": 4, "hidden_size": 32}
    theirs = transformers.models.bark.BarkSemanticModel(
        transformers.models.bark.BarkSemanticConfig(
            input_vocab_size=60, output_vocab_size=40, bias=bias, dropout=0.0, **sizes
        )
    )
    tensors = random_weights(theirs.double).state_dict()
    style = STYLES["gpt2"] | {"mlp": "exact-gelu", "bias": bias, "tied": False}
    config = GPTConfig(vocab_size=60, context_length=24, n_layer=2, n_head=4, d_model=32, **style)
    ours = GPT(config).double()
    own = {
        "token_embedding.weight": tensors["input_embeds_layer.weight"],
        "position_embedding.weight": tensors["position_embeds_layer.weight"],
        "head.weight": torch.nn.functional.pad(tensors["lm_head.weight"], (0, 0, 0, 20)),
    }
    for kind in ("weight", "bias") if bias else ("weight",):
        own[f"norm.{kind}"] = tensors[f"layernorm_final.{kind}"]
        for i in range(2):
            block, layer = f"blocks.{i}", f"layers.{i}"
            names = {"norm1": "layernorm_1", "norm2": "layernorm_2", "mlp.up": "mlp.in_proj"}
            names |= {"attention.out": "attn.out_proj", "mlp.down": "mlp.out_proj"}
            for name, other in names.items():
                own[f"{block}.{name}.{kind}"] = tensors[f"{layer}.{other}.{kind}"]
            joint = tensors[f"{layer}.attn.att_proj.{kind}"].chunk(3)
            for name, part in zip("qkv", joint):
                own[f"{block}.attention.{name}.{kind}"] = part
    ours.load_state_dict(own)
    tokens = torch.randint(60, (3, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[..., :40], theirs(input_ids=tokens).logits)
