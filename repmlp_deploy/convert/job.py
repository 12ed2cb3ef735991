"""An export under way: what the steps after loading share. Nothing in it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from torch import nn

from repmlp_deploy.bundle import ArtifactEntry, FileEntry, Hop, describe_file
from repmlp_deploy.convert.graph.calibrate import Calibration
from repmlp_deploy.convert.proof.certificate import Certifier
from repmlp_deploy.convert.proof.weights import match_weights
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.source.own_network import Interface
from repmlp_deploy.convert.source.trained import Trained
from repmlp_deploy.convert.step import Clock

__all__ = ["Artifact", "Graphs", "Job"]


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
        digests: SHA-256 of the exported and of the simplified graph.
    """

    fp32: bytes | None
    lowered: bytes | None
    about: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def lowered_sha256(self) -> str | None:
        """The digest of `lowered` if it is known already: computing it twice takes a second."""
        same = self.lowered is not None and self.lowered is self.fp32
        return self.digests.get("simplified", self.digests["exported"]) if same else None


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
