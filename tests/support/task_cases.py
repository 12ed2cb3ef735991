"""Small networks of every task with random weights and BatchNorm statistics, written as checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from golden import fill
from repmlp_deploy.card import ModelCard
from repmlp_deploy.nets.families import build_network

_LEVELS = {"mean": (120.0, 115.0, 100.0), "std": (60.0, 57.0, 55.0)}


def small_card(family: str, **changes) -> ModelCard:
    """A card of a family at 32×32, narrow, one block a stage at least."""
    trunk = {"channels": (8, 16), "depths": (1, 2), "sharesets": (2, 4), "kernels": (1, 3)}
    networks = {
        "pspnet": ("segment", {**trunk, "bins": (1, 3), "hidden": 12, "classes": 5}),
        "repmlpnet-backbone": ("features", {**trunk, "out_indices": (0, 1)}),
        "repmlpnet": ("classify", {**trunk, "classes": 5}),
        "repmlp-resnet": (
            "classify",
            {
                "block": "light",
                "depths": (1, 3, 2, 1),
                "channels": (16, 32, 64, 32),
                "stem": 8,
                "partition": (2, 2),
                "groups": 2,
                "kernels": (1, 3),
                "reduction": 2,
                "classes": 5,
            },
        ),
        "mobilefacenet": (
            "embed",
            {
                "stem": 8,
                "channels": (8, 16, 16),
                "down": (2, 2, 2),
                "depths": (1, 2, 1),
                "units": ("bottleneck", "repmlp", "repmlp"),
                "sharesets": (1, 4, 8),
                "final": 24,
                "embedding": 10,
            },
        ),
    }
    task, network = networks[family]
    size = changes.pop("input_size", (32, 32))
    return ModelCard.model_validate(
        {
            "name": f"small-{family}",
            "family": family,
            "task": task,
            "input_size": size,
            "network": network | changes,
            "preprocessing": {"resize": {"mode": "exact", "size": size}, **_LEVELS},
        }
    )


def filled(network: nn.Module) -> nn.Module:
    """The network with deterministic random weights and BatchNorm statistics far from (0, 1).

    Outside residual units BatchNorm scales are 2.5 times the golden cases', so that what an input says survives chains.
    """
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    weights = {key: torch.from_numpy(np.asarray(value)) for key, value in fill.fill_state_dict(shapes).items()}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not any(part in name for part in ("_block", "prebn")):
            weights[f"{name}.weight"] *= 2.5
    network.load_state_dict(weights)
    return network.eval()


def small_network(family: str, **changes) -> nn.Module:
    """The network of `small_card`, filled."""
    return filled(build_network(small_card(family, **changes)))


def network_reaching(factor: float) -> nn.Module:
    """A RepMLPNet whose values between the convolutions of one FFN are larger by a factor, and nowhere else."""
    network = filled(build_network(small_card("repmlpnet")))
    ffn = network.stages[1][0].ffn_block
    with torch.no_grad():
        ffn.ffn_fc1.bn.weight *= factor
        ffn.ffn_fc1.bn.bias *= factor
        ffn.ffn_fc2.bn.running_var.fill_(factor**2)
    return network


def save_network(network: nn.Module, path: Path) -> Path:
    """Its state dict in `path`."""
    torch.save(network.state_dict(), path)
    return path


def random_inputs(shape, seed=0) -> torch.Tensor:
    """Float64 inputs from a fixed seed."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
