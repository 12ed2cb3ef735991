import numpy as np
import pytest

from repmlp_deploy.errors import VerificationError
from repmlp_deploy.numerics import TOLERANCES, allowed_error, compare, noise_floor, noise_floors, require_close


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 10))


def test_the_same_output_is_at_distance_zero(reference: np.ndarray) -> None:
    result = compare(reference, reference)
    assert (result.max_abs, result.mean_abs, result.max_rel, result.between) == (0, 0, 0, 0)
    assert result.cosine == pytest.approx(1)
    assert result.top1 == 1


def test_each_figure_measures_what_it_says(reference: np.ndarray) -> None:
    output = reference.copy()
    output[2, reference[2].argmin()] += 100
    result = compare(output, reference)
    assert result.max_abs == pytest.approx(100)
    assert result.mean_abs == pytest.approx(100 / reference.size)
    assert result.max_rel == pytest.approx(100 / np.abs(reference).max())
    assert result.top1 == 0.75
    assert result.cosine < 0.5


def test_an_output_that_ignores_its_input_scores_one_between_samples() -> None:
    """However close its values are: here a ten-thousandth."""
    reference = np.ones((4, 10)) + 1e-4 * np.random.default_rng(0).standard_normal((4, 10))
    ignorant = np.repeat(reference.mean(axis=0, keepdims=True), 4, axis=0)
    result = compare(ignorant, reference)
    assert result.max_abs < 1e-3
    assert result.between == pytest.approx(1)
    assert np.isnan(compare(reference[:1], reference[:1]).between)
    assert compare(reference[:1], reference[:1]).as_dict()["between"] is None


def test_wrong_shapes_and_values_that_are_not_finite_are_no_comparison(reference: np.ndarray) -> None:
    with pytest.raises(VerificationError, match=r"shape \(4, 9\); the reference has \(4, 10\)"):
        compare(reference[:, :9], reference)
    reference[0, 0] = np.nan
    with pytest.raises(VerificationError, match="1 values that are not finite"):
        compare(reference, np.ones((4, 10)))


def test_the_noise_floor_is_what_float32_costs_and_never_nothing(reference: np.ndarray) -> None:
    assert noise_floor(reference + 0.5, reference) == pytest.approx(0.5)
    assert noise_floor(reference, reference) == pytest.approx(4 * 2**-23 * np.abs(reference).max())


@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_every_row_of_the_tolerance_table_passes_below_and_fails_above(precision: str, reference: np.ndarray) -> None:
    floor = 1e-7  # so that the row's other limit, on differences between samples, is far
    allowed = allowed_error(precision, floor)
    output = reference.copy()
    output[1, 3] += 0.99 * allowed
    require_close("inside", output, reference, floor=floor, precision=precision)
    output[1, 3] = reference[1, 3] + 1.01 * allowed
    with pytest.raises(VerificationError, match="outside differs from the trained network by"):
        require_close("outside", output, reference, floor=floor, precision=precision)
    assert TOLERANCES[precision].reason


def test_a_single_output_near_zero_has_the_floor_of_the_others() -> None:
    """Terms of size 1 that cancel round like terms of size 1, whatever is left of them."""
    reference = np.array([[0.5], [1e-6], [-0.7], [0.3]])
    rounded = (reference + np.array([[1e-8], [2e-8], [0.0], [1e-8]])).astype(np.float32)
    floors = noise_floors(rounded, reference)
    assert floors[1] > 4 * np.finfo(np.float32).eps * 0.3
    many = np.tile(reference, (1, 10))
    assert noise_floors(many.astype(np.float32), many)[1] < 1e-10, "a quiet sample among many outputs keeps its own"
