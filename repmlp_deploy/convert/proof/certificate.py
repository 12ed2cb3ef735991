"""The certificate: compare the output of every step with the trained network's, here and on the target machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import BatchRange, Bundle, Hop, Probe
from repmlp_deploy.errors import MissingDependency, MissingDevice, VerificationError
from repmlp_deploy.numerics import (
    allowed_error,
    compare,
    describe_distance,
    is_close,
    margin_of,
    noise_floors,
    sample_errors,
)
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.choice import open_runner
from repmlp_deploy.runtime.runner import RUNNERS, RunnerOptions
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["Certifier", "Run", "batch_sizes", "recertify"]

Run = Callable[..., NDArray[Any] | Sequence[NDArray[Any]]]
"""Inputs by position to the output, or to the outputs in their order."""


class Certifier:
    """Compare steps with the probe; each comparison returns its rows of the certificate. Holds no rows itself.

    Args:
        probe: inputs and the trained network's outputs.
        sizes: batch sizes to run every step at.
        class_axes: axes of an output whose axis 1 is classes, so that a top-1 exists; None for none.
        outputs: names, where there are several; each is compared with its own noise floor.
        consequence: of a step that fails, for its message.
    """

    def __init__(
        self,
        probe: Probe,
        sizes: Sequence[int],
        *,
        class_axes: int | None = find_task("classify").class_axes,
        outputs: Sequence[str] = (),
        consequence: str = "nothing was written",
    ) -> None:
        self._probe = probe
        self._sizes = tuple(sizes)
        self._class_axes = class_axes
        self._consequence = consequence
        self._suffixes = [f": {name}" for name in outputs] if len(outputs) > 1 else [""]
        self._floors = [noise_floors(float32, reference) for reference, float32 in probe.outputs()]
        self.floor = float(self._floors[0].max())

    def floor_rows(self) -> list[Hop]:
        """Return the rows of the trained network itself in float32, one per output: the noise floor."""
        rows = np.arange(len(self._probe.inputs))
        hops = []
        for i, (reference, float32) in enumerate(self._probe.outputs()):
            hop = self._hop("trained, float32", i, float32, reference, self._floors[i], rows)
            known = {"kind": "floor", "allowed": hop.floor, "passed": None, "margin": None, "note": "the noise floor"}
            hops.append(hop.model_copy(update=known))
        return hops

    @property
    def inputs(self) -> list[NDArray[Any]]:
        """Return the probe's inputs, every sample once."""
        return [self._probe.inputs, *self._probe.further_inputs]

    def batches(self, *further: int) -> list[list[NDArray[Any]]]:
        """Return the inputs of every batch size that steps are run at, and of further ones."""
        return [self._probe.batches(size)[0] for size in sorted({*self._sizes, *further})]

    def covering(self) -> list[list[NDArray[Any]]]:
        """Return the inputs of batches of the largest size that together hold every sample of the probe."""
        size = max(self._sizes)
        return [self._probe.batches(size, start)[0] for start in range(0, len(self._probe.inputs), size)]

    def measure(self, name: str, run: Run, precision: str, artifact: str = "") -> list[Hop]:
        """Return the rows of one step, one per batch size and output; some may have failed.

        The largest batch size sees every sample, in as many batches as that takes; the others see one batch each.

        Raises:
            VerificationError: an output has another shape or is not finite, or there is another number of them.
        """
        hops, samples, start = [], len(self._probe.inputs), 0
        for size in self._sizes:
            starts = range(0, samples, size) if size == max(self._sizes) else (start,)
            rows = np.concatenate([(first + np.arange(size)) % samples for first in starts])
            for i, output in enumerate(self._run(name, run, size, starts)):
                reference, floors = self._probe.outputs()[i][0][rows], self._floors[i][rows]
                try:
                    hop = self._hop(name, i, output, reference, floors, rows, precision)
                except VerificationError as error:
                    raise VerificationError(f"{name}{self._suffixes[i]} at batch {size}: {error}") from None
                hops.append(hop.model_copy(update={"batch": size, "artifact": artifact}))
            start += size
        return hops

    def require(self, name: str, run: Run, precision: str = "fp32", artifact: str = "") -> list[Hop]:
        """Return the rows of one step, all passed.

        Args:
            name: of the step.
            run: inputs to outputs.
            precision: whose tolerance applies.
            artifact: the format whose graph runs; empty for a network of PyTorch.

        Raises:
            VerificationError: it differs too much from the trained network.
        """
        return self.require_passed(self.measure(name, run, precision, artifact))

    def first_sample(self) -> tuple[list[NDArray[Any]], list[NDArray[np.float64]]]:
        """Return the inputs of the first sample, (1, …), floats in float64, and the trained network's outputs."""
        inputs, references = self._probe.batches(1)
        return [x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x for x in inputs], references

    def require_outputs(
        self, name: str, outputs: Sequence[NDArray[Any]], references: Sequence[NDArray[np.float64]]
    ) -> list[Hop]:
        """Return the rows of outputs for the first samples, all passed.

        Args:
            name: the step.
            outputs: (n, …); if they are float64, only its rounding is allowed.
            references: the right outputs. If another network than the trained one gave them, the floor is the trained
                network's in proportion to the largest output, and a few units in the last place at least. It is the
                trained network's own where one of the two gave only zeros, as behind a ReLU.

        Raises:
            VerificationError: they differ by more than rounding.
        """
        hops = []
        for i, (output, reference) in enumerate(zip(outputs, references, strict=True)):
            rows = np.arange(len(reference))
            own, size = np.abs(self._probe.outputs()[i][0][rows]).max(), np.abs(reference).max()
            scale = size / own if size > 0 and own > 0 else 1.0
            floors = np.maximum(self._floors[i][rows] * scale, noise_floors(reference, reference))
            precision = "fp64" if output.dtype == np.float64 else "fp32"
            hops.append(self._hop(name, i, output, reference, floors, rows, precision))
        return self.require_passed(hops)

    def require_passed(self, hops: Sequence[Hop]) -> list[Hop]:
        """Return these rows.

        Raises:
            VerificationError: one of them did not pass.
        """
        for hop in hops:
            if not hop.passed:
                where = f"at batch {hop.batch}" if hop.kind == "output" else f"({hop.note})"
                tolerance = "weights" if hop.kind == "weights" else hop.precision
                said = describe_distance(hop.max_abs, hop.between, floor=hop.floor, precision=tolerance)
                remedy = PRECISIONS.get(hop.precision, PRECISIONS["fp32"]).remedy
                raise VerificationError(f"{hop.name} {where} {said}: {self._consequence}; {remedy}")
        return list(hops)

    def _run(self, name: str, run: Run, size: int, starts: Sequence[int]) -> list[NDArray[Any]]:
        """Return every output of the batches that begin with these samples, concatenated."""
        answers = []
        for start in starts:
            inputs, references = self._probe.batches(size, start)
            answer = run(*inputs)
            outputs = [answer] if isinstance(answer, np.ndarray) else list(answer)
            if len(outputs) != len(references):
                raise VerificationError(f"{name} has {len(outputs)} outputs; the trained network has {len(references)}")
            answers.append(outputs)
        return [np.concatenate(batches) for batches in zip(*answers, strict=True)]

    def _hop(  # noqa: PLR0913 - what is compared, and how it is judged
        self,
        name: str,
        index: int,
        output: NDArray[Any],
        reference: NDArray[np.float64],
        floors: NDArray[np.float64],
        rows: NDArray[np.int64],
        precision: str = "fp32",
    ) -> Hop:
        """Return the row of one output; `floors` and `rows`, the samples, have an entry for each of its rows."""
        result = compare(output, reference, classes=reference.ndim == self._class_axes)
        errors = sample_errors(output, reference)
        worst = int(np.argmax(errors / floors))
        floor = float(floors[worst])
        result = replace(result, max_abs=float(errors[worst]))
        return Hop(
            name=name + self._suffixes[index],
            kind="output",
            precision=precision,
            batch=len(output),
            **result.as_dict(),
            floor=floor,
            allowed=allowed_error(precision, floor),
            passed=is_close(result, floor=floor, precision=precision),
            ratio=result.max_abs / floor,
            margin=margin_of(result, floor=floor, precision=precision),
            sample=int(rows[worst]),
        )


