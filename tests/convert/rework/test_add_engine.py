"""Engines for a bundle that was proved elsewhere: no torch, no ONNX Runtime, the bundle replaced whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from repmlp_deploy import Bundle, export
from repmlp_deploy.bundle import MANIFEST, BatchRange
from repmlp_deploy.cli.build import build_command
from repmlp_deploy.cli.export import export_command
from repmlp_deploy.cli.shared.console import run_command
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats.tensorrt import flavours
from repmlp_deploy.convert.rework.add_engine import add_engines, verified_graph
from repmlp_deploy.errors import BundleError, InputError
from support.pip import run_pip

ROOT = Path(__file__).resolve().parents[3]

BLOCKED = ("torch", "onnxruntime", "onnxscript", "onnxsim", "safetensors", "openvino", "nncf")


def without_engine(folder: Path) -> Path:
    """The bundle as if it had been exported to ONNX alone."""
    data = json.loads((folder / MANIFEST).read_text())
    (folder / data["artifacts"].pop("trt-rtx")["path"]).unlink()
    data["notes"] = [note for note in data["notes"] if "engine" not in note]
    (folder / MANIFEST).write_text(json.dumps(data))
    return folder


def built_without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); from repmlp_deploy.cli.build import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def ends_with(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(build_command, [str(argument) for argument in arguments])
    return int(ended.value.code)


def test_an_engine_is_built_without_torch_and_onnx_runtime(bundle_folder: Path) -> None:
    before = Bundle.load(without_engine(bundle_folder)).manifest
    child = built_without_torch(bundle_folder, "--batch", "1:1:2,3:8:16", "--compute-capability", "8.6,12.0", "--json")
    assert child.returncode == 0, child.stderr
    after = Bundle.load(bundle_folder)
    assert json.loads(child.stdout)["artifacts"].keys() == after.manifest.artifacts.keys()
    details = after.artifact("trt-rtx").model_extra
    assert details["compute_capabilities"] == ["8.6", "12.0"]
    assert [profile["images"] for profile in details["profiles"]] == [
        [[1, 3, 32, 32], [1, 3, 32, 32], [2, 3, 32, 32]],
        [[3, 3, 32, 32], [8, 3, 32, 32], [16, 3, 32, 32]],
    ]
    assert len(after.read(after.artifact("trt-rtx"))) > 100_000
    assert after.manifest.certificate == before.certificate
    assert after.manifest.probe == before.probe
    assert after.manifest.batch == before.batch
    assert after.manifest.provenance["checkpoint"] == before.provenance["checkpoint"]
    assert after.manifest.provenance["engines"]["trt-rtx"]["date"]
    assert after.manifest.notes[-1] == "the trt-rtx engine was built from the verified graph and has not run here"


def test_an_engine_takes_the_place_of_the_earlier_one_or_another_folder(bundle_folder: Path, tmp_path: Path) -> None:
    profiles = (BatchRange(min=1, opt=1, max=1),)
    elsewhere = add_engines(bundle_folder, ["trt-rtx"], EngineOptions(profiles=profiles), out=tmp_path / "other")
    assert Bundle.load(bundle_folder).artifact("trt-rtx").model_extra["profiles"][0]["images"][2][0] == 16
    assert elsewhere.artifact("trt-rtx").model_extra["profiles"][0]["images"][2][0] == 1
    for entry in elsewhere.files():
        elsewhere.read(entry)
    assert len(elsewhere.manifest.notes) == len(set(elsewhere.manifest.notes))


def test_a_graph_that_was_changed_is_not_built_from(bundle_folder: Path) -> None:
    path = bundle_folder / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="was changed: its sha256 is not the manifest's"):
        add_engines(bundle_folder, ["trt-rtx"])


@pytest.mark.parametrize("passed", [None, False])
def test_a_graph_that_was_not_verified_is_not_built_from(bundle_folder: Path, passed: bool | None) -> None:
    data = json.loads((bundle_folder / MANIFEST).read_text())
    if passed is None:
        data["certificate"] = [hop for hop in data["certificate"] if "ONNX" not in hop["name"]]
    else:
        data["certificate"][-1]["passed"] = passed
    (bundle_folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="was not verified"):
        add_engines(bundle_folder, ["trt-rtx"])


def test_rows_of_another_precision_do_not_vouch_for_the_graph(digits_checkpoint: Path, tmp_path: Path) -> None:
    """The float32 graph that the fp16 one was made from was verified, the fp16 graph itself was not."""
    bundle = export(digits_checkpoint, precision="fp16", batch="1:2:4", out=tmp_path / "bundle")
    assert verified_graph(bundle) == (tmp_path / "bundle" / "model.onnx").read_bytes()
    rows = tuple(hop for hop in bundle.manifest.certificate if hop.precision != "fp16")
    unproved = Bundle(bundle.manifest.model_copy(update={"certificate": rows}), bundle.folder)
    with pytest.raises(BundleError, match="was not verified"):
        verified_graph(unproved)


def test_profiles_beyond_what_was_verified_are_refused(bundle_folder: Path) -> None:
    before = (bundle_folder / MANIFEST).read_bytes()
    wide = EngineOptions(profiles=(BatchRange(min=1, opt=1, max=17),))
    with pytest.raises(InputError, match=r"--batch 1:1:17 is beyond what the graph was verified for, 1 to 16"):
        add_engines(bundle_folder, ["trt-rtx"], wide)
    assert (bundle_folder / MANIFEST).read_bytes() == before


def test_the_command_says_what_was_built_and_refuses_what_it_cannot(
    bundle_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ends_with(bundle_folder, "--optimization-level", 1) == 0
    out = capsys.readouterr().out
    for said in ("24 float", "1:4:16", "the builder's choice", "has not run here"):
        assert said in out
    assert ends_with(bundle_folder, "--refittable") == 4
    assert ends_with(bundle_folder, "--format", "trt") == 4
    assert "use --format trt-rtx" in capsys.readouterr().err
    assert ends_with(bundle_folder, "--format", "onnx") == 2
    assert ends_with(bundle_folder, "--refit-from", "x.pth", "--tf32") == 2
    assert ends_with(bundle_folder, "--weights", "ema") == 2
    assert ends_with(tmp_path) == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--tf32",), 2, "--tf32 is about engines; add --format trt or trt-rtx"),
        (("--batch", "1:1:1,1:8:64"), 2, "--batch is about engines"),
        (("--format", "trt-rtx", "--compute-capability", "9.9"), 2, "cannot build for 9.9; it can for"),
        (("--format", "trt-rtx", "--timing-cache", "x"), 2, "trt-rtx has no --timing-cache"),
        (("--format", "trt-rtx", "--verbosity", "loud"), 2, "--verbosity loud: unknown"),
        (("--format", "trt-rtx", "--strip-weights"), 4, "needs an NVIDIA driver"),
        (("--format", "trt"), 4, "use --format trt-rtx, which builds for RTX GPUs without one"),
    ],
)
def test_an_export_refuses_options_in_one_line_before_it_reads_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.setattr(flavours, "find_gpus", tuple)
    with pytest.raises(SystemExit) as ended:
        run_command(export_command, ["--ckpt", "there-is-none.pth", *words])
    assert ended.value.code == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


@pytest.mark.slow
def test_the_rtx_extra_alone_is_enough_to_build(bundle_folder: Path, tmp_path: Path) -> None:
    """In an environment that has nothing else: 90 MB from the package index."""
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    run_pip("install", "--quiet", "-c", ROOT / "constraints.txt", f"{ROOT}[rtx]", python=scripts / "python")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    have = subprocess.run([scripts / "python", "-c", "import torch"], capture_output=True, check=False, env=environment)
    assert have.returncode != 0
    subprocess.run([scripts / "repmlp-build", without_engine(bundle_folder)], check=True, env=environment)
    bundle = Bundle.load(bundle_folder)
    assert len(bundle.read(bundle.artifact("trt-rtx"))) > 100_000


def test_weights_of_the_graph_are_weights_of_the_engine_by_name(bundle: Bundle) -> None:
    """What refitting rests on: the builder's network knows every floating-point initializer by its own name."""
    import tensorrt_rtx as trt

    from repmlp_deploy.convert.formats.tensorrt.flavours import creation_flags
    from repmlp_deploy.runtime.tensorrt.log import shared_logger

    data = bundle.read(bundle.artifact("onnx"))
    network = trt.Builder(shared_logger(trt)).create_network(creation_flags(trt))
    parser = trt.OnnxParser(network, shared_logger(trt))
    assert parser.parse(data)
    initializers = onnx.load_from_string(data).graph.initializer
    weights = [t.name for t in initializers if numpy_helper.to_array(t).dtype.kind == "f"]
    assert len(weights) == 52
    assert all(network.mark_weights_refittable(name) for name in weights)
    assert not network.mark_weights_refittable("no such weight")
