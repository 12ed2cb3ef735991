"""What a probe's samples look like, and that none of them is left out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from repmlp_deploy.convert.proof.probe import KINDS, probe_like, run_network

IMAGE = np.zeros((1, 3, 20, 28), np.float32)


def test_every_kind_of_sample_is_what_it_says() -> None:
    samples = dict(zip(KINDS, probe_like(IMAGE), strict=True))
    assert samples["constant"].std(axis=(1, 2)).max() == 0
    assert len(set(samples["constant"][:, 0, 0])) == 3
    assert [np.count_nonzero(channel) for channel in samples["impulse"]] == [1, 1, 1]
    assert len({int(channel.argmax()) for channel in samples["impulse"]}) == 3
    china, flower = samples["photograph china"], samples["photograph flower"]
    assert np.abs(china - flower).max() > 1
    assert all(0.3 < photograph.std() < 3 for photograph in (china, flower))
    smooth = np.abs(np.diff(china, axis=2)).mean() / china.std()
    assert smooth < 0.7 * np.abs(np.diff(samples["random"], axis=2)).mean() / samples["random"].std()


def test_samples_are_seeded_and_all_different() -> None:
    inputs = probe_like(IMAGE)
    assert np.array_equal(inputs, probe_like(IMAGE))
    assert not np.array_equal(inputs, probe_like(IMAGE, seed=1))
    assert len(np.unique(inputs.reshape(len(KINDS), -1), axis=0)) == len(KINDS)
    assert inputs.dtype == np.float32


def test_other_inputs_than_photographs_fit() -> None:
    for shape in ((1, 1, 5, 7), (2, 4, 1, 1), (1, 12), (3,)):
        inputs = probe_like(np.zeros(shape, np.float32))
        assert inputs.shape == (len(KINDS), *shape[1:])
        assert np.isfinite(inputs).all()
    indices = np.array([[3, 1], [2, 0]])
    rows = probe_like(indices)
    assert rows.dtype == indices.dtype
    assert {tuple(row) for row in rows} == {(3, 1), (2, 0)}


def test_an_example_says_how_large_values_are() -> None:
    example = np.random.default_rng(0).normal(100, 30, (4, 3, 8, 8)).astype(np.float32)
    inputs = probe_like(example)
    assert abs(inputs.mean() - example.mean()) < 1
    assert abs(inputs.std() - example.std()) < 1


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: (x,), lambda x: {"scores": x}, lambda x: [None, {"a": x}]])
def test_a_network_gives_a_tuple_of_outputs_however_it_returns_them(kind: Callable[[torch.Tensor], object]) -> None:
    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return kind(x)

    x = np.ones((2, 3), np.float32)
    outputs = run_network(Network(), x)
    assert isinstance(outputs, tuple)
    assert [np.array_equal(output, x) for output in outputs] == [True]
