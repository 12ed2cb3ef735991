"""What every host does with a request: find the model, make arrays of tensors, wait for the batch, answer.

Hosts translate: HTTP, gRPC and Ray Serve call the same methods and differ only in their wire formats.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy import __version__
from repmlp_deploy.bundle import Manifest, TensorSpec
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.batching import BatcherClosed, DeadlineMissed, QueueFull
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.decoding import Decoder, stacked
from repmlp_deploy.runtime.tasks import Answer
from repmlp_deploy.serving.images import IMAGE_INPUT, encoded_images, find_image_outputs
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.protocol import (
    BadRequest,
    Failed,
    InferRequest,
    InferResponse,
    NotReady,
    Overloaded,
    ServingError,
    Tensor,
    TensorMetadata,
    TooLarge,
    TooLate,
    UnknownModel,
    datatype_of,
)
from repmlp_deploy.serving.served_model import ServedModel, Version
from repmlp_deploy.text import printable

__all__ = ["EXTENSIONS", "Inference", "ModelMetadata"]

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")

_OUTCOMES: Mapping[type[ServingError], str] = MappingProxyType(
    {BadRequest: "bad", TooLarge: "bad", UnknownModel: "bad", Overloaded: "overloaded", TooLate: "late"}
    | {NotReady: "unavailable"}
)


@dataclass(frozen=True)
class ModelMetadata:
    """What the protocol tells of a model."""

    name: str
    version: str
    platform: str
    inputs: Sequence[TensorMetadata]
    outputs: Sequence[TensorMetadata]

    def as_json(self) -> dict[str, Any]:
        """Return the protocol's form."""
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": self.platform,
            "inputs": [tensor.as_json() for tensor in self.inputs],
            "outputs": [tensor.as_json() for tensor in self.outputs],
        }


