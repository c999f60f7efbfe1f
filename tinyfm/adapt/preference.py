"""Preferences: a language model learns which answers are better, from people or from a reward.

Pretraining teaches what is likely. People can say which of two whole answers is better. Let x be a
prompt and y an answer of T tokens:

    ln p(y | x) = sum_t ln p(y_t | x, y_<t)

A reward model r (Christiano et al. 2017; Ouyang et al. 2022, eq. 1) learns from pairs, of which
people prefer y+ to y-. Bradley and Terry (1952) say how often an answer wins; the loss is the -ln:

    P(y+ beats y-) = sigmoid(r(x, y+) - r(x, y-))

Only differences count in it. A small cost, center (r+ + r-)^2, puts the zero in the middle
(Eisenstein et al. 2023).

The goal of all that follows is a high reward near the reference q, the model at the start. Far from
it the reward model errs, and the text is no language any more. Both numbers are always reported:

    maximise E r(x, y) - beta KL(p || q),      KL(p || q) = E ln (p(y | x) / q(y | x)),   y from p

Best of n needs no training: draw n answers from q, keep the one with the highest reward. Its KL is
at most ln n - (n - 1) / n (Stiennon et al. 2020, appendix G).

DPO (Rafailov et al. 2023) needs no reward model: the best p has r = beta ln (p / q), up to a number
that depends on x alone (their eq. 5), and the sigmoid above reads only differences (eq. 7):

    h = ln (p(y+) / q(y+)) - ln (p(y-) / q(y-)),       loss = -ln sigmoid(beta h)

IPO (Azar et al. 2023, eq. 17) differs in one line. A pair that is always won would push h without
end; so h is to reach a finite value. Its log-ratios are means over the tokens, as in trl:

    loss = (h - 1 / (2 beta))^2

In both, q is data: ln q(y | x) of each answer is computed once, before training.

PPO and GRPO draw the answers from p itself. An answer has an advantage A: how much better it is
than others. PPO (Schulman et al. 2017, eq. 7) allows several updates from the same answers, which
older weights p_old have drawn. A ratio R that leaves 1 - epsilon ... 1 + epsilon gains no more:

    R_t = p(y_t) / p_old(y_t),       gain_t = min(R_t A, clip(R_t, 1 - epsilon, 1 + epsilon) A)

PPO has a second network for A. GRPO (Shao et al. 2024, eq. 3 and 4) draws a group of answers to
each prompt instead, and compares them with each other. It adds the KL, token by token, by an
estimate that is never negative (Schulman 2020, "k3"):

    A = (r - mean r of the group) / (deviation of the group + 1e-4)
    k3_t = q(y_t) / p(y_t) - 1 - ln (q(y_t) / p(y_t))
    loss = mean over answers of the mean over their tokens of (beta k3_t - gain_t)

Here each batch is drawn by the present weights and used for one update. So R is 1, and its gradient
is that of ln p. If all answers of a group have the same reward, it teaches nothing.

Why the loss draws the answers: the data are a function of (seed, step) and know no weights. The
loss has the weights, and a random generator for each row. A row is a prompt, and its group is drawn
from its generator. So an update does not depend on how a batch is cut, and a resumed run draws the
same answers. One limit: how the products of a row are rounded may depend on the other rows. Now and
then a draw then falls on another token, and two ranks write another answer than one.

Letters: B rows, n answers, T tokens, D width.
Left out: conversations, several updates from the same answers, a value network, rewards of single
steps, sampling at other temperatures than 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm import generate
from tinyfm.adapt.heads import normalise
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.tokenizer import Tokenizer

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class RewardConfig:
    center: float = 0.01  # weight of the cost that puts the mean reward of a pair at 0

    def __post_init__(self):
        if not 0 <= self.center < math.inf:
            raise ValueError(f"center is {self.center}; it must be 0 or above")


@dataclass(frozen=True)
class DPOConfig:
    loss: Literal["dpo", "ipo"] = "dpo"  # dpo: log-sigmoid of the margin; ipo: a margin to reach
    beta: float = 0.1  # the larger, the closer to the reference

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; it must be above 0")


@dataclass(frozen=True)
class GRPOConfig:
    group: int = 8  # answers to each prompt, which are compared with each other
    beta: float = 0.04  # weight of the KL to the reference
    max_new_tokens: int = 64  # largest number of tokens of an answer

    def __post_init__(self):
        for name, least in (("group", 2), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; it must be 0 or above")


# ---- formulas -----------------------------------------------------------------------------------
# All take numbers of answers or pairs (n,), or of tokens (n, T), and return as many.


def bradley_terry(difference: Tensor) -> Tensor:
    """-ln of the probability that the better answer wins, by its reward less the other's."""
    return -F.logsigmoid(difference)


