"""The table of block types. To add one, write its file in `nets.blocks` and give it an entry here."""

from __future__ import annotations

from repmlp_deploy.nets.blocks.conv_bn import ConvBN, MergeableConvBN
from repmlp_deploy.nets.blocks.protocol import Reparameterizable
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.blocks.repmlp_unit import RepMLPUnit
from repmlp_deploy.nets.networks.repmlpnet import RepMLPBackbone, RepMLPNet, RepMLPTrunk

__all__ = ["BLOCKS", "block_of", "has_fold_rule"]

BLOCKS: dict[str, type[Reparameterizable]] = {
    "repmlp-2022": RepMLPBlock,
    "repmlp-2021": RepMLP,
    "repmlp-unit": RepMLPUnit,
    "conv-bn": ConvBN,
    "mergeable-conv-bn": MergeableConvBN,
    # networks whose final norm moves when they are folded
    "repmlpnet": RepMLPNet,
    "repmlpnet-trunk": RepMLPTrunk,
    "repmlpnet-backbone": RepMLPBackbone,
}
"""Name to module class. A type that is not here is never merged, folded or blamed as a block."""


def block_of(module: object) -> Reparameterizable | None:
    """Return `module` as a block if its class, or a base of it, is in the table."""
    return module if isinstance(module, Reparameterizable) and isinstance(module, tuple(BLOCKS.values())) else None


def has_fold_rule(module: object) -> bool:
    """Return whether the class of `module` itself is in the table: a subclass may compute something else."""
    return type(module) in BLOCKS.values()
