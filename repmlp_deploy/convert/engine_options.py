"""What an engine can be asked for: one value for both flavours. No framework and no builder is needed here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.options import require_choice
from repmlp_deploy.errors import InputError

__all__ = ["FLAGS", "VERBOSITIES", "EngineOptions", "parse_capabilities", "with_profiles"]

VERBOSITIES = ("error", "warning", "info", "verbose")

FLAGS: Mapping[str, str] = {
    "profiles": "--batch",
    "workspace_gb": "--workspace-gb",
    "tf32": "--tf32",
    "optimization_level": "--optimization-level",
    "timing_cache": "--timing-cache",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
    "compute_capabilities": "--compute-capability",
    "refittable": "--refittable",
    "strip_weights": "--strip-weights",
    "verbosity": "--verbosity",
}
"""Field to its name on the command line."""

_LARGEST_WORKSPACE_GB = 4096
_HIGHEST_LEVEL = 5


@dataclass(frozen=True)
class EngineOptions:
    """How to build an engine. An option that a flavour or its version does not have is refused.

    Attributes:
        profiles: optimisation profiles; by default one, the batch sizes that the graph serves.
        workspace_gb: most scratch memory an engine may take, in 2³⁰ bytes; None leaves it to the builder.
        tf32: let float32 products round their inputs to 10 bits of mantissa. Off: the proof is of float32.
        optimization_level: 0 (quick to build) to 5; None is the builder's own, 3.
        timing_cache: what an earlier build measured is not measured again: `auto` is a file in the user's cache
            folder where the flavour measures at all, `off` none, anything else a file.
        version_compatible: runs in later versions too.
        hardware_compatible: runs on every GPU from Ampere on.
        compute_capabilities: GPUs to build for, such as `8.6`; by default the flavour's own choice.
        refittable: weights can be replaced later.
        strip_weights: leave the weights out; they are put in by refitting, before the first run.
        verbosity: which of the builder's messages go to stderr; its warnings are always kept in the report.
    """

    profiles: tuple[BatchRange, ...] = ()
    workspace_gb: float | None = None
    tf32: bool = False
    optimization_level: int | None = None
    timing_cache: str | Path = "auto"
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()
    refittable: bool = False
    strip_weights: bool = False
    verbosity: str = "error"

    def __post_init__(self) -> None:
        """Refuse values that no flavour takes.

        Raises:
            InputError: a value is out of its range.
        """
        require_choice("--verbosity", self.verbosity, VERBOSITIES)
        if self.workspace_gb is not None and not 0 < self.workspace_gb <= _LARGEST_WORKSPACE_GB:
            raise InputError(
                f"--workspace-gb is {self.workspace_gb:g}; expected a positive number of gibibytes, at most "
                f"{_LARGEST_WORKSPACE_GB}"
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= _HIGHEST_LEVEL:
            raise InputError(f"--optimization-level is {self.optimization_level}; expected 0 to {_HIGHEST_LEVEL}")

    def asked(self) -> tuple[str, ...]:
        """Return the fields that are not at their default."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)


def with_profiles(options: EngineOptions, profiles: Sequence[BatchRange]) -> EngineOptions:
    """Return the options with the profiles of `--batch`, unless they have their own."""
    return options if options.profiles else replace(options, profiles=tuple(profiles))


def parse_capabilities(text: str) -> tuple[str, ...]:
    """Read the compute capabilities of `8.6,8.9,12.0`, without repetition.

    Raises:
        InputError: a word is none.
    """
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not re.fullmatch(r"[1-9][0-9]?\.[0-9]", word):
            raise InputError(f"--compute-capability {word!r}: expected two numbers and a point, such as 8.6 or 12.0")
    return tuple(dict.fromkeys(words))
