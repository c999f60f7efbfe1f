"""The recipe of MusicGen: a language model that writes the codes of a codec.

The codec is another run, trained first if it is not given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from data import sounds, wheels
from data.splits import HELD_OUT, TRAIN, VAL
from tinyfm.batches.sounds import SoundCodeData, SoundConfig, to_sounds
from tinyfm.codec import CodecConfig
from tinyfm.common.config import RunPath
from tinyfm.evaluate.markov import Markov, choose_order
from tinyfm.generate import Sampling
from tinyfm.musicgen import MusicGenConfig, SoundWriter, SoundWriterConfig, flatten
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores, write_step_file
from tinyfm.recipes.codec import PRESETS as CODEC_PRESETS
from tinyfm.recipes.codec import sound_files
from tinyfm.recipes.pictures import NoTokenizer
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class MusicGenRun(NoTokenizer, Run):
    """Write sounds: a language model over the codes of a codec."""

    model: SoundWriterConfig = field(default_factory=SoundWriterConfig)
    data: SoundConfig = field(default_factory=SoundConfig)
    codec: RunPath = ""  # run that supplies the codec (default: train one first)

    family: ClassVar[str] = "musicgen"
    PARTS: ClassVar[tuple[str, ...]] = ("codec",)
    SAMPLE_OPTIONS = frozenset({
        "prompt", "seed", "temperature", "top_k", "top_p", "min_p", "n", "out",
    })  # fmt: skip
    ABOUT = About(
        library="tinyfm",
        use="It writes sounds of the kind that it was trained on.",
        limits="They sound like the voice, but say no words that were not said in training.",
    )
    LOSS_ROWS: ClassVar[int] = 1  # a window has seconds, and the held-out splits few windows
    SHOWN: ClassVar[int] = 2

    def build_model(self) -> SoundWriter:
        return SoundWriter(self.model)

    def open_data(self) -> SoundCodeData:
        codec, train = self.model.codec, self.train
        length = self.model.music.frames * codec.hop
        return SoundCodeData(self.data, codec.rate, length, train.batch_size, train.seed)

    def get_ready(self, model: SoundWriter, data: SoundCodeData) -> None:
        data.encode_all(model.codec, self.model.music.frames)

    def show(self, model: SoundWriter, data: SoundCodeData, folder: Path, step: int) -> str:
        """Write sounds, from nothing."""
        found = self.write(model, torch.zeros(self.SHOWN, 1, 0), Sampling(seed=step))
        path = write_step_file(folder, step, "wav", lambda path: sounds.save(found, path))
        return f"--- step {step}: {self.SHOWN} sounds: {path}"

    def write(self, model: SoundWriter, starts: torch.Tensor, sampling: Sampling) -> list:
        """Sounds (B, C, T) continued to the end of the context, as samples of each."""
        known = -(-starts.size(2) // self.model.codec.hop)
        p = next(model.codec.decoder.parameters())
        found = model.generate(
            starts.to(p.device, p.dtype), self.model.music.frames - known, sampling
        )
        return list(found[:, 0].float().cpu().numpy())

    # ---- the part -------------------------------------------------------------------------------

    def with_parts(self, codec: CodecConfig) -> SoundWriterConfig:
        """The model's config for this codec."""
        music = replace(self.model.music, n_code=codec.n_code, n_book=codec.n_book)
        return replace(self.model, music=music, codec=codec)

    def check_parts(self) -> None:
        wheels.find(sounds.PACKAGE)

    def part_run(self, option: str, usual: Run, given: dict[str, Any]) -> Run:
        """The run that trains the codec, of the sizes in --model.codec. usual: the preset of it."""
        train = {name: getattr(self.train, name) for name in ("seed", "device", "dtype")}
        out = f"{self.out}-{option}"
        return replace(
            usual,
            model=self.model.codec,
            data=self.data,
            train=replace(usual.train, **train),
            out=out,
            resume=Path(out).exists(),
        )

    def take_parts(self, model: SoundWriter, codec: OpenRun) -> None:
        """Copy the weights of the trained codec into the model."""
        model.codec.load_state_dict(codec.model.state_dict())

    # ---- the trained model ----------------------------------------------------------------------

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Write n sounds, from nothing or from the start of the .wav file of --prompt, as .wav and
        as a spectrogram."""
        out = sound_files(options)
        starts = torch.zeros(1, 1, 0)
        if options.prompt:
            most = self.model.music.frames // 2 * self.model.codec.hop
            starts = to_sounds(sounds.read_file(options.prompt)[:most])
        starts = starts.repeat(options.n or 4, 1, 1)
        print(sounds.save(self.write(opened.model, starts, options.sampling), out))

    def losses(self, model: SoundWriter, data: SoundCodeData) -> Scores:
        """Nats per code of both held-out splits, and per frame."""
        scores = super().losses(model, data)
        n_book = self.model.music.n_book
        for split in HELD_OUT:
            nats = scores[f"{split}_loss"].through(lambda loss: n_book * loss)
            scores[f"{split}_frame_nats"] = nats
        return scores

    def baselines(self, data: SoundCodeData) -> dict[str, Scores]:
        """The same of a Markov model of the codes, one after the other."""
        n_book = self.model.music.n_book

        def tokens(split: str):
            codes = torch.from_numpy(data.windows[split].astype("int64"))[None]
            return flatten(codes, self.model.music.n_code)[0].numpy()

        markov = Markov(tokens(TRAIN))
        order = choose_order(markov, tokens(VAL))
        scores = {}
        for split in HELD_OUT:
            loss = float(markov.nats(tokens(split))[order].mean())
            scores |= {f"{split}_loss": loss, f"{split}_frame_nats": n_book * loss}
        return {f"Markov, order {order}": scores}


RUNS = (MusicGenRun,)

PRESETS = {
    "musicgen": Preset(
        "a voice from nothing, four codes at a time, with its codec",
        MusicGenRun(
            model=SoundWriterConfig(
                music=MusicGenConfig(context_length=128, n_head=3, dropout=0.1),
                codec=CODEC_PRESETS["codec"].run.model,
            ),
            optim=OptimConfig(lr=0.005, muon_lr=0.01, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=600, batch_size=32, eval_every=150),
        ),
    ),
    "musicgen-codec": Preset("the first part of it: as codec", CODEC_PRESETS["codec"].run),
}
