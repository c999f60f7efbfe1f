"""The recipes there are: presets by name, run types by family.

A recipe is imported when it is needed, so that training a GPT loads no picture models.
"""

from __future__ import annotations

import dataclasses
import difflib
from importlib import import_module

from tinyfm.recipes.base import Preset, Run
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig

# One module a family. To add a family, add its recipe here.
RECIPES = (
    "tinyfm.recipes.gpt",
    "tinyfm.recipes.encoder",
    "tinyfm.recipes.seq2seq",
    "tinyfm.recipes.xlnet",
    "tinyfm.recipes.clip",
    "tinyfm.recipes.autoencoder",
    "tinyfm.recipes.ddpm",
    "tinyfm.recipes.text2image",
    "tinyfm.recipes.vq",
    "tinyfm.recipes.dalle",
    "tinyfm.recipes.vision_gpt",
    "tinyfm.recipes.codec",
    "tinyfm.recipes.musicgen",
)

# Other names of presets.
ALIASES = {"bert": "encoder", "vae": "autoencoder", "diffusion": "ddpm", "t2i": "text2image"}


def name_of(recipe: str) -> str:
    """What users call a recipe: tinyfm.recipes.vision_gpt is vision-gpt."""
    return recipe.rpartition(".")[2].replace("_", "-")


def likely_first(name: str) -> list[str]:
    """The recipes, those first whose own name `name` starts with: they probably define it."""
    return sorted(RECIPES, key=lambda recipe: not name.startswith(name_of(recipe)))


def all_presets() -> dict[str, Preset]:
    """All presets by name."""
    presets = {}
    for recipe in RECIPES:
        presets |= import_module(recipe).PRESETS
    return presets


def family_names() -> list[str]:
    """The names of the recipes, each of which is also the name of a preset."""
    return [name_of(recipe) for recipe in RECIPES]


def family_presets(name: str) -> dict[str, Preset]:
    """The presets of the recipe that defines `name`. Raises ValueError if none does."""
    for recipe in likely_first(name):
        presets = import_module(recipe).PRESETS
        if name in presets:
            return presets
    names = list(all_presets())
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no preset {name!r}; {hint}presets: {', '.join(names)}")


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError if there is none."""
    return family_presets(name)[name]


def find_run_type(family: str) -> type[Run]:
    """The run type of a family, such as "clip-classify". Raises ValueError if there is none."""
    known = []
    for recipe in likely_first(family):
        for run_type in import_module(recipe).RUNS:
            if run_type.family == family:
                return run_type
            known.append(run_type.family)
    raise ValueError(f"the run is of family {family!r}, which is none of {', '.join(known)}")


# ---- presets for runs that start from a trained model -------------------------------------------

FULL = OptimConfig(lr=4e-3, muon_lr=0.01, warmup_steps=10, decay_fraction=1)
PARTLY = OptimConfig(optimizer="adamw", lr=0.005, warmup_steps=10, weight_decay=0, decay_fraction=1)
ADAPTED = {  # the fewer weights are trained, the further each one has to move
    "full": FULL,
    "lora": PARTLY,
    "bias": dataclasses.replace(PARTLY, lr=0.02),
    "head": dataclasses.replace(PARTLY, lr=0.02),
    "prompt": dataclasses.replace(PARTLY, lr=0.03),
}


# Tasks that may not move far from their base.
NEAR = {
    "dpo": TrainConfig(steps=100, batch_size=32, eval_every=25),
    "grpo": TrainConfig(steps=100, batch_size=16, eval_every=25),
}

# The more rows a batch of questions has, the more passages each is compared with.
EMBED = TrainConfig(steps=300, batch_size=128, eval_every=100)


def scale_rates(optim: OptimConfig, factor: float) -> OptimConfig:
    """The same with other learning rates: the full ones would soon undo what was learnt before."""
    return dataclasses.replace(optim, lr=optim.lr * factor, muon_lr=optim.muon_lr * factor)


def get_preset(name: str, task: str = "", adapt: str = "full", init_from: str = "") -> Preset:
    """A preset, with the optimizer that suits the task, the adapter and the start.

    Raises ValueError for an unknown name, or a task that the family does not have.
    """
    preset = find_preset(name)
    run = preset.run
    if task:
        run_type = find_task(run.family, task)
        optim = ADAPTED.get(adapt, FULL)
        train = TrainConfig(steps=300, batch_size=32, eval_every=100)
        if task == "embed":
            train = EMBED
        if task in NEAR:
            optim = scale_rates(optim, 0.1)
            train = NEAR[task]
        return Preset(preset.about, run_type(model=run.model, optim=optim, train=train))
    if adapt == "full":
        optim = scale_rates(run.optim, 0.5) if init_from else run.optim
    else:
        optim = ADAPTED.get(adapt, FULL)
    if optim == run.optim:
        return preset
    return Preset(preset.about, dataclasses.replace(run, optim=optim))


def find_task(family: str, task: str) -> type[Run]:
    """The run type that fine-tunes a family for a task. Raises ValueError if there is none."""
    tasks = {}
    for recipe in likely_first(family):
        for run_type in import_module(recipe).RUNS:
            run = run_type()
            if run.task and run.base_family == family:
                tasks[run.task] = run_type
        if tasks:
            break
    if task not in tasks:
        known = f"it has {', '.join(tasks)}" if tasks else "it has none"
        raise ValueError(f"--task {task} is not for a run of family {family}: {known}")
    return tasks[task]
