"""What the recipes of models that draw what a text says share: text2image and DALL-E."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tinyfm.batches.latents import LatentConfig, LatentData
from tinyfm.batches.pairs import GLYPHS
from tinyfm.common import sheets
from tinyfm.evaluate import generated, judge
from tinyfm.recipes.base import About, OpenRun, Run, Scores
from tinyfm.recipes.pictures import (
    check_rows,
    save_step_sheet,
    spread_rows,
    warn_if_cut,
    warn_if_unseen,
    write_words,
)


@dataclass(frozen=True, kw_only=True)
class DrawingRun(Run):
    """Draw what a text says, with parts that are trained first."""

    data: LatentConfig = field(default_factory=LatentConfig)

    SHOWN: ClassVar[int] = 32
    GUIDANCE: ClassVar[float] = 3.0
    SHOWN_BY: ClassVar[dict[str, Any]] = {}  # further options of model.generate
    ABOUT = About(
        task="text-to-image",
        library="tinyfm",
        use="It draws what a caption of the kind in its training data says.",
        limits="It knows the words of its captions alone. Drawings may be wrong, or near to a "
        "training picture.",
    )

    # ---- training -------------------------------------------------------------------------------

    def get_ready(self, model: nn.Module, data: LatentData) -> None:
        model.tokenizer = data.tokenizer
        if self.data.cache_latents:
            data.encode_all(model, self.data)

    def write_files(self, folder: Path, data: LatentData) -> None:
        super().write_files(folder, data)
        if not self.init_from:  # the words of the base's captions are not known
            write_words(folder, data)

    def show(self, model: nn.Module, data: LatentData, folder: Path, step: int) -> str:
        """Draw captions of the validation split."""
        rows = spread_rows(len(data.val.labels), self.SHOWN)
        prompts = [data.val.captions[i][0] for i in rows]
        sheet = sheets.prompted(model, prompts, guidance=self.GUIDANCE, **self.SHOWN_BY)
        return save_step_sheet(sheet, folder, step)

    def check_parts(self) -> None:
        check_rows(self)

    # ---- the trained model ----------------------------------------------------------------------

    def read_prompts(self, opened: OpenRun, options: Any, length: int) -> list[str]:
        """--prompt of sample.py, n times. Says on stderr what the model cannot read of it.

        length: most tokens of a text. Raises ValueError if there is no prompt.
        """
        if not (options.prompt or "").strip():
            raise ValueError('say what to draw: --prompt "sans bold latin small letter a"')
        opened.model.tokenizer = opened.tokenizer
        warn_if_cut(opened.tokenizer, [options.prompt], length)
        if not options.adapter:  # an adapter may know further words
            warn_if_unseen(opened, [options.prompt])
        return [options.prompt] * (options.n or 8)

    def can_draw(self) -> bool:
        return self.data.path in GLYPHS

    def guidance_of(self, options: Any) -> float:
        return self.GUIDANCE if options.guidance is None else options.guidance

    def measured_by(self, guidance: float) -> dict[str, Any]:
        """The options of model.generate with which drawings are measured."""
        raise NotImplementedError

    def measure(self, opened: OpenRun, model: nn.Module, data: LatentData, options: Any) -> Scores:
        """Share of drawings that a judge reads as their prompt, for data that it can read.

        --picture shows characters that were held out, drawn by the trained model.
        """
        if self.data.path not in GLYPHS:
            return {}
        judged_by = judge.config_of(options.judge_steps)
        how = self.measured_by(self.guidance_of(options))
        scores = generated.measure(model, data, self.data, how, judged_by, options.samples)
        if options.picture and model is opened.model:
            generated.draw_held_out(model, data, self.data.color, how, options.picture)
        return scores
