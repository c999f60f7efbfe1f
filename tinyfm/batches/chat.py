"""Conversations -> rows to train on: {"messages": [{"role": ..., "content": ...}, ...]} a line.

A row is one conversation in the template of adapt/chat.py. It starts at position 0, as in sampling.
So rows are padded to the longest of a batch rather than packed: no row contains parts of two
conversations. A conversation longer than the context continues in another row, which repeats its
system messages. An answer that is too long for one row loses its end.

A hash of each conversation decides which are held out, so that the order of a file changes nothing.
Legend: B batch, T tokens. Left out: rows on disk; a token takes nine bytes of memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data import chats, files
from data.report import Report
from tinyfm.adapt.chat import Message, check_messages, encode_message, split_exchanges
from tinyfm.batches.order import check_val_fraction, hash_order, held_out_count, shuffle
from tinyfm.tokenizer import Tokenizer

SOURCES = {"chats": chats}


@dataclass(frozen=True)
class ChatConfig:
    """Which conversations to learn from."""

    # chats (questions about the standard library), or a jsonl file, folder or "glob", each line
    # {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    path: str = "chats"
    tokenizer: str = ""  # folder with a saved tokenizer; default: that of the base run
    val_fraction: float = 0.1  # share of the conversations held out for validation

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        check_val_fraction(self.val_fraction)


# ---- files ---------------------------------------------------------------------------------------


def read_line(line: str) -> list[Message]:
    """The messages of a line of jsonl. Raises ValueError with the reason if they teach nothing."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    check_messages(messages)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise ValueError("the assistant says nothing")
    return [{key: message[key] for key in ("role", "content")} for message in messages]


def read_conversations(path: str, report: Report) -> Iterator[list[Message]]:
    """Yield the messages of each conversation in `path`, equal ones once.

    For files, the report counts the lines that were found, used and skipped. Raises ValueError if
    no conversation can be used.
    """
    if path in SOURCES:
        for conversation in SOURCES[path].conversations():
            yield conversation["messages"]
        return
    seen: set[str] = set()
    for name in files.find(path):
        try:
            text, _ = files.read(name)
        except (ValueError, OSError) as error:
            report.skip(str(error), name.name)
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            report.found += 1
            try:
                messages = read_line(line)
            except ValueError as error:
                report.skip(str(error), f"{name.name}:{number}")
                continue
            content = json.dumps(messages)
            if content in seen:
                report.skip("the same as another", f"{name.name}:{number}")
                continue
            seen.add(content)
            report.used += 1
            yield messages
    if not report.used:
        raise ValueError(f"no conversation to learn from in {path!r}: {report}")


# ---- rows to train on ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Token ids, and which of them the assistant says."""

    ids: np.ndarray  # int64 (n,)
    trained: np.ndarray  # bool (n,)


def make_rows(
    tokenizer: Tokenizer, messages: list[Message], context_length: int, cuts: Counter[str]
) -> list[Row]:
    """A conversation as rows of at most context_length + 1 ids; none if no answer fits.

    `cuts` counts the conversations that are split and the answers that are cut or lost.
    """

    def encode(part: list[Message]) -> list[tuple[int, bool]]:
        """(id, whether it is trained on) for each token."""
        pairs = []
        for message in part:
            pairs += zip(*encode_message(tokenizer, message))
        return pairs

    # Fill a row with exchanges while they fit, then start the next one.
    most = context_length + 1
    system, exchanges = split_exchanges(messages)
    start = [(tokenizer.eot, False), *encode(system)]
    drafts = [start]
    for exchange in exchanges:
        if exchange[-1]["role"] != "assistant":
            continue  # a last question without an answer teaches nothing
        pairs = encode(exchange)
        is_empty = len(drafts[-1]) == len(start)
        if not is_empty and len(drafts[-1]) + len(pairs) > most:
            drafts.append(start)
        drafts[-1] = drafts[-1] + pairs

    # Cut rows that are too long, and drop those without an answer.
    rows = [Row(*map(np.array, zip(*draft[:most]))) for draft in drafts]
    kept = [row for row in rows if row.trained.any()]
    too_long = sum(len(draft) > most for draft in drafts)
    lost = len(rows) - len(kept)
    cuts["conversations continue in another row"] += int(len(rows) > 1)
    cuts["answers lose their end"] += too_long - lost
    cuts["answers have no room at all"] += lost
    return kept


