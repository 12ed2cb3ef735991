"""Calibration: samples of what a network will see, and the ranges its activations take on them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import hash_file
from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.capture import captured_output
from repmlp_deploy.errors import InputError, MissingDependency
from repmlp_deploy.runtime.images import IMAGE_SUFFIXES, open_image, preprocess

try:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
except ImportError:
    raise MissingDependency("onnxruntime", "cpu") from None

__all__ = ["ENOUGH", "LIMIT", "METHODS", "Calibration", "measure_ranges", "read_calibration", "take_calibration"]

ENOUGH = 32
"""Samples below which the ranges are a guess: the report says so."""

LIMIT = 256
"""Samples used at most, evenly spaced over what is given: more change no range worth the memory."""

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
        samples: name of every input to (n, …) float32, the same n for all.
        source: where they are from, for the report.
        available: how many there were.
    """

    samples: Mapping[str, NDArray[Any]]
    source: str
    available: int

    def __len__(self) -> int:
        return len(next(iter(self.samples.values())))

    def feeds(self) -> list[dict[str, NDArray[Any]]]:
        """Return one feed per sample, batch 1."""
        return [{name: values[i : i + 1] for name, values in self.samples.items()} for i in range(len(self))]

    def chosen(self, count: int) -> list[NDArray[Any]]:
        """Return `count` samples evenly spaced, an array for every input."""
        order = _spaced(len(self), count)
        return [values[order] for values in self.samples.values()]

    def remarks(self) -> list[str]:
        """Return what a reader of the report should know."""
        notes = [f"calibrated with {len(self)} of {self.available} samples of {self.source}"]
        if len(self) < ENOUGH:
            notes.append(
                f"only {len(self)} calibration samples: at least {ENOUGH} are asked for, so the int8 ranges are a guess"
            )
        return notes


def read_calibration(
    path: str | Path, inputs: Mapping[str, Sequence[int]], preprocessing: Preprocessing | None
) -> Calibration:
    """Read the samples in `path`.

    Args:
        path: a folder of images, searched through all its folders; or a `.npz` of arrays (n, …) that the network takes
            as they are, under the names of its inputs, or a single array for a network with one input.
        inputs: name of every input to its shape without the batch.
        preprocessing: from an image to the input; None where nobody said what images the network takes.

    Raises:
        InputError: `path` holds nothing usable; the first thing wrong is named.
        ImageError: a file is a damaged image.
    """
    path = Path(path)
    if path.is_dir():
        return _read_images(path, inputs, preprocessing)
    if path.suffix.lower() != ".npz" or not path.is_file():
        raise InputError(f"--calibration {path}: expected a folder of images or a .npz file")
    return _read_arrays(path, inputs)


def take_calibration(arrays: Mapping[str, NDArray[Any]], inputs: Mapping[str, Sequence[int]]) -> Calibration:
    """Take samples that are in memory: arrays (n, …) as the network takes them, by the names of its inputs.

    Raises:
        InputError: they do not fit the network.
    """
    return _checked(dict(arrays), inputs, "calibration", "arrays in memory")


def measure_ranges(graph: bytes, calibration: Calibration, tensors: Sequence[str], method: str) -> dict[str, float]:
    """Measure the largest absolute value that int8 must hold, for every one of `tensors`.

    Args:
        graph: a serialized float32 model.
        calibration: what to run it on.
        tensors: names of activations.
        method: an entry of `METHODS`.

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
        feeds = calibration.feeds()
        for start in range(0, len(feeds), _CHUNK):
            calibrator.collect_data(_Feeds(feeds[start : start + _CHUNK]))
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
    files = sorted(
        p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and p.name[0] != "."
    )
    if not files:
        raise InputError(f"--calibration {path} holds no images; expected {', '.join(IMAGE_SUFFIXES)} files")
    name, shape = next(iter(inputs.items()))
    samples = np.empty((min(len(files), LIMIT), *shape), np.float32)
    for i, index in enumerate(_spaced(len(files), LIMIT)):
        samples[i] = preprocess(open_image(files[index]), how)
    return Calibration({name: samples}, f"{path.name}/", len(files))


def _read_arrays(path: Path, inputs: Mapping[str, Sequence[int]]) -> Calibration:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise InputError(f"--calibration {path} cannot be read: {error}") from None
    return _checked(found, inputs, f"--calibration {path}", f"{path.name} (sha256 {hash_file(path)[:12]})")


def _checked(
    found: dict[str, NDArray[Any]], inputs: Mapping[str, Sequence[int]], what: str, source: str
) -> Calibration:
    """Return the arrays of the network's inputs."""
    if len(inputs) == len(found) == 1:
        found = dict(zip(inputs, found.values(), strict=True))
    samples = {}
    for name, shape in inputs.items():
        if name not in found:
            raise InputError(f"{what} holds {', '.join(found) or 'nothing'}; the network takes {name}")
        values = found[name]
        if values.shape[1:] != tuple(shape) or not len(values):
            expected = ", ".join(str(edge) for edge in shape)
            raise InputError(f"{what}: {name} is {values.shape}; the network takes (N, {expected})")
        if np.issubdtype(values.dtype, np.floating):
            values = values.astype(np.float32, copy=False)
            if not np.isfinite(values).all():
                raise InputError(f"{what}: {name} has values that are not finite")
        samples[name] = values[_spaced(len(values), LIMIT)]
    lengths = sorted({len(found[name]) for name in inputs})
    if len(lengths) > 1:
        raise InputError(f"{what}: its arrays hold {', '.join(map(str, lengths))} samples")
    return Calibration(samples, source, lengths[0])


def _spaced(available: int, count: int) -> list[int]:
    """Return at most `count` indices, evenly over `available`."""
    count = min(available, count)
    return [i * available // count for i in range(count)]
