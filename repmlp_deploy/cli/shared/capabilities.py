"""Find out what this machine can run and build, and what would have to be installed for the rest."""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from repmlp_deploy.errors import RepMLPError, installation_of, optional_imports
from repmlp_deploy.runtime.cpus import cpu_instructions, cpu_name, cpu_quota, usable_cpus
from repmlp_deploy.runtime.tensorrt.driver import find_gpus

__all__ = ["EXTRAS_FOR", "Capability", "Extra", "describe_cpu", "find_capabilities", "find_extras"]


@dataclass(frozen=True)
class Capability:
    """One thing that this project can do on some machines.

    Attributes:
        name: what is done, such as `run onnx`.
        works: whether this machine can do it.
        details: versions and devices, or what is missing and the remedy.
    """

    name: str
    works: bool
    details: str


@dataclass(frozen=True)
class Extra:
    """Packages that are installed by `pip install repmlp-deploy[NAME]`.

    Attributes:
        name: of the extra.
        purpose: what it is for.
        missing: its packages that are not installed.
        remedy: the command that installs them; empty if nothing is missing.
    """

    name: str
    purpose: str
    missing: tuple[str, ...]
    remedy: str


EXTRAS_FOR = {
    "export": "converting: PyTorch, ONNX, NNCF",
    "cpu": "ONNX Runtime",
    "gpu": "ONNX Runtime for CUDA, instead of cpu",
    "openvino": "OpenVINO",
    "rtx": "TensorRT-RTX engines",
    "trt": "TensorRT engines",
    "pycuda": "engines in PyCUDA's memory",
    "ort-rtx": "TensorRT-RTX in ONNX Runtime",
    "timm": "networks of timm by name",
    "serve": "repmlp-serve",
    "map": "repmlp-map",
    "ray": "repmlp-map and repmlp-serve on several machines",
    "bench": "repmlp-bench and its reports",
    "cli": "what the commands print with",
    "docs": "building the documentation",
    "dev": "the tests and the checks",
}
"""Every extra of pyproject.toml, and what it is for."""


_MARKERS_THAT_FAIL = tuple(
    f"{name} != {quote}{absent}{quote}"
    for name, absent, here in (
        ("sys_platform", "win32", sys.platform),
        ("platform_machine", "aarch64", platform.machine()),
    )
    for quote in "'\""
    if here == absent
)
"""Those markers of requirements, of all that there are, that leave a package out on this machine."""


def find_extras() -> list[Extra]:
    """Return every extra of this package, with what is missing; nothing is imported."""
    required = _requirements()
    found = []
    for name, purpose in EXTRAS_FOR.items():
        missing = tuple(package for package in _packages_of(name, required) if not _is_installed(package))
        found.append(Extra(name, purpose, missing, installation_of(name) if missing else ""))
    return found


def _packages_of(extra: str, required: dict[str, list[str]]) -> list[str]:
    """Return the packages of an extra, and of the extras that it names."""
    found: dict[str, None] = {}
    for one in required.get(extra, []):
        package, others = re.findall(r"^([\w.-]+)(?:\[([^]]*)\])?", one)[0]
        if package == "repmlp-deploy":
            for other in others.split(","):
                found.update(dict.fromkeys(_packages_of(other.strip(), required)))
        elif not any(marker in one for marker in _MARKERS_THAT_FAIL):
            found[package] = None
    return list(found)


def _requirements() -> dict[str, list[str]]:
    """Return the requirements of every extra, of the checkout that this is, or of the installed package."""
    project = Path(__file__).resolve().parents[3] / "pyproject.toml"
    if project.is_file():
        given = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        return {name: list(map(str, some)) for name, some in given.items()}
    by_extra: dict[str, list[str]] = {}
    for one in requires("repmlp-deploy") or []:
        for extra in re.findall(r"extra == ['\"]([\w-]+)['\"]", one):
            by_extra.setdefault(extra, []).append(one)
    return by_extra


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def find_capabilities() -> list[Capability]:
    """Return what can be run and built here; every package is really imported."""
    return [_try(name, check) for name, check in _CHECKS.items()]


def describe_cpu() -> dict[str, Any]:
    """Return the processor, the cores this process may use, and the instruction sets that runtimes profit from."""
    quota = cpu_quota()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "cores_allowed": usable_cpus(),
        "cpu_quota": None if quota is None else round(quota, 2),
        "instructions": cpu_instructions(),
    }


def _try(name: str, check: Callable[[], str]) -> Capability:
    try:
        with optional_imports():
            return Capability(name, works=True, details=check())
    except RepMLPError as error:
        return Capability(name, works=False, details=str(error))
    except Exception as error:  # noqa: BLE001 - a broken library must not hide the rest of the report
        return Capability(name, works=False, details=f"{type(error).__name__}: {error}")


def _onnx_runtime() -> str:
    ort = import_module("onnxruntime")
    return f"onnxruntime {ort.__version__}: {', '.join(ort.get_available_providers())}"


def _openvino() -> str:
    ov = import_module("openvino")
    return f"openvino {ov.__version__.split('-')[0]}: {', '.join(ov.Core().available_devices)}"


def _run_engine(module: str) -> Callable[[], str]:
    def check() -> str:
        gpus = find_gpus()
        if not gpus:
            raise RepMLPError("no NVIDIA GPU with a driver: engines run where there is one")
        return f"{module} {import_module(module).__version__} on {', '.join(gpu.name for gpu in gpus)}"

    return check


def _convert() -> str:
    return _imported("torch", "onnx", "onnxscript", "onnxsim", "safetensors")


def _quantize_openvino() -> str:
    """Return NNCF's version without importing it: that takes seconds and reports usage."""
    import_module("openvino")
    try:
        return f"nncf {version('nncf')}"
    except PackageNotFoundError:
        raise ModuleNotFoundError("no nncf", name="nncf") from None


def _build_rtx() -> str:
    return f"{_imported('tensorrt_rtx')}, for RTX GPUs"


def _build_trt() -> str:
    gpus = find_gpus()
    if not gpus:
        raise RepMLPError("trt builds on the GPU it is for: run on the target, or use --format trt-rtx")
    return f"{_imported('tensorrt')}, for {', '.join(f'{gpu.name} ({gpu.capability})' for gpu in gpus)}"


def _report() -> str:
    return _imported("psutil", "matplotlib", "jinja2")


def _imported(*modules: str) -> str:
    """Return names and versions of modules, each imported."""
    return ", ".join(f"{name} {getattr(import_module(name), '__version__', '')}".strip() for name in modules)


_CHECKS: dict[str, Callable[[], str]] = {
    "run onnx": _onnx_runtime,
    "run openvino": _openvino,
    "run trt-rtx": _run_engine("tensorrt_rtx"),
    "run trt": _run_engine("tensorrt"),
    "export onnx": _convert,
    "export openvino": lambda: f"{_openvino()}; {_imported('torch', 'onnx')}",
    "export openvino int8": _quantize_openvino,
    "build trt-rtx": _build_rtx,
    "build trt": _build_trt,
    "benchmark": _report,
}
"""What may be done, to a function that returns how, or raises why not."""
