"""Labelled data on a disk: what an evaluation reads, in an order that is always the same.

classify   a folder with a folder of images for every class, or a text file of lines `path label`
segment    a folder with `images/` and `masks/`, a PNG of class ids for every image, 255 for pixels that do not count
embed      a text file of lines `path path same`, 1 for two pictures of one face and 0 otherwise

Paths in a text file are relative to its folder, and hold no blanks unless the fields are separated by tabs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repmlp_deploy.bundle import Manifest
from repmlp_deploy.errors import InputError
from repmlp_deploy.files import read_text
from repmlp_deploy.reading import is_hidden, state_of
from repmlp_deploy.runtime.images import IMAGE_SUFFIXES, find_images

__all__ = ["DATASETS", "Dataset", "Sample", "read_dataset"]

_LARGEST_LIST_BYTES = 1 << 30
_MOST_DIGITS = 9


@dataclass(frozen=True)
class Sample:
    """One thing to be judged.

    Attributes:
        images: files that the network sees: one, or two to compare.
        target: class id; or 1 for two images of one face, 0 otherwise.
        mask: file of class ids, where every pixel has its own.
    """

    images: tuple[Path, ...]
    target: int = 0
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Samples in their order.

    Attributes:
        samples: what is to be judged.
        remark: how it was read, for the report.
        warnings: what may make every score wrong.
    """

    samples: tuple[Sample, ...]
    remark: str
    warnings: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return a SHA-256 of the files' names, lengths, times and targets; contents are not read."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for path in (*sample.images, *([] if sample.mask is None else [sample.mask])):
                name = os.path.realpath(path)  # Path.resolve raises where a link leads to itself
                digest.update(f"{name}|{_state(path)}|".encode("utf-8", "surrogateescape"))
            digest.update(f"{sample.target}\n".encode())
        return digest.hexdigest()


def read_dataset(path: Path, manifest: Manifest, option: str = "--data") -> Dataset:
    """Find the labelled data in `path`, for a network of this manifest.

    Args:
        path: see the module.
        manifest: of the bundle.
        option: that named the path, for messages.

    Raises:
        InputError: the task has no kind of data, or `path` is not of that kind; the first thing wrong is named.
    """
    if manifest.task not in DATASETS:
        raise InputError(f"{manifest.name} has task {manifest.task}; repmlp-eval knows {', '.join(DATASETS)}")
    called = f"{option} {path}"
    if state_of(path, called) is None:
        raise InputError(f"{called}: no such file or folder")
    try:
        dataset = DATASETS[manifest.task](path, manifest, called)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{called} cannot be read: {error}") from None
    if not dataset.samples:
        raise InputError(f"{called} holds no images; expected {', '.join(IMAGE_SUFFIXES)} files")
    return dataset


def _read_classes(path: Path, manifest: Manifest, called: str) -> Dataset:
    if manifest.scores == "multi-label":
        raise InputError(f"{manifest.name} gives several labels per image; repmlp-eval scores one label per image")
    classes = manifest.classes
    if path.is_file():
        return _read_class_list(path, manifest.labels, classes)
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not is_hidden(child.name))
    if not folders:
        raise InputError(f"{called} has no folders; expected one per class, or a list file of lines `path label`")
    ids, remark, warnings = _match_folders([folder.name for folder in folders], manifest.labels, classes, called)
    samples = tuple(
        Sample((image,), target) for folder, target in zip(folders, ids, strict=True) for image in find_images(folder)
    )
    return Dataset(samples, remark, warnings)


def _match_folders(
    names: Sequence[str], labels: Sequence[str] | None, classes: int, called: str
) -> tuple[list[int], str, tuple[str, ...]]:
    """Return the class id of every folder, by its name, its number or its place in sorted order; how; and warnings."""
    known = _Names(labels)
    if any(known.ids(name) for name in names):
        return [_id_of(name, known, f"{called}: folder") for name in names], "folders matched by name", ()
    if all(_is_number(name) and int(name) < classes for name in names):
        return [int(name) for name in names], "folders matched by number", ()
    if len(names) == classes:
        first = "class 0" if labels is None else f"class 0, {labels[0]}"
        warning = (
            f"{called}: no folder has the name of a class, so they are the classes in sorted order, beginning with "
            f"{names[0]} for {first}: rename them to labels or class numbers if that is wrong"
        )
        return list(range(classes)), "folders matched by sorted order", (warning,)
    raise InputError(
        f"{called} has {len(names)} class folders, none with a label as its name; the network has {classes} "
        "classes: rename the folders, or give a list file of lines `path label`"
    )


