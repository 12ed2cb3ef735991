"""Golden cases: outputs of the official implementations on deterministic weights, in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from golden import fill

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class GoldenCase:
    name: str

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads((GOLDEN / f"{self.name}.json").read_text())

    @property
    def config(self) -> dict[str, Any]:
        return self.about["config"]

    def weights(self) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value) for key, value in fill.fill_state_dict(self.about["state_dict"]).items()}

    def input(self) -> np.ndarray:
        return fill.golden_input(self.about["input_shape"])

    def output(self) -> np.ndarray:
        return np.load(GOLDEN / f"{self.name}.npz")["output"]


def names(prefix: str) -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob(f"{prefix}*.json"))


def assert_matches_golden(output: np.ndarray, golden: np.ndarray, *, atol: float) -> None:
    """Values agree, and so do the differences between samples, which are far smaller than the values."""
    assert output.shape == golden.shape
    np.testing.assert_allclose(output, golden, rtol=0, atol=atol)
    ours, theirs = output - output.mean(axis=0), golden - golden.mean(axis=0)
    assert np.abs(ours - theirs).max() <= 0.005 * np.abs(theirs).max()
