"""The recipe of codecs: sounds as a few integers a moment, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data import sounds
from data.splits import TEST
from tinyfm.batches.sounds import SoundConfig, SoundData, to_sounds
from tinyfm.codec import QUIET, Codec, CodecConfig, spectrogram
from tinyfm.evaluate import metrics
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores, free_name, write_step_file
from tinyfm.recipes.pictures import NoTokenizer, mean_metrics
from tinyfm.recipes.vq import code_scores
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig
from tinyfm.vq import count_codes, perplexity

WINDOW = 256  # samples of a spectrum that is compared
MU_LAW_BITS = (8, 4, 3, 2, 1)  # of a sample, of the baselines


# ---- measures ------------------------------------------------------------------------------------


def signal_to_noise(sound: Tensor, rebuilt: Tensor) -> float:
    """10 log10 of the power of a sound (1, C, T) over that of the error, in decibels."""
    noise = (sound - rebuilt).square().sum().clamp(min=1e-9)
    return float(10 * (sound.square().sum() / noise).log10())


def spectral_distance(sound: Tensor, rebuilt: Tensor) -> float:
    """The distance of the logarithms of two spectrograms, in decibels: over frequencies the root of
    the mean square, then the mean over moments. Quiet tones count as QUIET."""
    both = [20 * (spectrogram(x, WINDOW) + QUIET).log10() for x in (sound, rebuilt)]
    return float((both[0] - both[1]).square().mean(1).sqrt().mean())


def fidelity(pairs: list[tuple[Tensor, Tensor]]) -> Scores:
    """Both measures, means over sounds, of pairs (sound, the same rebuilt)."""
    found = {
        "signal to noise, dB": [signal_to_noise(*pair) for pair in pairs],
        "spectral distance, dB": [spectral_distance(*pair) for pair in pairs],
    }
    ones = np.ones(len(pairs))
    return {name: metrics.ratio_of_sums(own, ones, "sounds") for name, own in found.items()}


def mu_law(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples after mu-law with fewer bins than 256."""
    return sounds.to_samples(sounds.to_bins(samples, 1 << bits), 1 << bits)


# ---- the recipe ----------------------------------------------------------------------------------


def sound_files(options: Any) -> Path:
    """The name of sample.py's files, without an ending. Raises ValueError if one is there."""
    path = Path(options.out or free_name("sample.wav", ".png"))
    for file in (path.with_suffix(".wav"), path.with_suffix(".png")):
        if file.exists() and not options.overwrite:
            raise ValueError(f"{file} exists: choose another --out, or add --overwrite")
    return path


