"""Copies of module trees with some modules replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

__all__ = ["with_replaced"]


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_replaced(root: ModuleT, replacements: Mapping[nn.Module, nn.Module]) -> ModuleT:
    """A copy of `root` in which every module of `replacements` is its replacement, wherever it is used.

    The copy has parameters and buffers of its own, over the same memory where nothing changed: hundreds of megabytes
    are not copied, and `copy.half()` leaves `root` alone, but training one in place would change the other.
    """
    memo: dict[int, Any] = {}
    modules: list[nn.Module] = [root, *replacements.values()]
    for module in modules:
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        for buffer in module.buffers():
            memo[id(buffer)] = buffer.detach()
    # replacements are copied as well: what they took over from `root` must not tie the copy to it
    memo |= {id(old): copy.deepcopy(new, memo) for old, new in replacements.items()}
    return copy.deepcopy(root, memo)
