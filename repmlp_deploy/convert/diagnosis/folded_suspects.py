"""Suspects of folding: what every tensor of a folded module should hold, and what known faults would leave there.

The letters are those of `folding`; expected values are computed from the trained module, see `suspects`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from repmlp_deploy.convert.diagnosis.suspects import (
    BatchNorm,
    Check,
    Fault,
    Finding,
    affine_by_running,
    conv_checks,
    merged_checks,
    merged_matrix,
    parameter_checks,
    wrong_affines,
)
from repmlp_deploy.nets.blocks.conv_bn import ChannelAffine, ConvBN, FoldedConv
from repmlp_deploy.nets.blocks.repmlp2021 import AddedPerceptron, FoldedRepMLP, RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import FoldedBlock, RepMLPBlock
from repmlp_deploy.nets.blocks.repmlp_unit import FFN, FoldedUnit, RepMLPUnit

__all__ = ["added_perceptron_checks", "folded_checks", "head_checks", "unit_forward"]


def folded_checks(trained: nn.Module, folded: nn.Module) -> Iterator[Check] | None:
    """The checks of a folded module; None where there are none for its kind."""
    match trained, folded:
        case RepMLPUnit(), FoldedUnit():
            return _unit_checks(trained, folded)
        case RepMLPBlock(), FoldedBlock():
            return _block_checks(trained, folded)
        case RepMLP(), FoldedRepMLP():
            return _repmlp_checks(trained, folded)
        case ConvBN(), FoldedConv():
            return conv_checks(trained, folded.conv)
        case nn.BatchNorm2d(), ChannelAffine():
            return _affine_checks(trained, folded)
    return None


def head_checks(norm: BatchNorm, head: nn.Linear, folded: nn.Linear) -> Iterator[Check]:
    """The checks of a linear head that absorbed the BatchNorm in front of the mean."""

    def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        weight = head.weight.detach().double()
        return weight * a, head.bias.detach().double() + weight @ b

    yield from _absorbed(
        "head · head_norm fold", norm, values, [("head.weight", folded.weight), ("head.bias", folded.bias)]
    )


def added_perceptron_checks(trained: RepMLP, folded: AddedPerceptron) -> Iterator[Check]:
    """The checks of the global perceptron of 2021 that absorbed the BatchNorm behind its pool."""
    if trained.fc1_fc2 is None:
        return
    fc1, part = trained.fc1_fc2.fc1, "global perceptron"
    if trained.avg is not None:

        def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            weight = fc1.weight.detach().double()
            a, b = (each.repeat_interleave(fc1.in_features // trained.C) for each in (a, b))
            return weight * a, fc1.bias.detach().double() + weight @ b

        stored = [("fc1_fc2.fc1.weight", folded.fc1.weight), ("fc1_fc2.fc1.bias", folded.fc1.bias)]
        yield from _absorbed(part, trained.avg.bn, values, stored)
    else:
        yield from parameter_checks(fc1, folded.fc1, part)
    yield from parameter_checks(trained.fc1_fc2.fc2, folded.fc2, part)


@torch.no_grad()
def unit_forward(trained: RepMLPUnit, x: Tensor, got: Tensor) -> Finding:
    """What a folded unit did instead, when every tensor it holds is right.

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
        ("global perceptron", "gate of the map behind prebn1", x + ungated * block.gp(trained.prebn1(normal))),
        ("residual", "forgotten", y),
    ):
        z = first + trained.ffn_block(trained.prebn2(first))
        if torch.allclose(got, z, rtol=1e-5, atol=1e-5 * float(z.abs().max())):
            return Finding(part, fault)
    return Finding("forward", "its tensors are right, what it does with them is not")


def _bias_of(block: RepMLPBlock, like: Tensor) -> Tensor:
    """What a block answers to zeros before its gate, as a map."""
    zeros = torch.zeros_like(like)
    answer: Tensor = block(zeros) / block.gp(zeros)
    return answer


def _absorbed(
    part: str,
    bn: BatchNorm,
    values: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    stored: list[tuple[str, Tensor]],
) -> Iterator[Check]:
    """The checks of tensors that absorbed `bn`; `values` makes them of an (a, b)."""
    expected = values(*affine_by_running(bn))
    for i, (name, got) in enumerate(stored):

        def faults(i: int = i) -> Iterator[Fault]:
            for what, a, b in wrong_affines(bn):
                yield part, what, values(a, b)[i]

        yield Check(part, name, got.detach(), expected[i].view(got.shape), faults)


def _affine_checks(bn: nn.BatchNorm2d, folded: ChannelAffine) -> Iterator[Check]:
    def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.view(-1, 1, 1), b.view(-1, 1, 1)

    return _absorbed("norm fold", bn, values, [("scale", folded.scale), ("shift", folded.shift)])


def _block_checks(block: RepMLPBlock, folded: FoldedBlock) -> Iterator[Check]:
    yield from merged_checks(block, folded.weight.detach().transpose(1, 2), folded.bias.detach(), name="fc3 transposed")
    yield from parameter_checks(block.gp, folded.gp, "global perceptron")


def _repmlp_checks(block: RepMLP, folded: FoldedRepMLP) -> Iterator[Check]:
    if folded.fc1_fc2 is not None:
        yield from added_perceptron_checks(block, folded.fc1_fc2)
    weight, bias = folded.fc3.detach().transpose(1, 2), folded.bias.detach()[:, 0]
    yield from merged_checks(block, weight, bias, name="fc3 transposed")


def _unit_checks(unit: RepMLPUnit, folded: FoldedUnit) -> Iterator[Check]:
    """In the order of the data: prebn1 and FC3, the gate, the FFN."""
    block = unit.repmlp_block
    S, J, area = folded.S, folded.J, folded.h * folded.w
    merged = [merged_matrix(block, s) for s in range(S)]
    matrix, bias = (torch.stack([pair[i] for pair in merged]) for i in (0, 1))  # (S, h·w, h·w), (S, h·w)
    row_sum = matrix.sum(dim=2)

    def prebn1(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        offset = b.view(J, S, 1) * row_sum + bias
        return a.view(J, S, 1), offset / a.view(J, S, 1) if folded.divided else offset

    yield from _absorbed(
        "prebn1 fold", unit.prebn1, prebn1, [("scale", folded.scale), ("offset", folded.offset.view(J, S, area))]
    )
    yield from _gate_checks(unit, folded)
    stored = folded.fc3.detach().view(S, area, area)
    yield Check("fc3", "fc3", stored, matrix.transpose(1, 2), lambda: [("fc3", "matrix transposed", matrix)])
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
    yield from _absorbed("global perceptron", unit.prebn1, values, stored)
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
        for check in conv_checks(ffn.ffn_fc2, last):
            yield _renamed(check)


def _renamed(check: Check) -> Check:
    """The check of a convolution as that of the FFN's second."""
    part = "ffn_fc2 · bn fold"

    def faults() -> Iterator[Fault]:
        for _, what, value in check.faults():
            yield part, what, value

    return replace(check, part=part, name=check.name.replace("conv.", "ffn.2."), faults=faults)
