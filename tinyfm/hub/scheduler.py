"""A U-Net with its noise schedule as diffusers keeps them: a pipeline folder.

It is a folder of folders, unet/ and scheduler/, or in the first published ones all in one. The
scheduler has no weights: scheduler_config.json says how noise grows, what the network predicts and
where a sampler stops. Its class is one of many samplers; which one to use is for `sample` to say.
Tables as in hub_diffusion.py. Left out: what matters in training only, and other ways to sample.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfm.common.files import load_tensors, save_tensors, write_json
from tinyfm.hub import diffusion as hub

FIELDS = """
diffusion_steps  num_train_timesteps
schedule         beta_schedule
beta_start       beta_start
beta_end         beta_end
prediction       prediction_type
clip             clip_sample
spacing          timestep_spacing
offset           steps_offset
end_clean        set_alpha_to_one
variance         variance_type
"""
WORDS = {  # ours -> theirs, where a value is named otherwise
    "schedule": {"linear": "linear", "scaled_linear": "scaled_linear",
                 "cosine": "squaredcos_cap_v2"},
    "prediction": {"eps": "epsilon", "x0": "sample", "v": "v_prediction"},
    "variance": {"small": "fixed_small", "large": "fixed_large"},
}  # fmt: skip
COMMON = {  # what diffusers takes where the file says nothing, and the classes where they differ
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "variance_type": "fixed_small", "steps_offset": 0,
    "clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading",
    "trained_betas": None, "thresholding": False, "rescale_betas_zero_snr": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_lu_lambdas": False, "use_flow_sigmas": False, "clip_sample_range": 1.0,
}  # fmt: skip
SCHEDULERS = {
    "DDPMScheduler": COMMON | {"clip_sample": True},
    "DDIMScheduler": COMMON | {"clip_sample": True},
    "PNDMScheduler": COMMON | {"set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": COMMON | {"timestep_spacing": "linspace"},
}
FLOW_FIELDS = """
diffusion_steps  num_train_timesteps
clip             clip_sample
"""
FLOW = {
    "num_train_timesteps": 1000, "clip_sample": False, "shift": 1.0, "use_dynamic_shifting": False,
    "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def read_scheduler(kind: str, raw: dict, config: Any) -> Any:
    """A DiffusionConfig with what scheduler_config.json says."""
    if kind == FLOW_SCHEDULER:
        values = hub.read_fields(raw, FLOW_FIELDS, FLOW, type(config))
        return replace(config, prediction="flow", **values)
    values = hub.read_fields(raw, FIELDS, SCHEDULERS[kind], type(config))
    for name, words in WORDS.items():
        ours = {theirs: ours for ours, theirs in words.items()}
        if values[name] not in ours:
            raise ValueError(f"{name} is {values[name]!r}; supported: {', '.join(ours)}")
        values[name] = ours[values[name]]
    return replace(config, **values)


def write_scheduler(config: Any) -> dict[str, Any]:
    """scheduler_config.json of a DiffusionConfig."""
    if config.prediction == "flow":
        return {"_class_name": FLOW_SCHEDULER} | hub.write_fields(config, FLOW_FIELDS, FLOW)
    kind = "DDPMScheduler" if config.end_clean else "DDIMScheduler"
    raw = hub.write_fields(config, FIELDS, SCHEDULERS[kind])
    raw |= {"beta_schedule": WORDS["schedule"][config.schedule]}
    raw |= {"prediction_type": WORDS["prediction"][config.prediction]}
    raw |= {"variance_type": WORDS["variance"][config.variance]}
    return {"_class_name": kind} | raw


def part(folder: Path, name: str) -> Path:
    """The folder of one part of a pipeline."""
    return folder / name if (folder / name).is_dir() else folder


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """The Diffusion in a pipeline's folder, in evaluation mode, on the CPU.

    Raises ValueError for what ours cannot express, or weights that do not fit.
    """
    folder = Path(folder)
    unet, path = part(folder, "unet"), part(folder, "scheduler") / "scheduler_config.json"
    config = hub.read(unet / "config.json", hub.UNETS, hub.read_unet, config_cls)
    config = hub.read(path, [*SCHEDULERS, FLOW_SCHEDULER], read_scheduler, config)
    learned = (folder / "null_context.safetensors").is_file()  # Stable Diffusion's is a text, ""
    config = replace(config, learned_null=learned)
    with torch.device("meta"):
        model = cls(config)
    model.unet = hub.load_weights(type(model.unet), config, hub.unet_names(config), unet, dtype)
    if config.d_context and learned:
        null = load_tensors(folder, "null_context")["null_context"]
        model.null_context = nn.Parameter(null.to(dtype))
    return model.eval()


def save(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder that `load` reads, and diffusers: as a pipeline, if there is no context."""
    folder, raw = Path(folder), write_scheduler(model.config)
    hub.save_unet(model.unet, folder / "unet", overwrite)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", raw)
    (folder / "null_context.safetensors").unlink(missing_ok=True)  # of a model overwritten
    if model.config.d_context and model.config.learned_null:
        save_tensors(folder, "null_context", {"null_context": model.null_context})
    if not model.config.d_context and model.config.prediction != "flow":
        kinds = {"unet": "UNet2DModel", "scheduler": raw["_class_name"]}
        parts = {name: ["diffusers", kind] for name, kind in kinds.items()}
        write_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **parts})
