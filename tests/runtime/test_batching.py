"""Batches form while the worker is busy, and every caller gets the rows that are its own."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest

from repmlp_deploy.runtime.batching import (
    Batcher,
    BatcherClosed,
    DeadlineMissed,
    Durations,
    Execution,
    QueueFull,
    Queueing,
)


class Network:
    """Doubles its input; waits at a gate, so that a test decides how long a batch runs."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, inputs: Any) -> list[np.ndarray]:
        self.sizes.append(len(inputs[0]))
        self.begun.set()
        assert self.gate.wait(10)
        if (inputs[0] == 13).any():
            raise RuntimeError("thirteen")
        return [inputs[0] * 2]


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def seen() -> list[Execution]:
    return []


@pytest.fixture
def batcher(network: Network, seen: list[Execution]) -> Iterator[Batcher]:
    made = Batcher(network, 4, Queueing(queue=6, observe=seen.append))
    yield made
    network.gate.set()
    made.close()


def _row(value: float, samples: int = 1) -> list[np.ndarray]:
    return [np.full((samples, 2), value, np.float32)]


def _busy(batcher: Batcher, network: Network) -> Future[list[np.ndarray]]:
    """Occupy the worker."""
    first = batcher.submit(_row(0))
    assert network.begun.wait(10)
    return first


def _answer_six_in_order(batcher: Batcher, network: Network) -> None:
    """One request runs alone; five wait, and run in their order, four of them together."""
    first = _busy(batcher, network)
    others = [batcher.submit(_row(value)) for value in (1, 2, 3, 4, 5)]
    network.gate.set()
    assert [f.result(10)[0].tolist() for f in (first, *others)] == [[[2 * v, 2 * v]] for v in range(6)]
    batcher.close()
    assert network.sizes == [1, 4, 1]


def test_a_lone_request_runs_at_once_and_those_that_wait_run_together(
    batcher: Batcher, network: Network, seen: list[Execution]
) -> None:
    _answer_six_in_order(batcher, network)
    assert [len(run.waits) for run in seen] == [1, 4, 1]
    assert sum(run.samples for run in seen) == 6


def test_requests_stay_whole_and_a_large_one_runs_alone(batcher: Batcher, network: Network) -> None:
    _busy(batcher, network)
    futures = [batcher.submit(_row(1, 3)), batcher.submit(_row(2, 2))]
    network.gate.set()
    assert [f.result(10)[0].shape for f in futures] == [(3, 2), (2, 2)]
    assert batcher.submit(_row(3, 9)).result(10)[0].tolist() == [[6, 6]] * 9
    assert network.sizes == [1, 3, 2, 9]


def test_a_full_queue_refuses_at_once(batcher: Batcher, network: Network) -> None:
    _busy(batcher, network)
    taken = [batcher.submit(_row(1, 3)), batcher.submit(_row(1, 3))]
    with pytest.raises(QueueFull, match="6 samples wait; the queue holds 6"):
        batcher.submit(_row(1))  # the network stands still, so a refusal that waits would never come
    network.gate.set()
    assert [len(f.result(10)[0]) for f in taken] == [3, 3]


def test_a_cancelled_request_is_never_run(batcher: Batcher, network: Network) -> None:
    _busy(batcher, network)
    gone, kept = batcher.submit(_row(1)), batcher.submit(_row(2))
    assert gone.cancel()
    network.gate.set()
    assert kept.result(10)[0].tolist() == [[4, 4]]
    assert network.sizes == [1, 1]
    assert batcher.waiting == 0


def test_a_cancelled_request_leaves_its_place_to_others(batcher: Batcher, network: Network) -> None:
    _busy(batcher, network)
    gone = [batcher.submit(_row(1, 3)), batcher.submit(_row(2, 3))]
    assert batcher.waiting == 6
    assert all(future.cancel() for future in gone)
    assert batcher.waiting == 0
    kept = [batcher.submit(_row(3, 3)), batcher.submit(_row(4, 3))]
    assert len(wait(gone, timeout=10).done) == 2, "who waits for it is told"
    network.gate.set()
    assert [float(future.result(10)[0][0, 0]) for future in kept] == [6.0, 8.0]


