"""The machine: what a figure must be read with, and resident memory."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import repmlp_deploy
from repmlp_deploy.convert import memory
from repmlp_deploy.errors import MissingDependency
from repmlp_deploy.runtime.cpus import cpu_info, cpu_instructions, cpu_name, usable_cpus
from repmlp_deploy.runtime.tensorrt.driver import find_gpus

try:
    import psutil
except ImportError:
    raise MissingDependency("psutil", "bench") from None

__all__ = ["describe_machine", "has_nvidia_gpu", "peak_bytes", "reset_peak", "resident_bytes", "usable_cores"]

_PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxsim",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu12",
    "numpy",
    "pillow",
)


def usable_cores() -> int:
    """Return how many cores this process may run on; physical ones if the system tells them apart."""
    allowed = usable_cpus()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def has_nvidia_gpu() -> bool:
    """Return whether the driver names an NVIDIA GPU."""
    return bool(find_gpus())


def describe_machine() -> dict[str, Any]:
    """Return processor, memory, accelerator, system, versions and commit; None for what the system does not say."""
    frequency = psutil.cpu_freq()
    return {
        "cpu": cpu_name(),
        "cpu_flags": cpu_instructions(),
        "cores_logical": psutil.cpu_count(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": usable_cores(),
        "frequency_mhz": round(frequency.max or frequency.current) if frequency else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "virtual_machine": "hypervisor" in cpu_info().get("flags", "").split(),
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": ", ".join(gpu.name for gpu in find_gpus()) or None,
        "gpu_driver": _nvidia("driver_version"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"repmlp-deploy": repmlp_deploy.__version__}
        | {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def resident_bytes() -> int:
    """Return resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Return the largest resident memory of this process since it began, or since `reset_peak` if that works."""
    return memory.peak_bytes() or int(psutil.Process().memory_info().peak_wset)  # only Windows does not say


def reset_peak() -> bool:
    """Begin a new peak at the present resident memory; False where the system has no way to."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia(field: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    return _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"])


def _commit() -> str | None:
    """Return the checkout's commit, marked if files differ from it; None for an installed package."""
    root = Path(repmlp_deploy.__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit} with changes" if commit and changed else commit


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603 - ours
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
