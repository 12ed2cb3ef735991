"""The counts of kernels in the guide to TensorRT: the forms of FC3, the log that is read, and a real build."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy.card import data_root
from repmlp_deploy.convert.diagnosis.bisect import compute_in_onnx_runtime
from repmlp_deploy.convert.graph.proto import serialize_model
from support.graph_cases import SMALL, graph_case
from tensorrt_layers import BATCH, BATCHES, FORMS, Counts, count_kernels, lowered, read_kernels, with_fc3


def line(name: str, kind: str, inputs: str, outputs: str) -> str:
    """A line of the log; a tensor is its dimensions and its type."""

    def listed(tensors: str) -> str:
        words = [word.split(":") for word in tensors.split()]
        return ", ".join(f"{{ Name: x, Dimensions: [{dims}], Strides: [1], Datatype: {kind} }}" for dims, kind in words)

    weights = "{ Name: w, Dimensions: [9,9], Datatype: Half }"
    parts = f"Inputs: [ {listed(inputs)}], Constants: [ {weights}], Outputs: [ {listed(outputs)}]"
    return f"Name: {name}, LayerType: {kind}, {parts}, TacticName: t, StreamId: 0\n"


LOG = (
    "Layers:\n"
    + line("__mye4172_0_myl0_0", "shape_call", "", "")
    + line("__myl_TranCast_myl0_1", "kgen", "2,3,4:Float", "2,3,4:Half")
    + line("stages.0.0.fc3/MatMul_myl0_2", "gemm", "2,-1,4:Half", "8:Half")
    + line("__myl_CorrDivErf_myl0_3", "runtime_fusion", "8:Half", "8:Int8")
)


def test_kernels_are_read_from_the_log() -> None:
    kernels = read_kernels(LOG)
    assert [kernel.is_product for kernel in kernels] == [False, True, True]
    assert [kernel.only_moves for kernel in kernels] == [True, False, False]
    assert [kernel.moved for kernel in kernels] == [24 * 4 + 24 * 2, 0, 8 * 2 + 8]  # an open size counts nothing
    assert Counts.of(kernels) == Counts(kernels=3, products=2, reformats=1, fused=2, moved=168)


@pytest.mark.parametrize("family", ["repmlpnet", "repmlp-resnet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_fc3_computes_the_same(form: str, family: str) -> None:
    graph = graph_case(family).model
    images = np.random.default_rng(0).normal(size=(3, 3, *SMALL[family])).astype(np.float32)
    made = with_fc3(graph, form)
    kinds = {node.op_type for node in made.graph.node if node.name.endswith("fc3/MatMul")}
    assert kinds == {"MatMul" if form == "matmul" else "Conv"}
    expected, got = (compute_in_onnx_runtime(serialize_model(g), [images], ["out0"])[0] for g in (graph, made))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_real_builder_lists_its_kernels_and_their_bytes() -> None:
    data = lowered(graph_case("repmlpnet").model, "int8")
    counts = count_kernels(data, BATCHES, (3, 32, 32))
    products = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in graph_case("repmlpnet").model.graph.node)
    assert counts.products == products
    assert counts.kernels > counts.fused + counts.reformats > 0
    assert count_kernels(data, BATCH, (3, 32, 32)).moved > 8 * 3 * 32 * 32 * 4


def test_the_guide_has_every_row_of_the_table() -> None:
    guide = Path(data_root().parent / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (repmlp\S+) \| (fp16|int8) \| (matmul|grouped|points) \|", guide, re.MULTILINE)
    assert len(set(rows)) == len(rows) == 18
