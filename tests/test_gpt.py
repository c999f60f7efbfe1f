"""The GPT: attention, positions, loss, FLOPs and config, for each variant of the architecture."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import count_parameters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinyfm.calc import trace
from tinyfm.gpt import (
    GPT,
    MLP,
    Attention,
    GPTConfig,
    alibi_scores,
    alibi_slopes,
    attention_mask,
    rope_frequencies,
    rotate,
)
from tinyfm.recipes import registry
from tinyfm.recipes.gpt import STYLES

GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "bias": True,
    "tied": True,
    "qk_norm": False,
}
VARIANTS = {
    "ours": {},
    "gpt1": STYLES["gpt1"],
    "gpt2": GPT2,
    "bloom": STYLES["bloom"] | {"n_head": 6, "d_head": 4},
    "granite": STYLES["granite"] | {"attention_scale": 0.5},
    "falcon-7b": STYLES["falcon"] | {"n_kv_head": 1},
    "falcon-40b": STYLES["falcon-40b"] | {"n_kv_head": 2},
    "command-r": STYLES["command-r"],
    "llama2": {"qk_norm": False},
    "llama3": {"qk_norm": False, "n_kv_head": 2, "rope_factor": 8.0, "rope_original_context": 8},
    "mistral": {"qk_norm": False, "n_kv_head": 1, "window": 5},
    "qwen3": {"n_kv_head": 2, "d_head": 6, "tied": True, "bias": True},
    "relu2": {"mlp": "relu2", "norm": "layernorm", "d_ff": 24},
}
V, T = 41, 16


def small(**options) -> GPTConfig:
    sizes = {"vocab_size": V, "context_length": T, "n_layer": 2, "n_head": 4, "d_model": 32}
    return GPTConfig(**{**sizes, "zero_init": False, **options})


def loud(config: GPTConfig, seed: int = 0) -> GPT:
    """A model in float64 with random weights so large that every input matters to its output."""
    torch.manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            scale = p.size(1) ** -0.5 if p.ndim == 2 else 1
            p.copy_(torch.randn_like(p) * scale)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS)
def config(request) -> GPTConfig:
    return small(**VARIANTS[request.param])


# ---- attention ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pad", [None, torch.tensor([0, 2])])
def test_attention_is_the_plain_formula(pad):
    """softmax(q k' / sqrt(K)) v with the mask written out. Mask None means plain causal."""
    config = small()
    q, k, v = torch.randn(3, 2, 4, T, 8, generator=torch.Generator().manual_seed(0)).double()
    positions = torch.arange(T)
    mask = attention_mask(positions, positions, 0, pad)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
    expected = scores.softmax(-1) @ v
    attention = Attention(config)
    torch.testing.assert_close(attention.attend(q, k, v, mask), expected)
    if pad is None:
        torch.testing.assert_close(attention.attend(q, k, v, None), expected)


@torch.no_grad()
def test_a_token_changes_no_logits_before_it(config):
    model = loud(config)
    tokens = random_tokens(2, T)
    logits = model(tokens)
    assert logits.shape == (2, T, V)
    for t in (0, 1, 7, T - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        difference = (model(changed) - logits).abs().amax(-1)  # (B, T)
        assert difference[:, :t].sum() == 0
        assert (difference[:, t] > 1e-3).all()


@torch.no_grad()
def test_rows_of_a_batch_are_independent(config):
    model = loud(config)
    tokens = random_tokens(3, T)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"position": "learned"}, {"n_kv_head": 1}])
def test_window_limits_attention(options):
    model = loud(small(window=5, n_layer=1, **options))
    tokens = random_tokens(1, T)
    t = 12
    before = model(tokens)[:, t]
    seen = []
    for s in range(T):
        changed = tokens.clone()
        changed[:, s] = (changed[:, s] + 1) % V
        if not torch.equal(model(changed)[:, t], before):
            seen.append(s)
    assert seen == [8, 9, 10, 11, 12]  # the last 5 tokens, t included


def test_window_as_long_as_the_row_is_no_window():
    tokens = random_tokens(2, T)
    plain, windowed = (loud(small(window=w))(tokens) for w in (0, T))
    torch.testing.assert_close(plain, windowed)


