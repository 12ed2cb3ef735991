"""Read the words of the command line. No framework is needed here."""

from __future__ import annotations

import difflib
import importlib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.card import Scores
from repmlp_deploy.errors import InputError
from repmlp_deploy.text import kind_and_line

__all__ = [
    "CALIBRATION_METHODS",
    "DEFAULT_METHOD",
    "DEFAULT_OPSET",
    "ENOUGH_SAMPLES",
    "GRAPHS",
    "INPUTS",
    "MERGES",
    "OPSETS",
    "SCORES",
    "check_merge",
    "find_named",
    "is_by_package",
    "parse_batch",
    "parse_crop",
    "parse_levels",
    "parse_model",
    "parse_profiles",
    "parse_resize",
    "parse_size",
    "require_choice",
    "whole_range",
]

GRAPHS = ("folded", "merged")
INPUTS = ("float32", "uint8")
MERGES = ("auto", "blocks", "regions", "hooks")
"""How a network is merged, besides PACKAGE:FUNCTION."""
CALIBRATION_METHODS = ("minmax", "entropy", "percentile")
DEFAULT_METHOD = "minmax"
ENOUGH_SAMPLES = 32
"""Calibration samples below which int8 ranges are a guess: a warning says so."""
DEFAULT_OPSET = 20
"""The first with Gelu."""
OPSETS = range(18, 24)
"""What torch's exporter writes by itself; version 18 is that of ONNX Runtime 1.14."""
SCORES: tuple[str, ...] = get_args(Scores)
LARGEST_BATCH = 65_536
LARGEST_EDGE = 16_384
MOST_PROFILES = 16
MOST_CHANNELS = 64
_LARGEST_LEVEL = 1e6
_LONGEST_RANGE = 40
_LONGEST_NAME = 200
_TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?")
_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_WEIGHTS_OF_TIMM = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_model_args"),
    *("checkpoint_path", "cache_dir"),
)
_NAMED = {"--module": ("factory", "holds no network"), "--merge": ("function", "merges no network")}


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
        raise InputError(f"--batch is {text}; MIN, OPT and MAX must be in ascending order")
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


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """Read name and arguments of `timm:NAME[,key=value…]`; a value is a number, a size HxW, true, false or a word.

    Raises:
        InputError: it is something else, or an argument would read or download weights.
    """
    package, _, rest = text.partition(":")
    name, *words = rest.split(",")
    if package != "timm" or not _TIMM_NAME.fullmatch(name) or len(text) > _LONGEST_NAME:
        raise InputError(
            f"--model is {text[:_LONGEST_NAME]!r}; expected timm:NAME[,key=value…], as timm:repvgg_a0; "
            "the name of a card goes to --card"
        )
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier() or not value:
            raise InputError(f"--model {text}: {word!r} is no key=value")
        if key in _WEIGHTS_OF_TIMM:
            raise InputError(f"--model {text}: {key} is about weights, which come from --ckpt alone: drop it")
        arguments[key] = _literal(text, value)
    return name, arguments


def _literal(text: str, value: str) -> int | float | bool | tuple[int, int] | str:
    """Return the number, size, truth value or word that is written."""
    if value in ("true", "false", "True", "False"):
        return value.lower() == "true"
    size = _size(value)
    if size is not None:
        return size
    try:
        number = float(value)
    except ValueError:
        if not _WORD.fullmatch(value):
            raise InputError(f"--model {text}: {value!r} is no number, size or word") from None
        return value
    if not abs(number) <= LARGEST_BATCH:
        raise InputError(f"--model {text}: {value} is larger than {LARGEST_BATCH}")
    return int(number) if value.lstrip("-").isdigit() else number


def parse_size(text: str) -> tuple[int, int]:
    """Read (H, W) from `HxW`.

    Raises:
        InputError: it is something else.
    """
    size = _size(text)
    if size is None:
        raise InputError(
            f"--input-size is {text[:_LONGEST_RANGE]!r}; expected HxW, such as 224x224, each up to {LARGEST_EDGE}"
        )
    return size


