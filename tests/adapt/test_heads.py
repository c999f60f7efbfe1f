"""Classifiers on pretrained bodies: the features of all families, learning, and bad input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_weights
from torch import nn

from tinyfm import adapt
from tinyfm.adapt import heads
from tinyfm.adapt.heads import Classifier, count_places, in_places
from tinyfm.autoencoder import Autoencoder, AutoencoderConfig
from tinyfm.batches.labelled import TaskConfig, texts
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes import autoencoder, clip, ddpm, encoder, gpt, vq, xlnet
from tinyfm.recipes.classify import score_batches
from tinyfm.tokenizer import ByteTokenizer
from tinyfm.training.optim import OptimConfig, hidden_matrices
from tinyfm.training.trainer import TrainConfig, Trainer
from tinyfm.vq import VQVAE, VQConfig
from tinyfm.xlnet import XLNet, XLNetConfig

CLASSES = {"topic": ("a", "b", "c"), "tone": ("good", "bad")}
TEXT = GPTConfig(257, context_length=24, n_layer=1, n_head=2, d_model=16, zero_init=False)
CLIPS = CLIPConfig(
    image_size=16,
    patch_size=4,
    image_layer=1,
    image_width=16,
    image_head=2,
    vocab_size=9,
    context_length=4,
    text_layer=1,
    text_width=8,
    text_head=2,
    embed_dim=8,
)
CODES = VQConfig(image_size=16, channels=(8, 16), latent_channels=3, groups=4)
LATENTS = AutoencoderConfig(image_size=16, channels=(8, 16), latent_channels=3, groups=4)
NOISE = DiffusionConfig(
    image_size=16,
    patch_size=2,
    channels=(8, 16),
    attend=(False, True),
    n_block=1,
    n_head=2,
    groups=4,
)
WORDS = EncoderConfig(258, context_length=24, n_layer=2, n_head=2, d_model=32)
ORDERS = XLNetConfig(257, context_length=24, n_layer=2, n_head=2, d_model=32, segments=True)
BODIES = {
    GPT: TEXT,
    Encoder: WORDS,
    XLNet: ORDERS,
    CLIP: CLIPS,
    Autoencoder: LATENTS,
    VQVAE: CODES,
    Diffusion: NOISE,
}
READERS = {
    GPT: gpt.GPTClassifyRun.reader,
    Encoder: encoder.EncoderClassifyRun.reader,
    XLNet: xlnet.XLNetClassifyRun.reader,
    CLIP: clip.CLIPClassifyRun.reader,
    Autoencoder: autoencoder.AutoencoderClassifyRun.reader,
    VQVAE: vq.VQClassifyRun.reader,
    Diffusion: ddpm.DDPMClassifyRun.reader,
}


def classifier(body: nn.Module, classes: dict = CLASSES) -> Classifier:
    return Classifier(body, classes, READERS[type(body)])


def body_of(kind) -> nn.Module:
    return random_weights(lambda: kind(BODIES[kind]))


def rows(model: Classifier, n: int) -> dict[str, torch.Tensor]:
    """A random batch."""
    batch, rng = model.example_batch(n), torch.Generator().manual_seed(1)
    for name in ("images", "tokens"):
        if name in batch:
            like = batch[name]
            whole = not like.is_floating_point()
            new = torch.randint(257, like.shape, generator=rng) if whole else torch.rand(like.shape)
            batch[name] = new
    top = torch.tensor([len(names) for names in model.classes.values()])
    batch["labels"] = (torch.rand(n, len(top), generator=rng) * top).long()
    return batch


# ---- features -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BODIES)
def test_features_are_standardised_and_depend_on_their_own_row_alone(kind):
    torch.manual_seed(0)
    model = classifier(body_of(kind))
    batch = rows(model, 5)
    x = model.features(batch)
    assert x.shape == (5, READERS[kind].width(model.config))
    own = x * x.size(1) / heads.WIDTH
    assert own.mean(1).abs().max() < 1e-5
    assert (own.var(1, correction=0) - 1).abs().max() < 1e-2
    alone = model.features({name: tensor[3:4] for name, tensor in batch.items()})
    assert torch.allclose(alone, x[3:4], atol=1e-4)
    assert not torch.allclose(x[3], x[2], atol=1e-2)


@pytest.mark.parametrize("kind", [GPT, Encoder, XLNet])
def test_features_do_not_depend_on_padding(kind):
    model = classifier(body_of(kind))
    tokens = torch.randint(257, (2, 10), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    x = model.features({"tokens": tokens, "mask": real})
    for filler in (0, 256):
        padded = torch.cat((tokens, torch.full((2, 7), filler)), 1)
        mask = torch.cat((real, torch.zeros(2, 7, dtype=torch.bool)), 1)
        assert torch.allclose(model.features({"tokens": padded, "mask": mask}), x, atol=1e-5)
    more = torch.cat((tokens, tokens[:, :7]), 1)
    unmasked = {"tokens": more, "mask": torch.ones_like(more, dtype=torch.bool)}
    assert not torch.allclose(model.features(unmasked), x, atol=1e-2)


def test_the_first_features_of_clip_are_those_of_its_image_tower():
    clip = body_of(CLIP)
    model = classifier(clip)
    batch = rows(model, 3)
    x = model.reader.read(clip, batch)
    assert torch.allclose(x[:, : CLIPS.image_width], clip.image_tower(batch["images"]), atol=1e-5)


def test_the_features_of_a_u_net_are_the_output_of_its_middle():
    diffusion = body_of(Diffusion)
    seen = []
    model = classifier(diffusion)
    batch = rows(model, 2)
    x = model.reader.read(diffusion, batch)
    diffusion.unet.middle_out.register_forward_hook(lambda *call: seen.append(call[2]))
    t = int(0.3 * NOISE.diffusion_steps)
    alpha = diffusion.path(NOISE.diffusion_steps)[-2 - t][1]
    diffusion.unet(alpha * batch["images"], torch.tensor([t]))
    assert torch.allclose(in_places(seen[0], 4), x, atol=1e-4)


def test_places_are_means_of_parts():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert in_places(x, 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert torch.equal(in_places(x, 9), x.flatten(1))
    assert [count_places(4, grid) for grid in (2, 9)] == [4, 16]


# ---- the classifier -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BODIES)
def test_at_first_all_classes_are_equally_likely(kind):
    model = classifier(body_of(kind))
    batch = rows(model, 4)
    for names, p in zip(CLASSES.values(), model.predict(batch).values()):
        assert torch.equal(p, torch.full((4, len(names)), 1 / len(names)))
    loss, _ = model.loss(batch)
    assert loss.item() == pytest.approx((np.log(3) + np.log(2)) / 2, rel=1e-6)


@pytest.mark.parametrize("kind", BODIES)
def test_the_features_depend_on_all_trained_parameters_and_on_no_frozen_one(kind):
    """With several GPUs, every trained parameter must get a gradient."""
    model = classifier(body_of(kind)).train()
    for parameter in model.heads.parameters():
        nn.init.normal_(parameter)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)
    model.loss(rows(model, 3))[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert {"heads.0.weight", "heads.1.bias"} < trained
    assert {id(p) for p in model.heads.parameters()}.isdisjoint(map(id, hidden_matrices(model)))


def test_a_tied_head_is_read():
    model = classifier(GPT(replace(TEXT, tied=True)))
    assert model.body.token_embedding.weight.requires_grad


def test_loss_is_the_mean_over_heads_and_predictions_are_its_probabilities():
    model = classifier(body_of(GPT))
    for parameter in model.heads.parameters():
        nn.init.normal_(parameter, std=0.1)
    batch = rows(model.eval(), 6)
    loss, metrics = model.loss(batch)
    p = model.predict(batch)
    wanted = 0.0
    for q, question in enumerate(CLASSES):
        own = p[question][torch.arange(6), batch["labels"][:, q]]
        wanted -= own.log().mean() / 2
        right = (p[question].argmax(1) == batch["labels"][:, q]).float().mean()
        assert metrics[f"accuracy {question}"] == right
    assert torch.allclose(loss, wanted, atol=1e-5)
    halves = [{name: x[i : i + 3] for name, x in batch.items()} for i in (0, 3)]
    found = heads.predictions(model, halves)
    assert np.allclose(found["tone"][0], p["tone"].detach().numpy(), atol=1e-6)
    assert np.array_equal(found["tone"][1], batch["labels"][:, 1].numpy())
    scores = score_batches(model, halves)
    assert scores["accuracy topic"] == pytest.approx(float(metrics["accuracy topic"]))
    assert {"macro_f1 tone", "calibration_error tone"} <= scores.keys()


def test_in_training_all_classes_share_a_tenth_of_the_label():
    model = classifier(body_of(GPT), {"topic": CLASSES["topic"]})
    nn.init.normal_(model.heads[0].weight, std=0.1)
    batch = rows(model, 6)
    own = (torch.arange(6), batch["labels"][:, 0])
    target = torch.full((6, len(CLASSES["topic"])), 0.1 / len(CLASSES["topic"]))
    target[own] += 0.9
    wanted = -(target * model.predict(batch)["topic"].log()).sum(1).mean()
    assert model.train().loss(batch)[0].item() == pytest.approx(wanted.item(), rel=1e-5)


# ---- learning -----------------------------------------------------------------------------------


def few_passages(tmp_path: Path, batch_size: int):
    """24 passages with two questions; a topic is a word of the passage, a tone is arbitrary."""
    rng = np.random.default_rng(0)
    lines = ["text,topic,tone"]
    for i in range(24):
        words = [f"w{n}" for n in rng.integers(99, size=3)]
        topic = ("sea", "sky")[i % 2]
        tone = ("dull", "gay")[i // 2 % 2]
        words[i % 3] = topic
        lines.append(f"{' '.join(words)},{topic},{tone}")
    path = tmp_path / "few.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = TaskConfig(str(path), label_columns=("topic", "tone"), labels=20)
    return texts(config, ByteTokenizer(), TEXT.context_length, batch_size, seed=0)


def test_twenty_passages_are_learnt_by_heart(tmp_path):
    """The loss starts at ln 2 = 0.69. "tone" can only be memorised."""
    data = few_passages(tmp_path, 20)
    torch.manual_seed(0)
    model = classifier(GPT(replace(TEXT, d_model=32)), data.classes)
    train = TrainConfig(steps=40, batch_size=20, eval_every=0, device="cpu", dtype="float32")
    optim = OptimConfig(optimizer="adamw", lr=0.01, warmup_steps=5)
    Trainer(model, data, train, optim, tmp_path / "run").fit()
    scores = score_batches(model.eval(), [data.read("train", data.chosen)])
    assert scores["accuracy topic"] == scores["accuracy tone"] == 1


def test_a_frozen_body_keeps_its_weights(tmp_path):
    data = few_passages(tmp_path, 4)
    body = body_of(GPT)
    before = adapt.base_hash(body)
    model = classifier(body, data.classes)
    adapt.apply(model, "head")
    train = TrainConfig(steps=3, batch_size=4, eval_every=0, device="cpu", dtype="float32")
    Trainer(model, data, train, OptimConfig(warmup_steps=0), tmp_path / "run").fit()
    assert adapt.base_hash(model) == before
    assert model.heads[0].weight.abs().max() > 0
    assert [*model.state_dict()] == [f"heads.{q}.{p}" for q in (0, 1) for p in ("weight", "bias")]


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"d_context is 8.*trained on pictures alone"):
        ddpm.DDPMClassifyRun(model=replace(NOISE, d_context=8))
    with pytest.raises(ValueError, match="no question"):
        classifier(GPT(TEXT), {})
    for names in (("one",), (), ("same", "same")):
        with pytest.raises(ValueError, match="the classes of 'x' are"):
            classifier(GPT(TEXT), {"x": names})
    model = classifier(CLIP(CLIPS))
    with pytest.raises(ValueError, match="a CLIP reads images; the batch has tokens, mask"):
        model.features({"tokens": torch.zeros(1, 2), "mask": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"images are \(3, .*, this CLIP takes \(1, 16, 16\)"):
        model.features({"images": torch.zeros(2, 3, 16, 16)})
