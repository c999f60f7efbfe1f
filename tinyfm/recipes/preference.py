"""Preferences: `python train.py gpt --task reward|dpo|grpo --init-from RUN`.

All three start from a trained GPT (adapt/preference.py has the methods):

    reward   a reward model, from pairs of a better and a worse answer
    dpo      a GPT that learns the same pairs itself, near its reference, the run it starts from
    grpo     a GPT that writes answers and learns from their rewards

gpt.py derives its run types from these. The reference's log-probabilities of pairs are computed
once and cached. Beside each reward stands the KL to the reference, measured on answers that the
policy draws to held-out prompts, and how varied these are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from data.splits import HELD_OUT, TRAIN, VAL
from tinyfm import adapt, tokenizer
from tinyfm.adapt.preference import (
    Answer,
    Batch,
    DPOConfig,
    GroupPolicy,
    GRPOConfig,
    Guide,
    PairPolicy,
    Reward,
    RewardConfig,
    RewardModel,
    check_differences,
    distinct,
    draw_answers,
    frozen_log_probs,
    kl_of_answers,
    score_answers,
)
from tinyfm.adapt.rewards import Judge, Parses
from tinyfm.batches.preference import SHOWN, PairConfig, PairData, PromptConfig, PromptData
from tinyfm.common.seeds import row_generators
from tinyfm.evaluate.metrics import proportion, ratio_of_sums
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.base import About, OpenRun, Run, Scores, warn_if_longer, write_texts_file
from tinyfm.tokenizer import Tokenizer

PAIR_TOKENS = 64  # of an answer that is drawn to measure a policy trained on pairs
AT_ONCE = 32  # answers that are drawn together
CHECKED = 16  # prompts whose answers must differ in reward before training starts


@dataclass(frozen=True, kw_only=True)
class PreferenceRun(Run):
    """What the three share. `model` and `data` are the fields of the subclass."""

    model: GPTConfig = field(default_factory=GPTConfig)

    base_family: ClassVar[str] = "gpt"

    def __post_init__(self):
        if self.adapt == "prompt":
            raise ValueError(f"--adapt prompt is not for --task {self.task}: use lora or full")

    def open_tokenizer(self) -> Tokenizer:
        """That of the base. Raises ValueError without one."""
        if not self.data.tokenizer:
            raise ValueError(
                f"--task {self.task} starts from a model that writes: add --init-from RUN"
            )
        return tokenizer.load(self.data.tokenizer)


@dataclass(frozen=True, kw_only=True)
class PairRun(PreferenceRun):
    """A run on pairs."""

    data: PairConfig = field(default_factory=PairConfig)

    def open_data(self) -> PairData:
        own = self.open_tokenizer()
        train = self.train
        length = self.model.context_length
        return PairData(self.data, own, length, train.batch_size, train.seed)

    def differences(self, model: nn.Module, data: PairData, split: str) -> np.ndarray:
        """By how much the model prefers the better answer of each pair: float64 (n,)."""
        raise NotImplementedError

    def score(self, model: nn.Module, data: PairData) -> Scores:
        """The share of validation pairs whose better answer the model prefers, and by how much."""
        found = self.differences(model, data, VAL)
        return {"val_accuracy": right(found).mean(), "val_margin": found.mean()}

    def losses(self, model: nn.Module, data: PairData) -> Scores:
        """The loss of both held-out splits, and the share of pairs that are ordered rightly."""
        scores = super().losses(model, data)
        for split in HELD_OUT:
            if data.splits[split]:
                found = self.differences(model, data, split)
                scores[f"{split}_accuracy"] = proportion(right(found) > 0.5, "pairs")
                scores[f"{split}_margin"] = ratio_of_sums(found, np.ones(len(found)), "pairs")
        return scores


def right(differences: np.ndarray) -> np.ndarray:
    """1 for a pair that is ordered rightly, 1/2 for a tie."""
    return (differences > 0) + (differences == 0) / 2


@torch.no_grad()
def over_batches(
    measure: Callable[[Batch], torch.Tensor], model: nn.Module, batches: Iterable[Batch]
) -> np.ndarray:
    """`measure` (n, ...) of each batch of n, one after the other: float64. At least one batch."""
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        found.append(measure(batch).double().cpu().numpy())
    return np.concatenate(found)


# ---- the reward model ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RewardRun(PairRun):
    """Teach a GPT which answers are better."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    task: str = "reward"

    family: ClassVar[str] = "reward"
    has_heads: ClassVar[bool] = True
    FACTS = (*Run.FACTS, "reward")
    SAMPLE_OPTIONS = frozenset({"prompt"})
    ABOUT = About(
        task="text-classification",
        use="It gives a text a reward: above 0 if it is like those that were preferred.",
        limits="A reward is an estimate. A text that is written to have a high one may have found "
        "an error of the model.",
    )

    def build_model(self) -> RewardModel:
        return RewardModel(GPT(self.model), self.reward)

    def trunk(self, model: RewardModel, base: Run) -> GPT:
        return model.body

    def differences(self, model: RewardModel, data: PairData, split: str) -> np.ndarray:
        def measure(batch: dict) -> torch.Tensor:
            rewards = model.pair_rewards(batch)
            return rewards[:, 0] - rewards[:, 1]

        return over_batches(measure, model, data.split_batches(split, self.train.batch_size))

    def show(self, model: RewardModel, data: PairData, folder: Path, step: int) -> str:
        """Write the answers of some validation pairs with their rewards."""
        rows = data.splits[VAL][:16]
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in data.collate(rows).items()}
        with torch.no_grad():
            rewards = model.pair_rewards(batch).tolist()
        texts = []
        for row, pair in zip(rows, rewards):
            for ids, reward in zip((row.chosen, row.rejected), pair):
                texts.append(f"{reward:+.2f}  {data.tokenizer.decode(ids[1:-1])}")
        write_texts_file(folder, step, texts)
        return f"--- step {step} finds:\n{texts[0][:200]}\n{texts[1][:200]}"

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Print the reward of --prompt."""
        if not (options.prompt or "").strip():
            raise ValueError("give the text to judge: --prompt TEXT")
        warn_if_longer(opened, options.prompt, ends=2)
        answer = Answer([], [], "", options.prompt, ended=True)
        (reward,) = Judge(opened.model, opened.tokenizer)([answer])
        print(f"{reward:.4f}")


def check_judge(judge: OpenRun, name: str) -> None:
    """Raise ValueError for a run that gives no rewards. name: how the user named it."""
    if not isinstance(judge.model, RewardModel):
        raise ValueError(
            f"{name} is a run of family {judge.run.family}: give a reward model, of "
            "python train.py gpt --task reward"
        )


# ---- policies -----------------------------------------------------------------------------------


def answer_prompts(
    model: GPT,
    own: Tokenizer,
    prompts: Sequence[list[int]],
    seed: int,
    most: int,
    end: re.Pattern[bytes] | None = None,
    number: int = 0,
) -> list[Answer]:
    """One answer to each prompt; the random stream of prompt i is that of row i in evaluation.

    number: of the round, where each prompt is answered several times.
    """
    answers = []
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first : first + AT_ONCE]
        generators = row_generators(seed, -1 - number, range(first, first + len(some)))
        answers += draw_answers(model, own, some, generators, most, end)
    return answers


def distance(policy: GPT, reference: GPT, answers: Sequence[Answer], name: str) -> Scores:
    """The KL to the reference in nats an answer, with its interval, and how varied answers are."""
    kl = kl_of_answers(policy, reference, answers)
    return {
        f"{name}_kl": ratio_of_sums(kl, np.ones(len(kl)), "answers"),
        f"{name}_distinct_2": distinct([answer.tokens for answer in answers]),
    }


@dataclass(frozen=True, kw_only=True)
class DPORun(PairRun):
    """Let a GPT prefer the better answers of pairs."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
    task: str = "dpo"

    family: ClassVar[str] = "dpo"
    FACTS = (*Run.FACTS, "dpo")

    def build_model(self) -> PairPolicy:
        return PairPolicy(self.model, self.dpo)

    def use_others(
        self,
        model: PairPolicy,
        data: PairData,
        open_base: Callable[[], OpenRun],
        open_run: Callable[[str], OpenRun],
    ) -> None:
        """Give the data the reference's log-probabilities, and keep it to measure the KL."""
        base = open_base().model
        device = next(model.parameters()).device

        def log_probs(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return frozen_log_probs(base, tokens.to(device), mask.to(device))

        data.add_reference(log_probs, adapt.base_hash(base))
        model.guide = Guide(base, data.tokenizer)

    def differences(self, model: PairPolicy, data: PairData, split: str) -> np.ndarray:
        batches = data.split_batches(split, self.train.batch_size)
        return over_batches(model.margins, model, batches)

    def answers(self, model: GPT, data: PairData, split: str, most: int = 0) -> list[Answer]:
        """Answers to the prompts of a split that leave room for one, all or `most` of them.

        If there is one prompt, such as the empty one, SHOWN answers to it.
        """
        context = self.model.context_length
        prompts = data.prompts(split)
        shortest = min(map(len, prompts))
        tokens = min(PAIR_TOKENS, context // 2, context - shortest)
        prompts = [ids for ids in prompts if len(ids) + tokens <= context]
        if len(prompts) == 1:
            prompts = prompts * SHOWN
        prompts = prompts[: most or None]
        return answer_prompts(model, data.tokenizer, prompts, self.train.seed, tokens)

    def score(self, model: PairPolicy, data: PairData) -> Scores:
        answers = self.answers(model, data, VAL, SHOWN)
        return super().score(model, data) | distance(model, model.guide.reference, answers, VAL)

    def losses(self, model: PairPolicy, data: PairData) -> Scores:
        scores = super().losses(model, data)
        for split in HELD_OUT:
            if data.splits[split]:
                answers = self.answers(model, data, split)
                scores |= distance(model, model.guide.reference, answers, split)
        return scores

    def show(self, model: PairPolicy, data: PairData, folder: Path, step: int) -> str:
        return write_answers(self.answers(model, data, VAL, 8), folder, step)


def write_answers(answers: Sequence[Answer], folder: Path, step: int) -> str:
    """Write prompts with their answers, and return the first."""
    texts = [answer.before + answer.text for answer in answers]
    write_texts_file(folder, step, texts)
    return f"--- step {step} writes:\n{texts[0].strip()[:300]}"


@dataclass(frozen=True, kw_only=True)
class GRPORun(PreferenceRun):
    """Let a GPT learn from the rewards of its answers."""

    data: PromptConfig = field(default_factory=PromptConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    task: str = "grpo"

    family: ClassVar[str] = "grpo"
    FACTS = (*Run.FACTS, "grpo")

    def __post_init__(self):
        super().__post_init__()
        if self.train.parallel == "fsdp" or self.train.compile:
            raise ValueError(
                "--task grpo draws answers within its loss, which neither --train.parallel fsdp "
                "nor --train.compile can do: leave both out"
            )

    def build_model(self) -> GroupPolicy:
        return GroupPolicy(self.model, self.grpo)

    def open_data(self) -> PromptData:
        own = self.open_tokenizer()
        train = self.train
        room = self.model.context_length - self.grpo.max_new_tokens
        if room < 1:
            raise ValueError(
                f"--grpo.max-new-tokens {self.grpo.max_new_tokens} leaves no room for a prompt in "
                f"the context of {self.model.context_length}: use a smaller number"
            )
        return PromptData(self.data, own, room, train.batch_size, train.seed)

    def facts_of(self, data: PromptData) -> dict[str, Any]:
        return {"data": replace(self.data, path=data.path)}

    def open_reward(self, data: PromptData, open_run: Callable[[str], OpenRun]) -> Reward:
        """The reward that the options name. Raises ValueError for a judge that gives none."""
        if self.data.reward == "parses":
            return Parses()
        judge = open_run(self.data.judge)
        check_judge(judge, f"--data.judge {self.data.judge}")
        reward = Judge(judge.model, judge.tokenizer, data.whole)
        for rows in data.splits.values():
            for ids in rows:  # a prompt that the judge cannot read is found before training
                reward.start(data.tokenizer.decode(ids[1:]))
        return reward

    def use_others(
        self,
        model: GroupPolicy,
        data: PromptData,
        open_base: Callable[[], OpenRun],
        open_run: Callable[[str], OpenRun],
    ) -> None:
        """Give the model its reference and its reward.

        When training starts, the model has the weights of its base: its answers must differ.
        """
        reward = self.open_reward(data, open_run)
        model.guide = Guide(open_base().model, data.tokenizer, reward)
        if model.training and not self.resume:
            batch = data.collate(data.prompts(TRAIN)[:CHECKED])
            check_differences(model, batch, self.train.seed)

    def answers(
        self, model: GroupPolicy, data: PromptData, split: str, most: int = 0
    ) -> list[Answer]:
        """Answers to the prompts of a split, all or `most` of them."""
        prompts = data.prompts(split)[: most or None]
        seed = self.train.seed
        tokens = self.grpo.max_new_tokens
        return answer_prompts(model, data.tokenizer, prompts, seed, tokens, model.guide.reward.end)

    def scores_of(self, model: GroupPolicy, answers: Sequence[Answer], name: str) -> Scores:
        """The share of answers with a reward above 0, the mean reward, the KL, and variety."""
        reward = model.guide.reward
        values = score_answers(reward, answers).double().numpy()
        scores = {f"{name}_{reward.name}": proportion(values > 0, "answers")}
        if self.data.reward != "parses":  # where the mean is the share
            scores[f"{name}_reward"] = ratio_of_sums(values, np.ones(len(values)), "answers")
        return scores | distance(model, model.guide.reference, answers, name)

    def score(self, model: GroupPolicy, data: PromptData) -> Scores:
        return self.scores_of(model, self.answers(model, data, VAL, SHOWN), VAL)

    def losses(self, model: GroupPolicy, data: PromptData) -> Scores:
        """The scores on all prompts of validation and test."""
        scores = {}
        for split in HELD_OUT:
            if data.prompts(split):
                scores |= self.scores_of(model, self.answers(model, data, split), split)
        return scores

    def show(self, model: GroupPolicy, data: PromptData, folder: Path, step: int) -> str:
        return write_answers(self.answers(model, data, VAL, 8), folder, step)
