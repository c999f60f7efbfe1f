"""Conversations -> rows to train on: {"messages": [{"role": ..., "content": ...}, ...]} a line.

The forms of OpenAI, ShareGPT and Alpaca are read, from any table that data/tables.py reads. A key
that changes what is learnt is obeyed ("weight": 0) or its conversation is skipped (tool calls).

A row is one conversation in the template of adapt/chat.py. It starts at position 0, as in sampling.
So rows are padded to the longest of a batch rather than packed: no row contains parts of two
conversations. A conversation longer than the context continues in another row, which repeats its
system messages. An answer that is too long for one row loses its end.

Near duplicates are left out. A hash of each conversation decides which are held out, so that the
order of a file changes nothing: half for validation, half for test.
Legend: B batch, T tokens. Left out: rows on disk; a token takes nine bytes of memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data import chats, dedupe, reading, tables
from data.report import Report, counted
from data.splits import HELD_OUT, SPLITS, TRAIN, overlap_of, overlapping, share_of
from tinyfm.adapt.chat import ROLES, Message, check_messages, encode_message, split_exchanges
from tinyfm.batches.order import check_val_fraction, hash_order, held_out_count, shuffle
from tinyfm.common.config import DataPath, FolderPath
from tinyfm.tokenizer import Tokenizer

SOURCES = {"chats": chats}
FORMAT = 2  # of the splits; 1 had no test conversations, and near duplicates in validation
INDEX_MB = 64  # of memory, to recognize duplicates; it is touched only as far as it is needed


@dataclass(frozen=True)
class ChatConfig:
    """Which conversations to learn from."""

    # chats (questions about the standard library), or a file, folder or "glob" of conversations in
    # the forms of OpenAI, ShareGPT or Alpaca, such as jsonl with {"messages": [...]} a line
    path: DataPath = "chats"
    tokenizer: FolderPath = ""  # folder with a saved tokenizer (default: that of the base run)
    # share of your own conversations held out, half for validation and half for test; chats have
    # their own splits
    val_fraction: float = 0.1

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        check_val_fraction(self.val_fraction)


# ---- one conversation, in any of the usual forms -------------------------------------------------

FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, ...]} (OpenAI), '
    '{"conversations": [{"from": "human", "value": "..."}, ...]} (ShareGPT), or '
    '{"instruction": "...", "input": "...", "output": "..."} (Alpaca)'
)
ROLE_NAMES = {  # as others name them
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
}
# What these say is lost in a conversation of texts. Empty ones say nothing.
UNSUPPORTED = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "audio",
               "images", "image", "videos", "refusal")  # fmt: skip
# Whether a message is trained on: OpenAI's "weight", and what other trainers call it.
WEIGHTS = {"weight": (1, 0), "train": (True, False), "loss": (True, False), "masked": (False, True)}
USED_KEYS = {"messages", "conversations", "instruction", "input", "output", "system", "history",
             "role", "content", "from", "value", *UNSUPPORTED, *WEIGHTS}  # fmt: skip


def refuse_unsupported(fields: dict) -> None:
    """Raise ValueError that names a key whose meaning would be lost."""
    for name in UNSUPPORTED:
        if fields.get(name):
            raise ValueError(f"{name!r} cannot be learnt: only texts of {', '.join(ROLES)}")


def read_content(content: Any) -> str:
    """The text of a message: a text, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("a message whose content is no text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of a message of type {kind!r}, which is no text")
        texts.append(part["text"])
    return "".join(texts)


def is_trained(message: dict) -> bool:
    """Whether the assistant learns from a message or a conversation, by the keys of WEIGHTS."""
    trained = True
    for name, (yes, no) in WEIGHTS.items():
        value = message.get(name)
        if value is None:
            continue
        if value not in (yes, no):
            raise ValueError(f"{name!r} is {value!r}: it must be {yes} or {no}")
        trained = trained and value == yes
    return trained


def read_message(fields: Any) -> Message:
    """A message with "role" and "content", or "from" and "value".

    The result has "weight": 0 if it is a message of the assistant that is not trained on.
    """
    if not isinstance(fields, dict):
        raise ValueError("a message that is no object")
    refuse_unsupported(fields)
    name = fields.get("role", fields.get("from"))
    content = fields.get("content", fields.get("value"))
    if name is None or content is None:
        raise ValueError('a message without "role" and "content"')
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise ValueError(f"unknown role {name!r}, none of {', '.join(ROLE_NAMES)}")
    message = {"role": ROLE_NAMES[name], "content": read_content(content)}
    if message["role"] == "assistant" and not is_trained(fields):
        message["weight"] = 0
    return message


