"""From an image to the network's input, equal to what the weights were trained with to the last level.

Resizing is Pillow's, on 8-bit levels. Sizes and offsets round as the training pipelines do: the longer edge is
truncated, int(long · size / short), and a centre crop starts at int(round((edge - crop) / 2)).

That is the mode `exact`. The mode `fast` is for photographs much larger than the input: a JPEG file is decoded at 1/2,
1/4 or 1/8 of its size, where that leaves at least twice the size to resize to, and a large reduction begins with
whole-number steps. Some levels differ then; `docs/benchmarks.md` says by how much.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from repmlp_deploy.card import Preprocessing, Resize
from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.reading import files_below, opened

__all__ = [
    "DECODE_MODES",
    "IMAGE_SUFFIXES",
    "RASTER_FORMATS",
    "ImageLike",
    "find_images",
    "levels_of",
    "network_input",
    "normalised",
    "open_image",
    "preprocess",
    "to_image",
]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# The decoders that may open a file. Pillow has others that start programs: EPS runs a PostScript interpreter.
# JPEG covers MPO, the form of many phones.
RASTER_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

ImageLike = str | os.PathLike[str] | bytes | io.BytesIO | Image.Image | NDArray[Any]

DECODE_MODES = ("exact", "fast")

_Size = tuple[int, int]
_Sized = tuple[Image.Image, _Size]
_Out = NDArray[Any] | None

MAX_PIXELS = 100_000_000  # after every step; Pillow needs 400 MB for as many. A file of 20 KB can claim more.
MAX_BYTES = 64 << 20  # of a file that is read at once
MAX_EDGE = 1_000_000  # Pillow's tables for resizing grow with the edge, whatever the other edge is

MAX_SCANS = 100  # of a JPEG, each over every pixel; progressive files have about ten. One of 66 KB can hold thousands.

_JPEG_MARKER = re.compile(
    rb"\xff([\x01-\xcf\xd8-\xfe])"
)  # after a scan's 0xff come 0 or a restart marker, 0xd0 to 0xd7
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_COLOURS = 3
_GAP = 2.0  # how much larger than the resized image the fast mode leaves what Pillow's filters see
_SCALES = (8, 4, 2)  # by which libjpeg decodes smaller
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_PROGRAM_FORMATS = ("EPS", "WMF")  # loading one may start an interpreter
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # Pillow gives their 16-bit gray images as mode I
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Return the RGB image in a file, or in the bytes of one, turned upright as its EXIF says.

    Only the decoders of `RASTER_FORMATS` see the content, whatever the file's name ends in.

    Raises:
        ImageError: the file is missing, is no regular file, is no raster image, is truncated, has floating-point
            levels, or decodes to more than `MAX_PIXELS`.
        InputError: the file cannot be read for a reason that is no fault of the image, such as a failing disk.
    """
    return _opened(source, own=False)[0]


