"""Which artifact of several is opened, why, and how many inferences run at a time."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.bundle import MANIFEST
from repmlp_deploy.bundle.manifest import ArtifactEntry
from repmlp_deploy.bundle.records import MeasuredArtifact, Speed
from repmlp_deploy.errors import BundleError, DeviceError, InputError
from repmlp_deploy.runtime import choice
from repmlp_deploy.runtime.choice import measure_artifacts, with_speeds
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.onnx.runner import OnnxRunner
from repmlp_deploy.runtime.runner import RUNNERS, Entry
from support.openvino_bundle import with_openvino

INPUTS = np.random.default_rng(0).standard_normal((19, 3, 32, 32)).astype(np.float32)

Times = Mapping[int, float]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, _exported: Path) -> Bundle:
    """An ONNX and an OpenVINO artifact, without figures."""
    return with_openvino(Bundle.load(_exported), tmp_path_factory.mktemp("both") / "bundle")


def told(bundle: Bundle, out: Path, machine: str = "", **speeds: Times) -> Bundle:
    """The bundle with these figures in its manifest, by default of this machine."""
    entries = dict(bundle.manifest.artifacts)
    for name, times in speeds.items():
        speed = Speed(machine=machine or choice._machine(), device="cpu", runtime="x 1", batch_ms=dict(times))
        record = MeasuredArtifact(speed=speed).model_dump(mode="json")
        entries[name] = ArtifactEntry.model_validate(entries[name].model_dump() | record)
    contents = {entry.path: bundle.read(entry) for entry in bundle.files()}
    manifest = bundle.manifest.model_copy(update={"artifacts": entries})
    return replace(bundle, manifest=manifest, contents=contents).save(out)


@pytest.mark.parametrize(
    ("onnx", "openvino", "first", "reason"),
    [
        ({1: 0.3, 4: 0.7}, {1: 0.6, 4: 1.4}, "onnx", "onnx: the fastest, measured at the export (batch 1: "),
        ({1: 0.6, 4: 1.4}, {1: 0.3, 4: 0.7}, "openvino", "openvino: the fastest, measured at the export"),
        ({1: 0.95, 4: 2}, {1: 1, 4: 2}, "openvino", "openvino: as fast as any, and the first in order"),
    ],
)
def test_what_the_manifest_calls_the_fastest_is_opened(  # noqa: PLR0913 - cases
    both: Bundle, tmp_path: Path, onnx: Times, openvino: Times, first: str, reason: str
) -> None:
    """A gain within noise is no reason to leave the order."""
    bundle = told(both, tmp_path / "bundle", onnx=onnx, openvino=openvino)
    with Predictor(bundle, threads=1) as predictor:
        assert predictor.format == first
        assert predictor.details["chosen"].startswith(reason)
    with Predictor(bundle, threads=1, format="openvino") as predictor:
        assert predictor.format == "openvino"
        assert "chosen" not in predictor.details


def test_figures_of_another_machine_decide_and_say_so(both: Bundle, tmp_path: Path) -> None:
    bundle = told(both, tmp_path / "bundle", "elsewhere", onnx={1: 1, 4: 2}, openvino={1: 2, 4: 4})
    with Predictor(bundle, threads=1) as predictor:
        assert predictor.format == "onnx"
        assert (
            "measured at the export, on another machine (batch 1: openvino 2 ms, onnx 1 ms;"
            in predictor.details["chosen"]
        )


def test_without_figures_the_order_decides(both: Bundle, tmp_path: Path) -> None:
    half = told(both, tmp_path / "half", onnx={1: 1, 4: 2})
    for bundle in (both, half):
        with Predictor(bundle, threads=1) as predictor:
            assert predictor.format == "openvino"
            assert predictor.details["chosen"] == "openvino: the first in order, as nothing was measured"


def test_with_a_cache_the_first_start_measures_and_later_ones_read_it(
    both: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = told(both, tmp_path / "bundle", "elsewhere", onnx={1: 1, 4: 2}, openvino={1: 2, 4: 4})
    real, runs = choice._measure, []

    def counted(*given: object) -> object:
        runs.append(given)
        return real(*given)

    monkeypatch.setattr(choice, "_measure", counted)
    said = set()
    for _ in range(2):
        with Predictor(bundle, cache=tmp_path / "cache") as predictor:
            said.add(predictor.details["chosen"])
            assert predictor.logits(INPUTS).shape == (19, 10)
    assert len(runs) == len(said) == 1
    assert "measured here (batch 1: " in said.pop()


def test_another_release_of_a_runtime_is_measured_anew(
    both: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update may make the other artifact the fastest, and so may a runtime that was not there."""
    runs = []

    def measured(*given: object) -> Mapping[str, Times]:
        runs.append(given)
        return {"onnx": {1: 1.0, 4: 2.0}, "openvino": {1: 2.0, 4: 4.0}}

    def opened() -> int:
        with Predictor(both, cache=tmp_path / "cache", threads=1) as predictor:
            assert predictor.format == "onnx"
        return len(runs)

    monkeypatch.setattr(choice, "_measure", measured)
    assert [opened(), opened()] == [1, 1]
    real = importlib.metadata.version
    for name, version in (("openvino", "2099.0"), ("onnxruntime", "9.0")):
        monkeypatch.setattr(importlib.metadata, "version", lambda p, n=name, v=version: v if p == n else real(p))
        before = len(runs)
        assert [opened(), opened()] == [before + 1, before + 1]


