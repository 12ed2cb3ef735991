"""A subject under load: right answers have figures, and one that mixes up its batches has none."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed")

from repmlp_deploy.bench.load import driver as module
from repmlp_deploy.bench.load.driver import SAMPLES, Driver
from repmlp_deploy.bench.load.ways import WAYS, Plan
from repmlp_deploy.bench.subjects.table import Job, open_subject
from repmlp_deploy.bundle.probe import PROBE
from repmlp_deploy.card import load_card
from repmlp_deploy.errors import RepMLPError, VerificationError

PLAN = Plan("offline", 0.05)


class Wrong:
    """A subject whose batches come back in another order; alone, a sample is right."""

    def __init__(self, subject):
        self._subject = subject

    def run(self, batch):
        return self._subject.run(batch)[::-1]


@pytest.fixture
def job(bundle):
    return Job(format="onnx", precision="fp32", threads=2, card=load_card("repmlp-digits"), bundle=str(bundle.folder))


def driver_of(job, subject=None, *, smallest=1, largest=4):
    return Driver(job, subject or open_subject(job), smallest, largest, Path(job.bundle, PROBE))


@pytest.mark.parametrize("source", ["tensors", "jpeg"])
def test_every_way_gives_figures_for_right_answers(job, source):
    driver = driver_of(job)
    for way in WAYS:
        found = driver.run(way, source, PLAN)
        assert found.samples_per_s > 0
        assert found.samples == found.compared >= SAMPLES
        assert found.max_abs_error < 1e-4
        if source == "tensors":
            assert found.max_abs_error > 0, "float32 against float64"


@pytest.mark.parametrize("source", ["tensors", "jpeg"])
def test_a_wrong_answer_has_no_speed(job, source):
    driver = driver_of(job, Wrong(open_subject(job)))
    assert driver.run("single", source, PLAN).samples >= SAMPLES
    with pytest.raises(VerificationError, match="under load its answers differ"):
        driver.run("batched", source, PLAN)


def test_answers_that_go_wrong_later_have_no_speed_either(job):
    """The proof before the run passes; what comes back while the load generator runs is compared again."""

    class Ageing(Wrong):
        calls = 0

        def run(self, batch):
            self.calls += 1
            answer = self._subject.run(batch)
            return answer if self.calls <= SAMPLES + 1 else answer + np.float32(1)

    with pytest.raises(VerificationError, match="under load its answers differ from the trained network by 1"):
        driver_of(job, Ageing(open_subject(job))).run("single", "tensors", PLAN)


def test_small_batches_are_padded_to_what_is_served(job):
    sizes = []

    class Noting(Wrong):
        def run(self, batch):
            sizes.append(len(batch))
            return self._subject.run(batch)

    driver_of(job, Noting(open_subject(job)), smallest=3).run("single", "tensors", PLAN)
    assert set(sizes) == {3}


def test_a_runtime_that_fails_is_told(job):
    class Failing(Wrong):
        def run(self, _batch):
            raise OSError("no memory")

    with pytest.raises(RepMLPError, match="64 samples failed, the first with OSError: no memory"):
        driver_of(job, Failing(None)).run("batched", "tensors", PLAN)


def test_streams_open_the_subject_again_once(job, monkeypatch):
    opened = []

    def noted(asked):
        opened.append(asked.streams)
        return open_subject(asked)

    monkeypatch.setattr(module, "open_subject", noted)
    driver = driver_of(job)
    for _ in range(2):
        driver.run("streams", "tensors", PLAN)
    assert opened == [2]