def _opened(source: str | os.PathLike[str] | bytes, resize: Resize | None = None, *, own: bool = True) -> _Sized:
    """Return the RGB image, decoded smaller if `resize` allows it, and the file's upright (height, width)."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        # read before Pillow sees it: a disk that fails is no fault of the image
        file = io.BytesIO(source) if isinstance(source, bytes) else opened(Path(source), MAX_BYTES)
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours, and an error
            with Image.open(file, formats=RASTER_FORMATS) as image:
                return _upright_rgb(image, name, resize, own=own)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except InputError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a readable image: its format is none of {', '.join(RASTER_FORMATS)}") from None
    except Exception as error:  # noqa: BLE001 - decoders raise whatever a damaged file makes them raise
        raise ImageError(f"{name} is not a readable image: {error}") from None


def find_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and the folders inside it, sorted; see `files_below`.

    What has an image's name and is no file, such as a dangling link, is among them: reading it names it in an error.

    Raises:
        InputError: one of the folders cannot be read.
    """
    try:
        return sorted(path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    except OSError as error:
        raise InputError(f"the folder {error.filename or folder} cannot be read: {error.strerror or error}") from None


def to_image(source: ImageLike, *, array_order: str = "RGB") -> Image.Image:
    """Return the RGB image that a path, a file's bytes, a Pillow image or an array shows; `source` does not change.

    Args:
        source: an array is (H, W, 3) or (H, W) uint8; a file's bytes may be in a `BytesIO`.
        array_order: order of an array's channels, RGB or BGR.

    Raises:
        ImageError: it is none of these, or cannot be read.
    """
    if isinstance(source, Image.Image):
        return _from_pillow(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, array_order)
    if isinstance(source, io.BytesIO):
        return open_image(source.getvalue())
    if isinstance(source, str | os.PathLike | bytes):
        return open_image(source)
    raise ImageError(f"cannot read an image from {type(source).__name__}; give a path, bytes, a Pillow image or array")


def network_input(
    source: ImageLike, how: Preprocessing, *, array_order: str = "RGB", decode: str = "exact", out: _Out = None
) -> tuple[NDArray[Any], _Size]:
    """Return the network's input for anything that shows an image, and the image's (height, width).

    It is (C, H, W) float32, or (H, W, C) uint8 where the graph normalises.

    A network of one channel takes gray images: colours are converted with Pillow's weights. One of three takes RGB.
    With any other number of channels only arrays (H, W, channels) uint8 are images.

    Args:
        source: see `to_image`.
        how: from the card.
        array_order: see `to_image`.
        decode: of `DECODE_MODES`.
        out: array of the input's shape and type that is filled and returned, such as a row of a batch.

    Raises:
        ImageError: see `to_image` and `preprocess`; or the array has another number of bands.
    """
    if how.channels in (1, _COLOURS):
        fast = decode == "fast"
        content = source.getvalue() if isinstance(source, io.BytesIO) else source
        if isinstance(content, str | os.PathLike | bytes):
            image, size = _opened(content, how.resize if fast else None)
        else:
            image = to_image(content, array_order=array_order)
            size = image.height, image.width
        return _prepared(image, how, size, fast=fast, out=out), size
    if not isinstance(source, np.ndarray) or source.shape[2:] != (how.channels,) or source.dtype != np.uint8:
        got = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
        raise ImageError(f"image is {got}; a network of {how.channels} bands takes uint8 (H, W, {how.channels}) arrays")
    if 0 in source.shape:
        raise ImageError(f"image array is empty: {source.shape}")
    _refuse_large(source.shape[1], source.shape[0], "the image array")
    bands = [Image.fromarray(np.ascontiguousarray(source[:, :, c])) for c in range(how.channels)]
    levels = np.stack([np.asarray(_fitted(band, how, source.shape[:2])) for band in bands], axis=-1)
    return _as_input(levels, how, out), source.shape[:2]


def preprocess(image: Image.Image, how: Preprocessing) -> NDArray[Any]:
    """Return the network's input for an RGB image: (3, H, W) float32, or (1, H, W) of its gray levels; a new array.

    Where the graph normalises, it is (H, W, 3) or (H, W, 1) uint8.

    Raises:
        ImageError: a step would make more than `MAX_PIXELS`, the image is smaller than the crop, or the network takes
            neither gray images nor RGB.
    """
    if how.channels not in (1, _COLOURS):
        raise ImageError(f"the network takes {how.channels} bands, and an image has 3: give uint8 arrays (H, W, bands)")
    return _prepared(image, how, (image.height, image.width), fast=False)


def normalised(levels: NDArray[Any], how: Preprocessing, out: _Out = None) -> NDArray[np.float32]:
    """Return levels less the mean over the std, in `out` or anew: (…, H, W, C) uint8 -> (…, C, H, W) float32."""
    ordered = levels[..., ::-1] if how.colour_order == "BGR" else levels
    channels_first = np.moveaxis(ordered, -1, -3)  # (…, H, W, C) -> (…, C, H, W)
    normal: NDArray[np.float32] = np.empty(channels_first.shape, np.float32) if out is None else out
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (how.mean, how.std))
    np.copyto(normal, channels_first, casting="unsafe")
    normal -= mean  # in place: first touching the memory of a temporary takes ten times as long as the arithmetic
    normal /= std
    return normal


