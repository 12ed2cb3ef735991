"""Room in float16: values that are near its end are found on the probe and on calibration data, and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repmlp_deploy import export
from repmlp_deploy.convert.graph.headroom import MARGIN, find_headroom
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.precision import PRECISIONS
from support.graph_cases import SMALL, graph_case
from support.task_cases import network_reaching, save_network, small_card

FP16 = PRECISIONS["fp16"]
CARD = small_card("repmlpnet")


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return graph_case("repmlpnet").model


def inputs(scale: float = 1.0) -> list[list[np.ndarray]]:
    return [[probe_inputs((3, *SMALL["repmlpnet"]), samples=4) * np.float32(scale)]]


def test_only_types_of_limited_range_are_checked() -> None:
    assert {name for name, entry in PRECISIONS.items() if entry.is_limited} == {"fp16"}


def test_the_largest_value_is_named_with_its_module_and_margin(model: onnx.ModelProto) -> None:
    found = find_headroom(model, FP16, (), inputs())
    assert found.is_enough
    assert found.margin == pytest.approx(65504 / found.largest)
    assert found.module
    smaller = find_headroom(model, FP16, (), [[batch[0][:1] * np.float32(0.1)] for batch in inputs()])
    assert smaller.largest < found.largest, "it is what the samples show"


def test_the_first_value_without_room_is_named_and_float32_values_do_not_count(model: onnx.ModelProto) -> None:
    """Images of a million times the size leave float16 in the first convolution."""
    found = find_headroom(model, FP16, (), inputs(1e6))
    assert not found.is_enough
    assert (found.module, found.node) == ("conv_embedding.conv", "Conv conv_embedding.conv/Conv")
    everything = {node.name for node in model.graph.node}
    last = next(node.name for node in model.graph.node if "head" in node.name)
    kept = find_headroom(model, FP16, everything - {last}, inputs(1e6))
    assert kept.node.endswith(last) or kept.module != "conv_embedding.conv"


@pytest.mark.parametrize(("mask", "is_enough"), [(-np.inf, True), (np.inf, False), (-1e30, False)])
def test_masks_of_minus_infinity_have_room(mask: float, is_enough: bool) -> None:
    """Any type holds them, unlike a large finite number."""
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y")]
    masked = numpy_helper.from_array(np.array([0, 0, mask], np.float32), "mask")
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"], name="add")]
    small = helper.make_model(
        helper.make_graph(nodes, "g", border[:1], border[1:], [masked]), opset_imports=[helper.make_opsetid("", 20)]
    )
    found = find_headroom(small, FP16, (), [[np.ones((2, 3), np.float32)]])
    assert found.is_enough is is_enough
    assert found.largest == 1.0 or not is_enough


def test_a_value_that_fits_without_the_margin_is_refused_and_keeping_its_block_helps(tmp_path: Path) -> None:
    """Nothing overflows on the probe; on a larger image it would."""
    path = save_network(network_reaching(2e4), tmp_path / "near.pth")
    with pytest.raises(VerificationError) as caught:
        export(path, card=CARD, precision="fp16", batch=2, out=tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("fp16 has no room for this network: first at stages.1.0 · ffn_fc1: Conv ")
    assert f"float16 ends at 65504, and a margin of {MARGIN:g}" in said
    assert "pass --keep-fp32 'stages.1.0*', or use bf16" in said
    assert not (tmp_path / "out").exists()
    kept = export(path, card=CARD, precision="fp16", batch=2, keep_fp32=["stages.1.0*"], out=tmp_path / "out")
    about = kept.manifest.artifacts["onnx"].model_extra["headroom"]
    assert about["margin"] >= MARGIN
    assert not about["module"].startswith("stages.1.0")


def test_calibration_data_is_looked_at_too(tmp_path: Path) -> None:
    """The probe is fine; a sample of the data that is given is not."""
    path = save_network(network_reaching(8e2), tmp_path / "fine.pth")
    export(path, card=CARD, precision="fp16", batch=2, out=tmp_path / "fine")
    dark = np.clip(probe_inputs((3, 32, 32), samples=40, seed=3) * 0.3, -1.9, 2.1)
    made = export(path, card=CARD, precision="fp16", batch=2, calibration={"images": dark}, out=tmp_path / "data")
    alone = made.manifest.artifacts["onnx"].model_extra["headroom"]["largest"]
    loud = dark.copy()
    loud[7] *= 5.0
    made = export(
        path,
        card=CARD,
        precision="fp16",
        batch=2,
        calibration={"images": np.clip(loud, -1.9, 2.1)},
        out=tmp_path / "loud",
    )
    assert made.manifest.artifacts["onnx"].model_extra["headroom"]["largest"] > alone
