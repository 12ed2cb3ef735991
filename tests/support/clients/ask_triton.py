"""Ask a server with tritonclient. Runs in the clients' environment, without our package.

Usage: ask_triton.py HTTP GRPC BATCH.npz OUT.npz IMAGE...

Every way of asking saves the logits of the batch, and the index and label of every image, under its name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http

MODEL, IMAGES = "digits", "digits-image"


def ask(kind: Any, client: Any, batch: np.ndarray, images: list[bytes], *, binary: bool | None) -> dict[str, Any]:
    """Ask with one of the two clients; `binary` is None where the client has no such choice."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert not client.is_model_ready("none")
    client.get_server_metadata()
    client.get_model_metadata(MODEL)
    client.get_model_config(MODEL)
    client.get_inference_statistics(MODEL)
    client.get_model_repository_index()
    how = {} if binary is None else {"binary_data": binary}
    tensor = kind.InferInput("images", list(batch.shape), "FP32")
    tensor.set_data_from_numpy(batch, **how)
    wanted = [kind.InferRequestedOutput("logits", **how)]
    answer = client.infer(MODEL, [tensor], outputs=wanted, request_id="7")
    found = {"logits": answer.as_numpy("logits")}
    encoded = kind.InferInput("image", [len(images)], "BYTES")
    encoded.set_data_from_numpy(np.array(images, dtype=np.object_))
    answer = client.infer(IMAGES, [encoded])
    return found | {"index": answer.as_numpy("index"), "label": answer.as_numpy("label").astype(str)}


def main() -> None:
    """Ask in every way and save the answers."""
    http, grpc, source, out, *paths = sys.argv[1:]
    batch, images = np.load(source)["batch"], [Path(path).read_bytes() for path in paths]
    http_client = over_http.InferenceServerClient(http.removeprefix("http://"))
    answers = {
        "http-json": ask(over_http, http_client, batch, images, binary=False),
        "http-binary": ask(over_http, http_client, batch, images, binary=True),
        "grpc": ask(over_grpc, over_grpc.InferenceServerClient(grpc), batch, images, binary=None),
    }
    np.savez(out, **{f"{name}.{what}": value for name, found in answers.items() for what, value in found.items()})


if __name__ == "__main__":
    main()
