"""What a run can do for a client, by the kind of its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyfm.adapt.heads import Classifier
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.autoencoder import Autoencoder
from tinyfm.clip import CLIP
from tinyfm.ddpm import Diffusion
from tinyfm.gpt import GPT
from tinyfm.text2image import TextToImage


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
        """Of complete, chat, embed, classify, search, draw (from a prompt) and sample (from none).

        A run that can chat can also complete.
        """
        model = self.model
        if isinstance(model, GPT):
            chat = {"chat"} if self.opened.run.task == "chat" else set()
            return frozenset({"complete", "embed"} | chat)
        if isinstance(model, CLIP) and model.config.loss != "simclr":
            return frozenset({"embed", "classify", "search"})
        if isinstance(model, Classifier):
            return frozenset({"classify"})
        if isinstance(model, TextToImage):
            return frozenset({"draw"})
        if isinstance(model, Diffusion):
            return frozenset({"sample"})
        if isinstance(model, Autoencoder):
            return frozenset({"rebuild"})
        return frozenset()


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
