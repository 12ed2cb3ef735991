"""The commands as people run them: reports on stdout, one line on stderr, exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repmlp_deploy import Bundle
from repmlp_deploy.cli import bench as bench_cli
from repmlp_deploy.cli import build as build_cli
from repmlp_deploy.cli import export as export_cli
from repmlp_deploy.cli import inspect as inspect_cli
from repmlp_deploy.cli import pack as pack_cli
from repmlp_deploy.cli import predict as predict_cli
from repmlp_deploy.cli import serve as serve_cli
from repmlp_deploy.cli import verify as verify_cli
from repmlp_deploy.precision import PRECISIONS, Tolerance
from repmlp_deploy.runtime.tensorrt.driver import find_gpus
from support.commands import SAMPLES, ends_with

ROOT = Path(__file__).resolve().parents[2]


def export_fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and the error, which is one line, the last on stderr; nothing on stdout."""
    code = ends_with(export_cli.export_command, *arguments)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in err
    return code, lines[-1].removeprefix("error: ")


def test_an_export_prints_its_hops_and_a_prediction_follows(
    capsys: pytest.CaptureFixture[str], digits_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert ends_with(export_cli.export_command, "--ckpt", digits_checkpoint, "--out", out) == 0
    text, progress = capsys.readouterr()
    for said in ("equal to the trained network, in ", "closest to its limit: ", "onnx: model.onnx, fp32", str(out)):
        assert said in text
    assert len(text.splitlines()) <= 8
    assert "... 3 of 6: verify folded" in progress.splitlines()
    assert ends_with(export_cli.export_command, "--ckpt", digits_checkpoint, "--out", out, "--details") == 0
    text = capsys.readouterr().out
    for said in ("simplified ONNX", "recognised as repmlp-digits", "every tolerance is met", "equal to the trained"):
        assert said in text

    assert ends_with(predict_cli.predict_command, out, *SAMPLES, "--check", "--top", 2) == 0
    assert "onnx on cpu" in capsys.readouterr().out
    assert ends_with(predict_cli.predict_command, out, *SAMPLES, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["top"][0]["class"] for row in report["predictions"]] == [str(i) for i in range(10)]


def test_json_is_one_object_on_stdout(
    capsys: pytest.CaptureFixture[str], digits_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ("--ckpt", digits_checkpoint, "--out", tmp_path / "out", "--json", "--format", "checkpoint")
    assert ends_with(export_cli.export_command, *arguments) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["out"] == str(tmp_path / "out")
    assert report["artifacts"]["checkpoint"]["path"] == "model.safetensors"
    assert "... 3 of 6: merge" in err


def test_inspecting_a_checkpoint_and_a_bundle(
    capsys: pytest.CaptureFixture[str], digits_checkpoint: Path, bundle: Bundle
) -> None:
    assert ends_with(inspect_cli.inspect_command, digits_checkpoint, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["card"], report["layout"], report["state"]) == ("repmlp-digits", "official", "trained")
    assert (report["channels"], report["parameters"]) == ([24, 48, 96], 158184)
    assert ends_with(inspect_cli.inspect_command, bundle.folder / "model.safetensors") == 0
    assert "merged" in capsys.readouterr().out
    assert ends_with(inspect_cli.inspect_command, bundle.folder) == 0
    assert "simplified ONNX" in capsys.readouterr().out
    assert ends_with(inspect_cli.inspect_command, bundle.folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "bundle"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (inspect_cli.inspect_command, ("--weights", "ema")),
        (inspect_cli.inspect_command, ("--mean", "1,2,3")),
        (inspect_cli.inspect_command, ("--write-card", "no.toml")),
        (verify_cli.verify_command, ("--module", "package:make")),
        (verify_cli.verify_command, ("--card", "repmlp-digits")),
    ],
)
def test_an_option_about_a_checkpoint_is_refused_without_one(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, command: Any, option: tuple[str, str]
) -> None:
    assert ends_with(command, bundle.folder, *option) == 2
    assert f"{option[0]} is about " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing option '--ckpt'"),
        (["--ckpt", "x.pth", "--formt", "onnx"], "No such option: --formt"),
        (["--ckpt", "x.pth", "--format", "onxx"], "--format onxx: unknown; did you mean onnx?"),
        (["--ckpt", "x.pth", "--graph", "fold"], "--graph fold: unknown; did you mean folded?"),
        (["--ckpt", "x.pth", "--precision", "fp4"], "--precision fp4: unknown"),
        (["--ckpt", "x.pth", "--batch", "8:1:64"], "--batch is 8:1:64; MIN, OPT and MAX must be in ascending order"),
        (["--ckpt", "x.pth", "--input-size", "224"], "expected HxW, such as 224x224"),
        (["--ckpt", "x.pth", "--card", "repmlpnet-b222"], "did you mean repmlpnet-b224?"),
        (["--ckpt", "x.pth"], "x.pth: no such file"),
    ],
)
def test_unusable_arguments_exit_2(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, message = export_fails(capsys, *arguments)
    assert code == 2
    assert said in message


def test_unusable_files_exit_2_and_leave_the_earlier_bundle(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, bundle_folder: Path, digits_state: dict[str, torch.Tensor]
) -> None:
    before = {path.name: path.read_bytes() for path in bundle_folder.iterdir()}
    contents = {
        "list.pth": [1, 2],
        "other.pth": {"layer.weight": torch.ones(2)},
        "nan.pth": {**digits_state, "head.bias": digits_state["head.bias"] * float("nan")},
        "variance.pth": {**digits_state, "head_norm.running_var": -digits_state["head_norm.running_var"]},
        "missing.pth": {k: v for k, v in digits_state.items() if k != "head_norm.bias"},
        "shape.pth": {**digits_state, "head.bias": torch.ones(3)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        code, message = export_fails(capsys, "--ckpt", tmp_path / name, "--out", bundle_folder)
        assert code == 2, message
        assert name in message
    code, message = export_fails(capsys, "--ckpt", bundle_folder / "model.safetensors", "--out", bundle_folder)
    assert code == 2
    assert "merged already" in message
    assert {path.name: path.read_bytes() for path in bundle_folder.iterdir()} == before


def test_outputs_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, digits_checkpoint: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").touch()
    assert export_fails(capsys, "--ckpt", digits_checkpoint, "--out", tmp_path / "file")[0] == 2
    assert export_fails(capsys, "--ckpt", digits_checkpoint, "--out", tmp_path / "folder")[0] == 2
    assert export_fails(capsys, "--ckpt", digits_checkpoint, "--out", tmp_path / "file" / "out")[0] == 5
    assert export_fails(capsys, "--ckpt", digits_checkpoint, "--out", "/proc/nowhere/out")[0] == 5


def test_a_missing_package_exits_4_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, digits_checkpoint: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    code, message = export_fails(capsys, "--ckpt", digits_checkpoint, "--format", "trt-rtx")
    assert code == 4
    assert 'pip install "repmlp-deploy[rtx]"' in message


def test_a_failed_verification_exits_3_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, digits_checkpoint: Path, tmp_path: Path
) -> None:
    strict = Tolerance(floor_ratio=1e-9, reason="nothing passes this")
    monkeypatch.setitem(PRECISIONS, "fp32", replace(PRECISIONS["fp32"], tolerance=strict))
    code, message = export_fails(capsys, "--ckpt", digits_checkpoint, "--out", tmp_path / "out")
    assert code == 3
    assert "nothing was written" in message
    assert list(tmp_path.iterdir()) == []


def test_a_defect_is_one_line_and_a_traceback_only_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, digits_checkpoint: Path
) -> None:
    from repmlp_deploy.convert import pipeline

    def broken(_network: object, _shape: object) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(pipeline, "record_probe", broken)
    code, message = export_fails(capsys, "--ckpt", digits_checkpoint)
    assert code == 1
    assert "ZeroDivisionError: by nothing (this is a defect" in message
    assert ends_with(export_cli.export_command, "--ckpt", digits_checkpoint, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_verifying_runs_the_probe_again(capsys: pytest.CaptureFixture[str], bundle_folder: Path) -> None:
    assert ends_with(verify_cli.verify_command, bundle_folder) == 0
    text = capsys.readouterr().out
    for said in ("onnx on cpu", "simplified ONNX", "trt-rtx was not run"):
        assert said in text
    assert ends_with(verify_cli.verify_command, bundle_folder, "--json", "--format", "onnx") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert [hop["batch"] for hop in report["hops"][1:]] == [1, 3, 4]
    assert ends_with(verify_cli.verify_command, bundle_folder, "--format", "trt-rtx") == (0 if find_gpus() else 4)
    assert ends_with(verify_cli.verify_command, bundle_folder, "--format", "openvino") == 2


def test_verifying_notices_a_runtime_that_computes_differently(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    from repmlp_deploy.runtime.onnx.runner import OnnxRunner

    exact = OnnxRunner.run_all
    monkeypatch.setattr(OnnxRunner, "run_all", lambda self, x: [exact(self, x)[0] * 1.001])
    assert ends_with(verify_cli.verify_command, bundle.folder, "--json") == 3
    out, err = capsys.readouterr()
    assert not json.loads(out)["passed"]
    assert "onnx on cpu at batch 1 differs from the trained network" in err


@pytest.mark.parametrize("name", ["model.onnx", "model.trt-rtx.engine", "model.pt2", "probe.npz"])
def test_verifying_notices_a_flipped_byte_in_any_file(
    capsys: pytest.CaptureFixture[str], bundle_folder: Path, name: str
) -> None:
    data = bytearray((bundle_folder / name).read_bytes())
    data[len(data) // 3] ^= 4
    (bundle_folder / name).write_bytes(data)
    assert ends_with(verify_cli.verify_command, bundle_folder) == 2
    assert f"{name} was changed" in capsys.readouterr().err


def test_a_folder_stands_for_the_images_in_it(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i, folder in enumerate([tmp_path / "a", tmp_path / "a" / "b"]):
        shutil.copy(SAMPLES[i], folder / f"{i}.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert ends_with(predict_cli.predict_command, bundle.folder, tmp_path / "a", SAMPLES[3], "--json") == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert [row["top"][0]["class"] for row in found] == ["0", "1", "3"]
    (tmp_path / "empty").mkdir()
    assert ends_with(predict_cli.predict_command, bundle.folder, tmp_path / "empty") == 2
    assert "holds no images; expected .bmp" in capsys.readouterr().err


def test_predicting_what_is_no_bundle_or_no_image(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, bundle: Bundle
) -> None:
    for arguments in ((tmp_path, SAMPLES[0]), (bundle.folder, tmp_path / "none.png"), (bundle.folder,)):
        assert ends_with(predict_cli.predict_command, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
    assert ends_with(predict_cli.predict_command, bundle.folder, SAMPLES[0], "--top", 0) == 2
    assert ends_with(predict_cli.predict_command, bundle.folder, SAMPLES[0], "--device", "cuda") == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--card", "repmlp-digits"), "is about the checkpoint, and there is none: pass --ckpt FILE"),
        (("--module", "a:b"), "is about the checkpoint, and there is none: pass --ckpt FILE"),
        (("--bisect", "--engine-report", "x.py"), "--engine-report only writes a script: leave --bisect out"),
        (("--engine-report", "x.py", "--device", "cpu", "--bisect"), "leave --bisect, --device out"),
        (("--bisect", "--ckpt", "x.pth", "--threads", "1"), "leave --device and --threads out"),
    ],
)
def test_verifying_refuses_what_it_would_not_use(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, arguments: tuple[str, ...], said: str
) -> None:
    assert ends_with(verify_cli.verify_command, bundle.folder, *arguments) == 2
    assert said in capsys.readouterr().err


NO_NAME = "n" * 300


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (verify_cli.verify_command, (NO_NAME,)),
        (verify_cli.verify_command, ("BUNDLE", "--ckpt", NO_NAME)),
        (build_cli.build_command, (NO_NAME,)),
        (pack_cli.pack_command, (NO_NAME, "--layout", "ovms", "--out", "out")),
        (bench_cli.bench_command, ("--bundle", NO_NAME)),
        (bench_cli.bench_command, ("--precision", "int8", "--calibration", NO_NAME)),
        (serve_cli.serve_command, (NO_NAME,)),
        (serve_cli.serve_command, (f"name={NO_NAME}",)),
        (serve_cli.serve_command, ("--watch", NO_NAME)),
    ],
)
def test_an_input_that_no_disk_can_have_is_an_input(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, command: object, arguments: tuple[str, ...]
) -> None:
    given = [bundle.folder if word == "BUNDLE" else word for word in arguments]
    assert ends_with(command, *given) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search("File name too long|no such file|no such folder or file|is no folder", said), said


@pytest.mark.parametrize("command", ["export", "predict", "inspect", "verify"])
def test_every_command_has_help(command: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", f"from repmlp_deploy.cli.{command} import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--debug" in child.stdout


def export_process(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "export.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", ["probe", "export", "simplify", "save"])
def test_an_export_killed_at_any_step_leaves_the_old_bundle_or_the_new_one(
    bundle_folder: Path, digits_checkpoint: Path, step: str
) -> None:
    process = export_process("--ckpt", digits_checkpoint, "--out", bundle_folder, "--batch", "1:2:4")
    assert process.stderr is not None
    while not process.stderr.readline().strip().endswith(f" of 6: {step}"):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    bundle = Bundle.load(bundle_folder)
    for entry in bundle.files():
        bundle.read(entry)
    assert bundle.manifest.batch.max in (16, 4)


@pytest.mark.slow
def test_an_interrupted_export_says_so_and_leaves_nothing_behind(digits_checkpoint: Path, tmp_path: Path) -> None:
    process = export_process("--ckpt", digits_checkpoint, "--out", tmp_path / "out")
    assert process.stderr is not None
    while process.stderr.readline().strip() != "... 4 of 6: export":
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
