"""Nodes of a quantized model return to float32 without another quantization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.formats.candidate import BY_ACCURACY
from repmlp_deploy.convert.formats.openvino import IR, quantize_ir
from repmlp_deploy.convert.formats.openvino_float import with_float_nodes
from repmlp_deploy.convert.graph.run import onnx_run
from repmlp_deploy.runtime.openvino.runner import CompiledIR
from repmlp_deploy.runtime.runner import RunnerOptions
from support.digit_cases import exported, scans

assert with_float_nodes  # what `quantize_ir` builds with


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("graph") / "out"
    exported("repmlp-digits", out, "fp32")
    return (Path(out) / "model.onnx").read_bytes()


def run(ir: IR, inputs: np.ndarray) -> np.ndarray:
    return CompiledIR(lambda: (ir.xml, ir.weights), "int8", RunnerOptions()).run_all(inputs)[0]


@pytest.mark.parametrize("batch", [BatchRange(min=1, opt=8, max=64), BatchRange(min=8, opt=8, max=8)])
def test_kept_nodes_compute_what_they_computed_before(graph: bytes, batch: BatchRange) -> None:
    inputs = scans("repmlp-digits", 8, held_out=True)[0]
    samples = scans("repmlp-digits", 16, held_out=False)[0]
    size = batch.min  # a graph of a fixed batch is calibrated with that
    feeds = [{"images": samples[i : i + size]} for i in range(0, len(samples), size)]
    built = quantize_ir(graph, "int8", batch=batch, inputs={"images": (3, 32, 32)}, calibration=feeds)
    nodes = [node.name for node in onnx.load_from_string(graph).graph.node]
    expected = onnx_run(graph)(inputs)[0]

    plain = built(())
    error = np.abs(run(plain, inputs) - expected).max()
    assert error > 0.01

    everything = built(nodes)
    assert b'"FakeQuantize"' not in everything.xml
    assert "lowered" not in everything.details
    assert np.abs(run(everything, inputs) - expected).max() < 1e-4

    fc3 = [name for name in nodes if name.startswith("stages.0.0.fc3/")]
    one = built(fc3)
    assert [(line["node"], line["reason"]) for line in one.details["kept_fp32"]] == [(fc3[0], BY_ACCURACY)]
    assert sum(one.details["lowered"].values()) == sum(plain.details["lowered"].values()) - 1
    assert np.abs(run(one, inputs) - expected).max() > 0.01

    assert built(()).xml == plain.xml, "the quantized model itself does not change"
