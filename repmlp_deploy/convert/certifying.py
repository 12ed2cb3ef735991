"""Certifying: every step's output against the trained network's, hop by hop; and again on the machine it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import BatchRange, Bundle, Hop, Probe
from repmlp_deploy.errors import MissingDependency, MissingDevice, VerificationError
from repmlp_deploy.numerics import allowed_error, compare, describe_distance, is_close, noise_floor
from repmlp_deploy.runtime.runner import RUNNERS, RunnerOptions, open_runner
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["Certifier", "Run", "batch_sizes", "recertify"]

Run = Callable[..., NDArray[Any] | Sequence[NDArray[Any]]]
"""Inputs by position to the output, or to the outputs in their order."""


class Certifier:
    """Compares steps with the probe and keeps a line for each: the certificate.

    Args:
        probe: inputs and the trained network's answers.
        sizes: batch sizes to run every step at.
        class_axes: axes of an output whose axis 1 is classes, so that a top-1 exists; None for none.
        outputs: names, where there are several; each is compared with its own noise floor.
    """

    def __init__(
        self,
        probe: Probe,
        sizes: Sequence[int],
        *,
        class_axes: int | None = find_task("classify").class_axes,
        outputs: Sequence[str] = (),
    ) -> None:
        self._probe = probe
        self._sizes = tuple(sizes)
        self._class_axes = class_axes
        self._suffixes = [f": {name}" for name in outputs] if len(outputs) > 1 else [""]
        self._floors = [noise_floor(float32, reference) for reference, float32 in probe.answers()]
        self.floor = self._floors[0]
        self.hops: list[Hop] = []
        for i, (reference, float32) in enumerate(probe.answers()):
            line = self._hop("trained, float32", i, float32, reference, "fp32")
            line = line.model_copy(update={"allowed": self._floors[i]})
            self.hops.append(line.model_copy(update={"passed": None, "note": "the noise floor"}))

    def measure(self, name: str, run: Run, precision: str) -> list[Hop]:
        """The lines of one step, a batch size and output each, judged but not recorded.

        Raises:
            VerificationError: an output has another shape or is not finite, or there is another number of them.
        """
        hops = []
        for size in self._sizes:
            inputs, references = self._probe.batches(size)
            answer = run(*inputs)
            outputs = [answer] if isinstance(answer, np.ndarray) else list(answer)
            if len(outputs) != len(references):
                raise VerificationError(f"{name} has {len(outputs)} outputs; the trained network has {len(references)}")
            for i, (output, reference) in enumerate(zip(outputs, references, strict=True)):
                try:
                    hops.append(self._hop(name, i, output, reference, precision))
                except VerificationError as error:
                    raise VerificationError(f"{name}{self._suffixes[i]} at batch {size}: {error}") from None
        return hops

    def require(self, name: str, run: Run, precision: str = "fp32") -> None:
        """Record the lines of one step.

        Raises:
            VerificationError: it strays too far from the trained network.
        """
        hops = self.measure(name, run, precision)
        for hop in hops:
            if not hop.passed:
                said = describe_distance(hop.max_abs, hop.between, floor=hop.floor, precision=precision)
                raise VerificationError(
                    f"{hop.name} at batch {hop.batch} {said}: nothing was written; {_REMEDIES[precision]}"
                )
        self.hops += hops

    def _hop(self, name: str, index: int, output: NDArray[Any], reference: NDArray[np.float64], precision: str) -> Hop:
        result = compare(output, reference, classes=reference.ndim == self._class_axes)
        floor = self._floors[index]
        return Hop.model_validate(
            {
                "name": name + self._suffixes[index],
                "batch": len(output),
                **result.as_dict(),
                "floor": floor,
                "allowed": allowed_error(precision, floor),
                "passed": is_close(result, floor=floor, precision=precision),
            }
        )


_REMEDIES = {
    "fp32": "please report this checkpoint",
    "fp16": "keep the worst blocks in float32, --keep-fp32 PATTERN, or use bf16",
    "bf16": "keep the worst blocks in float32, --keep-fp32 PATTERN, or use fp32",
    "int8": "give more or better calibration images, or keep the worst blocks in float32, --keep-fp32 PATTERN",
}


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
    names = [spec.name for spec in bundle.manifest.outputs]
    axes = find_task(bundle.manifest.task).class_axes
    certifier = Certifier(bundle.probe(), batch_sizes(bundle.manifest.batch), class_axes=axes, outputs=names)
    hops, notes = list(certifier.hops), []
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
        hops += certifier.measure(f"{name} on {runner.device}", runner.run_all, entry.precision)
        runner.close()
    if artifact_format is not None:
        bundle.artifact(artifact_format)
    return hops, notes
