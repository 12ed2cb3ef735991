"""What importing costs, and what it must not need."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import repmlp_deploy

HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "openvino", "nncf", "pydantic", "PIL")


def run(script: str) -> str:
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_importing_the_package_loads_no_framework_and_almost_nothing_else() -> None:
    """Every module costs time: two of this package, none of another, and a handful of Python's own."""
    script = (
        "import sys, json; before = set(sys.modules); import repmlp_deploy; "
        "print(json.dumps([name for name in set(sys.modules) - before if sys.modules[name] is not None]))"
    )
    loaded = json.loads(run(script))
    assert not {name.split(".")[0] for name in loaded} - sys.stdlib_module_names - {"repmlp_deploy"}
    assert {name for name in loaded if name.startswith("repmlp_deploy")} == {"repmlp_deploy", "repmlp_deploy.privacy"}
    assert len(loaded) <= 25, sorted(loaded)


def test_the_help_of_a_command_loads_no_framework() -> None:
    script = """
import json, sys
from repmlp_deploy.cli.shared.entry import COMMANDS, run
sys.argv = [sys.argv[0], "--help"]
for name in COMMANDS:
    try:
        run(name)
    except SystemExit as ended:
        assert ended.code == 0
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not ({*HEAVY} - {"pydantic", "PIL"}) & {*json.loads(child.stderr)}


def test_the_predictor_needs_neither_torch_nor_onnx_nor_an_engine() -> None:
    blocked = ("torch", "onnx", "onnxscript", "onnxsim", "tensorrt", "tensorrt_rtx", "openvino", "rich", "typer")
    run(f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from repmlp_deploy import Predictor, Bundle")


def test_a_bundle_runs_without_torch(bundle: repmlp_deploy.Bundle) -> None:
    """The digits samples are predicted and the probe passes with torch and onnx not importable."""
    script = f"""
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(("torch", "onnx", "tensorrt_rtx", "openvino")))
from pathlib import Path
from repmlp_deploy import Predictor
from repmlp_deploy.card import data_root
with Predictor({str(bundle.folder)!r}) as predictor:
    predictor.self_check()
    images = sorted((data_root() / "samples" / "digits").glob("*.png"))
    print([p.pred_class for p in predictor(images)])
from repmlp_deploy.convert.proof.certificate import recertify
hops, _ = recertify(predictor.bundle)
assert [hop.passed for hop in hops] == [None, True, True, True]
"""
    assert run(script).strip() == str([str(i) for i in range(10)])


def test_public_names_are_explicit_and_resolve() -> None:
    assert set(repmlp_deploy.__all__) <= set(dir(repmlp_deploy))
    assert {"Predictor", "export", "get_model", "inference_model", "merge_branches"} <= set(repmlp_deploy.__all__)
    for name in repmlp_deploy.__all__:
        assert getattr(repmlp_deploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Predictr'"):
        _ = repmlp_deploy.Predictr


def test_a_missing_runtime_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from repmlp_deploy.errors import MissingDependency

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "repmlp_deploy.runtime.onnx.runner")
    with pytest.raises(MissingDependency, match=r'onnxruntime is not installed: pip install "repmlp-deploy\[cpu\]"'):
        importlib.import_module("repmlp_deploy.runtime.onnx.runner")


def test_a_runtime_that_is_there_and_fails_to_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from repmlp_deploy.errors import MissingDependency

    why = "libcudart.so.12: cannot open shared object file"
    (tmp_path / "onnxruntime.py").write_text(f"raise ImportError({why!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("onnxruntime", "repmlp_deploy.runtime.onnx.runner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingDependency, match=rf"onnxruntime cannot be imported \({why}\): pip install"):
        importlib.import_module("repmlp_deploy.runtime.onnx.runner")
