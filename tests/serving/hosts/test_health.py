"""The health service: what it says of models that answer, are gone, or take no images."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from repmlp_deploy import Bundle
from repmlp_deploy.card import Preprocessing, Resize
from repmlp_deploy.serving.hosts.health import Health, health_of
from repmlp_deploy.serving.hosts.messages import SERVICE
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.models import Models
from support.bundles import PARTS, bundle_of_graph

SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3


class Context:
    """Raises as gRPC does when a call is refused."""

    async def abort(self, code: grpc.StatusCode, said: str) -> None:
        raise grpc.RpcError(code, said)


def _asked(name: str) -> Any:
    return health_pb2.HealthCheckRequest(service=name)


def test_every_name_that_requests_may_have_is_known(inference: Inference, tmp_path: Path) -> None:
    """Of feature maps no image model is made."""
    how = Preprocessing(resize=Resize(mode="exact", size=(32, 32)), mean=(120, 115, 100), std=(60, 57, 55))
    tensors = bundle_of_graph(PARTS, tmp_path / "tensors", task="features", how=how)
    inference.models.add("tensors", tensors.folder or Path()).load()
    known = dict.fromkeys(("", SERVICE, "digits", "digits-image", "tensors"), SERVING)
    assert health_of(inference) == known
    found = asyncio.run(Health(inference).List(None, None)).statuses
    assert {name: answer.status for name, answer in found.items()} == known
    inference.models.find("digits")[0].unload()
    assert {name for name, status in health_of(inference).items() if status == NOT_SERVING} == {
        "digits",
        "digits-image",
    }


def test_a_watcher_is_told_of_every_change_and_leaves_with_the_server(inference: Inference, bundle: Bundle) -> None:
    models: Models = inference.models

    async def run() -> list[int]:
        health, answers, told = Health(inference), asyncio.Queue[int](), list[int]()

        async def watch() -> None:
            async for answer in health.Watch(_asked("digits"), None):
                answers.put_nowait(answer.status)

        async def told_next() -> None:
            await health.tell()
            told.append(await asyncio.wait_for(answers.get(), 10))

        watching = asyncio.ensure_future(watch())
        await told_next()
        models.find("digits")[0].unload()
        await told_next()
        models.remove("digits")
        await told_next()
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            await health.Check(_asked("digits"), Context())
        models.add("digits", bundle.folder or Path()).load()
        await told_next()
        assert (await health.Check(_asked("digits"), Context())).status == SERVING
        models.stopping = True
        await told_next()
        await asyncio.wait_for(watching, 10)
        return told

    assert asyncio.run(run()) == [SERVING, NOT_SERVING, UNKNOWN, SERVING, NOT_SERVING]