def test_a_late_request_that_is_cancelled_leaves_its_place_too() -> None:
    begun, go = threading.Semaphore(0), threading.Semaphore(0)

    def network(inputs: Any) -> list[np.ndarray]:
        begun.release()
        assert go.acquire(timeout=10)
        return [inputs[0]]

    batcher = Batcher(network, 1, Queueing(queue=3, target=30))
    first = batcher.submit(_row(0))
    assert begun.acquire(timeout=10)
    late = [batcher.submit(_row(value)) for value in (1, 2, 3)]
    for request in batcher._queue:
        request.arrived -= 60
    go.release()
    assert begun.acquire(timeout=10)
    assert first.done()
    assert [one.future for one in batcher._late] == late[1:]
    assert all(future.cancel() for future in late[1:])
    assert batcher.waiting == 0
    assert not batcher._late
    go.release()
    batcher.close()
    assert late[0].result(10)


def test_answers_keep_no_inputs(batcher: Batcher, network: Network) -> None:
    """What a service was asked is freed at once, not by the garbage collector."""
    network.gate.set()
    gc.disable()
    try:
        rows = _row(1)
        kept = weakref.ref(rows[0])
        future = batcher.submit(rows)
        assert future.result(10)
        del rows, future
        assert batcher.submit(_row(2)).result(10)  # the worker has left the first batch
        assert kept() is None
    finally:
        gc.enable()


def test_a_missed_deadline_is_an_error_and_costs_no_run(batcher: Batcher, network: Network) -> None:
    _busy(batcher, network)
    late = batcher.submit(_row(1), deadline=time.monotonic() + 0.01)
    time.sleep(0.05)
    network.gate.set()
    with pytest.raises(DeadlineMissed, match="in the queue"):
        late.result(10)
    batcher.close()
    assert network.sizes == [1]


def test_one_bad_request_does_not_spoil_its_batch(batcher: Batcher, network: Network) -> None:
    _busy(batcher, network)
    futures = [batcher.submit(_row(value)) for value in (1, 13, 3)]
    network.gate.set()
    assert futures[0].result(10)[0].tolist() == [[2, 2]]
    assert futures[2].result(10)[0].tolist() == [[6, 6]]
    with pytest.raises(RuntimeError, match="thirteen"):
        futures[1].result(10)


def test_closing_answers_what_waits_and_refuses_the_rest(batcher: Batcher, network: Network) -> None:
    first = _busy(batcher, network)
    waiting = batcher.submit(_row(1))
    closer = threading.Thread(target=batcher.close)
    closer.start()
    network.gate.set()
    closer.join(10)
    assert first.done()
    assert waiting.result(0)[0].tolist() == [[2, 2]]
    with pytest.raises(BatcherClosed):
        batcher.submit(_row(1))
    batcher.close()


def test_a_delay_gathers_a_crowd_and_leaves_a_lone_caller_alone(network: Network) -> None:
    network.gate.set()
    delay = 2.0
    batcher = Batcher(network, 3, Queueing(delay=delay))
    try:
        start = time.monotonic()
        for _ in range(3):
            batcher.submit(_row(1)).result(10)
        assert time.monotonic() - start < delay
        network.gate.clear()
        network.begun.clear()
        futures = [_busy(batcher, network), batcher.submit(_row(2)), batcher.submit(_row(3))]
        network.gate.set()
        for future in futures:
            future.result(10)
        assert network.sizes[-2:] == [1, 2]
        late = [batcher.submit(_row(4))]
        time.sleep(0.05)
        late.append(batcher.submit(_row(5)))
        for future in late:
            future.result(10)
        assert network.sizes[-1] == 2
    finally:
        batcher.close()