def dpo(h: Tensor, beta: float) -> Tensor:
    """The loss of pairs by the difference h of their log-ratios."""
    return bradley_terry(beta * h)


def ipo(h: Tensor, beta: float) -> Tensor:
    return (h - 1 / (2 * beta)) ** 2


PAIR_LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {"dpo": dpo, "ipo": ipo}


def clipped_gain(
    log_p: Tensor, old_log_p: Tensor, advantages: Tensor, epsilon: float = 0.2
) -> Tensor:
    """PPO's gain of each token (n, T); advantages (n, 1)."""
    ratio = (log_p - old_log_p).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def k3(log_p: Tensor, log_q: Tensor) -> Tensor:
    """An estimate of KL(p || q) from tokens that p drew: at least 0, and right on average."""
    difference = log_q - log_p
    return difference.exp() - 1 - difference


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards (B, group) -> advantages (B, group), which are 0 where all of a group are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def best_of(rewards: np.ndarray, n: int, values: np.ndarray | None = None) -> np.ndarray:
    """The expected value of the best of n answers, without a bias: (B, N) -> (B,).

    rewards: of N answers, by which the best of n of them is chosen. values: what is averaged, by
    default the rewards. The i-th smallest of N rewards is the highest of n in binom(i - 1, n - 1)
    of binom(N, n) choices (Nakano et al. 2021, appendix I). Raises ValueError unless 1 <= n <= N.
    """
    N = rewards.shape[1]
    order = rewards.argsort(axis=1, kind="stable")
    values = rewards if values is None else values
    if not 1 <= n <= N:
        raise ValueError(f"best of {n}: there are {N} answers; use 1 to {N}")
    weights = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    return np.take_along_axis(values, order, axis=1) @ np.array(weights)


def best_of_kl(n: int) -> float:
    """The most that KL(best of n || reference) can be."""
    return math.log(n) - (n - 1) / n


# ---- log-probabilities --------------------------------------------------------------------------


def pad_rows(rows: Sequence[Sequence[int]], starts: Sequence[int], pad: int = 0) -> Batch:
    """Rows as a batch: {"tokens": int64 (n, T + 1), "mask": bool (n, T)}.

    starts: place of the first token of each answer, at least 1. The mask is True for the targets
    that belong to an answer. Rows are filled up on the right, where causal attention does not look.
    """
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts)):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, start - 1 : len(row) - 1] = True
    return {"tokens": tokens, "mask": mask}


def log_probs(model: GPT, tokens: Tensor, mask: Tensor) -> Tensor:
    """ln p of each target, float32 (n, T), 0 where the mask (n, T) is False; tokens (n, T + 1)."""
    states = model.hidden(tokens[:, :-1])[mask]  # (targets that count, D)
    targets = tokens[:, 1:][mask]
    found = -F.cross_entropy(model.head(states).float(), targets, reduction="none")
    return torch.zeros(mask.shape, device=found.device).masked_scatter(mask, found)


@torch.no_grad()
def frozen_log_probs(model: GPT, tokens: Tensor, mask: Tensor) -> Tensor:
    """`log_probs` of a reference, which follows the tokens to their device."""
    if next(model.parameters()).device != tokens.device:
        model.to(tokens.device)
    return log_probs(model.requires_grad_(False).eval(), tokens, mask)


# ---- the reward model ---------------------------------------------------------------------------


class RewardModel(nn.Module):
    """A GPT whose mean state over the tokens of an answer gives one number, the reward.

    Batches are those of batches/preference.py: tokens (B, 2, T + 1) and mask (B, 2, T), the better
    answer first. The states are normalised as those of a classifier (heads.py).
    """

    unit = "token"

    def __init__(self, body: GPT, settings: RewardConfig | None = None):
        super().__init__()
        self.body = body
        self.config = body.config
        self.settings = settings or RewardConfig()
        self.outer = (*body.outer, "heads")  # trained by AdamW, not by Muon
        if not body.config.tied:
            body.head.requires_grad_(False)  # it is not read
        self.heads = nn.ModuleList([nn.Linear(body.config.d_model, 1)])
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise the head; the body keeps its weights."""
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def reset_buffers(self):
        self.body.reset_buffers()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (n, T + 1), and which targets (n, T) are the answer -> rewards (n,)."""
        states = self.body.hidden(tokens)[:, 1:].float()  # of the targets
        own = mask[..., None]
        mean = (states * own).sum(1) / own.sum(1).clamp(min=1)  # (n, D)
        return self.heads[0](normalise(mean)).squeeze(1).float()

    def pair_rewards(self, batch: Batch) -> Tensor:
        """(B, 2): of the better answer and of the other."""
        return self(batch["tokens"].flatten(0, 1), batch["mask"].flatten(0, 1)).view(-1, 2)

    def loss(self, batch: Batch, generators=None) -> tuple[Tensor, Batch]:
        rewards = self.pair_rewards(batch)
        loss = bradley_terry(rewards[:, 0] - rewards[:, 1])
        return (loss + self.settings.center * rewards.sum(1) ** 2).mean(), {}

    def example_batch(self, rows: int) -> Batch:
        tokens = torch.zeros(rows, 2, self.config.context_length, dtype=torch.long)
        return {"tokens": tokens, "mask": torch.ones_like(tokens[..., 1:], dtype=torch.bool)}


