"""XLNet in the Hugging Face layout: equality with transformers on random weights, both ways."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import assert_equal_weights, count_parameters, edit_json, random_weights
from safetensors.torch import load_file, save_file

from tinyfm import tokenizer
from tinyfm.adapt.heads import Classifier
from tinyfm.calc import systems
from tinyfm.hub import classifier
from tinyfm.recipes.xlnet import XLNetClassifyRun
from tinyfm.xlnet import XLNet, XLNetConfig, places_of, remember

transformers.logging.set_verbosity_error()
SIZES = {"vocab_size": 61, "d_model": 24, "n_layer": 3, "n_head": 4, "d_inner": 40}
B, T, M = 3, 12, 7


@pytest.fixture(scope="module")
def theirs():
    """A model of transformers with random weights."""
    config = transformers.XLNetConfig(**SIZES, mem_len=None)
    return random_weights(lambda: transformers.XLNetLMHeadModel(config), 0.2)


@pytest.fixture
def published(theirs, tmp_path):
    """The folder that it was saved to."""
    theirs.save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def random_rows() -> dict[str, torch.Tensor]:
    """Rows of unequal length, with orders and segments, and other text in front of them."""
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(T) < torch.tensor([T, 7, 9])[:, None]
    tokens = torch.randint(1, 61, (B, T), generator=g)
    order = torch.stack([torch.randperm(T, generator=g) for _ in range(B)])
    order = (order - 6).clamp(min=0) * mask
    return {
        "tokens": tokens,
        "order": order,
        "targets": tokens.where(order > 0, -100),
        "mask": mask,
        "segments": torch.randint(2, (B, T), generator=g),
        "before": torch.randint(61, (B, M), generator=g),
    }


def perm_mask(order: torch.Tensor) -> torch.Tensor:
    """Their mask: 1 where i must not look at j. Their content stream sees itself all the same."""
    later = order[:, None, :] > order[:, :, None]
    itself = torch.eye(T, dtype=torch.bool) & (order > 0)[:, :, None]
    return (later | itself).float()


@torch.no_grad()
def assert_same(ours: XLNet, theirs, segments: bool, tolerance: float = 1e-5) -> None:
    """Equal logits of both streams, with and without padding, segments and memory."""
    rows = random_rows()
    tokens, mask, order = rows["tokens"], rows["mask"], rows["order"]
    own = rows["segments"] if segments else None

    # All tokens given, and the memory of the text in front.
    read = theirs(rows["before"], use_mems=True)
    states = ours.streams(rows["before"])
    assert (ours.head(states.content) - read.logits).abs().max() < tolerance
    memory = remember(states, None, M)
    for mine, mem in zip(memory, read.mems):
        assert (mine - mem.transpose(0, 1)).abs().max() < tolerance
    found = ours.head(ours.hidden(tokens, mask, own))
    expected = theirs(tokens, attention_mask=mask.float(), token_type_ids=own).logits
    assert (found - expected)[mask].abs().max() < tolerance

    # Both streams.
    places = places_of(rows["targets"])
    real = places >= 0
    mapping = F.one_hot(places.clamp(min=0), T).float() * real[..., None]
    for there, in_front in ((None, None), (mask, None), (mask, memory)):
        expected = theirs(
            tokens,
            attention_mask=None if there is None else there.float(),
            perm_mask=perm_mask(order),
            target_mapping=mapping,
            token_type_ids=own,
            mems=None if in_front is None else read.mems,
            use_mems=in_front is not None,
        ).logits
        found = ours(tokens, order, places.clamp(min=0), there, own, in_front)
        assert (found - expected)[real].abs().max() < tolerance


# ---- against transformers ------------------------------------------------------------------------


def test_logits_both_ways(theirs, published, tmp_path):
    ours = XLNet.from_pretrained(published)
    assert not ours.training
    assert ours.config.context_length == 512
    assert_same(ours, theirs, segments=True)
    assert count_parameters(ours) == theirs.num_parameters()

    ours.save_pretrained(tmp_path / "again")
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    again = XLNet.from_pretrained(tmp_path / "again")
    assert again.config == ours.config
    assert_equal_weights(again, ours)


def test_a_model_without_segments_is_written_with_vectors_of_zero(tmp_path):
    config = XLNetConfig(300, 16, n_layer=2, n_head=2, d_model=16, d_ff=24)
    ours = random_weights(lambda: XLNet(config), 0.2)
    words = tokenizer.train("sentencepiece", ["the cat sat on the mat and the dog ran " * 40], 270)
    ours.save_pretrained(tmp_path, words)
    exported = transformers.XLNetLMHeadModel.from_pretrained(tmp_path)
    assert_same(ours, exported, segments=False)
    again = XLNet.from_pretrained(tmp_path)
    assert again.config.segments and again.config.context_length == 16
    assert_same(again, exported, segments=True)
    their_words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert their_words("the cat sat").input_ids == words.encode("the cat sat")
    assert exported.config.pad_token_id == their_words.pad_token_id == words.eot


def test_a_classifier(tmp_path):
    """It reads the mean state over the real tokens of its context, so the folder holds its code."""
    config = XLNetConfig(61, 9, n_layer=2, n_head=2, d_model=16)
    body = random_weights(lambda: XLNet(config), 0.2)
    ours = Classifier(body, {"label": ("no", "yes")}, XLNetClassifyRun.reader).eval()
    torch.nn.init.normal_(ours.heads[0].weight)
    classifier.save(ours, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, trust_remote_code=True
    )
    rows = random_rows()
    with torch.no_grad():
        cut = {name: rows[name][:, :9] for name in ("tokens", "mask")}
        expected = theirs(rows["tokens"], rows["mask"].long()).logits
        torch.testing.assert_close(ours(cut)[0], expected, atol=1e-5, rtol=1e-5)
    again = transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**SIZES))
    again.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"ForSequenceClassification.*supported: XLNetLMHead"):
        XLNet.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["xlnet-base", "xlnet-large"])
def test_published_sizes(name):
    """calc's ledger is compared with transformers in tests/calc/test_systems.py."""
    c = systems.get(name).shape
    config = XLNetConfig(
        c["vocab"], c["context"], c["layers"], c["heads"], c["d_model"], c["d_ff"], segments=True
    )
    with torch.device("meta"):
        assert count_parameters(XLNet(config)) == systems.get(name).parameters


