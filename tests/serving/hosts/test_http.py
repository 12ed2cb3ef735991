"""The protocol over HTTP: every endpoint, with and without versions, and every way in which a request can be wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.serving.codec import decode_request
from repmlp_deploy.serving.hosts import http
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.protocol import InferRequest
from repmlp_deploy.serving.served_model import ServedModel


def _batch(samples: int = 2) -> np.ndarray:
    return np.random.default_rng(samples).normal(size=(samples, 3, 32, 32)).astype(np.float32)


def _json(batch: np.ndarray, **more: Any) -> dict[str, Any]:
    item = {"name": "images", "shape": list(batch.shape), "datatype": "FP32", "data": batch.reshape(-1).tolist()}
    return {"inputs": [item], **more}


def _binary(batch: np.ndarray, datatype: str = "FP32", **more: Any) -> tuple[bytes, dict[str, str]]:
    raw = batch.tobytes()
    item = {"name": "images", "shape": list(batch.shape), "datatype": datatype}
    header = json.dumps({"inputs": [{**item, "parameters": {"binary_data_size": len(raw)}}], **more}).encode()
    return header + raw, {"Inference-Header-Content-Length": str(len(header))}


def _logits(answer: dict[str, Any]) -> np.ndarray:
    output = next(o for o in answer["outputs"] if o["name"] == "logits")
    return np.array(output["data"], np.float32).reshape(output["shape"])


def _version(client: TestClient) -> str:
    return client.get("/v2/models/digits").json()["versions"][0]


def test_the_server_and_its_models_describe_themselves(client: TestClient) -> None:
    assert client.get("/v2").json()["name"] == "repmlp-serve"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    said = client.get("/v2/models/digits").json()
    assert said["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert said["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    images = client.get("/v2/models/digits-image").json()
    assert images["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [(o["name"], o["datatype"]) for o in images["outputs"]] == [
        ("logits", "FP32"),
        ("label", "BYTES"),
        ("index", "INT64"),
        ("score", "FP32"),
    ]


@pytest.mark.parametrize("suffix", ["", "/"])
def test_paths_may_name_the_version_and_end_in_a_slash(client: TestClient, suffix: str) -> None:
    version = _version(client)
    for path in ("", "/ready", "/config", "/stats"):
        for base in ("/v2/models/digits", f"/v2/models/digits/versions/{version}"):
            assert client.get(base + path + suffix).status_code == 200
        assert client.get(f"/v2/models/digits/versions/1{path}{suffix}").status_code == 404
    answer = client.post(f"/v2/models/digits/versions/{version}/infer{suffix}", json=_json(_batch(1)))
    assert answer.status_code == 200


def test_json_gives_the_logits_of_the_predictor(client: TestClient, predictor: Predictor) -> None:
    batch = _batch()
    answer = client.post("/v2/models/digits/infer", json=_json(batch, id="x7"))
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["id"] == "x7"
    assert (_logits(answer.json()) == predictor.logits(batch)).all()


def test_raw_tensors_give_the_logits_of_the_predictor(client: TestClient, predictor: Predictor) -> None:
    batch = _batch(3)
    body, headers = _binary(batch, parameters={"binary_data_output": True})
    answer = client.post("/v2/models/digits/infer", content=body, headers=headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    said = json.loads(answer.content[:length])["outputs"][0]
    assert said["parameters"] == {"binary_data_size": 120}
    assert answer.content[length:] == predictor.logits(batch).tobytes()


def test_half_precision_inputs_are_widened(client: TestClient, predictor: Predictor) -> None:
    half = _batch().astype(np.float16)
    body, headers = _binary(half, "FP16")
    answer = client.post("/v2/models/digits/infer", content=body, headers=headers).json()
    assert (_logits(answer) == predictor.logits(half.astype(np.float32))).all()
    bits = _batch().view("<u4") >> 16
    body, headers = _binary(bits.astype("<u2"), "BF16")
    answer = client.post("/v2/models/digits/infer", content=body, headers=headers).json()
    assert (_logits(answer) == predictor.logits((bits << 16).view(np.float32))).all()


def test_a_body_that_is_one_input_needs_no_description(
    client: TestClient, predictor: Predictor, digit_files: list[Path]
) -> None:
    batch, headers = _batch(), {"Inference-Header-Content-Length": "0"}
    answer = client.post("/v2/models/digits/infer", content=batch.tobytes(), headers=headers).json()
    assert (_logits(answer) == predictor.logits(batch)).all()
    data = digit_files[3].read_bytes()
    answer = client.post("/v2/models/digits-image/infer", content=data, headers=headers).json()
    assert {o["name"]: o["data"] for o in answer["outputs"]}["label"] == [predictor(data).pred_class]


def test_images_give_the_predictions_of_the_predictor(
    client: TestClient, predictor: Predictor, digit_files: list[Path]
) -> None:
    elements = [path.read_bytes() for path in digit_files]
    raw = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    item = {"name": "image", "shape": [len(elements)], "datatype": "BYTES"}
    header = json.dumps({"inputs": [{**item, "parameters": {"binary_data_size": len(raw)}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    answer = client.post("/v2/models/digits-image/infer", content=header + raw, headers=headers).json()
    said = {output["name"]: output["data"] for output in answer["outputs"]}
    expected = [predictor(element) for element in elements]
    assert said["index"] == [prediction.pred_label for prediction in expected]
    assert said["label"] == [prediction.pred_class for prediction in expected]
    np.testing.assert_allclose(said["score"], [prediction.pred_score for prediction in expected], rtol=1e-5)


def test_outputs_are_chosen_and_ordered_by_the_caller(client: TestClient, digit_files: list[Path]) -> None:
    import base64

    text = base64.b64encode(digit_files[0].read_bytes()).decode()
    inputs = [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}]
    body = {"inputs": inputs, "outputs": [{"name": "score"}, {"name": "index"}]}
    answer = client.post("/v2/models/digits-image/infer", json=body).json()
    assert [output["name"] for output in answer["outputs"]] == ["score", "index"]


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies_are_read(client: TestClient, encoding: str, pack: Any) -> None:
    body = pack(json.dumps(_json(_batch(1))).encode())
    answer = client.post("/v2/models/digits/infer", content=body, headers={"Content-Encoding": encoding})
    assert answer.status_code == 200
    for damaged in (body[:-5], body + b"x", b"no"):
        answer = client.post("/v2/models/digits/infer", content=damaged, headers={"Content-Encoding": encoding})
        assert (answer.status_code, answer.json()) == (400, {"error": "the compressed body is damaged"})


def test_a_bomb_is_refused_before_it_is_unpacked(client: TestClient) -> None:
    body = gzip.compress(bytes(200 << 20))
    answer = client.post("/v2/models/digits/infer", content=body, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413


def _wrong(**changes: Any) -> dict[str, Any]:
    body = _json(_batch(1))
    body["inputs"][0] |= changes
    return body


@pytest.mark.parametrize(
    ("path", "request_", "status", "message"),
    [
        ("/v2/models/none/infer", {"json": {}}, 404, "no model is named 'none'; served are digits"),
        ("/v2/models/digits/versions/9/infer", {"json": _json(_batch(1))}, 404, "digits has version"),
        ("/v2/models/digits/infer", {"content": b"\x00"}, 400, "not JSON"),
        ("/v2/models/digits/infer", {"json": _wrong(name="x")}, 400, "inputs are x; the model takes images"),
        ("/v2/models/digits/infer", {"json": _wrong(datatype="FP64")}, 400, "images is FP64; the model takes FP32"),
        ("/v2/models/digits/infer", {"json": _wrong(shape=[1, 3, 1024])}, 400, r"takes \(N, 3, 32, 32\)"),
        ("/v2/models/digits/infer", {"json": _wrong(shape=[0, 3, 32, 32], data=[])}, 400, "empty batch"),
        ("/v2/models/digits/infer", {"json": _json(_batch(1), outputs=[{"name": "y"}])}, 400, "has no output 'y'"),
        (
            "/v2/models/digits/infer",
            {"json": _json(_batch(1), outputs=[{"name": "logits"}] * 2)},
            400,
            "outputs are logits, logits; name each once",
        ),
        (
            "/v2/models/digits/infer",
            {"content": b"abc", "headers": {"Inference-Header-Content-Length": "0"}},
            400,
            "3 bytes",
        ),
        (
            "/v2/models/digits/infer",
            {"json": {}, "headers": {"Inference-Header-Content-Length": "-1"}},
            400,
            "whole number",
        ),
        ("/v2/models/digits/infer", {"json": {}, "headers": {"Content-Encoding": "br"}}, 400, "'br'"),
        ("/v2/models/digits/infer", {"content": bytes((1 << 20) + 1)}, 413, "the server takes 1048576"),
        ("/v2/models/digits-image/infer", {"json": _json(_batch(1))}, 400, "takes one input, image"),
        (
            "/v2/models/digits-image/infer",
            {"content": b"no image", "headers": {"Inference-Header-Content-Length": "0"}},
            400,
            "not a readable image",
        ),
        ("/v2/models/digits-image-image/infer", {"json": {}}, 404, "no model"),
        ("/v2/models/digits/infe", {"json": {}}, 404, "no such path"),
        ("/v3", {"json": {}}, 404, "no such path"),
        ("/v2", {"json": {}}, 405, "Method Not Allowed"),
        ("/v2/repository/models/none/load", {}, 404, "no model"),
        (
            "/v2/repository/models/digits/load",
            {"json": {"parameters": {"config": "{}"}}},
            400,
            "config are not offered",
        ),
        (
            "/v2/repository/models/digits/unload",
            {"json": {"parameters": {"unload_dependents": True, "force": 1, "a": 1}}},
            400,
            "^parameters a, force are not offered$",
        ),
        (
            "/v2/repository/models/digits/unload",
            {"json": {"parameters": ["force"]}},
            400,
            "request: parameters must be an object",
        ),
    ],
)
def test_a_wrong_request_is_one_clear_error(
    client: TestClient, path: str, request_: dict[str, Any], status: int, message: str
) -> None:
    import re

    answer = client.post(path, **request_)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert re.search(message, answer.json()["error"])


def test_too_many_images_are_refused_before_they_are_decoded(client: TestClient) -> None:
    inputs = [{"name": "image", "shape": [65], "datatype": "BYTES", "data": ["AA=="] * 65}]
    answer = client.post("/v2/models/digits-image/infer", json={"inputs": inputs})
    assert (answer.status_code, answer.json()["error"]) == (400, "65 images; the model takes 1 to 64 at a time")


def test_a_deadline_in_the_past_is_504(client: TestClient) -> None:
    answer = client.post("/v2/models/digits/infer", json=_json(_batch(1), parameters={"timeout": 1}))
    assert answer.status_code == 504
    assert "deadline" in answer.json()["error"]


def test_request_ids_are_echoed_if_they_are_plain(client: TestClient) -> None:
    assert client.get("/v2", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/v2", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"
    assert len(client.get("/v2").headers["x-request-id"]) == 32


def test_counts_reach_prometheus_and_the_statistics(client: TestClient) -> None:
    for samples in (1, 3):
        assert client.post("/v2/models/digits/infer", json=_json(_batch(samples))).status_code == 200
    client.post("/v2/models/digits/infer", json=_wrong(name="x"))
    text = client.get("/metrics").text
    assert 'repmlp_requests_total{model="digits",outcome="ok"} 2.0' in text
    assert 'repmlp_requests_total{model="digits",outcome="bad"} 1.0' in text
    assert 'repmlp_batch_samples_sum{model="digits"} 4.0' in text
    assert 'repmlp_model_ready{model="digits"} 1.0' in text
    stats = client.get("/v2/models/stats").json()["model_stats"][0]
    assert (stats["name"], stats["inference_count"], stats["execution_count"]) == ("digits", 4, 2)
    assert stats["inference_stats"]["success"]["count"] == 2
    assert stats["inference_stats"]["success"]["ns"] > stats["inference_stats"]["compute_infer"]["ns"] > 0
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert {stats["inference_stats"][part]["count"] for part in parts} == {2}


def test_requests_that_the_network_never_sees_are_counted_too(client: TestClient) -> None:
    nan, plain = np.full((1, 3, 32, 32), np.nan, np.float32).tobytes(), {"Inference-Header-Content-Length": "0"}
    wrong: list[tuple[bytes, dict[str, str]]] = [
        (b"{", {}),
        (bytes((1 << 20) + 1), plain),
        (b"", {"Content-Encoding": "gzip"}),
        (b"{}", {"Inference-Header-Content-Length": "x"}),
        (nan, plain),  # its answer is no JSON
    ]
    for content, headers in wrong:
        assert client.post("/v2/models/digits/infer", content=content, headers=headers).status_code in (400, 413)
    _ask(client.app, "POST", "/v2/models/digits/infer", [{"type": "http.disconnect"}])
    text = client.get("/metrics").text
    for outcome, count in {"bad": len(wrong), "cancelled": 1, "ok": 0}.items():
        assert f'repmlp_requests_total{{model="digits",outcome="{outcome}"}} {count}.0' in text


def test_the_configuration_has_shapes_without_the_batch(client: TestClient) -> None:
    config = client.get("/v2/models/digits/config").json()
    assert config["max_batch_size"] == 16
    assert config["input"] == [{"name": "images", "data_type": "TYPE_FP32", "dims": [3, 32, 32]}]
    assert client.get("/v2/models/digits-image/config").json()["input"][0]["data_type"] == "TYPE_STRING"


def test_models_are_unloaded_and_loaded(client: TestClient) -> None:
    assert client.post("/v2/repository/models/digits/unload").status_code == 200
    assert client.get("/v2/models/digits/ready").status_code == 503
    assert client.post("/v2/models/digits/infer", json=_json(_batch(1))).status_code == 503
    assert client.get("/v2/health/ready").json() == {"ready": False, "models": {"digits": "it was unloaded"}}
    index = client.post("/v2/repository/index").json()
    assert index == [{"name": "digits", "version": "", "state": "UNAVAILABLE", "reason": "it was unloaded"}]
    assert client.post("/v2/repository/index", json={"ready": True}).json() == []
    assert client.post("/v2/repository/models/digits/load", json={}).status_code == 200
    assert client.post("/v2/models/digits/infer", json=_json(_batch(1))).status_code == 200
    assert client.post("/v2/repository/index", json={"ready": True}).json()[0]["state"] == "READY"


def test_loads_that_wait_keep_no_request_waiting(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    released, begun = threading.Event(), threading.Event()

    def load(_: ServedModel) -> bool:
        begun.set()
        return released.wait(30)

    monkeypatch.setattr(ServedModel, "load", load)
    with client, ThreadPoolExecutor(65) as pool:
        loads = [pool.submit(client.post, "/v2/repository/models/digits/load") for _ in range(64)]
        try:
            assert begun.wait(10)
            time.sleep(1)  # all of them have arrived
            content, headers = _binary(_batch(8))  # large enough to be decoded in a thread
            asked = pool.submit(client.post, "/v2/models/digits/infer", content=content, headers=headers)
            assert asked.result(10).status_code == 200
        finally:
            released.set()
    assert {load.result().status_code for load in loads} == {200}


def test_without_control_nothing_is_loaded_on_request(inference: Inference) -> None:
    from repmlp_deploy.serving.hosts.http import HttpOptions, create_app
    from repmlp_deploy.serving.watch import Library

    client = TestClient(create_app(inference, Library(inference.models), HttpOptions()))
    answer = client.post("/v2/repository/models/digits/unload")
    assert (answer.status_code, "--control" in answer.json()["error"]) == (403, True)
    assert client.get("/v2/models/digits/ready").status_code == 200


def test_a_runtime_that_fails_is_500_and_never_stays_ready(
    client: TestClient, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = models.find("digits")[0].version().served

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is gone\x1b[31m")

    monkeypatch.setattr(served.runner, "run_all", fail)
    answer = client.post("/v2/models/digits/infer", json=_json(_batch(1)))
    assert answer.status_code == 500
    assert answer.json()["error"] == "digits failed: the device is gone\\u001b[31m"
    assert client.get("/v2/health/ready").status_code == 503
    assert "the device is gone" in client.get("/v2/health/ready").json()["models"]["digits"]
    assert 'repmlp_model_ready{model="digits"} 0.0' in client.get("/metrics").text


def test_a_stopping_server_answers_what_it_has_taken(client: TestClient, models: Models) -> None:
    models.stopping = True
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/v2/health/ready").json() == {"ready": False, "reason": "the server stops"}
    assert client.get("/v2/models/digits/ready").json()["reason"] == "the server stops"
    assert client.post("/v2/models/digits/infer", json=_json(_batch(1))).status_code == 200


def test_a_defect_is_500_without_details(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Inference, "server", lambda _: 1 / 0)
    answer = client.get("/v2")
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error; the server's log says more"})
    assert "ZeroDivisionError" in caplog.text


def _ask(app: Any, method: str, path: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Send messages of ASGI to the application, as a host does, and return its answers."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent


def test_a_client_that_goes_while_it_sends_is_no_defect(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/v2/models/digits/infer", "/v2/repository/models/digits/load", "/v2/repository/index"):
        begun = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
        assert [message.get("status") for message in _ask(client.app, "POST", path, begun)] == [499, None]
    assert caplog.text == ""


def test_a_defect_is_logged_once(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a host sees as an exception it would log again."""
    monkeypatch.setattr(Inference, "server", lambda _: 1 / 0)
    assert _ask(client.app, "GET", "/v2", [{"type": "http.request", "body": b""}])[0]["status"] == 500
    assert [record.message for record in caplog.records] == ["defect"]


@pytest.mark.parametrize("samples", [1, 8])
def test_large_bodies_are_decoded_beside_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    loops: list[bool] = []

    def decode(body: bytes, header: int | None) -> InferRequest:
        try:
            asyncio.get_running_loop()
            loops.append(True)
        except RuntimeError:
            loops.append(False)
        return decode_request(body, header)

    monkeypatch.setattr(http, "decode_request", decode)
    content, headers = _binary(_batch(samples))
    assert client.post("/v2/models/digits/infer", content=content, headers=headers).status_code == 200
    assert loops == [samples == 1]


def test_the_queue_is_empty_when_nobody_waits(client: TestClient) -> None:
    assert client.post("/v2/models/digits/infer", json=_json(_batch(2))).status_code == 200
    assert 'repmlp_queue_samples{model="digits"} 0.0' in client.get("/metrics").text


def test_a_shape_without_values_is_the_callers_fault(client: TestClient) -> None:
    item = {"name": "images", "datatype": "FP32", "shape": [0, 1 << 40, 1 << 40], "data": []}
    answer = client.post("/v2/models/digits/infer", json={"inputs": [item]})
    assert (answer.status_code, "is too large" in answer.json()["error"]) == (400, True)
