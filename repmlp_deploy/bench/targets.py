"""Targets: the networks that are measured, with their weights, graphs, counts and probe in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
from numpy.typing import NDArray

from repmlp_deploy.bench.counting.count import count_graph, count_network
from repmlp_deploy.bench.counting.counts import Counts
from repmlp_deploy.bench.settings import Settings
from repmlp_deploy.bench.subjects.pytorch import open_trained, upstream_merge
from repmlp_deploy.bench.subjects.seeding import seeded_network, seeded_samples
from repmlp_deploy.bench.subjects.table import SUBJECTS, Job, chosen_rows, why_not
from repmlp_deploy.bundle import PROBE, ArtifactEntry, BatchRange, Bundle, describe_file
from repmlp_deploy.card import ModelCard, data_root, load_card
from repmlp_deploy.convert.formats import FORMATS
from repmlp_deploy.convert.job import image_preprocessing
from repmlp_deploy.convert.pipeline import export
from repmlp_deploy.convert.proof.probe import probe_inputs, record_probe
from repmlp_deploy.convert.source.trained import find_interface
from repmlp_deploy.convert.transform import transform_and_prove
from repmlp_deploy.errors import InputError, RepMLPError
from repmlp_deploy.nets.families import card_spec
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["Target", "Unavailable", "counts_key", "find_targets"]

Show = Callable[[str], None]

CALIBRATION_SAMPLES = 32

_IMAGE_AXES = 4


class Unavailable(Exception):  # noqa: N818 - an outcome that becomes a row's reason
    """What a row needs cannot be made here; the message is the reason."""


@dataclass
class Target:
    """One network to measure.

    Attributes:
        name: of the card.
        card: its description.
        shape: (C, H, W) of the input.
        batches: sizes its artifacts must serve.
        checkpoint: file with trained weights; None where only a bundle was given.
        model: `timm:NAME[,…]`, for a network of timm.
        input_name: of the network's input.
        device: `cpu` or `cuda`.
        weights: where the weights are from, for the report.
        folder: for what is made.
        given: the bundle that was given instead of a checkpoint.
        counts: graph to what it does; filled as graphs are made.
        notes: for the report.
        wanted: (format, precision) of every row, so that one export makes what several of them need.
        calibration: images or arrays for int8; seeded inputs where there are none.
    """

    name: str
    card: ModelCard
    shape: tuple[int, ...]
    batches: BatchRange
    checkpoint: Path | None
    weights: str
    folder: Path
    given: Bundle | None = None
    counts: dict[str, Counts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wanted: tuple[tuple[str, str], ...] = ()
    calibration: Path | None = None
    model: str | None = None
    input_name: str = "images"
    device: str = "cpu"
    _made: dict[tuple[str, str, str], Bundle | str] = field(default_factory=dict)

    @property
    def no_pictures(self) -> str:
        """Why there are no figures from JPEG bytes to classes; empty if there are."""
        task = self.card.task if self.given is None else self.given.manifest.task
        if task == "classify":
            return ""
        if find_task(task).refusal:
            return "no card says how images are made"
        return f"it would end with classes, and the task is {task}"

    def job(self, format_name: str, precision: str, threads: int, show: Show) -> Job:
        """Return what a child needs to open a row of this target; make the artifact if no row needed it before.

        Raises:
            Unavailable: it cannot be made; the message says why.
        """
        subject = SUBJECTS[format_name]
        job = Job(format=format_name, precision=precision, threads=threads, card=self.card, model=self.model)
        job = job.model_copy(update={"device": self.device})
        if subject.needs == "checkpoint":
            if self.checkpoint is None:
                raise Unavailable("a bundle holds no trained network: pass --ckpt")
            return job.model_copy(update={"checkpoint": str(self.checkpoint)})
        bundle = self._bundle(subject.needs, subject.graph, precision, show)
        return job.model_copy(update={"bundle": str(bundle.folder)})

    def probe(self) -> Path:
        """Return the file with inputs and the trained network's answers; inputs like those of a calibration, if any."""
        made = [(precision, bundle) for (_, _, precision), bundle in self._made.items() if isinstance(bundle, Bundle)]
        made.sort(key=lambda pair: not PRECISIONS[pair[0]].needs_calibration)
        bundle = next((bundle for _, bundle in made), self.given)
        if bundle is not None and bundle.folder is not None:
            return bundle.folder / bundle.manifest.probe.path
        path = self.folder / PROBE
        if not path.is_file() and self.checkpoint is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            trained = open_trained(self.checkpoint, self.card, self.model)
            path.write_bytes(record_probe(trained.network, probe_inputs(self.shape)).to_bytes())
        return path

    def count_networks(self) -> None:
        """Count the trained, merged and folded PyTorch networks."""
        if self.checkpoint is None:
            return
        trained = open_trained(self.checkpoint, self.card, self.model)
        made = transform_and_prove(trained, "folded").value
        forms = {"trained": trained.network, "merged": made.merged, "folded": made.network}
        if self.model is not None:
            try:
                forms["merged"] = transform_and_prove(trained, "merged", merge="hooks").value.merged
            except RepMLPError as error:
                del forms["merged"]
                self.notes.append(f"{self.name}, merged: not counted: {error}")
        for graph, network in forms.items():
            try:
                self.counts[graph] = count_network(network, self.shape)
            except ValueError as error:
                self.notes.append(f"{self.name}, {graph}: not counted: {error}")

    def _bundle(self, artifact: str, graph: str, precision: str, show: Show) -> Bundle:
        key = (artifact, graph, precision)
        together = self._together(artifact, graph, precision)
        if key not in self._made and len(together) > 1:
            made = self._find_or_export(together, graph, precision, show)
            if isinstance(made, Bundle):  # otherwise each is tried alone, so that one does not fail the others
                self._made |= {(name, graph, precision): made for name in together}
        if key not in self._made:
            self._made[key] = self._find_or_export((artifact,), graph, precision, show)
        made = self._made[key]
        if isinstance(made, str):
            raise Unavailable(made)
        return made

    def _together(self, artifact: str, graph: str, precision: str) -> tuple[str, ...]:
        """Return the artifact and those of other rows that the same export can make and this machine can run."""
        others = [
            SUBJECTS[name].needs
            for name, other in self.wanted
            if other == precision and SUBJECTS[name].graph == graph and why_not(name, other, self.device) is None
        ]
        makable = {
            name for name, entry in FORMATS.items() if entry.needs != "form"
        }  # a row's "checkpoint" is the trained file
        return tuple(dict.fromkeys([artifact, *(name for name in others if name in makable)]))

    def _find_or_export(self, artifacts: tuple[str, ...], graph: str, precision: str, show: Show) -> Bundle | str:
        """Return the bundle with some artifacts, or why there is none."""
        try:
            if self.given is not None:
                for artifact in artifacts:
                    bundle = self._given(self.given, artifact, graph, precision)
            else:
                bundle = self._exported(artifacts, graph, precision, show)
            key = f"{graph} ONNX"
            if (
                (key not in self.counts or precision == "fp32")
                and "onnx" in bundle.manifest.artifacts
                and bundle.folder is not None
            ):
                model = onnx.load(bundle.folder / bundle.artifact("onnx").path)
                self.counts[key] = count_graph(model)
        except (RepMLPError, Unavailable) as error:
            return str(error)
        except ValueError as error:
            self.notes.append(f"{self.name}, {graph} ONNX: not counted: {error}")
        return bundle

    @staticmethod
    def _given(bundle: Bundle, artifact: str, graph: str, precision: str) -> Bundle:
        """Return the given bundle if it holds what is asked for."""
        manifest = bundle.manifest
        if manifest.graph != graph:
            raise Unavailable(f"the bundle holds the {manifest.graph} graph, not the {graph} one")
        if artifact not in manifest.artifacts:
            raise Unavailable(f"the bundle holds {', '.join(manifest.artifacts)}, no {artifact}")
        if manifest.artifacts[artifact].precision != precision:
            raise Unavailable(f"the bundle is {manifest.artifacts[artifact].precision}, not {precision}")
        return bundle

    def _exported(self, artifacts: tuple[str, ...], graph: str, precision: str, show: Show) -> Bundle:
        if artifacts[0] not in FORMATS:
            raise Unavailable(f"this version exports no {artifacts[0]}")
        if self.checkpoint is None:
            raise AssertionError("a target has a checkpoint or a bundle")
        if artifacts == ("openvino",) and PRECISIONS[precision].lowering == "cast":
            return self._stored_in(precision, show)
        calibration: Path | dict[str, NDArray[np.float32]] | None = None
        if PRECISIONS[precision].needs_calibration and self.calibration is not None:
            calibration = self.calibration
        elif PRECISIONS[precision].needs_calibration:
            calibration = {
                self.input_name: seeded_samples(self.shape, CALIBRATION_SAMPLES, image_preprocessing(self.card))
            }
            with_what = f"{CALIBRATION_SAMPLES} seeded inputs, not with images: see --calibration"
            note = f"{self.name}: {precision} is calibrated with {with_what}"
            self.notes += [] if note in self.notes else [note]
        return export(
            self.checkpoint,
            card=self.card,
            model=self.model,
            input_size=None if self.model is None else self.card.input_size,
            formats=artifacts,
            graph=graph,
            merge=upstream_merge(self.model, graph),
            precision=precision,
            batch=self.batches,
            calibration=calibration,
            out=self.folder / f"{'-'.join(artifacts)}-{graph}-{precision}",
            progress=lambda step: show(f"{self.name}: exporting the {graph} graph: {step}"),
        )

    def _stored_in(self, precision: str, show: Show) -> Bundle:
        """Store OpenVINO's artifact in 16 bits, from the verified float32 graph; the row itself is compared later."""
        verified = self._bundle("onnx", "folded", "fp32", show)
        show(f"{self.name}: storing the folded graph in {precision}")
        shapes = {self.input_name: self.shape}
        graph = verified.read(verified.artifact("onnx"))
        ir = import_module("repmlp_deploy.convert.formats.openvino").build_ir(
            graph, precision=precision, batch=self.batches, inputs=shapes
        )
        contents = {"model.xml": ir.xml, "model.bin": ir.weights}
        files = {name: describe_file(name, content) for name, content in contents.items()}
        entry = {**files["model.xml"].model_dump(), **ir.details, "precision": precision}
        entry["companions"] = (files["model.bin"].model_dump(),)
        artifacts = {"openvino": ArtifactEntry.model_validate(entry)}
        manifest = verified.manifest.model_copy(update={"artifacts": artifacts})
        contents[PROBE] = verified.read(manifest.probe)
        return Bundle(manifest, contents=contents).save(self.folder / f"openvino-folded-{precision}")


