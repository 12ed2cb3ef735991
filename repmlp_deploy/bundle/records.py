"""What artifacts and origins say of themselves in the manifest, as types.

In the file these stand beside the fields that every artifact has. A reader asks an entry for the record it needs:
`entry.record(GraphRecord)`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CheckpointOrigin",
    "EngineBuild",
    "EngineReport",
    "GraphRecord",
    "KeptAccuracy",
    "KeptNode",
    "MeasuredArtifact",
    "Origin",
    "Sensitivity",
    "Speed",
]


class Record(BaseModel):
    """A part of what is written; keys that a reader does not ask for are left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class KeptNode(Record):
    """A node that stays in float32, or several of one operator.

    Attributes:
        op: the operator.
        reason: why it stays.
        node: its name, for a product.
        module: the module it belongs to.
        count: how many there are, for anything else.
    """

    op: str
    reason: str
    node: str | None = None
    module: str = ""
    count: int | None = None

    def name(self) -> str:
        """Return what a report calls it."""
        return f"{self.count} {self.op}" if self.count is not None else self.module or self.node or self.op


class Sensitivity(Record):
    """The largest error when only this block is in the low precision."""

    block: str
    max_abs: float


class KeptAccuracy(Record):
    """How an artifact keeps its accuracy on labelled images.

    Attributes:
        max_drop: percentage points of top-1 that it may lose.
        drop: that it loses; negative where it is better.
        images: how many there are.
        source: where they are from.
        trained_top1: share that the trained network gets right, in float32.
        lowered_top1: that the artifact got right with nothing returned to float32.
        top1: that it gets right.
        kept: blocks with products that were returned to float32.
        products: how many products that are.
        builds: artifacts that were built and judged.
    """

    max_drop: float
    drop: float
    images: int
    source: str
    trained_top1: float
    lowered_top1: float
    top1: float
    kept: tuple[str, ...] = ()
    products: int = 0
    builds: int

    def summary(self) -> str:
        """Return it as a line."""
        before = f" ({100 * self.lowered_top1:.2f} % before)" if self.builds > 1 else ""
        kept = f"{self.products} products in {', '.join(self.kept)} are in float32" if self.kept else "all lowered"
        return (
            f"top-1 is {100 * self.top1:.2f} %{before} on {self.images} images; the trained network's is "
            f"{100 * self.trained_top1:.2f} %, so {self.drop:.3g} of {self.max_drop:g} points are lost; {kept}, after "
            f"{self.builds} {'builds' if self.builds > 1 else 'build'}"
        )


class GraphRecord(Record):
    """What an ONNX artifact says of its precision.

    Attributes:
        lowered: operator to the number of its nodes that compute in the precision.
        kept_fp32: what stays in float32.
        sensitivity: of every block, the worst first, if it was measured.
        accuracy: on labelled images, if it had to keep one.
    """

    lowered: dict[str, int] = {}
    kept_fp32: tuple[KeptNode, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    accuracy: KeptAccuracy | None = None

    def kept_products(self) -> tuple[str, ...]:
        """Return the names of the products that stay in float32."""
        return tuple(kept.node for kept in self.kept_fp32 if kept.node is not None)


class Speed(Record):
    """How fast an artifact was where it was made.

    Attributes:
        machine: a name of the processor and of how many of its cores the process had.
        device: it ran on.
        runtime: and its version.
        batch_ms: batch size to the milliseconds of the shortest run.
    """

    machine: Annotated[str, Field(max_length=100)]
    device: Annotated[str, Field(max_length=100)]
    runtime: Annotated[str, Field(max_length=200)]
    batch_ms: Annotated[
        dict[Annotated[int, Field(gt=0)], Annotated[float, Field(gt=0, allow_inf_nan=False)]],
        Field(min_length=1, max_length=8),
    ]


class MeasuredArtifact(Record):
    """What an artifact says of its speed; None where nothing was measured."""

    speed: Speed | None = None


class EngineBuild(Record):
    """The options of a build that decide what can be done with the engine later."""

    refittable: bool = False
    strip_weights: bool = False


class EngineReport(Record):
    """What a report shows of an engine.

    Attributes:
        version: the builder's.
        compute_capabilities: the GPUs it is for, such as `8.6`; None for the builder's own choice.
        profiles: input to its smallest, best and largest shape.
        layers: how many it has.
        product_types: type to the number of products that compute in it.
        build_seconds: of the build.
        weights_bytes: of its weights, if the builder tells.
        scratch_bytes: of its working memory, if the builder tells.
        warnings: of the builder.
        options: of the build.
    """

    version: str
    compute_capabilities: tuple[str, ...] | None
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...]
    layers: int
    product_types: dict[str, int]
    build_seconds: float
    weights_bytes: int | None = None
    scratch_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    options: EngineBuild = EngineBuild()


class CheckpointOrigin(Record):
    """The weights file that a bundle was made from.

    Attributes:
        file: its name.
        sha256: of its bytes.
        container: the path of keys to the weights in it, joined by dots; empty for its top level.
        ignored: patterns of keys that were left out.
        merged: whether its branches were merged already: the merged network took the trained one's place.
    """

    file: str = "an unnamed checkpoint"
    sha256: str = ""
    container: str = ""
    ignored: Annotated[tuple[Annotated[str, Field(max_length=1000)], ...], Field(max_length=1000)] = ()
    merged: bool = False


class Origin(Record):
    """What a bundle was made from, and when.

    Attributes:
        checkpoint: None for a network that was handed over in memory.
        model: `timm:NAME[,…]` for a network of timm; empty for any other.
        merge: how the network was merged, see `export`; bundles that do not say it hold merged blocks.
        by_name: whether a network of no family takes its inputs by name; None in older bundles.
        seconds: of every step.
        date: of the export.
    """

    checkpoint: CheckpointOrigin | None = None
    merge: Annotated[str, Field(max_length=200)] = "blocks"
    model: Annotated[str, Field(max_length=200)] = ""
    by_name: bool | None = None
    seconds: Annotated[dict[str, float], Field(default_factory=dict)]
    date: str = "an unknown date"