@dataclass(frozen=True, kw_only=True)
class CodecRun(NoTokenizer, Run):
    """Turn sounds into a few integers a moment, and rebuild them."""

    model: CodecConfig = field(default_factory=CodecConfig)
    data: SoundConfig = field(default_factory=SoundConfig)

    family: ClassVar[str] = "codec"
    SAMPLE_OPTIONS = frozenset({"seed", "prompt", "n", "out"})
    ABOUT = About(
        use="It turns sounds of the kind that it was trained on into integers and back, for a "
        "language model that writes these.",
        limits="It has heard one voice on the telephone. Others come back blurred.",
    )
    SHOWN: ClassVar[int] = 2

    def build_model(self) -> Codec:
        return Codec(self.model)

    def open_data(self) -> SoundData:
        m, train = self.model, self.train
        return SoundData(self.data, m.rate, m.sound_length, train.batch_size, train.seed)

    def score(self, model: Codec, data: SoundData) -> Scores:
        """The terms of the loss, the perplexity of the codes, and the number of those without use,
        means over codebooks."""
        rows = self.train.micro_batch_size or self.train.batch_size
        scores = {f"val_{name}": mean for name, mean in mean_metrics(self, model, data).items()}
        return scores | code_scores(model, (b["sounds"] for b in data.val_batches(rows)))

    def show(self, model: Codec, data: SoundData, folder: Path, step: int) -> str:
        """Write validation sounds, each followed by what is rebuilt of it."""
        device = next(model.parameters()).device
        parts = []
        with torch.no_grad():
            for sound in next(data.val_batches(self.SHOWN))["sounds"]:
                rebuilt = model.rebuild(sound[None].to(device)).float().cpu()
                parts += [sound[0].numpy(), rebuilt[0, 0].numpy()]
        path = write_step_file(folder, step, "wav", lambda path: sounds.save(parts, path))
        return f"--- step {step}: {self.SHOWN} sounds, each followed by the same rebuilt: {path}"

    # ---- the trained model ----------------------------------------------------------------------

    def sample_form(self, options: Any) -> tuple[str, frozenset[str]]:
        if options.prompt:
            return "with --prompt", self.SAMPLE_OPTIONS - {"n", "seed"}
        return "", self.SAMPLE_OPTIONS

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Write n test sounds, or the .wav file of --prompt, each followed by what is rebuilt of
        it; print the codes of the first."""
        out = sound_files(options)
        if options.prompt:
            recordings = [sounds.read_file(options.prompt)]
        else:
            test = self.open_data().recordings[TEST]
            order = np.random.default_rng(options.sampling.seed).permutation(len(test))
            recordings = [test[i] for i in order[: options.n or 4]]
        device = next(opened.model.parameters()).device
        dtype = opened.model.decoder[0].bias.dtype
        parts = []
        for number, samples in enumerate(recordings):
            sound = to_sounds(samples)
            with torch.no_grad():
                codes = opened.model.encode(sound.to(device, dtype))
                rebuilt = opened.model.decode(codes).float().cpu()[0, 0, : len(samples)]
            if not number:
                print_codes(codes[0], self.model.n_code)
            parts += [sound[0, 0].numpy(), rebuilt.numpy()]
        print(f"each sound, then the same rebuilt: {sounds.save(parts, out)}")

    def rebuilt(
        self, model: Codec, data: SoundData, n_book: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each test sound (1, 1, n), the same rebuilt by the first codebooks, its codes."""
        device = next(model.parameters()).device
        for samples in data.recordings[TEST]:
            sound = to_sounds(samples)
            codes = model.encode(sound.to(device), n_book)
            yield sound, model.decode(codes)[..., : len(samples)].float().cpu(), codes

    def measure(self, opened: OpenRun, model: Codec, data: SoundData, options: Any) -> Scores:
        """How near rebuilt test sounds are, with all codebooks and with the first ones; how evenly
        the codes of each are used."""
        c = self.model
        frames_a_second = c.rate / c.hop
        scores = {}
        for n_book in range(c.n_book, 0, -1):
            found = list(self.rebuilt(model, data, n_book))
            near = fidelity([(sound, rebuilt) for sound, rebuilt, _ in found])
            near["bits a second"] = n_book * np.log2(c.n_code) * frames_a_second
            ending = "" if n_book == c.n_book else f", {n_book} of {c.n_book} codebooks"
            scores |= {f"{name}{ending}": value for name, value in near.items()}
            if n_book == c.n_book:
                counts = sum(count_codes(codes, c.n_code) for _, _, codes in found)
                for q, own in enumerate(counts):
                    scores[f"perplexity of codebook {q}"] = float(perplexity(own))
                    scores[f"codes of codebook {q} without use"] = int((own == 0).sum())
        return scores

    def baselines(self, data: SoundData) -> dict[str, Scores]:
        """The same of mu-law, with 8 bits a sample and fewer."""
        columns = {}
        for bits in MU_LAW_BITS:
            pairs = []
            for samples in data.recordings[TEST]:
                sound = to_sounds(samples)
                pairs.append((sound, torch.from_numpy(mu_law(sound.numpy(), bits)).float()))
            columns[f"mu-law, {bits} bits"] = fidelity(pairs) | {
                "bits a second": bits * sounds.RATE
            }
        return columns


def print_codes(codes: Tensor, n_code: int) -> None:
    """Print codes (Q, frames), a line a codebook."""
    width = len(str(n_code - 1))
    for q, book in enumerate(codes.tolist()):
        print(f"codes of the first sound, codebook {q} of {len(codes)}:")
        print(" ".join(f"{code:{width}}" for code in book))


RUNS = (CodecRun,)

PRESETS = {
    "codec": Preset(
        "a voice into 200 integers a second and back",
        CodecRun(
            optim=OptimConfig(lr=2e-3, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=1000, batch_size=8, eval_every=250),
        ),
    ),
}
