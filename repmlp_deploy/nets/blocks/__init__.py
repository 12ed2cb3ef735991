"""The blocks of re-parameterizable networks: one file per block type."""

from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import (
    FFN,
    ConvBN,
    GlobalPerceptron,
    MergeableConvBN,
    RepMLPBlock,
    RepMLPUnit,
    switch_blocks,
)

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
