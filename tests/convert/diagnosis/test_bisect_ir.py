"""Bisection of OpenVINO models: constants changed in the `.bin` file and operations changed in the topology."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.cli import verify as verify_cli
from repmlp_deploy.cli.shared.console import run_command
from repmlp_deploy.convert.diagnosis.bisect_ir import ModelValues
from repmlp_deploy.convert.diagnosis.blame import Blame
from repmlp_deploy.convert.diagnosis.values import Trace, first_difference
from repmlp_deploy.convert.formats import openvino as openvino_format
from repmlp_deploy.convert.formats.openvino import IR, build_ir
from repmlp_deploy.convert.graph.export import Traced, export_graph, trace_network
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.graph.simplify import simplify_graph
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.rework.locate import blame_bundle
from repmlp_deploy.convert.source.trained import load_trained
from repmlp_deploy.errors import BundleError, MissingDependency
from support.bundles import certify_again
from support.graph_cases import BATCH, SMALL, graph_case
from support.ir_files import constant_names, with_constant
from support.networks import randomize
from support.openvino_bundle import with_openvino
from support.task_cases import small_network

HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 instructions")


@cache
def traced(family: str) -> Traced:
    return trace_network(graph_case(family).network, [torch.zeros(1, 3, *SMALL[family])], BATCH)


@cache
def built(family: str, precision: str = "fp32") -> IR:
    shape = (3, *SMALL[family])
    return build_ir(
        serialize_model(graph_case(family).model),
        precision=precision,
        batch=BatchRange(min=1, opt=8, max=8),
        inputs={"images": shape},
        calibration=[{"images": x[None]} for x in probe_inputs(shape, samples=4, seed=3)],
    )


def blame(family: str, ir: tuple[bytes, bytes], precision: str = "fp32") -> Blame | None:
    inputs = [probe_inputs((3, *SMALL[family]), samples=2)]
    return first_difference(ModelValues(ir, precision), traced(family).program, [inputs])


def tampered(
    name: str, change: Callable[[np.ndarray], np.ndarray], precision: str = "fp32", family: str = "repmlpnet"
) -> Blame:
    """What is blamed where one constant of the `.bin` file is changed."""
    ir = built(family, precision)
    found = blame(family, (ir.xml, with_constant(ir.xml, ir.weights, name, change)), precision)
    assert found is not None, f"{name} is wrong and nobody notices"
    return found


def off_by(amount: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[1] += amount
        return values

    return change


@pytest.mark.parametrize("family", ["repmlpnet", "mobilefacenet", "repmlp-resnet"])
def test_the_model_of_every_family_is_blameless_and_every_module_is_compared(family: str) -> None:
    ir = built(family)
    assert blame(family, (ir.xml, ir.weights)) is None
    values, trace = ModelValues((ir.xml, ir.weights), "fp32"), Trace(traced(family).program)
    compared = {anchor.key for anchor in values.anchors(trace)}
    modules = {
        name for name, module in graph_case(family).network.named_modules() if name and not list(module.children())
    }
    assert modules & set(trace.nodes) <= compared


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=needs_bf16), "int8"])
def test_a_model_of_a_lower_precision_is_blameless(precision: str) -> None:
    ir = built("repmlpnet", precision)
    assert blame("repmlpnet", (ir.xml, ir.weights), precision) is None


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), (3, 5, 5)),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)), (3, 9)),
    ],
)
def test_a_convolution_that_took_in_its_norm_is_blameless(network: nn.Module, shape: tuple[int, ...]) -> None:
    """It gives the value of the BatchNorm; what follows is compared all the same."""
    torch.manual_seed(0)
    program = trace_network(randomize(network), [torch.zeros(1, *shape)], BATCH)
    graph = export_graph(program, input_names=["x"], output_names=["y"], optimize=program.needs_folding)
    ir = build_ir(
        serialize_model(simplify_graph(graph)),
        precision="fp32",
        batch=BatchRange(min=1, opt=2, max=4),
        inputs={"x": shape},
    )
    inputs = [np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)]

    def blamed(weights: bytes) -> Blame | None:
        return first_difference(ModelValues((ir.xml, weights), "fp32"), program.program, [inputs])

    assert blamed(ir.weights) is None
    found = blamed(with_constant(ir.xml, ir.weights, "3.weight", off_by(0.1)))
    assert found is not None
    assert found.place == "3"


WEIGHTS = {
    "conv_embedding.conv.weight": "conv_embedding",
    "stages.1.0.fc3": "stages.1.0 · fc3",
    "stages.0.0.offset": "stages.0.0 · prebn1 fold",
    "stages.0.0.gp.fc2.weight": "stages.0.0 · global perceptron · fc2",
    "stages.1.1.gp.fc1.bias": "stages.1.1 · global perceptron · fc1",
    "stages.1.1.ffn.0.weight": "stages.1.1 · ffn_fc1",
    "embeds.0.conv.bias": "embeds.0",
    "head.weight": "head",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_constant_that_is_off_is_blamed_in_its_block(name: str) -> None:
    found = tampered(name, off_by(1e-3))
    assert (found.place, found.fault) == (WEIGHTS[name], "the graph holds another weight")
    assert (found.element.name, found.element.got - found.element.expected) == (name, pytest.approx(1e-3, rel=1e-2))


@pytest.mark.parametrize(
    ("family", "name", "place"),
    [
        ("mobilefacenet", "stages.1.units.1.fc3", "stages.1.units.1 · fc3"),
        ("repmlp-resnet", "linear.bias", "linear"),
        ("repmlp-resnet", "stage0.0.conv.weight", "stage0.0"),
    ],
)
def test_a_constant_of_another_family_is_blamed_too(family: str, name: str, place: str) -> None:
    found = tampered(name, off_by(1e-2), family=family)
    assert (found.place, found.element.name) == (place, name)


@needs_bf16
def test_a_constant_in_bfloat16_is_compared_as_what_it_stands_for() -> None:
    def change(bits: np.ndarray) -> np.ndarray:
        bits.reshape(-1)[1] = 0x3F80  # 1.0
        return bits

    found = tampered("stages.1.0.fc3", change, "bf16")
    assert (found.place, found.element.index, found.element.got) == ("stages.1.0 · fc3", (0, 0, 1), 1.0)


@pytest.mark.parametrize(
    ("product", "place"),
    [
        ("stages.1.0.fc3/MatMul", "stages.1.0 · fc3"),
        ("stages.1.1.ffn.0/Conv/WithoutBiases", "stages.1.1 · ffn_fc1"),
        ("head/Gemm/WithoutBiases", "head"),
    ],
)
def test_a_scale_of_an_int8_model_is_blamed_in_its_block(product: str, place: str) -> None:
    """NNCF's constants have no names of weights; the product that reads them is named after its module."""
    ir = built("repmlpnet", "int8")
    nodes = {node.get_friendly_name(): node for node in ov.Core().read_model(ir.xml, ir.weights).get_ops()}
    scale = nodes[f"{product}/fq_weights_1"].input_value(1).get_node().get_friendly_name()
    found = tampered(scale, lambda values: values * np.float32(-20), "int8")
    assert found.place == place
    assert found.fault.endswith("cannot do with int8")


