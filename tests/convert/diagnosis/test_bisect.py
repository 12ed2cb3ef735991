"""Bisection of ONNX graphs, exported and simplified, and of bundles against their checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import MANIFEST, BatchRange, hash_file
from repmlp_deploy.cli import verify as verify_cli
from repmlp_deploy.cli.shared.console import run_command
from repmlp_deploy.convert.diagnosis.bisect import blame_graph
from repmlp_deploy.convert.graph.calibrate import measure_ranges, take_calibration
from repmlp_deploy.convert.graph.export import TRACED, Traced, export_graph, trace_network, with_symbolic_batch
from repmlp_deploy.convert.graph.lowering.lower import product_tensors, set_precision
from repmlp_deploy.convert.graph.lowering.pointwise import channels_last_values
from repmlp_deploy.convert.graph.proto import SCOPES, serialize_model
from repmlp_deploy.convert.graph.run import said_by_runtime
from repmlp_deploy.convert.graph.simplify import simplify_graph
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.rework.locate import Bisection, blame_bundle
from repmlp_deploy.errors import InputError
from support.task_cases import small_network

INPUTS = [probe_inputs((3, 32, 32), samples=2)]


@pytest.fixture(scope="module")
def traced() -> Traced:
    network = fold_affine(merge_branches(small_network("repmlpnet")))
    return trace_network(network, [torch.zeros(1, 3, 32, 32)], TRACED)


@pytest.fixture(scope="module")
def exported(traced: Traced) -> onnx.ModelProto:
    return export_graph(traced, input_names=["images"], output_names=["logits"])


@pytest.fixture(scope="module")
def simplified(exported: onnx.ModelProto) -> onnx.ModelProto:
    return simplify_graph(exported)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def moved(model: onnx.ModelProto, name: str, by: float = 1e-3) -> onnx.ModelProto:
    """A copy with one weight off."""
    result = copied(model)
    tensor = next(t for t in result.graph.initializer if t.name == name)
    values = np.frombuffer(tensor.raw_data, np.float32).copy()
    values[1] += by
    tensor.raw_data = values.tobytes()
    return result


WEIGHTS = {
    "conv_embedding.conv.weight": "conv_embedding",
    "stages.0.0.offset": "stages.0.0 · prebn1 fold",
    "embeds.0.conv.bias": "embeds.0",
    "stages.1.0.fc3": "stages.1.0 · fc3",
    "stages.1.1.gp.fc2.bias": "stages.1.1 · global perceptron · fc2",
    "stages.1.1.ffn.0.weight": "stages.1.1 · ffn_fc1",
    "head.bias": "head",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_off_is_found(
    name: str, traced: Traced, exported: onnx.ModelProto, simplified: onnx.ModelProto
) -> None:
    for model in (exported, simplified):
        blame = blame_graph(traced.program, serialize_model(moved(model, name)), [INPUTS])
        assert blame is not None
        assert (blame.place, blame.fault) == (WEIGHTS[name], "the graph holds another weight")
        assert blame.element.name == name


def test_graphs_that_are_right_are_blameless(
    traced: Traced, exported: onnx.ModelProto, simplified: onnx.ModelProto
) -> None:
    for model in (exported, simplified):
        assert blame_graph(traced.program, serialize_model(model), [INPUTS]) is None
    half = set_precision(simplified, "fp16").model
    assert blame_graph(traced.program, serialize_model(half), [INPUTS], "fp16") is None


@pytest.fixture(scope="module")
def quantized(simplified: onnx.ModelProto) -> onnx.ModelProto:
    calibration = take_calibration({"images": probe_inputs((3, 32, 32), samples=32)}, {"images": (3, 32, 32)})
    model = with_symbolic_batch(simplified)
    ranges = measure_ranges(serialize_model(model), calibration, product_tensors(model), "minmax")
    return set_precision(model, "int8", ranges=ranges).model


def test_an_int8_graph_that_is_right_is_blameless_although_its_channels_are_last(
    traced: Traced, quantized: onnx.ModelProto
) -> None:
    """Every value is compared, those of the FFN among them, and none is what the network has somewhere else."""
    last = channels_last_values(quantized.graph)
    gelus = {node.output[0] for node in quantized.graph.node if node.op_type == "Gelu"}
    assert gelus
    assert gelus <= last
    assert not last & {value.name for value in quantized.graph.output}
    assert blame_graph(traced.program, serialize_model(quantized), [INPUTS], "int8") is None


@pytest.mark.parametrize(
    ("scale", "place"),
    [
        ("stages.1.0.ffn.0.weight_scale", "stages.1.0 · ffn_fc1"),
        ("stages.1.1.ffn.2.weight_scale", "stages.1.1 · ffn_fc2"),
        ("stages.1.1.fc3_scale", "stages.1.1 · fc3"),
    ],
)
def test_a_scale_of_an_int8_graph_that_is_another_is_blamed_in_its_place(
    scale: str, place: str, traced: Traced, quantized: onnx.ModelProto
) -> None:
    model = copied(quantized)
    tensor = next(t for t in model.graph.initializer if t.name == scale)
    values = np.frombuffer(tensor.raw_data, np.float32) * np.float32(-20)
    tensor.raw_data = values.tobytes()
    blame = blame_graph(traced.program, serialize_model(model), [INPUTS], "int8")
    assert blame is not None
    assert blame.place == place


def test_a_weight_of_a_half_precision_graph_is_compared_in_its_own_steps(
    traced: Traced, simplified: onnx.ModelProto
) -> None:
    """A hundredth is ten steps of fp16."""
    half = set_precision(moved(simplified, "stages.1.0.fc3", by=0.05), "fp16").model
    blame = blame_graph(traced.program, serialize_model(half), [INPUTS], "fp16")
    assert (blame.place, blame.element.index) == ("stages.1.0 · fc3", (0, 0, 1))


@pytest.mark.parametrize(
    ("op", "other", "place"),
    [("Sigmoid", "Tanh", "stages.1.0 · global perceptron"), ("Gelu", "Relu", "stages.1.0 · ffn")],
)
def test_an_operation_that_is_another_is_found(
    op: str, other: str, place: str, traced: Traced, simplified: onnx.ModelProto
) -> None:
    model = copied(simplified)
    node = [node for node in model.graph.node if node.op_type == op][1]
    node.op_type = other
    del node.attribute[:]
    blame = blame_graph(traced.program, serialize_model(model), [INPUTS])
    assert blame.place == place
    assert blame.fault == f"{other} {node.name} computes something else"
    assert blame.error > 8 * blame.floor


def test_without_the_exporters_notes_weights_still_lead_to_the_block(
    traced: Traced, simplified: onnx.ModelProto
) -> None:
    model = copied(simplified)
    for node in model.graph.node:
        del node.metadata_props[:]
    assert blame_graph(traced.program, serialize_model(model), [INPUTS]) is None
    gelu = [node for node in model.graph.node if node.op_type == "Gelu"][1]
    gelu.op_type = "Relu"
    del gelu.attribute[:]
    blame = blame_graph(traced.program, serialize_model(model), [INPUTS])
    assert blame.place == "stages.1.0 · ffn_fc2"  # the first weight behind it


def test_simplification_keeps_the_notes(simplified: onnx.ModelProto) -> None:
    noted = [node for node in simplified.graph.node if any(entry.key == SCOPES for entry in node.metadata_props)]
    assert len(noted) == len(simplified.graph.node)


def test_a_graph_that_does_not_run_is_blamed_at_its_node(traced: Traced, simplified: onnx.ModelProto) -> None:
    model = copied(simplified)
    shapes = {tensor.name for tensor in model.graph.initializer}
    node = [n for n in model.graph.node if n.op_type == "Reshape" and n.input[1] in shapes][-1]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7, 7]), "wrong"))
    node.input[1] = "wrong"
    blame = blame_graph(traced.program, serialize_model(model), [INPUTS])
    assert blame.block == "stages.1.1"
    assert re.match(r"\w+ stages\.\S+ fails at batch 2: Node ", blame.fault)


def test_a_trace_of_one_batch_size_is_not_asked_for_others(traced: Traced, exported: onnx.ModelProto) -> None:
    from repmlp_deploy.convert.graph.export import with_symbolic_batch

    model = with_symbolic_batch(moved(exported, "head.bias"))
    batches = [[probe_inputs((3, 32, 32), samples=n)] for n in (1, 2, 3)]
    assert blame_graph(traced.program, serialize_model(model), batches).place == "head"


def test_onnx_runtimes_complaints_lose_its_own_codes() -> None:
    said = (
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Reshape node. "
        "Name:'node_view' Status Message: /src/reshape.h:47 Reshape(…) size was false. It cannot be reshaped"
    )
    assert said_by_runtime(RuntimeError(said)) == "It cannot be reshaped"
    assert said_by_runtime(RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got\n1")) == "Got 1"


# --- bundles


def tampered(folder: Path) -> None:
    """One weight of the artifact is off, and the manifest agrees with the file."""
    onnx.save(moved(onnx.load(folder / "model.onnx"), "stages.1.0.gp.fc1.bias"), folder / "model.onnx")
    data = json.loads((folder / MANIFEST).read_text())
    data["artifacts"]["onnx"]["sha256"] = hash_file(folder / "model.onnx")
    (folder / MANIFEST).write_text(json.dumps(data))


def verify_ends_with(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(verify_cli.verify_command, [str(argument) for argument in arguments])
    return int(ended.value.code)


def test_the_command_bisects(bundle_folder: Path, digits_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (bundle_folder, "--ckpt", digits_checkpoint, "--bisect")
    assert verify_ends_with(*given) == 0
    assert "value by value" in capsys.readouterr().out
    tampered(bundle_folder)
    assert verify_ends_with(*given) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "first at stages.1.0 · global perceptron · fc1: the graph holds another weight; " in err
    assert len(err.splitlines()) == 1
    assert verify_ends_with(*given, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert report["blame"]["place"] == "stages.1.0 · global perceptron · fc1"
    assert report["blame"]["element"]["index"] == [1]
    assert verify_ends_with(bundle_folder, "--bisect") == 2
    assert "pass --ckpt FILE" in capsys.readouterr().err
    assert verify_ends_with(*given[:-1]) == 3, "without --bisect too, though it then says less of where"


def test_a_custom_network_cannot_be_rederived(bundle: Bundle, digits_checkpoint: Path) -> None:
    own = Bundle(bundle.manifest.model_copy(update={"family": "custom"}), bundle.folder)
    with pytest.raises(InputError, match="a network of your own"):
        blame_bundle(own, digits_checkpoint)


@pytest.mark.parametrize("change", [lambda r: r + 1e-2, lambda r: r[:, :-1]], ids=["other values", "another shape"])
def test_a_probe_of_other_answers_is_blamed(
    change: Callable[[np.ndarray], np.ndarray], bundle: Bundle, digits_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    probe = bundle.probe()
    wrong = replace(probe, reference=change(probe.reference), float32=change(probe.float32))
    monkeypatch.setattr(Bundle, "probe", lambda _self: wrong)
    assert blame_bundle(bundle, digits_checkpoint).blame.block == "probe"


def test_a_fixed_batch_is_traced_as_it_is(digits_checkpoint: Path, tmp_path: Path) -> None:
    from repmlp_deploy import export

    fixed = export(digits_checkpoint, batch=3, graph="merged", out=tmp_path / "out")
    assert fixed.manifest.batch == BatchRange(min=3, opt=3, max=3)
    assert blame_bundle(fixed, digits_checkpoint) == Bisection(None, ("onnx",))


def test_a_bfloat16_graph_is_bisected_as_emulated(digits_checkpoint: Path, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider cannot run it; that is no fault of the graph."""
    from repmlp_deploy import export

    made = export(digits_checkpoint, batch=2, precision="bf16", out=tmp_path / "out")
    assert blame_bundle(made, digits_checkpoint) == Bisection(None, ("onnx",))