def counts_key(format_name: str) -> str:
    """Return which of a target's counts a format computes."""
    subject = SUBJECTS[format_name]
    return subject.graph if subject.needs in ("checkpoint", "openvino") else f"{subject.graph} ONNX"


def find_targets(settings: Settings, folder: Path) -> list[Target]:
    """Return the networks that the settings name, with their weights in files.

    Raises:
        InputError: a card, checkpoint or bundle is unusable.
    """
    targets = _targets(settings, folder)
    for target in targets:
        target.wanted = tuple(chosen_rows(settings.formats, settings.precision, settings.device))
        target.device = settings.device
        target.calibration = settings.calibration
    return targets


def _targets(settings: Settings, folder: Path) -> list[Target]:
    largest = max(*settings.batch, 8)
    batches = BatchRange(min=1, opt=8, max=largest)
    if settings.bundle is not None:
        return [_target_of_bundle(Bundle.load(settings.bundle), settings, folder)]
    if settings.ckpt is not None:
        card = None if settings.card is None else load_card(settings.card)
        trained = open_trained(settings.ckpt, card, settings.model)
        interface = find_interface(trained)
        shape = tuple(interface.examples[0].shape[1:])
        said = [*(f"warning: {warning}" for warning in trained.warnings), *trained.notes]
        notes = [f"{trained.card.name}: {note}" for note in said]
        name = trained.card.name
        return [
            Target(
                name,
                trained.card,
                shape,
                batches,
                settings.ckpt,
                str(settings.ckpt),
                folder / name,
                notes=notes,
                model=trained.model,
                input_name=interface.inputs[0],
            )
        ]
    return [_target_of_card(load_card(name), batches, folder) for name in settings.models]


