"""Find the state dict in what a checkpoint holds.

Training code stores weights in many ways: at the top level, under `model` or `state_dict`, beside an exponential moving
average. A state dict is any mapping with tensors in it, at most three levels deep.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from repmlp_deploy.convert.source.checkpoint import Placeholder
from repmlp_deploy.errors import CheckpointError, InputError

__all__ = ["Selected", "is_averaged", "plain_key", "select_weights"]

_DEEPEST = 3
_WRAPPERS = ("module", "_orig_mod")
_MODEL_NAMES = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "module")
_EMA = re.compile(r"(^|_)(ema|averaged|swa)(_|$)")


@dataclass(frozen=True)
class Selected:
    """The state dict that was chosen among those in a file.

    Attributes:
        found: the file's key to what it holds.
        path: the keys that lead to it, joined by dots.
        others: the paths of the others.
        notes: what a reader of the report should know.
    """

    found: Mapping[str, Any]
    path: str
    others: tuple[str, ...]
    notes: tuple[str, ...] = ()


def select_weights(content: Any, weights: str | None, name: str, state_key: str | None = None) -> Selected:
    """Return the state dict to use among those in `content`.

    Args:
        content: as `read_checkpoint` returns it.
        weights: `model` or `ema`; by default `model`, or the only one there is.
        name: what messages call the file.
        state_key: the path of keys to the state dict, joined by dots, instead of `weights`.

    Raises:
        CheckpointError: there is none, or not the one that was asked for.
        InputError: both `weights` and `state_key` say which one.
    """
    if weights is not None and state_key is not None:
        raise InputError(f"--weights {weights} and --state-key {state_key} both say which weights to read: drop one")
    if isinstance(content, Placeholder):
        content = content.content
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}; expected a state dict or a dictionary of them")
    places = _places(content)
    if state_key is None:
        chosen, notes = _usual(content, places, weights, name)
    else:
        found = next((place for place in places if place.path == state_key), None)
        if found is None:
            have = ", ".join(place.path or "its top level" for place in places) or "none"
            raise CheckpointError(f"{name} holds no state dict under {state_key}; it has: {have}")
        chosen, notes = found, ()
    odd = next((key for key in chosen.found if not isinstance(key, str)), None)
    if odd is not None:
        raise CheckpointError(f"{name} has the key {odd!r}; expected names")
    others = tuple(place.path or "its top level" for place in places if place.path != chosen.path)
    return Selected(chosen.found, chosen.path, others, notes)


def _usual(
    content: Mapping[Any, Any], places: list[_Place], weights: str | None, name: str
) -> tuple[_Place, tuple[str, ...]]:
    """Return the likeliest place with `weights`, and what to say of it."""
    if not places:
        keys = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
        raise CheckpointError(f"{name} holds no state dict; its keys are {keys}")
    swapped = _swapped_by_mmengine(content)
    if swapped:
        places = [place.swapped() if place.path in ("state_dict", "ema_state_dict") else place for place in places]
    likely = [place for place in places if place.weights] or places
    kinds = {place.kind: place for place in reversed(likely)}
    if weights is not None and weights not in kinds:
        raise CheckpointError(f"{name} holds no {weights} weights, only {', '.join(kinds)}: drop --weights {weights}")
    usual = "ema" if "model" not in kinds or (swapped and "ema" in kinds) else "model"
    chosen = kinds[weights or usual]
    twin = next((place for place in likely if place is not chosen and place.is_alike(chosen)), None)
    if twin is not None:
        raise CheckpointError(
            f"{name} holds weights of the same names under {chosen.path} and {twin.path}: say which with --state-key"
        )
    if chosen.kind == "model":
        return chosen, ()
    if swapped:
        return chosen, ("mmengine saved the averaged (EMA) weights as state_dict: these are used",)
    alone = f"{name} holds no other weights than the averaged (EMA) ones under {chosen.path}: these are used"
    return chosen, () if weights == "ema" else (alone,)


def is_averaged(path: Sequence[str]) -> bool:
    """Return whether the names that lead to weights say that they are a moving average."""
    return any(_EMA.search(part) for part in path)


def plain_key(key: str) -> str:
    """Return a key without the parts that wrappers of networks add."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class _Place:
    """A state dict in a file: `model` or `ema`, the path to it, and what it holds."""

    kind: str
    path: str
    found: Mapping[str, Any]

    @property
    def weights(self) -> int:
        """How many tensors have more than one number: a counter, a decay or the best accuracy is no weight."""
        return sum(isinstance(value, Tensor) and value.numel() > 1 for value in self.found.values())

    @property
    def rank(self) -> int:
        """The smaller, the likelier it is the model."""
        known = [_MODEL_NAMES.index(part) for part in self.path.split(".") if part in _MODEL_NAMES]
        return min(known, default=len(_MODEL_NAMES))

    def is_alike(self, other: _Place) -> bool:
        """Return whether only the order in the file speaks for one of two places."""
        alike = self.kind == other.kind and self.path.count(".") == other.path.count(".") and self.rank == other.rank
        return alike and {plain_key(str(key)) for key in self.found} == {plain_key(str(key)) for key in other.found}

    def swapped(self) -> _Place:
        return _Place("model" if self.kind == "ema" else "ema", self.path, self.found)


def _places(content: Mapping[Any, Any]) -> list[_Place]:
    """Return every state dict in `content`, the likeliest first."""
    return sorted(_visited(content, ()), key=lambda place: place.rank)


def _visited(value: Any, path: tuple[str, ...]) -> list[_Place]:
    """Return the state dicts in a value, the outermost first.

    Tensors beside a state dict, such as the best accuracy, are none: a mapping around others is a state dict if it has
    at least as many weights as each of them.
    """
    inside = value.content if isinstance(value, Placeholder) else value
    if not isinstance(inside, Mapping):
        return []
    items = inside.items() if len(path) < _DEEPEST else ()
    nested = [place for key, item in items if isinstance(key, str) for place in _visited(item, (*path, key))]
    kind = "ema" if is_averaged(path) else "model"
    own = _Place(kind, ".".join(path), inside)
    if not any(isinstance(item, Tensor) for item in inside.values()):
        return nested
    return nested if any(place.weights > own.weights for place in nested) else [own, *nested]


def _swapped_by_mmengine(content: Mapping[Any, Any]) -> bool:
    """Return whether mmengine's EMA hook put the averaged weights in the place of the others."""
    meta = content.get("meta")
    inside = meta.content if isinstance(meta, Placeholder) else meta
    return (
        isinstance(content.get("ema_state_dict"), Mapping)
        and isinstance(content.get("state_dict"), Mapping)
        and isinstance(inside, Mapping)
        and "mmengine_version" in inside
    )
