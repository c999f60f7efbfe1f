"""An embedder: a vector for each text, so that a question is near to the passage that answers it.

The states of a pretrained model say what the next or the hidden word is. Nothing made the vectors
of a question and of its answer alike. This is learned from n pairs (q_i, p_i) of a question and the
passage that answers it. The vector of a text is a mean of the model's last states h_t over its
tokens, scaled to length 1. A rare token says more than a common one, so it counts more: by its
inverse document frequency (as in BM25, retrieval.py) times a factor for each token, which is
learned and starts at 1:

    x = sum_t w_t h_t / sum_t w_t        w_t = idf(token t) exp(a(token t))
    idf(token) = ln(1 + N / (1 + n))     n of the N passages of training contain it

InfoNCE is clip.py's loss, with one tower for both:

    z_ij = q_i . p_j / temperature
    loss = mean over i of  -ln softmax_j(z_ij) at j = i       which passage answers my question?
         + the same of z transposed, halved                   which question does my passage answer?

Negatives. The passages of the other pairs of a batch are wrong answers (in-batch negatives). Most
have nothing to do with the question, and soon teach nothing. So each question also brings passages
that have its words and yet are not the answer: those which BM25 ranks high (mined negatives,
Karpukhin et al. 2020). They are columns of z for all questions of the batch, so B questions with k
mined negatives each are compared with B (1 + k) passages. Columns of equal passages have equal
numbers: a passage is no negative of a question that it answers, even if another question brought
it.

Widths. A Matryoshka embedder (Kusupati et al. 2022) can be cut: the first 32 numbers of a vector,
scaled to length 1 again, are a vector too. The loss is computed for several widths, and their mean
is minimised (the paper's sum, with weights 1, divided by their number). So the first numbers carry
the most, and an index can be smaller.

Cost. Of a passage the first tokens are read, `length` of them: an article's title and first words
say what it is about, and a search by words reads the rest. The loss compares the rows of a batch,
so `rows_at_once` and `gather` work as in clip.py. Texts of like length are read together, so that
little is padding.

Letters: B batch, R rows of the batch on this process, k mined negatives a question, T tokens,
D width of the states.
Left out: instructions in front of the text, distillation from a model that reads question and
passage together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyfm.adapt.heads import Batch, Reader, freeze_unread

PART = 32  # texts that are read together, unless rows_at_once says fewer


@dataclass(frozen=True)
class EmbedderConfig:
    """How an embedder learns."""

    temperature: float = 0.05  # cosines are divided by it: the smaller, the more the nearest count
    # parts of the vector that are to serve as vectors too, beside the whole one
    widths: tuple[int, ...] = (32, 64, 128)
    # tokens of a text that are read, the first ones; 0 = all that the body takes. The start says
    # what a passage is about, and a short text costs less
    length: int = 32

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON has lists
        if not self.temperature > 0:
            raise ValueError(f"--embed.temperature is {self.temperature}; it must be above 0")
        if min(self.widths, default=1) < 1:
            raise ValueError(f"--embed.widths has {min(self.widths)}; each must be at least 1")
        if self.length < 0:
            raise ValueError(f"--embed.length is {self.length}; it must be at least 0")


def mask_of(lengths: Tensor, T: int) -> Tensor:
    """Which of T places are real: (n,) -> bool (n, T). Each row has a real token."""
    return torch.arange(T, device=lengths.device) < lengths.clamp(min=1)[:, None]


class TokenWeights(nn.Module):
    """How much each of V tokens counts in a mean."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros(vocab_size))
        self.register_buffer("idf", torch.ones(vocab_size))  # 1 until the data are known

    @torch.no_grad()
    def count(self, passages: Iterable[Sequence[int]]) -> None:
        """Set the inverse document frequencies, unless they were set before."""
        if not self.idf.eq(1).all():
            return
        n = torch.zeros(len(self.idf))
        N = 0
        for ids in passages:
            n[torch.tensor(ids).unique()] += 1
            N += 1
        self.idf.copy_(torch.log(1 + N / (1 + n)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (n, T) -> their weights (n, T)."""
        return self.idf[tokens] * self.log_factor[tokens].exp()


class Embedder(nn.Module):
    """A body that turns tokens (n, T) with lengths (n,) into vectors (n, D).

    reader: how its features are read; parts that these do not depend on are frozen. states(body,
    tokens, mask): its last states (n, T, D).
    """

    whole_batch = True  # the loss compares the rows, so the trainer passes all it has at once
    unit = "pair"

    def __init__(self, body: nn.Module, settings: EmbedderConfig, reader: Reader, states: Callable):
        """Raises ValueError for a width above that of the body's states."""
        super().__init__()
        D = reader.width(body.config)
        if max(settings.widths, default=1) > D:
            raise ValueError(
                f"--embed.widths has {max(settings.widths)}, and the vectors have {D} numbers: "
                f"give others, such as --embed.widths {max(1, D // 4)}"
            )
        self.body = body
        self.settings = settings
        self.states = states
        self.heads = TokenWeights(body.config.vocab_size)  # an adapter saves what is named heads
        self.config = body.config
        self.widths = sorted({*settings.widths, D})
        most = body.config.context_length
        self.length = min(settings.length or most, most)  # most tokens of a text
        self.outer = (*body.outer, "heads")  # trained by AdamW, not by Muon
        self.rows_at_once = 0  # texts in the body at a time, to save memory; 0 = PART, all kept
        self.rank = 0  # of this process
        self.gather = lambda rows: rows  # R rows of each process -> all rows, in order of rank
        freeze_unread(body, reader)

    def reset_parameters(self):
        """Give all tokens the factor 1; the body keeps its weights."""
        nn.init.zeros_(self.heads.log_factor)

    def reset_buffers(self):
        """Compute the buffers that are not saved, after the model was built on "meta"."""
        self.body.reset_buffers()

    # ---- vectors ----

    def check_width(self, width: int) -> None:
        """Raise ValueError for a width that the model was not trained for."""
        if width not in self.widths:
            known = ", ".join(map(str, self.widths))
            raise ValueError(f"width {width}: this embedder was trained for the widths {known}")

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens (n, T) with their lengths (n,) -> weighted means of the states (n, D), float32."""
        mask = mask_of(lengths, tokens.size(1))
        states = self.states(self.body, tokens, mask).float()  # (n, T, D)
        weights = self.heads(tokens) * mask  # (n, T)
        return (weights[..., None] * states).sum(1) / weights.sum(1, keepdim=True)

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The same, some texts of like length at a time: (n, T), (n,) -> (n, D).

        With rows_at_once, the activations of one part are kept at a time; the backward pass
        computes them again.
        """
        lengths = lengths.clamp(1, tokens.size(1))
        order = lengths.argsort(stable=True)
        # Fake tensors have no values to read, and a compiled graph no length that depends on them.
        known = type(tokens) is Tensor and not torch.compiler.is_compiling()
        found = []
        for part in order.split(self.rows_at_once or PART):
            longest = int(lengths[part[-1]]) if known else tokens.size(1)
            inputs = (tokens[part, :longest], lengths[part])
            if self.rows_at_once:
                found.append(checkpoint(self.read, *inputs, use_reentrant=False))
            else:
                found.append(self.read(*inputs))
        return torch.cat(found)[order.argsort()]

    def forward(self, tokens: Tensor, lengths: Tensor, width: int = 0) -> Tensor:
        """Unit vectors (n, width) of texts; width 0 = all D numbers."""
        x = self.encode(tokens, lengths)
        return F.normalize(x[:, : width or x.size(1)], dim=1)

    # ---- loss ----

    def gathered(self, rows: Tensor) -> Tensor:
        """In training the rows of all processes, (B, ...); in evaluation this process's."""
        return self.gather(rows) if self.training else rows

    def loss(self, batch: Batch, generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over widths and over the two directions of InfoNCE, in nats.

        batch: "questions" (R, T) and "question_lengths" (R,); "passages" (R, 1 + k, T), the right
        one first, "passage_lengths" and "ids" (R, 1 + k): the number of each passage. Nothing is
        drawn from generators. Raises ValueError for a batch of one row.
        """
        from tinyfm.clip import contrast, softmax_loss  # here: a GPT loads no picture models

        q = self.encode(batch["questions"], batch["question_lengths"])  # (R, D)
        p = self.encode(batch["passages"].flatten(0, 1), batch["passage_lengths"].flatten())
        ids = batch["ids"]  # (R, 1 + k)
        own = ids[:, 0].contiguous()
        all_q = self.gathered(q)  # (B, D)
        all_p = self.gathered(p)  # (B (1 + k), D)
        all_ids = self.gathered(ids.flatten())
        all_own = self.gathered(own)
        if len(all_q) < 2:
            raise ValueError(
                "the loss compares a question with the passages of others, and this batch has 1 "
                "row: use --train.batch-size 2 or more"
            )
        p = p.unflatten(0, ids.shape)[:, 0]  # (R, D): the right ones
        scale = 1 / self.settings.temperature
        losses = []
        for width in self.widths:
            x, y, all_x, all_y = (F.normalize(v[:, :width], dim=1) for v in (q, p, all_q, all_p))
            to_passage = contrast(softmax_loss, x, all_y, own, all_ids, scale)
            to_question = contrast(softmax_loss, y, all_x, own, all_own, scale)
            losses.append((to_passage + to_question) / 2)
        return torch.stack(losses).mean(), {}

    def example_batch(self, rows: int) -> Batch:
        """A batch of zeros in the form of the data, with one mined negative; texts are full."""
        T = self.length
        tokens = torch.zeros(rows, 2, T, dtype=torch.long)
        lengths = torch.full((rows, 2), T)
        return {
            "questions": tokens[:, 0].clone(),
            "question_lengths": lengths[:, 0].clone(),
            "passages": tokens,
            "passage_lengths": lengths,
            "ids": torch.arange(2 * rows).view(rows, 2),
        }
