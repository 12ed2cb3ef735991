"""Read the words of the command line. No framework is needed here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.errors import InputError

__all__ = [
    "CALIBRATION_METHODS",
    "GRAPHS",
    "parse_batch",
    "parse_profiles",
    "parse_size",
    "require_choice",
    "whole_range",
]

GRAPHS = ("folded", "merged")
CALIBRATION_METHODS = ("minmax", "entropy", "percentile")
LARGEST_BATCH = 65_536
LARGEST_EDGE = 16_384
MOST_PROFILES = 16
_LONGEST_RANGE = 40


def _is_count(word: str, largest: int) -> bool:
    return word.isascii() and word.isdigit() and 0 < int(word) <= largest


def parse_batch(text: str | int) -> BatchRange:
    """Read `MIN:OPT:MAX`, or one size that is fixed.

    Raises:
        InputError: it is neither, or the three do not rise.
    """
    parts = str(text).split(":") if len(str(text)) <= _LONGEST_RANGE else []
    if len(parts) not in (1, 3) or not all(_is_count(part, LARGEST_BATCH) for part in parts):
        raise InputError(
            f"--batch is {str(text)[:_LONGEST_RANGE]!r}; expected MIN:OPT:MAX, such as 1:8:64, or one number up to "
            f"{LARGEST_BATCH}"
        )
    low, best, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    if not low <= best <= high:
        raise InputError(f"--batch is {text}; MIN, OPT and MAX must not fall")
    return BatchRange(min=low, opt=best, max=high)


def parse_profiles(text: str | int) -> tuple[BatchRange, ...]:
    """Read the ranges of `MIN:OPT:MAX[,MIN:OPT:MAX…]`, each an engine's optimisation profile.

    Raises:
        InputError: one of them is no range, or they leave out sizes between the smallest and the largest.
    """
    words = str(text).split(",")
    if len(words) > MOST_PROFILES:
        raise InputError(f"--batch has {len(words)} ranges; at most {MOST_PROFILES}")
    profiles = tuple(parse_batch(part.strip()) for part in words)
    reached = 0
    for profile in sorted(profiles, key=lambda profile: profile.min):
        if reached and profile.min > reached + 1:
            raise InputError(f"--batch {text} leaves out sizes {reached + 1} to {profile.min - 1}; widen a range")
        reached = max(reached, profile.max)
    return profiles


def whole_range(profiles: Sequence[BatchRange]) -> BatchRange:
    """Return the range from the smallest size to the largest; the last range says which size is best."""
    return BatchRange(min=min(p.min for p in profiles), opt=profiles[-1].opt, max=max(p.max for p in profiles))


def parse_size(text: str) -> tuple[int, int]:
    """Read (H, W) from `HxW`.

    Raises:
        InputError: it is something else.
    """
    parts = text.lower().split("x") if len(text) <= _LONGEST_RANGE else []
    if len(parts) != 2 or not all(_is_count(part, LARGEST_EDGE) for part in parts):  # noqa: PLR2004
        raise InputError(
            f"--input-size is {text[:_LONGEST_RANGE]!r}; expected HxW, such as 224x224, each up to {LARGEST_EDGE}"
        )
    return int(parts[0]), int(parts[1])


def require_choice(option: str, value: str, choices: Sequence[str], aliases: Sequence[str] = ()) -> None:
    """Raise InputError with the nearest suggestion unless `value` is one of `choices`."""
    if value not in choices:
        near = difflib.get_close_matches(value, [*choices, *aliases], n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}"
        raise InputError(f"{option} {value}: unknown; {hint}")
