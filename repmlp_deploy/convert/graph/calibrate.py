"""Calibration: samples of what a network will see, and the ranges its activations take on them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import hash_file
from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.capture import captured_output
from repmlp_deploy.convert.graph.sample_checks import check_samples
from repmlp_deploy.convert.options import ENOUGH_SAMPLES
from repmlp_deploy.convert.step import Tell, tell_nobody
from repmlp_deploy.errors import InputError, optional_imports
from repmlp_deploy.runtime.images import IMAGE_SUFFIXES, find_images, network_input

with optional_imports():  # onnxruntime, or onnx, which its quantization needs
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

__all__ = [
    "LIMIT",
    "METHODS",
    "UNSEEN",
    "Calibration",
    "measure_ranges",
    "read_calibration",
    "take_calibration",
]

LIMIT = 256
"""Samples whose ranges are measured at most, evenly spaced over what is given: more change no range much."""

UNSEEN = 8
"""Samples kept out of the ranges at most, for the probe: int8 is judged on images that its ranges have not seen."""

_PART_UNSEEN = 5  # one of so many, where there are few

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
"""How a range is chosen, as ONNX Runtime implements it: all values, least relative entropy, 99.999 % of the values."""

_CHUNK = 4  # samples whose every activation is in memory at a time


@dataclass(frozen=True)
class Calibration:
    """Samples by the network's inputs.

    Attributes:
        samples: name of every input to (n, …), the same n for all; ranges are measured on them.
        source: where they are from, for the report.
        available: how many there were.
        unseen: samples that are in no range, likewise.
        warnings: what looks wrong about them.
    """

    samples: Mapping[str, NDArray[Any]]
    source: str
    available: int
    unseen: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.samples.values())))

    def feeds(self, size: int = 1) -> list[dict[str, NDArray[Any]]]:
        """Return all samples as feeds of a batch size; the last is filled with first ones."""
        return [dict(zip(self.samples, batch, strict=True)) for batch in self.batches(size)]

    def batches(self, size: int) -> list[list[NDArray[Any]]]:
        """Return all samples in batches of a size, an array for every input; the last is filled with first ones."""
        order = np.arange(-(-len(self) // size) * size) % len(self)
        return [[values[part] for values in self.samples.values()] for part in order.reshape(-1, size)]

    def chosen(self, count: int) -> list[NDArray[Any]]:
        """Return at most `count` samples, an array for every input: unseen ones first, then others evenly spaced."""
        order = _spaced(len(self), count - self._unseen())
        kept = {name: values[:count] for name, values in self.unseen.items()}
        return [np.concatenate([kept.get(name, values[:0]), values[order]]) for name, values in self.samples.items()]

    def probe_kinds(self, count: int) -> list[str]:
        """Return what each of the `count` samples of `chosen` is."""
        unseen = min(self._unseen(), count)
        return ["unseen"] * unseen + ["calibration"] * (count - unseen)

    def _unseen(self) -> int:
        return len(next(iter(self.unseen.values()), ()))

    def remarks(self) -> list[str]:
        """Return what a reader of the report should know."""
        probed = f"the probe has {self._unseen() or 'none'} of those that were not used"
        return [f"calibrated with {len(self)} of {self.available} samples of {self.source}; {probed}"]


def read_calibration(
    path: str | Path,
    inputs: Mapping[str, Sequence[int]],
    preprocessing: Preprocessing | None,
    types: Mapping[str, np.dtype[Any]] = MappingProxyType({}),
) -> Calibration:
    """Read the samples in `path`.

    Args:
        path: a folder of images, searched through all its folders; or a `.npz` of arrays (n, …) that the network takes
            as they are, under the names of its inputs, or a single array for a network with one input.
        inputs: name of every input to its shape without the batch.
        preprocessing: from an image to the input; None where nobody said what images the network takes.
        types: name of an input to the type that the network takes; by default floats become float32 and integers stay.

    Raises:
        InputError: `path` holds nothing usable; the first thing wrong is named.
        ImageError: a file is a damaged image.
    """
    path = Path(path)
    if path.is_dir():
        return _read_images(path, inputs, preprocessing)
    if path.suffix.lower() != ".npz" or not path.is_file():
        raise InputError(f"--calibration {path}: expected a folder of images or a .npz file")
    return _read_arrays(path, inputs, preprocessing, types)


def take_calibration(
    arrays: Mapping[str, NDArray[Any]],
    inputs: Mapping[str, Sequence[int]],
    preprocessing: Preprocessing | None = None,
    types: Mapping[str, np.dtype[Any]] = MappingProxyType({}),
) -> Calibration:
    """Take samples that are in memory: arrays (n, …) as the network takes them, by the names of its inputs.

    Args:
        arrays: input to samples.
        inputs: see `read_calibration`.
        preprocessing: see `read_calibration`.
        types: see `read_calibration`.

    Raises:
        InputError: they do not fit the network, or are no such images as `preprocessing` makes.
    """
    return _checked(dict(arrays), inputs, "calibration", "arrays in memory", preprocessing, types)


def measure_ranges(  # noqa: PLR0913 - how ranges are measured, and on what
    graph: bytes,
    calibration: Calibration,
    tensors: Sequence[str],
    method: str,
    tell: Tell = tell_nobody,
    *,
    batch: int = 1,
) -> dict[str, float]:
    """Measure the largest absolute value that int8 must hold, for every one of `tensors`.

    Args:
        graph: a serialized float32 model.
        calibration: what to run it on.
        tensors: names of activations.
        method: an entry of `METHODS`.
        tell: is told how many of how many samples ran.
        batch: samples that the graph takes at once, where that is fixed.

    Raises:
        InputError: the calibrator cannot find a range.
    """
    with tempfile.TemporaryDirectory(prefix="repmlp-calibrate-") as folder, captured_output():
        source = Path(folder, "source.onnx")
        source.write_bytes(graph)
        calibrator = create_calibrator(
            source,
            ["Conv", "Gemm", "MatMul"],
            augmented_model_path=str(Path(folder, "augmented.onnx")),
            calibrate_method=METHODS[method],
            extra_options={"symmetric": True},
        )
        feeds, chunk = calibration.feeds(batch), max(1, _CHUNK // batch)
        for start in range(0, len(feeds), chunk):
            calibrator.collect_data(_Feeds(feeds[start : start + chunk]))
            tell(min((start + chunk) * batch, len(calibration)), len(calibration))
        measured = calibrator.compute_data()
    ranges = {}
    for name in tensors:
        if name not in measured.keys():  # noqa: SIM118 - not a mapping
            raise InputError(f"calibration measured no range of {name}")
        low, high = measured[name].range_value
        ranges[name] = max(abs(float(np.min(low))), abs(float(np.max(high))))
    return ranges


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        self._left: Iterator[Mapping[str, NDArray[Any]]] = iter(feeds)

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the next feed; None after the last."""
        return next(self._left, None)


