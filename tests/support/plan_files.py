"""What a TensorRT-RTX plan shows of its inputs and outputs to who cannot deserialize it.

The format is not documented. Found by comparing plans that differ in one thing: a tensor's name stands behind its
length, in a record with its type and in another with its rank and its dimensions, the batch as a negative placeholder.
Integers are little-endian.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Embedded:
    """A tensor of the plan: the number of its `DataType`, and its shape without the batch."""

    dtype: int
    shape: tuple[int, ...]


def find_embedded(plan: bytes, name: str) -> Embedded | None:
    """The input or output called `name`; None where the plan has no such records."""
    key = re.escape(struct.pack("<Q", len(name)) + name.encode())
    typed = re.search(key + rb"\x1c\x80\x01\x00.{5}\x0d\x80\x01\x00\x07\x80\x01\x00(.{4})", plan, re.DOTALL)
    ranked = re.search(key + rb"\x59\x80\x01\x00\x07\x80\x01\x00(.{4})(.{400})", plan, re.DOTALL)
    if typed is None or ranked is None:
        return None
    rank = int.from_bytes(ranked[1], "little")
    for match in re.finditer(re.escape(struct.pack("<Q", rank)), ranked[2]):
        dims = ranked[2][match.end() : match.end() + 8 * rank]
        shape = struct.unpack(f"<{rank}q", dims) if len(dims) == 8 * rank else (0,)
        if len(shape) == rank and shape[0] < 0 and all(size > 0 for size in shape[1:]):
            return Embedded(int.from_bytes(typed[1], "little"), shape[1:])
    return None
