"""What the certifier compares: every sample by its own floor, at every batch size, and none left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy.bundle import Bundle, Hop, Probe, Verdict
from repmlp_deploy.convert.proof.certificate import Certifier, recertify
from repmlp_deploy.errors import BundleError, DeviceError, VerificationError
from repmlp_deploy.runtime.onnx.runner import OnnxRunner

SIZES = np.array([1.0, 1e-3, 10.0, 1.0, 1.0])
"""Largest output of each sample."""


@pytest.fixture
def probe() -> Probe:
    rng = np.random.default_rng(0)
    reference = rng.uniform(0.5, 1.0, (5, 4)) * SIZES[:, None]
    inputs = np.arange(5, dtype=np.float32)[:, None]  # a sample's input is its number
    return Probe(inputs, reference, reference.astype(np.float32))


def answer(probe: Probe, wrong: dict[int, float]):
    """A run that gives the reference, but for these samples that much more."""

    def run(inputs: np.ndarray) -> np.ndarray:
        numbers = inputs[:, 0].astype(int)
        return probe.reference[numbers] + np.array([wrong.get(n, 0.0) for n in numbers])[:, None]

    return run


def test_an_error_on_a_quiet_sample_cannot_hide_behind_a_loud_one(probe: Probe) -> None:
    certifier = Certifier(probe, (5,))
    error = 1e-6  # nothing beside outputs of 10, a thousandth of this sample's
    assert error < certifier.floor
    certifier.require("fine", answer(probe, {2: error}))
    with pytest.raises(VerificationError, match="wrong at batch 5 differs"):
        certifier.require("wrong", answer(probe, {1: error}))
    assert [hop.sample for hop in certifier.measure("wrong", answer(probe, {1: error}), "fp32")] == [1]


@pytest.mark.parametrize("sizes", [(1,), (1, 2), (1, 2, 3), (8,)])
def test_every_sample_is_seen_whatever_the_batch_sizes(probe: Probe, sizes: tuple[int, ...]) -> None:
    for sample, size in enumerate(SIZES):
        hops = Certifier(probe, sizes).measure("wrong", answer(probe, {sample: 1e-3 * size}), "fp32")
        assert [hop.batch for hop in hops] == list(sizes)
        assert not hops[-1].passed
        assert hops[-1].sample == sample


def test_a_hop_says_how_far_it_is_from_failing(probe: Probe) -> None:
    certifier = Certifier(probe, (5,))
    floor = 4 * 2.0**-23 * probe.reference[0].max()
    (hop,) = certifier.measure("step", answer(probe, {0: 2 * floor}), "fp32")
    assert hop.ratio == pytest.approx(2)
    assert hop.margin == pytest.approx(4)
    assert hop.allowed == pytest.approx(8 * floor)
    (exact,) = certifier.measure("step", answer(probe, {}), "fp32")
    assert (exact.max_abs, exact.ratio, exact.margin, exact.passed) == (0, 0, None, True)


def test_a_float16_row_that_mixes_samples_has_no_margin(probe: Probe) -> None:
    """Where samples must be kept apart, the margin is that of the stricter limit."""
    ignorant = np.repeat(probe.reference.mean(axis=0, keepdims=True), 5, axis=0)
    (hop,) = Certifier(probe, (5,)).measure("step", lambda _x: ignorant, "fp16")
    assert hop.margin is not None
    assert hop.margin < 0.1
    assert not hop.passed


def test_a_sample_without_any_output_has_a_floor(probe: Probe) -> None:
    silent = Probe(probe.inputs, np.zeros((5, 4)), np.zeros((5, 4), np.float32))
    (hop,) = Certifier(silent, (5,)).measure("step", lambda x: np.zeros((len(x), 4)), "fp32")
    assert hop.passed
    (hop,) = Certifier(silent, (5,)).measure("step", lambda x: np.full((len(x), 4), 1e-9), "fp32")
    assert not hop.passed


def test_answers_in_float64_are_judged_by_float64s_row(probe: Probe) -> None:
    certifier = Certifier(probe, (5,))
    off = probe.reference + 1e-9 * SIZES[:, None]
    certifier.require_outputs("rounded", [off.astype(np.float32)], [probe.reference])
    certifier.require_outputs("exact", [probe.reference * (1 + 1e-15)], [probe.reference])
    with pytest.raises(VerificationError, match=r"off at batch 5 differs .* fp64 allows"):
        certifier.require_outputs("off", [off], [probe.reference])
    certifier.require_outputs("scaled", [probe.reference[:1] * 1e6], [probe.reference[:1] * 1e6])


def test_a_sample_that_one_network_answers_with_zeros_is_judged(probe: Probe) -> None:
    """A ReLU at the end may leave nothing, of the trained network or of the one with redrawn statistics."""
    nothing, something = np.zeros((1, 4)), probe.reference[:1]
    silent = Probe(probe.inputs, nothing.repeat(5, axis=0), nothing.repeat(5, axis=0).astype(np.float32))
    for trained, right in [(probe, nothing), (silent, something), (silent, nothing)]:
        certifier = Certifier(trained, (5,))
        (hop,) = certifier.require_outputs("redrawn", [right * (1 + 1e-15)], [right])
        assert hop.passed
        with pytest.raises(VerificationError, match="off at batch 1 differs"):
            certifier.require_outputs("off", [right + 1e-9], [right])


def test_the_verdict_is_the_closest_hop(probe: Probe) -> None:
    certifier = Certifier(probe, (5,))
    floor = 4 * 2.0**-23 * probe.reference[0].max()
    hops = certifier.floor_rows()
    hops += certifier.require("close", answer(probe, {0: 2 * floor}))
    hops += certifier.require("closer", answer(probe, {0: 4 * floor}))
    verdict = Verdict.of(hops)
    assert (verdict.passed, verdict.closest) == (True, "closer")
    assert verdict.margin == pytest.approx(2)
    failed = certifier.measure("wrong", answer(probe, {0: 1.0}), "fp32")
    assert not Verdict.of([*hops, *failed]).passed
    assert Verdict.of(hops[:1]) == Verdict(passed=True, margin=None, closest=None)


def test_lines_of_older_bundles_are_read() -> None:
    """Before margins were told."""
    old = {"name": "merged", "batch": 1, "max_abs": 1e-7, "mean_abs": 1e-8, "max_rel": 1e-7, "between": None}
    hop = Hop.model_validate({**old, "cosine": 1.0, "top1": 1.0, "floor": 1e-7, "allowed": 8e-7, "passed": True})
    assert (hop.ratio, hop.margin, hop.sample) == (None, None, None)


def test_a_runner_that_fails_is_closed(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[OnnxRunner] = []

    def failing(*_: object) -> list[np.ndarray]:
        raise DeviceError("too little memory")

    def noted(self: OnnxRunner) -> None:
        closed.append(self)

    monkeypatch.setattr(OnnxRunner, "run_all", failing)
    monkeypatch.setattr(OnnxRunner, "close", noted)
    with pytest.raises(DeviceError, match="too little memory"):
        recertify(Bundle.load(bundle_folder), "onnx")
    assert len(closed) == 1


def test_an_artifact_that_is_not_there_is_refused_before_any_file_is_read(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(bundle_folder)
    monkeypatch.setattr(Bundle, "read", lambda *_: pytest.fail("a file was read"))
    with pytest.raises(BundleError, match="trt"):
        recertify(bundle, "trt")
