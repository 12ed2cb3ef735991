"""Which of many parts must stay in float32, found with few builds.

Parts are ranked, the most sensitive first. If accuracy only grows as more of them stay, the shortest beginning of the
ranking that holds is found by bisection, in log2 of their number. It need not be the smallest set that holds: a part
inside it may be there only because a more sensitive one follows. So single parts are given back, the least sensitive
first, for as long as that holds.

Every set that is returned was itself built and judged, also where accuracy does not only grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Holds", "fewest_kept"]

Holds = Callable[[Sequence[str]], bool]
"""Parts in float32 to whether that suffices."""


def fewest_kept(ranked: Sequence[str], holds: Holds, *, gives_back: int, empty_fails: bool = True) -> list[str]:
    """Return parts that suffice in float32, in the order of the ranking.

    Args:
        ranked: all parts, the most sensitive first; all of them together suffice.
        holds: builds and judges.
        gives_back: how many single parts to try to give back.
        empty_fails: whether it is known that no part at all does not suffice.
    """
    kept = list(ranked[: _shortest(ranked, holds, 0 if empty_fails else -1)])
    for part in list(reversed(kept[:-1]))[:gives_back]:  # the last one is needed, or bisection had ended before it
        fewer = [other for other in kept if other != part]
        if holds(fewer):
            kept = fewer
    return kept


def _shortest(ranked: Sequence[str], holds: Holds, fails: int) -> int:
    """Return the length of a beginning that suffices, while one part less does not."""
    suffices = len(ranked)
    while suffices - fails > 1:
        middle = (fails + suffices) // 2
        if holds(ranked[:middle]):
            suffices = middle
        else:
            fails = middle
    return suffices
