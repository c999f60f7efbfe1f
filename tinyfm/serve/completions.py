"""Texts: /v1/completions and /v1/chat/completions, whole or as a stream.

A request asks for rows: n texts for each prompt. The engine writes them all at once, and sends an
event for each token (engine.py). A `Reply` collects the events of each row and puts them into the
form of one of the two routes. The rows are those of `sample.py RUN -n ROWS --seed SEED`.

A stream is a sequence of server-sent events, "data: {...}" and a blank line. Each but the last of a
row has `finish_reason: null`; "data: [DONE]" ends the stream. The status of HTTP is sent with the
first token, so what fails before has a status that says so.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tinyfm.adapt import chat
from tinyfm.generate import visible_from
from tinyfm.serve.engine import Busy, Done, Engine, Event, TextRequest, Token
from tinyfm.serve.families import Served, find_run
from tinyfm.serve.guard import Json, read_json, unless_gone
from tinyfm.serve.requests import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    Writing,
    check,
    read,
)
from tinyfm.tokenizer import replace_surrogates

MOST_UNREAD = 4000  # tokens that are kept for a client that does not read its stream
LOWEST_LOGPROB = -9999.0  # stands for ln 0, which JSON cannot write

# ---- the rows of a request -----------------------------------------------------------------------


class Rows:
    """The texts of one request while they are written: iterate over (row, event)."""

    def __init__(self, engine: Engine, name: str, requests: Sequence[TextRequest]):
        """Submit all rows. Raises Busy if there is no room for them, and ValueError."""
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.handles = []
        self.open = len(requests)
        try:
            for i, request in enumerate(requests):
                self.handles.append(engine.submit(name, request, partial(self.put, i)))
        except Exception:
            self.cancel()
            raise

    def put(self, i: int, event: Event) -> None:
        """Called in the engine's thread. Raises Busy for a client that reads too slowly."""
        if self.queue.qsize() > MOST_UNREAD and isinstance(event, Token):
            raise Busy("the client does not read")
        self.loop.call_soon_threadsafe(self.queue.put_nowait, (i, event))

    def cancel(self) -> None:
        """End all rows; those that have ended stay as they are."""
        for handle in self.handles:
            handle.cancel()

    def __aiter__(self) -> Rows:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self.open:
            raise StopAsyncIteration
        i, event = await self.queue.get()
        if isinstance(event, Done):
            self.open -= 1
            if event.error:
                raise BadRequest(event.error, status=500)
            if event.reason == "cancelled":
                reason = "the server is closing, or the stream was read too slowly"
                raise BadRequest(f"the text was ended: {reason}", status=503)
        return i, event


# ---- replies -------------------------------------------------------------------------------------


