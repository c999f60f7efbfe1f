"""Adaptation: training starts from the base's outputs, trains few weights, and can be undone."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_weights
from torch import nn

from tinyfm import adapt
from tinyfm.adapt import AdapterConfig, lora, soft_prompt
from tinyfm.adapt import __main__ as adapt_command
from tinyfm.adapt.distill import distil
from tinyfm.adapt.heads import Classifier
from tinyfm.autoencoder import Autoencoder, AutoencoderConfig
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.common import files
from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.gpt import STYLES, GPTClassifyRun
from tinyfm.training import checkpoint, optim
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig, Trainer
from tinyfm.unet import UNet, UNetConfig

V, T = 31, 32
TINY = GPTConfig(V, T, n_layer=2, n_head=2, d_model=16)
X = torch.arange(20).view(2, 10)
IMAGES = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)


def random_gpt(**fields) -> GPT:
    return random_weights(lambda: GPT(GPTConfig(**(vars(TINY) | fields))))


def clip() -> CLIP:
    return CLIP(CLIPConfig(8, 1, 4, "conv", 1, 8, 2, V, T, 1, 8, 2, 8))


def autoencoder() -> Autoencoder:
    return Autoencoder(AutoencoderConfig(8, channels=(8, 16), groups=4))


def unet() -> UNet:
    return UNet(UNetConfig(8, channels=(8, 16), attend=(False, True), n_head=2, groups=4))


MODELS = {  # a function that builds a model, and one that calls it
    "gpt": (random_gpt, lambda m: m(X)),
    "gpt-learned-tied": (
        lambda: random_gpt(position="learned", tied=True, norm="layernorm", bias=True),
        lambda m: m(X),
    ),
    "clip": (lambda: random_weights(clip), lambda m: m(IMAGES, X)),
    "autoencoder": (lambda: random_weights(autoencoder), lambda m: m.decode(m.encode(IMAGES)[0])),
    "unet": (lambda: random_weights(unet), lambda m: m(IMAGES, torch.tensor([1.0, 7.0]))),
}
# Targets for all layers that can be merged: not those with a tied weight.
MERGEABLE = {"gpt-learned-tied": "blocks|position"}


def disturb(model: nn.Module, seed: int = 1, std: float = 0.3) -> None:
    """Change the trained parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def same(one: dict, two: dict) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# ---- every layout -------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_gpt_of_every_published_layout_can_be_adapted(style):
    """Methods, distillation and heads: the loss reaches what is trained; the cache is right."""

    def make() -> GPT:
        return random_gpt(**STYLES[style])

    batch = {"tokens": torch.arange(30).view(2, 15)}
    methods = ("lora", "bias", "prompt") if make().config.tied else ("lora", "head", "prompt")
    for method in methods:
        model = make()
        adapt.apply(model, method, AdapterConfig(2, prompt_tokens=3))
        disturb(model)
        model.loss(batch)[0].backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        prompts = [soft_prompt.prompt_ids(model) + row for row in ([1, 2], [3, 4, 5, 6])]
        s = Sampling(6, temperature=0)
        assert complete(model, prompts, s) == complete(model, prompts, s, use_cache=False)
    student = make()
    distil(student, make(), temperature=2.0, share=0.5)
    classifier = Classifier(make(), {"topic": ("a", "b")}, GPTClassifyRun.reader)
    for model, rows in ((student, batch), (classifier, classifier.example_batch(2))):
        model.train().loss(rows)[0].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- the base can be restored -------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_lora_on_every_layer_starts_without_effect_merges_and_comes_off(kind):
    make, run = MODELS[kind]
    model = make()
    base = copy.deepcopy(model.state_dict())
    digest = adapt.base_hash(model)
    out = run(make().requires_grad_(False))  # torch may compute a frozen layer in another way
    adapt.apply(model, "lora", AdapterConfig(1, 2.0, targets=MERGEABLE.get(kind, ".")))
    assert torch.equal(run(model), out)
    disturb(model)
    adapted = run(model)
    assert not torch.allclose(adapted, out, atol=0.01)
    assert adapt.base_hash(model) == digest

    merged = copy.deepcopy(model)
    before = adapt.merge(merged)
    assert not any(lora.adapted_layers(merged)) and merged.state_dict().keys() == base.keys()
    torch.testing.assert_close(run(merged), adapted, atol=1e-4, rtol=1e-4)
    assert adapt.base_hash(merged) != digest
    merged.load_state_dict(before, strict=False)
    assert same(merged.state_dict(), base)

    adapt.remove(model)
    assert same(model.state_dict(), base)
    assert adapt.trained(model)[0] == adapt.trained(model)[1]
    assert torch.equal(run(model.requires_grad_(False)), out)


