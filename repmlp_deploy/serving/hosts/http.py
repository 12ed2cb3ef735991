"""The protocol over HTTP: an ASGI application, for uvicorn, Ray Serve or any other server of ASGI.

Every path may end in a slash, and every path of a model may name a version: `/v2/models/M/versions/V/…`. Errors are
`{"error": …}`. Bodies are read as bytes whatever their Content-Type says, since clients leave it out.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files

from repmlp_deploy.errors import optional_imports
from repmlp_deploy.text import printable

with optional_imports():
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

from repmlp_deploy.serving.codec import decode_request, encode_response, parameters_of, parse_json
from repmlp_deploy.serving.hosts.bodies import read_body
from repmlp_deploy.serving.hosts.page import page_file, render_page
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.metrics import CONTENT_TYPE
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.protocol import BadRequest, ServingError, UnknownModel
from repmlp_deploy.serving.watch import Library, check_parameters, require_control

__all__ = ["HttpOptions", "create_app"]

HEADER_LENGTH = "inference-header-content-length"

_BIG = 1 << 16  # bytes that are decoded, or encoded, in a thread
_CONTROL_BODY = 1 << 16
_GONE = 499  # nobody reads it
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_log = logging.getLogger("repmlp.serve.http")


@dataclass(frozen=True)
class HttpOptions:
    """Limits of the HTTP host.

    Attributes:
        body_limit: bytes of a body at most.
        body_seconds: that a client may take to send one.
        control: whether clients may load and unload models.
        log_requests: whether every request is logged.
        send_ids: whether answers get the request's id; not where a proxy before the application does that.
    """

    body_limit: int = 64 << 20
    body_seconds: float = 30.0
    control: bool = False
    log_requests: bool = False
    send_ids: bool = True


def create_app(inference: Inference, library: Library, options: HttpOptions) -> ASGIApp:
    """Return the application.

    Args:
        inference: what the models do.
        library: what loads and unloads them.
        options: limits.
    """
    host = _Host(inference, library, options)
    app = Starlette(
        routes=host.routes(),
        exception_handlers={
            ServingError: _refused,
            ClientDisconnect: _gone,
            HTTPException: _http_error,
            Exception: _defect,
        },
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body
    return _Observed(app, options)


class _Host:
    """The endpoints."""

    def __init__(self, inference: Inference, library: Library, options: HttpOptions) -> None:
        self._inference, self._library, self._options = inference, library, options

    @property
    def _models(self) -> Models:
        return self._inference.models

    def routes(self) -> list[Route]:
        """Return the paths of the protocol, of its extensions, and of people and monitoring."""
        routes = [
            Route("/", self.page),
            Route("/page.js", self.page_part),
            Route("/page.css", self.page_part),
            Route("/openapi.json", self.openapi),
            Route("/metrics", self.metrics),
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/v2/models/stats", self.statistics),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", self.load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", self.unload, methods=["POST"]),
        ]
        for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(path, self.metadata),
                Route(f"{path}/ready", self.model_ready),
                Route(f"{path}/config", self.config),
                Route(f"{path}/stats", self.statistics),
                Route(f"{path}/infer", self.infer, methods=["POST"]),
            ]
        return routes

    async def server(self, _: Request) -> Response:
        """Say what the server is."""
        return JSONResponse(self._inference.server())

    async def live(self, _: Request) -> Response:
        """Say that the process answers."""
        return JSONResponse({"live": True})

    async def ready(self, _: Request) -> Response:
        """Say whether every model has passed its check, and else why not."""
        health = self._models.health()
        return JSONResponse(health, 200 if health["ready"] else 503)

    async def metadata(self, request: Request) -> Response:
        """Say what a model takes and gives."""
        return JSONResponse(self._inference.metadata(*_model(request)).as_json())

    async def model_ready(self, request: Request) -> Response:
        """Say whether a model answers, and else why not."""
        name, version = _model(request)
        model, _ = self._models.find(name)
        ready = self._inference.model_ready(name, version)
        said = {"name": name, "ready": ready} | ({} if ready else {"reason": model.reason or "the server stops"})
        return JSONResponse(said, 200 if ready else 503)

    async def config(self, request: Request) -> Response:
        """Say a model's configuration, as load generators read it."""
        return JSONResponse(self._inference.config(*_model(request)))

    async def statistics(self, request: Request) -> Response:
        """Say what a model, or every model, has done so far."""
        return JSONResponse(self._inference.statistics(*_model(request)))

    async def metrics(self, _: Request) -> Response:
        """Give the metrics to Prometheus."""
        return Response(self._models.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self, _: Request) -> Response:
        """Describe these endpoints for tools."""
        described = files(__package__).joinpath("openapi.json").read_bytes()
        return Response(described, media_type="application/json")

    async def infer(self, request: Request) -> Response:
        """Answer an inference request; drop it where the client goes away."""
        name, version = _model(request)
        with self._inference.counted(name, gone=ClientDisconnect):
            body = await read_body(request, self._options.body_limit, self._options.body_seconds)
            work = asyncio.ensure_future(self._infer(name, version, body, _header_length(request)))
            gone = asyncio.ensure_future(_disconnected(request.receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                return work.result()
            finally:
                for task in (work, gone):
                    task.cancel()

    async def _infer(self, name: str, version: str, body: bytes, header: int | None) -> Response:
        big = len(body) > _BIG
        asked = await asyncio.to_thread(decode_request, body, header) if big else decode_request(body, header)
        answer = await self._inference.infer(name, version, asked)
        large = sum(tensor.data.size for tensor in answer.outputs) * 8 > _BIG
        encoded = asyncio.to_thread(encode_response, answer, asked) if large else None
        content, length = await encoded if encoded is not None else encode_response(answer, asked)
        if length is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)})

    async def index(self, request: Request) -> Response:
        """List the models and their states."""
        body = await read_body(request, _CONTROL_BODY, self._options.body_seconds)
        only_ready = parse_json(body).get("ready") is True if body else False
        return JSONResponse([entry for entry in self._library.index() if not only_ready or entry["state"] == "READY"])

    async def load(self, request: Request) -> Response:
        """Load a model, or its bundle's new version; answer when it has passed its check, or why it was refused."""
        await self._controlled(request)
        await asyncio.wrap_future(self._library.begin_load(request.path_params["name"]))
        return JSONResponse({})

    async def unload(self, request: Request) -> Response:
        """Unload a model; answer when it has answered what it had begun."""
        await self._controlled(request)
        await asyncio.wrap_future(self._library.begin_unload(request.path_params["name"]))
        return JSONResponse({})

    async def _controlled(self, request: Request) -> None:
        """Raise unless clients may load and unload, without parameters."""
        body = await read_body(request, _CONTROL_BODY, self._options.body_seconds)
        require_control(allowed=self._options.control)
        check_parameters(parameters_of(parse_json(body), "request") if body else ())

    async def page(self, _: Request) -> Response:
        """Show the page for people."""
        return Response(render_page(self._models), media_type="text/html", headers=_HEADERS)

    async def page_part(self, request: Request) -> Response:
        """Give the page's script or style."""
        content, kind = page_file(request.url.path.rpartition("/")[2])
        return Response(content, media_type=kind, headers=_HEADERS)