@dataclass
class Row:
    """What a row has so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    characters: int = 0  # of the tokens whose log-probabilities were reported
    written: int = 0  # tokens, without the prompt's
    cached: int = 0  # tokens of the prompt that the engine knew already
    reason: str | None = None  # why it ended


class Reply:
    """The answer to a request. A subclass gives it the form of its route."""

    prefix: str  # of its id
    whole_object: str
    chunk_object: str

    def __init__(
        self,
        asked: Writing,
        run: Served,
        requests: list[TextRequest],
        starts: list[str],
        warnings: list[str],
    ):
        """starts: the text that each row begins with, before anything is written."""
        self.asked = asked
        self.run = run
        self.requests = requests
        self.rows = [Row(start) for start in starts]
        self.warnings = warnings
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    # ---- the form of the route ----

    def logprobs(self, row: Row, tokens: list[Token]) -> Any:
        """The log-probabilities of a row's next tokens; None if they were not asked for."""
        raise NotImplementedError

    def whole_choice(self, i: int, row: Row) -> dict[str, Any]:
        raise NotImplementedError

    def chunk_choice(self, i: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def first_choices(self) -> list[dict[str, Any]]:
        """The choices that a stream starts with, before the first token."""
        raise NotImplementedError

    def clean(self, row: Row, text: str) -> str:
        """New text of a row, without what belongs to the template."""
        return text

    # ---- what is collected ----

    def add(self, row: Row, event: Event) -> tuple[str, list[Token]]:
        """Add an event to its row; returns the new text and the new token, if there are any."""
        if isinstance(event, Done):
            row.reason = event.reason
            row.cached = event.cached
            tokens = []
        else:
            # A soft prompt's tokens are no text.
            tokens = [event] if event.id < self.run.tokenizer.vocab_size else []
            row.written += not event.prompt
        if isinstance(event, Token) and event.prompt:
            text = ""  # the row began with it
        else:
            text = self.clean(row, event.text)
        row.text += text
        row.tokens += tokens
        return text, tokens

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens. A prompt counts once, however many texts follow it."""
        n, front = self.asked.n, len(self.run.front)
        prompt = 0
        cached = 0
        for i in range(0, len(self.rows), n):
            prompt += len(self.requests[i].prompt) - front
            cached += max(0, max(row.cached for row in self.rows[i : i + n]) - front)
        written = sum(row.written for row in self.rows)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    # ---- the answer ----

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields of every answer. seed: with it the same texts come again."""
        answer = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.run.name,
            "system_fingerprint": self.run.opened.folder.name,
            "seed": self.requests[0].sampling.seed,
            "choices": choices,
        }
        if self.warnings:
            answer["warnings"] = self.warnings
        return answer

    async def whole(self, rows: Rows) -> Response:
        """The answer in one piece, when all rows have ended."""
        async for i, event in rows:
            self.add(self.rows[i], event)
        choices = [self.whole_choice(i, row) for i, row in enumerate(self.rows)]
        return Json(self.envelope(self.whole_object, choices) | {"usage": self.usage()})

    async def stream(self, rows: Rows, first: tuple[int, Event]) -> AsyncIterator[bytes]:
        """The answer as server-sent events. `first` was taken from the rows already."""
        for choice in self.first_choices():
            yield self.chunk([choice])
        for chunk in self.event_chunks(*first):
            yield chunk
        try:
            async for i, event in rows:
                for chunk in self.event_chunks(i, event):
                    yield chunk
            if self.asked.include_usage:
                yield self.chunk([], self.usage())
        except BadRequest as error:
            yield server_sent(error.body())
        yield b"data: [DONE]\n\n"

    def event_chunks(self, i: int, event: Event) -> list[bytes]:
        """What a stream says about an event."""
        row = self.rows[i]
        text, tokens = self.add(row, event)
        logprobs = self.logprobs(row, tokens) if tokens else None
        choices = []
        if text or logprobs is not None:
            choices.append(self.chunk_choice(i, text, logprobs, None))
        if row.reason:
            choices.append(self.chunk_choice(i, "", None, row.reason))
        return [self.chunk([choice]) for choice in choices]

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        answer = self.envelope(self.chunk_object, choices)
        if self.asked.include_usage:
            answer["usage"] = usage
        self.warnings = []  # once is enough
        return server_sent(answer)

    def token_text(self, i: int) -> str:
        """A token as text; a part of a character as its bytes, bytes:\\xe2\\x82."""
        data = self.run.tokenizer.token_bytes(i)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def server_sent(value: dict[str, Any]) -> bytes:
    """An event. It is ASCII, as some clients take more than line feeds for the end of a line."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n".encode("ascii")


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


class CompletionReply(Reply):
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def add(self, row: Row, event: Event) -> tuple[str, list[Token]]:
        if self.asked.prompt_alone and isinstance(event, Token) and not event.prompt:
            return "", []
        if self.asked.prompt_alone and isinstance(event, Done):
            event = replace(event, text="")
        return super().add(row, event)

    def logprobs(self, row: Row, tokens: list[Token]) -> dict[str, list] | None:
        if self.asked.logprobs is None:
            return None
        texts = [self.token_text(token.id) for token in tokens]
        values = []
        alternatives = []
        offsets = []
        for token, text in zip(tokens, texts):
            offsets.append(row.characters)
            row.characters += len(text)
            if token.logprob is None:  # nothing predicts the first token of a prompt
                values.append(None)
                alternatives.append(None)
                continue
            values.append(finite(token.logprob))
            alternatives.append({self.token_text(j): finite(value) for j, value in token.top})
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": alternatives,
            "text_offset": offsets,
        }

    def first_choices(self) -> list[dict[str, Any]]:
        echoed = [(i, row.text) for i, row in enumerate(self.rows) if row.text]
        return [self.chunk_choice(i, text, None, None) for i, text in echoed]

    def chunk_choice(self, i: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole_choice(self, i: int, row: Row) -> dict[str, Any]:
        return self.chunk_choice(i, row.text, self.logprobs(row, row.tokens), row.reason)


class ChatReply(Reply):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def clean(self, row: Row, text: str) -> str:
        return text if row.text else text.removeprefix(" ")  # the template's, after the role

    def logprobs(self, row: Row, tokens: list[Token]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        content = []
        for token in tokens:
            top = [self.entry(j, value) for j, value in token.top]
            content.append(self.entry(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def entry(self, i: int, logprob: float) -> dict[str, Any]:
        data = self.run.tokenizer.token_bytes(i)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(data)}

    def first_choices(self) -> list[dict[str, Any]]:
        choices = [self.chunk_choice(i, "", None, None) for i in range(len(self.rows))]
        for choice in choices:
            choice["delta"] = {"role": "assistant", "content": ""}
        return choices

    def chunk_choice(self, i: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        delta = {} if reason else {"content": text}
        return {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def whole_choice(self, i: int, row: Row) -> dict[str, Any]:
        message = {"role": "assistant", "content": row.text, "refusal": None}
        logprobs = self.logprobs(row, row.tokens)
        return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": row.reason}


# ---- from a request to its rows ------------------------------------------------------------------


def prepare_completion(
    asked: CompletionRequest, run: Served, limit: int, warnings: list[str]
) -> Reply:
    """The rows of a completion. limit: most tokens that the server writes. Raises BadRequest."""
    tokenizer = run.tokenizer
    sampling = asked.sampling(1 if asked.prompt_alone else asked.max_tokens, limit)
    sampling = replace(sampling, stop_tokens=(tokenizer.eot,))
    requests = []
    starts = []
    for prompt in asked.prompts():
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt) or [tokenizer.eot]
        else:
            ids = prompt
            wrong = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
            last = tokenizer.vocab_size - 1
            check(not wrong, "prompt", wrong[:1], f"ids of the run {run.name}, 0 to {last}")
            prompt = tokenizer.decode(ids)
        ids = [*run.front, *ids]
        warn_if_cut(run, ids, warnings)
        for _ in range(asked.n):
            request = TextRequest(
                ids,
                sampling,
                len(requests),
                asked.stop_strings,
                asked.logprobs or 0,
                asked.echo and asked.logprobs is not None,
            )
            requests.append(request)
            starts.append(replace_surrogates(prompt) if asked.echo else "")
    return CompletionReply(asked, run, requests, starts, warnings)


def warn_if_cut(run: Served, ids: list[int], warnings: list[str]) -> None:
    """Warn about a prompt of which the model does not see the start."""
    context = run.model.config.context_length
    left_out = visible_from(len(ids), context)
    if left_out and len(warnings) < 10:
        warnings.append(
            f"the prompt has {len(ids)} tokens: the model sees the last {len(ids) - left_out}, "
            f"as its context is {context}"
        )


def prepare_chat(asked: ChatRequest, run: Served, limit: int, warnings: list[str]) -> Reply:
    """The rows of a chat's answer, as adapt/chat.py builds them. Raises BadRequest."""
    messages = asked.conversation()
    name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    sampling = asked.sampling(getattr(asked, name), limit, name)
    try:
        ids, sampling = chat.prepare_answer(run.model, run.tokenizer, messages, sampling)
    except ValueError as error:
        raise BadRequest(str(error), "messages", code="context_length_exceeded") from error
    left_out = len(run.front) + len(chat.render(run.tokenizer, messages)) - len(ids)
    if left_out:
        warnings.append(f"the oldest exchanges, {left_out} tokens, do not fit: they were left out")
    requests = [
        TextRequest(ids, sampling, i, asked.stop_strings, asked.top_logprobs)
        for i in range(asked.n)
    ]
    return ChatReply(asked, run, requests, [""] * asked.n, warnings)