def test_a_runtime_that_is_not_installed_has_no_version() -> None:
    assert Entry("nowhere:nothing", ("cpu",), ("repmlp-no-such-package",)).versions() == ""
    assert RUNNERS["openvino"].versions() == f"openvino {importlib.metadata.version('openvino')}"
    assert RUNNERS["onnx"].versions().startswith("onnxruntime")


def test_the_fastest_is_passed_over_where_it_cannot_run(
    both: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = told(both, tmp_path / "bundle", onnx={1: 2, 4: 4}, openvino={1: 1, 4: 2})
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "repmlp_deploy.runtime.openvino.runner", raising=False)
    assert list(measure_artifacts(bundle)) == ["onnx"]
    for cache in (None, tmp_path / "cache"):
        with Predictor(bundle, threads=1, cache=cache) as predictor:
            assert predictor.format == "onnx"
            assert "openvino" in predictor.details["passed_over"]


def test_measuring_writes_figures_of_every_size_into_the_manifest(both: Bundle, tmp_path: Path) -> None:
    contents = {entry.path: both.read(entry) for entry in both.files()}
    saved = with_speeds(replace(both, contents=contents)).save(tmp_path / "bundle")
    said = json.loads((tmp_path / "bundle" / MANIFEST).read_text())["artifacts"]
    assert set(said["onnx"]["speed"]["batch_ms"]) == {"1", "4"}
    assert Bundle.load(saved.folder).artifact("openvino").record(MeasuredArtifact).speed.runtime.startswith("openvino")
    with Predictor(saved.folder, check=True) as predictor:
        assert "measured at the export (" in predictor.details["chosen"]
    assert set(measure_artifacts(both)) == {"onnx", "openvino"}