class _Observed:
    """Gives every request an id, drops slashes at the end of paths, and logs requests where that is wanted."""

    def __init__(self, app: ASGIApp, options: HttpOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if len(path) > 1 and path.endswith("/"):
            scope = {**scope, "path": path.rstrip("/") or "/"}
        given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"")
        request_id = given if _plain(given) else uuid.uuid4().hex.encode()
        start, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._options.send_ids:
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if not status:  # else `_defect` has logged and answered it, and Starlette raises it again
                raise
        finally:
            if self._options.log_requests:
                _log.info(
                    "request",
                    extra={
                        "id": request_id.decode(),
                        "method": scope["method"],
                        "path": printable(path, 200),
                        "status": status,
                        "seconds": round(time.monotonic() - start, 6),
                    },
                )


def _plain(value: bytes) -> bool:
    """Return whether a request id is short and of visible ASCII characters only."""
    return 0 < len(value) <= 128 and all(0x21 <= byte <= 0x7E for byte in value)  # noqa: PLR2004 - ! to ~


def _model(request: Request) -> tuple[str, str]:
    return request.path_params.get("name", ""), request.path_params.get("version", "")


def _header_length(request: Request) -> int | None:
    given = request.headers.get(HEADER_LENGTH)
    if given is None:
        return None
    if not given.isascii() or not given.isdecimal() or len(given) > 12:  # noqa: PLR2004 - a terabyte
        raise BadRequest("Inference-Header-Content-Length must be a whole number")
    return int(given)


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    """Return when the client has gone."""
    with suppress(ClientDisconnect):
        while (await receive())["type"] != "http.disconnect":
            pass


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)  # noqa: S101 - what the handler is registered for
    return JSONResponse({"error": printable(error)}, error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what the handler is registered for
    if error.status_code == UnknownModel.status:
        return JSONResponse({"error": f"no such path: {printable(request.url.path, 200)}"}, error.status_code)
    return JSONResponse({"error": printable(error.detail)}, error.status_code, headers=error.headers)


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_GONE)


async def _defect(_: Request, error: Exception) -> Response:
    _log.error("defect", exc_info=error)
    return JSONResponse({"error": "internal error; the server's log says more"}, 500)
