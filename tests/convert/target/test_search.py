"""Few builds find few parts, and what is returned was judged, whatever the judge is like."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from repmlp_deploy.convert.target.search import fewest_kept

PARTS = [f"block{i:02}" for i in range(32)]


class Judge:
    """Holds if every part that is needed is kept; remembers what it judged."""

    def __init__(self, needed: Sequence[str]) -> None:
        self.needed, self.judged = set(needed), []

    def __call__(self, kept: Sequence[str]) -> bool:
        self.judged.append(tuple(kept))
        return self.needed <= set(kept)


def test_a_beginning_of_the_ranking_takes_a_logarithm_of_builds() -> None:
    judge = Judge(PARTS[:9])
    assert fewest_kept(PARTS, judge, gives_back=0) == PARTS[:9]
    assert len(judge.judged) == 5


def test_single_parts_are_given_back_the_least_sensitive_first() -> None:
    judge = Judge([PARTS[0], PARTS[4]])
    assert fewest_kept(PARTS, judge, gives_back=8) == [PARTS[0], PARTS[4]]
    assert judge.judged[5:] == [
        (*PARTS[:3], PARTS[4]),
        (*PARTS[:2], PARTS[4]),
        (PARTS[0], PARTS[4]),
        (PARTS[4],),
    ]
    assert fewest_kept(PARTS, Judge(judge.needed), gives_back=1) == [*PARTS[:3], PARTS[4]]


def test_no_part_at_all_is_tried_where_that_may_suffice() -> None:
    assert fewest_kept(PARTS, Judge([]), gives_back=8, empty_fails=False) == []
    judge = Judge([])
    assert fewest_kept(PARTS, judge, gives_back=8) == PARTS[:1]
    assert () not in judge.judged


@given(st.sets(st.integers(0, 2**6 - 1)), st.integers(0, 6))
def test_whatever_is_returned_was_judged_to_hold(holding: set[int], gives_back: int) -> None:
    """Also where keeping more is worse, as it can be on few images."""
    parts = PARTS[:6]
    judged = {tuple(parts): True}

    def holds(kept: Sequence[str]) -> bool:
        code = sum(1 << parts.index(part) for part in kept)
        judged[tuple(kept)] = code in holding
        return code in holding

    assert judged[tuple(fewest_kept(parts, holds, gives_back=gives_back))]