def test_attention_mask_by_hand():
    positions = torch.arange(4)
    pad = torch.tensor([0, 2])
    full, padded = attention_mask(positions, positions, 2, pad)[:, 0].int().tolist()
    assert full == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    # A padding token sees itself: a row of a softmax must not be empty.
    assert padded == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@torch.no_grad()
def test_grouped_heads_are_shared_heads():
    grouped = loud(small(n_kv_head=2))
    full = loud(small(), seed=1)
    state = grouped.state_dict()
    for name in state:
        if ".k.weight" in name or ".v.weight" in name:  # (G K, D): each head serves two query heads
            heads = state[name].unflatten(0, (2, 8))
            state[name] = heads.repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = random_tokens(2, T)
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_silu_is_on_the_gate():
    """SiLU(ln 3) = 3/4 ln 3; times up, 2; times down, 10."""
    mlp = MLP(GPTConfig(n_head=1, d_model=2, d_ff=1))
    x = torch.tensor([1.0, 0.0])
    with torch.no_grad():
        mlp.gate.weight.fill_(math.log(3))
        mlp.up.weight.fill_(2)
        mlp.down.weight.fill_(10)
    torch.testing.assert_close(mlp(x), torch.full((2,), 15 * math.log(3)))


# ---- positions ----------------------------------------------------------------------------------


def test_rotation_by_hand():
    """The pair (1, 3) stays; (2, 4) makes a quarter turn, from channel i towards i + K/2."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    turned = rotate(x, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert turned.flatten().tolist() == [1, -4, 3, 2]


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8)
    angles = torch.arange(T)[:, None] * rope_frequencies(small())
    q, k = (rotate(x.expand(1, 1, T, 8), angles.cos(), angles.sin())[0, 0] for x in (q, k))
    scores = q @ k.T  # (T, T)
    for distance in range(T):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[:, 0].unique().numel() == T


@torch.no_grad()
def test_pairs_of_neighbours_are_halves_in_another_order():
    neighbours = loud(small(rope_pairs="neighbours", qk_norm=False, n_kv_head=2))
    halves = loud(small(qk_norm=False, n_kv_head=2), seed=1)
    state = neighbours.state_dict()
    for name in state:
        if ".q.weight" in name or ".k.weight" in name:
            heads = state[name].unflatten(0, (-1, 8))
            state[name] = torch.cat((heads[:, ::2], heads[:, 1::2]), 1).flatten(0, 1)
    halves.load_state_dict(state)
    tokens = random_tokens(2, T)
    torch.testing.assert_close(neighbours(tokens), halves(tokens))


def test_alibi_by_hand():
    """Slopes are 2^-k; for 6 heads those of 4, then two of 8. Scores fall with the distance."""
    assert alibi_slopes(8).log2().tolist() == [-1, -2, -3, -4, -5, -6, -7, -8]
    assert alibi_slopes(6).log2().tolist() == [-2, -4, -6, -8, -1, -3]
    positions = torch.arange(3)
    mask = attention_mask(positions, positions, 0, torch.tensor([1]))
    added = alibi_scores(positions, positions, mask, torch.tensor([0.5, 0.25]))
    no = -math.inf
    first = [[0, no, no], [no, 0, no], [no, -0.5, 0]]
    second = [[0, no, no], [no, 0, no], [no, -0.25, 0]]
    assert added.tolist() == [[first, second]]


@torch.no_grad()
def test_alibi_reads_texts_longer_than_those_of_training():
    """No weight depends on the context length, and a token's output not on how far it stands."""
    config = small(**STYLES["bloom"] | {"window": 5, "n_layer": 1})
    model = GPT(replace(config, context_length=4 * T)).double()
    model.load_state_dict(loud(config).state_dict())
    tokens = random_tokens(1, 4 * T)
    torch.testing.assert_close(model(tokens)[:, -1], model(tokens[:, -5:])[:, -1])


