"""RepMLP blocks of other implementations, recognised by their structure and made ours, without importing them.

A block still to be merged has a 1×1 convolution `fc3` without a bias, a BatchNorm `fc3_bn`, and branches `repconvK` of
a `conv` and a `bn`; that of 2022 has a gate `gp`, that of 2021 adds an `fc1_fc2` where there are several partitions. So
it is in the official releases, in mmpretrain, and in most copies of them. Only the partition's edges cannot be read off
tensors: they are attributes, `h` and `w` or `path_h` and `path_w`.

Names prove nothing. Before a block is taken for ours it is compared with ours, merged and in float64, on a map of
several partitions where it accepts one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repmlp_deploy.nets.blocks.conv_bn import ConvBN
from repmlp_deploy.nets.blocks.repmlp2021 import AddedPerceptron, PooledNorm, RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock

__all__ = ["adopt_blocks", "has_branches"]

BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch offers no public name for 1d, 2d and 3d alike

_EDGES = (("h", "w"), ("path_h", "path_w"))
_CLOSE = 1e-9  # of the largest output, in float64: far above its rounding, far below any other arithmetic


def adopt_blocks(network: nn.Module, *, confirm: bool = True) -> dict[nn.Module, RepMLPBlock | RepMLP]:
    """Every foreign RepMLP block in `network` that still has its branches, and the block of ours that it is.

    Ours share the tensors of theirs, and the gate `gp` as it is.

    Args:
        network: in evaluation mode.
        confirm: compare outputs; without it, blocks are only recognised.

    Raises:
        ValueError: a block has the structure but computes something else, or its partition cannot be told.
    """
    found: dict[nn.Module, RepMLPBlock | RepMLP] = {}
    for name, module in network.named_modules():
        if _unmerged(module):
            try:
                found[module] = _adopted(module)
            except (AttributeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{_called(name, module)} has the parts of a RepMLP block, but {error}") from None
            if confirm:
                _confirm(found[module], module, _called(name, module))
    return found


def has_branches(network: nn.Module) -> bool:
    """Return whether `network` has a RepMLP block, ours or foreign, that is not merged yet."""
    own = (module for module in network.modules() if isinstance(module, RepMLPBlock | RepMLP))
    return any(not block.deploy for block in own) or bool(adopt_blocks(network, confirm=False))


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the module'} ({type(module).__name__})"


def _unmerged(module: nn.Module) -> bool:
    if type(module) in (RepMLPBlock, RepMLP):
        return False
    fc3, bn = getattr(module, "fc3", None), getattr(module, "fc3_bn", None)
    return isinstance(fc3, nn.Conv2d) and fc3.bias is None and fc3.kernel_size == (1, 1) and isinstance(bn, BatchNorm)


def _adopted(block: nn.Module) -> RepMLPBlock | RepMLP:
    edges = next((pair for pair in _EDGES if all(isinstance(getattr(block, edge, None), int) for edge in pair)), None)
    if edges is None:
        said = " or ".join(f"{h} and {w}" for h, w in _EDGES)
        raise ValueError(f"its partition is unknown: set the attributes {said}")
    h, w = (getattr(block, edge) for edge in edges)
    ours = _of_2022(block, h, w) if hasattr(block, "gp") else _of_2021(block, h, w)
    for name, child in block.named_children():
        if kernel := re.fullmatch(r"repconv(\d+)", name):
            ours.add_module(name, _branch(child))
            ours.kernels = (*ours.kernels, int(kernel[1]))
    return ours.eval()


def _of_2022(block: nn.Module, h: int, w: int) -> RepMLPBlock:
    ours = RepMLPBlock.__new__(RepMLPBlock)
    nn.Module.__init__(ours)
    ours.fc3, ours.fc3_bn, ours.gp = block.fc3, block.fc3_bn, block.gp  # type: ignore[assignment]
    ours.S, ours.h, ours.w, ours.kernels = ours.fc3.groups, h, w, ()
    ours.C = next(m.in_channels for m in block.gp.modules() if isinstance(m, nn.Conv2d))  # type: ignore[union-attr]
    ours.as_convolution = False
    if ours.fc3.weight.shape[:2] != (ours.S * h * w, h * w):
        raise ValueError(f"its fc3 has shape {tuple(ours.fc3.weight.shape)}, not that of {h}x{w} partitions")
    return ours


def _of_2021(block: nn.Module, h: int, w: int) -> RepMLP:
    ours = RepMLP.__new__(RepMLP)
    nn.Module.__init__(ours)
    ours.fc3, ours.fc3_bn = block.fc3, block.fc3_bn  # type: ignore[assignment]
    ours.groups, ours.h, ours.w, ours.kernels = ours.fc3.groups, h, w, ()
    ours.H, ours.W = (int(getattr(block, edge)) for edge in ("H", "W"))
    ours.C, ours.O = (channels // (h * w) for channels in (ours.fc3.in_channels, ours.fc3.out_channels))
    ours.as_convolution = False
    ours.fc1_fc2 = ours.avg = None
    if (h, w) != (ours.H, ours.W):
        ours.fc1_fc2 = AddedPerceptron.__new__(AddedPerceptron)
        nn.Module.__init__(ours.fc1_fc2)
        ours.fc1_fc2.fc1, ours.fc1_fc2.fc2 = block.fc1_fc2.fc1, block.fc1_fc2.fc2  # type: ignore[union-attr, assignment]
        ours.avg = PooledNorm.__new__(PooledNorm)
        nn.Module.__init__(ours.avg)
        ours.avg.bn = block.avg.bn  # type: ignore[union-attr, assignment]
    return ours


def _branch(branch: nn.Module) -> ConvBN:
    ours = ConvBN.__new__(ConvBN)
    nn.Module.__init__(ours)
    ours.conv, ours.bn, ours.relu = branch.conv, branch.bn, False  # type: ignore[assignment]
    return ours


@torch.no_grad()
def _confirm(ours: RepMLPBlock | RepMLP, theirs: nn.Module, name: str) -> None:
    """Raise unless ours, merged, computes what theirs does."""
    sizes = [(ours.H, ours.W)] if isinstance(ours, RepMLP) else [(2 * ours.h, 3 * ours.w), (ours.h, ours.w)]
    x, expected = _first_answer(copy.deepcopy(theirs).double(), ours.C, sizes, name)
    merged = copy.deepcopy(ours).double()
    merged.switch_to_deploy()
    got: Tensor = merged(x)
    if got.shape != expected.shape or not float((got - expected).abs().max()) <= _CLOSE * float(expected.abs().max()):
        raise ValueError(
            f"{name} has the parts of a RepMLP block but computes something else, so it cannot be merged: "
            "build it with the blocks of repmlp_deploy.nets"
        )


def _first_answer(
    block: nn.Module, channels: int, sizes: Sequence[tuple[int, int]], name: str
) -> tuple[Tensor, Tensor]:
    """A random map of the first of `sizes` that `block` accepts, and what it answers."""
    generator, said = torch.Generator().manual_seed(0), ""
    for height, width in sizes:
        x = torch.randn(2, channels, height, width, dtype=torch.float64, generator=generator)
        try:
            return x, block(x.clone())
        except (RuntimeError, ValueError, AssertionError) as error:
            said = f"{height}x{width}: {' '.join(str(error).split())[:200] or type(error).__name__}"
    raise ValueError(f"{name} has the parts of a RepMLP block but does not run on a map of {said}")
