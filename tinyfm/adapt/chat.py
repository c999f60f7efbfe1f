"""Chats: a model that continues texts learns to answer, and to hold a conversation.

Pretraining predicts every token. Instruction tuning (Wei et al. 2021; Ouyang et al. 2022, step 1)
trains on whole conversations, but only on the assistant's tokens (batches/chat.py makes the rows):

    loss = - sum_t m_t ln p(x_t | x_<t) / sum_t m_t,     m_t = 1 if the assistant says x_t, else 0.

Training and sampling use one template. The end-of-text token EOT stands first and ends every
message. A message starts with its role, in plain text:

    EOT user: What does cmp do? EOT assistant: Compare two files. EOT user: And clear_cache? EOT ...

A role counts only after an EOT, and no message can contain one: the tokenizer encodes an
"<|endoftext|>" in a text like any other text. So text that looks like a role stays text. Role and
content are encoded separately. So "assistant:" is always the same tokens, and the tokens after it,
with the EOT that ends the turn, are those that sampling generates: these are trained on.

Left out: tools, other models' templates. preference.py is the next step of Ouyang et al.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tinyfm import generate
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# {"role": one of ROLES, "content": text}; also "weight": 0 if the assistant is not to learn it
Message = dict[str, Any]


# ---- the template --------------------------------------------------------------------------------


# The same template in Jinja, as transformers reads it: its apply_chat_template gives the ids of
# `render`, unless a message holds the name of a special token.
JINJA = (
    "{{ eos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


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
    """Ids of one message, with EOT at its end, and for each whether it is trained on.

    "ROLE:" and " CONTENT" are encoded separately. Trained on are the assistant's content and the
    EOT after it, unless the message has "weight": 0.
    """
    role = tokenizer.encode(f"{message['role']}:")
    content = [*tokenizer.encode(f" {message['content']}"), tokenizer.eot]
    trained = message["role"] == "assistant" and message.get("weight", 1) != 0
    return role + content, [False] * len(role) + [trained] * len(content)


def render(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """Token ids of a conversation, up to the start of the assistant's next answer.

    Raises ValueError as check_messages does.
    """
    check_messages(messages)
    ids = [tokenizer.eot]
    for message in messages:
        message_ids, _ = encode_message(tokenizer, message)
        ids += message_ids
    return ids + tokenizer.encode("assistant:")


def split_exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(the system messages at the start, the other messages in groups that end with an answer)."""
    start = 0
    while start < len(messages) and messages[start]["role"] == "system":
        start += 1
    exchanges: list[list[Message]] = []
    for i in range(start, len(messages)):
        if i == start or messages[i - 1]["role"] == "assistant":
            exchanges.append([])
        exchanges[-1].append(messages[i])
    return messages[:start], exchanges


# ---- a conversation ------------------------------------------------------------------------------


def trim_history(tokenizer: Tokenizer, messages: list[Message], room: int) -> list[int]:
    """`render` of the conversation, without its oldest exchanges if it takes more than `room` ids.

    The system messages and the last exchange stay. Raises ValueError if they alone are too long.
    """
    system, exchanges = split_exchanges(messages)
    for first in range(max(1, len(exchanges))):
        recent = [message for exchange in exchanges[first:] for message in exchange]
        ids = render(tokenizer, system + recent)
        if len(ids) <= room:
            return ids
    raise ValueError(f"the message takes {len(ids)} tokens, only {room} fit: say it in fewer words")


def prepare_answer(
    model, tokenizer: Tokenizer, messages: list[Message], sampling: generate.Sampling
) -> tuple[list[int], generate.Sampling]:
    """The ids after which the model writes its next answer, and the settings for it.

    The answer and the conversation before it share the context. The answer may take
    max_new_tokens, but at most half of the context. The conversation gets the rest (trim_history).
    Raises ValueError if the last message does not fit.
    """
    context = model.config.context_length
    answer = min(sampling.max_new_tokens, max(1, context // 2))
    stops = (*sampling.stop_tokens, tokenizer.eot)
    front = prompt_ids(model)  # a soft prompt stands before everything that the model reads
    ids = front + trim_history(tokenizer, messages, context - answer - len(front))
    return ids, replace(sampling, max_new_tokens=answer, stop_tokens=stops)


def reply(
    model, tokenizer: Tokenizer, messages: list[Message], sampling: generate.Sampling | None = None
) -> Iterator[str]:
    """Yield the assistant's next answer in parts, as soon as each is certain.

    See `prepare_answer`.
    """
    ids, s = prepare_answer(model, tokenizer, messages, sampling or generate.Sampling())
    text = generate.TextStream()
    started = False
    never = tokenizer.without_token(model.config.vocab_size)
    for (token,) in generate.stream(model, [ids], s, never=never):
        part = text.feed(tokenizer.token_bytes(token))
        if started:
            yield part
        else:
            yield part.removeprefix(" ")  # the template's space after the role
            started = part != ""
    yield text.feed(b"", final=True)


def chat(
    model,
    tokenizer: Tokenizer,
    read: Callable[[str], str] = input,
    write: Callable = print,
    sampling: generate.Sampling | None = None,
    system: str = "",
) -> list[Message]:
    """Read questions and write answers until the end of input (Ctrl-D); return the messages.

    `read` and `write` are called like input and print. A question that does not fit into the
    context is forgotten. Each answer is sampled with another seed.
    """
    s = sampling or generate.Sampling()
    messages = []
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
