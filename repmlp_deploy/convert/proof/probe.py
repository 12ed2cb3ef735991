"""The probe: seeded inputs, and the trained network's outputs for them in float64 and in float32.

Random samples exercise everything at once. The others have a structure that noise does not have: a photograph has edges
and smooth areas, an impulse reaches single columns of every FC3, and a constant shows what happens at the borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from repmlp_deploy.bundle import Probe
from repmlp_deploy.card import data_root
from repmlp_deploy.convert.proof.summation import PlainSums
from repmlp_deploy.errors import InputError
from repmlp_deploy.nets.flat import flatten_outputs
from repmlp_deploy.nets.surgery import in_double
from repmlp_deploy.text import kind_and_line

__all__ = ["KINDS", "SEED", "probe_inputs", "probe_like", "record_probe", "run_network"]

SEED = 20210505
KINDS = ("random", "photograph china", "impulse", "constant", "random", "photograph flower")
"""What every sample of a probe is; the first is what a batch of one runs with."""

_MAP_AXES = 3  # (C, H, W)
_IMPULSE = 8.0  # deviations of an image's values
_GREY, _DEVIATION = 0.449, 0.226  # of ImageNet's pixels, over 255


def probe_inputs(shape: Sequence[int], samples: int = 3, seed: int = SEED) -> NDArray[np.float32]:
    """Return (samples, C, H, W) float32 that look like normalised images to a network.

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


def probe_like(example: NDArray[Any], seed: int = SEED) -> NDArray[Any]:
    """Return (len(KINDS), …) inputs of the shape, type, mean and deviation of `example` (n, …).

    Where they are no float maps (C, H, W), noise takes the place of photographs; what is no float is taken from the
    example's rows, whose values may have a meaning.
    """
    rng = np.random.default_rng(seed)
    samples, shape = len(KINDS), example.shape[1:]
    if not np.issubdtype(example.dtype, np.floating):
        rows: NDArray[Any] = example[rng.permutation(np.arange(samples) % len(example))]
        return rows
    maps = len(shape) == _MAP_AXES
    inputs = probe_inputs(shape, samples, seed) if maps else rng.standard_normal((samples, *shape))
    for i, kind in enumerate(KINDS):
        if kind.startswith("photograph") and maps:
            inputs[i] = _photograph(kind.split()[1], shape)
        elif kind == "impulse" and shape:
            inputs[i] = _impulse(shape)
        elif kind == "constant" and shape:
            inputs[i] = rng.standard_normal((shape[0] if len(shape) > 1 else 1, *(1 for _ in shape[1:])))
    if example.std() > 0:
        inputs = (inputs - inputs.mean()) / inputs.std() * example.std() + example.mean()
    return inputs.astype(example.dtype)


def _photograph(name: str, shape: Sequence[int]) -> NDArray[np.float64]:
    """Return a photograph of `models/samples` as (C, H, W), normalised; further channels repeat red, green, blue."""
    c, h, w = shape
    with Image.open(data_root() / "samples" / "photographs" / f"{name}.jpg", formats=["JPEG"]) as image:
        pixels = np.asarray(image.convert("RGB").resize((w, h), Image.Resampling.BILINEAR), np.float64)
    return ((pixels / 255 - _GREY) / _DEVIATION).transpose(2, 0, 1)[np.arange(c) % 3]


def _impulse(shape: Sequence[int]) -> NDArray[np.float64]:
    """Return zeros except one place in every channel, off every axis of symmetry; a vector is a single channel."""
    values = np.zeros(shape)
    channels = values.reshape(shape[0] if len(shape) > 1 else 1, -1)
    channel, size = np.arange(len(channels)), channels.shape[1]
    channels[channel, (size * 2 // 5 + shape[-1] // 4 + 2 * channel) % size] = _IMPULSE
    return values


@torch.no_grad()
def run_network(network: nn.Module, *inputs: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Run the network on a batch and return its outputs as numpy, in the order of `flatten_outputs`."""
    answer = network(*(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs))
    return tuple(x.numpy() for x in flatten_outputs(answer).values())


def record_probe(trained: nn.Module, *inputs: NDArray[Any]) -> Probe:
    """Return the inputs with the trained network's outputs, in float64 and in float32.

    Long sums in float32 are added as plain runtimes add them, see `summation`.

    Raises:
        InputError: the network does not run in float64, or gives no row per sample.
    """
    precise = [value.astype(np.float64) if np.issubdtype(value.dtype, np.floating) else value for value in inputs]
    try:
        references = run_network(in_double(trained), *precise)
    except Exception as error:  # noqa: BLE001 - a user's code raises anything
        where = f"in float64 on {len(inputs[0])} samples, which the proof needs"
        remedy = (
            "keep tensors that are no weights as buffers (register_buffer), and make others in the type of the input: "
            "in float64 these change their type with the network"
        )
        raise InputError(f"the network does not run {where}: {kind_and_line(error)}; {remedy}") from None
    _require_rows(references, len(inputs[0]))
    with PlainSums():
        rounded = run_network(trained, *inputs)
    answers = [
        (reference.astype(np.float64), float32.astype(np.float32))
        for reference, float32 in zip(references, rounded, strict=True)
    ]
    return Probe(inputs[0], *answers[0], tuple(inputs[1:]), tuple(answers[1:]))


def _require_rows(outputs: Sequence[NDArray[Any]], samples: int) -> None:
    """Raise unless every output has a row per sample."""
    for output in outputs:
        if output.ndim == 0 or len(output) != samples:
            raise InputError(
                f"an output has shape {output.shape} for {samples} samples; expected ({samples}, …): what a network "
                "answers to a sample must not depend on the others"
            )
