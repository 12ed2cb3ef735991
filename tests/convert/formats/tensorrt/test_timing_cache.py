"""The timing cache, with a stand-in for the builder's own: the real one would look for a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tensorrt_rtx

from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats.tensorrt import build as engine
from repmlp_deploy.convert.formats.tensorrt.timing_cache import TimingCache, default_timing_cache
from repmlp_deploy.errors import OutputError
from repmlp_deploy.runtime.tensorrt.driver import Gpu
from support.graph_cases import graph_case


class Measurements:
    """What ITimingCache is to us: entries that can be combined and serialized, of one GPU."""

    def __init__(self, data: bytes, gpu: str) -> None:
        content = json.loads(data or json.dumps({"gpu": gpu, "entries": []}))
        self.gpu, self.entries = content["gpu"], set(content["entries"])

    def combine(self, other: Measurements, ignore_mismatch: bool) -> bool:
        if other.gpu != self.gpu and not ignore_mismatch:
            return False
        self.entries |= other.entries
        return True

    def serialize(self) -> bytes:
        return json.dumps({"gpu": self.gpu, "entries": sorted(self.entries)}).encode()


class Config:
    """The calls of IBuilderConfig that a timing cache needs."""

    def __init__(self, gpu: str = "8.6") -> None:
        self.gpu, self._cache = gpu, None

    def create_timing_cache(self, data: bytes) -> Measurements:
        return Measurements(data, self.gpu)

    def set_timing_cache(self, cache: Measurements, ignore_mismatch: bool) -> bool:
        if cache.gpu != self.gpu and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Measurements:
        return self._cache


def build(path: Path, *measured: str, gpu: str = "8.6") -> str:
    """What happens to the file in one build; the cache's state."""
    cache, config = TimingCache(path), Config(gpu)
    cache.attach(config)
    config.get_timing_cache().entries |= set(measured)
    cache.save(config)
    return cache.state


def entries(path: Path) -> list[str]:
    return json.loads(path.read_bytes())["entries"]


def test_a_second_build_knows_what_the_first_measured(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cache"
    assert build(path, "a") == "new"
    assert build(path, "b") == "reused"
    assert entries(path) == ["a", "b"]
    assert {file.name for file in path.parent.iterdir()} == {"cache", "cache.lock"}


@pytest.mark.parametrize("content", [b"not JSON", json.dumps({"gpu": "12.0", "entries": ["x"]}).encode()])
def test_a_file_that_is_damaged_or_of_another_gpu_is_replaced_and_said_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache"
    path.write_bytes(content)
    assert build(path, "a").startswith("replaced")
    assert entries(path) == ["a"]


def test_builds_side_by_side_lose_nothing(tmp_path: Path) -> None:
    """Each begins before any has ended, so that every one of them must merge and not overwrite."""
    path, names = tmp_path / "cache", [f"kernel {i}" for i in range(16)]
    begun = threading.Barrier(len(names))

    def one(name: str) -> None:
        cache, config = TimingCache(path), Config()
        cache.attach(config)
        begun.wait()
        config.get_timing_cache().entries.add(name)
        cache.save(config)

    threads = [threading.Thread(target=one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entries(path) == sorted(names)


@pytest.mark.skipif(sys.platform == "win32", reason="holds the lock by fcntl")
def test_another_process_with_the_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    held = (
        f"import fcntl, sys; f = open({str(path) + '.lock'!r}, 'a+b'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        builder = threading.Thread(target=build, args=(path, "a"))
        builder.start()
        builder.join(0.3)
        assert builder.is_alive()
        assert not path.exists()
        other.communicate(b"\n")
    builder.join()
    assert entries(path) == ["a"]


def test_a_file_that_cannot_be_written_is_refused_before_the_build(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"--timing-cache .*file/cache"):
        TimingCache(tmp_path / "file" / "cache")


def test_the_default_file_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_timing_cache("tensorrt", "10.13.0", "8.6") == (
        tmp_path / "repmlp-deploy" / "tensorrt-10.13.0-sm86.timing"
    )


class Module:
    __version__ = "10.13.0"


def test_trt_has_one_by_default_and_rtx_never(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(engine, "find_gpus", lambda: (Gpu("a GPU", "8.6"),))
    found = engine._timing_cache("trt", Module, EngineOptions(), [])
    assert found.path.parent == tmp_path / "repmlp-deploy"
    assert engine._timing_cache("trt", Module, EngineOptions(timing_cache="off"), []) is None
    assert engine._timing_cache("trt-rtx", Module, EngineOptions(), []) is None
    own = engine._timing_cache("trt", Module, EngineOptions(timing_cache=tmp_path / "own"), [])
    assert own.path == tmp_path / "own"


def test_a_home_that_cannot_be_written_to_costs_a_warning_and_not_the_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "file"))
    monkeypatch.setattr(engine, "find_gpus", lambda: (Gpu("a GPU", "8.6"),))
    warnings: list[str] = []
    assert engine._timing_cache("trt", Module, EngineOptions(), warnings) is None
    assert len(warnings) == 1
    assert "no timing cache" in warnings[0]


def test_the_real_bindings_have_what_the_cache_calls() -> None:
    for owner, names in {
        tensorrt_rtx.IBuilderConfig: ("create_timing_cache", "set_timing_cache", "get_timing_cache"),
        tensorrt_rtx.ITimingCache: ("combine", "serialize"),
    }.items():
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__} has no {name}"
    said = tensorrt_rtx.IBuilderConfig.set_timing_cache.__doc__
    assert "ITimingCache, ignore_mismatch: bool) -> bool" in said
    assert "ITimingCache, ignore_mismatch: bool) -> bool" in tensorrt_rtx.ITimingCache.combine.__doc__


@pytest.mark.gpu
def test_a_real_build_fills_the_cache_and_a_rebuild_reuses_it(tmp_path: Path) -> None:
    case = graph_case("repmlpnet")
    options = EngineOptions(timing_cache=tmp_path / "cache")
    first, second = (
        engine.build_engine("trt", case.model.SerializeToString(), case.spec, options).details for _ in range(2)
    )
    assert (first["timing_cache"], second["timing_cache"]) == ("new", "reused")
    assert (tmp_path / "cache").stat().st_size > 100
    assert second["build_seconds"] < first["build_seconds"]
