"""The Open Inference Protocol, version 2: its tensors, requests, answers and errors, apart from any transport."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.errors import RepMLPError

__all__ = [
    "DATATYPES",
    "MAX_AXES",
    "BadRequest",
    "Failed",
    "Forbidden",
    "InferRequest",
    "InferResponse",
    "NotReady",
    "Overloaded",
    "RequestedOutput",
    "ServingError",
    "Tensor",
    "TensorMetadata",
    "TooLarge",
    "TooLate",
    "UnknownModel",
    "byte_array",
    "check_bytes_count",
    "check_shape",
    "datatype_of",
    "is_within",
    "tensor_from_raw",
    "tensor_to_raw",
]


class ServingError(RepMLPError):
    """A request that gets no answer; `status` is HTTP's, `code` the name of gRPC's."""

    status = 500
    code = "INTERNAL"


class BadRequest(ServingError):
    """The request says something that it must not say."""

    status, code = 400, "INVALID_ARGUMENT"


class Forbidden(ServingError):
    """The server was started without this ability."""

    status, code = 403, "PERMISSION_DENIED"


class UnknownModel(ServingError):
    """No model, or no version of it, has this name."""

    status, code = 404, "NOT_FOUND"


class TooLarge(ServingError):
    """The body is larger than the server takes."""

    status, code = 413, "RESOURCE_EXHAUSTED"


class Overloaded(ServingError):
    """Too many requests wait. RESOURCE_EXHAUSTED, since KServe's client repeats what is UNAVAILABLE at once."""

    status, code = 503, "RESOURCE_EXHAUSTED"


class NotReady(ServingError):
    """The model is loading, or has failed its check, or the server stops."""

    status, code = 503, "UNAVAILABLE"


class TooLate(ServingError):
    """The deadline passed."""

    status, code = 504, "DEADLINE_EXCEEDED"


class Failed(ServingError):
    """The runtime failed."""


DATATYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "UINT8": "uint8",
        "UINT16": "uint16",
        "UINT32": "uint32",
        "UINT64": "uint64",
        "INT8": "int8",
        "INT16": "int16",
        "INT32": "int32",
        "INT64": "int64",
        "FP16": "float16",
        "FP32": "float32",
        "FP64": "float64",
    }
)
"""The protocol's datatypes that NumPy has. BF16 travels as raw bytes and becomes float32; BYTES is an object array."""

MAX_AXES = 8
MAX_ELEMENTS = 1 << 40
_MAX_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named array.

    Attributes:
        name: of the input or output.
        datatype: of the protocol.
        data: (…) of the shape; `bytes` objects for BYTES.
        encoded: BYTES that are no text: base64 where they travel as JSON.
    """

    name: str
    datatype: str
    data: NDArray[Any]
    encoded: bool = False


@dataclass(frozen=True)
class TensorMetadata:
    """What a model says of an input or output; -1 is an axis of any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the protocol's form."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class RequestedOutput:
    """An output that the caller wants, and whether as raw bytes."""

    name: str
    binary: bool = False


@dataclass(frozen=True)
class InferRequest:
    """What a caller asks.

    Attributes:
        inputs: in the caller's order.
        outputs: what is wanted; empty for everything.
        binary: whether outputs that were not named travel as raw bytes.
        id: echoed.
        timeout: seconds that the caller waits at most, or None.
        raw: a body without any description: the only input's bytes.
    """

    inputs: Sequence[Tensor] = ()
    outputs: Sequence[RequestedOutput] = ()
    binary: bool = False
    id: str = ""
    timeout: float | None = None
    raw: bytes | memoryview | None = None


@dataclass(frozen=True)
class InferResponse:
    """What the model answers."""

    model: str
    version: str
    outputs: Sequence[Tensor]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def datatype_of(dtype: str) -> str:
    """Return the protocol's name of a NumPy dtype."""
    return next(name for name, known in DATATYPES.items() if known == dtype)