def levels_of(inputs: NDArray[Any], how: Preprocessing) -> NDArray[np.uint8]:
    """Return the nearest levels that normalised inputs are made of: (…, C, H, W) -> (…, H, W, C) uint8."""
    mean, std = (np.asarray(values, np.float64)[:, None, None] for values in (how.mean, how.std))
    levels = np.moveaxis(np.rint(inputs * std + mean).clip(0, 255).astype(np.uint8), -3, -1)
    return np.ascontiguousarray(levels[..., ::-1] if how.colour_order == "BGR" else levels)


def _prepared(image: Image.Image, how: Preprocessing, size: _Size, *, fast: bool, out: _Out = None) -> NDArray[Any]:
    """Return the network's input for an RGB image, which may be a smaller form of one of (height, width) `size`."""
    fitted = _fitted(image.convert("L") if how.channels == 1 else image, how, size, _GAP if fast else None)
    return _as_input(np.atleast_3d(np.asarray(fitted)), how, out)


def _as_input(levels: NDArray[np.uint8], how: Preprocessing, out: _Out) -> NDArray[Any]:
    """Return what the graph takes of (H, W, C) levels, in `out` or in a new array."""
    if how.input != "uint8":
        return normalised(levels, how, out)
    kept = np.empty(levels.shape, np.uint8) if out is None else out
    np.copyto(kept, levels)
    return kept


def _fitted(image: Image.Image, how: Preprocessing, whole: tuple[int, int], gap: float | None = None) -> Image.Image:
    """Return the image resized and cropped.

    Args:
        image: to resize.
        how: from the card.
        whole: (height, width) of what `image` shows, which counts where it was decoded smaller.
        gap: see Pillow's `reducing_gap`.
    """
    if how.resize is not None:
        size = how.resize.size if how.resize.mode == "exact" else _short_edge(whole, how.resize.size[0])
        if size != (image.height, image.width):
            _refuse_large_resize(image, size)
            image = image.resize((size[1], size[0]), _FILTERS[how.interpolation], reducing_gap=gap)
    if how.crop is not None:
        image = _centre_crop(image, how.crop)
    return image


def _from_pillow(image: Image.Image) -> Image.Image:
    name = f"the Pillow image of mode {image.mode}"
    if image.format in _PROGRAM_FORMATS:
        raise ImageError(f"{name} has the format {image.format}; convert it to one of {', '.join(RASTER_FORMATS)}")
    try:
        return _upright_rgb(image, name)[0]
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - a lazily loaded file is decoded here, and a closed one raises
        raise ImageError(f"{name} is not readable: {error}") from None


def _from_array(levels: NDArray[Any], order: str) -> Image.Image:
    colour = levels.ndim == 3 and levels.shape[2] == 3  # noqa: PLR2004 - (H, W, 3)
    if levels.dtype != np.uint8 or not (levels.ndim == 2 or colour):  # noqa: PLR2004 - (H, W)
        raise ImageError(
            f"image array is {levels.dtype} {levels.shape}; expected uint8 (H, W, 3) or (H, W): "
            "for normalised float batches call logits()"
        )
    if 0 in levels.shape:
        raise ImageError(f"image array is empty: {levels.shape}")
    _refuse_large(levels.shape[1], levels.shape[0], "the image array")
    ordered = levels[:, :, ::-1] if order == "BGR" and colour else levels
    return Image.fromarray(np.ascontiguousarray(ordered)).convert("RGB")


def _refuse_large(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width}x{height} pixels; at most {MAX_PIXELS} are decoded: scale it down first")
    if max(width, height) > MAX_EDGE:
        raise ImageError(f"{name} has {width}x{height} pixels; an edge has at most {MAX_EDGE}: cut it first")


def _refuse_large_resize(image: Image.Image, size: tuple[int, int]) -> None:
    """Raise if resizing to (height, width) `size`, or Pillow's step on the way there, makes too many pixels."""
    height, width = size
    # Pillow resizes the rows first: that image has the new width and the old height.
    if max(width * height, width * image.height) > MAX_PIXELS:
        raise ImageError(
            f"image is {image.width}x{image.height}; resizing it to {width}x{height} needs more than {MAX_PIXELS} "
            "pixels: crop it first"
        )


