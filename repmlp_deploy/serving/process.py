"""The server's process: hosts, signals, and how it ends.

The first SIGTERM or Ctrl-C stops accepting, finishes what is under way and exits 0; the second exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repmlp_deploy.errors import InputError, optional_imports
from repmlp_deploy.serving.hosts.addresses import bound_socket, naming_address
from repmlp_deploy.serving.hosts.connections import limited_connections
from repmlp_deploy.serving.hosts.grpc import GrpcOptions, GrpcServer
from repmlp_deploy.serving.hosts.http import HttpOptions, create_app
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.watch import Library

with optional_imports():
    import uvicorn

__all__ = ["ServerOptions", "serve"]

_END_SECONDS = 2.0  # for what is left after the requests
_log = logging.getLogger("repmlp.serve")


@dataclass(frozen=True)
class ServerOptions:
    """Where and how the server listens.

    Attributes:
        host: address to listen on.
        http_port: of HTTP; 0 for any free one.
        grpc_port: of gRPC; 0 for any free one, None for no gRPC.
        certificate: PEM file of the TLS certificate chain; None for no TLS.
        key: PEM file of its private key.
        timeout: seconds after which a request gets no answer any more.
        drain: seconds that requests under way may take when the server stops.
        connections: HTTP connections at most; further ones get 503.
        http: limits of the HTTP host.
        header_seconds: that a request's header may take; slower ones get 408.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    certificate: Path | None = None
    key: Path | None = None
    timeout: float = 30.0
    drain: float = 30.0
    connections: int = 1024
    http: HttpOptions = field(default_factory=HttpOptions)
    header_seconds: float = 10.0


class _Server(uvicorn.Server):
    """uvicorn's server; signals are handled here, since they stop more than HTTP."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(models: Models, library: Library, options: ServerOptions) -> None:
    """Serve until a signal ends it.

    Args:
        models: that answer; `library` loads them.
        library: of the bundles.
        options: where to listen.

    Raises:
        InputError: an address is taken or is none, or a certificate cannot be read.
    """
    with contextlib.suppress(ImportError):
        import uvloop  # noqa: PLC0415 - quicker, where it is installed

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(models, library, options))
        return
    asyncio.run(_serve(models, library, options))


async def _serve(models: Models, library: Library, options: ServerOptions) -> None:
    inference = Inference(models, timeout=options.timeout)
    listening = _listen(options.host, options.http_port)
    server = _Server(_uvicorn_config(inference, library, options))
    if server.config.is_ssl:
        _require_tls(server.config)
    addresses = {"http": _address(listening, options)}
    grpc = _grpc_server(inference, library, options)
    if grpc is not None:
        addresses["grpc"] = await grpc.start()
        models.when_changed(_from_any_thread(grpc.tell_health))
    stopped = asyncio.Event()
    _handle_signals(models, server, stopped, options.drain + _END_SECONDS)
    library.start()
    _log.info("listening", extra=addresses)
    try:
        async with asyncio.TaskGroup() as hosts:
            hosts.create_task(_serve_http(server, listening, stopped))
            if grpc is not None:
                hosts.create_task(_serve_grpc(grpc, stopped, options.drain))
    finally:
        models.stopping = True
        await asyncio.to_thread(library.stop)
        await asyncio.to_thread(inference.close)
        _log.info("stopped")


def _grpc_server(inference: Inference, library: Library, options: ServerOptions) -> GrpcServer | None:
    if options.grpc_port is None:
        return None
    http = options.http
    grpc = GrpcOptions(
        options.host,
        options.grpc_port,
        http.body_limit,
        control=http.control,
        log_requests=http.log_requests,
        certificate=options.certificate,
        key=options.key,
    )
    return GrpcServer(inference, library, grpc)


async def _serve_http(server: uvicorn.Server, listening: socket.socket, stopped: asyncio.Event) -> None:
    try:
        await server.serve(sockets=[listening])
    finally:
        stopped.set()


async def _serve_grpc(grpc: GrpcServer, stopped: asyncio.Event, drain: float) -> None:
    await stopped.wait()
    await grpc.stop(drain)


def _from_any_thread(function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Return a function for other threads that runs the coroutine in this event loop."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            asyncio.run_coroutine_threadsafe(function(), loop)

    return call


def _uvicorn_config(inference: Inference, library: Library, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(inference, library, options.http),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        date_header=False,
        http=limited_connections(options.connections, options.header_seconds),
        ws="none",
        timeout_graceful_shutdown=max(1, round(options.drain)),
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, so that an address that is taken is an error of its own."""
    with naming_address(host, port):
        listening = bound_socket(host, port)
        listening.listen(2048)
        listening.setblocking(False)
    return listening


def _require_tls(config: uvicorn.Config) -> None:
    def encrypted() -> str:
        raise ValueError("the key is encrypted; write it without a pass phrase, with openssl pkey -in KEY -out FILE")

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(config.ssl_certfile), config.ssl_keyfile, encrypted)  # uvicorn would ask for it
        config.load()
    except (OSError, ValueError) as error:
        raise InputError(f"TLS: cannot use {config.ssl_certfile} and {config.ssl_keyfile}: {error}") from None


def _address(listening: socket.socket, options: ServerOptions) -> str:
    host, port = listening.getsockname()[:2]
    scheme = "https" if options.certificate else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _handle_signals(models: Models, server: uvicorn.Server, stopped: asyncio.Event, seconds: float) -> None:
    """Let the first signal drain, and the second end the process, or the time: a load may take much longer."""

    def end(number: int, said: str) -> None:
        _log.warning(said)
        sys.stderr.flush()
        os._exit(128 + number)

    def stop(number: int) -> None:
        if models.stopping:
            end(number, "stopped at once")
        models.stopping = True
        _log.info("stopping", extra={"signal": signal.Signals(number).name})
        timer = threading.Timer(seconds, end, (number, "stopped, though something still ran"))
        timer.daemon = True
        timer.start()
        server.should_exit = True
        stopped.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