def test_context_extension_slows_long_waves_only():
    plain = GPTConfig(d_head=64, rope_theta=500_000.0)
    longer = replace(plain, rope_factor=8.0, rope_original_context=8192)
    ratio = rope_frequencies(plain) / rope_frequencies(longer)
    waves = 2 * math.pi / rope_frequencies(plain)
    short = ratio[waves < 8192 / 4]
    torch.testing.assert_close(short, torch.ones_like(short))
    assert (ratio[waves > 8192] - 8).abs().max() < 1e-4
    between = ratio[(waves > 8192 / 4) & (waves < 8192)]
    assert len(between) and (between > 1).all() and (between < 8).all()


def test_too_many_tokens():
    with pytest.raises(ValueError, match=r"17 tokens .*context_length 16; shorten the text"):
        GPT(small())(random_tokens(1, T + 1))


# ---- training -----------------------------------------------------------------------------------


def test_every_parameter_learns(config):
    model = loud(config).train()
    model.loss({"tokens": random_tokens(4, T + 1)})[0].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if name.endswith("k.bias") and config.position != "rope" and not config.qk_norm:
            continue  # it adds q . b to all scores of a row, which does not change the softmax
        assert p.grad.abs().max() > 1e-6, name


def test_the_first_loss_is_that_of_a_uniform_guess(config):
    torch.manual_seed(0)
    for zero_init in (False, True):
        model = GPT(replace(config, zero_init=zero_init))
        loss, _ = model.loss({"tokens": random_tokens(8, T + 1)})
        assert abs(loss.item() - math.log(V)) < 0.1


def test_zero_init_starts_from_the_identity():
    model = GPT(small(zero_init=True))
    tokens = random_tokens(2, T)
    torch.testing.assert_close(model.hidden(tokens), model.norm(model.token_embedding(tokens)))


def test_dropout_is_for_training_only():
    tokens = random_tokens(2, T)
    model = loud(small(dropout=0.5))
    torch.testing.assert_close(model(tokens), loud(small())(tokens))
    model.train()
    assert (model(tokens) - model(tokens)).abs().max() > 1e-3


def test_masked_targets_do_not_count():
    model = loud(small())
    tokens = random_tokens(3, T + 1)
    mask = torch.rand(3, T, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, -1] = False
    loss, metrics = model.loss({"tokens": tokens, "mask": mask})
    assert metrics["weight"] == mask.sum() < mask.numel()
    log_p = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(loss.double(), -log_p[mask].mean(), rtol=1e-5, atol=1e-5)
    tokens[:, -1] = (tokens[:, -1] + 1) % V  # a masked target
    assert model.loss({"tokens": tokens, "mask": mask})[0] == loss


def test_weighted_means_of_unequal_batches_equal_the_whole():
    model = loud(small())
    tokens = random_tokens(4, T + 1)
    mask = torch.arange(T) < torch.tensor([[1], [T], [3], [0]])
    whole, metrics = model.loss({"tokens": tokens, "mask": mask})
    total = 0
    weight = 0
    for i in range(4):
        row = slice(i, i + 1)
        loss, row_metrics = model.loss({"tokens": tokens[row], "mask": mask[row]})
        total = total + loss * row_metrics["weight"]
        weight += row_metrics["weight"]
    assert metrics["weight"] == weight == 1 + T + 3
    mean = total / metrics["weight"]
    torch.testing.assert_close(mean, whole)  # the row without targets adds 0, not nan
    assert model.loss({"tokens": tokens})[1]["weight"] == 4 * T


def test_bfloat16_and_autocast_are_near_float32(config):
    torch.manual_seed(0)
    model = GPT(config).eval()
    tokens = random_tokens(2, T + 1)
    loss = model.loss({"tokens": tokens})[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.loss({"tokens": tokens})[0]
    half = model.bfloat16().loss({"tokens": tokens})[0]
    assert half.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loss, rtol=0.01, atol=0)
    torch.testing.assert_close(half, loss, rtol=0.01, atol=0)


# ---- counting -----------------------------------------------------------------------------------


def test_flops_equal_those_that_torch_counts(config):
    # The counter counts matrix products. The MATH backend computes attention by matrix products,
    # so all T x T scores count, also the half that the causal mask discards.
    model = GPT(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss({"tokens": random_tokens(3, T + 1)})[0].backward()
    assert counter.get_total_flops() == 3 * model.flops_per_row()


def test_gpt2_has_its_published_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, d_model=768, **GPT2))
    assert count_parameters(model) == 124_439_808
    assert model.flops_per_row() == 874_944_921_600


