"""Encoders in the Hugging Face layout: equality with transformers on random weights, both ways."""

import json
from pydoc_data.topics import topics

import pytest
import torch
import transformers
from conftest import assert_equal_weights, count_parameters, edit_json, random_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, pipeline

from tinyfm import tokenizer
from tinyfm.adapt.heads import Classifier, Reader
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.hub import classifier, encoder

transformers.logging.set_verbosity_error()
SIZES = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 20, "pad_token_id": 0,
}  # fmt: skip
DISTIL = {
    "vocab_size": 97, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4,
    "max_position_embeddings": 20,
}  # fmt: skip
FULL = ["full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 500.0}
NEAR = {"rope_type": "default", "rope_theta": 50.0}
MODERN = SIZES | {
    "layer_types": FULL, "local_attention": 6,
    "bos_token_id": None, "eos_token_id": None, "cls_token_id": None,
    "sep_token_id": None, "rope_parameters": {"full_attention": ROPE, "sliding_attention": NEAR},
}  # fmt: skip
BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
TEXTS = [*topics.values()][:9]
VARIANTS = {
    "bert": ("BertForMaskedLM", SIZES | {"type_vocab_size": 3}),
    "roberta": ("RobertaForMaskedLM", SIZES | {"pad_token_id": 1, "max_position_embeddings": 22}),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "generator": ("ElectraForMaskedLM", SIZES | {"embedding_size": 16}),
    "discriminator": ("ElectraForPreTraining", SIZES | {"embedding_size": 16}),
    "wide discriminator": ("ElectraForPreTraining", SIZES | {"embedding_size": 24}),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "modernbert with windows": (
        "ModernBertForMaskedLM",
        MODERN | {"layer_types": None, "num_hidden_layers": 5},
    ),
    "modernbert with biases": ("ModernBertForMaskedLM", MODERN | dict.fromkeys(BIASES, True)),
}


def reference(variant: str, **fields):
    """A model of transformers with random weights in float64."""
    title, sizes = VARIANTS[variant]
    kind = getattr(transformers, title)
    config = kind.config_class(**sizes | fields)
    return random_weights(lambda: kind(config)).double()


@pytest.fixture(params=VARIANTS)
def published(request, tmp_path):
    """A model of transformers, and the folder it was saved to."""
    model = reference(request.param)
    model.save_pretrained(tmp_path / "published")
    return model, tmp_path / "published"


@pytest.fixture
def bert(tmp_path):
    """A folder with a small BERT of transformers."""
    reference("bert").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def rows(pad: int, segments: int) -> dict[str, torch.Tensor]:
    """Three rows of unequal length, as transformers takes them."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 97, (3, 20), generator=g)
    mask = torch.arange(20) < torch.tensor([20, 7, 12])[:, None]
    batch = {"input_ids": tokens.where(mask, pad), "attention_mask": mask.long()}
    if segments:
        batch["token_type_ids"] = torch.randint(segments, (3, 20), generator=g)
    return batch


@torch.no_grad()
def assert_same_logits(ours: Encoder, theirs, tolerance=1e-5):
    """Equal logits at real tokens; for a row without padding also if no mask is passed."""
    batch = rows(ours.config.pad_id, ours.config.segments)
    mask = batch["attention_mask"].bool()
    segments = batch.get("token_type_ids")
    predict = ours.detect if ours.config.objective == "electra" else ours
    found = predict(batch["input_ids"], mask, segments)
    expected = theirs(**batch).logits
    torch.testing.assert_close(found[mask], expected[mask], atol=tolerance, rtol=tolerance)
    first = batch["input_ids"][:1]
    expected = theirs(first).logits
    torch.testing.assert_close(predict(first), expected, atol=tolerance, rtol=tolerance)


# ---- against transformers ------------------------------------------------------------------------


def test_logits_both_ways(published, tmp_path):
    theirs, folder = published
    ours = Encoder.from_pretrained(folder, torch.float64)
    assert not ours.training
    assert_same_logits(ours, theirs)
    assert count_parameters(ours) == theirs.num_parameters()

    ours.save_pretrained(tmp_path / "again")
    exported, info = type(theirs).from_pretrained(
        tmp_path / "again", output_loading_info=True, dtype=torch.float64
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(ours, exported)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    again = Encoder.from_pretrained(tmp_path / "again", torch.float64)
    assert encoder.resolve(again.config) == encoder.resolve(ours.config)
    assert_equal_weights(again, ours)


def test_an_electra_is_two_folders(tmp_path):
    config = EncoderConfig(
        vocab_size=97, context_length=20, n_layer=2, n_head=4, d_model=24, d_embedding=16,
        norm="post", position="learned", segments=2, mlp="gelu", bias=True, objective="electra",
        generator_head=2,
    )  # fmt: skip
    ours = random_weights(lambda: Encoder(config))
    ours.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert encoder.resolve(again.config) == encoder.resolve(config)
    assert_equal_weights(again, ours)
    batch = rows(0, 2)
    mask = batch["attention_mask"].bool()
    arguments = (batch["input_ids"], mask, batch["token_type_ids"])
    discriminator = transformers.ElectraForPreTraining.from_pretrained(tmp_path)
    generator = transformers.ElectraForMaskedLM.from_pretrained(tmp_path / "generator")
    pairs = ((ours.detect(*arguments), discriminator), (ours(*arguments), generator))
    for found, theirs in pairs:
        expected = theirs(**batch).logits
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)

    # Without its generator it is a discriminator, which can be trained for a task only.
    (tmp_path / "generator" / "config.json").unlink()
    alone = Encoder.from_pretrained(tmp_path)
    assert torch.equal(alone.detect(*arguments), ours.detect(*arguments))
    with pytest.raises(ValueError, match=r"no generator.*--init-from"):
        alone(*arguments)


def test_a_published_tokenizer_and_fill_mask(tmp_path):
    """The pipeline of transformers gives our candidates, with our probabilities."""
    words = tokenizer.train("wordpiece", TEXTS, 300)
    ours = random_weights(lambda: Encoder(EncoderConfig(300, 16, n_layer=2, d_model=32)), 0.5)
    ours.save_pretrained(tmp_path, words)
    fill = pipeline("fill-mask", str(tmp_path), top_k=3)
    found = fill("The [MASK] sat")
    row = [words.cls, *words.encode("The [MASK] sat", specials=True), words.eot]
    with torch.no_grad():
        p = ours(torch.tensor([row]))[0, row.index(words.mask)].softmax(-1)
    best = p.topk(3)
    assert [entry["token"] for entry in found] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([e["score"] for e in found]), best.values)
    assert fill.tokenizer.pad_token_id == words.pad == ours.config.pad_id


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_fill_mask_of_a_run(kind, tmp_path):
    """The tokenizers of our runs have no mask: it is the model's last row, and is named in export.

    A text starts after the end of another, as in training."""
    plain = tokenizer.train(kind, TEXTS, 400)
    words = plain.for_encoder(400)
    assert (words.mask, words.eot, words.vocab_size) == (400, plain.eot, 401)
    assert words.encode("The [MASK] of", specials=True)[:-1] == [*plain.encode("The"), 400]
    ours = random_weights(lambda: Encoder(EncoderConfig(401, 16, n_layer=1, d_model=32)), 0.5)
    ours.save_pretrained(tmp_path, words)
    fill = pipeline("fill-mask", str(tmp_path), top_k=3)
    row = [plain.eot, *plain.encode("The"), 400, *plain.encode(" statement")]
    with torch.no_grad():
        best = ours(torch.tensor([row]))[0, row.index(400)].softmax(-1).topk(3)
    found = fill("The [MASK] statement")
    assert [entry["token"] for entry in found] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([e["score"] for e in found]), best.values)


def test_a_classifier(tmp_path):
    """Its features are the mean state over the real tokens, so the folder holds code for them."""
    words = tokenizer.train("wordpiece", TEXTS, 300)
    body = random_weights(lambda: Encoder(EncoderConfig(300, 16, n_layer=2, d_model=32)))

    def read(body, batch):
        mask = batch["mask"]
        return body.hidden(batch["tokens"], mask).sum(1) / mask.sum(1, keepdim=True)

    reader = Reader(read, ("tokens", "mask"), lambda config: config.d_model, ("head",))
    ours = Classifier(body, {"label": ("no", "yes")}, reader).eval()
    torch.nn.init.normal_(ours.heads[0].weight)
    classifier.save(ours, tmp_path, words)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, trust_remote_code=True
    )
    batch = rows(0, 0)
    tokens, mask = batch["input_ids"][:, :16], batch["attention_mask"][:, :16]
    with torch.no_grad():
        (found,) = ours({"tokens": tokens, "mask": mask.bool()})
        expected = theirs(tokens, mask).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- other forms of published folders ------------------------------------------------------------


def test_the_first_files_of_bert(bert):
    """TensorFlow's names of the norms, stored copies of tied tensors, and the second loss."""
    stored = {}
    for name, tensor in load_file(bert / "model.safetensors").items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        stored[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor.clone()
    expected = Encoder.from_pretrained(bert)
    stored["bert.embeddings.position_ids"] = torch.arange(20)[None]
    stored["cls.predictions.decoder.weight"] = stored[
        "bert.embeddings.word_embeddings.weight"
    ].clone()
    stored["cls.predictions.decoder.bias"] = stored["cls.predictions.bias"].clone()
    stored["bert.pooler.dense.bias"] = torch.zeros(24)
    stored["cls.seq_relationship.bias"] = torch.zeros(2)
    save_file(stored, bert / "model.safetensors")
    edit_json(bert / "config.json", architectures=["BertForPreTraining"])
    with pytest.warns(UserWarning, match=r"bert.pooler.dense.bias, cls.seq_relationship.bias"):
        assert_equal_weights(Encoder.from_pretrained(bert), expected)
    stored["cls.predictions.decoder.weight"][3] += 1
    save_file(stored, bert / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder.weight differs"), pytest.warns(UserWarning):
        Encoder.from_pretrained(bert)


PUBLISHED = {
    "bert-base": (109_514_298, "BertForMaskedLM", {"vocab_size": 30522}),
    "roberta-base": (124_697_433, "RobertaForMaskedLM", {
        "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5}),
    "distilbert": (66_985_530, "DistilBertForMaskedLM", {}),
    "electra-small": (13_549_057, "ElectraForPreTraining", {}),
    "modernbert-base": (149_655_232, "ModernBertForMaskedLM", {}),
    "electra-base-generator": (33_740_602, "ElectraForMaskedLM", {
        "embedding_size": 768, "hidden_size": 256, "num_attention_heads": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    parameters, title, fields = PUBLISHED[name]
    kind = getattr(transformers, title)
    raw = kind.config_class(**fields).to_dict() | {"architectures": [title]}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    model_type, config = encoder.read_config(EncoderConfig, tmp_path)
    with torch.device("meta"):
        ours = Encoder(config)
        theirs = kind(AutoConfig.from_pretrained(tmp_path))
    assert count_parameters(ours) == theirs.num_parameters() == parameters
    _, tensors = encoder.their_tensors(ours, model_type)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in tensors.items()}.items() <= shapes.items()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "deberta-v2"}, "model_type is 'deberta-v2'; supported: bert, roberta"),
        (
            {"architectures": ["BertForSequenceClassification"]},
            "BertForSequenceClassification.*supported: BertForMaskedLM or BertForPreTraining",
        ),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported: 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"attention_probs_dropout_prob": 0.2}, "attention_probs_dropout_prob is 0.2"),
        ({"num_hidden_layers": 3}, "do not fit config.json, 16 in all"),
        ({"hidden_size": None}, "hidden_size is None"),
    ],
)
def test_refused_settings(bert, fields, message):
    edit_json(bert / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(bert)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            "each n-th layer from the first",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["full_attention"]}, "a list of 2 kinds"),
        ({"layer_types": None, "global_attn_every_n_layers": "3"}, "is '3'; supported: a whole"),
        ({"layer_types": None, "local_attention": 1}, "local_attention is 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
    ],
)
def test_refused_settings_of_modernbert(fields, message, tmp_path):
    reference("modernbert").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(tmp_path)


def test_settings_of_modernbert_as_transformers_4_writes_them(tmp_path):
    theirs = reference("modernbert with windows")
    theirs.save_pretrained(tmp_path)
    older = {"global_attn_every_n_layers": 3, "global_rope_theta": 500.0, "local_rope_theta": 50.0}
    edit_json(tmp_path / "config.json", layer_types=..., rope_parameters=..., **older)
    ours = Encoder.from_pretrained(tmp_path, torch.float64)
    assert (ours.config.window, ours.config.window_every) == (3, 3)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "post"}, r"ModernBertForMaskedLM, needs norm 'pre', not 'post'"),
        ({"objective": "electra"}, r"ElectraForPreTraining, needs norm 'post', not 'pre'"),
        ({"segments": 2}, "segments 0, not 2"),
    ],
)
def test_what_transformers_cannot_compute(fields, message, tmp_path):
    model = Encoder(EncoderConfig(97, 20, n_layer=1, d_model=32, **fields))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
