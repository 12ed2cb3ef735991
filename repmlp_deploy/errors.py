"""The errors that RepMLP Deploy raises, and the exit code each one ends a command with.

RepMLPError
├── InputError               2   unusable arguments or input
│   ├── CardError                a model card that cannot be read, or that contradicts itself
│   ├── CheckpointError          a weights file that is damaged, unsafe, or of another network
│   ├── BundleError              a deployed folder that is damaged or of another schema
│   └── ImageError               an image that cannot be decoded, or is too large
├── VerificationError        3   an output differs from the trained network's; nothing is written
├── MissingDependency        4   a package is not installed; the message names the exact remedy
├── MissingDevice            4   a device, driver or provider is not there
├── DeviceError              4   a device is there, and a call to it failed
├── BuildError               4   a vendor's builder refused a graph that had been verified
└── OutputError              5   the result could not be written; an earlier one is untouched

Every message is one line: what, got, expected, remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

__all__ = [
    "EXTRAS",
    "BuildError",
    "BundleError",
    "CardError",
    "CheckpointError",
    "DeviceError",
    "ImageError",
    "InputError",
    "MissingDependency",
    "MissingDevice",
    "OutputError",
    "RepMLPError",
    "VerificationError",
    "installation_of",
    "missing_dependency",
    "optional_imports",
]


class RepMLPError(Exception):
    """Root of the package's errors; `exit_code` is what a command ends with."""

    exit_code = 1


class InputError(RepMLPError, ValueError):
    """Unusable arguments or input."""

    exit_code = 2


class CardError(InputError):
    """A model card that cannot be read, or that contradicts itself."""


class CheckpointError(InputError):
    """A weights file that is damaged, unsafe, or of another network."""


class BundleError(InputError):
    """A deployed folder that is damaged or of another schema."""


class ImageError(InputError):
    """An image that cannot be decoded, or is too large."""


class VerificationError(RepMLPError):
    """An output differs from the trained network's by more than its tolerance."""

    exit_code = 3


EXTRAS: Mapping[str, str] = MappingProxyType(
    {
        "cuda": "rtx",
        "google": "serve",
        "grpc": "serve",
        "grpc_health": "serve",
        "grpc_reflection": "serve",
        "httptools": "serve",
        "jinja2": "bench",
        "markupsafe": "bench",
        "matplotlib": "bench",
        "ml_dtypes": "export",
        "mlperf_loadgen": "bench",
        "nncf": "export",
        "onnx": "export",
        "onnx_ir": "export",
        "onnxruntime": "cpu",
        "onnxruntime_ep_nv_tensorrt_rtx": "ort-rtx",
        "onnxscript": "export",
        "onnxsim": "export",
        "openvino": "openvino",
        "prometheus_client": "serve",
        "psutil": "bench",
        "pyarrow": "map",
        "pycuda": "pycuda",
        "ray": "ray",
        "rich": "cli",
        "safetensors": "export",
        "starlette": "serve",
        "tensorrt": "trt",
        "tensorrt_rtx": "rtx",
        "tomli_w": "export",
        "timm": "timm",
        "torch": "export",
        "torchvision": "timm",
        "typer": "cli",
        "uvicorn": "serve",
        "uvloop": "serve",
        "yaml": "ray",
    }
)
"""Optional package, by the name that is imported, to the extra that brings it."""


class MissingDependency(RepMLPError, ImportError):  # noqa: N818 - the contract's name
    """A package that is not installed.

    Args:
        package: what could not be imported.
        extra: the extra of this project that brings it; None for a package that another package needs.
        reason: why an installed package could not be imported; by default what the import said that failed just now.
        remedy: what helps, if that is not to install the extra.
    """

    exit_code = 4

    def __init__(self, package: str, extra: str | None, reason: str = "", remedy: str = "") -> None:
        reason = reason or _failed_import()
        what = f"{package} cannot be imported ({reason})" if reason else f"{package} is not installed"
        super().__init__(f"{what}: {remedy or installation_of(extra)}")
        self.package = package
        self.extra = extra

    def needed_by(self, why: str) -> MissingDependency:
        """Return this error, which says first what the package is needed for."""
        self.msg = f"{why}: {self}"
        return self


def _failed_import() -> str:
    """Return why the import failed that is being handled; empty if there is none, or the package is not there."""
    error = sys.exception()
    said = isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError | RepMLPError)
    return " ".join(str(error).split()) if said else ""


def installation_of(extra: str | None) -> str:
    """Return the command that installs an extra, whether this copy is installed or lies in a checkout."""
    if extra is None:
        return "an installed package needs it, and `python -m pip check` says which"
    from importlib.metadata import PackageNotFoundError, distribution  # noqa: PLC0415 - 30 ms that only a failure needs

    checkout = Path(__file__).resolve().parents[1]
    try:
        distribution("repmlp-deploy")  # pip completes what is installed, and looks for no other copy of it
    except PackageNotFoundError:
        if (checkout / "pyproject.toml").is_file():
            return f'pip install -e "{checkout}[{extra}]"'
    return f'pip install "repmlp-deploy[{extra}]"'


def missing_dependency(error: ImportError) -> RepMLPError | None:
    """Return what a failed import means to a user, or None if the fault is in this package.

    Args:
        error: what `import` raised, in this package or in one that it uses.
    """
    if isinstance(error, RepMLPError):
        return error
    package = (error.name or "").partition(".")[0]
    if not package or package == __name__.partition(".")[0]:
        return None
    reason = "" if isinstance(error, ModuleNotFoundError) else str(error)
    return MissingDependency(package, EXTRAS.get(package), reason)


@contextmanager
def optional_imports() -> Iterator[None]:
    """Turn a failed import of an optional package into `MissingDependency`, which names the remedy."""
    try:
        yield
    except ImportError as error:
        found = None if isinstance(error, RepMLPError) else missing_dependency(error)
        if found is None:
            raise
        raise found from error


class MissingDevice(RepMLPError):  # noqa: N818 - reads as what it says
    """A device, driver or execution provider that is not there."""

    exit_code = 4


class DeviceError(RepMLPError, RuntimeError):
    """A call to a device that is there, but failed."""

    exit_code = 4


class BuildError(RepMLPError):
    """A vendor's parser or builder refused a verified graph."""

    exit_code = 4


class OutputError(RepMLPError, OSError):
    """The result could not be written; an earlier one is untouched."""

    exit_code = 5
