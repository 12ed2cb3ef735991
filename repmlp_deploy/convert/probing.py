"""The probe: seeded inputs, and what the trained network answers to them in float64 and in float32."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.bundle import Probe

__all__ = ["SAMPLES", "SEED", "probe_inputs", "record_probe", "run_network"]

SEED = 20210505
SAMPLES = 3


def probe_inputs(shape: Sequence[int], samples: int = SAMPLES, seed: int = SEED) -> NDArray[np.float32]:
    """(samples, C, H, W) float32 that look like normalised images to a network.

    Each sample has a colour of its own, waves of a few lengths and directions, and fine noise: something for every
    stage, from single positions to what survives global pooling, and different in every sample.
    """
    rng = np.random.default_rng(seed)
    c, h, w = shape
    y, x = np.mgrid[0:h, 0:w] / max(h, w)
    colour = 1.2 * rng.standard_normal((samples, c, 1, 1))
    noise = 0.4 * rng.standard_normal((samples, c, h, w))
    inputs = colour + noise
    for cycles in (1, 3, 9, 27):
        direction, phase = rng.uniform(0, 2 * np.pi, (2, samples, c, 1, 1))
        wave = np.cos(2 * np.pi * cycles * (np.cos(direction) * x + np.sin(direction) * y) + phase)
        inputs += 0.5 * wave
    return inputs.astype(np.float32)


@torch.no_grad()
def run_network(network: nn.Module, inputs: NDArray[np.floating]) -> NDArray[np.floating]:
    """The network's output for a batch, as numpy."""
    output: NDArray[np.floating] = network(torch.from_numpy(np.ascontiguousarray(inputs))).numpy()
    return output


def record_probe(trained: nn.Module, shape: Sequence[int]) -> Probe:
    """Probe inputs of (C, H, W) with the trained network's answers; the float64 copy of it is gone afterwards."""
    inputs = probe_inputs(shape)
    reference = run_network(copy.deepcopy(trained).double(), inputs.astype(np.float64))
    return Probe(inputs, reference.astype(np.float64), run_network(trained, inputs).astype(np.float32))
