import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx
import torch
from onnx import TensorProto, helper

from repmlp_deploy import Bundle, export
from repmlp_deploy.bundle import BatchRange, GraphRecord
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats.tensorrt import build as engine
from repmlp_deploy.convert.formats.tensorrt import flavours
from repmlp_deploy.convert.formats.tensorrt.build import GraphSpec, build_engine
from repmlp_deploy.convert.formats.tensorrt.flavours import Flavour, check_flavour
from repmlp_deploy.convert.formats.tensorrt.network_types import NetworkTypes, require_precision
from repmlp_deploy.convert.graph.lowering.lower import set_precision
from repmlp_deploy.convert.graph.nodes import node_modules
from repmlp_deploy.convert.graph.proto import SCOPES
from repmlp_deploy.errors import BuildError, InputError, MissingDependency, MissingDevice, VerificationError
from repmlp_deploy.runtime.tensorrt.driver import Gpu
from repmlp_deploy.runtime.tensorrt.log import shared_logger
from support.plan_files import Embedded, find_embedded

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


def graph_of(bundle: Bundle) -> bytes:
    return bundle.read(bundle.artifact("onnx"))


DIGITS = GraphSpec({"images": (3, 32, 32)}, BATCH)


def test_a_product_in_another_type_than_was_asked_for_is_an_error(bundle: Bundle) -> None:
    """A graph that stayed in float32 builds without a complaint from anybody; the node and its module are named."""
    claimed = replace(DIGITS, precision="fp16")
    with pytest.raises(VerificationError, match=r"24 of 24 products are not in fp16; node \S+ of conv_embedding"):
        build_engine("trt-rtx", graph_of(bundle), claimed)


def test_a_lowered_graph_is_not_taken_for_float32(bundle: Bundle) -> None:
    lowered = set_precision(onnx.load_from_string(graph_of(bundle)), "fp16").model.SerializeToString()
    with pytest.raises(VerificationError, match=r"products are not in fp32; .* multiplies in half"):
        build_engine("trt-rtx", lowered, DIGITS)


def test_products_that_the_graph_says_it_keeps_are_no_error(bundle: Bundle) -> None:
    lowered = set_precision(onnx.load_from_string(graph_of(bundle)), "fp16", keep_fp32=["head"])
    (kept,) = GraphRecord.model_validate(lowered.describe()).kept_products()
    data = lowered.model.SerializeToString()
    built = build_engine("trt-rtx", data, replace(DIGITS, precision="fp16", kept_fp32=(kept,)))
    assert built.details["product_types"] == {"half": 23, "float": 1}
    with pytest.raises(VerificationError, match=rf"1 of 24 products are not in fp16; node {kept} of head"):
        build_engine("trt-rtx", data, replace(DIGITS, precision="fp16"))


def test_a_precision_that_no_product_has_is_an_error_even_if_all_are_kept() -> None:
    types = NetworkTypes(1, 2, {}, {}, {"a": "float", "b": "float"})
    with pytest.raises(VerificationError, match="no product is in bf16: all 2 stay in float32"):
        require_precision(types, "bf16", where="trt", kept=("a", "b"))


def test_a_builders_error_names_the_module_of_the_node_it_quotes(bundle: Bundle) -> None:
    """Turing has no float32 products in TensorRT-RTX."""
    turing = EngineOptions(compute_capabilities=("7.5",))
    with pytest.raises(
        BuildError,
        match=r"'stages\.0\.0\.fc3/MatMul' for Turing .*\(node stages\.0\.0\.fc3/MatMul of stages\.0\.0\.fc3\)",
    ):
        build_engine("trt-rtx", graph_of(bundle), DIGITS, turing)


def test_a_parsers_error_names_the_module() -> None:
    model = onnx.load_from_string(graph_with("NonMaxSuppressionOfDreams"))
    scopes = str(["", "stages.0", "stages.0.1.gp", "relu"])
    model.graph.node[0].metadata_props.add(key=SCOPES, value=scopes)
    with pytest.raises(BuildError, match=r"node the_odd_node of stages\.0\.1\.gp \(NonMaxSuppressionOfDreams\)"):
        build_engine("trt-rtx", model.SerializeToString(), SPEC)


