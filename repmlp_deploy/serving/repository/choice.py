"""What is packed: a verified artifact under a model's name and version."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from repmlp_deploy.bundle import ArtifactEntry, Bundle, TensorSpec
from repmlp_deploy.errors import BundleError, InputError, VerificationError
from repmlp_deploy.precision import PRECISIONS

__all__ = ["Choice", "ImageStep", "Layout", "Packed", "computes_in"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME = 128
_LARGEST_VERSION = 2**31 - 1
_LONGEST_DELAY_MS = 10_000


@dataclass(frozen=True)
class ImageStep:
    """Preprocessing that a server runs itself.

    Attributes:
        graph: an ONNX file.
        image: its input, decoded images.
        tensor: its output, of the type and the shape of the network's input.
    """

    graph: bytes
    image: TensorSpec
    tensor: TensorSpec


@dataclass(frozen=True)
class Choice:
    """How a bundle is packed.

    Attributes:
        bundle: on disk.
        format: the artifact; None for the first that the server runs.
        name: of the model; None for the bundle's.
        version: of the model, a positive number.
        max_delay_ms: how long the server may wait to fill a batch.
        storage: where a cluster finds the repository; only some servers ask for it.
        images: None for a model that takes tensors alone.
    """

    bundle: Bundle
    format: str | None = None
    name: str | None = None
    version: int = 1
    max_delay_ms: float = 2.0
    storage: str | None = None
    images: ImageStep | None = None

    @property
    def model(self) -> str:
        """The model's name."""
        return self.name or self.bundle.manifest.name

    def check(self) -> None:
        """Raise unless the choice can be packed at all.

        Raises:
            InputError: the name, the version or the delay is none.
            VerificationError: the bundle's certificate has a row that failed.
        """
        if not _NAME.fullmatch(self.model) or len(self.model) > _LONGEST_NAME:
            raise InputError(f"--name is {self.model[:40]!r}; expected letters, digits, dots, dashes and underscores")
        if not 0 < self.version <= _LARGEST_VERSION:
            raise InputError(f"--model-version is {self.version}; expected 1 to {_LARGEST_VERSION}")
        if not 0 <= self.max_delay_ms <= _LONGEST_DELAY_MS:
            raise InputError(f"--max-delay-ms is {self.max_delay_ms:g}; expected 0 to {_LONGEST_DELAY_MS}")
        if not self.bundle.manifest.verdict.passed:
            raise VerificationError(f"{self.bundle.folder} has comparisons that failed: it is not packed; export again")

    def artifact(self, runs: Sequence[str], server: str) -> tuple[str, ArtifactEntry]:
        """Return the artifact to pack, one of those that the server runs, the preferred one first.

        Raises:
            InputError: the server does not run the one that was asked for.
            BundleError: the bundle has none that it runs.
        """
        artifacts = self.bundle.manifest.artifacts
        if self.format == "trt-rtx" and "trt" in runs:
            raise InputError(f"{server} runs plans of TensorRT, and trt-rtx is an engine of TensorRT-RTX: export trt")
        if self.format is not None and self.format not in runs:
            raise InputError(f"{server} runs {', '.join(runs)}; --format is {self.format}")
        wanted = [self.format] if self.format is not None else [name for name in runs if name in artifacts]
        if not wanted or wanted[0] not in artifacts:
            have = ", ".join(artifacts)
            raise BundleError(
                f"{self.bundle.folder} holds {have}; {server} runs {', '.join(runs)}: export one of these"
            )
        return wanted[0], artifacts[wanted[0]]


@dataclass(frozen=True)
class Packed:
    """What is written.

    Attributes:
        files: path inside the repository to content; those of one model version lie in one folder.
        model: the folder of the model inside the repository.
        version: the folder of the version inside the model's.
        unchecked: what no check here can tell, for the user to know.
    """

    files: Mapping[str, bytes]
    model: str
    version: str
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A server.

    Attributes:
        server: its name for people.
        pack: a choice to the files of a repository.
    """

    server: str
    pack: Callable[[Choice], Packed]


def computes_in(precision: str) -> str:
    """Return the type that OpenVINO must compute in for the artifact to be what was verified."""
    names = PRECISIONS[precision].openvino if precision in PRECISIONS else None
    return "f32" if names is None else names.computes
