"""The ledgers of published systems: parameters and FLOPs equal those of the reference modules."""

import re
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinyfm.calc import __main__ as calc
from tinyfm.calc import systems
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.gpt import GPT
from tinyfm.recipes import registry
from tinyfm.seq2seq import Seq2Seq, Seq2SeqConfig

# ---- each system as the reference libraries build it; c is its shape -----------------------------


def decoder(name, c):
    """Classes whose configs share the field names of Llama."""
    fields = {
        "hidden_size": c["d_model"],
        "num_hidden_layers": c["layers"],
        "vocab_size": c["vocab"],
        "num_attention_heads": c["heads"],
        "num_key_value_heads": c["kv_heads"],
        "head_dim": c["d_head"],
        "intermediate_size": c["d_ff"],
        "tie_word_embeddings": c["head"] == "tied",
    }
    if name.startswith("mixtral"):
        return hf.MixtralForCausalLM(hf.MixtralConfig(**fields, num_local_experts=c["experts"]))
    if name.startswith("mistral"):
        return hf.MistralForCausalLM(hf.MistralConfig(**fields, sliding_window=c["window"]))
    if name.startswith("granite"):
        return hf.GraniteForCausalLM(hf.GraniteConfig(**fields))
    if name.startswith("qwen3"):
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**fields))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**fields))


def gpt(name, c):
    sizes = {
        "n_layer": c["layers"],
        "n_embd": c["d_model"],
        "n_head": c["heads"],
        "vocab_size": c["vocab"],
        "n_positions": c["positions"],
    }
    if name == "gpt1":
        return hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**sizes))
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_inner=c["d_ff"]))


