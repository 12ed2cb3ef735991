"""The scenarios of a session: ways take turns, what cannot run says why, and a failure has no figures."""

from types import SimpleNamespace

import pytest

from repmlp_deploy.bench.crew import ChildFailed
from repmlp_deploy.bench.load.ways import STEPS, WAYS
from repmlp_deploy.bench.measure.results import LoadRun
from repmlp_deploy.bench.scenarios import Scenarios
from repmlp_deploy.bench.settings import Settings

SETTINGS = Settings(scenario=("server", "single-stream"), p99_ms=50.0, seconds=1.0)


class Child:
    """A process that keeps the limit up to some rate, another one for each way, and notes what it is asked."""

    def __init__(self, asked, capacities, fails=None):
        self.asked, self.capacities, self.fails = asked, capacities, fails

    def ask(self, command, *, way, source, plan, **given):
        assert (command, given) == ("scenario", {"probe": "probe.npz", "smallest": 1, "largest": 8})
        scenario, rate = plan["scenario"], plan["rate"]
        self.asked.append((scenario, way, source, rate))
        if self.fails == (way, scenario):
            raise ChildFailed("it died")
        late = scenario == "server" and rate > self.capacities[way]
        ms = 1000.0 if late else 10.0
        run = LoadRun(samples_per_s=100.0, p50_ms=ms, p90_ms=ms, p99_ms=ms, valid=True, samples=100, compared=100)
        return run.model_copy(update={"asked_per_s": rate or None}).model_dump()


def measure(  # noqa: PLR0913 - what may be the case
    settings=SETTINGS, *, capacities=None, fails=None, in_time=lambda: True, formats=("onnx",), no_pictures=""
):
    asked = []
    batches = SimpleNamespace(min=1, max=8)
    target = SimpleNamespace(name="net", batches=batches, probe=lambda: "probe.npz", no_pictures=no_pictures)
    capacities = capacities or {"single": 20.0, "batched": 70.0, "targeted": 80.0, "streams": 90.0}
    members = [
        SimpleNamespace(format=name, precision="fp32", failed="", child=Child(asked, capacities, fails))
        for name in formats
    ]
    records = [SimpleNamespace(target=target, format=name, precision="fp32", reason="") for name in formats]
    records.append(SimpleNamespace(target=target, format="trt", precision="fp32", reason="no NVIDIA GPU"))
    scenarios = Scenarios(settings, 2, lambda _: None, in_time)
    scenarios.measure(target, members, records)
    rows = {(row.format, row.scenario, row.source, row.way): row for row in scenarios.rows()}
    return asked, rows


def test_the_highest_rate_of_every_way_is_found_in_turns():
    asked, rows = measure()
    figures = {way: rows["onnx", "server", "tensors", way].figure for way in WAYS}
    step = 100 / 2**STEPS
    assert figures == {
        "single": pytest.approx(20, abs=step),
        "batched": pytest.approx(70, abs=step),
        "targeted": pytest.approx(80, abs=step),
        "streams": pytest.approx(90, abs=step),
    }
    assert all(rows["onnx", "server", "tensors", way].run.p99_ms <= 50 for way in WAYS)
    rates = [way for scenario, way, *_ in asked if scenario == "server"]
    assert rates == [*WAYS] * STEPS, "rate by rate, each way in turn"
    assert rows["onnx", "server", "tensors", "single"].limit_ms == 50
    assert len(rows["onnx", "server", "tensors", "single"].tried) == STEPS
    assert rows["onnx", "single-stream", "tensors", "single"].figure == 10
    assert ("onnx", "offline", "tensors", "single") not in rows, "it ran for the search, and was not asked for"
    assert any(scenario == "offline" for scenario, *_ in asked)


def test_jpeg_bytes_come_with_end_to_end():
    assert {source for *_, source, _ in measure()[1]} == {"tensors"}
    assert {source for *_, source, _ in measure(SETTINGS.model_copy(update={"end_to_end": True}))[1]} == {
        "tensors",
        "jpeg",
    }


def test_a_network_without_pictures_has_no_figures_from_jpeg_bytes():
    asked, rows = measure(SETTINGS.model_copy(update={"end_to_end": True}), no_pictures="no card")
    assert {source for _, _, source, _ in asked} == {"tensors"}
    row = rows["onnx", "server", "jpeg", "single"]
    assert (row.status, row.reason) == ("unavailable", "no card")


def test_nothing_is_run_that_was_not_asked_for():
    assert measure(Settings()) == ([], {})
    asked, _ = measure(Settings(scenario=("offline",)))
    assert {scenario for scenario, *_ in asked} == {"offline"}


def test_what_cannot_run_says_why():
    _, rows = measure(formats=("torch-merged",))
    for scenario in ("single-stream", "server"):
        assert "PyTorch" in rows["torch-merged", scenario, "tensors", "streams"].reason
        assert rows["torch-merged", scenario, "tensors", "streams"].status == "unavailable"
        assert rows["trt", scenario, "tensors", "single"].reason == "no NVIDIA GPU"
        assert rows["torch-merged", scenario, "tensors", "batched"].status == "measured"


def test_a_failure_takes_the_figures_of_its_way_alone():
    """An answer that is wrong in one scenario makes the others of the same way worthless."""
    _, rows = measure(fails=("batched", "server"))
    for scenario in ("single-stream", "server"):
        row = rows["onnx", scenario, "tensors", "batched"]
        assert (row.status, row.reason, row.figure) == ("failed", "it died", None)
        assert rows["onnx", scenario, "tensors", "single"].status == "measured"


def test_a_rate_that_nothing_keeps_is_nought_with_its_reason():
    _, rows = measure(capacities=dict.fromkeys(WAYS, 0.0))
    row = rows["onnx", "server", "tensors", "single"]
    assert (row.figure, row.run) == (0, None)
    assert "not even 1.56 samples per second" in row.reason


def test_the_time_limit_ends_the_search_and_says_so():
    calls = iter(range(1000))
    _, rows = measure(in_time=lambda: next(calls) < 4 + 4 + 5)
    row = rows["onnx", "server", "tensors", "single"]
    assert (row.status, len(row.tried)) == ("measured", 2)
    assert "ended after 2 of 6 rates" in row.reason
    assert rows["onnx", "single-stream", "tensors", "single"].reason == ""
    _, rows = measure(in_time=lambda: False)
    assert all(row.status == "unavailable" and "--limit" in row.reason for key, row in rows.items() if key[0] == "onnx")
