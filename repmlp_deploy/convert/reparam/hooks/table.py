"""The names that packages give the method that merges a module, and which modules have one."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable

from torch import nn

__all__ = ["HOOKS", "Hook", "find_hook", "hooks_in"]

HOOKS = (
    "fuse",
    "reparameterize",
    "switch_to_deploy",
    "merge_kernel",
    "merge_dilated_branches",
    "fuse_repvgg_block",
)
"""Method names, the first that a module has is called: timm, MobileOne, RepVGG, RepLKNet, UniRepLKNet, YOLOv7."""

Hook = Callable[[], object]


def find_hook(module: nn.Module) -> tuple[str, Hook] | None:
    """Return the name and the method that merges `module`; None if its class has none.

    A child that happens to be called `fuse`, and a method that needs arguments, are no hooks.
    """
    for name in HOOKS:
        if not inspect.isfunction(getattr(type(module), name, None)):
            continue
        method = getattr(module, name)
        needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in needed):
            return name, method
    return None


def hooks_in(network: nn.Module) -> dict[str, int]:
    """Return how many modules of a network have each hook, the most frequent first."""
    found = (find_hook(module) for module in network.modules())
    return dict(Counter(hook[0] for hook in found if hook is not None).most_common())
