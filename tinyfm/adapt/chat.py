"""Chats: a model that continues texts learns to answer, and to talk.

Pretraining predicts every token. Instruction tuning (Wei et al. 2021; Ouyang et al. 2022, step 1)
shows whole conversations, and counts what the assistant says only (chat_data.py makes the rows):

    loss = - sum_t m_t ln p(x_t | x_<t) / sum_t m_t,     m_t = 1 if the assistant says x_t, else 0.

One template serves training and sampling. The end-of-text token EOT stands first and closes every
message; a message begins with its role, in plain text:

    EOT user: What does cmp do? EOT assistant: Compare two files. EOT user: And clear_cache? EOT ...

Only behind an EOT does a role count, and no message can bring one along: the tokenizer reads an
"<|endoftext|>" in a text as any other text. So what looks like a role in a message stays text. Role
and content are encoded apart: "assistant:" is always the same tokens, and what is trained on are
the tokens behind it and the EOT that ends the turn, which are just those that sampling makes.

Left out: tools, other models' templates, preferences (RLHF, DPO).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tinyfm import generate
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # {"role": one of ROLES, "content": text}


# ---- the template -------------------------------------------------------------------------------


def check_messages(messages: Any) -> None:
    """Raise ValueError, with the reason, if these are not the messages of a conversation."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('no list of "messages"')
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError('a message without "role" and "content"')
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role {message['role']!r}, none of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError("a message whose content is no text")


def encode_message(tokenizer: Tokenizer, message: Message) -> tuple[list[int], list[bool]]:
    """Ids of one message, EOT at its end, and which of them are trained on."""
    role = tokenizer.encode(f"{message['role']}:")
    content = [*tokenizer.encode(f" {message['content']}"), tokenizer.eot]
    trained = message["role"] == "assistant"
    return role + content, [False] * len(role) + [trained] * len(content)


def render(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant's next answer begins.

    Raises ValueError as check_messages says.
    """
    check_messages(messages)
    ids = [tokenizer.eot]
    for message in messages:
        ids += encode_message(tokenizer, message)[0]
    return ids + tokenizer.encode("assistant:")


def split_exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages it begins with; and the rest in groups, cut after each answer."""
    start = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    exchanges: list[list[Message]] = []
    for i in range(start, len(messages)):
        if i == start or messages[i - 1]["role"] == "assistant":
            exchanges.append([])
        exchanges[-1].append(messages[i])
    return messages[:start], exchanges


# ---- talking ------------------------------------------------------------------------------------


def fit_history(tokenizer: Tokenizer, messages: list[Message], room: int) -> list[int]:
    """`render` of as much as fits into `room` tokens: the oldest exchanges go first, the system
    messages and the last exchange stay. Raises ValueError if these are too long by themselves."""
    system, exchanges = split_exchanges(messages)
    for first in range(max(1, len(exchanges))):
        ids = render(tokenizer, system + [m for group in exchanges[first:] for m in group])
        if len(ids) <= room:
            return ids
    raise ValueError(f"the message takes {len(ids)} tokens, only {room} fit: say it in fewer words")


def reply(
    model, tokenizer: Tokenizer, messages: list[Message], sampling: generate.Sampling | None = None
) -> Iterator[str]:
    """Yield the assistant's next answer in parts, as they become certain.

    The context is shared: an answer may take max_new_tokens, but at most half of it; what went
    before gets the rest, see fit_history.
    """
    s, context = sampling or generate.Sampling(), model.config.context_length
    s = replace(s, max_new_tokens=min(s.max_new_tokens, max(1, context // 2)))
    s = replace(s, stop_tokens=(*s.stop_tokens, tokenizer.eot))
    front = prompt_ids(model)  # a soft prompt stands before all that the model reads
    ids = front + fit_history(tokenizer, messages, context - s.max_new_tokens - len(front))
    text, begun = generate.TextStream(), False
    for (token,) in generate.stream(model, [ids], s):
        part = text.feed(tokenizer.token_bytes(token))
        yield part if begun else part.removeprefix(" ")  # which the template puts there
        begun = begun or bool(part)
    yield text.feed(b"", final=True)


def chat(
    model, tokenizer: Tokenizer, read: Callable[[str], str] = input, write: Callable = print,
    sampling: generate.Sampling | None = None, system: str = "",
) -> list[Message]:  # fmt: skip
    """Talk until the end of input (Ctrl-D); returns the messages. `write` takes print's options."""
    s, messages = sampling or generate.Sampling(), []
    if system:
        messages.append({"role": "system", "content": system})
    while True:
        try:
            question = read("user: ")
        except EOFError:
            return messages
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        write("assistant: ", end="", flush=True)
        try:
            answer = ""
            for part in reply(model, tokenizer, messages, s):
                write(part, end="", flush=True)
                answer += part
            messages.append({"role": "assistant", "content": answer})
            write()
        except ValueError as error:
            del messages[-1]
            write(f"({error})")
        s = replace(s, seed=s.seed + 1)
