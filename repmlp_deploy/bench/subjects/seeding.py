"""Seeded weights and inputs: the same on every machine, for benchmarks that need no trained checkpoint.

Every tensor depends on its name and shape alone. BatchNorm statistics are far from (0, 1) and scales from 1, so that
merging and folding change every weight and a transformation that forgets one shows in the output. Kernels are scaled by
their fan-in, so that activations keep their size through the depth. Latency depends on none of this as long as
values stay normal numbers: denormals, which would cost a hundredfold, do not occur.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.card import ModelCard, Preprocessing
from repmlp_deploy.convert.job import of_whole_levels
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.nets.families import build_network

__all__ = ["seeded_network", "seeded_samples", "seeded_tensor"]

_SAMPLES_SEED = 7  # another than the probe's, so that no range is measured on what is compared


def seeded_network(card: ModelCard) -> nn.Module:
    """Return the card's network with seeded weights: evaluation mode, float32, no gradients."""
    with torch.device("meta"):
        network = build_network(card)
    state = {
        name: torch.from_numpy(seeded_tensor(name, tuple(value.shape))) for name, value in network.state_dict().items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(requires_grad=False).eval()


def seeded_tensor(name: str, shape: Sequence[int]) -> NDArray[np.generic]:
    """Return the tensor of this name and shape: float32, or int64 for a BatchNorm's counter."""
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")))
    kind = name.rsplit(".", maxsplit=1)[-1]
    if kind == "num_batches_tracked":
        return np.asarray(1000, dtype=np.int64)
    if kind == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if kind == "weight" and len(shape) == 1:  # a BatchNorm's scale; below 1, so that residual stacks stay tame
        return rng.uniform(0.25, 0.75, shape).astype(np.float32)
    if len(shape) == 1:  # means and biases
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    kernel = rng.standard_normal(shape, dtype=np.float32)
    kernel /= np.float32(math.sqrt(math.prod(shape[1:])))
    return kernel


def seeded_samples(shape: Sequence[int], samples: int, how: Preprocessing | None) -> NDArray[np.float32]:
    """Return (samples, C, H, W) float32: what images give if they are normalised as `how` says, or any values."""
    values = probe_inputs(shape, samples, _SAMPLES_SEED)
    return values if how is None else of_whole_levels(values, how)
