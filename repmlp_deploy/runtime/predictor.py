"""`Predictor`: a bundle as a function from images to predictions, for use in services."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle, Manifest
from repmlp_deploy.errors import InputError
from repmlp_deploy.numerics import Comparison
from repmlp_deploy.runtime.decoding import Decoder
from repmlp_deploy.runtime.images import ImageLike
from repmlp_deploy.runtime.runner import EngineSettings, RunnerOptions, stream_count
from repmlp_deploy.runtime.served import Closed, Served
from repmlp_deploy.runtime.tasks import (
    Answer,
    Embedding,
    Prediction,
    Segmentation,
    predictions_from_logits,
    softmax,
)

__all__ = ["Embedding", "Prediction", "Predictor", "Segmentation", "predictions_from_logits", "softmax"]

F32 = NDArray[np.float32]

_MOST_THREADS = 1024


def _check_types(threads: object, cache: object) -> None:
    """Raise unless `threads` and `cache` have the types that `Predictor` takes."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise InputError(f"threads is {threads!r}; expected a whole number or None")
    if isinstance(threads, int) and not 0 < threads <= _MOST_THREADS:
        raise InputError(f"threads is {threads}; expected 1 to {_MOST_THREADS}")
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise InputError(f"cache is a {type(cache).__name__}; expected the path of a folder or None")


