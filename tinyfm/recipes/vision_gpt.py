"""The recipe of a GPT that sees: captions of pictures, answers to questions about them, and actions
of a robot; also about several pictures, with examples or with questions about two.

The actions are words, as in RT-2 (Brohan et al. 2023): the model sees what the robot sees, reads
the mission, and writes what to do. It remembers no earlier picture.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from data import episodes, pictures
from data.report import counted
from data.splits import TRAIN, VAL
from tinyfm.batches.order import fixed_order
from tinyfm.batches.pairs import EPISODES, GLYPHS
from tinyfm.batches.seen import SeenConfig, SeenData, commonest
from tinyfm.evaluate import metrics, zero_shot
from tinyfm.generate import Sampling
from tinyfm.gpt import GPTConfig
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores, write_step_file
from tinyfm.recipes.modalities import success
from tinyfm.recipes.pictures import spread_rows
from tinyfm.tokenizer import Tokenizer
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig
from tinyfm.vision_gpt import VisionGPT, VisionGPTConfig

QUICK = 500  # captions of validation that are written at each evaluation
ASKED = 1000  # test pictures about which evaluate asks each question; captions are of all
STYLE = "what style?"
SHOWN = 24  # pictures in a sample
AT_ONCE = 250  # pictures that are read together
DRAW_OPTIONS = frozenset(vars(Sampling())) - {"max_new_tokens", "stop_tokens"}  # of sample.py


# ---- what a model says --------------------------------------------------------------------------


@torch.inference_mode()
def write(
    model: VisionGPT,
    tokenizer: Tokenizer,
    images: np.ndarray,
    texts: Sequence[Sequence[str]],
    longest: int = 0,
    sampling: Sampling | None = None,
) -> list[str]:
    """What the model writes behind the last picture of each row, without spaces around it.

    images: uint8 (n, I, C, H, W). texts (n, I): those behind the pictures, "" for none. The last
    one is continued: a question, or "" for a caption. longest: tokens to write, at most as many as
    the context has room for; 0 = as many. sampling: a draw; by default the likeliest token each
    time.
    """
    c = model.config
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    never = tokenizer.without_token(c.gpt.vocab_size)
    known = sorted({text for own in texts for text in own})
    ids = dict(zip(known, tokenizer.encode_batch(known)))
    end = [tokenizer.eot]
    written = []
    for first in range(0, len(texts), AT_ONCE):
        rows = []
        for *before, last in texts[first : first + AT_ONCE]:
            parts = [end]
            for text in before:
                parts += [None, ids[text] + end if text else []]
            rows.append(model.place_images([*parts, None, ids[last]]))
        room = c.gpt.context_length - max(map(len, rows))
        if room < 1:
            raise ValueError(
                f"the prompt {texts[first][-1]!r} leaves no room for an answer in the context of "
                f"{c.gpt.context_length} tokens: shorten it"
            )
        how = replace(
            sampling or Sampling(temperature=0),
            max_new_tokens=min(longest or room, room),
            stop_tokens=(tokenizer.eot,),
        )
        x = torch.from_numpy(images[first : first + AT_ONCE]).to(device, dtype) / 127.5 - 1
        found = model.generate(rows, x, how, never=never)
        written += [tokenizer.decode(row).strip() for row in found]
    return written


# ---- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VisionGPTRun(Run):
    """Train a GPT to write about pictures."""

    model: VisionGPTConfig = field(default_factory=VisionGPTConfig)
    data: SeenConfig = field(default_factory=SeenConfig)

    family: ClassVar[str] = "vision-gpt"
    SAMPLE_OPTIONS = DRAW_OPTIONS | {"prompt", "image", "texts", "n"}
    LOSS_ROWS = 50
    ABOUT = About(
        task="image-to-text",
        library="tinyfm",
        use="It writes the caption of a picture of the kind that it was trained on, and answers "
        "the questions of its training.",
        limits="It writes something about any picture, also about one unlike those of its "
        "training, and does not say that it is a guess.",
    )

    def __post_init__(self):
        if self.adapt == "prompt":
            raise ValueError("--adapt prompt is for a GPT: use lora, bias or full")

    def build_model(self) -> VisionGPT:
        model = VisionGPT(self.model)
        model.images_per_row = self.data.most_pictures
        return model

    def starts_from(self, base: Run) -> bool:
        """A GPT is a base too: it supplies the language model."""
        return super().starts_from(base) or (base.base_family == "gpt" and not base.has_heads)

    def sized_by(self, base: Run) -> VisionGPTConfig:
        if base.base_family != "gpt":
            return base.model
        if self.adapt != "full":
            raise ValueError(
                f"--adapt {self.adapt} would not train what sees, and {self.init_from} is a GPT "
                "that sees nothing: use --model.frozen"
            )
        return replace(self.model, gpt=base.model)

    def trunk(self, model: VisionGPT, base: Run) -> nn.Module:
        return model.gpt if base.base_family == "gpt" else model

    def open_data(self) -> SeenData:
        if self.model.frozen and not self.init_from:
            raise ValueError(
                "--model.frozen keeps a language model as it is: add --init-from RUN, a trained GPT"
            )
        return SeenData.load(self.data, self.model, self.train.batch_size, self.train.seed)

    def answer(
        self,
        model: VisionGPT,
        data: SeenData,
        split: str,
        kind: int,
        rows: np.ndarray,
        shots: int = 0,
    ) -> tuple[list[str], list[str]]:
        """(what the model writes, what is right) for question number `kind` of these pictures.

        shots: examples in front of each, in place of the question's words.
        """
        exam = data.exam(split, kind, rows, shots)
        found = write(model, data.tokenizer, exam.images, exam.texts, data.longest)
        return found, exam.answers

    def score(self, model: VisionGPT, data: SeenData) -> Scores:
        """Share of QUICK validation pictures whose caption is exactly right."""
        split = data.split(VAL)
        rows = fixed_order(len(data.val.labels))[:QUICK]
        found, right = self.answer(model, data, split, 0, rows)
        return {"val_right": float(np.mean([a == b for a, b in zip(found, right)]))}

    def show(self, model: VisionGPT, data: SeenData, folder: Path, step: int) -> str:
        """Draw validation pictures with what the model writes; return the first texts."""
        split = data.split(VAL)
        rows = spread_rows(len(data.val.labels), min(SHOWN, len(data.val.labels)))
        prompts = data.questions[split][0].prompts
        titles = []
        for row, text, right in zip(rows, *self.answer(model, data, split, 0, rows)):
            title = f"{prompts[row]} {text}".strip()
            titles.append(title if text == right else f"{title}, not {right}")
        images = data.val.images[rows].transpose(0, 2, 3, 1)
        write_step_file(
            folder, step, "png", lambda path: pictures.save_grid(images, path, 8, titles)
        )
        return f"--- step {step} writes: " + "; ".join(titles[:: max(1, len(titles) // 3)][:3])

    # ---- the trained model ----------------------------------------------------------------------

    def glyph_questions(self) -> tuple[list[str], list[str]]:
        """The questions about one glyph, and about two, that the run has learned."""
        if self.data.path not in GLYPHS:
            return [], []
        from data import glyphs  # here, as it loads font libraries, which only the drawings need

        caption = "red sans a on blue" if self.data.color else "sans a"
        compared = list(glyphs.compared(caption, "a")) if self.data.compare else []
        return list(glyphs.answers(caption, "a")), compared

    def read_prompt(self, prompt: str) -> str:
        """A question of sample.py. Raises ValueError if the model has not learned to answer it."""
        if self.data.path == EPISODES:
            return episodes.read_prompt(prompt).strip()
        if not prompt or self.data.path not in GLYPHS:
            return prompt
        about_one, about_two = self.glyph_questions()
        known = [*about_one, *about_two]
        if prompt not in known:
            raise ValueError(
                f"--prompt {prompt!r} is no question that this run has learned: give one of "
                f"{', '.join(map(repr, known))}, or leave it out for a caption"
            )
        return prompt

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Print the caption of the last --image, or the answer to --prompt: the likeliest token
        each time. With -n or settings of the draw, drawn ones.

        --texts are those of the pictures before the last.
        """
        if not any(options.image):
            raise ValueError("give the picture to look at: --image FILE")
        prompt = self.read_prompt(options.prompt or "")
        texts = [*self.texts_before(options, prompt), prompt]
        size = (self.model.image_size, self.model.channels)
        pixels = np.stack([pictures.read(image, *size) for image in options.image])
        n = options.n or 1
        how = options.sampling
        if options.n is None and how == Sampling():
            how = replace(how, temperature=0)
        images = np.repeat(pixels.transpose(0, 3, 1, 2)[None], n, axis=0)
        for text in write(opened.model, opened.tokenizer, images, [texts] * n, sampling=how):
            print(f"{' '.join(options.image)}: {text}")

    def texts_before(self, options: Any, prompt: str) -> Sequence[str]:
        """The texts of the pictures before the last of --image.

        Raises ValueError if they are not as many, or the prompt is about another number of
        pictures. A warning says that training had fewer.
        """
        images, texts = options.image, options.texts
        if prompt in self.glyph_questions()[1]:
            if len(images) != 2 or texts:
                raise ValueError(
                    f"--prompt {prompt!r} is about two pictures without texts, and there are "
                    f"{len(images)} with {len(texts)}: give --image FILE FILE"
                )
            return [""]
        if len(texts) != len(images) - 1 or not all(texts):
            raise ValueError(
                f"--image has {counted(len(images), 'pictures')} and --texts has {len(texts)}: "
                "give a text for each picture but the last"
            )
        if len(images) > self.data.pictures:
            print(
                f"--image has {len(images)} pictures, and training had {self.data.pictures} in a "
                "row: train.py has --data.pictures for more",
                file=sys.stderr,
            )
        return texts

    def right(
        self, data: SeenData, split: str, kind: int, shots: int, right: Sequence[bool]
    ) -> Scores:
        """{measure: share} of answers to question number `kind` about the first test pictures."""
        name = data.names[kind]
        if shots:
            name = f"{name} by {counted(shots, 'examples')}"
        alike, word = zero_shot.clusters_of(split, data.splits[split])
        rows = test_rows(data, split, kind)
        alike = [alike[i] for i in rows] if alike else []
        return {f"{split}: {name}": metrics.proportion(right, "images", alike, word)}

    def measure(self, opened: OpenRun, model: VisionGPT, data: SeenData, options: Any) -> Scores:
        """Shares of test pictures with the right caption, and the right answer to each question.

        Where rows have several pictures, the questions are also asked by examples. Of episodes also
        the share of test worlds in which the trained model reaches the goal.
        """
        scores = {}
        for split, kind, shots in test_questions(data):
            rows = test_rows(data, split, kind)
            found, right = self.answer(model, data, split, kind, rows, shots)
            scores |= self.right(data, split, kind, shots, [a == b for a, b in zip(found, right)])
        if self.data.path != EPISODES or model is not opened.model:
            return scores

        def policy(running: Sequence[episodes.Episode]) -> list[str]:
            seen = np.stack([episode.pictures[-1] for episode in running]).transpose(0, 3, 1, 2)
            missions = [[episode.mission] for episode in running]
            return write(model, data.tokenizer, seen[:, None], missions, data.longest)

        return scores | reached(episodes.results(policy))

    def baselines(self, data: SeenData) -> dict[str, Scores]:
        """What is right if the commonest answer of training is always given; of episodes also what
        the expert and random actions reach."""
        scores = {}
        everything = np.arange(len(data.train.labels))
        kinds = range(len(data.names))
        guesses = [commonest(data.asked(TRAIN, kind, everything)[1]) for kind in kinds]
        for split, kind, shots in test_questions(data):
            answers = data.asked(split, kind, test_rows(data, split, kind))[1]
            right = [each == guesses[kind] for each in answers]
            scores |= self.right(data, split, kind, shots, right)
        columns = {"commonest answer": scores}
        if self.data.path == EPISODES:
            for name, player in episodes.MODALITY.players.items():
                columns[name] = reached(player())
        return columns


