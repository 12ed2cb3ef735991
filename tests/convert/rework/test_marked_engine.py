"""Values inside engines: the marked graph, the real builder, and the whole way on a simulated GPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from repmlp_deploy import Bundle, export
from repmlp_deploy.convert.diagnosis.bisect import GraphValues, compute_in_onnx_runtime
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats.tensorrt.build import Engine, GraphSpec
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS
from repmlp_deploy.convert.graph.lowering.lower import set_precision
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.rework import marked_engine
from repmlp_deploy.convert.rework.locate import blame_bundle
from repmlp_deploy.convert.rework.marked_engine import build_marked, compute_in_engine, mark_outputs
from repmlp_deploy.errors import BuildError, MissingDevice
from repmlp_deploy.runtime.tensorrt.driver import Gpu
from support.bundles import certify_again
from support.fakes.machine import VERSIONS, Machine, with_engines
from support.fakes.tensorrt import Plan, make_tensorrt
from support.graph_cases import SMALL, graph_case
from support.plan_files import find_embedded


def anchors(model: onnx.ModelProto, precision: str = "fp32") -> list[str]:
    """Return every value of a graph that bisecting compares."""
    values = GraphValues(serialize_model(model), precision)
    return list(dict.fromkeys(anchor.value for anchor in values.anchors(None)))


@pytest.mark.parametrize("family", ["repmlpnet", "repmlp-resnet"])
def test_every_value_that_is_compared_is_an_output_of_the_marked_graph(family: str) -> None:
    """It has the same content, whether its first axis is the batch or the sharesets."""
    model = graph_case(family).model
    names, data = anchors(model), serialize_model(model)
    images = np.random.default_rng(0).normal(size=(2, 3, *SMALL[family])).astype(np.float32)
    marked = mark_outputs(data, names, 2)
    assert list(marked.shapes) == names
    assert any(shape[0] != 2 for shape in marked.shapes.values()) == (family == "repmlpnet")
    outputs = [spec.name for spec in marked.outputs()]
    rows = compute_in_onnx_runtime(marked.data, [images], outputs)
    assert [row.shape for row in rows] == [(2, spec.shape[1]) for spec in marked.outputs()]
    plain = onnx.load_model_from_string(data)
    plain.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "out0")
    expected = compute_in_onnx_runtime(serialize_model(plain), [images], names)
    for got, value in zip(marked.restored(rows, names), expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)


def test_a_value_without_a_known_shape_is_told_from_one_that_differs() -> None:
    marked = mark_outputs(serialize_model(graph_case("repmlpnet").model), ["nothing of this name"], 1)
    assert marked.outputs() == ()
    assert marked.restored([], ["nothing of this name"])[0].ndim == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_real_builder_takes_every_marked_output(precision: str) -> None:
    """Each is in the plan, in float32 and of the marked shape."""
    case = graph_case("repmlpnet")
    model = set_precision(case.model, precision).model
    marked = mark_outputs(serialize_model(model), anchors(model, precision), 2)
    spec = type(case.spec)(case.spec.inputs, case.spec.batch, precision)
    engine = build_marked("trt-rtx", marked, spec, EngineOptions(compute_capabilities=("8.9",)))
    assert len(marked.outputs()) > 40
    for output in marked.outputs():
        assert (len(output.name).to_bytes(8, "little") + output.name.encode()) in engine.plan, output.name
    assert not find_embedded(engine.plan, "out0")


def test_without_a_gpu_an_engine_is_not_bisected(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marked_engine, "find_gpus", tuple)
    with pytest.raises(MissingDevice, match=r"no NVIDIA GPU: run on the target, .* --format onnx"):
        compute_in_engine("trt-rtx", bundle)


class Graphs(Mapping[bytes, Plan]):
    """Plans that are the graphs they were built from."""

    def __init__(self) -> None:
        self.plans: dict[bytes, Plan] = {}

    def __getitem__(self, plan: bytes) -> Plan:
        return self.plans[plan]

    def __iter__(self):
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def build(self, _name: str, graph: bytes, spec: GraphSpec, options: EngineOptions) -> Engine:
        """Return an engine whose stand-in on the simulated GPU runs the graph."""
        assert options.compute_capabilities == ("8.6",)
        profile = {key: ((spec.batch.min, *shape),) * 3 for key, shape in spec.inputs.items()}
        self.plans[graph] = Plan(graph, (profile,))
        about = {"flavour": "trt-rtx", "version": VERSIONS["trt-rtx"], "compute_capabilities": ["8.6"]}
        return Engine(graph, about | {"profiles": [profile]})


def change_a_gelu(folder: Path) -> str:
    """Make the second Gelu of a bundle's graph a Relu; return the place to blame."""
    model = onnx.load(folder / "model.onnx")
    gelu = [node for node in model.graph.node if node.op_type == "Gelu"][1]
    gelu.op_type = "Relu"
    del gelu.attribute[:]
    onnx.save(model, folder / "model.onnx")
    return gelu.name.partition(".ffn")[0] + " · ffn"


def test_an_operation_is_blamed_by_values_that_the_engine_gave(
    bundle: Bundle, digits_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the real builder takes, above, the simulated GPU runs here."""
    engines = with_engines(bundle, tmp_path / "digits")
    graphs = Graphs()
    machine = Machine(engines, "trt-rtx").install(monkeypatch)
    monkeypatch.setattr(marked_engine, "build_engine", graphs.build)
    monkeypatch.setattr(marked_engine, "find_gpus", lambda: (Gpu("simulated", "8.6"),))
    monkeypatch.setattr(marked_engine, "check_flavour", lambda _name: None)
    module = make_tensorrt(machine.gpu, "tensorrt_rtx", machine.versions["trt-rtx"], graphs)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    found = blame_bundle(engines, digits_checkpoint, artifacts=["trt-rtx"])
    assert (found.blame, found.compared) == (None, ("trt-rtx",))
    machine.gpu.assert_clean()
    assert len(graphs) >= 3, "one engine per batch size and set of values"
    place = change_a_gelu(engines.folder)
    found = blame_bundle(certify_again(engines.folder), digits_checkpoint, artifacts=["trt-rtx"])
    assert found.blame.place == place
    assert found.blame.fault.startswith("Relu ")
    assert found.blame.fault.endswith("computes something else")


def test_what_a_builder_cannot_do_is_no_blame(
    bundle: Bundle, digits_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise BuildError("trt-rtx could not build the engine: no memory")

    monkeypatch.setattr(marked_engine, "build_engine", refuse)
    monkeypatch.setattr(marked_engine, "find_gpus", lambda: (Gpu("simulated", "8.6"),))
    with pytest.raises(BuildError, match="no memory"):
        blame_bundle(bundle, digits_checkpoint, artifacts=["trt-rtx"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["trt", "trt-rtx"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_gpu_an_engine_is_bisected(name: str, precision: str, digits_checkpoint: Path, tmp_path: Path) -> None:
    """It is blameless, and a changed scale of a block is blamed there by values that the GPU computed."""
    pytest.importorskip(FLAVOURS[name].module)
    pytest.importorskip("cuda.bindings")
    made = export(digits_checkpoint, formats=f"onnx,{name}", precision=precision, batch="1:4:16", out=tmp_path / "out")
    assert blame_bundle(made, digits_checkpoint, artifacts=[name]).blame is None
    place = change_a_gelu(made.folder)
    found = blame_bundle(certify_again(made.folder), digits_checkpoint, artifacts=[name])
    assert found.blame.place == place
