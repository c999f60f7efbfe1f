"""Continuous batching: texts that begin and end at different times share each forward pass.

To write one token for one text, a GPT reads all its weights; so the speed of the memory is the
limit, and the processor waits. Eight texts at once take little longer than one. But a server cannot
wait until eight requests have come, nor until the longest of eight texts is finished. So a text
enters the batch, or leaves it, between any two tokens (Yu et al. 2022, Orca). What the rows of such
a batch share, and what they do not:

    linear layers, norms    (B, 1, D): each weight is read once, for all rows
    attention               one row after the other, each over its own cache (`RowCache`)
    the draw                one row after the other, each with its own settings and random stream

A new text is first read: its prompt, but for the last token, fills its cache, in pieces. So the
others wait for a piece or two, not for a whole prompt. Then it joins the batch, which reads one
token of every row. Texts that begin alike read the same keys and values: `PrefixCache` keeps those
of recent prompts.

A row's numbers do not depend on the other rows, bit for bit, if the matrix library computes each
row of a product in one way, whatever the number of rows. oneDNN does, for bfloat16 and for packed
weights (`pack_weights`). MKL, for float32, adds in another order when there are fewer than 4. So a
batch has 4, 8, 12 .. rows (LEAST_ROWS); the results of those without a text are not used.
generate.stream, with one text, has products of one row. So its tokens are the same, but in float32
its numbers are not, in their last digits: rarely, a draw falls on another token. On a GPU, both
may depend on the number of rows.

Letters: B batch, T tokens, V vocabulary, D model width, N query heads, G key/value heads, K head
width.
Left out: paged memory (Kwon et al. 2023), pieces of prompts in the same pass as the batch (Agrawal
et al. 2023), speculative decoding.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyfm import generate

PACKED_SIZE = 1 << 17  # numbers in a weight; for smaller ones, oneDNN's call takes the most time
PACKED_ROWS = 16  # rows of a product for which packed weights are laid out
LEAST_ROWS = 4  # rows of a matrix product from which on each row's sums have one order
PIECE = 128  # tokens of a prompt that are read at once
GROWTH = 64  # positions that are added to a full cache

# ---- products of few rows -----------------------------------------------------------------------


def pack_weights(model: nn.Module) -> None:
    """Lay out the weights of a model's linear layers as oneDNN reads them, in place, on a CPU.

    A matrix library computes with a weight that is cut into blocks. It cuts the weight for every
    product, and for a few rows that takes longer than the product. Here it is cut once. The copy
    takes as much memory as the weights. The model can no longer be trained. On a CPU for which
    there is no such layout, the model stays as it is.
    """
    for layer in model.modules():
        if type(layer) is not nn.Linear or layer.weight.device.type != "cpu":
            continue
        if layer.weight.numel() < PACKED_SIZE or "forward" in vars(layer):  # small, or compiled
            continue
        try:
            layer.forward = packed_linear(layer.weight.detach(), layer.bias)
        except (AttributeError, RuntimeError):  # this torch, processor or format has none
            return


def packed_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """F.linear with the weight in the layout for products of a few rows."""
    library = torch.ops.mkldnn  # oneDNN's former name
    bias = None if bias is None else bias.detach()
    packed = library._reorder_linear_weight(weight, PACKED_ROWS)

    def forward(x: Tensor) -> Tensor:
        return library._linear_pointwise(x, packed, bias, "none", [], "")

    forward(weight.new_zeros(1, weight.size(1)))  # fails here, if it fails
    return forward


# ---- caches -------------------------------------------------------------------------------------


class RowCache:
    """Keys and values of one text, which grow with it.

    Each layer has two tensors (1, G, capacity, K). What is read goes behind what the cache holds. A
    prompt may thus be read in pieces.
    """

    one_by_one = False  # it is a batch of one row
    pad = None  # the row has no padding

    def __init__(self, config, device: torch.device):
        self.window = config.window
        self.device = device
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.first = 0  # position of the first key that is kept
        self.length = 0  # positions read

    def attend(self, attend, layer: int, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        """Store k, v (1, G, T, K) of the next T positions; attend to them and to those before.

        A single query sees the latest `window` keys only. A mask's last columns are for the keys
        that are kept.
        """
        T = k.size(2)
        start = self.length - self.first
        end = start + T
        if layer == len(self.layers):
            self.layers.append((k[:, :, :0], v[:, :, :0]))
        keys, values = self.layers[layer]
        if end > keys.size(2):
            keys, values = enlarged(keys, start, end), enlarged(values, start, end)
            self.layers[layer] = (keys, values)
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        seen = max(0, end - self.window) if self.window and T == 1 else 0
        if mask is not None:
            mask = mask[..., seen - end :]
        return attend(q, keys[:, :, seen:end], values[:, :, seen:end], mask)

    def key_positions(self, T: int) -> Tensor:
        """Position of each key that T next positions may attend to."""
        return torch.arange(self.first, self.length + T, device=self.device)

    def drop_unseen(self) -> None:
        """Free the keys and values that have left the window."""
        unseen = self.length - self.first - self.window
        if self.window and unseen >= max(GROWTH, self.window):
            kept = slice(unseen, self.length - self.first)
            self.layers = [(k[:, :, kept].clone(), v[:, :, kept].clone()) for k, v in self.layers]
            self.first += unseen

    def copy(self, length: int) -> RowCache:
        """A cache of the first `length` positions."""
        assert self.first == 0, "the first positions have left the cache"
        other = RowCache.__new__(RowCache)
        vars(other).update(vars(self))
        other.length = length
        other.layers = [
            (k[:, :, :length].clone(), v[:, :, :length].clone()) for k, v in self.layers
        ]
        return other

    def count_bytes(self, length: int | None = None) -> int:
        """Bytes of the tensors, or of a `copy` of the first `length` positions."""
        parts = [x[:, :, :length] for layer in self.layers for x in layer]
        return sum(x.numel() * x.element_size() for x in parts)


def enlarged(old: Tensor, kept: int, least: int) -> Tensor:
    """A tensor (1, G, capacity, K), at least `least` long, that begins with `kept` old ones."""
    capacity = GROWTH * math.ceil(least / GROWTH)
    new = old.new_empty(1, old.size(1), capacity, old.size(3))
    new[:, :, :kept] = old[:, :, :kept]
    return new


class Rows:
    """The caches of several texts as one cache, for one token each.

    The model's batch may have more rows than there are caches: those attend to nothing.
    """

    one_by_one = True

    def __init__(self, caches: Sequence[RowCache], rows: int):
        self.caches = caches
        lengths = [cache.length for cache in caches] + [0] * (rows - len(caches))
        self.length = max(lengths)
        # The model computes position = length - pad.
        self.pad = torch.tensor([self.length - n for n in lengths], device=caches[0].device)

    def attend(self, attend, layer: int, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        """q (B, N, 1, K), k, v (B, G, 1, K) -> (B, N, 1, K), row by row."""
        outputs = []
        for i, (cache, *own) in enumerate(zip(self.caches, q.split(1), k.split(1), v.split(1))):
            own_mask = None if mask is None else mask[i : i + 1]
            outputs.append(cache.attend(attend, layer, *own, own_mask))
        if len(outputs) < len(q):
            outputs.append(torch.zeros_like(q[len(outputs) :]))
        return torch.cat(outputs)

    def key_positions(self, T: int) -> Tensor:
        """Positions for a mask (ALiBi has one): all rows end at the same one."""
        return torch.arange(self.length + T, device=self.pad.device)


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens with which both rows begin."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


class PrefixCache:
    """Keys and values of recent prompts, so that a common beginning is read once.

    The least recently used ones go when all together exceed `max_bytes`.
    """

    SHORTEST = 8  # tokens; to read fewer costs less than to look for them

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.entries: OrderedDict[tuple[int, ...], RowCache] = OrderedDict()

    def find(self, tokens: Sequence[int]) -> RowCache | None:
        """A copy of the longest beginning of these tokens that is known, without the last token.

        What remains to be read is nothing, or at least LEAST_ROWS tokens. So its products are those
        of a prompt that is read as a whole; only attention may differ, by rounding.
        """
        best: tuple[int, ...] = ()
        common = 0
        for known in self.entries:
            n = count_common(known, tokens)
            if n > common:
                best, common = known, n
        rest = len(tokens) - 1 - common
        if rest <= 0:
            common = len(tokens) - 1
        elif rest < LEAST_ROWS:
            common -= LEAST_ROWS - rest
        if common < self.SHORTEST:
            return None
        self.entries.move_to_end(best)
        return self.entries[best].copy(common)

    def add(self, tokens: Sequence[int], cache: RowCache) -> None:
        """Keep the keys and values of these tokens, all that the cache holds."""
        tokens = tuple(tokens)
        if len(tokens) < self.SHORTEST or tokens in self.entries:
            return
        size = cache.count_bytes(len(tokens))
        if size > self.max_bytes:  # it would drive out all others, and then itself
            return
        for known in list(self.entries):
            if tokens[: len(known)] == known:  # the new entry contains it
                self.bytes -= self.entries.pop(known).count_bytes()
        self.entries[tokens] = cache.copy(len(tokens))
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, oldest = self.entries.popitem(last=False)
            self.bytes -= oldest.count_bytes()


# ---- the batch ----------------------------------------------------------------------------------


class Text:
    """A text that is being written.

    index: its random stream is that of row `index` of generate.stream. echo: whether the tokens of
    the prompt are reported too, with their log-probabilities; then all of it is read.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: generate.Sampling,
        index: int = 0,
        echo: bool = False,
    ):
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.sampling = sampling
        self.generator = generate.row_generator(sampling.seed, index)
        self.echo = echo
        self.start = 0  # first token that the model sees
        self.cache: RowCache | None = None
        self.cached = 0  # tokens of the prompt that were found in a PrefixCache

    @property
    def unread(self) -> int:
        """Number of tokens that the model sees but has not read; the batch reads the last one."""
        return len(self.tokens) - self.start - (self.cache.length if self.cache else 0)


