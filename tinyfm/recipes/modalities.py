"""What a GPT's texts are worth where they are no prose: molecules, tunes, levels, episodes, series.

The model is the GPT of gpt.py, and the text has a MODALITY (data/modality.py), so nothing here
knows a modality by name. `write_modality` is for sample.py: it writes texts, says how many are
valid, unique and novel, and draws or plays them. `measure` counts the same for evaluate, over more
texts, at temperature 1: the model's own distribution. Beside it stand the real held-out texts, and
those of a Markov model (evaluate/markov.py) that has read the same tokens. Of episodes, it also
plays: what the model writes is done, until the goal is reached.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from data.modality import Modality
from data.report import counted
from data.splits import HELD_OUT, TEST, TRAIN, VAL
from tinyfm import generate
from tinyfm.batches.text import MODALITIES, TextData
from tinyfm.evaluate import metrics
from tinyfm.evaluate.markov import Markov, choose_order
from tinyfm.evaluate.metrics import Scores
from tinyfm.recipes import writing
from tinyfm.recipes.base import OpenRun, Run, free_name
from tinyfm.tokenizer import Tokenizer

FORECASTS = 40  # documents whose rest evaluate forecasts
GUESSES = 20  # texts for each forecast
MARKOV_SAMPLES = 200  # texts that a Markov model writes, at most: it is slow
AT_ONCE = 100  # texts that are written at a time
ACTION_TOKENS = 8  # tokens that a player writes for an action: its letters and a line end
SHOWN_FAULTS = 3


def modality_of(path: str) -> Modality | None:
    """The modality of a named source; None for all other texts."""
    if path in MODALITIES:
        return MODALITIES[path].MODALITY
    return None


def texts_of(data: TextData, split: str) -> Iterator[str]:
    """The documents of a split."""
    for ids in data.split(split).documents():
        yield data.tokenizer.decode(ids.tolist())


# ---- valid, unique, novel ------------------------------------------------------------------------


def shares(modality: Modality, texts: Sequence[str], training: Sequence[str]) -> Scores:
    """The shares of texts that are valid, unique and novel, and what describes them."""
    is_valid = np.array([not modality.fault(text) for text in texts])
    valid = [text for text, fine in zip(texts, is_valid) if fine]
    different = list({modality.key(text): text for text in valid}.values())
    scores = {"valid": metrics.proportion(is_valid, modality.unit), "unique": 0.0, "novel": 0.0}
    if valid:
        scores["unique"] = len(different) / len(valid)
        new = ~np.array(modality.known(different, training))
        scores["novel"] = metrics.proportion(new, f"different valid {modality.unit}")
    described = [found for found in map(modality.describe, texts) if found]
    for name in described[0] if described else ():
        parts, wholes = np.array([own[name] for own in described]).T
        scores[name] = metrics.ratio_of_sums(parts, wholes, modality.unit)
    return scores


def write(
    model: nn.Module,
    tokenizer: Tokenizer,
    starts: Sequence[str],
    longest: int,
    front: list[int],
    seed: int,
) -> list[str]:
    """Continue each start, "" for a new text, at temperature 1; return the whole texts.

    longest: tokens to write. front: ids of a soft prompt.
    """
    never = tokenizer.without_token(model.config.vocab_size)
    texts = []
    for first in range(0, len(starts), AT_ONCE):
        own = starts[first : first + AT_ONCE]
        prompts = [[*front, tokenizer.eot, *tokenizer.encode(start)] for start in own]
        sampling = generate.Sampling(
            longest, temperature=1.0, stop_tokens=(tokenizer.eot,), seed=seed + first
        )
        rows = generate.complete(model, prompts, sampling, never=never)
        texts += [start + tokenizer.decode(row) for start, row in zip(own, rows)]
    return texts


# ---- forecasts -----------------------------------------------------------------------------------


def to_forecast(data: TextData) -> list[str]:
    """FORECASTS test documents, evenly spread."""
    texts = list(texts_of(data, TEST))
    rows = np.linspace(0, len(texts) - 1, min(FORECASTS, len(texts))).astype(int)
    return [texts[i] for i in rows]


def forecast_scores(
    modality: Modality, documents: Sequence[str], guesses: Sequence[list[str]]
) -> Scores:
    """The mean errors of the guesses at the rest of each document."""
    found = [modality.errors(text, own) for text, own in zip(documents, guesses)]
    return {
        name: metrics.ratio_of_sums([own[name] for own in found], np.ones(len(found)), "documents")
        for name in found[0]
    }


# ---- episodes ------------------------------------------------------------------------------------


def play(modality: Modality, model: nn.Module, tokenizer: Tokenizer, front: list[int]) -> Scores:
    """The shares of the games' episodes in which the likeliest actions reach the goal."""
    never = tokenizer.without_token(model.config.vocab_size)
    sampling = generate.Sampling(ACTION_TOKENS, temperature=0.0, stop_tokens=(tokenizer.eot,))

    def answer(texts: Sequence[str]) -> list[str]:
        prompts = [[*front, tokenizer.eot, *tokenizer.encode(text)] for text in texts]
        found = []
        for first in range(0, len(prompts), AT_ONCE):
            own = prompts[first : first + AT_ONCE]
            found += generate.complete(model, own, sampling, never=never)
        return [tokenizer.decode(row) for row in found]

    return {name: success(game(answer)) for name, game in modality.games.items()}


