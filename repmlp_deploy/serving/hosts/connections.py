"""What a connection is told that sends no request, or that is one too many: `{"error": …}`, like every other fault.

uvicorn would answer these itself, in plain text, and wait for a request's header as long as the client likes. It would
also keep headers and pipelined requests of any size and number, and lose the body of a request that offers HTTP/2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from http import HTTPStatus
from typing import Any

from repmlp_deploy.errors import optional_imports

with optional_imports():
    import httptools
    from starlette.responses import JSONResponse
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["limited_connections"]

_HEADER_BYTES = 1 << 16
_TOO_LARGE = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request's header has more than {_HEADER_BYTES} bytes")
_PIPELINED = 64  # requests that wait behind the one that is answered


class _Parser(httptools.HttpRequestParser):
    """Reads a request that offers another protocol as if it did not, which HTTP allows.

    Java's client offers HTTP/2 with every request. httptools would end such a request after its header, and take the
    body for the other protocol.
    """

    def __init__(self, protocol: _Limited) -> None:
        self._protocol = protocol
        self._start()

    def feed_data(self, data: bytes | bytearray | memoryview) -> None:  # type: ignore[override]
        while data:
            try:
                super().feed_data(data)
                break
            except httptools.HttpParserUpgrade as ended:
                data = self._protocol.head_without_offer() + bytes(data[ended.args[0] :])
                self._start()

    def _start(self) -> None:
        super().__init__(self._protocol)
        with contextlib.suppress(AttributeError):  # httptools < 0.6.3 lets a client send after its last request
            self.set_dangerous_leniencies(lenient_data_after_close=True)


class _Limited(HttpToolsProtocol):
    """uvicorn's protocol with limits.

    Attributes:
        most: open connections; what a further one asks for gets 503.
        header_seconds: between the first byte of a request, or the connection's start, and the end of the header.
        beyond: whether too many connections were open when this one was opened.
        unread: bytes that arrived since the last header or part of a body was complete.
        fault: the status and the reason with which a request is refused though it is HTTP.
    """

    most: int
    header_seconds: float
    app: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.inner = self.app
        self.app = self._limited
        self.parser = _Parser(self)
        self.waiting: asyncio.TimerHandle | None = None
        self.beyond, self.unread = False, 0
        self.fault: tuple[HTTPStatus, str] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.beyond = len(self.connections) > self.most
        self._wait_for_header()

    def data_received(self, data: bytes) -> None:
        self.unread += len(data)
        super().data_received(data)
        if self.unread > _HEADER_BYTES and not self.transport.is_closing():
            self._refuse(*_TOO_LARGE)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        else:
            self._wait_for_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        self.unread = 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _HEADER_BYTES:
            self.fault = _TOO_LARGE  # its end came with the bytes that are too many
        elif len(self.pipeline) >= _PIPELINED:
            self.fault = (HTTPStatus.BAD_REQUEST, f"more than {_PIPELINED} requests of this connection wait")
        if self.fault is not None or self.parser.get_method() == b"CONNECT":
            raise ConnectionError  # the parser ends, and `send_400_response` is called
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def head_without_offer(self) -> bytes:
        """Return the header that was read last, without the offer of another protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def send_400_response(self, msg: str) -> None:
        self._refuse(*(self.fault or (HTTPStatus.BAD_REQUEST, msg)))

    def _wait_for_header(self) -> None:
        if self.waiting is None:
            said = f"the request's header took more than {self.header_seconds:g} s"
            later = asyncio.get_running_loop().call_later
            self.waiting = later(self.header_seconds, self._refuse, HTTPStatus.REQUEST_TIMEOUT, said)

    def _stop_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def _refuse(self, status: HTTPStatus, said: str) -> None:
        """Answer without the application, and close."""
        body = json.dumps({"error": said}).encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    async def _limited(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application, unless too many connections are open, and were when this one was opened."""
        if not self.beyond or len(self.connections) <= self.most:
            await self._answered(scope, receive, send)
            return
        said = f"{self.most} connections are open, and no more are served: try again"
        refusal = JSONResponse({"error": said}, HTTPStatus.SERVICE_UNAVAILABLE, {"connection": "close"})
        await refusal(scope, receive, send)

    async def _answered(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application; where the server stops before it has begun to answer, say that."""
        begun = False

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.inner(scope, receive, noted)
        except asyncio.CancelledError:  # by uvicorn, which would log it as a defect and answer 500
            if not begun:
                refusal = JSONResponse({"error": "the server stops"}, HTTPStatus.SERVICE_UNAVAILABLE)
                await refusal(scope, receive, send)


def limited_connections(most: int, header_seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with limits on what comes before the application.

    Args:
        most: open connections that are served.
        header_seconds: that the header of a request may take.
    """
    return type("LimitedConnections", (_Limited,), {"most": most, "header_seconds": header_seconds})