def collate(rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    """Rows as a batch, padded with the id `pad` to the longest of them, T + 1.

    {"tokens": int64 (B, T + 1), "mask": bool (B, T), True for the targets that count}
    """
    longest = max(len(row.ids) for row in rows)
    tokens = np.full((len(rows), longest), pad)
    mask = np.zeros((len(rows), longest - 1), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids) - 1] = row.trained[1:]
    return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}


# ---- batches -------------------------------------------------------------------------------------


def hold_out(conversations: list[list[Message]], val_fraction: float) -> tuple[list, list]:
    """(training, validation) conversations, in an order and a split by the hash of each."""
    by_hash = hash_order([json.dumps(messages).encode() for messages in conversations])
    ordered = [conversations[i] for i in by_hash]
    count = held_out_count(len(ordered), val_fraction)
    return ordered[count:], ordered[:count]


class ChatData:
    """Batches of conversations, and the metrics of the held-out ones. All rows are in memory."""

    def __init__(
        self,
        config: ChatConfig,
        tokenizer: Tokenizer,
        context_length: int,
        batch_size: int,
        seed: int,
    ):
        """Read and encode. Raises ValueError if there are fewer than two conversations, or if no
        answer fits into the context."""
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed

        # Read, split, and make rows.
        report = Report()
        cuts: Counter[str] = Counter()
        conversations = list(read_conversations(config.path, report))
        if len(conversations) < 2:
            raise ValueError(f"{config.path!r} has one conversation; give one more to hold out")
        self.train, self.val = (
            [row for one in part for row in make_rows(tokenizer, one, context_length, cuts)]
            for part in hold_out(conversations, config.val_fraction)
        )
        if not self.train or not self.val:
            advice = "use a longer --model.context-length, or shorter conversations"
            raise ValueError(f"no answer fits into {context_length} tokens: {advice}")

        # Count the tokens that are trained on, and the bytes of the held-out answers.
        held = np.concatenate([row.ids[row.trained] for row in self.val]).tolist()
        self.val_tokens = len(held)
        self.val_bytes = len(tokenizer.decode_bytes(i for i in held if i != tokenizer.eot))
        rows = self.train + self.val
        ids = np.concatenate([row.ids for row in rows])
        trained = np.concatenate([row.trained for row in rows])
        self.unit = "tokens"
        self.units_per_row = round(len(ids) / len(rows))

        content = tokenizer.fingerprint().encode() + ids.tobytes() + trained.tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        learnt = int(trained.sum())
        parts = [
            f"{config.path}: {len(conversations):,} conversations in {len(rows):,} rows, "
            f"{len(self.val):,} of them held out, "
            f"{learnt:,} of {len(ids):,} tokens are trained on, {learnt / len(ids):.0%}"
        ]
        parts += [f"{count:,} {problem}" for problem, count in cuts.items() if count]
        if report.skipped:
            parts.append(str(report))
        self.description = "; ".join(parts)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, with the fields of `collate`."""
        index = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        chosen = shuffle(index, len(self.train), self.seed)
        return collate([self.train[i] for i in chosen], self.tokenizer.eot)

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """All held-out rows, `rows` at a time."""
        for first in range(0, len(self.val), rows):
            yield collate(self.val[first : first + rows], self.tokenizer.eot)

    def metrics(self, nats_per_token: float) -> dict[str, float]:
        """Bits per byte of the assistant's answers. Ending a turn is cost without bytes."""
        return {"val_bpb": nats_per_token * self.val_tokens / math.log(2) / self.val_bytes}