# ---- configuration ------------------------------------------------------------------------------

MISTAKES = [
    ({"n_layer": 0}, "n_layer is 0; it must be at least 1"),
    ({"vocab_size": -3}, "vocab_size is -3"),
    ({"window": -1}, "window is -1; it must be at least 0"),
    ({"d_model": 33}, "d_model 33 .*n_head 4; use 32 or set d_head"),
    ({"n_kv_head": 3}, "n_head 4 .*n_kv_head 3; use a divisor of 4"),
    ({"n_kv_head": 8}, "n_head 4 .*n_kv_head 8"),
    ({"d_head": 5}, "head width 5 is odd; .*even"),
    ({"dropout": 1.0}, "dropout is 1.0; .*at least 0 and below 1"),
    ({"mlp": "gelo"}, "mlp is 'gelo'; use one of"),
    ({"norm": "batch"}, "norm is 'batch'; use one of"),
    ({"position": None}, "position is None; use one of"),
    ({"block": "sandwich"}, "block is 'sandwich'; use one of"),
    ({"norm_bias": True}, "norm_bias is True, .*rmsnorm .*; use layernorm"),
    ({"logit_scale": 0.0}, "logit_scale is 0.0; it must be above 0"),
    ({"residual_scale": math.nan}, "residual_scale is nan"),
    ({"embedding_scale": math.inf}, "embedding_scale is inf; .* finite"),
    ({"attention_scale": -1.0}, "attention_scale is -1.0; .*or 0 for"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_mistakes_in_a_config(options, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**options)
    assert "\n" not in str(error.value)


def test_derived_sizes_follow_a_changed_config():
    config = GPTConfig(d_model=256, n_head=4)
    assert (config.K, config.G, config.F) == (64, 4, 704)
    wider = replace(config, d_model=768, n_head=6)
    assert (wider.K, wider.G, wider.F) == (128, 6, 2048)
    assert replace(wider, mlp="gelu").F == 3072
    fixed = replace(config, d_head=16, n_kv_head=2, d_ff=100)
    assert replace(fixed, d_model=512).F == 100
    assert (fixed.K, fixed.G) == (16, 2)
    assert GPT(replace(small(), d_model=64)).blocks[0].attention.q.weight.shape == (64, 64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_in_chunks_is_the_loss_of_all_logits(tied, masked):
    """The loss and every gradient; 80 targets in chunks of 7."""
    torch.manual_seed(0)
    config = GPTConfig(101, 16, n_layer=2, n_head=2, d_model=32, tied=tied, zero_init=False)
    model = GPT(config)
    batch = {"tokens": torch.randint(101, (5, 17))}
    if masked:
        batch["mask"] = torch.rand(5, 16) > 0.5
    found = []
    for most in (GPT.logits_at_once, 7 * 101):
        model.logits_at_once = most
        model.zero_grad()
        loss, _ = model.loss(batch)
        (3 * loss).backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, chunked in zip(*found):
        torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6)


def test_a_head_with_an_adapter_is_not_bypassed_by_chunks():
    torch.manual_seed(0)
    model = GPT(GPTConfig(101, 16, n_layer=1, n_head=2, d_model=32))
    batch = {"tokens": torch.randint(101, (5, 17))}
    model.head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    plain, _ = model.loss(batch)
    model.logits_at_once = 7 * 101
    chunked, _ = model.loss(batch)
    assert chunked == plain


def test_chunks_halve_the_memory_of_a_step(monkeypatch):
    """At the shape of GPT-2 124M and 32 rows of 1,024 tokens, counted without allocating it."""
    preset = registry.get_preset("gpt2-124m").run
    peaks = []
    for most in (GPT.logits_at_once, 1 << 60):
        monkeypatch.setattr(GPT, "logits_at_once", most)
        model = GPT(preset.model)
        peak, _ = trace.step_bytes(model, preset.optim, 32, dtype=torch.bfloat16)
        peaks.append(peak)
    assert peaks[0] <= peaks[1] / 2
