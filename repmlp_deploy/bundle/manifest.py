"""The manifest: what `manifest.json` says, as frozen types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from repmlp_deploy.card import Preprocessing

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "ArtifactEntry",
    "BatchRange",
    "FileEntry",
    "Hop",
    "Manifest",
    "TensorSpec",
    "Verdict",
]

SCHEMA = 1
MANIFEST = "manifest.json"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """A file of the bundle: a plain name inside it, its SHA-256 and its length."""

    path: FileName
    sha256: Digest
    bytes: Annotated[int, Field(ge=0)]


class ArtifactEntry(FileEntry):
    """One deployable artifact; what else a format records about itself stays beside these fields."""

    model_config = ConfigDict(frozen=True, extra="allow")

    precision: str
    companions: tuple[FileEntry, ...] = ()


class TensorSpec(_Frozen):
    """An input or output: `shape` has None for the batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class BatchRange(_Frozen):
    """Batch sizes that the artifacts serve, and the one they are best at."""

    min: Annotated[int, Field(gt=0)]
    opt: Annotated[int, Field(gt=0)]
    max: Annotated[int, Field(gt=0)]


class Hop(_Frozen):
    """One line of the certificate: what was compared with the trained network, and how close it came.

    Every sample has a floor of its own; `max_abs`, `floor`, `allowed`, `ratio` and `margin` are those of the sample
    that comes closest to what it is allowed.

    Attributes:
        name: the step.
        batch: size of the batch it ran with; 0 where nothing ran and weights were compared.
        max_abs: largest absolute error against the trained network in float64.
        mean_abs: mean absolute error.
        max_rel: `max_abs` over the largest absolute reference.
        between: relative error of the differences between samples.
        cosine: smallest cosine of a sample.
        top1: share of samples with the same largest class.
        floor: noise floor, the trained network's own error in float32.
        allowed: largest `max_abs` that passes.
        passed: whether it did; None for the floor itself.
        note: anything a reader must know.
        ratio: `max_abs` over `floor`.
        margin: `allowed` over `max_abs`; None where the error is nothing.
        sample: the sample of the probe, from 0; None where weights were compared.
    """

    name: str
    batch: int
    max_abs: float
    mean_abs: float
    max_rel: float
    between: float | None
    cosine: float
    top1: float | None
    floor: float
    allowed: float
    passed: bool | None
    note: str = ""
    ratio: float | None = None
    margin: float | None = None
    sample: int | None = None


class Verdict(_Frozen):
    """What the certificate comes to.

    Attributes:
        passed: whether every hop did.
        margin: the smallest of them: how often the largest error fits into what is allowed; None where none has one.
        closest: the hop with that margin.
    """

    passed: bool
    margin: float | None
    closest: str | None

    @classmethod
    def of(cls, hops: Sequence[Hop]) -> Verdict:
        """The verdict on these hops."""
        judged = [hop for hop in hops if hop.passed is not None]
        closest = min((hop for hop in judged if hop.margin is not None), key=lambda hop: hop.margin or 0, default=None)
        return cls(
            passed=all(hop.passed for hop in judged),
            margin=None if closest is None else closest.margin,
            closest=None if closest is None else closest.name,
        )


class Manifest(_Frozen):
    """`manifest.json`.

    `input` and `output` are the only ones, or the first of several; then `inputs` and `outputs` hold them all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    name: str
    family: str
    task: str
    graph: str
    input: TensorSpec
    output: TensorSpec
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    batch: BatchRange
    artifacts: dict[str, ArtifactEntry]
    probe: FileEntry
    certificate: tuple[Hop, ...]
    verdict: Verdict | None = None
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"
