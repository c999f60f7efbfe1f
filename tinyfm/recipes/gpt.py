"""The recipe of language models: pretraining, distillation, chat, classification, search,
preferences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.splits import HELD_OUT, TEST, TRAIN
from tinyfm import generate, tokenizer
from tinyfm.adapt import chat
from tinyfm.adapt.distill import DistilConfig, distil, take_layers
from tinyfm.adapt.heads import Reader, mean_state
from tinyfm.adapt.soft_prompt import PromptedData
from tinyfm.batches.chat import ChatConfig, ChatData
from tinyfm.batches.labelled import TaskData
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.common.config import RunPath
from tinyfm.evaluate import likelihood
from tinyfm.evaluate.metrics import ratio_of_sums
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes import modalities, writing
from tinyfm.recipes.base import (
    BEAM_OPTIONS,
    About,
    Answers,
    OpenRun,
    Preset,
    Run,
    Scores,
    beams_of,
    write_texts_file,
)
from tinyfm.recipes.classify import TextClassifyRun
from tinyfm.recipes.embed import EmbedRun
from tinyfm.recipes.preference import DPORun, GRPORun, RewardRun
from tinyfm.tokenizer import Tokenizer
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig

SAMPLING_OPTIONS = frozenset(vars(generate.Sampling()))
CLASSIFYING = frozenset({"prompt", "shots", "examples", "seed"})  # options that it reads

# ---- pretraining --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GPTRun(Run):
    """Pretrain a GPT on text."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: TextConfig = field(default_factory=TextConfig)

    teacher: RunPath = ""  # distillation: also learn from the predictions of this run
    distil: DistilConfig = field(default_factory=DistilConfig)

    family: ClassVar[str] = "gpt"
    UNIT: ClassVar[str] = "documents"  # what the held-out texts are cut into, for intervals
    FACTS = (*Run.FACTS, "teacher", "distil")
    SAMPLE_OPTIONS = SAMPLING_OPTIONS | BEAM_OPTIONS | {
        "prompt", "n", "out", "stop", "compile", "draft", "draft_tokens", "shots", "examples"
    }  # fmt: skip
    QUESTIONS = ("text", "choices", "task")
    UNTRAINED = ("zero-shot", "few-shot")
    ABOUT = About(
        task="text-generation",
        use="It continues a text of the kind that it was trained on, and is a start for "
        "fine-tuning.",
        limits="It predicts likely words, and does not know what is true. Beyond its training "
        "text it writes nonsense, and it may repeat parts of that text word for word.",
    )

    def build_model(self) -> GPT:
        return GPT(self.model)

    def at_width(self, width: int) -> GPTRun:
        """The same at another width. Blocks, heads and rows of a batch grow with it.

        Muon's rate is the same for all widths, as the spectral norm of its updates is (muon.py).
        Of AdamW's matrices the embedding wants one rate for all widths too, and the head one that
        falls like 1 / width (Yang et al. 2022, table 8); they share one, which falls like the root.
        """
        m = self.model
        blocks = max(2, width // 128)
        lr = self.optim.lr * (m.d_model / width) ** 0.5
        return replace(
            self,
            model=replace(m, d_model=width, n_layer=blocks, n_head=blocks),
            optim=replace(self.optim, lr=float(f"{lr:.3g}")),
            train=replace(self.train, batch_size=self.train.batch_size * width // m.d_model),
        )

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the soft prompt, which takes up that part of the context."""
        n = self.adapter.prompt_tokens if self.adapt == "prompt" else 0
        return [self.model.vocab_size + i for i in range(n)]

    def with_prompt(self, data: Any) -> Any:
        """The data with the soft prompt, if there is one, in front of each row."""
        return PromptedData(data, self.prompt_ids) if self.prompt_ids else data

    def open_data(self) -> TextData:
        train = self.train
        length = self.model.context_length - len(self.prompt_ids)
        data = TextData.prepare(
            self.data, self.model.vocab_size, length, train.batch_size, train.seed
        )
        return self.with_prompt(data)

    def losses(self, model: GPT, data: TextData) -> Scores:
        """Nats per token and bits per byte of both held-out texts; intervals over their UNIT."""
        scores = {}
        for name in HELD_OUT:
            split = data.split(name)
            if not len(split.starts):
                continue
            nats = likelihood.score_targets(model, data.split_batches(name, self.train.batch_size))
            by_document = np.add.reduceat(nats, split.starts)
            tokens = np.diff([*split.starts, split.predicted])
            scores[f"{name}_loss"] = ratio_of_sums(by_document, tokens, self.UNIT)
            bits = by_document / math.log(2)
            scores[f"{name}_bpb"] = ratio_of_sums(bits, split.bytes, self.UNIT)
        return scores

    def learn_from(self, model: GPT, data: TextData, teacher: OpenRun) -> None:
        """Make the teacher's predictions part of the model's training loss."""
        both = (data.tokenizer, teacher.tokenizer)
        c = self.distil
        distil(model, teacher.model, c.temperature, c.share, both, c.cosine)
        if c.take_layers:
            take_layers(model, teacher.model)

    def show(self, model: GPT, data: TextData, folder: Path, step: int) -> str:
        """Write two texts, from nothing; return one."""
        starts = [[data.tokenizer.eot]] * 2
        text = self.write(model, data.tokenizer, starts, 0.8, folder, step)
        return f"--- step {step} writes:\n{text}"

    def write(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        starts: list[list[int]],
        temperature: float,
        folder: Path,
        step: int,
    ) -> str:
        """Continue rows of token ids, write the texts to a file, and return the first."""
        sampling = generate.Sampling(
            max_new_tokens=min(100, self.model.context_length // 2),
            temperature=temperature,
            stop_tokens=(tokenizer.eot,),
        )
        starts_with_prompt = [self.prompt_ids + ids for ids in starts]
        never = tokenizer.without_token(self.model.vocab_size)
        rows = generate.complete(model, starts_with_prompt, sampling, never=never)
        texts = [tokenizer.decode(ids[1:] + row) for ids, row in zip(starts, rows)]
        write_texts_file(folder, step, texts)
        return texts[0].strip()[:300]

    def sample_form(self, options: Any) -> tuple[str, frozenset[str]]:
        if options.shots or options.examples:
            return "with --shots and --examples", CLASSIFYING
        if options.beams > 1:
            return "with --beams", self.SAMPLE_OPTIONS - {"draft_tokens"}
        return "", self.SAMPLE_OPTIONS

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Continue --prompt, or classify it after --shots of --examples."""
        if options.prompt == "":
            raise ValueError("the prompt is empty: give text, or leave out --prompt")
        if options.shots or options.examples:
            writing.classify_prompt(opened, options)
            return
        beams = beams_of(options, (opened.tokenizer.eot,))
        modality = modalities.modality_of(self.data.path)
        if beams:
            writing.search_text(opened, options, beams, modality)
        elif modality:
            modalities.write_modality(self, modality, opened, options)
        else:
            writing.write_texts(opened, options)

    def measure(self, opened: OpenRun, model: GPT, data: TextData, options: Any) -> Scores:
        """Of texts that are no prose: how many that the trained model writes are valid."""
        modality = modalities.modality_of(self.data.path)
        if modality is None or model is not opened.model:
            return {}
        n = options.samples or modality.samples
        return modalities.measure(modality, model, data, n, self.prompt_ids, options.seed)

    def baselines(self, data: TextData) -> dict[str, Scores]:
        """Of texts that are no prose: the real ones, and those of a Markov model."""
        modality = modalities.modality_of(self.data.path)
        if modality is None:
            return {}
        return modalities.baselines(modality, data)

    def classify_untrained(self, opened: OpenRun, data: TaskData, shots: int) -> Answers:
        """By likelihood, after up to `shots` examples that the seed of the data draws."""
        names = next(iter(data.classes.values()))

        def text(split: str, i: int) -> str:
            return opened.tokenizer.decode(data.inputs[split][i].tolist())

        pool = [(text(TRAIN, i), names[data.labels[TRAIN][i, 0]]) for i in data.chosen]
        queries = [text(TEST, i) for i in range(len(data.labels[TEST]))]
        found = likelihood.classify(
            opened.model,
            opened.tokenizer,
            pool,
            queries,
            names,
            shots,
            data.seed,
            calibrate=True,
        )
        guesses = np.array([names.index(guess.label) for guess in found])
        return Answers(guesses, data.labels[TEST][:, 0], [guess.shots for guess in found])


# ---- tasks --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChatRun(GPTRun):
    """Teach a GPT to answer."""

    data: ChatConfig = field(default_factory=ChatConfig)
    task: str = "chat"

    family: ClassVar[str] = "chat"
    UNIT: ClassVar[str] = "conversations"
    base_family: ClassVar[str] = "gpt"
    SAMPLE_OPTIONS = SAMPLING_OPTIONS | {"prompt", "chat"}
    ABOUT = About(
        task="text-generation",
        use="It answers questions of the kind that its conversations have.",
        limits="Its answers may be wrong, and sound as sure as right ones. It was not trained to "
        "refuse anything.",
    )

    def open_data(self) -> ChatData:
        if not self.data.tokenizer:
            raise ValueError("an untrained model cannot chat: start from a run, --init-from RUN")
        train = self.train
        length = self.model.context_length - len(self.prompt_ids)
        own = tokenizer.load(self.data.tokenizer)
        return self.with_prompt(ChatData(self.data, own, length, train.batch_size, train.seed))

    def show(self, model: GPT, data: ChatData, folder: Path, step: int) -> str:
        """Answer the first questions of held-out conversations; return one with its answer."""
        length = self.model.context_length // 2
        starts = [row.ids[: row.trained.argmax()].tolist()[-length:] for row in data.val[:8]]
        return f"--- step {step}:\n{self.write(model, data.tokenizer, starts, 0.0, folder, step)}"

    def sample_form(self, options: Any) -> tuple[str, frozenset[str]]:
        if options.chat:
            return "with --chat", self.SAMPLE_OPTIONS - {"prompt"}
        return "", self.SAMPLE_OPTIONS

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Answer --prompt; or, with --chat, what the user types, until the end of input."""
        if options.chat:
            chat.chat(opened.model, opened.tokenizer, input, sampling=options.sampling)
            return
        if not (options.prompt or "").strip():
            raise ValueError("say something: --prompt TEXT, or --chat to talk")
        messages = [{"role": "user", "content": options.prompt}]
        for part in chat.reply(opened.model, opened.tokenizer, messages, options.sampling):
            print(part, end="", flush=True)
        print()


@dataclass(frozen=True, kw_only=True)
class GPTClassifyRun(TextClassifyRun):
    """Classify texts."""

    model: GPTConfig = field(default_factory=GPTConfig)

    family: ClassVar[str] = "gpt-classify"
    trunk_run: ClassVar[type[Run]] = GPTRun
    reader: ClassVar[Reader] = Reader(
        read=mean_state,
        inputs=("tokens", "mask"),
        width=lambda config: config.d_model,
        unread=("head",),
    )


@dataclass(frozen=True, kw_only=True)
class GPTEmbedRun(EmbedRun):
    """Learn vectors of questions and passages."""

    model: GPTConfig = field(default_factory=GPTConfig)

    family: ClassVar[str] = "gpt-embed"
    trunk_run: ClassVar[type[Run]] = GPTRun
    reader: ClassVar[Reader] = GPTClassifyRun.reader
    states = staticmethod(lambda gpt, tokens, mask: gpt.hidden(tokens))


class Writer:
    """What a fine-tuned run can do because its model is a GPT that writes."""

    SAMPLE_OPTIONS = GPTRun.SAMPLE_OPTIONS
    QUESTIONS = GPTRun.QUESTIONS
    UNTRAINED = GPTRun.UNTRAINED
    ABOUT = GPTRun.ABOUT
    sample = GPTRun.sample
    sample_form = GPTRun.sample_form
    classify_untrained = GPTRun.classify_untrained


@dataclass(frozen=True, kw_only=True)
class GPTDPORun(Writer, DPORun):
    """Let a GPT prefer the better answers of pairs."""


@dataclass(frozen=True, kw_only=True)
class GPTGRPORun(Writer, GRPORun):
    """Let a GPT learn from the rewards of its answers."""


RUNS = (GPTRun, ChatRun, GPTClassifyRun, GPTEmbedRun, RewardRun, GPTDPORun, GPTGRPORun)

# ---- presets ------------------------------------------------------------------------------------

LAYERNORM = {"norm": "layernorm", "norm_eps": 1e-5, "qk_norm": False, "zero_init": False}
PARALLEL = LAYERNORM | {"block": "parallel", "tied": True}
# What the members of a published family share, besides their sizes.
STYLES = {
    "gpt2": LAYERNORM | {"position": "learned", "mlp": "gelu", "bias": True, "tied": True},
    "bloom": LAYERNORM | {
        "position": "alibi", "embed_norm": True, "mlp": "gelu", "bias": True, "tied": True},
    "llama": {"mlp": "swiglu", "qk_norm": False, "norm_eps": 1e-5, "zero_init": False},
    "falcon": PARALLEL | {"mlp": "exact-gelu", "norm_bias": True},
    "palm": PARALLEL | {"mlp": "swiglu", "rope_pairs": "neighbours"},
}  # fmt: skip
STYLES["gpt1"] = STYLES["gpt2"] | {"block": "post-norm"}
STYLES["falcon-40b"] = STYLES["falcon"] | {"block": "parallel-two-norms"}
STYLES["command-r"] = STYLES["palm"] | {"logit_scale": 1 / 16}
# The multipliers of Granite 3.0 2B, whose heads are 64 wide.
STYLES["granite"] = STYLES["llama"] | {
    "embedding_scale": 12.0, "attention_scale": 1 / 64, "residual_scale": 0.22,
    "logit_scale": 1 / 8, "tied": True,
}  # fmt: skip
GPT2 = STYLES["gpt2"] | {"vocab_size": 50257, "context_length": 1024}
LLAMA = STYLES["llama"]


def small_run(d_model: int, n_head: int, data: TextConfig, train: TrainConfig) -> GPTRun:
    """A GPT of two layers, for CPUs.

    Wide and shallow: on a CPU a wider matrix product costs little more, another layer a lot.
    """
    return GPTRun(
        model=GPTConfig(
            vocab_size=4096, context_length=256, n_layer=2, n_head=n_head, d_model=d_model
        ),
        data=data,
        optim=OptimConfig(lr=0.012, muon_lr=0.02, warmup_steps=10, decay_fraction=0.6),
        train=train,
    )


def sweep_preset(d_model: int) -> Preset:
    """A run on bytes of 20 tokens a parameter, counted without embeddings and head.

    Its FLOPs C grow about like the fourth power of the width, so the batches about like C^(1/3), as
    Bi et al. (2024, eq. 1) advise. One pair of rates then suits all sizes: see calc/sweep.py.
    """
    config = GPTConfig(
        vocab_size=257,  # bytes: larger tables would be most of a small model
        context_length=128,
        n_layer=2,
        n_head=2,
        d_model=d_model,
        d_ff=3 * d_model,
    )
    parameters = config.n_layer * 13 * d_model**2  # 4 D^2 of attention and 3 x 3 D^2 of the MLP
    rows = round(3.2 * (d_model / 24) ** (4 / 3))
    run = GPTRun(
        model=config,
        data=TextConfig(tokenizer="bytes"),
        optim=OptimConfig(lr=0.009, muon_lr=0.017, warmup_steps=10, decay_fraction=0.6),
        train=TrainConfig(
            steps=round(20 * parameters / (rows * config.context_length)),
            batch_size=rows,
            eval_every=0,
        ),
    )
    return Preset(f"width {d_model}: one of nine sizes for a scaling law", run)


def modality_preset(
    about: str,
    path: str,
    context_length: int,
    steps: int,
    usual: str = "",
    tokenizer: str = "bytes",
) -> Preset:
    """A run on texts of a modality, a sign at a time, for one CPU core and ten minutes.

    Their signs are few, so the tables are small, and the model is deeper and narrower than for
    prose. Many narrow heads find what belongs together far apart, such as the two ends of a ring.
    Molecules, 600 steps, validation loss: 2 heads 0.712, 4 heads 0.705, 8 heads 0.701. A model
    three times as large, at equal time, reads too little: 0.651 beside 0.635 after ten minutes.
    """
    run = GPTRun(
        model=GPTConfig(
            vocab_size=257, context_length=context_length, n_layer=4, n_head=8, d_model=128
        ),
        data=TextConfig(path, tokenizer, whole=True),
        optim=OptimConfig(lr=0.01, muon_lr=0.02, warmup_steps=20, decay_fraction=0.6),
        train=TrainConfig(steps=steps, batch_size=2048 // context_length, eval_every=steps // 4),
    )
    return Preset(about, run, usual)


def gpu_run(model: GPTConfig, steps: int, batch_size: int, micro: int, lr: float) -> GPTRun:
    """A run for GPUs: batches of batch_size rows, `micro` rows in a forward pass."""
    train = TrainConfig(steps, batch_size, micro, eval_every=max(1, steps // 20), compile=True)
    optim = OptimConfig(lr=lr, warmup_steps=steps // 50)
    return GPTRun(model=model, data=TextConfig(tokenizer="bpe"), optim=optim, train=train)


PRESETS = {
    "gpt": Preset(
        "a small GPT on the documentation of Python, numpy and torch: two minutes on two cores",
        small_run(
            d_model=256,
            n_head=2,
            data=TextConfig(),
            train=TrainConfig(steps=300, batch_size=16, micro_batch_size=8, eval_every=100),
        ),
        usual="1.67 to 1.69, as three seeds gave",
        sweep="budget.csv",
    ),
    "molecules": modality_preset(
        "a GPT that writes molecules: a quarter of an hour on one core",
        "molecules", 128, 4200, "0.85 to 0.86, as three seeds gave",
    ),
    "genome": modality_preset(
        "a GPT on the bases of a bacterium's genome: ten minutes on one core",
        "genome", 256, 2100, "1.92 to 1.93, as three seeds gave",
    ),
    "tunes": modality_preset(
        "a GPT that writes tunes, as notes and sound: ten minutes on one core", "tunes", 256, 2400
    ),
    "chorales": modality_preset(
        "a GPT that writes for four voices: a quarter of an hour on one core",
        "chorales", 512, 3600, "0.51 to 0.52, as three seeds gave",
    ),
    "series": modality_preset(
        "a GPT that forecasts the weather by the hour: six minutes on one core",
        "series", 512, 1200, "1.29 to 1.44, as three seeds gave",
    ),
    "levels": modality_preset(
        "a GPT that writes levels of a platform game: ten minutes on one core",
        "levels", 512, 1800, "0.18, as three seeds gave",
    ),
    "episodes": modality_preset(
        "a GPT that plays a robot in a room: a quarter of an hour on one core",
        "episodes", 512, 4000,
    ),
    "sounds": modality_preset(
        "a GPT that writes a voice, sample by sample: a quarter of an hour on one core",
        "sounds", 1024, 2700, tokenizer="characters",
    ),
    # A scaling law is fitted to the first eight, and then predicts the large one, which has four
    # times the FLOPs of the eighth: python -m tinyfm.calc sweep.
    "sweep-1": sweep_preset(24),
    "sweep-2": sweep_preset(28),
    "sweep-3": sweep_preset(32),
    "sweep-4": sweep_preset(40),
    "sweep-5": sweep_preset(48),
    "sweep-6": sweep_preset(56),
    "sweep-7": sweep_preset(64),
    "sweep-8": sweep_preset(72),
    "sweep-large": sweep_preset(104),
    "gpt2-124m": Preset(
        "GPT-2's smallest size, batches of half a million tokens: for GPUs",
        gpu_run(
            GPTConfig(n_layer=12, n_head=12, d_model=768, **GPT2),
            steps=20_000, batch_size=512, micro=32, lr=6e-4,
        ),
    ),
    "gpt2-1.5b": Preset(
        "GPT-2's largest size, batches of a million tokens: for GPUs",
        gpu_run(
            GPTConfig(n_layer=48, n_head=25, d_model=1600, **GPT2),
            steps=50_000, batch_size=1024, micro=8, lr=2e-4,
        ),
    ),
    "llama-1b": Preset(
        "the shape of Llama 3.2 1B, batches of two million tokens: for GPUs",
        gpu_run(
            GPTConfig(
                n_layer=16, n_head=32, n_kv_head=8, d_model=2048, d_ff=8192, vocab_size=128_256,
                context_length=4096, rope_theta=500_000.0, tied=True, **LLAMA,
            ),
            steps=50_000, batch_size=512, micro=4, lr=3e-4,
        ),
    ),
}  # fmt: skip
