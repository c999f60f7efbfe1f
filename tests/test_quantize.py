"""Weights in 8 and 4 bits: the rounding, the products, the models of all families, the commands."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call, normal, random_weights
from torch import nn

import sample
import train
from tinyfm import adapt, generate
from tinyfm.adapt.soft_prompt import add_prompt, prompt_ids
from tinyfm.batching import Batch, Text
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.compiled import compile_decoding
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate.__main__ import SIZE
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.quantize import (
    LONG,
    QuantizedLinear,
    as_bfloat16,
    count_bytes,
    int4_steps,
    int8_steps,
    output_errors,
    pack,
    pack_nibbles,
    quantize,
    round_int4,
    round_int8,
    round_one_by_one,
    round_plainly,
    round_second_order,
    round_weight,
    unpack_nibbles,
)
from tinyfm.recipes import run_dir
from tinyfm.seq2seq import Seq2Seq, Seq2SeqConfig
from tinyfm.serve import __main__ as serve
from tinyfm.xlnet import XLNet, XLNetConfig

SMALL = GPTConfig(vocab_size=41, context_length=96, n_layer=2, n_head=2, d_model=32, d_ff=64)


def small_gpt(**options) -> GPT:
    return random_weights(lambda: GPT(replace(SMALL, **options)))


# ---- rounding -----------------------------------------------------------------------------------


def test_weights_are_rounded_to_the_nearest():
    W = normal(40, 64)
    W[3] = 0
    steps = int8_steps(W)
    assert torch.equal(steps, steps.bfloat16().float())
    q = round_int8(W, steps)
    assert q[0].abs().max() == 127 and (W - steps * q).abs().max() <= steps.max() * 0.76
    assert ((W - steps * q).abs() <= steps / 2 + 1e-6).float().mean() > 0.98

    groups = W.unflatten(1, (2, 32))
    steps = int4_steps(groups)
    q = round_int4(groups, steps)
    largest = groups.abs().argmax(-1, keepdim=True)
    assert (q.gather(-1, largest) == torch.where(groups.amax(-1, True) == 0, 0, -8)).all()
    inside = q < 7
    assert ((groups - steps * q).abs() <= steps.abs() * 0.54)[inside].all()
    assert (as_bfloat16(torch.zeros(2)) == 1).all()


@pytest.mark.parametrize("group", [32, 64])
def test_two_numbers_share_a_byte(group):
    q = torch.arange(-8, 8).repeat(3, 8)
    q[1] = q[1].flip(0)
    packed = pack_nibbles(q, group)
    assert packed.shape == (3, 64) and packed.dtype == torch.uint8
    assert packed[0, 0] == (q[0, 0] + 8) + 16 * (q[0, group // 2] + 8)
    assert torch.equal(unpack_nibbles(packed, group), q.to(torch.int8))


def alike_inputs(K: int) -> torch.Tensor:
    """Inputs that say nearly the same, and one that is always 0, (200, K) in float64."""
    X = normal(200, 6).double() @ normal(6, K, seed=1).double() + 0.3 * normal(200, K, seed=2)
    X[:, 5] = 0
    return X


def test_second_order_rounding_is_what_the_equation_says():
    W = normal(9, 64, seed=3)
    X = alike_inputs(64)
    H = X.T @ X
    q, steps = round_second_order(W, H, 32)
    slow_q, slow_steps = round_one_by_one(W, H, 32)
    assert torch.equal(q, slow_q) and torch.equal(steps, slow_steps)


def test_second_order_rounding_is_never_worse_on_the_inputs_it_is_for():
    W = normal(300, 64, seed=3)
    X = alike_inputs(64)
    H = X.T @ X
    plain = output_errors(W, *round_plainly(W, 32), H)
    assert torch.allclose(
        plain, (X @ (W - replaced(*round_plainly(W, 32))).T.double()).square().sum(0)
    )
    better = output_errors(W, *round_weight(W, H, 32), H)
    assert (better <= plain).all() and better.sum() < 0.5 * plain.sum()
    X = X[:3]  # three examples say little: some rows are worse by second order alone
    H = X.T @ X + 1e-9 * torch.eye(64)
    plain = output_errors(W, *round_plainly(W, 32), H)
    assert (output_errors(W, *round_weight(W, H, 32), H) <= plain).all()


def replaced(q: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return q * steps.repeat_interleave(q.size(1) // steps.size(1), 1)


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("outputs, bias", [(48, True), (19, False)])
@torch.no_grad()
def test_a_packed_product_is_the_obvious_one(kind, outputs, bias):
    """To the rounding of bfloat16. A row's numbers do not depend on the other rows, bit for bit."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(96, outputs, bias)).eval()
    x = normal(17, 1, 96)
    exact = plain(x)
    quantize(plain, kind)
    (layer,) = plain
    obvious = layer(x)
    assert 0 < (obvious - exact).abs().max() < (0.02 if kind == "int8" else 0.3)
    pack(plain)
    assert layer.packed is not None or not torch.backends.cpu.get_cpu_capability().startswith("AVX")
    got = layer(x)
    assert got.dtype == torch.float32 and got.shape == obvious.shape
    torch.testing.assert_close(got, obvious, rtol=0.01, atol=0.01)
    for rows in (1, 3, 4, 8, 16):
        assert torch.equal(layer(x[:rows]), got[:rows])
    torch.testing.assert_close(layer(x[:, 0]), got[:, 0])
    long = normal(1, LONG, 96)
    torch.testing.assert_close(layer(long)[:, :5], layer(long[:, :5]), rtol=0.01, atol=0.01)
    plain.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), obvious, rtol=0.02, atol=0.02)
    x = x[:, 0].bfloat16()
    got = layer(x)
    assert torch.equal(layer(x[3]), got[3]) and torch.equal(layer(x.T.contiguous().T), got)