def reached(found: dict[str, list[bool]]) -> Scores:
    """The share of test worlds in which each game was won."""
    return {game: success(own) for game, own in found.items()}


def test_questions(data: SeenData) -> list[tuple[str, int, int]]:
    """(split, number of a question, examples in place of its words) of what is asked on test."""
    asked = [(kind, 0) for kind in range(len(data.names))]
    shots = data.config.pictures - 1
    if shots:
        asked += [(kind, shots) for kind in range(1, len(data.questions[TRAIN]))]
    return [(split, *each) for split in list(data.splits)[2:] for each in asked]


def test_rows(data: SeenData, split: str, kind: int) -> np.ndarray:
    """The pictures of a test split about which a question is asked, int64.

    Held-out characters are drawn in all styles. Questions ask of them in the styles of training, so
    that the answers tell what new characters cost, and those of held-out fonts what a new style
    costs. A comparison is asked about pictures for which the right answer may be yes.
    """
    order = fixed_order(len(data.splits[split].labels))
    if not kind:
        return order
    comparison = kind - len(data.questions[split])
    if comparison >= 0:
        order = order[data.comparisons[split][comparison].has_like(order)]
    if STYLE in data.names:
        style = data.names.index(STYLE)
        known = {*data.questions[TRAIN][style].answers}
        styles = data.questions[split][style].answers
        in_known = [i for i in order if styles[i] in known]
        if in_known:  # not where all is in a new style
            order = np.array(in_known)
    return order[:ASKED]


