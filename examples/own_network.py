"""Merge, prove and export a network of your own, whatever its classes are called.

python examples/own_network.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from repmlp_deploy import Predictor, export


class Block(nn.Module):
    """A 3×3 convolution, a 1×1 convolution and a shortcut in parallel, each with a BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.narrow = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.shortcut = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branches: (N, C, H, W) -> (N, C, H, W)."""
        return torch.relu(self.wide(x) + self.narrow(x) + self.shortcut(x))


def make_network() -> nn.Module:
    """Return a network that stands for a trained one: its BatchNorms have seen data."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        Block(16),
        Block(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    for _ in range(20):
        network(torch.randn(16, 3, 32, 32) * 2 + 1)
    return network.eval()


def main() -> None:
    """Export the network, and compare the bundle with it on new inputs."""
    network = make_network()
    bundle = export(network, example_input=torch.zeros(1, 3, 32, 32), formats="onnx", out="artifacts/own-network")
    images = np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        trained = network(torch.from_numpy(images)).numpy()
    with Predictor(bundle.folder) as predictor:
        (deployed,) = predictor.run(**{bundle.manifest.input.name: images}).values()
    print(f"largest difference: {np.abs(trained - deployed).max():.0e}")
    assert np.allclose(trained, deployed, atol=1e-4)


if __name__ == "__main__":
    main()
