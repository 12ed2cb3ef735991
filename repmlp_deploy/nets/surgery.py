"""Copies of module trees with some modules replaced, and what is no longer needed of the original."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["in_double", "keep_weights", "switch_blocks", "weights_freed", "with_replaced"]


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_replaced(root: ModuleT, replacements: Mapping[nn.Module, nn.Module]) -> ModuleT:
    """Return a copy of `root` with every module of `replacements` replaced, wherever it is used.

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


def in_double(root: ModuleT) -> ModuleT:
    """Return a copy of `root` in float64, without a float32 copy on the way."""
    memo: dict[int, Any] = {}
    for parameter in root.parameters():
        memo[id(parameter)] = nn.Parameter(_copied(parameter.detach()), requires_grad=False)
    for buffer in root.buffers():
        memo[id(buffer)] = _copied(buffer.detach())
    return copy.deepcopy(root, memo)


def _copied(value: Tensor) -> Tensor:
    return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()


def keep_weights(old: nn.Module, new: nn.Module) -> None:
    """Do nothing: the counterpart of what `weights_freed` returns."""


def weights_freed(root: nn.Module) -> Callable[[nn.Module, nn.Module], None]:
    """Return f(old, new), which frees the parameters of a module inside `root` that has been replaced.

    Those that `new` took over stay, and so do those that two modules share, of which the other may still be needed.
    """
    users = Counter(id(parameter) for module in root.modules() for parameter in module.parameters(recurse=False))

    def free(old: nn.Module, new: nn.Module) -> None:
        kept = {id(parameter) for parameter in new.parameters()}
        for parameter in old.parameters():
            if users[id(parameter)] == 1 and id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)  # views of it that `new` holds keep their memory

    return free


@torch.no_grad()
def switch_blocks(root: nn.Module) -> None:
    """Merge every block below `root` in place; merged ones stay unchanged."""
    for module in list(root.modules()):
        switch: Callable[[], None] | None = getattr(module, "switch_to_deploy", None)
        if module is not root and switch is not None:
            switch()
