"""Polygraphy, NVIDIA's own tool, judges our graphs: it inspects, runs, compares and sanitizes those of every family.

It is a command of its own and knows nothing of this project. The folded graph is compared with the merged-only one,
which has the BatchNorms that folding removes.
"""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.graph.simplify import simplify_graph
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form
from support.graph_cases import BATCH, CASES, graph_case, trained_case

polygraphy_main = pytest.importorskip("polygraphy.tools._main", reason='needs pip install "repmlp-deploy[dev]"').main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the tool's own are not ours

TOLERANCE = "1e-4"  # both graphs are float32; their sums run in another order


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str


def polygraphy(*arguments: str) -> Done:
    """Run the tool in this process, where its imports are paid for once; it installs nothing by itself."""
    printed = io.StringIO()
    with patch.object(sys, "argv", ["polygraphy", *arguments]), redirect_stdout(printed), redirect_stderr(printed):
        try:
            code = polygraphy_main()
        except SystemExit as ended:
            code = ended.code
    return Done(int(code or 0), printed.getvalue())


@cache
def merged_graph(family: str) -> onnx.ModelProto:
    """Return the graph of the network that is merged as upstream does it, and not folded."""
    network = upstream_form(merge_branches(trained_case(family)))
    names = [value.name for value in graph_case(family).model.graph.output]
    traced = trace_network(network, [torch.zeros(1, 3, *CASES[family])], BATCH)
    return simplify_graph(export_graph(traced, input_names=["images"], output_names=names))


def compare(folder: Path, family: str, folded: onnx.ModelProto) -> Done:
    """Run both graphs on the same seeded input and compare their outputs."""
    onnx.save(folded, folder / "folded.onnx")
    onnx.save(merged_graph(family), folder / "merged.onnx")
    shape = f"images:[3,3,{CASES[family][0]},{CASES[family][1]}]"
    options = ("--onnxrt", "--input-shapes", shape, "--seed", "1")
    answers = str(folder / "merged.json")
    first = polygraphy("run", str(folder / "merged.onnx"), *options, "--save-outputs", answers)
    assert first.returncode == 0, first.stdout
    bounds = ("--atol", TOLERANCE, "--rtol", TOLERANCE)
    return polygraphy("run", str(folder / "folded.onnx"), *options, "--load-outputs", answers, *bounds)


@pytest.mark.parametrize("family", CASES)
def test_the_folded_graph_computes_what_the_merged_one_does(tmp_path: Path, family: str) -> None:
    done = compare(tmp_path, family, graph_case(family).model)
    assert done.returncode == 0, done.stdout
    assert "Pass Rate: 100.00%" in done.stdout


def test_a_planted_fault_fails_the_comparison(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(graph_case("repmlpnet").model)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(0.01), weight.name))
    done = compare(tmp_path, "repmlpnet", model)
    assert done.returncode != 0
    assert "FAILED" in done.stdout


@pytest.mark.parametrize("family", CASES)
def test_sanitizing_finds_nothing_to_fold_and_nothing_to_remove(tmp_path: Path, family: str) -> None:
    model = graph_case(family).model
    onnx.save(model, tmp_path / "model.onnx")
    options = ("--fold-constants", "--cleanup", "-o", str(tmp_path / "clean.onnx"))
    done = polygraphy("surgeon", "sanitize", str(tmp_path / "model.onnx"), *options)
    assert done.returncode == 0, done.stdout
    clean = onnx.load(tmp_path / "clean.onnx")
    onnx.checker.check_model(clean)
    assert [node.op_type for node in clean.graph.node] == [node.op_type for node in model.graph.node]
    assert len(clean.graph.initializer) == len(model.graph.initializer)


@pytest.mark.parametrize("family", CASES)
def test_inspecting_tells_inputs_outputs_and_nodes(tmp_path: Path, family: str) -> None:
    model = graph_case(family).model
    onnx.save(model, tmp_path / "model.onnx")
    done = polygraphy("inspect", "model", str(tmp_path / "model.onnx"))
    assert done.returncode == 0, done.stdout
    assert re.search(rf"---- {len(model.graph.node)} Node\(s\) ----", done.stdout)
    assert "images [dtype=float32" in done.stdout