def palm(name, c):
    """PaLM's block is Cohere's."""
    config = hf.CohereConfig(
        hidden_size=c["d_model"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"],
        head_dim=c["d_head"],
        intermediate_size=c["d_ff"],
        vocab_size=c["vocab"],
    )
    return hf.CohereForCausalLM(config)


def opt(name, c):
    narrow = c["d_embed"] > 0
    config = hf.OPTConfig(
        hidden_size=c["d_model"],
        num_hidden_layers=c["layers"],
        ffn_dim=c["d_ff"],
        num_attention_heads=c["heads"],
        vocab_size=c["vocab"],
        max_position_embeddings=c["context"],
        word_embed_proj_dim=c["d_embed"] if narrow else c["d_model"],
        do_layer_norm_before=not narrow,
    )
    return hf.OPTForCausalLM(config)


def bloom(name, c):
    config = hf.BloomConfig(
        hidden_size=c["d_model"], n_layer=c["layers"], n_head=c["heads"], vocab_size=c["vocab"]
    )
    return hf.BloomForCausalLM(config)


def falcon(name, c):
    config = hf.FalconConfig(
        hidden_size=c["d_model"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        num_kv_heads=c["kv_heads"],
        new_decoder_architecture=c["norms"] == 2,
        vocab_size=c["vocab"],
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
    )
    return hf.FalconForCausalLM(config)


def bert(name, c):
    sizes = {
        "hidden_size": c["d_model"],
        "num_hidden_layers": c["layers"],
        "num_attention_heads": c["heads"],
        "intermediate_size": c["d_ff"],
        "vocab_size": c["vocab"],
        "max_position_embeddings": c["positions"],
    }
    if name.startswith("roberta"):
        return hf.RobertaForMaskedLM(hf.RobertaConfig(**sizes, type_vocab_size=1))
    if name.startswith("electra"):
        width = c["d_embed"] or c["d_model"]
        return hf.ElectraForPreTraining(hf.ElectraConfig(**sizes, embedding_size=width))
    if name == "distilbert":
        return hf.DistilBertModel(hf.DistilBertConfig())
    return hf.BertModel(hf.BertConfig(**sizes))


def xlnet(name, c):
    config = hf.XLNetConfig(
        d_model=c["d_model"], n_layer=c["layers"], n_head=c["heads"], d_inner=c["d_ff"]
    )
    return hf.XLNetLMHeadModel(config)


def marian(name, c):
    config = hf.MarianConfig(
        d_model=c["d_model"],
        encoder_layers=c["layers"],
        decoder_layers=c["layers"],
        encoder_attention_heads=c["heads"],
        decoder_attention_heads=c["heads"],
        encoder_ffn_dim=c["d_ff"],
        decoder_ffn_dim=c["d_ff"],
        vocab_size=c["vocab"],
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return hf.MarianMTModel(config)


def t5(name, c):
    v11 = c["head"] == "untied"
    config = hf.T5Config(
        d_model=c["d_model"],
        d_kv=c["d_head"],
        d_ff=c["d_ff"],
        num_layers=c["layers"],
        num_heads=c["heads"],
        vocab_size=c["vocab"],
        feed_forward_proj="gated-gelu" if v11 else "relu",
    )
    model = hf.T5ForConditionalGeneration(config)
    if v11:  # transformers ties each head that it builds, and unties what it loads
        model.lm_head = torch.nn.Linear(c["d_model"], c["vocab"], bias=False)
    return model


def whisper(name, c):
    config = hf.WhisperConfig(
        d_model=c["d_model"],
        encoder_layers=c["layers"],
        decoder_layers=c["layers"],
        encoder_attention_heads=c["heads"],
        decoder_attention_heads=c["heads"],
        encoder_ffn_dim=c["d_ff"],
        decoder_ffn_dim=c["d_ff"],
        vocab_size=c["vocab"],
    )
    return hf.WhisperForConditionalGeneration(config)


def musicgen(name, c):
    config = hf.MusicgenDecoderConfig(
        hidden_size=c["d_model"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        ffn_dim=c["d_ff"],
        vocab_size=c["vocab"],
    )
    return hf.MusicgenForCausalLM(config)


def clip_text_config(c):
    return {
        "hidden_size": c["d_model"],
        "num_hidden_layers": c["layers"],
        "num_attention_heads": c["heads"],
        "intermediate_size": c["d_ff"],
    }


def clip(name, c):
    if name == "sd1-text":
        return hf.CLIPTextModel(hf.CLIPTextConfig(**clip_text_config(c)))
    D = c["image_width"]
    vision = {
        "hidden_size": D,
        "num_hidden_layers": c["image_layers"],
        "patch_size": c["patch"],
        "num_attention_heads": D // 64,
        "intermediate_size": 4 * D,
    }
    config = hf.CLIPConfig(
        text_config=clip_text_config(c), vision_config=vision, projection_dim=c["outputs"]
    )
    return hf.CLIPModel(config)


def vit(name, c):
    config = hf.ViTConfig(
        hidden_size=c["d_model"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        intermediate_size=c["d_ff"],
        patch_size=c["patch"],
        num_labels=1000,
    )
    return hf.ViTForImageClassification(config)


def unet(name, c):
    attention = "AttnDownBlock2D" if name.startswith("ddpm") else "CrossAttnDownBlock2D"
    down = []
    for level in range(len(c["channels"])):
        down.append(attention if level in c["attention"] else "DownBlock2D")
    fields = {
        "sample_size": c["side"],
        "block_out_channels": c["channels"],
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
    }
    if name.startswith("ddpm"):
        return diffusers.UNet2DModel(**fields, attention_head_dim=None)
    if name == "sdxl-unet":
        fields |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "transformer_layers_per_block": [1, 2, 10],
        }
    heads = [width // 64 for width in c["channels"]] if c["d_head"] else 8
    return diffusers.UNet2DConditionModel(
        **fields, cross_attention_dim=c["cross"], attention_head_dim=heads
    )


def vae(name, c):
    n = len(c["channels"])
    return diffusers.AutoencoderKL(
        block_out_channels=c["channels"],
        latent_channels=c["latent"],
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * n,
        up_block_types=["UpDecoderBlock2D"] * n,
    )


def resnet(name, c):
    return hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000))


def mobilenet(name, c):
    return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(num_labels=1000))


BUILDERS = {
    "gpt": gpt, "opt": opt, "bloom": bloom, "falcon": falcon, "llama": decoder, "palm": palm,
    "bert": bert, "roberta": bert, "distilbert": bert, "electra": bert, "xlnet": xlnet, "t5": t5,
    "t5-v1.1": t5, "transformer": marian, "marian": marian,
    "whisper": whisper, "musicgen": musicgen, "clip": clip, "clip-text": clip, "vit": vit,
    "unet": unet, "vae": vae, "resnet": resnet, "mobilenet": mobilenet,
}  # fmt: skip
# Parameters of families that neither library has: counted from the code of their authors, or by
# the formulas of their papers.
EXACT = {
    "adm-64": 295_904_454, "adm-128": 421_529_606, "adm-256": 553_838_086, "adm-512": 558_997_638,
    "dit-b2": 130_315_808, "dit-l2": 457_840_672, "dit-xl2": 674_834_720, "dit-s2": 32_865_056,
    # Likewise 80 x 13 D^2 + V D, with two gains per block.
    "gopher-280b": 279_697_162_240 + 161 * 16384, "chinchilla-70b": 70_055_362_560 + 161 * 8192,
}  # fmt: skip


def build(name):
    system = systems.get(name)
    with torch.device("meta"):
        return BUILDERS[system.family](name, system.shape)


def count_trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", systems.rows())
def test_parameters_equal_the_reference(name):
    system = systems.get(name)
    if name in EXACT:
        assert system.parameters == EXACT[name]
    else:
        assert system.parameters == count_trained(build(name))


# A system of each kind that our GPT can be.
GPTS = (
    "gpt1", "gpt3-175b", "jurassic1-jumbo", "bloom-176b", "mistral-7b", "llama3.2-1b",
    "qwen3-0.6b", "granite-3.0-8b", "falcon-7b", "falcon-180b", "palm-540b", "command-r",
)  # fmt: skip


@pytest.mark.parametrize("name", GPTS)
def test_our_gpt_has_the_size_of_the_system_that_it_is(name):
    system = systems.get(name)
    with torch.device("meta"):
        ours = GPT(calc.gpt_config(system))
    assert count_trained(ours) == system.parameters
    if not system.shape["window"]:
        assert ours.flops_per_row() == system.flops_per_row()


@pytest.mark.parametrize(
    "name", ("transformer-2017-base", "opus-mt-en-de", "t5-3b", "t5-v1_1-base")
)
def test_our_seq2seq_has_the_size_of_the_system_that_it_is(name):
    system = systems.get(name)
    c = system.shape
    config = Seq2SeqConfig(
        vocab_size=c["vocab"], context_length=c["context"], n_layer=c["layers"],
        n_head=c["heads"], d_model=c["d_model"], d_head=c["d_head"], d_ff=c["d_ff"],
        tied=c["head"] == "tied",
    )  # fmt: skip
    if system.family.startswith("t5"):
        config = replace(config, mlp="relu" if config.tied else "geglu")
    else:
        kind = {"position": "sinusoid", "norm": "post", "norm_kind": "layernorm"}
        config = replace(config, mlp="silu", bias=True, **kind)
    with torch.device("meta"):
        ours = Seq2Seq(config)
    assert count_trained(ours) == system.parameters
    if c["targets"] == c["context"]:
        assert ours.flops_per_row() == system.flops_per_row()


def test_dit_is_that_of_diffusers_with_one_embedding_a_block():
    """diffusers repeats the embedding of time and class in each block; the authors have it once."""
    for name in ("dit-s2", "dit-b2", "dit-l2", "dit-xl2"):
        c = systems.get(name).shape
        with torch.device("meta"):
            theirs = diffusers.DiTTransformer2DModel(
                num_attention_heads=c["heads"],
                attention_head_dim=c["d_head"],
                out_channels=8,
                num_layers=c["layers"],
                sample_size=32,
            )
        parts = systems.get(name).by_part("parameters")
        once = parts["time"] + parts["embedding"]
        assert count_trained(theirs) == systems.get(name).parameters + (c["layers"] - 1) * once


# ---- FLOPs --------------------------------------------------------------------------------------


def tokens(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def noise(*shape):
    return torch.zeros(shape)


INPUTS = {
    "gpt2": lambda m: m(tokens(1, 1024), use_cache=False),
    "bloom-560m": lambda m: m(tokens(1, 2048), use_cache=False),
    "opt-350m": lambda m: m(tokens(1, 2048), use_cache=False),
    "bert-base": lambda m: m(tokens(1, 512)),
    "roberta-base": lambda m: m(tokens(1, 512)),
    "electra-small": lambda m: m(tokens(1, 512)),
    "distilbert": lambda m: m(tokens(1, 512)),
    "xlnet-base": lambda m: m(tokens(1, 512)),
    "t5-3b": lambda m: m(tokens(1, 512), decoder_input_ids=tokens(1, 114), use_cache=False),
    "clip-vit-b32": lambda m: m(tokens(1, 77), noise(1, 3, 224, 224)),
    "vit-b16": lambda m: m(noise(1, 3, 224, 224)),
    "whisper-tiny": lambda m: m(noise(1, 80, 3000), decoder_input_ids=tokens(1, 448)),
    "resnet-50": lambda m: m(noise(1, 3, 224, 224)),
    "mobilenetv2": lambda m: m(noise(1, 3, 224, 224)),
    "ddpm-cifar10": lambda m: m(noise(1, 3, 32, 32), 0),
    "sd1-unet": lambda m: m(noise(1, 4, 64, 64), 0, noise(1, 77, 768)),
    "sd1-vae": lambda m: m(noise(1, 3, 512, 512)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_forward_flops_equal_those_that_torch_counts(name):
    """On meta tensors; on fake ones where the reference code needs a CPU device."""
    system = systems.get(name)
    counter = FlopCounterMode(display=False)
    empty = FakeTensorMode() if name in ("gpt2", "xlnet-base") else torch.device("meta")
    with empty, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = BUILDERS[system.family](name, system.shape).eval()
        with counter:
            INPUTS[name](model)
    assert system.flops_per_row(backward=False) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("preset", "system"),
    [("gpt2-124m", "gpt2"), ("gpt2-1.5b", "gpt2-xl"), ("llama-1b", "llama3.2-1b")],
)
def test_large_presets_have_the_published_shapes(preset, system):
    run = registry.get_preset(preset).run
    with torch.device("meta"):
        model = run.build_model()
    published = systems.get(system, run.model.context_length)
    assert published.parameters == count_trained(model)
    assert published.flops_per_row() == model.flops_per_row()


# ---- published figures --------------------------------------------------------------------------


def rounded(figure):
    """The value of a figure such as "174600M", and half a unit of its last digit."""
    digits, letter = re.fullmatch(r"([\d.]+)([MB]?)", figure).groups()
    scale = {"M": 1e6, "B": 1e9, "": 1}[letter]
    places = len(digits.partition(".")[2])
    return float(digits) * scale, 0.5 * scale / 10**places


def test_published_figures_hold_within_their_rounding():
    checked = 0
    for name, row in systems.rows().items():
        if row["published"]:
            value, half = rounded(row["published"])
            assert abs(systems.get(name).parameters - value) <= half, name
            checked += 1
        else:
            assert row["note"], f"{name}: no published figure, and no note that says why"
    assert checked > 85


def test_figures_that_count_something_else():
    """Where a source counts something else, the difference is the one that the note states."""
    get = systems.get
    assert get("llama2-70b").parameters == 68_976_653_312 - 80 * 64  # rotary frequencies
    head = 65_024 * get("falcon-180b").shape["d_model"]
    assert get("falcon-180b").parameters + head == 179_522_565_120  # its head, stored twice
    assert get("gpt2").parameters - 102_144 == 124_337_664  # without biases
    # The formula of PaLM's paper, 118 (2 D 12288 + 2 D 256 + 12 D^2) + V D, and a gain a norm.
    assert get("palm-540b").parameters - 119 * 18432 == 540_354_281_472
    blocks = get("bloom-176b").stacks[1]
    assert blocks.total("parameters") / blocks.n == 2_466_437_120
    assert get("bloom-176b").by_part("parameters")["embedding"] == 3_596_615_680
    sd1 = [get(f"sd1-{part}").parameters for part in ("unet", "vae", "text")]
    assert sum(sd1) == 1_066_235_307
    assert get("mixtral-8x7b").active == pytest.approx(12.9e9, rel=2e-3)


def test_published_flops():
    assert systems.get("gpt2").flops_per_row(backward=False) == 291_648_307_200  # nanoGPT's table
    assert systems.get("gpt2").flops_per_row() == 874_944_921_600
    for name, gmacs in (("s2", 6.06), ("b2", 23.01), ("l2", 80.71), ("xl2", 118.64)):
        assert systems.get(f"dit-{name}").total("macs") / 1e9 == pytest.approx(gmacs, abs=0.021)
    for name, gflops in (("b32", 14.78), ("b16", 41.09), ("l14", 175.33)):  # open_clip's table
        got = systems.get(f"clip-vit-{name}").flops_per_row(backward=False)
        assert got / 1e9 == pytest.approx(gflops, abs=0.006)


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("gpt2", 85_056_000), ("bloom-176b", 172_650_655_744), ("opt-350m", 303_357_952),
        ("qwen3-0.6b", 440_467_456), ("llama2-70b", 68_452_360_192), ("bert-base", 85_646_592),
        ("t5-small", 44_056_576), ("t5-v1_1-base", 198_228_480),
    ],
)  # fmt: skip
def test_non_embedding_parameters(name, n):
    assert systems.get(name).non_embedding == n


# ---- the table ----------------------------------------------------------------------------------


def test_the_context_changes_attention_only():
    short = systems.get("llama3-8b", 1024)
    long = systems.get("llama3-8b", 2048)
    assert short.parameters == long.parameters
    c = short.shape
    scores = 12 * c["layers"] * c["heads"] * c["d_head"]
    assert long.flops_per_row() - 2 * short.flops_per_row() == scores * (2048**2 - 2 * 1024**2)
    window = systems.get("mistral-7b", 8192).by_part("products")["attention"]
    assert window == 2 * 32 * 4096 * 8192 * 4096


@pytest.mark.parametrize(
    ("name", "context", "message"),
    [
        ("gpt3-175", 0, "no system 'gpt3-175'; did you mean gpt3-175b"),
        ("Llama-7B", 0, "did you mean llama-7b"),
        ("zzz", 0, "--list"),
        ("gpt2", 2048, "context 2048: .*1 to 1024"),
        ("llama-7b", -1, "context -1: .*at least 1"),
        ("resnet-50", 10, "resnet-50 has rows of a fixed size"),
    ],
)
def test_refused_names_and_contexts(name, context, message):
    with pytest.raises(ValueError, match=message):
        systems.get(name, context)


# ---- how much they were trained -----------------------------------------------------------------


def test_tokens_of_bert():
    """Devlin et al. 2019, appendix A.2: 1M steps of 256 rows of 512 tokens, about 40 epochs.

    It is an upper bound: 90% of the steps had rows of 128 tokens.
    """
    for name in ("bert-base", "bert-large"):
        trained = systems.get(name).trained
        assert trained == pytest.approx(256 * 512 * 1e6, rel=1e-3)
        assert trained / 3.3e9 == pytest.approx(40, abs=0.5)
    assert "at most" in systems.get("bert-base").note


ENCODER_FIELDS = {"n_layer": "layers", "n_head": "heads", "vocab_size": "vocab"}
ENCODER_FIELDS |= {"d_model": "d_model", "d_ff": "d_ff", "d_embedding": "d_embed"}
ENCODERS = [name for name in systems.rows() if re.match("bert|roberta|distilbert|electra", name)]


@pytest.mark.parametrize("name", ENCODERS)
def test_the_encoder_of_this_repository_has_the_ledger_s_counts(name):
    system = systems.get(name)
    c = system.shape
    sizes = {field: c[column] for field, column in ENCODER_FIELDS.items()}
    kind = "electra" if system.family == "electra" else "mlm"
    first = c["positions"] - c["context"]  # rows to spare, of RoBERTa
    with torch.device("meta"):
        model = Encoder(
            EncoderConfig(
                **sizes, context_length=c["context"], segments=c["types"], norm="post", mlp="gelu",
                position="learned", bias=True, first_position=first, objective=kind,
                generator_head=0,
            )
        )  # fmt: skip
    heads = [part for part in ("head", "detector") if hasattr(model, part)]
    count = {name: 0 for name, _ in model.named_children()}
    for parameter, p in model.named_parameters():
        count[parameter.split(".")[0]] += p.numel()
    if system.family in ("bert", "distilbert"):  # counted with BERT's pooler or without a head
        pooler = system.parameters_by_part().get("output", 0)
        assert count["embeddings"] + count["tower"] == system.parameters - pooler
    else:
        assert sum(count.values()) == system.parameters
    # FLOPs of the blocks.
    linear = [m for part in heads for m in getattr(model, part).modules()]
    weights = sum(m.weight.numel() for m in linear if isinstance(m, torch.nn.Linear))
    read = model.share if heads == ["head"] else 1
    blocks = model.flops_per_row() - 6 * read * c["context"] * weights
    parts = system.flops_by_part()
    found = sum(sum(parts.get(part, (0, 0))) for part in ("attention", "mlp", "projection"))
    assert blocks == pytest.approx(found, rel=1e-9)
