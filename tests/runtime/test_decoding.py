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


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("taken", ["float32", "uint8"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_rows_of_a_batch_are_to_the_bit_what_preprocessing_by_the_book_gives(
    order: str, taken: str, channels: int, mode: str
) -> None:
    """Pillow's RGB, resized, cropped, less the mean over the std in float32, each a step and an array of its own."""
    how = Preprocessing(
        resize=Resize(mode="short-edge", size=(48, 48)),
        crop=(40, 40),
        mean=(123.675, 116.28, 103.53)[:channels],
        std=(58.395, 57.12, 57.375)[:channels],
        colour_order=order if channels == 3 else "RGB",
        input=taken,
    )
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(PHOTOGRAPHS[0]).resize((90, 70)).save(turned, "JPEG", exif=exif)
    see_through = io.BytesIO()
    Image.open(PHOTOGRAPHS[1]).resize((70, 90)).convert("RGBA").save(see_through, "PNG")
    files = [path.read_bytes() for path in PHOTOGRAPHS] + [turned.getvalue(), see_through.getvalue()]
    decoder = Decoder(mode=mode)
    ((batch, _),) = decoder.batches(files, how, 8)
    decoder.close()
    assert batch.dtype == taken
    assert batch.flags.c_contiguous
    for values, file in zip(batch, files, strict=True):
        np.testing.assert_array_equal(values, by_the_book(file, how, fast=mode == "fast"))


def by_the_book(file: bytes, how: Preprocessing, *, fast: bool) -> np.ndarray:
    image = Image.open(io.BytesIO(file))
    whole = image.size
    if fast:
        scale = next((s for s in (8, 4, 2) if min(whole) >= s * 2 * 48), None)
        if scale is not None:
            image.draft(None, (whole[0] // scale, whole[1] // scale))
    image.load()
    sideways = image.getexif().get(0x0112, 1) == 6
    image = image.convert("RGB")
    if sideways:
        image, whole = image.transpose(Image.Transpose.ROTATE_270), whole[::-1]
    if how.channels == 1:
        image = image.convert("L")
    width, height = whole
    size = (int(width * 48 / height), 48) if height <= width else (48, int(height * 48 / width))
    image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0 if fast else None)
    left, top = round((size[0] - 40) / 2), round((size[1] - 40) / 2)
    levels = np.array(image.crop((left, top, left + 40, top + 40))).reshape(40, 40, how.channels)
    if how.input == "uint8":
        return levels
    ordered = levels[:, :, ::-1] if how.colour_order == "BGR" else levels
    planes = ordered.transpose(2, 0, 1).astype(np.float32)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (how.mean, how.std))
    return (planes - mean) / std


def test_a_batch_without_a_size_of_its_own_is_stacked() -> None:
    """Nothing is resized or cropped: images of one size are a batch."""
    plain = Preprocessing(**PLAIN)
    decoder = Decoder()
    ((batch, sizes),) = decoder.batches(DIGITS[:3], plain, 4)
    decoder.close()
    alone = [network_input(path, plain) for path in DIGITS[:3]]
    np.testing.assert_array_equal(batch, [values for values, _ in alone])
    assert sizes == [size for _, size in alone]


def test_an_input_is_written_where_it_is_wanted() -> None:
    how = short_edge(32)
    wanted = np.full((3, 32, 32), np.nan, np.float32)
    values, _ = network_input(PHOTOGRAPHS[0], how, out=wanted)
    assert values is wanted
    np.testing.assert_array_equal(wanted, network_input(PHOTOGRAPHS[0], how)[0])


def test_images_of_several_sizes_are_no_batch() -> None:
    """Without a crop, preprocessing leaves each image its size."""
    how = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))
    images = [Image.new("RGB", (40, 32)), Image.new("RGB", (40, 32)), Image.new("RGB", (32, 32))]
    with pytest.raises(ImageError, match="become inputs of 3 x 32 x 40 and 3 x 32 x 32; give them one by one"):
        next(Decoder().batches(images, how, 3))
    assert next(Decoder().batches(images[:2], how, 3))[0].shape == (2, 3, 32, 40)
