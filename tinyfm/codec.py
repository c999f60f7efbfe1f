"""A codec: sounds to a few integers a moment, and back (EnCodec, Défossez et al. 2022).

A sound is T numbers in [-1, 1] for each channel, thousands a second. The encoder, convolutions with
strides and an LSTM, turns them into one vector of Z numbers for each `hop` samples, a frame. The
residual quantiser of vq.py replaces each vector by Q codes, and the decoder, the encoder in reverse
order, turns the sum of their vectors into samples:

    sound (C, T) -> encoder -> (Z, frames) -> codes (Q, frames) -> (Z, frames) -> decoder -> (C, T)

So a second has rate / hop frames of Q codes, log2 K bits each. The first codebooks hold the coarse
form, so a sound may be encoded with fewer of them than there are.

Weight normalisation (Salimans & Kingma 2016): each weight of a convolution is stored as a direction
v and a gain g, one g for each output channel (in an upsampling layer: for each input channel),

    w = g v / |v|

which keeps the size of a step in training apart from the size of the weights.

Causal. A causal convolution is padded on the left alone, so that frame t depends on no sample after
it, and a sound can be coded while it is being recorded. The padding mirrors what is there, so the
first few frames are an exception: they do depend on the samples that follow.

The loss compares samples and spectrograms (eqs. 1 and 2 of the paper; the form of the second is
that of DDSP, Engel et al. 2020, eq. 4). With S_w the magnitudes of a Fourier transform of windows
of w samples, every w/4,

    mean |x - x'| + weight mean_w (mean |S_w - S'_w| + mean |log S_w - log S'_w|)

The samples alone would leave high notes out, which are quiet but heard. To these, vq.py's two terms
of the codebook are added.

Letters: B batch, C channels of a sound, D width of a layer, T samples or frames, Z numbers in a
vector, Q codebooks, K codes in each.
Left out: the discriminators of the paper, its balancing of the terms, its arithmetic coding; the
model for 48 kHz, which reads a sound in pieces that overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.vq import Quantizer, VQConfig

QUIET = 1e-3  # magnitude below which differences hardly count in the logarithm of a spectrogram


@dataclass(frozen=True)
class CodecConfig:
    rate: int = 8000  # samples a second
    in_channels: int = 1  # channels of a sound: 1 mono, 2 stereo
    width: int = 16  # channels of the first convolution; they double at each stride
    ratios: tuple[int, ...] = (8, 5, 4)  # factors of the decoder's upsampling; their product is hop
    n_block: int = 1  # residual blocks at each ratio
    kernel_size: int = 7  # samples that the first convolution of a network reads
    last_kernel_size: int = 7  # the same of the last one
    block_kernel_size: int = 3  # the same of a residual block
    dilation_growth: int = 2  # factor of the dilation from one residual block to the next
    compress: int = 2  # factor by which a residual block is narrower inside
    block_shortcut: bool = True  # a convolution, of 1 sample, around each residual block
    n_lstm: int = 2  # layers of the LSTM
    causal: bool = True  # whether a frame depends on no later sample
    latent_channels: int = 32  # numbers in the vector of a frame
    n_code: int = 256  # codes in a codebook
    n_book: int = 4  # codebooks, each for what those before it have left over
    commitment: float = 0.25  # weight of the term that keeps the encoder near to its codes
    dead_after: int = 20  # steps without use after which a code is moved; 0 = never
    windows: tuple[int, ...] = (64, 128, 256, 512, 1024)  # samples in the windows of the loss
    spectrum_weight: float = 1.0  # weight of the spectrograms in the loss
    sound_length: int = 8000  # samples of a training example

    def __post_init__(self):
        for name in ("ratios", "windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        least = {
            "rate": 1, "width": 1, "n_block": 0, "kernel_size": 1, "last_kernel_size": 1,
            "block_kernel_size": 1, "dilation_growth": 1, "compress": 1, "n_lstm": 1,
            "latent_channels": 1, "spectrum_weight": 0, "sound_length": 1,
        }  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {smallest}")
        if self.in_channels not in (1, 2):
            raise ValueError(f"in_channels is {self.in_channels}; use 1 (mono) or 2 (stereo)")
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios are {self.ratios}; give whole numbers from 1, such as 8 5 4")
        if self.compress > self.width:
            raise ValueError(f"compress {self.compress} exceeds width {self.width}; lower it")
        if not self.windows or min(self.windows) < 4:
            raise ValueError(f"windows are {self.windows}; give whole numbers from 4")
        if max(self.windows) // 2 >= self.sound_length:
            problem = f"a window of {max(self.windows)} samples is too long for sound_length"
            raise ValueError(f"{problem} {self.sound_length}; use {max(self.windows)} or more")
        _ = self.vq  # which checks the other fields

    @property
    def vq(self) -> VQConfig:
        """The config of the quantiser; what belongs to pictures is not used."""
        names = ("latent_channels", "n_code", "n_book", "commitment", "dead_after")
        return VQConfig(**{name: getattr(self, name) for name in names})

    @property
    def hop(self) -> int:
        """Samples in a frame."""
        return math.prod(self.ratios)


# ---- pure functions -----------------------------------------------------------------------------


def reflect(x: Tensor, left: int, right: int) -> Tensor:
    """Pad x (B, D, T) with its own mirror image. If x is too short, zeros follow it first."""
    T = x.size(-1)
    missing = max(0, max(left, right) + 1 - T)
    padded = F.pad(F.pad(x, (0, missing)), (left, right), mode="reflect")
    return padded[..., : left + T + right]


def normed_weight(direction: Tensor, gain: Tensor) -> Tensor:
    """w = g v / |v|: direction v (D1, D2, kernel), gain g (D1,)."""
    scale = gain / direction.norm(dim=(1, 2))
    return scale[:, None, None] * direction


def spectrogram(sounds: Tensor, window: int) -> Tensor:
    """Sounds (B, C, T) -> magnitudes (B C, window / 2 + 1, moments), one moment every window / 4.

    A sine of amplitude a has magnitude a / 2, whatever the window.
    """
    shape = torch.hann_window(window, device=sounds.device)
    x = sounds.float().flatten(0, 1)
    waves = torch.stft(x, window, hop_length=window // 4, window=shape, return_complex=True)
    return waves.abs() / shape.sum()


def spectrum_distance(sounds: Tensor, rebuilt: Tensor, windows: tuple[int, ...]) -> Tensor:
    """Mean distance of the spectrograms, and of their logarithms, over windows of these sizes."""
    total = torch.zeros((), device=sounds.device)
    for window in windows:
        ours = spectrogram(rebuilt, window)
        theirs = spectrogram(sounds, window)
        total = total + F.l1_loss(ours, theirs)
        total = total + F.l1_loss((ours + QUIET).log(), (theirs + QUIET).log())
    return total / len(windows)


def check_sounds(sounds: Tensor, channels: int) -> None:
    """Raise ValueError unless these are sounds (B, C, T) of so many channels, finite, and T > 0."""
    if sounds.ndim != 3:
        raise ValueError(f"sounds are {tuple(sounds.shape)}; they must be (B, {channels}, samples)")
    if sounds.size(1) != channels:
        problem = f"the sounds have {sounds.size(1)} channels, but the model has {channels}"
        raise ValueError(f"{problem}; mix them, or repeat one")
    if not sounds.size(2):
        raise ValueError("the sounds are empty; give at least one sample")
    if not sounds.isfinite().all():
        raise ValueError("the sounds hold a NaN or an infinity; samples are between -1 and 1")


# ---- layers -------------------------------------------------------------------------------------


class NormedWeight(nn.Module):
    """What both kinds of convolution share: a direction, a gain and a bias."""

    def __init__(self, shape: tuple[int, int, int], n_bias: int):
        super().__init__()
        self.direction = nn.Parameter(torch.empty(shape))
        self.gain = nn.Parameter(torch.empty(shape[0]))
        self.bias = nn.Parameter(torch.empty(n_bias))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draw the directions, with gains that leave them as they are; biases are 0."""
        fan_in = self.direction[0].numel()
        nn.init.normal_(self.direction, std=math.sqrt(2 / fan_in))  # He et al. 2015
        nn.init.zeros_(self.bias)
        if not self.direction.is_meta:
            self.gain.copy_(self.direction.norm(dim=(1, 2)))

    def weight(self) -> Tensor:
        return normed_weight(self.direction, self.gain)


