"""What is read of single operators, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repmlp_deploy.convert.reparam.regions.forms import Form, added_form, applied_form, itself
from repmlp_deploy.convert.reparam.regions.reading import Affine, Reading, Same, Sum, read_node, scale_shift
from repmlp_deploy.convert.reparam.regions.tracing import Values, module_path, sizes, trace
from support.networks import randomize

X = torch.zeros(1, 4, 9, 8)
FACTORS = torch.arange(1.0, 5)


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("factors", FACTORS)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _read(function: Callable[[Tensor], Tensor]) -> list[Reading | None]:
    graph = trace(Applied(function).eval(), (X,))
    values = Values(graph)
    return [read_node(node, values) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("function", "taps", "scaled"),
    [
        (lambda x: x * 2, (1, 1), 2.0),
        (lambda x: 2 * x, (1, 1), 2.0),
        (lambda x: x / 2, (1, 1), 0.5),
        (lambda x: x * 0.1, (1, 1), 0.1),
        (lambda x: x / 0.3, (1, 1), 1 / 0.3),
        (lambda x: x * FACTORS[:, None, None], (1, 1), 1.0),
        (lambda x: F.avg_pool2d(x, 2), (2, 2), 0.25),
        (lambda x: F.avg_pool2d(x, (2, 1), divisor_override=4), (2, 1), 0.25),
        (lambda x: F.avg_pool2d(x, 3, 1, 1), (3, 3), 1 / 9),
        (lambda x: F.pad(x, (1, 2, 3, 4)), (1, 1), 1.0),
        (lambda x: F.pad(x, (-1, 0)), (1, 1), 1.0),
    ],
)
def test_affine_operators_are_read(function: Callable[[Tensor], Tensor], taps: tuple[int, int], scaled: float) -> None:
    *_, reading = _read(function)
    assert isinstance(reading, Affine)
    assert reading.map.taps == taps
    assert float(reading.map.kernel[0, 0, 0, 0]) == pytest.approx(scaled, rel=1e-14)
    assert reading.bias is None


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: x * x,
        lambda x: x + x.mean(),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.pad(x, (1, 1), value=1.0),
        lambda x: x * FACTORS[:, None, None].expand(4, 9, 8).contiguous().cumsum(1),
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x.flatten(1),
    ],
)
def test_what_is_no_map_bounds_a_region(function: Callable[[Tensor], Tensor]) -> None:
    assert _read(function)[-1] is None


def test_sums_and_copies_are_read() -> None:
    assert isinstance(_read(lambda x: x - torch.relu(x))[-1], Sum)
    assert isinstance(_read(lambda x: torch.relu(x).clone())[-1], Same)
    shifted = _read(lambda x: x - FACTORS[:, None, None])[-1]
    assert isinstance(shifted, Affine)
    assert shifted.bias is not None
    assert torch.equal(shifted.bias, -FACTORS.double())


def test_a_moved_norm_scales_the_axis_that_it_names() -> None:
    x = torch.ones(2, 3, 4)
    assert torch.equal(scale_shift(x, FACTORS, FACTORS, 2)[0, 0], 2 * FACTORS)


def test_a_bias_differs_from_place_to_place_after_padding() -> None:
    network = randomize(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))
    graph = trace(network, (X,))
    values = Values(graph)
    norm, conv = (n for n in graph.graph.nodes if isinstance(read_node(n, values), Affine))
    first, second = read_node(norm, values), read_node(conv, values)
    assert isinstance(first, Affine)
    assert isinstance(second, Affine)
    made = applied_form(norm, first, itself(first.of))
    assert made is not None
    padded = applied_form(conv, second, made)
    assert padded is not None
    assert padded.bias is not None
    assert padded.bias.shape == (4, 9, 8)
    without = applied_form(conv, second, Form(made.axis, made.maps, None, made.covers))
    assert without is not None
    assert without.bias is not None
    assert without.bias.shape == (4,)
    assert module_path([norm, conv]) == ""
    assert module_path([conv]) == "1"
    assert sizes(conv) == (2, 4, 9, 8)
    twice = added_form(conv, Sum(first.of, first.of, 1), itself(first.of), itself(first.of))
    assert twice is not None
    (total,) = twice.maps.values()
    assert total is not None
    assert float(total.kernel[0]) == 2