def byte_array(elements: Sequence[bytes]) -> NDArray[Any]:
    """Return BYTES as an array (N,) of objects, which NumPy makes of a list only when it is told to."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def is_within(values: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Return whether every value lies in the range of a type."""
    if not values.size or dtype.kind == "b":
        return True
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    number = float if dtype.kind == "f" else int
    return number(limits.min) <= number(values.min()) and number(values.max()) <= number(limits.max)


def check_bytes_count(name: str, count: int) -> None:
    """Raise BadRequest if a tensor has more BYTES elements than any model takes, each an object of its own."""
    if count > _MAX_BYTES:
        raise BadRequest(f"{name}: {count} BYTES elements; a tensor has at most {_MAX_BYTES}")


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """Return the shape if it is one.

    Raises:
        BadRequest: it is no list of a few lengths.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) > MAX_AXES:
        raise BadRequest(f"{name}: shape must be a list of at most {MAX_AXES} lengths")
    if not all(isinstance(edge, int) and not isinstance(edge, bool) and edge >= 0 for edge in shape):
        raise BadRequest(f"{name}: shape {list(shape)} must hold whole numbers from 0")
    if math.prod(max(edge, 1) for edge in shape) > MAX_ELEMENTS:  # NumPy multiplies the others where one is 0
        raise BadRequest(f"{name}: shape {list(shape)} is too large")
    return tuple(shape)


def tensor_from_raw(name: str, datatype: str, shape: tuple[int, ...], raw: bytes | memoryview) -> Tensor:
    """Return the tensor in little-endian bytes, without a copy where the datatype allows it.

    BYTES elements have a length of 4 bytes before each. BF16 becomes float32, which holds every value of it.

    Raises:
        BadRequest: the datatype is unknown, or the bytes are not those of the shape.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, _byte_elements(name, raw, count).reshape(shape), encoded=True)
    dtype = "uint16" if datatype == "BF16" else DATATYPES.get(datatype)
    if dtype is None:
        raise BadRequest(f"{name}: no datatype {datatype!r}; known: {', '.join((*DATATYPES, 'BF16', 'BYTES'))}")
    kind = np.dtype(dtype).newbyteorder("<")
    if len(raw) != count * kind.itemsize:
        raise BadRequest(f"{name}: {len(raw)} bytes; shape {list(shape)} of {datatype} has {count * kind.itemsize}")
    if datatype == "BOOL":  # any byte but 0 is true; a NumPy bool of another value is not
        return Tensor(name, datatype, np.frombuffer(raw, np.uint8).reshape(shape) != 0)
    values = np.frombuffer(raw, kind).reshape(shape)
    if datatype == "BF16":
        return Tensor(name, datatype, (values.astype("<u4") << 16).view("<f4"))
    return Tensor(name, datatype, values)


def _byte_elements(name: str, raw: bytes | memoryview, count: int) -> NDArray[Any]:
    check_bytes_count(name, count)
    if count * _LENGTH.size > len(raw):
        raise BadRequest(f"{name}: {len(raw)} bytes cannot hold {count} BYTES elements")
    elements, offset, whole = np.empty(count, object), 0, bytes(raw)
    for i in range(count):
        if offset + _LENGTH.size > len(whole):
            raise BadRequest(f"{name}: element {i} of {count} is missing")
        (length,) = _LENGTH.unpack_from(whole, offset)
        offset += _LENGTH.size
        if offset + length > len(whole):
            raise BadRequest(f"{name}: element {i} has {length} bytes; {len(whole) - offset} are left")
        elements[i] = whole[offset : offset + length]
        offset += length
    if offset != len(whole):
        raise BadRequest(f"{name}: {len(whole) - offset} bytes are left after {count} elements")
    return elements


def tensor_to_raw(tensor: Tensor) -> bytes:
    """Return the tensor's values as the protocol's little-endian bytes."""
    if tensor.datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(element)) + element for element in tensor.data.reshape(-1))
    kind = np.dtype(DATATYPES[tensor.datatype]).newbyteorder("<")
    return np.ascontiguousarray(tensor.data, kind).tobytes()
