"""MusicGen: the patterns by hand, equality with MusicgenForCausalLM of transformers, errors."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import assert_equal_weights, edit_json, normal, random_weights
from transformers import MusicgenForCausalLM

from tinyfm.generate import Sampling
from tinyfm.musicgen import (
    MusicGen,
    MusicGenConfig,
    count_frames,
    flatten,
    interleave,
    interleave_slowly,
    undo_interleave,
)

transformers.logging.set_verbosity_error()
K, Q = 11, 3
TINY = MusicGenConfig(n_code=K, n_book=Q, context_length=20, n_layer=2, n_head=2, d_model=16)
SIZES = {
    "vocab_size": K, "num_codebooks": Q, "max_position_embeddings": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "hidden_size": 16, "ffn_dim": 24, "pad_token_id": K,
    "bos_token_id": K,
}  # fmt: skip


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(K, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def theirs():
    """A model of transformers with random weights."""
    config = transformers.MusicgenDecoderConfig(**SIZES)
    return random_weights(lambda: MusicgenForCausalLM(config), 0.2)


@pytest.fixture
def published(theirs, tmp_path):
    """The folder that it was saved to."""
    theirs.save_pretrained(tmp_path / "published")
    return tmp_path / "published"


# ---- the patterns --------------------------------------------------------------------------------

PATTERNS = ("delay", "flat", "parallel")
CODES = torch.tensor([[[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 1, 2]]])
COLUMNS = torch.tensor([[
    [K, 1, 2, 3, 4, K, K],
    [K, K, 5, 6, 7, 8, K],
    [K, K, K, 9, 0, 1, 2],
]])  # fmt: skip
FLAT = torch.tensor([[
    [K, 1, K, K, 2, K, K],
    [K, K, 5, K, K, 6, K],
    [K, K, K, 9, K, K, 0],
]])  # fmt: skip


def test_the_patterns_by_hand(theirs):
    assert torch.equal(interleave(CODES, K, "delay"), COLUMNS)
    _, mask = theirs.build_delay_pattern_mask(CODES[0], pad_token_id=K, max_length=7)
    assert torch.equal(COLUMNS[0] == K, mask == K)
    assert torch.equal(interleave(CODES[..., :2], K, "flat"), FLAT)
    assert torch.equal(interleave(CODES, K, "parallel")[..., 1:], CODES)
    assert flatten(CODES, K)[0, :6].tolist() == [1, 5 + K, 9 + 2 * K, 2, 6 + K, 2 * K]
    found = {pattern: [count_frames(pattern, Q, n) for n in range(3, 10)] for pattern in PATTERNS}
    assert found["delay"] == [1, 2, 3, 4, 5, 6, 7]
    assert found["flat"] == [1, 1, 1, 2, 2, 2, 3]
    assert found["parallel"] == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(2, 4, 9), (1, 4, 1), (3, 1, 5), (1, 2, 0)])
def test_each_pattern_and_back(shape, pattern):
    codes = random_codes(*shape)
    columns = interleave(codes, K, pattern)
    assert torch.equal(columns, interleave_slowly(codes, K, pattern))
    assert torch.equal(undo_interleave(columns[..., 1:], pattern), codes)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_probabilities_of_all_sounds_add_up_to_one(pattern):
    """Of two frames of two codebooks of three codes, so that nats compare."""
    config = replace(TINY, n_code=3, n_book=2, context_length=4, pattern=pattern)
    model = random_weights(lambda: MusicGen(config), 0.5)
    sounds = torch.cartesian_prod(*[torch.arange(3)] * 4).view(81, 2, 2)
    nats = torch.stack(
        [2 * model.loss({"codes": codes[None]})[1]["frame_nats"] for codes in sounds]
    )
    assert nats.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert nats.std() > 0.1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_writes_by_a_cache_what_it_would_read(pattern):
    """The likeliest code at each place, given all before it; the given frames stay."""
    model = random_weights(lambda: MusicGen(replace(TINY, pattern=pattern)), 0.5)
    prompt = random_codes(2, Q, 2)
    found = model.generate(prompt, 4, Sampling(temperature=0))
    assert torch.equal(found[..., :2], prompt)
    logits = model(interleave(found, K, pattern)[..., :-1])
    expected = undo_interleave(logits, pattern).argmax(-1)
    assert torch.equal(found[..., 2:], expected[..., 2:])
    assert not torch.equal(found[..., :2], expected[..., :2])


# ---- against transformers ------------------------------------------------------------------------


@torch.no_grad()
def assert_same(ours, theirs, with_text: bool):
    """Equal logits, with a text of which some is padding and without one."""
    columns = interleave(random_codes(2, Q, 12), K, "delay")
    expected = theirs(columns.flatten(0, 1)).logits.view(2, Q, -1, K)
    torch.testing.assert_close(ours(columns), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    if not with_text:
        return
    states = normal(2, 5, 16)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    read = theirs(
        columns.flatten(0, 1), encoder_hidden_states=states, encoder_attention_mask=mask.long()
    ).logits.view(2, Q, -1, K)
    found = ours(columns, ours.prepare_text(states, mask))
    torch.testing.assert_close(found, read, atol=1e-5, rtol=1e-5)
    assert (read - expected).abs().max() > 0.01


def test_logits_both_ways(theirs, published, tmp_path):
    ours = MusicGen.from_pretrained(published)
    assert not ours.training
    assert_same(ours, theirs, with_text=True)
    ours.save_pretrained(tmp_path / "again")
    exported, info = MusicgenForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    again = MusicGen.from_pretrained(tmp_path / "again")
    assert again.config == ours.config
    assert_equal_weights(again, ours)


def test_a_model_that_reads_no_text(tmp_path):
    ours = random_weights(lambda: MusicGen(TINY), 0.2)
    ours.save_pretrained(tmp_path)
    assert_same(ours, MusicgenForCausalLM.from_pretrained(tmp_path).eval(), with_text=False)
    again = MusicGen.from_pretrained(tmp_path)
    text = again.prepare_text(normal(2, 5, 16))
    columns = interleave(random_codes(2, Q, 12), K, "delay")
    torch.testing.assert_close(again(columns, text), ours(columns))


@torch.no_grad()
def test_the_loss_is_theirs_and_counts_every_code_once(theirs, published):
    """Their loss skips the places without a code, and is a mean over codebooks."""
    ours = MusicGen.from_pretrained(published)
    codes = random_codes(2, Q, 7)
    columns = interleave(codes, K, "delay")
    expected = theirs(columns[..., :-1].flatten(0, 1), labels=columns[..., 1:].transpose(1, 2)).loss
    loss, metrics = ours.loss({"codes": codes})
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["frame_nats"], Q * expected)


def test_it_writes_what_transformers_writes(theirs, published):
    """The likeliest codes, from nothing and behind a prompt; and row by row as in a batch."""
    ours = MusicGen.from_pretrained(published)
    greedy = Sampling(temperature=0)
    settings = {
        "do_sample": False, "num_return_sequences": 1, "decoder_start_token_id": K,
        "use_cache": False,  # with one, transformers 5 reads only the last column of a prompt
    }  # fmt: skip
    for known in (0, 4):
        prompt = random_codes(2, Q, known)
        start = torch.full((2 * Q, 1), K)
        given = torch.cat((start, prompt.flatten(0, 1)), dim=1)
        mask = torch.ones(2, 1 + known)
        length = known + 6 + Q
        expected = theirs.generate(given, attention_mask=mask, max_length=length, **settings)
        found = ours.generate(prompt, 6, greedy)
        assert found.shape == (2, Q, known + 6)
        assert torch.equal(found[..., :known], prompt)
        assert torch.equal(found, expected)
    text = ours.prepare_text(normal(2, 5, 16))
    both = ours.generate(random_codes(2, Q, 2), 8, Sampling(seed=3), text)
    alone = ours.prepare_text(normal(2, 5, 16)[:1])
    assert torch.equal(
        both[:1], ours.generate(random_codes(2, Q, 2)[:1], 8, Sampling(seed=3), alone)
    )
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    "pattern, low, high",
    [("delay", 2.2, 2.9), ("flat", 2.2, 2.9), ("parallel", 6.5, 7.5)],
)
def test_what_a_code_knows_of_its_frame(pattern, low, high):
    """Code q is that of codebook 0 plus q. It costs nothing but in the first codebook, ln 11 = 2.40
    nats, if codes before it are known; if they are not, 3 ln 11 = 7.19."""
    torch.manual_seed(0)
    model = MusicGen(replace(TINY, context_length=24, pattern=pattern))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(100):
        first = random_codes(16, 1, 8, seed=step)
        loss, metrics = model.loss({"codes": (first + torch.arange(Q)[:, None]) % K})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert low < metrics["frame_nats"] < high


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "musicgen"}, "'musicgen'; supported: musicgen_decoder, .*model.decoder"),
        ({"model_type": "gpt2"}, "'gpt2'; supported: musicgen_decoder"),
        ({"audio_channels": 2}, "audio_channels is 2; supported: 1"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"pad_token_id": 3}, "pad_token_id is 3; supported: vocab_size, 11"),
        ({"num_codebooks": 4}, "tensors do not fit config.json, 2 in all"),
    ],
)
def test_refused_settings(fields, message, published):
    edit_json(published / "config.json", **fields)
    with pytest.raises(ValueError, match=message) as error:
        MusicGen.from_pretrained(published)
    assert str(published) in str(error.value)


def test_codes_and_texts_that_do_not_fit():
    model = MusicGen(TINY)
    for code in (K, -1):
        with pytest.raises(ValueError, match=f"no code {code}: the codebooks have 0 to 10"):
            model.loss({"codes": torch.full((1, Q, 4), code)})
    with pytest.raises(ValueError, match=r"\(1, 2, 4\); they must be \(B, 3, frames\)"):
        model.generate(random_codes(1, 2, 4), 1)
    with pytest.raises(ValueError, match=r"2 frames and 17 new ones: .* at most 18 in all"):
        model.generate(random_codes(1, Q, 2), 17)
    with pytest.raises(ValueError, match="21 steps exceed context_length 20"):
        model(interleave(random_codes(1, Q, 18), K, "delay"))
    with pytest.raises(ValueError, match="reads no texts; build it with text=True"):
        model.prepare_text(normal(1, 5, 16))
    with pytest.raises(ValueError, match=r"\(1, 5, 8\); it must be \(B, tokens, 16\)"):
        MusicGen(replace(TINY, text=True)).prepare_text(normal(1, 5, 8))
    with pytest.raises(ValueError, match="d_model is 15; sinusoids need an even width"):
        replace(TINY, d_model=15)
    with pytest.raises(ValueError, match="pattern is 'late'; use one of"):
        replace(TINY, pattern="late")
    for pattern in ("delay", "flat"):
        with pytest.raises(ValueError, match=r"context_length is 2, too short .* at least 3"):
            replace(TINY, context_length=2, pattern=pattern)
    flat = MusicGen(replace(TINY, pattern="flat"))
    with pytest.raises(ValueError, match=r"2 frames and 5 new ones: .* at most 6 in all"):
        flat.generate(random_codes(1, Q, 2), 5)
    with pytest.raises(ValueError, match="pattern is 'flat'; supported: 'delay'"):
        flat.save_pretrained("x")