def parse_resize(text: str) -> tuple[str, tuple[int, int] | None]:
    """Read (`exact`, (H, W)) from `HxW`, (`short-edge`, (N, N)) from `N`, or (`none`, None).

    Raises:
        InputError: it is something else.
    """
    if text == "none":
        return "none", None
    size = _size(text)
    if size is not None:
        return "exact", size
    if len(text) <= _LONGEST_RANGE and _is_count(text, LARGEST_EDGE):
        return "short-edge", (int(text), int(text))
    raise InputError(
        f"--resize is {text[:_LONGEST_RANGE]!r}; expected HxW, the length of the shorter edge, or none, "
        f"up to {LARGEST_EDGE}"
    )


def parse_crop(text: str) -> tuple[int, int] | str:
    """Read (H, W) from `HxW`, or `none`.

    Raises:
        InputError: it is something else.
    """
    size = "none" if text == "none" else _size(text)
    if size is None:
        raise InputError(f"--crop is {text[:_LONGEST_RANGE]!r}; expected HxW, each up to {LARGEST_EDGE}, or none")
    return size


def parse_levels(option: str, text: str) -> tuple[float, ...]:
    """Read one number per channel, comma-separated.

    Raises:
        InputError: it is something else, or a number is no level.
    """
    try:
        values = tuple(float(word) for word in text.split(",", MOST_CHANNELS))
    except ValueError:
        values = ()
    finite = all(math.isfinite(value) and abs(value) <= _LARGEST_LEVEL for value in values)
    if not finite or not 0 < len(values) <= MOST_CHANNELS:
        raise InputError(
            f"{option} is {text[:_LONGEST_RANGE]!r}; expected one number per channel, such as 123.7,116.3,103.5"
        )
    return values


def _size(text: str) -> tuple[int, int] | None:
    parts = text.lower().split("x") if len(text) <= _LONGEST_RANGE else []
    if len(parts) != 2 or not all(_is_count(part, LARGEST_EDGE) for part in parts):  # noqa: PLR2004
        return None
    return int(parts[0]), int(parts[1])


def check_merge(merge: str) -> None:
    """Raise InputError unless `merge` is one of `MERGES` or has the form PACKAGE:FUNCTION."""
    if ":" not in merge:
        require_choice("--merge", merge, MERGES, ("PACKAGE:FUNCTION",))
        return
    _split_name("--merge", merge)


def is_by_package(merge: str) -> bool:
    """Return whether the network's own package merges it."""
    return merge == "hooks" or ":" in merge


def find_named(option: str, text: str) -> Any:
    """Import what `package.module:name` names; modules in the working folder are found.

    Raises:
        InputError: there is nothing of that name.
    """
    module_name, name = _split_name(option, text)
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{option} {text}: {error}") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code raises anything
        raise InputError(f"{option} {text}: importing it fails: {kind_and_line(error)}") from None
    finally:
        sys.path.pop(0)
    if not hasattr(module, name):
        raise InputError(f"{option} {text}: {module_name} has no {name}")
    return getattr(module, name)


def _split_name(option: str, text: str) -> tuple[str, str]:
    module_name, _, name = text.partition(":")
    kind, purpose = _NAMED[option]
    if not module_name or not name.isidentifier() or len(text) > _LONGEST_NAME:
        raise InputError(f"{option} is {text[:_LONGEST_NAME]!r}; expected package.module:{kind}")
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(f"{option} {text}: {module_name} is no module's name; expected it as `import` takes it")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise InputError(f"{option} {text}: {module_name} is a module of Python and {purpose}; name or rename your own")
    return module_name, name


def require_choice(option: str, value: str, choices: Sequence[str], aliases: Sequence[str] = ()) -> None:
    """Raise InputError with the nearest suggestion unless `value` is one of `choices`."""
    if value not in choices:
        near = difflib.get_close_matches(value, [*choices, *aliases], n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}"
        raise InputError(f"{option} {value}: unknown; {hint}")
