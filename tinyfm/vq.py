"""A vector-quantised autoencoder (VQ-VAE): pictures to a few integers, and back.

The encoder of autoencoder.py turns a picture into a vector z of Z numbers at each of h w places.
Here each z is replaced by the nearest of K learnt vectors, the codebook e_0 ... e_{K-1} (van den
Oord et al. 2017, eqs. 1 and 2):

    k = argmin_j |z - e_j|,      the decoder reads e_k in place of z

So a picture is h w integers k, its codes: tokens, as those of a text, which a language model can
learn to write (dalle.py). The loss is their eq. 3,

    |x - decode(e_k)|^2 / 2  +  |sg(z) - e_k|^2  +  beta |z - sg(e_k)|^2

where sg stops gradients. The argmin has none, so the gradient at e_k is handed to z as it is:
straight through. The first term thus trains encoder and decoder; the second pulls the code to the
vectors that chose it; the third commits the encoder to its codes. All three are sums over a
picture, and means over pictures.

Residual quantisation (SoundStream, Zeghidour et al. 2021; EnCodec, Défossez et al. 2022) uses Q
codebooks: each one quantises what the codebooks before it have left over,

    r_1 = z,  r_{q+1} = r_q - e_q(r_q),      z is about e_1 + ... + e_Q

so that Q codes choose one of K^Q sums, of only Q K vectors.

Dead codes. A code that no vector chooses has no gradient, and stays where it is. So a code that was
idle for `dead_after` steps moves next to another one, whose cell, the vectors that choose it, is
split in two (Linde, Buzo & Gray 1980). Which cell? The gradient of code k is 2 n (e_k - mean), for
n vectors with this mean. It is large if the code is far from the mean; and if the code is at the
mean of all data, the mean of n of them differs by chance, and the square of the gradient is 4 n
times the variance in the cell: four times its squared error, which a split can lower. So the codes
with the largest gradients are chosen. That needs neither counts nor random numbers, and gradients
are the same however a batch was cut into micro-batches or over ranks: revival is a function of
(seed, step).

Letters: B batch, C channels, H W rows and columns, Z numbers in a vector, h w places, Q codebooks,
K codes in each, n vectors.
Left out: adversarial and perceptual losses, codes that are compared by their angle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.autoencoder import AutoencoderConfig, Decoder, Encoder, check_images

NEAR = 0.01  # distance of a revived code from its neighbour, over the spread of the codebook


@dataclass(frozen=True)
class VQConfig:
    image_size: int = 32  # rows and columns of a training image; other sizes work too
    in_channels: int = 1  # channels of an image: 1 grey, 3 colour
    channels: tuple[int, ...] = (16, 32, 64)  # width of each level; sizes halve in between
    n_block: int = 1  # residual blocks per level of the encoder; the decoder has one more
    latent_channels: int = 8  # numbers in the vector of a code
    groups: int = 8  # number of groups of channels, each of which is normalised together
    attention: bool = True  # attention between all places, in the middle of encoder and decoder
    n_code: int = 512  # codes in a codebook
    n_book: int = 1  # codebooks, each for what those before it have left over
    commitment: float = 0.25  # weight beta of the term that keeps the encoder near to its codes
    dead_after: int = 20  # steps without use after which a code is moved; never with 0 or ema_decay
    # decay of the moving averages that the codes follow, in place of gradients; 0 = gradients. The
    # averages move with each micro-batch, on each rank alone: for comparison with other libraries
    ema_decay: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        for name, least in (("n_code", 2), ("n_book", 1), ("dead_after", 0), ("commitment", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        _ = self.autoencoder  # which checks the other fields

    @property
    def autoencoder(self) -> AutoencoderConfig:
        """The config of the encoder and the decoder."""
        names = ("image_size", "in_channels", "channels", "n_block", "latent_channels", "groups")
        sizes = {name: getattr(self, name) for name in names}
        return AutoencoderConfig(**sizes, attention=self.attention, variational=False)

    @property
    def factor(self) -> int:
        """The factor by which rows and columns shrink from an image to its codes."""
        return self.autoencoder.factor

    @property
    def codes_per_image(self) -> int:
        """The number of codes of a training image, Q h w."""
        return self.n_book * (self.image_size // self.factor) ** 2


# ---- pure functions -----------------------------------------------------------------------------


def find_nearest_slowly(x: Tensor, codebook: Tensor) -> Tensor:
    """The obvious way to `find_nearest`: one vector after the other."""
    codes = []
    for vector in x:
        distances = (codebook - vector).square().sum(1)  # (K,)
        codes.append(distances.argmin())
    return torch.stack(codes)


def find_nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code of each vector: x (n, Z), codebook (K, Z) -> int64 (n,).

    |x - e|^2 = |x|^2 - 2 x . e + |e|^2, and |x|^2 is the same for all codes.
    """
    scores = codebook.square().sum(1) - 2 * x @ codebook.T  # (n, K)
    return scores.argmin(1)


