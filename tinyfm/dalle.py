"""DALL-E: a language model that continues a text with a picture.

    prompt -> tokens -> GPT (gpt.py) -> codes, one by one -> decoder of a VQ-VAE (vq.py) -> image

A VQ-VAE turns pictures into codes: integers, as the tokens of a text are. So one GPT learns both as
one sequence (Ramesh et al. 2021): first the T tokens of a text, then the N codes of its picture,
from left to right and from top to bottom, with ids behind those of the text:

    x = (text_1 ... text_T, V + code_1 ... V + code_N)        V: number of text tokens
    p(x) = prod_t p(x_t | x_1 ... x_{t-1})

Nothing in the GPT knows of pictures. All texts have T tokens, filled up with the token that ends a
text, so that each code has its place. The VQ-VAE is trained first, and then frozen.

The loss weighs the two kinds. -ln p is averaged over the tokens of the text and over the codes, and
the text gets the weight 1/8, the picture 7/8, as in the paper: pictures are what the model is for,
but to predict the text too teaches which words go together.

Drawing is sampling (generate.py), with a mask: after the text only codes may follow. Guidance (Ho
and Salimans 2021, for tokens Gafni et al. 2022) draws from the logits

    l(empty text) + guidance (l(text) - l(empty text))

For this, training replaces one text in ten by an empty one.

Letters: B batch, T tokens of a text, V text tokens, C channels, H W rows and columns, Q codebooks
of K codes, h w places, N = Q h w codes of a picture.
Left out: sparse attention, the relaxed codebook of the paper's autoencoder (Gumbel-softmax),
choosing among many drawings by a CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyfm.generate import KVCache, Sampling, choose
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.tokenizer import encode_captions
from tinyfm.vq import VQVAE, VQConfig


@dataclass(frozen=True)
class DALLEConfig:
    n_layer: int = 4  # blocks of the GPT
    n_head: int = 4  # query heads
    d_model: int = 192  # width of the residual stream
    dropout: float = 0.0  # share of activations set to zero in training
    text_vocab_size: int = 1024  # number of tokens of texts that the model knows
    text_length: int = 16  # tokens of a text, with the one that ends it; a longer text is cut
    text_weight: float = 0.125  # weight of the text in the loss; the picture has the rest
    text_drop: float = 0.1  # share of training texts that are replaced by an empty one
    vq: VQConfig = field(default_factory=VQConfig)  # the VQ-VAE, which may be given as a dict

    def __post_init__(self):
        if isinstance(self.vq, dict):  # a config read from JSON
            object.__setattr__(self, "vq", VQConfig(**self.vq))
        for name, least in (("text_vocab_size", 2), ("text_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("text_weight", "text_drop"):
            if not 0 <= getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")
        _ = self.gpt  # which checks the other fields

    @property
    def gpt(self) -> GPTConfig:
        """The config of the GPT. Positions are learned: codes depend on their place."""
        return GPTConfig(
            vocab_size=self.text_vocab_size + self.vq.n_book * self.vq.n_code,
            context_length=self.text_length + self.vq.codes_per_image,
            n_layer=self.n_layer,
            n_head=self.n_head,
            d_model=self.d_model,
            dropout=self.dropout,
            position="learned",
        )

    def first_id(self, i: int) -> int:
        """The id of code 0 at place i of a picture: each codebook has ids of its kind."""
        return self.text_vocab_size + i % self.vq.n_book * self.vq.n_code


def counted_text(text: Tensor) -> Tensor:
    """True where a token of texts (B, T) counts in the loss: up to the first one that ends it."""
    is_end = text == text[:, -1:]
    return is_end.cumsum(1) - is_end.long() == 0


def mean_by_row(nats: Tensor, counted: Tensor) -> Tensor:
    """The mean of each row of nats (B, n) where `counted` is True, then over rows.

    So a row has the same weight in any batch, however many of its tokens count.
    """
    return ((nats * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()


class DALLE(nn.Module):
    """A GPT over texts and the codes of a frozen VQ-VAE.

    `tokenizer` is that of the texts. It is None at first, and then prompts must be tokens.
    """

    unit = "pair"  # one row of a batch: an image and its caption
    outer = GPT.outer

    def __init__(self, config: DALLEConfig):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.vq = VQVAE(config.vq).requires_grad_(False)
        self.gpt = GPT(config.gpt)
        first_ids = torch.tensor([config.first_id(i) for i in range(config.vq.codes_per_image)])
        self.register_buffer("first_ids", first_ids, persistent=False)  # (N,)
        self.train()

    def train(self, mode: bool = True) -> DALLE:
        """Set the mode of the GPT; the frozen VQ-VAE stays in evaluation mode."""
        super().train(mode)
        self.vq.eval()
        return self

    # ---- texts and images ----

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> tokens (B, T), int64. A text that is too long loses its last words.

        Raises ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("a text needs a tokenizer: set model.tokenizer, or give tokens")
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows, _ = encode_captions(self.tokenizer, texts, self.config.text_length)
        return self.fill(torch.from_numpy(rows))

    def fill(self, tokens: Tensor) -> Tensor:
        """Rows of at most T tokens (B, t), each with its end token last -> (B, T), filled up with
        that token. Raises ValueError for longer rows."""
        missing = self.config.text_length - tokens.size(1)
        if missing < 0:
            length = self.config.text_length
            raise ValueError(f"a text of {tokens.size(1)} tokens exceeds text_length {length}")
        return torch.cat((tokens, tokens[:, -1:].expand(-1, missing)), dim=1)

    def encode_images(self, images: Tensor, generators=None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> codes (B, N), int64 in [0, K), place by place.

        The generators are not used: nothing about codes is random.
        """
        return rearrange(self.vq.encode(images), "B Q h w -> B (h w Q)")

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N) -> images (B, C, H, W) in [-1, 1], float32.

        Raises ValueError for a code outside of the codebook.
        """
        Q = self.config.vq.n_book
        side = self.config.vq.image_size // self.config.vq.factor
        codes = rearrange(codes, "B (h w Q) -> B Q h w", Q=Q, h=side)
        return self.vq.decode(codes).float().clamp(-1, 1)

    # ---- training ----

    def drop_texts(self, text: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Replace some of the texts (B, T) by empty ones: row i if generators[i] says so."""
        draws = torch.stack([torch.rand(1, generator=g) for g in generators])  # (B, 1)
        dropped = (draws < self.config.text_drop).to(text.device)
        return torch.where(dropped, text[:, -1:], text)

    def loss(
        self, batch: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of -ln p of the texts and of the codes, in nats a token, weighed by text_weight.

        batch has "tokens" (B, t), t at most T, and "codes" (B, N) or "images" (B, C, H, W). Texts
        are dropped in training alone. The first token of a text is not predicted.

        metrics, without gradients: "image_nats" and "text_nats", the two means.
        """
        text = self.fill(batch["tokens"])
        T = text.size(1)
        if self.training:
            text = self.drop_texts(text, generators)
        if "codes" in batch:
            codes = batch["codes"]
        else:
            with torch.no_grad():
                codes = self.encode_images(batch["images"])
        tokens = torch.cat((text, self.first_ids + codes), dim=1)  # (B, T + N)

        logits = self.gpt.head(self.gpt.hidden(tokens[:, :-1])).float()  # (B, T + N - 1, ids)
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        nats = nats.view(len(tokens), -1)  # (B, T + N - 1)
        text_nats = mean_by_row(nats[:, : T - 1], counted_text(text)[:, 1:])
        image_nats = nats[:, T - 1 :].mean()
        weight = self.config.text_weight
        metrics = {"image_nats": image_nats.detach(), "text_nats": text_nats.detach()}
        return weight * text_nats + (1 - weight) * image_nats, metrics

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the fields of a real one whose images are already encoded."""
        c = self.config
        return {
            "codes": torch.zeros(rows, c.vq.codes_per_image, dtype=torch.long),
            "tokens": torch.zeros(rows, c.text_length, dtype=torch.long),
        }

    # ---- drawing ----

    @torch.no_grad()
    def draw_codes(
        self,
        text: Tensor,
        sampling: Sampling,
        guidance: float,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Texts (B, T) -> the codes of one drawing each, (B, N). Row i uses only generators[i]."""
        config = self.config
        K = config.vq.n_code
        tokens = text
        if guidance != 1:  # each text, and below them as many empty ones
            tokens = torch.cat((text, text[:, -1:].expand_as(text)))
        n = len(tokens)
        length = config.gpt.context_length
        pad = torch.zeros(n, dtype=torch.long, device=text.device)
        cache = KVCache(config.gpt, length, pad)
        codes = []
        for i in range(config.vq.codes_per_image):
            states = self.gpt.hidden(tokens, cache)[:, -1]
            first = config.first_id(i)
            logits = self.gpt.head(states)[:, first : first + K].float()  # the mask: codes alone
            if guidance != 1:
                given, empty = logits.chunk(2)
                logits = empty + guidance * (given - empty)
            drawn = choose(logits, sampling, list(generators))  # (B,)
            codes.append(drawn)
            tokens = (first + drawn).repeat(n // len(text))[:, None]
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str] | Tensor,
        sampling: Sampling | None = None,
        guidance: float = 1.0,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw B prompts: images (B, C, H, W) in [-1, 1], float32.

        prompts: a text, B texts, or their tokens (B, t). sampling: its temperature, top_k, top_p
        and min_p shape the draws. guidance: how closely to follow the prompts; 1 = none.
        generators: B CPU generators; by default torch's global generator seeds them. The model is
        put into evaluation mode. Raises ValueError for inputs that do not fit.
        """
        text = self.fill(prompts) if isinstance(prompts, Tensor) else self.tokenize(prompts)
        if not len(text):
            raise ValueError("there is no prompt; give at least one")
        if text.min() < 0 or text.max() >= self.config.text_vocab_size:
            raise ValueError(
                f"the texts hold an id outside 0 to {self.config.text_vocab_size - 1}; use the "
                "tokenizer that the model was trained with"
            )
        if not 0 <= guidance < float("inf"):
            raise ValueError(f"guidance is {guidance}; it must be 0 or above; 1 is none")
        if generators is None:
            seeds = torch.randint(1 << 62, (len(text),)).tolist()
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if len(generators) != len(text):
            counts = f"{len(text)} prompts, {len(generators)} generators"
            raise ValueError(f"there are {counts}; give one generator per prompt")
        self.eval()
        text = text.to(self.first_ids.device)
        return self.decode(self.draw_codes(text, sampling or Sampling(), guidance, generators))
