"""Peaks: the fastest matrix products and memory stream this machine shows, and the roof they make.

A product of two n×n matrices is n³ multiply-adds, two operations each. For every precision each library that is
installed is tried, and the fastest single run counts: a roof is what can be reached, not what is typical. The
stream is c = a + b over arrays far larger than any cache, three arrays' bytes a pass.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import torch

from repmlp_deploy.bench.counting.counts import Counts
from repmlp_deploy.bench.measure.results import Machine, Roofline

__all__ = ["best_of", "measure_peaks", "roofline"]

EDGES = (1536,)
SECONDS, SLOW_SECONDS = 0.3, 1.0
STREAM_BYTES = 1 << 28

Product = Callable[[], object]


def measure_peaks(threads: int) -> Machine:
    """Measure the machine's peaks with this many threads."""
    torch.set_num_threads(threads)
    peaks: dict[str, float] = {}
    sources: dict[str, str] = {}
    for precision, library, edge, product in _products(threads):
        gflops = 2 * edge**3 / _fastest(product) / 1e9
        if gflops > peaks.get(precision, 0.0):
            peaks[precision], sources[precision] = gflops, f"{library}, {edge}x{edge}"
    a, b = torch.ones(STREAM_BYTES // 4), torch.ones(STREAM_BYTES // 4)
    c = torch.empty_like(a)
    bandwidth = 3 * STREAM_BYTES / _fastest(lambda: torch.add(a, b, out=c)) / 1e9
    return Machine(peak_gflops=peaks, peak_source=sources, bandwidth_gb_s=bandwidth)


def best_of(first: Machine, second: Machine) -> Machine:
    """Return the higher of two measurements of every peak: what else ran on the machine can only lower one."""
    peaks, sources = dict(first.peak_gflops), dict(first.peak_source)
    for precision, gflops in second.peak_gflops.items():
        if gflops > peaks.get(precision, 0.0):
            peaks[precision], sources[precision] = gflops, second.peak_source[precision]
    return Machine(
        peak_gflops=peaks,
        peak_source=sources,
        bandwidth_gb_s=max(first.bandwidth_gb_s, second.bandwidth_gb_s),
    )


def roofline(counts: Counts, batch: int, precision: str, latency_ms: float, machine: Machine | None) -> Roofline:
    """Return where a row of this latency lies under the machine's roof."""
    gflops = 2 * counts.macs * batch / (latency_ms / 1e3) / 1e9
    intensity = counts.intensity(batch, precision)
    peak = None if machine is None else machine.peak_gflops.get(precision)
    if machine is None or peak is None:
        return Roofline(gflops=gflops, intensity=intensity, attainable_gflops=None, share=None)
    attainable = min(peak, intensity * machine.bandwidth_gb_s)
    return Roofline(gflops=gflops, intensity=intensity, attainable_gflops=attainable, share=gflops / attainable)


def _fastest(call: Product) -> float:
    """Return the seconds of the fastest of as many calls as fit the time, at least three; of a slow call the first's.

    Products in a precision that the CPU has no instructions for take seconds, and are no roof.
    """
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started  # it also warms up
    if first > SLOW_SECONDS:
        return first
    times: list[float] = []
    ends = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < ends:  # noqa: PLR2004 - named in the docstring
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _products(threads: int) -> Iterator[tuple[str, str, int, Product]]:
    """Return precision, library, edge and a call that multiplies two edge×edge matrices."""
    for edge in EDGES:
        a, b = torch.rand(edge, edge), torch.rand(edge, edge)
        c = torch.empty_like(a)
        yield "fp32", "torch", edge, lambda a=a, b=b, c=c: torch.mm(a, b, out=c)  # type: ignore[misc]
        x, y = a.numpy(), b.numpy()
        yield "fp32", "numpy", edge, lambda x=x, y=y: np.matmul(x, y)  # type: ignore[misc]
        a16, b16 = a.bfloat16(), b.bfloat16()
        yield "bf16", "torch", edge, lambda a=a16, b=b16: torch.mm(a, b)  # type: ignore[misc]
        if importlib.util.find_spec("openvino") is not None:
            for precision in ("fp32", "bf16"):
                yield precision, "openvino", edge, _openvino_product(x, y, precision, threads)
        if importlib.util.find_spec("onnxruntime") is not None:
            yield "int8", "onnxruntime", edge, _int8_product(edge, threads)


def _openvino_product(x: np.ndarray, y: np.ndarray, precision: str, threads: int) -> Product:
    import openvino as ov  # noqa: PLC0415 - one of several libraries that are tried

    parameter = ov.opset13.parameter(x.shape, np.float32)
    model = ov.Model([ov.opset13.matmul(parameter, ov.opset13.constant(y), False, False)], [parameter])
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x, shared_memory=True))
    return lambda: request.infer()  # noqa: PLW0108 - typed here, unlike the method


def _int8_product(edge: int, threads: int) -> Product:
    import onnxruntime as ort  # noqa: PLC0415 - one of several libraries that are tried

    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.integers(-127, 127, (edge, edge), dtype=np.int8), "w")
    node = onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    ends = [
        onnx.helper.make_tensor_value_info(name, kind, [edge, edge])
        for name, kind in (("x", onnx.TensorProto.UINT8), ("y", onnx.TensorProto.INT32))
    ]
    graph = onnx.helper.make_graph([node], "product", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    x = rng.integers(0, 255, (edge, edge), dtype=np.uint8)
    return lambda: session.run(None, {"x": x})
