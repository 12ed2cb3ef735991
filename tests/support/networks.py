"""Small networks whose BatchNorms are far from the identity."""

from __future__ import annotations

import torch
from torch import nn


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and BatchNorm statistics such that a merge that forgets one of them is visibly wrong."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return network.eval().requires_grad_(requires_grad=False)