def _read_images(path: Path, inputs: Mapping[str, Sequence[int]], how: Preprocessing | None) -> Calibration:
    if how is None:
        raise InputError(
            f"--calibration {path}: nobody said what images this network takes: pass --card, "
            "or give a .npz of the arrays it takes"
        )
    if len(inputs) > 1:
        raise InputError(
            f"--calibration {path}: the network takes {', '.join(inputs)}: give a .npz with an array for each"
        )
    files = find_images(path)
    if not files:
        raise InputError(f"--calibration {path} holds no images; expected {', '.join(IMAGE_SUFFIXES)} files")
    name, shape = next(iter(inputs.items()))
    order = _spaced(len(files), LIMIT + UNSEEN)
    samples = np.empty((len(order), *shape), np.float32)
    for i, index in enumerate(order):
        samples[i] = network_input(files[index], how)[0]
    return _split({name: samples}, f"--calibration {path}", f"{path.name}/", len(files), how)


def _read_arrays(
    path: Path,
    inputs: Mapping[str, Sequence[int]],
    how: Preprocessing | None,
    types: Mapping[str, np.dtype[Any]],
) -> Calibration:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # noqa: BLE001 - archives make zipfile, zlib and numpy raise whatever they like
        raise InputError(f"--calibration {path} cannot be read: {error or type(error).__name__}") from None
    source = f"{path.name} (sha256 {hash_file(path)[:12]})"
    return _checked(found, inputs, f"--calibration {path}", source, how, types)


