"""Calibration samples: images as the network sees them, arrays as they are, and nothing that does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repmlp_deploy import Bundle
from repmlp_deploy.convert.graph.calibrate import (
    LIMIT,
    METHODS,
    UNSEEN,
    measure_ranges,
    read_calibration,
    take_calibration,
)
from repmlp_deploy.convert.options import CALIBRATION_METHODS
from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.runtime.images import preprocess, to_image

INPUTS = {"images": (3, 32, 32)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_images_are_preprocessed_as_the_network_wants_them(images: Path, bundle: Bundle) -> None:
    how = bundle.manifest.preprocessing
    calibration = read_calibration(images, INPUTS, how)
    seen = sorted(images.rglob("*.png"))[1:]  # the first is hidden
    assert (len(calibration), calibration.available) == (5, 6)
    np.testing.assert_array_equal(calibration.unseen["images"][0], preprocess(to_image(seen[0]), how))
    np.testing.assert_array_equal(calibration.samples["images"][0], preprocess(to_image(seen[1]), how))
    assert calibration.feeds()[4]["images"].shape == (1, 3, 32, 32)


def test_few_samples_are_said_to_be_few(images: Path, bundle: Bundle) -> None:
    calibration = read_calibration(images, INPUTS, bundle.manifest.preprocessing)
    assert calibration.remarks() == [
        "calibrated with 5 of 6 samples of images/; the probe has 1 of those that were not used"
    ]
    assert calibration.warnings == ("only 6 calibration samples; expected 32 or more, so the int8 ranges are a guess",)
    values = np.random.default_rng(0).standard_normal((32, 3, 32, 32)).astype(np.float32)
    assert take_calibration({"images": values}, INPUTS).warnings == ()


def test_of_many_samples_some_evenly_spaced_are_used() -> None:
    values = np.arange(3 * LIMIT, dtype=np.float32).reshape(-1, 1, 1, 1)
    calibration = take_calibration({"images": values}, {"images": (1, 1, 1)})
    seen, unseen = (part["images"].ravel().tolist() for part in (calibration.samples, calibration.unseen))
    assert (len(seen), len(unseen), calibration.available) == (LIMIT, UNSEEN, 3 * LIMIT)
    steps = np.diff(sorted(seen + unseen))
    assert set(steps.tolist()) <= {2.0, 3.0}, "evenly spaced"


def test_the_probe_has_samples_that_no_range_was_measured_on() -> None:
    values = np.arange(40, dtype=np.float32).reshape(-1, 1, 1, 1)
    calibration = take_calibration({"images": values}, {"images": (1, 1, 1)})
    probed = {float(x) for x in calibration.chosen(8)[0].ravel()}
    assert len(probed) == 8
    assert not probed & set(calibration.samples["images"].ravel().tolist())
    assert calibration.probe_kinds(8) == ["unseen"] * 8
    few = take_calibration({"images": values[:6]}, {"images": (1, 1, 1)})
    assert few.probe_kinds(len(few.chosen(8)[0])) == ["unseen"] + ["calibration"] * 5


def test_arrays_are_taken_by_name_or_alone(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 3, 32, 32))
    np.savez(tmp_path / "alone.npz", whatever=values)
    alone = read_calibration(tmp_path / "alone.npz", INPUTS, None)
    assert alone.samples["images"].dtype == np.float32
    np.savez(tmp_path / "two.npz", images=values, ids=np.arange(4).reshape(4, 1))
    two = read_calibration(tmp_path / "two.npz", INPUTS | {"ids": (1,)}, None)
    assert two.samples["ids"].dtype.kind == "i", "what is no float has a meaning of its own"
    assert "alone.npz (sha256 " in alone.source


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((4, 3, 8, 8)), "b": np.zeros(1)}, "holds a, b; the network takes images"),
        ({"images": np.zeros((4, 3, 8, 8))}, r"images is \(4, 3, 8, 8\); the network takes \(N, 3, 32, 32\)"),
        ({"images": np.zeros((0, 3, 32, 32))}, r"images is \(0, 3, 32, 32\)"),
        ({"images": np.full((4, 3, 32, 32), np.nan)}, "not finite"),
        ({"images": np.full((4, 3, 32, 32), "a")}, "images is <U1; the network takes float32"),
        ({"images": np.ones((4, 3, 32, 32))}, "all 4 samples are the same"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_calibration(tmp_path / "x.npz", INPUTS, None)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (np.arange(4, dtype=np.int32), np.int64),
        (np.arange(4), np.uint8),
        (np.array([True, False, True, True]), np.bool_),
        (np.array([1, 0, 0, 1]), np.bool_),
        (np.arange(4.0), np.float32),
    ],
)
def test_arrays_have_the_type_that_the_network_takes(given: np.ndarray, kind: type[np.generic]) -> None:
    calibration = take_calibration({"ids": given[:, None]}, {"ids": (1,)}, types={"ids": np.dtype(kind)})
    assert calibration.samples["ids"].dtype == kind
    np.testing.assert_array_equal(calibration.samples["ids"][:, 0], given)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (np.arange(4) + 300, np.uint8, "ids is int64; the network takes uint8"),
        (np.arange(4), np.bool_, "ids is int64; the network takes bool"),
        (np.arange(4.0), np.int64, "ids is float64; the network takes int64"),
        (np.arange(4), np.float32, "ids is int64; the network takes float32$"),
        (np.arange(4) > 1, np.int64, "ids is bool; the network takes int64"),
    ],
)
def test_arrays_of_another_type_are_refused(given: np.ndarray, kind: type[np.generic], message: str) -> None:
    with pytest.raises(InputError, match=message):
        take_calibration({"ids": given[:, None]}, {"ids": (1,)}, types={"ids": np.dtype(kind)})


def test_arrays_of_different_lengths_are_refused() -> None:
    arrays = {"images": np.zeros((4, 3, 32, 32)), "ids": np.zeros((3, 1))}
    with pytest.raises(InputError, match="its arrays hold 3, 4 samples"):
        take_calibration(arrays, INPUTS | {"ids": (1,)})


def test_what_is_no_folder_and_no_archive_is_refused(tmp_path: Path, images: Path, bundle: Bundle) -> None:
    how = bundle.manifest.preprocessing
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "nothing", "expected a folder of images or a .npz file"),
        (tmp_path / "broken.npz", "cannot be read"),
        (tmp_path / "empty", "holds no images; expected .bmp"),
    ]:
        with pytest.raises(InputError, match=message):
            read_calibration(path, INPUTS, how)
    with pytest.raises(InputError, match="nobody said what images"):
        read_calibration(images, INPUTS, None)
    with pytest.raises(InputError, match="an array for each"):
        read_calibration(images, INPUTS | {"ids": (1,)}, how)
    (images / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        read_calibration(images, INPUTS, how)


def test_the_options_are_the_methods() -> None:
    assert tuple(METHODS) == CALIBRATION_METHODS


@pytest.mark.parametrize("method", sorted(METHODS))
def test_ranges_are_those_of_the_samples(bundle: Bundle, method: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The input's own, which can be told without running anything; nothing is printed."""
    values = np.random.default_rng(0).uniform(-1, 1, (9, 3, 32, 32)).astype(np.float32)
    values[8, 0, 0, 0] = -3  # the first is for the probe
    calibration = take_calibration({"images": values}, INPUTS)
    graph = bundle.read(bundle.artifact("onnx"))
    told: list[tuple[int, int]] = []
    ranges = measure_ranges(graph, calibration, ["images", "conv2d"], method, lambda *done: told.append(done))
    assert told == [(4, 8), (8, 8)]
    if method == "minmax":
        assert ranges["images"] == 3
    else:
        assert 0.9 < ranges["images"] <= 3.1
    assert ranges["conv2d"] > 0
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InputError, match="no range of nowhere"):
        measure_ranges(graph, calibration, ["nowhere"], method)
