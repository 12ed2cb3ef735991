from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import repmlp_deploy
from repmlp_deploy import export
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.graph import simplify as simplifying
from repmlp_deploy.convert.graph.export import export_graph, trace_network, with_metadata
from repmlp_deploy.convert.graph.proto import SCOPES, large_weights, restore_weights, serialize_model, without_weights
from repmlp_deploy.convert.graph.simplify import SimplificationFailed, simplify_graph
from repmlp_deploy.errors import InputError, RepMLPError
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet
from support.networks import randomize


def model_with_weights() -> onnx.ModelProto:
    large = numpy_helper.from_array(np.random.default_rng(0).standard_normal((200, 200)).astype(np.float32), "large")
    small = numpy_helper.from_array(np.ones(200, np.float32), "small")
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["x"], ["y"], name="idle"),
            helper.make_node("MatMul", ["y", "large"], ["z"], name="product"),
            helper.make_node("Add", ["z", "small"], ["out"], name="shift"),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 200])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 200])],
        [large, small],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="p")
    return with_metadata(model, {"name": "toy", "labels": ["ä", "b"]})


def test_serializing_piecewise_means_the_same_model() -> None:
    model = model_with_weights()
    assert [tensor.name for tensor in large_weights(model)] == ["large"]
    assert onnx.load_from_string(serialize_model(model)) == _reordered(model)
    onnx.checker.check_model(serialize_model(model))


def _reordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Small initializers first, as the pieces are written."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = sorted(result.graph.initializer, key=lambda t: t.name == "large")
    del result.graph.initializer[:]
    result.graph.initializer.extend(tensors)
    return result


def test_weights_taken_out_come_back() -> None:
    model = model_with_weights()
    bare = without_weights(model, large_weights(model), as_inputs=True)
    assert [value.name for value in bare.graph.input] == ["x", "large"]
    assert bare.metadata_props == model.metadata_props
    restore_weights(bare, large_weights(model))
    assert bare == _reordered(model)


def test_simplification_drops_idle_nodes_and_keeps_weights_and_metadata() -> None:
    model = model_with_weights()
    simplified = simplify_graph(model)
    assert [node.op_type for node in simplified.graph.node] in (["MatMul", "Add"], ["Gemm"])
    assert simplified.metadata_props == model.metadata_props
    large = {t.name: numpy_helper.to_array(t) for t in simplified.graph.initializer}
    np.testing.assert_array_equal(large["large"], numpy_helper.to_array(model.graph.initializer[0]))
    assert [value.name for value in simplified.graph.input] == ["x"]


def test_products_of_one_value_are_packed_however_large_they_are() -> None:
    width = 160
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((width, width)).astype(np.float32) for _ in "qkv"]
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            *(helper.make_node("MatMul", ["a", f"w{i}"], [f"y{i}"]) for i in range(3)),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, width])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, 4, width]) for i in range(3)],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert len(large_weights(model)) == 3
    packed = simplify_graph(model)
    assert [node.op_type for node in packed.graph.node] == ["Relu", "MatMul", "Split"]
    assert [value.name for value in packed.graph.input] == ["x"]
    x = rng.standard_normal((1, 4, width)).astype(np.float32)
    results = (ReferenceEvaluator(either).run(None, {"x": x}) for either in (model, packed))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crashed with signal 11"),
        ("import sys; sys.exit('no such thing')", "failed: no such thing"),
        ("pass", "failed: no message"),
        ("import time; time.sleep(60)", "did not finish in 1 s"),
    ],
)
def test_a_child_that_fails_is_an_outcome_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(simplifying, "_CHILD", script)
    monkeypatch.setattr(simplifying, "TIMEOUT_SECONDS", 1)
    with pytest.raises(SimplificationFailed, match=said):
        simplify_graph(model_with_weights())


