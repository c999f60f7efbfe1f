"""Distillation: a student learns what a teacher thinks of every token, not only which one came.

A text says that one token came next; a trained teacher says how likely each of V would have been,
which is far more to learn from a position. Hinton et al. 2015 soften both with a temperature tau,
so that small probabilities count, and add the usual loss (section 2 there):

    loss = (1 - share) CE + share tau^2 KL(p || q),  KL(p || q) = sum_v p_v (ln p_v - ln q_v),
    p = softmax(teacher's logits / tau),   q = softmax(student's logits / tau)

The KL's gradient in a logit is (q - p) / tau, and q - p itself shrinks as 1 / tau: with tau^2 the
shares mean the same at any tau. The mean is over the positions that the student's own loss counts.

`distil` changes what the student's `loss` is in training mode; validation, checkpoints and
parameters know nothing of the teacher. Letters: B batch, T tokens, V vocabulary. Left out: hidden
states and attention maps (DistilBERT), texts that the teacher writes (Kim and Rush 2016),
classifiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.tokenizer import Tokenizer


@dataclass(frozen=True)
class DistilConfig:
    temperature: float = 2.0  # softens what the teacher says; above 0
    share: float = 0.5  # of the teacher's word in the loss: 0 = none, 1 = nothing else counts

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(teacher || student) of each position, in nats: logits (..., V) -> (...)."""
    log_q = (student.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, share: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {"weight"}) of logits (..., V) and targets (...); those of -100 do not count."""
    counts = targets != -100
    ce = F.cross_entropy(student.float().flatten(0, -2), targets.flatten(), reduction="sum")
    kl = divergence(student, teacher, temperature).masked_fill(~counts, 0).sum()
    weight = counts.sum()
    return ((1 - share) * ce + share * kl) / weight.clamp(min=1), {"weight": weight}


def next_tokens(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of rows of tokens, as GPT.loss counts them."""
    tokens = batch["tokens"]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if "mask" in batch:
        targets = targets.masked_fill(~batch["mask"], -100)
    return inputs, targets


def check_tokenizers(student: Tokenizer, teacher: Tokenizer) -> None:
    """Raise ValueError unless an id is the same bytes to both."""
    if student.vocab_size != teacher.vocab_size:
        sizes = f"{teacher.vocab_size} tokens, the student's {student.vocab_size}"
        raise ValueError(f"the teacher's tokenizer has {sizes}: both must read with the same one")
    ids = range(student.vocab_size)
    different = [i for i in ids if student.token_bytes(i) != teacher.token_bytes(i)]
    if different or student.specials != teacher.specials:
        raise ValueError(
            f"the teacher's tokenizer is another one, {len(different):,} tokens differ: train the "
            "student with --data.tokenizer set to the teacher's folder"
        )


def check_sizes(student, teacher) -> None:
    """Raise ValueError unless the teacher can judge what the student reads and writes."""
    if prompt_ids(student):
        raise ValueError(
            "a soft prompt is no text to the teacher: use another --adapt, or no teacher"
        )
    for name, fits in (("vocab_size", int.__eq__), ("context_length", int.__ge__)):
        have, need = getattr(teacher.config, name), getattr(student.config, name)
        if not fits(have, need):
            flag = f"--model.{name.replace('_', '-')} {have}"
            raise ValueError(f"the teacher's {name} is {have}, the student's {need}; use {flag}")


def distil(student: nn.Module, teacher: nn.Module, temperature: float = 2.0, share: float = 0.5,
           tokenizers: tuple[Tokenizer, Tokenizer] | None = None) -> None:  # fmt: skip
    """Make student.loss, in training mode, also follow the teacher; both are GPTs.

    The teacher is frozen, in evaluation mode, and moves to the student's device; it is no part of
    the student. share 0 is the plain loss, 1 the teacher's word alone. tokenizers: the student's,
    the teacher's. Raises ValueError if the two do not fit, or for a setting out of range.
    """
    DistilConfig(temperature, share)  # or refuse
    check_sizes(student, teacher)
    if tokenizers:
        check_tokenizers(*tokenizers)
    teacher.requires_grad_(False).eval()
    plain = student.loss.__func__

    def loss(self, batch: dict[str, Tensor], generator=None) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's own loss in evaluation mode, else the sum above."""
        if not self.training:
            return plain(self, batch, generator)
        inputs, targets = next_tokens(batch)
        if teacher.head.weight.device != inputs.device:  # the student has moved since
            teacher.to(inputs.device)
        with torch.no_grad():
            judged = teacher(inputs)
        return distillation_loss(self(inputs), judged, targets, temperature, share)

    student.loss = MethodType(loss, student)  # bound, so that a copy of the student is its own
