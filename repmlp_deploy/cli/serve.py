"""`repmlp-serve BUNDLE…`: answer requests by the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared.console import run_command, typer
from repmlp_deploy.cli.shared.serving.config import read_config
from repmlp_deploy.cli.shared.serving.on_ray import (
    HostEngine,
    MaxReplicas,
    RayServing,
    ReplicaCpus,
    ReplicaGpus,
    ReplicaRequests,
    Replicas,
    WriteRayConfig,
)
from repmlp_deploy.errors import InputError
from repmlp_deploy.reading import is_folder
from repmlp_deploy.runtime.runner import RunnerOptions, stream_count
from repmlp_deploy.serving.hosts.http import HttpOptions
from repmlp_deploy.serving.logs import configure_logging
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.process import ServerOptions, serve
from repmlp_deploy.serving.served_model import ModelOptions
from repmlp_deploy.serving.watch import Library

__all__ = ["main"]

_MEGABYTE = 1 << 20
_NO_PORT = -1
_HIGHEST_PORT = 65_535
_MANY = 1024


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
            metavar="FILE.toml",
            is_eager=True,
            callback=read_config,
            help="TOML file with options by their names; the command line wins.",
        ),
    ] = None,
    watch: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Serve the bundles in this folder, and follow its changes.")
    ] = None,
    watch_seconds: Annotated[float, typer.Option(help="Seconds between two looks at the bundles.")] = 2.0,
    control: Annotated[bool, typer.Option("--control", help="Let clients load and unload models.")] = False,
    host_engine: HostEngine = "local",
    replicas: Replicas = None,
    max_replicas: MaxReplicas = None,
    replica_requests: ReplicaRequests = None,
    replica_cpus: ReplicaCpus = None,
    replica_gpus: ReplicaGpus = None,
    write_ray_config: WriteRayConfig = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port; 0 for any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 for any free one, -1 for no gRPC.")] = 8001,
    artifact: Annotated[str | None, typer.Option("--format", help="Artifact; default: the best here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt or rtx; default: the best here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference.")] = None,
    streams: Annotated[
        str,
        typer.Option(
            metavar="latency|throughput|N", help="Inferences at a time; throughput: measure which number is best."
        ),
    ] = "latency",
    workers: Annotated[int | None, typer.Option(help="Batches that run at a time; default: as --streams.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for compiled int8 models; the next start is quicker."),
    ] = None,
    max_delay_ms: Annotated[float, typer.Option(help="How long a batch waits for more requests, under load.")] = 0.0,
    target_ms: Annotated[
        float | None, typer.Option(help="Answer within so long where that is possible: late requests go last.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Samples that may wait; further requests get 503.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request gets 504.")] = 30.0,
    drain: Annotated[float, typer.Option(help="Seconds for requests under way when the server stops.")] = 30.0,
    connections: Annotated[int, typer.Option(help="Largest number of HTTP connections.")] = _MANY,
    body_mb: Annotated[int, typer.Option(help="Largest body of a request.")] = 64,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Serve TLS with this certificate chain.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="The certificate's private key.")] = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log every request.")] = False,
) -> None:
    """Serve bundles over HTTP and gRPC; a bundle is ready only after its self-check passed on this machine."""
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
        | {"--target-ms": (1.0 if target_ms is None else target_ms, 0.1, 3_600_000)}
        | {"--drain": (drain, 1, 3600), "--connections": (connections, 1, 1 << 20)}
        | {"--watch-seconds": (watch_seconds, 0.05, 3600)}
    )
    named = _all_named(bundles or ())
    folders = [_folder(path) for path in watch or ()]
    if not named and not folders:
        raise InputError("nothing to serve: name bundles, or a folder of them with --watch")
    ray = RayServing(replicas, max_replicas, replica_requests, replica_cpus, replica_gpus, write_ray_config)
    elsewhere = {"--control": control, "--tls-certificate": tls_key is not None, "--connections": connections != _MANY}
    on_ray = ray.require_engine(host_engine, elsewhere)
    configure_logging(as_json=log_format == "json")
    grpc = None if grpc_port == _NO_PORT else grpc_port
    if on_ray:
        how: dict[str, Any] = {"format": artifact, "device": device, "threads": threads, "workers": workers or 0}
        how |= {"streams": stream_count(streams), "cache": str(cache) if cache else None, "queue": queue}
        how |= {"max_delay_ms": max_delay_ms, "target_ms": target_ms, "timeout": timeout}
        how |= {"drain": drain, "body_mb": body_mb, "log_format": log_format, "log_requests": log_requests}
        ray.serve(named, folders, watch_seconds, how, (host, port, grpc))
        return
    runner = RunnerOptions(device, threads, cache, streams=stream_count(streams))
    target = None if target_ms is None else target_ms / 1000
    delay, at_a_time = max_delay_ms / 1000, workers or 0
    models = Models(ModelOptions(artifact, runner, queue=queue, delay=delay, workers=at_a_time, target=target))
    for name, folder in named.items():
        models.add(name, folder)
    http = HttpOptions(body_mb * _MEGABYTE, control=control, log_requests=log_requests)
    where = ServerOptions(host, port, grpc, tls_certificate, tls_key, timeout, drain, connections, http)
    serve(models, Library(models, folders, watch_seconds), where)


def _all_named(given: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the arguments, by the names that they are served under.

    Raises:
        InputError: one is no bundle or has a name that no URL can carry, or two have one name.
    """
    names = Models(ModelOptions())
    for one in given:
        names.add(*_named(one))
    return {model.name: model.folder for model in names.all()}


def _named(given: str) -> tuple[str, Path]:
    """Return the name and the folder of an argument, `NAME=PATH` or `PATH`; the name is the manifest's by default."""
    name, separator, path = given.partition("=")
    if separator and not is_folder(Path(given), given):
        folder = Path(path)
        Bundle.load(folder)
        return name, folder
    return Bundle.load(given).manifest.name, Path(given)


def _folder(path: Path) -> Path:
    if not is_folder(path, f"--watch {path}"):
        raise InputError(f"--watch {path} is no folder")
    return path


def _require_ranges(options: dict[str, tuple[Any, Any, Any]]) -> None:
    for name, (value, low, high) in options.items():
        if not low <= value <= high:
            raise InputError(f"{name} is {value}; expected {low} to {high}")
