"""Pictures that every process makes alike: arrays that look like images, and JPEG files of them."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["PICTURE", "image_like", "synthetic_jpeg"]

PICTURE = (375, 500)
"""(H, W) of the JPEG of end-to-end rows: the usual size of an ImageNet photograph."""


def image_like(shape: tuple[int, ...], samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Return (samples, C, H, W) float32 with patches of colour and fine noise, of about unit variance."""
    rng = np.random.default_rng(seed)
    c, h, w = shape
    coarse = rng.standard_normal((samples, c, -(-h // 16), -(-w // 16)), dtype=np.float32)
    coarse = coarse.repeat(16, axis=2).repeat(16, axis=3)[:, :, :h, :w]
    coarse += np.float32(0.3) * rng.standard_normal((samples, c, h, w), dtype=np.float32)
    return np.ascontiguousarray(coarse)


def synthetic_jpeg(seed: int) -> bytes:
    """Return the bytes of a JPEG with the size and the detail of a photograph."""
    height, width = PICTURE
    levels = (
        np.clip(128 + 40 * image_like((3, height, width), 1, seed)[0], 0, 255).astype(np.uint8).transpose(1, 2, 0)
    )  # (3, H, W) -> (H, W, 3)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
