"""The protocol over gRPC, by a channel of its own and the messages of our own pool."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import repmlp_deploy.serving.hosts.messages as our_messages
from repmlp_deploy import Bundle
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.serving.hosts.messages import SERVICE, message, service
from support.serving import Server, running_server


@pytest.fixture(scope="module")
def server(_exported: Path) -> Iterator[Server]:
    with running_server(f"digits={_exported}", "--format", "onnx", "--control", "--body-mb", "1", grpc=True) as made:
        made.wait_until_ready()
        yield made


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc, options=[("grpc.max_receive_message_length", -1)]) as made:
        yield made


def _call(channel: grpc.Channel, method: str, timeout: float = 30, **fields: Any) -> Any:
    described = service().methods_by_name[method]
    return _send(channel, method, message(described.input_type.name)(**fields), timeout)


def _send(channel: grpc.Channel, method: str, request: Any, timeout: float = 30) -> Any:
    answer = message(service().methods_by_name[method].output_type.name)
    call = channel.unary_unary(f"/{SERVICE}/{method}", lambda m: m.SerializeToString(), answer.FromString)
    return call(request, timeout=timeout)


def _batch(samples: int = 2) -> np.ndarray:
    return np.random.default_rng(samples).normal(size=(samples, 3, 32, 32)).astype(np.float32)


def _request(batch: np.ndarray, **changes: Any) -> Any:
    tensor = {"name": "images", "datatype": "FP32", "shape": batch.shape} | changes.pop("tensor", {})
    raws = changes.pop("raws", [batch.tobytes()])
    return message("ModelInferRequest")(
        **{"model_name": "digits", "inputs": [tensor], "raw_input_contents": raws} | changes
    )


def _logits(answer: Any) -> np.ndarray:
    at = [output.name for output in answer.outputs].index("logits")
    return np.frombuffer(answer.raw_output_contents[at], np.float32).reshape(answer.outputs[at].shape)


def test_the_compiled_description_is_that_of_the_proto_file(tmp_path: Path) -> None:
    from grpc_tools import protoc

    folder = Path(our_messages.__file__).parent
    out = tmp_path / "inference.binpb"
    arguments = ["protoc", f"-I{folder}", "--include_imports", f"--descriptor_set_out={out}", "inference.proto"]
    assert protoc.main(arguments) == 0
    fresh, stored = (FileDescriptorSet.FromString(p.read_bytes()) for p in (out, folder / "inference.binpb"))
    assert fresh == stored


def test_the_server_and_its_models_describe_themselves(channel: grpc.Channel) -> None:
    assert _call(channel, "ServerLive").live
    assert _call(channel, "ServerReady").ready
    assert _call(channel, "ServerMetadata").name == "repmlp-serve"
    assert _call(channel, "ModelReady", name="digits").ready
    assert not _call(channel, "ModelReady", name="none").ready
    metadata = _call(channel, "ModelMetadata", name="digits")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("images", "FP32", [-1, 3, 32, 32])]
    config = _call(channel, "ModelConfig", name="digits").config
    assert (config.max_batch_size, list(config.input[0].dims), config.input[0].data_type) == (16, [3, 32, 32], 11)


def test_raw_contents_give_the_logits_of_the_predictor(channel: grpc.Channel, predictor: Predictor) -> None:
    batch = _batch(3)
    answer = _send(channel, "ModelInfer", _request(batch, id="q"))
    assert (answer.id, answer.model_name) == ("q", "digits")
    assert (_logits(answer) == predictor.logits(batch)).all()
    version = answer.model_version
    assert (_logits(_send(channel, "ModelInfer", _request(batch, model_version=version))) == _logits(answer)).all()


def test_typed_contents_give_the_logits_of_the_predictor(channel: grpc.Channel, predictor: Predictor) -> None:
    batch = _batch(1)
    tensor = {"contents": {"fp32_contents": batch.reshape(-1).tolist()}}
    answer = _send(channel, "ModelInfer", _request(batch, raws=[], tensor=tensor))
    assert (_logits(answer) == predictor.logits(batch)).all()


@pytest.mark.parametrize("raw", [True, False])
def test_images_give_the_predictions_of_the_predictor(
    channel: grpc.Channel, predictor: Predictor, digit_files: list[Path], raw: bool
) -> None:
    elements = [path.read_bytes() for path in digit_files[:4]]
    joined = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    tensor = {"name": "image", "datatype": "BYTES", "shape": [4]}
    tensor |= {} if raw else {"contents": {"bytes_contents": elements}}
    request = _request(_batch(), model_name="digits-image", tensor=tensor, raws=[joined] if raw else [])
    answer = _send(channel, "ModelInfer", request)
    names = [output.name for output in answer.outputs]
    index = np.frombuffer(answer.raw_output_contents[names.index("index")], np.int64)
    assert index.tolist() == [predictor(element).pred_label for element in elements]


@pytest.mark.parametrize(
    ("changes", "code", "message_"),
    [
        ({"model_name": "none"}, "NOT_FOUND", "no model is named 'none'"),
        ({"model_version": "7"}, "NOT_FOUND", "digits has version"),
        ({"raws": [b"1"]}, "INVALID_ARGUMENT", "1 bytes; shape"),
        ({"raws": [b"1", b"2"]}, "INVALID_ARGUMENT", "2 raw_input_contents for 1 inputs"),
        ({"inputs": []}, "INVALID_ARGUMENT", "no inputs"),
        ({"tensor": {"shape": [-1, 3]}}, "INVALID_ARGUMENT", "whole numbers from 0"),
        ({"tensor": {"datatype": "FP8"}}, "INVALID_ARGUMENT", "no datatype 'FP8'"),
        ({"raws": [], "tensor": {"datatype": "FP16"}}, "INVALID_ARGUMENT", "contents carry"),
        ({"raws": [], "tensor": {"contents": {"fp32_contents": [1]}}}, "INVALID_ARGUMENT", "1 values; shape"),
        ({"tensor": {"contents": {"fp32_contents": [1]}}}, "INVALID_ARGUMENT", "exclude each other"),
        (
            {"raws": [], "tensor": {"datatype": "INT8", "shape": [1], "contents": {"int_contents": [300]}}},
            "INVALID_ARGUMENT",
            "outside the range of INT8",
        ),
        ({"outputs": [{"name": "y"}]}, "INVALID_ARGUMENT", "has no output 'y'"),
        (
            {"outputs": [{"name": "logits", "parameters": {"classification": {"int64_param": 3}}}]},
            "INVALID_ARGUMENT",
            "classification is not offered",
        ),
        ({"parameters": {"timeout": {"string_param": "x"}}}, "INVALID_ARGUMENT", "microseconds"),
        ({"parameters": {"timeout": {"int64_param": 1}}}, "DEADLINE_EXCEEDED", "deadline"),
        ({"raws": [bytes(2 << 20)]}, "RESOURCE_EXHAUSTED", "larger than max"),
    ],
)
def test_a_wrong_request_is_one_clear_error(
    channel: grpc.Channel, changes: dict[str, Any], code: str, message_: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        _send(channel, "ModelInfer", _request(_batch(), **changes))
    assert (caught.value.code().name, message_ in caught.value.details()) == (code, True), caught.value.details()


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_only_unknown_parameters_are_named(channel: grpc.Channel, method: str) -> None:
    parameters = {name: {"bool_param": True} for name in ("unload_dependents", "force", "a")}
    with pytest.raises(grpc.RpcError) as caught:
        _call(channel, method, model_name="digits", parameters=parameters)
    assert caught.value.details() == "parameters a, force are not offered"


def test_bytes_that_are_no_message_are_the_callers_fault(channel: grpc.Channel) -> None:
    call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    for junk in (b"\xff" * 50, b"\x0a\x03abc", b"\x2a\x00"):
        with pytest.raises(grpc.RpcError) as caught:
            call(junk, timeout=10)
        assert caught.value.code().name in ("INVALID_ARGUMENT", "NOT_FOUND")
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/ModelStreamInfer")(b"", timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_health_and_reflection_are_served(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE, "digits", "digits-image"):
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest
    listed, found = stub.ServerReflectionInfo(
        iter([request(list_services=""), request(file_containing_symbol=SERVICE)])
    )
    names = {entry.name for entry in listed.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert len(found.file_descriptor_response.file_descriptor_proto) == 1


def test_loading_and_unloading_reach_the_health_service(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert _call(channel, "RepositoryIndex").models[0].state == "READY"
    _call(channel, "RepositoryModelUnload", model_name="digits")
    watched = health.Watch(health_pb2.HealthCheckRequest(service="digits"), timeout=10)
    assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watched.cancel()
    assert list(_call(channel, "RepositoryIndex", ready=True).models) == []
    with pytest.raises(grpc.RpcError, match="it was unloaded") as caught:
        _send(channel, "ModelInfer", _request(_batch()))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    _call(channel, "RepositoryModelLoad", model_name="digits")
    assert _call(channel, "ServerReady").ready
    assert _call(channel, "ModelStatistics", name="digits").model_stats[0].name == "digits"


def test_a_call_under_way_is_answered_after_sigterm(bundle: Bundle, predictor: Predictor) -> None:
    with running_server(f"digits={bundle.folder}", "--format", "onnx", grpc=True) as server:
        server.wait_until_ready()
        batch = _batch(1500)
        with grpc.insecure_channel(server.grpc) as channel:
            future = channel.unary_unary(f"/{SERVICE}/ModelInfer", lambda m: m.SerializeToString()).future(
                _request(batch), timeout=30
            )
            time.sleep(0.15)
            assert server.terminate() == 0
            answer = message("ModelInferResponse").FromString(future.result())
        assert (_logits(answer) == predictor.logits(batch)).all()


def test_health_and_the_log_follow_models_and_calls(bundle_folder: Path, tmp_path: Path) -> None:
    """A model that is gone is unknown, and every call is a line."""
    library = tmp_path / "library"
    for name in ("a", "b"):
        shutil.copytree(bundle_folder, library / name)
    options = ("--watch-seconds", "0.1", "--format", "onnx", "--log-requests", "--log-format", "json")
    with running_server("--watch", library, *options, grpc=True) as server:
        server.wait_until_ready()
        with grpc.insecure_channel(server.grpc) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            def status(name: str) -> int:
                try:
                    return int(health.Check(health_pb2.HealthCheckRequest(service=name)).status)
                except grpc.RpcError as error:
                    return -1 if error.code() == grpc.StatusCode.NOT_FOUND else -2

            assert [status("a"), status("a-image")] == [1, 1]
            shutil.rmtree(library / "a")
            end = time.monotonic() + 10
            while [status("a"), status("a-image")] != [-1, -1]:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert status("b") == 1
            assert _call(channel, "ModelReady", name="b").ready
            with pytest.raises(grpc.RpcError):
                _call(channel, "ModelMetadata", name="a")
        assert server.terminate() == 0
    lines = [json.loads(line) for line in server.text.splitlines()]
    told = [(line["method"], line["status"]) for line in lines if line["message"] == "request" and "path" not in line]
    assert told == [("ModelReady", "OK"), ("ModelMetadata", "NOT_FOUND")]
