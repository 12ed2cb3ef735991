"""Batches of labelled data: images decoded by several threads, every artifact run on them, what they count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Manifest
from repmlp_deploy.errors import InputError
from repmlp_deploy.evaluation.datasets import Sample
from repmlp_deploy.evaluation.metrics import TALLIES
from repmlp_deploy.reading import DiskError
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.images import network_input

__all__ = ["TRAINED", "Engine", "Judged", "Judging", "Run", "judge"]

TRAINED = "trained"

F32 = NDArray[np.float32]
Run = Callable[[F32], F32]


@dataclass(frozen=True)
class Judging:
    """How samples are judged.

    Attributes:
        manifest: of the bundle.
        batch: samples a batch.
        workers: threads that decode; None for one per processor.
        skip_unreadable: judge the others of a batch in which images cannot be read.
    """

    manifest: Manifest
    batch: int
    workers: int | None = None
    skip_unreadable: bool = False


@dataclass(frozen=True)
class Judged:
    """What a batch counts.

    Attributes:
        samples: of the batch.
        broken: why samples of it cannot be read.
        counts: artifact, or `trained`, to the state of a tally of this batch alone.
    """

    samples: int
    broken: tuple[str, ...]
    counts: Mapping[str, Mapping[str, Any]]


Engine = Callable[[Judging, Mapping[str, Run], Sequence[Sample]], Iterator[Judged]]
"""Yields what every batch counts, in order."""


@dataclass(frozen=True)
class _Decoded:
    """A sample's images as the network takes them, or why there are none."""

    sample: Sample
    inputs: tuple[F32, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    error: str = ""


def judge(how: Judging, runs: Mapping[str, Run], samples: Sequence[Sample]) -> Iterator[Judged]:
    """Judge samples in this process. See `Engine`.

    Raises:
        InputError: a mask does not fit its image or the network.
    """
    for chunk in _decoded(samples, how.manifest, how.batch, how.workers or usable_cpus()):
        yield _judged(chunk, how, runs)


def _judged(chunk: Sequence[_Decoded], how: Judging, runs: Mapping[str, Run]) -> Judged:
    broken = tuple(decoded.error for decoded in chunk if decoded.error)
    good = [decoded for decoded in chunk if not decoded.error]
    if not good or (broken and not how.skip_unreadable):
        return Judged(len(chunk), broken, {})
    outputs = _outputs(runs, [image for decoded in good for image in decoded.inputs])
    samples = [decoded.sample for decoded in good]
    sizes = [size for decoded in good for size in decoded.sizes]
    counts = {}
    for name in runs:
        tally = TALLIES[how.manifest.task](how.manifest.classes)
        tally.add(outputs[name], samples, sizes, None if name == TRAINED else outputs.get(TRAINED))
        counts[name] = tally.state()
    return Judged(len(chunk), broken, counts)


def _outputs(runs: Mapping[str, Run], images: Sequence[F32]) -> dict[str, F32]:
    """Run everything on one batch."""
    inputs = np.stack(images)
    outputs = {name: run(inputs) for name, run in runs.items()}
    shapes = {name: output.shape for name, output in outputs.items()}
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"{name} gives {shape}" for name, shape in shapes.items())
        raise InputError(f"these are different networks: {said}; give the checkpoint that the bundle was made from")
    return outputs


def _decoded(samples: Sequence[Sample], manifest: Manifest, batch: int, workers: int) -> Iterator[list[_Decoded]]:
    """Yield the samples in order, one batch at a time; the next batches are decoded while one runs."""
    chunks = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    ahead = 1 + -(-workers // batch)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting: list[list[Future[_Decoded]]] = []
        try:
            for chunk in chunks:
                waiting.append([pool.submit(_decode, sample, manifest) for sample in chunk])
                if len(waiting) > ahead:
                    yield [future.result() for future in waiting.pop(0)]
            while waiting:
                yield [future.result() for future in waiting.pop(0)]
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()


def _decode(sample: Sample, manifest: Manifest) -> _Decoded:
    inputs, sizes = [], []
    try:
        for path in sample.images:
            values, size = network_input(path, manifest.preprocessing)
            inputs.append(values)
            sizes.append(size)
    except DiskError:  # later it may be read
        raise
    except InputError as error:  # it is no image, or this user may not read it
        return _Decoded(sample, error=str(error))
    return _Decoded(sample, tuple(inputs), tuple(sizes))
