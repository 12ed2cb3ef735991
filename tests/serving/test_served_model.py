"""A model answers only after its check has passed, and what fails leaves the version that answers alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import hash_file
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.onnx.runner import OnnxRunner
from repmlp_deploy.serving import served_model
from repmlp_deploy.serving.metrics import Metrics, ModelMetrics
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.protocol import NotReady, UnknownModel
from repmlp_deploy.serving.served_model import ModelOptions, ServedModel
from repmlp_deploy.serving.watch import Library


def _model(folder: Path) -> ServedModel:
    return ServedModel("digits", folder, ModelOptions("onnx"), ModelMetrics(Metrics(), "digits"), lambda: None)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_model_is_ready_after_its_check(bundle_folder: Path) -> None:
    model = _model(bundle_folder)
    with pytest.raises(NotReady, match="digits is not ready: it is being loaded"):
        model.version()
    assert model.load()
    version = model.version()
    assert version.margin > 1
    assert 0 < int(version.name) < 10**12  # a number, as perf_analyzer reads it
    model.unload()
    with pytest.raises(NotReady, match="it was unloaded"):
        model.version()


def test_the_log_says_within_how_long_requests_are_to_be_answered(
    bundle_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, metrics = ModelOptions("onnx", target=0.05), ModelMetrics(Metrics(), "digits")
    model = ServedModel("digits", bundle_folder, options, metrics, lambda: None)
    with caplog.at_level("INFO", logger="repmlp.serve"):
        assert model.load()
    model.unload()
    ready = next(record for record in caplog.records if record.message == "model ready")
    assert vars(ready)["target_ms"] == pytest.approx(50)


@pytest.mark.parametrize("name", ["model.onnx", "probe.npz", "model.pt2", "manifest.json"])
def test_a_flipped_byte_in_any_file_is_never_ready(bundle_folder: Path, name: str) -> None:
    _flip(bundle_folder / name)
    model = _model(bundle_folder)
    assert not model.load()
    assert not model.ready
    assert name in model.reason
    with pytest.raises(NotReady, match=name.replace(".", r"\.")):
        model.version()


def test_a_file_is_hashed_once(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run has its hash from being read; large weights would make every start slower otherwise."""
    hashed: list[str] = []

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(served_model, "hash_file", noted)
    model = _model(bundle_folder)
    assert model.load()
    model.unload()
    assert sorted(hashed) == sorted(
        file.path for file in Bundle.load(bundle_folder).files() if file.path not in ("model.onnx", "probe.npz")
    )
    assert hashed


def test_a_runtime_that_computes_differently_is_never_ready(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OnnxRunner.run_all

    def wrong(self: OnnxRunner, *inputs: np.ndarray) -> list[Any]:
        return [output * np.float32(1.001) for output in right(self, *inputs)]

    monkeypatch.setattr(OnnxRunner, "run_all", wrong)
    model = _model(bundle_folder)
    assert not model.load()
    assert "differs from the trained network by" in model.reason


def test_a_bundle_that_fails_leaves_the_old_version_in_place(bundle_folder: Path) -> None:
    model = _model(bundle_folder)
    assert model.load()
    old = model.version()
    _flip(bundle_folder / "model.onnx")
    assert not model.load()
    assert model.ready
    assert model.version() is old
    assert "model.onnx was changed" in model.refused
    assert old.batcher.submit([np.zeros((1, 3, 32, 32), np.float32)]).result(10)[0].shape == (1, 10)
    _flip(bundle_folder / "model.onnx")
    assert model.load()
    assert model.refused == ""
    assert model.version() is not old
    model.unload()


def _places(tmp_path: Path, bundle: Bundle) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(bundle.folder, tmp_path / "library" / name))


def test_a_watched_folder_is_followed(tmp_path: Path, bundle: Bundle) -> None:
    put = _places(tmp_path, bundle)
    put("a")
    models = Models(ModelOptions("onnx"))
    library = Library(models, [tmp_path / "library"])
    library.look()
    assert [model.name for model in models.all()] == ["a"]
    first = models.find("a")[0].version()
    library.look()
    assert models.find("a")[0].version() is first
    put("b")
    (tmp_path / "library" / "notes").mkdir()
    library.look()
    assert [model.name for model in models.all()] == ["a", "b"]
    manifest = tmp_path / "library" / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"notes": [', '"notes": [\n"another",', 1))
    library.look()
    assert models.find("a")[0].version().name != first.name
    shutil.rmtree(tmp_path / "library" / "a")
    library.look()
    assert models.find("a")[0].ready  # it may be in the middle of being replaced
    library.look()
    with pytest.raises(UnknownModel, match="served are b"):
        models.find("a")
    models.close()


def test_a_refused_bundle_is_not_tried_again_until_it_changes(tmp_path: Path, bundle: Bundle) -> None:
    folder = _places(tmp_path, bundle)("a")
    _flip(folder / "probe.npz")
    models = Models(ModelOptions("onnx"))
    library = Library(models, [tmp_path / "library"])
    for _ in range(3):
        library.look()
    counted = models.metrics.registry.get_sample_value("repmlp_loads_total", {"model": "a", "outcome": "refused"})
    assert counted == 1
    assert models.health()["models"]["a"].startswith(str(folder / "probe.npz"))
    assert library.index()[0]["state"] == "UNAVAILABLE"
    _flip(folder / "probe.npz")
    (folder / "manifest.json").touch()
    library.look()
    assert models.ready
    models.close()


def test_a_model_that_was_unloaded_on_request_stays_away(tmp_path: Path, bundle: Bundle) -> None:
    _places(tmp_path, bundle)("a")
    models = Models(ModelOptions("onnx"))
    library = Library(models, [tmp_path / "library"])
    library.look()
    library.unload("a")
    library.look()
    assert not models.ready
    assert library.load("a") == ""
    assert models.ready
    with pytest.raises(UnknownModel, match="load or unload that"):
        library.load("a-image")
    models.close()


def test_names_that_a_url_cannot_carry_or_that_are_taken_are_refused(bundle: Bundle) -> None:
    models = Models(ModelOptions("onnx"))
    models.add("a", bundle.folder)
    for name, message in (
        ("a", "two bundles are named a"),
        ("a/b", "expected letters"),
        ("", "expected letters"),
        ("..", "expected letters"),
        ("x-image", "stands for images"),
        ("\x1b[31m", "u001b"),
    ):
        with pytest.raises(InputError, match=message):
            models.add(name, bundle.folder)
    assert not models.ready
