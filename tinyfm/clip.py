"""CLIP: images and texts in one space, learnt from pairs (Radford et al. 2021).

Two towers, a Vision Transformer (vit.py) for images and a causal Transformer for texts, each turn
their input into a unit vector of E numbers. Training on pairs of an image and its caption makes the
two vectors of a pair point the same way, and those of different pairs apart (InfoNCE):

    z_ij = exp(s) x_i . y_j                      logit of image i and text j; the scale is learnt
    L(z) = -mean_i ln softmax_j(z_ij) at j = i   each row is a classification: which text is mine?
    loss = (L(z) + L(z')) / 2                    z' transposed: which image is mine?

With all rows in one piece, in four lines (figure 3 there):

    x, y = encode_image(images), encode_text(tokens)     # (B, E), (B, E)
    z = exp(s) * x @ y.T                                 # (B, B)
    labels = arange(B)
    loss = (cross_entropy(z, labels) + cross_entropy(z.T, labels)) / 2

So a class needs no training, only a name: write the class names as captions, and classify an image
by the nearest caption (zero-shot). Two more losses share the code:

    SigLIP     (Zhai et al. 2023) classifies each pair on its own: do the two belong together? The
               paper starts at a scale of 10 and a bias of -10. The scale starts at 1 / temperature
               here, by default CLIP's 1 / 0.07 = 14.3: set temperature 0.1 to follow the paper.
    SimCLR     (Chen et al. 2020) needs no captions: a pair is one image, changed twice at random.
               The paper's projection is an MLP with one hidden layer, and its temperature is fixed
               (0.1 on ImageNet). Here the projection is CLIP's matrix, and the scale is learnt.

The scale exp(s) stays below max_scale, 100 as in CLIP's paper: larger logits make training
unstable. `after_step` puts s back to that bound whenever a step has passed it.

Negatives. The positive of an image is its own text, or any equal caption; all other texts of the
batch are its negatives. They are few, and after some training easy to classify. Then the batch has
little left to teach, although the image might still be nearer to another of the data's M texts.
InfoNCE has two remedies, named here after their options, and they can be combined:

    memory     A cross-batch memory (XBM, Wang et al. 2020) keeps the vectors of the last Q rows as
               further columns of z. They cost no pass through a tower. They were computed with
               earlier weights and carry no gradient; while the weights change fast, old vectors
               mislead. So Q is a few batches, and the memory starts `memory_after` batches late.

    rivals     "all": each negative counts as several. Of n columns, n - 1 are negatives, and the
               data have M - 1, so each counts as w = (M - 1) / (n - 1): ln w is added to its logit.
               For example, M = 1,001 and n = 11 give w = 100. With a positive at logit 8 and ten
               negatives at logit 4, the probability of the positive falls from 0.85 to 0.05, so
               that there is much left to learn.

What does "all" estimate? If the negatives are drawn from the data at random, all equally likely,
then w times the sum of their exp(z) is on average the sum over all negatives of the data: the loss
approximates the softmax over all M texts (sampled softmax, Jean et al. 2015). It is too low on
average, because E ln(sum) <= ln E(sum), and lower the fewer negatives matter. But if batches are
made of runs of similar rows (--data.neighbours), the premise is wrong. The texts of a row's own run
are always in its batch, so each of them stands for itself alone: its weight should be 1, and it is
w. Then the loss is no estimate but a weighting of hard negatives: the model learns most from the
texts that it confuses. A test shows the size of it (tests/test_clip.py). For 4,096 texts on a
circle, the softmax over all has the loss 0.67. Random batches of 256 estimate 0.31, and batches of
16 runs of 16 neighbours 2.71; with weight 1 inside a run and 4080 / 240 outside, they give 0.65.

Large batches. The rows of a batch are compared with each other, so the batch cannot be cut into
independent micro-batches. To save memory, the towers process `rows_at_once` rows at a time and
repeat that in the backward pass (GradCache, Gao et al. 2021), and z too is computed a few rows at a
time: the loss and the gradients are the same. With several processes, each computes the rows of z
for its own images, and `gather` fetches the other processes' vectors, with their gradients.

One config expresses OpenAI's CLIP models exactly. The default config has convolutions in front of
the image tower (Xiao et al. 2021), which learn faster from few images.

Letters: B batch, R rows of the batch on this process, T tokens, D width of a tower, E embedding
width, V vocabulary, C channels, H W rows and columns, M pairs in the data, Q rows in the memory.
Left out: the ResNet image towers, and text towers with bidirectional attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyfm.vit import Block, ImageTower


@dataclass(frozen=True)
class CLIPConfig:
    image_size: int = 32  # rows and columns of an image
    channels: int = 1  # channels of an image: 1 grey, 3 colour
    patch_size: int = 8  # rows and columns of a patch, one token of the image tower
    stem: Literal["patch", "conv"] = "conv"  # layers from pixels to tokens: one linear, or several
    image_layer: int = 3  # blocks of the image tower
    image_width: int = 128  # width of the image tower
    image_head: int = 4  # attention heads of the image tower
    vocab_size: int = 2048  # number of tokens the text tower knows
    context_length: int = 32  # largest number of tokens in a caption, the end token included
    text_layer: int = 2  # blocks of the text tower
    text_width: int = 128  # width of the text tower
    text_head: int = 4  # attention heads of the text tower
    embed_dim: int = 128  # width of the space that images and texts share
    image_ff: int = 0  # width inside the MLPs of the image tower; 0 = 4 times image_width
    text_ff: int = 0  # width inside the MLPs of the text tower; 0 = 4 times text_width
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # nonlinearity of the MLPs
    norm_eps: float = 1e-5  # small number added to the variance in each norm
    image_mean: tuple[float, ...] = (0.5,)  # mean of pixels in [0, 1]; 1 number, or 1 per channel
    image_std: tuple[float, ...] = (0.5,)  # deviation of pixels in [0, 1]; numbers as in image_mean
    end_token: int = -1  # id that ends a text; -1 = the last id of its row, -2 = the highest
    loss: Literal["infonce", "siglip", "simclr"] = "infonce"  # contrastive loss
    temperature: float = 0.07  # initial temperature: logits start as cosines / temperature
    max_scale: float = 100.0  # largest factor from cosines to logits
    # weight of infonce's negatives, those of the batch and the memory: batch = 1 each; all = as
    # many as the training data have, divided equally
    rivals: Literal["batch", "all"] = "batch"
    memory: int = 0  # rows of earlier batches that infonce keeps as further negatives
    memory_after: int = 0  # batches before the memory starts, as the weights change fast at first
    augment: float = 0.1  # strength of random changes to training images; simclr: at least 1

    def __post_init__(self):
        self._check_at_least(1, "image_size", "patch_size", "image_layer", "image_width")
        self._check_at_least(1, "image_head", "vocab_size", "text_layer", "text_width")
        self._check_at_least(1, "text_head", "embed_dim")
        self._check_at_least(0, "image_ff", "text_ff", "memory", "memory_after", "augment")
        self._check_at_least(2, "context_length")
        self._check_at_least(-2, "end_token")
        self._check_divisible("image_width", "image_head")
        self._check_divisible("text_width", "text_head")
        self._check_divisible("image_size", "patch_size")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size is {self.patch_size}; the conv stem needs a power of 2")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; use 1 for grey, 3 for colour images")
        for name in ("image_mean", "image_std"):
            values = tuple(getattr(self, name))  # JSON has lists
            object.__setattr__(self, name, values)
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} is {values}; give 1 number, or {self.channels}")
        for name in ("temperature", "max_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std is {self.image_std}; each number must be above 0")
        for name, kind in get_type_hints(CLIPConfig).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; use one of {get_args(kind)}")

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def _check_divisible(self, name: str, divisor_name: str) -> None:
        value = getattr(self, name)
        divisor = getattr(self, divisor_name)
        if value % divisor:
            nearest = divisor * max(1, round(value / divisor))
            problem = f"{name} {value} is not divisible by {divisor_name} {divisor}"
            raise ValueError(f"{problem}; use {nearest}")


# ---- random changes of images -------------------------------------------------------------------


def augment(images: Tensor, generators: list[torch.Generator], strength: float) -> Tensor:
    """Shift, rotate, stretch, shear and shade each image (B, C, H, W) at random, in [-1, 1].

    Image i draws its changes from generators[i], a CPU generator. At strength 1 it is shifted by up
    to 1/8 of the frame, rotated by up to 15 degrees, stretched by up to exp(0.2) either way, and
    its contrast is scaled by 0.6 to 1.4. Outside the frame the border is repeated.
    """
    u = torch.stack([torch.rand(7, generator=g) for g in generators]).to(images.device)
    u = (2 * u - 1) * strength  # (B, 7) in [-strength, strength]
    angle = u[:, 0] * math.radians(15)
    shear = 0.15 * u[:, 1]
    stretch_x = torch.exp(0.2 * u[:, 2])
    stretch_y = torch.exp(0.2 * u[:, 3])
    shift_x = u[:, 4] / 4  # of a frame that spans [-1, 1]
    shift_y = u[:, 5] / 4
    contrast_factor = 1 + 0.4 * u[:, 6].clamp(-1, 1)

    # Row x and row y of the affine map from places of the result to places of the image.
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack((cos * stretch_x, (shear - sin) * stretch_y, shift_x), dim=1)  # (B, 3)
    row_y = torch.stack((sin * stretch_x, cos * stretch_y, shift_y), dim=1)
    maps = torch.stack((row_x, row_y), dim=1)  # (B, 2, 3)
    grid = F.affine_grid(maps, images.shape, align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return (moved * contrast_factor[:, None, None, None]).clamp(-1, 1)


# ---- the text tower -----------------------------------------------------------------------------


class TextTower(nn.Module):
    """Tokens (B, T) -> (B, D): the state at the end token, the first that has read the whole text.

    Rows are padded with the end token, so its first occurrence counts. The config says which id it
    is; OpenAI's code takes the highest id of each row (end_token -2).
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        D = config.text_width
        self.end_token = config.end_token
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.position = nn.Parameter(torch.empty(config.context_length, D))
        self.blocks = nn.ModuleList(
            Block(D, config.text_head, config.text_ff, causal=True, config=config)
            for _ in range(config.text_layer)
        )
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)

    def states(self, tokens, at=None):
        """Normalised states of all tokens, (B, T, D).

        With `at` (B,), only the state at position at[i] of row i, (B, 1, D): the last block then
        computes no other.
        """
        T = tokens.size(1)
        if len(self.position) < T:
            problem = f"{T} tokens exceed context_length {len(self.position)}"
            raise ValueError(f"{problem}; shorten the text, or train with a longer context")
        x = self.token_embedding(tokens) + self.position[:T]  # (B, T, D)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, at))

    def forward(self, tokens):
        """Tokens (B, T) -> the states at the end tokens, (B, D)."""
        if self.end_token == -1:
            end_id = tokens[:, -1:]  # (B, 1)
        elif self.end_token == -2:
            end_id = tokens.amax(1, keepdim=True)  # (B, 1)
        else:
            end_id = self.end_token
        end = (tokens == end_id).int().argmax(1)  # (B,): the first occurrence
        # Cut off the padding that all rows share: the model is causal, so no end token sees it.
        # Fake tensors have no values to read, and a compiled graph no length that depends on them.
        if type(tokens) is Tensor and not torch.compiler.is_compiling():
            tokens = tokens[:, : int(end.max()) + 1]
        return self.states(tokens, end)[:, 0]