class Conv(NormedWeight):
    """A convolution over time: (B, c_in, T) -> (B, c_out, T / stride), rounded up."""

    def __init__(self, config, c_in: int, c_out: int, kernel: int, stride: int = 1, dilation=1):
        super().__init__((c_out, c_in, kernel), c_out)
        self.stride = stride
        self.dilation = dilation
        self.causal = config.causal
        self.padding = (kernel - 1) * dilation + 1 - stride  # so that T becomes T / stride

    def forward(self, x):
        right = 0 if self.causal else self.padding // 2
        left = self.padding - right
        to_full_frame = -x.size(-1) % self.stride
        x = reflect(x, left, right + to_full_frame)
        return F.conv1d(x, self.weight(), self.bias, self.stride, dilation=self.dilation)


class Upsample(NormedWeight):
    """The reverse of a Conv with a stride: (B, c_in, T) -> (B, c_out, T ratio)."""

    def __init__(self, config, c_in: int, c_out: int, ratio: int):
        super().__init__((c_in, c_out, 2 * ratio), c_out)
        self.ratio = ratio
        self.causal = config.causal

    def forward(self, x):
        x = F.conv_transpose1d(x, self.weight(), self.bias, self.ratio)  # T ratio + ratio
        right = self.ratio if self.causal else self.ratio // 2
        left = self.ratio - right
        return x[..., left : x.size(-1) - right]


