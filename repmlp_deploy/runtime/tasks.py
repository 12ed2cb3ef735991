"""Tasks: what a network's outputs mean, and the predictions they become.

A class's probability is the softmax of the logits. A single logit answers a question: its sigmoid is the probability
of yes. Where several classes may be present at once, each has the sigmoid of its own logit. A mask is the largest of
the logits after each class's map was resized to the image, so that borders are as smooth as the logits are. Embeddings
are compared by their directions: they are scaled to length 1, after which the cosine of two is their dot product.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repmlp_deploy.card import Scores
from repmlp_deploy.errors import BundleError, InputError
from repmlp_deploy.runtime.images import ImageLike, to_image

__all__ = [
    "TASKS",
    "Answer",
    "Embedding",
    "Prediction",
    "Segmentation",
    "Task",
    "embeddings_from_outputs",
    "find_task",
    "masks_from_logits",
    "palette",
    "predictions_from_logits",
    "sigmoid",
    "softmax",
]

F32 = NDArray[np.float32]
Size = tuple[int, int]

_UINT8_CLASSES = 256


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network says of one image; also reads like a mapping, `prediction["pred_class"]`.

    Attributes:
        pred_label: index of the most likely class.
        pred_class: its name, or None where the labels are unknown.
        pred_score: its probability.
        pred_scores: (classes,) float32, every probability; of no and yes where the network has a single logit.
    """

    pred_label: int
    pred_class: str | None
    pred_score: float
    pred_scores: F32

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Return the names of the fields."""
        return tuple(f.name for f in fields(cls))

    def above(self, threshold: float = 0.5) -> list[tuple[int, float]]:
        """Return the classes with at least this probability, best first: the answer where several may be present."""
        return [(i, score) for i, score in self.top(len(self.pred_scores)) if score >= threshold]

    def top(self, k: int = 5) -> list[tuple[int, float]]:
        """Return the k most likely classes and their probabilities, best first."""
        order = np.argsort(-self.pred_scores, kind="stable")[:k]
        return [(int(i), float(self.pred_scores[i])) for i in order]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The class of every pixel of one image.

    Attributes:
        mask: (H, W) class ids, of the size of the upright image: uint8, int32 for more than 256 classes.
        labels: names of the classes, or None where they are unknown.
    """

    mask: NDArray[np.integer]
    labels: tuple[str, ...] | None = None

    def shares(self) -> list[tuple[int, float]]:
        """Return (class id, share of the pixels) of every class that occurs, the largest share first."""
        ids, counts = np.unique(self.mask, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(int(ids[i]), float(counts[i] / self.mask.size)) for i in order]

    def mask_image(self) -> Image.Image:
        """Return the class ids as a grey image, for PNG: 8 bits, or 16 for more than 256 classes."""
        return Image.fromarray(self.mask if self.mask.dtype == np.uint8 else self.mask.astype(np.uint16))

    def mask_png(self) -> bytes:
        """Return the PNG file of `mask_image`."""
        file = io.BytesIO()
        self.mask_image().save(file, "PNG")
        return file.getvalue()

    def overlay(self, image: ImageLike, *, alpha: float = 0.5, array_order: str = "RGB") -> Image.Image:
        """Return the image with every class in its colour of `palette`, RGB.

        Args:
            image: the one that was segmented.
            alpha: weight of the colours, 0 to 1.
            array_order: channel order of an image array, RGB or BGR.

        Raises:
            InputError: `alpha` is no weight, or the image is of another size.
        """
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha is {alpha}; expected 0 to 1")
        shown = to_image(image, array_order=array_order)
        if (shown.height, shown.width) != self.mask.shape:
            h, w = self.mask.shape
            raise InputError(f"image is {shown.height}x{shown.width}; the mask is {h}x{w}: give the one it was made of")
        return Image.blend(shown, Image.fromarray(palette(int(self.mask.max()) + 1)[self.mask]), alpha)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The vector that the network gives for a face.

    Attributes:
        vector: (D,) float32 of length 1.
    """

    vector: F32

    def similarity(self, other: Embedding) -> float:
        """Return the cosine of two embeddings, -1 to 1.

        Raises:
            InputError: they are of different lengths.
        """
        if self.vector.shape != other.vector.shape:
            raise InputError(
                f"embeddings have {len(self.vector)} and {len(other.vector)} values; compare like with like"
            )
        return float(np.clip(np.dot(self.vector.astype(np.float64), other.vector.astype(np.float64)), -1.0, 1.0))


Answer = Prediction | Segmentation | Embedding


def softmax(logits: F32) -> F32:
    """Return probabilities along the last axis, in float32."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: F32 = raised / raised.sum(axis=-1, keepdims=True)
    return probabilities


