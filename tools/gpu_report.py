"""Write one report of what runs on this machine's GPU: `make test-gpu`, or `python tools/gpu_report.py --out FILE.md`.

It needs no network. For every NVIDIA builder that is installed and every precision it exports a network with seeded
weights, builds the engine for this GPU, compares it with the trained network again at every batch size (the rows of the
certificate, run on the GPU), and times calls from arrays on the host to arrays on the host: with memory of cuda-python
with and without CUDA graphs, and with PyCUDA's. ONNX Runtime's CUDA provider is measured beside them, and the merged
and folded network in PyTorch in fp32, tf32, fp16 and bf16. What cannot be run is a line with its reason, and the report
is written after every line. The roofline is the least time that the published peaks of the card allow, where
`gpu_roofline.py` knows it.

Exit codes: 0; 3 if a row failed or a line met a defect, after the report was written; 4 without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import datetime as dt
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gpu_roofline import ACTIVATIONS, BORDER, CARDS, Card, least_ms
from repmlp_deploy import Bundle, EngineOptions, Predictor, export, get_model
from repmlp_deploy.bench.subjects.cuda import DTYPES, CudaNetwork
from repmlp_deploy.bench.subjects.table import OpenedSubject
from repmlp_deploy.bundle import Hop
from repmlp_deploy.card import ModelCard
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS
from repmlp_deploy.convert.proof.certificate import Certifier, batch_sizes, recertify
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.rework.add_engine import add_engines
from repmlp_deploy.errors import MissingDependency, RepMLPError
from repmlp_deploy.files import replace_file
from repmlp_deploy.runtime.runner import EngineSettings, RunnerOptions
from repmlp_deploy.runtime.tasks import find_task
from repmlp_deploy.runtime.tensorrt.driver import LIBRARY, find_gpus

__all__ = ["Latency", "Line", "Record", "find_card", "measure", "measure_pytorch", "settings_of_engines", "to_markdown"]

MODEL = "repmlpnet-b224"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
BATCHES = (1, 8, 64)
CALLS, WARM_UP = 100, 10
PACKAGES = (
    "tensorrt",
    "tensorrt-rtx-cu12",
    "cuda-python",
    "pycuda",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "numpy",
)
_COLUMNS = (
    *("runtime", "precision", "largest error / allowed", "rows passed"),
    *("batch", "median ms", "95 % ms", "on the GPU ms", "roofline ms"),
)
_KEPT_SAMPLES = 40  # of calibration


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a call at one batch size, from the host to the host.

    Attributes:
        batch: images a call.
        median_ms: of the calls.
        p95_ms: of the calls.
        at_best_ms: the least that the card allows, or None; `unfused_ms` too, with every activation in memory.
        device_ms: by the GPU's own clock, without copies; None where a runtime tells none.
    """

    batch: int
    median_ms: float
    p95_ms: float
    at_best_ms: float | None = None
    unfused_ms: float | None = None
    device_ms: float | None = None


@dataclass(frozen=True)
class Line:
    """One runtime in one precision.

    Attributes:
        runtime: `trt` or `trt-rtx` with its memory and graphs, `onnx on cuda`, or `torch` with the form of the network.
        precision: it computes in.
        rows: of the certificate that ran on the GPU: name, batch, error, allowed, passed.
        latencies: by batch size.
        reason: why nothing ran; empty if it did.
        defect: whether the reason is none that this package knows, such as an error of PyTorch.
    """

    runtime: str
    precision: str
    rows: tuple[tuple[str, int | None, float, float, bool | None], ...] = ()
    latencies: tuple[Latency, ...] = ()
    reason: str = ""
    defect: bool = False

    @classmethod
    def of_error(cls, runtime: str, precision: str, error: Exception) -> Line:
        """Return the line of what could not be measured."""
        if isinstance(error, RepMLPError):
            return cls(runtime, precision, reason=str(error))
        said = (str(error).splitlines() or [""])[0]
        return cls(runtime, precision, reason=f"{type(error).__name__}: {said}", defect=True)


@dataclass(frozen=True)
class Record:
    """The whole report: what it ran on, and its lines."""

    model: str
    gpu: str
    capability: str
    driver: str
    date: str
    platform: str
    versions: dict[str, str]
    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        """Whether something ran, no row failed, and no line met a defect."""
        if any(line.defect for line in self.lines):
            return False
        verdicts = [row[4] for line in self.lines for row in line.rows if row[4] is not None]
        return bool(verdicts) and all(verdicts)


