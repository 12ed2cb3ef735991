"""PyTorch on an NVIDIA GPU: a network in one of four arithmetics, with times by the GPU's own clock.

`run` takes arrays of the host and gives arrays of the host, as the rows of engines and of ONNX Runtime do, so that
latencies can be compared: the copy back waits until the GPU is done. `device_ms` leaves the copies out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repmlp_deploy.bench.measure.results import ProfileLine
from repmlp_deploy.errors import MissingDevice

__all__ = ["DTYPES", "CudaNetwork", "network_in", "set_float32_products", "times_on_stream", "why_no_cuda"]

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precision to the type of weights and activations; tf32 rounds the factors of products to 10 bits of mantissa."""


def why_no_cuda() -> str | None:
    """Return why this torch does not run on a GPU; None if it does."""
    if torch.cuda.is_available():
        return None
    built = f"is built for CUDA {torch.version.cuda}, and finds no GPU" if torch.version.cuda else "has no CUDA"
    return f"torch {torch.__version__} {built}: install a build of torch that fits the driver"


def network_in(network: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """Return a network on a device, with weights in the type of an entry of `DTYPES`; it may share them."""
    return network.to(device=device, dtype=DTYPES[precision])


def set_float32_products(precision: str) -> None:
    """Let float32 products of this process run in TF32, or forbid it."""
    arithmetic = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = arithmetic
    torch.backends.cudnn.conv.fp32_precision = arithmetic  # type: ignore[attr-defined]


def times_on_stream(call: Callable[[], object], calls: int) -> list[float]:
    """Return the milliseconds of every call, between two events on the current stream."""
    times = []
    for _ in range(calls):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return times


class CudaNetwork:
    """A PyTorch network on the first GPU.

    Args:
        network: in float32, on the CPU.
        precision: an entry of `DTYPES`.
        compiled: whether inductor compiles it.

    Raises:
        MissingDevice: this torch finds no GPU.
    """

    def __init__(self, network: nn.Module, precision: str, *, compiled: bool) -> None:
        missing = why_no_cuda()
        if missing is not None:
            raise MissingDevice(missing)
        set_float32_products(precision)
        self._device, self._dtype = torch.device("cuda", 0), DTYPES[precision]
        placed = network_in(network, precision, self._device)
        self._network = torch.compile(placed) if compiled else placed
        self.proof: dict[str, Any] = {
            "runtime": f"torch {torch.__version__}, {'compiled by inductor' if compiled else 'eager'}",
            "device": f"cuda, {torch.cuda.get_device_name(self._device)}",
            "dtype": str(self._dtype).removeprefix("torch."),
            "float32 products": torch.backends.cuda.matmul.fp32_precision,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, classes) float32, both on the host."""
        with torch.inference_mode():
            output: NDArray[np.float32] = self._network(self._placed(batch)).float().cpu().numpy()
        return output

    def device_ms(self, batch: NDArray[np.float32], calls: int) -> float:
        """Return the median milliseconds of the network alone, between two events on its stream."""
        images = self._placed(batch)
        with torch.inference_mode():
            return float(statistics.median(times_on_stream(lambda: self._network(images), calls)))

    def profile(self, batch: NDArray[np.float32], calls: int) -> list[ProfileLine]:
        """Return nothing: PyTorch rows are not profiled."""
        del batch, calls
        return []

    def _placed(self, batch: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(batch).to(device=self._device, dtype=self._dtype)
