"""The script that compares an engine's layers: its table, its comparison, and what of it runs without a GPU."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from repmlp_deploy import Bundle, export
from repmlp_deploy.cli import verify as verify_cli
from repmlp_deploy.cli.shared.console import run_command
from repmlp_deploy.convert.rework import engine_script
from repmlp_deploy.convert.rework.engine_report import compared_values, engine_report
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.tensorrt.driver import find_gpus
from support.graph_cases import SMALL, graph_case

pytest.importorskip("polygraphy", reason='needs pip install "repmlp-deploy[dev]"')

BLOCKED = ("torch", "repmlp_deploy")


@pytest.fixture(scope="module")
def script(_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "compare.py"
    path.write_text(engine_report(Bundle.load(_exported)), encoding="utf-8")
    return path


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script where neither torch nor this package can be imported."""
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=script.parent, timeout=300)


def loaded(script: Path, monkeypatch: pytest.MonkeyPatch, **replaced: Any) -> SimpleNamespace:
    """Return the script's names, some of them replaced where its functions look."""
    names = runpy.run_path(str(script))
    for name, value in replaced.items():
        monkeypatch.setitem(names["main"].__globals__, name, value)
    return SimpleNamespace(**names)


def test_the_script_is_whole_and_imports_only_what_it_says(script: Path) -> None:
    text = script.read_text()
    tree = ast.parse(text)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in imported if name} <= sys.stdlib_module_names
    loads = {
        node.args[0].value for node in ast.walk(tree) if _calls(node, "load") and isinstance(node.args[0], ast.Constant)
    }
    assert {name.partition(".")[0] for name in loads} == {"numpy", "onnx", "onnxruntime", "polygraphy", "tensorrt_rtx"}


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


