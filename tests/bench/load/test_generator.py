"""MLCommons' load generator drives a service, and its own figures are what is returned."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed")

from repmlp_deploy.bench.load.generator import _read, complete, generate_load
from repmlp_deploy.bench.load.ways import Plan
from repmlp_deploy.errors import RepMLPError


class Sleeper:
    """Answers after some milliseconds, one sample at a time."""

    def __init__(self, ms):
        self.seconds, self.indices = ms / 1e3, []
        self.pool = ThreadPoolExecutor(1)

    def issue(self, samples):
        for sample in samples:
            self.pool.submit(self._answer, sample.id, sample.index)

    def _answer(self, query, index):
        time.sleep(self.seconds)
        self.indices.append(index)
        complete(query)


def test_single_stream_waits_for_each_answer():
    sleeper = Sleeper(4)
    found = generate_load(sleeper.issue, Plan("single-stream", 0.2, 8))
    assert len(sleeper.indices) >= 32
    assert set(sleeper.indices) <= set(range(8))
    assert 4 <= found.p50_ms <= found.p90_ms <= found.p99_ms
    assert 0 < found.samples_per_s <= 250
    assert found.asked_per_s is None


def test_offline_hands_over_all_at_once():
    sleeper = Sleeper(2)
    found = generate_load(sleeper.issue, Plan("offline", 0.2, 8, rate=500))
    assert len(sleeper.indices) >= 100
    assert 0 < found.samples_per_s <= 500
    assert found.p99_ms > 50 * 2, "the last of a hundred waits for the others"


def test_the_server_is_late_at_a_rate_that_it_cannot_keep():
    limit = {"limit_ms": 50.0}
    slow = generate_load(Sleeper(5).issue, Plan("server", 0.5, 8, rate=20, **limit))
    fast = generate_load(Sleeper(5).issue, Plan("server", 0.5, 8, rate=1000, **limit))
    assert (slow.asked_per_s, fast.asked_per_s) == (20, 1000)
    assert fast.p99_ms > 50, "a hundred samples of 5 ms within 0.1 s"
    assert fast.p99_ms > slow.p99_ms
    assert not fast.valid


def test_a_summary_of_another_form_is_said():
    with pytest.raises(RepMLPError, match=r"summary has no .*, but: nothing"):
        _read("nothing", Plan("offline", 1, 8))
