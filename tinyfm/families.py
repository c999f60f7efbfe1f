"""Run types: what binds a family to the trainer.

A run type is a dataclass of configs, each an option on the command line, that knows how to build
its model, open its data, and what to measure and show as it learns. The trainer knows none of them.
What all have is in run.py. To add a family: its module, a data set, and its run type, in RUNS;
presets.py names runs.
"""

from tinyfm.image_families import AutoencoderRun, CLIPRun, DDPMRun, TextToImageRun
from tinyfm.task_families import (
    AutoencoderClassifyRun,
    CLIPClassifyRun,
    DDPMClassifyRun,
    GPTClassifyRun,
)
from tinyfm.text_families import ChatRun, GPTRun

PRETRAINING = (GPTRun, CLIPRun, AutoencoderRun, DDPMRun, TextToImageRun)
TASKS = (ChatRun, GPTClassifyRun, CLIPClassifyRun, AutoencoderClassifyRun, DDPMClassifyRun)
FAMILIES = {run.family: run for run in PRETRAINING + TASKS}
