"""What replicas serve, and how many there are: the `args` and `deployments` of a file for `serve deploy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["APPLICATION", "DEPLOYMENT", "Scale", "Served", "Settings", "deploy_file"]

APPLICATION = "repmlp"
"""Name of the application in Ray Serve."""

DEPLOYMENT = "Replica"
"""Name of its only deployment."""

_PATIENCE = 5.0  # seconds that a proxy waits longer than a replica, whose answer says more


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Served(_Strict):
    """A bundle that is served.

    Attributes:
        path: of its folder, as every replica sees it.
        version: that must lie there; another is refused. None for whatever lies there.
    """

    path: str
    version: str | None = None


class Settings(_Strict):
    """What a replica serves. A change starts new replicas.

    Attributes:
        bundles: by name.
        format: which artifact; None for the best that runs on the replica's machine.
        device: what it runs on; None for the best there is.
        threads: of one inference; None for as many CPUs as a replica asks for.
        workers: batches that run at a time; 0 for as many as streams.
        streams: inferences that the runtime runs at a time; 0 for as many as a measurement finds best.
        cache: folder for what the runtime compiles.
        max_delay_ms: that a crowd's batch may wait for more requests.
        target_ms: within which requests are to be answered where that is possible.
        queue: samples that may wait in a replica.
        timeout: seconds after which a request gets no answer any more.
        drain: seconds that requests under way may take when a replica stops.
        body_mb: largest body of a request.
        log_format: text or json.
        log_requests: whether every request is logged.
    """

    bundles: Mapping[str, Served] = Field(min_length=1)
    format: str | None = None
    device: str | None = None
    threads: int | None = Field(None, ge=1)
    workers: int = Field(0, ge=0, le=64)
    streams: int = 1
    cache: str | None = None
    max_delay_ms: float = Field(0.0, ge=0, le=10_000)
    target_ms: float | None = Field(None, gt=0, le=3_600_000)
    queue: int = Field(1024, ge=1, le=1 << 24)
    timeout: float = Field(30.0, gt=0, le=86_400)
    drain: float = Field(30.0, ge=1, le=3600)
    body_mb: int = Field(64, ge=1, le=4096)
    log_format: str = Field("text", pattern="^(text|json)$")
    log_requests: bool = False


class Scale(_Strict):
    """How many replicas there are, and what each asks Ray for. A change of their number restarts none.

    Attributes:
        replicas: that there are at least.
        most: that there are at most; None for a fixed number.
        requests: under way in a replica, above which there are more of them.
        cpus: of a replica.
        gpus: of a replica; parts of one are shared.
    """

    replicas: int = Field(1, ge=1)
    most: int | None = None
    requests: int = Field(16, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of Ray Serve's deployment."""
        actor = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.most is None:
            return {"num_replicas": self.replicas, "ray_actor_options": actor}
        scaling = {"min_replicas": self.replicas, "max_replicas": self.most, "target_ongoing_requests": self.requests}
        return {"autoscaling_config": scaling, "ray_actor_options": actor}


def proxy_options(host: str, port: int, grpc_port: int | None, timeout: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of Ray Serve's proxies for HTTP and for gRPC; they are the cluster's, not an application's."""
    http = {"host": host, "port": port, "request_timeout_s": timeout + _PATIENCE}
    if grpc_port is None:
        return http, {}
    services = [f"{__package__}.services.{name}" for name in ("add_inference", "add_health", "add_reflection")]
    grpc = {"port": grpc_port, "grpc_servicer_functions": services, "enable_reflection": False}
    return http, {**grpc, "request_timeout_s": timeout + _PATIENCE}


def deploy_file(settings: Settings, scale: Scale, http: dict[str, Any], grpc: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file for `serve deploy`."""
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": f"{__package__}:app",
        "args": settings.model_dump(mode="json", exclude_defaults=True),
        "deployments": [{"name": DEPLOYMENT, **scale.options}],
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": http,
        **({"grpc_options": grpc} if grpc else {}),
        "applications": [application],
    }
