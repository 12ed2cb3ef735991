"""Bisecting an artifact that takes 8-bit images beside a trace that takes normalised inputs.

Both get the same samples, each in its own form. The artifact's first convolution may hold the weights for levels, as
`graph.level_input` folds them; they stand for the trace's weights where they are what those fold into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.diagnosis.blame import Blame
from repmlp_deploy.convert.diagnosis.values import Anchor, Arrays, Trace, Values
from repmlp_deploy.convert.graph.level_input import level_kernel
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.images import levels_of

__all__ = ["LevelValues"]

_WEIGHTS = 3  # arguments of a convolution up to its bias


class LevelValues(Values):
    """An artifact that takes (n, H, W, C) uint8, as one that takes the normalised (n, C, H, W) float32.

    Args:
        artifact: takes levels.
        how: they are normalised.
        program: the trace that it is compared with.
    """

    def __init__(self, artifact: Values, how: Preprocessing, program: torch.export.ExportedProgram) -> None:
        self._artifact, self._how = artifact, how
        self.precision, self.end = artifact.precision, artifact.end
        self._folded = _first_weights(program, how)

    def anchors(self, trace: Trace) -> Sequence[Anchor]:
        """Return the artifact's anchors."""
        return self._artifact.anchors(trace)

    def values(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """Compute values for normalised inputs."""
        return self._artifact.values(self._levels(inputs), names)

    def failure(self, inputs: Arrays) -> Blame | None:
        """Return where the artifact fails to run, if it does."""
        return self._artifact.failure(self._levels(inputs))

    def weights_read(self, index: int) -> Sequence[str]:
        """Return the names of the weights that an operation reads."""
        return self._artifact.weights_read(index)

    def stored(self, weight: str) -> NDArray[Any] | None:
        """Return a weight; of one that the normalisation is folded into, the trace's if it is what that folds into."""
        stored = self._artifact.stored(weight)
        if stored is None or weight not in self._folded:
            return stored
        plain, folded = self._folded[weight]
        if stored.size != folded.size:
            return stored
        error = np.abs(stored.reshape(folded.shape).astype(np.float64) - folded)
        rounding = (PRECISIONS[self.precision].rounding or 0) + 2.0**-22  # float32 sums in another order
        return plain if error.max() <= rounding * np.abs(folded).max() else stored

    def operation(self, anchor: Anchor) -> tuple[str, str]:
        """Return the module and the name of an anchor's operation."""
        return self._artifact.operation(anchor)

    def _levels(self, inputs: Arrays) -> Arrays:
        return [levels_of(values, self._how) for values in inputs]


def _first_weights(
    program: torch.export.ExportedProgram, how: Preprocessing
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the first convolution's weights by name: the trace's, and what the normalisation is folded into."""
    graph = program.module().graph
    first = next(node for node in graph.nodes if node.op == "placeholder")
    readers = [node for node in first.users if node.op == "call_function"]  # the trace's own checks read it, too
    if len(readers) != 1 or "conv2d" not in str(readers[0].target):
        return {}
    named = [str(node.target) for node in readers[0].args[1:_WEIGHTS] if isinstance(node, torch.fx.Node)]
    values = [program.state_dict[name].detach().numpy() for name in named if name in program.state_dict]
    if not values or len(values) != len(named) or values[0].shape[1] != how.channels:
        return {}
    folded = level_kernel(values[0], values[1] if len(values) > 1 else None, how)
    return dict(zip(named, zip(values, folded, strict=False), strict=True))
