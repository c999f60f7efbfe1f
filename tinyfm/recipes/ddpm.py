"""TODO."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tinyfm.batches.pairs import ImageData
from tinyfm.common import sheets
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.recipes import base
from tinyfm.recipes.base import ImageRun, Run, write_png
from tinyfm.recipes.classify import PictureClassifyRun


@dataclass(frozen=True, kw_only=True)
class DDPMRun(ImageRun):
    """Make pictures from noise."""

    model: DiffusionConfig = field(default_factory=DiffusionConfig)

    family: ClassVar[str] = "ddpm"
    SHOWN: ClassVar[int] = 32

    def __post_init__(self):
        if self.model.d_context:
            raise ValueError(
                f"d_context is {self.model.d_context}, but this run's pictures come without a "
                "context: set --model.d-context 0"
            )

    def build_model(self) -> Diffusion:
        return Diffusion(self.model)

    def score(self, model: Diffusion, data: ImageData) -> dict[str, float]:
        """The validation loss by quarters of the noise level, from little noise to most."""
        parts = self.parts_of_loss(model, data)
        return {f"val_{name}": value for name, value in parts.items()}

    def show(self, model: Diffusion, data: ImageData, folder: Path, step: int) -> str:
        """Draw samples."""
        steps = min(20, self.model.diffusion_steps)
        return self.save(sheets.samples(model, self.SHOWN, "dpm++", steps, seed=0), folder, step)


@dataclass(frozen=True, kw_only=True)
class DDPMClassifyRun(PictureClassifyRun):
    model: DiffusionConfig = field(default_factory=DiffusionConfig)

    family: ClassVar[str] = "ddpm-classify"
    trunk_run: ClassVar[type[Run]] = DDPMRun


def denoise(opened: base.OpenRun, options) -> None:
    """n pictures, or the film of how the first of them came about."""
    make, seed = sheets.film if options.film else sheets.samples, options.sampling.seed
    write_png(make(opened.model, options.n or 16, options.sampler, options.steps, seed), options)