def test_the_head_may_be_stored_too(published):
    stored = load_file(published / "model.safetensors")
    stored["lm_loss.weight"] = stored["transformer.word_embedding.weight"].clone()
    save_file(stored, published / "model.safetensors")
    XLNet.from_pretrained(published)
    stored["lm_loss.weight"][3] += 1
    save_file(stored, published / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_loss.weight differs from transformer.word_emb"):
        XLNet.from_pretrained(published)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "transfo-xl"}, "'transfo-xl'; supported: xlnet .Transformer-XL reads"),
        ({"model_type": "bert"}, "model_type is 'bert'; supported: xlnet"),
        ({"architectures": ["XLNetForSequenceClassification"]}, "supported: XLNetLMHeadModel"),
        ({"attn_type": "uni"}, "attn_type is 'uni'; supported: 'bi'"),
        ({"clamp_len": 20}, "clamp_len is 20"),
        ({"same_length": True}, "same_length is True"),
        ({"bi_data": True}, "bi_data is True"),
        ({"ff_activation": "relu"}, "ff_activation is 'relu'; supported: 'gelu'"),
        ({"d_head": 8}, "d_head is 8"),
        ({"n_layer": 4}, "do not fit config.json, 17 in all"),
        ({"n_head": None}, "n_head is None"),
        ({"context_length": "9"}, "context_length is '9'"),
    ],
)
def test_refused_settings(published, fields, message):
    edit_json(published / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        XLNet.from_pretrained(published)
