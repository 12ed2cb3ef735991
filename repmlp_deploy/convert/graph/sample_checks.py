"""Whether calibration samples can be what the network will see.

int8 ranges fit the samples they were measured on, whatever these are: levels of 0 to 255 where normalised values
belong give ranges that are a hundred times too wide, and no comparison with the trained network on the same samples
shows it. So the samples are compared with what preprocessing can make of an image, and with photographs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repmlp_deploy.card import Preprocessing, data_root
from repmlp_deploy.errors import InputError

__all__ = ["check_samples"]

_SLACK = 0.1  # of the span of levels: filters overshoot, and augmentation brightens
_NARROW = 1 / 3  # of the deviation of photographs: a smaller one is of another scale, or of images without contrast
_WIDE = 3.0
_PHOTOGRAPHS = ("china", "flower")


def check_samples(samples: Mapping[str, NDArray[Any]], what: str, how: Preprocessing | None) -> list[str]:
    """Return what looks wrong about calibration samples.

    Args:
        samples: name of every input to (n, …).
        what: where they are from, for messages.
        how: what makes the input of an image; None for inputs that are no images.

    Raises:
        InputError: all samples are the same, or images normalised as `how` says cannot have these values.
    """
    warnings = _repeated(samples, what)
    if how is not None and len(samples) == 1:
        name, values = next(iter(samples.items()))
        _require_levels(name, values, what, how)
        warnings += _beside_photographs(values, how)
    return warnings


def _repeated(samples: Mapping[str, NDArray[Any]], what: str) -> list[str]:
    count = len(next(iter(samples.values())))
    distinct = len({_digest([values[i] for values in samples.values()]) for i in range(count)})
    if count > 1 and distinct == 1:
        raise InputError(f"{what}: all {count} samples are the same; int8 ranges need different ones")
    return [f"only {distinct} of the {count} calibration samples differ"] if distinct < count else []


def _digest(sample: Sequence[NDArray[Any]]) -> bytes:
    total = hashlib.sha256()
    for values in sample:
        total.update(values.tobytes())
    return total.digest()


def _require_levels(name: str, values: NDArray[Any], what: str, how: Preprocessing) -> None:
    """Raise unless every channel lies where normalisation puts levels of 0 to 255."""
    mean, std = np.asarray(how.mean), np.asarray(how.std)
    low, high = -mean / std, (255 - mean) / std
    slack = _SLACK * (high - low)
    axes = (0, *range(2, values.ndim))
    smallest, largest = values.min(axis=axes), values.max(axis=axes)
    wrong = np.flatnonzero((smallest < low - slack) | (largest > high + slack))
    if len(wrong):
        c = int(wrong[0])
        raise InputError(
            f"{what}: channel {c} of {name} goes from {smallest[c]:.4g} to {largest[c]:.4g}; normalised images lie "
            f"between {low[c]:.4g} and {high[c]:.4g}: normalise them, give a folder of images, or say --mean and --std"
        )


def _beside_photographs(values: NDArray[Any], how: Preprocessing) -> list[str]:
    """Return a warning if the values vary far less, or far more, than those of photographs."""
    deviation = float(values.std())
    levels = np.concatenate([_levels(name).reshape(-1, 3) for name in _PHOTOGRAPHS])
    usual = float(levels.std() / np.mean(how.std))
    if _NARROW * usual <= deviation <= _WIDE * usual:
        return []
    seen = f"calibration samples deviate by {deviation:.2g} from their mean, and photographs by {usual:.2g}"
    return [f"{seen}: check that they are normalised as the network takes them"]


def _levels(name: str) -> NDArray[np.float64]:
    """Return a sample photograph as (h, w, 3) levels, small: only its mean and deviation count."""
    with Image.open(data_root() / "samples" / "photographs" / f"{name}.jpg", formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB").resize((64, 64)), np.float64)