def success(reached: Sequence[bool]) -> metrics.Measured:
    """The share of episodes that reached their goal."""
    return metrics.proportion(np.array(reached), "episodes")


# ---- sample.py -----------------------------------------------------------------------------------


def report(
    modality: Modality, prompt: str, texts: Sequence[str], open_data: Any, out: Path
) -> None:
    """Print how many texts are valid, unique and novel, and what they answer; draw the valid ones.

    prompt: as the user wrote it. open_data(): the run's data, for what training has. out: name of
    the files that are drawn.
    """
    faults = [modality.fault(text) for text in texts]
    valid = [text for text, fault in zip(texts, faults) if not fault]
    try:
        training = list(texts_of(open_data(), TRAIN))
    except (ValueError, OSError) as error:
        print(f"without the data, copies are not known: {error}", file=sys.stderr)
        training = []
    found = shares(modality, texts, training)
    line = f"{counted(len(texts), modality.unit)}: {len(valid)} valid"
    if valid:
        line += f", of which {found['unique']:.0%} are unique"
    if valid and training:
        line += f", of which {float(found['novel']):.0%} are not in training"
    print(line, file=sys.stderr)
    for reason, count in Counter(filter(None, faults)).most_common(SHOWN_FAULTS):
        print(f"{counted(count, modality.unit)} not valid: {reason}", file=sys.stderr)
    said = modality.answer(prompt, valid) if prompt and valid else ""
    if said:
        print(said)
    if valid and modality.endings:
        modality.draw(valid, out)
        print(", ".join(str(out.with_suffix(ending)) for ending in modality.endings))


def write_modality(run: Run, modality: Modality, opened: OpenRun, options: Any) -> None:
    """Print n texts that are no prose, how many are valid, and the files in which they are drawn.

    They are as long as the modality allows, unless --max-new-tokens is given.
    """
    prompt = options.prompt or ""
    start = modality.read_prompt(prompt) if prompt else ""
    sampling = options.sampling
    if sampling.max_new_tokens == generate.Sampling().max_new_tokens:
        sampling = replace(sampling, max_new_tokens=max(1, modality.longest - len(start)))
    out = Path(options.out or free_name("sample", *modality.endings))
    files = [out.with_suffix(ending) for ending in modality.endings]
    text_file = options.out
    if out in files:  # the text stands beside what is drawn
        text_file = str(out.with_suffix(".txt"))
        files.append(out.with_suffix(".txt"))
    there = [file for file in files if file.exists()]
    if there and not options.overwrite:
        raise ValueError(f"{there[0]} exists: choose another --out, or add --overwrite")
    options = replace(options, sampling=sampling, prompt=start, out=text_file)
    texts = writing.write_texts(opened, options, from_start=True, shown=modality.readable)
    report(modality, prompt, texts, run.open_data, out)


# ---- evaluate ------------------------------------------------------------------------------------


def measure(
    modality: Modality, model: nn.Module, data: TextData, n: int, front: list[int], seed: int
) -> Scores:
    """The shares of n texts of the model, the errors of its forecasts, and what it plays."""
    texts = write(model, data.tokenizer, [""] * n, modality.longest, front, seed)
    scores = shares(modality, texts, list(texts_of(data, TRAIN)))
    if modality.given:
        documents = to_forecast(data)
        starts = [text[: modality.given] for text in documents for _ in range(GUESSES)]
        rest = modality.longest - modality.given
        found = write(model, data.tokenizer, starts, rest, front, seed)
        guesses = [found[i : i + GUESSES] for i in range(0, len(found), GUESSES)]
        scores |= forecast_scores(modality, documents, guesses)
    return scores | play(modality, model, data.tokenizer, front)


def baselines(modality: Modality, data: TextData) -> dict[str, Scores]:
    """The shares of the real test texts; and those of a Markov model, with its losses."""
    training = list(texts_of(data, TRAIN))
    test = [piece for text in texts_of(data, TEST) for piece in modality.pieces(text)]
    real = shares(modality, test, training)
    markov = Markov(data.split(TRAIN).tokens, modality.markov_order)
    order = choose_order(markov, data.split(VAL).tokens)
    eot = data.tokenizer.eot
    n = min(MARKOV_SAMPLES, modality.samples)
    rows = markov.write(n, eot, eot, modality.longest, order)
    scores = shares(modality, [data.tokenizer.decode(row) for row in rows], training)
    for name in HELD_OUT:
        split = data.split(name)
        loss = float(markov.nats(split.tokens)[order].mean())
        scores[f"{name}_loss"] = loss
        scores[f"{name}_bpb"] = split.bits_per_byte(loss)
    columns = {"real": real, f"Markov, order {order}": scores}
    if modality.given:
        documents = to_forecast(data)
        for name, guess in modality.rivals.items():
            guesses = [guess(text[: modality.given], training) for text in documents]
            columns[name] = forecast_scores(modality, documents, guesses)
    for name, player in modality.players.items():
        columns[name] = {game: success(reached) for game, reached in player().items()}
    return columns
