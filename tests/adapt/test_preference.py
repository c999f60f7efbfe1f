"""Preferences: the losses by hand and as trl has them, padding, learning, rewards."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import generators

from tinyfm.adapt.preference import (
    Answer,
    DPOConfig,
    GroupPolicy,
    GRPOConfig,
    Guide,
    PairPolicy,
    RewardModel,
    best_of,
    best_of_kl,
    bradley_terry,
    check_differences,
    clipped_gain,
    distinct,
    dpo,
    draw_answers,
    frozen_log_probs,
    group_advantages,
    ipo,
    k3,
    kl_of_answers,
    log_probs,
    pad_rows,
    score_answers,
)
from tinyfm.adapt.rewards import Judge, Parses, is_function
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
EOT = BYTES.eot
CONFIG = GPTConfig(
    vocab_size=257, context_length=24, n_layer=1, n_head=2, d_model=32, zero_init=False
)


def tiny(kind: type = GPT, *arguments, seed: int = 0):
    torch.manual_seed(seed)
    return kind(CONFIG, *arguments)


def pairs(*texts: tuple[str, str, str], pad: int = 0) -> dict[str, torch.Tensor]:
    rows, starts = [], []
    for prompt, *answers in texts:
        for answer in answers:
            start = [EOT, *prompt.encode()]
            rows.append([*start, *answer.encode(), EOT])
            starts.append(len(start))
    batch = pad_rows(rows, starts, pad)
    return {name: tensor.unflatten(0, (-1, 2)) for name, tensor in batch.items()}


# ---- formulas ------------------------------------------------------------------------------------


def test_losses_of_pairs_by_hand():
    h = torch.tensor([0.0, 5.0, -5.0])
    expected = [math.log(2), math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))]
    torch.testing.assert_close(dpo(h, 0.1), torch.tensor(expected))
    assert ipo(h, 0.1).tolist() == [25, 0, 100]
    assert bradley_terry(torch.tensor(math.log(3))).item() == pytest.approx(-math.log(0.75))


def test_ppo_gains_nothing_from_a_ratio_that_is_far_already():
    log_p = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]])
    gain = clipped_gain(log_p, torch.zeros(1, 5), advantages, 0.2)
    torch.testing.assert_close(gain, torch.tensor([[1.2, -1.5, 0.5, -0.8, 2.0]]))
    gain.sum().backward()
    assert log_p.grad.tolist() == [[0, -1.5, 0.5, 0, 2]]  # R A, or 0 where it is clipped


def test_the_estimate_of_kl_is_right_on_average():
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    estimates = k3(p.log(), q.log())
    assert (estimates >= 0).all()
    assert (p * estimates).sum().item() == pytest.approx((p * (p / q).log()).sum().item())


def test_advantages_compare_within_a_group():
    found = group_advantages(torch.tensor([[0.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]))
    deviation = 0.5 + 1e-4  # with n - 1, as trl has it
    torch.testing.assert_close(found[0], torch.tensor([-0.25, -0.25, -0.25, 0.75]) / deviation)
    assert found[1].tolist() == [0] * 4


def test_best_of_n_is_the_mean_over_all_choices():
    rewards = np.array([[3.0, 1.0, 2.0, 0.0]])
    assert best_of(rewards, 1).tolist() == [1.5]
    assert best_of(rewards, 2) == pytest.approx((3 + 3 + 3 + 2 + 2 + 1) / 6)
    assert best_of(rewards, 4) == 3
    assert best_of(rewards, 4, np.array([[9.0, 8.0, 7.0, 6.0]])) == 9  # chosen by the reward
    assert best_of_kl(1) == 0 and best_of_kl(4) == pytest.approx(math.log(4) - 0.75)
    with pytest.raises(ValueError, match="best of 5: there are 4"):
        best_of(rewards, 5)


def test_distinct_counts_different_pairs():
    assert distinct([[1, 2, 1, 2], [1, 2]]) == 2 / 4
    assert distinct([[1]]) == 0


# ---- log-probabilities ---------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_answer():
    model = tiny()
    row = [EOT, *b"ab", *b"cde", EOT]
    batch = pad_rows([row], [3])
    found = log_probs(model, batch["tokens"], batch["mask"])
    log_p = model(torch.tensor([row[:-1]])).log_softmax(-1)[0]
    expected = [0, 0] + [log_p[i - 1, row[i]].item() for i in range(3, 7)]
    torch.testing.assert_close(found[0], torch.tensor(expected))


@pytest.mark.parametrize("kind", ["dpo", "ipo", "reward"])
def test_padding_never_counts(kind):
    model = RewardModel(tiny()) if kind == "reward" else tiny(PairPolicy, DPOConfig(kind))
    if kind == "reward":
        torch.nn.init.normal_(model.heads[0].weight)
    texts = ("ab", "cde", "fghijkl"), ("a", "x", "yzw")
    losses = []
    for pad, wider in ((0, 0), (99, 5)):
        batch = pairs(*texts, pad=pad)
        batch["reference"] = torch.tensor([[-3.0, -4.0], [-5.0, -1.0]])
        more = torch.full((2, 2, wider), pad)
        batch["tokens"] = torch.cat((batch["tokens"], more), -1)
        batch["mask"] = torch.cat((batch["mask"], more.bool() & False), -1)
        losses.append(model.loss(batch)[0])
    apart = []
    for i, text in enumerate(texts):
        batch = pairs(text)
        batch["reference"] = torch.tensor([[-3.0, -4.0], [-5.0, -1.0]])[i : i + 1]
        apart.append(model.loss(batch)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], torch.stack(apart).mean())


# ---- learning ------------------------------------------------------------------------------------


def train(model, batch, steps: int, lr: float = 0.01) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    for step in range(steps):
        loss, _ = model.loss(batch, generators(len(next(iter(batch.values()))), seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


TASTE = [("?", "good " + word, "bad " + word) for word in ("cat", "dog", "sun", "sea")]


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_dpo_raises_the_margin(kind):
    model = tiny(PairPolicy, DPOConfig(kind))
    batch = pairs(*TASTE)
    flat = batch["tokens"].flatten(0, 1), batch["mask"].flatten(0, 1)
    batch["reference"] = frozen_log_probs(tiny(), *flat).sum(1).view(-1, 2)
    torch.testing.assert_close(model.margins(batch), torch.zeros(4), atol=1e-4, rtol=0)
    train(model, batch, 20)
    margins = model.margins(batch)
    if kind == "dpo":
        assert (margins > 5).all()
    else:
        assert (margins > 1).all()
        assert (margins < 6).all()  # it has a value to reach, 1 / (2 beta) = 5


def test_a_reward_model_learns_what_is_preferred_and_keeps_the_middle_at_zero():
    model = RewardModel(tiny())
    assert model.loss(pairs(*TASTE))[0].item() == pytest.approx(math.log(2))
    train(model, pairs(*TASTE), 30)
    rewards = model.pair_rewards(pairs(*TASTE))
    assert (rewards[:, 0] > 0.5).all() and (rewards[:, 1] < -0.5).all()
    judge = Judge(model, BYTES, whole=False)
    answers = [Answer([], [], "?", text, True) for text in ("good cat", "bad cat")]
    assert judge(answers) == pytest.approx(rewards[0].tolist(), abs=1e-5)


class Says:
    """1 for answers that contain a letter; or a constant."""

    name = "says"
    end = re.compile(rb"\n")
    value = None

    def __call__(self, answers):
        if self.value is not None:
            return [self.value] * len(answers)
        return ["e" in answer.text for answer in answers]


def policy_that_says(beta: float = 0.0) -> GroupPolicy:
    model = tiny(GroupPolicy, GRPOConfig(group=16, beta=beta, max_new_tokens=6))
    model.guide = Guide(tiny(), BYTES, Says())
    return model


def prompt_batch(n: int) -> dict[str, torch.Tensor]:
    prompts = torch.full((n, 4), EOT)
    prompts[:, 1] = torch.arange(97, 97 + n)
    return {"prompts": prompts, "lengths": torch.full((n,), 2)}


def test_grpo_learns_to_write_a_letter():
    model = policy_that_says()
    batch = prompt_batch(8)
    before = model.draw(batch, generators(8), 16)[1].mean()
    train(model, batch, 40)
    answers, rewards = model.draw(batch, generators(8), 16)
    assert before < 0.1
    assert rewards.mean() > 0.9
    assert kl_of_answers(model, model.guide.reference, answers).mean() > 1
    assert kl_of_answers(tiny(), tiny(), answers).max() < 1e-5


def test_grpo_is_the_formula_and_an_update_does_not_depend_on_the_cut():
    model = policy_that_says(beta=0.5)
    model.guide = model.guide._replace(reference=tiny(seed=1))
    batch = prompt_batch(4)
    loss, _ = model.loss(batch, generators(4))
    loss.backward()
    found = model.head.weight.grad.clone()

    # The formula, an answer at a time.
    model.zero_grad()
    answers, rewards = model.draw(batch, generators(4), 16)
    advantages = group_advantages(rewards).flatten()
    assert advantages.any()
    total = 0.0
    goal = 0.0
    for answer, advantage in zip(answers, advantages):
        own = pad_rows([answer.prompt + answer.tokens], [2]).values()
        log_p, log_q = (log_probs(m, *own)[0, 1:] for m in (model, model.guide.reference))
        kl = (log_q - log_p).exp() - 1 - (log_q - log_p)
        total = total + (0.5 * kl - advantage * (log_p - log_p.detach()).exp()).mean() / 64
        goal = goal + 0.5 * kl.mean().item() / 64
    total.backward()
    torch.testing.assert_close(found, model.head.weight.grad, atol=1e-5, rtol=1e-4)
    assert loss.item() == pytest.approx(goal - rewards.mean().item(), abs=1e-4)

    # Two micro-batches.
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        (model.loss(part, generators(4)[rows])[0] / 2).backward()
    torch.testing.assert_close(found, model.head.weight.grad, atol=1e-5, rtol=1e-4)


def test_answers_end_and_leave_the_model_in_its_mode():
    model = tiny().train()
    prompts = [[EOT, 97], [EOT, 97, 98, 99]]
    answers = draw_answers(model, BYTES, prompts, generators(2), 20, re.compile(rb"[a-z]"))
    assert model.training
    for prompt, answer in zip(prompts, answers):
        assert answer.prompt == prompt and answer.before == bytes(prompt[1:]).decode()
        letters = [97 <= token <= 122 for token in answer.tokens]
        assert answer.ended == (letters[-1] or answer.tokens[-1] == EOT)
        assert not any(letters[:-1])
        assert not re.search("[a-z]", answer.text)
    alone = draw_answers(model, BYTES, prompts[1:], generators(2)[1:], 20, re.compile(rb"[a-z]"))
    assert alone[0].tokens == answers[1].tokens


def test_the_calculators_count_a_pair_as_two_rows_and_a_prompt_as_its_group():
    for model, rows in ((tiny(PairPolicy), 2), (tiny(GroupPolicy), 8)):
        assert model.flops_per_row() == rows * tiny().flops_per_row()
        batch = model.example_batch(3)
        assert len(batch["tokens"]) == 3 * rows
        assert torch.equal(model.loss(batch)[0], tiny().loss(batch)[0])


# ---- rewards -------------------------------------------------------------------------------------

START = 'def f(x):\n    """Add one."""\n'


@pytest.mark.parametrize(
    ("answer", "ended", "reward"),
    [
        ("    return x + 1\n", True, 1),
        ("    return x +", True, 0),
        ("    if x:\n        return 1\n    return (", False, 1),  # its last line is not finished
        ("    return (", False, 0),
        ("", True, 0),
        ("    return x\n  y\n", True, 0),
        ("    return x\nprint(1)\n", True, 0),  # more than one function
        ("    break\n", True, 0),  # parses, and does not compile
        ("    return '\0'\n", True, 0),
    ],
)
def test_a_function_is_checked_and_never_run(answer, ended, reward):
    assert Parses()([Answer([], [], START, answer, ended)]) == [reward]


def test_checking_runs_nothing(tmp_path):
    place = tmp_path / "made"
    assert is_function(f"def f(x=open({str(place)!r}, 'w')):\n    return x\n")
    assert not place.exists()


def test_a_judge_refuses_a_prompt_that_leaves_no_room_for_the_answer():
    judge = Judge(RewardModel(tiny()), BYTES, whole=False)
    judge([Answer([], [], "p" * 22, "an answer that loses its end", True)])
    with pytest.raises(ValueError, match=r"'ppp.*' has 24 tokens for the judge, .* context 24"):
        judge([Answer([], [], "p" * 23, "a", True)])


def test_impossible_rewards_are_named():
    answer = Answer([], [], "", "hello", True)
    with pytest.raises(ValueError, match="the reward of 'hello' is nan"):
        score_answers(lambda answers: [math.nan], [answer])
    model = policy_that_says()
    model.guide.reward.value = 2
    with pytest.raises(ValueError, match=r"the reward is constant: 16 answers .* 2 to the first"):
        check_differences(model, prompt_batch(2), seed=0)


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (DPOConfig, {"beta": 0}, "beta is 0"),
        (GRPOConfig, {"group": 1}, "group is 1"),
        (GRPOConfig, {"beta": -1}, "beta is -1"),
    ],
)
def test_settings_out_of_range(config, words, message):
    with pytest.raises(ValueError, match=message):
        config(**words)
