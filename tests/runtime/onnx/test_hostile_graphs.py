"""What a graph cannot make ONNX Runtime do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from repmlp_deploy.errors import BundleError
from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions


def _graph(weights: TensorProto) -> bytes:
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4096]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", edges[:1], edges[1:], [weights])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return model.SerializeToString()


def test_weights_are_not_read_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No digest of the bundle covers them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.bin").write_bytes(np.full(4096, 7, np.float32).tobytes())
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4096], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="planted.bin")
    with pytest.raises(BundleError, match="refuses the model"):
        open_session(_graph(weights), RunnerOptions())


def test_weights_inside_the_graph_are_read() -> None:
    session, _ = open_session(_graph(onnx.numpy_helper.from_array(np.ones(4096, np.float32), "w")), RunnerOptions())
    assert session.run(None, {"x": np.zeros(4096, np.float32)})[0].sum() == 4096
