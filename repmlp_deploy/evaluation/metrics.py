"""Tallies: what is counted while an evaluation runs, and the scores that follow from it.

Every tally is numbers that JSON can hold, so that an evaluation that was stopped goes on where it was.

Intersection over union of a class: the pixels that are it and are called it, over those that are it or are called it;
the mean is over the classes that occur. Verification, as usual for LFW: pairs are cut into ten folds in their order,
the threshold that is best on nine is judged on the tenth, and the ten accuracies are averaged.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repmlp_deploy.errors import InputError
from repmlp_deploy.evaluation.datasets import Sample
from repmlp_deploy.reading import state_of
from repmlp_deploy.runtime.images import RASTER_FORMATS
from repmlp_deploy.runtime.tasks import embeddings_from_outputs, masks_from_logits

__all__ = ["IGNORED", "TALLIES", "ClassTally", "MaskTally", "PairTally", "Tally", "best_threshold", "verification"]

IGNORED = 255  # in masks: pixels that do not count
TOP = 5
FOLDS = 10

F32 = NDArray[np.float32]
Size = tuple[int, int]


class Tally(Protocol):
    """What is counted for one artifact."""

    main: str

    def add(self, outputs: F32, samples: Sequence[Sample], sizes: Sequence[Size], trained: F32 | None) -> None:
        """Count a batch.

        Args:
            outputs: (n, …), one row per image, the images of a sample next to each other.
            samples: what they are of.
            sizes: (height, width) of every image.
            trained: the trained network's outputs for the same batch, or None.
        """
        ...

    def scores(self) -> dict[str, Any]:
        """Score to value, those of everything counted so far."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the counts, for JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from counts of `state()`."""
        ...

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add counts of `state()` of the batches that come next."""
        ...

    def mark(self) -> Any:
        """Return what `undo` needs; its size does not depend on how much was counted."""
        ...

    def undo(self, mark: Any) -> None:
        """Forget what was counted since `mark()`."""
        ...


class ClassTally:
    """Top-1 and top-5 accuracy; among equal logits the smaller class comes first, as in `argmax`."""

    main = "top1"

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._counts = {"count": 0, "top1": 0, "top5": 0, "agreed": 0, "compared": 0}

    def add(self, outputs: F32, samples: Sequence[Sample], sizes: Sequence[Size], trained: F32 | None) -> None:
        """Count a batch of (n, classes) logits, or of (n, 1) where a single logit tells two classes apart."""
        del sizes
        outputs, trained = _per_class(outputs), None if trained is None else _per_class(trained)
        order = np.argsort(-outputs, axis=1, kind="stable")[:, :TOP]
        hits = order == np.array([sample.target for sample in samples])[:, None]
        self._counts["count"] += len(samples)
        self._counts["top1"] += int(hits[:, 0].sum())
        self._counts["top5"] += int(hits.any(axis=1).sum())
        if trained is not None:
            self._counts["compared"] += len(samples)
            self._counts["agreed"] += int((order[:, 0] == trained.argmax(axis=1)).sum())

    def scores(self) -> dict[str, Any]:
        """Return shares of the images."""
        counts = self._counts
        found: dict[str, Any] = {"top1": _share(counts["top1"], counts["count"])}
        if self._classes > TOP:
            found["top5"] = _share(counts["top5"], counts["count"])
        if counts["compared"]:
            found["agreement"] = _share(counts["agreed"], counts["compared"])
        return found | {"right": counts["top1"], "count": counts["count"]}

    def state(self) -> dict[str, Any]:
        """Return the counts."""
        return dict(self._counts)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._counts = {key: int(state[key]) for key in self._counts}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the counts of `state`."""
        self._counts = {key: count + int(state[key]) for key, count in self._counts.items()}

    def mark(self) -> dict[str, int]:
        """Return the counts."""
        return dict(self._counts)

    def undo(self, mark: dict[str, int]) -> None:
        """Go back to the counts of `mark()`."""
        self._counts = dict(mark)


def _per_class(logits: F32) -> F32:
    """Return (n, classes) logits: a single logit z becomes 0 and z, since sigmoid(z) = softmax(0, z)."""
    return np.concatenate([np.zeros_like(logits), logits], axis=1) if logits.shape[1] == 1 else logits


