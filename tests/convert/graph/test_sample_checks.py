"""Calibration samples that cannot be what the network will see are refused or named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from repmlp_deploy.card import data_root, load_card
from repmlp_deploy.convert.graph.calibrate import take_calibration
from repmlp_deploy.convert.graph.sample_checks import check_samples
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.images import preprocess

HOW = load_card("repmlpnet-t224").preprocessing


@pytest.fixture(scope="module")
def normalised() -> np.ndarray:
    """Crops of the sample photographs as the network takes them."""
    images = [Image.open(data_root() / "samples" / "photographs" / f"{name}.jpg") for name in ("china", "flower")]
    crops = [image.crop((x, 20, x + 300, 320)) for image in images for x in range(0, 200, 10)]
    return np.stack([preprocess(crop, HOW)[:, ::4, ::4] for crop in crops])


def test_normalised_photographs_pass(normalised: np.ndarray) -> None:
    assert check_samples({"images": normalised}, "calibration", HOW) == []


@pytest.mark.parametrize("scale", ["levels", "unit"])
def test_another_scale_is_noticed(normalised: np.ndarray, scale: str) -> None:
    """Levels of 0 to 255 are impossible; levels of 0 to 1 lie within the range, but hardly vary."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (HOW.mean, HOW.std))
    levels = normalised * std + mean
    if scale == "levels":
        with pytest.raises(
            InputError, match=r"channel 0 of images goes from 0 to 254; normalised images lie between -2\.1"
        ):
            check_samples({"images": levels}, "calibration", HOW)
    else:
        warnings = check_samples({"images": levels / 255}, "calibration", HOW)
        assert len(warnings) == 1
        assert "check that they are normalised" in warnings[0]


def test_repeated_samples_are_noticed(normalised: np.ndarray) -> None:
    with pytest.raises(InputError, match="all 40 samples are the same"):
        check_samples({"images": np.repeat(normalised[:1], 40, axis=0)}, "calibration", HOW)
    half = np.concatenate([normalised, normalised])
    assert check_samples({"images": half}, "calibration", HOW) == ["only 40 of the 80 calibration samples differ"]


def test_levels_as_integers_get_a_clear_word(normalised: np.ndarray) -> None:
    levels = np.clip(normalised * 50 + 100, 0, 255).astype(np.uint8)
    with pytest.raises(InputError, match="images is uint8; the network takes float32, normalised"):
        take_calibration({"images": levels}, {"images": levels.shape[1:]}, HOW)


def test_inputs_that_are_no_images_have_no_levels() -> None:
    values = np.random.default_rng(0).uniform(0, 255, (40, 3, 8, 8)).astype(np.float32)
    assert check_samples({"x": values}, "calibration", None) == []
