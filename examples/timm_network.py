"""Merge and export a network of timm, and compare the bundle with it; nothing is downloaded.

python examples/timm_network.py [NAME]
"""

from __future__ import annotations

import sys

import numpy as np
import timm
import torch
from torch import nn

from repmlp_deploy import Predictor, export

SIZE = 64


def randomized(network: nn.Module) -> nn.Module:
    """Return the network with statistics as after training, so that its BatchNorms do something."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def main(name: str) -> None:
    """Write `artifacts/NAME`, and print what merging did and how far the bundle is from the network."""
    torch.manual_seed(0)
    network = randomized(timm.create_model(name, pretrained=False, num_classes=10))
    bundle = export(network, example_input=torch.zeros(1, 3, SIZE, SIZE), formats="onnx", out=f"artifacts/{name}")
    print(next(note for note in bundle.manifest.notes if note.startswith("regions: ")))
    images = np.random.default_rng(1).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    with torch.no_grad():
        trained = network(torch.from_numpy(images)).numpy()
    with Predictor(bundle.folder) as predictor:
        (deployed,) = predictor.run(**{bundle.manifest.input.name: images}).values()
    print(f"largest difference: {np.abs(trained - deployed).max() / np.abs(trained).max():.0e} of the largest output")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "repvgg_a0")