def straight_through(z: Tensor, e: Tensor) -> Tensor:
    """The value of e, with the gradient of z."""
    return z + (e - z).detach()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of how often each code is used, counts (K,): K if all are used alike."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()


def count_codes(codes: Tensor, n_code: int) -> Tensor:
    """How often each code is used: codes (B, Q, *places) -> int64 (Q, K), on the CPU."""
    books = codes.cpu().transpose(0, 1).flatten(1)  # (Q, n)
    return torch.stack([book.bincount(minlength=n_code) for book in books])


@torch.no_grad()
def split_cells(codebook: Tensor, gradient: Tensor, dead: Tensor) -> None:
    """Move dead codes, in place: one next to each of the codes with the largest gradients.

    codebook, gradient: (K, Z). dead: int64, numbers of codes. If more codes are dead than have a
    gradient, the last of the dead ones stay.
    """
    size = gradient.norm(dim=1)  # (K,)
    order = size.argsort(descending=True, stable=True)
    sources = order[: min(len(dead), int((size > 0).sum()))]
    towards_mean = -gradient[sources] / size[sources, None]
    codebook[dead[: len(sources)]] = codebook[sources] + NEAR * codebook.std() * towards_mean


@torch.no_grad()
def follow_averages(
    codebook: Tensor, counts: Tensor, sums: Tensor, x: Tensor, codes: Tensor, decay: float
) -> None:
    """Move each code to the moving average of its vectors, in place (van den Oord, appendix A.1).

    counts (K,), sums (K, Z): moving averages of the number and the sum of the vectors that chose a
    code. x (n, Z) are new vectors, codes (n,) their choices.
    """
    chosen = F.one_hot(codes, len(codebook)).to(x)  # (n, K)
    counts.lerp_(chosen.sum(0), 1 - decay)
    sums.lerp_(chosen.T @ x, 1 - decay)
    codebook.copy_(sums / counts.clamp(min=1e-5)[:, None])


