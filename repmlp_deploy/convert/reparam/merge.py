"""Merging: the branches and BatchNorms of every block become one linear map with a bias.

With a·y + b the evaluation-mode form of each BatchNorm and T(K) the Toeplitz matrix of a kernel, a RepMLP block becomes

    FC3'(x) = (a₃ W₃ + Σ_k T(a_k K_k)) x + (b₃ + Σ_k b_k),

exactly; `nets.blocks.algebra` derives and computes it. A block of 2021 also absorbs the BatchNorm after its average
pool into FC1, and the networks of that release fuse their convolutions with the BatchNorms after them. Any other
BatchNorm stays, as in upstream's own merge. Every block type of `nets.block_types` merges itself.
"""

from __future__ import annotations

import torch
from torch import nn

from repmlp_deploy.nets.block_types import block_of
from repmlp_deploy.nets.foreign import adopt_blocks
from repmlp_deploy.nets.surgery import keep_weights, weights_freed, with_replaced

__all__ = ["merge_branches", "upstream_form"]


@torch.no_grad()
def merge_branches(trained: nn.Module, *, use_up: bool = False) -> nn.Module:
    """Return a copy of `trained` with every block merged; `trained` is unchanged unless `use_up` is set.

    Blocks are ours, or those of the official releases or mmpretrain. Foreign blocks are recognised by their structure,
    confirmed by their outputs and become ours (`nets.foreign`). Blocks that are merged already stay as they are, and so
    does everything else in `trained`. Weights that merging does not change share their memory with `trained`: call
    copy.deepcopy on the result before you train either of them further.

    Args:
        trained: any module with blocks inside, in evaluation mode.
        use_up: free every block of `trained` as soon as it is merged, so that memory never holds two networks;
            `trained` is unusable afterwards.

    Raises:
        ValueError: there is no block, a BatchNorm is in training mode, or a foreign block does not compute what its
            structure says.
    """
    training = [name for name, module in trained.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0] or 'the module'} is in training mode: call .eval() before merging")
    adopted = adopt_blocks(trained)
    own = (block_of(module) for module in trained.modules())
    if not adopted and not any(block.branched for block in own if block is not None):
        raise ValueError(f"{type(trained).__name__} contains no RepMLP block: there is nothing to merge")
    replacements: dict[nn.Module, nn.Module] = {}
    free = weights_freed(trained) if use_up else keep_weights
    for module in trained.modules():
        block = adopted.get(module) or block_of(module)
        if block is not None and not block.deploy:
            replacements[module] = block.merged().eval()
            free(module, replacements[module])
    return with_replaced(trained, replacements)


def upstream_form(merged: nn.Module) -> nn.Module:
    """Return a copy of `merged` that computes FC3 as upstream's deploy mode does, by a grouped 1×1 convolution."""
    copy = with_replaced(merged, {})
    for module in copy.modules():
        if (block := block_of(module)) is not None and block.branched:
            block.as_convolution = True
    return copy
