"""Bodies of HTTP: what they say is read exactly, and what is no request is one clear error."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repmlp_deploy.serving.codec import decode_base64, decode_request, encode_response, parse_json, timeout_of
from repmlp_deploy.serving.protocol import BadRequest, InferRequest, InferResponse, RequestedOutput, Tensor


def _body(**changes: Any) -> bytes:
    item = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2.5, -3, 4]} | changes
    return json.dumps({"inputs": [{k: v for k, v in item.items() if v is not None}]}).encode()


def test_json_is_read() -> None:
    body = json.dumps(
        {
            "id": "a1",
            "parameters": {"timeout": 1500, "binary_data_output": True},
            "inputs": [{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2.5], [-3, 4]]}],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}, {"name": "z"}],
        }
    ).encode()
    request = decode_request(body, None)
    assert (request.id, request.timeout, request.binary) == ("a1", 0.0015, True)
    assert request.outputs == [RequestedOutput("y", binary=True), RequestedOutput("z")]
    tensor = request.inputs[0]
    assert (tensor.name, tensor.data.dtype, tensor.data.tolist()) == ("x", np.float32, [[1, 2.5], [-3, 4]])


@pytest.mark.parametrize(
    ("datatype", "data", "value"),
    [
        ("BOOL", [True, False], [True, False]),
        ("UINT8", [0, 255], [0, 255]),
        ("INT64", [-(2**63), 2**63 - 1], [-(2**63), 2**63 - 1]),
        ("UINT64", [0, 2**64 - 1], [0, 2**64 - 1]),
        ("FP64", [1e300, 5], [1e300, 5.0]),
        ("BYTES", ["ä", ""], ["ä".encode(), b""]),
        ("BYTES", [["ä"], [""]], ["ä".encode(), b""]),
    ],
)
def test_every_datatype_of_json_is_exact(datatype: str, data: list[Any], value: list[Any]) -> None:
    request = decode_request(_body(datatype=datatype, data=data, shape=[2]), None)
    assert request.inputs[0].data.tolist() == value


def test_raw_tensors_follow_the_json_in_its_order() -> None:
    first, second = np.arange(4, dtype=np.float32), np.array([7], np.int64)
    items = [
        {"name": "a", "shape": [4], "datatype": "FP32", "parameters": {"binary_data_size": 16}},
        {"name": "b", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}},
    ]
    header = json.dumps({"inputs": items}).encode()
    request = decode_request(header + first.tobytes() + second.tobytes(), len(header))
    assert [tensor.data.tolist() for tensor in request.inputs] == [[0, 1, 2, 3], [7]]


def test_a_body_without_a_header_is_one_raw_input() -> None:
    assert decode_request(b"abc", 0).raw == b"abc"


@pytest.mark.parametrize(
    ("body", "header", "message"),
    [
        (b"", None, "not JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"{}", None, "no inputs"),
        (b"\xff{", None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b'{"inputs": [NaN]}', None, "not JSON"),
        (b"{}", 3, "Content-Length is 3; the body has 2"),
        (b'{"inputs": {}}', None, "inputs must be a list"),
        (b'{"inputs": [1]}', None, "inputs must be a list of at most"),
        (b'{"inputs": [{}]}', None, "an input has no name"),
        (json.dumps({"inputs": [{}] * 300}).encode(), None, "at most 256"),
        (_body(shape=None), None, "x: shape must be a list"),
        (_body(shape=[3]), None, r"4 values; shape \[3\] has 3"),
        (_body(datatype=None), None, "datatype must be a string"),
        (_body(datatype="FP16"), None, "send raw bytes"),
        (_body(datatype="complex"), None, "not 'complex'"),
        (_body(data=None), None, "data must be a list"),
        (_body(data=["1", "2", "3", "4"]), None, "does not hold FP32 values only"),
        (_body(data=[1, [2, 3], 4]), None, "data is no array"),
        (_body(data=[1, 2, 3, 1e39]), None, "outside the range of FP32"),
        (_body(data=[1, 2, 3, 10**400]), None, "outside the range of FP32"),
        (_body(data=[[1, 2], [3, 4, 5]], shape=[5]), None, "data is no array"),
        (_body(datatype="UINT64", data=[[2**63], [1, 2]], shape=[3]), None, "data is no array"),
        (_body(datatype="INT64", data=[[2**70, 1], []], shape=[2]), None, "data is no array|outside the range"),
        (_body(data=[True, 1.0, 2, 3]), None, "does not hold FP32 values only"),
        (_body(datatype="INT64", data=[1, 2, 3, 2**63]), None, "outside the range of INT64"),
        (_body(datatype="UINT64", data=[1, 2, 3, -1]), None, "outside the range of UINT64"),
        (_body(datatype="UINT8", data=[1, 2, 3, 256]), None, "outside the range of UINT8"),
        (_body(datatype="UINT8", data=[1, 2, 3, -1]), None, "outside the range of UINT8"),
        (_body(datatype="INT8", data=[1, 2, 3, 4.5]), None, "does not hold INT8 values only"),
        (_body(datatype="BYTES", data=["a", 1, "b", "c"]), None, "must hold 4 strings"),
        (_body(parameters={"binary_data_size": 8}, data=None), None, "0 bytes are left"),
        (_body(parameters={"binary_data_size": -1}, data=None), None, "binary_data_size is -1"),
        (_body(parameters={"shared_memory_region": "r"}), None, "shared memory is not offered"),
        (_body(parameters=[1]), None, "parameters must be an object"),
        (json.dumps({"id": 1, **json.loads(_body())}).encode(), None, "id must be a string"),
        (json.dumps({"parameters": {"timeout": "1"}, **json.loads(_body())}).encode(), None, "microseconds"),
        (json.dumps({"parameters": {"binary_data_output": 1}, **json.loads(_body())}).encode(), None, "true or false"),
        (json.dumps({"outputs": [{}], **json.loads(_body())}).encode(), None, "an output has no name"),
        (
            json.dumps(
                {"outputs": [{"name": "y", "parameters": {"classification": 3}}], **json.loads(_body())}
            ).encode(),
            None,
            "classification is not offered",
        ),
        (_body() + b"more", len(_body()), "4 bytes follow"),
    ],
)
def test_what_is_no_request_is_one_clear_error(body: bytes, header: int | None, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        decode_request(body, header)


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 250)))
@settings(max_examples=300, deadline=None)
def test_no_body_raises_anything_else(body: bytes, header: int | None) -> None:
    with contextlib.suppress(BadRequest):
        decode_request(body, header)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "data", "shape"]), inner),
    max_leaves=12,
)


@given(
    name=_JSON, shape=_JSON, datatype=st.sampled_from(["FP32", "BYTES", "INT8", "BOOL"]) | _JSON, data=_JSON,
    parameters=_JSON, rest=st.binary(max_size=8),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_no_description_raises_anything_else(**parts: Any) -> None:
    rest = parts.pop("rest")
    header = json.dumps({"inputs": [parts], "parameters": parts["parameters"]}).encode()
    with contextlib.suppress(BadRequest):
        decode_request(header + rest, len(header))


def test_an_answer_is_json_or_json_and_raw_tensors() -> None:
    values = np.array([[0.1, 2]], np.float32)
    texts = np.empty(1, object)
    texts[:] = ["ä".encode()]
    answer = InferResponse("m", "v", [Tensor("y", "FP32", values), Tensor("t", "BYTES", texts)], "7")
    body, length = encode_response(answer, InferRequest())
    said = json.loads(body)
    assert length is None
    assert (said["model_name"], said["model_version"], said["id"]) == ("m", "v", "7")
    assert np.array(said["outputs"][0]["data"], np.float32).tolist() == values[0].tolist()
    assert said["outputs"][1]["data"] == ["ä"]
    body, length = encode_response(answer, InferRequest(outputs=[RequestedOutput("y", binary=True)], binary=False))
    said = json.loads(body[:length])
    assert said["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert body[length:] == values.tobytes()
    body, length = encode_response(answer, InferRequest(binary=True))
    assert body[length:] == values.tobytes() + b"\x02\x00\x00\x00" + "ä".encode()


def test_encoded_bytes_travel_as_base64_in_json() -> None:
    element = np.empty(1, object)
    element[:] = [b"\x89PNG"]
    body, _ = encode_response(InferResponse("m", "v", [Tensor("mask", "BYTES", element, encoded=True)]), InferRequest())
    said = json.loads(body)["outputs"][0]
    assert (said["data"], said["parameters"]) == (["iVBORw=="], {"content_type": "base64"})
    request = decode_request(_body(datatype="BYTES", data=said["data"], shape=[1]), None)
    assert decode_base64(request.inputs[0]).data.tolist() == [b"\x89PNG"]
    with pytest.raises(BadRequest, match="element 0 is not base64"):
        decode_base64(decode_request(_body(datatype="BYTES", data=["?"], shape=[1]), None).inputs[0])


def test_json_cannot_carry_what_is_no_number() -> None:
    answer = InferResponse("m", "v", [Tensor("y", "FP32", np.array([np.nan], np.float32))])
    with pytest.raises(BadRequest, match="ask for raw bytes"):
        encode_response(answer, InferRequest())
    assert encode_response(answer, InferRequest(binary=True))[1] is not None


def test_strings_for_numbers_cost_no_more_than_their_body() -> None:
    """NumPy would make each as long as the longest: 1.6 GB here."""
    body = _body(data=["a" * 2000, *[""] * 200_000], shape=[1])
    tracemalloc.start()
    with pytest.raises(BadRequest, match="does not hold FP32 values only"):
        decode_request(body, None)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 * len(body)


def test_null_says_as_little_as_nothing() -> None:
    given = json.loads(_body()) | {"id": None, "outputs": None, "parameters": []}
    request = decode_request(json.dumps(given).encode(), None)
    assert (request.id, list(request.outputs)) == ("", [])


def test_a_million_nested_lists_are_no_work() -> None:
    body = _body(datatype="BYTES", shape=[1], data=[["a"] * 50_000])
    with pytest.raises(BadRequest, match="must hold 1 strings"):
        decode_request(body, None)
    assert parse_json(b'{"a": 1}') == {"a": 1}
    assert timeout_of({"timeout": 0}) is None


@pytest.mark.parametrize("small", [b"[]", b"[1]", b"{}"])
def test_a_body_of_many_small_lists_is_not_read(small: bytes) -> None:
    body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [' + small
    with pytest.raises(BadRequest, match="more than 2097152 lists and objects; send data as one flat list"):
        decode_request(body + (b"," + small) * (1 << 21) + b"]}]}", None)
