"""Bodies of HTTP: JSON, and JSON followed by raw tensors, as the protocol's binary tensor extension has it."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pydantic_core
from numpy.typing import NDArray

from repmlp_deploy.serving.protocol import (
    DATATYPES,
    MAX_AXES,
    BadRequest,
    InferRequest,
    InferResponse,
    RequestedOutput,
    Tensor,
    byte_array,
    check_bytes_count,
    check_shape,
    is_within,
    tensor_from_raw,
    tensor_to_raw,
)

__all__ = [
    "MAX_TENSORS",
    "decode_base64",
    "decode_request",
    "encode_response",
    "parameters_of",
    "parse_json",
    "timeout_of",
]

_KINDS: Mapping[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}
"""The types of JSON's values, by the kind of NumPy's type."""
_WIDEST: Mapping[str, type] = {"b": bool, "u": np.uint64, "i": np.int64, "f": np.float64}
MAX_TENSORS = 256
_MAX_LISTS = 1 << 21  # with objects; a million takes a second, in which the interpreter does nothing else
_MAX_ID = 1024
_MICROSECONDS = 1e6


def parse_json(body: bytes | memoryview) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        BadRequest: it is something else.
    """
    text = bytes(body)
    if text.count(b"[") + text.count(b"{") > _MAX_LISTS:
        raise BadRequest(
            f"the body has more than {_MAX_LISTS} lists and objects; send data as one flat list, or as raw bytes"
        )
    try:
        data = pydantic_core.from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadRequest("the body must be a JSON object")
    return data


def decode_request(body: bytes, header_length: int | None) -> InferRequest:
    """Return the request in a body.

    Args:
        body: JSON, or JSON and the raw tensors that it describes.
        header_length: bytes of JSON at its start; None for all of it, 0 for a body that is one raw input.

    Raises:
        BadRequest: it is no request.
    """
    if header_length == 0:
        return InferRequest(raw=body)
    if header_length is not None and not 0 < header_length <= len(body):
        raise BadRequest(f"Inference-Header-Content-Length is {header_length}; the body has {len(body)} bytes")
    view = memoryview(body)
    end = len(body) if header_length is None else header_length
    data, rest = parse_json(view[:end]), view[end:]
    parameters = parameters_of(data, "request")
    inputs, used = [], 0
    for item in _items(data, "inputs"):
        tensor, size = _input(item, rest[used:])
        inputs.append(tensor)
        used += size
    if used != len(rest):
        raise BadRequest(f"{len(rest) - used} bytes follow the inputs that the header describes")
    if not inputs:
        raise BadRequest("the request has no inputs")
    outputs = [_output(item) for item in _items(data, "outputs")]
    return InferRequest(inputs, outputs, _flag(parameters, "binary_data_output"), _id(data), timeout_of(parameters))


