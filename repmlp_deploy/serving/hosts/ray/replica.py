"""A replica of Ray Serve: the models of a local server, its application and its gRPC service in one actor.

A replica takes no traffic before every bundle has passed its self-check. One whose models are no longer ready, because
an execution and then the self-check failed, fails Ray's health check and is replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from repmlp_deploy.errors import BundleError, optional_imports
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.serving.hosts.grpc import Servicer
from repmlp_deploy.serving.hosts.health import health_of
from repmlp_deploy.serving.hosts.http import HttpOptions, create_app
from repmlp_deploy.serving.hosts.messages import message, service
from repmlp_deploy.serving.hosts.ray.loopback import keep_replica
from repmlp_deploy.serving.hosts.ray.services import METHODS
from repmlp_deploy.serving.hosts.ray.settings import DEPLOYMENT, Settings
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.logs import configure_logging
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.protocol import ServingError, TooLarge
from repmlp_deploy.serving.served_model import ModelOptions
from repmlp_deploy.serving.watch import Library
from repmlp_deploy.text import printable

with optional_imports():
    import grpc
    from grpc_health.v1 import health_pb2
    from ray import serve

__all__ = ["Replica", "deployment"]

_MEGABYTE = 1 << 20
_HEALTH_SECONDS = 2.0
_ATTEMPTS = 2  # to start a replica: a bundle that fails its check fails it again
_SPARE = 64  # requests beyond the queue, so that the replica, and not Ray, says that it is full
_log = logging.getLogger("repmlp.serve.ray")


class Replica:
    """What Ray Serve runs in each replica.

    Args:
        given: the settings as JSON values.

    Raises:
        BundleError: a bundle fails its check, or is not the version that was asked for.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        keep_replica()
        settings = Settings.model_validate(given)
        configure_logging(as_json=settings.log_format == "json")
        self._models = _loaded(settings)
        self._inference = Inference(self._models, timeout=settings.timeout)
        self._library = Library(self._models)
        self._servicer = Servicer(self._inference, self._library, control=False, log_requests=settings.log_requests)
        self._http = HttpOptions(settings.body_mb * _MEGABYTE, log_requests=settings.log_requests, send_ids=False)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application; Ray calls this after the constructor."""
        return create_app(self._inference, self._library, self._http)

    def check_health(self) -> None:
        """Raise unless every model is ready; Ray asks regularly, and replaces the replica."""
        if not self._models.ready:
            raise BundleError(f"not ready: {self._models.health()}")

    async def answer(self, name: str, data: bytes, context: Any) -> Any:
        """Answer a call of the inference service; an error is set in the context."""
        try:
            if len(data) > self._http.body_limit:
                raise TooLarge(f"the message has {len(data)} bytes, larger than max: {self._http.body_limit}")
            return await self._servicer.answer(name, data)
        except ServingError as error:
            context.set_code(getattr(grpc.StatusCode, error.code))
            context.set_details(printable(error))
        return message(service().methods_by_name[name].output_type.name)()

    async def Check(self, request: bytes, grpc_context: Any) -> Any:  # noqa: N802 - the protocol's name
        """Answer a call of the health checking protocol."""
        status = health_of(self._inference).get(health_pb2.HealthCheckRequest.FromString(request).service)
        if status is None:
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: bytes) -> AsyncIterator[Any]:  # noqa: N802 - the protocol's name
        """Yield the status of a service now and whenever it changes."""
        name, told = health_pb2.HealthCheckRequest.FromString(request).service, None
        while True:
            status = health_of(self._inference).get(name)
            status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN if status is None else status
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
            told = status
            await asyncio.sleep(_HEALTH_SECONDS)


def _call(name: str) -> Callable[[Replica, bytes, Any], Awaitable[Any]]:
    """Return the method that Ray's proxy calls: it has the name of the service's method."""

    async def call(self: Replica, request: bytes, grpc_context: Any) -> Any:
        return await self.answer(name, request, grpc_context)

    call.__name__ = name
    return call


for _name in METHODS:
    setattr(Replica, _name, _call(_name))


def deployment(settings: Settings) -> Any:
    """Return Ray Serve's deployment of these settings: what does not depend on the number of replicas."""
    return serve.deployment(serve.ingress()(Replica)).options(
        name=DEPLOYMENT,
        max_ongoing_requests=settings.queue + _SPARE,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=_ATTEMPTS,
        max_surge_percent=1,  # rounded up: a new replica starts, passes its check, and only then an old one goes
    )


def _loaded(settings: Settings) -> Models:
    """Return the models, every one of which has passed its check."""
    cache = Path(settings.cache) if settings.cache else None
    runner = RunnerOptions(settings.device, settings.threads, cache, streams=settings.streams)
    queue, delay = settings.queue, settings.max_delay_ms / 1000
    target = None if settings.target_ms is None else settings.target_ms / 1000
    workers = settings.workers
    models = Models(ModelOptions(settings.format, runner, queue=queue, delay=delay, workers=workers, target=target))
    for name, served in settings.bundles.items():
        models.add(name, Path(served.path))
    Library(models).look()
    for model in models.all():
        wanted = settings.bundles[model.name].version
        if not model.ready:
            raise BundleError(f"{model.name} was refused: {model.reason}")
        if wanted not in {None, model.version().name}:
            there = model.version().name
            raise BundleError(f"{model.name} was refused: {model.folder} holds version {there}, not {wanted}")
    return models