def test_exporting_prints_nothing_and_names_the_tensors(
    small_network: RepMLPNet, capfd: pytest.CaptureFixture[str]
) -> None:
    traced = trace_network(small_network, [torch.zeros(1, 3, 16, 24)], BatchRange(min=1, opt=2, max=4))
    model = export_graph(traced, input_names=["images"], output_names=["logits"])
    assert str(Path(repmlp_deploy.__file__).parent).encode() not in serialize_model(model), "a path of this machine"
    assert any(entry.key == SCOPES for node in model.graph.node for entry in node.metadata_props)
    assert capfd.readouterr() == ("", "")
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert model.opset_import[0].version == 20


@pytest.mark.parametrize(
    ("network", "shape", "left"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU()), (1, 3, 9), ["Conv", "Relu"]),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2, bias=False), nn.ReLU()), (1, 3, 5, 5), ["ConvTranspose", "Relu"]),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), (1, 3, 5, 5), ["ConvTranspose"]),
        (nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), (1, 3, 5, 5, 5), ["Conv"]),
    ],
)
def test_what_regions_leave_is_folded_by_the_exporter(
    network: nn.Module, shape: tuple[int, ...], left: list[str], tmp_path: Path
) -> None:
    """The graph of an export is no larger than the exporter's own."""
    bundle = export(randomize(network), example_input=torch.zeros(shape), batch="1:2:4", out=tmp_path / "out")
    assert [node.op_type for node in onnx.load(bundle.folder / "model.onnx").graph.node] == left


class Parts(nn.Module):
    """Take a map apart and put it together in another order."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.kind = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "unbind":
            return torch.stack(y.unbind(2)[::-1], 2)
        return torch.cat((y.chunk(2, 1) if self.kind == "chunk" else y.split([1, 3], 1))[::-1], 1)


@pytest.mark.parametrize("kind", ["chunk", "split", "unbind"])
def test_parts_of_a_map_are_no_sequence(kind: str, tmp_path: Path) -> None:
    """TensorRT takes none."""
    example, out = torch.zeros(1, 3, 4, 4), tmp_path / "out"
    bundle = export(randomize(Parts(kind)), example_input=example, batch="1:2:4", formats="onnx,trt-rtx", out=out)
    operators = {node.op_type for node in onnx.load(bundle.folder / "model.onnx").graph.node}
    assert operators in ({"Conv", "Split", "Concat"}, {"Conv", "Slice", "Concat"})


class Attention(nn.Module):
    """Attention as the exporter does not know it: without an axis of heads."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_an_operator_that_cannot_be_converted_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export(Attention().eval(), example_input=torch.zeros(1, 5, 6), out=tmp_path / "out")
    assert str(caught.value) == (
        "torch.onnx.export cannot convert aten.scaled_dot_product_attention.default: "
        "AssertionError: only 4D query, key, and value are supported; rewrite it, or run again with --debug"
    )


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space left on device"), r"OSError: \[Errno 28\] No space left on device"),
        (AttributeError("no such pass"), "AttributeError: no such pass"),
    ],
)
@pytest.mark.parametrize("step", ["", "Error when translating node. target=torch.ops.aten.addmm.default"])
def test_what_no_operator_causes_is_no_fault_of_the_network(
    cause: Exception, said: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator that the exporter names is at fault, unless memory or disk is."""

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError(f"failed to convert: {step}") from cause

    traced = trace_network(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),), BatchRange(min=2, opt=2, max=2))
    monkeypatch.setattr("torch.onnx.export", failing)
    of_network = bool(step) and isinstance(cause, AttributeError)
    start = r"cannot convert aten\.addmm\.default" if of_network else "failed"
    with pytest.raises(RepMLPError, match=f"^torch.onnx.export {start}: {said}; ") as caught:
        export_graph(traced, input_names=["x"], output_names=["y"])
    assert isinstance(caught.value, InputError) == of_network
    assert ("rewrite it" in str(caught.value)) == of_network
