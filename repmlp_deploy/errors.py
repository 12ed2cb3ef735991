"""The errors that RepMLP Deploy raises, and the exit code each one ends a command with.

RepMLPError
├── InputError               2   unusable arguments or input
│   ├── CardError                a model card that cannot be read, or that contradicts itself
│   ├── CheckpointError          a weights file that is damaged, unsafe, or of another network
│   ├── BundleError              a deployed folder that is damaged or of another schema
│   └── ImageError               an image that cannot be decoded, or is too large
├── VerificationError        3   an output strays from the trained network's; nothing is written
├── MissingDependency        4   a package is not installed; the message names the exact remedy
├── MissingDevice            4   a device, driver or provider is not there
├── DeviceError              4   a device is there, and a call to it failed
├── BuildError               4   a vendor's builder refused a graph that had been verified
└── OutputError              5   the result could not be written; an earlier one is untouched

Every message is one line: what, got, expected, remedy.
"""

from __future__ import annotations

__all__ = [
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
    """An output strays from the trained network's by more than its tolerance."""

    exit_code = 3


class MissingDependency(RepMLPError, ImportError):  # noqa: N818 - the contract's name
    """A package that is not installed.

    Args:
        package: what could not be imported.
        extra: the extra of this project that brings it.
    """

    exit_code = 4

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed: pip install "repmlp-deploy[{extra}]"')
        self.package = package
        self.extra = extra


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