# ---- what a policy writes and follows -----------------------------------------------------------


class Answer(NamedTuple):
    """What a model has written after a prompt."""

    prompt: list[int]  # ids, the end-of-text token first
    tokens: list[int]  # ids of the answer, with the one that ended it
    before: str  # the prompt's text
    text: str  # the answer's, without what ended it
    ended: bool  # or the number of tokens was used up


class Reward(Protocol):
    """A function of answers; rewards.py has two."""

    name: str  # of the share of answers with a reward above 0
    end: re.Pattern[bytes]  # what ends an answer, besides the end-of-text token

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]: ...


class Guide(NamedTuple):
    """What a policy stays near, and what it follows."""

    reference: GPT
    tokenizer: Tokenizer
    reward: Reward | None = None


# ---- DPO and IPO --------------------------------------------------------------------------------


class PairPolicy(GPT):
    """A GPT that learns from pairs, whose batch["reference"] (B, 2) is ln q of both answers."""

    guide: Guide  # for evaluation alone; a tuple, so the reference's weights are not the model's

    def __init__(self, config: GPTConfig, settings: DPOConfig | None = None):
        super().__init__(config)
        self.settings = settings or DPOConfig()

    def margins(self, batch: Batch) -> Tensor:
        """h of each pair, (B,)."""
        mask = batch["mask"].flatten(0, 1)
        log_p = log_probs(self, batch["tokens"].flatten(0, 1), mask).sum(1)
        ratios = log_p - batch["reference"].flatten()
        if self.settings.loss == "ipo":
            ratios = ratios / mask.sum(1)
        better, worse = ratios.view(-1, 2).unbind(1)
        return better - worse

    def loss(self, batch: Batch, generators=None) -> tuple[Tensor, Batch]:
        if "reference" not in batch:  # the calculators' example: as many tokens, the same cost
            return super().loss(batch)
        return PAIR_LOSSES[self.settings.loss](self.margins(batch), self.settings.beta).mean(), {}

    def example_batch(self, rows: int) -> Batch:
        return super().example_batch(2 * rows)

    def flops_per_row(self) -> int:
        return 2 * super().flops_per_row()


# ---- answers ------------------------------------------------------------------------------------


def draw_answers(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    generators: list[torch.Generator],
    most: int,
    end: re.Pattern[bytes] | None = None,
) -> list[Answer]:
    """One answer to each prompt, of at most `most` tokens, drawn at temperature 1.

    It ends with the end-of-text token, or where `end` is found in its bytes. The model is left in
    the mode, training or evaluation, that it was in. Products are computed in float32.
    """
    training = model.training
    sampling = generate.Sampling(max_new_tokens=most, temperature=1.0)
    never = tokenizer.without_token(model.config.vocab_size)
    tokens: list[list[int]] = [[] for _ in prompts]
    contents = [b""] * len(prompts)
    running = set(range(len(prompts)))
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        steps = generate.stream(model, list(prompts), sampling, never=never, generators=generators)
        for step in steps:
            for i in sorted(running):
                tokens[i].append(step[i])
                if step[i] != tokenizer.eot:
                    contents[i] += tokenizer.token_bytes(step[i])
                if step[i] == tokenizer.eot or (end and end.search(contents[i])):
                    running.discard(i)
            if not running:
                break
    model.train(training)
    answers = []
    for i, (prompt, own, content) in enumerate(zip(prompts, tokens, contents)):
        if end:
            content = end.split(content, maxsplit=1)[0]
        before = tokenizer.decode(prompt[1:])
        text = content.decode("utf-8", errors="replace")
        answers.append(Answer(prompt, own, before, text, i not in running))
    return answers


def batch_answers(answers: Sequence[Answer]) -> Batch:
    """The rows of answers, see `pad_rows`."""
    rows = [answer.prompt + answer.tokens for answer in answers]
    return pad_rows(rows, [len(answer.prompt) for answer in answers])


