"""Constants of an OpenVINO model, changed where they lie in its `.bin` file."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

__all__ = ["constant_names", "with_constant"]

_CONSTANT = re.compile(r'<layer id="\d+" name="([^"]+)" type="Const"[^>]*>\s*<data ([^>]*)/>')
_TYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "i8": np.int8}


def constant_names(xml: bytes) -> list[str]:
    """Return the names of all constants of a topology."""
    return [name for name, _ in _CONSTANT.findall(xml.decode())]


def with_constant(xml: bytes, weights: bytes, name: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """Return the content of a `.bin` file with one constant changed; bfloat16 is given as its 16 bits."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', dict(_CONSTANT.findall(xml.decode()))[name]))
    start, size = int(fields["offset"]), int(fields["size"])
    kind = _TYPES[fields["element_type"]]
    shape = [int(edge) for edge in fields["shape"].split(",") if edge.strip()]
    values = np.frombuffer(weights[start : start + size], kind).reshape(shape)
    changed = change(values.copy()).astype(kind)
    assert changed.shape == values.shape
    assert (changed != values).any()
    return weights[:start] + changed.tobytes() + weights[start + size :]
