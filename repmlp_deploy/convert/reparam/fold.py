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
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm, convolution_with, fuse_batch_norm
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP, grouped_product
from repmlp_deploy.nets.blocks.repmlp2022 import FFN, ConvBN, GlobalPerceptron, RepMLPBlock, RepMLPUnit
from repmlp_deploy.nets.networks.repmlpnet import RepMLPBackbone, RepMLPNet, RepMLPTrunk
from repmlp_deploy.nets.surgery import keep_weights, weights_freed, with_replaced

__all__ = ["ChannelAffine", "FoldedBlock", "FoldedConv", "FoldedRepMLP", "FoldedUnit", "fold_affine"]

_LARGEST_OFFSET = 1e3  # of m/a: far inside float16's 65504, whatever W x adds to it


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


class FoldedConv(nn.Module):
    """A convolution with a bias, optionally a ReLU behind it."""

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.conv = conv
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return F.relu(y) if self.relu else y


class ChannelAffine(nn.Module):
    """a·x + b per channel: (N, C, H, W) -> (N, C, H, W), what a BatchNorm is where nothing linear is its neighbour."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if bn.running_mean is None else bn.running_mean.dtype
        a, b = (part.view(-1, 1, 1).to(dtype) for part in affine_of_batch_norm(bn))
        self.scale, self.shift = _constant(a), _constant(b)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class FoldedUnit(nn.Module):
    """A RepMLP unit without BatchNorms: (N, C, H, W) -> (N, C, H, W); letters as in the module's text, J = C/S.

    Holds `fc3`, every W_s transposed, (S, h·w, h·w), or (h·w, h·w) where S = 1; `scale`, a, (J, S, 1); `offset`,
    (J, S, h·w), m/a where `divided` and m otherwise.
    """

    def __init__(self, unit: RepMLPUnit) -> None:
        super().__init__()
        block = unit.repmlp_block
        bias = block.fc3.bias
        if bias is None:
            raise ValueError("a RepMLP block still has its branches: merge before folding")
        self.S, self.J, self.h, self.w = block.S, block.C // block.S, block.h, block.w
        S, J, area = self.S, self.J, block.h * block.w
        a, b = affine_of_batch_norm(unit.prebn1)
        matrix = block.fc3.weight.detach().view(S, area, area)
        row_sum = matrix.sum(dim=2, dtype=torch.float64)  # (S, h·w)
        scale, shift = a.view(J, S, 1), b.view(J, S, 1)
        offset = shift * row_sum + bias.detach().double().view(S, area)  # m, (J, S, h·w)
        self.divided = bool((offset.abs() <= _LARGEST_OFFSET * scale.abs()).all()) and bool((a != 0).all())
        transposed = matrix.transpose(1, 2).contiguous()
        self.fc3 = _constant(transposed[0] if S == 1 else transposed)
        self.scale = _constant(scale.to(matrix.dtype))
        self.offset = _constant((offset / scale if self.divided else offset).to(matrix.dtype))
        self.gp = _gate_of_affine(block.gp, a, b)
        self.ffn = _ffn_of_affine(unit.ffn_block, unit.prebn2)

    def forward(self, x: Tensor) -> Tensor:
        J, S, h, w = self.J, self.S, self.h, self.w
        rows, columns = x.shape[2] // h, x.shape[3] // w
        gate: Tensor = self.gp(x)  # (N, C, 1, 1)
        if rows == columns == 1:
            y = self._product(x.reshape(-1, S, h * w)).reshape(-1, J, S, h * w)
            gate = gate.reshape(-1, J, S, 1)
            y = (y + self.offset) * (gate * self.scale) if self.divided else (y * self.scale + self.offset) * gate
            z = x + y.reshape(-1, *x.shape[1:])
        else:
            cut = (
                x.reshape(-1, J * S, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5).contiguous()
            )  # (N, rows, columns, C, h, w)
            y = self._product(cut.reshape(-1, S, h * w)).reshape(-1, J, S, h * w)
            y = (y + self.offset) * self.scale if self.divided else y * self.scale + self.offset
            y = (
                y.reshape(-1, rows, columns, S, h, w).permute(0, 3, 1, 4, 2, 5).contiguous()
            )  # (N·J, S, rows, h, columns, w)
            z = x + y.reshape(-1, *x.shape[1:]) * gate
        out: Tensor = z + self.ffn(z)
        return out

    def _product(self, x: Tensor) -> Tensor:
        """W of every shareset times its rows: (M, S, h·w) -> (M, S, h·w)."""
        if self.S == 1:
            return x @ self.fc3
        return (x.transpose(0, 1) @ self.fc3).transpose(0, 1).contiguous()  # (S, M, h·w) × (S, h·w, h·w)


class FoldedBlock(RepMLPBlock):
    """A merged RepMLP block of 2022 outside a unit of ours, FC3 transposed once: `weight` is (S, h·w, h·w)."""

    def __init__(self, block: RepMLPBlock) -> None:
        nn.Module.__init__(self)
        if block.fc3.bias is None:
            raise ValueError("a RepMLP block still has its branches: merge before folding")
        self.C, self.S, self.h, self.w, self.kernels = block.C, block.S, block.h, block.w, ()
        self.gp, self.fc3_bn = block.gp, None
        area = block.h * block.w
        self.weight = _constant(block.fc3.weight.detach().view(self.S, area, area).transpose(1, 2).contiguous())
        self.bias = _constant(block.fc3.bias.detach().view(self.S, area))

    def _apply_fc3(self, rows: Tensor) -> Tensor:
        return grouped_product(rows.flatten(1), self.weight).view(-1, *rows.shape[1:]) + self.bias


class FoldedRepMLP(nn.Module):
    """A merged RepMLP block of 2021: (N, C, H, W) -> (N, O, H, W); letters as in `nets.repmlp`.

    Cutting into partitions and sharing channels out to groups are one permutation here, and so are their inverses.
    Holds `fc3`, every group's matrix transposed, (g, C/g·h·w, O/g·h·w), and `bias`, (g, 1, O/g·h·w).
    """

    def __init__(self, block: RepMLP) -> None:
        super().__init__()
        if block.fc3.bias is None:
            raise ValueError("a RepMLP block still has its branches: merge before folding")
        self.C, self.O, self.g = block.C, block.O, block.groups
        self.H, self.W, self.h, self.w = block.H, block.W, block.h, block.w
        matrix = block.fc3.weight.detach().view(self.g, -1, block.fc3.in_channels // self.g)
        self.fc1_fc2 = block.fc1_fc2
        self.fc3 = _constant(matrix.transpose(1, 2).contiguous())
        self.bias = _constant(block.fc3.bias.detach().view(self.g, 1, -1))

    def forward(self, x: Tensor) -> Tensor:
        g, C, O, h, w = self.g, self.C, self.O, self.h, self.w
        rows, columns = self.H // h, self.W // w
        cut = x.reshape(-1, g, C // g, rows, h, columns, w)
        if self.fc1_fc2 is not None:
            pooled = F.avg_pool2d(x, (h, w))  # (N, C, H, W) -> (N, C, rows, columns)
            added = self.fc1_fc2(pooled.reshape(-1, C * rows * columns))
            cut = cut + added.reshape(-1, g, C // g, rows, 1, columns, 1)
        cut = cut.permute(1, 0, 3, 5, 2, 4, 6).contiguous()  # (g, N, rows, columns, C/g, h, w)
        y = cut.reshape(g, -1, C // g * h * w) @ self.fc3 + self.bias  # (g, N·partitions, O/g·h·w)
        y = y.reshape(g, -1, rows, columns, O // g, h, w)
        return y.permute(1, 0, 4, 2, 5, 3, 6).contiguous().view(-1, O, self.H, self.W)


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _conv_of_affine(conv: nn.Conv2d, a: Tensor, b: Tensor) -> nn.Conv2d:
    """conv(a·x + b) as one convolution, for a 1×1 kernel without padding or groups."""
    weight = conv.weight.detach().double()
    bias = weight[:, :, 0, 0] @ b
    return convolution_with(conv, weight * a[:, None, None], bias if conv.bias is None else bias + conv.bias.detach())


def _gate_of_affine(gp: GlobalPerceptron, a: Tensor, b: Tensor) -> GlobalPerceptron:
    """The global perceptron of a·x + b, as one of x."""
    result = GlobalPerceptron.__new__(GlobalPerceptron)
    nn.Module.__init__(result)
    result.fc1, result.fc2 = _conv_of_affine(gp.fc1, a, b), gp.fc2
    return result


def _ffn_of_affine(ffn: FFN, bn: nn.BatchNorm2d) -> nn.Module:
    """FFN(BN(x)) as two convolutions with GELU between."""
    first = fuse_batch_norm(ffn.ffn_fc1.conv, ffn.ffn_fc1.bn)
    return nn.Sequential(
        _conv_of_affine(first, *affine_of_batch_norm(bn)), nn.GELU(), fuse_batch_norm(ffn.ffn_fc2.conv, ffn.ffn_fc2.bn)
    )


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
    head.weight = _constant((weight * a).to(module.head.weight.dtype))
    head.bias = _constant((module.head.bias.detach() + weight @ b).to(module.head.weight.dtype))
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
