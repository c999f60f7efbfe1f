"""Networks as ledgers: which numbers they learn, and how often each is used.

A network is a list of matrices. One of m x n, used at P positions of a row (tokens of a text,
pixels of an image), holds m n numbers and costs m n P multiply-adds; biases, gains and tables hold
numbers and cost next to nothing; attention holds none and costs 2 N K T S multiply-adds between T
queries and S keys, half for the scores and half for their sums. So one line of the ledger answers
three questions: how many parameters, how many FLOPs, how many numbers wait for the backward pass.

    attention   q and out of D x N K, k and v of D x G K     2 D N K + 2 D G K
    MLP         two matrices of D x F, or three for SwiGLU   2 D F, or 3 D F
    tables      tokens and positions                         V D + T D

With N K = G K = D and F = 4 D that is 12 D^2 a layer: the 12 L D^2 of the GPT papers. Convolutions
are matrices of k^2 C_in x C_out used at every pixel.

Each function here writes the ledger of a family from the numbers of a shape (systems.py has them).
Counted is what is learnt: a tied head once, fixed sinusoids not at all.

Letters: B batch, T tokens, S keys, D model width, N query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary, C channels, L layers.
Left out: text encoders of MusicGen, and what a system does around its network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace as Shape

# ---- the ledger ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One line. Counts are of one layer, and, from `products` on, of one row of the batch."""

    part: str  # what it is called in sums; "embedding" and "head" are the tables of tokens
    weights: int = 0  # numbers in matrices
    vectors: int = 0  # biases, gains, tables: learnt, but not multiplied by what passes
    positions: int = 0  # how often a row uses each weight
    products: int = 0  # multiply-adds between activations
    kept: int = 0  # numbers kept for the backward pass ...
    split: int = 0  # ... and those of them that tensor parallelism divides
    scores: int = 0  # attention scores: kept too, unless attention is fused
    masks: int = 0  # numbers that dropout may zero: each keeps a byte

    @property
    def parameters(self) -> int:
        return self.weights + self.vectors

    @property
    def macs(self) -> int:
        return self.weights * self.positions + self.products


@dataclass(frozen=True)
class Stack:
    """Layers that are repeated n times: a block of a Transformer, or, once, all the rest."""

    layers: tuple[Layer, ...]
    n: int = 1
    boundary: int = 0  # numbers that enter a block, a row: what activation checkpointing keeps
    cache: int = 0  # numbers that generation keeps of each token, in each block
    cross_cache: int = 0  # ... and of each row: keys and values of what the encoder read

    def total(self, quantity: str) -> int:
        return self.n * sum(getattr(layer, quantity) for layer in self.layers)


def vary(c: Shape, **changes: int) -> Shape:
    return Shape(**vars(c) | changes)


def conv(part: str, C: int, out: int, at: int, taps: int = 1, bias: int = 1) -> Layer:
    """C channels become `out` at `at` positions, each reading `taps` of them; 1 is a linear layer.

    A square kernel of width k has k^2 taps.
    """
    return Layer(part, taps * C * out, bias * out, at, kept=C * at)


# ---- Transformers -------------------------------------------------------------------------------


def attention(c: Shape, T: int, S: int = 0) -> Iterator[Layer]:
    """T queries look at S keys of another stack, or at their own stack's (Vaswani et al. 2017).

    With relative positions (Dai et al. 2019) one matrix more turns distances into keys, to which
    the queries compare too; without causality there are twice as many distances.
    """
    D, NK, GK = c.d_model, c.heads * c.d_head, c.kv_heads * c.d_head
    keys, part = S or min(T, c.window or T), "cross-attention" if S else "attention"
    distances = c.relative * (1 if c.causal else 2) * keys
    vectors = c.bias * (NK + D + (2 - c.no_k_bias) * GK) + c.relative_biases * NK
    yield Layer(
        part, 2 * D * NK, vectors + 2 * c.qk_norm * c.d_head, T, NK * T * (2 * keys + distances),
        kept=D * T, split=2 * NK * T + 2 * GK * (S or T), scores=c.heads * T * keys, masks=D * T,
    )  # fmt: skip
    yield Layer(part, 2 * D * GK, positions=S or T)  # keys and values
    if c.relative:
        yield Layer(part, D * NK, positions=distances)


