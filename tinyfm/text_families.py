"""Run types of language models: what binds pretraining and chat to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tinyfm import generate, tokenizer
from tinyfm.adapt.distill import DistilConfig, distil
from tinyfm.adapt.soft_prompt import PromptedData
from tinyfm.batches.chat import ChatConfig, ChatData
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.run import Run


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
