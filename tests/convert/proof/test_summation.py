"""The noise floor covers what float32 needs for long sums, and no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from repmlp_deploy import export
from repmlp_deploy.convert.proof.summation import LONG, PlainSums
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.nets.blocks import RepMLPBlock
from support.networks import randomize

SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "mean, kept": lambda x: x.mean((2, 3), keepdim=True),
    "mean of all": lambda x: x.mean(),
    "sum": lambda x: x.sum((-1, -2)),
    "sum of all": lambda x: x.sum(),
    "sum of channels": lambda x: x.sum(1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive pool of four": lambda x: F.adaptive_avg_pool2d(x, 2),
    "pool": lambda x: F.avg_pool2d(x, tuple(x.shape[2:])),
    "pool of two": lambda x: F.avg_pool2d(x, 2),
    "mean in float64": lambda x: x.mean((2, 3), dtype=torch.float64),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("size", [(300, 5, 7), (3, 16, 21), (2, 47, 64)])
def test_every_sum_keeps_its_value_and_shape(name: str, size: tuple[int, ...]) -> None:
    x = torch.randn(2, *size, dtype=torch.float64)
    with PlainSums():
        plain = SUMS[name](x)
    expected = SUMS[name](x)
    assert plain.shape == expected.shape
    torch.testing.assert_close(plain, expected, rtol=1e-13, atol=1e-13)


def runtime_mean(x: np.ndarray) -> np.ndarray:
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    graph = helper.make_graph(
        [node],
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("edge", [64, 128, 256])
def test_the_error_is_as_large_as_the_runtimes(edge: int) -> None:
    """Never less than half of it, so that the floor covers it; never ten times it, so that it hides nothing."""
    x = np.abs(np.random.default_rng(0).standard_normal((2, 64, edge, edge))).astype(np.float32)
    exact = x.astype(np.float64).mean((2, 3))
    with PlainSums():
        plain = torch.from_numpy(x).mean((2, 3)).numpy()
    theirs, ours = np.abs(runtime_mean(x) - exact).max(), np.abs(plain - exact).max()
    assert 0.5 * theirs <= ours <= 10 * theirs


def test_short_sums_are_left_alone() -> None:
    x = torch.randn(2, 3, LONG - 1)
    with PlainSums():
        assert torch.equal(x.mean(-1), torch.mean(x, -1))


class Pooled(nn.Module):
    """A block between a stem and a head that reads the mean of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = RepMLPBlock(16, 8, 8, sharesets=4, hidden=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


@pytest.fixture
def pooled() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Pooled())


@pytest.mark.slow
@pytest.mark.parametrize("edge", [128, 256, 512])
def test_a_correct_network_with_a_large_map_is_proved(pooled: nn.Module, edge: int, tmp_path: Path) -> None:
    bundle = export(pooled, example_input=torch.zeros(1, 3, edge, edge), batch="1:2:4", out=tmp_path / "out")
    verdict = bundle.manifest.verdict
    assert verdict is not None
    assert verdict.passed
    assert verdict.margin is not None
    assert verdict.margin > 2


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1 - 1e-3, 1 + 1e-4])
def test_a_wrong_mean_over_a_large_map_is_noticed(
    pooled: nn.Module, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose head is off by a thousandth, or a ten-thousandth."""
    from repmlp_deploy.convert.graph import export as graph_export

    right = graph_export.trace_network

    def traced(network: nn.Module, *arguments: Any) -> Any:
        network.head.weight.mul_(factor)
        return right(network, *arguments)

    monkeypatch.setattr("repmlp_deploy.convert.graphs.trace_network", traced)
    with pytest.raises(VerificationError, match="differs from the trained network"):
        export(pooled, example_input=torch.zeros(1, 3, 256, 256), batch="1:2:4", out=tmp_path / "out")
