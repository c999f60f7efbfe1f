"""Distillation: a student learns from the predictions of a teacher, not only from the next token.

A text shows which token came next. A trained teacher also says how likely each of the V tokens was,
so a position carries far more information. Hinton et al. 2015 soften both distributions with a
temperature tau, so that small probabilities count, and add the usual loss (section 2 there):

    loss = (1 - share) CE + share tau^2 KL(p || q),  KL(p || q) = sum_v p_v (ln p_v - ln q_v),
    p = softmax(teacher's logits / tau),   q = softmax(student's logits / tau)

The gradient of the KL with respect to a logit is (q - p) / tau, and q - p itself shrinks as
1 / tau. The factor tau^2 makes up for both, so a share means the same at any tau. The mean is over
the positions that count in the student's own loss.

DistilBERT (Sanh et al. 2019) is an encoder that learns in this way from one with twice as many
layers, and has two ideas more. The student starts from every second layer of the teacher
(`take_layers`). And its last states s are to point where the teacher's t do:

    loss = ... + cosine (1 - s . t / (|s| |t|))

It sums the three losses with the weights 5 (teacher), 2 (text) and 1 (cosine): a share of 5/7 and
a cosine of 1/7. It compares the states of all tokens; here it is those that are predicted.

`distil` changes the student's `loss` in training mode only. Validation and checkpoints stay the
same, and the teacher's parameters are not among the student's.

Letters: B batch, T tokens, D width, V vocabulary.
Left out: matching attention maps (TinyBERT), training on texts that the teacher writes (Kim and
Rush 2016), students that classify.
"""

from __future__ import annotations

import re
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
    cosine: float = 0.0  # weight of the cosine distance between the last states of the two
    take_layers: bool = False  # start from the teacher's weights, its layers evenly spaced

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")
        if not self.cosine >= 0:
            raise ValueError(f"cosine is {self.cosine}; it must be at least 0")


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


def target_states(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(last states (..., D), targets (...) that are predicted from them by model.head).

    A GPT predicts the next token of each, an encoder the masked ones.
    """
    if hasattr(model, "target_states"):
        places, states = model.target_states(batch)
        return states, batch["targets"].flatten()[places]
    inputs, targets = next_tokens(batch)
    return model.hidden(inputs), targets


def cosine_distance(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Mean of 1 - cos of the angle between states (..., D), over the targets that count."""
    counts = targets != -100
    distance = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return distance.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)


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


BLOCK = re.compile(r"\bblocks\.(\d+)\.")


def count_blocks(model: nn.Module) -> int:
    return 1 + max(int(match[1]) for name in model.state_dict() for match in BLOCK.finditer(name))


@torch.no_grad()
def take_layers(student: nn.Module, teacher: nn.Module) -> list[int]:
    """Copy the teacher's weights into a student with fewer layers; return their numbers.

    They are evenly spaced from the first to the last: of 12, a student with 6 takes 0, 2, 4, 7, 9
    and 11, as DistilBERT does. Raises ValueError, and changes nothing, if the two differ in more
    than the number of layers. What only the teacher has, such as segments, is left out.
    """
    n, m = count_blocks(student), count_blocks(teacher)
    if n > m:
        raise ValueError(
            f"layers cannot be taken: the student has {n} of them, and the teacher {m}; use "
            f"--model.n-layer {m} or less"
        )
    taken = [round(i * (m - 1) / max(1, n - 1)) for i in range(n)]
    theirs = teacher.state_dict()
    values = {}
    for name, own in student.state_dict().items():
        source = BLOCK.sub(lambda match: f"blocks.{taken[int(match[1])]}.", name)
        found = theirs.get(source)
        if found is None or found.shape != own.shape:
            shape = None if found is None else tuple(found.shape)
            raise ValueError(
                f"layers cannot be taken: {name} is {tuple(own.shape)}, the teacher's {source} is "
                f"{shape}; give the student the teacher's sizes"
            )
        values[name] = found
    student.load_state_dict(values)
    return taken


def check_kinds(student: nn.Module, teacher: nn.Module, cosine: float) -> None:
    """Raise ValueError unless the two predict the same, and have states of the same width."""
    kinds = [type(model).__name__ for model in (student, teacher)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the student is {kinds[0]} and the teacher {kinds[1]}: use one kind")
    for who, model in (("student", student), ("teacher", teacher)):
        objective = getattr(model.config, "objective", "mlm")
        if objective != "mlm":
            raise ValueError(
                f"the {who}'s objective is {objective}: a discriminator predicts no tokens, so use "
                "a model trained with --model.objective mlm"
            )
    widths = [model.config.d_model for model in (student, teacher)]
    if cosine and widths[0] != widths[1]:
        raise ValueError(
            f"states of {widths[0]} and {widths[1]} numbers have no angle: use --model.d-model "
            f"{widths[1]}, or --distil.cosine 0"
        )


def distil(
    student: nn.Module,
    teacher: nn.Module,
    temperature: float = 2.0,
    share: float = 0.5,
    tokenizers: tuple[Tokenizer, Tokenizer] | None = None,
    cosine: float = 0.0,
) -> None:
    """Replace student.loss, in training mode, with the distillation loss.

    Both models are GPTs, or both are encoders that predict masked tokens. The teacher is frozen,
    put into evaluation mode, and moved to the student's device. share: 0 is the plain loss, 1 uses
    the teacher's predictions alone. tokenizers: (student's, teacher's), to compare. cosine: weight
    of the distance between the last states. Raises ValueError if the two models or tokenizers do
    not fit each other, or for a setting out of range.
    """
    DistilConfig(temperature, share, cosine)  # raises for settings out of range
    check_kinds(student, teacher, cosine)
    check_sizes(student, teacher)
    if tokenizers:
        check_tokenizers(*tokenizers)
    teacher.requires_grad_(False).eval()
    plain = student.loss.__func__

    def loss(self, batch: dict[str, Tensor], generator=None) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training:
            return plain(self, batch, generator)
        # The trainer moves the student after this function was built; the teacher follows.
        device = batch["tokens"].device
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        with torch.no_grad():
            teacher_states, _ = target_states(teacher, batch)
            teacher_logits = teacher.head(teacher_states)
        states, targets = target_states(self, batch)
        logits = self.head(states)
        total, metrics = distillation_loss(logits, teacher_logits, targets, temperature, share)
        if cosine:
            total = total + cosine * cosine_distance(states, teacher_states, targets)
        return total, metrics

    student.loss_name = "loss_with_teacher"
    student.loss = MethodType(loss, student)  # bound, so a copy of the student uses its own weights
