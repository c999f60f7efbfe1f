"""What a run can do for a client, by the kind of its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyfm.adapt.embedder import Embedder
from tinyfm.adapt.heads import Classifier
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.autoencoder import Autoencoder
from tinyfm.clip import CLIP
from tinyfm.common.schema import shorten
from tinyfm.ddpm import Diffusion
from tinyfm.encoder import Encoder
from tinyfm.evaluate.zero_shot import unseen_words
from tinyfm.gpt import GPT
from tinyfm.serve.requests import BadRequest
from tinyfm.text2image import TextToImage
from tinyfm.tokenizer import encode_captions
from tinyfm.xlnet import XLNet


@dataclass(frozen=True)
class Served:
    """A run that the server offers. opened: an OpenRun of recipes/base.py."""

    name: str  # its id in the API, such as gpt
    folder: Path  # the run's folder, or that of one of its checkpoints, as it was given
    opened: Any
    front: tuple[int, ...] = field(default=())  # ids of its soft prompt

    @property
    def model(self) -> Any:
        return self.opened.model

    @property
    def tokenizer(self) -> Any:
        return self.opened.tokenizer

    @property
    def family(self) -> str:
        return self.opened.run.family

    @property
    def abilities(self) -> frozenset[str]:
        """Which of these it can do: complete, chat, embed, classify, search, draw (from a prompt),
        sample (draw without one), rebuild (encode a picture and decode it).

        A run that can chat can also complete.
        """
        model = self.model
        if isinstance(model, GPT):
            chat = {"chat"} if self.opened.run.task == "chat" else set()
            return frozenset({"complete", "embed"} | chat)
        if isinstance(model, CLIP) and model.config.loss != "simclr":
            return frozenset({"embed", "classify", "search"})
        if isinstance(model, Encoder | XLNet | Embedder):
            return frozenset({"embed"})
        if isinstance(model, Classifier):
            return frozenset({"classify"})
        if isinstance(model, TextToImage):
            return frozenset({"draw"})
        if isinstance(model, Diffusion):
            return frozenset({"sample"})
        if isinstance(model, Autoencoder):
            return frozenset({"rebuild"})
        return frozenset()


# What a run without an ability cannot do, and what to do instead.
ADVICE = {
    "complete": "continue texts: name a run of a GPT",
    "chat": "chat: use /v1/completions to continue a text, or teach a run to answer first, "
    "python train.py gpt --task chat --init-from RUN --out runs/chat",
    "embed": "embed texts: name a GPT, an encoder, an XLNet, a run of --task embed or a CLIP",
    "classify": "classify: name a run of --task classify, or a CLIP with labels",
    "search": "search pictures: name a CLIP that was trained with captions",
    "draw": "draw what a text says: name a text2image run",
}


def find_run(runs: dict[str, Served], name: str, *abilities: str) -> Served:
    """The run of that name, if it has one of the abilities; without a name, the first that has.

    Without abilities, any run will do.

    Raises BadRequest otherwise.
    """
    able = [run for run in runs.values() if not abilities or run.abilities & {*abilities}]
    named = ", ".join(runs)[:300]
    if name and name not in runs:
        raise BadRequest(
            f"there is no run {shorten(name)!r} here; there are: {named}",
            "model",
            404,
            "model_not_found",
        )
    if not name and not able:
        raise BadRequest(f"none of the runs here, {named}, can {ADVICE[abilities[0]]}", "model")
    run = runs[name] if name else able[0]
    if run not in able:
        raise BadRequest(f"the run {name} cannot {ADVICE[abilities[0]]}", "model")
    return run


def serve_run(opened: Any, path: str, taken: set[str]) -> Served:
    """The run under the shortest name that is not taken: gpt, gpt/step-000300, or its path."""
    folder = Path(path)
    name = folder.resolve().name
    if name.startswith("step-"):
        name = f"{folder.resolve().parent.name}/{name}"
    if name in taken:
        name = folder.as_posix()
    number = 2
    while name in taken:
        name = f"{folder.as_posix()}:{number}"
        number += 1
    return Served(name, folder, opened, tuple(prompt_ids(opened.model)))


def warn_about_texts(run: Served, texts: list[str], warnings: list[str]) -> None:
    """Warn about texts of which a CLIP, or a text2image run, cannot read all, or knows no word."""
    config = getattr(run.model.config, "clip", run.model.config)
    _, cut = encode_captions(run.tokenizer, texts, config.context_length)
    if cut:
        limit = f"{config.context_length} tokens, the most that {run.name} reads"
        warnings.append(f"{cut} of {len(texts)} texts were cut to {limit}")
    unseen = unseen_words(run.opened.folder, run.tokenizer, texts)
    if unseen:
        words = ", ".join(repr(shorten(word)) for word in unseen[:20])
        warnings.append(f"no training caption has {words}")
