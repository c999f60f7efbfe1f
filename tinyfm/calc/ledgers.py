"""Networks as ledgers: which numbers a network learns, and how often each one is used.

A network is a list of matrices. A matrix of m x n that is applied at P positions of a row (the
tokens of a text, the pixels of an image) holds m n parameters and costs m n P multiply-adds.
Biases, gains and tables hold parameters but cost next to nothing. Attention itself holds no
parameters, but costs 2 N K T S multiply-adds between T queries and S keys: half for the scores,
half for the weighted sums. So one line of the ledger answers three questions: how many parameters
there are, how many FLOPs they cost, and how many numbers are kept for the backward pass.

    attention   q and out of D x N K, k and v of D x G K     2 D N K + 2 D G K
    MLP         two matrices of D x F, or three for SwiGLU   2 D F, or 3 D F
    tables      tokens and positions                         V D + T D

With N K = G K = D and F = 4 D that is 12 D^2 a layer, the 12 L D^2 of the GPT papers. A convolution
is a matrix of k^2 C_in x C_out that is applied at every pixel.

Each function below writes the ledger of one family from the sizes in a shape (see systems.py). Only
trained parameters are counted: a tied head once, fixed sinusoids not at all.

Letters: B batch, T tokens, S keys, D model width, N query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary, E embedding width, C channels, Z latent channels, L layers.
Left out: the text encoder of MusicGen, and everything a system does around its network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace as Shape

# ---- the ledger ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One line of a ledger.

    All counts are for one layer; `products`, `kept`, `split`, `scores` and `masks` are also for one
    row of the batch.
    """

    part: str  # the name under which it is summed; "embedding" and "head" are the token tables
    weights: int = 0  # parameters in matrices
    vectors: int = 0  # parameters outside matrices: biases, gains, tables
    positions: int = 0  # positions of a row at which each weight is applied
    products: int = 0  # multiply-adds between activations, as in attention
    kept: int = 0  # numbers kept for the backward pass, whole on every GPU
    split: int = 0  # numbers kept for the backward pass that tensor parallelism divides
    scores: int = 0  # attention scores, kept only where attention is not fused
    masks: int = 0  # numbers that dropout may zero: each keeps one byte of mask

    @property
    def parameters(self) -> int:
        return self.weights + self.vectors

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward pass over one row.

        Each weight is used once at each position; what is outside matrices multiplies nothing.
        """
        return self.weights * self.positions + self.products


@dataclass(frozen=True)
class Stack:
    """Layers that are repeated n times: the block of a Transformer. With n = 1, other layers."""

    layers: tuple[Layer, ...]
    n: int = 1
    boundary: int = 0  # numbers of a row that enter a block: what full checkpointing keeps
    cache: int = 0  # numbers that each block caches for each token in generation
    cross_cache: int = 0  # and for each row: keys and values of the encoder's output

    def total(self, quantity: str) -> int:
        """Sum of one quantity of Layer, such as "parameters" or "macs", over all repetitions."""
        return self.n * sum(getattr(layer, quantity) for layer in self.layers)


def vary(c: Shape, **changes: int) -> Shape:
    """A copy of a shape with some fields changed."""
    return Shape(**vars(c) | changes)


def conv(part: str, C: int, out: int, at: int, taps: int = 1, bias: int = 1) -> Layer:
    """A map from C to `out` channels at `at` positions, each reading `taps` positions.

    A square kernel of width k has k^2 taps; a linear layer has 1.
    """
    return Layer(part, taps * C * out, bias * out, at, kept=C * at)


# ---- Transformers -------------------------------------------------------------------------------


def attention(c: Shape, T: int, S: int = 0) -> Iterator[Layer]:
    """T queries attend to their own stack, or to S keys of another one (Vaswani et al. 2017).

    With relative positions (Dai et al. 2019) one more matrix turns distances into keys, and the
    queries are compared with these too; without a causal mask there are twice as many distances.
    """
    D = c.d_model
    NK = c.heads * c.d_head
    GK = c.kv_heads * c.d_head
    part = "cross-attention" if S else "attention"
    sources = S or T  # positions from which keys and values are computed
    keys = S or min(T, c.window or T)  # keys that a query is compared with
    distances = c.relative * (1 if c.causal else 2) * keys
    vectors = c.bias * (NK + D + (2 - c.no_k_bias) * GK)
    vectors += c.relative_biases * NK
    vectors += 2 * c.qk_norm * c.d_head
    # Queries, output and the products of attention; all biases and gains.
    yield Layer(
        part,
        weights=2 * D * NK,
        vectors=vectors,
        positions=T,
        products=NK * T * (2 * keys + distances),
        kept=D * T,
        split=2 * NK * T + 2 * GK * sources,
        scores=c.heads * T * keys,
        masks=D * T,
    )
    # Keys and values.
    yield Layer(part, weights=2 * D * GK, positions=sources)
    if c.relative:
        yield Layer(part, weights=D * NK, positions=distances)


def mlp(c: Shape, T: int) -> Iterator[Layer]:
    """Two matrices of D x F, or three for SwiGLU (Shazeer 2020), at each of T tokens.

    In a mixture of experts (Shazeer et al. 2017) there are `experts` such MLPs, of which each token
    passes `active`. Yields the layer "mlp" with what a token passes. With several experts also the
    layer "router", a matrix of D x experts, and "idle experts": the weights of the others, which
    are held but not multiplied, as vectors.

    mlp_bias: 1 if there are biases, on F and on D, else 0. For the backward pass a row keeps the
    D T inputs whole. `split` are the numbers inside: 2 F for each token and active expert, those
    before and after the nonlinearity; for SwiGLU 4 F (gate, its SiLU, the other half, and their
    product); for ReLU F. Dropout may zero the D T outputs.
    """
    D = c.d_model
    F = c.d_ff
    if c.mlp == "swiglu":
        weights = 3 * D * F
        inside = 4 * F
    else:
        weights = 2 * D * F
        inside = 2 * F
    if c.mlp == "relu":
        # Its output determines its gradient, so one copy also serves as the input of what follows.
        inside = F
    yield Layer(
        "mlp",
        weights=c.active * weights,
        vectors=c.mlp_bias * (F + D),
        positions=T,
        kept=D * T,
        split=c.active * inside * T,
        masks=D * T,
    )
    if c.experts > 1:
        yield Layer("router", weights=D * c.experts, positions=T)
        yield Layer("idle experts", vectors=(c.experts - c.active) * weights)


def norms(c: Shape, n: int, T: int, width: int = 0) -> Layer:
    """n normalisations of `width` channels: each a gain, and for LayerNorm also a bias."""
    width = width or c.d_model
    return Layer("norm", vectors=n * c.norm * width, kept=n * width * T)


def block(c: Shape, T: int, S: int = 0) -> Stack:
    """All blocks of a Transformer: attention, cross-attention if there are S keys, and an MLP."""
    layers = list(attention(c, T))
    if S:
        layers += attention(c, T, S)
    layers += mlp(c, T)
    layers.append(norms(c, c.norms + bool(S), T))
    cache = 2 * c.kv_heads * c.d_head if c.causal else 0
    return Stack(tuple(layers), c.layers, c.d_model * T, cache, cache * S)


def output(c: Shape, T: int, E: int) -> Iterator[Layer]:
    """The layers after the last block, by the kind of head.

    A tied head uses the table of tokens, of width E, once more.
    """
    D = c.d_model
    V = c.vocab
    dense = Layer("output", D * D, D, T, kept=D * T)
    tied = Layer("head", products=V * E * T, kept=E * T)
    match c.head:
        case "tied":
            yield tied
        case "untied":
            yield Layer("head", V * D, positions=T, kept=D * T)
        case "pooler":  # BERT: the state of the first token represents the sentence
            yield replace(dense, positions=1, kept=D)
        case "masked":  # RoBERTa, and BERT in pretraining: predict masked tokens
            yield from (dense, norms(c, 1, T), tied, Layer("output", vectors=V))
        case "biased":  # XLNet, which also learns the vector that stands for a hidden token
            yield from (tied, Layer("output", vectors=V + D))
        case "binary":  # ELECTRA: was this token replaced?
            yield from (dense, conv("output", D, 1, T))


def transformer(c: Shape) -> Iterator[Stack]:
    """A single stack of blocks: the decoders after GPT and the encoders after BERT."""
    T = c.context
    V = c.vocab
    D = c.d_model
    E = c.d_embed or D
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


def encoder_decoder(c: Shape) -> Iterator[Stack]:
    """The Transformer of 2017 (Vaswani et al.), Marian and T5 (Raffel et al. 2020).

    Encoder and decoder share one table of tokens. Positions are fixed sinusoids, or biases of
    `buckets` distances, which all layers of the encoder share, and all of the decoder.
    """
    S = c.context
    T = c.targets
    D = c.d_model
    yield Stack((Layer("embedding", vectors=c.vocab * D + 2 * c.buckets * c.heads),))
    yield block(vary(c, causal=0), S)
    yield block(c, T, S)
    yield Stack((norms(c, c.final_norm, S), norms(c, c.final_norm, T), *output(c, T, D)))


def whisper(c: Shape) -> Iterator[Stack]:
    """Whisper (Radford et al. 2022): two convolutions halve the frames of a spectrogram.

    The positions of the encoder are fixed.
    """
    S = c.frames
    T = c.context
    D = c.d_model
    first = conv("convolutions", c.mels, D, 2 * S, 3)
    yield Stack((first, conv("convolutions", D, D, S, 3)))
    yield block(vary(c, causal=0), S)
    yield Stack((norms(c, 1, S), Layer("embedding", vectors=(c.vocab + c.positions) * D)))
    yield block(c, T, S)
    yield Stack((norms(c, 1, T), *output(c, T, D)))


def musicgen(c: Shape) -> Iterator[Stack]:
    """MusicGen (Copet et al. 2023): a decoder of four streams of codes that attends to a text."""
    T = c.context
    D = c.d_model
    codes = c.vocab + 1  # and one that starts a stream
    yield Stack((Layer("embedding", vectors=c.streams * codes * D),))
    yield block(c, T, c.text)
    yield Stack((norms(c, 1, T), Layer("head", c.streams * c.vocab * D, positions=T, kept=D * T)))


def vision(c: Shape) -> Iterator[Stack]:
    """ViT (Dosovitskiy et al. 2021): the tokens are square patches of the image.

    One more token in front of them comes to represent the whole image.
    """
    patches = (c.image // c.patch) ** 2
    D = c.d_model
    T = patches + 1
    patch = conv("patches", 3, D, patches, c.patch**2, c.patch_bias)
    yield Stack((patch, Layer("embedding", vectors=D + T * D), norms(c, c.embed_norm, T)))
    yield block(c, T)
    yield Stack((norms(c, 1, T), conv("output", D, c.outputs, 1, bias=c.patch_bias)))


def clip(c: Shape) -> Iterator[Stack]:
    """CLIP (Radford et al. 2021): two towers that project into one space, and a learned scale."""
    D = c.image_width
    N = D // 64
    image = vary(
        c,
        embed_norm=1,
        layers=c.image_layers,
        d_model=D,
        heads=N,
        kv_heads=N,
        d_head=64,
        d_ff=4 * D,
    )
    yield from vision(image)
    yield from transformer(c)
    scale = Layer("scale", vectors=1, products=c.outputs)  # a text times its own image
    yield Stack((conv("output", c.d_model, c.outputs, 1, bias=0), scale))


def dit(c: Shape) -> Iterator[Stack]:
    """DiT (Peebles and Xie 2023): a Transformer on the patches of a latent.

    Time and class set the gain, shift and gate of every norm.
    """
    T = (c.image // c.patch) ** 2
    D = c.d_model
    inside = block(c, T)
    modulation = conv("modulation", D, 6 * D, 1)
    time = conv("time", 256, D, 1)
    classes = Layer("embedding", vectors=(c.classes + 1) * D)  # one means "any class"
    patches = conv("patches", c.channels, D, T, c.patch**2)
    yield Stack((patches, time, conv("time", D, D, 1), classes))
    yield replace(inside, layers=(*inside.layers, modulation))
    last = conv("output", D, 2 * c.channels * c.patch**2, T)
    yield Stack((norms(c, 1, T), conv("modulation", D, 2 * D, 1), last))


# ---- convolutional networks ---------------------------------------------------------------------


def image_norm(C: int, at: int) -> Layer:
    """Group or batch normalisation of C channels at `at` pixels: a gain and a bias.

    The norm and the nonlinearity after it each keep their input.
    """
    return Layer("norm", vectors=2 * C, kept=2 * C * at)


def residual(c: Shape, C: int, out: int, at: int) -> Iterator[Layer]:
    """Norm, convolution, the embedding of the time (added, or a scale and a shift), and again norm
    and convolution."""
    yield image_norm(C, at)
    yield conv("convolutions", C, out, at, 9)
    if c.time:
        yield conv("time", c.time, (1 + c.scale_shift) * out, 1)
    yield image_norm(out, at)
    yield conv("convolutions", out, out, at, 9)
    if out != C:
        yield conv("convolutions", C, out, at)


def pixel_attention(c: Shape, C: int, at: int, depth: int) -> Iterator[Layer]:
    """Every pixel attends to every other one.

    Where there is a text, of width `cross`, these are `depth` Transformer blocks with a gated MLP
    (GEGLU), and every pixel also attends to the tokens.
    """
    heads = C // c.d_head if c.d_head else c.heads
    pairs = Layer("attention", products=2 * C * at * at, scores=heads * at * at)
    yield Layer("norm", vectors=2 * C, kept=C * at)
    if not c.cross:
        yield from (conv("attention", C, 3 * C, at), pairs, conv("attention", C, C, at))
        return
    yield conv("attention", C, C, at)
    for _ in range(depth):
        yield Layer("norm", vectors=6 * C, kept=3 * C * at)
        # Pixels to pixels.
        yield from (conv("attention", C, 3 * C, at, bias=0), pairs, conv("attention", C, C, at))
        # Pixels to tokens.
        yield conv("cross-attention", C, C, at, bias=0)
        yield conv("cross-attention", c.cross, 2 * C, c.text, bias=0)
        yield replace(pairs, part="cross-attention", products=2 * C * at * c.text, scores=0)
        yield conv("cross-attention", C, C, at)
        # GEGLU: 8 C wide before the gate, 4 C after it.
        yield from (conv("mlp", C, 8 * C, at), conv("mlp", 4 * C, C, at))
    yield conv("attention", C, C, at)


def contract(c: Shape, at: int) -> tuple[list[Layer], list[int]]:
    """From the image, of `at` pixels, to the middle of a U-Net.

    Each level has `blocks` residual blocks; after each level but the last the side is halved.
    Returns the layers, and the channels of each map that the way back may read.
    """
    C = c.channels[0]
    layers = [conv("convolutions", c.inputs, C, at, 9)]
    skips = [C]
    for level, out in enumerate(c.channels):
        for _ in range(c.blocks):
            layers += residual(c, C, out, at)
            C = out
            if level in c.attention:
                layers += pixel_attention(c, C, at, c.depth[level])
            skips.append(C)
        if level < len(c.channels) - 1:
            at //= 4
            layers += resample(c, C, at)
            skips.append(C)
    return layers, skips


def resample(c: Shape, C: int, at: int) -> list[Layer]:
    """The change to `at` pixels: a residual block, or a single convolution."""
    if c.updown:
        return list(residual(c, C, C, at))
    return [conv("convolutions", C, C, at, 9)]


def middle(c: Shape, at: int) -> list[Layer]:
    """The lowest level: two residual blocks with attention between them."""
    C = c.channels[-1]
    between = pixel_attention(c, C, at, c.depth[-1])
    return [*residual(c, C, C, at), *between, *residual(c, C, C, at)]


def expand(c: Shape, at: int, skips: list[int]) -> list[Layer]:
    """From the middle, of `at` pixels, back to the image.

    Each level has one residual block more than on the way down; each of them also reads a map of
    `skips`, if there are any.
    """
    skips = list(skips)
    layers: list[Layer] = []
    C = c.channels[-1]
    for level, out in reversed(list(enumerate(c.channels))):
        for _ in range(c.blocks + 1):
            skip = skips.pop() if skips else 0
            layers += residual(c, C + skip, out, at)
            C = out
            if level in c.attention:
                layers += pixel_attention(c, C, at, c.depth[level])
        if level:
            at *= 4
            layers += resample(c, C, at)
    return [*layers, image_norm(C, at), conv("convolutions", C, c.outputs, at, 9)]


def unet(c: Shape) -> Iterator[Stack]:
    """The U-Net of DDPM (Ho et al. 2020, appendix B) and its successors.

    On the way up each block also reads a map that was kept on the way down.
    """
    first = c.first or c.channels[0]
    at = c.side**2
    time = [conv("time", first, c.time, 1), conv("time", c.time, c.time, 1)]
    if c.added:  # SDXL: sizes and crops of the image, and a vector of the whole text
        time += [conv("time", c.added, c.time, 1), conv("time", c.time, c.time, 1)]
    time.append(Layer("embedding", vectors=c.classes * c.time))
    down, skips = contract(c, at)
    lowest = at // 4 ** (len(c.channels) - 1)
    yield Stack((*time, *down, *middle(c, lowest), *expand(c, lowest, skips)))


def vae(c: Shape) -> Iterator[Stack]:
    """Stable Diffusion's autoencoder (Rombach et al. 2022): a U-Net without skips.

    The encoder gives the mean and the variance of a latent of Z = `latent` channels.
    """
    at = c.side**2
    C = c.channels[-1]
    Z = c.latent
    lowest = at // 4 ** (len(c.channels) - 1)
    down, _ = contract(c, at)
    down += middle(c, lowest)
    down += [image_norm(C, lowest), conv("convolutions", C, 2 * Z, lowest, 9)]
    yield Stack((*down, conv("convolutions", 2 * Z, 2 * Z, lowest)))
    up = [conv("convolutions", Z, Z, lowest), conv("convolutions", Z, C, lowest, 9)]
    yield Stack((*up, *middle(c, lowest), *expand(c, lowest, [])))


def resnet(c: Shape) -> Iterator[Stack]:
    """ResNet (He et al. 2016): bottlenecks of 1x1 to a quarter of the channels, 3x3, 1x1 back."""
    C = 64
    at = (c.image // 2) ** 2
    layers = [conv("convolutions", 3, C, at, 49, bias=0), image_norm(C, at)]
    at //= 4
    for level, blocks in enumerate(c.blocks):
        inside = 64 * 2**level
        out = 256 * 2**level
        for i in range(blocks):
            before = at
            if level and i == 0:  # the first block of a level halves the side
                at //= 4
            # (channels in, channels out, pixels, taps)
            steps = [(C, inside, before, 1), (inside, inside, at, 9), (inside, out, at, 1)]
            if i == 0:
                steps.append((C, out, at, 1))  # the skip changes its channels too
            for channels_in, channels_out, pixels, taps in steps:
                layers.append(conv("convolutions", channels_in, channels_out, pixels, taps, bias=0))
                layers.append(image_norm(channels_out, pixels))
            C = out
    yield Stack((*layers, conv("output", C, c.outputs, 1)))


def mobilenet(c: Shape) -> Iterator[Stack]:
    """MobileNetV2 (Sandler et al. 2018, table 2): inverted residuals.

    A 1x1 convolution to 6 times the channels, a 3x3 one on each channel alone, 1x1 back to few.
    """
    C = 32
    at = (c.image // 2) ** 2
    layers = [conv("convolutions", 3, C, at, 9, bias=0), image_norm(C, at)]
    for level, (out, blocks) in enumerate(zip(c.channels, c.blocks)):
        for i in range(blocks):
            wide = C * (6 if level else 1)
            before = at
            if i == 0 and level in c.halving:
                at //= 4
            if wide != C:
                layers += [conv("convolutions", C, wide, before, bias=0), image_norm(wide, before)]
            depthwise = conv("convolutions", 1, wide, at, 9, bias=0)
            layers += [replace(depthwise, kept=wide * before), image_norm(wide, at)]
            layers += [conv("convolutions", wide, out, at, bias=0), image_norm(out, at)]
            C = out
    layers += [conv("convolutions", C, 1280, at, bias=0), image_norm(1280, at)]
    yield Stack((*layers, conv("output", 1280, c.outputs, 1)))