def test_a_width_that_the_packed_product_cannot_read_stays_plain():
    """torch's product for int8 would read past the end of its rows."""
    plain = nn.Sequential(nn.Linear(24, 8), nn.Linear(32, 8)).eval()
    quantize(plain, "int8")
    pack(plain)
    assert plain[0].packed is None
    x = normal(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(plain[0](x), x @ plain[0].weight.T + plain[0].bias)


# ---- models -------------------------------------------------------------------------------------

CLIP_CONFIG = CLIPConfig(
    image_size=8, channels=1, patch_size=4, image_layer=1, image_width=32, image_head=2,
    vocab_size=257, context_length=16, text_layer=1, text_width=32, text_head=2, embed_dim=16,
)  # fmt: skip
DIFFUSION = DiffusionConfig(
    image_size=8, patch_size=1, in_channels=1, channels=(32, 32), groups=4,
    attend=(False, True), n_head=2,
)  # fmt: skip
WORDS = EncoderConfig(vocab_size=258, context_length=32, n_layer=1, n_head=2, d_model=32)
MODELS = {
    "gpt": lambda: GPT(SMALL),
    "gpt, tied": lambda: GPT(replace(SMALL, tied=True, position="learned", bias=True)),
    "encoder": lambda: Encoder(WORDS),
    "clip": lambda: CLIP(CLIP_CONFIG),
    "diffusion": lambda: Diffusion(DIFFUSION),
    "seq2seq": lambda: Seq2Seq(Seq2SeqConfig(vocab_size=40, n_layer=1, n_head=2, d_model=32)),
    "xlnet": lambda: XLNet(XLNetConfig(vocab_size=40, n_layer=1, n_head=2, d_model=32)),
}


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_model_of_each_family(family, kind):
    """Nearly the same loss, from fewer bytes; no plain linear layer or table remains."""
    model = random_weights(MODELS[family], 0.05)
    batch = model.example_batch(4)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    before, size = model.loss(batch, generators)[0], count_bytes(model)
    matrices = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
    products = []
    quantize(model, kind, lambda: products.append(model.loss(batch, generators)))
    assert not any(type(m) in (nn.Linear, nn.Embedding) for m in model.modules())
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    after = model.loss(batch, generators)[0]
    assert after == pytest.approx(before.item(), rel=0.01 if kind == "int8" else 0.05)
    assert size - count_bytes(model) > 2.7 * matrices > 0
    assert bool(products) == (kind == "int4")
    with torch.enable_grad(), pytest.raises(ValueError, match="cannot be trained"):
        model.train().loss(batch, generators)


def test_a_tied_head_stays_tied_and_keeps_eight_bits():
    model = small_gpt(tied=True)
    quantize(model, "int4")
    assert model.head.quantized is model.token_embedding.quantized
    assert model.head.quantized.kind == "int8"
    assert model.blocks[0].attention.q.quantized.kind == "int4"
    assert torch.equal(model.token_embedding(torch.tensor([[7]]))[0, 0], model.head.weight[7])
    model.to(torch.bfloat16)
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_a_width_that_the_groups_do_not_divide():
    model = small_gpt(d_ff=48)
    eight = quantize(model, "int4")
    assert eight == ["blocks.0.mlp.down", "blocks.1.mlp.down"]
    assert model.blocks[0].mlp.down.quantized.kind == "int8"
    with pytest.raises(ValueError, match=r"groups of 32 inputs.*\[24\].*int8"):
        quantize(nn.Sequential(nn.Linear(24, 8)), "int4")


def test_what_cannot_be_quantised():
    model = small_gpt()
    with pytest.raises(ValueError, match=r"'int3'.*int8 or int4"):
        quantize(model, "int3")
    with pytest.raises(ValueError, match=r"16 inputs.*32, 64, 128"):
        quantize(model, "int4", group=16)
    adapt.apply(model, "lora", adapt.AdapterConfig())
    with pytest.raises(ValueError, match=r"blocks.0.attention.q.*not merged"):
        quantize(model, "int8")
    adapt.merge(model)
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"blocks.1.mlp.up.*not finite"):
        quantize(model, "int8")
    model = small_gpt()
    quantize(model, "int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, "int8")
    with pytest.raises(ValueError, match="no linear layer"):
        quantize(nn.Sequential(nn.Conv2d(1, 1, 3)), "int8")


# ---- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.filterwarnings("ignore:past 96 tokens")
def test_a_text_is_the_same_alone_among_others_and_as_a_stream(kind, dtype):
    model = small_gpt(zero_init=False)
    if kind == "int4":
        add_prompt(model, 3)
    quantize(model, kind)
    model.to(dtype)
    pack(model)
    s = generate.Sampling(12, seed=4)
    prompts = [prompt_ids(model) + [i] * (7 * i + 2) for i in range(6)]
    alone = []
    for prompt in prompts:
        batch = Batch(model)
        batch.add(Text(prompt, s))
        alone.append([batch.step()[-1][1] for _ in range(12)])
    batch = Batch(model)
    together = {Text(prompt, s): [] for prompt in prompts}
    for text in together:
        batch.add(text)
    for _ in range(12):
        for text, drawn in batch.step():
            together[text].append(drawn)
    for prompt, one, many in zip(prompts, alone, together.values(), strict=True):
        for a, b in zip(one, many, strict=True):
            assert a.token == b.token and torch.equal(a.logprobs, b.logprobs)
        stream = [step[0] for step in generate.stream(model, [prompt], s)]
        assert stream == [drawn.token for drawn in one]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_can_be_compiled(kind, monkeypatch, capsys):
    """torch captures the graphs and runs them itself: its compiler takes seconds for each."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiler(f, backend="eager", **options)
    )
    model = small_gpt(bias=True)
    quantize(model, kind)
    pack(model)
    cache = generate.KVCache(model.config, 9, torch.zeros(1, dtype=torch.long))
    with torch.inference_mode():
        expected = model(torch.tensor([[5, 6, 7]]))
        compile_decoding(model)
        states = [model.hidden(torch.tensor([[i]]), cache) for i in (5, 6, 7)]
        got = torch.stack([model.head(state[:, -1]) for state in states], 1)
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)
    assert "continuing without it" not in capsys.readouterr().out


# ---- the commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["int8", "int4-gptq"])
def test_the_command_compares_a_model_with_its_quantised_form(how, tiny_run, capsys):
    assert call(evaluate, tiny_run, "--quantize", how, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    row = scores["test_bpb"]
    assert row[how] != row["reached"] and row[how] == pytest.approx(row["reached"], abs=0.02)
    size = scores[SIZE]
    assert size[how] < (0.35 if how == "int8" else 0.32) * size["reached"]
    kept = json.loads((Path(tiny_run) / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    assert kept["test_bpb"][how] == row[how] and kept.keys() == scores.keys() - {SIZE}


def test_a_question_is_asked_of_both_forms(tiny_run, tmp_path, capsys):
    file = tmp_path / "a.txt"
    file.write_text("the list of words", encoding="utf-8")
    assert call(evaluate, tiny_run, "--text", file, "--quantize", "int4", "--json") == 0
    row = json.loads(capsys.readouterr().out)["scores"][f"text {file}: bits per byte"]
    assert row["int4"] != row["reached"] and row["int4"] == pytest.approx(row["reached"], abs=0.02)


def test_second_order_rounding_needs_the_data(tiny_run):
    opened = run_dir.open_run(str(tiny_run))
    data = replace(opened.run.data, path="gone.txt")
    opened = replace(opened, run=replace(opened.run, data=data))
    with pytest.raises(ValueError, match=r"gone.txt.*training data.*int4 does without"):
        run_dir.quantize_run(opened, opened.model, "int4-gptq")


def test_a_lora_is_merged_first(tiny_run, text, tmp_path, capsys):
    out = tmp_path / "lora"
    few = ["--train.steps", "2", "--train.batch-size", "4", "--train.eval-every", "0"]
    base = ["--init-from", tiny_run, "--adapt", "lora", "--optim.lr", "0.5"]
    assert call(train, "gpt", *base, "--data.path", text, *few, "--out", out) == 0
    assert call(evaluate, out, "--quantize", "int8", "--json") == 0
    printed = capsys.readouterr().out
    row = json.loads(printed[printed.index('{\n  "run"') :])["scores"]["val_loss"]
    assert abs(row["int8"] - row["reached"]) < 0.1 * abs(row["before"] - row["reached"])


def test_sampling_and_the_server_write_the_same_text(tiny_run, capsys):
    words = ["--prompt", "The", "--max-new-tokens", "8", "--quantize", "int4"]
    assert call(sample, tiny_run, *words, "--seed", "3") == 0
    printed = capsys.readouterr()
    assert "int4 and float32" in printed.err
    options = serve.Options((str(tiny_run),), quantize="int4")
    (served,) = serve.open_runs(options)
    assert isinstance(served.model.head, QuantizedLinear)
    s = generate.Sampling(8, seed=3)
    batch = Batch(served.model)
    text = Text(served.tokenizer.encode("The"), s)
    batch.add(text)
    for _ in range(8):
        batch.step()
    assert served.tokenizer.decode(text.tokens) == printed.out.removesuffix("\n")
