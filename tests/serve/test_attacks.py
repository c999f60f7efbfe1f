"""Attacks on the server: strangers' pages, bad values, too much of everything, slow clients.

After each, the server still answers, and no text is being written.
"""

import base64
import io
import json
import socket
import struct
import time
import zlib

import httpx
import pytest
import small_runs
from conftest import call

from tinyfm.serve import __main__ as command
from tinyfm.serve.guard import PatientProtocol, Settings
from tinyfm.serve.requests import BadRequest, parse_form

KEY = "open sesame"
FRIEND = "http://localhost:3000"
LIMITS = Settings(max_body=200_000, max_tokens=1000, allow_origins=(FRIEND,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return small_runs.build_runs(folder, ("gpt", "chat", "clip", "text2image", "reviews"))


@pytest.fixture(scope="module")
def server(runs):
    with small_runs.serving(runs, LIMITS) as server:
        yield server


@pytest.fixture
def hasty(tmp_path, monkeypatch):
    """A server that soon loses its patience."""
    monkeypatch.setattr(PatientProtocol, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(PatientProtocol, "WRITE_SECONDS", 0.5)
    runs = small_runs.build_runs(tmp_path, ("gpt",))
    with small_runs.serving(runs, Settings(body_seconds=0.5, max_tokens=10_000)) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left(server):
    yield
    assert httpx.get(f"{server.url}/v1/models").status_code == 200
    end = time.monotonic() + 60
    while any(own.running or own.waiting for own in server.engine.models.values()):
        assert time.monotonic() < end, "a text is still being written"
        time.sleep(0.01)


@pytest.fixture
def post(server):
    """POST bytes, or a value as JSON, to a route."""

    def send(route, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        names = {"Content-Type": "application/json"} | names
        return httpx.post(server.url + route, content=content, headers=names, timeout=30)

    return send


TEXT = {"prompt": "a", "max_tokens": 2}


# ---- pages of strangers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil", "[]"]
)
def test_a_rebound_name_is_refused(post, host):
    """DNS rebinding: a stranger's name resolves to 127.0.0.1, and the browser sends that name."""
    answer = post("/v1/completions", TEXT, Host=host)
    assert answer.status_code in (400, 403)
    assert "choices" not in answer.text


def test_own_names_are_served(post, server):
    for host in (f"localhost:{server.port}", "127.0.0.1:9", "[::1]:80", "LOCALHOST."):
        assert post("/v1/completions", TEXT, Host=host).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "file://"]
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_page_of_a_stranger_is_refused(post, origin, kind):
    answer = post("/v1/completions", TEXT, Origin=origin, Content_Type=kind)
    assert answer.status_code == 403 and "--allow-origin" in answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in answer.headers


def test_requests_that_a_page_may_send_unasked_are_refused(post, server):
    """A "simple" request needs no OPTIONS before; old browsers send it without an Origin."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = post("/v1/completions", TEXT, Content_Type=kind)
        assert answer.status_code == 415 and "application/json" in answer.text
    for site in ("cross-site", "same-site"):
        models = f"{server.url}/v1/models"
        assert httpx.get(models, headers={"Sec-Fetch-Site": site}).status_code == 403
        link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
        assert httpx.get(models, headers=link).status_code == 403
        assert httpx.get(server.url, headers=link).status_code == 200


def test_options_are_answered_and_only_friends_may_read(post, server):
    url = f"{server.url}/v1/chat/completions"
    assert httpx.options(url).status_code == 204
    asked = {"Origin": FRIEND, "Access-Control-Request-Headers": "authorization,content-type"}
    answer = httpx.options(url, headers=asked)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == FRIEND
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    served = post("/v1/completions", TEXT, Origin=FRIEND)
    assert served.status_code == 200 and served.headers["access-control-allow-origin"] == FRIEND
    assert httpx.options(url, headers={"Origin": "https://evil.example"}).status_code == 403


def test_every_answer_has_the_headers_that_protect_the_page(server, post):
    answers = [
        httpx.get(server.url),
        httpx.get(f"{server.url}/v1/models"),
        httpx.get(f"{server.url}/<script>"),
        post("/v1/completions", b"{"),
        post("/v1/completions", TEXT, Host="evil.example"),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
    assert all("json" in answer.headers["content-type"] for answer in answers[1:])


@pytest.mark.parametrize("path", [
    "/../guard.py", "/%2e%2e/guard.py", "/..%2fguard.py", "/%2fetc/passwd", "//etc/passwd",
    "/..\\guard.py", "/%00", "/api/sample?run=../../..&file=../guard.py", "/v1/models/../../x",
    "/api/sample?run=gpt&file=../../../../../../etc/passwd",
])  # fmt: skip
def test_no_file_but_the_pages_own_can_be_read(server, path):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = read_all(connection)
    assert answer.split()[1] in (b"404", b"400"), answer[:300]
    assert b"root:" not in answer and b"import" not in answer


def read_all(connection, seconds=20):
    connection.settimeout(seconds)
    received = b""
    while part := connection.recv(65_536):
        received += part
    return received


# ---- the key ------------------------------------------------------------------------------------


def test_with_a_key_nothing_but_the_page_is_open(runs):
    settings = Settings(host="0.0.0.0", api_key=KEY, allow_origins=(FRIEND,))
    with small_runs.serving(runs, settings) as server:
        body = {"prompt": "a", "max_tokens": 2}
        url = f"{server.url}/v1/completions"
        for given in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Basic x", "Bearer é"):
            headers = [(b"Authorization", given.encode("latin-1"))] if given else []
            assert httpx.post(url, json=body, headers=headers).status_code == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert httpx.post(url, json=body, headers=right).status_code == 200
        for path in ("", "/api.js"):
            assert httpx.get(server.url + path).status_code == 200
        for path in ("/v1/models", "/api/models", "/api/runs"):
            assert httpx.get(server.url + path).status_code == 401
        assert httpx.options(url, headers={"Origin": FRIEND}).status_code == 204
        assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 403


def test_others_are_let_in_only_with_a_key(monkeypatch, capsys):
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        assert call(command, "runs/gpt", "--host", host) == 1
        assert "--api-key" in capsys.readouterr().err
    monkeypatch.setenv(command.KEY_VARIABLE, KEY)
    options = command.Options(("runs/gpt",), host="0.0.0.0")
    assert command.choose_settings(options).api_key == KEY
    monkeypatch.setenv(command.KEY_VARIABLE, "two\r\nlines")
    with pytest.raises(ValueError, match="key"):
        command.choose_settings(options)


@pytest.mark.parametrize(
    "origin", ["localhost:3000", "*", "http://*", "http://a.example/page", "http://A.example", ""]
)
def test_only_an_origin_can_be_allowed(origin):
    with pytest.raises(ValueError, match="such as http://localhost:3000"):
        command.Options(("runs/gpt",), allow_origin=(origin,))


# ---- bad values ---------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "a"}]}
BAD = [  # route, body, a part of the answer
    ("completions", TEXT | {"n": 10_000}, "n is 10000"),
    ("completions", TEXT | {"n": 0}, "n is 0"),
    ("completions", TEXT | {"max_tokens": 10**9}, "1000000000"),
    ("completions", TEXT | {"max_tokens": -1}, "-1"),
    ("completions", b'{"prompt": "a", "max_tokens": 1e9}', "max_tokens"),
    ("completions", b'{"prompt": "a", "temperature": NaN}', "NaN"),
    ("completions", b'{"prompt": "a", "temperature": 1e999}', "1e999"),
    ("completions", TEXT | {"temperature": -1}, "temperature is -1"),
    ("completions", TEXT | {"temperature": "hot"}, "hot"),
    ("completions", TEXT | {"top_p": 0}, "top_p is 0"),
    ("completions", TEXT | {"min_p": 2}, "min_p is 2"),
    ("completions", TEXT | {"top_k": -1}, "top_k is -1"),
    ("completions", TEXT | {"repetition_penalty": 0}, "repetition_penalty"),
    ("completions", TEXT | {"seed": 2**50}, "seed"),
    ("completions", TEXT | {"seed": 1.5}, "seed"),
    ("completions", TEXT | {"logprobs": 21}, "logprobs is 21"),
    ("completions", TEXT | {"logprobs": True}, "logprobs"),
    ("completions", TEXT | {"stop": ["x"] * 10_000}, "10000"),
    ("completions", TEXT | {"stop": "x" * 10_000}, "1000 characters"),
    ("completions", TEXT | {"stop": [1]}, "stop"),
    ("completions", TEXT | {"stream": "yes"}, "stream"),
    ("completions", TEXT | {"stream_options": []}, "stream_options"),
    ("completions", TEXT | {"model": 5}, "model is 5"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [1.5]}, "prompt"),
    ("completions", {"prompt": [1, "a"]}, "token ids alone"),
    ("completions", {"prompt": [[]]}, "prompt"),
    ("completions", {"prompt": [-1]}, "-1"),
    ("completions", {"prompt": [257]}, "0 to 256"),
    ("completions", {"prompt": [10**15]}, "0 to 256"),
    ("completions", {"prompt": ["a"] * 100, "n": 2}, "200 texts; one request writes at most 128"),
    ("completions", {"prompt": {"a": 1}}, "prompt"),
    ("completions", b'{"prompt": "a", "prompt": "b"}', "twice"),
    ("completions", b"[" * 20_000, "nested"),
    ("completions", b'{"a":' * 100 + b"1" + b"}" * 100, "nested"),
    ("completions", b'{"prompt": "\xff\xfe"}', "UTF-8"),
    ("completions", b'{"prompt": ' + b"1" * 5000 + b"}", "too large"),
    ("completions", b"[1]", "object"),
    ("completions", b"", "JSON"),
    ("completions", b"null", "object"),
    ("chat/completions", {}, "messages"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": ["hi"]}, "messages[0]"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "tool"),
    ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "content"),
    ("chat/completions", {"messages": [{"role": [], "content": "a"}]}, "role"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "texts alone"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a" * 999}]}, "fewer words"),
    ("chat/completions", CHAT | {"max_completion_tokens": 0}, "max_completion_tokens is 0"),
    ("chat/completions", CHAT | {"max_tokens": 10**9}, "max_tokens is 1000000000"),
    ("chat/completions", CHAT | {"top_logprobs": 3}, "logprobs: true"),
    ("embeddings", {}, "input"),
    ("embeddings", {"input": ""}, "0 tokens"),
    ("embeddings", {"input": ["a"] * 3000}, "3000"),
    ("embeddings", {"input": "a", "dimensions": 7}, "dimensions"),
    ("embeddings", {"input": "a", "encoding_format": "hex"}, "hex"),
    ("classify", {"model": "clip", "image": "AAAA"}, "labels"),
    ("classify", {"model": "clip", "image": "AAAA", "labels": ["a", "a"]}, "different"),
    ("classify", {"model": "clip", "image": "AAAA", "labels": ["a", "b"]}, "image"),
    ("classify", {"model": "clip", "image": "data:,x", "labels": ["a", "b"]}, "base64"),
    ("classify", {"model": "reviews", "image": "AAAA"}, "input"),
    ("classify", {"model": "gpt", "input": "a"}, "cannot classify"),
    ("search", {"query": " "}, "query"),
    ("search", {"query": "a", "n": 0}, "n is 0"),
    ("images/generations", {"prompt": " "}, "say what"),
    ("images/generations", {"prompt": "a", "n": 10_000}, "10000"),
    ("images/generations", {"prompt": "a", "steps": 10**6}, "steps"),
    ("images/generations", {"prompt": "a", "sampler": "magic"}, "magic"),
    ("images/generations", {"prompt": "a", "guidance": -3}, "guidance"),
    ("images/generations", {"prompt": "a", "size": "9999x9999"}, "32x32"),
    ("images/generations", {"prompt": "a", "size": "7x7"}, "7"),
    ("images/generations", {"prompt": "a", "size": "1x1; rm"}, "size"),
    ("images/edits", {"prompt": "a"}, "image"),
    ("images/edits", {"prompt": "a", "image": "%%%"}, "base64"),
    ("images/edits", {"prompt": "a", "image": "AAAA", "strength": 2}, "strength"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "part"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_refused_with_a_sentence_about_it(post, route, body, part):
    answer = post(f"/v1/{route}", body)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text[:300]
    assert part in error["message"] and len(error["message"]) < 700
    assert error["type"] == "invalid_request_error"


def test_odd_texts_are_served(post):
    for prompt in ("\ud800", "\x00", "<|endoftext|>", "a" * 5000, "\u202e\ufffe", ""):
        answer = post("/v1/completions", {"prompt": prompt, "max_tokens": 2, "echo": True})
        assert answer.status_code == 200, answer.text[:300]
    assert "context is 64" in post("/v1/completions", {"prompt": "a" * 99}).json()["warnings"][0]
    markup = "<script>alert(1)</script>"
    answer = post("/v1/completions", {"model": markup, "prompt": "a"})
    assert answer.status_code == 404 and "json" in answer.headers["content-type"]


def png(width, height):
    """A PNG that says it is this large, and is complete."""
    rows = zlib.compress(b"\0" * (height * (width // 8 + 2)), 9)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", rows)]
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*parts, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_bombs_and_other_files_are_no_pictures(server, post):
    uploads = {
        "pixels": png(8000, 8000),
        "formats": b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
        "truncated": png(64, 64)[:45],
        "crop": png(1, 5_000_000),
    }
    for part, data in uploads.items():
        form = {"image": data, "prompt": (None, "a"), "steps": (None, "1")}
        answers = [httpx.post(f"{server.url}/v1/images/edits", files=form, timeout=30)]
        body = {"model": "clip", "image": base64.b64encode(data).decode(), "labels": ["a", "b"]}
        answers.append(post("/v1/classify", body))
        for answer in answers:
            assert answer.status_code == 400 and part in answer.text, answer.text


@pytest.mark.parametrize("body", [
    b"", b"--x", b"--x\r\n\r\n--x--", b"--x\r\nname\r\n\r\n1\r\n--x--",
    b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 2 + b"--x--",
    b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 999 + b"--x--",
])  # fmt: skip
def test_a_broken_form_is_refused(body):
    for content_type in ("multipart/form-data; boundary=x", 'multipart/form-data; boundary="x"'):
        with pytest.raises(BadRequest):
            parse_form(body, content_type)
    with pytest.raises(BadRequest, match="boundary"):
        parse_form(body, "multipart/form-data")


# ---- too much, too slow -------------------------------------------------------------------------


def test_a_large_body_is_refused_however_it_comes(post, server):
    large = json.dumps({"prompt": "a" * 300_000}).encode()
    answer = post("/v1/completions", large)
    assert answer.status_code == 413 and "200,000 bytes" in answer.text
    in_chunks = httpx.post(
        f"{server.url}/v1/completions",
        content=(large[i : i + 1000] for i in range(0, len(large), 1000)),
        headers={"Content-Type": "application/json"},
    )
    assert in_chunks.status_code == 413
    assert post("/api/tokens", large).status_code == 413


def connect(server, text):
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(text.replace("\n", "\r\n").encode())
    return connection


HEAD = "POST /v1/completions HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n"


def test_slow_clients_are_let_go(hasty):
    """Nothing at all, half a head, half a body, and a second request that does not come."""
    for text, status in (
        ("", b""),
        ("GET /v1/models HTTP/1.1\nHost", b""),
        (f"{HEAD}Content-Length: 100\n\n{{", b"HTTP/1.1 408"),
        ("GET /v1/models HTTP/1.1\nHost: 127.0.0.1\n\nGET /v1", b"HTTP/1.1 200"),
    ):
        with connect(hasty, text) as connection:
            try:
                answer = read_all(connection)
            except ConnectionResetError:
                answer = b""
            assert answer[: len(status) or None] == status


def test_a_client_that_does_not_read_is_let_go(hasty):
    asked = json.dumps(
        {"prompt": "a", "n": 8, "max_tokens": 10_000, "stream": True, "logprobs": 20}
    )
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", hasty.port))
    text = f"{HEAD}Content-Length: {len(asked)}\n\n{asked}"
    connection.sendall(text.replace("\n", "\r\n").encode())
    with connection:
        end = time.monotonic() + 60
        while not hasty.engine.models["gpt"].running:
            assert time.monotonic() < end
            time.sleep(0.01)
        # Nothing is read: the server must end the rows by itself.
        while hasty.engine.models["gpt"].running:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_too_many_requests_are_told_to_come_again(server):
    """The queue of the engine is full: 503 before anything is written, and later served."""
    body = json.dumps({"prompt": "a", "n": 60, "max_tokens": 1000}).encode()
    text = f"{HEAD}Content-Length: {len(body)}\n\n{body.decode()}"
    with connect(server, text):
        end = time.monotonic() + 60
        while len(server.engine.models["gpt"].waiting) < 20:
            assert time.monotonic() < end
            time.sleep(0.005)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "n": 60})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_many_cancelled_requests_harm_no_other(server, post):
    asked = {"prompt": "It was", "seed": 4, "max_tokens": 30}
    expected = post("/v1/completions", asked).json()["choices"][0]["text"]
    body = json.dumps(asked | {"stream": True, "max_tokens": 1000})
    text = f"{HEAD}Content-Length: {len(body)}\n\n{body}"
    for _ in range(10):
        connections = [connect(server, text) for _ in range(6)]
        assert post("/v1/completions", asked).json()["choices"][0]["text"] == expected
        for connection in connections:
            connection.close()


def test_a_slow_reader_gets_the_whole_text(server, post):
    asked = {"prompt": "It was", "seed": 4, "max_tokens": 40}
    expected = post("/v1/completions", asked).json()["choices"][0]["text"]
    found = io.StringIO()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked | {"stream": True}) as got:
        for line in got.iter_lines():
            if line.startswith("data: {"):
                found.write(json.loads(line[6:])["choices"][0]["text"])
                time.sleep(0.005)
    assert found.getvalue() == expected