class Inference:
    """The protocol's operations on a set of models. Made and used in one event loop.

    Args:
        models: that are served.
        timeout: seconds after which a request that nobody limited gets `TooLate`.
    """

    def __init__(self, models: Models, *, timeout: float = 30.0) -> None:
        self.models, self._timeout = models, timeout
        self._decoder = Decoder()
        self._pool = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="answer")  # for what takes seconds
        self._decoding: dict[str, int] = {}

    def server(self) -> dict[str, Any]:
        """Return what the server says of itself."""
        return {"name": "repmlp-serve", "version": __version__, "extensions": list(EXTENSIONS)}

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Return what a model takes and gives.

        Raises:
            UnknownModel: there is no such model or version.
            NotReady: it does not answer.
        """
        model, images = self.models.find(name)
        found = _version(model, version)
        manifest = found.manifest
        outputs = [_tensor_metadata(spec) for spec in manifest.outputs]
        inputs = [_tensor_metadata(spec) for spec in manifest.inputs]
        if images:
            inputs, outputs = [IMAGE_INPUT], [*outputs, *find_image_outputs(name, manifest).metadata]
        return ModelMetadata(name, found.name, f"repmlp_{found.served.runner.format}", inputs, outputs)

    def model_ready(self, name: str, version: str = "") -> bool:
        """Return whether a model answers.

        Raises:
            UnknownModel: there is no such model or version.
        """
        model, images = self.models.find(name)
        if self.models.stopping or not model.ready:
            return False
        try:
            found = _version(model, version)
        except NotReady:  # since a moment
            return False
        return not images or bool(find_image_outputs(name, found.manifest))

    def config(self, name: str, version: str = "") -> dict[str, Any]:
        """Return the model's configuration, as load generators read it: shapes without the batch."""
        metadata, largest = self.metadata(name, version), self.models.find(name)[0].version().manifest.batch.max
        return {
            "name": name,
            "platform": metadata.platform,
            "backend": "repmlp",
            "max_batch_size": largest,
            "version_policy": {"latest": {"num_versions": 1}},
            "input": [_config_tensor(tensor) for tensor in metadata.inputs],
            "output": [_config_tensor(tensor) for tensor in metadata.outputs],
            "dynamic_batching": {"preferred_batch_size": [largest]},
        }

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Return the protocol's statistics of a model, or of all that answer."""
        names = [name] if name else [model.name for model in self.models.all() if model.ready]
        stats = []
        for one in names:
            model, _ = self.models.find(one)
            found = _version(model, version)
            stats.append({"name": one, "version": found.name, "last_inference": 0, **model.metrics.statistics()})
        return {"model_stats": stats}

    async def infer(
        self, name: str, version: str, request: InferRequest, *, remaining: float | None = None
    ) -> InferResponse:
        """Answer a request.

        Args:
            name: of the model.
            version: that must answer; empty for any.
            request: decoded.
            remaining: seconds that the transport still waits.

        Raises:
            ServingError: it gets no answer; the class says why.
        """
        model, images = self.models.find(name)
        start = time.monotonic()
        limits = [limit for limit in (request.timeout, remaining, self._timeout) if limit is not None]
        limit = max(min(limits), 0.0)
        try:
            async with asyncio.timeout(limit):
                response = await self._answer(model, images, name, version, request, start + limit)
        except TimeoutError:
            raise TooLate(f"the deadline of {limit:.3f} s passed") from None
        model.metrics.seconds.observe(time.monotonic() - start)
        return response

    @contextmanager
    def counted(self, name: str, gone: type[BaseException] = asyncio.CancelledError) -> Iterator[None]:
        """Count a request by its outcome; around all that a host does with it, from its body to the answer.

        Args:
            name: of the model.
            gone: what the host raises if the client has gone, besides CancelledError.

        Raises:
            UnknownModel: there is no such model.
        """
        model, _ = self.models.find(name)
        outcome = "failed"
        try:
            yield
            outcome = "ok"
        except (asyncio.CancelledError, gone):
            outcome = "cancelled"
            raise
        except ServingError as error:
            outcome = _OUTCOMES.get(type(error), "failed")
            raise
        finally:
            model.metrics.outcomes[outcome].inc()

    def close(self) -> None:
        """Give back threads and models."""
        self.models.close()
        self._decoder.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _answer(  # noqa: PLR0913 - the request, taken apart
        self, model: ServedModel, images: bool, name: str, wanted: str, request: InferRequest, deadline: float
    ) -> InferResponse:
        """Answer by the version that is there; where another takes its place meanwhile, by that one."""
        while True:
            version = _version(model, wanted)
            try:
                if images:
                    outputs = await self._from_images(name, model, version, request, deadline)
                else:
                    arrays = _arrays(version, request)
                    outputs = _named(version.manifest, await _batched(model, version, arrays, deadline))
            except BatcherClosed:
                await asyncio.sleep(0)
                continue
            except InputError as error:
                raise BadRequest(str(error)) from None
            return InferResponse(name, version.name, _selected(name, outputs, request), request.id)

    async def _from_images(
        self, name: str, model: ServedModel, version: Version, request: InferRequest, deadline: float
    ) -> list[Tensor]:
        """Return the raw output and what the task makes of it, for encoded images."""
        manifest, task = version.manifest, version.served.task
        extra = find_image_outputs(name, manifest)
        encoded = encoded_images(request, manifest.batch.max)
        async with self._admitted(model, len(encoded)):
            start = time.monotonic()
            begun = [self._decoder.submit(image, manifest.preprocessing) for image in encoded]
            inputs = await _all([asyncio.wrap_future(future) for future in begun])
            model.metrics.preprocess.observe(time.monotonic() - start)
        sizes = [size for _, size in inputs]
        parts = extra.parts(sizes)
        outputs = await _batched(model, version, [stacked([values for values, _ in inputs])], deadline)
        answers: list[Answer] = []
        loop, pool = asyncio.get_running_loop(), self._pool if extra.sized else None
        for part in parts:  # between them, a request that is too late ends
            given = (outputs[0][part], sizes[part], manifest.labels, manifest.scores)
            answers += await loop.run_in_executor(pool, task.answer, *given)
        return [*_named(manifest, outputs), *await loop.run_in_executor(pool, extra.tensors, answers)]

    @asynccontextmanager
    async def _admitted(self, model: ServedModel, samples: int) -> AsyncIterator[None]:
        """Count images that are being decoded: they wait like those in the queue."""
        under_way = self._decoding.get(model.name, 0)
        if under_way and under_way + samples + model.version().batcher.waiting > model.options.queue:
            raise Overloaded(f"{under_way} images are being decoded; the queue holds {model.options.queue}")
        self._decoding[model.name] = under_way + samples
        try:
            yield
        finally:
            self._decoding[model.name] -= samples


