"""Prompting: what a trained model answers as it is, with no weight changed.

A language model gives any text a likelihood (scoring.py). So it can be asked how well it foretells
a text, which of several continuations is likelier, and, with some labelled examples in front, which
label belongs to one more: few-shot learning in context (Brown et al. 2020). A CLIP compares an
image with the names of classes. `python -m tinyfm.evaluate RUN --text | --choices | --task` prints
what comes of it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.labelled import SPLITS
from tinyfm import presets, records
from tinyfm.batches.labelled import TaskData
from tinyfm.common import files
from tinyfm.evaluate import likelihood, metrics, zero_shot

ASKED_TEXTS = 200  # held-out texts whose class a language model is asked
Scores = dict[str, float]


def score_text(opened: records.OpenRun, path: str, shots: int) -> Scores:
    """Of a file, a folder or a "glob", each text from its beginning."""
    found = likelihood.score_file(opened.model, opened.tokenizer, path)
    return {"perplexity": found.perplexity, "bits per byte": found.bits_per_byte}


def read_choices(path: str) -> list[dict]:
    """Questions of a jsonl. Raises ValueError with the line that is none."""
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            choices = question["choices"]
            texts = all(isinstance(text, str) for text in (question["context"], *choices))
            if not texts or not 0 <= question["answer"] < len(choices) or len(choices) < 2:
                raise ValueError("context and choices are texts, answer a place among two or more")
        except (ValueError, KeyError, TypeError) as error:
            form = '{"context": "2+2=", "choices": ["4", "5"], "answer": 0}'
            raise ValueError(f"{path}:{number} is no question as {form}: {error!r}") from error
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} has no question")
    return questions


def answer_choices(opened: records.OpenRun, path: str, shots: int) -> Scores:
    """Share of questions whose likeliest choice is the answer: in total, by token, by byte."""
    questions = read_choices(path)
    asked = [(question["context"], question["choices"]) for question in questions]
    found = likelihood.choose(opened.model, opened.tokenizer, asked)
    scores = {"by chance": sum(1 / len(choices) for _, choices in asked) / len(asked)}
    for rule in ("total", "token", "byte"):
        best = [max(range(len(c.scores)), key=lambda i: c.scores[i].by(rule)) for c in found]
        right = [place == question["answer"] for place, question in zip(best, questions)]
        scores[f"right, likelihood by {rule}"] = sum(right) / len(right)
    return scores


def tell_classes(opened: records.OpenRun, data: TaskData, shots: int = 0) -> Scores:
    """Accuracy and macro-F1 of a task's first question without training: a CLIP compares images
    with the names of classes, a GPT their likelihood, after `shots` labelled examples."""
    model, tokenizer, (train, held_out) = opened.model, opened.tokenizer, SPLITS
    names, truth = next(iter(data.classes.values())), data.labels[held_out][:, 0]
    if opened.run.base_family == "clip":
        templates = files.read_json(opened.folder / opened.run.TEMPLATES)
        x = zero_shot.embed_images(model, data.inputs[held_out])
        classes = zero_shot.class_vectors(model, tokenizer, names, templates)
        guesses = zero_shot.classify(x, classes, model.scale()).cpu().numpy()
    else:
        rows = np.random.default_rng(0).permutation(len(truth))[:ASKED_TEXTS]
        read = lambda split, i: tokenizer.decode(data.inputs[split][i].tolist())  # noqa: E731
        first = data.chosen[:shots]
        shown = [(read(train, i), names[data.labels[train][i, 0]]) for i in first]
        queries = [read(held_out, i) for i in rows]
        found = likelihood.classify(model, tokenizer, shown, queries, names, calibrate=True)
        guesses, truth = np.array([names.index(guess.label) for guess in found]), truth[rows]
    confusion = metrics.confusion_matrix(guesses, truth, len(names))
    return {"accuracy": float((guesses == truth).mean()), "macro_f1": metrics.macro_f1(confusion)}


def answer_task(opened: records.OpenRun, path: str, shots: int) -> Scores:
    """`tell_classes` of the task that a path names."""
    run = presets.get_preset(opened.run.base_family, "classify").run
    saved = str(opened.folder) if opened.tokenizer else ""
    config = replace(run.data, path=path, tokenizer=saved, labels=0)
    data = replace(run, model=opened.run.model, data=config).open_data()
    lines = data.baselines()[next(iter(data.classes))]
    return {"by chance": lines["chance"], **tell_classes(opened, data, shots)}


QUESTIONS = {"text": score_text, "choices": answer_choices, "task": answer_task}


def answer(opened: records.OpenRun, asked: dict[str, str], shots: int) -> dict[str, Scores]:
    """{measure: {"reached": ...}} of what is asked: {name of a question: a path, or ""}.

    Raises ValueError for what the family cannot be asked.
    """
    table, family = {}, opened.run.family
    if shots and (family == "clip" or not asked["task"]):
        raise ValueError("--shots shows a GPT labelled examples of a --task: it needs both")
    for name, path in asked.items():
        if not path:
            continue
        if family not in ("gpt", "chat") and (family, name) != ("clip", "task"):
            raise ValueError(f"--{name} is not for a run of family {family}")
        found = QUESTIONS[name](opened, path, shots)
        table |= {f"{name} {path}: {key}": {"reached": value} for key, value in found.items()}
    return table