@pytest.mark.parametrize("failing", range(1, 5))
def test_an_export_is_saved_where_a_run_fails_while_it_is_measured(
    both: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The measurement is optional, so what cannot be measured has no figures."""
    runs = []
    run_all = OnnxRunner.run_all

    def short_of_memory(self: OnnxRunner, *inputs: np.ndarray) -> list[np.ndarray]:
        runs.append(inputs)
        if len(runs) == failing:
            raise DeviceError("too little memory")
        return run_all(self, *inputs)

    monkeypatch.setattr(OnnxRunner, "run_all", short_of_memory)
    assert list(measure_artifacts(both)) == ["openvino"]
    runs.clear()
    contents = {entry.path: both.read(entry) for entry in both.files()}
    saved = with_speeds(replace(both, contents=contents)).save(tmp_path / "bundle")
    assert saved.artifact("onnx").record(MeasuredArtifact).speed is None


def test_what_fails_to_open_is_not_measured(both: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise DeviceError("too little memory")

    monkeypatch.setattr(OnnxRunner, "__init__", refused)
    assert list(measure_artifacts(both)) == ["openvino"]


def test_one_artifact_is_not_measured(bundle: Bundle) -> None:
    assert with_speeds(bundle) is bundle


def test_figures_that_are_none_are_refused(both: Bundle, tmp_path: Path) -> None:
    bundle = told(both, tmp_path / "bundle", onnx={1: 1}, openvino={1: 2})
    path = bundle.folder / MANIFEST
    text = path.read_text()
    for wrong in ('"1": -2.0', '"0": 1.0', '"1": NaN'):
        path.write_text(text.replace('"1": 2.0', wrong))
        with pytest.raises(BundleError):
            Predictor(bundle.folder)


@pytest.mark.parametrize("artifact", ["onnx", "openvino"])
def test_several_inferences_at_a_time_give_the_same_answers(both: Bundle, artifact: str) -> None:
    """OpenVINO makes no more of them than there are CPUs."""
    with Predictor(both, format=artifact) as single, Predictor(both, format=artifact, streams=3) as several:
        assert single.details["streams"] == 1
        assert several.details["streams"] == 3 or artifact == "openvino"
        for count in (1, 4, 19):
            x = INPUTS[:count]
            np.testing.assert_allclose(several.logits(x), single.logits(x), rtol=0, atol=1e-5)
        several.self_check()


def test_throughput_takes_what_is_measured_faster(both: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "usable_cpus", lambda: 2)
    for faster, expected in (("1", 1), ("2", 2)):
        times = {name: {8: 1.0 if name == faster else 2.0} for name in ("1", "2")}
        monkeypatch.setattr(choice, "_measure", lambda *_, times=times: times)
        with Predictor(both, format="onnx", streams="throughput") as predictor:
            assert predictor.details["streams"] == expected
            assert predictor.details["streams_chosen"].startswith(
                f"{expected}: the fastest, measured here (1 at a time"
            )
            assert predictor.logits(INPUTS).shape == (19, 10)
    monkeypatch.setattr(choice, "usable_cpus", lambda: 1)
    with Predictor(both, format="onnx", streams="throughput") as predictor:
        assert predictor.details["streams_chosen"] == "1: there is one CPU"


def test_throughput_goes_on_with_what_fits_into_memory(both: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "usable_cpus", lambda: 2)
    closed: list[OnnxRunner] = []
    run_all, close = OnnxRunner.run_all, OnnxRunner.close

    def short_of_memory(self: OnnxRunner, *inputs: np.ndarray) -> list[np.ndarray]:
        if self.details["streams"] == 2:
            raise DeviceError("too little memory")
        return run_all(self, *inputs)

    def noted(self: OnnxRunner) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(OnnxRunner, "run_all", short_of_memory)
    monkeypatch.setattr(OnnxRunner, "close", noted)
    with Predictor(both, format="onnx", streams="throughput") as predictor:
        assert predictor.details["streams"] == 1
        assert ", 2 at a time failed)" in predictor.details["streams_chosen"]
        assert [runner.details["streams"] for runner in closed] == [2]
        assert predictor.logits(INPUTS).shape == (19, 10)


def test_throughput_is_measured_for_real(both: Bundle) -> None:
    with Predictor(both, streams="throughput") as predictor:
        assert predictor.details["streams"] in (1, usable_cpus())
        assert predictor.logits(INPUTS).shape == (19, 10)


@pytest.mark.parametrize("streams", [0, -1, 1.5, True, "fast", "0", None, 1000])
def test_other_numbers_of_streams_are_refused(bundle: Bundle, streams: object) -> None:
    with pytest.raises(InputError, match=r"streams is .*; expected latency, throughput or a number from 1 to 256"):
        Predictor(bundle, streams=streams)


def test_streams_are_for_cpus(bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"on cuda is EngineSettings\(workers="):
        Predictor(bundle, format="onnx", device="cuda", streams=2)


def test_an_interruption_while_a_runtime_loads_makes_no_other_one_run(
    both: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled modules make a failed import of it, which is no missing package."""
    fails = "try:\n    raise KeyboardInterrupt\nexcept BaseException as error:\n    raise ImportError from error\n"
    (tmp_path / "openvino.py").write_text(fails)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("openvino", "repmlp_deploy.runtime.openvino.runner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(KeyboardInterrupt):
        Predictor(both)
