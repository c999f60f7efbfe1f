"""Who may call the server, and how much of its time and memory a caller may take.

A server on 127.0.0.1 is not private: every page that the user's browser opens can send it requests.
Such a page can also let its own name resolve to 127.0.0.1 ("DNS rebinding"), and then the browser
takes the server for a part of that page. So each request is checked:

    Host       the name that the client used must be one of this machine's, never a stranger's
    Origin     what a page sends must come from the server's own page, or from one that the user
               named with --allow-origin; a browser adds this header, and no script can change it
    key        with --api-key, /v1 and /api need it; a server that others can reach always has one

A body is read only as far as its limit and for a limited time. Connections that send nothing, or do
not read what they are sent, are ended (`PatientProtocol`).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyfm.serve.requests import BadRequest, convert_form, parse, parse_form

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    host: str = "127.0.0.1"  # the address that the server listens on
    api_key: str = ""  # empty: none is needed
    allow_origins: tuple[str, ...] = ()  # pages of others that may send requests
    max_tokens: int = 32_768  # most tokens of one text
    max_body: int = 10_000_000  # bytes of a request
    body_seconds: float = 30  # to send a body

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


# ---- answers -------------------------------------------------------------------------------------

# Nothing but the page's own files may run in the page, and nobody may show it in a frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE_HEADERS: Headers = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


class Json(Response):
    """A value as JSON. What UTF-8 cannot write, half of a surrogate pair, becomes "?"."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def error_response(error: BadRequest) -> Json:
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers["Retry-After"] = "1"
    if error.status in (408, 413):  # what is left of the body is not read
        headers["Connection"] = "close"
    return Json(error.body(), error.status, headers)


# ---- every request -------------------------------------------------------------------------------


class Guard:
    """An ASGI application around another one, which gets only the requests that pass."""

    def __init__(self, app: Callable[..., Awaitable[None]], settings: Settings):
        self.app = app
        self.settings = settings
        self.names = {"localhost", settings.host.lower()}
        if not settings.is_loopback:
            self.names.add(socket.gethostname().lower())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        added = [*SAFE_HEADERS]

        async def send_safely(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            origin = self.check_caller(scope)
            if origin:
                added += cors_headers(origin)
            answer = self.answer_options(scope, origin)
            if answer is None:
                self.check_key(scope)
                check_kind(scope)
                await self.app(scope, LimitedBody(receive, self.settings), send_safely)
                return
        except BadRequest as error:
            answer = error_response(error)
        await answer(scope, receive, send_safely)

    def check_caller(self, scope: Any) -> str:
        """The origin of a page of others that may call; "" for every other caller.

        Raises BadRequest for a stranger's Host or Origin.
        """
        hosts = values_of(scope, b"host")
        if len(hosts) != 1 or not self.is_own_name(host_name(hosts[0])):
            shown = hosts[0][:100] if hosts else ""
            raise BadRequest(
                f"the Host {shown!r} is no name of this server; call it by its address, such as "
                "http://127.0.0.1",
                status=403,
            )
        for origin in values_of(scope, b"origin"):
            if origin in self.settings.allow_origins:
                return origin
            if not is_same(origin, hosts[0]):
                raise BadRequest(
                    f"requests of the page {origin[:100]!r} are not allowed; if you trust it, "
                    f"start the server with --allow-origin {origin[:100]}",
                    status=403,
                )
        # A browser sends no Origin with the address of a picture or a link in a page of others.
        site = values_of(scope, b"sec-fetch-site")
        if site and site[0] not in ("same-origin", "none"):
            is_link = values_of(scope, b"sec-fetch-mode") == ["navigate"]
            if scope["method"] != "GET" or not is_link or is_api(scope["path"]):
                raise BadRequest("a page of another site may not call this server", status=403)
        return ""

    def is_own_name(self, name: str) -> bool:
        """Whether a client may call this server by a name.

        The name of an address is safe: nobody can let it resolve to another one.
        """
        try:
            return ipaddress.ip_address(name).is_loopback or not self.settings.is_loopback
        except ValueError:
            return name in self.names

    def answer_options(self, scope: Any, origin: str) -> Response | None:
        """The answer to OPTIONS, by which a browser asks before it lets a page send a request."""
        if scope["method"] != "OPTIONS":
            return None
        headers = {"Allow": "GET, HEAD, POST, OPTIONS"}
        if origin:
            asked = values_of(scope, b"access-control-request-headers")
            headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            headers["Access-Control-Allow-Headers"] = asked[0] if asked else "authorization"
            headers["Access-Control-Allow-Private-Network"] = "true"
            headers["Access-Control-Max-Age"] = "600"
        return Response(status_code=204, headers=headers)

    def check_key(self, scope: Any) -> None:
        """Raise BadRequest if a request needs the key and does not have it."""
        key = self.settings.api_key
        is_page = scope["method"] in ("GET", "HEAD") and not is_api(scope["path"])
        if not key or is_page:
            return
        given = "".join(values_of(scope, b"authorization"))
        # The time that this takes says nothing about the key.
        if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {key}".encode()):
            raise BadRequest("this server needs its key: Authorization: Bearer KEY", status=401)


def is_api(path: str) -> bool:
    return path in ("/v1", "/api") or path.startswith(("/v1/", "/api/"))


def values_of(scope: Any, name: bytes) -> list[str]:
    """The values of a header, as often as it occurs."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]*)?", re.IGNORECASE)


def host_name(host: str) -> str:
    """The name in a Host header, without the port: "[::1]:80" -> "::1"; "" if it is none."""
    found = HOST.fullmatch(host)
    return (found[1] or found[2]).lower().removesuffix(".") if found else ""


def is_same(origin: str, host: str) -> bool:
    """Whether a page is the server's own: it came from the host that the request goes to."""
    scheme, separator, own = origin.partition("://")
    return bool(separator) and scheme in ("http", "https") and own.lower() == host.lower()


def cors_headers(origin: str) -> Headers:
    """What lets a page of this origin read the answer."""
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", b"retry-after"),
        (b"vary", b"origin"),
    ]


