"""The loop over labelled data: images decoded by several threads, every artifact run on the same batches.

What was counted so far is kept in a state file, written beside it and renamed, so that it is always whole. Its name is
a hash of what the result depends on: artifacts, data, trained network. A run that was stopped goes on from it, and a
run that ends removes it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Manifest
from repmlp_deploy.errors import ImageError, InputError, OutputError
from repmlp_deploy.evaluation.datasets import Dataset, Sample
from repmlp_deploy.evaluation.metrics import TALLIES, Tally
from repmlp_deploy.files import cache_folder, read_json, replace_file
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.images import network_input

__all__ = ["TRAINED", "Evaluation", "Progress", "discard_state", "evaluate", "state_folder", "state_key"]

TRAINED = "trained"
_SAVE_SECONDS = 2.0
_LARGEST_STATE_BYTES = 1 << 28

F32 = NDArray[np.float32]
Run = Callable[[F32], F32]
Progress = Callable[[int, int, Mapping[str, Any]], None]
"""(samples done, samples in all, scores so far of the first artifact)."""


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        scores: artifact, or `trained`, to its scores.
        count: samples that were judged.
        unreadable: samples that were left out, with the reason.
        resumed: samples that an earlier run had judged.
        seconds: of this run.
    """

    scores: Mapping[str, Mapping[str, Any]]
    count: int
    unreadable: tuple[str, ...]
    resumed: int
    seconds: float


