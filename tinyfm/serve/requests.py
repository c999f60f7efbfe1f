"""Bodies of requests: their fields, the values that they may have, and the errors of the API.

A body comes from a stranger. It is read in steps:

    values = parse(body)                              # JSON within limits: an object
    request, warnings = read(CompletionRequest, values)

Field by field, a value is compared with its type, and then with its range. Fields that no class
here has are ignored, and the warnings name them. `null` means that a field is left out.

The names are those of OpenAI's API. It has no fields for some settings of tinyfm: top_k, min_p,
repetition_penalty, steps, guidance, sampler; these have the names of sample.py's options. What is
left out has the default of sample.py, but for the seed, which is drawn.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import random
import re
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypedDict

from tinyfm.common import schema
from tinyfm.generate import Sampling

MOST_ROWS = 128  # texts of one request
MOST_TOP = 20  # alternatives with each token
MOST_STOPS = 16
STOP_CHARACTERS = 1000  # of one stop string
MOST_CHARACTERS = 200_000  # of all texts of a request together; or token ids
MOST_INPUTS = 2048  # prompts, or texts to embed
MOST_LABELS = 256
MOST_PICTURES = 16  # to draw
MOST_STEPS = 1000
MOST_FOUND = 100  # pictures that a search returns

# ---- errors --------------------------------------------------------------------------------------


class BadRequest(Exception):
    """A request that is not served: a sentence for the client, with the field if it is about one.

    status: of HTTP. code: OpenAI's short name of the problem, for programs.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = ""):
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code or {401: "invalid_api_key", 404: "not_found"}.get(status)

    def body(self) -> dict[str, Any]:
        """The answer, in the form that OpenAI's clients read."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def check(valid: bool, param: str, value: Any, rule: str) -> None:
    """Raise BadRequest unless a value is valid. rule: what it must be."""
    if not valid:
        raise BadRequest(f"{param} is {schema.shorten(value)}; it must be {rule}", param)


# ---- from bytes to a request ---------------------------------------------------------------------


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body holds as JSON. Raises BadRequest with the reason otherwise."""
    try:
        values = schema.parse_json(body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not valid UTF-8: {error.reason}; send UTF-8") from error
    except ValueError as error:
        raise BadRequest(f"the body is no JSON that can be read: {error}") from error
    if not isinstance(values, dict):
        raise BadRequest("the body is JSON, but no object; send {...}")
    return values


def read(kind: type, values: dict[str, Any]) -> tuple[Any, list[str]]:
    """A request of this class from the fields of a body, and warnings that name the fields ignored.

    Raises BadRequest with the field.
    """
    kinds = schema.fields_of(kind)
    known = {}
    ignored = []
    for name, value in values.items():
        if value is None:
            continue
        if name in kinds:
            try:
                known[name] = schema.check(value, kinds[name], name)
            except ValueError as error:
                raise BadRequest(str(error), name) from error
        elif value or name not in NEUTRAL:
            ignored.append(schema.shorten(name, 40))
    required = [
        f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
    ]
    for name in required:
        if name not in known:
            raise BadRequest(f"{name} is missing", name)
    warnings = []
    if ignored:
        warnings.append(f"ignored, as this server does not know them: {', '.join(ignored[:20])}")
    return kind(**known), warnings


# Fields of OpenAI's API that change nothing if they are 0, false or empty.
NEUTRAL = frozenset({
    "best_of", "frequency_penalty", "functions", "logit_bias", "metadata", "modalities",
    "parallel_tool_calls", "presence_penalty", "store", "suffix", "tools", "user",
})  # fmt: skip


def convert_form(kind: type, fields_found: dict[str, str]) -> dict[str, Any]:
    """The fields of a form, which are all texts, with numbers where the class wants numbers."""
    kinds = schema.fields_of(kind)
    values: dict[str, Any] = {}
    for name, text in fields_found.items():
        values[name] = text
        if name in kinds and not schema.fits("", kinds[name]):
            with contextlib.suppress(ValueError):  # `read` will say what is expected
                values[name] = schema.parse_json(text)
    return values


# ---- texts ---------------------------------------------------------------------------------------


class StreamOptions(TypedDict, total=False):
    """What a stream says besides the text."""

    include_usage: bool


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a text is to be written: what completions and chats share."""

    model: str = ""  # name of a run; empty = the first that can do it
    n: int = 1
    max_tokens: int = Sampling.max_new_tokens
    temperature: float = Sampling.temperature
    top_k: int = Sampling.top_k
    top_p: float = Sampling.top_p
    min_p: float = Sampling.min_p
    repetition_penalty: float = Sampling.repetition_penalty
    seed: int | None = None
    stop: str | list[str] = ""
    stream: bool = False
    stream_options: StreamOptions | None = None

    def __post_init__(self):
        check(1 <= self.n <= MOST_ROWS, "n", self.n, f"1 to {MOST_ROWS}")
        stops = self.stop_strings
        check(len(stops) <= MOST_STOPS, "stop", f"of {len(stops)} texts", f"at most {MOST_STOPS}")
        for stop in stops:
            rule = f"texts of at most {STOP_CHARACTERS} characters"
            check(len(stop) <= STOP_CHARACTERS, "stop", stop, rule)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(stop for stop in stops if stop)

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, max_tokens: int, limit: int, field: str = "max_tokens") -> Sampling:
        """The settings of generate.py; without a seed, a random one.

        limit: most tokens that the server writes. field: the one that max_tokens comes from. Raises
        BadRequest with the field.
        """
        check(1 <= max_tokens <= limit, field, max_tokens, f"1 to {limit}, this server's limit")
        seed = random.SystemRandom().getrandbits(32) if self.seed is None else self.seed
        try:
            return Sampling(
                max_new_tokens=max_tokens,
                temperature=float(self.temperature),
                top_k=self.top_k,
                top_p=float(self.top_p),
                min_p=float(self.min_p),
                repetition_penalty=float(self.repetition_penalty),
                seed=seed,
            )
        except ValueError as error:  # it starts with the name of the field
            raise BadRequest(str(error), str(error).split()[0]) from error


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(Writing):
    """POST /v1/completions: continue texts."""

    prompt: Any = ""  # a text, several texts, token ids, or several lists of them
    echo: bool = False  # give the prompt back, in front of what was written
    logprobs: int | None = None  # number of alternatives with each token

    def __post_init__(self):
        super().__post_init__()
        top = self.logprobs or 0
        check(0 <= top <= MOST_TOP, "logprobs", self.logprobs, f"0 to {MOST_TOP}")

    @property
    def prompt_alone(self) -> bool:
        """Whether only the prompt's log-probabilities are wanted: with echo and max_tokens 0.

        One token is then written and left out.
        """
        return self.echo and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids. Raises BadRequest."""
        found = texts_or_ids(self.prompt, "prompt")
        rows = len(found) * self.n
        if rows > MOST_ROWS:
            problem = f"{len(found)} prompts with n {self.n} are {rows} texts"
            raise BadRequest(f"{problem}; one request writes at most {MOST_ROWS}", "prompt")
        return found


def texts_or_ids(value: Any, param: str) -> list[str | list[int]]:
    """A text, a list of texts, token ids, or a list of lists of them -> a list of one of each.

    Raises BadRequest for anything else, an empty list, and too much of it.
    """
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        value = [value]
    if not isinstance(value, list) or not value:
        shown = schema.shorten(value)
        raise BadRequest(f"{param} is {shown}; expected a text, token ids, or a list", param)
    check(len(value) <= MOST_INPUTS, param, f"of {len(value)} texts", f"at most {MOST_INPUTS}")
    size = 0
    for one in value:
        ids = isinstance(one, list) and one and all(type(i) is int for i in one)
        if not isinstance(one, str) and not ids:
            shown = schema.shorten(one)
            rule = "expected texts alone, token ids alone, or lists of ids"
            raise BadRequest(f"{param} holds {shown}; {rule}", param)
        size += len(one)
    rule = f"at most {MOST_CHARACTERS:,}"
    check(size <= MOST_CHARACTERS, param, f"of {size:,} characters or ids", rule)
    return value


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Writing):
    """POST /v1/chat/completions: the next answer of a conversation."""

    messages: list[Any]
    max_completion_tokens: int | None = None  # the newer name of max_tokens
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self):
        super().__post_init__()
        check(
            0 <= self.top_logprobs <= MOST_TOP,
            "top_logprobs",
            self.top_logprobs,
            f"0 to {MOST_TOP}",
        )
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        check(bool(self.messages), "messages", [], "a list with at least one message")

    def conversation(self) -> list[dict[str, str]]:
        """The messages as adapt/chat.py takes them: role and content. Raises BadRequest."""
        found = [read_message(message, i) for i, message in enumerate(self.messages)]
        size = sum(len(message["content"]) for message in found)
        rule = f"at most {MOST_CHARACTERS:,}"
        check(size <= MOST_CHARACTERS, "messages", f"of {size:,} characters", rule)
        return found


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def read_message(message: Any, i: int) -> dict[str, str]:
    """One message. Its content may be a text, or a list of parts that are texts."""
    where = f"messages[{i}]"
    if not isinstance(message, dict):
        raise BadRequest(f"{where} is {schema.shorten(message)}; expected an object", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise BadRequest(f"{where}.role is {schema.shorten(role)}; use one of {known}", "messages")
    content = message.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                shown = schema.shorten(part)
                raise BadRequest(
                    f"{where}.content has {shown}; this server reads texts alone: "
                    '{"type": "text", "text": ...}',
                    "messages",
                )
            texts.append(part["text"])
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise BadRequest(
            f"{where}.content is {schema.shorten(content)}; expected a text", "messages"
        )
    return {"role": ROLES[role], "content": content}


# ---- vectors, classes, pictures ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """POST /v1/embeddings: unit vectors of texts."""

    input: Any
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


@dataclass(frozen=True, kw_only=True)
class ClassifyRequest:
    """POST /v1/classify: a text or a picture among classes."""

    model: str = ""
    input: str = ""  # a text
    image: str = ""  # a picture in base64, or a data URL
    labels: list[str] | None = None  # for a CLIP: the names to choose from

    def __post_init__(self):
        if bool(self.input) == bool(self.image):
            raise BadRequest("give one of input, a text, and image, a picture in base64", "input")
        check_length(self.input, "input")
        if self.labels is None:
            return
        n = len(self.labels)
        check(2 <= n <= MOST_LABELS, "labels", f"of {n} names", f"2 to {MOST_LABELS}")
        check(len({*self.labels}) == n, "labels", self.labels, "different names")
        check(
            all(name.strip() for name in self.labels), "labels", self.labels, "without empty ones"
        )
        check_length("".join(self.labels), "labels")


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """POST /v1/search: the pictures that fit a text, or are like a picture."""

    model: str = ""
    query: str = ""
    image: str = ""  # a picture in base64, or a data URL
    n: int = 8

    def __post_init__(self):
        if bool(self.query.strip()) == bool(self.image):
            raise BadRequest("give one of query, a text, and image, a picture in base64", "query")
        check_length(self.query, "query")
        check(1 <= self.n <= MOST_FOUND, "n", self.n, f"1 to {MOST_FOUND}")


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """POST /v1/images/generations: pictures of a text, or of nothing."""

    model: str = ""
    prompt: str = ""
    negative_prompt: str = ""
    n: int = 1
    size: str = "auto"
    response_format: str = "b64_json"
    seed: int | None = None
    steps: int = 20
    guidance: float = 3.0
    sampler: str = "dpm++"

    def __post_init__(self):
        check_length(self.prompt, "prompt")
        check_length(self.negative_prompt, "negative_prompt")
        check(1 <= self.n <= MOST_PICTURES, "n", self.n, f"1 to {MOST_PICTURES}")
        check(1 <= self.steps <= MOST_STEPS, "steps", self.steps, f"1 to {MOST_STEPS}")
        check(self.seed is None or abs(self.seed) < 2**40, "seed", self.seed, "below 2**40")
        valid = self.size == "auto" or re.fullmatch(r"[0-9]{1,4}x[0-9]{1,4}", self.size)
        check(bool(valid), "size", self.size, "auto, or WIDTHxHEIGHT such as 32x32")

    def height_and_width(self) -> tuple[int, int] | None:
        """Of the pictures; None for the model's own size."""
        if self.size == "auto":
            return None
        width, height = self.size.split("x")
        return int(height), int(width)

    def drawn_seed(self) -> int:
        """The seed; without one, a random one."""
        return random.SystemRandom().getrandbits(32) if self.seed is None else self.seed


@dataclass(frozen=True, kw_only=True)
class EditRequest(ImageRequest):
    """POST /v1/images/edits: a given picture changed, whole or in part.

    Pictures are files of a form, or texts in base64.
    """

    image: str
    mask: str = ""  # white or transparent where the picture is to be drawn again
    strength: float | None = None  # share to draw again; as sample.py: 0.6, or 1 with a mask

    def __post_init__(self):
        super().__post_init__()
        valid = self.strength is None or 0 < self.strength <= 1
        check(valid, "strength", self.strength, "above 0, at most 1")


def share_to_redraw(strength: float | None, masked: bool) -> float:
    """The strength asked for; else that of sample.py."""
    if strength is not None:
        return strength
    return 1.0 if masked else 0.6  # a masked part may be redrawn entirely


def check_length(text: str, param: str) -> None:
    """Raise BadRequest for a text that is too long to be read."""
    rule = f"at most {MOST_CHARACTERS:,}"
    check(len(text) <= MOST_CHARACTERS, param, f"of {len(text):,} characters", rule)


def decode_base64(text: str, param: str) -> bytes:
    """The bytes of a picture in base64, or in a data URL. Raises BadRequest."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadRequest(f"{param} is a data URL that is not in base64", param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{param} is no base64: {error}", param) from error


# ---- forms ---------------------------------------------------------------------------------------

MOST_PARTS = 100


def parse_form(body: bytes, content_type: str) -> dict[str, bytes]:
    """The fields of a multipart/form-data body (RFC 7578): files and texts alike, as bytes.

    A name that ends in [] counts without. File names are not read. Raises BadRequest.
    """
    found = re.search(r'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', content_type, re.IGNORECASE)
    if not found:
        raise BadRequest("the form has no boundary in its Content-Type")
    boundary = b"\r\n--" + (found[1] or found[2]).encode("latin-1", "replace")
    parts = (b"\r\n" + body).split(boundary, MOST_PARTS + 1)
    if len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise BadRequest(f"the form is incomplete, or has more than {MOST_PARTS} fields")
    form: dict[str, bytes] = {}
    for part in parts[1:-1]:
        head, blank, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'\bname="([^"]{1,100})"', head)
        if not blank or not name:
            raise BadRequest("a field of the form has no name")
        key = name[1].decode("utf-8", "replace").removesuffix("[]")
        if key in form:
            raise BadRequest(f"the field {key!r} occurs twice in the form; send one", key)
        form[key] = content
    return form
