"""Preprocessing as a graph: the bits of Pillow and numpy, for every shape of image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repmlp_deploy.bundle import TensorSpec
from repmlp_deploy.card import Preprocessing, Resize
from repmlp_deploy.convert.graph import image_input
from repmlp_deploy.convert.graph.image_input import preprocessing_graph
from repmlp_deploy.convert.graph.run import onnx_run
from repmlp_deploy.errors import InputError, VerificationError
from repmlp_deploy.runtime.images import network_input

COLOURS: dict[str, Any] = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
SHORT_EDGE = Resize(mode="short-edge", size=(40, 40))
EXACT = Resize(mode="exact", size=(24, 36))

WAYS = {
    "short edge and crop": Preprocessing(resize=SHORT_EDGE, crop=(33, 28), **COLOURS),
    "bicubic, BGR": Preprocessing(
        resize=SHORT_EDGE, crop=(33, 28), interpolation="bicubic", colour_order="BGR", **COLOURS
    ),
    "exact": Preprocessing(resize=EXACT, interpolation="bicubic", **COLOURS),
    "crop alone": Preprocessing(crop=(20, 19), **COLOURS),
    "gray": Preprocessing(resize=EXACT, crop=(24, 30), mean=(127.5,), std=(127.5,)),
    "five bands": Preprocessing(resize=EXACT, mean=(1, 2, 3, 4, 5), std=(1, 1, 2, 2, 3)),
    "levels": Preprocessing(resize=SHORT_EDGE, crop=(32, 32), input="uint8", **COLOURS),
}


def network(how: Preprocessing, batch: int | None = None) -> TensorSpec:
    """Return the input of a network that `how` is for."""
    assert how.crop is not None or how.resize is not None
    size = how.crop or (how.resize.size if how.resize is not None else (0, 0))
    shape = (batch, *size, how.channels) if how.input == "uint8" else (batch, how.channels, *size)
    return TensorSpec(name="x", dtype=how.input, shape=shape)


def random_levels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("size", [(40, 40), (95, 61), (61, 95), (20, 24), (170, 37), (23, 201), (102, 67)])
def test_the_graph_gives_the_bits_that_the_predictor_feeds(how: Preprocessing, size: tuple[int, int]) -> None:
    """Smaller and larger images, and tall ones, whose columns Pillow sums first."""
    levels = random_levels(*size, how.channels)
    expected, _ = network_input(levels[:, :, 0] if how.channels == 1 else levels, how)
    (got,) = onnx_run(preprocessing_graph(how, network(how))[0].SerializeToString())(np.stack([levels, levels]))
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, np.stack([expected, expected]))


def test_a_network_without_resizing_takes_its_own_size_alone() -> None:
    how = Preprocessing(**COLOURS)
    model, image, tensor = preprocessing_graph(how, TensorSpec(name="x", dtype="float32", shape=(4, 3, 8, 9)))
    assert (image.shape, tensor.shape) == ((4, 8, 9, 3), (4, 3, 8, 9))
    levels = random_levels(4, 8, 9, 3)
    (got,) = onnx_run(model.SerializeToString())(levels)
    np.testing.assert_array_equal(got, np.stack([network_input(one, how)[0] for one in levels]))


def test_an_image_that_cannot_be_cropped_or_is_too_long_is_an_error() -> None:
    """The graph must not crop beyond the image, and its matrix must not fill the memory."""
    for way, shape in (("crop alone", (1, 18, 40, 3)), ("crop alone", (1, 40, 17, 3)), ("exact", (1, 1, 16_385, 3))):
        run = onnx_run(preprocessing_graph(WAYS[way], network(WAYS[way]))[0].SerializeToString())
        with pytest.raises(VerificationError, match="out of data bounds"):
            run(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (Preprocessing(resize=EXACT, interpolation="lanczos", **COLOURS), "graphs resize bilinear and bicubic"),
        (Preprocessing(resize=SHORT_EDGE, **COLOURS), "not every image becomes 40x40"),
        (Preprocessing(resize=EXACT, crop=(32, 32), **COLOURS), "not every image becomes 32x32"),
    ],
)
def test_what_no_graph_can_do_is_refused(how: Preprocessing, said: str) -> None:
    with pytest.raises(InputError, match=said):
        preprocessing_graph(how, network(how))


def test_a_network_of_other_tensors_has_no_preprocessing() -> None:
    for shape in ((None, 3, 24), (None, 4, 24, 36), (None, 3, None, 36)):
        with pytest.raises(InputError, match="which is no image"):
            preprocessing_graph(WAYS["exact"], TensorSpec(name="x", dtype="float32", shape=shape))


def test_a_graph_that_computes_something_else_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_level_more(image: NDArray[np.uint8], how: Preprocessing) -> tuple[NDArray[Any], tuple[int, int]]:
        made, size = network_input(image, how)
        made[0, 0, 0] += 1
        return made, size

    monkeypatch.setattr(image_input, "network_input", one_level_more)
    with pytest.raises(VerificationError, match="something else than Pillow"):
        preprocessing_graph(WAYS["levels"], network(WAYS["levels"]))