@dataclass
class _State:
    """How far an evaluation is."""

    done: int = 0
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Decoded:
    """A sample's images as the network takes them, or why there are none."""

    sample: Sample
    inputs: tuple[F32, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    error: str = ""


def evaluate(  # noqa: PLR0913 - what meets here
    runs: Mapping[str, Run],
    manifest: Manifest,
    dataset: Dataset,
    *,
    state_file: Path | None = None,
    key: str = "",
    batch: int | None = None,
    workers: int | None = None,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every run on a data set.

    Args:
        runs: artifact to what gives its outputs for a batch; one called `trained` is what the others are compared with.
        manifest: of the bundle.
        dataset: of its task.
        state_file: where to keep what was counted; None for nowhere.
        key: what the state belongs to; an earlier state of another key is not used.
        batch: images a batch, default the best of the bundle.
        workers: threads that decode; default: one per processor.
        skip_unreadable: count images that cannot be read instead of stopping.
        progress: told after every batch.

    Raises:
        ImageError: an image cannot be read.
        InputError: a mask does not fit its image or the network.
        OutputError: the state could not be kept.
    """
    started = time.perf_counter()
    tallies = {name: TALLIES[manifest.task](manifest.classes) for name in runs}
    state = _restored(state_file, key, tallies, len(dataset.samples))
    resumed = state.done
    saved = time.monotonic()
    per_batch = max(1, (batch or manifest.batch.opt) // len(dataset.samples[0].images))
    rest = dataset.samples[state.done :]
    try:
        for chunk in _decoded(rest, manifest, per_batch, workers or usable_cpus()):
            _count(chunk, runs, tallies, state, skip_unreadable=skip_unreadable)
            if progress is not None:
                first = next(iter(tallies.values()))
                progress(state.done, len(dataset.samples), {first.main: first.scores()[first.main]})
            if time.monotonic() - saved >= _SAVE_SECONDS:
                _save(state_file, key, state, tallies)
                saved = time.monotonic()
    except BaseException:
        _save(state_file, key, state, tallies)
        raise
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    judged = len(dataset.samples) - len(state.unreadable)
    if not judged:
        raise InputError(f"none of {len(dataset.samples)} samples can be read; the first: {state.unreadable[0]}")
    scores = {name: tally.scores() for name, tally in tallies.items()}
    return Evaluation(scores, judged, tuple(state.unreadable), resumed, time.perf_counter() - started)


def state_key(manifest: Manifest, formats: Sequence[str], dataset: Dataset, *, ckpt_sha256: str = "") -> str:
    """Return the hash of everything that a result depends on."""
    artifacts = [[name, manifest.artifacts[name].sha256] for name in formats]
    about = [manifest.name, manifest.task, artifacts, manifest.preprocessing.model_dump(mode="json")]
    text = json.dumps([about, manifest.labels, dataset.digest(), ckpt_sha256])
    return hashlib.sha256(text.encode()).hexdigest()


def state_folder() -> Path:
    """Return the folder that keeps states, `eval` in the cache folder."""
    return cache_folder("eval")


def _count(
    chunk: Sequence[_Decoded],
    runs: Mapping[str, Run],
    tallies: Mapping[str, Tally],
    state: _State,
    *,
    skip_unreadable: bool,
) -> None:
    """Run a batch and count it everywhere, or nowhere."""
    broken = [decoded.error for decoded in chunk if decoded.error]
    if broken and not skip_unreadable:
        raise ImageError(f"{broken[0]}; pass --skip-unreadable to leave such images out")
    good = [decoded for decoded in chunk if not decoded.error]
    outputs = _outputs(runs, [image for decoded in good for image in decoded.inputs])
    samples = [decoded.sample for decoded in good]
    sizes = [size for decoded in good for size in decoded.sizes]
    before, done, unreadable = {name: tally.state() for name, tally in tallies.items()}, state.done, state.unreadable
    try:
        for name, tally in tallies.items() if good else ():
            tally.add(outputs[name], samples, sizes, None if name == TRAINED else outputs.get(TRAINED))
        state.unreadable = [*unreadable, *broken]
        state.done = done + len(chunk)
    except BaseException:  # an interruption between two tallies would make them differ
        for name, tally in tallies.items():
            tally.restore(before[name])
        state.done, state.unreadable = done, unreadable
        raise


def _outputs(runs: Mapping[str, Run], images: Sequence[F32]) -> dict[str, F32]:
    """Run everything on one batch; return nothing for an empty one."""
    if not images:
        return {}
    inputs = np.stack(images)
    outputs = {name: run(inputs) for name, run in runs.items()}
    shapes = {name: output.shape for name, output in outputs.items()}
    if len(set(shapes.values())) > 1:
        said = ", ".join(f"{name} gives {shape}" for name, shape in shapes.items())
        raise InputError(f"these are different networks: {said}; give the checkpoint that the bundle was made of")
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
    except ImageError as error:
        return _Decoded(sample, error=str(error))
    return _Decoded(sample, tuple(inputs), tuple(sizes))


def discard_state(path: Path) -> None:
    """Remove the state of an earlier run, if there is one.

    Raises:
        InputError: the file is something else.
    """
    if _read_state(path) is not None:
        path.unlink(missing_ok=True)


def _read_state(path: Path) -> Mapping[str, Any] | None:
    """Return what a state file holds; None if there is none.

    Raises:
        InputError: the file is something else.
    """
    try:
        data = read_json(path, _LARGEST_STATE_BYTES)
        if data.keys() == {"key", "done", "unreadable", "tallies"}:
            return {**data, "done": int(data["done"]), "unreadable": [str(error) for error in data["unreadable"]]}
        raise ValueError("other keys")  # noqa: TRY301 - one more way to be no state
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        if not path.exists():
            return None
        raise _no_state(path, error) from None


def _no_state(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is no state of an evaluation ({type(error).__name__}): remove it, or name another")


def _restored(path: Path | None, key: str, tallies: Mapping[str, Tally], count: int) -> _State:
    """Restore the state of an earlier run with the same key and fill the tallies from it; otherwise start afresh."""
    data = None if path is None else _read_state(path)
    if path is None or data is None:
        return _State()
    if data["key"] != key or not 0 <= data["done"] <= count or set(data["tallies"]) != set(tallies):
        return _State()
    try:
        for name, tally in tallies.items():
            tally.restore(data["tallies"][name])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _no_state(path, error) from None
    return _State(data["done"], data["unreadable"])


def _save(path: Path | None, key: str, state: _State, tallies: Mapping[str, Tally]) -> None:
    if path is None or not state.done:
        return
    data = {"key": key, "done": state.done, "unreadable": state.unreadable}
    data["tallies"] = {name: tally.state() for name, tally in tallies.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(data).encode(), durable=True)
    except OSError as error:
        raise OutputError(
            f"could not keep the state in {path}: {error.strerror or error}; name another --state"
        ) from None
