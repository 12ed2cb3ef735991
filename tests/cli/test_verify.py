"""`repmlp-verify`: the certificate read, made again without torch, and derived again from the checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from repmlp_deploy import Bundle, export
from repmlp_deploy.bundle import MANIFEST, hash_file
from repmlp_deploy.cli import verify as verify_cli
from repmlp_deploy.cli.shared.console import run_command
from support.networks import randomize
from support.own_networks import Scorer

BLOCKED = ("torch", "onnx", "onnxscript", "onnxsim", "safetensors", "tensorrt_rtx", "openvino")


def verify_without_torch(*arguments: object, blocked: tuple[str, ...] = BLOCKED) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter that can import none of what converting needs."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from repmlp_deploy.cli.verify import main; main()"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def verify(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(verify_cli.verify_command, [str(argument) for argument in arguments])
    return int(ended.value.code)


def test_a_bundle_is_verified_without_torch(bundle: Bundle) -> None:
    done = verify_without_torch(bundle.folder)
    assert done.returncode == 0, done.stderr
    for said in ("certified on", "folded, redrawn", "every tolerance is met; the closest is", "onnx on cpu"):
        assert said in done.stdout


def test_a_bundle_of_which_nothing_runs_is_not_verified(bundle: Bundle) -> None:
    """A check that compared nothing has no verdict: neither a pass nor a failure."""
    done = verify_without_torch(bundle.folder, "--json", blocked=(*BLOCKED, "onnxruntime"))
    assert done.returncode == 4
    assert json.loads(done.stdout)["passed"] is None
    assert done.stderr.count("\n") == 1
    for said in ("nothing is verified", "onnx was not run: onnxruntime is not installed"):
        assert said in done.stderr


def test_without_torch_the_checkpoint_needs_an_extra(bundle: Bundle, digits_checkpoint: Path) -> None:
    done = verify_without_torch(bundle.folder, "--ckpt", digits_checkpoint)
    assert done.returncode == 4
    assert 'pip install "repmlp-deploy[export]"' in done.stderr


def test_a_flipped_byte_is_noticed_without_torch(bundle_folder: Path) -> None:
    data = bytearray((bundle_folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_folder / "model.onnx").write_bytes(data)
    done = verify_without_torch(bundle_folder)
    assert done.returncode == 2
    assert "model.onnx was changed: its sha256 is not the manifest's" in done.stderr


def test_a_swapped_artifact_is_noticed_even_if_its_hash_was_swapped_too(bundle_folder: Path) -> None:
    """The graph of a network of the same architecture, trained otherwise."""
    path = bundle_folder / "model.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
            tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(0.99)).tobytes()
    onnx.save(model, path)
    data = json.loads((bundle_folder / MANIFEST).read_text())
    data["artifacts"]["onnx"] |= {"sha256": hash_file(path), "bytes": path.stat().st_size}
    (bundle_folder / MANIFEST).write_text(json.dumps(data))
    done = verify_without_torch(bundle_folder)
    assert done.returncode == 3
    assert "onnx on cpu at batch 1 differs from the trained network" in done.stderr


def test_the_checkpoint_derives_the_certificate_again(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, digits_checkpoint: Path, tmp_path: Path
) -> None:
    assert verify(bundle.folder, "--ckpt", digits_checkpoint) == 0
    text = capsys.readouterr().out
    for said in ("derived again from", "recorded reference", "checkpoint weights", "onnx weights"):
        assert said in text
    assert verify(bundle.folder, "--ckpt", digits_checkpoint, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert {hop["name"] for hop in report["derived"]} >= {"recorded reference", "merged weights", "onnx weights"}
    other = Path(shutil.copy(digits_checkpoint, tmp_path / "other.safetensors"))
    with other.open("ab") as file:
        file.write(b"\0")
    assert verify(bundle.folder, "--ckpt", other) == 3
    assert "the bundle was made from repmlp-digits.safetensors" in capsys.readouterr().err


def test_the_certificate_says_what_it_rests_on(bundle: Bundle) -> None:
    data = json.loads((bundle.folder / MANIFEST).read_text())
    assert data["verdict"]["passed"]
    assert data["verdict"]["margin"] == min(hop["margin"] for hop in data["certificate"] if hop["margin"] is not None)
    provenance = data["provenance"]
    assert len(provenance["checkpoint"]["sha256"]) == 64
    assert set(provenance["graphs"]) == {"exported", "simplified"}
    assert provenance["graphs"]["simplified"] == data["artifacts"]["onnx"]["sha256"]
    assert provenance["probe"]["samples"][:2] == ["random", "photograph china"]
    assert {"seed", "statistics_seed"} <= set(provenance["probe"])
    assert provenance["cpu"]
    for hop in data["certificate"]:
        assert {"max_abs", "mean_abs", "max_rel", "cosine", "top1", "floor", "ratio", "allowed", "margin"} <= set(hop)


def test_a_network_of_ones_own_is_derived_and_bisected_with_its_factory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    network = randomize(Scorer())
    torch.save(network.state_dict(), tmp_path / "own.pth")
    factory, out = "support.own_networks:Scorer", tmp_path / "bundle"
    export(tmp_path / "own.pth", module=factory, formats="onnx,checkpoint", batch="1:2:4", out=out)
    told = ("--ckpt", tmp_path / "own.pth", "--module", factory)
    assert verify(out, *told, "--json") == 0
    derived = {hop["name"] for hop in json.loads(capsys.readouterr().out)["derived"]}
    assert derived >= {"recorded reference", "folded, float64", "onnx weights", "checkpoint weights"}
    assert verify(out, *told, "--bisect") == 0
    assert "value by value" in capsys.readouterr().out
    assert verify(out, "--ckpt", tmp_path / "own.pth") == 2
    assert "pass --module PACKAGE.MODULE:FACTORY" in capsys.readouterr().err
    changed = network.state_dict() | {"stem.bias": network.stem.bias + 0.1}
    torch.save(changed, tmp_path / "other.pth")
    assert verify(out, "--ckpt", tmp_path / "other.pth", "--module", factory, "--bisect") == 3
    assert "stem" in capsys.readouterr().err