def _read_class_list(path: Path, labels: Sequence[str] | None, classes: int) -> Dataset:
    known = _Names(labels)
    samples = []
    for where, fields in _lines(path, 2):
        image, label = fields
        target = int(label) if _is_number(label) and not known.ids(label) else _id_of(label, known, f"{where}: label")
        if target >= classes:
            raise InputError(f"{where}: label is {target}; the network has classes 0 to {classes - 1}")
        samples.append(Sample((path.parent / image,), target))
    return Dataset(tuple(samples), "labels from a list")


def _read_masks(path: Path, manifest: Manifest, called: str) -> Dataset:
    del manifest
    for part in ("images", "masks"):
        if not (path / part).is_dir():
            raise InputError(f"{called} has no folder {part}; expected images/ and masks/")
    masks = {mask.stem: mask for mask in (path / "masks").iterdir() if mask.suffix.lower() == ".png"}
    images = find_images(path / "images")
    lacking = [image.name for image in images if image.stem not in masks]
    if lacking:
        raise InputError(f"{called}: {len(lacking)} images have no PNG of their name in masks/, such as {lacking[0]}")
    return Dataset(tuple(Sample((image,), mask=masks[image.stem]) for image in images), "masks matched by name")


def _read_pairs(path: Path, manifest: Manifest, called: str) -> Dataset:
    del manifest
    if not path.is_file():
        raise InputError(f"{called} is a folder; embed takes a list file of lines `path path same`")
    samples = []
    for where, (first, second, same) in _lines(path, 3):
        if same not in ("0", "1"):
            raise InputError(f"{where}: the last field is {same!r}; expected 1 for one face or 0 for two")
        samples.append(Sample((path.parent / first, path.parent / second), int(same)))
    if len({sample.target for sample in samples}) == 1:
        raise InputError(f"{called} has pairs of one kind only; verification needs both 1 and 0")
    return Dataset(tuple(samples), "pairs from a list")


DATASETS: Mapping[str, Callable[[Path, Manifest, str], Dataset]] = {
    "classify": _read_classes,
    "segment": _read_masks,
    "embed": _read_pairs,
}
"""Task to what reads its data."""


def _is_number(word: str) -> bool:
    """Return whether a word can be the number of a class."""
    return word.isascii() and word.isdecimal() and len(word) <= _MOST_DIGITS


class _Names:
    """The class ids of labels; a few ImageNet labels name two classes."""

    def __init__(self, labels: Sequence[str] | None) -> None:
        self._exact: dict[str, list[int]] = {}
        self._folded: dict[str, list[int]] = {}
        for i, label in enumerate(labels or ()):
            self._exact.setdefault(label, []).append(i)
            self._folded.setdefault(_folded(label), []).append(i)

    def ids(self, name: str) -> Sequence[int]:
        """Return the classes that a name means; a label that is written in the same way comes first."""
        return self._exact.get(name, self._folded.get(_folded(name), ()))


def _folded(name: str) -> str:
    """Return a name without what people write in different ways: upper case, and blanks or underscores."""
    return name.replace("_", " ").casefold()


def _id_of(name: str, known: _Names, what: str) -> int:
    ids = known.ids(name)
    if len(ids) == 1:
        return ids[0]
    reason = f"names {len(ids)} classes" if ids else "is no label of the network"
    raise InputError(f"{what} {name!r} {reason}: use class numbers")


def _lines(path: Path, count: int) -> list[tuple[str, list[str]]]:
    """Return (place, fields) of every line that is not empty."""
    found = []
    for number, line in enumerate(read_text(path, _LARGEST_LIST_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.rsplit(None, count - 1)
        fields = fields if len(fields) == count and all(fields) and "\0" not in line else []
        if not fields:
            raise InputError(f"{path}:{number}: {line.strip()[:80]!r} is no line of {count} fields")
        found.append((f"{path}:{number}", fields))
    return found


def _state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:
        return "missing"
    return f"{state.st_size}|{state.st_mtime_ns}"
