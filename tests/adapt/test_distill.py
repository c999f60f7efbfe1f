"""Distillation: the formula, the loss of a student, and which teachers fit which students."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tinyfm import adapt
from tinyfm import tokenizer as tokenizers
from tinyfm.adapt.distill import (
    check_tokenizers,
    cosine_distance,
    distil,
    distillation_loss,
    divergence,
    take_layers,
)
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig, Trainer

V, T = 23, 12


def small(seed: int = 0, **options) -> GPT:
    sizes = {"vocab_size": V, "context_length": T, "n_layer": 1, "n_head": 2, "d_model": 16}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**sizes, "zero_init": False, **options}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def random_batch(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (rows, T + 1), generator=generator)
    return {"tokens": tokens, "mask": torch.rand(rows, T, generator=generator) < 0.6}


def test_divergence_is_torchs_kl_div():
    student, teacher = torch.randn(2, 5, 7, V, dtype=torch.float64).float()
    for temperature in (0.5, 1.0, 3.0):
        q, p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
        expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2
        torch.testing.assert_close(divergence(student, teacher, temperature), expected)


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1.0), (2.5, 0.3), (4.0, 0.0)])
def test_gradient_is_the_formula_s(temperature, share):
    """(1 - share) (softmax - onehot) + share tau (q - p), as a mean over counted positions."""
    student = torch.randn(4, 6, V, dtype=torch.float64).float().requires_grad_()
    teacher, targets = torch.randn(4, 6, V), torch.randint(0, V, (4, 6))
    targets[torch.rand(4, 6) < 0.4] = -100
    loss, metrics = distillation_loss(student, teacher, targets, temperature, share)
    loss.backward()
    counts = targets != -100
    assert metrics["weight"] == counts.sum()
    plain = student.detach().softmax(-1) - F.one_hot(targets.clamp(min=0), V)
    q, p = ((x.detach() / temperature).softmax(-1) for x in (student, teacher))
    expected = ((1 - share) * plain + share * temperature * (q - p)) / counts.sum()
    torch.testing.assert_close(student.grad, expected * counts[..., None])


def test_loss_is_the_weighted_sum_in_training_and_the_plain_loss_in_evaluation():
    student = small()
    teacher = small(1)
    batch = random_batch()
    plain, plain_metrics = student.loss(batch)
    with torch.no_grad():
        logits, judged = (m(batch["tokens"][:, :-1]) for m in (student, teacher))
    kl = divergence(logits, judged, 2.0)[batch["mask"]].mean()
    distil(student, teacher, temperature=2.0, share=0.25)
    loss, metrics = student.loss(batch)
    torch.testing.assert_close(loss, 0.75 * plain + 0.25 * kl)
    assert metrics["weight"] == plain_metrics["weight"] == batch["mask"].sum()
    assert torch.equal(student.eval().loss(batch)[0], plain)
    whole = {"tokens": batch["tokens"]}
    assert student.train().loss(whole)[1]["weight"] == batch["tokens"][:, 1:].numel()


def test_share_0_has_the_gradient_of_the_plain_loss():
    student = small()
    batch = random_batch()
    student.loss(batch)[0].backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    distil(student, small(1), share=0.0)
    student.loss(batch)[0].backward()
    for p, gradient in zip(student.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient)


def test_the_teacher_is_no_part_of_the_student():
    student = small(dropout=0.5)
    teacher = small(1, dropout=0.5, d_model=32)
    before = [*student.state_dict()]
    distil(student, teacher)
    student.train()
    assert [*student.state_dict()] == before
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    student.loss(random_batch())[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_a_copy_of_a_student_uses_its_own_weights():
    student = small()
    batch = random_batch()
    distil(student, small(1))
    twin = copy.deepcopy(student)
    with torch.no_grad():
        student.head.weight.zero_()
    twin.loss(batch)[0].backward()
    assert twin.head.weight.grad is not None
    assert student.head.weight.grad is None


class Constant:
    """The same rows at each step, as data for the trainer."""

    unit, units_per_row = "tokens", T

    def __init__(self):
        self.rows = random_batch(8)

    def batch(self, step, rows=slice(None)):
        return {name: tensor[rows] for name, tensor in self.rows.items()}

    def val_batches(self, rows):
        yield self.rows

    def metrics(self, loss):
        return {"teacher_kl": self.kl()}


def test_a_student_learns_to_predict_as_its_teacher_does(tmp_path):
    """Through the trainer, on rows of noise, which only the teacher makes worth learning from."""
    student = small()
    teacher = small(1)
    data = Constant()

    def kl() -> float:
        with torch.no_grad():
            logits, judged = (m(data.rows["tokens"][:, :-1]) for m in (student, teacher))
        return divergence(logits, judged, 1.0)[data.rows["mask"]].mean().item()

    data.kl = kl
    before = kl()
    distil(student, teacher, temperature=1.0, share=1.0)
    train = TrainConfig(steps=50, batch_size=8, micro_batch_size=3, eval_every=0, device="cpu")
    optim = OptimConfig(lr=1e-2)
    scores = Trainer(student, data, train, optim, tmp_path / "run").fit()
    assert scores["teacher_kl"] < 0.2 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vocab_size": V + 1},
            f"vocab_size is {V + 1}, the student's {V}; use --model.vocab-size",
        ),
        ({"context_length": T - 1}, f"context_length is {T - 1}, the student's {T}"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        distil(small(), small(1, **options))
    distil(small(), small(1, context_length=T + 5, n_layer=2))
    prompted = small()
    adapt.apply(prompted, "prompt", adapt.AdapterConfig(prompt_tokens=2))
    with pytest.raises(ValueError, match=r"has a soft prompt.*use another --adapt"):
        distil(prompted, small(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"share": 1.5}, "share is 1.5; it must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        distil(small(), small(1), **options)


def test_tokenizers_are_compared_by_what_their_ids_mean(tmp_path):
    first, second = (tokenizers.train("bpe", [t * 40], 262) for t in ("the cat ", "a dog is "))
    first.save(tmp_path)
    again = tokenizers.load(tmp_path)
    check_tokenizers(first, again)
    with pytest.raises(ValueError, match="is another one, 5 tokens differ"):
        check_tokenizers(first, second)
    with pytest.raises(ValueError, match="has 257 tokens, the student's 262"):
        distil(small(), small(1), tokenizers=(first, tokenizers.ByteTokenizer()))


# ---- encoders ------------------------------------------------------------------------------------


def small_encoder(seed: int = 0, **options) -> Encoder:
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 16, "zero_init": False}
    return Encoder(EncoderConfig(V, T, **{**sizes, **options}))


def masked_batch() -> dict[str, torch.Tensor]:
    tokens = random_batch()["tokens"][:, :T]
    chosen = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    mask = torch.arange(T) < torch.tensor([[T], [5], [9]])
    return {"tokens": tokens, "mask": mask, "targets": tokens.where(chosen & mask, -100)}


def test_cosine_distance_by_hand():
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    teacher = torch.tensor([[0.0, 3.0], [2.0, 0.0], [-1.0, -1.0]])
    expected = (1 + (1 - 0.5**0.5)) / 2  # right angle, 45 degrees; the last does not count
    found = cosine_distance(student, teacher, torch.tensor([1, 2, -100]))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_an_encoder_learns_from_its_teacher_s_masked_words_and_states():
    """DistilBERT's three losses, at the places that are predicted."""
    student = small_encoder()
    teacher = small_encoder(1, n_layer=4)
    batch = masked_batch()
    chosen = batch["targets"] != -100
    plain, metrics = student.loss(batch)
    with torch.no_grad():
        logits, judged = (m(batch["tokens"], batch["mask"])[chosen] for m in (student, teacher))
        states, theirs = (
            m.hidden(batch["tokens"], batch["mask"])[chosen] for m in (student, teacher)
        )
    kl = divergence(logits, judged, 2.0).mean()
    cosine = (1 - F.cosine_similarity(states, theirs)).mean()
    distil(student, teacher, temperature=2.0, share=5 / 7, cosine=1 / 7)
    loss, taught = student.loss(batch)
    torch.testing.assert_close(loss, 2 / 7 * plain + 5 / 7 * kl + cosine / 7)
    assert taught["weight"] == metrics["weight"] == chosen.sum()
    assert torch.equal(student.eval().loss(batch)[0], plain)


