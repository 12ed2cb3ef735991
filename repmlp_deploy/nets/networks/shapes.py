"""Infer a RepMLP block of 2021, trained or merged, from the shapes of its weights, and count layers and branches.

FC3 holds the area of a partition, FC1 the number of partitions: their product is the area of the map. Edges are not
told, so that squares are assumed unless the input's size is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BlockShapes", "branch_kernels", "count_layers", "partition_of", "read_block", "square_input"]


@dataclass(frozen=True)
class BlockShapes:
    """One block.

    Attributes:
        channels: C.
        area: h·w.
        groups: of FC3.
        partitions: how many.
        reduction: inputs of the global perceptron over its width.
        kernels: of the branches; empty in a merged block.
    """

    channels: int
    area: int
    groups: int
    partitions: int
    reduction: int
    kernels: tuple[int, ...]


def read_block(shapes: Mapping[str, Sequence[int]], prefix: str, *, channels: int) -> BlockShapes:
    """Infer the block whose keys begin with `prefix` and that maps `channels` to `channels`.

    Raises:
        KeyError: it has no FC3.
    """
    fc3 = shapes[f"{prefix}fc3.weight"]  # (C·h·w, C·h·w / groups, 1, 1)
    fc1 = shapes.get(f"{prefix}fc1_fc2.fc1.weight")  # (width, C·partitions)
    return BlockShapes(
        channels=channels,
        area=fc3[0] // channels,
        groups=fc3[0] // fc3[1],
        partitions=1 if fc1 is None else fc1[1] // channels,
        reduction=1 if fc1 is None else max(1, fc1[1] // fc1[0]),
        kernels=branch_kernels(shapes, prefix),
    )


def branch_kernels(shapes: Mapping[str, Sequence[int]], prefix: str) -> tuple[int, ...]:
    """Return the kernels of the branches of the block whose keys begin with `prefix`, the smallest first."""
    return tuple(sorted(_numbers(shapes, f"{prefix}repconv")))


def count_layers(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """Return how many numbered layers have keys that begin with `prefix`; one that is missing in between counts."""
    return 1 + max(_numbers(shapes, prefix), default=-1)


def _numbers(shapes: Mapping[str, Sequence[int]], prefix: str) -> set[int]:
    return {int(key.removeprefix(prefix).split(".")[0]) for key in shapes if key.startswith(prefix)}


def square_input(blocks: Sequence[tuple[int, BlockShapes]]) -> tuple[int, int]:
    """Return the (H, W) of the only square input whose maps have these numbers of partitions of these areas.

    Args:
        blocks: stride of a block's map, and the block.

    Raises:
        ValueError: there is none.
    """
    areas = [block.area * block.partitions for _, block in blocks]
    edges = {math.isqrt(area) * stride for area, (stride, _) in zip(areas, blocks, strict=True)}
    if any(math.isqrt(area) ** 2 != area for area in areas) or len(edges) != 1:
        said = ", ".join(str(area) for area in areas)
        raise ValueError(f"RepMLP blocks cover {said} positions a stage, no square input's maps: pass --input-size HxW")
    edge = edges.pop()
    return edge, edge


def partition_of(area: int, maps: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (h, w) of `area` positions that divides every map (H, W): the square, or the only rectangle.

    Raises:
        ValueError: there is none, or several.
    """
    edges = [(h, area // h) for h in range(1, area + 1) if not area % h]
    fits = [(h, w) for h, w in edges if not any(H % h or W % w for H, W in maps)]
    best = [(h, w) for h, w in fits if h == w] or fits
    if len(best) != 1:
        said = ", ".join(f"{h}x{w}" for h, w in fits) or "none"
        raise ValueError(f"partitions have {area} positions; those that divide the maps: {said}: give a card")
    return best[0]
