"""Folding: every BatchNorm that merging leaves goes into a neighbour, and FC3 becomes a batched product. Exact.

**prebn1 and the block.** With prebn1 as x_c ↦ a_c x_c + b_c per channel c and FC3 linear over the positions of one
channel, W_s its matrix and β_s its bias (s the shareset of c),

    FC3(a_c x_c + b_c) = a_c (W_s x_c) + m_c,      m_c = b_c · rowsum(W_s) + β_s.

The global perceptron absorbs prebn1 as well, because the mean of an affine map is the affine map of the mean:
FC1(mean(a x + b)) = (FC1·a) mean(x) + (FC1·b + c₁). The unit's first half becomes

    y = x + g ⊙ (a ⊙ W x + m)  =  x + (g·a) ⊙ (W x + m/a),

the second form, one pass over the map cheaper, wherever m/a stays in the range of every precision. The constant map
(C, h·w) costs no time: with a single number in its place B224 took as long, in float32, bf16 and int8, at batch 1 and
8, within 2 %; only OpenVINO's int8 at batch 1, which is reading constants, would gain, 8 %. Equivalents that store
less, x + b/a in front of W with the (S, h·w) map β behind it, take a pass over x instead.

**prebn2** goes into the first convolution of the FFN, which is 1×1 without padding: W(a x + b) = (W·a) x + W b.
**A BatchNorm behind a convolution** scales its rows. **The head's BatchNorm** goes through the mean into the head.
Without such a head the last map is a result of its own: its BatchNorm stays as the a·x + b it is.

**The block of 2021** keeps no BatchNorm once merged; its permutations in front of and behind FC3 become one each.

**FC3 as a product.** A grouped 1×1 convolution on a 1×1 map is executed by most runtimes as one matrix-vector product a
row. With channel c = j·S + s the same arithmetic is (S, N·parts·C/S, h·w) × (S, h·w, h·w), one batched product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn

from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm, constant, fuse_batch_norm
from repmlp_deploy.nets.blocks.conv_bn import ChannelAffine, ConvBN, FoldedConv
from repmlp_deploy.nets.blocks.repmlp2021 import FoldedRepMLP, RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import FoldedBlock, GlobalPerceptron, RepMLPBlock
from repmlp_deploy.nets.blocks.repmlp_unit import FoldedUnit, RepMLPUnit
from repmlp_deploy.nets.networks.repmlpnet import RepMLPBackbone, RepMLPNet, RepMLPTrunk
from repmlp_deploy.nets.surgery import keep_weights, weights_freed, with_replaced

__all__ = ["fold_affine"]


@torch.no_grad()
def fold_affine(merged: nn.Module, *, keep_unknown: bool = False, use_up: bool = False) -> nn.Module:
    """A copy of `merged` without any BatchNorm and with FC3 as a batched product; `merged` is left alone.

    Args:
        merged: as `merge_branches` returns it.
        keep_unknown: let BatchNorms stay that no rule knows: a user's own parts.
        use_up: free every part of `merged` as soon as it is folded; `merged` is of no use afterwards.

    Raises:
        ValueError: a block is not merged yet, or a BatchNorm is left that no rule knows.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    free = weights_freed(merged) if use_up else keep_weights
    for module in _outermost(merged, replacements):
        found = RULES[type(module)](module)
        replacements |= found
        for old, new in found.items():
            free(old, new)
    folded = with_replaced(merged, replacements)
    if keep_unknown:
        return folded.eval()
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    if left:
        raise ValueError(f"no rule folds the BatchNorm {left[0]}")
    return folded.eval()


def _outermost(root: nn.Module, replaced: Collection[nn.Module]) -> Iterator[nn.Module]:
    """Modules inside `root` that have a rule, each once, from the outside in, but for what is `replaced` meanwhile."""
    seen, waiting = set[nn.Module](), [root]
    while waiting:
        module = waiting.pop()
        if module in seen or module in replaced:
            continue
        seen.add(module)
        if type(module) in RULES:
            yield module
        if module not in replaced:
            waiting += module.children()


def _fold_conv_bn(module: ConvBN) -> dict[nn.Module, nn.Module]:
    return {module: FoldedConv(fuse_batch_norm(module.conv, module.bn), relu=module.relu)}


def _fold_unit(module: RepMLPUnit) -> dict[nn.Module, nn.Module]:
    if type(module.repmlp_block.gp) is not GlobalPerceptron:  # a gate of the user's own, which may not be folded into
        return {}
    return {module: FoldedUnit(module)}


def _fold_block(module: RepMLPBlock) -> dict[nn.Module, nn.Module]:
    return {module: FoldedBlock(module)}


def _fold_repmlp(module: RepMLP) -> dict[nn.Module, nn.Module]:
    return {module: FoldedRepMLP(module)}


def _fold_head(module: RepMLPNet) -> dict[nn.Module, nn.Module]:
    a, b = affine_of_batch_norm(module.head_norm)
    weight = module.head.weight.detach().double()
    head = nn.Linear(module.head.in_features, module.head.out_features, device="meta")
    head.weight = constant((weight * a).to(module.head.weight.dtype))
    head.bias = constant((module.head.bias.detach() + weight @ b).to(module.head.weight.dtype))
    return {module.head_norm: nn.Identity(), module.head: head}


def _fold_final_norm(module: RepMLPTrunk) -> dict[nn.Module, nn.Module]:
    return {module.head_norm: ChannelAffine(module.head_norm)}


RULES: dict[type[nn.Module], Callable[..., dict[nn.Module, nn.Module]]] = {
    ConvBN: _fold_conv_bn,
    RepMLPUnit: _fold_unit,
    RepMLPBlock: _fold_block,
    RepMLP: _fold_repmlp,
    RepMLPNet: _fold_head,
    RepMLPTrunk: _fold_final_norm,
    RepMLPBackbone: _fold_final_norm,
}
"""Module type to what replaces it or its children; looked at from the outside in."""