def score_answers(reward: Reward, answers: Sequence[Answer]) -> Tensor:
    """The rewards of answers, float32 (n,). Raises ValueError for one that is not finite."""
    rewards = torch.tensor([float(value) for value in reward(answers)])
    for answer, value in zip(answers, rewards.tolist()):
        if not math.isfinite(value):
            raise ValueError(
                f"the reward of {answer.text[:60]!r} is {value}: a reward must be a finite number, "
                "so look at what computes it"
            )
    return rewards


def distinct(rows: Sequence[Sequence[Any]], n: int = 2) -> float:
    """The number of different runs of n tokens in all rows, over the number of runs (Li et al.
    2016, distinct-n). It falls with the number of rows: compare equal numbers."""
    runs = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


# ---- GRPO ---------------------------------------------------------------------------------------


class GroupPolicy(GPT):
    """A GPT that learns from the rewards of what it writes; `guide` says which.

    A batch has "prompts", int64 (B, P), filled up on the right, and "lengths" (B,).
    """

    guide: Guide  # a tuple, as in PairPolicy

    def __init__(self, config: GPTConfig, settings: GRPOConfig | None = None):
        super().__init__(config)
        self.settings = settings or GRPOConfig()

    def draw(
        self, batch: Batch, generators: Sequence[torch.Generator], group: int
    ) -> tuple[list[Answer], Tensor]:
        """`group` answers to each prompt, one prompt after the other, and rewards (B, group)."""
        prompts = []
        own = []
        rows = zip(batch["prompts"].tolist(), batch["lengths"].tolist(), generators)
        for ids, length, generator in rows:
            prompts += [ids[:length]] * group
            seeds = torch.randint(2**62, (group,), generator=generator).tolist()
            own += [torch.Generator().manual_seed(seed) for seed in seeds]
        guide = self.guide
        most = self.settings.max_new_tokens
        answers = draw_answers(self, guide.tokenizer, prompts, own, most, guide.reward.end)
        return answers, score_answers(guide.reward, answers).view(-1, group)

    def loss(self, batch: Batch, generators=None) -> tuple[Tensor, Batch]:
        """The value is minus the goal, beta KL - reward; the gradient is that of GRPO's loss.

        Without training, one answer is drawn to each prompt.
        """
        if "prompts" not in batch:  # the calculators' example: the cost of the update alone
            return super().loss(batch)
        beta = self.settings.beta
        answers, rewards = self.draw(batch, generators, self.settings.group if self.training else 1)
        device = batch["prompts"].device
        tokens, mask = (tensor.to(device) for tensor in batch_answers(answers).values())

        def mean(values: Tensor) -> Tensor:
            """Mean over answers of the mean over their tokens."""
            return ((values * mask).sum(1) / mask.sum(1)).mean()

        log_p = log_probs(self, tokens, mask)
        kl = k3(log_p, frozen_log_probs(self.guide.reference, tokens, mask))
        goal = rewards.mean().to(device) - beta * mean(kl)
        if not self.training:
            return -goal, {}
        advantages = group_advantages(rewards).to(device).view(-1, 1)
        gain = clipped_gain(log_p, log_p.detach(), advantages)
        loss = mean(beta * kl - gain)
        return loss + (-goal - loss).detach(), {}

    def example_batch(self, rows: int) -> Batch:
        return super().example_batch(self.settings.group * rows)

    def flops_per_row(self) -> int:
        return self.settings.group * super().flops_per_row()


def check_differences(policy: GroupPolicy, batch: Batch, seed: int) -> None:
    """Draw a group of answers to each prompt. Raises ValueError if all groups have equal rewards:
    then there is nothing to learn."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(batch["prompts"]))]
    _, rewards = policy.draw(batch, generators, policy.settings.group)
    if not (rewards != rewards[:, :1]).any():
        raise ValueError(
            f"the reward is constant: {rewards.size(1)} answers to each of {len(rewards)} prompts "
            f"have the same, {rewards[0, 0]:g} to the first, so there is nothing to learn. Start "
            "from a run that sometimes succeeds, or give --grpo.group a larger number"
        )


# ---- how far a policy is from its reference -----------------------------------------------------


@torch.no_grad()
def kl_of_answers(
    policy: GPT, reference: GPT, answers: Sequence[Answer], at_once: int = 32
) -> np.ndarray:
    """The sum of k3 over the tokens of each answer that the policy drew, in nats: float64 (n,)."""
    device = next(policy.parameters()).device
    found = []
    for first in range(0, len(answers), at_once):
        batch = batch_answers(answers[first : first + at_once])
        tokens, mask = (tensor.to(device) for tensor in batch.values())
        log_q = frozen_log_probs(reference, tokens, mask)
        found.append(k3(log_probs(policy, tokens, mask), log_q).sum(1).double().cpu())
    return torch.cat(found).numpy()
