"""Whether answers are right: what a precision allows, and the comparison of those that came back under load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Probe
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.numerics import TOLERANCES, allowed_error, noise_floor, sample_errors

__all__ = ["Answer", "Expected", "error_allowed"]

Answer = tuple[int, NDArray[np.float32]]
"""Index of a sample, and the output (1, …) that came back for it."""


def error_allowed(precision: str, probe: Probe) -> float | None:
    """Return the largest absolute error that passes; None where the precision has no tolerance."""
    named = "fp16" if precision == "tf32" else precision  # both keep 10 bits of mantissa
    floor = noise_floor(probe.float32, probe.reference)
    return allowed_error(named, floor) if named in TOLERANCES else None


@dataclass(frozen=True)
class Expected:
    """What must come back.

    Attributes:
        outputs: (n, …), one per sample; a sample's index counts on from the first after the last.
        whose: in words, for the message.
        precision: that the answers are computed in.
        allowed: largest absolute error; None where there is no tolerance.
    """

    outputs: NDArray[np.floating]
    whose: str
    precision: str
    allowed: float | None

    def check(self, answers: Sequence[Answer]) -> float:
        """Return the largest error of the answers; 0 for none.

        Raises:
            VerificationError: an answer is further away than the precision allows, or has another shape.
        """
        if not answers:
            return 0.0
        got = np.concatenate([answer for _, answer in answers])
        expected = self.outputs[[index % len(self.outputs) for index, _ in answers]]
        worst = float(sample_errors(got, expected).max())
        if self.allowed is not None and worst > self.allowed:
            raise VerificationError(
                f"under load its answers differ from {self.whose} by {worst:.2e}; {self.precision} allows "
                f"{self.allowed:.2e}: no figures"
            )
        return worst