class ResBlock(nn.Module):
    """x + two convolutions of x, narrower in between; the sum may have a convolution around it."""

    def __init__(self, config: CodecConfig, width: int, dilation: int):
        super().__init__()
        inner = width // config.compress
        self.conv1 = Conv(config, width, inner, config.block_kernel_size, dilation=dilation)
        self.conv2 = Conv(config, inner, width, 1)
        self.shortcut = Conv(config, width, width, 1) if config.block_shortcut else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.conv2(F.elu(self.conv1(F.elu(x))))


class LSTM(nn.Module):
    """x + LSTM(x), along the frames: (B, D, T) -> (B, D, T)."""

    def __init__(self, config: CodecConfig, width: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, config.n_lstm, batch_first=True)

    def forward(self, x):
        return x + self.lstm(x.mT)[0].mT


def make_encoder(config: CodecConfig) -> nn.Sequential:
    """Sounds (B, C, T) -> vectors (B, Z, T / hop), rounded up."""
    D = config.width
    layers = [Conv(config, config.in_channels, D, config.kernel_size)]
    for ratio in reversed(config.ratios):
        layers += [ResBlock(config, D, config.dilation_growth**i) for i in range(config.n_block)]
        layers += [nn.ELU(), Conv(config, D, 2 * D, 2 * ratio, stride=ratio)]
        D = 2 * D
    layers += [LSTM(config, D), nn.ELU()]
    layers += [Conv(config, D, config.latent_channels, config.last_kernel_size)]
    return nn.Sequential(*layers)


