"""From an image to the network's input, equal to what the weights were trained with to the last level.

Resizing is Pillow's, on 8-bit levels. Sizes and offsets round as the training pipelines do: the longer edge is
truncated, int(long · size / short), and a centre crop starts at int(round((edge - crop) / 2)).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.errors import ImageError

__all__ = ["IMAGE_SUFFIXES", "ImageLike", "open_image", "preprocess", "to_image"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

ImageLike = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]

MAX_PIXELS = 100_000_000  # 300 MB decoded; a 20 KB file can claim more than that

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """The RGB image in a file, or in the bytes of one, turned upright as its EXIF says.

    Raises:
        ImageError: it is not there, is no image, is truncated, or decodes to more than `MAX_PIXELS`.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours, and an error
            with Image.open(_stream(source)) as image:
                _refuse_bomb(image, name)
                return _upright_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise whatever a damaged file makes them raise
        raise ImageError(f"{name} is not a readable image: {error}") from None


def to_image(source: ImageLike, *, array_order: str = "RGB") -> Image.Image:
    """The RGB image that a path, the bytes of a file, a Pillow image or an array shows; `source` is left alone.

    Args:
        source: an array is (H, W, 3) or (H, W) uint8.
        array_order: order of an array's channels, RGB or BGR.

    Raises:
        ImageError: it is none of these.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)):  # noqa: PLR2004
            raise ImageError(
                f"image array is {source.dtype} {source.shape}; expected uint8 (H, W, 3) or (H, W): "
                "for normalised float batches call logits()"
            )
        if 0 in source.shape:
            raise ImageError(f"image array is empty: {source.shape}")
        ordered = source[:, :, ::-1] if array_order == "BGR" and source.ndim == 3 else source  # noqa: PLR2004
        return Image.fromarray(np.ascontiguousarray(ordered)).convert("RGB")
    if isinstance(source, str | os.PathLike | bytes):
        return open_image(source)
    raise ImageError(f"cannot read an image from {type(source).__name__}; give a path, bytes, a Pillow image or array")


def preprocess(image: Image.Image, how: Preprocessing) -> NDArray[np.float32]:
    """The network's input for an RGB image: (3, H, W) float32, an array of its own."""
    if how.resize is not None:
        size = how.resize.size if how.resize.mode == "exact" else _short_edge(image, how.resize.size[0])
        if size != (image.height, image.width):
            image = image.resize((size[1], size[0]), _FILTERS[how.interpolation])
    if how.crop is not None:
        image = _centre_crop(image, how.crop)
    levels = np.asarray(image, dtype=np.float32)  # (H, W, 3), RGB
    if how.colour_order == "BGR":
        levels = levels[:, :, ::-1]
    normal = (levels - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)


def _stream(source: str | os.PathLike[str] | bytes) -> Any:
    if isinstance(source, bytes):
        import io  # noqa: PLC0415 - only here

        return io.BytesIO(source)
    return Path(source)


def _refuse_bomb(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        raise ImageError(f"{name} has {size} pixels; at most {MAX_PIXELS} are decoded: scale it down first")


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I;16", "I", "F")):
        # Pillow clips deeper levels at 255 when it converts them; scale 16 bits to 8 instead.
        levels = np.asarray(upright, dtype=np.float64)
        if levels.size and levels.max() > 255:  # noqa: PLR2004 - the largest 8-bit level
            levels = levels / 257
        upright = Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
    return upright.convert("RGB")


def _short_edge(image: Image.Image, short: int) -> tuple[int, int]:
    """(height, width) with the shorter edge `short` and the longer one truncated."""
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
