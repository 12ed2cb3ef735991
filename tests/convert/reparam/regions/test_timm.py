"""Real networks of timm, every BatchNorm redrawn: proved, without BatchNorms, with no more layers than timm leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from repmlp_deploy.convert.reparam.regions import merge_regions
from support.timm_networks import redrawn_timm

NETWORKS = {"repvgg_a0": 64, "fastvit_t8": 64, "starnet_s1": 64, "resnet18": 64}
"""Network to the edge of its input. `benchmarks/regions.py` goes through more of them, which takes minutes."""


@pytest.fixture
def double() -> Iterator[None]:
    """Make float64 the default: timm's own merge builds its convolutions in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _layers(network: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())


@pytest.mark.usefixtures("double")
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_timm_merges_at_least_as_far_as_by_its_own_methods(name: str) -> None:
    from timm.utils.model import reparameterize_model

    network, x = redrawn_timm(name, NETWORKS[name])
    by_timm = _layers(reparameterize_model(copy.deepcopy(network)))
    expected = network(x)
    merged = merge_regions(network, (x,))
    for samples, reference in ((x, expected), (x[:1], expected[:1])):
        error = float((merged.value(samples) - reference).abs().max() / reference.abs().max())
        assert error <= 1e-12
    between = merged.report.before["products"] - _layers(network)  # products of two values stay
    assert merged.report.after["products"] - between <= by_timm
    assert merged.report.after["BatchNorms"] == 0