def make_decoder(config: CodecConfig) -> nn.Sequential:
    """Vectors (B, Z, T) -> sounds (B, C, T hop)."""
    D = config.width * 2 ** len(config.ratios)
    layers = [Conv(config, config.latent_channels, D, config.kernel_size), LSTM(config, D)]
    for ratio in config.ratios:
        layers += [nn.ELU(), Upsample(config, D, D // 2, ratio)]
        D = D // 2
        layers += [ResBlock(config, D, config.dilation_growth**i) for i in range(config.n_block)]
    layers += [nn.ELU(), Conv(config, D, config.in_channels, config.last_kernel_size)]
    return nn.Sequential(*layers)


# ---- the model ----------------------------------------------------------------------------------


class Codec(nn.Module):
    """Sounds (B, C, T) in [-1, 1] to codes (B, Q, frames), by encode, and back, by decode."""

    unit = "sound"  # what a data set is counted in
    outer = ("codebooks", "lstm")  # tables, and stacks of four matrices: for AdamW, not for Muon
    unsharded = ("codebooks",)  # whole on each rank, as `revive` compares rows

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config)
        self.quantizer = Quantizer(config.vq)

    def reset_buffers(self):
        self.quantizer.reset_buffers()

    def after_step(self):
        """Revive dead codes: the trainer calls this after each step."""
        self.quantizer.revive()

    def to_vectors(self, sounds: Tensor) -> Tensor:
        """Sounds (B, C, T) -> vectors (B, Z, T / hop), rounded up, before quantisation.

        Raises ValueError for sounds of other channels, empty ones, and numbers that are not finite.
        """
        check_sounds(sounds, self.config.in_channels)
        return self.encoder(sounds.to(self.encoder[0].bias.dtype))

    def encode(self, sounds: Tensor, n_book: int = 0) -> Tensor:
        """Sounds (B, C, T) in [-1, 1] -> codes (B, Q, T / hop), rounded up, int64 in [0, K).

        n_book: use so many of the codebooks, the first ones; 0 = all.
        """
        Q = self.config.n_book
        if not 0 <= n_book <= Q:
            raise ValueError(f"n_book is {n_book}; the model has {Q} codebooks")
        return self.quantizer.encode(self.to_vectors(sounds))[:, : n_book or Q]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, Q, T), of all codebooks or the first ones, -> sounds (B, C, T hop).

        They are not clamped to [-1, 1]. Raises ValueError for a code outside of the codebook.
        """
        z = self.quantizer.decode(codes)
        return self.decoder(z.to(self.decoder[0].bias.dtype))

    def rebuild(self, sounds: Tensor, n_book: int = 0) -> Tensor:
        """Sounds (B, C, T) -> the same decoded from their codes, (B, C, T)."""
        return self.decode(self.encode(sounds, n_book))[..., : sounds.size(-1)]

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of batch["sounds"] (B, C, T), each term a mean. Nothing is random.

        metrics, without gradients: "samples", "spectrum", "codebook" and "commitment", the terms.
        """
        sounds = batch["sounds"]
        z = self.encoder(sounds)  # not checked, as `to_vectors` does: a GPU would wait for it
        e, _, codebook, commitment = self.quantizer(z)
        rebuilt = self.decoder(e.to(z.dtype)).float()[..., : sounds.size(-1)]
        terms = {
            "samples": F.l1_loss(rebuilt, sounds),
            "spectrum": spectrum_distance(sounds, rebuilt, self.config.windows),
            "codebook": codebook / z.numel(),
            "commitment": commitment / z.numel(),
        }
        loss = terms["samples"] + self.config.spectrum_weight * terms["spectrum"]
        loss = loss + terms["codebook"] + self.config.commitment * terms["commitment"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the shapes and dtypes of real data."""
        return {"sounds": torch.zeros(rows, self.config.in_channels, self.config.sound_length)}

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> Codec:
        """Read an EncodecModel folder of transformers (hub/codec.py)."""
        from tinyfm.hub import codec

        return codec.load(cls, CodecConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write weights and config in the layout of transformers (hub/codec.py)."""
        from tinyfm.hub import codec

        codec.save(self, folder, overwrite)
