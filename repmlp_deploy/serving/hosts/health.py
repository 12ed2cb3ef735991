"""The health checking protocol of gRPC: which models answer, asked for once or watched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from repmlp_deploy.errors import optional_imports
from repmlp_deploy.serving.hosts.messages import SERVICE
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.models import IMAGE_SUFFIX
from repmlp_deploy.serving.protocol import UnknownModel

with optional_imports():
    import grpc
    from grpc_health.v1 import health_pb2

__all__ = ["Health", "health_of"]


def health_of(inference: Inference) -> dict[str, int]:
    """Return the status of the server, of the service and of every model, by the names that are asked for."""
    models = inference.models
    ready = {"": models.ready, SERVICE: models.ready}
    for model in models.all():
        for name in (model.name, model.name + IMAGE_SUFFIX):
            with contextlib.suppress(UnknownModel):  # it takes tensors only, or was removed since
                ready[name] = inference.model_ready(name)
    response = health_pb2.HealthCheckResponse
    return {name: response.SERVING if answers else response.NOT_SERVING for name, answers in ready.items()}


class Health:
    """Answers for the models as they are; a name that nothing has, or has no more, is unknown.

    Args:
        inference: the models.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._changed = asyncio.Condition()
        self._turn = 0

    async def tell(self) -> None:
        """Let those who watch look again."""
        async with self._changed:
            self._turn += 1
            self._changed.notify_all()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        """Say whether a service answers."""
        status = health_of(self._inference).get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, _request: Any, _context: Any) -> Any:  # noqa: N802 - the protocol's name
        """Say of every service whether it answers."""
        found = health_of(self._inference).items()
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in found}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, _context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the protocol's name
        """Say now, and whenever it changes, whether a service answers; until the server stops."""
        told = None
        while True:
            turn, status = self._turn, health_of(self._inference).get(request.service)
            status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN if status is None else status
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
            told = status
            if self._inference.models.stopping:
                return
            async with self._changed:
                while self._turn == turn:
                    await self._changed.wait()
