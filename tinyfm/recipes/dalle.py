"""The recipe of DALL-E: a GPT that writes the codes of a VQ-VAE behind a text.

The VQ-VAE is a run of its own family, trained first if it is not given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from tinyfm.batches.latents import CodeData, LatentConfig
from tinyfm.batches.pairs import GLYPHS
from tinyfm.common import sheets
from tinyfm.common.config import RunPath
from tinyfm.dalle import DALLE, DALLEConfig
from tinyfm.evaluate import generated, judge
from tinyfm.generate import Sampling
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores
from tinyfm.recipes.pictures import (
    check_rows,
    mean_metrics,
    part_of,
    save_sheet,
    save_step_sheet,
    spread_rows,
    warn_if_cut,
    warn_if_unseen,
    write_words,
)
from tinyfm.recipes.vq import PRESETS as VQ_PRESETS
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig
from tinyfm.vq import VQConfig


@dataclass(frozen=True, kw_only=True)
class DALLERun(Run):
    """Draw what a text says: a GPT over texts and the codes of a VQ-VAE."""

    model: DALLEConfig = field(default_factory=DALLEConfig)
    data: LatentConfig = field(default_factory=LatentConfig)
    vq: RunPath = ""  # run that supplies the VQ-VAE (default: train one first)

    family: ClassVar[str] = "dalle"
    PARTS: ClassVar[tuple[str, ...]] = ("vq",)
    SAMPLE_OPTIONS = frozenset({
        "prompt", "seed", "guidance", "temperature", "top_k", "top_p", "min_p", "n", "out",
    })  # fmt: skip
    SHOWN: ClassVar[int] = 32
    GUIDANCE: ClassVar[float] = 3.0
    ABOUT = About(
        task="text-to-image",
        library="tinyfm",
        use="It draws what a caption of the kind in its training data says.",
        limits="It knows the words of its captions alone. Drawings may be wrong, or near to a "
        "training picture.",
    )

    def build_model(self) -> DALLE:
        return DALLE(self.model)

    def open_data(self) -> CodeData:
        m, c = self.model, self.train
        sizes = (m.vq.image_size, m.vq.in_channels, m.text_vocab_size, m.text_length)
        data = CodeData.prepare(self.data, *sizes, c.batch_size, c.seed)
        data.val_images = self.data.val_images
        return data

    def get_ready(self, model: DALLE, data: CodeData) -> None:
        model.tokenizer = data.tokenizer
        if self.data.cache_latents:
            data.encode_all(model, self.data)

    def write_files(self, folder: Path, data: CodeData) -> None:
        super().write_files(folder, data)
        if not self.init_from:  # the words of the base's captions are not known
            write_words(folder, data)

    def score(self, model: DALLE, data: CodeData) -> Scores:
        """Nats per code and per token of the texts."""
        return {f"val_{name}": mean for name, mean in mean_metrics(self, model, data).items()}

    def show(self, model: DALLE, data: CodeData, folder: Path, step: int) -> str:
        """Draw captions of the validation split."""
        rows = spread_rows(len(data.val.labels), self.SHOWN)
        prompts = [data.val.captions[i][0] for i in rows]
        sheet = sheets.prompted(model, prompts, guidance=self.GUIDANCE)
        return save_step_sheet(sheet, folder, step)

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

    def check_parts(self) -> None:
        check_rows(self)

    def take_parts(self, model: DALLE, vq: OpenRun) -> None:
        """Copy the weights of the trained VQ-VAE into the model."""
        model.vq.load_state_dict(vq.model.state_dict())

    # ---- the trained model ----------------------------------------------------------------------

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Draw n pictures of --prompt."""
        if not (options.prompt or "").strip():
            raise ValueError('say what to draw: --prompt "sans bold latin small letter a"')
        opened.model.tokenizer = opened.tokenizer
        warn_if_cut(opened.tokenizer, [options.prompt], self.model.text_length)
        if not options.adapter:  # an adapter may know further words
            warn_if_unseen(opened, [options.prompt])
        prompts = [options.prompt] * (options.n or 8)
        how = {"sampling": options.sampling, "guidance": options.guidance}
        sheet = sheets.prompted(opened.model, prompts, options.sampling.seed, **how)
        save_sheet(sheet._replace(titles=()), options)  # all have the same prompt

    def can_draw(self) -> bool:
        return self.data.path in GLYPHS

    def measure(self, opened: OpenRun, model: DALLE, data: CodeData, options: Any) -> Scores:
        """Share of drawings that a judge reads as their prompt, for data that it can read.

        --picture shows characters that were held out, drawn by the trained model.
        """
        if self.data.path not in GLYPHS:
            return {}
        judged_by = judge.config_of(options.judge_steps)
        how = {"sampling": Sampling(), "guidance": options.guidance}
        scores = generated.measure(model, data, self.data, how, judged_by, options.samples)
        if options.picture and model is opened.model:
            generated.draw_held_out(model, data, self.data.color, how, options.picture)
        return scores


RUNS = (DALLERun,)

PRESETS = {
    "dalle": Preset(
        "letters as a text says, code by code, with its VQ-VAE: a quarter of an hour in all",
        DALLERun(
            model=DALLEConfig(vq=VQ_PRESETS["vq"].run.model),
            optim=OptimConfig(lr=0.006, muon_lr=0.012, warmup_steps=50, decay_fraction=0.6),
            train=TrainConfig(steps=1800, batch_size=64, micro_batch_size=32, eval_every=600),
        ),
    ),
    "dalle-vq": Preset("the first part of it: as vq", VQ_PRESETS["vq"].run),
}
