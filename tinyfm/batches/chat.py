"""Conversations -> rows to train on: {"messages": [{"role": ..., "content": ...}, ...]} a line.

A row is one conversation in the template of chat.py, from its own position 0, as when sampled. So
rows are padded to the longest of a batch rather than packed: nothing in a row is of another
conversation. One that is longer than the context goes on in another row, which begins with its
system messages again; an answer that alone is too long loses its end.

Which conversations are held out is decided by their hashes: the order of a file changes nothing.
Letters: B batch, T tokens. Left out: rows on disk. A token takes nine bytes of memory.
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
from tinyfm.batches.order import shuffle
from tinyfm.tokenizer import Tokenizer

SOURCES = {"chats": chats}


@dataclass(frozen=True)
class ChatConfig:
    """Which conversations to learn from."""

    # chats (questions about the standard library), or a jsonl file, folder or "glob", each line
    # {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    path: str = "chats"
    tokenizer: str = ""  # a folder with a saved one; that of the run it begins from if not given
    val_fraction: float = 0.1  # share of the conversations held out for validation

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--data.val-fraction {self.val_fraction}: it must be between 0 and 1")


# ---- files ---------------------------------------------------------------------------------------


def read_line(line: str) -> list[Message]:
    """The messages of a line of jsonl. Raises ValueError with the reason why it teaches nothing."""
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
    """Yield the messages of each conversation that `path` names, equal ones once. The report is of
    files: what was found, used and skipped.

    Raises ValueError if there is none to learn from.
    """
    if path in SOURCES:
        yield from (talk["messages"] for talk in SOURCES[path].conversations())
        return
    seen: set[str] = set()
    for name in files.find(path):
        try:
            lines = files.read(name)[0].split("\n")
        except (ValueError, OSError) as error:
            report.skip(str(error), name.name)
            continue
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            report.found += 1
            try:
                messages = read_line(line)
            except ValueError as error:
                report.skip(str(error), f"{name.name}:{number}")
                continue
            if (content := json.dumps(messages)) in seen:
                report.skip("the same as another", f"{name.name}:{number}")
                continue
            seen.add(content)
            report.used += 1
            yield messages
    if not report.used:
        raise ValueError(f"no conversation to learn from in {path!r}: {report}")


# ---- rows to train on ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    ids: np.ndarray  # int64 (n,)
    trained: np.ndarray  # bool (n,): the assistant's


def make_rows(
    tokenizer: Tokenizer, messages: list[Message], context_length: int, cuts: Counter[str]
) -> list[Row]:
    """A conversation as rows of at most context_length + 1 ids. `cuts` counts what that costs."""

    def encode(part: list[Message]) -> list[tuple[int, bool]]:
        return [pair for m in part for pair in zip(*encode_message(tokenizer, m))]

    system, exchanges = split_exchanges(messages)
    start, most = [(tokenizer.eot, False), *encode(system)], context_length + 1
    drafts = [start]
    for exchange in exchanges:
        if exchange[-1]["role"] != "assistant":
            continue  # a last question without an answer teaches nothing
        pairs = encode(exchange)
        if len(drafts[-1]) > len(start) and len(drafts[-1]) + len(pairs) > most:
            drafts.append(start)
        drafts[-1] = drafts[-1] + pairs
    rows = [Row(*map(np.array, zip(*draft[:most]))) for draft in drafts]
    kept = [row for row in rows if row.trained.any()]
    long, lost = sum(len(draft) > most for draft in drafts), len(rows) - len(kept)
    cuts["conversations go on in another row"] += len(rows) > 1
    cuts["answers lose their end"] += long - lost
    cuts["answers have no room at all"] += lost
    return kept


def collate(rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    """{"tokens": int64 (B, T + 1), "mask": bool (B, T), the targets that count}; T the longest."""
    longest = max(len(row.ids) for row in rows)
    tokens = np.full((len(rows), longest), pad)
    mask = np.zeros((len(rows), longest - 1), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids) - 1] = row.trained[1:]
    return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}


# ---- the data ------------------------------------------------------------------------------------


def hold_out(talks: list[list[Message]], share: float) -> tuple[list, list]:
    """(training, validation): the order of hashes decides, so no order of a file matters."""

    def digest(talk: list[Message]) -> str:
        return hashlib.sha256(json.dumps(talk).encode()).hexdigest()

    talks = sorted(talks, key=digest)
    held = min(len(talks) - 1, max(1, round(share * len(talks))))
    return talks[held:], talks[:held]


class ChatData:
    """Batches of conversations, and the measures of those held out; all are kept in memory."""

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer, context_length: int,
                 batch_size: int, seed: int):  # fmt: skip
        """Read and encode. Raises ValueError if there are not two conversations to learn from, or
        the context is too short for the answers."""
        report, cuts = Report(), Counter()
        talks = list(read_conversations(config.path, report))
        if len(talks) < 2:
            raise ValueError(f"{config.path!r} has one conversation; give one more to hold out")
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        self.train, self.val = (
            [row for talk in part for row in make_rows(tokenizer, talk, context_length, cuts)]
            for part in hold_out(talks, config.val_fraction)
        )
        if not self.train or not self.val:
            advice = "use a longer --model.context-length, or shorter conversations"
            raise ValueError(f"no answer fits into {context_length} tokens: {advice}")
        held = np.concatenate([row.ids[row.trained] for row in self.val]).tolist()
        self.val_tokens = len(held)
        self.val_bytes = len(tokenizer.decode_bytes(i for i in held if i != tokenizer.eot))
        ids = np.concatenate([row.ids for row in self.train + self.val])
        trained = np.concatenate([row.trained for row in self.train + self.val])
        rows, total, learnt = len(self.train + self.val), len(ids), int(trained.sum())
        self.unit, self.units_per_row = "tokens", round(total / rows)
        content = tokenizer.fingerprint().encode() + ids.tobytes() + trained.tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        notes = [f"{count:,} {what}" for what, count in cuts.items() if count]
        notes += [str(report)] if report.skipped else []
        self.description = "; ".join([
            f"{config.path}: {len(talks):,} conversations in {rows:,} rows, {len(self.val):,} of "
            f"them held out, {learnt:,} of {total:,} tokens are trained on, {learnt / total:.0%}",
            *notes,
        ])  # fmt: skip

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, as `collate` returns them."""
        index = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        chosen = shuffle(index, len(self.train), self.seed)
        return collate([self.train[i] for i in chosen], self.tokenizer.eot)

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """All rows held out, `rows` at a time."""
        for first in range(0, len(self.val), rows):
            yield collate(self.val[first : first + rows], self.tokenizer.eot)

    def metrics(self, nats_per_token: float) -> dict[str, float]:
        """Bits per byte of what the assistant says; ending its turns is cost without bytes."""
        return {"val_bpb": nats_per_token * self.val_tokens / math.log(2) / self.val_bytes}
