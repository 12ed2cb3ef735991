"""Connections that send no whole request, and those beyond the limit, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import uvicorn

from repmlp_deploy.serving.hosts.connections import limited_connections

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HEADER_SECONDS = 0.4


async def _application(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the body of the request, in capitals, and `ok`."""
    assert scope["type"] == "http"
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    said = body.upper() + b"ok"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
    await send({"type": "http.response.body", "body": said})


@pytest.fixture
def port() -> Iterator[int]:
    config = uvicorn.Config(
        _application, port=0, lifespan="off", log_config=None, http=limited_connections(2, HEADER_SECONDS), ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def _connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def _all_of(connection: socket.socket) -> tuple[bytes, Any]:
    """Return the status line and the body of the last answer before the server closes."""
    with connection.makefile("rb") as stream:
        head, _, body = stream.read().partition(b"\r\n\r\n")
    return head.splitlines()[0], json.loads(body)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", REQUEST[:-2]], ids=["nothing", "half a line", "no end"])
def test_a_header_that_does_not_come_is_refused_in_time(sent: bytes, port: int) -> None:
    with _connected(port) as connection:
        start = time.monotonic()
        connection.sendall(sent)
        status, answer = _all_of(connection)
        assert HEADER_SECONDS * 0.9 < time.monotonic() - start < 10
    assert status == b"HTTP/1.1 408 Request Timeout"
    assert answer == {"error": "the request's header took more than 0.4 s"}


def test_the_second_header_of_a_connection_has_its_limit_too(port: int) -> None:
    with _connected(port) as connection:
        connection.sendall(REQUEST)
        assert connection.recv(4096).endswith(b"ok")
        connection.sendall(b"G")
        assert _all_of(connection)[0] == b"HTTP/1.1 408 Request Timeout"


def test_a_slow_header_that_ends_in_time_is_answered(port: int) -> None:
    with _connected(port) as connection:
        for part in (REQUEST[:5], REQUEST[5:20], REQUEST[20:]):
            connection.sendall(part)
            time.sleep(HEADER_SECONDS / 8)
        assert connection.recv(4096).endswith(b"ok")
        time.sleep(HEADER_SECONDS * 1.5)  # a connection that is kept alive is no slow header
        connection.sendall(REQUEST)
        assert connection.recv(4096).endswith(b"ok")


def test_one_connection_too_many_is_told_so(port: int) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(_connected(port))
            connection.sendall(REQUEST)
            assert connection.recv(4096).endswith(b"ok")
        third = stack.enter_context(_connected(port))
        time.sleep(HEADER_SECONDS / 8)
        connection.sendall(REQUEST)  # one of those that were there before
        assert connection.recv(4096).endswith(b"ok")
        third.sendall(REQUEST)
        status, answer = _all_of(third)
        assert status == b"HTTP/1.1 503 Service Unavailable"
        assert answer == {"error": "2 connections are open, and no more are served: try again"}


def test_what_is_no_request_is_400_in_json(port: int) -> None:
    with _connected(port) as connection:
        connection.sendall(b"\x00\x01\r\n\r\n")
        status, answer = _all_of(connection)
        assert status == b"HTTP/1.1 400 Bad Request"
        assert answer == {"error": "Invalid HTTP request received."}


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
WITH_BODY = b"POST / HTTP/1.1\r\nHost: x\r\n" + OFFER + b"Content-Length: 4\r\n\r\nbody"
CHUNKED = b"POST / HTTP/1.1\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"


@pytest.mark.parametrize("pause", [0, WITH_BODY.index(b"Upgrade: h2c"), WITH_BODY.index(b"\r\n\r\n") + 4])
@pytest.mark.parametrize("request_", [WITH_BODY, CHUNKED], ids=["length", "chunked"])
def test_an_offer_of_http_2_is_ignored_and_the_body_is_read(request_: bytes, pause: int, port: int) -> None:
    """Java's client offers it with every request."""
    with _connected(port) as connection:
        for _ in range(2):  # the connection is kept alive
            connection.sendall(request_[:pause])
            time.sleep(HEADER_SECONDS / 8)
            connection.sendall(request_[pause:])
            assert connection.recv(4096).endswith(b"\r\n\r\nBODYok")


def test_pipelined_offers_are_answered_in_turn(port: int) -> None:
    last = WITH_BODY.replace(b"Connection: Upgrade", b"Connection: close, Upgrade")
    with _connected(port) as connection, connection.makefile("rb") as stream:
        connection.sendall(WITH_BODY + CHUNKED + REQUEST + last)
        answers = stream.read()
    assert answers.count(b"200 OK") == 4
    assert answers.count(b"BODYok") == 3


def test_a_tunnel_is_refused(port: int) -> None:
    with _connected(port) as connection:
        connection.sendall(b"CONNECT /v2 HTTP/1.1\r\nHost: x\r\n\r\n" + REQUEST)
        status, answer = _all_of(connection)
        assert status == b"HTTP/1.1 400 Bad Request"
        assert answer == {"error": "Invalid HTTP request received."}


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        REQUEST[:-2] + b"A: ",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        CHUNKED[:-2] + b"A: ",
    ],
    ids=["path", "value", "chunk extension", "trailer"],
)
def test_a_header_that_does_not_end_is_refused(start: bytes, port: int) -> None:
    with _connected(port) as connection, suppress(ConnectionError):
        connection.sendall(start)
        for _ in range(64):
            connection.sendall(b"a" * (1 << 14))
            time.sleep(0.001)
        pytest.fail("a megabyte was taken")


@pytest.mark.parametrize("pause", [0, HEADER_SECONDS / 8], ids=["in one piece", "in two"])
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["open", "ended"])
def test_a_large_header_is_refused_with_its_limit(end: bytes, pause: float, port: int) -> None:
    with _connected(port) as connection:
        connection.sendall(REQUEST[:-2] + b"A: ")
        time.sleep(pause)
        connection.sendall(b"a" * 65_537 + end)
        status, answer = _all_of(connection)
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert answer == {"error": "the request's header has more than 65536 bytes"}


def test_bodies_are_no_header(port: int) -> None:
    size = 1 << 20
    with _connected(port) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size + b"a" * size)
        assert stream.read().endswith(b"A" * size + b"ok")


def test_one_connection_sends_few_requests_ahead(port: int) -> None:
    with _connected(port) as connection, connection.makefile("rb") as stream:
        connection.sendall(REQUEST * 64 + REQUEST.replace(b"Host", b"Connection: close\r\nHost"))
        assert stream.read().count(b"200 OK") == 65
    with _connected(port) as connection:
        connection.sendall(REQUEST * 66)
        status, answer = _all_of(connection)
    assert status == b"HTTP/1.1 400 Bad Request"
    assert answer == {"error": "more than 64 requests of this connection wait"}
