"""An export under way: what the steps after loading share. Nothing in it changes.

Where artifacts are to take uint8 images, every step up to the simplified graph takes normalised inputs. From there on
the same samples go in as levels, and the trained network's outputs for them stay the reference. So the probe's inputs
are whole levels from the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.bundle import ArtifactEntry, FileEntry, Hop, Probe, describe_file
from repmlp_deploy.card import ModelCard, Preprocessing
from repmlp_deploy.convert.graph.calibrate import Calibration
from repmlp_deploy.convert.proof.certificate import Certifier, batch_sizes
from repmlp_deploy.convert.proof.weights import match_weights
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.source.own_network import Interface
from repmlp_deploy.convert.source.trained import Trained
from repmlp_deploy.convert.step import Clock
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.images import levels_of, normalised
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["Artifact", "Graphs", "Job", "image_preprocessing", "of_whole_levels", "require_images", "taking_images"]

_MAP_AXES = 4  # (N, C, H, W)


@dataclass(frozen=True)
class Job:
    """What every step needs.

    Attributes:
        trained: what is exported.
        interface: how it is called.
        request: what was asked for.
        samples: for calibration, if the precision needs them.
        certifier: compares with the trained network.
        clock: around every part of the work.
    """

    trained: Trained
    interface: Interface
    request: Request
    samples: Calibration | None
    certifier: Certifier
    clock: Clock

    @property
    def preprocessing(self) -> Preprocessing:
        """From an image to what the artifacts take."""
        return self.trained.card.preprocessing.model_copy(update={"input": self.request.input})

    def match_weights(self, name: str, model: onnx.ModelProto, network: nn.Module) -> Hop:
        """Return the row that compares a graph's weights with the network's."""
        return match_weights(name, model, network=network, own=self.trained.interface is not None)


@dataclass(frozen=True)
class Graphs:
    """The verified graph, serialized.

    Attributes:
        fp32: exported and, if that went well, simplified; None if no format needs it.
        lowered: in the precision that was asked for, the same bytes for fp32; None if no format needs it.
        about: what the manifest says of the lowered one.
        digests: SHA-256 of the exported graph, of the simplified one, and of the one that takes uint8 images.
    """

    fp32: bytes | None
    lowered: bytes | None
    about: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def need_fp32(self) -> bytes:
        """Return the float32 graph, for a format whose entry says `needs="fp32"`."""
        return _needed(self.fp32, "fp32")

    def need_lowered(self) -> bytes:
        """Return the lowered graph, for a format whose entry says `needs="lowered"`."""
        return _needed(self.lowered, "lowered")

    @property
    def lowered_sha256(self) -> str | None:
        """The digest of `lowered` if it is known already: computing it twice takes a second."""
        same = self.lowered is not None and self.lowered is self.fp32
        return list(self.digests.values())[-1] if same else None


def _needed(graph: bytes | None, need: str) -> bytes:
    if graph is None:
        raise AssertionError(f'no format has needs="{need}" in FORMATS, so this graph was not made')
    return graph


@dataclass(frozen=True)
class Artifact:
    """What a format made: its entry in the manifest, and its files by name."""

    entry: ArtifactEntry
    files: Mapping[str, bytes]

    @classmethod
    def of(  # noqa: PLR0913 - what an entry says
        cls,
        name: str,
        data: bytes,
        precision: str,
        about: Mapping[str, Any] | None = None,
        *,
        companions: Mapping[str, bytes] | None = None,
        sha256: str | None = None,
    ) -> Artifact:
        """Return an artifact with one main file.

        Args:
            name: of the file.
            data: its content.
            precision: of the artifact.
            about: what else the entry says.
            companions: further files.
            sha256: the digest of `data`, if it is known already.
        """
        more = dict(companions or {})
        file = describe_file(name, data) if sha256 is None else FileEntry(path=name, sha256=sha256, bytes=len(data))
        described = {**file.model_dump(), "precision": precision, **(about or {})}
        if more:
            described["companions"] = tuple(describe_file(*item) for item in more.items())
        return cls(ArtifactEntry.model_validate(described), {**more, name: data})


def require_images(trained: Trained, interface: Interface) -> None:
    """Raise InputError unless the network takes one batch of images, and somebody said how they are normalised."""
    name, how = trained.card.name, trained.card.preprocessing
    if trained.card.task == "custom":
        raise InputError(
            f"--input uint8: {name} has no card, so nobody said how its images are normalised: pass --card"
        )
    if len(interface.examples) != 1:
        raise InputError(f"--input uint8 is for one input; {name} takes {', '.join(interface.inputs)}")
    example = interface.examples[0]
    if example.ndim != _MAP_AXES or example.shape[1] != how.channels or example.dtype != torch.float32:
        got = f"{str(example.dtype).removeprefix('torch.')} {tuple(example.shape)}"
        raise InputError(f"--input uint8 is for float32 (N, {how.channels}, H, W); {name} takes {got}")


def image_preprocessing(card: ModelCard) -> Preprocessing | None:
    """Return how a network's images are normalised; None if its inputs are no images that anybody described."""
    return None if find_task(card.task).refusal else card.preprocessing


def of_whole_levels(inputs: NDArray[Any], how: Preprocessing) -> NDArray[np.float32]:
    """Return the nearest inputs that 8-bit images give: (N, C, H, W) float32."""
    return normalised(levels_of(inputs, how), how)


def taking_images(job: Job, probe: Probe) -> tuple[Job, Probe]:
    """Return the job and the probe with uint8 images (N, H, W, C) for inputs.

    Args:
        job: with normalised inputs.
        probe: of whole levels.
    """
    how, name = job.trained.card.preprocessing, job.interface.inputs[0]
    shown = replace(probe, inputs=levels_of(probe.inputs, how))
    example = torch.from_numpy(levels_of(job.interface.examples[0].numpy(), how))
    samples = job.samples
    if samples is not None:
        unseen = {key: levels_of(values, how) for key, values in samples.unseen.items()}
        samples = replace(samples, samples={name: levels_of(samples.samples[name], how)}, unseen=unseen)
    certifier = Certifier(
        shown,
        batch_sizes(job.request.batch),
        class_axes=find_task(job.trained.card.task).class_axes,
        outputs=job.interface.outputs,
    )
    interface = replace(job.interface, examples=(example,))
    return replace(job, interface=interface, samples=samples, certifier=certifier), shown
