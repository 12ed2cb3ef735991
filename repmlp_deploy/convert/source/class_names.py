"""The class names that training code saved beside the weights.

They are looked for under the names that libraries give them: `dataset_meta.classes` of mmengine, `CLASSES` of mmcv
before it, `class_to_idx` of torchvision's data sets, `id2label` of transformers, `label_names` and `class_names` of
scripts. What is under such a name counts only if it is a list of texts, or numbers every class once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from repmlp_deploy.convert.source.checkpoint import Placeholder

__all__ = ["find_class_names"]

_NAMES = ("classes", "class_names", "class_to_idx", "idx_to_class", "id2label", "label2id", "label_names", "labels")
_DEEPEST = 3
_LONGEST = 512


def find_class_names(content: Any) -> tuple[str, ...] | None:
    """Return the class names in what a checkpoint holds, in the order of the logits; None if there are none.

    Args:
        content: as `read_checkpoint` returns it.
    """
    return next(_found(content, 0), None)


def _found(value: Any, depth: int) -> Iterator[tuple[str, ...]]:
    inside = value.content if isinstance(value, Placeholder) else value
    if not isinstance(inside, Mapping) or depth > _DEEPEST:
        return
    for key, item in inside.items():
        if isinstance(key, str) and key.lower() in _NAMES:
            names = _names(item)
            if names is not None:
                yield names
    for item in inside.values():
        yield from _found(item, depth + 1)


def _names(value: Any) -> tuple[str, ...] | None:
    """Return a list of texts, or the texts that are numbered from 0, in their order."""
    inside = value.content if isinstance(value, Placeholder) else value
    if isinstance(inside, Mapping):
        inside = _numbered(inside)
    if not isinstance(inside, list | tuple) or not inside:
        return None
    if not all(isinstance(name, str) and len(name) <= _LONGEST for name in inside):
        return None
    return tuple(inside)


def _numbered(mapping: Mapping[Any, Any]) -> list[Any] | None:
    """Return the texts of a mapping between names and numbers, either way round."""
    by_number: dict[int, Any] = {}
    for key, value in mapping.items():
        name, number = (key, value) if isinstance(value, int) else (value, key)
        if isinstance(number, str) and number.isdecimal() and len(number) < 7:  # noqa: PLR2004 - JSON's keys are texts
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool):
            return None
        by_number[number] = name
    if sorted(by_number) != list(range(len(mapping))):
        return None
    return [by_number[number] for number in range(len(mapping))]
