"""The manifest: what `manifest.json` says, as frozen types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from repmlp_deploy.bundle.records import Origin
from repmlp_deploy.card import Label, Preprocessing, Scores, count_classes
from repmlp_deploy.errors import BundleError
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.text import first_fault

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

R = TypeVar("R", bound=BaseModel)

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """A file of the bundle: a plain name inside it, its SHA-256 and its length."""

    path: FileName
    sha256: Digest
    bytes: Annotated[int, Field(ge=0)]


def _known_precision(name: str) -> str:
    if name not in PRECISIONS:
        raise ValueError(f"expected one of {', '.join(PRECISIONS)}")
    return name


class ArtifactEntry(FileEntry):
    """One deployable artifact; what else a format records about itself stays beside these fields."""

    model_config = ConfigDict(frozen=True, extra="allow")

    precision: Annotated[str, AfterValidator(_known_precision)]
    companions: tuple[FileEntry, ...] = ()

    def record(self, kind: type[R], called: str = "") -> R:
        """Return what the format records about itself, as a type.

        Args:
            kind: of the record.
            called: the artifact, in a message; default: its file.

        Raises:
            BundleError: it is not such a record.
        """
        return _checked(kind, self.model_extra or {}, called or self.path)


class TensorSpec(_Frozen):
    """An input or output; `shape` has None for the batch."""

    name: Annotated[str, Field(max_length=256)]
    dtype: Literal["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    shape: Annotated[tuple[Annotated[int, Field(gt=0, le=1 << 24)] | None, ...], Field(min_length=1, max_length=8)]


class BatchRange(_Frozen):
    """Batch sizes that the artifacts serve, and the one they are best at."""

    min: Annotated[int, Field(gt=0)]
    opt: Annotated[int, Field(gt=0)]
    max: Annotated[int, Field(gt=0, le=65_536)]

    @model_validator(mode="after")
    def _rising(self) -> BatchRange:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"batch sizes must not fall: {self.min}:{self.opt}:{self.max}")
        return self


class Hop(_Frozen):
    """One row of the certificate: what was compared with the trained network, and how close it came.

    Every sample has a floor of its own; `max_abs`, `floor`, `allowed`, `ratio` and `margin` are those of the sample
    that comes closest to its limit.

    Attributes:
        name: the step.
        kind: `output` of a network or graph; `weights`, compared one by one; `floor`, the trained network in float32.
        artifact: the format whose graph ran or whose constants were compared; empty for networks of PyTorch.
        precision: whose tolerance applies, an entry of `PRECISIONS` or `fp64`; empty in bundles that do not say it.
        batch: size of the batch it ran with; None for weights.
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
        sample: the sample of the probe, from 0; None for weights.
    """

    name: str
    kind: Literal["output", "weights", "floor"]
    artifact: str = ""
    precision: str = ""
    batch: int | None
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

    @model_validator(mode="before")
    @classmethod
    def _with_kind(cls, data: Any) -> Any:
        """Read rows of bundles that tell weights by a batch of 0, and the graph by the step's name."""
        if not isinstance(data, dict) or "kind" in data:
            return data
        kind = "floor" if data.get("passed") is None else "output" if data.get("batch") else "weights"
        words = str(data.get("name", "")).replace(",", "").split()
        artifact = "onnx" if "ONNX" in words else "openvino" if "OpenVINO" in words else ""
        told = "fp32" if artifact and "refitted" not in words else ""  # a refit named no precision
        precision = next((word for word in words if word in PRECISIONS), told)
        return {**data, "kind": kind, "batch": data.get("batch") or None, "artifact": artifact, "precision": precision}


class Verdict(_Frozen):
    """What follows from the certificate.

    Attributes:
        passed: whether every row passed.
        margin: the smallest margin: how often the largest error fits into what is allowed; None if no row has one.
        closest: the row with that margin.
    """

    passed: bool
    margin: float | None
    closest: str | None

    @classmethod
    def of(cls, hops: Sequence[Hop]) -> Verdict:
        """Return the verdict on these rows."""
        judged = [hop for hop in hops if hop.passed is not None]
        closest = min((hop for hop in judged if hop.margin is not None), key=lambda hop: hop.margin or 0, default=None)
        return cls(
            passed=all(hop.passed for hop in judged),
            margin=None if closest is None else closest.margin,
            closest=None if closest is None else closest.name,
        )


