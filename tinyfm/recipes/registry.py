"""Named runs: what is trained on what, how, and what to expect of it.

A preset is a value of a run type (families.py).
"""

from __future__ import annotations

import dataclasses
import difflib

from tinyfm.autoencoder import AutoencoderConfig
from tinyfm.batches.pairs import ImageConfig, PairConfig
from tinyfm.batches.text import TextConfig
from tinyfm.clip import CLIPConfig
from tinyfm.ddpm import DiffusionConfig
from tinyfm.gpt import GPTConfig
from tinyfm.recipes.autoencoder import AutoencoderClassifyRun, AutoencoderRun, walk
from tinyfm.recipes.base import Preset
from tinyfm.recipes.classify import classify
from tinyfm.recipes.clip import CLIPClassifyRun, CLIPRun, sample_clip
from tinyfm.recipes.ddpm import DDPMClassifyRun, DDPMRun, denoise
from tinyfm.recipes.gpt import (
    GPT2,
    LLAMA,
    SWEEP,
    ChatRun,
    GPTClassifyRun,
    GPTRun,
    gpt_run,
    sweep_run,
    talk,
    write_texts,
)
from tinyfm.recipes.text2image import LETTERS, TextToImageRun, illustrate
from tinyfm.text2image import TextToImageConfig
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig

PRESETS = {
    "gpt": Preset(
        "a small GPT on the documentation of Python, numpy and torch: two minutes on two cores",
        GPTRun(
            # Wide and shallow: on a CPU a wider product costs little more, another layer a lot.
            model=GPTConfig(vocab_size=4096, context_length=256, n_layer=2, n_head=2, d_model=256),
            data=TextConfig(val_fraction=0.03),  # all of it is read at each evaluation
            optim=OptimConfig(lr=0.012, muon_lr=0.02, warmup_steps=10, decay_fraction=0.6),
            train=TrainConfig(steps=300, batch_size=16, micro_batch_size=8, eval_every=100),
        ),
        usual="1.65 to 1.66, as three seeds gave",
    ),
    "clip": Preset(
        "images and captions in one space, on letters and symbols: ten minutes on two cores",
        CLIPRun(
            # A batch alone is soon too easy: further rivals, once weights move slowly.
            model=CLIPConfig(rivals="all", memory=2048, memory_after=1800),
            data=PairConfig(neighbours=16),  # hard to tell apart, so there is more to learn
            optim=OptimConfig(lr=0.006, muon_lr=0.01, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=3000, batch_size=256, eval_every=1000),
        ),
        usual="0.81 to 0.86, as four runs gave",
    ),
    "autoencoder": Preset(
        "pictures into a quarter as many numbers and back, on letters and symbols: three minutes",
        AutoencoderRun(
            model=AutoencoderConfig(beta_warmup_steps=100),
            optim=OptimConfig(lr=2e-3, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=500, batch_size=32, eval_every=125),
        ),
        usual="4.0, as one seed gave",
    ),
    "ddpm": Preset(
        "letters out of noise: six and a half minutes on two cores",
        DDPMRun(
            model=DiffusionConfig(patch_size=2, n_block=1),
            data=ImageConfig(path="letters"),
            # Muon for kernels as well: after half the steps the loss is what AdamW's is at the end.
            optim=OptimConfig(lr=1e-3, kernels=True, warmup_steps=50, ema_half_life=100),
            train=TrainConfig(steps=2000, batch_size=32, eval_every=500),
        ),
        usual="0.11, as one seed gave",
    ),
    "text2image": Preset(
        "letters as a text says, with its text tower and autoencoder: thirteen minutes in all",
        TextToImageRun(
            model=TextToImageConfig(
                diffusion=DiffusionConfig(image_size=8, in_channels=4, channels=(64, 128),
                                          attend=(False, True), n_block=1, d_context=128,
                                          prediction="flow", clip=False),
                **LETTERS,
            ),
            optim=OptimConfig(lr=2e-3, warmup_steps=50, ema_half_life=100, decay_fraction=0.5),
            train=TrainConfig(steps=2400, batch_size=64, eval_every=800),
        ),
        usual="0.19 to 0.22, as three seeds gave",
    ),
    "text2image-autoencoder": Preset(
        "the first part of it: as autoencoder, on fewer pictures for fewer steps",
        AutoencoderRun(
            model=LETTERS["autoencoder"],
            data=ImageConfig(path="letters"),
            optim=OptimConfig(lr=2e-3, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=250, batch_size=32, eval_every=125),
        ),
    ),
    "text2image-clip": Preset(
        "the second part: as clip, on fewer pictures for fewer steps",
        CLIPRun(
            model=LETTERS["clip"],
            data=PairConfig(path="letters", neighbours=16),
            optim=OptimConfig(lr=0.006, muon_lr=0.01, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=600, batch_size=256, eval_every=300),
        ),
    ),
    **{
        f"sweep-{name}": Preset(f"width {d_model}: {SWEEP}", sweep_run(d_model, steps))
        for name, d_model, steps in (
            ("1", 64, 69), ("2", 96, 111), ("3", 128, 159), ("4", 160, 214), ("5", 192, 270),
            ("6", 224, 336), ("large", 352, 660),
        )
    },
    "gpt2-124m": Preset(
        "GPT-2's smallest size, batches of half a million tokens: for GPUs",
        gpt_run(20_000, 512, 32, n_layer=12, n_head=12, d_model=768, **GPT2),
    ),
    "gpt2-1.5b": Preset(
        "GPT-2's largest size, batches of a million tokens: for GPUs",
        gpt_run(50_000, 1024, 8, {"lr": 2e-4}, n_layer=48, n_head=25, d_model=1600, **GPT2),
    ),
    "llama-1b": Preset(
        "the shape of Llama 3.2 1B, batches of two million tokens: for GPUs",
        gpt_run(50_000, 512, 4, {"lr": 3e-4}, n_layer=16, n_head=32, n_kv_head=8, d_model=2048,
                d_ff=8192, vocab_size=128_256, context_length=4096, rope_theta=500_000.0,
                tied=True, **LLAMA),
    ),
}  # fmt: skip