# ---- routes --------------------------------------------------------------------------------------


class RowStream(StreamingResponse):
    """A stream that ends its rows when the client goes away."""

    def __init__(self, content: AsyncIterator[bytes], rows: Rows):
        super().__init__(content, media_type="text/event-stream")
        self.rows = rows

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.rows.cancel()


async def answer(request: Request, kind: type, ability: str, prepare: Callable) -> Response:
    """Read a request, have its rows written, and answer. Raises BadRequest and Busy."""
    state = request.app.state
    asked, warnings = read(kind, await read_json(request))
    run = find_run(state.runs, asked.model, ability)
    limit = state.settings.max_tokens
    reply = await anyio.to_thread.run_sync(prepare, asked, run, limit, warnings)
    rows = Rows(state.engine, run.name, reply.requests)
    try:
        if not asked.stream:
            return await unless_gone(request, reply.whole(rows))
        first = await unless_gone(request, anext(rows))
        return RowStream(reply.stream(rows, first), rows)
    except BaseException:
        rows.cancel()
        raise


async def complete(request: Request) -> Response:
    """POST /v1/completions"""
    return await answer(request, CompletionRequest, "complete", prepare_completion)


async def answer_chat(request: Request) -> Response:
    """POST /v1/chat/completions"""
    return await answer(request, ChatRequest, "chat", prepare_chat)
