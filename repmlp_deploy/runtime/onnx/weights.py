"""Hand a graph's large weights to ONNX Runtime beside the graph, in the memory that they were read into.

ONNX Runtime parses a serialized graph into protobuf objects, and copies every weight out of these. For a graph of
280 MB the two copies take as long as everything else that opens it. So the bytes are split before ONNX Runtime sees
them: what is left of a large weight in the graph is its name, its type and its shape, and the values go in by name.

Only these fields of the wire format are read (onnx.proto; field numbers never change there):

    ModelProto.graph = 7    GraphProto.initializer = 5
    TensorProto.dims = 1, data_type = 2, name = 8, raw_data = 9, external_data = 13, data_location = 14

Whatever looks different from what the exporter writes stays in the graph, where ONNX Runtime judges it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Split", "field_head", "split_weights"]

_LARGE_BYTES = 1 << 14  # smaller weights cost nothing, and graph optimizers read them
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BITS = 64

_TYPES = MappingProxyType({1: np.float32, 2: np.uint8, 3: np.int8, 10: np.float16})
"""Element type of TensorProto to NumPy's, of those that large weights have."""

_LOCATION_EXTERNAL = b"\x70\x01"  # data_location = EXTERNAL
_ENTRY_LOCATION = b"\x6a\x13\x0a\x08location\x12\x07weights"  # external_data: {location: weights}


class _OtherForm(Exception):  # noqa: N818 - an outcome
    """The bytes are not of the form that the exporter writes."""


@dataclass(frozen=True)
class Split:
    """A serialized graph without its large weights.

    Attributes:
        graph: serialized; names the weights as external data, of no file that exists.
        weights: name to values, in the memory of the bytes that were split.
    """

    graph: bytes
    weights: Mapping[str, NDArray[Any]]


def split_weights(model: bytes | memoryview) -> Split | None:
    """Return the graph and its large weights apart; None where the bytes are of another form, or no weight is large."""
    view = memoryview(model)
    weights: dict[str, NDArray[Any]] = {}
    try:
        parts: list[bytes | memoryview] = []
        graphs = 0
        for number, whole, content in _fields(view):
            if number == _GRAPH and content is not None:
                graphs += 1
                graph = _without_weights(content, weights)
                parts += [field_head(_GRAPH, len(graph)), graph]
            else:
                parts.append(whole)
    except _OtherForm:
        return None
    return Split(b"".join(parts), weights) if weights and graphs == 1 else None


def _without_weights(graph: memoryview, weights: dict[str, NDArray[Any]]) -> bytes:
    """Return the graph; add its large weights to `weights`."""
    parts: list[bytes | memoryview] = []
    names: set[str] = set()
    for number, whole, content in _fields(graph):
        if number != _INITIALIZER or content is None:
            parts.append(whole)
            continue
        name, values, rest = _tensor(content)
        if name in names:
            raise _OtherForm
        names.add(name)
        if values is None:
            parts.append(whole)
            continue
        weights[name] = values
        parts += [field_head(_INITIALIZER, len(rest)), rest]
    return b"".join(parts)


def _tensor(tensor: memoryview) -> tuple[str, NDArray[Any] | None, bytes]:
    """Return a weight's name, its values if they are many, and the tensor without them."""
    kept: list[bytes | memoryview] = []
    dims: list[int] = []
    said: dict[int, memoryview] = {}
    kind = 0
    plain = True
    for number, whole, content in _fields(tensor):
        if number in (_EXTERNAL, _LOCATION) or number in said:
            plain = False
        if content is not None:
            said[number] = content
        if number == _DIMS:
            dims += [_value(whole)] if content is None else _packed(content)
        elif number == _TYPE:
            kind = _value(whole)
        if number != _RAW:
            kept.append(whole)
    try:
        name = str(said.get(_NAME, b""), "utf-8")
    except UnicodeDecodeError:
        raise _OtherForm from None
    raw, element = said.get(_RAW), _TYPES.get(kind)
    if not plain or raw is None or element is None or len(raw) < _LARGE_BYTES:
        return name, None, b""
    if not name or prod(dims) * np.dtype(element).itemsize != len(raw):
        return name, None, b""
    values = np.frombuffer(raw, element).reshape(dims)
    return name, values, b"".join([*kept, _ENTRY_LOCATION, _LOCATION_EXTERNAL])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """Yield every field of a message: its number, all its bytes, and its content where it has a length.

    Raises:
        _OtherForm: the bytes are no message.
    """
    position, end = 0, len(message)
    while position < end:
        start = position
        key, position = _read_varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == _BYTES:
            length, position = _read_varint(message, position)
            content, position = message[position : position + length], position + length
            if position > end:
                raise _OtherForm
            yield number, message[start:position], content
            continue
        if wire == _VARINT:
            _, position = _read_varint(message, position)
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise _OtherForm
        if position > end:
            raise _OtherForm
        yield number, message[start:position], None


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it."""
    value = shift = 0
    while shift < _VARINT_BITS:
        if position >= len(message):
            raise _OtherForm
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:  # noqa: PLR2004 - the bit that says that more follows
            return value, position
        shift += 7
    raise _OtherForm


def _value(field: memoryview) -> int:
    """Return the number of a field that is one."""
    _, position = _read_varint(field, 0)
    return _read_varint(field, position)[0]


def _packed(content: memoryview) -> list[int]:
    """Return the numbers of a repeated field that is written as one."""
    numbers, position = [], 0
    while position < len(content):
        number, position = _read_varint(content, position)
        numbers.append(number)
    return numbers


def field_head(number: int, length: int) -> bytes:
    """Return what precedes the bytes of a field that has a length: its tag, and the length."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    """Return a number as the wire format writes it."""
    made = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits per byte
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
