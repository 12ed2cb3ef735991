"""The blocks of re-parameterizable networks: one file per block type."""

from repmlp_deploy.nets.blocks.conv_bn import ConvBN, MergeableConvBN
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import GlobalPerceptron, RepMLPBlock
from repmlp_deploy.nets.blocks.repmlp_unit import FFN, RepMLPUnit
from repmlp_deploy.nets.surgery import switch_blocks

__all__ = [
    "FFN",
    "ConvBN",
    "GlobalPerceptron",
    "MergeableConvBN",
    "RepMLP",
    "RepMLPBlock",
    "RepMLPUnit",
    "switch_blocks",
]
