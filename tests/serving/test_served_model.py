"""A model answers only after its check has passed, and what fails leaves the version that answers alone."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import MANIFEST, hash_file
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.batching import Execution
from repmlp_deploy.runtime.onnx.runner import OnnxRunner
from repmlp_deploy.runtime.served import Served
from repmlp_deploy.serving import served_model
from repmlp_deploy.serving.metrics import Metrics, ModelMetrics
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.protocol import NotReady, UnknownModel
from repmlp_deploy.serving.served_model import ModelOptions, ServedModel
from repmlp_deploy.serving.watch import Library, find_bundles


def _model(folder: Path) -> ServedModel:
    return ServedModel("digits", folder, ModelOptions("onnx"), ModelMetrics(Metrics(), "digits"), lambda: None)


def _watching(*folders: Path) -> tuple[Models, Library]:
    """The models of a server that watches these folders; nothing is loaded yet."""
    models = Models(ModelOptions("onnx"))
    return models, Library(models, folders)


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
    models, library = _watching(tmp_path / "library")
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
    models, library = _watching(tmp_path / "library")
    for _ in range(3):
        library.look()
    counted = models.metrics.registry.get_sample_value("repmlp_loads_total", {"model": "a", "outcome": "refused"})
    assert counted == 1
    assert models.health()["models"]["a"].startswith(str(folder / "probe.npz"))
    assert library.index()[0]["state"] == "UNAVAILABLE"
    _flip(folder / "probe.npz")
    library.look()
    library.look()
    assert models.ready
    models.close()


def test_a_model_that_was_unloaded_on_request_stays_away(tmp_path: Path, bundle: Bundle) -> None:
    _places(tmp_path, bundle)("a")
    models, library = _watching(tmp_path / "library")
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


def test_a_late_check_of_an_old_version_says_nothing_of_the_new_one(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(bundle_folder)
    assert model.load()
    old, check = model.version(), Served.check

    def check_while_loading(served: Served) -> Any:
        if served is old.served:
            monkeypatch.setattr(Served, "check", check)
            assert model.load()
            raise RuntimeError("GPU lost")
        return check(served)

    monkeypatch.setattr(Served, "check", check_while_loading)
    model._observe(Execution(1, (0.0,), 0.1, RuntimeError("GPU lost")))
    assert model.ready
    assert model.version() is not old
    model.unload()


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_many_failed_requests_cost_few_checks(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checks, clock = _model(bundle_folder), list[float](), Clock()
    assert model.load()
    monkeypatch.setattr(served_model, "time", clock)

    def check(_: Served) -> None:
        checks.append(clock.now)
        clock.now += 2

    monkeypatch.setattr(Served, "check", check)
    failed = Execution(1, (0.0,), 0.1, ValueError("a bad request"))
    for _ in range(50):
        model._observe(failed)
    assert checks == [1000]
    clock.now += 20
    model._observe(failed)
    assert checks == [1000, 1022], "a runtime may break later"
    monkeypatch.setattr(Served, "check", lambda _: 1 / 0)
    model._observe(failed)
    assert model.ready
    clock.now += 20
    for _ in range(3):
        model._observe(failed)
    assert not model.ready
    assert "ZeroDivisionError" in model.reason
    model.unload()


def test_a_check_of_an_old_version_makes_the_new_one_no_more_trusted(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(bundle_folder)
    assert model.load()
    old, check, checked = model.version(), Served.check, list[Served]()

    def check_while_loading(served: Served) -> Any:
        checked.append(served)
        if len(checked) == 1:
            assert model.load()
        return check(served)

    monkeypatch.setattr(Served, "check", check_while_loading)
    for _ in range(2):
        model._observe(Execution(1, (0.0,), 0.1, ValueError("a bad request")))
    new = model.version().served
    assert checked == [old.served, new, new], "the new one was checked when it was loaded, and after its own failure"
    model.unload()


def test_a_bundle_is_loaded_when_its_copy_is_whole(tmp_path: Path, bundle: Bundle) -> None:
    whole = Path(shutil.copytree(bundle.folder, tmp_path / "elsewhere"))
    folder = tmp_path / "library" / "a"
    folder.mkdir(parents=True)
    models, library = _watching(tmp_path / "library")
    names = sorted(path.name for path in whole.iterdir())
    assert names[0] == MANIFEST, "a copy in alphabetical order begins with it"
    for name in names:
        shutil.copy(whole / name, folder / name)
        library.look()
        assert models.find("a")[0].ready is False or name == names[-1]
    library.look()
    assert models.ready
    models.close()


def test_a_folder_that_may_not_be_looked_into_is_left_out(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _places(tmp_path, bundle)("a")
    (tmp_path / "library" / "lost+found").mkdir()
    is_file = Path.is_file

    def of_root(path: Path) -> bool:
        if "lost+found" in path.parts:
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", of_root)
    assert [path.name for path in find_bundles(tmp_path / "library")] == ["a"]
    with pytest.raises(FileNotFoundError):
        find_bundles(tmp_path / "nothing")


def test_of_two_folders_with_one_name_the_first_is_served_until_it_is_gone(
    tmp_path: Path, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Path(shutil.copytree(bundle.folder, tmp_path / folder / "a")) for folder in ("one", "two"))
    models, library = _watching(tmp_path / "one", tmp_path / "two")
    for _ in range(2):
        library.look()
    assert models.find("a")[0].folder == first
    (told,) = [record for record in caplog.records if record.message == "bundle left out"]
    assert f"{first} has the same name" in vars(told)["reason"]
    shutil.rmtree(first)
    for _ in range(3):
        library.look()
    assert models.find("a")[0].folder == second
    assert models.ready
    models.close()


def test_what_is_gone_leaves_no_metrics(bundle: Bundle) -> None:
    models = Models(ModelOptions("onnx"))
    for name in ("a", "b"):
        models.add(name, bundle.folder).load()
    assert b'model="a"' in models.metrics.text()
    models.remove("a")
    assert b'model="a"' not in models.metrics.text()
    assert b'model="b"' in models.metrics.text()
    models.add("a", bundle.folder).load()
    assert models.metrics.registry.get_sample_value("repmlp_model_ready", {"model": "a"}) == 1
    models.close()


def test_a_model_that_was_unloaded_does_not_make_the_others_unready(bundle: Bundle) -> None:
    models = Models(ModelOptions("onnx"))
    library = Library(models)
    for name in ("a", "b"):
        models.add(name, bundle.folder)
    library.look()
    library.unload("a")
    assert models.ready
    assert models.health() == {"ready": True, "models": {"a": "it was unloaded"}}
    library.unload("b")
    assert not models.ready
    models.close()


def test_what_cannot_be_looked_at_hides_no_bundle(tmp_path: Path, bundle: Bundle) -> None:
    folder = _places(tmp_path, bundle)("a")
    for i in range(4):  # some come before the manifest, whatever the order of the folder
        (folder / f".#lock{i}").symlink_to(tmp_path / "nothing")
    models, library = _watching(tmp_path / "library")
    library.look()
    assert models.ready
    models.close()


def test_a_folder_of_the_same_name_takes_no_model_away(tmp_path: Path, bundle: Bundle) -> None:
    second = Path(shutil.copytree(bundle.folder, tmp_path / "two" / "a"))
    (tmp_path / "one").mkdir()
    models, library = _watching(tmp_path / "one", tmp_path / "two")
    library.look()
    damaged = Path(shutil.copytree(bundle.folder, tmp_path / "one" / "a"))
    _flip(damaged / "model.onnx")
    for _ in range(3):
        library.look()
    assert models.find("a")[0].folder == second
    assert models.ready
    models.close()


def test_a_disk_that_fails_for_a_moment_takes_no_model_away(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _places(tmp_path, bundle)("a")
    models, library = _watching(tmp_path / "library")
    library.look()

    def stale(_: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "is_file", stale)
    for _ in range(3):
        library.look()
    assert models.ready
    models.close()