@pytest.mark.parametrize("method", adapt.METHODS)
@pytest.mark.parametrize("kind", ["gpt", "gpt-learned-tied"])
@torch.no_grad()
def test_every_method_starts_without_effect_and_can_be_removed(kind, method):
    make, run = MODELS[kind]
    model = make()
    base = copy.deepcopy(model.state_dict())
    digest = adapt.base_hash(model)
    out = run(model)
    if (kind, method) == ("gpt-learned-tied", "head"):
        with pytest.raises(ValueError, match=r"head of GPT is its token embedding \(tied\)"):
            adapt.apply(model, method)
        return
    adapt.apply(model, method)
    assert torch.equal(run(model)[..., :V], out) and adapt.base_hash(model) == digest
    if method == "full":
        assert same(model.state_dict(), base)
        return
    disturb(model)
    assert adapt.base_hash(model) == digest
    adapt.remove(model)
    assert same(model.state_dict(), base) and torch.equal(run(model), out)
    adapt.apply(model, method)  # a plain model can be adapted again


def test_the_product_is_the_paper_s_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(3, 4, 3, stride=2, padding=1))
    lora.attach(model, {"0": AdapterConfig(2, 6.0), "1": AdapterConfig(3, 6.0)}, "a")
    disturb(model)

    x = torch.randn(7, 5)
    linear = model[0]
    A, B = linear.lora["a"].A.weight, linear.lora["a"].B.weight
    expected = x @ linear.weight.T + linear.bias + 6 / 2 * (x @ A.T) @ B.T
    torch.testing.assert_close(linear(x), expected)

    x = torch.randn(2, 3, 6, 6)
    conv = model[1]
    A, B = conv.lora["a"].A.weight, conv.lora["a"].B.weight
    W = conv.weight + 6 / 3 * torch.einsum("orij,rckl->ockl", B, A)
    torch.testing.assert_close(conv(x), F.conv2d(x, W, conv.bias, 2, 1), atol=1e-5, rtol=1e-5)

    table = nn.Embedding(7, 5)
    ids = torch.tensor([[6, 0], [3, 3]])
    model = nn.Sequential(table)
    lora.attach(model, {"0": AdapterConfig(2, 6.0, dropout=0.5)}, "a")  # ids are not dropped
    disturb(model)
    A, B = table.lora["a"].A.weight, table.lora["a"].B.weight
    torch.testing.assert_close(model(ids), (table.weight + 6 / 2 * A @ B.T)[ids])


@torch.no_grad()
def test_adapters_can_be_added_weighted_and_exchanged():
    model = random_gpt()
    layer, x = model.blocks[0].mlp.up, torch.randn(3, 16)
    base = layer(x)
    adapt.apply(model, "lora", AdapterConfig(2), "a")
    disturb(model)
    a = layer(x) - base
    adapters = {"a": model.state_dict()}
    fresh = random_gpt()
    adapt.apply(fresh, "lora", AdapterConfig(4))
    disturb(fresh, seed=2)
    adapters["b"] = fresh.state_dict()
    b = fresh.blocks[0].mlp.up(x) - base
    adapt.load_adapter(model, adapters["b"], "lora", AdapterConfig(4), "b")
    assert torch.allclose(layer(x), base + a + b, atol=1e-5)
    for weights, expected in (
        ({"a": 1, "b": -0.5}, base + a - b / 2),
        ({"b": 1}, base + b),
        ({"a": 2}, base + 2 * a),
    ):
        lora.set_weights(model, weights)
        assert torch.allclose(layer(x), expected, atol=1e-5)
    off = copy.deepcopy(model)
    off.blocks[0].mlp.up.lora["b"].A.weight.fill_(math.nan)  # a LoRA with weight 0 is not computed
    lora.set_weights(off, {})
    assert torch.equal(off.blocks[0].mlp.up(x), base)
    lora.set_weights(model, {"a": 1, "b": 0.5})
    out = model(X)
    adapt.merge(model)
    torch.testing.assert_close(model(X), out, atol=1e-4, rtol=1e-4)


