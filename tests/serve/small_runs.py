"""Small runs with random weights, and a server that offers them: shared by the tests of serve/."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import random_weights

from tinyfm.adapt.embedder import Embedder, EmbedderConfig
from tinyfm.adapt.heads import Classifier
from tinyfm.adapt.soft_prompt import add_prompt
from tinyfm.autoencoder import AutoencoderConfig
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.base import OpenRun
from tinyfm.recipes.clip import CLIPClassifyRun
from tinyfm.recipes.encoder import EncoderEmbedRun
from tinyfm.recipes.gpt import GPTClassifyRun
from tinyfm.serve.__main__ import Server, listen, make_config
from tinyfm.serve.app import create_app
from tinyfm.serve.engine import Engine
from tinyfm.serve.families import Served, serve_run
from tinyfm.serve.guard import Settings
from tinyfm.text2image import TextToImage, TextToImageConfig
from tinyfm.tokenizer import ByteTokenizer

TEXT = GPTConfig(vocab_size=257, context_length=64, n_layer=1, n_head=2, d_model=32)
WORDS = EncoderConfig(vocab_size=258, context_length=64, n_layer=1, n_head=2, d_model=32)
PICTURE = CLIPConfig(
    image_size=8, channels=3, patch_size=4, image_layer=1, image_width=16, image_head=2,
    vocab_size=257, context_length=24, text_layer=1, text_width=16, text_head=2, embed_dim=16,
)  # fmt: skip
NOISE = DiffusionConfig(
    image_size=8, patch_size=1, in_channels=3, channels=(8, 16), groups=4, attend=(False, True),
    n_head=2,
)  # fmt: skip
DRAWING = TextToImageConfig(
    DiffusionConfig(
        image_size=4, in_channels=2, channels=(8, 16), groups=4, attend=(False, True), n_head=2,
        d_context=16, prediction="flow", clip=False,
    ),
    AutoencoderConfig(image_size=8, in_channels=3, channels=(8, 16), groups=4, latent_channels=2),
    PICTURE,
)  # fmt: skip
CLASSES = {"label": ("good", "bad"), "tone": ("calm", "angry", "glad")}


def never_end(head: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
    """A forward hook of a head: the end-of-text token is never drawn, so that texts last."""
    end = torch.arange(logits.size(-1)) == ByteTokenizer().eot
    return logits.masked_fill(end, -1e4)


def build_gpt() -> GPT:
    model = GPT(TEXT)
    model.head.register_forward_hook(never_end)
    return model


def build_soft() -> GPT:
    model = build_gpt()
    add_prompt(model, 3)
    return model


def build_reviews() -> Classifier:
    return Classifier(GPT(TEXT), CLASSES, GPTClassifyRun.reader)


def build_scripts() -> Classifier:
    return Classifier(CLIP(PICTURE), CLASSES, CLIPClassifyRun.reader)


def build_embedder() -> Embedder:
    settings = EmbedderConfig(widths=(8,), length=16)
    return Embedder(Encoder(WORDS), settings, EncoderEmbedRun.reader, EncoderEmbedRun.states)


BUILDERS = {
    "gpt": build_gpt,
    "chat": build_gpt,
    "soft": build_soft,
    "encoder": lambda: Encoder(WORDS),
    "embedder": build_embedder,
    "clip": lambda: CLIP(PICTURE),
    "reviews": build_reviews,
    "scripts": build_scripts,
    "ddpm": lambda: Diffusion(NOISE),
    "text2image": lambda: TextToImage(DRAWING),
}


def build_runs(folder: Path, names: tuple[str, ...] = tuple(BUILDERS)) -> list[Served]:
    """Runs of these names, as the command would open them."""
    runs = []
    for name in names:
        checkpoint = folder / name / "step-000001"
        checkpoint.mkdir(parents=True)
        (checkpoint / "templates.json").write_text(json.dumps(["a {}"]), encoding="utf-8")
        model = random_weights(BUILDERS[name])
        tokenizer = ByteTokenizer()
        if name == "text2image":
            model.tokenizer = tokenizer
        run = SimpleNamespace(family=name, task="chat" if name == "chat" else "")
        opened = OpenRun(run, model, tokenizer, checkpoint, {"step": 1}, "model")
        runs.append(serve_run(opened, str(folder / name), set()))
    return runs


def start_engine(runs: list[Served]) -> Engine:
    engine = Engine(max_rows=8, max_waiting=64)
    for run in runs:
        if "complete" in run.abilities:
            engine.add(run.name, run.model, run.tokenizer)
    return engine


@contextlib.contextmanager
def serving(runs: list[Served], settings: Settings | None = None, **more) -> Iterator:
    """A server in a thread; yields it, with its `url`, `engine` and `runs`."""
    torch.set_num_threads(1)
    engine = start_engine(runs)
    app = create_app(runs, engine, settings, **more)
    listening = listen("127.0.0.1", 0)
    server = Server(make_config(app, grace=5), engine, grace=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    server.port = listening.getsockname()[1]
    server.url = f"http://127.0.0.1:{server.port}"
    server.runs = {run.name: run for run in runs}
    try:
        yield server
    finally:
        server.should_exit = True
        engine.close(5)
        thread.join(20)
