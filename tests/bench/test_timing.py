"""Percentiles, warm-up and ratios say what the calls support, and no more."""

import time

import numpy as np
import pytest

from repmlp_deploy.bench.measure import peaks
from repmlp_deploy.bench.measure.timing import _pooled_medians, compare_rounds, summarize, time_calls, warm_up


def _rounds(median, *, rounds=8, spread=0.03, seed=0, drift=0.0):
    rng = np.random.default_rng(seed)
    return tuple(
        tuple(float(ms) for ms in median * (1 + drift * i) * rng.lognormal(0, spread, 12)) for i in range(rounds)
    )


def test_nothing_is_clipped():
    """One call in a hundred that takes a hundred times as long is in the maximum, the mean and the throughput."""
    rounds = ((1.0,) * 99, (100.0,))
    summary = summarize(rounds, batch=2)
    assert summary.calls == 100
    assert summary.max_ms == 100.0
    assert summary.mean_ms == pytest.approx(1.99)
    assert summary.images_per_s == pytest.approx(1e3 * 200 / 199)
    assert summary.p50_ms == 1.0


def test_percentiles_need_the_calls_that_support_them():
    few, more = summarize(((1.0,) * 19,), 1), summarize(((1.0,) * 20,), 1)
    assert (few.p90_ms, few.p95_ms, few.p99_ms) == (1.0, None, None)
    assert (more.p95_ms, more.p99_ms) == (1.0, None)
    assert summarize(((1.0,) * 100,), 1).p99_ms == 1.0


def test_a_real_difference_is_told_and_none_is_not_claimed():
    base = _rounds(10.0, seed=1)
    assert compare_rounds(base, _rounds(5.0, seed=2)).verdict == "faster"
    assert compare_rounds(base, _rounds(12.0, seed=3)).verdict == "slower"
    assert compare_rounds(base, _rounds(10.02, seed=4, spread=0.2)).verdict == "not distinguishable"


def test_drift_that_hits_both_rows_cancels():
    """A machine that slows by half over the run leaves the ratio of interleaved rows within a few percent."""
    ratio = compare_rounds(_rounds(10.0, drift=0.07, seed=1), _rounds(5.0, drift=0.07, seed=2))
    assert ratio.value == pytest.approx(2.0, rel=0.05)
    assert ratio.low > 1.8


def test_few_rounds_widen_the_interval_to_every_round():
    base, own = ((10.0,), (10.0,), (10.0,)), ((9.0,), (9.5,), (10.5,))
    ratio = compare_rounds(base, own)
    assert ratio.low <= 10 / 10.5
    assert ratio.high >= 10 / 9
    assert ratio.verdict == "not distinguishable"


def test_one_round_supports_no_verdict():
    ratio = compare_rounds(((10.0,),), ((1.0,),))
    assert (ratio.low, ratio.high, ratio.verdict) == (None, None, "too few rounds")


def test_the_interval_covers_the_true_ratio_nineteen_times_in_twenty():
    rng = np.random.default_rng(5)
    inside = 0
    for i in range(60):
        noise = rng.lognormal(0, 0.05, (2, 8))
        base = tuple((float(10 * n),) * 3 for n in noise[0])
        own = tuple((float(8 * n),) * 3 for n in noise[1])
        ratio = compare_rounds(base, own, seed=i)
        inside += ratio.low <= 1.25 <= ratio.high
    assert inside >= 50


def test_rounds_of_unpaired_runs_are_resampled_apart():
    ratio = compare_rounds(_rounds(10.0, rounds=8), _rounds(10.0, rounds=5, seed=9), paired=False)
    assert ratio.low < 1 < ratio.high


def test_calls_are_timed_until_time_and_number_are_reached():
    assert len(time_calls(lambda: None, 0.0, least=4)) == 4
    assert len(time_calls(lambda: None, 0.01)) > 4
    gapped = time_calls(lambda: None, 0.05, gap_ms=10)
    assert len(gapped) <= 6
    assert max(gapped) < 10  # the gap itself is not latency


def test_warm_up_ends_when_calls_are_level():
    """Calls that get faster for a while are warmed past; ones that never settle end with the time, and say so."""
    clock = iter([50, 40, 30, 20] + [1] * 2000)

    def settling():
        ends = time_calls.__globals__["time"].perf_counter() + next(clock) / 2e3
        while time_calls.__globals__["time"].perf_counter() < ends:
            pass

    settled = warm_up(settling, 5.0)
    assert settled.calls >= 7
    assert settled.seconds < 5
    short = warm_up(lambda: None, 0.0)
    assert (short.calls, short.steady) == (0, False)


def test_resampled_medians_are_medians():
    rng = np.random.default_rng(0)
    rounds = [rng.random(n) for n in (1, 4, 2, 7)]
    chosen = rng.integers(0, 4, (50, 4))
    expected = [np.median(np.concatenate([rounds[i] for i in choice])) for choice in chosen]
    np.testing.assert_allclose(_pooled_medians(rounds, chosen), expected)


def test_what_drifts_from_round_to_round_cancels() -> None:
    """Twice as fast in each of two rounds, whose calls pooled would say that nothing differs."""
    baseline = ((100.0,) * 10, (200.0,) * 2)
    own = ((50.0,) * 2, (100.0,) * 10)
    assert compare_rounds(baseline, own).value == 2
    assert compare_rounds(baseline, own, paired=False).value == 1


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 4), (0.02, 1)])
def test_a_product_without_instructions_of_its_own_is_measured_once(monkeypatch, seconds, calls):
    monkeypatch.setattr(peaks, "SECONDS", 0.0)
    monkeypatch.setattr(peaks, "SLOW_SECONDS", 0.01)
    made = []

    def product():
        made.append(time.sleep(seconds))

    assert peaks._fastest(product) >= seconds
    assert len(made) == calls
