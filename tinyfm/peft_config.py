"""adapter_config.json of Hugging Face's peft: what of it our LoRA computes; the rest is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tinyfm.common.files import read_json
from tinyfm.hub.layout import refuse

CONFIG = "adapter_config.json"

# Fields with a say here, or none: which layers are meant shows in the tensors, and the settings of
# other kinds count for nothing unless a field that turns them on is set.
KNOWN = """
peft_type bias init_lora_weights r lora_alpha lora_dropout rank_pattern alpha_pattern
task_type base_model_name_or_path target_modules exclude_modules layers_to_transform layers_pattern
fan_in_fan_out inference_mode revision auto_mapping peft_version runtime_config
megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config
"""
ALLOWED = {  # some ways to begin, such as pissa, change the base
    "peft_type": ("LORA",), "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}  # fmt: skip


def target_modules(found: set[str], every: set[str]) -> list[str]:
    """What says which layers are adapted: the ends of their names, or their names where an end is
    also that of another."""
    ends = {name.split(".")[-1] for name in found}
    return sorted(ends if found == {n for n in every if n.split(".")[-1] in ends} else found)


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value for a layer: of the first pattern that ends its name, as peft looks them up."""
    found = (v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ValueError for what our LoRA does not compute."""
    raw = read_json(folder / CONFIG)
    try:
        if not isinstance(raw, dict):
            refuse("the file", raw, "an object")
        raw = {"bias": "none", "init_lora_weights": True, "lora_dropout": 0.0} | raw
        for field, values in ALLOWED.items():
            if raw.get(field) not in values:
                refuse(field, raw.get(field), " or ".join(map(repr, values)))
        for field in sorted(raw.keys() - {*KNOWN.split()}):
            if raw[field]:
                refuse(field, raw[field], "a LoRA without it")
        for field, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
            if type(raw.get(field)) not in kinds or raw[field] <= 0:
                refuse(field, raw.get(field), "a number above 0")
        return raw
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
