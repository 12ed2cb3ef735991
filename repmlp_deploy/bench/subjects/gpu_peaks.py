"""Peaks of the GPU: its fastest matrix products and memory stream, by its own clock."""

from __future__ import annotations

from collections.abc import Callable

import torch

from repmlp_deploy.bench.measure.results import Machine
from repmlp_deploy.bench.subjects.cuda import DTYPES, set_float32_products, times_on_stream, why_no_cuda
from repmlp_deploy.errors import MissingDevice

__all__ = ["measure_gpu_peaks"]

EDGE, STREAM_BYTES, CALLS = 8192, 1 << 30, 20


def measure_gpu_peaks() -> Machine:
    """Measure the peaks of the first GPU.

    Raises:
        MissingDevice: this torch finds no GPU.
    """
    missing = why_no_cuda()
    if missing is not None:
        raise MissingDevice(missing)
    device, peaks = torch.device("cuda", 0), {}
    for precision, dtype in DTYPES.items():
        set_float32_products(precision)
        a, b = (torch.rand(EDGE, EDGE, device=device, dtype=dtype) for _ in range(2))
        peaks[precision] = 2 * EDGE**3 / _fastest_seconds(lambda a=a, b=b: torch.mm(a, b)) / 1e9  # type: ignore[misc]
    x, y = (torch.ones(STREAM_BYTES // 4, device=device) for _ in range(2))
    out = torch.empty_like(x)
    bandwidth = 3 * STREAM_BYTES / _fastest_seconds(lambda: torch.add(x, y, out=out)) / 1e9
    source = f"torch on {torch.cuda.get_device_name(device)}, {EDGE}x{EDGE}"
    return Machine(peak_gflops=peaks, peak_source=dict.fromkeys(peaks, source), bandwidth_gb_s=bandwidth)


def _fastest_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest call; the first ones warm up."""
    return min(times_on_stream(call, CALLS)) / 1e3
