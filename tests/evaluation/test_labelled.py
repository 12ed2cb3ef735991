"""Labelled images as an export gets them: what is wrong with them is said in a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repmlp_deploy import Bundle, LabelledFolder, export
from repmlp_deploy.convert.step import tell_nobody
from repmlp_deploy.errors import ImageError, InputError


@pytest.fixture(scope="module")
def bundle(digits_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One that is made quickly: only its manifest counts here."""
    return export(digits_checkpoint, formats="checkpoint", out=tmp_path_factory.mktemp("made") / "out")


def folder(root: Path, per_class: int = 2) -> Path:
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True)
        for i in range(per_class):
            Image.new("L", (8, 8), 20 * digit + i).save(root / str(digit) / f"{i}.png")
    return root


def test_images_are_counted_right_by_their_label(bundle: Bundle, tmp_path: Path) -> None:
    images = LabelledFolder(folder(tmp_path / "labelled"))(bundle.manifest, ())
    assert images.count == 20
    assert images.source == "labelled: folders matched by name"
    told = []

    def always_three(batch: np.ndarray) -> np.ndarray:
        return np.eye(10, dtype=np.float32)[[3] * len(batch)]

    assert images.right(always_three, lambda *done: told.append(done)) == 2
    assert told[-1] == (20, 20)
    assert images.inputs(5).shape == (5, 3, 32, 32)
    assert len(images.inputs(64)) == 20


def test_few_images_are_a_warning(bundle: Bundle, tmp_path: Path) -> None:
    few = LabelledFolder(folder(tmp_path / "few"))(bundle.manifest, ())
    assert few.warnings == ("only 20 images in --eval: one of them is 5 points of accuracy",)
    assert LabelledFolder(folder(tmp_path / "more", 10))(bundle.manifest, ()).warnings == ()


def test_calibration_images_among_them_are_a_warning_whatever_they_are_called(bundle: Bundle, tmp_path: Path) -> None:
    root = folder(tmp_path / "labelled", 10)
    copy, other = tmp_path / "copy.png", tmp_path / "other.png"
    copy.write_bytes((root / "4" / "1.png").read_bytes())
    Image.new("L", (8, 8), 255).save(other)
    missing = tmp_path / "missing.png"
    assert LabelledFolder(root)(bundle.manifest, [other, missing]).warnings == ()
    (warning,) = LabelledFolder(root)(bundle.manifest, [other, copy]).warnings
    assert warning.startswith("1 of 100 images in --eval are calibration images, too")


def test_an_image_that_cannot_be_read_is_named(bundle: Bundle, tmp_path: Path) -> None:
    root = folder(tmp_path / "labelled")
    (root / "7" / "0.png").write_bytes(b"no image")
    images = LabelledFolder(root)(bundle.manifest, ())
    with pytest.raises(ImageError, match=r"--eval: .*7.0\.png"):
        images.right(lambda batch: np.zeros((len(batch), 10), np.float32), tell_nobody)


def test_labels_that_are_no_classes_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    root = folder(tmp_path / "labelled")
    (root / "3").rename(root / "three")
    with pytest.raises(InputError, match=r"--eval .*: folder .*three"):
        LabelledFolder(root)(bundle.manifest, ())
