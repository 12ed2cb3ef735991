"""What images become, for every task, and networks that take levels: the answers of `Predictor`, through the server."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from repmlp_deploy import Bundle, Embedding, Predictor, Segmentation
from repmlp_deploy.card import Preprocessing, Resize
from repmlp_deploy.runtime import tasks
from repmlp_deploy.serving import images
from repmlp_deploy.serving.hosts.http import HttpOptions, create_app
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.served_model import ModelOptions
from repmlp_deploy.serving.watch import Library
from support.bundles import FACES, PARTS, bundle_of_graph

LEVELS = np.random.default_rng(5).integers(0, 256, (2, 90, 70, 3), dtype=np.uint8)


HOW = Preprocessing(resize=Resize(mode="exact", size=(32, 32)), mean=(120, 115, 100), std=(60, 57, 55))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A graph that segments, and one that embeds and takes levels."""
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "parts": bundle_of_graph(PARTS, folder / "parts", task="segment", how=HOW),
        "faces": bundle_of_graph(FACES, folder / "faces", task="embed", how=HOW.model_copy(update={"input": "uint8"})),
    }


@pytest.fixture(scope="module")
def served(bundles: dict[str, Bundle]) -> Iterator[TestClient]:
    models = Models(ModelOptions("onnx"))
    for name, bundle in bundles.items():
        models.add(name, bundle.folder or Path())
    library, inference = Library(models), Inference(models)
    library.look()
    yield TestClient(create_app(inference, library, HttpOptions(body_limit=1 << 20)), raise_server_exceptions=False)
    inference.close()


def encoded(levels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def infer(client: TestClient, model: str, item: dict[str, Any], raw: bytes) -> dict[str, Any]:
    """Return the outputs by name; the input is binary, the outputs are JSON."""
    header = json.dumps({"inputs": [{**item, "parameters": {"binary_data_size": len(raw)}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    answer = client.post(f"/v2/models/{model}/infer", content=header + raw, headers=headers)
    assert answer.status_code == 200, answer.text
    return {output["name"]: output for output in answer.json()["outputs"]}


def infer_images(client: TestClient, model: str) -> dict[str, Any]:
    files = [encoded(levels) for levels in LEVELS]
    raw = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    return infer(client, model, {"name": "image", "shape": [len(files)], "datatype": "BYTES"}, raw)


def values(output: dict[str, Any]) -> NDArray[Any]:
    return np.asarray(output["data"], np.float32).reshape(output["shape"])


def test_segmenting_gives_masks_of_the_size_of_the_images(served: TestClient, bundles: dict[str, Bundle]) -> None:
    outputs = infer_images(served, "parts-image")
    assert outputs["mask"]["datatype"] == "BYTES"
    with Predictor(bundles["parts"], format="onnx") as predictor:
        expected = predictor(list(LEVELS))
    assert len(outputs["mask"]["data"]) == len(expected) == len(LEVELS)
    for text, answer in zip(outputs["mask"]["data"], expected, strict=True):
        assert isinstance(answer, Segmentation)
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        np.testing.assert_array_equal(mask, answer.mask)
        assert mask.shape == LEVELS.shape[1:3]
        assert len(np.unique(mask)) > 1  # a mask of one class would equal too easily


def test_embedding_gives_vectors_of_length_one(served: TestClient, bundles: dict[str, Bundle]) -> None:
    outputs = infer_images(served, "faces-image")
    vectors = values(outputs["vector"])
    with Predictor(bundles["faces"], format="onnx") as predictor:
        expected = predictor(list(LEVELS))
    assert all(isinstance(answer, Embedding) for answer in expected)
    np.testing.assert_allclose(vectors, np.stack([answer.vector for answer in expected]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_a_network_that_takes_levels_is_served_as_uint8(served: TestClient, bundles: dict[str, Bundle]) -> None:
    """The tensor is levels, (N, H, W, C); the image model makes them itself, and both give the same output."""
    said = served.get("/v2/models/faces").json()["inputs"]
    spec = bundles["faces"].manifest.input
    assert said == [{"name": spec.name, "datatype": "UINT8", "shape": [-1, *spec.shape[1:]]}]
    with Predictor(bundles["faces"], format="onnx") as predictor:
        levels = np.stack([predictor.preprocess(one) for one in LEVELS])
        expected = predictor.logits(levels)
    assert levels.dtype == np.uint8
    item = {"name": spec.name, "datatype": "UINT8", "shape": list(levels.shape)}
    (output,) = infer(served, "faces", item, levels.tobytes()).values()
    np.testing.assert_allclose(values(output), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(values(infer_images(served, "faces-image")[output["name"]]), values(output))
    wrong = {"inputs": [{**item, "datatype": "FP32", "data": [0.0] * levels.size}]}
    answer = served.post("/v2/models/faces/infer", json=wrong)
    assert (answer.status_code, answer.json()["error"]) == (400, f"{spec.name} is FP32; the model takes UINT8")


def test_masks_of_a_request_have_a_limit(served: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MASK_PIXELS", 2 * 90 * 70 - 1)
    files = [base64.b64encode(encoded(levels)).decode() for levels in LEVELS]
    for count, status in ((1, 200), (2, 400)):
        item = {"name": "image", "shape": [count], "datatype": "BYTES", "data": files[:count]}
        answer = served.post("/v2/models/parts-image/infer", json={"inputs": [item]})
        assert answer.status_code == status, answer.text
    assert answer.json()["error"] == "the masks of these images have 12600 pixels; a request may have 12599"


def test_a_request_that_is_too_late_makes_no_more_masks(served: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made, answered = list[int](), threading.Event()

    def slow(_logits: NDArray[np.float32], sizes: Sequence[tuple[int, int]], *_: object) -> list[Segmentation]:
        made.append(len(sizes))
        assert answered.wait(30)
        return [Segmentation(np.zeros(size, np.uint8)) for size in sizes]

    monkeypatch.setattr(tasks, "masks_from_logits", slow)
    files = [base64.b64encode(encoded(LEVELS[0])).decode()] * 3
    item = {"name": "image", "shape": [3], "datatype": "BYTES", "data": files}
    asked = {"inputs": [item], "parameters": {"timeout": 2_000_000}}
    answer = served.post("/v2/models/parts-image/infer", json=asked)
    answered.set()
    assert (answer.status_code, answer.json()["error"]) == (504, "the deadline of 2.000 s passed")
    (done,) = infer_images(served, "parts-image")["mask"]["shape"]  # in the same threads, after what was begun
    assert done == len(LEVELS)
    assert made == [1, 1, 1], "one of the first request, two of the second"
