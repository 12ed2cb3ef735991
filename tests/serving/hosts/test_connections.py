"""Connections that send no whole request, and those beyond the limit, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from repmlp_deploy.serving.hosts.connections import limited_connections

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HEADER_SECONDS = 0.4


async def _application(scope: Any, _receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


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
