"""The recipe of encoders: pretraining on hidden words (BERT) or on replaced ones (ELECTRA), and
classification of texts.

The loss of hidden words is the mean of -ln p over the tokens that are hidden, in nats; the same
tokens of validation and of test are hidden for every run. Those that stay as they are count too,
and are easy. So the loss, and what one calls pseudo-perplexity, is no perplexity of a text and
cannot be compared with a GPT's: the model reads the text on both sides of the token.

ELECTRA's validation loss is that of both its parts. So a score of each stands beside it. For the
generator, it is the share of hidden tokens that are guessed. For the discriminator, it is the share
of pairs, a replaced and a kept token, in which the replaced one has the higher logit (the area
under the ROC curve; 0.5 by chance). A better generator makes that harder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.splits import HELD_OUT, TEST, VAL
from tinyfm.adapt.distill import DistilConfig, distil, take_layers
from tinyfm.adapt.heads import Batch, Reader, read_rows
from tinyfm.batches.masked import NOT_PREDICTED, MaskedConfig, MaskedData, Vocabulary
from tinyfm.common.config import RunPath
from tinyfm.common.seeds import row_generators
from tinyfm.encoder import Encoder, EncoderConfig, draw, uniform
from tinyfm.evaluate.metrics import proportion, ratio_of_sums
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores, write_texts_file
from tinyfm.recipes.classify import TextClassifyRun
from tinyfm.tokenizer import Tokenizer
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig

GUESSES = 5  # candidates that sample.py prints for a mask
SHOWN = 8  # rows of validation in a sample
MASK = re.compile(r"\[MASK\]|<mask>")
EXAMPLE = 'write [MASK] where a word is missing, as in --prompt "The [MASK] statement"'


# ---- what is found ------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a model says about the hidden tokens of a split, n of them, and about all N tokens."""

    nats: np.ndarray  # -ln p of each hidden token, float64 (n,)
    hits: np.ndarray  # whether it is the most likely one, bool (n,)
    places: np.ndarray  # where it stands among all tokens, int64 (n,)
    replaced: np.ndarray  # electra: whether each token was replaced, bool (N,); otherwise empty
    judged: np.ndarray  # electra: the discriminator's logit that it was, float32 (N,)

    def detection(self) -> float:
        """The share of pairs, a replaced and a kept token, in which the replaced has more logit.

        Equal ones count half. By the ranks of the replaced tokens (Mann and Whitney 1947).
        """
        _, place, counts = np.unique(self.judged, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; the mean of equal ones
        n = int(self.replaced.sum())
        pairs = n * (len(ranks) - n)
        return float(ranks[self.replaced].sum() - n * (n + 1) / 2) / max(1, pairs)


@torch.no_grad()
def guess_hidden(model: Encoder, batches: Iterable[Batch]) -> Found:
    """Predict the hidden tokens of all batches; with the electra objective, also judge them all.

    The generator's draws are those of seed 0.
    """
    device = next(model.parameters()).device
    parts = []
    rows = 0
    tokens = 0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        places, logits = model.predictions(batch)
        targets = batch["targets"].flatten()
        hidden = targets[places]
        nats = F.cross_entropy(logits, hidden, reduction="none").double()
        replaced = torch.zeros(0, dtype=torch.bool)
        judged = torch.zeros(0)
        if model.config.objective == "electra":
            B, T = batch["tokens"].shape
            generators = row_generators(0, -1, range(rows, rows + B))
            u = uniform((B, T), generators).to(device).flatten()[places]
            original = torch.where(targets == NOT_PREDICTED, batch["tokens"].flatten(), targets)
            drawn = original.index_copy(0, places, draw(logits, u))
            replaced = drawn != original
            judged = model.detect(drawn.view(B, T), batch.get("mask")).flatten().float()
            rows += B
        own = (nats, logits.argmax(-1) == hidden, places + tokens, replaced, judged)
        parts.append([tensor.cpu().numpy() for tensor in own])
        tokens += targets.numel()
    return Found(*(np.concatenate(column) for column in zip(*parts)))


# ---- features -----------------------------------------------------------------------------------


def state_of_text(encoder: Encoder, batch: Batch) -> Tensor:
    """Mean of the last layer's states over the real tokens of each text: (B, T) -> (B, D)."""
    real = batch["mask"]
    states = encoder.hidden(batch["tokens"], real).float()  # (B, T, D), 0 at padding
    return states.sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def features(encoder: Encoder, rows: Sequence[Sequence[int]], at_once: int = 32) -> Tensor:
    """`state_of_text` of rows of token ids, float32 (n, D), on the CPU; see read_rows."""
    return read_rows(state_of_text, encoder, rows, at_once)


def halves_found(encoder: Encoder, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Search: for the first half of each document, is its second half the nearest of all?

    Near is a high cosine of the features, less their mean over all documents. bool (n,).
    """
    first = features(encoder, [ids[: len(ids) // 2] for ids in documents])
    second = features(encoder, [ids[len(ids) // 2 :] for ids in documents])
    first = F.normalize(first - first.mean(0), dim=1)
    second = F.normalize(second - second.mean(0), dim=1)
    nearest = (first @ second.T).argmax(1)
    return (nearest == torch.arange(len(documents))).numpy()


# ---- pretraining --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncoderRun(Run):
    """Pretrain an encoder on text with hidden words."""

    model: EncoderConfig = field(default_factory=EncoderConfig)
    data: MaskedConfig = field(default_factory=MaskedConfig)

    teacher: RunPath = ""  # distillation: also learn from the predictions of this run
    distil: DistilConfig = field(default_factory=DistilConfig)

    family: ClassVar[str] = "encoder"
    FACTS = (*Run.FACTS, "teacher", "distil")
    SAMPLE_OPTIONS = frozenset({"prompt"})
    ABOUT = About(
        task="fill-mask",
        use="It guesses hidden words, and is a start for classifiers of texts.",
        limits="It writes no text. Its guesses follow its training text, also in what that says "
        "of people.",
    )

    def __post_init__(self):
        if self.adapt == "prompt":
            raise ValueError("--adapt prompt is for a model that writes: use lora, bias or head")

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

    def score(self, model: Encoder, data: MaskedData, split: str = VAL) -> Scores:
        """Share of hidden tokens that are guessed; electra: also `Found.detection`."""
        found = guess_hidden(model, data.split_batches(split, self.train.batch_size))
        scores = {}
        if len(found.replaced):
            scores[f"{split}_detection"] = found.detection()
        return scores | {f"{split}_accuracy": float(found.hits.mean())}

    def losses(self, model: Encoder, data: MaskedData) -> Scores:
        """Nats per hidden token of both held-out texts, and the share that is guessed.

        The intervals are over documents. With the electra objective these are the generator's;
        further the loss of both parts, over batches, and the detection.
        """
        scores = {}
        if self.model.objective == "electra":
            scores = super().losses(model, data)
        for split in HELD_OUT:
            rows = self.train.batch_size
            found = guess_hidden(model, data.split_batches(split, rows))
            documents = np.concatenate([part.ravel() for part in data.documents_of(split, rows)])
            own = documents[found.places]
            counts = np.bincount(own)
            there = counts > 0  # documents with a hidden token
            name = f"{split}_loss"
            if len(found.replaced):
                name = f"{split}_generator_loss"
                scores[f"{split}_detection"] = found.detection()
            for measure, values in ((name, found.nats), (f"{split}_accuracy", found.hits)):
                sums = np.bincount(own, values)
                scores[measure] = ratio_of_sums(sums[there], counts[there], "documents")
        return scores

    def measure(self, opened: OpenRun, model: Encoder, data: MaskedData, options: Any) -> Scores:
        """Search by features: the share of test documents whose halves find each other."""
        split = data.split(TEST)
        ends = [*split.starts[1:], len(split) - 1]
        documents = [split.tokens[start + 1 : end] for start, end in zip(split.starts, ends)]
        long = [ids for ids in documents if len(ids) >= 16]
        if len(long) < 2:
            return {}
        name = f"second half found among {len(long):,}"
        return {name: proportion(halves_found(model, long), "documents")}

    def show(self, model: Encoder, data: MaskedData, folder: Path, step: int) -> str:
        """Write validation text with the guesses in brackets; return the start of it."""
        batch = next(data.val_batches(SHOWN))
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        places, logits = model.predictions(batch)
        guesses = torch.full_like(batch["targets"].flatten(), NOT_PREDICTED)
        guesses[places] = logits.argmax(-1)
        guesses = guesses.view_as(batch["targets"])
        rows = zip(batch["tokens"].tolist(), batch["targets"].tolist(), guesses.tolist())
        texts = [with_guesses(data.tokenizer, *row) for row in rows]
        write_texts_file(folder, step, texts)
        return f"--- step {step} guesses what is hidden:\n{texts[0].strip()[:300]}"

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Print the likeliest tokens for each mask in --prompt, and the sentence with the first."""
        vocabulary = Vocabulary(opened.tokenizer, self.model.vocab_size)
        ids = encode_prompt(opened.tokenizer, vocabulary, options.prompt or "")
        guesses = fill(opened.model, vocabulary, ids)
        count = min(options.n or GUESSES, len(vocabulary.drawn))
        best = list(ids)
        for number, (place, found) in enumerate(guesses.items(), 1):
            best[place] = int(found.argmax())
            if len(guesses) > 1:
                print(f"mask {number}:")
            for token in found.argsort(descending=True)[:count].tolist():
                print(f"{found[token]:.4f}  {shown(opened.tokenizer, token)}")
        print(opened.tokenizer.decode(best[1:]).strip())


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token's text without the spaces around it; one of spaces alone stands in quotes."""
    text = tokenizer.decode([token])
    return text.strip() or repr(text)


def with_guesses(
    tokenizer: Tokenizer, inputs: list[int], targets: list[int], guesses: list[int]
) -> str:
    """The text of a row. What was hidden stands in brackets: [right], or [guess, not hidden]."""
    text = ""
    triples = zip(inputs, targets, guesses)
    for hidden, group in groupby(triples, key=lambda triple: triple[1] != NOT_PREDICTED):
        if not hidden:
            text += tokenizer.decode([token for token, _, _ in group])
            continue
        for _, target, guess in group:
            own = "?"
            if guess < tokenizer.vocab_size:  # not the mask
                own = shown(tokenizer, guess)
            if guess != target:
                own += f", not {shown(tokenizer, target)}"
            if tokenizer.decode([target]).startswith(" "):
                text += " "
            text += f"[{own}]"
    return text


# ---- filling masks ------------------------------------------------------------------------------


def encode_prompt(tokenizer: Tokenizer, vocabulary: Vocabulary, prompt: str) -> list[int]:
    """The ids of a text with masks, after an end-of-text token, which starts a text.

    The space before a mask belongs to the word that is missing. Raises ValueError without a mask.
    """
    parts = MASK.split(prompt)
    if len(parts) == 1:
        problem = f"the prompt {prompt!r} has no mask" if prompt else "there is no prompt"
        raise ValueError(f"{problem}: {EXAMPLE}")
    ids = [tokenizer.eot]
    for part in parts[:-1]:
        ids += [*tokenizer.encode(part.rstrip()), vocabulary.mask]
    return ids + tokenizer.encode(parts[-1])


@torch.inference_mode()
def fill(model: Encoder, vocabulary: Vocabulary, ids: list[int]) -> dict[int, Tensor]:
    """{place of each mask: probabilities of the tokens, (V,)}; those of no ordinary token are 0.

    Each mask is filled as if the others stayed. Raises ValueError for a text that is too long.
    """
    longest = model.config.context_length
    if len(ids) > longest:
        raise ValueError(
            f"the prompt has {len(ids)} tokens with its masks, and the model reads {longest}: "
            "shorten it"
        )
    device = next(model.parameters()).device
    logits = model(torch.tensor([ids], device=device))[0].float().cpu()  # (T, V)
    logits[:, ~torch.from_numpy(vocabulary.ordinary)] = -torch.inf
    p = logits.softmax(-1)
    return {place: p[place] for place, token in enumerate(ids) if token == vocabulary.mask}


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


RUNS = (EncoderRun, EncoderClassifyRun)

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
