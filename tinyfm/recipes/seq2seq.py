"""The recipe of encoder-decoders: from spelling to sound, translation, hidden spans of a text, and
your own pairs; and classification of texts by what the encoder reads.

The loss is per token of the target, END included. What counts is what the model writes: a word is
wrong unless all its phones are those of one of its pronunciations. That is the share of words wrong
(word error rate) of papers on pronunciation. The share of phones wrong divides the phones that have
to be changed (edit distance to the nearest pronunciation) by those of that pronunciation.

The model writes greedily, the likeliest token each time, unless it is told to search with beams.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.splits import HELD_OUT, TEST, VAL
from tinyfm.adapt.heads import Batch, Reader, read_rows
from tinyfm.batches.spans import SpanData, find_sentinels, longest_shape
from tinyfm.batches.text_pairs import (
    NOT_PREDICTED,
    SPANS,
    TRANSLATION,
    WORDS,
    TextPairConfig,
    TextPairData,
    fill_up,
    unread,
)
from tinyfm.beam import Beams
from tinyfm.evaluate import metrics
from tinyfm.generate import Sampling
from tinyfm.recipes.base import (
    BEAM_OPTIONS,
    About,
    OpenRun,
    Preset,
    Run,
    Scores,
    beams_of,
    write_texts_file,
)
from tinyfm.recipes.classify import TextClassifyRun
from tinyfm.recipes.hidden import MASK
from tinyfm.seq2seq import Seq2Seq, Seq2SeqConfig
from tinyfm.tokenizer import Tokenizer
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig

Data = TextPairData | SpanData

SCORED = 1000  # pairs of validation that are guessed at each evaluation
SHOWN = 8  # pairs in a sample
AT_ONCE = 256  # sources that are read together
DRAW_OPTIONS = frozenset(vars(Sampling())) - {"max_new_tokens", "stop_tokens"}  # of sample.py
UNITS = {WORDS: "words", TRANSLATION: "strings"}  # of others: pairs
EXAMPLES = {
    WORDS: "give a word, as in --prompt foundation",
    TRANSLATION: 'give a text to translate, as in --prompt "Open file"',
    SPANS: 'write [MASK] where words are missing, as in --prompt "The [MASK] statement"',
}


# ---- what a model says --------------------------------------------------------------------------


@torch.inference_mode()
def write(
    model: Seq2Seq,
    sources: Sequence[Sequence[int]],
    never: Sequence[int] = (),
    how: Sampling | Beams | None = None,
) -> list[list[int]]:
    """What the model writes for each source: token ids, without END.

    Sources end with END. never: ids that are not written. how: a draw or a search; by default the
    likeliest token each time. Sources of like length are read together.
    """
    model.eval()
    device = next(model.parameters()).device
    if how is None:
        how = Sampling(temperature=0, max_new_tokens=model.config.context_length)
    answer = model.search if isinstance(how, Beams) else model.generate
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found: list[list[int]] = [[] for _ in sources]
    for first in range(0, len(order), AT_ONCE):
        numbers = order[first : first + AT_ONCE]
        source, mask = fill_up([sources[i] for i in numbers], model.config.pad_id)
        texts = answer(
            torch.from_numpy(source).to(device),
            torch.from_numpy(mask).to(device),
            how,
            never=never,
        )
        for i, ids in zip(numbers, texts):
            found[i] = ids
    return found


@torch.no_grad()
def target_nats(model: Seq2Seq, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """(nats, tokens) of the target of each row of the batches, float64 and int64 (n,)."""
    device = next(model.parameters()).device
    nats = []
    tokens = []
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        targets = batch["targets"]
        logits = model(batch["source"], batch["inputs"], batch["mask"]).float()  # (B, T, V)
        own = F.cross_entropy(
            logits.mT, targets, ignore_index=NOT_PREDICTED, reduction="none"
        )  # (B, T)
        nats.append(own.double().sum(1).cpu().numpy())
        tokens.append((targets != NOT_PREDICTED).sum(1).cpu().numpy())
    return np.concatenate(nats), np.concatenate(tokens)


def phones_wrong(guess: str, pronunciations: Sequence[str]) -> tuple[int, int]:
    """(edits, phones) of the pronunciation that is nearest to the guess."""
    said = guess.split()
    found = []
    for pronunciation in pronunciations:
        phones = pronunciation.split()
        found.append((metrics.edit_distance(said, phones), len(phones)))
    return min(found, key=lambda each: each[0])


def guess_scores(path: str, guesses: Sequence[str], answers: Sequence[Sequence[str]]) -> Scores:
    """The measures of guesses, each with its right answers, of which any will do."""
    unit = UNITS.get(path, "pairs")
    right = np.array([guess in own for guess, own in zip(guesses, answers)])
    if path == WORDS:
        counts = np.array([phones_wrong(*each) for each in zip(guesses, answers)])
        return {
            "words_wrong": metrics.proportion(~right, unit),
            "phones_wrong": metrics.ratio_of_sums(counts[:, 0], counts[:, 1], unit),
        }
    return {
        "exact": metrics.proportion(right, unit),
        "chrf": metrics.measured_chrf(guesses, answers, unit),
    }


# ---- features -----------------------------------------------------------------------------------


def state_of_source(model: Seq2Seq, batch: Batch) -> Tensor:
    """Mean of the encoder's states over the real tokens of each text: (B, T) -> (B, D)."""
    real = batch["mask"]
    states = model.encode(batch["tokens"], real).float()  # (B, T, D), 0 at padding
    return states.sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def features(model: Seq2Seq, rows: Sequence[Sequence[int]], at_once: int = 32) -> Tensor:
    """`state_of_source` of rows of token ids, float32 (n, D), on the CPU; see read_rows."""
    return read_rows(state_of_source, model, rows, at_once)


