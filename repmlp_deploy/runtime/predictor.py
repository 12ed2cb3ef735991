"""`Predictor`: a bundle as a function from images to predictions, for use in services."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle, Manifest
from repmlp_deploy.errors import InputError
from repmlp_deploy.numerics import Comparison, noise_floor, require_close
from repmlp_deploy.runtime.images import ImageLike, preprocess, to_image
from repmlp_deploy.runtime.runner import EngineSettings, RunnerOptions, open_runner
from repmlp_deploy.runtime.tasks import (
    Answer,
    Embedding,
    Prediction,
    Segmentation,
    find_task,
    predictions_from_logits,
    softmax,
)

__all__ = ["Embedding", "Prediction", "Predictor", "Segmentation", "predictions_from_logits", "softmax"]

F32 = NDArray[np.float32]

_MOST_THREADS = 1024


def _require_single(manifest: Manifest) -> None:
    """Raise unless the network has one input and one output."""
    for what, several in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        if len(several) > 1:
            names = ", ".join(spec.name for spec in several)
            raise InputError(
                f"{manifest.name} has {len(several)} {what} ({names}); Predictor serves one: run the artifact itself"
            )


def _check_types(threads: object, cache: object) -> None:
    """Raise unless `threads` and `cache` have the types that `Predictor` takes."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise InputError(f"threads is {threads!r}; expected a whole number or None")
    if isinstance(threads, int) and not 0 < threads <= _MOST_THREADS:
        raise InputError(f"threads is {threads}; expected 1 to {_MOST_THREADS}")
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise InputError(f"cache is a {type(cache).__name__}; expected the path of a folder or None")


class _Calls:
    """Counts the calls under way, so that closing can wait for them."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._running = 0
        self._closed = False

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Count one call of the predictor of network `name`.

        Raises:
            InputError: the predictor is closed.
        """
        with self._changed:
            if self._closed:
                raise InputError(f"the predictor of {name} is closed; open another: Predictor(folder)")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def close(self) -> bool:
        """Refuse further calls and wait for those under way; return False where another call closed it before."""
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: self._running == 0)
        return first