def measure(  # noqa: PLR0913 - what is measured, and how
    bundle: Bundle,
    artifact_format: str,
    precision: str,
    device: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    gpu: str = "",
    engine: EngineSettings | None = None,
) -> Line:
    """Compare an artifact of a bundle with the trained network on this GPU, and time it.

    Args:
        bundle: on disk.
        artifact_format: the artifact.
        precision: of it, for the report.
        device: for ONNX Runtime, `cuda`.
        clock: seconds.
        gpu: the card's name, for the roofline.
        engine: how an engine is run.
    """
    runtime = artifact_format if device is None else f"{artifact_format} on {device}"
    if engine is not None:
        runtime += f", {engine.memory}, {'CUDA graphs' if engine.cuda_graphs else 'no CUDA graphs'}"
    engine = engine or EngineSettings()
    try:
        with _context(engine.memory):
            hops, notes = recertify(bundle, artifact_format, RunnerOptions(device=device, engine=engine))
            judged = [hop for hop in hops if hop.passed is not None]
            if not judged:
                return Line(runtime, precision, reason="; ".join(notes) or "it did not run")
            with Predictor(bundle, format=artifact_format, device=device, engine=engine) as predictor:
                latencies = tuple(_latencies(predictor.logits, bundle, precision, clock, gpu))
    except Exception as error:  # noqa: BLE001 - whatever a runtime raises is the reason of its line
        return Line.of_error(runtime, precision, error)
    return Line(runtime, precision, _rows(judged), latencies)


def _rows(hops: Sequence[Hop]) -> tuple[tuple[str, int | None, float, float, bool | None], ...]:
    return tuple((hop.name, hop.batch, hop.max_abs, hop.allowed, hop.passed) for hop in hops)


def measure_pytorch(  # noqa: PLR0913 - what is measured, and how
    bundle: Bundle,
    form: str,
    network: nn.Module,
    precision: str,
    *,
    opened: Callable[[nn.Module, str], OpenedSubject] = lambda network, precision: CudaNetwork(
        network, precision, compiled=False
    ),
    clock: Callable[[], float] = time.perf_counter,
    gpu: str = "",
) -> Line:
    """Compare a network in PyTorch with the trained one, and time it.

    Args:
        bundle: of the same trained network; its probe is what the network is compared with.
        form: `merged` or `folded`.
        network: in float32 on the CPU; left alone.
        precision: an entry of `DTYPES`.
        opened: puts the network on a device.
        clock: seconds.
        gpu: the card's name, for the roofline.
    """
    names = [spec.name for spec in bundle.manifest.outputs]
    axes = find_task(bundle.manifest.task).class_axes
    kind = "fp16" if precision == "tf32" else precision  # both keep 10 bits of mantissa
    try:
        subject = opened(copy.deepcopy(network), precision)
        certifier = Certifier(bundle.probe(), batch_sizes(bundle.manifest.batch), class_axes=axes, outputs=names)
        hops = certifier.measure(f"torch {form}", lambda *inputs: [subject.run(inputs[0])], kind)
        latencies = tuple(_latencies(subject.run, bundle, precision, clock, gpu, subject.device_ms))
    except Exception as error:  # noqa: BLE001 - as in `measure`
        return Line.of_error(f"torch {form}", precision, error)
    return Line(f"torch {form}", precision, _rows(hops), latencies)


def settings_of_engines() -> list[EngineSettings]:
    """Return every way to run an engine: both packages for memory, and CUDA graphs on and off where there are any."""
    return [EngineSettings(), EngineSettings(cuda_graphs=False), EngineSettings(memory="pycuda", cuda_graphs=False)]


@contextmanager
def _context(memory: str) -> Iterator[None]:
    """Make a context current for PyCUDA, which joins that of the service it runs in."""
    if memory != "pycuda":
        yield
        return
    try:
        driver = import_module("pycuda.driver")
    except ImportError:
        raise MissingDependency("pycuda", "pycuda") from None
    driver.init()
    driver.Device(0).make_context()
    try:
        yield
    finally:
        driver.Context.pop()


def _latencies(  # noqa: PLR0913 - what is timed, and how
    call: Callable[[NDArray[np.float32]], object],
    bundle: Bundle,
    precision: str,
    clock: Callable[[], float],
    gpu: str,
    device_ms: Callable[[NDArray[np.float32], int], float | None] | None = None,
) -> Iterator[Latency]:
    shape = tuple(int(edge) for edge in bundle.manifest.input.shape[1:] if edge is not None)
    for batch in (size for size in BATCHES if bundle.manifest.batch.min <= size <= bundle.manifest.batch.max):
        images = probe_inputs(shape, samples=batch)
        seconds = []
        for _ in range(WARM_UP + CALLS):
            started = clock()
            call(images)
            seconds.append(clock() - started)
        kept = 1e3 * np.array(seconds[WARM_UP:])
        card = find_card(gpu) if bundle.manifest.name == MODEL else None
        bounds: list[float | None] = [None, None]
        if card is not None and precision in card.tera_ops:
            bounds = [least_ms(card, precision, batch, moved) for moved in (BORDER, ACTIVATIONS)]
        on_device = None if device_ms is None else device_ms(images, CALLS)
        yield Latency(batch, float(np.median(kept)), float(np.percentile(kept, 95)), *bounds, on_device)


def find_card(gpu: str) -> Card | None:
    """Return the published peaks of a GPU by the driver's name for it, such as `NVIDIA A100-SXM4-80GB`."""
    named = ((card, re.sub(r" (80 GB )?SXM", "", card.name)) for card in CARDS)
    return next((card for card, name in named if re.search(rf"\b{name}\b", gpu)), None)


