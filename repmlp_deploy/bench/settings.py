"""Settings of a run: what the command line or a suite asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from repmlp_deploy.bench.load.ways import Scenario
from repmlp_deploy.bench.subjects.table import BASELINE, ON_CUDA
from repmlp_deploy.errors import InputError
from repmlp_deploy.files import read_toml
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.reading import state_of
from repmlp_deploy.text import printable

__all__ = ["DEFAULT_MODEL", "Settings", "read_settings"]

DEFAULT_MODEL = "repmlpnet-b224"

_LARGEST_SUITE_BYTES = 1 << 20

_OPTIONS = {"limit_seconds": "limit", "idle_ms": "idle", "end_to_end": "end-to-end", "p99_ms": "p99"}
"""Setting to its option, where the names differ; a suite may use either."""

_SOURCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ckpt": ("ckpt", "card", "model", "calibration"),
        "bundle": ("bundle",),
        "models": ("models", "calibration"),
    }
)
"""What says which network is measured, to the settings that belong to it."""

_LARGEST_COUNT = 65_536
_LARGEST_AMOUNT = 1e6

Count = Annotated[int, Field(gt=0, le=_LARGEST_COUNT)]
Positive = Annotated[float, Field(gt=0, le=_LARGEST_AMOUNT)]


class Settings(BaseModel):
    """What is measured, and for how long.

    Attributes:
        models: cards; their weights are seeded, or the card's own where they ship with the package.
        formats: entries of `SUBJECTS`; None for all that are not opt-in.
        precision: those that rows compute in, where their format has them.
        device: `cuda` for rows on the first NVIDIA GPU.
        batch: images a call.
        threads: of one inference; None for all usable cores.
        seconds: of timing a row.
        limit_seconds: of the whole run: rounds end then, and rows that got fewer than planned say so.
        baseline: format that ratios are against.
        idle_ms: gap before every call of an idle row; None for no such rows.
        end_to_end: also measure from JPEG bytes to classes.
        profile: also measure time per stage and operation.
        ckpt: trained checkpoint to use instead of `models`.
        model: `timm:NAME[,…]`, the network of timm that `ckpt` is for.
        card: of `ckpt`; None for the one that its keys and shapes tell.
        bundle: bundle to use instead of `models`.
        scenario: load scenarios that are run, too.
        p99_ms: milliseconds that the 99th percentile of latency must keep in the server scenario.
        calibration: folder of images or `.npz` that int8 is calibrated with; None for seeded inputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[tuple[str, ...], Field(min_length=1)] = (DEFAULT_MODEL,)
    formats: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    precision: Annotated[tuple[str, ...], Field(min_length=1)] = ("fp32", "bf16")
    device: Literal["cpu", "cuda"] = "cpu"
    batch: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    threads: Count | None = None
    seconds: Positive = 8.0
    limit_seconds: Positive = 320.0
    baseline: str = BASELINE
    idle_ms: Positive | None = None
    end_to_end: bool = False
    profile: bool = False
    scenario: tuple[Scenario, ...] = ()
    p99_ms: Positive = 100.0
    ckpt: Path | None = None
    model: str | None = None
    card: str | None = None
    bundle: Path | None = None
    calibration: Path | None = None


def read_settings(suite: Path | None, given: Mapping[str, Any]) -> Settings:
    """Read the settings of a suite's TOML file; the command line takes precedence.

    Args:
        suite: the file; None for the defaults.
        given: the command line's settings, lists as comma-separated words; None stands for what was not given.

    Raises:
        InputError: the file cannot be read, or a setting is wrong or contradicts another.
    """
    found = {} if suite is None else _read_suite(suite)
    named = {name: _parsed(name, value) for name, value in given.items() if value is not None}
    try:
        settings = Settings.model_validate(_with_defaults(_without_other_source(found, named) | named))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = f"--{_OPTIONS.get(name, name)}" if name in named else f"{suite}: {name}"
        raise InputError(f"{where}: {first['msg']}; got {first['input']!r}") from None
    _require_consistent(settings, named)
    return settings


def _read_suite(suite: Path) -> dict[str, Any]:
    """Return the settings in a suite's file; a list may be written as on the command line.

    Raises:
        InputError: it cannot be read, or names no setting.
    """
    try:
        values = read_toml(suite, _LARGEST_SUITE_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"--suite {suite}: {getattr(error, 'strerror', None) or error}") from None
    settings = {_OPTIONS.get(name, name): name for name in Settings.model_fields}
    found = {}
    for key, value in values.items():
        name = settings.get(key, key)
        if name not in Settings.model_fields:
            known = ", ".join(sorted(settings))
            raise InputError(f"--suite {suite}: no setting {printable(key, 100)!r}; known: {known}")
        one = str(value) if name == "batch" and type(value) is int else value
        found[name] = _parsed(name, one)
    return found


def _require_consistent(settings: Settings, named: Mapping[str, Any]) -> None:
    """Raise InputError if a setting contradicts another; `named` are those of the command line."""
    if settings.ckpt is not None and settings.bundle is not None:
        raise InputError("--ckpt and --bundle were both given; one of them says what is measured")
    if settings.bundle is not None and settings.calibration is not None:
        raise InputError("--calibration is for an export, and --bundle names a finished bundle: leave one of them out")
    asked = f"--calibration {settings.calibration}"
    if settings.calibration is not None and state_of(settings.calibration, asked) is None:
        raise InputError(f"{asked}: no such folder or file")
    calibrated = any(name in PRECISIONS and PRECISIONS[name].needs_calibration for name in settings.precision)
    if settings.calibration is not None and not calibrated:
        raise InputError("--calibration is for int8 and fp8: add one of them to --precision, or drop --calibration")
    if "p99_ms" in named and "server" not in settings.scenario:
        raise InputError("--p99 is the limit of the server scenario: add it to --scenario, or drop --p99")
    if settings.model is not None and settings.ckpt is None:
        raise InputError("--model says what the checkpoint of --ckpt is for, and there is none")
    if settings.card is not None and settings.ckpt is None:
        raise InputError("--card describes the checkpoint of --ckpt, and there is none")
    if (settings.ckpt or settings.bundle) and "models" in named:
        raise InputError("--models is for seeded networks; with --ckpt or --bundle leave it out")


def _without_other_source(found: dict[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a suite's settings without those of another network than the command line names."""
    source = next((name for name in _SOURCES if name in named), None)
    if source is None:
        return found
    others = {setting for name in _SOURCES if name != source for setting in _SOURCES[name]}
    return {name: value for name, value in found.items() if name not in others.difference(_SOURCES[source])}


def _with_defaults(chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the precisions that are usual on the device, where none are named."""
    return {"precision": ON_CUDA} | chosen if chosen.get("device") == "cuda" else chosen


def _parsed(name: str, value: Any) -> Any:
    """Read a setting of the command line, and its list if it is one."""
    if not isinstance(value, str) or name not in ("models", "formats", "precision", "batch", "scenario"):
        return value
    words = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
    if name != "batch":
        return words
    if not words or not all(_is_count(word) for word in words):
        raise InputError(f"--batch is {value[:40]!r}; expected numbers from 1 to {_LARGEST_COUNT}, such as 1,8,64")
    return tuple(sorted({int(word) for word in words}))


def _is_count(word: str) -> bool:
    short = len(word) <= len(str(_LARGEST_COUNT))
    return short and word.isascii() and word.isdigit() and 0 < int(word) <= _LARGEST_COUNT
