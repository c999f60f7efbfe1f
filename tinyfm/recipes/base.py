"""A recipe binds one family of models to the commands. This file holds what all recipes share.

A recipe is one file of this folder. It defines

    a run type   a dataclass derived from `Run`: its fields are the options of train.py, its methods
                 say how to build the model, open the data, and report, sample and measure
    RUNS         its run types: pretraining first, then the tasks it can be fine-tuned for
    PRESETS      named values of those types: what `python train.py NAME` trains

registry.py lists the recipes, launch.py trains a run, run_dir.py reads and writes its folder. The
trainer and the lessons know nothing of recipes. To add a family, write its lesson, its batches and
its recipe, and add the recipe to registry.RECIPES.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from torch import nn
from tyro.conf import Suppress

from data.splits import HELD_OUT, VAL
from tinyfm import tokenizer
from tinyfm.adapt import AdapterConfig
from tinyfm.beam import Beams
from tinyfm.common.config import FolderPath, MaybeText, Name, RunPath, may_change
from tinyfm.common.seeds import row_generators
from tinyfm.evaluate import metrics
from tinyfm.evaluate.metrics import Scores
from tinyfm.generate import Sampling
from tinyfm.tokenizer import Tokenizer
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


class About(NamedTuple):
    """What the model card of a family's export says."""

    task: str = ""  # as the Hugging Face hub calls it (pipeline_tag)
    library: str = "transformers"  # that opens the folder
    use: str = ""  # what the model is for, in sentences
    limits: str = ""  # what it cannot do, in sentences


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of one run. A subclass adds the fields `model` and `data`, configs too."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: FolderPath = ""  # folder of the run
    resume: bool = False  # continue from the last checkpoint in that folder
    dry_run: bool = False  # print the cost of training and the settings, then stop
    json: bool = False  # with --dry-run: print both as JSON
    # choose size and steps for this: 10m, 2h, 1e13 FLOP, 20M tokens, or 5 dollars
    budget: MaybeText = None
    gpu: Name = ""  # GPU that a budget in dollars is spent on
    # fine-tune for a task instead of pretraining: classify, embed, chat, reward, dpo or grpo
    task: Name = ""
    # start from this run: it supplies the weights, the sizes and the tokenizer
    init_from: RunPath = may_change("")
    # which weights to train: all, LoRA, biases and norms, the head, or a soft prompt
    adapt: Literal["full", "lora", "bias", "head", "prompt"] = "full"

    # Settings of --adapt.
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    base_hash: Suppress[str] = ""  # hash of the weights that the run started from

    family: ClassVar[str]
    # The fields that config.json records: always, and where they differ from their default.
    CONFIGS: ClassVar[tuple[str, ...]] = ("model", "data", "optim", "train")
    FACTS: ClassVar[tuple[str, ...]] = ("init_from", "base_hash", "adapt", "adapter")
    # Options that name runs whose models become parts of this model. PRESET-OPTION trains a part.
    PARTS: ClassVar[tuple[str, ...]] = ()
    # Options of sample.py that apply to this family, but for those that all have (sample.py's
    # COMMON); and of evaluate (--text, --choices, --task).
    SAMPLE_OPTIONS: ClassVar[frozenset[str]] = frozenset()
    QUESTIONS: ClassVar[tuple[str, ...]] = ()
    # Rows of the batches over which a loss has its interval; 0 = as in training, for a loss that
    # compares the rows of a batch.
    LOSS_ROWS: ClassVar[int] = 8
    # Ways to classify without training: "zero-shot", "few-shot" (with examples in the prompt).
    UNTRAINED: ClassVar[tuple[str, ...]] = ()
    # Whether the model is the family's with heads on top. Then it is no base for other runs.
    has_heads: ClassVar[bool] = False
    ABOUT: ClassVar[About] = About()  # for the model card of an export

    # ---- training -------------------------------------------------------------------------------

    def at_width(self, width: int) -> Run:
        """The same at another width, and what follows from it: a size of --budget's sweep."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """The model with its initial weights."""
        raise NotImplementedError

    def open_data(self) -> Any:
        """The data, as the trainer reads them; prepared and cached the first time."""
        raise NotImplementedError

    @property
    def base_family(self) -> str:
        """Family of the runs that this one can start from."""
        return self.family

    def starts_from(self, base: Run) -> bool:
        """Whether a run can be the base of this one."""
        return base.base_family == self.base_family and not base.has_heads

    def sized_by(self, base: Run) -> Any:
        """The model's config, with the sizes of the base."""
        return base.model

    def trunk(self, model: nn.Module, base: Run) -> nn.Module:
        """The part of the model that gets the weights of the base."""
        return model

    def facts_of(self, data: Any) -> dict[str, Any]:
        """Fields of the run that follow from its data, such as the classes of a task."""
        return {}

    def use_others(
        self,
        model: nn.Module,
        data: Any,
        open_base: Callable[[], OpenRun],
        open_run: Callable[[str], OpenRun],
    ) -> None:
        """Let model and data use other runs, before training or evaluation.

        The model is on its device. open_base() gives the run that this one starts from,
        open_run(NAME) any other. Raises ValueError if one is gone or does not fit.
        """

    def get_ready(self, model: nn.Module, data: Any) -> None:
        """Prepare model and data for each other, once the model has its weights."""

    def score(self, model: nn.Module, data: Any) -> Scores:
        """Scores reported with the validation loss at each evaluation.

        The first one sums up the run, unless it is a term of the loss, named val_loss_...
        """
        return {}

    def show(self, model: nn.Module, data: Any, folder: Path, step: int) -> str:
        """Write samples to folder/step-NNNNNN.*; return one line about them."""
        raise NotImplementedError

    # ---- checkpoints ----------------------------------------------------------------------------

    def write_files(self, folder: Path, data: Any) -> None:
        """Add to a checkpoint what sampling needs besides the weights; here the tokenizer."""
        data.tokenizer.save(folder)

    def read_tokenizer(self, folder: Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint; None for a family that reads no text."""
        return tokenizer.load(folder)

    # ---- the trained model ----------------------------------------------------------------------

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Carry out sample.py's `options`. Raises ValueError for options that make no sense."""
        raise NotImplementedError

    def sample_form(self, options: Any) -> tuple[str, frozenset[str]]:
        """(what the options ask for, which of SAMPLE_OPTIONS it has a use for).

        For a family whose `sample` does several things, the first part is such as "with --chat".
        """
        return "", self.SAMPLE_OPTIONS

    def losses(self, model: nn.Module, data: Any) -> Scores:
        """Loss on validation and test as training measures it, and data.metrics of validation.

        The intervals are over batches of LOSS_ROWS. Data without split_batches have no test split.
        """
        rows = min(self.LOSS_ROWS, self.train.batch_size) or self.train.batch_size
        batches = {VAL: data.val_batches(rows)}
        if hasattr(data, "split_batches"):
            batches = {split: data.split_batches(split, rows) for split in HELD_OUT}
        scores = {}
        for split, found in batches.items():
            scores |= batch_losses(model, found, split, self.train.seed, rows)
        names = data.metrics(0.0)
        for name in names:
            scores[name] = scores["val_loss"].through(
                lambda loss, name=name: data.metrics(loss)[name]
            )
        return scores

    def measure(self, opened: OpenRun, model: nn.Module, data: Any, options: Any) -> Scores:
        """Scores that `python -m tinyfm.evaluate` prints after the losses.

        model: the trained model of `opened`, or the same model before training. options: the
        command's; draw its --picture only for the trained model.
        """
        return {}

    def baselines(self, data: Any) -> dict[str, Scores]:
        """Scores that need no model: {column: {measure: score}}."""
        return {}

    def can_draw(self) -> bool:
        """Whether `measure` can draw evaluate's --picture."""
        return False

    def classify_untrained(self, opened: OpenRun, data: Any, shots: int) -> Answers:
        """Classify the test examples of a task without training.

        shots: number of labelled examples in the prompt, for a family that reads a prompt.
        """
        raise ValueError(f"a run of family {self.family} cannot classify without training")


@dataclass(frozen=True)
class OpenRun:
    """A trained run, loaded from a checkpoint."""

    run: Run
    model: nn.Module
    tokenizer: Tokenizer | None  # None for a family that reads no text
    folder: Path  # the checkpoint
    meta: dict[str, Any]  # its step and scores
    weights: str  # "ema" (averaged) or "model"
    draft: OpenRun | None = None  # a smaller run that proposes tokens (sample.py --draft)


@dataclass(frozen=True)
class Preset:
    """A named run."""

    about: str  # one line for --help
    run: Run
    # The score that a run of it ends with, as recorded in benchmarks/README.md: "1.65 to 1.66, ..."
    usual: str = ""
    sweep: str = ""  # table of calc/ with runs of several widths: the law of --budget

    def usual_range(self) -> list[float]:
        """The numbers with which `usual` starts."""
        return [float(word) for word in re.findall(r"\d+\.?\d*", self.usual.split(",")[0])]


class Answers(NamedTuple):
    """What a model that was not trained for a task answers to its first question."""

    guesses: np.ndarray  # int (n,)
    truth: np.ndarray  # int (n,)
    shots: list[int]  # labelled examples in the prompt of each; empty without prompts


# ---- helpers of several recipes -----------------------------------------------------------------


def batch_losses(
    model: nn.Module,
    batches: Iterable[dict],
    split: str,
    seed: int,
    rows: int,
) -> Scores:
    """{"SPLIT_loss": mean of model.loss over the batches of `rows` rows}; {} without a batch."""
    device = next(model.parameters()).device
    losses = []
    weights = []
    for i, batch in enumerate(batches):
        n = len(next(iter(batch.values())))
        generators = row_generators(seed, -1, range(i * rows, i * rows + n))
        loss, found = model.loss({k: v.to(device) for k, v in batch.items()}, generators)
        weights.append(float(found.get("weight", n)))
        losses.append(float(loss) * weights[-1])
    if not weights:
        return {}
    return {f"{split}_loss": metrics.ratio_of_sums(losses, weights, "batches")}


BEAM_OPTIONS = frozenset({"beams", "length_penalty"})  # of sample.py


def beams_of(options: Any, stop_tokens: tuple[int, ...] = ()) -> Beams | None:
    """The search that the options of sample.py ask for; None if they ask for none.

    Raises ValueError beside options that draw texts.
    """
    if options.beams < 1:
        raise ValueError(f"beams is {options.beams}; use 1 for none, or 2 and more to search")
    if options.beams == 1:
        if options.length_penalty != 1:
            raise ValueError("--length-penalty is for a search: add --beams 4")
        return None
    drawing = [
        name
        for name, value in vars(Sampling()).items()
        if name not in ("max_new_tokens", "stop_tokens")
        and getattr(options.sampling, name) != value
    ]
    if drawing:
        flag = f"--{drawing[0].replace('_', '-')}"
        raise ValueError(
            f"{flag} draws a text, and --beams searches for one: leave out one of them"
        )
    if options.n not in (None, 1):
        raise ValueError(f"--beams finds one text, the likeliest: leave out -n {options.n}")
    sampling = options.sampling
    stops = (*sampling.stop_tokens, *stop_tokens)
    return Beams(options.beams, options.length_penalty, sampling.max_new_tokens, stops)


def warn_if_longer(opened: OpenRun, text: str, ends: int = 0) -> None:
    """Say on stderr if the model reads only the start of a text. ends: ids that are added to it."""
    n = len(opened.tokenizer.encode(text)) + ends
    most = opened.model.config.context_length
    if n > most:
        print(f"the text has {n} tokens: the model reads the first {most}", file=sys.stderr)


def print_shares(shares: dict[str, float]) -> None:
    """Print names and their probabilities, the most likely first."""
    for name, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        print(f"{share:.4f}  {name}")


def write_step_file(folder: Path, step: int, suffix: str, write: Callable[[Path], None]) -> Path:
    """Make folder/step-NNNNNN.SUFFIX with `write`; return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:06d}.{suffix}"
    write(path)
    return path


def free_name(name: str, *endings: str) -> str:
    """The first of sample.png, sample-2.png, sample-3.png, ... that is no file yet.

    endings: of other files with that name, such as ".mid", none of which may be there.
    """
    first = Path(name)
    path = first
    number = 1
    while path.exists() or any(path.with_suffix(ending).exists() for ending in endings):
        number += 1
        path = first.with_stem(f"{first.stem}-{number}")
    return str(path)


def write_texts_file(folder: Path, step: int, texts: list[str]) -> Path:
    """Write texts to folder/step-NNNNNN.txt, with a line ---- between them."""
    content = "\n----\n".join(texts) + "\n"
    return write_step_file(
        folder, step, "txt", lambda path: path.write_text(content, encoding="utf-8")
    )