def to_markdown(record: Record) -> str:
    """Return the report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    out = [
        f"# {record.model} on {record.gpu}",
        "",
        f"{record.date}; compute capability {record.capability}; {record.driver}; {record.platform}; {versions}.",
        f"Latencies are medians of {CALLS} calls after {WARM_UP}, from arrays on the host to arrays on the host.",
        "On the GPU: the network alone, between CUDA events.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in record.lines:
        if line.reason:
            out.append(f"| {line.runtime} | {line.precision} | not run: {line.reason.replace('|', '/')} | | | | | | |")
            continue
        worst = max(line.rows, key=lambda row: row[2] / row[3])
        passed = f"{sum(bool(row[4]) for row in line.rows)} of {len(line.rows)}"
        for i, latency in enumerate(line.latencies):
            head = (line.runtime, line.precision, f"{worst[2]:.2e} / {worst[3]:.2e}", passed) if i == 0 else ("",) * 4
            bound = "" if latency.at_best_ms is None else f"{latency.at_best_ms:.3g} – {latency.unfused_ms:.3g}"
            alone = "" if latency.device_ms is None else f"{latency.device_ms:.3g}"
            figures = (str(latency.batch), f"{latency.median_ms:.3g}", f"{latency.p95_ms:.3g}", alone, bound)
            out.append("| " + " | ".join((*head, *figures)) + " |")
    return "\n".join(out) + "\n"


def driver() -> str:
    """Return the highest CUDA version that the driver supports."""
    number = ctypes.c_int()
    ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(number))
    return f"a driver for CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def calibration_samples(card: ModelCard) -> NDArray[np.float32]:
    """Return inputs like those of the probe, which the rows run on, within what images can become."""
    how = card.preprocessing
    ends = [(level - np.array(how.mean)) / np.array(how.std) for level in (0, 255)]
    samples = probe_inputs((3, *card.input_size), samples=_KEPT_SAMPLES)
    low, high = (end.astype(np.float32)[:, None, None] for end in ends)
    return np.clip(samples, low, high)


def lines(model: str, gpu: str, capability: str) -> Iterator[Line]:
    """Yield every line of the report; export the network once per precision."""
    network = get_model(model)
    samples = calibration_samples(network.card)
    for precision in PRECISIONS:
        given = {"calibration": {"images": samples}} if precision in ("int8", "fp8") else {}
        with tempfile.TemporaryDirectory(prefix="repmlp-gpu-") as folder:
            try:
                bundle = export(network, precision=precision, batch="1:8:64", out=Path(folder, "b"), **given)
            except Exception as error:  # noqa: BLE001 - as in `measure`
                yield Line.of_error("export", precision, error)
                continue
            if precision == "fp32":
                yield from _pytorch_lines(network, bundle, gpu)
            yield measure(bundle, "onnx", precision, "cuda", gpu=gpu)
            for name in FLAVOURS:
                options = EngineOptions(compute_capabilities=() if FLAVOURS[name].needs_gpu else (capability,))
                try:
                    made = add_engines(Path(folder, "b"), [name], options, out=Path(folder, name))
                except Exception as error:  # noqa: BLE001 - as in `measure`
                    yield Line.of_error(name, precision, error)
                    continue
                for engine in settings_of_engines():
                    yield measure(made, name, precision, gpu=gpu, engine=engine)


def _pytorch_lines(network: nn.Module, bundle: Bundle, gpu: str) -> Iterator[Line]:
    try:
        merged = merge_branches(network)
        forms = {"merged": merged, "folded": fold_affine(merged)}
    except Exception as error:  # noqa: BLE001 - as in `measure`
        yield Line.of_error("torch", "fp32", error)
        return
    for form, made in forms.items():
        for precision in DTYPES:
            yield measure_pytorch(bundle, form, made, precision, gpu=gpu)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report and its JSON, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report.md"), help="the report; a .json lies beside it")
    parser.add_argument("--model", default=MODEL, help="a card")
    options = parser.parse_args(arguments)
    gpus = find_gpus()
    if not gpus:
        sys.stderr.write(
            f"error: {LIBRARY} finds no NVIDIA GPU, so there is nothing to report: run on a machine with one\n"
        )
        return 4
    about = (
        gpus[0].name,
        gpus[0].capability,
        driver(),
        dt.datetime.now(dt.UTC).date().isoformat(),
        platform.platform(),
    )
    record = Record(options.model, *about, dict(_versions()), ())
    for line in lines(options.model, gpus[0].name, gpus[0].capability):
        record = replace(record, lines=(*record.lines, line))
        replace_file(options.out, to_markdown(record).encode())
        replace_file(options.out.with_suffix(".json"), json.dumps(asdict(record), indent=1).encode())
    sys.stdout.write(f"{options.out}: {len(record.lines)} lines\n")
    return 0 if record.passed else 3


if __name__ == "__main__":
    sys.exit(main())
