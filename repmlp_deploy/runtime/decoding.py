"""Images into batches of network inputs, decoded in threads while the network runs, each into its row of the batch.

Pillow releases the interpreter while it decodes and resizes, so threads are enough. They work on the images of the
next batch while the present one runs. What they do costs the network time only where no core is free.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.errors import ImageError, InputError
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.images import DECODE_MODES, ImageLike, network_input

__all__ = ["Decoder", "stacked"]

Size = tuple[int, int]

_AHEAD = 1  # batches that are decoded while one runs
_MOST_THREADS = 16


class Decoder:
    """Decodes, resizes and normalises images. One instance serves any number of threads.

    Args:
        array_order: of the channels of image arrays, `RGB` or `BGR`.
        mode: of `DECODE_MODES`.

    Raises:
        InputError: there is no such order or mode.
    """

    def __init__(self, array_order: str = "RGB", mode: str = "exact") -> None:
        if array_order not in ("RGB", "BGR"):
            raise InputError(f"array_order is {array_order!r}; expected RGB or BGR")
        if mode not in DECODE_MODES:
            raise InputError(f"decode is {mode!r}; expected {' or '.join(DECODE_MODES)}")
        self._order, self._mode = array_order, mode
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None

    def one(self, image: ImageLike, how: Preprocessing, out: NDArray[Any] | None = None) -> tuple[NDArray[Any], Size]:
        """Return the network's input, without a batch axis, and the image's (height, width); see `network_input`."""
        return network_input(image, how, array_order=self._order, decode=self._mode, out=out)

    def batches(
        self, images: Sequence[ImageLike], how: Preprocessing, size: int
    ) -> Generator[tuple[NDArray[Any], list[Size]]]:
        """Yield inputs (N, …) and the images' sizes, for at most `size` images at a time, in order.

        Files and their bytes are decoded ahead, in threads. Pillow images and arrays are read when their turn comes,
        in the caller's thread, since loading a Pillow image changes it.

        Raises:
            ImageError: one of them is no image; the batches before it were yielded.
        """
        ahead: deque[_Batch] = deque()
        try:
            for start in range(0, len(images), size):
                ahead.append(_Batch(self, images[start : start + size], how))
                if len(ahead) > _AHEAD:
                    yield ahead[0].result()
                    ahead.popleft()
            while ahead:
                yield ahead[0].result()
                ahead.popleft()
        finally:
            for batch in ahead:
                batch.cancel()

    def submit(
        self, image: ImageLike, how: Preprocessing, out: NDArray[Any] | None = None
    ) -> Future[tuple[NDArray[Any], Size]]:
        """Return the future of what `one` returns, made in a thread."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(min(usable_cpus(), _MOST_THREADS), thread_name_prefix="decode")
            return self._pool.submit(self.one, image, how, out)

    def close(self) -> None:
        """Wait for the threads."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


class _Batch:
    """The images of a batch, each of which a thread decodes into its row, or which is read when it is asked for."""

    def __init__(self, decoder: Decoder, images: Sequence[ImageLike], how: Preprocessing) -> None:
        shape = _input_shape(how)
        dtype = np.uint8 if how.input == "uint8" else np.float32
        self._whole = None if shape is None else np.empty((len(images), *shape), dtype)
        self._begun = [
            _Begun(decoder, image, how, None if self._whole is None else self._whole[i])
            for i, image in enumerate(images)
        ]

    def result(self) -> tuple[NDArray[Any], list[Size]]:
        ready = [image.result() for image in self._begun]
        whole = stacked([values for values, _ in ready]) if self._whole is None else self._whole
        return whole, [size for _, size in ready]

    def cancel(self) -> None:
        for image in self._begun:
            image.cancel()


class _Begun:
    """An image that a thread decodes, or that is read when it is asked for."""

    def __init__(self, decoder: Decoder, image: ImageLike, how: Preprocessing, out: NDArray[Any] | None) -> None:
        self._decoder, self._image, self._how, self._out = decoder, image, how, out
        encoded = isinstance(image, str | os.PathLike | bytes | io.BytesIO)
        self._future = decoder.submit(image, how, out) if encoded else None

    def result(self) -> tuple[NDArray[Any], Size]:
        if self._future is not None:
            return self._future.result()
        return self._decoder.one(self._image, self._how, self._out)

    def cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()


def stacked(inputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the inputs (…) of several images as one batch (N, …).

    Raises:
        ImageError: they are of several sizes, since preprocessing leaves each image its own.
    """
    odd = next((one for one in inputs if one.shape != inputs[0].shape), None)
    if odd is not None:
        shapes = " and ".join(" x ".join(map(str, one.shape)) for one in (inputs[0], odd))
        raise ImageError(f"images of several sizes become inputs of {shapes}; give them one by one, or equal sizes")
    return np.stack(inputs)


def _input_shape(how: Preprocessing) -> tuple[int, ...] | None:
    """Return the shape of every image's input, without a batch axis; None where the image decides."""
    size = how.crop
    if size is None and how.resize is not None and how.resize.mode == "exact":
        size = how.resize.size
    if size is None:
        return None
    return (*size, how.channels) if how.input == "uint8" else (how.channels, *size)
