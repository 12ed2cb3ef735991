"""The loop over labelled data: the counts of every batch, in order, and where a run that was stopped goes on.

What was counted so far is kept in a state file, written beside it and renamed, so that it is always whole. Its name is
a hash of what the result depends on: artifacts, data, trained network. A run that was stopped goes on from it, and a
run that ends removes it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Manifest, hash_file
from repmlp_deploy.errors import ImageError, InputError, OutputError
from repmlp_deploy.evaluation.datasets import Dataset, read_dataset
from repmlp_deploy.evaluation.judging import TRAINED, Engine, Judged, Judging, Run, judge
from repmlp_deploy.evaluation.metrics import TALLIES, Tally
from repmlp_deploy.files import cache_folder, read_json, replace_file
from repmlp_deploy.reading import state_of
from repmlp_deploy.runtime.images import network_input

__all__ = [
    "TRAINED",
    "Evaluation",
    "LabelledFolder",
    "LabelledImages",
    "Progress",
    "Run",
    "discard_state",
    "evaluate",
    "state_folder",
    "state_key",
]

_SAVE_SECONDS = 2.0
_SCORE_SECONDS = 1.0
_LARGEST_STATE_BYTES = 1 << 28
_ENOUGH = 100  # images below which one of them is more than a point

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


class _Shown:
    """The score that is shown meanwhile, computed now and then: that of pairs is of all of them, every time."""

    def __init__(self, tally: Tally) -> None:
        self._tally, self._scores, self._due = tally, dict[str, Any](), time.monotonic()

    def scores(self) -> Mapping[str, Any]:
        """Return the score, which may be a few seconds old."""
        begun = time.monotonic()
        if begun >= self._due:
            self._scores = {self._tally.main: self._tally.scores()[self._tally.main]}
            now = time.monotonic()
            self._due = now + max(_SCORE_SECONDS, 10 * (now - begun))
        return self._scores


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
    engine: Engine = judge,
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
        progress: told after every batch, with scores that may be a few seconds old.
        engine: runs and counts the batches; by default this process.

    Raises:
        ImageError: an image cannot be read.
        InputError: a mask does not fit its image or the network.
        OutputError: the state could not be kept.
    """
    started = time.perf_counter()
    tallies = {name: TALLIES[manifest.task](manifest.classes) for name in runs}
    state = _restored(state_file, key, tallies, len(dataset.samples))
    _require_readable(state.unreadable, skip=skip_unreadable)
    shown = _Shown(next(iter(tallies.values())))
    resumed = state.done
    saved = time.monotonic()
    per_batch = max(1, (batch or manifest.batch.opt) // len(dataset.samples[0].images))
    rest = dataset.samples[state.done :]
    try:
        for judged in engine(Judging(manifest, per_batch, workers, skip_unreadable), runs, rest):
            _count(judged, tallies, state, skip_unreadable=skip_unreadable)
            if progress is not None:
                progress(state.done, len(dataset.samples), shown.scores())
            if time.monotonic() - saved >= _SAVE_SECONDS:
                _save(state_file, key, state, tallies)
                saved = time.monotonic()
    except BaseException:
        _save(state_file, key, state, tallies)
        raise
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    scored = len(dataset.samples) - len(state.unreadable)
    if not scored:
        raise InputError(f"none of {len(dataset.samples)} samples can be read; the first: {state.unreadable[0]}")
    scores = {name: tally.scores() for name, tally in tallies.items()}
    return Evaluation(scores, scored, tuple(state.unreadable), resumed, time.perf_counter() - started)


def state_key(manifest: Manifest, formats: Sequence[str], dataset: Dataset, *, trained: Any = "") -> str:
    """Return the hash of everything that a result depends on.

    Args:
        manifest: of the bundle.
        formats: the artifacts.
        dataset: what they are judged on.
        trained: what the trained network's outputs depend on, as JSON can hold it.
    """
    artifacts = [[name, manifest.artifacts[name].sha256] for name in formats]
    about = [manifest.name, manifest.task, artifacts, manifest.preprocessing.model_dump(mode="json")]
    text = json.dumps([about, manifest.labels, dataset.digest(), trained])
    return hashlib.sha256(text.encode()).hexdigest()


def state_folder() -> Path:
    """Return the folder that keeps states, `eval` in the cache folder."""
    return cache_folder("eval")


def _count(judged: Judged, tallies: Mapping[str, Tally], state: _State, *, skip_unreadable: bool) -> None:
    """Count a batch everywhere, or nowhere."""
    _require_readable(judged.broken, skip=skip_unreadable)
    marks, done, unreadable = {name: tally.mark() for name, tally in tallies.items()}, state.done, len(state.unreadable)
    try:
        for name, counts in judged.counts.items():
            tallies[name].merge(counts)
        state.unreadable += judged.broken
        state.done = done + judged.samples
    except BaseException:  # an interruption between two tallies would make them differ
        for name, tally in tallies.items():
            tally.undo(marks[name])
        del state.unreadable[unreadable:]
        state.done = done
        raise


def _require_readable(broken: Sequence[str], *, skip: bool) -> None:
    if broken and not skip:
        raise ImageError(f"{broken[0]}; pass --skip-unreadable to leave such images out")


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
        if state_of(path, path) is None:
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


class LabelledFolder:
    """A folder with a folder of images per class, or a list file: opens its images for a network.

    Args:
        path: see `datasets`.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __call__(self, manifest: Manifest, calibration: Sequence[Path]) -> LabelledImages:
        """Return the images.

        Args:
            manifest: of the network.
            calibration: image files that ranges are measured on.

        Raises:
            InputError: there are none, or the labels are not the network's classes.
        """
        return LabelledImages(read_dataset(self._path, manifest, "--eval"), manifest, self._path, calibration)


class LabelledImages:
    """The labelled images of one network.

    Attributes:
        source: the folder's or the file's name, and how it was read.
        count: images.
        warnings: what makes an accuracy on them say less than it seems.
    """

    def __init__(self, dataset: Dataset, manifest: Manifest, path: Path, calibration: Sequence[Path]) -> None:
        self._dataset, self._manifest = dataset, manifest
        self.source = f"{path.name}: {dataset.remark}"
        self.count = len(dataset.samples)
        images = [sample.images[0] for sample in dataset.samples]
        self.warnings = (*dataset.warnings, *_few(self.count), *_overlap(images, calibration))

    def right(self, run: Run, tell: Callable[[int, int], None]) -> int:
        """Return for how many images the largest output is that of the label.

        Raises:
            ImageError: an image cannot be read.
        """
        found = evaluate(
            {"it": run},
            self._manifest,
            self._dataset,
            skip_unreadable=True,
            progress=lambda done, total, _scores: tell(done, total),
        )
        if found.unreadable:
            raise ImageError(f"--eval: {found.unreadable[0]}")
        return int(found.scores["it"]["right"])

    def inputs(self, count: int) -> NDArray[Any]:
        """Return the network's input for at most so many images, evenly spaced.

        Raises:
            ImageError: an image cannot be read.
        """
        count = min(count, self.count)
        chosen = [self._dataset.samples[i * self.count // count].images[0] for i in range(count)]
        return np.stack([network_input(path, self._manifest.preprocessing)[0] for path in chosen])


def _few(count: int) -> tuple[str, ...]:
    if count >= _ENOUGH:
        return ()
    return (f"only {count} images in --eval: one of them is {100 / count:.2g} points of accuracy",)


def _overlap(images: Sequence[Path], calibration: Sequence[Path]) -> tuple[str, ...]:
    """Say how many images are calibration images, too; files are compared by their content, if their lengths agree."""
    sizes = {size for path in calibration if (size := _size(path)) is not None}
    same = [path for path in images if _size(path) in sizes]
    if not same:
        return ()
    lengths = {_size(path) for path in same}
    digests = {hash_file(path) for path in calibration if _size(path) in lengths}
    count = sum(hash_file(path) in digests for path in same)
    if not count:
        return ()
    return (f"{count} of {len(images)} images in --eval are calibration images, too: accuracy on others may be lower",)


def _size(path: Path) -> int | None:
    """Return the length of a file in bytes; None where there is none, which reading it says."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
