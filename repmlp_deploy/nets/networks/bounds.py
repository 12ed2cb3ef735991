"""The bounds of hyper-parameters: a card may say anything, and what is built grows with its numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = ["Count", "Counts", "Depth", "Depths"]

Count = Annotated[int, Field(gt=0, le=1_000_000)]
"""A width, an edge or a number of classes."""
Depth = Annotated[int, Field(gt=0, le=256)]
"""How many units a stage has."""
Counts = Annotated[tuple[Count, ...], Field(max_length=64)]
"""One number per stage or branch."""
Depths = Annotated[tuple[Depth, ...], Field(max_length=64)]
"""One number of units per stage."""
