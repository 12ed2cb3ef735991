"""The search finds the highest rate, and a way that cannot be run says why."""

import pytest

from repmlp_deploy.bench.load.ways import STEPS, WAYS, RateSearch, why_no_way


@pytest.mark.parametrize("capacity", [0.0, 3.0, 61.0, 99.0, 500.0])
def test_the_search_ends_within_a_step_below_what_keeps_the_limit(capacity):
    search, tried = RateSearch(100.0), []
    while not search.ended:
        tried.append(search.rate)
        search.tell(kept=search.rate <= capacity)
    step = 100.0 / 2**STEPS
    assert len(tried) == STEPS
    assert search.low <= capacity
    assert search.low >= min(capacity, 100.0) - step
    assert all(0 < rate < 100 for rate in tried)


def test_streams_are_of_runtimes_on_cpus_with_several_threads():
    assert "PyTorch" in why_no_way("streams", "torch-merged", 2, "cpu")
    assert "CPUs" in why_no_way("streams", "onnx", 2, "cuda")
    assert "one thread" in why_no_way("streams", "onnx", 1, "cpu")
    assert why_no_way("streams", "onnx", 2, "cpu") is None
    assert all(why_no_way(way, "torch-merged", 1, "cuda") is None for way in ("single", "batched"))
    assert next(iter(WAYS)) == "single", "the first way is what others are compared with"
