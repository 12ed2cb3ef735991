"""Real TensorRT-RTX builds of every family in every precision, and of the full-size network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx
import pytest
import tensorrt_rtx
import torch

import gpu_roofline
from repmlp_deploy.bench.counting.count import count_graph
from repmlp_deploy.bundle import BatchRange, GraphRecord
from repmlp_deploy.card import load_card
from repmlp_deploy.convert.formats.tensorrt.build import GraphSpec, build_engine
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.graph.lowering.lower import PRODUCTS, product_tensors, set_precision
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.graph.simplify import simplify_graph
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.loading import load_network
from repmlp_deploy.nets.families import FAMILIES
from support.golden_cases import GoldenCase
from support.graph_cases import SMALL, GraphCase, graph_case
from support.plan_files import Embedded, find_embedded

pytestmark = pytest.mark.slow  # many exports, seconds each

PRECISIONS = {"fp32": "float", "fp16": "half", "bf16": "bf16", "int8": "int8", "fp8": "fp8"}


def lower(model: onnx.ModelProto, spec: GraphSpec, precision: str) -> tuple[bytes, GraphSpec]:
    """A graph in a precision; the ranges of int8 are invented, which changes no type and no size."""
    lowered = set_precision(model, precision, ranges=dict.fromkeys(product_tensors(model), 4.0))
    spec = replace(spec, precision=precision, kept_fp32=GraphRecord.model_validate(lowered.describe()).kept_products())
    return serialize_model(lowered.model), spec


@pytest.fixture(scope="module", params=sorted(SMALL))
def case(request: pytest.FixtureRequest) -> Iterator[GraphCase]:
    return graph_case(request.param)


def test_every_family_is_among_the_cases() -> None:
    assert SMALL.keys() == FAMILIES.keys()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_family_builds_in_every_precision(case: GraphCase, precision: str) -> None:
    engine = build_engine("trt-rtx", *lower(case.model, case.spec, precision))
    products = sum(node.op_type in PRODUCTS for node in case.model.graph.node)
    assert engine.details["product_types"] == {PRECISIONS[precision]: products}
    found = find_embedded(engine.plan, "images")
    assert found == Embedded(int(tensorrt_rtx.DataType.FLOAT), tuple(case.spec.inputs["images"]))
    assert find_embedded(engine.plan, "out0") is not None


@pytest.mark.slow
def test_the_size_of_b224_shows_the_precision() -> None:
    state = GoldenCase("repmlpnet-b224").weights()
    folded = fold_affine(merge_branches(load_network(state, load_card("repmlpnet-b224"), merged=False)))
    traced = trace_network(folded, [torch.zeros(1, 3, 224, 224)], BatchRange(min=1, opt=8, max=64))
    model = simplify_graph(export_graph(traced, input_names=["images"], output_names=["logits"]))
    spec = GraphSpec({"images": (3, 224, 224)}, BatchRange(min=1, opt=8, max=64))
    weights = 4 * sum(parameter.numel() for parameter in folded.state_dict().values())
    counts = count_graph(model)  # what the guide's computed table rests on
    assert (counts.macs, counts.weight_elements) == (gpu_roofline.MACS, gpu_roofline.WEIGHTS)
    assert (counts.activation_elements, counts.io_elements) == (gpu_roofline.ACTIVATIONS, gpu_roofline.BORDER)
    expected = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.25}
    for precision, share in expected.items():
        lowered = lower(model, spec, precision)
        engine = build_engine("trt-rtx", *lowered)
        assert engine.details["product_types"].keys() == {PRECISIONS[precision]}
        assert 0.95 * share < engine.details["weights_bytes"] / weights < 1.1 * share + 0.05
        assert len(engine.plan) < (share + 0.1) * weights