class Predictor:
    """Runs a bundle. One instance serves any number of threads.

    Args:
        bundle: the folder that `repmlp-export` wrote.
        format: which artifact; by default the first that can be run here.
        device: `cpu` or `cuda`, for ONNX artifacts also `tensorrt` or `rtx`; by default the best that is there. One
            that you name is used or refused.
        threads: of one inference; by default the runtime's choice.
        cache: folder for what the runtime compiles or optimises, where that makes the next start quicker: OpenVINO's
            compiled models, ONNX Runtime's int8 graphs. It must belong to whoever runs the service, since what is in it
            runs without another check. By default only what TensorRT-RTX compiles is kept, beside the bundle.
        engine: how a TensorRT engine is run: device memory, GPU, workers, CUDA graphs.
        array_order: channel order of image arrays, `RGB` or `BGR`.

    Raises:
        BundleError: the folder is damaged.
        InputError: the network has several inputs or outputs.
        MissingDependency: the artifact's runtime is not installed.
        MissingDevice: the device is not there.
        OutputError: the cache cannot be written.
    """

    def __init__(  # noqa: PLR0913 - one per way of running it
        self,
        bundle: str | Path | Bundle,
        *,
        format: str | None = None,  # noqa: A002 - the word of the command line
        device: str | None = None,
        threads: int | None = None,
        cache: str | Path | None = None,
        engine: EngineSettings | None = None,
        array_order: str = "RGB",
    ) -> None:
        if array_order not in ("RGB", "BGR"):
            raise InputError(f"array_order is {array_order!r}; expected RGB or BGR")
        _check_types(threads, cache)
        self._calls = _Calls()
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self.manifest = self.bundle.manifest
        self._task = find_task(self.manifest.task)
        _require_single(self.manifest)
        self._array_order = array_order
        folder = None if cache is None else Path(cache)
        options = RunnerOptions(device, threads, folder, engine or EngineSettings())
        self._runner = open_runner(self.bundle, format, options)

    @property
    def format(self) -> str:
        """The artifact that runs."""
        return self._runner.format

    @property
    def device(self) -> str:
        """The device it runs on."""
        return self._runner.device

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Class names in the order of the logits, or None."""
        return self.manifest.labels

    @property
    def details(self) -> dict[str, Any]:
        """What the runtime says of itself: version, threads; and, `passed_over`, which artifacts cannot run here."""
        return dict(self._runner.details)

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Any]: ...
    @overload
    def __call__(self, images: ImageLike) -> Any: ...

    def __call__(self, images: ImageLike | list[Any] | tuple[Any, ...]) -> Any:
        """Return the prediction for an image, or a list of them for a list.

        The bundle's task decides the type: a `Prediction` for `classify`, a `Segmentation` for `segment`, an
        `Embedding` for `embed`. An image is a path, the bytes of a file, a Pillow image, or an (H, W, 3) or (H, W)
        uint8 array.

        Raises:
            ImageError: one of them is no image.
            InputError: the network was exported without a card, so that nobody said what images it takes; or the
                predictor is closed.
        """
        if self._task.refusal:
            raise InputError(f"{self.manifest.name} {self._task.refusal}")
        with self._calls.one(self.manifest.name):
            if isinstance(images, list | tuple):
                return [answer for chunk in self._chunks(images) for answer in self._predict(chunk)]
            return self._predict([images])[0]

    def logits(self, batch: F32) -> F32:
        """Return raw outputs for a normalised batch.

        Args:
            batch: (N, C, H, W) float32, as `preprocess` makes it; it is not modified.

        Returns:
            (N, classes) float32, an array the caller owns; (N, classes, H, W) for `segment`, embeddings as they leave
            the network, not normalised, for `embed`. Batches larger than the artifact's maximum are split,
            smaller ones than its minimum are padded.

        Raises:
            InputError: the shape or type is not the network's, or the predictor is closed.
        """
        with self._calls.one(self.manifest.name):
            return self._logits(batch)

    def _logits(self, batch: F32) -> F32:
        expected = self.manifest.input.shape[1:]
        if not isinstance(batch, np.ndarray) or batch.ndim != len(expected) + 1 or batch.shape[1:] != expected:
            got = tuple(batch.shape) if isinstance(batch, np.ndarray) else type(batch).__name__
            takes = ", ".join(str(edge) for edge in expected)
            raise InputError(f"input is {got}; {self.manifest.name} takes (N, {takes})")
        if batch.dtype != np.float32:
            raise InputError(f"input is {batch.dtype}; {self.manifest.name} takes float32")
        if not len(batch):
            raise InputError("input is an empty batch; give at least one sample")
        limit = self.manifest.batch.max
        parts = [self._run(batch[i : i + limit]) for i in range(0, len(batch), limit)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def preprocess(self, image: ImageLike) -> F32:
        """Return the network's input for one image: (3, H, W) float32."""
        return preprocess(to_image(image, array_order=self._array_order), self.manifest.preprocessing)

    def self_check(self) -> list[tuple[int, Comparison]]:
        """Run the probe on this machine: (batch size, distance from the trained network), for several batch sizes.

        Raises:
            VerificationError: an output is further from the trained network's than the artifact's precision allows.
            InputError: the predictor is closed.
        """
        with self._calls.one(self.manifest.name):
            return self._self_check()

    def _self_check(self) -> list[tuple[int, Comparison]]:
        probe = self.bundle.probe()
        floor = noise_floor(probe.float32, probe.reference)
        precision = self.bundle.artifact(self.format).precision
        results = []
        for size in sorted({self.manifest.batch.min, self.manifest.batch.opt}):
            inputs, reference = probe.batch(size)
            what = f"{self.format} on {self.device} at batch {size}"
            results.append(
                (
                    size,
                    require_close(
                        what,
                        self._logits(inputs),
                        reference,
                        floor=floor,
                        precision=precision,
                        classes=self._task.class_axes == reference.ndim,
                    ),
                )
            )
        return results

    def close(self) -> None:
        """Wait for the calls under way, then give back memory and devices.

        Later calls raise an `InputError`. Closing twice does nothing more.
        """
        if self._calls.close():
            self._runner.close()

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse to be pickled or copied: memory of a runtime and devices cannot be.

        Raises:
            InputError: always.
        """
        raise InputError("a Predictor cannot be pickled or copied; open Predictor(folder) in each process instead")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _predict(self, images: Sequence[ImageLike]) -> list[Answer]:
        if not images:
            return []
        inputs, sizes = [], []
        for source in images:  # one by one: a decoded image is far larger than the network's input
            image = to_image(source, array_order=self._array_order)
            sizes.append((image.height, image.width))
            inputs.append(preprocess(image, self.manifest.preprocessing))
        return self._task.answer(self._logits(np.stack(inputs)), sizes, self.labels)

    def _chunks(self, images: Sequence[ImageLike]) -> Iterator[Sequence[ImageLike]]:
        """Yield lists of at most the largest batch, so that a long list is never decoded all at once."""
        limit = self.manifest.batch.max
        for start in range(0, len(images), limit):
            yield images[start : start + limit]

    def _run(self, batch: F32) -> F32:
        """Run at most the largest batch, padded to the smallest by repeating the last sample."""
        missing = self.manifest.batch.min - len(batch)
        if missing > 0:
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        output = self._runner.run(np.ascontiguousarray(batch))
        return output[: len(output) - missing] if missing > 0 else output