def test_many_threads_get_their_own_rows(network: Network) -> None:
    network.gate.set()
    batcher = Batcher(network, 16, Queueing(queue=100_000, workers=2))
    wrong: list[int] = []

    def call(first: int) -> None:
        values = range(first, first + 200)
        wrong.extend(v for v in values if (batcher.submit(_row(v)).result(10)[0] != 2 * v).any())

    threads = [threading.Thread(target=call, args=(1000 * i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    batcher.close()
    assert not wrong
    assert sum(network.sizes) == 1600


class Timed:
    """Takes so long per batch and per sample, and notes the values of every batch."""

    def __init__(self, batch: float, sample: float) -> None:
        self.batch, self.sample = batch, sample
        self.batches: list[list[float]] = []

    def __call__(self, inputs: Any) -> list[np.ndarray]:
        self.batches.append([float(row[0]) for row in inputs[0]])
        time.sleep(self.batch + self.sample * len(inputs[0]))
        return [inputs[0] * 2]


class NoTime(Durations):
    """Batches take no time: how long a test keeps its gate shut says nothing of a network."""

    def note(self, samples: int, seconds: float) -> None:
        """Learn nothing."""


def _values_as_answered(batcher: Batcher, network: Network, futures: Iterable[Future[list[np.ndarray]]]) -> list[float]:
    """Open the gate, and return the first value of every answer, in the order in which the answers came."""
    seen: list[float] = []
    for future in futures:
        future.add_done_callback(lambda done: seen.append(float(done.result()[0][0, 0])))
    batcher._durations = NoTime()
    network.gate.set()
    batcher.close()
    return seen


def test_expected_durations_follow_what_was_seen() -> None:
    seen = Durations()
    assert seen.expected(3) == 0.0
    seen.note(4, 0.08)
    assert seen.expected(4) == 0.08
    assert seen.expected(2) == pytest.approx(0.04)
    assert seen.expected(8) == pytest.approx(0.16)
    for _ in range(100):
        seen.note(4, 0.04)
    assert seen.expected(4) == pytest.approx(0.04, rel=0.01)


def test_a_batch_is_as_large_as_its_first_request_allows() -> None:
    """A sample takes 0.2 s and the target is 1 s: eight that wait are not one batch, which would take 1.6 s."""
    network = Timed(0.0, 0.2)
    batcher = Batcher(network, 8, Queueing(target=1.0))
    batcher.submit(_row(0)).result(10)
    futures = [batcher.submit(_row(value)) for value in range(1, 9)]
    assert [future.result(10)[0][0, 0] for future in futures] == [2.0 * value for value in range(1, 9)]
    batcher.close()
    assert max(len(batch) for batch in network.batches) < 5
    without = Timed(0.0, 0.01)
    plain = Batcher(without, 8)
    first = [plain.submit(_row(value)) for value in range(9)]
    assert all(future.result(10) for future in first)
    plain.close()
    assert max(len(batch) for batch in without.batches) == 8


def test_who_is_late_already_goes_behind_those_that_can_be_in_time() -> None:
    network = Network()
    batcher = Batcher(network, 4, Queueing(target=0.3))
    _busy(batcher, network)
    late = [batcher.submit(_row(value)) for value in (1, 2)]
    time.sleep(0.5)
    fresh = [batcher.submit(_row(value)) for value in (3, 4)]
    seen = _values_as_answered(batcher, network, (*late, *fresh))
    assert sorted(seen[:2]) == [6.0, 8.0]
    assert sorted(seen[2:]) == [2.0, 4.0], "and they are answered all the same"
    assert network.sizes == [1, 2, 2]


def test_a_late_request_still_fails_at_its_deadline_while_others_come() -> None:
    network = Network()
    batcher = Batcher(network, 1, Queueing(target=0.05))
    _busy(batcher, network)
    late = batcher.submit(_row(1), deadline=time.monotonic() + 0.1)
    time.sleep(0.2)
    fresh = [batcher.submit(_row(value)) for value in (2, 3)]
    batcher._durations = NoTime()
    network.gate.set()
    with pytest.raises(DeadlineMissed):
        late.result(10)
    assert [future.result(10)[0][0, 0] for future in fresh] == [4.0, 6.0]
    batcher.close()


def test_late_requests_stay_behind_when_one_of_them_misses_its_deadline() -> None:
    network = Network()
    batcher = Batcher(network, 4, Queueing(target=30))
    _busy(batcher, network)
    expires = batcher.submit(_row(1), deadline=time.monotonic() - 1)
    late = [batcher.submit(_row(value)) for value in (2, 3)]
    for request in batcher._queue:
        request.arrived -= 60
    fresh = [batcher.submit(_row(value)) for value in (5, 6)]
    seen = _values_as_answered(batcher, network, (*late, *fresh))
    with pytest.raises(DeadlineMissed):
        expires.result(10)
    assert [sorted(seen[:2]), sorted(seen[2:])] == [[10.0, 12.0], [4.0, 6.0]]


def test_a_target_that_no_request_can_keep_changes_nothing() -> None:
    """Everyone is late: they are batched in the order of their arrival, as without a target."""
    network = Network()
    batcher = Batcher(network, 4, Queueing(target=1e-9))
    _answer_six_in_order(batcher, network)