def test_a_node_without_a_scope_is_placed_by_its_weights() -> None:
    node = helper.make_node("Conv", ["x", "stages.1.ffn.0.weight", "stages.1.ffn.0.bias"], ["y"], name="convolution")
    nameless = helper.make_node("Relu", ["y"], ["z"], name="relu")
    graph = helper.make_graph([node, nameless], "g", [], [])
    modules = node_modules(helper.make_model(graph).SerializeToString())
    assert modules == {"convolution": "stages.1.ffn.0"}
    assert node_modules(b"no graph") == {}


def configured(**options: object) -> object:
    return engine._configured(tensorrt_rtx, tensorrt_rtx.Builder(shared_logger(tensorrt_rtx)), EngineOptions(**options))


def test_options_reach_the_builder() -> None:
    flags = tensorrt_rtx.BuilderFlag
    plain = configured()
    assert not any(plain.get_flag(flag) for flag in (flags.TF32, flags.REFIT, flags.STRIP_PLAN))
    config = configured(
        tf32=True, refittable=True, strip_weights=True, workspace_gb=0.5, optimization_level=1,
        compute_capabilities=("8.6", "12.0"),
    )  # fmt: skip
    assert all(config.get_flag(flag) for flag in (flags.TF32, flags.REFIT, flags.STRIP_PLAN))
    assert config.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE) == 1 << 29
    assert config.builder_optimization_level == 1
    targets = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert targets == [tensorrt_rtx.ComputeCapability.SM86, tensorrt_rtx.ComputeCapability.SM120]


def test_a_value_that_the_builder_clamps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineOptions, "__post_init__", lambda _self: None)  # let 9 through
    with pytest.raises(InputError, match="--optimization-level: 9 was asked for; the builder takes 5"):
        configured(optimization_level=9)


def test_too_little_scratch_memory_is_the_builders_error(bundle: Bundle) -> None:
    with pytest.raises(BuildError, match="workspace"):
        build_engine("trt-rtx", graph_of(bundle), DIGITS, EngineOptions(workspace_gb=1e-6))


def test_the_details_say_what_was_built(bundle: Bundle) -> None:
    details = bundle.artifact("trt-rtx").model_extra
    weights = sum(t.ByteSize() for t in onnx.load_from_string(graph_of(bundle)).graph.initializer)
    assert 0.9 * weights < details["weights_bytes"] < 1.1 * weights
    assert details["scratch_bytes"] > 1 << 20
    assert (details["layers"], details["tensors"]) == (110, 111)
    assert details["layer_kinds"]["convolution"] + details["layer_kinds"]["matrix_multiply"] == 24
    assert details["product_types"] == {"float": 24}
    assert details["options"]["tf32"] is False
    assert (details["timing_cache"], details["compute_capabilities"], details["warnings"]) == (None, None, [])


def test_the_plan_shows_names_shapes_and_types_as_the_manifest_says(bundle: Bundle) -> None:
    plan = bundle.read(bundle.artifact("trt-rtx"))
    for spec in (bundle.manifest.input, bundle.manifest.output):
        found = find_embedded(plan, spec.name)
        assert found == Embedded(int(tensorrt_rtx.DataType.FLOAT), spec.shape[1:])
        assert spec.dtype == "float32"
    assert find_embedded(plan, "pictures") is None


@pytest.mark.parametrize(("onnx_type", "name"), [("FLOAT", "FLOAT"), ("FLOAT16", "HALF"), ("BFLOAT16", "BF16")])
def test_what_is_read_from_a_plan_follows_the_graph(onnx_type: str, name: str) -> None:
    """The reader of the test above notices another type and another shape."""
    model = onnx.load_from_string(graph_with("Relu"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DataType.Value(onnx_type)
        value.type.tensor_type.shape.dim[3].dim_value = 7
    built = build_engine("trt-rtx", model.SerializeToString(), GraphSpec({"images": (3, 4, 7)}, BATCH))
    for tensor in ("images", "logits"):
        found = find_embedded(built.plan, tensor)
        assert found == Embedded(int(getattr(tensorrt_rtx.DataType, name)), (3, 4, 7))
