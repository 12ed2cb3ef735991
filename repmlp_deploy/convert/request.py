"""What an export was asked for, checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.options import (
    CALIBRATION_METHODS,
    DEFAULT_METHOD,
    DEFAULT_OPSET,
    GRAPHS,
    INPUTS,
    OPSETS,
    check_merge,
    require_choice,
)
from repmlp_deploy.errors import InputError
from repmlp_deploy.precision import PRECISIONS

__all__ = ["LowPrecision", "Request"]

_ALL_POINTS = 100


@dataclass(frozen=True)
class LowPrecision:
    """How the graph gets its precision.

    Attributes:
        precision: of `PRECISIONS`.
        calibration: a folder, a file or arrays for a precision that needs them.
        asked_method: of `CALIBRATION_METHODS`; None for `DEFAULT_METHOD`.
        keep_fp32: patterns of what stays in float32.
        sensitivity: whether to measure every block alone.
        max_drop: percentage points of top-1 that it may lose on labelled images; None for any number.
    """

    precision: str = "fp32"
    calibration: str | Path | Mapping[str, NDArray[Any]] | None = None
    asked_method: str | None = None
    keep_fp32: tuple[str, ...] = ()
    sensitivity: bool = False
    max_drop: float | None = None

    @property
    def method(self) -> str:
        """How ranges are chosen."""
        return DEFAULT_METHOD if self.asked_method is None else self.asked_method


@dataclass(frozen=True)
class Request:
    """The choices of one export; `export` describes them.

    Attributes:
        formats: entries of `FORMATS`, checked by `check_formats`.
        graph: of `GRAPHS`.
        batch: the sizes to serve.
        engine: how to build engines.
        low: the precision, and how to get it.
        asked_opset: of the ONNX graph; None for `DEFAULT_OPSET`, or the first later one that the precision needs.
        merge: of `MERGES`, or PACKAGE:FUNCTION.
        input: of `INPUTS`.
    """

    formats: tuple[str, ...]
    graph: str
    batch: BatchRange
    engine: EngineOptions
    low: LowPrecision
    asked_opset: int | None = None
    merge: str = "auto"
    input: str = "float32"

    @property
    def precision(self) -> str:
        """The precision of every artifact."""
        return self.low.precision

    @property
    def opset(self) -> int:
        """The opset of the float32 graph."""
        return DEFAULT_OPSET if self.asked_opset is None else self.asked_opset

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size; None if there are several."""
        return self.batch.min if self.batch.min == self.batch.max else None

    def check(self) -> None:
        """Raise InputError if the choices are unknown or contradict each other."""
        require_choice("--graph", self.graph, GRAPHS)
        check_merge(self.merge)
        require_choice("--input", self.input, INPUTS)
        require_choice("--precision", self.precision, tuple(PRECISIONS))
        require_choice("--calibration-method", self.low.method, CALIBRATION_METHODS)
        if self.opset not in OPSETS:
            raise InputError(f"--opset is {self.opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
        needed = PRECISIONS[self.precision].min_opset
        if self.asked_opset is not None and self.asked_opset < needed:
            raise InputError(f"{self.precision} needs opset {needed} or later; --opset is {self.asked_opset}")
        calibrated = PRECISIONS[self.precision].needs_calibration
        if calibrated and self.low.calibration is None:
            raise InputError(f"{self.precision} needs calibration images: pass --calibration DIR|FILE.npz")
        if not calibrated and self.low.asked_method is not None:
            able = [name for name, entry in PRECISIONS.items() if entry.needs_calibration]
            raise InputError(
                f"--calibration-method is for {' and '.join(able)}; --precision is {self.precision}: drop one of them"
            )
        looked_at = calibrated or PRECISIONS[self.precision].is_limited
        if not looked_at and self.low.calibration is not None:
            raise InputError(
                f"--calibration is for int8, fp8 and fp16, and --precision is {self.precision}: drop one of them"
            )
        if self.precision == "fp32" and (self.low.keep_fp32 or self.low.sensitivity):
            option = "--keep-fp32" if self.low.keep_fp32 else "--sensitivity"
            raise InputError(f"{option} says nothing where everything is fp32: name a --precision")
        if self.low.max_drop is not None:
            _check_max_drop(self.low.max_drop, self.precision)


def _check_max_drop(points: float, precision: str) -> None:
    """Raise InputError unless an accuracy can be asked for."""
    able = [name for name, entry in PRECISIONS.items() if entry.lowering == "quantize"]
    if not 0 <= points <= _ALL_POINTS:  # which a NaN is not, either
        raise InputError(f"--max-drop is {points:g}; expected percentage points from 0 to {_ALL_POINTS}, such as 0.5")
    if precision not in able:
        raise InputError(f"--max-drop is for {' and '.join(able)}; --precision is {precision}: drop one of them")
