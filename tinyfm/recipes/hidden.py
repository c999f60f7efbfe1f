"""What the recipes of encoders and of XLNet share: both predict tokens that are hidden from them.

The loss is the mean of -ln p over the hidden tokens, in nats. Runs with the same data options hide
the same tokens of validation and of test. Neither this loss nor its exponential, which is called
pseudo-perplexity, can be compared with a GPT's: the model reads the text on both sides of a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.splits import HELD_OUT, TEST, VAL
from tinyfm.adapt.heads import Batch, read_rows
from tinyfm.batches.masked import NOT_PREDICTED, ordinary_tokens
from tinyfm.evaluate.metrics import proportion, ratio_of_sums
from tinyfm.recipes.base import OpenRun, Run, Scores, write_texts_file
from tinyfm.tokenizer import Tokenizer

GUESSES = 5  # candidates that sample.py prints for a mask
SHOWN = 8  # rows of validation in a sample
MASK = re.compile(r"\[MASK\]|<mask>")
EXAMPLE = 'write [MASK] where a word is missing, as in --prompt "The [MASK] statement"'


# ---- what is found ------------------------------------------------------------------------------


class Found(NamedTuple):
    """A model's predictions of the n hidden tokens of a split."""

    nats: np.ndarray  # -ln p of each hidden token, float64 (n,)
    hits: np.ndarray  # whether it is the most likely one, bool (n,)
    places: np.ndarray  # where it stands among all tokens, int64 (n,)


@torch.no_grad()
def guess_hidden(model: nn.Module, batches: Iterable[Batch]) -> Found:
    """Predict the hidden tokens of all batches."""
    device = next(model.parameters()).device
    parts = []
    tokens = 0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        places, logits = model.predictions(batch)
        hidden = batch["targets"].flatten()[places]
        nats = F.cross_entropy(logits, hidden, reduction="none").double()
        own = (nats, logits.argmax(-1) == hidden, places + tokens)
        parts.append([tensor.cpu().numpy() for tensor in own])
        tokens += batch["targets"].numel()
    return Found(*(np.concatenate(column) for column in zip(*parts)))


# ---- features -----------------------------------------------------------------------------------