def _checked(  # noqa: PLR0913 - what is given, and what it must fit
    found: dict[str, NDArray[Any]],
    inputs: Mapping[str, Sequence[int]],
    what: str,
    source: str,
    how: Preprocessing | None,
    types: Mapping[str, np.dtype[Any]],
) -> Calibration:
    """Return the arrays of the network's inputs."""
    if len(inputs) == len(found) == 1:
        found = dict(zip(inputs, found.values(), strict=True))
    samples = {}
    for name, shape in inputs.items():
        if name not in found:
            raise InputError(f"{what} holds {', '.join(found) or 'nothing'}; the network takes {name}")
        values = np.asarray(found[name])
        if values.shape[1:] != tuple(shape) or not len(values):
            expected = ", ".join(str(edge) for edge in shape)
            raise InputError(f"{what}: {name} is {values.shape}; the network takes (N, {expected})")
        any_integer = how is None and np.issubdtype(values.dtype, np.integer)
        kind = types.get(name, values.dtype if any_integer else np.dtype(np.float32))
        values = _in_type(values, kind, f"{what}: {name}", " normalised: give that, or images" if how else "")
        samples[name] = values[_spaced(len(values), LIMIT + UNSEEN)]
    lengths = sorted({len(found[name]) for name in inputs})
    if len(lengths) > 1:
        raise InputError(f"{what}: its arrays hold {', '.join(map(str, lengths))} samples")
    return _split(samples, what, source, lengths[0], how)


def _in_type(values: NDArray[Any], kind: np.dtype[Any], what: str, remark: str) -> NDArray[Any]:
    """Return the values in the type that the network takes; integers and flags must stay what they are."""
    floats = np.issubdtype(kind, np.floating)
    if np.issubdtype(values.dtype, np.floating if floats else np.integer) or (values.dtype == kind == np.bool_):
        made = values.astype(kind, copy=False)
        if floats and not np.isfinite(made).all():
            raise InputError(f"{what} has values that are not finite")
        if floats or np.array_equal(made, values):
            return made
    raise InputError(f"{what} is {values.dtype}; the network takes {kind}{remark and ','}{remark}")


def _split(
    values: Mapping[str, NDArray[Any]], what: str, source: str, available: int, how: Preprocessing | None
) -> Calibration:
    """Return the samples, some of them kept out of the ranges; refuse those that no range can come from."""
    warnings = check_samples(values, what, how)
    count = len(next(iter(values.values())))
    if count < ENOUGH_SAMPLES:
        warnings.append(
            f"only {count} calibration samples; expected {ENOUGH_SAMPLES} or more, so the int8 ranges are a guess"
        )
    unseen = _spaced(count, min(UNSEEN, count // _PART_UNSEEN))
    seen = [i for i in range(count) if i not in set(unseen)]
    return Calibration(
        {name: array[seen] for name, array in values.items()},
        source,
        available,
        {name: array[unseen] for name, array in values.items()} if unseen else {},
        tuple(warnings),
    )


def _spaced(available: int, count: int) -> list[int]:
    """Return at most `count` indices, evenly over `available`."""
    count = min(available, count)
    return [i * available // count for i in range(count)]
