"""The probe: recorded inputs and the trained network's outputs for them."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.errors import BundleError

__all__ = ["PROBE", "Probe"]

PROBE = "probe.npz"

_LARGEST_BYTES = 1 << 30
_LARGEST_RATIO = 20  # of unpacked to packed size; np.savez does not compress


@dataclass(frozen=True)
class Probe:
    """Seeded inputs and the trained network's outputs for them.

    Attributes:
        inputs: (n, C, H, W) float32; (n, H, W, C) uint8 where the artifacts take that.
        reference: (n, classes) float64, from the trained network in float64.
        float32: (n, classes) float32, the same network in float32.
        further_inputs: of a network with several inputs, those after the first.
        further_outputs: of a network with several outputs, `reference` and `float32` of those after the first.
    """

    inputs: NDArray[Any]
    reference: NDArray[np.float64]
    float32: NDArray[np.float32]
    further_inputs: tuple[NDArray[Any], ...] = ()
    further_outputs: tuple[tuple[NDArray[np.float64], NDArray[np.float32]], ...] = ()

    def outputs(self) -> list[tuple[NDArray[np.float64], NDArray[np.float32]]]:
        """Return (reference, float32) of every output."""
        return [(self.reference, self.float32), *self.further_outputs]

    def to_bytes(self) -> bytes:
        """Return the content of `probe.npz`."""
        buffer = io.BytesIO()
        arrays = {"inputs": self.inputs, "reference": self.reference, "float32": self.float32}
        arrays |= {f"inputs.{i}": value for i, value in enumerate(self.further_inputs, 1)}
        for i, (reference, float32) in enumerate(self.further_outputs, 1):
            arrays |= {f"reference.{i}": reference, f"float32.{i}": float32}
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Probe:
        """Return the probe in the content of a `probe.npz`.

        Raises:
            BundleError: it holds something else.
        """
        try:
            _check_members(data)
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                further = sum(name.startswith("reference.") for name in arrays.files)
                probe = cls(
                    arrays["inputs"],
                    arrays["reference"],
                    arrays["float32"],
                    tuple(arrays[f"inputs.{i}"] for i in range(1, sum(n.startswith("inputs") for n in arrays.files))),
                    tuple((arrays[f"reference.{i}"], arrays[f"float32.{i}"]) for i in range(1, further + 1)),
                )
        except Exception as error:  # noqa: BLE001 - archives make zipfile, zlib, tokenize and numpy raise what they like
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise BundleError(f"{PROBE} is not a probe: {said}") from None
        probe.check()
        return probe

    def check(self) -> None:
        """Raise BundleError unless every array has numbers, every output is finite, and samples correspond."""
        samples = len(self.inputs) if self.inputs.ndim else 0
        arrays = [self.inputs, *self.further_inputs, *(array for pair in self.outputs() for array in pair)]
        if any(array.dtype.kind not in "fiub" for array in arrays):
            raise BundleError(f"{PROBE} is not a probe: an array holds no numbers")
        if not samples or any(not array.ndim or len(array) != samples for array in arrays):
            raise BundleError(f"{PROBE} is not a probe: its arrays have different numbers of samples, or none")
        for reference, float32 in self.outputs():
            if reference.shape != float32.shape:
                raise BundleError(f"{PROBE} is not a probe: outputs have shapes {reference.shape} and {float32.shape}")
        if not all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
            raise BundleError(f"{PROBE} is not a probe: a value is not finite")

    def batch(self, size: int) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Return inputs and references of a batch of `size`, cycling through the samples."""
        order = np.arange(size) % len(self.inputs)
        return self.inputs[order], self.reference[order]

    def batches(self, size: int, start: int = 0) -> tuple[list[NDArray[Any]], list[NDArray[np.float64]]]:
        """Return every input and every reference of a batch of `size`, cycling through the samples from `start` on."""
        order = (start + np.arange(size)) % len(self.inputs)
        inputs = [value[order] for value in (self.inputs, *self.further_inputs)]
        return inputs, [reference[order] for reference, _ in self.outputs()]


def _check_members(data: bytes) -> None:
    """Raise ValueError if the archive would unpack to far more than a probe holds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > _LARGEST_BYTES or unpacked > _LARGEST_RATIO * len(data):
        raise ValueError(f"it would unpack to {unpacked} bytes")
