"""`repmlp-serve BUNDLE…`: answer requests by the Open Inference Protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared.console import run_command, typer
from repmlp_deploy.cli.shared.serve_config import read_config
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.runner import RunnerOptions, stream_count
from repmlp_deploy.serving.hosts.http import HttpOptions
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.process import ServerOptions, configure_logging, serve
from repmlp_deploy.serving.served_model import ModelOptions
from repmlp_deploy.serving.watch import Library

__all__ = ["main"]

_MEGABYTE = 1 << 20
_NO_PORT = -1
_HIGHEST_PORT = 65_535


def main() -> None:
    """Run the command of this process."""
    run_command(serve_command)


def serve_command(  # noqa: PLR0913 - one per option
    bundles: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=]BUNDLE...", help="Folders that repmlp-export wrote.")
    ] = None,
    config: Annotated[  # noqa: ARG001 - read by its callback
        Path | None,
        typer.Option(
            metavar="FILE.toml", is_eager=True, callback=read_config, help="Options, by their names; the line wins."
        ),
    ] = None,
    watch: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Serve the bundles in it, and follow what changes there.")
    ] = None,
    watch_seconds: Annotated[float, typer.Option(help="Between two looks at the bundles.")] = 2.0,
    control: Annotated[bool, typer.Option("--control", help="Let clients load and unload models.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of HTTP; 0 for any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Of gRPC; 0 for any free one, -1 for no gRPC.")] = 8001,
    artifact: Annotated[str | None, typer.Option("--format", help="Artifact; default: the best here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or rtx; default: the best here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference.")] = None,
    streams: Annotated[
        str,
        typer.Option(metavar="latency|throughput|N", help="Inferences at a time; throughput measures which number."),
    ] = "latency",
    workers: Annotated[int | None, typer.Option(help="Batches that run at a time; default: as --streams.")] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep what the runtime compiles there, for a quick next start.")
    ] = None,
    max_delay_ms: Annotated[float, typer.Option(help="A crowd's batch may wait so long for more requests.")] = 0.0,
    queue: Annotated[int, typer.Option(help="Samples that may wait; further requests get 503.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request gets 504.")] = 30.0,
    drain: Annotated[float, typer.Option(help="Seconds for requests under way when the server stops.")] = 30.0,
    connections: Annotated[int, typer.Option(help="HTTP connections at most.")] = 1024,
    body_mb: Annotated[int, typer.Option(help="Largest body of a request.")] = 64,
    tls_certificate: Annotated[Path | None, typer.Option(metavar="PEM", help="Serve TLS with this chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="The certificate's private key.")] = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log every request.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - read by console
) -> None:
    """Serve bundles over HTTP and gRPC; each is ready only after its self-check has passed on this machine."""
    if log_format not in ("text", "json"):
        raise InputError(f"--log-format is {log_format!r}; expected text or json")
    if (tls_certificate is None) != (tls_key is None):
        raise InputError("--tls-certificate and --tls-key belong together; give both")
    _require_ranges(
        {"--port": (port, 0, _HIGHEST_PORT), "--grpc-port": (grpc_port, _NO_PORT, _HIGHEST_PORT)}
        | {
            "--workers": (1 if workers is None else workers, 1, 64),
            "--queue": (queue, 1, 1 << 24),
            "--body-mb": (body_mb, 1, 4096),
        }
        | {"--max-delay-ms": (max_delay_ms, 0, 10_000), "--timeout": (timeout, 0.001, 86_400)}
        | {"--drain": (drain, 1, 3600), "--connections": (connections, 1, 1 << 20)}
        | {"--watch-seconds": (watch_seconds, 0.05, 3600)}
    )
    runner = RunnerOptions(device, threads, cache, streams=stream_count(streams))
    options = ModelOptions(artifact, runner, queue=queue, delay=max_delay_ms / 1000, workers=workers or 0)
    models = Models(options)
    for given in bundles or ():
        models.add(*_named(given))
    folders = [_folder(path) for path in watch or ()]
    if not models.all() and not folders:
        raise InputError("nothing to serve: name bundles, or a folder of them with --watch")
    configure_logging(as_json=log_format == "json")
    http = HttpOptions(body_mb * _MEGABYTE, control=control, log_requests=log_requests)
    where = ServerOptions(
        host,
        port,
        None if grpc_port == _NO_PORT else grpc_port,
        tls_certificate,
        tls_key,
        timeout,
        drain,
        connections,
        http,
    )
    serve(models, Library(models, folders, watch_seconds), where)


def _named(given: str) -> tuple[str, Path]:
    """Return the name and the folder of an argument, `NAME=PATH` or `PATH`; the name is the manifest's by default."""
    name, separator, path = given.partition("=")
    if separator and not Path(given).is_dir():
        folder = Path(path)
        Bundle.load(folder)
        return name, folder
    return Bundle.load(given).manifest.name, Path(given)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"--watch {path} is no folder")
    return path


def _require_ranges(options: dict[str, tuple[Any, Any, Any]]) -> None:
    for name, (value, low, high) in options.items():
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; expected {low} to {high}")