def mlp(c: Shape, T: int) -> Iterator[Layer]:
    """Two matrices, or three for SwiGLU (Shazeer 2020); of several experts a token passes `active`
    (Shazeer et al. 2017)."""
    D, F = c.d_model, c.d_ff
    weights, inside = (3 * D * F, 4 * F) if c.mlp == "swiglu" else (2 * D * F, 2 * F)
    if c.mlp == "relu":  # its output tells its gradient: one copy serves as input of the next too
        inside = F
    biases = c.mlp_bias * (F + D)
    yield Layer(
        "mlp", c.active * weights, biases, T, kept=D * T, split=c.active * inside * T, masks=D * T
    )
    if c.experts > 1:
        yield Layer("router", D * c.experts, positions=T)
        yield Layer("idle experts", vectors=(c.experts - c.active) * weights)


def norms(c: Shape, n: int, T: int, width: int = 0) -> Layer:
    """n normalisations: a gain, and with LayerNorm a bias, for each of `width` channels."""
    width = width or c.d_model
    return Layer("norm", vectors=n * c.norm * width, kept=n * width * T)


def block(c: Shape, T: int, S: int = 0) -> Stack:
    """The blocks of attention (and cross-attention, if there are S keys to look at) and an MLP."""
    layers = [*attention(c, T), *(attention(c, T, S) if S else ()), *mlp(c, T)]
    layers.append(norms(c, c.norms + bool(S), T))
    cache = 2 * c.kv_heads * c.d_head if c.causal else 0
    return Stack(tuple(layers), c.layers, c.d_model * T, cache, cache * S)


def output(c: Shape, T: int, E: int) -> Iterator[Layer]:
    """What reads the last hidden states; "tied" is the table of tokens once more."""
    D, V = c.d_model, c.vocab
    dense = Layer("output", D * D, D, T, kept=D * T)
    tied = Layer("head", products=V * E * T, kept=E * T)
    match c.head:
        case "tied":
            yield tied
        case "untied":
            yield Layer("head", V * D, positions=T, kept=D * T)
        case "pooler":  # of BERT: the first token's state, for sentences
            yield replace(dense, positions=1, kept=D)
        case "masked":  # of RoBERTa, and of BERT while it is pretrained
            yield from (dense, norms(c, 1, T), tied, Layer("output", vectors=V))
        case "biased":  # of XLNet; and the vector that stands for a hidden token
            yield from (tied, Layer("output", vectors=V + D))
        case "binary":  # of ELECTRA: was this token replaced?
            yield from (dense, conv("output", D, 1, T))


def transformer(c: Shape) -> Iterator[Stack]:
    """One stack: GPT and all that came of it, BERT and all that came of it."""
    T, V, D, E = c.context, c.vocab, c.d_model, c.d_embed or c.d_model
    tables = V * E + (c.positions + c.types) * (c.d_position or E)
    before = [Layer("embedding", vectors=tables)]
    if c.embed_norm:
        before.append(norms(c, 1, T, E))
    if E != D:
        before.append(conv("projection", E, D, T, bias=c.projection_bias))
    after = [norms(c, c.final_norm, T)]
    if E != D and c.head == "tied":
        after.append(conv("projection", D, E, T, bias=0))
    yield Stack(tuple(before))
    yield block(c, T)
    yield Stack((*after, *output(c, T, E)))


def t5(c: Shape) -> Iterator[Stack]:
    """Encoder and decoder share one table; the bias of each distance is shared by all layers
    (Raffel et al. 2020)."""
    S, T, D, buckets = c.context, c.targets, c.d_model, 32
    yield Stack((Layer("embedding", vectors=c.vocab * D + 2 * buckets * c.heads),))
    yield block(vary(c, causal=0), S)
    yield block(c, T, S)
    yield Stack((norms(c, 1, S), norms(c, 1, T), *output(c, T, D)))


def whisper(c: Shape) -> Iterator[Stack]:
    """Two convolutions halve the frames of a spectrogram; positions of the encoder are fixed
    (Radford et al. 2022)."""
    S, T, D = c.frames, c.context, c.d_model
    first = conv("convolutions", c.mels, D, 2 * S, 3)
    yield Stack((first, conv("convolutions", D, D, S, 3)))
    yield block(vary(c, causal=0), S)
    yield Stack((norms(c, 1, S), Layer("embedding", vectors=(c.vocab + c.positions) * D)))
    yield block(c, T, S)
    yield Stack((norms(c, 1, T), *output(c, T, D)))


def musicgen(c: Shape) -> Iterator[Stack]:
    """A decoder of four streams of codes, which looks at an encoded text (Copet et al. 2023)."""
    T, D = c.context, c.d_model
    yield Stack((Layer("embedding", vectors=c.streams * (c.vocab + 1) * D),))  # one to start with
    yield block(c, T, c.text)
    yield Stack((norms(c, 1, T), Layer("head", c.streams * c.vocab * D, positions=T, kept=D * T)))


