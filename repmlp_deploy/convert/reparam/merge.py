"""Merging: every RepMLP block's branches and BatchNorms become one FC3 with a bias.

With a·y + b the evaluation-mode form of each BatchNorm and T(K) the Toeplitz matrix of a kernel,

    FC3'(x) = (a₃ W₃ + Σ_k T(a_k K_k)) x + (b₃ + Σ_k b_k),

exactly; `nets.blocks.algebra` derives and computes it. A block of 2021 also absorbs the BatchNorm after its average
pool into FC1 (`nets.blocks.repmlp2021`), and the networks of that release fuse their convolutions with the BatchNorms
after them. Any other BatchNorm stays, as in upstream's own merge.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from repmlp_deploy.nets.blocks.conv_bn import MergeableConvBN
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.foreign import adopt_blocks
from repmlp_deploy.nets.surgery import keep_weights, weights_freed, with_replaced

__all__ = ["merge_branches", "upstream_form"]


@torch.no_grad()
def merge_branches(trained: nn.Module, *, use_up: bool = False) -> nn.Module:
    """A copy of `trained` whose RepMLP blocks are merged; `trained` is left alone unless it is to be used up.

    Blocks are ours, or of the official releases or mmpretrain, recognised by their structure and confirmed by their
    outputs (`nets.foreign`); those become ours. Blocks that are merged already stay as they are, and so does whatever
    else `trained` contains. Weights that merging does not change share their memory with `trained`: copy.deepcopy the
    result before training either further.

    Args:
        trained: any module with RepMLP blocks inside, in evaluation mode.
        use_up: free every block of `trained` as soon as it is merged, so that there is never more than one network in
            memory; `trained` is of no use afterwards.

    Raises:
        ValueError: there is no RepMLP block, a BatchNorm is in training mode, or a foreign block computes something
            else than its structure says.
    """
    training = [name for name, module in trained.named_modules() if module.training]
    if training:
        raise ValueError(f"{training[0] or 'the module'} is in training mode: call .eval() before merging")
    adopted = adopt_blocks(trained)
    blocks = [module for module in trained.modules() if isinstance(module, RepMLPBlock | RepMLP)]
    if not blocks and not adopted:
        raise ValueError(f"{type(trained).__name__} contains no RepMLP block: there is nothing to merge")
    replacements: dict[nn.Module, nn.Module] = {}
    free = weights_freed(trained) if use_up else keep_weights
    for module in trained.modules():
        own = adopted.get(module, module)
        rule = next((MERGES[kind] for kind in type(own).__mro__ if kind in MERGES), None)
        if rule is not None and not own.deploy:
            replacements[module] = rule(own).eval()
            free(module, replacements[module])
    return with_replaced(trained, replacements)


def upstream_form(merged: nn.Module) -> nn.Module:
    """A copy of `merged` that computes FC3 as upstream's deploy mode does, a grouped 1×1 convolution: the baseline."""
    copy = with_replaced(merged, {})
    for module in copy.modules():
        if isinstance(module, RepMLPBlock | RepMLP):
            module.as_convolution = True
    return copy


def _merge_block(block: RepMLPBlock) -> RepMLPBlock:
    merged = RepMLPBlock.__new__(RepMLPBlock)
    nn.Module.__init__(merged)
    merged.C, merged.S, merged.h, merged.w, merged.kernels = block.C, block.S, block.h, block.w, ()
    merged.as_convolution = block.as_convolution
    merged.gp = block.gp
    merged.fc3 = block.merged_fc3()
    merged.fc3_bn = None
    return merged


def _merge_repmlp(block: RepMLP) -> RepMLP:
    merged = RepMLP.__new__(RepMLP)
    nn.Module.__init__(merged)
    merged.C, merged.O, merged.groups, merged.kernels = block.C, block.O, block.groups, ()
    merged.H, merged.W, merged.h, merged.w = block.H, block.W, block.h, block.w
    merged.as_convolution = block.as_convolution
    merged.fc1_fc2 = block.merged_perceptron()
    merged.fc3 = block.merged_fc3()
    merged.avg = merged.fc3_bn = None
    return merged


def _merge_conv_bn(module: MergeableConvBN) -> MergeableConvBN:
    merged = MergeableConvBN.__new__(MergeableConvBN)
    nn.Module.__init__(merged)
    merged.conv, merged.bn, merged.relu = module.merged_conv(), None, module.relu
    return merged


MERGES: dict[type[nn.Module], Callable[..., nn.Module]] = {
    RepMLPBlock: _merge_block,
    RepMLP: _merge_repmlp,
    MergeableConvBN: _merge_conv_bn,
}
"""Module type to its merged form."""
