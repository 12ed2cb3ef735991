"""Weights that ONNX Runtime takes beside the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import BundleError
from repmlp_deploy.runtime.onnx import runner
from repmlp_deploy.runtime.onnx.runner import OnnxRunner, open_session
from repmlp_deploy.runtime.onnx.weights import split_weights
from repmlp_deploy.runtime.runner import RunnerOptions

EDGE = 128
X = np.random.default_rng(0).standard_normal((3, EDGE)).astype(np.float32)


def product(*weights: TensorProto, name: str = "w") -> bytes:
    """y = x @ w + b, where b is small."""
    edges = [helper.make_tensor_value_info(edge, TensorProto.FLOAT, [None, EDGE]) for edge in ("x", "y")]
    bias = numpy_helper.from_array(np.arange(EDGE, dtype=np.float32), "b")
    nodes = [helper.make_node("MatMul", ["x", name], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    graph = helper.make_graph(nodes, "g", edges[:1], edges[1:], [*weights, bias])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def matrix(seed: int = 1, name: str = "w") -> TensorProto:
    """A weight that is large."""
    values = np.random.default_rng(seed).standard_normal((EDGE, EDGE)).astype(np.float32)
    return numpy_helper.from_array(values, name)


def test_a_split_graph_names_what_was_taken_out_and_keeps_the_rest() -> None:
    """What protobuf itself reads in the parts is what it reads in the whole."""
    whole = product(matrix())
    split = split_weights(whole)
    assert split is not None
    np.testing.assert_array_equal(split.weights["w"], numpy_helper.to_array(matrix()))
    assert set(split.weights) == {"w"}
    rest, before = onnx.load_model_from_string(split.graph), onnx.load_model_from_string(whole)
    taken = rest.graph.initializer[0]
    assert (taken.name, list(taken.dims), taken.data_type) == ("w", [EDGE, EDGE], TensorProto.FLOAT)
    assert taken.data_location == TensorProto.EXTERNAL
    assert not taken.raw_data
    taken.CopyFrom(before.graph.initializer[0])
    assert rest == before


def test_the_values_are_views_of_the_bytes_that_were_split() -> None:
    """A copy would take what splitting saves."""
    content = np.frombuffer(product(matrix()), np.uint8).copy()
    split = split_weights(content.data)
    assert split is not None
    assert np.shares_memory(split.weights["w"], content)


def test_a_session_computes_the_same_bits_with_the_weights_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = product(matrix())
    apart, _ = open_session(whole, RunnerOptions(threads=1))
    monkeypatch.setattr(runner, "split_weights", lambda _: None)
    together, _ = open_session(whole, RunnerOptions(threads=1))
    np.testing.assert_array_equal(apart.run(None, {"x": X})[0], together.run(None, {"x": X})[0])
    expected = X @ numpy_helper.to_array(matrix()) + np.arange(EDGE, dtype=np.float32)
    np.testing.assert_allclose(apart.run(None, {"x": X})[0], expected, rtol=1e-4, atol=1e-4)


def test_a_session_does_not_read_the_memory_that_is_given_back(
    bundle: Bundle,
) -> None:
    """Up to the release that is named in the runner, weights are copied; those of a later one are kept with it."""
    content = np.frombuffer(bundle.read(bundle.artifact("onnx")), np.uint8).copy()
    session, _ = open_session(content.data, RunnerOptions(threads=1))
    probe, name = bundle.probe().inputs, session.get_inputs()[0].name
    before = session.run(None, {name: probe})[0]
    if session in runner._kept:
        return
    content[:] = 0x7F
    np.testing.assert_array_equal(session.run(None, {name: probe})[0], before)


def test_weights_of_a_release_that_nobody_tried_are_kept_with_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_COPY", (0, 0))
    session, _ = open_session(product(matrix()), RunnerOptions(threads=1))
    assert session in runner._kept
    assert runner._release("1.32.0") == (1, 32)
    assert runner._release("1.dev") > (1, 32)


@pytest.mark.parametrize(
    "whole",
    [
        product(numpy_helper.from_array(np.eye(EDGE, dtype=np.float32)[:, :8] @ np.zeros((8, 1), np.float32), "w")),
        product(matrix(), matrix(2)),
        product(matrix())[:-1],
        b"\xff" * 40,
        b"",
    ],
    ids=["small", "twice", "cut", "no message", "empty"],
)
def test_anything_else_is_left_to_onnx_runtime(whole: bytes) -> None:
    assert split_weights(whole) is None


@pytest.mark.parametrize("fault", ["dims", "type", "location", "external"])
def test_a_weight_that_says_something_else_stays_in_the_graph(fault: str) -> None:
    """ONNX Runtime judges it, and the weights beside it go apart all the same."""
    odd = matrix(name="odd")
    if fault == "dims":
        odd.dims[0] = EDGE - 1
    elif fault == "type":
        odd.data_type = TensorProto.INT64
    elif fault == "location":
        odd.data_location = TensorProto.DEFAULT
    else:
        odd.external_data.add(key="location", value="planted.bin")
    split = split_weights(product(matrix(), odd))
    assert split is not None
    assert set(split.weights) == {"w"}
    assert odd in onnx.load_model_from_string(split.graph).graph.initializer


def test_a_weight_that_names_a_file_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(matrix().raw_data)  # the name that the split graph has
    planted = TensorProto(name="v", data_type=TensorProto.FLOAT, dims=[EDGE, EDGE], data_location=TensorProto.EXTERNAL)
    planted.external_data.add(key="location", value="weights")
    with pytest.raises(BundleError, match="refuses the model"):
        open_session(product(matrix(), planted, name="v"), RunnerOptions())


@given(st.binary(max_size=64), st.integers(0, 200))
def test_no_bytes_make_it_fail(noise: bytes, at: int) -> None:
    """It reads what nobody has checked for sense, although its digest is known."""
    whole = bytearray(product(matrix()))
    whole[at : at + len(noise)] = noise
    split_weights(bytes(whole))
    split_weights(noise)


def test_the_bundles_runner_takes_its_weights_apart(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = runner.split_weights

    def watched(model: memoryview) -> object:
        seen.append(plain(model))
        return seen[-1]

    monkeypatch.setattr(runner, "split_weights", watched)
    opened = OnnxRunner(bundle, RunnerOptions(threads=1))
    opened.close()
    assert seen[0] is not None
    assert len(seen[0].graph) + sum(v.nbytes for v in seen[0].weights.values()) < bundle.artifact("onnx").bytes + 4096
