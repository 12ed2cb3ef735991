"""Raw tensors: what was written is read again, and bytes that are not the shape's are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from repmlp_deploy.serving.protocol import (
    DATATYPES,
    BadRequest,
    Tensor,
    check_shape,
    datatype_of,
    tensor_from_raw,
    tensor_to_raw,
)


@pytest.mark.parametrize("datatype", DATATYPES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_numbers_survive_the_way(datatype: str, data: st.DataObject) -> None:
    shape = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    values = data.draw(arrays.arrays(np.dtype(DATATYPES[datatype]), shape))
    raw = tensor_to_raw(Tensor("x", datatype, values))
    back = tensor_from_raw("x", datatype, values.shape, raw).data
    assert back.dtype == values.dtype
    assert back.tobytes() == values.tobytes()
    assert datatype_of(str(values.dtype)) == datatype


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_bytes_survive_the_way(elements: list[bytes]) -> None:
    array = np.empty(len(elements), object)
    array[:] = elements
    raw = tensor_to_raw(Tensor("x", "BYTES", array))
    assert tensor_from_raw("x", "BYTES", (len(elements),), raw).data.tolist() == elements


def test_bfloat16_becomes_the_float32_of_the_same_value() -> None:
    raw = np.array([0x3F80, 0xC040, 0x7F80, 0x0001], "<u2").tobytes()
    tensor = tensor_from_raw("x", "BF16", (4,), raw)
    assert tensor.data.dtype == np.float32
    assert tensor.data.tolist() == [1.0, -3.0, float("inf"), 2.0**-133]


def test_any_byte_but_zero_is_true() -> None:
    assert tensor_from_raw("x", "BOOL", (3,), b"\x00\x01\x80").data.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "message"),
    [
        ("FP32", (2,), b"1234567", r"7 bytes; shape \[2\] of FP32 has 8"),
        ("FP32", (1 << 40,), b"", "0 bytes"),
        ("FP8", (1,), b"1", "no datatype 'FP8'"),
        ("BYTES", (2,), b"\x02\x00\x00\x00abc\x00", "element 1 of 2 is missing"),
        ("BYTES", (1,), b"\xff\xff\xff\xffa", "has 4294967295 bytes; 1 are left"),
        ("BYTES", (1,), b"\x01\x00\x00\x00ab", "1 bytes are left after 1 elements"),
        ("BYTES", (3,), b"\x01\x00\x00\x00a", "cannot hold"),
        ("BYTES", (1 << 40,), b"\x01\x00\x00\x00a", "a tensor has at most 65536"),
    ],
)
def test_bytes_of_another_shape_are_refused(datatype: str, shape: tuple[int, ...], raw: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        tensor_from_raw("x", datatype, shape, raw)


@pytest.mark.parametrize(
    "shape", [None, "12", [1.5], [True], [-1], [1] * 9, [1 << 41], [1 << 30, 1 << 30], [0, 1 << 40, 1 << 40], [[1]]]
)
def test_what_is_no_shape_is_refused(shape: object) -> None:
    with pytest.raises(BadRequest, match="shape"):
        check_shape("x", shape)


def test_a_shape_is_read() -> None:
    assert check_shape("x", [2, 0, 3]) == (2, 0, 3)