async def _all(waited: Sequence[Any]) -> list[Any]:
    """Return all results; after the first failure nobody waits for the rest."""
    tasks = [asyncio.ensure_future(one) for one in waited]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _batched(
    model: ServedModel, version: Version, arrays: Sequence[NDArray[Any]], deadline: float
) -> list[NDArray[Any]]:
    """Wait for the rows of a batch that are this request's."""
    try:
        future = version.batcher.submit(arrays, deadline=deadline)
        return await asyncio.wrap_future(future)
    except QueueFull as error:
        raise Overloaded(f"{model.name} is overloaded: {error}") from None
    except DeadlineMissed as error:
        raise TooLate(str(error)) from None
    except (BatcherClosed, InputError):
        raise
    except Exception as error:
        raise Failed(f"{model.name} failed: {printable(error, 300)}") from error


def _version(model: ServedModel, wanted: str) -> Version:
    found = model.version()
    if wanted and wanted != found.name:
        raise UnknownModel(f"{model.name} has version {found.name}, not {printable(wanted, 100)!r}")
    return found


def _arrays(version: Version, request: InferRequest) -> list[NDArray[Any]]:
    """Return the network's inputs in its order.

    Raises:
        BadRequest: a name or datatype is another, or one is missing.
        InputError: a shape is not the network's.
    """
    specs = version.manifest.inputs
    if request.raw is not None:
        arrays = [_from_body(specs, request.raw)]
    else:
        given = {tensor.name: tensor for tensor in request.inputs}
        if len(given) != len(request.inputs) or set(given) != {spec.name for spec in specs}:
            names, taken = ([*map(str, names)] for names in ((t.name for t in request.inputs), (s.name for s in specs)))
            raise BadRequest(f"inputs are {printable(', '.join(names), 200)}; the model takes {', '.join(taken)}")
        arrays = [_of_type(spec, given[spec.name]) for spec in specs]
    version.served.require_fit(arrays)
    return arrays


def _from_body(specs: Sequence[TensorSpec], raw: bytes | memoryview) -> NDArray[Any]:
    """Return the only input, from a body that holds nothing but its values."""
    if len(specs) > 1:
        raise BadRequest(f"a raw body is one input; the model takes {', '.join(spec.name for spec in specs)}")
    kind, edges = np.dtype(specs[0].dtype), specs[0].shape[1:]
    row = kind.itemsize * math.prod(edge or 1 for edge in edges)
    if not raw or len(raw) % row:
        raise BadRequest(f"the body has {len(raw)} bytes; a sample of {specs[0].name} has {row}")
    return np.frombuffer(raw, kind).reshape(-1, *edges)


def _of_type(spec: TensorSpec, tensor: Tensor) -> NDArray[Any]:
    """Return the values in the network's type; FP16 and BF16 become FP32, which holds every value of them."""
    expected = datatype_of(spec.dtype)
    if tensor.datatype in ("FP16", "BF16") and expected == "FP32":
        return tensor.data.astype(np.float32, copy=False)
    if tensor.datatype != expected:
        raise BadRequest(f"{spec.name} is {printable(tensor.datatype, 40)}; the model takes {expected}")
    return tensor.data


def _selected(name: str, outputs: Sequence[Tensor], request: InferRequest) -> list[Tensor]:
    """Return the outputs that were asked for, in that order."""
    if not request.outputs:
        return list(outputs)
    known = {tensor.name: tensor for tensor in outputs}
    unknown = [wanted.name for wanted in request.outputs if wanted.name not in known]
    if unknown:
        raise BadRequest(f"{name} has no output {printable(unknown[0], 100)!r}; it has {', '.join(known)}")
    names = [wanted.name for wanted in request.outputs]
    if len(set(names)) < len(names):  # an answer would be as large as the caller likes
        raise BadRequest(f"outputs are {printable(', '.join(names), 200)}; name each once")
    return [known[wanted.name] for wanted in request.outputs]


def _named(manifest: Manifest, outputs: Sequence[NDArray[Any]]) -> list[Tensor]:
    return [
        Tensor(spec.name, datatype_of(str(values.dtype)), values)
        for spec, values in zip(manifest.outputs, outputs, strict=True)
    ]


def _tensor_metadata(spec: TensorSpec) -> TensorMetadata:
    shape = tuple(edge if isinstance(edge, int) else -1 for edge in spec.shape)
    return TensorMetadata(spec.name, datatype_of(spec.dtype), shape)


def _config_tensor(tensor: TensorMetadata) -> dict[str, Any]:
    kind = {"BYTES": "STRING"}.get(tensor.datatype, tensor.datatype)
    return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(tensor.shape[1:]) or [1]}
