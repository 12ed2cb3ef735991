"""Merging: every RepMLP block's branches and BatchNorms become one FC3 with a bias.

For a block of 2022, with a·y + b the evaluation-mode form of each BatchNorm and T(K) the Toeplitz matrix of a kernel,

    FC3'(x) = (a₃ W₃ + Σ_k T(a_k K_k)) x + (b₃ + Σ_k b_k),

exactly; `nets.reparam` derives and computes it. BatchNorms outside the blocks stay, as in upstream's own merge.
"""

from __future__ import annotations

import torch
from torch import nn

from repmlp_deploy.nets.blocks import RepMLPBlock
from repmlp_deploy.nets.surgery import with_replaced

__all__ = ["merge_branches", "upstream_form"]


@torch.no_grad()
def merge_branches(trained: nn.Module) -> nn.Module:
    """A copy of `trained` whose RepMLP blocks are merged; `trained` is left alone.

    Blocks that are merged already stay as they are. Weights that merging does not change share their memory with
    `trained`: copy.deepcopy the result before training either further.

    Args:
        trained: any module with RepMLP blocks inside, in evaluation mode.

    Raises:
        ValueError: there is no RepMLP block, or a BatchNorm is in training mode.
    """
    blocks = [module for module in trained.modules() if isinstance(module, RepMLPBlock)]
    if not blocks:
        raise ValueError(f"{type(trained).__name__} contains no RepMLP block: there is nothing to merge")
    training = [name for name, module in trained.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0] or 'the module'} is in training mode: call .eval() before merging")
    return with_replaced(trained, {block: _merged(block) for block in blocks if not block.deploy})


def upstream_form(merged: nn.Module) -> nn.Module:
    """A copy of `merged` that computes FC3 as upstream's deploy mode does, a grouped 1×1 convolution: the baseline."""
    copy = with_replaced(merged, {})
    for module in copy.modules():
        if isinstance(module, RepMLPBlock):
            module.as_convolution = True
    return copy


def _merged(block: RepMLPBlock) -> RepMLPBlock:
    merged = RepMLPBlock.__new__(RepMLPBlock)
    nn.Module.__init__(merged)
    merged.C, merged.S, merged.h, merged.w, merged.kernels = block.C, block.S, block.h, block.w, ()
    merged.as_convolution = block.as_convolution
    merged.gp = with_replaced(block.gp, {})
    merged.fc3 = block.merged_fc3()
    merged.fc3_bn = None
    return merged.eval()