def _refuse_many_scans(image: Image.Image, name: str) -> None:
    """Raise if a JPEG that is not decoded yet has more scans than `MAX_SCANS`."""
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("JPEG", "MPO") or not image.info.get("progressive"):
        return
    at = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(at)
    place, scans = 2, 0  # after the mark of the start
    while (marker := _JPEG_MARKER.search(data, place)) is not None and data[marker.start() + 1] != _JPEG_END:
        scans += data[marker.start() + 1] == _JPEG_SCAN
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    if scans > MAX_SCANS:
        raise ImageError(f"{name} is a JPEG of {scans} scans; at most {MAX_SCANS} are decoded: save it again")


def _upright_rgb(image: Image.Image, name: str, resize: Resize | None = None, *, own: bool = False) -> _Sized:
    """Return the image upright, smaller if `resize` allows it, and its whole size; a new image unless it is `own`."""
    _refuse_large(image.width, image.height, name)
    _refuse_many_scans(image, name)
    height, width = image.height, image.width
    if resize is not None:
        _decode_smaller(image, resize)
    image.load()  # before the EXIF is read, which may load too, so that no damage is taken for damaged EXIF
    orientation = _orientation(image)
    turn = _TURNS.get(orientation)
    levels = _levels(image, name)
    rgb = levels if own and levels.mode == "RGB" else levels.convert("RGB")  # copying 12 megapixels takes 40 ms
    size = (width, height) if orientation in _SIDEWAYS else (height, width)
    return (rgb if turn is None else rgb.transpose(turn)), size


def _decode_smaller(image: Image.Image, resize: Resize) -> None:
    """Have an image that is not loaded yet decoded at a fraction of its size; only JPEG's decoder can."""
    edge = min(image.width, image.height)
    wanted = resize.size[0] if resize.mode == "short-edge" else max(resize.size)
    scale = next((scale for scale in _SCALES if edge >= scale * _GAP * wanted), None)
    if scale is not None:
        image.draft(None, (image.width // scale, image.height // scale))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, where the EXIF is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - parsers raise whatever damaged tags make them raise; the pixels are whole
        return 1
    return value if isinstance(value, int) else 1


def _levels(image: Image.Image, name: str) -> Image.Image:
    """Return `image` with 8-bit levels. The type of the levels decides how, never their values."""
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point levels, whose scale is unknown; convert it to 8 bits first")
    if image.mode.startswith("I;16"):
        return _high_byte(np.asarray(image))
    if image.mode != "I":
        return image
    levels = np.asarray(image)
    low, high = int(levels.min(initial=0)), int(levels.max(initial=0))
    sixteen = image.format in _SIXTEEN_BIT_FORMATS
    most = 65535 if sixteen else 255
    if low < 0 or high > most:
        raise ImageError(f"{name} has 32-bit levels from {low} to {high}; expected 0 to {most}: convert it first")
    return _high_byte(levels) if sixteen else Image.fromarray(levels.astype(np.uint8))


def _high_byte(levels: NDArray[Any]) -> Image.Image:
    return Image.fromarray((levels >> 8).astype(np.uint8))


def _short_edge(whole: tuple[int, int], short: int) -> tuple[int, int]:
    """Return (height, width) with the shorter edge `short` and the longer one truncated."""
    height, width = whole
    scale: Callable[[int, int], int] = lambda long, edge: int(long * short / edge)  # noqa: E731
    if height <= width:
        return short, scale(width, height)
    return scale(height, width), short


def _centre_crop(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    top = round((image.height - crop[0]) / 2)
    left = round((image.width - crop[1]) / 2)
    if top < 0 or left < 0:
        raise ImageError(f"image is {image.height}x{image.width} after resizing; cannot crop {crop[0]}x{crop[1]}")
    return image.crop((left, top, left + crop[1], top + crop[0]))