def batch_sizes(batch: BatchRange) -> tuple[int, ...]:
    """Return the sizes to verify at: the smallest, the best, and one that no doubling and no default would hit."""
    further = next(
        (n for n in (3, 5, 7, batch.max) if batch.min <= n <= batch.max and n not in (batch.min, batch.opt)), 0
    )
    return tuple(sorted({batch.min, batch.opt} | ({further} if further else set())))


def recertify(
    bundle: Bundle, artifact_format: str | None = None, options: RunnerOptions | None = None
) -> tuple[list[Hop], list[str]]:
    """Return the rows of a bundle's artifacts as they run on this machine, and why others have none. Needs no torch.

    Args:
        bundle: on disk; every file's sha256 is checked.
        artifact_format: one artifact; by default every one that runs here.
        options: device and threads.

    Raises:
        BundleError: a file is not what was certified, or the bundle has no such artifact.
        MissingDependency, MissingDevice: the one artifact that was asked for cannot run here.
        VerificationError: an output has another shape or is not finite.
    """
    if artifact_format is not None:
        bundle.artifact(artifact_format)
    for entry in bundle.files():
        bundle.read(entry)
    names = [spec.name for spec in bundle.manifest.outputs]
    axes = find_task(bundle.manifest.task).class_axes
    certifier = Certifier(bundle.probe(), batch_sizes(bundle.manifest.batch), class_axes=axes, outputs=names)
    hops, notes = certifier.floor_rows(), []
    for name, entry in bundle.manifest.artifacts.items():
        if artifact_format not in (None, name):
            continue
        if artifact_format is None and name not in RUNNERS:
            notes.append(f"{name} was not run: it is for other programs")
            continue
        try:
            runner = open_runner(bundle, name, options or RunnerOptions())
        except (MissingDependency, MissingDevice) as error:
            if artifact_format is not None:
                raise
            notes.append(f"{name} was not run: {error}")
            continue
        with closing(runner):
            hops += certifier.measure(f"{name} on {runner.device}", runner.run_all, entry.precision, name)
    return hops, notes