# ---- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seq2SeqRun(Run):
    """Train an encoder-decoder on pairs of a source and a target."""

    model: Seq2SeqConfig = field(default_factory=Seq2SeqConfig)
    data: TextPairConfig = field(default_factory=TextPairConfig)

    family: ClassVar[str] = "seq2seq"
    SAMPLE_OPTIONS = DRAW_OPTIONS | BEAM_OPTIONS | {"prompt", "n", "out"}
    ABOUT = About(
        task="text2text-generation",
        use="It writes the target for a source of the kind that its pairs have.",
        limits="For other sources it writes something too, and does not say that it is a guess.",
    )

    def __post_init__(self):
        if self.adapt == "prompt":
            raise ValueError("--adapt prompt is for a GPT: use lora, bias or full")

    def build_model(self) -> Seq2Seq:
        return Seq2Seq(self.model)

    def open_data(self) -> Data:
        kind = SpanData if self.data.path == SPANS else TextPairData
        return kind.prepare(self.data, self.model, self.train.batch_size, self.train.seed)

    def guess(
        self, model: Seq2Seq, data: TextPairData, split: str, most: int, how: Beams | None = None
    ) -> tuple[list[str], list[Sequence[str]], list[str]]:
        """(guesses, right answers, sources) of at most `most` pairs of a split, evenly spread."""
        own = data.splits[split]
        rows = np.linspace(0, len(own.pairs) - 1, min(most, len(own.pairs))).astype(int)
        found = write(model, [own.sources[i] for i in rows], self.never(data.tokenizer), how)
        pairs = [own.pairs[i] for i in rows]
        guesses = [data.tokenizer.decode(ids) for ids in found]
        return guesses, [pair.targets for pair in pairs], [pair.source for pair in pairs]

    def score(self, model: Seq2Seq, data: Data, split: str = VAL) -> Scores:
        """The measures of SCORED pairs of validation."""
        if isinstance(data, SpanData):
            return {}
        guesses, answers, _ = self.guess(model, data, split, SCORED)
        scores = guess_scores(self.data.path, guesses, answers)
        return {f"{split}_{name}": float(value) for name, value in scores.items()}

    def losses(self, model: Seq2Seq, data: Data) -> Scores:
        """Nats per token of the targets of validation and test, the first target of each pair."""
        unit = "rows" if isinstance(data, SpanData) else UNITS.get(self.data.path, "pairs")
        scores = {}
        for split in HELD_OUT:
            counts = target_nats(model, data.split_batches(split, AT_ONCE))
            scores[f"{split}_loss"] = metrics.ratio_of_sums(*counts, unit)
        return scores

    def measure(self, opened: OpenRun, model: Seq2Seq, data: Data, options: Any) -> Scores:
        """The measures of all test pairs; the untrained model does not search with --beams."""
        if isinstance(data, SpanData):
            return {}
        how = None
        if options.beams != 1 and model is opened.model:
            how = Beams(options.beams, max_new_tokens=self.model.context_length)
        guesses, answers, _ = self.guess(model, data, TEST, len(data.splits[TEST].pairs), how)
        scores = guess_scores(self.data.path, guesses, answers)
        return {f"test_{name}": value for name, value in scores.items()}

    def show(self, model: Seq2Seq, data: Data, folder: Path, step: int) -> str:
        """Write some validation pairs with what the model says; return the first ones."""
        if isinstance(data, SpanData):
            sources = list(next(data.val_batches(SHOWN))["source"].numpy())
            never = self.never(data.tokenizer)
            lines = [
                with_spans(data.tokenizer, data.sentinels, source, written)
                for source, written in zip(sources, write(model, sources, never))
            ]
            write_texts_file(folder, step, lines)
            return f"--- step {step} fills the gaps:\n{lines[0].strip()[:300]}"
        lines = []
        for guess, answers, source in zip(*self.guess(model, data, VAL, SHOWN)):
            line = f"{source}: {guess.strip()}"
            if guess not in answers:
                line += f", not {answers[0].strip()}"
            lines.append(line)
        write_texts_file(folder, step, lines)
        return f"--- step {step} writes: " + "; ".join(lines[:3])[:300]

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Print what the model writes for --prompt: the likeliest token each time.

        With --beams the text that a search finds; with -n or settings of the draw, drawn ones.
        """
        model = opened.model
        never = self.never(opened.tokenizer)
        sources = encode_prompt(self, opened.tokenizer, options.prompt or "")
        limit = self.model.context_length
        beams = beams_of(options)
        if beams:
            beams = replace(beams, max_new_tokens=limit)
            found = [[ids] for ids in write(model, sources, never, beams)]
        elif options.n is None and options.sampling == Sampling():
            found = [[ids] for ids in write(model, sources, never)]
        else:
            n = options.n or 1
            draw = replace(options.sampling, max_new_tokens=limit)
            found = [write(model, [source] * n, never, draw) for source in sources]
        lines = []
        for source, texts in zip(sources, found):
            lines += [self.shown(opened.tokenizer, source, ids) for ids in texts]
        print("\n".join(lines))
        if options.out:
            Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def shown(self, tokenizer: Tokenizer, source: Sequence[int], ids: Sequence[int]) -> str:
        """What was written, as text; spans stand where they were hidden."""
        if self.data.path == SPANS:
            return with_spans(tokenizer, self.sentinels(tokenizer), source, ids)
        return tokenizer.decode(ids).strip()

    def never(self, tokenizer: Tokenizer) -> list[int]:
        """The ids that are never written: rows of the model without a token, special tokens."""
        found = {*tokenizer.without_token(self.model.vocab_size), *tokenizer.specials.values()}
        if self.data.path == SPANS:
            found -= set(self.sentinels(tokenizer).tolist())
        return sorted(found - {self.model.end_id})

    def sentinels(self, tokenizer: Tokenizer) -> np.ndarray:
        """The ids of the sentinels of a run on spans."""
        spans = longest_shape(self.data, self.model.context_length).spans
        return find_sentinels(tokenizer, self.model.vocab_size, spans + 1)


# ---- prompts ------------------------------------------------------------------------------------


def encode_prompt(run: Seq2SeqRun, tokenizer: Tokenizer, prompt: str) -> list[list[int]]:
    """The sources in a prompt, with END: its words for a run on words, otherwise its lines.

    Raises ValueError if there is none, or one that the model cannot read.
    """
    path = run.data.path
    texts = prompt.lower().split() if path == WORDS else prompt.splitlines()
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError(
            f"there is no prompt: {EXAMPLES.get(path, 'give a source, --prompt TEXT')}"
        )
    longest = run.model.context_length
    rows = []
    for text in texts:
        unknown = unread(tokenizer, text)
        if unknown:
            raise ValueError(
                f"{text!r} has {unknown[0]!r}, which the model has never seen: write it with the "
                "letters of the training data"
            )
        ids = encode_gaps(run, tokenizer, text) if path == SPANS else tokenizer.encode(text)
        ids = [*ids, tokenizer.eot]
        if len(ids) > longest:
            raise ValueError(
                f"{text[:40]!r} has {len(ids)} tokens with the one that ends it, and the model "
                f"reads {longest}: shorten it"
            )
        rows.append(ids)
    return rows


def encode_gaps(run: Seq2SeqRun, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text with masks, each of which becomes a sentinel.

    The space before a mask belongs to what is missing. Raises ValueError without a mask, or for
    more than there are sentinels.
    """
    parts = MASK.split(text)
    sentinels = run.sentinels(tokenizer)[:-1].tolist()  # the last one only closes targets
    if len(parts) == 1:
        raise ValueError(f"{text[:40]!r} has no mask: {EXAMPLES[SPANS]}")
    if len(parts) - 1 > len(sentinels):
        raise ValueError(
            f"{text[:40]!r} has {len(parts) - 1} masks, and the model fills at most "
            f"{len(sentinels)}: use fewer"
        )
    ids = []
    for part, sentinel in zip(parts[:-1], sentinels):
        ids += [*tokenizer.encode(part.rstrip()), sentinel]
    return ids + tokenizer.encode(parts[-1])


