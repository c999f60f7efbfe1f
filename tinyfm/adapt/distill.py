"""Distillation: a student learns from the predictions of a teacher, not only from the next token.

A text shows which token came next. A trained teacher also says how likely each of the V tokens was,
so a position carries far more information. Hinton et al. 2015 soften both distributions with a
temperature tau, so that small probabilities count, and add the usual loss (section 2 there):

    loss = (1 - share) CE + share tau^2 KL(p || q),  KL(p || q) = sum_v p_v (ln p_v - ln q_v),
    p = softmax(teacher's logits / tau),   q = softmax(student's logits / tau)

The gradient of the KL with respect to a logit is (q - p) / tau, and q - p itself shrinks as
1 / tau. The factor tau^2 makes up for both, so a share means the same at any tau. The mean is over
the positions that count in the student's own loss.

`distil` changes the student's `loss` in training mode only. Validation and checkpoints stay the
same, and the teacher's parameters are not among the student's.

Letters: B batch, T tokens, V vocabulary.
Left out: matching hidden states or attention maps (DistilBERT), training on texts that the teacher
writes (Kim and Rush 2016), students that classify.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.tokenizer import Tokenizer


@dataclass(frozen=True)
class DistilConfig:
    temperature: float = 2.0  # temperature that softens both distributions; above 0
    share: float = 0.5  # weight of the teacher's predictions in the loss; 1 - share: of the text

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")


# ---- the loss -----------------------------------------------------------------------------------


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(teacher || student) at each position, in nats: logits (..., V) -> (...)."""
    log_q = (student.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, share: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {"weight": number of targets that count}) of logits (..., V) and targets (...).

    Targets of -100 do not count.
    """
    counts = targets != -100
    ce = F.cross_entropy(student.float().flatten(0, -2), targets.flatten(), reduction="sum")
    kl = divergence(student, teacher, temperature).masked_fill(~counts, 0).sum()
    weight = counts.sum()
    return ((1 - share) * ce + share * kl) / weight.clamp(min=1), {"weight": weight}


def next_tokens(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of a batch of tokens, as in GPT.loss; -100 does not count."""
    tokens = batch["tokens"]
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    if "mask" in batch:
        targets = targets.masked_fill(~batch["mask"], -100)
    return inputs, targets


# ---- teacher and student ------------------------------------------------------------------------


def check_tokenizers(student: Tokenizer, teacher: Tokenizer) -> None:
    """Raise ValueError unless every id stands for the same bytes in both."""
    advice = "train the student with --data.tokenizer set to the teacher's folder"
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"the teacher's tokenizer has {teacher.vocab_size} tokens, the student's "
            f"{student.vocab_size}: {advice}"
        )
    ids = range(student.vocab_size)
    different = [i for i in ids if student.token_bytes(i) != teacher.token_bytes(i)]
    if different or student.specials != teacher.specials:
        raise ValueError(
            f"the teacher's tokenizer is another one, {len(different):,} tokens differ: {advice}"
        )


def check_sizes(student: Any, teacher: Any) -> None:
    """Raise ValueError unless the teacher can read the student's rows and predicts its tokens."""
    if prompt_ids(student):
        raise ValueError(
            "the student has a soft prompt, which the teacher cannot read: use another --adapt, or "
            "no teacher"
        )
    vocabulary = teacher.config.vocab_size
    if vocabulary != student.config.vocab_size:
        raise ValueError(
            f"the teacher's vocab_size is {vocabulary}, the student's "
            f"{student.config.vocab_size}; use --model.vocab-size {vocabulary}"
        )
    context = teacher.config.context_length
    if context < student.config.context_length:
        raise ValueError(
            f"the teacher's context_length is {context}, the student's "
            f"{student.config.context_length}; use --model.context-length {context}"
        )


def distil(
    student: nn.Module,
    teacher: nn.Module,
    temperature: float = 2.0,
    share: float = 0.5,
    tokenizers: tuple[Tokenizer, Tokenizer] | None = None,
) -> None:
    """Replace student.loss, in training mode, with the distillation loss; both models are GPTs.

    The teacher is frozen, put into evaluation mode, and moved to the student's device. share: 0 is
    the plain loss, 1 uses the teacher's predictions alone. tokenizers: (student's, teacher's), to
    compare. Raises ValueError if the two models or tokenizers do not fit each other, or for a
    setting out of range.
    """
    DistilConfig(temperature, share)  # raises for settings out of range
    check_sizes(student, teacher)
    if tokenizers:
        check_tokenizers(*tokenizers)
    teacher.requires_grad_(False).eval()
    plain = student.loss.__func__

    def loss(self, batch: dict[str, Tensor], generator=None) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training:
            return plain(self, batch, generator)
        inputs, targets = next_tokens(batch)
        # The trainer moves the student after this function was built; the teacher follows.
        if teacher.head.weight.device != inputs.device:
            teacher.to(inputs.device)
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        return distillation_loss(self(inputs), teacher_logits, targets, temperature, share)

    student.loss_name = "loss_with_teacher"
    student.loss = MethodType(loss, student)  # bound, so a copy of the student uses its own weights