RUNS = (VisionGPTRun,)

# ---- presets ------------------------------------------------------------------------------------


def small_run(
    data: SeenConfig,
    steps: int,
    rows: int,
    context_length: int,
    vocab_size: int = 2048,
    **image: int,
) -> VisionGPTRun:
    """A run for CPUs: three blocks see, and two write. image: the sizes of pictures."""
    gpt = GPTConfig(
        vocab_size=vocab_size, context_length=context_length, n_layer=2, n_head=2, d_model=128
    )
    return VisionGPTRun(
        model=VisionGPTConfig(image_layer=3, gpt=gpt, **image),
        data=data,
        optim=OptimConfig(lr=0.006, muon_lr=0.012, warmup_steps=20, decay_fraction=0.6),
        train=TrainConfig(steps, batch_size=rows, micro_batch_size=rows // 2, eval_every=400),
    )


PRESETS = {
    "vision-gpt": Preset(
        "a GPT that names letters and symbols and their style: ten minutes on two cores",
        small_run(SeenConfig(), steps=1600, rows=256, context_length=48),
        usual="0.81, as one seed gave",
    ),
    "vision-gpt-two": Preset(
        "the same with two pictures in a row: one as an example, or questions about both",
        small_run(
            SeenConfig(pictures=2, compare=0.25), steps=1600, rows=128, context_length=96
        ),
    ),
    "actions": Preset(
        "the same as a robot that does what it is told: ten minutes on two cores",
        small_run(  # a patch is a cell of the robot's view
            SeenConfig(path=EPISODES),
            steps=1200, rows=128, context_length=64, vocab_size=320, image_size=56, channels=3,
        ),
        usual="0.86, as one seed gave",
    ),
}  # fmt: skip
