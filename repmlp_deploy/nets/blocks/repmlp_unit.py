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

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm, constant, conv_of_affine, fuse_batch_norm
from repmlp_deploy.nets.blocks.checks import (
    Check,
    Fault,
    Finding,
    absorbed_checks,
    affine_by_running,
    fused_checks,
    parameter_checks,
    wrong_affines,
)
from repmlp_deploy.nets.blocks.conv_bn import ConvBN
from repmlp_deploy.nets.blocks.protocol import Reparameterizable
from repmlp_deploy.nets.blocks.repmlp2022 import GlobalPerceptron, RepMLPBlock
from repmlp_deploy.nets.blocks.terms import MergedSum, merged_checks, merged_matrix

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


class RepMLPUnit(Reparameterizable):
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

    def folded(self) -> dict[nn.Module, nn.Module]:
        """Return the unit without BatchNorms, unless the gate is a user's own, which cannot be folded into."""
        return {self: FoldedUnit(self)} if type(self.repmlp_block.gp) is GlobalPerceptron else {}

    def checks(self, made: nn.Module) -> Iterator[Check]:
        """Yield the checks of the folded unit, or of an unchanged one."""
        yield from _unit_checks(self, made) if isinstance(made, FoldedUnit) else parameter_checks(self, made, "")

    def wrong_geometry(self, made: nn.Module) -> Finding | None:
        """Return what is wrong with the partition of the block inside."""
        return self.repmlp_block.wrong_geometry(made)

    def wrong_forward(self, made: nn.Module, x: Tensor, got: Any) -> Finding | None:
        """Return what a folded unit did instead; see `Reparameterizable.wrong_forward`."""
        return None if type(made) is RepMLPUnit else _unit_forward(copy.deepcopy(self).double(), x, got)


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
        """Multiply every shareset's W by its rows: (M, S, h·w) -> (M, S, h·w)."""
        if self.S == 1:
            return x @ self.fc3
        return (x.transpose(0, 1) @ self.fc3).transpose(0, 1).contiguous()  # (S, M, h·w) × (S, h·w, h·w)


def _gate_of_affine(gp: GlobalPerceptron, a: Tensor, b: Tensor) -> GlobalPerceptron:
    """Return the global perceptron of a·x + b as a global perceptron of x."""
    return GlobalPerceptron.from_parts(conv_of_affine(gp.fc1, a, b), gp.fc2)


def _ffn_of_affine(ffn: FFN, bn: nn.BatchNorm2d) -> nn.Module:
    """Return FFN(BN(x)) as two convolutions with GELU between."""
    first = fuse_batch_norm(ffn.ffn_fc1.conv, ffn.ffn_fc1.bn)
    return nn.Sequential(
        conv_of_affine(first, *affine_of_batch_norm(bn)), nn.GELU(), fuse_batch_norm(ffn.ffn_fc2.conv, ffn.ffn_fc2.bn)
    )


@torch.no_grad()
def _unit_forward(trained: RepMLPUnit, x: Tensor, got: Tensor) -> Finding:
    """Return what a folded unit did instead, although every tensor in it is right.

    Args:
        trained: the unit, float64.
        x: (N, C, H, W) float64.
        got: what the folded unit answered.
    """
    block = trained.repmlp_block
    a, b = (each.view(-1, 1, 1) for each in affine_by_running(trained.prebn1))
    normal = trained.prebn1(x)
    gate = block.gp(normal)
    y = block(normal)
    without_shift = block(normal - b) / block.gp(normal - b) * gate  # g (a W x + β)
    ungated = torch.where(gate > 0, y / gate, y)
    shift = ungated - without_shift / gate + _bias_of(block, ungated)  # m, as a map
    for part, fault, first in (
        ("global perceptron", "gate applied before the shift", x + (ungated - shift) * gate + shift),
        ("global perceptron", "gate not applied", x + ungated),
        ("prebn1 fold", "shift not applied", x + (ungated - shift) * gate),
        ("prebn1 fold", "scale not applied", x + ((ungated - shift) / a + shift) * gate),
        ("global perceptron", "gate of the map after prebn1", x + ungated * block.gp(trained.prebn1(normal))),
        ("residual", "forgotten", y),
    ):
        z = first + trained.ffn_block(trained.prebn2(first))
        if torch.allclose(got, z, rtol=1e-5, atol=1e-5 * float(z.abs().max())):
            return Finding(part, fault)
    return Finding("forward", "its tensors are right, what it does with them is not")


