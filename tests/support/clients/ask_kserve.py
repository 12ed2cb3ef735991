"""Ask a server with KServe's clients. Runs in the clients' environment, without our package.

Usage: ask_kserve.py HTTP GRPC BATCH.npz OUT.npz IMAGE...
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

MODEL, IMAGES = "digits", "digits-image"


def _request(batch: np.ndarray, *, binary: bool) -> InferRequest:
    tensor = InferInput("images", list(batch.shape), "FP32")
    tensor.set_data_from_numpy(batch, binary_data=binary)
    return InferRequest(model_name=MODEL, infer_inputs=[tensor])


def _images(images: list[bytes]) -> InferRequest:
    tensor = InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=np.object_), binary_data=True)
    return InferRequest(model_name=IMAGES, infer_inputs=[tensor])


def _index(answer: Any) -> Any:
    return next(output for output in answer.outputs if output.name == "index").as_numpy()


async def ask_rest(address: str, batch: np.ndarray, images: list[bytes]) -> dict[str, Any]:
    """Ask over REST, with JSON and with raw tensors."""
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
    assert await client.is_server_live(address)
    assert await client.is_server_ready(address)
    assert await client.is_model_ready(address, MODEL)
    found = {}
    for name, binary in (("rest-json", False), ("rest-binary", True)):
        answer = await client.infer(address, _request(batch, binary=binary), model_name=MODEL)
        found[f"{name}.logits"] = answer.outputs[0].as_numpy()
    answer = await client.infer(address, _images(images), model_name=IMAGES)
    found["rest-binary.index"] = _index(answer)
    await client.close()
    return found


async def ask_grpc(address: str, batch: np.ndarray, images: list[bytes]) -> dict[str, Any]:
    """Ask over gRPC."""
    client = InferenceGRPCClient(address)
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready(MODEL)
    assert not await client.is_model_ready("none")
    answer = await client.infer(_request(batch, binary=True))
    found = {"grpc.logits": answer.outputs[0].as_numpy(), "grpc.index": _index(await client.infer(_images(images)))}
    await client.close()
    return found


def main() -> None:
    """Ask in every way and save the answers."""
    http, grpc, source, out, *paths = sys.argv[1:]
    batch, images = np.load(source)["batch"], [Path(path).read_bytes() for path in paths]
    found = asyncio.run(ask_rest(http, batch, images)) | asyncio.run(ask_grpc(grpc, batch, images))
    np.savez(out, **found)


if __name__ == "__main__":
    main()
