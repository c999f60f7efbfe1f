"""Adapters in peft's layout, written and read. The oracle is peft itself, on random weights."""

import json

import peft
import pytest
import torch
import transformers
from conftest import random_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPModel

from tinyfm import adapt
from tinyfm.adapt import AdapterConfig, lora
from tinyfm.adapt.peft import join, load_adapter_folder, save_adapter
from tinyfm.autoencoder import Autoencoder, AutoencoderConfig
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.gpt import STYLES

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft's use of transformers
    pytest.mark.filterwarnings("ignore:.*(tied|fan_in_fan_out):UserWarning"),
]
SIZES = {"vocab_size": 97, "context_length": 32, "n_layer": 2, "n_head": 4, "d_model": 32}
MODELS = {
    "qwen3": GPTConfig(**SIZES, n_kv_head=2, d_head=12),
    "llama": GPTConfig(**SIZES, n_kv_head=1, qk_norm=False),
    "gpt2": GPTConfig(
        **SIZES,
        position="learned",
        norm="layernorm",
        mlp="gelu",
        qk_norm=False,
        bias=True,
        tied=True,
    ),
    "falcon": GPTConfig(**SIZES | STYLES["falcon-40b"] | {"n_kv_head": 2}),
}
# Their names of the table of tokens, and of the first and last layer of the MLP.
LAYERS = {
    "gpt2": ("wte", "c_fc", "c_proj"),
    "falcon": ("word_embeddings", "dense_h_to_4h", "dense_4h_to_h"),
} | dict.fromkeys(("qwen3", "llama"), ("embed_tokens", "up_proj", "down_proj"))
CLIP_CONFIG = CLIPConfig(
    image_size=16,
    channels=3,
    patch_size=8,
    stem="patch",
    image_layer=1,
    image_width=32,
    image_head=2,
    vocab_size=60,
    context_length=8,
    text_layer=1,
    text_width=32,
    text_head=2,
    embed_dim=16,
    activation="quick_gelu",
    end_token=59,
)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """The kind of model, a function that loads it, and the folder that holds it."""
    folder = tmp_path_factory.mktemp(request.param)
    random_weights(lambda: GPT(MODELS[request.param])).save_pretrained(folder)
    return request.param, lambda: GPT.from_pretrained(folder), folder


def fill_b(model):
    """Make every B random, as training would: at the start B is zero, and A has no effect."""
    for name, p in model.named_parameters():
        if ".B." in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))


@torch.no_grad()
def assert_same_logits(ours, theirs):
    x = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x).logits, **CLOSE)


def assert_same_tensors(one, two):
    first = load_file(one / "adapter_model.safetensors")
    second = load_file(two / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", ["", ".", r"attention\.(q|v)$", r"1\.(attention\.(k|out)|mlp)|head"]
)
def test_our_adapter_in_peft_and_back(base, tmp_path, targets):
    _, make, folder = base
    model = make()
    before = adapt.base_hash(model)
    adapt.apply(model, "lora", AdapterConfig(3, 6.0, targets=targets))
    fill_b(model)
    save_adapter(model, tmp_path / "a", str(folder))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a"
    ).eval()
    assert_same_logits(model, theirs)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    adapted = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert adapted.keys() == stored.keys()  # no other layer is adapted
    x = torch.arange(9)[None]
    assert not torch.allclose(make()(x), model(x))
    again = make()
    load_adapter_folder(again, tmp_path / "a")
    assert torch.equal(again(x), model(x))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    assert adapt.base_hash(again) == before
    assert adapt.trained(again) == adapt.trained(model)


def load_theirs(base, config, path, *name):
    """(our model with an adapter that peft made and saved at path, peft's model)."""
    _, make, folder = base
    torch.manual_seed(0)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    theirs.save_pretrained(path)
    model = make()
    load_adapter_folder(model, path, *name)
    assert_same_logits(model, theirs)
    return model, theirs


@pytest.mark.parametrize("few", [True, False])
def test_their_adapter_here_and_back(base, tmp_path, few):
    kind, _, folder = base
    _, _, last = LAYERS[kind]
    if kind == "gpt2":
        names = ["c_attn"] if few else ["c_attn", "c_proj", "c_fc"]
    elif kind == "falcon":
        names = ["query_key_value"] if few else ["query_key_value", "dense", last]
    else:
        names = ["q_proj", "v_proj"] if few else "all-linear"
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        target_modules=names,
        init_lora_weights=False,
        rank_pattern={} if few else {last: 2},
        alpha_pattern={} if few else {f"0.mlp.{last}": 5},
        fan_in_fan_out=kind == "gpt2",
    )
    model, theirs = load_theirs(base, config, tmp_path / "theirs", "poems")
    save_adapter(model, tmp_path / "ours", str(folder), "poems")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_logits(model, peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval())
    adapt.merge(model)
    assert_same_logits(model, theirs.merge_and_unload())


