"""PyTorch's table of ONNX functions, made once per process.

Every `torch.onnx.export` makes this table anew, which takes half a second: much of what a small network's export takes.
Each export still gets a table of its own; what is kept are the entries, which do not change.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

__all__ = ["keep_functions"]

_MODULE = "torch.onnx._internal.exporter._registration"


def keep_functions() -> None:
    """Keep the table from now on; does nothing before PyTorch's exporter is imported, or if it was done before."""
    registry = getattr(sys.modules.get(_MODULE), "ONNXRegistry", None)
    make = getattr(registry, "from_torchlib", None)
    if make is None or hasattr(make, "kept"):
        return
    made = functools.cache(make)

    def from_torchlib(*arguments: Any, **named: Any) -> Any:
        kept = made(*arguments, **named)
        table = type(kept)()
        vars(table).update(vars(kept))
        table.functions = {name: list(found) for name, found in kept.functions.items()}
        return table

    from_torchlib.kept = True  # type: ignore[attr-defined]
    registry.from_torchlib = staticmethod(from_torchlib)
