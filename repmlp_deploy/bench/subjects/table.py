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
from repmlp_deploy.errors import InputError
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.runner import RUNNERS

__all__ = ["BASELINE", "SUBJECTS", "Job", "OpenedSubject", "Subject", "chosen_rows", "open_subject", "why_not"]

BASELINE = "torch-merged"
"""What a user of the official code deploys today; ratios are against it."""


class Job(BaseModel):
    """What a child process is to open.

    Attributes:
        format: an entry of `SUBJECTS`.
        precision: to compute in.
        threads: of one inference.
        card: what the network is.
        checkpoint: file with the trained weights, for subjects that run a PyTorch network.
        bundle: folder, for subjects that run an artifact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    precision: str
    threads: int
    card: ModelCard | None = None
    checkpoint: str | None = None
    bundle: str | None = None


class OpenedSubject(Protocol):
    """An opened subject.

    Attributes:
        proof: what the runtime itself says of version, provider or device, threads and types.
    """

    proof: dict[str, Any]

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, classes) float32."""
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
        precisions: those it computes in.
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


_TORCH = "repmlp_deploy.bench.subjects.pytorch:open_network"
_BUNDLE = "repmlp_deploy.bench.subjects.bundle:open_bundle"
_OPENVINO = "repmlp_deploy.bench.subjects.openvino:open_ir"

_ON_CPU = tuple(name for name, entry in PRECISIONS.items() if entry.runs_on_cpu)
_IN_OPENVINO = tuple(name for name, entry in PRECISIONS.items() if entry.openvino is not None)
_IN_TENSORRT = tuple(name for name, entry in PRECISIONS.items() if entry.tensorrt_type is not None)

SUBJECTS: dict[str, Subject] = {
    "torch-trained": Subject(
        "trained network, PyTorch eager, FC3 as upstream's grouped convolution",
        *("trained", "checkpoint", ("fp32",), _TORCH, "torch", "export"),
    ),
    "torch-merged": Subject(
        "upstream's own merge and FC3, PyTorch eager",
        *("merged", "checkpoint", ("fp32",), _TORCH, "torch", "export"),
    ),
    "torch-compile": Subject(
        "upstream's own merge and FC3, torch.compile",
        *("merged", "checkpoint", ("fp32",), _TORCH, "torch", "export"),
        opt_in=True,
    ),
    "torch-folded": Subject(
        "folded network, PyTorch eager",
        *("folded", "checkpoint", ("fp32",), _TORCH, "torch", "export"),
        opt_in=True,
    ),
    "onnx-merged": Subject(
        "upstream's own merge as ONNX, ONNX Runtime",
        *("merged", "onnx", ("fp32",), _BUNDLE, "onnxruntime", "cpu"),
        profiles=True,
    ),
    "onnx": Subject(
        "folded ONNX graph, ONNX Runtime",
        *("folded", "onnx", _ON_CPU, _BUNDLE, "onnxruntime", "cpu"),
        profiles=True,
    ),
    "openvino": Subject(
        "folded graph as OpenVINO IR, OpenVINO",
        *("folded", "openvino", _IN_OPENVINO, _OPENVINO, "openvino", "openvino"),
        profiles=True,
    ),
    "trt": Subject(
        "folded graph, TensorRT engine",
        *("folded", "trt", _IN_TENSORRT, _BUNDLE, FLAVOURS["trt"].module, "trt"),
    ),
    "trt-rtx": Subject(
        "folded graph, TensorRT-RTX engine",
        *("folded", "trt-rtx", _IN_TENSORRT, _BUNDLE, FLAVOURS["trt-rtx"].module, "rtx"),
    ),
}
"""Format to its entry, in the order of reports."""


def chosen_rows(formats: Sequence[str] | None, precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Return (format, precision) of every row; a format without any of `precisions` has one row that says why.

    Args:
        formats: entries of `SUBJECTS`; None for all that are not opt-in.
        precisions: of `fp32`, `fp16`, `bf16`, `int8`.

    Raises:
        InputError: a format is unknown, or a precision is one that no format has.
    """
    names = [name for name, subject in SUBJECTS.items() if not subject.opt_in] if formats is None else formats
    known = dict.fromkeys(p for subject in SUBJECTS.values() for p in subject.precisions)
    for name in names:
        require_choice("--formats", name, tuple(SUBJECTS))
    for precision in precisions:
        require_choice("--precision", precision, tuple(known))
    if not precisions:
        raise InputError("--precision is empty; name one of " + ", ".join(known))
    rows = []
    for name in dict.fromkeys(names):
        fitting = [p for p in dict.fromkeys(precisions) if p in SUBJECTS[name].precisions]
        # an engine that cannot run here says so once, not once a precision
        fitting = fitting[:1] if name in FLAVOURS and not has_nvidia_gpu() else fitting
        rows += [(name, precision) for precision in fitting or precisions[:1]]
    return rows


def why_not(name: str, precision: str) -> str | None:
    """Return why a format cannot run on this machine in this precision; None if it can."""
    subject = SUBJECTS[name]
    if precision not in subject.precisions:
        return f"{name} computes in {', '.join(subject.precisions)} only"
    if name in FLAVOURS and not has_nvidia_gpu():
        return "no NVIDIA GPU"
    if importlib.util.find_spec(subject.package) is None:
        return f'{subject.package} is not installed: pip install "repmlp-deploy[{subject.extra}]"'
    if subject.opener == _BUNDLE and subject.needs not in RUNNERS:
        return f"this version has no runner for {subject.needs}"
    return None


def open_subject(job: Job) -> OpenedSubject:
    """Open the subject of a job."""
    module, name = SUBJECTS[job.format].opener.split(":")
    opener: Callable[[Job], OpenedSubject] = getattr(import_module(module), name)
    return opener(job)
