"""Answers that came back under load are held against what must come back, to the precision's tolerance."""

import numpy as np
import pytest

from repmlp_deploy.bench.load.answers import Expected, error_allowed
from repmlp_deploy.bundle import Probe
from repmlp_deploy.errors import VerificationError

OUTPUTS = np.random.default_rng(0).standard_normal((3, 5))
EXPECTED = Expected(OUTPUTS, "the trained network", "fp32", 1e-5)


def answers(*indices, error=0.0):
    return [(i, OUTPUTS[i % 3][None].astype(np.float32) + np.float32(error)) for i in indices]


def test_right_answers_pass_whatever_their_order():
    assert EXPECTED.check(answers(5, 0, 2, 1, 63)) < 1e-6
    assert EXPECTED.check([]) == 0


def test_one_wrong_answer_is_enough():
    with pytest.raises(VerificationError, match=r"differ from the trained network by .*; fp32 allows 1.00e-05"):
        EXPECTED.check([*answers(0, 1, 2), *answers(1, error=1e-4)])
    with pytest.raises(VerificationError):
        EXPECTED.check([(0, OUTPUTS[1][None].astype(np.float32))])  # another sample's
    with pytest.raises(VerificationError):
        EXPECTED.check([(0, np.full((1, 5), np.nan, np.float32))])


def test_without_a_tolerance_the_error_is_told_and_not_judged():
    assert Expected(OUTPUTS, "it", "unknown", None).check(answers(0, error=1.0)) == pytest.approx(1.0, rel=1e-5)


def test_what_is_allowed_is_the_precisions_and_follows_the_floor():
    float32 = OUTPUTS.astype(np.float32)
    probe = Probe(np.zeros((3, 1, 2, 2), np.float32), OUTPUTS, float32)
    noisy = Probe(probe.inputs, OUTPUTS, float32 + np.float32(1e-3))
    assert 0 < error_allowed("fp32", probe) < error_allowed("bf16", probe)
    assert error_allowed("tf32", probe) == error_allowed("fp16", probe)
    assert error_allowed("fp32", noisy) > 100 * error_allowed("fp32", probe)
    assert error_allowed("fp3", probe) is None