def test_a_student_starts_from_layers_of_its_teacher():
    teacher = small_encoder(1, n_layer=12)
    student = small_encoder(n_layer=6)
    assert take_layers(student, teacher) == [0, 2, 4, 7, 9, 11]
    for own, layer in zip(student.tower.blocks, [0, 2, 4, 7, 9, 11]):
        assert torch.equal(own.mlp.up.weight, teacher.tower.blocks[layer].mlp.up.weight)
    table = student.embeddings.token_embedding.weight
    assert torch.equal(table, teacher.embeddings.token_embedding.weight)
    assert student.head.decoder.weight is table
    same = small_encoder(n_layer=12)
    take_layers(same, teacher)
    assert torch.equal(same(masked_batch()["tokens"]), teacher(masked_batch()["tokens"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 32}, r"is \(23, 32\), the teacher's .* is \(23, 16\)"),
        ({"n_layer": 3}, "has 3 of them, and the teacher 2.*--model.n-layer 2"),
        ({"segments": 2}, "segment_embedding.* is None"),
    ],
)
def test_layers_that_cannot_be_taken(options, message):
    student = small_encoder(**options)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=message):
        take_layers(student, small_encoder(1))
    assert all(torch.equal(before[name], p) for name, p in student.state_dict().items())


def test_encoders_and_gpts_do_not_teach_each_other():
    with pytest.raises(ValueError, match=r"is GPT and the teacher Encoder: use one kind"):
        distil(small(), small_encoder())
    with pytest.raises(ValueError, match=r"student's objective is electra.*objective mlm"):
        distil(small_encoder(objective="electra"), small_encoder())
    with pytest.raises(ValueError, match=r"16 and 32 numbers have no angle.*--distil.cosine 0"):
        distil(small_encoder(), small_encoder(d_model=32), cosine=0.1)
    with pytest.raises(ValueError, match=r"cosine is -1"):
        distil(small_encoder(), small_encoder(), cosine=-1)
