"""The recipe of encoders: pretraining on hidden words (BERT) or on replaced ones (ELECTRA),
classification of texts, and search.

What is measured of hidden words is in hidden.py. Those that stay as they are count too, and are
easy.

ELECTRA's validation loss is that of both its parts. So a score of each stands beside it. For the
generator, it is the share of hidden tokens that are guessed. For the discriminator, it is the share
of pairs, a replaced and a kept token, in which the replaced one has the higher logit (the area
under the ROC curve; 0.5 by chance). A better generator makes that harder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.splits import HELD_OUT, VAL
from tinyfm.adapt.distill import DistilConfig, distil, take_layers
from tinyfm.adapt.heads import Batch, Reader
from tinyfm.batches.masked import NOT_PREDICTED, MaskedConfig, MaskedData, mask_token
from tinyfm.common.config import RunPath
from tinyfm.common.seeds import row_generators
from tinyfm.encoder import Encoder, EncoderConfig, draw, uniform
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores
from tinyfm.recipes.classify import TextClassifyRun
from tinyfm.recipes.embed import EmbedRun
from tinyfm.recipes.hidden import HiddenTokensRun, state_of_text
from tinyfm.tokenizer import Tokenizer
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig

# ---- ELECTRA's discriminator --------------------------------------------------------------------


class Judged(NamedTuple):
    """What an ELECTRA says about all N tokens of a split, some of which were replaced."""

    replaced: np.ndarray  # whether each token was replaced, bool (N,)
    logits: np.ndarray  # the discriminator's logit that it was, float32 (N,)

    def detection(self) -> float:
        """The share of pairs, a replaced and a kept token, in which the replaced has more logit.

        Equal ones count half. By the ranks of the replaced tokens (Mann and Whitney 1947).
        """
        _, place, counts = np.unique(self.logits, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; the mean of equal ones
        n = int(self.replaced.sum())
        pairs = n * (len(ranks) - n)
        return float(ranks[self.replaced].sum() - n * (n + 1) / 2) / max(1, pairs)


@torch.no_grad()
def judge_tokens(model: Encoder, batches: Iterable[Batch]) -> Judged:
    """Let the generator replace tokens in all batches, by the draws of seed 0, and judge them."""
    device = next(model.parameters()).device
    parts = []
    rows = 0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        places, logits = model.predictions(batch)
        targets = batch["targets"].flatten()
        B, T = batch["tokens"].shape
        generators = row_generators(0, -1, range(rows, rows + B))
        u = uniform((B, T), generators).to(device).flatten()[places]
        original = torch.where(targets == NOT_PREDICTED, batch["tokens"].flatten(), targets)
        drawn = original.index_copy(0, places, draw(logits, u))
        judged = model.detect(drawn.view(B, T), batch.get("mask")).flatten().float()
        parts.append([tensor.cpu().numpy() for tensor in (drawn != original, judged)])
        rows += B
    return Judged(*(np.concatenate(column) for column in zip(*parts)))


# ---- pretraining --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncoderRun(HiddenTokensRun):
    """Pretrain an encoder on text with hidden words."""

    model: EncoderConfig = field(default_factory=EncoderConfig)
    data: MaskedConfig = field(default_factory=MaskedConfig)

    teacher: RunPath = ""  # distillation: also learn from the predictions of this run
    distil: DistilConfig = field(default_factory=DistilConfig)

    family: ClassVar[str] = "encoder"
    FACTS = (*Run.FACTS, "teacher", "distil")
    ABOUT = About(
        task="fill-mask",
        use="It guesses hidden words, and is a start for classifiers of texts.",
        limits="It writes no text. Its guesses follow its training text, also in what that says "
        "of people.",
    )

    def build_model(self) -> Encoder:
        return Encoder(self.model)

    def open_data(self) -> MaskedData:
        model, train = self.model, self.train
        return MaskedData.prepare(
            self.data, model.vocab_size, model.context_length, train.batch_size, train.seed
        )

    def learn_from(self, model: Encoder, data: MaskedData, teacher: OpenRun) -> None:
        """Make the teacher's predictions part of the model's training loss, as DistilBERT does."""
        both = (data.tokenizer, teacher.tokenizer)
        own = self.distil
        distil(model, teacher.model, own.temperature, own.share, both, own.cosine)
        if own.take_layers:
            take_layers(model, teacher.model)

    def mask_id(self, tokenizer: Tokenizer) -> int:
        return mask_token(tokenizer, self.model.vocab_size)

    def logits_at(self, model: Encoder, tokens: Tensor, places: Tensor) -> Tensor:
        return model(tokens)[0, places]

    def detection(self, model: Encoder, data: MaskedData, split: str) -> Scores:
        """electra: `Judged.detection` of a split."""
        judged = judge_tokens(model, data.split_batches(split, self.train.batch_size))
        return {f"{split}_detection": judged.detection()}

    def score(self, model: Encoder, data: MaskedData, split: str = VAL) -> Scores:
        """Share of hidden tokens that are guessed; electra: also the detection."""
        scores = super().score(model, data, split)
        if self.model.objective == "electra":
            return self.detection(model, data, split) | scores
        return scores

    def losses(self, model: Encoder, data: MaskedData) -> Scores:
        """Nats per hidden token of both held-out texts, and the share that is guessed.

        The intervals are over documents. With the electra objective these are the generator's;
        further the loss of both parts, over batches, and the detection.
        """
        if self.model.objective != "electra":
            return super().losses(model, data)
        scores = Run.losses(self, model, data)
        for split in HELD_OUT:
            scores |= self.detection(model, data, split)
            scores |= self.scores_of_documents(model, data, split, f"{split}_generator_loss")
        return scores


# ---- classification -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncoderClassifyRun(TextClassifyRun):
    """Classify texts."""

    model: EncoderConfig = field(default_factory=EncoderConfig)

    family: ClassVar[str] = "encoder-classify"
    trunk_run: ClassVar[type[Run]] = EncoderRun
    reader: ClassVar[Reader] = Reader(
        read=state_of_text,
        inputs=("tokens", "mask"),
        width=lambda config: config.d_model,
        unread=("head", "detector", "generator"),
    )


# ---- search -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncoderEmbedRun(EmbedRun):
    """Learn vectors of questions and passages."""

    model: EncoderConfig = field(default_factory=EncoderConfig)

    family: ClassVar[str] = "encoder-embed"
    trunk_run: ClassVar[type[Run]] = EncoderRun
    reader: ClassVar[Reader] = EncoderClassifyRun.reader
    states = staticmethod(Encoder.hidden)


RUNS = (EncoderRun, EncoderClassifyRun, EncoderEmbedRun)

# ---- presets ------------------------------------------------------------------------------------

PRESETS = {
    "encoder": Preset(
        "BERT in small: hidden words of documentation, five minutes on one core",
        EncoderRun(
            # The tokenizer of the `gpt` preset, and a row for the mask.
            model=EncoderConfig(
                vocab_size=4097, context_length=128, n_layer=2, n_head=4, d_model=256
            ),
            optim=OptimConfig(lr=0.012, muon_lr=0.02, warmup_steps=10, decay_fraction=0.6),
            train=TrainConfig(steps=600, batch_size=32, micro_batch_size=16, eval_every=200),
        ),
        usual="0.35, as one seed gave",
    ),
}
