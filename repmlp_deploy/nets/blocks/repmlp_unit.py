"""The residual unit of RepMLPNet (CVPR 2022) around the RepMLP block of 2022, and its folded form.

With prebn1 as x_c ↦ a_c x_c + b_c per channel c and FC3 linear over the positions of one channel, W_s its matrix and
β_s its bias (s the shareset of c),

    FC3(a_c x_c + b_c) = a_c (W_s x_c) + m_c,      m_c = b_c · rowsum(W_s) + β_s.

The global perceptron absorbs prebn1 as well, because the mean of an affine map is the affine map of the mean:
FC1(mean(a x + b)) = (FC1·a) mean(x) + (FC1·b + c₁). The unit's first half becomes

    y = x + g ⊙ (a ⊙ W x + m)  =  x + (g·a) ⊙ (W x + m/a).

The second form needs one pass less over the map. It is used wherever m/a stays in the range of every precision.
prebn2 goes into the first convolution of the FFN, which is 1×1 without padding: W(a x + b) = (W·a) x + W b.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm, constant, conv_of_affine, fuse_batch_norm
from repmlp_deploy.nets.blocks.conv_bn import ConvBN
from repmlp_deploy.nets.blocks.repmlp2022 import GlobalPerceptron, RepMLPBlock

__all__ = ["FFN", "FoldedUnit", "RepMLPUnit"]

_LARGEST_OFFSET = 1e3  # of m/a: far inside float16's 65504, whatever W x adds to it


class FFN(nn.Module):
    """Two 1×1 convolutions with BatchNorm, GELU between: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.ffn_fc1 = ConvBN(channels, hidden, 1)
        self.ffn_fc2 = ConvBN(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn_fc2(F.gelu(self.ffn_fc1(x)))
        return y


class RepMLPUnit(nn.Module):
    """One residual unit of RepMLPNet: y = x + RepMLP(BN(x)), then z = y + FFN(BN(y))."""

    def __init__(self, block: RepMLPBlock, ffn_hidden: int) -> None:
        super().__init__()
        self.repmlp_block = block
        self.ffn_block = FFN(block.C, ffn_hidden)
        self.prebn1 = nn.BatchNorm2d(block.C)
        self.prebn2 = nn.BatchNorm2d(block.C)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.repmlp_block(self.prebn1(x))
        z: Tensor = y + self.ffn_block(self.prebn2(y))
        return z


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
        self.fc3 = constant(transposed[0] if S == 1 else transposed)
        self.scale = constant(scale.to(matrix.dtype))
        self.offset = constant((offset / scale if self.divided else offset).to(matrix.dtype))
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


def _gate_of_affine(gp: GlobalPerceptron, a: Tensor, b: Tensor) -> GlobalPerceptron:
    """The global perceptron of a·x + b, as one of x."""
    result = GlobalPerceptron.__new__(GlobalPerceptron)
    nn.Module.__init__(result)
    result.fc1, result.fc2 = conv_of_affine(gp.fc1, a, b), gp.fc2
    return result


def _ffn_of_affine(ffn: FFN, bn: nn.BatchNorm2d) -> nn.Module:
    """FFN(BN(x)) as two convolutions with GELU between."""
    first = fuse_batch_norm(ffn.ffn_fc1.conv, ffn.ffn_fc1.bn)
    return nn.Sequential(
        conv_of_affine(first, *affine_of_batch_norm(bn)), nn.GELU(), fuse_batch_norm(ffn.ffn_fc2.conv, ffn.ffn_fc2.bn)
    )