@pytest.mark.parametrize("family", ["repmlpnet", "repmlp-resnet"])
def test_the_table_names_block_and_part_of_every_product(family: str) -> None:
    graph = graph_case(family).model
    values = compared_values(graph.SerializeToString())
    known = {name for node in graph.graph.node for name in node.output}
    assert [about["value"] for about in values] == list(dict.fromkeys(about["value"] for about in values))
    assert {about["value"] for about in values} <= known
    products = {node.output[0] for node in graph.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    assert products <= {about["value"] for about in values}
    places = [about["place"] for about in values]
    if family == "repmlpnet":
        for place in (
            "conv_embedding",
            "stages.1.1 · fc3",
            "stages.0.0 · global perceptron · fc2",
            "stages.1.0 · ffn_fc1",
        ):
            assert place in places
        assert places[-1] == "head"
    assert SMALL[family]
    assert "the network" not in places


def test_onnx_runtimes_side_runs_without_torch_and_without_this_package(script: Path, bundle: Bundle) -> None:
    done = run(script, bundle.folder, "--reference-only")
    assert done.returncode == 0, done.stderr
    count = len(compared_values(bundle.read(bundle.artifact("onnx"))))
    assert f"ONNX Runtime computed {count} values; no engine was compared" in done.stdout
    assert "stages.1.0 · fc3  (MatMul stages.1.0.fc3/MatMul): (4, " in done.stdout


def test_polygraphy_builds_the_engine_with_every_output(script: Path, bundle: Bundle) -> None:
    """Polygraphy's loaders are called for real, and TensorRT-RTX builds for a GPU that is not here."""
    done = run(script, bundle.folder, "--build-for", "8.9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was run" in done.stdout


def test_the_loaders_for_tensorrt_exist_too(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "compare.py"
    path.write_text(engine_report(bundle, "trt"))
    names = loaded(path, monkeypatch)
    assert (names.ABOUT["engine"], names.ABOUT["package"]) == (None, "tensorrt")
    network, config = names.network_and_config(b"", None)
    assert type(network).__name__ == "NetworkFromOnnxBytes"
    assert type(config).__name__ == "CreateConfig"
    assert config.tf32 is False
    with pytest.raises(names.Unusable, match="TensorRT builds for the GPU at hand") as caught:
        names.run(SimpleNamespace(bundle=bundle.folder, build_for="8.9"))
    assert caught.value.code == 2


def test_without_a_gpu_the_script_says_so(script: Path, bundle: Bundle) -> None:
    if find_gpus():
        pytest.skip("this machine has a GPU")
    done = run(script, bundle.folder)
    assert done.returncode == 4
    assert "the engine does not run on this machine, which needs an NVIDIA GPU" in done.stderr


def test_a_missing_package_and_a_changed_file_are_one_line(
    script: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = loaded(script, monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert names.main([str(bundle_folder), "--reference-only"]) == 4
    assert "onnxruntime cannot be imported" in capsys.readouterr().err
    with (bundle_folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert names.main([str(bundle_folder), "--reference-only"]) == 2
    assert "model.onnx is not the file that this script was written for" in capsys.readouterr().err


class Engines:
    """The GPU's side: ONNX Runtime's values, from one value on with an error."""

    def __init__(self, names: SimpleNamespace, graph: bytes, wrong: str, by: float) -> None:
        self._expected = names.run_reference(names.marked_graph(graph), names.read_inputs(names.folder))
        values = [names.marked(about["value"]) for about in names.ABOUT["values"]]
        late = values[values.index(names.marked(wrong)) :] if wrong else []
        self._wrong = dict.fromkeys(late, by)

    def run(self, _engine: object, _inputs: object) -> dict[str, np.ndarray]:
        found = {name: value * (1 + self._wrong.get(name, 0.0)) for name, value in self._expected.items()}
        return {name: value.astype(np.float32) for name, value in found.items()}


@pytest.mark.parametrize("by", [0.0, 1e-3])
def test_the_first_value_that_differs_is_named(  # noqa: PLR0913 - one per fixture
    by: float,
    script: Path,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    graph = bundle.read(bundle.artifact("onnx"))
    product = next(node for node in onnx.load_from_string(graph).graph.node if node.name == "stages.1.0.fc3/MatMul")
    names = loaded(script, monkeypatch)
    names.folder = bundle.folder
    engines = Engines(names, graph, product.output[0] if by else "", by)
    for name, function in {"run_engine": engines.run, "network_and_config": lambda *_: (None, None)}.items():
        monkeypatch.setitem(names.main.__globals__, name, function)
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
    code = names.main([str(bundle.folder), "--json", str(tmp_path / "rows.json")])
    out, err = capsys.readouterr()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert list(rows) == ["the bundle's engine", "every value, in an engine that was built again"]
    if not by:
        assert code == 0
        assert "every value is within the tolerance" in out
        return
    assert code == 3
    assert err.startswith("error: first at stages.1.0 · fc3: MatMul stages.1.0.fc3/MatMul differs by ")
    verdicts = [row["passed"] for row in rows["every value, in an engine that was built again"]]
    assert verdicts.index(False) == sum(verdicts)


def test_a_value_that_is_not_finite_or_of_another_shape_differs(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = loaded(script, monkeypatch)
    place = [{"output": "y", "place": "stages.0.0", "node": "Add y"}]
    right = {"y": np.ones((2, 3), np.float32)}
    for wrong in (np.full((2, 3), np.nan, np.float32), np.ones((2, 4), np.float32)):
        assert not names.compare({"y": wrong}, right, place)[0]["passed"]
    assert names.compare(right, right, place)[0]["passed"]


def test_the_command_writes_the_script_and_says_how_to_run_it(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            run_command(verify_cli.verify_command, [str(argument) for argument in arguments])
        return int(ended.value.code)

    path = tmp_path / "compare.py"
    assert verify(bundle.folder, "--engine-report", path) == 0
    assert f"python {path} {bundle.folder}" in " ".join(capsys.readouterr().out.split("`"))
    assert path.read_text() == engine_report(bundle)
    (tmp_path / "link").symlink_to(path)
    assert verify(bundle.folder, "--engine-report", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert verify(bundle.folder, "--engine-report", tmp_path / "no" / "compare.py") == 5
    assert verify(bundle.folder, "--engine-report", path, "--format", "onnx") == 2
    assert "--format onnx: unknown; expected one of trt, trt-rtx" in capsys.readouterr().err


def test_a_bundle_without_an_engine_or_in_bfloat16_is_refused(digits_checkpoint: Path, tmp_path: Path) -> None:
    made = export(digits_checkpoint, formats="onnx", precision="bf16", batch=2, out=tmp_path / "out")
    with pytest.raises(InputError, match="has no engine: name the builder to compare, --format trt or trt-rtx"):
        engine_report(made)
    with pytest.raises(InputError, match="ONNX Runtime runs no bf16 graph on a CPU"):
        engine_report(made, "trt")


def test_the_source_of_the_script_has_an_empty_table() -> None:
    assert engine_script.ABOUT == {}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_gpu_every_layer_is_compared(precision: str, digits_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = {"formats": "onnx,trt-rtx", "precision": precision, "batch": "1:4:16"}
    made = export(digits_checkpoint, out=tmp_path / "out", **options)
    path = tmp_path / "compare.py"
    path.write_text(engine_report(made))
    done = run(path, made.folder)
    assert done.returncode == 0, done.stdout + done.stderr
