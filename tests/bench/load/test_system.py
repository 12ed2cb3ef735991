"""Every sample that arrives is completed, right or wrong, and batches are no larger than the way allows."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest

from repmlp_deploy.bench.load import system as module
from repmlp_deploy.bench.load.system import Service, System


@dataclass(frozen=True)
class Arrived:
    id: int
    index: int


class Served:
    """A network that triples its input, and what it saw."""

    def __init__(self):
        self.sizes, self.finished = [], []

    def run(self, batch):
        self.sizes.append(len(batch))
        return 3 * batch

    def prepare(self, index):
        if index == 13:
            raise ValueError("no such picture")
        return np.full((1, 2), index, np.float32)


def run(served, count, *, largest, decoders=0, workers=1):
    completed, done = [], threading.Semaphore(0)

    def complete(query):
        completed.append(query)
        done.release()

    service = Service(served.run, served.prepare, served.finished.append, largest, workers, decoders)
    system = System(service, complete)
    system.issue([Arrived(1000 + i, i) for i in range(count)])
    for _ in range(count):
        assert done.acquire(timeout=60)
    system.close()
    assert sorted(completed) == list(range(1000, 1000 + count))
    return system


@pytest.mark.parametrize("decoders", [0, 2])
def test_every_sample_gets_its_own_answer(decoders):
    served = Served()
    system = run(served, 12, largest=4, decoders=decoders, workers=2)
    assert {index: float(output[0, 0]) for index, output in system.answers} == {i: 3.0 * i for i in range(12)}
    assert system.answered == 12 == sum(served.sizes)
    assert max(served.sizes) <= 4
    assert len(served.finished) == 12


def test_one_at_a_time_is_one_at_a_time():
    served = Served()
    run(served, 9, largest=1)
    assert set(served.sizes) == {1}


def test_what_fails_is_completed_and_told():
    system = run(Served(), 14, largest=8)
    assert system.answered == 13
    assert [str(failure) for failure in system.failures] == ["no such picture"]


def test_a_failing_network_is_told_for_every_sample():
    served = Served()
    served.run = lambda _batch: 1 / 0
    assert len(run(served, 5, largest=2, decoders=1).failures) == 5


def test_answers_are_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(module, "_MOST_KEPT_BYTES", 5 * 8)
    system = run(Served(), 12, largest=1)
    assert (system.answered, len(system.answers)) == (12, 5)