# ---- the quantiser ------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """Vectors (B, Z, *places) -> codes (B, Q, *places), int64 in [0, K), and back.

    The places may be rows and columns of a picture, or moments of a sound.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        K, Z = config.n_code, config.latent_channels
        self.codebooks = nn.ModuleList(nn.Embedding(K, Z) for _ in range(config.n_book))
        for book in self.codebooks:
            nn.init.normal_(book.weight, std=0.1)
            book.weight.requires_grad_(not config.ema_decay)
        self.reset_buffers()

    def reset_buffers(self):
        """Start to count idle steps, and the averages of ema_decay."""
        c = self.config
        self.register_buffer("idle", torch.zeros(c.n_book, c.n_code, dtype=torch.long))
        if c.ema_decay:
            self.register_buffer("counts", torch.ones(c.n_book, c.n_code))
            books = torch.stack([book.weight.detach() for book in self.codebooks])
            self.register_buffer("sums", books)  # (Q, K, Z)

    def quantize(self, z: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Vectors (B, Z, *places) -> (codes (B, Q, *places), what is left before each codebook, and
        the vectors of the codes: lists of Q tensors (n, Z)), float32 with gradients."""
        with torch.autocast(z.device.type, enabled=False):
            left = z.float().movedim(1, -1).flatten(0, -2)  # (n, Z)
            codes = []
            lefts = []
            found = []
            for book in self.codebooks:
                nearest = find_nearest(left.detach(), book.weight.detach().float())
                e = book(nearest).float()
                codes.append(nearest.view(len(z), *z.shape[2:]))
                lefts.append(left)
                found.append(e)
                left = left - e.detach()
        return torch.stack(codes, dim=1), lefts, found

    def encode(self, z: Tensor) -> Tensor:
        """Vectors (B, Z, *places) -> codes (B, Q, *places)."""
        return self.quantize(z)[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, Q, *places) -> the sum of their vectors, (B, Z, *places).

        They may be those of the first codebooks alone. Raises ValueError for a code outside of the
        codebook, or more codebooks than there are.
        """
        Q, K = self.config.n_book, self.config.n_code
        if codes.ndim < 3 or not 1 <= codes.size(1) <= Q:
            raise ValueError(
                f"codes are {tuple(codes.shape)}; they must be (B, {Q}, places ...), or have the "
                "first of the codebooks"
            )
        for code in (int(codes.min()), int(codes.max())):
            if not 0 <= code < K:
                raise ValueError(f"there is no code {code}: the codebook has 0 to {K - 1}")
        parts = [book(codes[:, q]) for q, book in enumerate(self.codebooks[: codes.size(1)])]
        return torch.stack(parts).sum(0).movedim(-1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors (B, Z, *places) -> (the vectors of their codes with the gradient of z; the codes;
        the codebook term and the commitment term, sums over all places and codebooks)."""
        codes, lefts, found = self.quantize(z)
        if self.config.ema_decay and self.training:
            for q, (x, book) in enumerate(zip(lefts, self.codebooks)):
                averages = (self.counts[q], self.sums[q], x.detach(), codes[:, q].flatten())
                follow_averages(book.weight, *averages, self.config.ema_decay)
        codebook_term = sum((x.detach() - e).square().sum() for x, e in zip(lefts, found))
        commitment_term = sum((x - e.detach()).square().sum() for x, e in zip(lefts, found))
        e = torch.stack(found).sum(0).view(len(z), *z.shape[2:], -1).movedim(-1, 1)
        return straight_through(z.float(), e), codes, codebook_term, commitment_term

    @torch.no_grad()
    def revive(self) -> None:
        """Count the steps that each code was idle, and move those that are dead; see `split_cells`.

        Called after each step of training, while the gradients are there. A code is used in a step
        if it has a gradient. Codes that stay dead wait again as long.
        """
        after = self.config.dead_after
        for book, idle in zip(self.codebooks, self.idle):
            gradient = book.weight.grad
            if gradient is None or not after:
                continue
            idle += 1
            idle[gradient.abs().sum(1) > 0] = 0
            dead = (idle >= after).nonzero().flatten()
            split_cells(book.weight, gradient, dead)
            idle[dead] = 0


# ---- the model ----------------------------------------------------------------------------------


class VQVAE(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to codes (B, Q, h, w), by encode, and back, by decode."""

    unit = "image"  # what a data set is counted in
    outer = ("codebooks",)  # a table: for AdamW, not for Muon
    unsharded = ("codebooks",)  # whole on each rank, as `revive` compares rows

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.autoencoder)
        self.decoder = Decoder(config.autoencoder)
        self.quantizer = Quantizer(config)

    def reset_buffers(self):
        self.quantizer.reset_buffers()

    def after_step(self):
        """Revive dead codes: the trainer calls this after each step."""
        self.quantizer.revive()

    def to_vectors(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> vectors (B, Z, h, w), before quantisation.

        Raises ValueError for images of other channels, or of a size that cannot be halved so often.
        """
        check_images(images.shape, self.config.in_channels, self.config.factor)
        return self.encoder(images.to(self.encoder.conv_in.weight.dtype))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> codes (B, Q, h, w), int64 in [0, K)."""
        return self.quantizer.encode(self.to_vectors(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, Q, h, w) -> images (B, C, H, W), not clamped to [-1, 1]."""
        z = self.quantizer.decode(codes)
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))

    def rebuild(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the same decoded from their codes."""
        return self.decode(self.encode(images))

    def loss(
        self, batch: dict[str, Tensor], generators: Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The three terms of batch["images"] (B, C, H, W), each a sum over a picture, their mean
        over pictures. Nothing is random.

        metrics, without gradients: "reconstruction", "codebook" and "commitment", the terms.
        """
        images = batch["images"]
        B = len(images)
        e, _, codebook, commitment = self.quantizer(self.to_vectors(images))
        rebuilt = self.decoder(e.to(self.decoder.conv_in.weight.dtype)).float()
        reconstruction = (rebuilt - images).square().sum() / (2 * B)
        codebook = codebook / B
        commitment = commitment / B
        metrics = {
            "reconstruction": reconstruction.detach(),
            "codebook": codebook.detach(),
            "commitment": commitment.detach(),
        }
        loss = reconstruction + self.config.commitment * commitment
        if not self.config.ema_decay:
            loss = loss + codebook
        return loss, metrics

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the shapes and dtypes of real data."""
        side = self.config.image_size
        return {"images": torch.zeros(rows, self.config.in_channels, side, side)}

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> VQVAE:
        """Read a VQModel folder of diffusers (hub/diffusion.py)."""
        from tinyfm.hub import diffusion

        return diffusion.load_vq(cls, VQConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write weights and config in the layout of diffusers (hub/diffusion.py)."""
        from tinyfm.hub import diffusion

        diffusion.save_vq(self, folder, overwrite)