def _target_of_card(card: ModelCard, batches: BatchRange, folder: Path) -> Target:
    shape = (card_spec(card).in_channels, *card.input_size)
    if card.weights is not None and card.weights.file is not None:
        path = data_root() / card.weights.file
        return Target(card.name, card, shape, batches, path, f"{card.weights.file}, shipped", folder / card.name)
    path = folder / f"{card.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in seeded_network(card).state_dict().items()}
    safetensors.torch.save_file(state, path)
    weights = "seeded, random BatchNorm statistics included; not trained: accuracy means nothing, speed does"
    return Target(card.name, card, shape, batches, path, weights, folder / card.name)


def _target_of_bundle(bundle: Bundle, settings: Settings, folder: Path) -> Target:
    manifest = bundle.manifest
    takes_images = len(manifest.input.shape) == _IMAGE_AXES and manifest.input.dtype == manifest.preprocessing.input
    if len(manifest.inputs) > 1 or not takes_images:
        taken = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in manifest.inputs).replace("None", "N")
        raise InputError(f"{settings.bundle} takes {taken}; only networks with one input, (N, C, H, W), are measured")
    if not manifest.batch.min <= min(settings.batch) <= max(settings.batch) <= manifest.batch.max:
        raise InputError(
            f"--batch asks for {', '.join(map(str, settings.batch))}; {settings.bundle} serves "
            f"{manifest.batch.min} to {manifest.batch.max}: export it with another --batch"
        )
    shape = tuple(edge for edge in manifest.input.shape[1:] if edge is not None)
    height, width = (edge or 1 for edge in manifest.image_size)
    card = ModelCard(
        name=manifest.name,
        family=manifest.family,
        input_size=(height, width),
        network={},
        preprocessing=manifest.preprocessing,
    )
    weights = f"bundle {settings.bundle}"
    return Target(manifest.name, card, shape, manifest.batch, None, weights, folder / manifest.name, given=bundle)