# ---- more negatives than a batch has -------------------------------------------------------------


class CrossBatchMemory(nn.Module):
    """The vectors of the last Q rows: x and y (Q, E), and ids (Q,), -1 where a place is empty.

    They are buffers, saved with the weights, so a resumed run has the memory it had. The memory
    stays empty for the first `after` batches.
    """

    def __init__(self, rows: int, width: int, after: int):
        super().__init__()
        self.after = after
        self.register_buffer("x", torch.zeros(rows, width))
        self.register_buffer("y", torch.zeros(rows, width))
        self.register_buffer("ids", torch.full((rows,), -1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # seen so far

    def append_to(self, x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of a batch (B, E), (B, E), (B,), followed by those remembered: B + Q rows."""
        return torch.cat((x, self.x)), torch.cat((y, self.y)), torch.cat((ids, self.ids))

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        """Store the rows of a batch in place of the oldest ones.

        Rows are stored as empty if the batch is one of the first `after`, or if they are not
        finite: the trainer skips a step with such numbers.
        """
        valid = (x + y).isfinite().all(1) & (self.batches >= self.after)
        x, y, ids = self.append_to(x.nan_to_num(), y.nan_to_num(), ids.where(valid, -1))
        Q = len(self.ids)
        self.x.copy_(x[:Q])
        self.y.copy_(y[:Q])
        self.ids.copy_(ids[:Q])
        self.batches += 1


def log_weights(ids: Tensor, n_pairs: int) -> Tensor:
    """For each column, the ln of the number of negatives as which it counts, (n,).

    ids (n,) are those of the columns, -1 where a column is empty: its result is -inf. n_pairs is M,
    the number of pairs in the data. Each of the k columns that are not empty counts as
    (M - 1) / (k - 1). If M does not exceed k, each counts once, and the result is 0.
    """
    known = ids >= 0
    count = ((n_pairs - 1) / (known.sum() - 1)).clamp(min=1)
    return count.log().where(known, -math.inf)


# ---- the losses ---------------------------------------------------------------------------------


def softmax_loss(z: Tensor, positive: Tensor) -> Tensor:
    """InfoNCE: the sum over rows of z (R, n) of the mean of -ln softmax at the row's positives.

    positive: bool (R, n), with at least one True in each row. z may hold -inf, but at no positive.
    The softmax is over all columns of a row. Logits may be large: exp(z) is not to overflow.
    """
    at_positives = z.masked_fill(~positive, 0).sum(1) / positive.sum(1)  # (R,)
    return (z.logsumexp(1) - at_positives).sum()


def sigmoid_loss(z: Tensor, positive: Tensor) -> Tensor:
    """SigLIP (algorithm 1 there): the sum over all pairs of -ln of the probability of its label.

    A pair is positive with probability sigmoid(z), negative with sigmoid(-z). z (R, n) are logits,
    which may be large; positive, bool (R, n), are the labels.
    """
    return -F.logsigmoid(torch.where(positive, z, -z)).sum()


def contrast(
    loss: Callable,
    x: Tensor,
    y: Tensor,
    x_ids: Tensor,
    y_ids: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    log_weight: Tensor | None = None,
    rows: int = 0,
) -> Tensor:
    """The mean of `loss` over the rows of x, each compared with all rows of y.

    x (R, E) and y (n, E) are unit vectors, z = scale x y' + bias are their logits (R, n). A pair is
    a positive where x_ids (R,) and y_ids (n,) are equal. skip (R,) is a column that each row leaves
    out: itself, where x and y are the same vectors. log_weight (n,), one number per column, is
    added to the logits of the negatives. `rows` > 0 computes z, and its gradient, for that number
    of rows at a time.
    """

    def loss_of(x, x_ids, skip):
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 blurs similar vectors
            z = (scale * x) @ y.T  # (rows, n)
        if bias is not None:
            z = z + bias
        positive = x_ids[:, None] == y_ids
        if log_weight is not None:
            z = torch.where(positive, z, z + log_weight)
        if skip is not None:
            itself = skip[:, None] == torch.arange(len(y), device=y.device)
            z = z.masked_fill(itself, -math.inf)
            positive = positive & ~itself
        return loss(z, positive)

    if not 0 < rows < len(x):
        return loss_of(x, x_ids, skip) / len(x)
    skips = [None] * math.ceil(len(x) / rows) if skip is None else skip.split(rows)
    total = 0
    for part in zip(x.split(rows), x_ids.split(rows), skips):
        total = total + checkpoint(loss_of, *part, use_reentrant=False)
    return total / len(x)


# ---- the model ----------------------------------------------------------------------------------


class CLIP(nn.Module):
    """Images (B, C, H, W) in [-1, 1] and tokens (B, T) -> logits (B, B), row i for image i."""

    unit = "pair"  # what a data set is counted in
    outer = ()  # Muon trains the tables too: most words occur in each batch
    whole_batch = True  # the loss compares the rows, so the trainer passes all it has at once

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.rows_at_once = 0  # rows in the towers and in z at a time, to save memory; 0 = all
        self.rank = 0  # of this process
        self.gather = lambda rows: rows  # R rows of each process -> all rows, in order of rank
        self.n_pairs = 0  # pairs in the training data, for rivals "all"
        self.image_tower = ImageTower(config)
        self.image_projection = nn.Linear(config.image_width, config.embed_dim, bias=False)
        if config.loss != "simclr":
            self.text_tower = TextTower(config)
            self.text_projection = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        if config.loss == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        if config.memory and config.loss == "infonce":
            self.memory = CrossBatchMemory(config.memory, config.embed_dim, config.memory_after)
        if config.memory or config.rivals == "all":  # more negatives than in validation
            self.loss_name = "loss_more_negatives"
        self.reset_parameters()

    def reset_buffers(self):
        """Compute the buffers that are not saved (see ImageTower.reset_buffers)."""
        self.image_tower.reset_buffers()

    def reset_parameters(self):
        """Draw the weights: biases 0, norms 1, embeddings normal with standard deviation 0.02.

        Matrices and kernels are normal with 1 / sqrt(fan-in); those that write to the states of a
        tower with L blocks are smaller by sqrt(2 L), as 2 L of them add up.
        """
        for name, p in self.named_parameters():
            layers = self.config.text_layer if "text" in name else self.config.image_layer
            if name.endswith("bias") and "logit" not in name:
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.ones_(p)
            elif p.ndim >= 2 and "embedding" not in name and "position" not in name:
                n_terms = p[0].numel()  # fan-in
                if name.endswith(("out.weight", "down.weight")):
                    n_terms *= 2 * layers
                nn.init.normal_(p, std=n_terms**-0.5)
            elif p.ndim:
                nn.init.normal_(p, std=0.02)

    # ---- embeddings ----

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> unit vectors (B, E) in float32."""
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if images.shape[1:] != expected:
            problem = f"images are {tuple(images.shape[1:])}, the model takes {expected}"
            raise ValueError(f"{problem}; convert the images")
        return F.normalize(self.image_projection(self.image_tower(images)).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), each row padded with its end token -> unit vectors (B, E) in float32."""
        if self.config.loss == "simclr":
            problem = "this model was trained on images alone: it has no text tower"
            raise ValueError(f"{problem}; train one with loss infonce or siglip")
        return F.normalize(self.text_projection(self.text_tower(tokens)).float(), dim=-1)

    def scale(self) -> Tensor:
        """exp(s), the factor from cosines to logits, at most max_scale.

        The clamp acts on weights from elsewhere; in training, `after_step` keeps s in its range.
        """
        return self.logit_scale.clamp(max=math.log(self.config.max_scale)).exp()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the scale in its range; the trainer calls this after each step.

        The clamp in `scale` alone would not do: above its bound the gradient is 0, so an s that has
        stepped over the bound would never change again.
        """
        if self.logit_scale.requires_grad:
            self.logit_scale.clamp_(max=math.log(self.config.max_scale))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.scale() * self.encode_image(images) @ self.encode_text(tokens).T  # (B, B)

    # ---- loss ----

    def in_parts(self, encode: Callable, inputs: Tensor) -> Tensor:
        """encode(inputs), rows_at_once rows at a time.

        The activations of one part are kept at a time; the backward pass computes them again.
        """
        if not 0 < self.rows_at_once < len(inputs):
            return encode(inputs)
        parts = inputs.split(self.rows_at_once)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in parts])

    def views(self, batch: dict[str, Tensor], generators) -> tuple[Tensor, Tensor]:
        """The two sides of the pairs, unit vectors (R, E) each."""
        config = self.config
        images = batch["images"]
        if config.loss == "simclr":  # in evaluation too; its generators are the same each time
            strength = max(1.0, config.augment)
            first = augment(images, generators, strength)
            second = augment(images, generators, strength)
            x = self.in_parts(self.encode_image, first)
            y = self.in_parts(self.encode_image, second)
            return x, y
        if self.training and config.augment and generators:
            images = augment(images, generators, config.augment)
        y = self.in_parts(self.encode_text, batch["tokens"])
        x = self.in_parts(self.encode_image, images)
        return x, y

    def gathered(self, rows: Tensor) -> Tensor:
        """In training the rows of all processes, (B, ..); in evaluation this process's own."""
        return self.gather(rows) if self.training else rows

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive loss of the config, in nats (siglip: per image, summed over texts).

        batch: "images" (R, C, H, W) in [-1, 1], "tokens" (R, T), and "labels" (R,), equal where the
        captions are. generators: one CPU generator per row; simclr needs them. Raises ValueError
        for a batch of one row.
        """
        x, y = self.views(batch, generators)
        all_x = self.gathered(x)  # (B, E)
        all_y = self.gathered(y)
        if len(all_x) < 2:
            problem = "a contrastive loss compares rows, and this batch has 1"
            raise ValueError(f"{problem}: it needs a batch of 2 rows or more")
        if self.config.loss == "simclr":
            return self.simclr_loss(x, y, all_x, all_y), {}
        ids = batch["labels"]
        all_ids = self.gathered(ids)  # (B,)
        if self.config.loss == "siglip":
            value = contrast(
                sigmoid_loss,
                x,
                all_y,
                ids,
                all_ids,
                self.scale(),
                bias=self.logit_bias,
                rows=self.rows_at_once,
            )
            return value, {}
        return self.infonce_loss(x, y, ids, all_x, all_y, all_ids), {}

    def infonce_loss(self, x, y, ids, all_x, all_y, all_ids) -> Tensor:
        """The mean of two classifications: of the images among texts, and the reverse.

        x, y (R, E) and ids (R,) are this process's rows, all_x, all_y (B, E) and all_ids (B,) those
        of all processes. In training the memory adds Q columns, and the rows enter the memory.
        """
        config = self.config
        columns_x, columns_y, column_ids = all_x, all_y, all_ids
        if self.training and config.memory:
            columns_x, columns_y, column_ids = self.memory.append_to(all_x, all_y, all_ids)
            self.memory.add(all_x, all_y, all_ids)
        log_weight = None
        if self.training and (config.memory or config.rivals == "all"):
            n_pairs = self.n_pairs if config.rivals == "all" else 0
            log_weight = log_weights(column_ids, n_pairs)
        options = {
            "x_ids": ids,
            "y_ids": column_ids,
            "scale": self.scale(),
            "log_weight": log_weight,
            "rows": self.rows_at_once,
        }
        image_to_text = contrast(softmax_loss, x, columns_y, **options)
        text_to_image = contrast(softmax_loss, y, columns_x, **options)
        return (image_to_text + text_to_image) / 2

    def simclr_loss(self, x, y, all_x, all_y) -> Tensor:
        """NT-Xent (Chen et al. 2020, eq. 1): find the other view of an image among all views.

        x, y (R, E) are the two views of this process's images, all_x, all_y (B, E) those of all.
        """
        ids = torch.arange(len(all_x), device=x.device)
        own = ids if len(all_x) == len(x) else ids.split(len(x))[self.rank]
        return contrast(
            softmax_loss,
            torch.cat((x, y)),  # (2 R, E)
            torch.cat((all_x, all_y)),  # (2 B, E)
            own.repeat(2),
            ids.repeat(2),
            self.scale(),
            skip=torch.cat((own, own + len(ids))),  # a view is not its own other view
            rows=self.rows_at_once,
        )

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch with the shapes and dtypes of real data; its captions have full length."""
        config = self.config
        images = torch.zeros(rows, config.channels, config.image_size, config.image_size)
        end = config.end_token if config.end_token >= 0 else 1
        filler = 0 if end else 1  # an id other than the end token
        tokens = torch.full((rows, config.context_length), filler)
        tokens[:, -1] = end
        return {"images": images, "tokens": tokens, "labels": torch.arange(rows)}

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> CLIP:
        """Read a CLIPModel folder in the Hugging Face layout (hub/clip.py)."""
        from tinyfm.hub import clip

        return clip.load(cls, CLIPConfig, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, config and tokenizer in the Hugging Face layout (hub/clip.py)."""
        from tinyfm.hub import clip

        clip.save(self, folder, tokenizer, overwrite)
