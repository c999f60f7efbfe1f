"""A bigram model: the next token depends on the last one alone."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from tinyfm.batches.text import TextConfig, TextData
from tinyfm.recipes.base import Preset, Run
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True)
class BigramConfig:  # the lesson: config and model, in tinyfm/bigram.py
    vocab_size: int = 257  # number of tokens
    context_length: int = 64  # tokens in a row


class Bigram(nn.Module):
    unit = "token"  # what the data are counted in
    outer = ("table",)  # trained by AdamW, not by Muon

    def __init__(self, config: BigramConfig):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)  # (last, next) -> logit

    def loss(self, batch, generators=None):
        tokens = batch["tokens"]  # (B, T + 1)
        logits = self.table(tokens[:, :-1])  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {}

    def example_batch(self, rows: int):  # for the calculators
        return {"tokens": torch.zeros(rows, self.config.context_length + 1, dtype=torch.long)}

    def generate(self, ids: list[int], n: int) -> list[int]:
        for _ in range(n):
            ids = [*ids, self.table.weight[ids[-1]].softmax(0).multinomial(1).item()]
        return ids


@dataclass(frozen=True, kw_only=True)
class BigramRun(Run):  # the recipe: run types and presets, in tinyfm/recipes/bigram.py
    model: BigramConfig = field(default_factory=BigramConfig)
    data: TextConfig = field(default_factory=lambda: TextConfig(tokenizer="bytes"))

    family = "bigram"
    SAMPLE_OPTIONS = frozenset({"prompt"})

    def build_model(self):
        return Bigram(self.model)

    def open_data(self):
        m, c = self.model, self.train
        return TextData.prepare(self.data, m.vocab_size, m.context_length, c.batch_size, c.seed)

    def show(self, model, data, folder, step):  # printed at each evaluation
        return data.tokenizer.decode(model.generate(data.tokenizer.encode("The"), 60))

    def sample(self, opened, options):  # python sample.py RUN
        ids = opened.tokenizer.encode(options.prompt or "The")
        print(opened.tokenizer.decode(opened.model.generate(ids, 60)))


RUNS = (BigramRun,)
optim = OptimConfig("adamw", lr=0.3, warmup_steps=0)
run = BigramRun(optim=optim, train=TrainConfig(steps=100, batch_size=64, eval_every=50))
PRESETS = {"bigram": Preset("which byte follows which: seconds", run)}