def timeout_of(parameters: Mapping[str, Any]) -> float | None:
    """Return the seconds in `timeout`, which is in microseconds; 0 and none mean no limit of the caller's."""
    timeout = parameters.get("timeout", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        raise BadRequest("timeout must be a whole number of microseconds")
    return min(timeout, 10**12) / _MICROSECONDS if timeout else None


def encode_response(response: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON where raw tensors follow it, else None.

    Raises:
        BadRequest: a value that JSON cannot carry was asked for as JSON.
    """
    binary = {output.name: output.binary for output in request.outputs}
    described: list[dict[str, Any]] = []
    raws: list[bytes] = []
    for tensor in response.outputs:
        item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.data.shape)}
        if binary.get(tensor.name, request.binary):
            raws.append(tensor_to_raw(tensor))
            item["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            item |= _as_json(tensor)
        described.append(item)
    data: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        data["id"] = response.id
    if response.parameters:
        data["parameters"] = dict(response.parameters)
    header = pydantic_core.to_json(data | {"outputs": described})
    return (b"".join([header, *raws]), len(header)) if raws else (header, None)


def _given(data: Mapping[str, Any], key: str, otherwise: object) -> Any:
    """Return a value; JSON's null says as little as a key that is not there."""
    value = data.get(key)
    return otherwise if value is None else value


def _items(data: Mapping[str, Any], key: str) -> Sequence[dict[str, Any]]:
    items = _given(data, key, [])
    if not isinstance(items, list) or len(items) > MAX_TENSORS or not all(isinstance(item, dict) for item in items):
        raise BadRequest(f"{key} must be a list of at most {MAX_TENSORS} objects")
    return items


def parameters_of(data: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the parameters of a part of a request; raise BadRequest if they are no object."""
    parameters = data.get("parameters") or {}  # some clients write an empty object as an empty list
    if not isinstance(parameters, dict):
        raise BadRequest(f"{what}: parameters must be an object")
    return parameters


def _flag(parameters: Mapping[str, Any], key: str) -> bool:
    value = parameters.get(key, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false")
    return value


def _id(data: Mapping[str, Any]) -> str:
    given = _given(data, "id", "")
    if not isinstance(given, str) or len(given) > _MAX_ID:
        raise BadRequest(f"id must be a string of at most {_MAX_ID} characters")
    return given


def _name(item: Mapping[str, Any], what: str) -> str:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise BadRequest(f"an {what} has no name")
    return name


def _output(item: Mapping[str, Any]) -> RequestedOutput:
    name = _name(item, "output")
    parameters = parameters_of(item, name)
    for key in ("classification", "shared_memory_region"):
        if key in parameters:
            raise BadRequest(f"output {name}: {key} is not offered")
    return RequestedOutput(name, _flag(parameters, "binary_data"))


def _input(item: Mapping[str, Any], rest: memoryview) -> tuple[Tensor, int]:
    """Return an input, and how many of the raw bytes are its own."""
    name = _name(item, "input")
    shape = check_shape(name, item.get("shape"))
    datatype, parameters = item.get("datatype"), parameters_of(item, name)
    if not isinstance(datatype, str):
        raise BadRequest(f"{name}: datatype must be a string")
    if "shared_memory_region" in parameters:
        raise BadRequest(f"input {name}: shared memory is not offered")
    if "binary_data_size" not in parameters:
        return Tensor(name, datatype, _from_json(name, datatype, shape, item.get("data"))), 0
    size = parameters["binary_data_size"]
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest):
        raise BadRequest(f"{name}: binary_data_size is {size!r}; {len(rest)} bytes are left")
    if "data" in item:
        raise BadRequest(f"{name}: data and binary_data_size exclude each other")
    return tensor_from_raw(name, datatype, shape, rest[:size]), size


def _from_json(name: str, datatype: str, shape: tuple[int, ...], data: object) -> NDArray[Any]:
    """Return the array in nested or flat lists."""
    if not isinstance(data, list):
        raise BadRequest(f"{name}: data must be a list")
    if datatype == "BYTES":
        return _texts(name, shape, data)
    if datatype not in DATATYPES or datatype == "FP16":
        carried = ", ".join(known for known in DATATYPES if known != "FP16")
        raise BadRequest(f"{name}: JSON carries {carried} and BYTES, not {datatype!r}; send raw bytes")
    wanted, flat = np.dtype(DATATYPES[datatype]), _flattened(data)
    kinds = set(map(type, flat))  # before NumPy sees them: it would make every string as long as the longest
    if list in kinds:
        raise BadRequest(f"{name}: data is no array")
    if kinds - _KINDS[wanted.kind]:
        raise BadRequest(f"{name}: data does not hold {datatype} values only")
    if len(flat) != math.prod(shape):
        raise BadRequest(f"{name}: {len(flat)} values; shape {list(shape)} has {math.prod(shape)}")
    try:
        given = _widest(data, flat, wanted.kind)
    except ValueError:  # lists of several lengths
        raise BadRequest(f"{name}: data is no array") from None
    if given is None or not is_within(given, wanted):
        raise BadRequest(f"{name}: a value is outside the range of {datatype}")
    return given.astype(wanted).reshape(shape)


def _widest(data: list[Any], flat: list[Any], kind: str) -> NDArray[Any] | None:
    """Return the values in the widest type of a kind; None if one is beyond it."""
    if kind == "u" and min(flat, default=0) < 0:  # NumPy 1 wraps it
        return None
    try:
        return np.asarray(data, _WIDEST[kind])
    except OverflowError:
        return None


def _texts(name: str, shape: tuple[int, ...], data: list[Any]) -> NDArray[Any]:
    """Return BYTES from JSON: text, which a model that wants encoded bytes reads as base64."""
    flat = _flattened(data)
    check_bytes_count(name, len(flat))
    if len(flat) != math.prod(shape) or not all(isinstance(text, str) for text in flat):
        raise BadRequest(f"{name}: data must hold {math.prod(shape)} strings")
    return byte_array([text.encode() for text in flat]).reshape(shape)


def _flattened(data: list[Any]) -> list[Any]:
    """Return the values in lists of lists; lists among them where they are no array of a few axes."""
    for _ in range(MAX_AXES):
        if not data or set(map(type, data)) != {list}:
            break
        data = list(chain.from_iterable(data))
    return data


def decode_base64(tensor: Tensor) -> Tensor:
    """Return BYTES that came as JSON, decoded; raw ones as they are.

    Raises:
        BadRequest: it is not base64.
    """
    if tensor.encoded:
        return tensor
    elements = np.empty(tensor.data.size, object)
    for i, text in enumerate(tensor.data.reshape(-1)):
        try:
            elements[i] = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            said = "JSON carries them as base64; or send raw bytes"
            raise BadRequest(f"{tensor.name}: element {i} is not base64: {said}") from None
    return Tensor(tensor.name, tensor.datatype, elements.reshape(tensor.data.shape), encoded=True)


def _as_json(tensor: Tensor) -> dict[str, Any]:
    """Return what JSON says of a tensor's values."""
    if tensor.datatype == "BYTES":
        elements = tensor.data.reshape(-1)
        if tensor.encoded:
            texts = [base64.b64encode(element).decode() for element in elements]
            return {"data": texts, "parameters": {"content_type": "base64"}}
        return {"data": [element.decode("utf-8", "replace") for element in elements]}
    if tensor.data.dtype.kind == "f" and not np.isfinite(tensor.data).all():
        raise BadRequest(f"{tensor.name} holds values that are no JSON numbers; ask for raw bytes")
    return {"data": tensor.data.reshape(-1).tolist()}
