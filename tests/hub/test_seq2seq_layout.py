"""Encoder-decoders of transformers, read and written: equal logits, with padding."""

import itertools
import json

import pytest
import torch
import transformers
from conftest import assert_equal_weights, count_parameters, edit_json, random_weights
from safetensors.torch import load_file, save_file

from tinyfm import tokenizer
from tinyfm.beam import Beams
from tinyfm.generate import Sampling
from tinyfm.hub import seq2seq
from tinyfm.seq2seq import Seq2Seq, Seq2SeqConfig

V, S, T = 41, 15, 11
MARIAN = {
    "vocab_size": V, "d_model": 24, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "max_position_embeddings": 20, "activation_function": "relu",
    "pad_token_id": 40, "decoder_start_token_id": 40, "eos_token_id": 0, "scale_embedding": True,
}  # fmt: skip
T5 = {
    "vocab_size": V, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 1,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0, "n_positions": 20,
}  # fmt: skip
V11 = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VARIANTS = {
    "2017": ("MarianMTModel", MARIAN),
    "marian": (
        "MarianMTModel",
        MARIAN | {"activation_function": "swish", "scale_embedding": False},
    ),
    "pegasus": ("PegasusForConditionalGeneration", MARIAN | {"activation_function": "gelu"}),
    "t5": ("T5ForConditionalGeneration", T5),
    "v1.1": ("T5ForConditionalGeneration", V11),
    "v1.1 tied": ("T5ForConditionalGeneration", V11),
    "mt5": ("MT5ForConditionalGeneration", V11),
}
UNTIED = ("v1.1", "mt5")


def save_reference(variant: str, folder, matrices: float = 0.1) -> torch.nn.Module:
    """Save a model of transformers with random weights; return it, as it is read from the folder.

    transformers ties every head, but when it reads a folder that holds another one.
    """
    title, sizes = VARIANTS[variant]
    kind = getattr(transformers, title)
    model = random_weights(lambda: kind(kind.config_class(**sizes)), matrices)
    for name, module in model.named_modules():
        if name.endswith("embed_positions"):
            module.weight.data = module.create_weight()  # no weights, but parameters there
    if variant == "marian":
        model.final_logits_bias = torch.randn(1, V)
    model.save_pretrained(folder)
    if variant in UNTIED:
        stored = load_file(folder / "model.safetensors")
        stored["lm_head.weight"] = torch.randn(V, 24)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return kind.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(params=VARIANTS)
def published(request, tmp_path):
    """A model of transformers, and the folder it was saved to."""
    return save_reference(request.param, tmp_path / "published"), tmp_path / "published"


