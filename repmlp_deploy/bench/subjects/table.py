"""What is compared: one entry a format, and how each is opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from repmlp_deploy.bench.measure.machine import has_nvidia_gpu
from repmlp_deploy.bench.measure.results import ProfileLine
from repmlp_deploy.card import ModelCard
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS
from repmlp_deploy.convert.options import require_choice
from repmlp_deploy.errors import InputError, MissingDevice, installation_of
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.runner import RUNNERS, RunnerOptions
from repmlp_deploy.runtime.tensorrt.driver import LIBRARY

__all__ = [
    "BASELINE",
    "ON_CUDA",
    "SUBJECTS",
    "Job",
    "OpenedSubject",
    "Subject",
    "chosen_rows",
    "open_subject",
    "require_device",
    "why_not",
]

BASELINE = "torch-merged"
"""What a user of the official code deploys today; ratios are against it."""


class Job(BaseModel):
    """What a child process is to open.

    Attributes:
        format: an entry of `SUBJECTS`.
        precision: to compute in.
        threads: of one inference.
        card: what the network is.
        model: `timm:NAME[,…]`, the network of timm that `checkpoint` is for.
        checkpoint: file with the trained weights, for subjects that run a PyTorch network.
        bundle: folder, for subjects that run an artifact.
        device: `cpu` or `cuda`.
        streams: inferences that run at a time on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    precision: str
    threads: int
    card: ModelCard | None = None
    model: str | None = None
    checkpoint: str | None = None
    bundle: str | None = None
    device: str = "cpu"
    streams: int = 1

    def runner_options(self, device: str | None) -> RunnerOptions:
        """Return how a runner is opened on a device; the threads are one inference's, or those of all streams."""
        return RunnerOptions(device, self.threads if self.streams == 1 else None, streams=self.streams)


class OpenedSubject(Protocol):
    """An opened subject.

    Attributes:
        proof: what the runtime itself says of version, provider or device, threads and types.
    """

    proof: dict[str, Any]

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, classes) float32."""
        ...

    def device_ms(self, batch: NDArray[np.float32], calls: int) -> float | None:
        """Return the median milliseconds by the device's own clock, without copies; None if it has none."""
        ...

    def profile(self, batch: NDArray[np.float32], calls: int) -> list[ProfileLine]:
        """Return milliseconds per call, by stage and kind of operation; the caller fills in model and batch."""
        ...


@dataclass(frozen=True)
class Subject:
    """One format that can be compared.

    Attributes:
        title: its name for people.
        graph: the form of the network it computes: trained, merged or folded.
        needs: `checkpoint`, or the artifact of a bundle.
        precisions: those it computes in, on a CPU if it can.
        on_cuda: those it computes in on an NVIDIA GPU.
        opener: `module:function`, from a `Job` to `OpenedSubject`.
        package: what must be importable.
        extra: the extra of this project that brings it.
        opt_in: whether it runs only when named.
        profiles: whether it can tell time per operation.
    """

    title: str
    graph: str
    needs: str
    precisions: tuple[str, ...]
    opener: str
    package: str
    extra: str
    opt_in: bool = False
    profiles: bool = False
    on_cuda: tuple[str, ...] = ()

    def precisions_on(self, device: str) -> tuple[str, ...]:
        """Return the precisions that it computes in on a device."""
        return self.on_cuda if device == "cuda" else self.precisions


_TORCH = "repmlp_deploy.bench.subjects.pytorch:open_network"
_BUNDLE = "repmlp_deploy.bench.subjects.bundle:open_bundle"
_OPENVINO = "repmlp_deploy.bench.subjects.openvino:open_ir"

ON_CUDA = ("fp32", "tf32", "fp16", "bf16")
"""What PyTorch computes in on a GPU, and the rows of a run there by default."""

_ONNX_ON_CUDA = ("fp32", "fp16", "int8")
_ON_CPU = tuple(name for name, entry in PRECISIONS.items() if entry.runs_on_cpu)
_IN_OPENVINO = tuple(name for name, entry in PRECISIONS.items() if entry.openvino is not None)
_IN_TENSORRT = tuple(name for name, entry in PRECISIONS.items() if entry.tensorrt_type is not None)