def sigmoid(logits: F32) -> F32:
    """Return the probability of yes for every logit, in float32."""
    small = np.exp(-np.abs(logits))  # at most 1, so that nothing overflows
    probabilities: F32 = np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
    return probabilities


def predictions_from_logits(
    logits: F32, labels: Sequence[str] | None, scores: Scores | None = None
) -> list[Prediction]:
    """Return one prediction per row of (N, classes) logits.

    Args:
        logits: (N, classes) float32; a single logit stands for two classes, no and yes.
        labels: names of the classes, or None.
        scores: how logits become probabilities; None means softmax, or sigmoid for a single logit.
    """
    probabilities = _probabilities(logits, scores)
    best = probabilities.argmax(axis=1)
    return [
        Prediction(int(i), None if labels is None else labels[i], float(row[i]), row.copy())
        for i, row in zip(best, probabilities, strict=True)
    ]


def _probabilities(logits: F32, scores: Scores | None) -> F32:
    """Return (N, classes) probabilities."""
    if scores == "multi-label":
        return sigmoid(logits)
    if logits.shape[1] > 1:
        return softmax(logits)
    yes = sigmoid(logits)
    return np.concatenate([1 - yes, yes], axis=1)


def masks_from_logits(logits: F32, sizes: Sequence[Size], labels: Sequence[str] | None = None) -> list[Segmentation]:
    """Return one segmentation per map of (N, classes, H, W) logits, each of its image's (height, width)."""
    names = None if labels is None else tuple(labels)
    return [Segmentation(_mask(maps, size), names) for maps, size in zip(logits, sizes, strict=True)]


def _mask(maps: F32, size: Size) -> NDArray[np.integer]:
    """Return (classes, H, W) logits -> (height, width) class ids."""
    kind = np.uint8 if len(maps) <= _UINT8_CLASSES else np.int32
    if maps.shape[1:] == size:
        ids: NDArray[np.integer] = maps.argmax(axis=0).astype(kind)
        return ids
    mask: NDArray[np.integer] = np.zeros(size, kind)
    best = _resized(maps[0], size).copy()
    for i in range(1, len(maps)):  # one by one: all maps at the size of a photograph would be gigabytes
        other = _resized(maps[i], size)
        better = other > best
        mask[better] = i
        np.copyto(best, other, where=better)
    return mask


def _resized(map_: F32, size: Size) -> F32:
    resized = Image.fromarray(map_).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)


def embeddings_from_outputs(outputs: F32) -> list[Embedding]:
    """Return one embedding of length 1 per row of (N, D); a row of zeros has no direction and stays zero."""
    lengths = np.linalg.norm(outputs.astype(np.float64), axis=1, keepdims=True)
    unit = outputs / np.maximum(lengths, np.finfo(np.float32).tiny)
    return [Embedding(row.copy()) for row in unit.astype(np.float32)]


def palette(classes: int) -> NDArray[np.uint8]:
    """Return (classes, 3) RGB levels, different for the first 256 classes; those of the PASCAL VOC challenge.

    The bits of a class id are dealt to red, green and blue in turn, each filling its level from the highest bit down.
    """
    ids = np.arange(classes)
    colours = np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


@dataclass(frozen=True)
class Task:
    """How a task's outputs are named, compared and turned into predictions.

    Attributes:
        output: name of the graph's output.
        class_axes: axes of an output whose axis 1 is classes; None where there are no classes.
        answer: (outputs (N, …), sizes (height, width) of the N images, labels, scores) -> N answers.
        refusal: why images have no prediction, and what to do; empty if they have one.
    """

    output: str
    class_axes: int | None
    answer: Callable[[F32, Sequence[Size], Sequence[str] | None, Scores | None], list[Any]]
    refusal: str = ""


TASKS: Mapping[str, Task] = {
    "classify": Task(
        "logits", 2, lambda outputs, _sizes, labels, scores: predictions_from_logits(outputs, labels, scores)
    ),
    "segment": Task("logits", 4, lambda outputs, sizes, labels, _scores: masks_from_logits(outputs, sizes, labels)),
    "embed": Task("embedding", None, lambda outputs, *_: embeddings_from_outputs(outputs)),
    "features": Task(
        "features",
        None,
        lambda outputs, *_: list(outputs),
        refusal="gives feature maps, which say nothing about an image by themselves: call logits() for the raw map",
    ),
    "custom": Task(
        "output",
        2,
        lambda outputs, *_: list(outputs),
        refusal="has no card, so how it takes images is unknown: call logits(), or export it with a card",
    ),
}
"""Task to what its outputs mean; the tasks of cards and manifests."""


def find_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        BundleError: this version knows no such task.
    """
    if name not in TASKS:
        raise BundleError(f"task is {name!r}; this version knows {', '.join(TASKS)}: install a newer one")
    return TASKS[name]