@dataclass(frozen=True)
class Drawn:
    """A token, drawn or of an echoed prompt, and the log-probabilities (V,) that the model gave all
    tokens in its place.

    They are those before the settings (temperature, top-k, ..) shape the distribution.
    """

    token: int
    logprobs: Tensor
    prompt: bool = False


class Batch:
    """The texts that a model is writing. A text may be added or removed between two tokens."""

    def __init__(self, model, never: Sequence[int] = (), prefix_bytes: int = 0):
        """never: ids that are not drawn. prefix_bytes: the size of the prefix cache."""
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.never = torch.tensor(list(never), dtype=torch.long, device=self.device)
        self.prefixes = PrefixCache(prefix_bytes)
        self.texts: list[Text] = []

    def add(self, text: Text) -> None:
        """Let a text join. Raises ValueError as generate.check_prompts does."""
        generate.check_prompts([text.tokens], self.model.config.vocab_size)
        self.texts.append(text)

    @torch.inference_mode()
    def step(self) -> list[tuple[Text, Drawn | Exception]]:
        """Read pieces of the texts that wait; draw a token for each of those that are read.

        Where a text alone failed, an error stands in place of its token.
        """
        results: list[tuple[Text, Drawn | Exception]] = []
        left = PIECE
        for text in self.texts:
            if left <= 0 and text.cache is None:
                continue
            try:
                self.place(text)  # here, to find what was read a moment ago
                if left > 0 and text.unread > 1:
                    left -= text.unread - 1
                    results += self.read(text)
            except Exception as error:  # such as too little memory
                results.append((text, error))
        ready = [text for text in self.texts if text.cache is not None and text.unread == 1]
        if not ready:
            return results
        try:
            return results + self.draw(ready)
        except Exception:
            for text in ready:  # which of them fails?
                try:
                    results += self.draw([text])
                except Exception as error:
                    results.append((text, error))
        return results

    def place(self, text: Text) -> None:
        """Give a text a cache: a new one if it just joined or has outgrown the context."""
        start = generate.visible_from(len(text.tokens), self.model.config.context_length)
        if text.cache is not None and start == text.start:
            return
        text.start = start
        text.cache = None
        if len(text.tokens) == text.prompt_length and not text.echo:
            text.cache = self.prefixes.find(text.tokens[start:])
        if text.cache is None:
            text.cache = RowCache(self.model.config, self.device)
        else:
            text.cached = text.cache.length

    def read(self, text: Text) -> list[tuple[Text, Drawn | Exception]]:
        """Read the next piece of a text into its cache, but not its last token.

        Returns the tokens that the piece predicts, if they are to be reported.
        """
        seen = text.tokens[text.start : -1]
        first = text.cache.length
        n = len(seen) - first
        if n >= PIECE + LEAST_ROWS:
            n = PIECE
        piece = torch.tensor([seen[first : first + n]], device=self.device)
        h = self.model.hidden(piece, text.cache)  # (1, n, D)
        if len(text.tokens) > text.prompt_length:
            return []
        if first + n == len(seen):
            self.prefixes.add(seen, text.cache)
        if not text.echo:
            return []
        logprobs = self.model.head(h[0]).float().log_softmax(-1)  # (n, V)
        predicted = text.tokens[text.start + first + 1 :]
        return [(text, Drawn(i, row, True)) for i, row in zip(predicted, logprobs)]

    def draw(self, texts: list[Text]) -> list[tuple[Text, Drawn | Exception]]:
        """Read the last token of each text, draw its next one and append it."""
        logits = self.next_logits(texts)
        logprobs = logits.float().log_softmax(-1)
        for text in texts:  # not before: a step that failed is done again, text by text
            text.cache.length += 1
            text.cache.drop_unseen()
        results: list[tuple[Text, Drawn | Exception]] = []
        for i, text in enumerate(texts):
            sampling = text.sampling
            shaped = logits[i : i + 1]
            if sampling.repetition_penalty != 1:
                shaped = generate.penalise_repeats(
                    shaped, [text.tokens], sampling.repetition_penalty
                )
            try:
                token = generate.choose(shaped, sampling, [text.generator]).item()
            except Exception as error:  # such as logits that are not finite
                results.append((text, error))
            else:
                text.tokens.append(token)
                results.append((text, Drawn(token, logprobs[i])))
        return results

    def next_logits(self, texts: list[Text]) -> Tensor:
        """Let the model read the last token of each text -> (B, V). The caches' lengths stay."""
        rows = LEAST_ROWS * math.ceil(len(texts) / LEAST_ROWS)  # few sizes, for a compiled model
        last = [[text.tokens[-1]] for text in texts] + [[0]] * (rows - len(texts))
        caches = [text.cache for text in texts]
        h = self.model.hidden(torch.tensor(last, device=self.device), Rows(caches, rows))
        logits = self.model.head(h[:, -1])[: len(texts)]
        if len(self.never):
            logits[:, self.never] = -math.inf
        return logits