def with_spans(
    tokenizer: Tokenizer, sentinels: np.ndarray, source: Sequence[int], written: Sequence[int]
) -> str:
    """The text of a source; in place of each sentinel, in brackets, what is written after it."""
    known = set(sentinels.tolist())
    spans: dict[int, list[int]] = {}
    own: list[int] = []  # what comes before the first sentinel is dropped
    for token in written:
        if token in known:
            own = spans.setdefault(token, [])
        elif token < tokenizer.vocab_size:
            own.append(token)
    text = ""
    for is_gap, group in groupby(source[:-1], key=lambda token: token in known):
        if not is_gap:
            text += tokenizer.decode(group)
            continue
        for sentinel in group:
            span = tokenizer.decode(spans.get(sentinel, []))
            space = " " if span.startswith(" ") else ""
            text += f"{space}[{span.strip()}]"
    return text


# ---- classification -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seq2SeqClassifyRun(TextClassifyRun):
    """Classify texts by what the encoder reads."""

    model: Seq2SeqConfig = field(default_factory=Seq2SeqConfig)

    family: ClassVar[str] = "seq2seq-classify"
    trunk_run: ClassVar[type[Run]] = Seq2SeqRun
    reader: ClassVar[Reader] = Reader(
        read=state_of_source,
        inputs=("tokens", "mask"),
        width=lambda config: config.d_model,
        unread=("decoder", "head"),
    )


RUNS = (Seq2SeqRun, Seq2SeqClassifyRun)

# ---- presets ------------------------------------------------------------------------------------

PRESETS = {
    "seq2seq": Preset(
        "spelling to sound: how 125,000 English words are said, ten minutes on two cores",
        Seq2SeqRun(
            # 27 letters, 39 phones, START and END. T5's cross-attention knows no positions, and
            # learns much later which letter comes next. So the positions are sinusoids.
            model=Seq2SeqConfig(
                vocab_size=68,
                context_length=32,
                n_layer=3,
                n_head=4,
                d_model=128,
                position="sinusoid",
                attention_scale=0,
            ),
            optim=OptimConfig(lr=0.01, muon_lr=0.02, warmup_steps=20, decay_fraction=0.7),
            train=TrainConfig(steps=4000, batch_size=128, eval_every=1000),
        ),
        usual="0.32 to 0.33, as three seeds gave",
    ),
}