def vision(c: Shape) -> Iterator[Stack]:
    """ViT: square patches of the image are the tokens, after one that will stand for them all
    (Dosovitskiy et al. 2021)."""
    patches, D = (c.image // c.patch) ** 2, c.d_model
    T = patches + 1
    patch = conv("patches", 3, D, patches, c.patch**2, c.patch_bias)
    yield Stack((patch, Layer("embedding", vectors=D + T * D), norms(c, c.embed_norm, T)))
    yield block(c, T)
    yield Stack((norms(c, 1, T), conv("output", D, c.outputs, 1, bias=c.patch_bias)))


def clip(c: Shape) -> Iterator[Stack]:
    """Two towers that project into one space, and the scale of their products (Radford et al.
    2021)."""
    D, N = c.image_width, c.image_width // 64
    image = vary(c, embed_norm=1, layers=c.image_layers, d_model=D, heads=N, kv_heads=N, d_head=64)
    yield from vision(vary(image, d_ff=4 * D))
    yield from transformer(c)
    scale = Layer("scale", vectors=1, products=c.outputs)  # of a text and its own image
    yield Stack((conv("output", c.d_model, c.outputs, 1, bias=0), scale))


def dit(c: Shape) -> Iterator[Stack]:
    """A Transformer on patches of a latent; time and class set gain, shift, gate of its norms
    (Peebles and Xie 2023)."""
    T, D = (c.image // c.patch) ** 2, c.d_model
    inside = block(c, T)
    modulation, time = conv("modulation", D, 6 * D, 1), conv("time", 256, D, 1)
    classes = Layer("embedding", vectors=(c.classes + 1) * D)  # one for "any class"
    patches = conv("patches", c.channels, D, T, c.patch**2)
    yield Stack((patches, time, conv("time", D, D, 1), classes))
    yield replace(inside, layers=(*inside.layers, modulation))
    last = conv("output", D, 2 * c.channels * c.patch**2, T)
    yield Stack((norms(c, 1, T), conv("modulation", D, 2 * D, 1), last))


# ---- convolutional networks ---------------------------------------------------------------------


def group_norm(C: int, at: int) -> Layer:
    """Normalisation, then a nonlinearity: each keeps what enters it."""
    return Layer("norm", vectors=2 * C, kept=2 * C * at)


def residual(c: Shape, C: int, out: int, at: int) -> Iterator[Layer]:
    """Norm, convolution, what the time adds (or scales by, too), norm, convolution."""
    yield group_norm(C, at)
    yield conv("convolutions", C, out, at, 9)
    if c.time:
        yield conv("time", c.time, (1 + c.scale_shift) * out, 1)
    yield group_norm(out, at)
    yield conv("convolutions", out, out, at, 9)
    if out != C:
        yield conv("convolutions", C, out, at)


def pixel_attention(c: Shape, C: int, at: int, depth: int) -> Iterator[Layer]:
    """Every pixel looks at every other; with a text (`cross` wide), also at its tokens.

    With a text it is `depth` Transformer blocks whose MLP is gated (GEGLU).
    """
    heads = C // c.d_head if c.d_head else c.heads
    look = Layer("attention", products=2 * C * at * at, scores=heads * at * at)
    yield Layer("norm", vectors=2 * C, kept=C * at)
    if not c.cross:
        yield from (conv("attention", C, 3 * C, at), look, conv("attention", C, C, at))
        return
    yield conv("attention", C, C, at)
    for _ in range(depth):
        yield Layer("norm", vectors=6 * C, kept=3 * C * at)
        yield from (conv("attention", C, 3 * C, at, bias=0), look, conv("attention", C, C, at))
        yield conv("cross-attention", C, C, at, bias=0)
        yield conv("cross-attention", c.cross, 2 * C, c.text, bias=0)
        yield replace(look, part="cross-attention", products=2 * C * at * c.text, scores=0)
        yield conv("cross-attention", C, C, at)
        yield from (conv("mlp", C, 8 * C, at), conv("mlp", 4 * C, C, at))
    yield conv("attention", C, C, at)


def contract(c: Shape, at: int) -> tuple[list[Layer], list[int]]:
    """Image to middle: `blocks` residual blocks a level, half the side after each but the last.

    Also returns the channels of what the way back may read.
    """
    C = c.channels[0]
    layers, skips = [conv("convolutions", c.inputs, C, at, 9)], [C]
    for level, out in enumerate(c.channels):
        for _ in range(c.blocks):
            layers += residual(c, C, out, at)
            C = out
            if level in c.attention:
                layers += pixel_attention(c, C, at, c.depth[level])
            skips.append(C)
        if level < len(c.channels) - 1:
            at //= 4
            layers += residual(c, C, C, at) if c.updown else [conv("convolutions", C, C, at, 9)]
            skips.append(C)
    return layers, skips


def middle(c: Shape, at: int) -> list[Layer]:
    C = c.channels[-1]
    look = pixel_attention(c, C, at, c.depth[-1])
    return [*residual(c, C, C, at), *look, *residual(c, C, C, at)]


def expand(c: Shape, at: int, skips: list[int]) -> list[Layer]:
    """Middle to image: one residual block more a level, each beside a skip if there are any."""
    layers, C = [], c.channels[-1]
    for level, out in reversed(list(enumerate(c.channels))):
        for _ in range(c.blocks + 1):
            layers += residual(c, C + (skips.pop() if skips else 0), out, at)
            C = out
            if level in c.attention:
                layers += pixel_attention(c, C, at, c.depth[level])
        if level:
            at *= 4
            layers += residual(c, C, C, at) if c.updown else [conv("convolutions", C, C, at, 9)]
    return [*layers, group_norm(C, at), conv("convolutions", C, c.outputs, at, 9)]


def unet(c: Shape) -> Iterator[Stack]:
    """DDPM's U-Net (Ho et al. 2020, appendix B) and its heirs: down, middle, and up beside what was
    kept on the way down."""
    first, at = c.first or c.channels[0], c.side**2
    time = [conv("time", first, c.time, 1), conv("time", c.time, c.time, 1)]
    if c.added:  # SDXL: sizes and crops of the image, and a vector of the whole text
        time += [conv("time", c.added, c.time, 1), conv("time", c.time, c.time, 1)]
    time.append(Layer("embedding", vectors=c.classes * c.time))
    down, skips = contract(c, at)
    least = at // 4 ** (len(c.channels) - 1)
    yield Stack((*time, *down, *middle(c, least), *expand(c, least, skips)))


def vae(c: Shape) -> Iterator[Stack]:
    """Stable Diffusion's autoencoder: a U-Net without skips, through a latent of `latent` channels
    whose mean and variance the encoder gives (Rombach et al. 2022)."""
    at, C, Z = c.side**2, c.channels[-1], c.latent
    least = at // 4 ** (len(c.channels) - 1)
    down, _ = contract(c, at)
    down += [*middle(c, least), group_norm(C, least), conv("convolutions", C, 2 * Z, least, 9)]
    yield Stack((*down, conv("convolutions", 2 * Z, 2 * Z, least)))
    up = [conv("convolutions", Z, Z, least), conv("convolutions", Z, C, least, 9)]
    yield Stack((*up, *middle(c, least), *expand(c, least, [])))


def batch_norm(C: int, at: int) -> Layer:
    return Layer("norm", vectors=2 * C, kept=2 * C * at)


def resnet(c: Shape) -> Iterator[Stack]:
    """Bottlenecks: 1x1 to a quarter of the channels, 3x3, 1x1 back (He et al. 2016)."""
    at, C = (c.image // 2) ** 2, 64
    layers = [conv("convolutions", 3, C, at, 49, bias=0), batch_norm(C, at)]
    at //= 4
    for level, blocks in enumerate(c.blocks):
        inside, out = 64 * 2**level, 256 * 2**level
        for i in range(blocks):
            before = at
            at = at // 4 if level and not i else at
            steps = [(C, inside, before, 1), (inside, inside, at, 9), (inside, out, at, 1)]
            steps += [(C, out, at, 1)] if not i else []
            for cin, cout, where, taps in steps:
                layers.append(conv("convolutions", cin, cout, where, taps, bias=0))
                layers.append(batch_norm(cout, where))
            C = out
    yield Stack((*layers, conv("output", C, c.outputs, 1)))


def mobilenet(c: Shape) -> Iterator[Stack]:
    """Inverted residuals: 1x1 to 6 times the channels, 3x3 on each alone, 1x1 to few (Sandler et
    al. 2018, table 2)."""
    at, C = (c.image // 2) ** 2, 32
    layers = [conv("convolutions", 3, C, at, 9, bias=0), batch_norm(C, at)]
    for level, (out, blocks) in enumerate(zip(c.channels, c.blocks)):
        for i in range(blocks):
            wide, before = C * (6 if level else 1), at
            at = at // 4 if not i and level in c.halving else at
            if wide != C:
                layers += [conv("convolutions", C, wide, before, bias=0), batch_norm(wide, before)]
            alone = replace(conv("convolutions", 1, wide, at, 9, bias=0), kept=wide * before)
            layers += [alone, batch_norm(wide, at)]
            layers += [conv("convolutions", wide, out, at, bias=0), batch_norm(out, at)]
            C = out
    layers += [conv("convolutions", C, 1280, at, bias=0), batch_norm(1280, at)]
    yield Stack((*layers, conv("output", 1280, c.outputs, 1)))
