"""Read the body of an HTTP request within limits of size and time, whatever its encoding."""

from __future__ import annotations

import asyncio
import contextlib
import zlib

from starlette.requests import Request

from repmlp_deploy.serving.protocol import BadRequest, TooLarge, TooLate
from repmlp_deploy.text import printable

__all__ = ["read_body"]

_PATIENCE = 2.0  # seconds for the rest of a body that is too large
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """Return the body, decompressed.

    Args:
        request: whose body was not read yet.
        limit: bytes at most, before and after decompression.
        seconds: that the client may take to send it.

    Raises:
        TooLarge: it is longer.
        TooLate: the client is slower.
        BadRequest: it is damaged, or of an unknown encoding.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        if "expect" not in request.headers:  # who asks first has not begun to send
            await _discard(request)
        raise TooLarge(f"the body has {declared[:20]} bytes; the server takes {limit}")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    await _discard(request)
                    raise TooLarge(f"the body has more than {limit} bytes")
                chunks.append(chunk)
    except TimeoutError:
        raise TooLate(f"the body did not arrive within {seconds:g} s") from None
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOWS:
        raise BadRequest(f"content-encoding is {printable(encoding, 40)!r}; expected gzip, deflate or none")
    return await asyncio.to_thread(_decompressed, body, _WINDOWS[encoding], limit)


async def _discard(request: Request) -> None:
    """Drop what still arrives, for a while.

    Clients send everything before they read. If the connection were closed meanwhile, they would see a broken pipe
    instead of the answer.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            async for _ in request.stream():
                pass


def _decompressed(body: bytes, window: int, limit: int) -> bytes:
    unpacker = zlib.decompressobj(window)
    try:
        plain = unpacker.decompress(body, limit + 1)
    except zlib.error:
        raise BadRequest("the compressed body is damaged") from None
    if len(plain) > limit:
        raise TooLarge(f"the body has more than {limit} bytes once it is decompressed")
    if not unpacker.eof or unpacker.unused_data:
        raise BadRequest("the compressed body is damaged")
    return plain
