"""Counts: what a network consists of and does for one image.

Conventions.

*Multiply-adds* are those of convolutions and matrix products, one per multiplication; papers call them FLOPs, while
hardware peaks count two operations each. Additions of biases, BatchNorms, activations and pooling are not counted, as
in the published figures.

*Parameters* are trainable tensors: running statistics of BatchNorms are none. In an ONNX graph they are the
initializers of floating-point or 8-bit type.

*Traffic* is what operations read and write if nothing stays in a cache or a register between them: every operation
but a view reads its inputs and writes its outputs. *Least traffic* is what no implementation can avoid: every weight,
the network's input and its output once. The arithmetic intensity that bounds a roofline is taken over the least
traffic, so that no honest measurement can lie above the roof.

What depends on weights alone is computed once, when a graph is loaded, and not counted.

All figures but weights are for one image; a batch of N multiplies them by N and reads the weights once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict

from repmlp_deploy.precision import PRECISIONS

__all__ = ["WIDTHS", "Counts", "OpCount", "stage_of"]

WIDTHS = {name: entry.bytes_per_weight for name, entry in PRECISIONS.items()} | {"tf32": 4}
"""Bytes of one element of a weight or an activation."""

_STAGES = (
    (re.compile(r"(?:^|\.)stages\.(\d+)\."), 0),
    (re.compile(r"(?:^|\.)embeds\.(\d+)\."), 1),  # the convolution that leads into the next stage belongs to it
)
_NAMED_STAGES = {"conv_embedding": "embedding", "head_norm": "head"}


class OpCount(BaseModel):
    """One operation of the network.

    Attributes:
        op: its kind, as PyTorch or ONNX calls it.
        stage: the part of the network it belongs to.
        macs: multiply-adds an image.
        weight_elements: elements of weights it reads.
        activation_elements: elements of activations it reads and writes, an image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: str
    stage: str
    macs: int
    weight_elements: int
    activation_elements: int


class Counts(BaseModel):
    """What a network or a graph consists of and does for one image.

    Attributes:
        parameters: elements of trainable tensors.
        macs: multiply-adds an image.
        weight_elements: elements of weights that are read, once a batch.
        activation_elements: elements that operations read and write, an image.
        io_elements: elements of the network's input and output, an image.
        operations: one entry an operation, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    macs: int
    weight_elements: int
    activation_elements: int
    io_elements: int
    operations: tuple[OpCount, ...]

    @classmethod
    def of(cls, parameters: int, io_elements: int, operations: Iterable[OpCount]) -> Self:
        """Add up `operations`."""
        ops = tuple(operations)
        return cls(
            parameters=parameters,
            macs=sum(op.macs for op in ops),
            weight_elements=sum(op.weight_elements for op in ops),
            activation_elements=sum(op.activation_elements for op in ops),
            io_elements=io_elements,
            operations=ops,
        )

    def least_bytes(self, batch: int, precision: str = "fp32") -> int:
        """Return bytes that no implementation can avoid: the weights once, the input and the output."""
        return WIDTHS[precision] * (self.weight_elements + batch * self.io_elements)

    def intensity(self, batch: int, precision: str = "fp32") -> float:
        """Return operations (two per multiply-add) per byte of the least traffic."""
        return 2 * self.macs * batch / self.least_bytes(batch, precision)

    def by(self, attribute: str) -> dict[str, int]:
        """Return multiply-adds per image, summed by `op` or `stage`, in order of appearance."""
        sums: dict[str, int] = {}
        for op in self.operations:
            if op.macs:
                key = str(getattr(op, attribute))
                sums[key] = sums.get(key, 0) + op.macs
        return sums


def stage_of(name: str) -> str | None:
    """Return the stage that a module or weight of this dotted name belongs to; None for a name that says nothing."""
    for pattern, offset in _STAGES:
        match = pattern.search(f"{name}.")
        if match:
            return f"stage {int(match[1]) + offset}"
    first = name.split(".", maxsplit=1)[0]
    if "." not in name and first not in (*_NAMED_STAGES, "head"):
        return None
    return _NAMED_STAGES.get(first, first)
