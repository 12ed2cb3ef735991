import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from repmlp_deploy import Bundle, export
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert import flavours
from repmlp_deploy.convert.driver import Gpu
from repmlp_deploy.convert.engine import GraphSpec, build_engine
from repmlp_deploy.convert.flavours import Flavour, check_flavour
from repmlp_deploy.errors import BuildError, MissingDependency, MissingDevice

BATCH = BatchRange(min=1, opt=2, max=4)
SPEC = GraphSpec({"images": (3, 4, 4)}, BATCH)


def graph_with(op: str) -> bytes:
    node = helper.make_node(op, ["images"], ["logits"], name="the_odd_node")
    shape = ["batch", 3, 4, 4]
    graph = helper.make_graph(
        [node],
        "odd",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def test_an_rtx_engine_is_really_built(bundle: Bundle) -> None:
    entry = bundle.artifact("trt-rtx")
    details = entry.model_extra
    assert details is not None
    assert entry.bytes > 100_000
    assert details["flavour"] == "trt-rtx"
    assert details["profiles"] == [{"images": [[1, 3, 32, 32], [4, 3, 32, 32], [16, 3, 32, 32]]}]
    assert set(details["layer_types"]) <= {"float", "int64", "int32", "bool"}
    assert details["layer_types"]["float"] > 50


def test_the_plan_is_raw_and_not_wrapped(bundle: Bundle) -> None:
    """Vendor tools read the file as it is: what the bindings call an engine header comes first."""
    import tensorrt_rtx

    plan = bundle.read(bundle.artifact("trt-rtx"))
    runtime = tensorrt_rtx.Runtime(tensorrt_rtx.Logger(tensorrt_rtx.Logger.INTERNAL_ERROR))
    _validity, diagnostics = runtime.get_engine_validity(plan)
    garbage = runtime.get_engine_validity(b"x" * len(plan))
    assert (_validity, diagnostics) != garbage


def test_a_parser_error_names_the_node() -> None:
    with pytest.raises(BuildError, match=r"the_odd_node .*NonMaxSuppressionOfDreams"):
        build_engine("trt-rtx", graph_with("NonMaxSuppressionOfDreams"), SPEC)


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(BuildError, match="cannot parse the graph"):
        build_engine("trt-rtx", b"not a graph", SPEC)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test lacks")
def test_trt_without_a_driver_names_the_other_flavour() -> None:
    with pytest.raises(MissingDevice, match="--format trt-rtx"):
        check_flavour("trt")


def test_trt_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavours, "find_gpus", lambda: (Gpu("a GPU", "8.6"),))
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r'pip install "repmlp-deploy\[trt\]"'):
        check_flavour("trt")


def test_trt_is_asked_for_before_anything_else_is_done(tmp_path: Path) -> None:
    """No minutes are spent on a checkpoint whose engine cannot be built; here it does not even exist."""
    if importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available():
        pytest.skip("trt can be built on this machine")
    with pytest.raises((MissingDevice, MissingDependency)):
        export(tmp_path / "none.pth", formats="onnx,trt", out=tmp_path / "out")


def test_both_flavours_share_one_code_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other flavour, given the module that is at hand, builds by the same code."""
    stand_in = Flavour("trt", "tensorrt_rtx", "trt", oldest=(1, 0), needs_gpu=False)
    monkeypatch.setitem(flavours.FLAVOURS, "trt", stand_in)
    built = build_engine("trt", graph_with("Relu"), SPEC)
    assert built.details["flavour"] == "trt"
    assert len(built.plan) > 1000


@pytest.mark.gpu
def test_a_trt_engine_is_built_on_this_gpu() -> None:
    built = build_engine("trt", graph_with("Relu"), SPEC)
    assert built.details["layer_types"] == {"float": 1}


def test_layer_types_follow_the_graph() -> None:
    """Strongly typed: a float16 graph gives float16 layers, without any builder flag."""
    weight = helper.make_tensor("w", TensorProto.FLOAT16, [3, 3], np.eye(3, dtype=np.float16).tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "w"], ["logits"], name="product")],
        "half",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT16, ["batch", 4, 4, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", 4, 4, 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    built = build_engine("trt-rtx", model.SerializeToString(), GraphSpec({"images": (4, 4, 3)}, BATCH, "fp16"))
    assert set(built.details["layer_types"]) == {"half"}
