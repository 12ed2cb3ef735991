"""The bounds of hyper-parameters: a card may say anything, and what is built grows with its numbers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, Field, model_validator

__all__ = ["Count", "Counts", "Depth", "Depths", "PerStage"]

Count = Annotated[int, Field(gt=0, le=1_000_000)]
"""A width, an edge or a number of classes."""
Depth = Annotated[int, Field(gt=0, le=256)]
"""How many units a stage has."""
Counts = Annotated[tuple[Count, ...], Field(max_length=64)]
"""One number per stage or branch."""
Depths = Annotated[tuple[Depth, ...], Field(max_length=64)]
"""One number of units per stage."""


class PerStage(BaseModel):
    """Hyper-parameters of which some are lists with one entry per stage.

    Attributes:
        per_stage: the names of these lists.
    """

    per_stage: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _one_entry_per_stage(self) -> Self:
        lists = {name: getattr(self, name) for name in self.per_stage if getattr(self, name) is not None}
        if len({len(values) for values in lists.values()}) > 1:
            said = ", ".join(f"{name} has {len(values)}" for name, values in lists.items())
            raise ValueError(f"every list has one entry per stage: {said}")
        return self
