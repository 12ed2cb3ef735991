import contextlib
import io
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from repmlp_deploy import reading
from repmlp_deploy.card import Preprocessing, Resize
from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.runtime import images
from repmlp_deploy.runtime.images import find_images, open_image, preprocess, to_image

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (427, 641, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_an_exact_resize_ignores_the_aspect_ratio_and_the_crop_is_centred(photo: Image.Image) -> None:
    how = Preprocessing(resize=Resize(mode="exact", size=(256, 256)), crop=(224, 224), **PLAIN)
    resized = np.asarray(photo.resize((256, 256), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(preprocess(photo, how).transpose(1, 2, 0), resized[16:240, 16:240])


def test_a_short_edge_truncates_the_long_one_and_the_crop_offset_rounds(photo: Image.Image) -> None:
    """641·292/427 is 438.33: 438 wide; the offset (438 - 255)/2 is 91.5, which rounds to even, 92."""
    how = Preprocessing(resize=Resize(mode="short-edge", size=(292, 292)), crop=(256, 255), **PLAIN)
    resized = np.asarray(photo.resize((438, 292), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(preprocess(photo, how).transpose(1, 2, 0), resized[18:274, 92:347])
    tall = photo.transpose(Image.Transpose.ROTATE_90)
    resized = np.asarray(tall.resize((292, 438), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(preprocess(tall, how).transpose(1, 2, 0), resized[91:347, 18:273])


def test_levels_are_normalised_in_float32_and_channels_ordered(photo: Image.Image) -> None:
    how = Preprocessing(mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 8.0), colour_order="BGR")
    result = preprocess(photo, how)
    levels = np.asarray(photo, np.float32)[:, :, ::-1]
    expected = (levels - np.float32([10, 20, 30])) / np.float32([2, 4, 8])
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result.transpose(1, 2, 0), expected)


def test_every_kind_of_source_shows_the_same_image(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    array = np.asarray(photo)
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), photo, array):
        np.testing.assert_array_equal(np.asarray(to_image(source)), array)
    np.testing.assert_array_equal(np.asarray(to_image(array[:, :, ::-1], array_order="BGR")), array)


def test_sources_are_left_alone(photo: Image.Image) -> None:
    array = np.asarray(photo).copy()
    before = array.copy()
    preprocess(to_image(array), Preprocessing(**PLAIN))[:] = 7
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(photo: Image.Image, mode: str) -> None:
    grey = np.asarray(photo.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    source = deep if mode == "I;16" else Image.fromarray(grey).convert(mode) if mode == "I" else photo.convert(mode)
    assert to_image(source).mode == "RGB"
    assert to_image(source).size == photo.size
    if mode in ("L", "I;16", "I"):
        np.testing.assert_array_equal(np.asarray(to_image(source))[:, :, 0], grey)


def test_photographs_are_turned_upright(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    turned = open_image(encoded(photo, "PNG", exif=exif))
    assert turned.size == (photo.height, photo.width)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("seed", range(6))
def test_damaged_images_give_one_line_or_an_image(photo: Image.Image, kind: str, seed: int) -> None:
    """Truncated and bit-flipped files never end in anything but an ImageError."""
    rng = random.Random(seed)
    data = bytearray(encoded(photo.resize((60, 40)), kind))
    for _ in range(seed * 3):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    with contextlib.suppress(ImageError):
        assert open_image(bytes(data[: int(len(data) * rng.uniform(0.2, 1))])).mode == "RGB"


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("hello")
    for source, said in [
        (tmp_path / "x.jpg", "is not a readable image"),
        (tmp_path / "none.jpg", "no such file"),
        (tmp_path, "is not a readable image"),
        (b"", "0 bytes is not a readable image"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \(4, 4, 3\); expected uint8"),
        (np.zeros((4, 4, 4), np.uint8), "expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), "is empty"),
        (3, "cannot read an image from int"),
    ]:
        with pytest.raises(ImageError, match=said):
            to_image(source)


def test_an_image_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="641x427 pixels; at most 1000"):
        open_image(encoded(photo, "PNG"))


def test_a_crop_larger_than_the_image_is_refused() -> None:
    how = Preprocessing(crop=(64, 64), **PLAIN)
    with pytest.raises(ImageError, match="32x32 after resizing; cannot crop 64x64"):
        preprocess(Image.new("RGB", (32, 32)), how)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["x.eps", "x.png"])
def test_no_decoder_that_starts_programs_sees_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    ran: list[object] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: ran.append(1) or Image.new("RGB", (8, 8)))
    (tmp_path / name).write_bytes(POSTSCRIPT)
    for source in (tmp_path / name, POSTSCRIPT, Image.open(io.BytesIO(POSTSCRIPT))):
        with pytest.raises(ImageError):
            to_image(source)
    assert ran == []


@pytest.mark.parametrize("brightest", [200, 300, 65535])
def test_sixteen_bit_gray_is_its_high_byte_however_bright_the_picture_is(brightest: int) -> None:
    levels = np.array([[0, 100, brightest]], np.uint16)
    deep = Image.fromarray(levels)
    pgm = b"P5 3 1 65535\n" + levels.astype(">u2").tobytes()
    for source in (deep, encoded(deep, "PNG"), encoded(deep, "TIFF"), pgm):
        np.testing.assert_array_equal(np.asarray(to_image(source))[:, :, 0], levels >> 8)


def test_levels_without_a_known_scale_are_refused() -> None:
    for value in (0.5, float("nan")):
        image = Image.fromarray(np.full((4, 4), value, np.float32))
        for source in (image, encoded(image, "TIFF")):
            with pytest.raises(ImageError, match="floating-point levels"):
                to_image(source)
    with pytest.raises(ImageError, match="from 0 to 256; expected 0 to 255"):
        to_image(Image.fromarray(np.array([[256]], np.int32)))


@pytest.mark.parametrize("size", [(600_000, 1), (1, 600_000)])
def test_a_resize_that_explodes_is_refused(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    """A wide image grows by its short edge; a tall one in Pillow's first pass, which resizes the rows."""
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("resized"))
    for mode in ("short-edge", "exact") if size[1] > 1 else ("short-edge",):
        how = Preprocessing(resize=Resize(mode=mode, size=(256, 256)), crop=(224, 224), **PLAIN)
        with pytest.raises(ImageError, match="needs more than 100000000 pixels"):
            preprocess(Image.new("RGB", size), how)


def test_an_edge_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_EDGE", 100)
    for source in (Image.new("L", (101, 1)), np.zeros((101, 1), np.uint8), encoded(Image.new("L", (101, 1)), "PNG")):
        with pytest.raises(ImageError, match="an edge has at most 100"):
            to_image(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(20)
def test_pipes_and_devices_are_refused_without_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ImageError, match="a pipe or a device"):
            to_image(path)


def test_closed_and_truncated_pillow_images_are_one_error(tmp_path: Path, photo: Image.Image) -> None:
    data = encoded(photo, "PNG")
    (tmp_path / "whole.png").write_bytes(data)
    closed = Image.open(tmp_path / "whole.png")
    closed.close()
    for source in (closed, Image.open(io.BytesIO(data[: len(data) // 2]))):
        with pytest.raises(ImageError, match="the Pillow image of mode RGB is not readable"):
            to_image(source)


def test_a_damaged_exif_leaves_the_pixels_as_they_are(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    def broken(_: Image.Image) -> Image.Exif:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    np.testing.assert_array_equal(np.asarray(to_image(photo)), np.asarray(photo))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(photo: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(expected))


def test_a_jpeg_of_many_scans_is_refused_and_one_with_the_same_bytes_elsewhere_is_not(photo: Image.Image) -> None:
    """Every scan costs a pass over all pixels; a few bytes make one."""
    data = encoded(photo, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="scans; at most 100 are decoded"):
        open_image(data[:last] + data[last:-2] * 200 + b"\xff\xd9")
    comment = b"\xff\xfe" + (2002).to_bytes(2) + b"\xff\xda" * 1000
    assert open_image(data[:2] + comment + data[2:] + b"\xff\xda" * 1000).size == photo.size


def test_hidden_files_and_what_lies_in_hidden_folders_is_not_found(tmp_path: Path) -> None:
    for name in ("a.png", "b/c.JPG", ".d.png", ".cache/e.png", "b/.f/g/h.png", "i.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    hidden = tmp_path / ".photos"
    hidden.mkdir()
    (hidden / "j.png").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == ["a.png", "b/c.JPG"]
    assert find_images(hidden) == [hidden / "j.png"], "a hidden folder that was named is meant"


def test_an_unreadable_folder_and_a_failing_disk_are_no_fault_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    def refusing(place: str) -> object:
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=rf"the folder {re.escape(str(tmp_path))} cannot be read: Permission denied"):
        find_images(tmp_path)
    monkeypatch.setattr(reading.time, "sleep", lambda _seconds: None)
    photo.save(tmp_path / "a.png")

    def failing(_path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(InputError, match="could not be read 4 times") as found:
        open_image(tmp_path / "a.png")
    assert not isinstance(found.value, ImageError)


def test_images_behind_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").touch()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "other")
    assert find_images(tmp_path / "in") == [tmp_path / "in" / "link" / "a.png"]
