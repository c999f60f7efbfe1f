"""Measure a trained run:  python -m tinyfm.evaluate RUN [--json] [--picture out.png]

A GPT: nats per token and bits per byte of its validation and test texts; on molecules and other
texts that are no prose also the shares of texts it writes that are valid, unique and novel, beside
those of real texts and of a Markov model. An encoder: nats per hidden token, which compare with no
GPT's, and the share that it guesses. XLNet: the same, and bits per byte from left to right, which
compare with a GPT's. An encoder-decoder: nats per token of its targets, and what it writes: the
share of words and phones that are wrong, or exact matches and chrF. CLIP: zero-shot classification
among all names of each held-out split, retrieval of captions and images, and classification from
image features alone. Diffusion: the distance of its samples from real pictures. Text-to-image: the
share of pictures that show what their prompt says. A VQ-VAE: the share of test letters that can be
read once it has rebuilt them. A codec: how near rebuilt test sounds are, beside mu-law. MusicGen:
nats a frame of codes, beside a Markov model. A GPT that sees: the shares of captions and of answers
that are exactly right; of actions also the share of test worlds in which it reaches the goal. A
classifier: accuracy and calibration. Next to each figure stands that of the same model before
training, or of the run it started from, and for features that of the raw pixels: only the
difference was learned. Losses and accuracies have an interval of 95% in parentheses, over the
documents or examples that stand behind it (metrics.py).

Other questions, which need no training:

    --text mine.txt                      a GPT: perplexity and bits per byte of any files
    --choices questions.jsonl            a GPT: the more probable of several continuations:
                                         {"context": "2+2=", "choices": ["4", "5"], "answer": 0}
    --task reviews.csv [--shots 4]       a GPT: classes by likelihood, after labelled examples
    --task scripts                       CLIP: classes by their names

With --quantize, a further column has the scores of the same model in int8 or int4.

What was measured on the run's own data is also kept in its folder, as evaluation.json, for the
model card of its export.

`python -m tinyfm.evaluate overlap RUN` says how much of the held-out text training has too.
`python -m tinyfm.evaluate suites RUN ...` examines GPTs with published questions.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

from data import pictures, tables
from data.report import Report
from tinyfm import quantize
from tinyfm.common import device as devices
from tinyfm.common import files
from tinyfm.common.config import (
    DataPath,
    FilePath,
    GivenRun,
    MaybeFloat,
    Name,
    PicturePath,
    Quantize,
)
from tinyfm.common.console import run_command
from tinyfm.common.options import parse
from tinyfm.evaluate import likelihood, metrics, overlap
from tinyfm.evaluate.metrics import Measured, Scores
from tinyfm.recipes import history, registry, run_dir, suites
from tinyfm.recipes.base import OpenRun
from tinyfm.recipes.classify import score_untrained


@dataclass(frozen=True)
class Options:
    run: GivenRun  # folder of a run, or of one of its checkpoints
    json: bool = False  # print JSON
    text: DataPath = ""  # GPT: score this file, folder or "glob"
    choices: FilePath = ""  # GPT: answer the questions of this jsonl file
    # GPT or CLIP: do this task, named as --data.path of train.py --task classify
    task: DataPath = ""
    shots: int = 0  # GPT: labelled examples of --task in the prompt, as many as fit
    seed: int = 0  # GPT: draws the examples of --shots, and texts
    # read the run's data from here, and not from where training read them
    data_path: DataPath = ""
    beams: int = 1  # seq2seq: texts that are kept at each step of a search; 1 = no search
    # text-to-image: how closely to follow the prompts (default: that of sample.py)
    guidance: MaybeFloat = None
    # ddpm, vq, text2image or dalle on letters: training steps of the judge of drawings, 0 = as many
    # as usual; with few it is trained quickly and reads badly
    judge_steps: int = 0
    # ddpm, vq, text2image or dalle on letters: pictures to draw, or to rebuild, for each question;
    # GPT on molecules and the like: texts to write; 0 = as many as usual
    samples: int = 0
    # picture to draw; CLIP or classifier: what it confuses; text-to-image: unseen characters
    picture: PicturePath = ""
    raw: bool = False  # use the weights of the last step, even if averaged ones were kept
    device: Name = "auto"  # device to compute on: cpu, cuda, mps, or auto
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # number format of matrix products
    quantize: Quantize = "none"  # format of the matrices: measure the model in it, too


def quantized_form(opened: OpenRun, options: Options, data: Any = None) -> dict[str, nn.Module]:
    """{"int8": a copy of the run's model in int8}, or as --quantize says; {} without the option.

    data: those of the run, if they are open already.
    """
    if options.quantize == "none":
        return {}
    model = copy.deepcopy(opened.model)
    run_dir.quantize_run(opened, model, options.quantize, data)
    return {options.quantize: model}


# ---- measures of the run's own data -------------------------------------------------------------

SIZE = "megabytes of weights"  # the row that --quantize adds


def rebuild_start(opened: OpenRun) -> tuple[str, nn.Module]:
    """("before" or "untrained", the model as its training started)."""
    run = opened.run
    torch.manual_seed(run.train.seed)
    base = None
    if run.init_from:
        with contextlib.suppress(ValueError):  # the base may be gone: this run needs it no more
            base = run_dir.open_same_base(run)
    start = run_dir.build_start(run, base).eval()
    # What was frozen was not trained by this run: it is the same before and after. A tied weight is
    # trained under all of its names.
    parameters = opened.model.named_parameters(remove_duplicate=False)
    trained = {name for name, p in parameters if p.requires_grad}
    frozen = {k: v for k, v in opened.model.state_dict().items() if k not in trained}
    start.load_state_dict(frozen, strict=False)
    return "before" if base else "untrained", start


@torch.inference_mode()
def evaluate(opened: OpenRun, options: Options) -> dict[str, Scores]:
    """{measure: {"untrained" or "before": ..., "reached": ..., and baselines}}.

    With --quantize, the quantised model has a column too, and the bytes of the weights a row.
    """
    run = opened.run
    device = devices.choose_device(options.device)
    dtype = devices.choose_dtype(options.dtype, device)
    if options.data_path:
        run = replace(run, data=replace(run.data, path=options.data_path))
    # The run's config, which may be a stranger's, names what is read and where it is kept.
    cache = getattr(run.data, "cache", "memory")
    print(f"data: {run.data.path}, prepared in {cache}", file=sys.stderr)
    data = run.open_data()
    if not run_dir.is_data_of(opened, data):
        print(
            f"warning: {opened.folder} was trained on other data than {run.data.path} gives today: "
            "the files changed, or an earlier version split them. Training may have read what is "
            "now held out",
            file=sys.stderr,
        )
    before, start = rebuild_start(opened)
    smaller = quantized_form(opened, options, data)
    table = {}
    for column, model in {before: start, "reached": opened.model, **smaller}.items():
        model.to(device)
        run.use_others(model, data, lambda: run_dir.open_same_base(run), run_dir.open_run)
        run.get_ready(model, data)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = run.losses(model, data) | run.measure(opened, model, data, options)
        for name, value in scores.items():
            table.setdefault(name, {})[column] = value
    if smaller:
        forms = {"reached": opened.model, **smaller}
        table[SIZE] = {column: quantize.count_bytes(model) / 1e6 for column, model in forms.items()}
    for column, scores in run.baselines(data).items():
        for name, value in scores.items():
            table.setdefault(name, {})[column] = value
    return table


# ---- other questions ----------------------------------------------------------------------------


def score_text(opened: OpenRun, path: str, options: Options) -> Scores:
    """Likelihood of a file, a folder or a "glob", each text from its start."""
    scores = likelihood.score_files(opened.model, opened.tokenizer, path)
    nats = np.array([-score.log_likelihood for score in scores])
    tokens = [score.tokens for score in scores]
    size = [score.bytes for score in scores]
    return {
        "perplexity": metrics.ratio_of_sums(nats, tokens, "documents").through(math.exp),
        "bits per byte": metrics.ratio_of_sums(nats / math.log(2), size, "documents"),
    }


QUESTION = '{"context": "2+2=", "choices": ["4", "5"], "answer": 0}'


def check_question(question: dict) -> None:
    """Raise ValueError, KeyError or TypeError for a row that is no question."""
    choices = question["choices"]
    texts = (question["context"], *choices)
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("context and choices must be texts")
    answer = question["answer"]
    if len(choices) < 2 or type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError("answer must be a place among two or more choices")


def read_choices(path: str) -> list[dict]:
    """Questions of a jsonl, or of another table. Raises ValueError with the row that is none."""
    questions = []
    report = Report()
    for place, question in tables.records(Path(path), report):
        try:
            check_question(question)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place} is no question as {QUESTION}: {error!r}") from error
        questions.append(question)
    if report.skipped:
        raise ValueError(f"{path}: {report}; a question is {QUESTION}")
    if not questions:
        raise ValueError(f"{path} has no question; a question is {QUESTION}")
    if report.notes:
        print("; ".join(report.notes), file=sys.stderr)
    return questions


def answer_choices(opened: OpenRun, path: str, options: Options) -> Scores:
    """Share of questions whose most probable choice is the answer: in total, by token, by byte."""
    questions = read_choices(path)
    asked = [(question["context"], question["choices"]) for question in questions]
    found = likelihood.choose(opened.model, opened.tokenizer, asked)
    scores = {"by chance": sum(1 / len(choices) for _, choices in asked) / len(asked)}
    for rule in ("total", "token", "byte"):
        right = []
        for choice, question in zip(found, questions):
            values = [score.by(rule) for score in choice.scores]
            right.append(values.index(max(values)) == question["answer"])
        scores[f"right, likelihood by {rule}"] = metrics.proportion(right, "questions")
    return scores


def answer_task(opened: OpenRun, path: str, options: Options) -> Scores:
    """Accuracy on a classification task, without training on it."""
    run = registry.get_preset(opened.run.base_family, "classify").run
    tokenizer = str(opened.folder) if opened.tokenizer else ""
    config = replace(run.data, path=path, tokenizer=tokenizer, labels=0)
    train = replace(run.train, seed=options.seed)
    data = replace(run, model=opened.run.model, data=config, train=train).open_data()
    lines = data.baselines()[next(iter(data.classes))]
    return {"by chance": lines["chance"], **score_untrained(opened, data, options.shots)}


QUESTIONS = {"text": score_text, "choices": answer_choices, "task": answer_task}


def answer(opened: OpenRun, options: Options) -> dict[str, Scores]:
    """{measure: {"reached": ...}} of the questions in the options; {} if there are none.

    With --quantize, the quantised model has a column too. Raises ValueError for a question that the
    family cannot answer.
    """
    asked = {name: getattr(options, name) for name in QUESTIONS if getattr(options, name)}
    if options.shots and ("few-shot" not in opened.run.UNTRAINED or "task" not in asked):
        raise ValueError("--shots shows a GPT labelled examples of a --task: it needs both")
    for name in asked:
        if name not in opened.run.QUESTIONS:
            raise ValueError(f"--{name} is not for a run of family {opened.run.family}")
    if not asked:
        return {}
    device = devices.choose_device(options.device)
    table = {}
    for column, model in {"reached": opened.model, **quantized_form(opened, options)}.items():
        own = replace(opened, model=model.to(device))
        for name, path in asked.items():
            for measure, value in QUESTIONS[name](own, path, options).items():
                table.setdefault(f"{name} {path}: {measure}", {})[column] = value
    return table


# ---- held-out text that training has ------------------------------------------------------------


@dataclass(frozen=True)
class OverlapOptions:
    """How much of the held-out text training has too, in runs of 13 words; or how many held-out
    pictures are near to a training picture of the same name."""

    # run directory, or a checkpoint in it; or docs, passages, stdlib, chats, packages, films, your
    # own text, glyphs, letters, or a folder of pictures
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN|PATH")]]
    json: bool = False  # print JSON


def show_overlap(words: list[str]) -> int:
    """Carry out `overlap` with its options."""
    about = inspect.cleandoc(OverlapOptions.__doc__)
    options = parse(OverlapOptions, about, "python -m tinyfm.evaluate overlap", words)
    path = options.data
    if not (Path(path) / "config.json").exists():
        data = overlap.open_named(path)
        trained_on = {path: data}
    else:
        trained_on = history.open_training_data(path)
        data = trained_on[path]
    if overlap.has_images(data):
        counts, line = overlap.measure_images(data)
        print(json.dumps(counts) if options.json else line)
        return 0
    shares = overlap.measure(data, trained_on)
    if options.json:
        print(json.dumps([asdict(own) for own in shares], indent=2))
    else:
        print(overlap.describe(shares))
    return 0


# ---- the command --------------------------------------------------------------------------------


def intervals(table: dict[str, Scores]) -> dict[str, dict[str, dict]]:
    """{measure: {column: its interval}} of the values that have one; null is no number."""
    found = {}
    for name, row in table.items():
        for column, value in row.items():
            if isinstance(value, Measured):
                ends = [None if math.isnan(end) else end for end in (value.low, value.high)]
                interval = {"low": ends[0], "high": ends[1], "n": value.n, "of": value.about}
                found.setdefault(name, {})[column] = interval
    return found


# Options that change what is measured; the record has those that were given.
RECORDED = ("data_path", "guidance", "judge_steps", "samples", "dtype")


def to_record(opened: OpenRun, table: dict[str, Scores]) -> dict[str, Any]:
    """What --json prints."""
    run = {"folder": str(opened.folder), "weights": opened.weights, **opened.meta}
    return {"run": run, "scores": table, "intervals": intervals(table)}


def keep(opened: OpenRun, options: Options, table: dict[str, Scores]) -> None:
    """Write evaluation.json into the folder of the run, for its model card (recipes/card.py).

    The row SIZE is left out: it is no score. A checkpoint that was copied away from its run has no
    such folder.
    """
    folder = opened.folder.parent
    if not (folder / "config.json").is_file():
        return
    default = Options("")
    given = {name: getattr(options, name) for name in RECORDED}
    given = {name: value for name, value in given.items() if value != getattr(default, name)}
    scores = {
        name: {k: float(v) if math.isfinite(v) else None for k, v in row.items()}
        for name, row in table.items()
        if name != SIZE
    }
    record = to_record(opened, table) | {"scores": scores, "options": given}
    try:
        files.write_json(folder / run_dir.EVALUATION, record)
    except (OSError, ValueError) as error:
        print(f"warning: {run_dir.EVALUATION} was not written: {error}", file=sys.stderr)


def main() -> int | str:
    try:
        if sys.argv[1:2] == ["overlap"]:
            return show_overlap(sys.argv[2:])
        if sys.argv[1:2] == ["suites"]:
            return suites.show(sys.argv[2:])
        options = parse(Options, __doc__, "python -m tinyfm.evaluate")
        if options.samples < 0 or options.samples == 1:
            raise ValueError(f"--samples is {options.samples}; use 0 (as many as usual), 2 or more")
        opened = run_dir.open_run(options.run, options.raw)
        if options.picture and not opened.run.can_draw():
            raise ValueError(
                "--picture shows names that were confused, or drawings of held-out characters: "
                "use a CLIP with texts, a classifier of pictures, or text-to-image on letters"
            )
        if options.picture:
            pictures.check_free(options.picture)
        table = answer(opened, options)
        if not table:
            table = evaluate(opened, options)
            keep(opened, options, table)
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(to_record(opened, table), indent=2))
        return 0
    print(f"{opened.folder}: step {opened.meta['step']}, {opened.weights} weights")
    for name, row in table.items():
        parts = [
            f"{column} {value if isinstance(value, Measured) else format(value, '.4g')}"
            for column, value in row.items()
        ]
        print(f"{name:58} {'  '.join(parts)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
