"""What timm imports of torchvision: names alone. The real one does not import beside every build of PyTorch."""

from __future__ import annotations

import enum
import sys
from types import ModuleType
from typing import Any

from torch import nn

__version__ = "0"
__path__: list[str] = []


class _Names(ModuleType):
    """A module in which every name is a class without content."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for _path in ("ops", "ops.misc", "transforms", "transforms.functional", "datasets", "utils"):
    _module = _Names(f"{__name__}.{_path}")
    _module.__path__ = []
    sys.modules[_module.__name__] = _module
    _parent, _, _last = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _last, _module)

sys.modules[f"{__name__}.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
sys.modules[f"{__name__}.transforms.functional"].InterpolationMode = enum.Enum(
    "InterpolationMode", ["NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"]
)
