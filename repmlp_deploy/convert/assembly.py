"""Collect what the steps of an export returned into a bundle. Every method returns a new value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from repmlp_deploy.bundle import PROBE, Bundle, Hop, Manifest, Probe, TensorSpec, describe_file
from repmlp_deploy.card import load_labels
from repmlp_deploy.convert.graph.calibrate import Calibration
from repmlp_deploy.convert.job import Artifact, Graphs, Job
from repmlp_deploy.convert.provenance import describe_provenance
from repmlp_deploy.convert.source.trained import Trained
from repmlp_deploy.convert.step import Step

__all__ = ["Assembly"]


@dataclass(frozen=True)
class Assembly:
    """What has been made and proved so far.

    Attributes:
        probe: inputs and the trained network's outputs.
        hops: the certificate's rows.
        notes: for the report.
        warnings: what may make answers wrong.
        artifacts: format to what it made.
        digests: of the graphs on the way.
    """

    probe: Probe
    hops: tuple[Hop, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def begun(cls, probe: Probe, trained: Trained, samples: Calibration | None, floors: Sequence[Hop]) -> Assembly:
        """Return what is known before any step: the probe, the noise floors, and what to say of the input."""
        notes, warnings = trained.notes, trained.warnings
        if samples is not None:
            notes, warnings = (*notes, *samples.remarks()), (*warnings, *samples.warnings)
        return cls(probe, tuple(floors), notes, warnings)

    def with_probe(self, probe: Probe) -> Assembly:
        """Return this with another form of the probe's inputs."""
        return replace(self, probe=probe)

    def warning(self, warnings: Sequence[str]) -> Assembly:
        """Return this with further warnings."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def after(self, step: Step[Any]) -> Assembly:
        """Return this with the rows and notes of a step."""
        return replace(self, hops=(*self.hops, *step.hops), notes=(*self.notes, *step.notes))

    def after_graphs(self, step: Step[Graphs]) -> Assembly:
        """Return this with the rows, notes and digests of the graphs."""
        return replace(self.after(step), digests=step.value.digests)

    def having(self, name: str, step: Step[Artifact]) -> Assembly:
        """Return this with the artifact of one format."""
        return replace(self.after(step), artifacts={**self.artifacts, name: step.value})

    def bundle(self, job: Job, seconds: Mapping[str, float]) -> Bundle:
        """Return the bundle, in memory.

        Args:
            job: of the export.
            seconds: of every step.
        """
        probe = self.probe.to_bytes()
        contents = {name: data for made in self.artifacts.values() for name, data in made.files.items()}
        return Bundle(self._manifest(job, probe, seconds), contents={**contents, PROBE: probe})

    def _manifest(self, job: Job, probe: bytes, seconds: Mapping[str, float]) -> Manifest:
        trained, request, interface = job.trained, job.request, job.interface
        n = request.fixed_batch
        inputs = tuple(
            TensorSpec.model_validate(
                {"name": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": (n, *x.shape[1:])}
            )
            for name, x in zip(interface.inputs, interface.examples, strict=True)
        )
        outputs = tuple(
            TensorSpec(name=name, dtype="float32", shape=(n, *reference.shape[1:]))
            for name, (reference, _) in zip(interface.outputs, self.probe.outputs(), strict=True)
        )
        provenance = describe_provenance(trained, seconds) | {"merge": request.merge, "graphs": dict(self.digests)}
        if job.samples is not None:
            provenance["probe"]["samples"] = job.samples.probe_kinds(len(self.probe.inputs))
        return Manifest(
            name=trained.card.name,
            family=trained.card.family,
            task=trained.card.task,
            graph=request.graph,
            inputs=inputs,
            outputs=outputs,
            preprocessing=job.preprocessing,
            labels=load_labels(trained.card),
            scores=trained.card.scores,
            batch=request.batch,
            artifacts={name: made.entry for name, made in self.artifacts.items()},
            probe=describe_file(PROBE, probe),
            certificate=self.hops,
            provenance=provenance,
            warnings=self.warnings,
            notes=self.notes,
        )