@torch.no_grad()
def assert_same_logits(ours: Seq2Seq, theirs):
    """Equal logits for sources of unequal length, and without a mask."""
    g = torch.Generator().manual_seed(1)
    source = torch.randint(2, V, (3, S), generator=g)
    mask = torch.arange(S) < torch.tensor([4, S, 9])[:, None]
    inputs = torch.randint(2, V, (3, T), generator=g)
    found = ours(source, inputs, mask)
    expected = theirs(source, attention_mask=mask.long(), decoder_input_ids=inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected = theirs(source[:1], decoder_input_ids=inputs[:1]).logits
    torch.testing.assert_close(ours(source[:1], inputs[:1]), expected, atol=1e-5, rtol=1e-5)


def count_theirs(model: torch.nn.Module) -> int:
    """Number of weights; transformers counts the sinusoids of a Marian too."""
    own = model.named_parameters()
    return sum(p.numel() for name, p in own if "embed_positions" not in name)


def test_logits_both_ways(published, tmp_path):
    theirs, folder = published
    ours = Seq2Seq.from_pretrained(folder, torch.float64)
    assert not ours.training
    assert_same_logits(ours, theirs)
    assert count_parameters(ours) - ours.config.head_bias * V == count_theirs(theirs)

    ours.save_pretrained(tmp_path / "again")
    kind = type(theirs)
    if kind is transformers.MT5ForConditionalGeneration:
        kind = transformers.T5ForConditionalGeneration
    exported, info = kind.from_pretrained(
        tmp_path / "again", output_loading_info=True, dtype=torch.float64
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, exported)
    again = Seq2Seq.from_pretrained(tmp_path / "again", torch.float64)
    assert seq2seq.resolve(again.config) == seq2seq.resolve(ours.config)
    assert_equal_weights(again, ours)


# ---- texts --------------------------------------------------------------------------------------


def until(row: list[int], stops) -> list[int]:
    """A row of transformers' generate, after the start token and up to a stop token."""
    return [*itertools.takewhile(lambda token: token not in stops, row[1:])]


@pytest.mark.parametrize("variant", ["2017", "t5", "v1.1"])
def test_texts_are_those_of_transformers(variant, tmp_path):
    """Greedy and by beams; some texts end by a stop token, others by their length."""
    theirs = save_reference(variant, tmp_path, matrices=0.4)
    ours = Seq2Seq.from_pretrained(tmp_path, torch.float64)
    end = ours.config.end_id
    g = torch.Generator().manual_seed(2)
    source = torch.randint(2, V - 1, (6, S), generator=g)
    mask = torch.arange(S) < torch.tensor([4, S, 9, 1, 12, 6])[:, None]

    def expected(stops, **settings):
        rows = theirs.generate(
            source, attention_mask=mask.long(), max_new_tokens=12, do_sample=False,
            decoder_start_token_id=ours.config.start_id, eos_token_id=[end, *stops],
            pad_token_id=ours.config.pad_id, forced_eos_token_id=None, **settings,
        )  # fmt: skip
        return [until(row, (end, *stops)) for row in rows.tolist()]

    assert ours.generate(source, mask, Sampling(12, temperature=0)) == expected(())
    ends = set()
    many = range(5, 30)
    for width, penalty, stops in ((4, 1.0, ()), (4, 0.0, many), (3, 2.5, many), (2, -1.0, ())):
        found = ours.search(source, mask, Beams(width, penalty, 12, tuple(stops)))
        assert found == expected(stops, num_beams=width, length_penalty=penalty)
        ends |= {len(row) == 12 for row in found}
    assert ends == {True, False}


# ---- tokenizers and published files --------------------------------------------------------------


def test_a_tokenizer_ends_each_source(tmp_path):
    """AutoTokenizer builds the rows of training, and generate writes our text."""
    words = tokenizer.train("bytes", [], 257)
    config = Seq2SeqConfig(257, 20, n_layer=1, n_head=2, d_model=16, n_bucket=8, end_id=256,
                           start_id=256, pad_id=256)  # fmt: skip
    ours = random_weights(lambda: Seq2Seq(config), 0.3)
    ours.save_pretrained(tmp_path, words)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = read(["two", "a"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[*b"two", 256], [*b"a", 256, 256, 256]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 0, 0]]
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    rows = theirs.generate(**batch, do_sample=False).tolist()
    found = ours.generate(
        batch["input_ids"], batch["attention_mask"].bool(), Sampling(19, temperature=0)
    )
    assert [until(row, [256]) for row in rows] == found
    assert tokenizer.load(tmp_path).encode("two") == [*b"two"]


def test_tokenizers_that_are_not_read(tmp_path):
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")  # Marian has one too
    for name, advice in (("spiece.model", "writes a tokenizer.json"), ("source.spm", "Marian")):
        path = tmp_path / name
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{name} is not read; .*{advice}"):
            tokenizer.load(tmp_path)
        path.unlink()


def test_files_that_store_more_than_weights(tmp_path):
    """Copies of the tied table, sinusoids in half precision, T5's unused bias."""
    save_reference("2017", tmp_path / "2017")
    expected = Seq2Seq.from_pretrained(tmp_path / "2017")
    path = tmp_path / "2017" / "model.safetensors"
    stored = load_file(path)
    table = stored.pop("model.shared.weight")
    stored["model.encoder.embed_tokens.weight"] = table
    stored["lm_head.weight"] = table.clone()
    stored["model.encoder.embed_positions.weight"] = expected.sinusoids.half()
    save_file(stored, path, {"format": "pt"})
    assert_equal_weights(Seq2Seq.from_pretrained(tmp_path / "2017"), expected)
    stored["model.encoder.embed_positions.weight"][1] += 1
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_positions.weight is no table of sinusoids"):
        Seq2Seq.from_pretrained(tmp_path / "2017")
    stored["lm_head.weight"][3] += 1
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.shared.weight"):
        Seq2Seq.from_pretrained(tmp_path / "2017")

    theirs = save_reference("t5", tmp_path / "t5")
    path = tmp_path / "t5" / "model.safetensors"
    bias = torch.ones(8, 4)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(load_file(path) | {name: bias}, path, {"format": "pt"})
    # As transformers 4 writes it: one setting says that the head is tied, and so divided.
    edit_json(tmp_path / "t5" / "config.json", scale_decoder_outputs=..., num_decoder_layers=1)
    assert_same_logits(Seq2Seq.from_pretrained(tmp_path / "t5", torch.float64), theirs)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        ("t5", {"model_type": "umt5"}, r"UMT5.* bias of distances in each layer.*supported: mar"),
        ("t5", {"model_type": "bart"}, r"Bart.* learns its positions"),
        ("t5", {"model_type": "longt5"}, r"LongT5.* near tokens only"),
        ("t5", {"model_type": "gpt2"}, r"model_type is 'gpt2'; supported: marian"),
        ("t5", {"architectures": ["T5EncoderModel"]}, r"T5EncoderModel.*T5ForConditional"),
        ("t5", {"feed_forward_proj": "gated-silu"}, r"gated-silu.*gated-gelu, relu"),
        ("t5", {"num_layers": 3}, r"do not fit config.json"),
        ("t5", {"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]"),
        (
            "2017",
            {"share_encoder_decoder_embeddings": False},
            r"share_.* is False; supported: True",
        ),
        ("2017", {"decoder_ffn_dim": 44}, r"decoder_ffn_dim is 44; supported: 40"),
        ("2017", {"normalize_before": True}, r"normalize_before is True"),
        ("2017", {"activation_function": "tanh"}, r"activation_function is 'tanh'"),
    ],
)
def test_refused_settings(variant, fields, message, tmp_path):
    title, sizes = VARIANTS[variant]
    config = getattr(transformers, title).config_class(**sizes).to_dict()
    raw = config | {"architectures": [title]} | fields
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file({"shared.weight": torch.ones(V, 24)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Seq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "sinusoid"}, r"T5ForConditionalGeneration, needs position 'relative'"),
        ({"logit_scale": 0.5}, r"logit_scale 1.0, not 0.5"),
        ({"head_bias": True}, r"head_bias False, not True"),
    ],
)
def test_what_transformers_cannot_compute(fields, message, tmp_path):
    model = Seq2Seq(Seq2SeqConfig(V, 8, n_layer=1, n_head=2, d_model=8, **fields))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
