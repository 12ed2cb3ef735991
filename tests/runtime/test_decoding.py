import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.card import Preprocessing, Resize, data_root
from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.runtime import decoding
from repmlp_deploy.runtime.decoding import Decoder
from repmlp_deploy.runtime.images import network_input

DIGITS = sorted((data_root() / "samples" / "digits").glob("*.png"))
PHOTOGRAPHS = sorted((data_root() / "samples" / "photographs").glob("*.jpg"))
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def short_edge(size: int) -> Preprocessing:
    return Preprocessing(resize=Resize(mode="short-edge", size=(size, size)), crop=(size, size), **PLAIN)


def test_batches_hold_what_every_image_alone_gives_in_order() -> None:
    """Files, their bytes, arrays and Pillow images, mixed; the last batch is the rest."""
    how = short_edge(32)
    first = Image.open(PHOTOGRAPHS[0])
    images = [*DIGITS, PHOTOGRAPHS[0], PHOTOGRAPHS[1].read_bytes(), np.asarray(first), first, first]
    expected = [network_input(image, how) for image in images]
    decoder = Decoder()
    batches = list(decoder.batches(images, how, 4))
    decoder.close()
    assert [len(values) for values, _ in batches] == [4, 4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([values for values, _ in batches]), [x for x, _ in expected])
    assert [size for _, sizes in batches for size in sizes] == [size for _, size in expected]


def test_the_next_batch_is_decoded_while_one_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than that: a long list is never in memory as a whole."""
    begun, two = [], threading.Event()

    def watched(image: Path, *args: object, **kwargs: object) -> object:
        begun.append(image)
        if len(begun) == 4:
            two.set()
        return network_input(image, *args, **kwargs)

    monkeypatch.setattr(decoding, "network_input", watched)
    decoder = Decoder()
    batches = decoder.batches(DIGITS, short_edge(32), 2)
    next(batches)
    assert two.wait(10)
    assert len(begun) == 4
    batches.close()
    decoder.close()
    assert len(begun) == 4


def test_an_image_that_is_none_is_named_after_the_batches_before_it() -> None:
    decoder = Decoder()
    batches = decoder.batches([*DIGITS[:2], b"no image", *DIGITS[2:]], short_edge(32), 2)
    next(batches)
    with pytest.raises(ImageError, match="8 bytes is not a readable image"):
        next(batches)
    decoder.close()


def test_an_unknown_mode_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="decode is 'quick'; expected exact or fast"):
        Predictor(bundle.folder, decode="quick")


def large_jpeg(orientation: int = 1) -> bytes:
    """Return a sample photograph, cropped to 250x200 and four times as large: some detail, and no square."""
    with Image.open(PHOTOGRAPHS[0]) as photograph:
        image = photograph.crop((0, 0, 250, 200)).resize((1000, 800), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["short-edge", "exact"])
def test_fast_decoding_differs_by_few_levels_and_keeps_size_and_place(orientation: int, mode: str) -> None:
    """A reduction of 8: decoded at a quarter. An image that is shifted by a pixel differs by several levels."""
    size = (100, 100) if mode == "short-edge" else (100, 130)
    how = Preprocessing(resize=Resize(mode=mode, size=size), crop=(96, 96), **PLAIN)
    data = large_jpeg(orientation)
    exact, whole = network_input(data, how)
    fast, told = network_input(data, how, decode="fast")
    assert told == whole == ((1000, 800) if orientation in (6, 8) else (800, 1000))
    assert fast.shape == exact.shape
    assert 0 < np.abs(fast - exact).mean() < 1
    assert np.abs(np.roll(fast, 1, axis=2) - exact).mean() > 2


def test_fast_decoding_reads_a_large_file_at_a_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = []
    inner = Image.Image.resize

    def watched(image: Image.Image, *args: object, **kwargs: object) -> Image.Image:
        resized.append(image.size)
        return inner(image, *args, **kwargs)

    data = large_jpeg()
    monkeypatch.setattr(Image.Image, "resize", watched)
    for mode in ("exact", "fast"):
        network_input(data, short_edge(64), decode=mode)
    assert resized == [(1000, 800), (250, 200)]


def test_fast_decoding_of_a_small_file_is_exact() -> None:
    """Below a reduction of four nothing is decoded smaller."""
    for path in PHOTOGRAPHS:
        exact, fast = (network_input(path, short_edge(65), decode=mode)[0] for mode in ("exact", "fast"))
        np.testing.assert_array_equal(exact, fast)


def test_predictions_of_a_list_are_those_of_its_files(bundle: Bundle) -> None:
    """More images than a batch, by paths and by bytes, through threads."""
    with Predictor(bundle.folder) as predictor:
        files = [*DIGITS, *DIGITS]
        alone = [predictor(path).pred_label for path in files]
        assert [answer.pred_label for answer in predictor(files)] == alone
        assert [answer.pred_label for answer in predictor([path.read_bytes() for path in files])] == alone
