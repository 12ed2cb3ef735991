"""A bundle derived again from its checkpoint: what was tampered with, manifest and all, does not come out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from repmlp_deploy import Bundle, export, get_model
from repmlp_deploy.bundle import MANIFEST, PROBE, Probe, hash_file
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.convert.rework.derive import derive_again
from repmlp_deploy.convert.rework.locate import blame_bundle
from repmlp_deploy.errors import InputError, VerificationError

pytestmark = pytest.mark.slow  # many exports, seconds each


def certify_again(folder: Path) -> Bundle:
    """Write the hashes of what lies there now into the manifest, as whoever exchanges a file on purpose would."""
    data = json.loads((folder / MANIFEST).read_text())
    for entry in [*data["artifacts"].values(), data["probe"]]:
        path = folder / entry["path"]
        entry |= {"sha256": hash_file(path), "bytes": path.stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(data))
    return Bundle.load(folder)


def change_probe(folder: Path, change: Callable[[Probe], Probe]) -> None:
    path = folder / PROBE
    path.write_bytes(change(Probe.from_bytes(path.read_bytes())).to_bytes())


def replace_answers(folder: Path) -> None:
    """Other answers, as another network would give."""
    change_probe(folder, lambda p: replace(p, reference=p.reference + 1e-3, float32=p.float32 + np.float32(1e-3)))


def widen_tolerances(folder: Path) -> None:
    """The right references, and a float32 run that makes the noise floor a hundred times higher."""
    change_probe(folder, lambda p: replace(p, float32=(p.reference + 1e-3).astype(np.float32)))


def perturb_graph(folder: Path) -> None:
    """A thousandth on one weight among many: far below the noise of the outputs."""
    model = onnx.load(folder / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "stages.2.0.fc3")
    values = np.frombuffer(tensor.raw_data, np.float32).copy()
    values[7] += np.float32(1e-3)
    tensor.raw_data = values.tobytes()
    onnx.save(model, folder / "model.onnx")


def perturb_checkpoint(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["head.weight"][0, 0] += 1e-3
    safetensors.torch.save_file(tensors, path)


def test_an_untouched_bundle_is_derived_again(bundle: Bundle, digits_checkpoint: Path) -> None:
    said: list[str] = []
    hops, notes = derive_again(bundle, digits_checkpoint, progress=said.append)
    names = [hop.name for hop in hops]
    for name in ("recorded reference", "recorded float32", "merged", "folded, float64", "folded weights"):
        assert name in names
    assert {"onnx weights", "checkpoint weights"} <= set(names)
    assert all(hop.passed for hop in hops if hop.passed is not None)
    assert "merge" in said
    assert any(note.startswith("the weights of trt-rtx were not compared") for note in notes)


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (replace_answers, "recorded reference at batch 6 differs from the trained network"),
        (widen_tolerances, "recorded float32 at batch 6 differs from the trained network"),
        (perturb_graph, r"onnx weights \(farthest: stages.2.0.fc3\) differs"),
        (perturb_checkpoint, r"checkpoint weights \(farthest: head.weight, row 0\) differs"),
    ],
)
def test_what_was_exchanged_with_its_hash_does_not_come_out(
    bundle_folder: Path, digits_checkpoint: Path, tamper: Callable[[Path], None], said: str
) -> None:
    tamper(bundle_folder)
    tampered = certify_again(bundle_folder)
    with pytest.raises(VerificationError, match=f"{said}.*do not use this bundle"):
        derive_again(tampered, digits_checkpoint)


def test_what_the_probe_cannot_tell_the_checkpoint_can(bundle_folder: Path) -> None:
    """The twin of the tests above: without the checkpoint, a perturbed weight or a widened tolerance passes."""
    perturb_graph(bundle_folder)
    widen_tolerances(bundle_folder)
    hops, _ = recertify(certify_again(bundle_folder))
    assert all(hop.passed for hop in hops if hop.passed is not None)


def test_a_checkpoint_is_hashed_once(bundle: Bundle, digits_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest_of = hashlib.file_digest

    def noted(file: BinaryIO, kind: str) -> object:
        hashed.append(file.name)
        return digest_of(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    derive_again(bundle, digits_checkpoint)
    assert hashed.count(str(digits_checkpoint)) == 1
    blame_bundle(bundle, digits_checkpoint)
    assert hashed.count(str(digits_checkpoint)) == 2


def test_another_checkpoint_is_refused_by_its_hash(
    bundle: Bundle, digits_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({**digits_state, "head.bias": digits_state["head.bias"] + 1e-3}, other)
    with pytest.raises(VerificationError, match=r"has sha256 .*; the bundle was made from repmlp-digits.safetensors"):
        derive_again(bundle, other)
    with pytest.raises(InputError, match="no such file"):
        derive_again(bundle, tmp_path / "none.pth")


def test_what_no_file_was_made_into_cannot_be_derived_again(tmp_path: Path, digits_checkpoint: Path) -> None:
    bundle = export(get_model("repmlp-digits", pretrained=True), formats="checkpoint", out=tmp_path / "out")
    with pytest.raises(InputError, match="was exported from a network in memory"):
        derive_again(bundle, digits_checkpoint)


def test_the_weights_that_were_exported_are_derived_again(tmp_path: Path, digits_checkpoint: Path) -> None:
    state = safetensors.torch.load_file(digits_checkpoint)
    averaged = {key: value * 0.5 if key == "head.weight" else value for key, value in state.items()}
    content = {"state_dict": state, "averaged": averaged | {"aux.weight": torch.zeros(3)}}
    torch.save(content, tmp_path / "both.pth")
    for said in ({"weights": "ema"}, {"state_key": "averaged"}):
        bundle = export(tmp_path / "both.pth", ignore=["aux.*"], formats="onnx", batch=2, out=tmp_path / "out", **said)
        hops, _ = derive_again(bundle, tmp_path / "both.pth")
        assert [hop.name for hop in hops if hop.passed is False] == []


def test_a_merged_graph_and_an_inferred_card_are_derived_again(tmp_path: Path, digits_checkpoint: Path) -> None:
    path = Path(shutil.copy(digits_checkpoint, tmp_path / "mine.safetensors"))
    bundle = export(path, graph="merged", batch=2, out=tmp_path / "out")
    hops, _ = derive_again(bundle, path)
    assert not any("folded" in hop.name for hop in hops)
    assert hops[-1].name == "onnx weights"
    assert hops[-1].passed