SUBJECTS: dict[str, Subject] = {
    "torch-trained": Subject(
        "trained network, PyTorch eager, FC3 as upstream's grouped convolution",
        *("trained", "checkpoint", ("fp32",), _TORCH, "torch", "export"),
        on_cuda=ON_CUDA,
    ),
    "torch-merged": Subject(
        "upstream's own merge and FC3, PyTorch eager",
        *("merged", "checkpoint", ("fp32",), _TORCH, "torch", "export"),
        on_cuda=ON_CUDA,
    ),
    "torch-compile": Subject(
        "upstream's own merge and FC3, torch.compile",
        *("merged", "checkpoint", ("fp32",), _TORCH, "torch", "export"),
        opt_in=True,
        on_cuda=ON_CUDA,
    ),
    "torch-folded": Subject(
        "folded network, PyTorch eager",
        *("folded", "checkpoint", ("fp32",), _TORCH, "torch", "export"),
        opt_in=True,
        on_cuda=ON_CUDA,
    ),
    "onnx-merged": Subject(
        "upstream's own merge as ONNX, ONNX Runtime",
        *("merged", "onnx", ("fp32",), _BUNDLE, "onnxruntime", "cpu"),
        profiles=True,
        on_cuda=("fp32",),
    ),
    "onnx": Subject(
        "folded ONNX graph, ONNX Runtime",
        *("folded", "onnx", _ON_CPU, _BUNDLE, "onnxruntime", "cpu"),
        profiles=True,
        on_cuda=_ONNX_ON_CUDA,
    ),
    "openvino": Subject(
        "folded graph as OpenVINO IR, OpenVINO",
        *("folded", "openvino", _IN_OPENVINO, _OPENVINO, "openvino", "openvino"),
        profiles=True,
    ),
    "trt": Subject(
        "folded graph, TensorRT engine",
        *("folded", "trt", _IN_TENSORRT, _BUNDLE, FLAVOURS["trt"].module, "trt"),
        on_cuda=_IN_TENSORRT,
    ),
    "trt-rtx": Subject(
        "folded graph, TensorRT-RTX engine",
        *("folded", "trt-rtx", _IN_TENSORRT, _BUNDLE, FLAVOURS["trt-rtx"].module, "rtx"),
        on_cuda=_IN_TENSORRT,
    ),
}
"""Format to its entry, in the order of reports."""


_ASKS_FOR_CUDA = {
    "torch": "repmlp_deploy.bench.subjects.cuda",
    "onnxruntime": "repmlp_deploy.bench.subjects.bundle",
}
"""Package to the module whose `why_no_cuda` says whether it runs on a GPU; engines run nowhere else."""


def require_device(device: str) -> None:
    """Raise MissingDevice if rows are to run on a GPU and the driver names none."""
    if device == "cuda" and not has_nvidia_gpu():
        raise MissingDevice(
            f"--device cuda needs an NVIDIA GPU, and {LIBRARY} finds none: run on a machine with one (in a container "
            "with --gpus all), or leave --device out"
        )


def chosen_rows(formats: Sequence[str] | None, precisions: Sequence[str], device: str = "cpu") -> list[tuple[str, str]]:
    """Return (format, precision) of every row; a format without any of `precisions` has one row that says why.

    Args:
        formats: entries of `SUBJECTS`; None for all that are not opt-in, on a GPU with the folded network in PyTorch.
        precisions: of `fp32`, `fp16`, `bf16`, `int8`, `fp8`; on a GPU also `tf32`.
        device: `cpu` or `cuda`.

    Raises:
        InputError: a format is unknown or does not run on the device, or a precision is one that no format has.
    """
    here = {name: subject for name, subject in SUBJECTS.items() if subject.precisions_on(device)}
    usual = [name for name, subject in here.items() if not subject.opt_in or (device, name) == ("cuda", "torch-folded")]
    names = usual if formats is None else formats
    known = dict.fromkeys(p for subject in here.values() for p in subject.precisions_on(device))
    for name in names:
        require_choice("--formats", name, tuple(SUBJECTS))
        if name not in here:
            raise InputError(f"--formats: {name} does not run on {device}; these do: {', '.join(here)}")
    for precision in precisions:
        if precision in ON_CUDA and precision not in known:
            raise InputError(f"--precision: {precision} does not run on {device}; these do: {', '.join(known)}")
        require_choice("--precision", precision, tuple(known))
    if not precisions:
        raise InputError("--precision is empty; name one of " + ", ".join(known))
    rows = []
    for name in dict.fromkeys(names):
        fitting = [p for p in dict.fromkeys(precisions) if p in SUBJECTS[name].precisions_on(device)]
        # an engine that cannot run here says so once, not once a precision
        fitting = fitting[:1] if name in FLAVOURS and not has_nvidia_gpu() else fitting
        rows += [(name, precision) for precision in fitting or precisions[:1]]
    return rows


def why_not(name: str, precision: str, device: str = "cpu") -> str | None:
    """Return why a format cannot run on this machine in this precision; None if it can."""
    subject = SUBJECTS[name]
    if precision not in subject.precisions_on(device):
        return f"{name} computes in {', '.join(subject.precisions_on(device))} only"
    if name in FLAVOURS and not has_nvidia_gpu():
        return "no NVIDIA GPU"
    if importlib.util.find_spec(subject.package) is None:
        return f"{subject.package} is not installed: {installation_of(subject.extra)}"
    if device == "cuda":  # torch is loaded for these rows alone
        module = _ASKS_FOR_CUDA.get(subject.package)
        missing: str | None = None if module is None else import_module(module).why_no_cuda()
        if missing is not None:
            return missing
    if subject.opener == _BUNDLE and subject.needs not in RUNNERS:
        return f"this version has no runner for {subject.needs}"
    return None


def open_subject(job: Job) -> OpenedSubject:
    """Open the subject of a job."""
    module, name = SUBJECTS[job.format].opener.split(":")
    opener: Callable[[Job], OpenedSubject] = getattr(import_module(module), name)
    return opener(job)
