"""A U-Net with its noise schedule in the layout of diffusers: the folder of a pipeline.

The folder has two parts, unet/ and scheduler/; the first published ones have all files in one
folder. The scheduler has no weights. Its scheduler_config.json says how the noise grows, what the
network predicts, and where a sampler stops. Its class is one of many samplers; our class is the
same for all of them, and `sample` chooses the sampler. So of a sampler's file the noise schedule is
read, and where its levels lie.

The tables are read as in diffusion.py. Left out: settings that matter in training only, and other
ways to sample.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfm.common.files import load_tensors, save_tensors, write_json
from tinyfm.hub import diffusion, layout

# ---- settings -----------------------------------------------------------------------------------

FIELD_TABLE = """
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
VALUES = {  # our field -> {our value: theirs}, where the values have other names
    "schedule": {
        "linear": "linear",
        "scaled_linear": "scaled_linear",
        "cosine": "squaredcos_cap_v2",
    },
    "prediction": {"eps": "epsilon", "x0": "sample", "v": "v_prediction"},
    "variance": {"small": "fixed_small", "large": "fixed_large"},
}
DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "steps_offset": 0,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
LINSPACE = {"timestep_spacing": "linspace"}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012}  # of Stable Diffusion
SCHEDULERS = {  # class of diffusers -> its defaults
    "DDPMScheduler": DEFAULTS | {"clip_sample": True},
    "DDPMParallelScheduler": DEFAULTS | {"clip_sample": True},
    "DDIMScheduler": DEFAULTS | {"clip_sample": True},
    "DDIMParallelScheduler": DEFAULTS | {"clip_sample": True},
    "DDIMInverseScheduler": DEFAULTS | {"clip_sample": True},
    "PNDMScheduler": DEFAULTS | {"set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": DEFAULTS | LINSPACE,
    "DPMSolverMultistepInverseScheduler": DEFAULTS | LINSPACE,
    "DPMSolverSinglestepScheduler": DEFAULTS,
    "DEISMultistepScheduler": DEFAULTS | LINSPACE,
    "UniPCMultistepScheduler": DEFAULTS | LINSPACE,
    "SASolverScheduler": DEFAULTS | LINSPACE,
    "EulerDiscreteScheduler": DEFAULTS | LINSPACE,
    "EulerAncestralDiscreteScheduler": DEFAULTS | LINSPACE,
    "LMSDiscreteScheduler": DEFAULTS | LINSPACE,
    "HeunDiscreteScheduler": DEFAULTS | LINSPACE | LATENT,
    "KDPM2DiscreteScheduler": DEFAULTS | LINSPACE | LATENT,
    "KDPM2AncestralDiscreteScheduler": DEFAULTS | LINSPACE | LATENT,
    "LCMScheduler": DEFAULTS | LATENT | {"beta_schedule": "scaled_linear"},
    "TCDScheduler": DEFAULTS | LATENT | {"beta_schedule": "scaled_linear"},
}
# Settings of one sampler, which say nothing of the noise in training. Ours do not follow them.
SAMPLER_FIELDS = {
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "clip_sample_range": 1.0,
}

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
FLOW_FIELD_TABLE = """
diffusion_steps  num_train_timesteps
clip             clip_sample
"""
FLOW_DEFAULTS = {
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


def warn_of_sampler(kind: str, raw: dict) -> None:
    """Warn of settings of a sampler that ours do not have."""
    others = [f for f, usual in SAMPLER_FIELDS.items() if raw.get(f, usual) not in (usual, None)]
    if others:
        warnings.warn(
            f"the {kind} of this folder samples with {', '.join(others)}, which the samplers here "
            "do not have; the noise schedule is read",
            stacklevel=2,
        )


def read_scheduler(kind: str, raw: dict, config: Any) -> Any:
    """Return the DiffusionConfig `config` with the settings of a scheduler_config.json."""
    if kind == FLOW_SCHEDULER:
        values = diffusion.read_settings(raw, FLOW_FIELD_TABLE, FLOW_DEFAULTS, type(config))
        return replace(config, prediction="flow", **values)
    warn_of_sampler(kind, raw)
    values = diffusion.read_settings(raw, FIELD_TABLE, SCHEDULERS[kind], type(config))
    for field, names in VALUES.items():
        ours = {theirs: our_value for our_value, theirs in names.items()}
        if values[field] not in ours:
            layout.refuse(field, values[field], ", ".join(ours))
        values[field] = ours[values[field]]
    return replace(config, **values)


def write_scheduler(config: Any) -> dict[str, Any]:
    """Return scheduler_config.json of a DiffusionConfig."""
    if config.prediction == "flow":
        raw = diffusion.write_settings(config, FLOW_FIELD_TABLE, FLOW_DEFAULTS)
        return {"_class_name": FLOW_SCHEDULER} | raw
    kind = "DDPMScheduler" if config.end_clean else "DDIMScheduler"
    raw = diffusion.write_settings(config, FIELD_TABLE, SCHEDULERS[kind] | SAMPLER_FIELDS)
    raw["beta_schedule"] = VALUES["schedule"][config.schedule]
    raw["prediction_type"] = VALUES["prediction"][config.prediction]
    raw["variance_type"] = VALUES["variance"][config.variance]
    return {"_class_name": kind} | raw


# ---- in and out ---------------------------------------------------------------------------------


def part_folder(folder: Path, name: str) -> Path:
    """Return the folder of one part of a pipeline: its subfolder, or else the folder itself."""
    if (folder / name).is_dir():
        return folder / name
    return folder


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the Diffusion of a pipeline's folder, in evaluation mode, on the CPU.

    cls and config_cls: Diffusion and DiffusionConfig. Raises ValueError if the settings cannot be
    expressed, or if the weights do not fit them.
    """
    folder = Path(folder)
    unet_folder = part_folder(folder, "unet")
    scheduler_path = part_folder(folder, "scheduler") / "scheduler_config.json"

    # The config: fields of the network, then those of the noise schedule.
    config = diffusion.read(
        unet_folder / "config.json", diffusion.UNETS, diffusion.read_unet, config_cls
    )
    kinds = [*SCHEDULERS, FLOW_SCHEDULER]
    config = diffusion.read(scheduler_path, kinds, read_scheduler, config)
    # Without its file, the null context is that of an empty text, as in Stable Diffusion.
    learned_null = (folder / "null_context.safetensors").is_file()
    config = replace(config, learned_null=learned_null)

    # The weights.
    n_tensors = len(layout.read_tensors(unet_folder, diffusion.WEIGHTS))
    model = layout.build_on_meta(cls, config, folder, n_tensors)
    names = diffusion.unet_names(config)
    model.unet = diffusion.load_weights(type(model.unet), config, names, unet_folder, dtype)
    if config.d_context and learned_null:
        null = load_tensors(folder, "null_context")["null_context"]
        model.null_context = nn.Parameter(null.to(dtype))
    return model.eval()


def save(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder for `load` and, if the model has no context, for diffusers' DDPMPipeline.

    That pipeline takes any scheduler: it follows a flow by Euler's method, from noise level 1 to 0.
    Raises ValueError if diffusers cannot express the U-Net, or if the folder holds a model already,
    unless overwrite.
    """
    folder = Path(folder)
    config = model.config
    raw = write_scheduler(config)
    layout.check_overwrite(folder, overwrite)
    diffusion.save_unet(model.unet, folder / "unet", overwrite)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", raw)
    # The model that is overwritten may have had them.
    (folder / "null_context.safetensors").unlink(missing_ok=True)
    (folder / "model_index.json").unlink(missing_ok=True)
    if config.d_context and config.learned_null:
        save_tensors(folder, "null_context", {"null_context": model.null_context})
    if not config.d_context:
        index = {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", raw["_class_name"]],
        }
        write_json(folder / "model_index.json", index)
