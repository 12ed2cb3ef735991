"""TensorRT-RTX's runtime cache: kept, shared, and never in the way."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.files import locked
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.tensorrt.runtime_cache import RuntimeCache
from support.fakes.gpu import Gpu
from support.fakes.machine import Machine, with_engines

BATCH = np.zeros((2, 3, 32, 32), np.float32)


@pytest.fixture
def engines(_exported: Path, tmp_path: Path) -> Bundle:
    return with_engines(Bundle.load(_exported), tmp_path / "digits")


def serve(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, folder: Path | None, **gpu: object) -> tuple[int, str]:
    """How many kernels one service compiled, and what it says of the cache."""
    machine = Machine(bundle, "trt-rtx", gpu=Gpu(**gpu)).install(monkeypatch)
    runner = machine.open(RunnerOptions(cache=folder), workers=1)
    runner.run(BATCH)
    note = runner.details["runtime_cache"]
    runner.close()
    machine.gpu.assert_clean()
    return machine.gpu.calls.count("compile"), note


def cache_file(folder: Path) -> Path:
    (file,) = (path for path in folder.iterdir() if path.suffix == ".cache")
    return file


def test_the_second_start_compiles_nothing(engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made" / "here"
    assert serve(engines, monkeypatch, folder)[0] == 1
    compiled, note = serve(engines, monkeypatch, folder)
    assert compiled == 0
    assert note == f"{cache_file(folder)}: reused"


def test_it_lies_beside_the_bundle_and_not_inside(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies inside would make the bundle refuse its next export."""
    inside = sorted(path.name for path in engines.folder.iterdir())
    serve(engines, monkeypatch, None)
    assert sorted(path.name for path in engines.folder.iterdir()) == inside
    assert cache_file(engines.folder.parent).name.startswith(f".{engines.folder.name}.")
    assert serve(engines, monkeypatch, None)[0] == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_started_anew(
    damage: str, engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(engines, monkeypatch, tmp_path / "cache")
    file = cache_file(tmp_path / "cache")
    data = file.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    file.write_bytes({"cut": data[:-3], "flipped": flipped, "empty": b"", "foreign": b"x" * 100}[damage])
    # the vendor's parser does not see it
    monkeypatch.setattr("support.fakes.tensorrt.IRuntimeCache.deserialize", lambda *_args: pytest.fail("deserialised"))
    compiled, note = serve(engines, monkeypatch, tmp_path / "cache")
    monkeypatch.undo()
    assert compiled == 1
    assert note.endswith("started anew: the file was damaged")
    assert file.read_bytes() == data  # whole again


def test_a_cache_of_another_machine_is_started_anew(
    engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intact, but TensorRT-RTX says no: the driver was updated, say."""
    serve(engines, monkeypatch, tmp_path)
    file = RuntimeCache(cache_file(tmp_path))
    file.write(b"kernels:9.9:whatever")
    compiled, note = serve(engines, monkeypatch, tmp_path)
    assert compiled == 1
    assert note.endswith("started anew: the file is of another GPU, driver or release")
    assert serve(engines, monkeypatch, tmp_path)[0] == 0


def test_another_gpu_has_another_file(engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(engines, monkeypatch, tmp_path / "cache")
    serve(engines, monkeypatch, tmp_path / "cache", capability=(12, 0))
    assert len(list((tmp_path / "cache").glob("*.cache"))) == 2


def test_a_folder_that_cannot_be_written_to_costs_no_answer(
    engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    compiled, note = serve(engines, monkeypatch, tmp_path / "file")
    assert compiled == 1
    assert "not written: " in note or "not read: " in note


def test_what_was_compiled_is_kept_after_the_first_inference(
    engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that is killed has kept it."""
    machine = Machine(engines, "trt-rtx").install(monkeypatch)
    runner = machine.open(RunnerOptions(cache=tmp_path / "cache"))
    runner.run(BATCH)
    assert cache_file(tmp_path / "cache").stat().st_size > 32
    runner.close()


def test_trt_keeps_none(engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(engines, "trt").install(monkeypatch)
    runner = machine.open(RunnerOptions(cache=tmp_path / "cache"))
    runner.run(BATCH)
    runner.close()
    assert not (tmp_path / "cache").exists()


def test_the_strategy_follows_the_option(engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(engines, "trt-rtx").install(monkeypatch)
    for wanted, name in ((True, "WHOLE_GRAPH_CAPTURE"), (False, "DISABLED")):
        runner = machine.open(RunnerOptions(cache=tmp_path), cuda_graphs=wanted)
        assert runner._jit.config.cuda_graph_strategy.name == name
        runner.close()


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    """While another holds the lock nothing is written; afterwards the file is whole."""
    file = RuntimeCache(tmp_path / "kernels.cache")
    with locked(file.path):
        thread = threading.Thread(target=file.write, args=(b"content",))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not file.path.exists()
    thread.join(10)
    assert RuntimeCache(file.path).read() == b"content"
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".lock", ".cache")] == []


def test_the_bindings_have_the_cache_only_for_rtx(engines: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for TensorRT lacks it, so that a slip would show."""
    Machine(engines).install(monkeypatch)
    assert not hasattr(sys.modules["tensorrt"], "IRuntimeCache")
    assert hasattr(sys.modules["tensorrt_rtx"], "IRuntimeCache")