class MaskTally:
    """Intersection over union, from a matrix of (class, what it was called) pixels."""

    main = "mean_iou"

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._pixels = np.zeros((classes, classes), np.int64)
        self._count, self._agreed, self._compared = 0, 0, 0

    def add(self, outputs: F32, samples: Sequence[Sample], sizes: Sequence[Size], trained: F32 | None) -> None:
        """Count a batch of (n, classes, H, W) logits, at the size of the images.

        Raises:
            InputError: a mask is not of its image's size, or holds ids of no class.
        """
        found = masks_from_logits(outputs, sizes)
        for sample, answer in zip(samples, found, strict=True):
            mask = _read_mask(sample, answer.mask.shape, self._classes)
            counted = mask != IGNORED
            cells = mask[counted].astype(np.int64) * self._classes + answer.mask[counted]
            self._pixels += np.bincount(cells, minlength=self._classes**2).reshape(self._pixels.shape)
        self._count += len(samples)
        if trained is not None:
            for answer, other in zip(found, masks_from_logits(trained, sizes), strict=True):
                self._agreed += int((answer.mask == other.mask).sum())
                self._compared += answer.mask.size

    def scores(self) -> dict[str, Any]:
        """Return the mean over the classes that occur, every class, and shares of the pixels."""
        right = np.diag(self._pixels)
        union = self._pixels.sum(axis=0) + self._pixels.sum(axis=1) - right
        iou = [float(r / u) if u else None for r, u in zip(right, union, strict=True)]
        present = [value for value in iou if value is not None]
        found: dict[str, Any] = {
            "mean_iou": sum(present) / len(present) if present else 0.0,
            "pixel_accuracy": _share(int(right.sum()), int(self._pixels.sum())),
        }
        if self._compared:
            found["agreement"] = _share(self._agreed, self._compared)
        return found | {"iou": iou, "count": self._count}

    def state(self) -> dict[str, Any]:
        """Return the matrix and the counts."""
        counts = {"count": self._count, "agreed": self._agreed, "compared": self._compared}
        return {"pixels": self._pixels.tolist(), **counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._pixels = np.array(state["pixels"], np.int64).reshape(self._classes, self._classes)
        self._count, self._agreed, self._compared = (int(state[key]) for key in ("count", "agreed", "compared"))

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the matrix and the counts of `state`."""
        self._pixels += np.array(state["pixels"], np.int64).reshape(self._pixels.shape)
        self._count += int(state["count"])
        self._agreed += int(state["agreed"])
        self._compared += int(state["compared"])

    def mark(self) -> tuple[NDArray[np.int64], int, int, int]:
        """Return a copy of the matrix, and the counts."""
        return self._pixels.copy(), self._count, self._agreed, self._compared

    def undo(self, mark: tuple[NDArray[np.int64], int, int, int]) -> None:
        """Go back to the matrix and the counts of `mark()`."""
        self._pixels, self._count, self._agreed, self._compared = mark


class PairTally:
    """Verification accuracy, from the cosine of every pair."""

    main = "accuracy"

    def __init__(self, classes: int) -> None:
        del classes  # there are none
        self._cosines: list[float] = []
        self._same: list[int] = []
        self._trained: list[float] = []

    def add(self, outputs: F32, samples: Sequence[Sample], sizes: Sequence[Size], trained: F32 | None) -> None:
        """Count a batch of (2·n, D) embeddings, the two of a pair next to each other."""
        del sizes
        found = embeddings_from_outputs(outputs)
        self._cosines += [a.similarity(b) for a, b in zip(found[::2], found[1::2], strict=True)]
        self._same += [sample.target for sample in samples]
        if trained is not None:
            others = embeddings_from_outputs(trained)
            self._trained += [a.similarity(b) for a, b in zip(found, others, strict=True)]

    def scores(self) -> dict[str, Any]:
        """Return accuracy over the folds, its deviation, and the mean threshold."""
        found: dict[str, Any] = verification(np.array(self._cosines), np.array(self._same, dtype=bool))
        if self._trained:
            found["agreement"] = float(np.mean(self._trained))  # mean cosine with the trained network's embedding
        return found | {"count": len(self._same)}

    def state(self) -> dict[str, Any]:
        """Return the cosines."""
        return {"cosines": list(self._cosines), "same": list(self._same), "trained": list(self._trained)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._cosines, self._same, self._trained = (list(state[key]) for key in ("cosines", "same", "trained"))

    def merge(self, state: Mapping[str, Any]) -> None:
        """Append the cosines of `state`."""
        self._cosines += state["cosines"]
        self._same += state["same"]
        self._trained += state["trained"]

    def mark(self) -> tuple[int, int, int]:
        """Return how many cosines there are."""
        return len(self._cosines), len(self._same), len(self._trained)

    def undo(self, mark: tuple[int, int, int]) -> None:
        """Remove the cosines that came after `mark()`."""
        cosines, same, trained = mark
        del self._cosines[cosines:], self._same[same:], self._trained[trained:]


TALLIES: Mapping[str, type[ClassTally | MaskTally | PairTally]] = {
    "classify": ClassTally,
    "segment": MaskTally,
    "embed": PairTally,
}
"""Task to what is counted."""


def verification(cosines: NDArray[np.float64], same: NDArray[np.bool_], folds: int = FOLDS) -> dict[str, float]:
    """Return `accuracy` and its `deviation` over the folds, each judged by the best `threshold` of the others."""
    folds = min(folds, len(cosines))
    if folds <= 1:  # nothing to choose a threshold by
        return {"accuracy": 0.0, "deviation": 0.0, "threshold": 0.0}
    accuracies, thresholds = [], []
    for fold in np.array_split(np.arange(len(cosines)), folds):
        others = np.setdiff1d(np.arange(len(cosines)), fold)
        thresholds.append(best_threshold(cosines[others], same[others]))
        accuracies.append(float(np.mean((cosines[fold] > thresholds[-1]) == same[fold])))
    return {
        "accuracy": float(np.mean(accuracies)),
        "deviation": float(np.std(accuracies)),
        "threshold": float(np.mean(thresholds)),
    }


def best_threshold(cosines: NDArray[np.float64], same: NDArray[np.bool_]) -> float:
    """Return the threshold that tells pairs apart best; between two cosines, the lowest such."""
    values = np.unique(cosines)
    cuts = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2, [values[-1] + 1e-6]])
    below_different = np.searchsorted(np.sort(cosines[~same]), cuts, side="right")
    above_same = np.count_nonzero(same) - np.searchsorted(np.sort(cosines[same]), cuts, side="right")
    return float(cuts[np.argmax(below_different + above_same)])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _read_mask(sample: Sample, shape: tuple[int, ...], classes: int) -> NDArray[np.integer]:
    """Return the class ids of a sample, checked."""
    if sample.mask is None:
        raise InputError(f"{sample.images[0]} has no mask")
    state = state_of(sample.mask, sample.mask)
    if state is None or not stat.S_ISREG(state.st_mode):  # opening a pipe waits for a writer
        raise InputError(f"{sample.mask} is no readable mask: it is missing, or is no regular file")
    try:
        with Image.open(sample.mask, formats=RASTER_FORMATS) as image:
            size = image.height, image.width
            mask = np.asarray(image) if size == shape else np.broadcast_to(np.uint8(0), size)  # a bomb is not decoded
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{sample.mask} is no readable mask: {error}") from None
    if mask.ndim != len(shape) or not np.issubdtype(mask.dtype, np.integer):
        raise InputError(f"{sample.mask} is {mask.dtype} {mask.shape}; expected one channel of class ids")
    if mask.shape != shape:
        got, wanted = "x".join(map(str, mask.shape)), "x".join(map(str, shape))
        raise InputError(f"{sample.mask} is {got}; its image is {wanted}")
    wrong = mask[(mask >= classes) & (mask != IGNORED)]
    if wrong.size:
        raise InputError(f"{sample.mask} holds the id {wrong[0]}; the network has classes 0 to {classes - 1}")
    return mask
