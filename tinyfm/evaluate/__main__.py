"""What a run is worth:  python -m tinyfm.evaluate RUN [--json] [--picture out.png]

A GPT: nats per token and bits per byte of its validation text. CLIP: names found zero-shot among
all names of each held-out split, retrieval of captions and images, and classes found from image
features alone. Diffusion: how far its samples are from real pictures. Text-to-image: how many
pictures are what their prompt says. A classifier: what it gets right. Beside each figure stands
that of the same model before training, or of the base that it began from, and for features that of
the raw pixels: what is not above those was not learnt.

Or something else that one asks of it, without training:

    --text mine.txt                      a GPT: perplexity and bits per byte of any files
    --choices questions.jsonl            a GPT: which of several continuations it finds likelier:
                                         {"context": "2+2=", "choices": ["4", "5"], "answer": 0}
    --task reviews.csv [--shots 4]       a GPT: classes by likelihood, after labelled examples;
    --task scripts                       CLIP: classes by their names
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from tinyfm.batches.pairs import GLYPHS
from tinyfm.common import device as machine
from tinyfm.common.seeds import row_generators
from tinyfm.evaluate import generated, likelihood
from tinyfm.evaluate.generated import draw_held_out
from tinyfm.evaluate.metrics import Scores
from tinyfm.evaluate.zero_shot import by_features, clip_scores, draw_confusions, pixels
from tinyfm.recipes import base, registry, run_dir
from tinyfm.recipes import base as records
from tinyfm.recipes.base import Run
from tinyfm.recipes.classify import tell_classes


def validation(run: Run, model: nn.Module, data: Any, device: torch.device) -> Scores:
    """The loss of the validation split, as training measures it."""
    rows, sums = run.train.batch_size, torch.zeros(2)
    for i, batch in enumerate(data.val_batches(rows)):
        n = len(next(iter(batch.values())))
        generators = row_generators(run.train.seed, -1, range(i * rows, i * rows + n))
        loss, metrics = model.loss({k: v.to(device) for k, v in batch.items()}, generators)
        weight = float(metrics.get("weight", n))
        sums += torch.tensor((float(loss) * weight, weight))
    loss = float(sums[0] / sums[1])
    return {"val_loss": loss, **data.metrics(loss)}


# ---- CLIP ---------------------------------------------------------------------------------------


def can_draw(run: Run) -> bool:
    if run.family == "text2image":
        return run.data.path in GLYPHS
    return run.family == "clip" and run.model.loss != "simclr"


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]  # run directory, or one checkpoint in it
    json: bool = False  # print JSON
    text: str = ""  # a GPT: score this file, folder or "glob"
    choices: str = ""  # a GPT: answer the questions of this jsonl
    task: str = ""  # a GPT or CLIP: answer this task, as --data.path of train.py --task classify
    shots: int = 0  # ... a GPT, after so many labelled examples
    guidance: float = 3.0  # text-to-image: how closely to follow the prompts
    picture: str = ""  # a PNG; of CLIP, what it confuses; of text-to-image, unseen characters
    raw: bool = False  # the weights of the last step, even if averaged ones were kept
    device: str = "auto"  # cpu, cuda, mps, or auto
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # of the matrix products


@torch.inference_mode()
def evaluate(opened: records.OpenRun, options: Options) -> dict[str, dict[str, float]]:
    """{measure: {"untrained": ..., "reached": ...}}, and "pixels" for measures of features."""
    run, tokenizer, table = opened.run, opened.tokenizer, {}
    device = machine.choose_device(options.device)
    dtype = machine.choose_dtype(options.dtype, device)
    data = run.open_data()
    torch.manual_seed(run.train.seed)
    base = None
    if run.init_from:
        with contextlib.suppress(ValueError):  # it may be gone by now: this run needs it no more
            base = run_dir.open_same_base(run)
    first = run_dir.begin(run, base).eval()
    learnt = {name for name, p in opened.model.named_parameters() if p.requires_grad}
    given = {k: v for k, v in opened.model.state_dict().items() if k not in learnt}
    first.load_state_dict(given, strict=False)  # what was frozen was not trained by this run
    for column, model in (("before" if base else "untrained", first), ("reached", opened.model)):
        model.to(device)
        run.get_ready(model, data)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = validation(run, model, data, device)
            if run.family == "clip":
                more, found = clip_scores(run, model, tokenizer, data)
                scores |= more
            if "classes" in run.facts:
                scores |= run.score(model, data)
            if run.family == "text2image" and run.data.path in GLYPHS:
                scores |= generated.measure(model, data, run.data, options.guidance)
            if run.family == "ddpm" and run.data.path in GLYPHS:
                scores |= generated.measure_samples(model, data, run.data.cache)
        for name, value in scores.items():
            table.setdefault(name, {})[column] = value
    if run.family == "clip":
        raw = {name: pixels(split.images) for name, split in data.splits.items()}
        for name, value in by_features(data, raw, "features").items():
            table[name]["pixels"] = value
        if options.picture and found:
            draw_confusions(data, found, options.picture)
    if run.family == "text2image" and options.picture:
        draw_held_out(opened.model, data, run.data.color, options.guidance, options.picture)
    return table


def main() -> int | str:
    try:
        options = tyro.cli(Options, description=__doc__)
        opened = run_dir.open_run(options.run, options.raw)
        if options.picture and not can_draw(opened.run):
            needed = "a CLIP with texts, or text-to-image on letters"
            raise ValueError(f"--picture shows names that were confused, or drawn: use {needed}")
        asked = {name: getattr(options, name) for name in QUESTIONS}
        if any(asked.values()):
            opened.model.to(machine.choose_device(options.device))
            table = answer(opened, asked, options.shots)
        else:
            table = evaluate(opened, options)
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    if options.json:
        step = {"folder": str(opened.folder), "weights": opened.weights, **opened.meta}
        print(json.dumps({"run": step, "scores": table}, indent=2))
        return 0
    print(f"{opened.folder}: step {opened.meta['step']}, {opened.weights} weights")
    for name, row in table.items():
        numbers = "  ".join(f"{column} {value:.4g}" for column, value in row.items())
        print(f"{name:58} {numbers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())


# FOLDED: merge this into the module's docstring
# Prompting: what a trained model answers as it is, with no weight changed.
#
# A language model gives any text a likelihood (scoring.py). So it can be asked how well it foretells
# a text, which of several continuations is likelier, and, with some labelled examples in front, which
# label belongs to one more: few-shot learning in context (Brown et al. 2020). A CLIP compares an
# image with the names of classes. `python -m tinyfm.evaluate RUN --text | --choices | --task` prints
# what comes of it.


def score_text(opened: base.OpenRun, path: str, shots: int) -> Scores:
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


def answer_choices(opened: base.OpenRun, path: str, shots: int) -> Scores:
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


def answer_task(opened: base.OpenRun, path: str, shots: int) -> Scores:
    """`tell_classes` of the task that a path names."""
    run = registry.get_preset(opened.run.base_family, "classify").run
    saved = str(opened.folder) if opened.tokenizer else ""
    config = replace(run.data, path=path, tokenizer=saved, labels=0)
    data = replace(run, model=opened.run.model, data=config).open_data()
    lines = data.baselines()[next(iter(data.classes))]
    return {"by chance": lines["chance"], **tell_classes(opened, data, shots)}


QUESTIONS = {"text": score_text, "choices": answer_choices, "task": answer_task}


def answer(opened: base.OpenRun, asked: dict[str, str], shots: int) -> dict[str, Scores]:
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