# ---- what is made of a trained model -------------------------------------------------------------

FULL = OptimConfig(lr=4e-3, muon_lr=0.01, warmup_steps=10, decay_fraction=1)
PARTLY = OptimConfig(optimizer="adamw", lr=0.005, warmup_steps=10, weight_decay=0, decay_fraction=1)
ADAPTED = {  # the fewer numbers are trained, the further each has to go
    "full": FULL,
    "lora": PARTLY,
    "bias": dataclasses.replace(PARTLY, lr=0.02),
    "head": dataclasses.replace(PARTLY, lr=0.02),
    "prompt": dataclasses.replace(PARTLY, lr=0.03),
}


def go_on(optim: OptimConfig) -> OptimConfig:
    """Half the rates: at the whole ones what was learnt is soon lost, before it can be of use."""
    return dataclasses.replace(optim, lr=optim.lr / 2, muon_lr=optim.muon_lr / 2)


def get_preset(name: str, task: str = "", adapt: str = "full", init_from: str = "") -> Preset:
    """A named run; or one that begins from a trained model, all of it or a part, or for a task.

    Raises ValueError for a name that there is not, or a task that is not for its family.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no preset {name!r}; {hint}presets: {', '.join(PRESETS)}")
    preset, optim = PRESETS[name], ADAPTED.get(adapt, FULL)
    if not task:
        if adapt == "full":
            optim = go_on(preset.run.optim) if init_from else preset.run.optim
        if optim == preset.run.optim:
            return preset
        return Preset(preset.about, dataclasses.replace(preset.run, optim=optim))
    fitting = [kind for kind in TASKS if kind().base_family == preset.run.family]
    for kind in fitting:
        if kind.task == task:
            train = TrainConfig(steps=300, batch_size=32, eval_every=100)
            return Preset(preset.about, kind(model=preset.run.model, optim=optim, train=train))
    known = f"it has {', '.join(kind.task for kind in fitting)}" if fitting else "it has none"
    raise ValueError(f"--task {task} is not for a run of family {preset.run.family}: {known}")


# ---- GPT: continue a text -----------------------------------------------------------------------

# ---- CLIP, autoencoder, diffusion: find.py and draw.py do the work ------------------------------


# FOLDED: merge this into the module's docstring
# Run types: what binds a family to the trainer.
#
# A run type is a dataclass of configs, each an option on the command line, that knows how to build
# its model, open its data, and what to measure and show as it learns. The trainer knows none of them.
# What all have is in run.py. To add a family: its module, a data set, and its run type, in RUNS;
# presets.py names runs.


# FOLDED: merge this into the module's docstring
# What sample.py does with a run, one function a family: text, names, pictures.
#
# `options` are sample.py's. All errors of a user are ValueErrors.


PRETRAINING = (GPTRun, CLIPRun, AutoencoderRun, DDPMRun, TextToImageRun)
TASKS = (ChatRun, GPTClassifyRun, CLIPClassifyRun, AutoencoderClassifyRun, DDPMClassifyRun)
FAMILIES = {run.family: run for run in PRETRAINING + TASKS}


SAMPLERS = {
    "gpt": write_texts, "chat": talk, "clip": sample_clip, "autoencoder": walk, "ddpm": denoise,
    "text2image": illustrate,
    **{f"{trunk}-classify": classify for trunk in ("gpt", "clip", "autoencoder", "ddpm")},
}  # fmt: skip