class Predictor:
    """Runs a bundle. One instance serves any number of threads.

    Args:
        bundle: the folder that `repmlp-export` wrote.
        format: which artifact; by default the one that was measured fastest; see `choice`.
        device: `cpu` or `cuda`, for ONNX artifacts also `tensorrt` or `rtx`; by default the best that is there. One
            that you name is used or refused.
        threads: of one inference; by default the runtime's choice, or the CPUs that a container's quota, the affinity
            or OMP_NUM_THREADS leave to this process, if these are fewer.
        cache: folder for what the runtime compiles or optimises, where that makes the next start quicker: int8 models
            and graphs, and which artifact is the fastest here. It must belong to whoever runs the service, since what
            is in it runs without another check. By default only what TensorRT-RTX compiles is kept, beside the bundle.
        engine: how a TensorRT engine is run: device memory, GPU, workers, CUDA graphs.
        array_order: channel order of image arrays, `RGB` or `BGR`.
        decode: `exact` for preprocessing equal to the training's; `fast` decodes large JPEG files at a fraction of
            their size and resizes in steps, so that some levels differ.
        check: run the probe before the first answer.
        streams: inferences that run at a time on a CPU, each on its share of the cores: a number, `latency` for one,
            or `throughput` for one or as many as there are CPUs, whichever is measured faster when it opens.

    Raises:
        BundleError: the folder is damaged.
        MissingDependency: the artifact's runtime is not installed.
        MissingDevice: the device is not there.
        OutputError: the cache cannot be written.
        VerificationError: with `check`, an output is not the trained network's.
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
        decode: str = "exact",
        check: bool = False,
        streams: int | str = "latency",
    ) -> None:
        _check_types(threads, cache)
        self._decoder = Decoder(array_order, decode)
        folder = None if cache is None else Path(cache)
        self._format = format
        self._options = RunnerOptions(device, threads, folder, engine or EngineSettings(), stream_count(streams))
        self._closed = False
        self._stale: list[Served] = []
        self._swapping = Lock()
        self._served = self._opened(bundle, check=check)

    def _opened(self, bundle: str | Path | Bundle, *, check: bool) -> Served:
        """Return the bundle, open, and checked if that is asked for."""
        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        served = Served(loaded, self._format, self._options)
        if check:
            try:
                served.check()
            except BaseException:
                served.close()
                raise
        return served

    @contextmanager
    def _call(self) -> Iterator[Served]:
        """Return the bundle that answers a call; it stays open until the call ends.

        Raises:
            InputError: the predictor is closed.
        """
        while True:
            served = self._served
            with ExitStack() as stack:
                try:
                    stack.enter_context(served.one_call())
                except Closed:
                    if self._closed:
                        said = f"the predictor of {served.manifest.name} is closed; open another: Predictor(folder)"
                        raise InputError(said) from None
                    continue  # another bundle took its place in between
                yield served
                return

    @property
    def bundle(self) -> Bundle:
        """What is served."""
        return self._served.bundle

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._served.manifest

    @property
    def format(self) -> str:
        """The artifact that runs."""
        return self._served.runner.format

    @property
    def device(self) -> str:
        """The device it runs on."""
        return self._served.runner.device

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Class names in the order of the logits, or None."""
        return self.manifest.labels

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may make answers wrong, such as preprocessing that was assumed when the bundle was made."""
        return self.manifest.warnings

    @property
    def details(self) -> dict[str, Any]:
        """What the runtime says of itself: version, threads, streams.

        And the choice: `chosen` and `streams_chosen`, what runs and why; `passed_over`, what cannot run here.
        """
        return dict(self._served.runner.details)

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Any]: ...
    @overload
    def __call__(self, images: ImageLike) -> Any: ...

    def __call__(self, images: ImageLike | list[Any] | tuple[Any, ...]) -> Any:
        """Return the prediction for an image, or a list of them for a list.

        The bundle's task decides the type: a `Prediction` for `classify`, a `Segmentation` for `segment`, an
        `Embedding` for `embed`. An image is a path, the bytes of a file, a Pillow image, or an (H, W, 3) or (H, W)
        uint8 array; (H, W, bands) for a network of another number of channels.

        Raises:
            ImageError: one of them is no image.
            InputError: the network was exported without a card, so that nobody said what images it takes; or the
                predictor is closed.
        """
        with self._call() as served:
            _require_answers(served)
            if isinstance(images, list | tuple):
                return self._predict(served, images)
            return self._predict(served, [images])[0]

    def logits(self, batch: NDArray[Any]) -> F32:
        """Return raw outputs for a normalised batch.

        Args:
            batch: (N, C, H, W) float32, as `preprocess` makes it; it is not modified. (N, H, W, C) uint8 for a bundle
                that was exported with `--input uint8`.

        Returns:
            (N, classes) float32, an array the caller owns; (N, classes, H, W) for `segment`, embeddings as they leave
            the network, not normalised, for `embed`. Batches larger than the artifact's maximum are split,
            smaller ones than its minimum are padded.

        Raises:
            InputError: the shape or type is not the network's, or the predictor is closed.
        """
        with self._call() as served:
            _require_single(served.manifest)
            output: F32 = served.outputs([batch])[0]
            return output

    def run(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return every output of a network with any number of inputs and outputs, by name.

        Args:
            inputs: (N, …) each, by the names and of the types in the manifest, all with the same N.

        Raises:
            InputError: a name, shape or type is not the network's, or the predictor is closed.
        """
        with self._call() as served:
            names = [spec.name for spec in served.manifest.inputs]
            if set(inputs) != set(names):
                given = ", ".join(inputs) or "none"
                raise InputError(f"inputs are {given}; {served.manifest.name} takes {', '.join(names)}")
            outputs = served.outputs([inputs[name] for name in names])
            return {spec.name: output for spec, output in zip(served.manifest.outputs, outputs, strict=True)}

    async def predict_async(self, image: ImageLike) -> Any:
        """Return the prediction for one image, for an event loop.

        Calls that are under way at the same time share batches. Decoding runs in a thread, and so does the network.

        Raises:
            ImageError: it is no image.
            InputError: see `__call__`.
        """
        with self._call() as served:
            _require_answers(served)
            _require_single(served.manifest)
            import asyncio  # noqa: PLC0415 - 40 ms, and who calls this has it

            values, size = await asyncio.to_thread(self._decoder.one, image, served.manifest.preprocessing)
            outputs = await asyncio.wrap_future(served.batcher().submit([values[None]]))
            labels, scores = served.manifest.labels, served.manifest.scores
            answers = await asyncio.to_thread(served.task.answer, outputs[0], [size], labels, scores)
            return answers[0]

    async def logits_async(self, batch: NDArray[Any]) -> F32:
        """Return raw outputs for a normalised batch, for an event loop; see `logits` and `predict_async`.

        Args:
            batch: see `logits`. It must not change before the outputs are there.
        """
        with self._call() as served:
            _require_single(served.manifest)
            served.require_fit([batch])
            import asyncio  # noqa: PLC0415 - see `predict_async`

            output: F32 = (await asyncio.wrap_future(served.batcher().submit([batch])))[0]
            return output.copy()

    def warm_up(self) -> None:
        """Run batches of zeros of the smallest and the preferred size, on a GPU of the largest, too.

        Runtimes allocate memory, and TensorRT-RTX compiles, on the first run of a size: without this call, the first
        requests wait for it.

        Raises:
            InputError: the predictor is closed.
        """
        with self._call() as served:
            served.warm_up()

    def preprocess(self, image: ImageLike) -> NDArray[Any]:
        """Return the network's input for one image: (C, H, W) float32, or (H, W, C) uint8; see `logits`."""
        return self._decoder.one(image, self.manifest.preprocessing)[0]

    def self_check(self) -> list[tuple[int, Comparison]]:
        """Run the probe on this machine: (batch size, distance from the trained network), for several batch sizes.

        Raises:
            VerificationError: an output is further from the trained network's than the artifact's precision allows.
            InputError: the predictor is closed.
        """
        with self._call() as served:
            return served.check()

    def reload(self, bundle: str | Path | Bundle) -> None:
        """Serve another bundle: open it, run its probe, and only then let it take the place of the present one.

        Calls under way finish on the bundle that they began with, whose memory the last of them gives back. No call
        waits. If anything fails, the present bundle serves on. In an event loop, reload in a thread, since opening a
        bundle takes seconds: `await asyncio.to_thread(predictor.reload, folder)`.

        Raises:
            InputError: the predictor is closed.
            Others: see the constructor, with `check`.
        """
        self._served.require_own_process()
        with self._swapping:
            if self._closed:
                raise InputError(f"the predictor of {self.manifest.name} is closed; open another: Predictor(folder)")
            fresh = self._opened(bundle, check=True)
            stale, self._served = self._served, fresh
            self._stale = [*(old for old in self._stale if not old.ended), stale]
        stale.retire()

    def close(self) -> None:
        """Wait for the calls under way, then give back memory and devices.

        Later calls raise an `InputError`. Closing twice does nothing more. In an event loop with calls under way, close
        in a thread: `await asyncio.to_thread(predictor.close)`.
        """
        with self._swapping:
            self._closed = True
        for served in (self._served, *self._stale):
            served.close()
        if self._served.own_process:
            self._decoder.close()

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

    def _predict(self, served: Served, images: Sequence[ImageLike]) -> list[Answer]:
        if not images:
            return []
        _require_single(served.manifest)
        manifest, answers = served.manifest, list[Answer]()
        if len(images) == 1:  # no thread has anything to do meanwhile
            values, size = self._decoder.one(images[0], manifest.preprocessing)
            return served.task.answer(served.outputs([values[None]])[0], [size], manifest.labels, manifest.scores)
        # a long list is never decoded all at once; on a CPU large batches run in slices of the best size anyway
        best = manifest.batch.opt * served.streams
        limit = best if served.runner.device == "cpu" else manifest.batch.max
        with closing(self._decoder.batches(images, manifest.preprocessing, limit)) as batches:
            for inputs, sizes in batches:
                answers += served.task.answer(served.outputs([inputs])[0], sizes, manifest.labels, manifest.scores)
        return answers


def _require_answers(served: Served) -> None:
    """Raise unless the task makes something of images."""
    if served.task.refusal:
        raise InputError(f"{served.manifest.name} {served.task.refusal}")


def _require_single(manifest: Manifest) -> None:
    """Raise unless the network has one input and one output."""
    for what, several in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        if len(several) > 1:
            names = ", ".join(spec.name for spec in several)
            raise InputError(
                f"{manifest.name} has {len(several)} {what} ({names}): call run(), which takes them by name"
            )
