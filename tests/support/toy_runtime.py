"""A toy runtime: it returns the probe's recorded outputs for the probe's inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.runtime.runner import RunnerOptions


class ToyRunner:
    """Look every sample up in the probe."""

    def __init__(self, bundle: Bundle, options: RunnerOptions) -> None:
        probe = bundle.probe()
        self.format = "checkpoint"
        self._known = {x.tobytes(): y for x, y in zip(probe.inputs, probe.float32, strict=True)}
        self.device = options.device or "table"
        self.details: dict[str, Any] = {"samples": len(self._known)}

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([self._known[x.tobytes()] for x in batch])

    def run_all(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        return [self.run(inputs[0])]

    def close(self) -> None:
        self._known = {}