# ---- bodies --------------------------------------------------------------------------------------

FORMS = ("/v1/images/edits", "/v1/classify", "/v1/search")  # routes to which files are sent


def check_kind(scope: Any) -> None:
    """Raise BadRequest unless a body says that it is JSON, or a form where there may be one.

    A page of another site cannot send JSON without asking first (OPTIONS); text it can.
    """
    if scope["method"] != "POST":
        return
    kind = "".join(values_of(scope, b"content-type"))
    name = kind.partition(";")[0].strip().lower()
    is_form = name == "multipart/form-data" and scope["path"] in FORMS
    if name != "application/json" and not is_form:
        raise BadRequest(
            f"the Content-Type is {kind[:100]!r}; send JSON, with Content-Type: application/json",
            status=415,
        )


class LimitedBody:
    """An ASGI `receive` that raises BadRequest for a body that is too large, or too slow."""

    def __init__(self, receive: Callable[[], Awaitable[Any]], settings: Settings):
        self.receive = receive
        self.settings = settings
        self.size = 0
        self.complete = False
        self.deadline = 0.0

    async def __call__(self) -> Any:
        if self.complete:  # then what comes is the end of the connection
            return await self.receive()
        message = await self.receive_in_time()
        # What is too much is read on for a while, so that the client gets to the answer.
        limit = self.settings.max_body
        while limit < self.size < 5 * limit and not self.complete:
            await self.receive_in_time()
        if self.size > limit:
            problem = f"the body is larger than {limit:,} bytes, this server's limit"
            raise BadRequest(problem, status=413)
        return message

    async def receive_in_time(self) -> Any:
        now = anyio.current_time()
        self.deadline = self.deadline or now + self.settings.body_seconds
        try:
            with anyio.fail_after(self.deadline - now):
                message = await self.receive()
        except TimeoutError as error:
            raise BadRequest("the body did not arrive in time", status=408) from error
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        return message


LARGE = 100_000  # bytes: a larger body is parsed in another thread, so that others need not wait


async def read_json(request: Request) -> dict[str, Any]:
    """The fields of a JSON body. Raises BadRequest."""
    body = await request.body()
    if len(body) > LARGE:
        return await anyio.to_thread.run_sync(parse, body)
    return parse(body)


async def read_json_or_form(
    request: Request, kind: type, files: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(fields, files) of a body in JSON or of a form. Raises BadRequest.

    kind: the class of the request, which says which fields are numbers. files: names of fields that
    are pictures. A form has their bytes; in JSON they stay among the fields, in base64.
    """
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        return await read_json(request), {}
    form = await anyio.to_thread.run_sync(parse_form, await request.body(), content_type)
    found = {name: form.pop(name) for name in files if form.get(name)}
    try:
        texts = {name: content.decode("utf-8") for name, content in form.items()}
    except UnicodeDecodeError as error:
        raise BadRequest(f"a field of the form is not valid UTF-8: {error.reason}") from error
    return convert_form(kind, texts), found


# ---- clients that go away ------------------------------------------------------------------------


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of some work. Raises ClientDisconnect, and cancels it, if the client goes away.

    The body must have been read.
    """

    async def wait_for_end() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_for_end())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


# ---- connections ---------------------------------------------------------------------------------


class PatientProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn, with an end to its patience.

    A client has REQUEST_SECONDS for the head of a request, also for the next one of the same
    connection, and WRITE_SECONDS to take from a full buffer. Then its connection is closed.
    """

    REQUEST_SECONDS = 20.0
    WRITE_SECONDS = 60.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.write_timer = None
        self.request_timer = None
        self.wait_for_request()

    def wait_for_request(self) -> None:
        """Give the client time for its next request."""
        before = self.cycle

        def end_if_late() -> None:
            if self.cycle is before:
                self.transport.abort()

        if self.request_timer:
            self.request_timer.cancel()
        self.request_timer = self.loop.call_later(self.REQUEST_SECONDS, end_if_late)

    def on_response_complete(self) -> None:
        self.wait_for_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_timer = self.loop.call_later(self.WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.write_timer:
            self.write_timer.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for timer in (self.request_timer, self.write_timer):
            if timer:
                timer.cancel()
