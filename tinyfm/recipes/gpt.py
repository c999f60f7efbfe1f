"""Run types of language models: what binds pretraining and chat to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data import labelled as label_files
from data.labelled import SPLITS
from data.report import Report
from tinyfm import compiled, generate, tokenizer
from tinyfm.adapt import chat
from tinyfm.adapt.distill import DistilConfig, distil
from tinyfm.adapt.heads import Classifier
from tinyfm.adapt.soft_prompt import PromptedData, prompt_ids
from tinyfm.batches import labelled
from tinyfm.batches import labelled as tasks
from tinyfm.batches.chat import ChatConfig, ChatData
from tinyfm.batches.labelled import TaskData
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.evaluate import likelihood
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes import base
from tinyfm.recipes.base import Run, print_shares
from tinyfm.recipes.classify import ClassifyRun
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class GPTRun(Run):
    """Pretrain a GPT on text."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: TextConfig = field(default_factory=TextConfig)

    teacher: str = ""  # a run to learn from beside the text: distillation
    distil: DistilConfig = field(default_factory=DistilConfig)

    family: ClassVar[str] = "gpt"
    facts: ClassVar[tuple[str, ...]] = (*Run.facts, "teacher", "distil")

    def build_model(self) -> GPT:
        return GPT(self.model)

    @property
    def prompt_ids(self) -> list[int]:
        """Of the soft prompt, which takes its place in the context."""
        n = self.adapter.prompt_tokens if self.adapt == "prompt" else 0
        return [self.model.vocab_size + i for i in range(n)]

    def open_data(self) -> TextData:
        m, c, ids = self.model, self.train, self.prompt_ids
        length = m.context_length - len(ids)
        data = TextData.prepare(self.data, m.vocab_size, length, c.batch_size, c.seed)
        return PromptedData(data, ids) if ids else data

    def learn_from(self, model: GPT, data: TextData, teacher) -> None:
        """Let an opened run's model be the teacher of this one's."""
        both = (data.tokenizer, teacher.tokenizer)
        distil(model, teacher.model, self.distil.temperature, self.distil.share, both)

    def show(self, model: GPT, data: TextData, folder: Path, step: int) -> str:
        """Write two texts from nothing to folder/step-NNNNNN.txt; return one of them."""
        return f"--- step {step} writes: " + self.write(
            model, data.tokenizer, [[data.tokenizer.eot]] * 2, 0.8, folder, step
        )

    def write(self, model: GPT, tokenizer, starts: list[list[int]], temperature: float,
              folder: Path, step: int) -> str:  # fmt: skip
        """Continue some starts, write them to folder/step-NNNNNN.txt, and return the first."""
        length = min(100, self.model.context_length // 2)
        sampling = generate.Sampling(
            max_new_tokens=length, temperature=temperature, stop_tokens=(tokenizer.eot,)
        )
        rows = generate.complete(model, [self.prompt_ids + ids for ids in starts], sampling)
        texts = [tokenizer.decode(ids[1:] + row) for ids, row in zip(starts, rows)]
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.txt"
        path.write_text("\n----\n".join(texts) + "\n", encoding="utf-8")
        return " ".join(texts[0].split())[:300]


@dataclass(frozen=True, kw_only=True)
class ChatRun(GPTRun):
    """Teach a GPT to answer."""

    data: ChatConfig = field(default_factory=ChatConfig)
    task: str = "chat"

    family: ClassVar[str] = "chat"
    base_family: ClassVar[str] = "gpt"

    def open_data(self) -> ChatData:
        if not self.data.tokenizer:
            raise ValueError("an untrained model cannot chat: begin from a run, --init-from RUN")
        m, c, ids = self.model, self.train, self.prompt_ids
        own = tokenizer.load(self.data.tokenizer)
        data = ChatData(self.data, own, m.context_length - len(ids), c.batch_size, c.seed)
        return PromptedData(data, ids) if ids else data

    def show(self, model: GPT, data: ChatData, folder: Path, step: int) -> str:
        """Answer the first questions of conversations held out; return one with its answer."""
        length = self.model.context_length // 2
        starts = [row.ids[: row.trained.argmax()].tolist()[-length:] for row in data.val[:8]]
        return f"--- step {step}: {self.write(model, data.tokenizer, starts, 0.0, folder, step)}"


def gpt_run(steps: int, batch_size: int, micro: int = 0, optim: dict | None = None, data=None,
            **model: Any) -> GPTRun:  # fmt: skip
    """A GPU-size run: a batch of batch_size rows, micro of them at a time."""
    every = max(1, steps // 20)
    train = TrainConfig(steps, batch_size, micro, eval_every=every, compile=True)
    optim_config = OptimConfig(**{"lr": 6e-4, "warmup_steps": steps // 50, **(optim or {})})
    text = data or TextConfig(tokenizer="bpe")
    return GPTRun(model=GPTConfig(**model), data=text, optim=optim_config, train=train)


SWEEP = "one of six runs for a scaling law, and a larger one to foretell"


def sweep_run(d_model: int, steps: int) -> GPTRun:
    """A small GPT on the standard library's code; 0.45 tokens a parameter, whatever the size."""
    model = GPTConfig(
        vocab_size=4096, context_length=256, n_layer=2, n_head=d_model // 32, d_model=d_model
    )
    return GPTRun(
        model=model,
        data=TextConfig(path="stdlib", val_fraction=0.03),
        optim=OptimConfig(lr=0.012, muon_lr=0.02, warmup_steps=10, decay_fraction=0.6),
        train=TrainConfig(steps=steps, batch_size=16, micro_batch_size=8, eval_every=0),
    )


GPT2 = {
    "vocab_size": 50257, "context_length": 1024, "position": "learned", "norm": "layernorm",
    "norm_eps": 1e-5, "mlp": "gelu", "bias": True, "tied": True, "qk_norm": False,
    "zero_init": False,
}  # fmt: skip
LLAMA = {"mlp": "swiglu", "qk_norm": False, "norm_eps": 1e-5, "zero_init": False}


@dataclass(frozen=True, kw_only=True)
class GPTClassifyRun(ClassifyRun):
    model: GPTConfig = field(default_factory=GPTConfig)

    family: ClassVar[str] = "gpt-classify"
    trunk_run: ClassVar[type[Run]] = GPTRun

    def open_data(self) -> TaskData:
        m, c, saved = self.model, self.train, self.data.tokenizer
        own = tokenizer.load(saved) if saved else tokenizer.ByteTokenizer()
        return labelled.texts(self.data, own, m.context_length, c.batch_size, c.seed)

    def show(self, model: Classifier, data: TaskData, folder: Path, step: int) -> str:
        """Write some held-out texts with their classes, and what was found; return the first."""
        rows, pairs = self.guesses(model, data)
        texts = [data.tokenizer.decode(data.inputs[SPLITS[1]][i].tolist()) for i in rows]
        folder.mkdir(exist_ok=True)
        lines = [f"{pair}\n{text}" for pair, text in zip(pairs, texts)]
        path = folder / f"step-{step:06d}.txt"
        path.write_text("\n----\n".join(lines) + "\n", encoding="utf-8")
        return f"--- step {step} finds: " + "; ".join(pairs[:3])


def write_texts(opened: base.OpenRun, options) -> None:
    """Print n texts, the first one while it is written, each with its prompt."""
    if options.prompt == "":
        raise ValueError("the prompt is empty; give some text, or no --prompt to begin a new one")
    if options.shots or options.examples:
        guess(opened, options)
        return
    if options.compile:
        compiled.compile_decoding(opened.model)
    stops = [stop.replace("\\n", "\n") for stop in options.stop]
    prompt = options.prompt or ""
    prompts = texts = [prompt] * (options.n or 1)
    print(prompt, end="", flush=True)
    front = prompt_ids(opened.model)
    for parts in generate.stream_text(
        opened.model, opened.tokenizer, prompts, options.sampling, stops, front
    ):
        texts = [text + part for text, part in zip(texts, parts)]
        print(parts[0], end="", flush=True)
    print()
    for text in texts[1:]:
        print(f"----\n{text}")
    if options.out:
        Path(options.out).write_text("\n----\n".join(texts) + "\n", encoding="utf-8")


def guess(opened: base.OpenRun, options) -> None:
    """The label of the prompt, after some labelled examples in the context: nothing is trained."""
    if not options.examples or not options.prompt:
        lacks = "--examples FILE" if not options.examples else "--prompt TEXT"
        raise ValueError(f"to guess a label of --prompt, as in --examples: {lacks} is not given")
    rows = label_files.text_rows(options.examples, Report(), "", label_files.LABEL_COLUMNS)
    names = np.array([row.labels for row in rows])
    order = np.random.default_rng(options.sampling.seed).permutation(len(rows))
    chosen = tasks.stratified(names, order)[: options.shots]
    shown, labels = [(rows[i].source, rows[i].labels[0]) for i in chosen], sorted(set(names[:, 0]))
    (found,) = likelihood.classify(
        opened.model, opened.tokenizer, shown, [options.prompt], labels, calibrate=True
    )
    if found.dropped:
        print(f"{found.dropped} of {len(shown)} examples do not fit into the context")
    print_shares(found.probabilities)


def talk(opened: base.OpenRun, options) -> None:
    """Answer the prompt; or what is typed, until the end of input."""
    if options.chat:
        chat.chat(opened.model, opened.tokenizer, input, sampling=options.sampling)
        return
    if not (options.prompt or "").strip():
        raise ValueError("say something: --prompt TEXT, or --chat to talk")
    messages = [{"role": "user", "content": options.prompt}]
    for part in chat.reply(opened.model, opened.tokenizer, messages, options.sampling):
        print(part, end="", flush=True)
    print()