def test_dropout_affects_the_product_alone_and_only_in_training():
    model = random_gpt()
    adapt.apply(model, "lora", AdapterConfig(dropout=0.5))
    assert torch.equal(model(X), random_gpt()(X))  # B is 0
    disturb(model)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))


# ---- trained and saved parameters ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "config", "is_trained"),
    [
        ("lora", AdapterConfig(2), lambda n: ".lora.default." in n),
        (
            "lora",
            AdapterConfig(2, targets=r"0\.attention\.v$"),
            lambda n: n.startswith("blocks.0.attention.v.lora"),
        ),
        ("bias", None, lambda n: "norm" in n or n.endswith("bias")),
        ("head", None, lambda n: n == "head.weight"),
        ("prompt", AdapterConfig(prompt_tokens=4), lambda n: n == "token_embedding.prompt"),
    ],
)
def test_only_the_adapter_gets_gradients_and_is_saved(method, config, is_trained):
    model = random_gpt(norm="layernorm", bias=True)
    adapt.apply(model, method, config)
    wanted = {name for name, _ in model.named_parameters() if is_trained(name)}
    disturb(model)
    batch = soft_prompt.prepend({"tokens": X}, soft_prompt.prompt_ids(model))
    model.loss(batch)[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    state = model.state_dict()
    assert state.keys() == wanted
    some = sum(tensor.numel() for tensor in state.values())
    assert adapt.trained(model) == (some, sum(p.numel() for p in model.parameters()))

    other = random_gpt(norm="layernorm", bias=True)
    adapt.load_adapter(other, state, method, config, base=adapt.base_hash(model))
    assert torch.equal(other(X), model(X))


def test_the_summary_counts_parameters():
    model = random_gpt()
    # Gains: of queries, keys and two norms in each of two blocks, and of the last norm.
    some = 2 * (8 + 8 + 16 + 16) + 16
    everything = sum(p.numel() for p in model.parameters())
    adapt.apply(model, "bias")
    share = 100 * some / everything
    assert adapt.summary(model) == f"trains {some:,} of {everything:,} parameters ({share:.3g}%)"


class Probed(nn.Module):
    """A model with heads for a task on top."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.heads = body, nn.ModuleDict({"topic": nn.Linear(16, 3)})
        self.heads["topic"].register_buffer("seen", torch.ones(3))
        self.outer = (*body.outer, "heads")

    def forward(self, tokens):
        return self.heads["topic"](self.body.hidden(tokens).mean(1))


@pytest.mark.parametrize("method", ["lora", "bias", "head", "prompt"])
def test_every_method_trains_and_saves_the_heads_which_are_no_part_of_the_base(method):
    model = Probed(random_gpt())
    plain = random_gpt()
    assert adapt.base_hash(model) == adapt.base_hash(plain)
    adapt.apply(model, method)
    heads = {"heads.topic.weight", "heads.topic.bias"}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained & {n for n, _ in model.named_parameters() if "heads" in n} == heads
    assert trained == heads or method != "head"
    assert model.state_dict().keys() == trained | {"heads.topic.seen"}
    disturb(model)
    ids = torch.tensor(soft_prompt.prompt_ids(model), dtype=torch.long).expand(2, -1)[:, :4]
    model(torch.cat((ids, X), 1)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)
    assert adapt.base_hash(model) == adapt.base_hash(plain)
    adapt.remove(model)
    assert torch.equal(model.body(X), plain(X))


def test_the_base_hash_depends_on_names_dtypes_shapes_and_bytes_but_not_on_the_order():
    def hash_of(**tensors):
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_parameter(name, nn.Parameter(tensor))
        return adapt.base_hash(model)

    a = torch.zeros(2, 3)
    b = torch.ones(4)
    digests = [
        hash_of(a=a, b=b),
        hash_of(a=a, c=b),
        hash_of(a=a.view(3, 2), b=b),
        hash_of(a=a.bfloat16(), b=b),
        hash_of(a=a, b=-b),
        hash_of(a=a),
    ]
    assert len({*digests}) == len(digests)
    assert hash_of(b=b, a=a) == digests[0] and len(digests[0]) == 64


def test_thin_matrices_are_not_trained_by_muon():
    model = random_gpt()
    adapt.apply(model, "lora")
    assert not any(p.requires_grad for p in optim.hidden_matrices(model))
    adapt.remove(model)
    assert model.outer == GPT.outer


def test_a_frozen_part_of_the_base_is_not_adapted():
    """For instance the decoder of an autoencoder, which a classifier of pictures does not use."""
    for method in ("lora", "bias", "head"):
        model = random_weights(lambda: Autoencoder(AutoencoderConfig(8, channels=(8,), groups=4)))
        model.heads = nn.ModuleList([nn.Linear(4, 2)])
        model.decoder.requires_grad_(False)
        adapt.apply(model, method, AdapterConfig(2))
        trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {"heads"} | ({"encoder"} if method != "head" else set())
        assert {name.split(".")[0] for name in model.state_dict()} == trained
        if method == "lora":  # the base is frozen now, but a second LoRA still finds its layers
            adapt.load_adapter(model, model.state_dict(), "lora", AdapterConfig(2), "more")
        adapt.remove(model)
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
            n for n, _ in model.named_parameters() if n.startswith("decoder")
        }


# ---- soft prompts -------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def prompted(request):
    model = random_gpt(tied=request.param)
    adapt.apply(model, "prompt", AdapterConfig(prompt_tokens=4))
    disturb(model)
    return model


@torch.no_grad()
def test_a_soft_prompt_is_read_as_embeddings_before_the_text(prompted):
    plain = random_gpt(tied=prompted.config.tied)
    assert soft_prompt.prompt_ids(prompted) == [V, V + 1, V + 2, V + 3]
    words = torch.tensor([[5, 6, 7, 8]])
    prompted.token_embedding.prompt.copy_(plain.token_embedding.weight[5:9])
    ids = torch.tensor([soft_prompt.prompt_ids(prompted)])
    logits = prompted(torch.cat((ids, X[:1]), 1))
    assert torch.equal(logits[..., :V], plain(torch.cat((words, X[:1]), 1)))
    assert not logits.softmax(-1)[..., V:].any()


def test_a_soft_prompt_starts_as_tokens_of_the_model():
    model = random_gpt()
    adapt.apply(model, "prompt", AdapterConfig(prompt_tokens=5))
    table, prompt = model.token_embedding.weight, model.token_embedding.prompt
    assert (prompt[:, None] == table).all(-1).sum() == 5


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_generation_with_a_prompt_is_the_same_with_and_without_the_cache(prompted, penalty):
    ids = soft_prompt.prompt_ids(prompted)
    prompts = [ids + [1, 2, 3], ids + [4]]  # two lengths, so one row is padded
    sampling = Sampling(max_new_tokens=6, temperature=1.0, repetition_penalty=penalty)
    rows = complete(prompted, prompts, sampling)
    assert rows == complete(prompted, prompts, sampling, use_cache=False)
    assert max(map(max, rows)) < V
    assert rows != complete(prompted, [prompt[4:] for prompt in prompts], sampling)
    with pytest.raises(ValueError, match=rf"id {V + 4}, outside 0 to {V + 3}"):
        complete(prompted, [[V + 4]], sampling)


@torch.no_grad()
def test_the_prompt_does_not_count_in_the_loss(prompted):
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    for batch in ({"tokens": X}, {"tokens": X, "mask": mask, "other": X}):
        longer = soft_prompt.prepend(batch, soft_prompt.prompt_ids(prompted))
        assert longer["tokens"].shape == (2, 14) and longer["mask"].shape == (2, 13)
        assert longer.keys() == batch.keys() | {"mask"}
        loss, metrics = prompted.loss(longer)
        log_p = prompted(longer["tokens"][:, :-1]).log_softmax(-1)[:, 4:]
        own = -log_p.gather(2, X[:, 1:, None])[..., 0]
        counted = batch.get("mask", torch.ones_like(mask))
        assert loss.item() == pytest.approx(own[counted].mean().item(), rel=1e-5)
        assert metrics["weight"] == counted.sum()


# ---- through the trainer ------------------------------------------------------------------------


class Rows:
    """Data for the trainer: each row counts up from one of four numbers."""

    unit, units_per_row = "tokens", 9

    def batch(self, step, rows):
        start = torch.arange(rows.start, rows.stop)[:, None] * 3 + step
        return {"tokens": (start % 4 + torch.arange(10)) % V}

    def val_batches(self, rows):
        return (self.batch(0, slice(i, i + rows)) for i in range(0, 4, rows))

    def metrics(self, val_loss):
        return {}


def train(out: Path, method: str, steps: int, resume: bool = False) -> Trainer:
    torch.manual_seed(0)
    model = random_gpt()
    adapt.apply(model, method, AdapterConfig(4, prompt_tokens=4, dropout=0.1))
    data = soft_prompt.PromptedData(Rows(), soft_prompt.prompt_ids(model))
    config = TrainConfig(steps, 4, eval_every=6, device="cpu", dtype="float32")
    rates = OptimConfig(lr=0.03, warmup_steps=2, decay_fraction=0.0)
    trainer = Trainer(model.train(), data, config, rates, out)
    if resume:
        trainer.resume()
    trainer.fit()
    return trainer


@pytest.mark.parametrize("method", ["lora", "bias", "head", "prompt"])
def test_training_lowers_the_loss_saves_little_and_resumes_bit_for_bit(tmp_path, method):
    whole = train(tmp_path / "whole", method, 12)
    batch = next(whole.data.val_batches(4))
    before = random_gpt().loss(Rows().batch(0, slice(0, 4)))[0]
    assert whole.scores["val_loss"] < before - 0.3 and "tokens" in batch

    train(tmp_path / "cut", method, 6)
    cut = train(tmp_path / "cut", method, 12, resume=True)
    assert same(cut.model.state_dict(), whole.model.state_dict())
    assert cut.scores == whole.scores

    folder = checkpoint.find(tmp_path / "whole")
    tensors = files.load_tensors(folder)
    some, everything = adapt.trained(whole.model)
    assert sum(t.numel() for t in tensors.values()) == some < everything / 2
    model = random_gpt()
    adapt.load_adapter(model, tensors, method, AdapterConfig(4, prompt_tokens=4))
    with torch.no_grad():
        assert model.loss(batch)[0].item() == pytest.approx(whole.scores["val_loss"], rel=1e-6)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": "("}, r"targets '\(' is not a regex"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**fields)


@pytest.mark.parametrize(
    ("make", "method", "config", "message"),
    [
        (random_gpt, "dora", {}, "method is 'dora'; use one of full, lora"),
        (random_gpt, "lora", {"targets": "conv"}, r"'conv' match no layer; .* blocks\.0"),
        (random_gpt, "lora", {"rank": 17}, r"17 exceeds 16, the rank of blocks\.0\.attention\.q"),
        (random_gpt, "prompt", {"prompt_tokens": 32}, "prompt_tokens is 32; .* room for 31"),
        (unet, "prompt", {}, "UNet is no language model"),
        (clip, "prompt", {}, "CLIP is no language model"),
        (autoencoder, "head", {}, "head of Autoencoder is not there"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1)), "lora", {}, "no hidden matrix; .* some of 0"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_changes_nothing(make, method, config, message):
    model = make()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        adapt.apply(model, method, AdapterConfig(**config))
    assert [name for name, _ in model.named_parameters()] == before
    assert adapt.trained(model)[0] == adapt.trained(model)[1]


def test_adapters_that_cannot_be_added_merged_or_loaded():
    model = random_gpt(tied=True)
    adapt.apply(model, "lora", AdapterConfig(2))
    for method in ("lora", "bias"):
        with pytest.raises(ValueError, match="adapted already"):
            adapt.apply(model, method)
    tensors, base = model.state_dict(), adapt.base_hash(model)
    for name, message in (
        ("default", "an adapter 'default' already"),
        ("a.b", "named 'a.b'"),
        ("keys", "named 'keys'"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt.load_adapter(model, tensors, "lora", AdapterConfig(2), name)
    with pytest.raises(ValueError, match=r"no adapter 'c'; the model has \['default'\]"):
        lora.set_weights(model, {"c": 1.0})
    other = random_gpt()
    with pytest.raises(ValueError, match=f"{base[:16]}, and this model's is [0-9a-f]{{16}}"):
        adapt.load_adapter(other, tensors, "lora", AdapterConfig(2), base=base)
    with pytest.raises(ValueError, match="do not fit the model"):
        adapt.load_adapter(other, tensors, "lora", AdapterConfig(3))

    adapt.remove(model)
    adapt.apply(model, "lora", AdapterConfig(2, targets="head"))
    with pytest.raises(ValueError, match="head cannot be merged: its weight is tied"):
        adapt.merge(model)
    adapt.remove(model)
    adapt.apply(model, "prompt", AdapterConfig(prompt_tokens=2))
    with pytest.raises(ValueError, match="soft prompt cannot be merged"):
        adapt.merge(model)


def test_the_command_without_compare_prints_its_usage():
    for arguments in (["x"], []):
        assert "python -m tinyfm.adapt compare RUN" in adapt_command.main(arguments)