class Manifest(_Frozen):
    """`manifest.json`.

    `scores` says how logits become probabilities; None means softmax, or sigmoid for a single logit. `warnings` are
    what may make answers wrong, such as preprocessing that nobody confirmed; every command repeats them.

    The verdict is derived from the certificate: a file that says another one is not believed. `input` and `output` in
    the file are the first of `inputs` and `outputs`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    name: str
    family: str
    task: str
    graph: str
    inputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    preprocessing: Preprocessing
    labels: Annotated[tuple[Label, ...], Field(max_length=100_000)] | None
    scores: Scores | None = None
    batch: BatchRange
    artifacts: dict[str, ArtifactEntry]
    probe: FileEntry
    certificate: tuple[Hop, ...]
    provenance: dict[str, Any]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_what_follows(cls, data: Any) -> Any:
        """Take `inputs` and `outputs` from the file's two forms, and drop what is derived."""
        if not isinstance(data, dict):
            return data
        kept = {key: value for key, value in data.items() if key not in ("input", "output", "verdict")}
        for several, one in (("inputs", "input"), ("outputs", "output")):
            if not kept.get(several) and one in data:
                kept[several] = [data[one]]
        return kept

    @model_validator(mode="after")
    def _one_label_per_class(self) -> Manifest:
        if self.task == "classify" and len(self.outputs[0].shape) > 1:
            classes = self.classes  # checks the scores
            if self.labels is not None and len(self.labels) != classes:
                raise ValueError(f"{len(self.labels)} labels for {classes} classes")
        return self

    @property
    def classes(self) -> int:
        """Classes that the first output distinguishes; a single logit distinguishes no and yes."""
        outputs = (self.outputs[0].shape[1] if len(self.outputs[0].shape) > 1 else None) or 0
        return count_classes(outputs, self.scores) if self.task == "classify" else outputs

    @property
    def input(self) -> TensorSpec:
        """The first input."""
        return self.inputs[0]

    @property
    def image_size(self) -> tuple[int | None, ...]:
        """(height, width) of the first input, if it is a map: (N, C, H, W), or (N, H, W, C) levels."""
        shape = self.input.shape
        return shape[1:3] if self.preprocessing.input == "uint8" else shape[2:]

    @property
    def output(self) -> TensorSpec:
        """The first output."""
        return self.outputs[0]

    @property
    def verdict(self) -> Verdict:
        """What follows from the certificate."""
        return Verdict.of(self.certificate)

    @property
    def origin(self) -> Origin:
        """What the bundle was made from.

        Raises:
            BundleError: the manifest says it in another form.
        """
        return _checked(Origin, self.provenance, MANIFEST)

    def as_json(self) -> dict[str, Any]:
        """Return what the file holds, as JSON's own types."""
        data = self.model_dump(mode="json", by_alias=True)
        data |= {"input": data["inputs"][0], "output": data["outputs"][0]}
        data |= {key: data[key] if len(data[key]) > 1 else [] for key in ("inputs", "outputs")}
        data["verdict"] = self.verdict.model_dump(mode="json")
        return {key: data[key] for key in _ORDER}

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n"


_ORDER: tuple[str, ...] = (
    "schema",
    "name",
    "family",
    "task",
    "graph",
    "input",
    "output",
    "inputs",
    "outputs",
    "preprocessing",
)
_ORDER += ("labels", "scores", "batch", "artifacts", "probe", "certificate", "verdict", "provenance")
_ORDER += ("warnings", "notes")


def _checked(kind: type[R], data: Any, where: str) -> R:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        place, said = first_fault(error)
        raise BundleError(f"the manifest's {where}: {place}: {said}; export the checkpoint again") from None