def read_alpaca(fields: dict) -> list[Message]:
    """The messages of an instruction, perhaps with an input, and its answer."""
    texts = [fields.get(name) or "" for name in ("system", "instruction", "input", "output")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("an instruction, input or output that is no text")
    if fields.get("history"):
        raise ValueError("'history' cannot be learnt: write the turns as \"messages\"")
    system, instruction, given, output = texts
    question = "\n\n".join(text for text in (instruction, given) if text.strip())
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    return messages


def read_conversation(fields: dict) -> list[Message]:
    """The messages of an object in one of FORMS. Raises ValueError with the reason for others."""
    refuse_unsupported(fields)
    if not is_trained(fields):
        raise ValueError(f"not to be trained on, by one of {', '.join(WEIGHTS)}")
    if isinstance(fields.get("instruction"), str) and "output" in fields:
        messages = read_alpaca(fields)
    else:
        listed = fields.get("messages") or fields.get("conversations")
        if not isinstance(listed, list) or not listed:
            raise ValueError('no list of "messages" or "conversations", no "instruction"')
        messages = [read_message(message) for message in listed]
        if isinstance(fields.get("system"), str) and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": fields["system"]})
    check_messages(messages)
    learnt = (m for m in messages if m["role"] == "assistant" and m.get("weight", 1))
    if not any(message["content"].strip() for message in learnt):
        raise ValueError("the assistant says nothing to learn")
    return messages


# ---- files ---------------------------------------------------------------------------------------


def unused_keys(fields: dict) -> Iterator[str]:
    """The keys of a conversation and of its messages that nothing here reads."""
    yield from fields.keys() - USED_KEYS
    for message in fields.get("messages") or fields.get("conversations") or ():
        yield from message.keys() - USED_KEYS


def read_files(path: str, report: Report) -> Iterator[tuple[str, list[Message]]]:
    """Yield (place, messages) of each row that can be used, of all files that `path` names.

    The report counts the rows that were found and skipped.
    """
    unused: Counter[str] = Counter()
    for file in reading.find(path, report):
        before = report.found
        try:
            for place, fields in tables.records(file, report):
                try:
                    messages = read_conversation(fields)
                except ValueError as error:
                    report.skip(str(error), place)
                    continue
                unused.update(unused_keys(fields))
                yield place, messages
            if report.found == before:
                report.skip("empty", file.name)
        except ValueError as error:
            report.skip(str(error), file.name)
    if unused:
        names = ", ".join(f"{name!r} ({count:,})" for name, count in unused.most_common(8))
        report.note(f"keys that are not used: {names}")


def without_duplicates(
    found: Iterator[tuple[str, list[Message]]], report: Report
) -> Iterator[tuple[str, list[Message]]]:
    """Leave out conversations that are nearly the same as one before, see data/dedupe.py."""
    seen = dedupe.Seen(INDEX_MB)
    for place, messages in found:
        text = "\n".join(message["content"] for message in messages)
        keys = dedupe.keys_of(text, near=True)
        reason = seen.look_up(keys)
        if reason:
            report.skip(reason, place)
            continue
        seen.add(keys)
        report.used += 1
        yield place, messages


def read_splits(config: ChatConfig, report: Report) -> dict[str, list[list[Message]]]:
    """The conversations of each split.

    Raises ValueError if no conversation can be used, or if there is only one.
    """
    path = config.path
    if path in SOURCES:
        splits = {name: [] for name in SPLITS}
        named = [(c["split"], c["messages"]) for c in SOURCES[path].conversations(report)]
        report.used = 0  # those that stay are counted again
        for split, messages in without_duplicates(iter(named), report):
            splits[split].append(messages)
        return splits
    found = [messages for _, messages in without_duplicates(read_files(path, report), report)]
    if not found:
        raise ValueError(f"no conversation to learn from in {path!r}: {report}; give {FORMS}")
    if len(found) < 2:
        raise ValueError(f"{path!r} has one conversation; give one more to hold out")
    return hold_out(found, config.val_fraction)


def leave_out_overlap(splits: dict[str, list[list[Message]]]) -> tuple[int, dict[str, float]]:
    """Remove held-out conversations whose answers training has, see data/splits.py.

    Returns how many, and the share of the words of those that stay in runs that training has.
    """
    training = [chats.said_in(messages) for messages in splits[TRAIN]]
    removed = 0
    shares = {}
    for name in HELD_OUT:
        counts = overlap_of([chats.said_in(messages) for messages in splits[name]], training)
        places = overlapping(counts)
        for i in reversed(places):
            del splits[name][i]
        removed += len(places)
        shares[name] = share_of(np.delete(counts, places, axis=0))
    return removed, shares


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


def hold_out(conversations: list[list[Message]], fraction: float) -> dict[str, list]:
    """The conversations of each split, in an order by the hash of each.

    At least one is validation. A single one that is held out leaves test empty.
    """
    by_hash = hash_order([json.dumps(messages).encode() for messages in conversations])
    ordered = [conversations[i] for i in by_hash]
    count = held_out_count(len(ordered), fraction)
    middle = (count + 1) // 2
    return {TRAIN: ordered[count:], "val": ordered[:middle], "test": ordered[middle:count]}


def answer_bytes(row: Row, tokenizer: Tokenizer) -> int:
    """The UTF-8 bytes of the answers in a row, without the template's space before each."""
    borders = np.flatnonzero(np.diff(np.concatenate(([False], row.trained, [False]))))
    size = 0
    for start, end in borders.reshape(-1, 2):
        ids = [i for i in row.ids[start:end].tolist() if i != tokenizer.eot]
        size += len(tokenizer.decode_bytes(ids).removeprefix(b" "))
    return size


class ChatSplit:
    """The rows of one split, and the sizes of what the assistant says in them."""

    def __init__(self, conversations: list[list[Row]], tokenizer: Tokenizer):
        """conversations: the rows of each; those without a row do not count."""
        kept = [rows for rows in conversations if rows]
        self.rows = [row for rows in kept for row in rows]
        tokens = [int(sum(row.trained.sum() for row in rows)) for rows in kept]
        self.predicted = sum(tokens)
        # Of each conversation: the number of its first predicted token, and the bytes of answers.
        self.starts = np.cumsum([0, *tokens])[:-1]
        self.bytes = np.array([sum(answer_bytes(row, tokenizer) for row in rows) for rows in kept])

    def bits_per_byte(self, nats_per_token: float) -> float:
        """From the mean loss over the predicted tokens. Ending a turn is cost without bytes."""
        return nats_per_token * self.predicted / math.log(2) / int(self.bytes.sum())


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
        conversations = read_splits(config, report)
        removed, shares = leave_out_overlap(conversations)
        self.splits = {}
        for name, part in conversations.items():
            rows = [make_rows(tokenizer, one, context_length, cuts) for one in part]
            self.splits[name] = ChatSplit(rows, tokenizer)
        self.train = self.splits[TRAIN].rows
        self.val = self.splits["val"].rows
        if not self.train or not self.val:
            advice = "use a longer --model.context-length, or shorter conversations"
            raise ValueError(f"no answer fits into {context_length} tokens: {advice}")

        rows = [row for split in self.splits.values() for row in split.rows]
        ids = np.concatenate([row.ids for row in rows])
        trained = np.concatenate([row.trained for row in rows])
        self.unit = "tokens"
        self.units_per_row = round(len(ids) / len(rows))

        content = tokenizer.fingerprint().encode() + ids.tobytes() + trained.tobytes()
        # A run keeps its start, which says by which version the data were split.
        self.fingerprint = f"{FORMAT}-{hashlib.sha256(content).hexdigest()}"
        learnt = int(trained.sum())
        held = [len(self.splits[name].rows) for name in HELD_OUT]
        parts = [
            f"{config.path}: {counted(sum(map(len, conversations.values())), 'conversations')} in "
            f"{counted(len(rows), 'rows')}, {held[0]:,} of them for validation and {held[1]:,} for "
            "test, "
            f"{learnt:,} of {len(ids):,} tokens are trained on, {learnt / len(ids):.0%}"
        ]
        parts.append(
            f"{shares['val']:.2%} of validation and {shares['test']:.2%} of test in 13-word runs "
            "that training also has"
        )
        if removed:
            parts.append(f"left out for having more: {counted(removed, 'conversations')}")
        parts += [f"{count:,} {problem}" for problem, count in cuts.items() if count]
        if report.skipped or report.notes:
            parts.append(str(report))
        self.description = "; ".join(parts)

    def split(self, name: str) -> ChatSplit:
        """The rows of "train", "val" or "test"; test may have none."""
        return self.splits[name]

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, with the fields of `collate`."""
        index = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        chosen = shuffle(index, len(self.train), self.seed)
        return collate([self.train[i] for i in chosen], self.tokenizer.eot)

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """All rows of validation, `rows` at a time."""
        return self.split_batches("val", rows)

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """All rows of a split, `rows` at a time."""
        found = self.splits[name].rows
        for first in range(0, len(found), rows):
            yield collate(found[first : first + rows], self.tokenizer.eot)

    def metrics(self, nats_per_token: float) -> dict[str, float]:
        """Bits per byte of the assistant's answers in validation."""
        return {"val_bpb": self.splits["val"].bits_per_byte(nats_per_token)}
