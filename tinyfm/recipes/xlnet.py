"""The recipe of XLNet: pretraining on tokens in random order, and classification of texts.

The loss is that of the tokens which are last in each order, as in training. It cannot be compared
with a GPT's (hidden.py). But XLNet is a language model in any order, and so in that of a GPT:
`python -m tinyfm.evaluate` also reads the held-out texts from left to right. These bits per byte
can be compared with a GPT's on the same data: every token but the first is predicted once, from
those in front of it. (A GPT trains on nothing else; here it is one order among many, and one in
which most tokens have little context.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.splits import HELD_OUT
from tinyfm.adapt.heads import Reader
from tinyfm.batches.permuted import PermutedConfig, PermutedData, draw_order
from tinyfm.common.figures import new_figure, save_figure
from tinyfm.evaluate.metrics import ratio_of_sums
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores
from tinyfm.recipes.classify import TextClassifyRun
from tinyfm.recipes.hidden import HiddenTokensRun, guess_hidden, shown, state_of_text
from tinyfm.tokenizer import Tokenizer
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig
from tinyfm.xlnet import XLNet, XLNetConfig, content_mask, picture, query_mask

MOST_DRAWN = 24  # tokens in a picture of masks

# ---- pretraining --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class XLNetRun(HiddenTokensRun):
    """Pretrain an XLNet on text."""

    model: XLNetConfig = field(default_factory=XLNetConfig)
    data: PermutedConfig = field(default_factory=PermutedConfig)

    family: ClassVar[str] = "xlnet"
    SAMPLE_OPTIONS = frozenset({"prompt", "n", "masks", "seed", "out"})
    ABOUT = About(
        use="It guesses words that are missing, in any order, and is a start for classifiers.",
        limits="Trained to guess one token in a few, it is a poor writer of whole texts. Its "
        "guesses follow its training text, also in what that says of people.",
    )

    def build_model(self) -> XLNet:
        return XLNet(self.model)

    def open_data(self) -> PermutedData:
        model, train = self.model, self.train
        return PermutedData.prepare(
            self.data,
            model.vocab_size,
            model.context_length,
            train.batch_size,
            train.seed,
            model.segments,
        )

    def mask_id(self, tokenizer: Tokenizer) -> int:
        """The end of a text: any id would do, as nothing looks at it."""
        return tokenizer.eot

    def logits_at(self, model: XLNet, tokens: Tensor, places: Tensor) -> Tensor:
        order = torch.zeros_like(tokens).index_fill(1, places, 1)
        return model(tokens, order, places[None])[0]

    def losses(self, model: XLNet, data: PermutedData) -> Scores:
        """The scores of `scores_of_documents`, and bits per byte from left to right, for both
        held-out texts.

        The intervals are over documents.
        """
        scores = super().losses(model, data)
        for name in HELD_OUT:
            split = data.split(name)
            batches = data.left_to_right(name, self.train.batch_size)
            bits = guess_hidden(model, batches).nats / math.log(2)  # of all tokens but the first
            by_document = np.add.reduceat(bits, split.starts)
            scores[f"{name}_left_to_right_bpb"] = ratio_of_sums(
                by_document, split.bytes, "documents"
            )
        return scores

    def sample_form(self, options: Any) -> tuple[str, frozenset[str]]:
        if options.masks:
            return "with --masks", self.SAMPLE_OPTIONS - {"n"}
        return "without --masks", HiddenTokensRun.SAMPLE_OPTIONS

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Fill the masks of --prompt; with --masks, draw what its tokens may look at."""
        if not options.masks:
            super().sample(opened, options)
            return
        words, order = self.ordered_words(opened.tokenizer, options)
        print(picture(words, order))
        if options.out:
            draw_masks(words, order, options.out)

    def ordered_words(self, tokenizer: Tokenizer, options: Any) -> tuple[list[str], list[int]]:
        """The tokens of --prompt, and an order of them that --seed draws.

        Raises ValueError unless they can be drawn in a line.
        """
        ids = tokenizer.encode(options.prompt or "")
        if not 2 <= len(ids) <= MOST_DRAWN:
            raise ValueError(
                f"--masks draws 2 to {MOST_DRAWN} tokens, and the prompt has {len(ids)}: give a "
                'sentence, as in --prompt "The cat sat on the mat" --masks'
            )
        rng = np.random.default_rng(options.sampling.seed)
        order = draw_order(np.ones(len(ids), dtype=bool), self.data, rng)
        return [shown(tokenizer, token) for token in ids], order.tolist()


def draw_masks(words: list[str], order: list[int], path: str) -> None:
    """Draw what both streams of each word may look at, as a picture file."""
    ranks = torch.tensor([order])
    places = torch.arange(len(words))[None]
    may_ask = ranks[0, :, None] > 0  # a given token has no query
    panels = {
        "content stream": content_mask(ranks)[0],
        "query stream,\nwhere predicted": query_mask(ranks, places)[0] & may_ask,
    }
    size = 2 + 0.4 * len(words)
    figure = new_figure(2 * size, size + 1)
    for axes, (name, may_look) in zip(figure.subplots(1, 2), panels.items()):
        axes.pcolormesh(may_look, cmap="Blues", vmax=1.5, edgecolors="lightgrey")
        axes.set_title(name)
        axes.set_xlabel("may look at")
        middles = [i + 0.5 for i in range(len(words))]
        axes.set_xticks(middles, words, rotation=60)
        axes.set_yticks(middles, [f"{word}  {rank}" for word, rank in zip(words, order)])
        axes.invert_yaxis()
        axes.set_aspect("equal")
    save_figure(figure, path)


# ---- classification -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class XLNetClassifyRun(TextClassifyRun):
    """Classify texts."""

    model: XLNetConfig = field(default_factory=XLNetConfig)

    family: ClassVar[str] = "xlnet-classify"
    trunk_run: ClassVar[type[Run]] = XLNetRun
    reader: ClassVar[Reader] = Reader(
        read=state_of_text,
        inputs=("tokens", "mask"),
        width=lambda config: config.d_model,
        # A text is one segment, and what all keys add to a score changes no softmax.
        unread=("head", "query_start", "segment_bias", "segment_embedding"),
    )


RUNS = (XLNetRun, XLNetClassifyRun)

# ---- presets ------------------------------------------------------------------------------------

PRESETS = {
    "xlnet": Preset(
        "XLNet in small: documentation in random orders, five minutes on one core",
        XLNetRun(
            # The tokenizer of the `gpt` preset: no mask is needed.
            model=XLNetConfig(
                vocab_size=4096, context_length=128, n_layer=2, n_head=4, d_model=256
            ),
            optim=OptimConfig(lr=0.012, muon_lr=0.02, warmup_steps=10, decay_fraction=0.6),
            train=TrainConfig(steps=600, batch_size=32, micro_batch_size=16, eval_every=200),
        ),
        usual="0.42, as one seed gave",
    ),
}
