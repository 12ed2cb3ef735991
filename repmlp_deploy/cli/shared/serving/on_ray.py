"""The options of `repmlp-serve --host-engine ray`, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from repmlp_deploy.cli.shared.console import print_line, typer
from repmlp_deploy.errors import InputError, OutputError, optional_imports
from repmlp_deploy.files import write_named
from repmlp_deploy.text import printable

__all__ = [
    "HostEngine",
    "MaxReplicas",
    "RayServing",
    "ReplicaCpus",
    "ReplicaGpus",
    "ReplicaRequests",
    "Replicas",
    "WriteRayConfig",
]

HostEngine = Annotated[str, typer.Option(help="local: this process; ray: Ray Serve, on RAY_ADDRESS or here.")]
Replicas = Annotated[
    int | None, typer.Option(help="Replicas of Ray Serve, default 1; with --max-replicas, the fewest.")
]
MaxReplicas = Annotated[int | None, typer.Option(help="Ray starts more replicas under load, up to this number.")]
ReplicaRequests = Annotated[
    int | None, typer.Option(help="With --max-replicas: Ray starts more replicas if one has more requests under way.")
]
ReplicaCpus = Annotated[float | None, typer.Option(help="CPUs that a replica asks Ray for; default: 1.")]
ReplicaGpus = Annotated[float | None, typer.Option(help="GPUs that a replica asks for; default: 1, or 0 on a CPU.")]
WriteRayConfig = Annotated[
    Path | None, typer.Option(metavar="FILE.yaml", help="Write the file for Ray's `serve deploy`, and end.")
]

_MOST_REPLICAS = 100  # above that, a surge of 1 percent is more than one replica
_MOST_SHARES = 256


@dataclass(frozen=True)
class RayServing:
    """What was asked of Ray Serve; None where the line does not say."""

    replicas: int | None
    max_replicas: int | None
    requests: int | None
    cpus: float | None
    gpus: float | None
    write: Path | None

    def require_engine(self, engine: str, elsewhere: Mapping[str, bool]) -> bool:
        """Return whether the engine is Ray Serve.

        Args:
            engine: its name.
            elsewhere: options that Ray Serve does not have, and whether they were given.

        Raises:
            InputError: there is none of this name, or an option is another engine's.
        """
        given = {
            "--replicas": self.replicas, "--max-replicas": self.max_replicas, "--replica-requests": self.requests,
            "--replica-cpus": self.cpus, "--replica-gpus": self.gpus, "--write-ray-config": self.write,
        }  # fmt: skip
        if engine not in ("local", "ray"):
            raise InputError(f"--host-engine is {printable(engine, 40)}; expected local or ray")
        if engine == "local":
            wrong = next((name for name, value in given.items() if value is not None), None)
            if wrong:
                raise InputError(f"{wrong} is for --host-engine ray; the local engine is one process: leave it out")
            return False
        wrong = next((name for name, is_given in elsewhere.items() if is_given), None)
        if wrong:
            raise InputError(f"--host-engine ray has no {wrong}: leave it out, or put a gateway before Ray Serve")
        replicas, most = 1 if self.replicas is None else self.replicas, self.max_replicas
        for name, value, low in (("--replicas", replicas, 1), ("--max-replicas", most, replicas)):
            if value is not None and not low <= value <= _MOST_REPLICAS:
                raise InputError(f"{name} is {value}; expected {low} to {_MOST_REPLICAS}")
        if self.requests is not None and (most is None or self.requests < 1):
            raise InputError(f"--replica-requests is {self.requests}; expected at least 1, with --max-replicas")
        for name, share in (("--replica-cpus", self.cpus), ("--replica-gpus", self.gpus)):
            if share is not None and not 0 <= share <= _MOST_SHARES:
                raise InputError(f"{name} is {share}; expected 0 to {_MOST_SHARES}")
        return True

    def serve(self, named: Mapping[str, Path], watched: Sequence[Path], every: float, options: dict[str, Any],
              address: tuple[str, int, int | None]) -> None:  # fmt: skip
        """Serve on Ray until a signal ends it, or write the file for `serve deploy`.

        Args:
            named: bundles by name.
            watched: folders of bundles.
            every: seconds between two looks at them.
            options: fields of `Settings`.
            address: host, port of HTTP and port of gRPC.

        Raises:
            MissingDependency: Ray is not installed.
        """
        with optional_imports():
            from repmlp_deploy.serving.hosts.ray.process import Address, Sources, serve_on_ray  # noqa: PLC0415
            from repmlp_deploy.serving.hosts.ray.settings import Scale, Settings  # noqa: PLC0415
        gpus = (0.0 if options["device"] in {None, "cpu"} else 1.0) if self.gpus is None else self.gpus
        cpus = 1.0 if self.cpus is None else self.cpus
        scale = Scale(replicas=self.replicas or 1, most=self.max_replicas, requests=self.requests or 16, cpus=cpus,
                      gpus=gpus)  # fmt: skip
        sources = Sources(named, watched, every)
        if self.write is None:
            serve_on_ray(lambda bundles: Settings(bundles=bundles, **options), sources, scale, Address(*address))
            return
        self._write(self.write, Settings(bundles=sources.find(), **options), scale, address)

    def _write(self, path: Path, settings: Any, scale: Any, address: tuple[str, int, int | None]) -> None:
        import yaml  # noqa: PLC0415 - comes with Ray

        from repmlp_deploy.serving.hosts.ray.settings import deploy_file, proxy_options  # noqa: PLC0415 - needs Ray

        content = deploy_file(settings, scale, *proxy_options(*address, settings.timeout))
        try:
            write_named(path, yaml.safe_dump(content, sort_keys=False).encode())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
        print_line(f"{path}: written; on the cluster, run `serve deploy {quote(str(path))}`")
