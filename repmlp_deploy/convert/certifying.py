"""Certifying: every step's output against the trained network's, hop by hop; and again on the machine it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import BatchRange, Bundle, Hop, Probe
from repmlp_deploy.errors import MissingDependency, MissingDevice, VerificationError
from repmlp_deploy.numerics import Comparison, allowed_error, compare, noise_floor
from repmlp_deploy.runtime.runner import RUNNERS, RunnerOptions, open_runner

__all__ = ["Certifier", "batch_sizes", "recertify"]

Run = Callable[[NDArray[np.float32]], NDArray[np.floating]]


class Certifier:
    """Compares steps with the probe and keeps a line for each: the certificate.

    Args:
        probe: inputs and the trained network's answers.
        sizes: batch sizes to run every step at.
        task_has_classes: whether a top-1 exists.
    """

    def __init__(self, probe: Probe, sizes: Sequence[int], *, task_has_classes: bool = True) -> None:
        self._probe = probe
        self._sizes = tuple(sizes)
        self._classes = task_has_classes
        self.floor = noise_floor(probe.float32, probe.reference)
        floor_line = self._hop(
            "trained, float32",
            len(probe.inputs),
            compare(probe.float32, probe.reference, classes=task_has_classes),
            allowed=self.floor,
        )
        self.hops: list[Hop] = [floor_line.model_copy(update={"passed": None, "note": "the noise floor"})]

    def measure(self, name: str, run: Run, precision: str) -> list[Hop]:
        """The lines of one step, a batch size each, judged but not recorded.

        Raises:
            VerificationError: an output has another shape or is not finite.
        """
        hops = []
        for size in self._sizes:
            inputs, reference = self._probe.batch(size)
            try:
                result = compare(run(inputs), reference, classes=self._classes)
            except VerificationError as error:
                raise VerificationError(f"{name} at batch {size}: {error}") from None
            hops.append(self._hop(name, size, result, allowed=allowed_error(precision, self.floor)))
        return hops

    def require(self, name: str, run: Run, precision: str = "fp32") -> None:
        """Record the lines of one step.

        Raises:
            VerificationError: it strays too far from the trained network.
        """
        hops = self.measure(name, run, precision)
        self.hops += hops
        for hop in hops:
            if not hop.passed:
                raise VerificationError(
                    f"{name} at batch {hop.batch} differs from the trained network by {hop.max_abs:.2e}; "
                    f"{precision} allows {hop.allowed:.2e}: nothing was written; please report this checkpoint"
                )

    def _hop(self, name: str, batch: int, result: Comparison, *, allowed: float) -> Hop:
        return Hop.model_validate(
            {
                "name": name,
                "batch": batch,
                **result.as_dict(),
                "floor": self.floor,
                "allowed": allowed,
                "passed": result.max_abs <= allowed,
            }
        )


def batch_sizes(batch: BatchRange) -> tuple[int, ...]:
    """The sizes to verify at: the smallest, the best, and one that neither a doubling nor a default would hit."""
    further = next(
        (n for n in (3, 5, 7, batch.max) if batch.min <= n <= batch.max and n not in (batch.min, batch.opt)), 0
    )
    return tuple(sorted({batch.min, batch.opt} | ({further} if further else set())))


def recertify(
    bundle: Bundle, artifact_format: str | None = None, options: RunnerOptions | None = None
) -> tuple[list[Hop], list[str]]:
    """The lines of a bundle's artifacts as they run on this machine, and why the others have none. Needs no torch.

    Args:
        bundle: on disk; every file's sha256 is checked.
        artifact_format: one artifact; by default all that can be run here.
        options: device and threads.

    Raises:
        BundleError: a file is not what was certified.
        MissingDependency, MissingDevice: the one artifact that was asked for cannot run here.
        VerificationError: an output has another shape or is not finite.
    """
    for entry in bundle.files():
        bundle.read(entry)
    certifier = Certifier(bundle.probe(), batch_sizes(bundle.manifest.batch))
    hops, notes = [certifier.hops[0]], []
    for name, entry in bundle.manifest.artifacts.items():
        if artifact_format not in (None, name):
            continue
        if artifact_format is None and name not in RUNNERS:
            notes.append(f"{name} was not run: no runner here runs it")
            continue
        try:
            runner = open_runner(bundle, name, options or RunnerOptions())
        except (MissingDependency, MissingDevice) as error:
            if artifact_format is not None:
                raise
            notes.append(f"{name} was not run: {error}")
            continue
        hops += certifier.measure(f"{name} on {runner.device}", runner.run, entry.precision)
        runner.close()
    if artifact_format is not None:
        bundle.artifact(artifact_format)
    return hops, notes
