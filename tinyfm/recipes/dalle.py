"""The recipe of DALL-E: a GPT that writes the codes of a VQ-VAE behind a text.

The VQ-VAE is another run, trained first if it is not given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from tinyfm.batches.latents import CodeData
from tinyfm.common import sheets
from tinyfm.common.config import RunPath
from tinyfm.dalle import DALLE, DALLEConfig
from tinyfm.generate import Sampling
from tinyfm.recipes.base import OpenRun, Preset, Run, Scores
from tinyfm.recipes.drawing import DrawingRun
from tinyfm.recipes.pictures import mean_metrics, part_of, save_sheet
from tinyfm.recipes.vq import PRESETS as VQ_PRESETS
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig
from tinyfm.vq import VQConfig


@dataclass(frozen=True, kw_only=True)
class DALLERun(DrawingRun):
    """Draw what a text says: a GPT over texts and the codes of a VQ-VAE."""

    model: DALLEConfig = field(default_factory=DALLEConfig)
    vq: RunPath = ""  # run that supplies the VQ-VAE (default: train one first)

    family: ClassVar[str] = "dalle"
    GUIDANCE: ClassVar[float] = 2.0
    SAMPLING: ClassVar[Sampling] = Sampling(temperature=0.5)  # if nothing else is asked for
    SHOWN_BY: ClassVar[dict[str, Any]] = {"sampling": SAMPLING}
    PARTS: ClassVar[tuple[str, ...]] = ("vq",)
    SAMPLE_OPTIONS = frozenset({
        "prompt", "seed", "guidance", "temperature", "top_k", "top_p", "min_p", "n", "out",
    })  # fmt: skip

    def build_model(self) -> DALLE:
        return DALLE(self.model)

    def open_data(self) -> CodeData:
        m, c = self.model, self.train
        sizes = (m.vq.image_size, m.vq.in_channels, m.text_vocab_size, m.text_length)
        data = CodeData.prepare(self.data, *sizes, c.batch_size, c.seed)
        data.val_images = self.data.val_images
        return data

    def score(self, model: DALLE, data: CodeData) -> Scores:
        """Nats per code and per token of the texts."""
        return {f"val_{name}": mean for name, mean in mean_metrics(self, model, data).items()}

    # ---- the part -------------------------------------------------------------------------------

    def with_parts(self, vq: VQConfig) -> DALLEConfig:
        """The model's config for this VQ-VAE."""
        return replace(self.model, vq=vq)

    def part_run(self, option: str, usual: Run, given: dict[str, Any]) -> Run:
        """The run that trains the VQ-VAE, of the sizes in --model.vq. usual: the preset of it."""
        model = dict(vars(self.model.vq))
        if self.data.color:
            model["in_channels"] = 3
        return part_of(self, option, usual, model, {})

    def take_parts(self, model: DALLE, vq: OpenRun) -> None:
        """Copy the weights of the trained VQ-VAE into the model."""
        model.vq.load_state_dict(vq.model.state_dict())

    # ---- the trained model ----------------------------------------------------------------------

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Draw n pictures of --prompt."""
        prompts = self.read_prompts(opened, options, self.model.text_length)
        how = self.measured_by(self.guidance_of(options))
        if options.sampling != Sampling(seed=options.sampling.seed):
            how["sampling"] = options.sampling
        sheet = sheets.prompted(opened.model, prompts, options.sampling.seed, **how)
        save_sheet(sheet._replace(titles=()), options)  # all have the same prompt

    def measured_by(self, guidance: float) -> dict[str, Any]:
        return {"sampling": self.SAMPLING, "guidance": guidance}


RUNS = (DALLERun,)

# Few codes, each of which sees its neighbourhood alone, rebuild a letter as readably as many that
# know of the whole picture, and are easier to write. Letters and digits that the judge reads as
# their prompt after 700 steps: 64 codes 76%, 128 codes 74%, 512 codes with attention 64%.
VQ = replace(VQ_PRESETS["vq"].run.model, n_code=64, attention=False)

PRESETS = {
    "dalle": Preset(
        "letters as a text says, code by code, with its VQ-VAE: a quarter of an hour in all",
        DALLERun(
            model=DALLEConfig(n_head=8, d_model=128, vq=VQ),
            optim=OptimConfig(lr=0.006, muon_lr=0.012, warmup_steps=50, decay_fraction=0.6),
            train=TrainConfig(steps=3600, batch_size=32, eval_every=900, compile=True),
        ),
    ),
    "dalle-vq": Preset(
        "the first part of it: as vq, with fewer codes", replace(VQ_PRESETS["vq"].run, model=VQ)
    ),
}
