"""Distances between outputs, and how large they may be.

The reference is always the trained network in float64. Its own float32 run differs from that by rounding alone:
the *noise floor*. An exact transformation run in float32 can only be expected to stay near that floor, and has
no excuse to be far from it, so float32 tolerances are a multiple of the floor and not a guessed constant.

Every sample has a floor of its own: an error on a quiet one cannot hide behind the rounding of a loud one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.errors import VerificationError
from repmlp_deploy.precision import PRECISIONS, Tolerance

__all__ = [
    "TOLERANCES",
    "Comparison",
    "Figures",
    "Tolerance",
    "allowed_error",
    "compare",
    "describe_distance",
    "is_close",
    "margin_of",
    "noise_floor",
    "noise_floors",
    "require_close",
    "sample_errors",
]

Array = NDArray[Any]


_EXACT = {
    "fp64": Tolerance(
        floor_ratio=1024 * 2.0**-29,
        reason="merging and folding computed in float64, whose unit of rounding is 2⁻²⁹ of float32's: what the algebra "
        "leaves is below 4 floors of that size, with redrawn BatchNorms too; a wrong formula, or one weight of FC3 "
        "changed by a thousandth, is beyond 1,000,000",
    ),
    "weights": Tolerance(
        floor_ratio=32.0,
        reason="the floor is half a unit in the last place of a row's largest weight, one rounding to float32: merging "
        "rounds once and folding a few times more, which stays below 4, while one weight changed by a thousandth of "
        "its row's largest is beyond 10,000",
    ),
}
"""Arithmetics that are no precision of an artifact."""


class _Tolerances(Mapping[str, Tolerance]):
    """The rows of the precisions, read from their table, and those of the other arithmetics."""

    def __getitem__(self, kind: str) -> Tolerance:
        return PRECISIONS[kind].tolerance if kind in PRECISIONS else _EXACT[kind]

    def __iter__(self) -> Iterator[str]:
        return iter((*PRECISIONS, *_EXACT))

    def __len__(self) -> int:
        return len(PRECISIONS) + len(_EXACT)


TOLERANCES: Mapping[str, Tolerance] = _Tolerances()
"""One row per kind of arithmetic. A comparison that cannot fail proves nothing: every row has a test that fails it."""

_FEW_OUTPUTS = 3  # the largest of fewer may be small by chance
_FLOOR_EPS = 4.0  # a floor below 4 units in the last place of the largest output was luck, not precision


class Figures(TypedDict):
    """The attributes of a `Comparison`; `between` is None where it is undefined."""

    max_abs: float
    mean_abs: float
    max_rel: float
    between: float | None
    cosine: float
    top1: float | None


@dataclass(frozen=True)
class Comparison:
    """The distance of an output (N, …) from its reference.

    Attributes:
        max_abs: largest absolute error.
        mean_abs: mean absolute error.
        max_rel: `max_abs` over the largest absolute reference.
        between: largest error of the differences between samples, over the largest such difference; an output that
            ignores its input scores 1 here however close its values are. NaN for a single sample.
        cosine: smallest cosine of a sample with its reference.
        top1: share of samples, of pixels where outputs are dense, with the reference's largest class; None without
            classes.
    """

    max_abs: float
    mean_abs: float
    max_rel: float
    between: float
    cosine: float
    top1: float | None

    def as_dict(self) -> Figures:
        """Return the figures under their names, with None for an undefined one."""
        return {
            "max_abs": float(self.max_abs),
            "mean_abs": float(self.mean_abs),
            "max_rel": float(self.max_rel),
            "between": None if np.isnan(self.between) else float(self.between),
            "cosine": float(self.cosine),
            "top1": None if self.top1 is None else float(self.top1),
        }


def compare(output: Array, reference: Array, *, classes: bool = True) -> Comparison:
    """Return the distance of `output` from `reference`, both (N, …), measured in float64.

    Args:
        output: what is to be judged.
        reference: what it should be.
        classes: whether axis 1 is classes, so that a top-1 exists: (N, classes), or (N, classes, H, W) where dense.

    Raises:
        VerificationError: the shapes differ, or the output is not finite.
    """
    y, r = _checked(output, reference)
    error = np.abs(y - r)
    n = len(r)
    flat_y, flat_r = y.reshape(n, -1), r.reshape(n, -1)
    norms = np.linalg.norm(flat_y, axis=1) * np.linalg.norm(flat_r, axis=1)
    cosine = np.divide(np.sum(flat_y * flat_r, axis=1), norms, out=np.ones(n), where=norms > 0)
    spread = np.abs(flat_r - flat_r.mean(axis=0)).max()
    drift = np.abs((flat_y - flat_r) - (flat_y - flat_r).mean(axis=0)).max()
    return Comparison(
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        max_rel=float(error.max() / max(np.abs(r).max(), np.finfo(np.float64).tiny)),
        between=float(drift / spread) if n > 1 and spread > 0 else float("nan"),
        cosine=float(cosine.min()),
        top1=float(np.mean(y.argmax(axis=1) == r.argmax(axis=1))) if classes else None,
    )


def noise_floor(float32_output: Array, reference: Array) -> float:
    """Return the largest absolute error of the trained network in float32, at least a few units in the last place."""
    return float(np.maximum(sample_errors(float32_output, reference), _least_floors(reference)).max())


def noise_floors(float32_output: Array, reference: Array) -> NDArray[np.float64]:
    """Return the noise floor of every sample: (N, …) twice -> (N,).

    One float32 run is one draw of the rounding: a sample it happened to be lucky with has the floor of the median
    sample, in proportion to its largest output.

    Raises:
        VerificationError: the shapes differ, or the float32 output is not finite.
    """
    errors, least = sample_errors(float32_output, reference), _least_floors(reference)
    floors: NDArray[np.float64] = np.maximum(errors, max(1.0, float(np.median(errors / least))) * least)
    return floors


def sample_errors(output: Array, reference: Array) -> NDArray[np.float64]:
    """Return the largest absolute error of every sample, in float64: (N, …) twice -> (N,).

    Raises:
        VerificationError: the shapes differ, or the output is not finite.
    """
    y, r = _checked(output, reference)
    errors: NDArray[np.float64] = np.abs(y - r).reshape(len(r), -1).max(axis=1)
    return errors


def allowed_error(precision: str, floor: float) -> float:
    """Return the largest absolute error that `precision` may have over a noise floor of `floor`."""
    return TOLERANCES[precision].floor_ratio * floor


def is_close(result: Comparison, *, floor: float, precision: str) -> bool:
    """Return whether an output is as close to its reference as its precision must bring it."""
    between = TOLERANCES[precision].between
    keeps_samples_apart = between is None or np.isnan(result.between) or result.between <= between
    return result.max_abs <= allowed_error(precision, floor) and bool(keeps_samples_apart)


def margin_of(result: Comparison, *, floor: float, precision: str) -> float | None:
    """Return the allowed error over the error, by the stricter limit of the row; None if there is no error."""
    limits = [(result.max_abs, allowed_error(precision, floor)), (result.between, TOLERANCES[precision].between)]
    return min((limit / error for error, limit in limits if limit is not None and error > 0), default=None)


def require_close(  # noqa: PLR0913 - what is compared, and how it is judged
    what: str, output: Array, reference: Array, *, floor: float, precision: str = "fp32", classes: bool = True
) -> Comparison:
    """Compare two outputs and raise unless they are close enough; `classes` as in `compare`.

    Raises:
        VerificationError: they are too far apart; the message names `what`.
    """
    try:
        result = compare(output, reference, classes=classes)
    except VerificationError as error:
        raise VerificationError(f"{what}: {error}") from None
    if not is_close(result, floor=floor, precision=precision):
        said = describe_distance(result.max_abs, result.between, floor=floor, precision=precision)
        raise VerificationError(f"{what} {said}")
    return result


def describe_distance(max_abs: float, between: float | None, *, floor: float, precision: str) -> str:
    """Return how far an output is from its reference and how far it may be, for a message that begins with its name."""
    tolerance, allowed = TOLERANCES[precision], allowed_error(precision, floor)
    if not max_abs <= allowed:
        return (
            f"differs from the trained network by {max_abs:.2e}; {precision} allows {allowed:.2e} "
            f"({tolerance.floor_ratio:g} times the noise floor)"
        )
    return (
        f"moves samples against each other by {between:.2g} of the trained network's own differences; "
        f"{precision} allows {tolerance.between}"
    )


def _least_floors(reference: Array) -> NDArray[np.float64]:
    """Return a few units in the last place of every sample's largest output: (N, …) -> (N,).

    Where a sample has few outputs, terms that cancel may leave the largest near zero, while their rounding stays: such
    samples count as large as the mean square of all.
    """
    rows = np.abs(reference).reshape(len(reference), -1)
    sizes = rows.max(axis=1)
    if rows.shape[1] < _FEW_OUTPUTS:
        sizes = np.maximum(sizes, np.sqrt(np.mean(sizes**2)))
    least: NDArray[np.float64] = np.maximum(_FLOOR_EPS * np.finfo(np.float32).eps * sizes, np.finfo(np.float64).tiny)
    return least


def _checked(output: Array, reference: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both arrays in float64; raise unless they can be compared."""
    if output.shape != reference.shape:
        raise VerificationError(f"output has shape {output.shape}; the reference has {reference.shape}")
    y, r = output.astype(np.float64), reference.astype(np.float64)
    if not np.isfinite(y).all():
        raise VerificationError(f"output has {np.count_nonzero(~np.isfinite(y))} values that are not finite")
    return y, r
