"""Folding: every BatchNorm that merging leaves goes into a neighbour, and FC3 becomes a batched product. Exact.

Every block type of `nets.block_types` folds itself. `nets.blocks.repmlp_unit` derives prebn1 and prebn2. A BatchNorm
after a convolution scales its rows. The head's BatchNorm goes through the mean into the head; without such a head the
last map is an output of its own, and its BatchNorm stays as the a·x + b it is. A block of 2021 keeps no BatchNorm once
it is merged; its permutations before and after FC3 become one each.

**The constant map** m/a (C, h·w) of a unit costs no time: with a single number in its place B224 took as long, in
float32, bf16 and int8, at batch 1 and 8, within 2 %. Only OpenVINO's int8 at batch 1, which is limited by reading
constants, would gain 8 %. Equivalents that store less, x + b/a before W and the (S, h·w) map β after it, need one more
pass over x.

**FC3 as a product.** Most runtimes execute a grouped 1×1 convolution on a 1×1 map as one matrix-vector product per row.
With channel c = j·S + s the same arithmetic is (S, N·parts·C/S, h·w) × (S, h·w, h·w), one batched product.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from repmlp_deploy.nets.block_types import block_of, has_fold_rule
from repmlp_deploy.nets.blocks.algebra import BatchNorm
from repmlp_deploy.nets.blocks.protocol import Reparameterizable
from repmlp_deploy.nets.surgery import keep_weights, weights_freed, with_replaced

__all__ = ["fold_affine"]


@torch.no_grad()
def fold_affine(merged: nn.Module, *, keep_unknown: bool = False, use_up: bool = False) -> nn.Module:
    """Return a copy of `merged` without any BatchNorm and with FC3 as a batched product; `merged` is unchanged.

    Args:
        merged: as `merge_branches` returns it.
        keep_unknown: keep BatchNorms that no rule folds, as in a user's own parts.
        use_up: free every part of `merged` as soon as it is folded; `merged` is unusable afterwards.

    Raises:
        ValueError: a block is not merged yet, or no rule folds some BatchNorm.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    free = weights_freed(merged) if use_up else keep_weights
    for block in _outermost(merged, replacements):
        found = block.folded()
        replacements |= found
        for old, new in found.items():
            free(old, new)
    folded = with_replaced(merged, replacements)
    if keep_unknown:
        return folded.eval()
    left = [name for name, module in folded.named_modules() if isinstance(module, BatchNorm)]
    if left:
        raise ValueError(f"no rule folds the BatchNorm {left[0]}")
    return folded.eval()


def _outermost(root: nn.Module, replaced: Collection[nn.Module]) -> Iterator[Reparameterizable]:
    """Yield blocks inside `root`, each once, from the outside in; skip those that are `replaced` in the meantime."""
    seen, waiting = set[nn.Module](), [root]
    while waiting:
        module = waiting.pop()
        if module in seen or module in replaced:
            continue
        seen.add(module)
        block = block_of(module) if has_fold_rule(module) else None
        if block is not None:
            yield block
        if module not in replaced:
            waiting += module.children()