def _bias_of(block: RepMLPBlock, like: Tensor) -> Tensor:
    """Return the block's output for zeros before its gate, as a map."""
    zeros = torch.zeros_like(like)
    answer: Tensor = block(zeros) / block.gp(zeros)
    return answer


def _unit_checks(unit: RepMLPUnit, folded: FoldedUnit) -> Iterator[Check]:
    """Yield the checks in the order of the data: prebn1 and FC3, the gate, the FFN."""
    block = unit.repmlp_block
    S, J, area = folded.S, folded.J, folded.h * folded.w
    merged = [merged_matrix(block, s) for s in range(S)]
    matrix, bias = (torch.stack([pair[i] for pair in merged]) for i in (0, 1))  # (S, h·w, h·w), (S, h·w)
    row_sum = matrix.sum(dim=2)

    def prebn1(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        offset = b.view(J, S, 1) * row_sum + bias
        return a.view(J, S, 1), offset / a.view(J, S, 1) if folded.divided else offset

    yield from absorbed_checks(
        "prebn1 fold", unit.prebn1, prebn1, [("scale", folded.scale), ("offset", folded.offset.view(J, S, area))]
    )
    yield from _gate_checks(unit, folded)
    stored = folded.fc3.detach().view(S, area, area)
    rows = MergedSum(stored.transpose(1, 2), bias, name="fc3 transposed", partition=(folded.h, folded.w))
    yield next(merged_checks(block, rows))  # of the matrix; its bias is in `offset`
    yield from _ffn_checks(unit.ffn_block, unit.prebn2, folded.ffn)


def _gate_checks(unit: RepMLPUnit, folded: FoldedUnit) -> Iterator[Check]:
    fc1, fc2 = unit.repmlp_block.gp.fc1, unit.repmlp_block.gp.fc2

    def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        weight = fc1.weight.detach().double()
        shift = weight[:, :, 0, 0] @ b
        return weight * a[:, None, None], shift if fc1.bias is None else shift + fc1.bias.detach().double()

    stored = [("gp.fc1.weight", folded.gp.fc1.weight)]
    if folded.gp.fc1.bias is not None:
        stored.append(("gp.fc1.bias", folded.gp.fc1.bias))
    yield from absorbed_checks("global perceptron", unit.prebn1, values, stored)
    yield from parameter_checks(fc2, folded.gp.fc2, "global perceptron")


def _ffn_checks(ffn: FFN, prebn2: nn.BatchNorm2d, folded: nn.Module) -> Iterator[Check]:
    first, last = folded.get_submodule("0"), folded.get_submodule("2")
    a_f, b_f = affine_by_running(ffn.ffn_fc1.bn)
    kernel = ffn.ffn_fc1.conv.weight.detach().double()  # (C·expansion, C, 1, 1)

    def of_prebn2(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a_f[:, None, None, None] * kernel * a[:, None, None], a_f * (kernel[:, :, 0, 0] @ b) + b_f

    def of_bn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a_2, b_2 = affine_by_running(prebn2)
        return a[:, None, None, None] * kernel * a_2[:, None, None], a * (kernel[:, :, 0, 0] @ b_2) + b

    expected = of_bn(a_f, b_f)
    for i, name in enumerate(("weight", "bias")):

        def faults(i: int = i) -> Iterator[Fault]:
            for what, a, b in wrong_affines(prebn2):
                yield "prebn2 fold", what, of_prebn2(a, b)[i]
            for what, a, b in wrong_affines(ffn.ffn_fc1.bn):
                yield "ffn_fc1 · bn fold", what, of_bn(a, b)[i]

        yield Check("ffn_fc1", f"ffn.0.{name}", first.get_parameter(name).detach(), expected[i], faults)
    if isinstance(last, nn.Conv2d):
        for check in fused_checks(ffn.ffn_fc2.conv, ffn.ffn_fc2.bn, last):
            yield _renamed(check)


def _renamed(check: Check) -> Check:
    """Return a check of a convolution as a check of the FFN's second one."""
    part = "ffn_fc2 · bn fold"

    def faults() -> Iterator[Fault]:
        for _, what, value in check.faults():
            yield part, what, value

    return replace(check, part=part, name=check.name.replace("conv.", "ffn.2."), faults=faults)