def test_a_rank_stabilised_adapter(base, tmp_path):
    kind, _, folder = base
    names = list(LAYERS[kind][1:])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, init_lora_weights=False, use_rslora=True,
        rank_pattern={names[0]: 2}, fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    model, _ = load_theirs(base, config, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours", str(folder))
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_logits(model, peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval())


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
def test_a_token_table_must_be_that_of_the_base(base, tmp_path):
    kind, make, _ = base
    names = list(LAYERS[kind][:2])
    config = peft.LoraConfig(
        r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=kind == "gpt2"
    )
    load_theirs(base, config, tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    tables = [name for name in tensors if name.endswith("base_layer.weight")]
    assert len(tables) == (0 if kind in ("gpt2", "falcon") else 1)  # peft knows common names only
    for table in tables:
        save_file(tensors | {table: tensors[table] + 1}, path)
        with pytest.raises(ValueError, match="trained on another base"):
            load_adapter_folder(make(), tmp_path / "theirs")


def test_an_adapter_of_clip_both_ways(tmp_path):
    model = random_weights(lambda: CLIP(CLIP_CONFIG))
    model.save_pretrained(tmp_path / "base")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = torch.randint(58, (2, 8))
    tokens[:, -1] = 59

    @torch.no_grad()
    def assert_same(ours, theirs):
        # transformers reads (pixel - mean) / std; with 0.5 and 0.5 that is our range, [-1, 1].
        expected = theirs(pixel_values=images, input_ids=tokens).logits_per_image
        torch.testing.assert_close(ours(images, tokens), expected, atol=1e-4, rtol=1e-4)

    adapt.apply(model, "lora", AdapterConfig(3, targets="."))
    fill_b(model)
    save_adapter(model, tmp_path / "a", str(tmp_path / "base"))
    theirs = CLIPModel.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert_same(model, theirs)
    theirs.save_pretrained(tmp_path / "b")
    again = CLIP.from_pretrained(tmp_path / "base")
    load_adapter_folder(again, tmp_path / "b")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    assert_same(again, theirs)


def test_parts_of_c_attn_with_different_a_become_blocks():
    A = torch.randn(2, 3, 5)
    B = torch.randn(2, 4, 3)
    joined_A, joined_B = join({"q": (A[0], B[0]), "v": (A[1], B[1])}, [4, 4, 4], 1)
    expected = torch.cat((B[0] @ A[0], torch.zeros(4, 5), B[1] @ A[1]))
    torch.testing.assert_close(joined_B @ joined_A, expected)
    shared_A, shared_B = join({"q": (A[0], B[0]), "k": (A[0], B[1])}, [4, 4, 4], 1)
    torch.testing.assert_close(shared_B[:4] @ shared_A, B[0] @ A[0])
    assert shared_A.shape == (3, 5) and not shared_B[8:].any()


def test_an_untrained_adapter_keeps_all_its_layers(tmp_path):
    model = GPT(MODELS["gpt2"])
    adapt.apply(model, "lora", AdapterConfig(2, targets=r"\.q$"))
    save_adapter(model, tmp_path, "x")
    again = GPT(MODELS["gpt2"])
    load_adapter_folder(again, tmp_path)
    assert {name[-1] for name, _ in lora.adapted_layers(again)} == {*"qkv"}


# ---- bad input ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter for a Llama, and a Llama without it."""
    model = GPT(MODELS["llama"])
    adapt.apply(model, "lora", AdapterConfig(2, targets=r"\.q$"))
    save_adapter(model, tmp_path / "a", "base")
    return tmp_path / "a", GPT(MODELS["llama"])


@pytest.mark.parametrize(
    "field",
    [{"use_rslora": "yes"}, {"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"},
     {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}, {"never_heard_of": 1}, {"r": "2"},
     {"lora_alpha": 0}, {"lora_dropout": 2.0}, {"rank_pattern": {"(q": 2}}, {"r": 10**30},
     {"alpha_pattern": {"q_proj": -1}}, {"rank_pattern": {"q_proj": 1.5}}, {"r": True},
     {"rank_pattern": ["q"]}],
)  # fmt: skip
def test_unsupported_settings_are_refused_by_name(saved, field):
    folder, model = saved
    raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(raw | field), encoding="utf-8")
    with pytest.raises(ValueError, match=next(iter(field)).removeprefix("lora_")):
        load_adapter_folder(model, folder)
    assert not any(lora.adapted_layers(model))


def test_a_pattern_that_never_ends_is_stopped(saved):
    folder, model = saved
    raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    raw["alpha_pattern"] = {"(?:.|..|...)+(?:.|..|...)+[0-9]q": 3}
    (folder / "adapter_config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapter_config.json: alpha_pattern: .* over 0.5 s"):
        load_adapter_folder(model, folder)
    assert not any(lora.adapted_layers(model))


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"base_model.model.lm_head.lora_magnitude_vector": torch.ones(1)},
         "lm_head.lora_magnitude_vector is of no layer"),
        (lambda t: t | {LAYER.replace("q_proj", "x") + "A.weight": torch.ones(1)}, r"x.lora_A"),
        (lambda t: {n: v for n, v in t.items() if n != LAYER + "B.weight"}, "only lora_A"),
        (lambda t: t | {LAYER + "A.weight": torch.ones(2, 5)}, r"q_proj has A, B of .*\(2, 5\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(saved, change, message):
    folder, model = saved
    path = folder / "adapter_model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        load_adapter_folder(model, folder)
    assert not any(lora.adapted_layers(model))


def test_a_pickle_is_refused(saved):
    folder, model = saved
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        load_adapter_folder(model, folder)


def test_refused_exports(saved, tmp_path):
    folder, model = saved
    with pytest.raises(ValueError, match="no LoRA named 'default'"):
        save_adapter(model, tmp_path / "b", "base")
    load_adapter_folder(model, folder)
    with pytest.raises(ValueError, match="already"):
        save_adapter(model, folder, "base")
    save_adapter(model, folder, "base", overwrite=True)
    other = Autoencoder(AutoencoderConfig(8, channels=(8, 8), groups=4))
    adapt.apply(other, "lora", AdapterConfig(2))
    with pytest.raises(ValueError, match="Autoencoder has no layout"):
        save_adapter(other, tmp_path / "c", "base")
