"""From an image to the network's input, equal to what the weights were trained with to the last level.

Resizing is Pillow's, on 8-bit levels. Sizes and offsets round as the training pipelines do: the longer edge is
truncated, int(long · size / short), and a centre crop starts at int(round((edge - crop) / 2)).
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.errors import ImageError

__all__ = ["IMAGE_SUFFIXES", "RASTER_FORMATS", "ImageLike", "open_image", "preprocess", "to_image"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# The decoders that may open a file. Pillow has others that start programs: EPS runs a PostScript interpreter.
# JPEG covers MPO, the form of many phones.
RASTER_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

ImageLike = str | os.PathLike[str] | bytes | io.BytesIO | Image.Image | NDArray[Any]

MAX_PIXELS = 100_000_000  # after every step; Pillow needs 400 MB for as many. A file of 20 KB can claim more.
MAX_EDGE = 1_000_000  # Pillow's tables for resizing grow with the edge, whatever the other edge is

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
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours, and an error
            with Image.open(_stream(source), formats=RASTER_FORMATS) as image:
                return _upright_rgb(image, name)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise whatever a damaged file makes them raise
        raise ImageError(f"{name} is not a readable image: {error}") from None


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


def preprocess(image: Image.Image, how: Preprocessing) -> NDArray[np.float32]:
    """Return the network's input for an RGB image: (3, H, W) float32, a new array.

    Raises:
        ImageError: a step would make more than `MAX_PIXELS`, or the image is smaller than the crop.
    """
    if how.resize is not None:
        size = how.resize.size if how.resize.mode == "exact" else _short_edge(image, how.resize.size[0])
        if size != (image.height, image.width):
            _refuse_large_resize(image, size)
            image = image.resize((size[1], size[0]), _FILTERS[how.interpolation])
    if how.crop is not None:
        image = _centre_crop(image, how.crop)
    levels = np.asarray(image, dtype=np.float32)  # (H, W, 3), RGB
    if how.colour_order == "BGR":
        levels = levels[:, :, ::-1]
    normal = (levels - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)


def _from_pillow(image: Image.Image) -> Image.Image:
    name = f"the Pillow image of mode {image.mode}"
    if image.format in _PROGRAM_FORMATS:
        raise ImageError(f"{name} has the format {image.format}; convert it to one of {', '.join(RASTER_FORMATS)}")
    try:
        return _upright_rgb(image, name)
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


def _stream(source: str | os.PathLike[str] | bytes) -> Path | io.BytesIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe waits for a writer; a device may never end
        raise ImageError(f"{path} is not a readable image: it is a folder, a pipe or a device; give a file")
    return path


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


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    _refuse_large(image.width, image.height, name)
    image.load()  # before the EXIF is read, which may load too, so that no damage is taken for damaged EXIF
    turn = _TURNS.get(_orientation(image))
    rgb = _levels(image, name).convert("RGB")  # always a new image: `image` is the caller's
    return rgb if turn is None else rgb.transpose(turn)


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


def _short_edge(image: Image.Image, short: int) -> tuple[int, int]:
    """Return (height, width) with the shorter edge `short` and the longer one truncated."""
    scale: Callable[[int, int], int] = lambda long, edge: int(long * short / edge)  # noqa: E731
    if image.height <= image.width:
        return short, scale(image.width, image.height)
    return scale(image.height, image.width), short


def _centre_crop(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    top = round((image.height - crop[0]) / 2)
    left = round((image.width - crop[1]) / 2)
    if top < 0 or left < 0:
        raise ImageError(f"image is {image.height}x{image.width} after resizing; cannot crop {crop[0]}x{crop[1]}")
    return image.crop((left, top, left + crop[1], top + crop[0]))
