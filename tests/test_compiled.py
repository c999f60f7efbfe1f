"""Compiled decoding: matrix-vector products equal a linear layer, generation gives equal tokens."""

import pytest
import torch
import torch.nn.functional as F

from tinyfm.compiled import FEW_ROWS, compile_decoding, few_rows_linear
from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.gpt import STYLES


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Remove the functions that earlier tests compiled."""
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, bias, tolerance", [(torch.float32, True, 1e-5), (torch.bfloat16, False, 0.02)]
)
def test_few_rows_linear_equals_a_linear_layer(dtype, bias, tolerance):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 40, bias).to(dtype)
    call = torch.compile(few_rows_linear, dynamic=False)
    for shape in [(1,), (1, 1), (FEW_ROWS, 1), (FEW_ROWS + 1, 1), (2 * FEW_ROWS + 1, 1)]:
        x = torch.randn(*shape, 48, dtype=dtype)
        expected = F.linear(x, layer.weight, layer.bias)
        got = call(x, layer.weight, layer.bias)
        assert got.shape == expected.shape and got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(few_rows_linear(x, layer.weight, layer.bias), expected)  # uncompiled


def test_a_compiled_model_generates_the_same_tokens(monkeypatch):
    compiled = []
    compiler = torch.compile

    def recording_compiler(function, **options):
        compiled.append(function)
        return compiler(function, **options)

    monkeypatch.setattr(torch, "compile", recording_compiler)
    torch.manual_seed(0)
    model = GPT(GPTConfig(97, 64, 2, 4, n_kv_head=2, d_model=32, zero_init=False))
    prompts = [[5, 6, 7], [8] * 9]
    s = Sampling(max_new_tokens=20, temperature=0.8, seed=3)
    expected = complete(model, prompts, s)
    tokens = torch.randint(0, 97, (2, 8))
    logits = model(tokens)
    compile_decoding(model)
    assert complete(model, prompts, s) == expected
    assert complete(model, prompts[:1], s) == complete(model, prompts[:1], s, use_cache=False)
    torch.testing.assert_close(model(tokens), logits)  # several tokens: not compiled
    assert len(compiled) == 5  # two parts of two blocks, and the head


OTHER_BLOCKS = {
    "gpt1": STYLES["gpt1"],
    "falcon-40b, alibi": STYLES["falcon-40b"] | {"position": "alibi"},
    "palm, residual scale": STYLES["palm"] | {"n_kv_head": 1, "residual_scale": 0.5},
}


@pytest.fixture
def captured_only(monkeypatch):
    """torch captures the same graphs, and runs them itself: its compiler takes seconds for each."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiler(f, backend="eager", **options)
    )


@pytest.mark.parametrize("kind", OTHER_BLOCKS)
def test_other_blocks_can_be_compiled_too(kind, captured_only, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(97, 64, 1, 4, d_model=32, **OTHER_BLOCKS[kind] | {"zero_init": False}))
    prompts = [[5, 6, 7], [8] * 9]
    s = Sampling(max_new_tokens=6, seed=3)
    expected = complete(model, prompts, s)
    compile_decoding(model)
    assert complete(model, prompts, s) == expected
    assert "continuing without it" not in capsys.readouterr().out


def test_models_do_not_share_what_is_compiled(captured_only, capsys):
    """torch compiles a function eight times at most: here once, and each model needs that."""
    limits = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        for width in (16, 32):
            model = GPT(GPTConfig(97, 64, 2, 4, d_model=width))
            compile_decoding(model)
            complete(model, [[5, 6, 7]], Sampling(max_new_tokens=3))
    assert "continuing without it" not in capsys.readouterr().out
