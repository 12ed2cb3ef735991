"""Blocks of other implementations, recognised by their structure and made ours, without importing them.

Every branched block type of the table says by `adopted` which structure it recognises, as in the official
releases, in mmpretrain, and in most copies of them.

Names prove nothing. A foreign block is taken for ours only after both have computed the same, ours merged and both in
float64, on a map of several partitions if the foreign block accepts one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repmlp_deploy.nets.block_types import BLOCKS, block_of
from repmlp_deploy.nets.blocks.protocol import Reparameterizable

__all__ = ["adopt_blocks", "has_branches", "holds_blocks"]

_CLOSE = 1e-9  # of the largest output, in float64: far above its rounding, far below any other arithmetic


def adopt_blocks(network: nn.Module, *, confirm: bool = True) -> dict[nn.Module, Reparameterizable]:
    """Return every foreign block in `network` that is not merged yet, with the block of ours that equals it.

    Ours share the tensors of theirs, and the gate `gp` as a module.

    Args:
        network: in evaluation mode.
        confirm: compare outputs; without it, blocks are only recognised.

    Raises:
        ValueError: a block has the structure but computes something else, or its partition is unknown.
    """
    found: dict[nn.Module, Reparameterizable] = {}
    for name, module in network.named_modules():
        try:
            ours = _adopted(module)
        except (AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{_called(name, module)} has the parts of a RepMLP block, but {error}") from None
        if ours is None:
            continue
        found[module] = ours
        if confirm:
            _confirm(ours, module, _called(name, module))
    return found


def has_branches(network: nn.Module) -> bool:
    """Return whether `network` has a block, ours or foreign, that is not merged yet."""
    own = (block for module in network.modules() if (block := block_of(module)) is not None and block.branched)
    return any(not block.deploy for block in own) or bool(adopt_blocks(network, confirm=False))


def holds_blocks(network: nn.Module) -> bool:
    """Return whether `network` has a block, ours or foreign, merged or not; merged foreign ones are not recognised."""
    own = (block_of(module) for module in network.modules())
    return any(block is not None and block.branched for block in own) or bool(adopt_blocks(network, confirm=False))


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the module'} ({type(module).__name__})"


def _adopted(module: nn.Module) -> Reparameterizable | None:
    """Return the first block of the table that shares the structure of a foreign module."""
    if type(module) in BLOCKS.values():
        return None
    ours = (kind.adopted(module) for kind in BLOCKS.values() if kind.branched)
    found = next((block for block in ours if block is not None), None)
    return None if found is None else found.eval()


@torch.no_grad()
def _confirm(ours: Reparameterizable, theirs: nn.Module, name: str) -> None:
    """Raise ValueError unless ours, merged, computes the same as theirs."""
    x, expected = _first_output(copy.deepcopy(theirs).double(), ours.example_shapes(), name)
    merged = copy.deepcopy(ours).double().merged()
    got: Tensor = merged(x)
    if got.shape != expected.shape or not float((got - expected).abs().max()) <= _CLOSE * float(expected.abs().max()):
        raise ValueError(
            f"{name} has the parts of a RepMLP block but computes something else, so it cannot be merged: "
            "build it with the blocks of repmlp_deploy.nets"
        )


def _first_output(block: nn.Module, shapes: Sequence[tuple[int, ...]], name: str) -> tuple[Tensor, Tensor]:
    """Return a random input of the first of `shapes` that `block` accepts, and the output."""
    generator, said = torch.Generator().manual_seed(0), ""
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        try:
            return x, block(x.clone())
        except (RuntimeError, ValueError, AssertionError) as error:
            size = "x".join(str(edge) for edge in shape[2:])
            said = f"{size}: {' '.join(str(error).split())[:200] or type(error).__name__}"
    raise ValueError(f"{name} has the parts of a RepMLP block but does not run on a map of {said}")