def state_of_text(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of the last layer's states over the real tokens of each text: (B, T) -> (B, D)."""
    real = batch["mask"]
    states = model.hidden(batch["tokens"], real).float()  # (B, T, D), 0 at padding
    return states.sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def features(model: nn.Module, rows: Sequence[Sequence[int]], at_once: int = 32) -> Tensor:
    """`state_of_text` of rows of token ids, float32 (n, D), on the CPU; see read_rows."""
    return read_rows(state_of_text, model, rows, at_once)


def halves_found(model: nn.Module, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Search: for the first half of each document, is its second half the nearest of all?

    Near is a high cosine of the features, less their mean over all documents. bool (n,).
    """
    first = features(model, [ids[: len(ids) // 2] for ids in documents])
    second = features(model, [ids[len(ids) // 2 :] for ids in documents])
    first = F.normalize(first - first.mean(0), dim=1)
    second = F.normalize(second - second.mean(0), dim=1)
    nearest = (first @ second.T).argmax(1)
    return (nearest == torch.arange(len(documents))).numpy()


# ---- texts with masks ---------------------------------------------------------------------------


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


def encode_prompt(tokenizer: Tokenizer, mask: int, prompt: str) -> tuple[list[int], list[int]]:
    """(ids of a text with masks, places of the masks); mask: the id that stands there.

    An end-of-text token comes first, which starts a text. The space before a mask belongs to the
    word that is missing. Raises ValueError without a mask.
    """
    parts = MASK.split(prompt)
    if len(parts) == 1:
        problem = f"the prompt {prompt!r} has no mask" if prompt else "there is no prompt"
        raise ValueError(f"{problem}: {EXAMPLE}")
    ids = [tokenizer.eot]
    places = []
    for part in parts[:-1]:
        ids += tokenizer.encode(part.rstrip())
        places.append(len(ids))
        ids.append(mask)
    return ids + tokenizer.encode(parts[-1]), places


# ---- the run type -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HiddenTokensRun(Run):
    """Pretrain on text with hidden tokens. A subclass adds `model` and `data`, and two methods."""

    SAMPLE_OPTIONS = frozenset({"prompt", "n"})

    def __post_init__(self):
        if self.adapt == "prompt":
            raise ValueError("--adapt prompt is for a model that writes: use lora, bias or head")

    def mask_id(self, tokenizer: Tokenizer) -> int:
        """The id that stands at a mask."""
        raise NotImplementedError

    def logits_at(self, model: nn.Module, tokens: Tensor, places: Tensor) -> Tensor:
        """Logits (n, V) of the tokens at n places of a row (1, T), as if all n were hidden."""
        raise NotImplementedError

    def candidates(self, tokenizer: Tokenizer) -> np.ndarray:
        """True for the ids that may fill a mask: bool (V,)."""
        found = ordinary_tokens(tokenizer, self.model.vocab_size)
        found[self.mask_id(tokenizer)] = False
        return found

    @torch.inference_mode()
    def fill(
        self, model: nn.Module, tokenizer: Tokenizer, prompt: str
    ) -> tuple[list[int], dict[int, Tensor]]:
        """(ids of the prompt, {place of each mask: probabilities of the tokens, (V,)}).

        Those of no candidate are 0. Each mask is filled as if the others stayed. Raises
        ValueError for a prompt without a mask, and for one that is too long.
        """
        ids, places = encode_prompt(tokenizer, self.mask_id(tokenizer), prompt)
        longest = self.model.context_length
        if len(ids) > longest:
            raise ValueError(
                f"the prompt has {len(ids)} tokens with its masks, and the model reads {longest}: "
                "shorten it"
            )
        device = next(model.parameters()).device
        tokens = torch.tensor([ids], device=device)
        logits = self.logits_at(model, tokens, torch.tensor(places, device=device)).float().cpu()
        logits[:, ~torch.from_numpy(self.candidates(tokenizer))] = -torch.inf
        return ids, dict(zip(places, logits.softmax(-1)))

    def score(self, model: nn.Module, data: Any, split: str = VAL) -> Scores:
        """Share of hidden tokens that are guessed."""
        found = guess_hidden(model, data.split_batches(split, self.train.batch_size))
        return {f"{split}_accuracy": float(found.hits.mean())}

    def scores_of_documents(self, model: nn.Module, data: Any, split: str, loss: str) -> Scores:
        """Nats per hidden token of a split, named `loss`, and the share that is guessed.

        The intervals are over documents.
        """
        rows = self.train.batch_size
        found = guess_hidden(model, data.split_batches(split, rows))
        documents = np.concatenate([part.ravel() for part in data.documents_of(split, rows)])
        own = documents[found.places]
        counts = np.bincount(own)
        there = counts > 0  # documents with a hidden token
        scores = {}
        for measure, values in ((loss, found.nats), (f"{split}_accuracy", found.hits)):
            sums = np.bincount(own, values)
            scores[measure] = ratio_of_sums(sums[there], counts[there], "documents")
        return scores

    def losses(self, model: nn.Module, data: Any) -> Scores:
        """The same for both held-out texts."""
        scores = {}
        for split in HELD_OUT:
            scores |= self.scores_of_documents(model, data, split, f"{split}_loss")
        return scores

    def measure(self, opened: OpenRun, model: nn.Module, data: Any, options: Any) -> Scores:
        """Search by features: the share of test documents whose halves find each other."""
        long = [ids for ids in data.split(TEST).documents() if len(ids) >= 16]
        if len(long) < 2:
            return {}
        name = f"second half found among {len(long):,}"
        return {name: proportion(halves_found(model, long), "documents")}

    def show(self, model: nn.Module, data: Any, folder: Path, step: int) -> str:
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
        ids, guesses = self.fill(opened.model, opened.tokenizer, options.prompt or "")
        count = min(options.n or GUESSES, int(self.candidates(opened.tokenizer).sum()))
        best = list(ids)
        for number, (place, found) in enumerate(guesses.items(), 1):
            best[place] = int(found.argmax())
            if len(guesses) > 1:
                print(f"mask {number}:")
            for token in found.argsort(descending=True)[:count].tolist():
                print(f"{found[token]:.4f}  {shown(opened.tokenizer, token)}")
        print(opened.tokenizer.decode(best[1:]).strip())
