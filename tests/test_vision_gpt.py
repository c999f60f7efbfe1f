"""A GPT that sees: parts equal to Idefics', who sees which picture, the cache, and errors."""

import dataclasses
import itertools
import re

import pytest
import torch
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from tinyfm.calc import estimate
from tinyfm.generate import Sampling
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig
from tinyfm.vision_gpt import GatedCrossBlock, Resampler, VisionGPT, VisionGPTConfig

TEXT = GPTConfig(vocab_size=20, context_length=24, n_layer=3, n_head=2, d_model=16, zero_init=False)
PREFIX = VisionGPTConfig(
    image_size=8, patch_size=4, channels=3, image_layer=1, image_head=2, image_width=12, gpt=TEXT
)
CONFIGS = {
    "prefix": PREFIX,
    "prefix-resampler": dataclasses.replace(PREFIX, n_latent=3),
    "cross": dataclasses.replace(PREFIX, way="cross", gate=0.7, cross_every=2),
    "cross-resampler": dataclasses.replace(PREFIX, way="cross", gate=0.7, n_latent=3),
}


def randomised(module):
    """The module with every weight drawn, so that none hides at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        with torch.no_grad():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return module.eval()


def build(config):
    return randomised(VisionGPT(config))


def pictures(rows, count, channels=3):
    return (
        torch.rand(rows, count, channels, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )


# ---- equal to Idefics ---------------------------------------------------------------------------

IDEFICS = IdeficsConfig(
    hidden_size=16, num_attention_heads=2, intermediate_size=TEXT.F, alpha_type="float",
    rms_norm_eps=1e-6, qk_layer_norms=False, vision_config={"embed_dim": 12},
    perceiver_config={"qk_layer_norms_perceiver": False}, attn_implementation="eager",
)  # fmt: skip


def copy(theirs, ours, names):
    """Copy weights to ours, whose names are theirs with the replacements of `names`."""
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)


def test_the_gated_block_equals_idefics():
    theirs = randomised(IdeficsGatedCrossAttentionLayer(IDEFICS, layer_idx=0))
    ours = GatedCrossBlock(TEXT, 12)
    copy(theirs, ours, {
        "cross_attn.o_proj": "out", "cross_attn.": "", "_proj": "", "input_layernorm": "norm1",
        "post_attention_layernorm": "norm2", "alpha_cross_attn": "attention_gate",
        "alpha_dense": "mlp_gate",
    })  # fmt: skip
    x = torch.randn(2, 5, 16)
    states = torch.randn(2, 3, 4, 12)  # three pictures of four vectors
    last = torch.tensor([[-1, 0, 0, 1, 2], [0, 1, 1, 1, 1]])
    sees = torch.arange(12) // 4 == last[:, :, None]
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None]
    with torch.no_grad():
        want = theirs(x, None, states.flatten(1, 2), mask, sees.any(-1))
        got = ours(x, states, last)
        assert torch.equal(ours(x, states, last, ours.keys_and_values(states)), got)
    assert torch.allclose(got, want, atol=1e-5)


def test_the_resampler_equals_idefics():
    theirs = randomised(IdeficsPerceiverResampler(IDEFICS, 12, 2, 2, 6, 3))
    ours = Resampler(3, 2, 12, 2)
    copy(theirs, ours, {
        "context_layer_norm": "norm_states", "latents_layer_norm": "norm1", "layer_norm": "norm",
        "output_proj": "out", "c_proj": "down", "1.ln": "norm2", "1.fc": "up", "1.down": "down",
        "blocks": "layers", "0.q_proj": "q", "0.k_proj": "k", "0.v_proj": "v", "0.out": "out",
        "0.norm_states": "norm_states", "0.norm1": "norm1",
    })  # fmt: skip
    states = torch.randn(2, 5, 12)
    with torch.no_grad():
        assert torch.allclose(ours(states), theirs(states), atol=1e-5)


# ---- who sees what ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_sees_the_pictures_before_it(name):
    model = build(CONFIGS[name])
    row = model.place_images([[1, 2], None, [3, 4], None, [5]])
    tokens = torch.tensor([row])
    images = pictures(1, 2)
    other = images.clone()
    other[:, 1] = -other[:, 1]
    with torch.no_grad():
        before = model(tokens, images)
        after = model(tokens, other)
        blind = model(tokens[:, :2])
    second = len(row) - 1 - model.config.image_tokens  # the first place of the second picture
    assert torch.allclose(before[:, :second], after[:, :second], atol=1e-6)
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-4
    first = model(tokens, -images)[:, 2:second]
    assert (first - before[:, 2:second]).abs().max() > 1e-4
    if name == "prefix":  # text alone is what the language model makes of it
        assert torch.allclose(before[:, :2], blind, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_spare_picture_changes_nothing_and_the_order_does(name):
    """Rows of one batch have as many pictures, and some show only the first ones."""
    model = build(CONFIGS[name])
    tokens = torch.tensor([model.place_images([[1], None, [2], None, [3, 4]])])
    images = pictures(1, 3)
    losses = [
        model.loss({"tokens": tokens, "images": shown})[0].item()
        for shown in (images[:, :2], images, images[:, [1, 0]])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_the_attention_reads_the_last_picture_alone():
    block = randomised(GatedCrossBlock(TEXT, 12))
    with torch.no_grad():
        block.mlp_gate.zero_()
    x = torch.randn(1, 3, 16)
    states = torch.randn(1, 2, 4, 12)
    other = torch.cat((torch.randn(1, 1, 4, 12), states[:, 1:]), dim=1)  # another first picture
    last = torch.tensor([[-1, 0, 1]])
    with torch.no_grad():
        y = block(x, states, last)
        z = block(x, other, last)
    assert torch.equal(y[:, 0], x[:, 0])  # before any picture
    assert torch.equal(y[:, 2], z[:, 2]) and not torch.allclose(y[:, 1], z[:, 1])


def test_closed_gates_leave_the_language_model_as_it_is():
    model = VisionGPT(dataclasses.replace(CONFIGS["cross"], gate=0.0, frozen=True)).eval()
    tokens = torch.tensor([model.place_images([None, [1, 2, 3]])])
    assert torch.equal(model(tokens, pictures(1, 1)), model.gpt(tokens))
    loss, _ = model.loss({"tokens": tokens, "images": pictures(1, 1)})
    loss.backward()
    assert all(p.grad is None for p in model.gpt.parameters())
    assert all(block.attention_gate.grad.abs() > 0 for block in model.cross)


# ---- writing and training -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_changes_nothing_and_a_picture_is_encoded_once(name, monkeypatch):
    model = build(CONFIGS[name])
    calls = []
    tower = model.image_tower.states
    monkeypatch.setattr(model.image_tower, "states", lambda x: calls.append(len(x)) or tower(x))
    prompts = [model.place_images([None, [1], None, [2, 3]]), model.place_images([None, [4]])]
    sampling = Sampling(max_new_tokens=6, temperature=0)
    images = pictures(2, 2)
    cached = model.generate(prompts, images, sampling)
    assert calls == [4]
    assert cached == model.generate(prompts, images, sampling, use_cache=False)
    alone = model.generate(prompts[1:], images[1:, :1], sampling)
    assert alone == cached[1:]
    assert model.config.image_id not in cached[0] + cached[1]


def test_places_of_pictures_are_no_targets():
    model = build(PREFIX)
    tokens = torch.tensor([model.place_images([[1], None, [2, 3]])])
    loss, metrics = model.loss({"tokens": tokens, "images": pictures(1, 1)})
    p = model(tokens[:, :-1], pictures(1, 1)).log_softmax(-1)[0]
    assert metrics["weight"] == 2
    assert loss.item() == pytest.approx(-(p[-2, 2] + p[-1, 3]).item() / 2, rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_in_chunks_is_the_loss_of_all_logits(name):
    model = build(CONFIGS[name])
    tokens = torch.tensor([model.place_images([[1], None, [2, 3, 4, 5]])] * 3)
    batch = {"tokens": tokens, "images": pictures(3, 1)}
    found = []
    for most in (GPT.logits_at_once, 40):
        model.gpt.logits_at_once = most
        model.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["prefix-resampler", "cross"])
def test_the_cost_of_training_is_predicted(name):
    optim, few = OptimConfig("adamw"), TrainConfig(steps=2, batch_size=4, device="cpu")
    assert estimate.forecast(VisionGPT(CONFIGS[name]), optim, few).flops > 0


def test_some_ids_are_never_written():
    model = build(PREFIX)
    row = model.place_images([None, [1]])
    greedy = Sampling(max_new_tokens=5, temperature=0)
    (free,) = model.generate([row], pictures(1, 1), greedy)
    (other,) = model.generate([row], pictures(1, 1), greedy, never=free[:1])
    assert free[0] not in other


@pytest.mark.parametrize("way", ["prefix", "cross-resampler"])
def test_it_learns_to_tell_pictures(way):
    torch.manual_seed(0)
    text = dataclasses.replace(TEXT, zero_init=True)
    model = VisionGPT(dataclasses.replace(CONFIGS[way], gpt=text))
    images = pictures(6, 1)
    tokens = torch.tensor([model.place_images([None, [i, 7 + i]]) for i in range(6)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        loss, _ = model.loss({"tokens": tokens, "images": images})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    places = tokens[:, : model.config.image_tokens].tolist()
    written = model.generate(places, images, Sampling(max_new_tokens=2, temperature=0))
    assert written == tokens[:, -2:].tolist()


@pytest.mark.parametrize("way", ["prefix", "cross"])
def test_it_learns_which_of_two_pictures_is_the_first(way):
    """For that it has to read both, and their order."""
    torch.manual_seed(0)
    text = dataclasses.replace(TEXT, zero_init=True)
    model = VisionGPT(dataclasses.replace(CONFIGS[way], gpt=text))
    pairs = list(itertools.permutations(range(3), 2))
    images = pictures(3, 1)[torch.tensor(pairs), 0]
    prompts = [model.place_images([None, None, [1]])] * len(pairs)
    tokens = torch.tensor([prompt + [2 + (i < j)] for prompt, (i, j) in zip(prompts, pairs)])
    mask = torch.arange(1, tokens.size(1)).expand(len(pairs), -1) == len(prompts[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        loss, _ = model.loss({"tokens": tokens, "images": images, "mask": mask})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written = model.generate(prompts, images, Sampling(max_new_tokens=1, temperature=0))
    assert written == tokens[:, -1:].tolist()


# ---- errors -------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    model = build(PREFIX)
    row = model.place_images([None, [1]])
    tokens = torch.tensor([row])
    cases = [
        (lambda: model(tokens, pictures(1, 1, channels=1)), "1 channels.*reads 3 channels"),
        (lambda: model(tokens, pictures(1, 1)[:, :0]), "at least one"),
        (lambda: model(tokens), "there is none"),
        (lambda: model.place_images([None] * 7), "7 pictures .* take 28.*holds 24"),
        (lambda: model(torch.tensor([row + row]), pictures(1, 1)), "8 places.*1 pictures"),
        (lambda: model.generate([row], pictures(1, 1)), "at most 19"),
        (lambda: dataclasses.replace(PREFIX, image_size=16, patch_size=2), "64 tokens.*has 24"),
    ]
    for wrong, words in cases:
        with pytest.raises(ValueError) as error:
            wrong()
        assert re.search(words, str(error.value))