def test_an_operation_that_is_another_is_found() -> None:
    ir = built("repmlpnet")
    xml = ir.xml.decode()
    assert xml.count('name="stages.1.0.gp/Sigmoid" type="Sigmoid" version="opset1"') == 1
    xml = xml.replace('name="stages.1.0.gp/Sigmoid" type="Sigmoid"', 'name="stages.1.0.gp/Sigmoid" type="Tanh"')
    found = blame("repmlpnet", (xml.encode(), ir.weights))
    assert found.place == "stages.1.0 · global perceptron"
    assert found.fault == "Tanh stages.1.0.gp/Sigmoid computes something else"
    assert found.error > 8 * found.floor


def test_a_product_that_was_cut_by_columns_is_put_together_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_format, "_LARGE_MATRIX", 600)
    network = fold_affine(merge_branches(small_network("repmlpnet", depths=(1, 1), sharesets=(1, 2))))
    program = trace_network(network, [torch.zeros(1, 3, 32, 32)], BATCH)
    graph = simplify_graph(export_graph(program, input_names=["images"], output_names=["logits"]))
    ir = build_ir(
        serialize_model(graph),
        precision="bf16",
        batch=BatchRange(min=1, opt=8, max=8),
        inputs={"images": (3, 32, 32)},
    )
    assert "stages.0.0.fc3.columns1" in constant_names(ir.xml)
    values = ModelValues((ir.xml, ir.weights), "bf16")
    stored, trained = values.stored("stages.0.0.fc3"), network.state_dict()["stages.0.0.fc3"].numpy()
    np.testing.assert_allclose(stored, trained.reshape(stored.shape), rtol=2**-8)
    if HAS_BF16:
        inputs = [probe_inputs((3, 32, 32), samples=2)]
        assert first_difference(values, program.program, [inputs]) is None


