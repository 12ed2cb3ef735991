"""Bisecting graphs that take uint8 images, whatever their first convolution is like."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.diagnosis.bisect import GraphValues
from repmlp_deploy.convert.diagnosis.blame import Blame
from repmlp_deploy.convert.diagnosis.level_values import LevelValues
from repmlp_deploy.convert.diagnosis.values import first_difference
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.graph.level_input import with_level_input
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.runtime.images import normalised

ORDERS = ("RGB", "BGR")


def preprocessing(order: str) -> Preprocessing:
    return Preprocessing(
        resize=None, crop=None, mean=(120.0, 110.0, 100.0), std=(60.0, 58.0, 56.0), colour_order=order, input="uint8"
    )


def found(padding: int, order: str, damaged: str = "", *, bias: bool = True) -> Blame | None:
    """What bisecting says of the graph, whole or with a constant of this ending scaled."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, bias=bias), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    how = preprocessing(order)
    levels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    inputs = normalised(levels, how)
    traced = trace_network(network, [torch.from_numpy(inputs)], BatchRange(min=1, opt=2, max=4))
    graph = export_graph(traced, input_names=["x"], output_names=["y"], optimize=True, opset=18)
    model, _ = with_level_input(graph, how)
    for tensor in model.graph.initializer:
        if damaged and tensor.name.endswith(damaged):
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name)
            )
    values = LevelValues(GraphValues(serialize_model(model), "fp32"), how, traced.program)
    return first_difference(values, traced.program, [[inputs]])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("padding", [0, 1], ids=["folded", "beside it"])
def test_a_sound_graph_is_not_blamed(padding: int, order: str) -> None:
    assert found(padding, order) is None


def test_a_convolution_that_had_no_bias_is_not_blamed() -> None:
    assert found(0, "RGB", bias=False) is None


@pytest.mark.parametrize(
    ("padding", "damaged"),
    [(0, "0.weight"), (0, "0.bias"), (0, "2.weight"), (0, "x_centre"), (1, "0.weight"), (1, "x_mean"), (1, "x_std")],
)
def test_every_constant_that_is_wrong_is_found(padding: int, damaged: str) -> None:
    assert found(padding, "RGB", damaged) is not None
    assert found(padding, "RGB") is None