def test_a_file_that_is_no_model_is_refused() -> None:
    with pytest.raises(BundleError, match="OpenVINO cannot read the model"):
        ModelValues((b"<net/>", b""), "fp32")


# --- bundles


def without_a_branch(checkpoint: Path, name: str, branch: str) -> np.ndarray:
    """Return the FC3 that merging without one branch gives."""
    network = copy.deepcopy(load_trained(checkpoint).network)
    block, _, weight = name.rpartition(".")
    bn = getattr(network.get_submodule(block).repmlp_block, branch).bn
    with torch.no_grad():
        bn.weight.zero_()
    return fold_affine(merge_branches(network)).state_dict()[f"{block}.{weight}"].numpy()


def verify_ends_with(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(verify_cli.verify_command, [str(argument) for argument in arguments])
    return int(ended.value.code)


def test_the_command_names_artifact_block_and_branch(
    bundle: Bundle, digits_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = with_openvino(bundle, tmp_path / "bundle")
    given = (made.folder, "--ckpt", digits_checkpoint, "--bisect")
    assert verify_ends_with(*given) == 0
    out = capsys.readouterr().out
    assert [line.split(": ")[1].split(" artifact")[0] for line in out.splitlines()] == ["the onnx", "the openvino"]
    wrong = without_a_branch(digits_checkpoint, "stages.1.0.fc3", "repconv3")
    xml, weights = (made.folder / "model.xml").read_bytes(), (made.folder / "model.bin").read_bytes()
    changed = with_constant(xml, weights, "stages.1.0.fc3", lambda values: wrong.reshape(values.shape))
    (made.folder / "model.bin").write_bytes(changed)
    certify_again(made.folder)
    assert verify_ends_with(*given) == 3
    err = capsys.readouterr().err
    assert "in its openvino artifact, first at stages.1.0 · fc3 · branch repconv3: dropped; stages.1.0.fc3[" in err
    assert len(err.splitlines()) == 1
    assert verify_ends_with(*given, "--format", "onnx") == 0
    assert verify_ends_with(*given, "--format", "openvino", "--json") == 3
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["compared"] == ["openvino"]
    assert report["blame"]["place"] == "stages.1.0 · fc3 · branch repconv3"
    assert verify_ends_with(*given, "--format", "checkpoint") == 2
    assert "--format checkpoint: unknown; expected one of onnx, openvino, trt" in capsys.readouterr().err


def test_an_artifact_whose_runtime_is_missing_is_noted(
    bundle: Bundle, digits_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_openvino(bundle, tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "repmlp_deploy.convert.diagnosis.bisect_ir")
    found = blame_bundle(made, digits_checkpoint)
    assert (found.blame, found.compared) == (None, ("onnx",))
    assert found.notes[0].startswith("not compared: openvino is not installed: pip install")
    with pytest.raises(MissingDependency, match="openvino is not installed"):
        blame_bundle(made, digits_checkpoint, artifacts=["openvino"])
