"""Results: what one run of the benchmark found, as JSON keeps it for comparison with later runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from repmlp_deploy.bench.counting.counts import Counts
from repmlp_deploy.bench.measure.timing import Ratio, Rounds, Summary, Warmup
from repmlp_deploy.errors import InputError
from repmlp_deploy.files import read_text
from repmlp_deploy.text import first_fault

__all__ = [
    "SCHEMA",
    "ColdStart",
    "Error",
    "LoadRun",
    "Machine",
    "Memory",
    "ProfileLine",
    "Report",
    "Roofline",
    "Row",
    "ScenarioRow",
    "load_report",
]

SCHEMA = 1

_LARGEST_REPORT_BYTES = 1 << 28


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColdStart(_Frozen):
    """From a started interpreter to the first answer, in a process of its own; files may be in the page cache.

    Attributes:
        import_s: importing the runtime.
        load_s: from the file to something that can be called: reading, checking, merging, compiling.
        first_ms: the first inference.
        batch: of the first inference.
    """

    import_s: float
    load_s: float
    first_ms: float
    batch: int


class Memory(_Frozen):
    """Resident memory of the row's own process.

    Attributes:
        peak_bytes: the largest while warming up and running at this batch; what loading took and gave back is not in
            it, except where the system cannot begin a peak anew, as on Windows and macOS.
        imports_bytes: with the runtime imported and nothing loaded: the libraries' share.
    """

    peak_bytes: int
    imports_bytes: int


class Error(_Frozen):
    """Distance from the trained network in float64, on the probe's inputs.

    Attributes:
        max_abs: largest absolute error.
        max_rel: that over the largest absolute reference.
        top1: share of samples with the same largest class.
        allowed: largest `max_abs` that passes; None where no tolerance exists for the precision.
    """

    max_abs: float
    max_rel: float
    top1: float | None
    allowed: float | None


class Roofline(_Frozen):
    """How much of what the machine can do a row attains, at the median latency.

    Attributes:
        gflops: attained, two operations a multiply-add.
        intensity: operations per byte that no implementation can avoid moving.
        attainable_gflops: min(peak of the precision, intensity × bandwidth).
        share: attained over attainable; None where the precision's peak is unknown.
    """

    gflops: float
    intensity: float
    attainable_gflops: float | None
    share: float | None


class Row(_Frozen):
    """One thing that was to be measured; what could not be says why.

    Attributes:
        model: the card's name.
        format: an entry of `SUBJECTS`.
        precision: that the row computes in.
        batch: images a call.
        mode: `steady`, calls back to back; `idle`, with a gap before each; `end-to-end`, from JPEG bytes to classes.
        title: its name for people.
        graph: whose counts apply: trained, merged or folded.
        status: whether there are figures.
        reason: why there are none, or fewer than asked for.
        rounds: every latency.
        warmup: what ran before.
        summary: of `rounds`.
        ratio: against the baseline row.
        cold: cold start.
        memory: resident memory.
        error: distance from the trained network.
        roofline: share of the attainable.
        proof: what the runtime itself says of provider, device, threads and types.
    """

    model: str
    format: str
    precision: str
    batch: int
    mode: Literal["steady", "idle", "end-to-end"]
    title: str
    graph: str
    status: Literal["measured", "unavailable", "failed"]
    reason: str = ""
    rounds: Rounds = ()
    warmup: Warmup | None = None
    summary: Summary | None = None
    ratio: Ratio | None = None
    cold: ColdStart | None = None
    memory: Memory | None = None
    error: Error | None = None
    roofline: Roofline | None = None
    proof: dict[str, Any] = {}

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What identifies a row across runs."""
        return self.model, self.format, self.precision, self.batch, self.mode

    @property
    def name(self) -> str:
        """Format and precision."""
        return f"{self.format} {self.precision}"


class Machine(_Frozen):
    """What the machine can do at best, measured in the same run with the same threads.

    Attributes:
        peak_gflops: precision to the fastest matrix product seen, two operations a multiply-add.
        peak_source: precision to the library and shape it was seen with.
        bandwidth_gb_s: fastest stream through memory.
    """

    peak_gflops: dict[str, float]
    peak_source: dict[str, str]
    bandwidth_gb_s: float


class LoadRun(_Frozen):
    """One run of MLCommons' load generator.

    Attributes:
        samples_per_s: that were answered.
        p50_ms, p90_ms, p99_ms: percentiles of latency, from a sample's arrival to its answer.
        valid: whether the load generator calls the run valid, which needs more samples than the figures do.
        asked_per_s: samples that arrived per second, in `server`.
        samples: that were answered.
        compared: answers that were compared with what must come back.
        max_abs_error: the largest error among them.
    """

    samples_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    valid: bool
    asked_per_s: float | None = None
    samples: int = 0
    compared: int = 0
    max_abs_error: float = 0.0


class ScenarioRow(_Frozen):
    """One way to run one format under one scenario; what could not be run says why.

    Attributes:
        model: the card's name.
        format: an entry of `SUBJECTS`.
        precision: that it computes in.
        scenario: `single-stream`, `offline` or `server`.
        source: `tensors`, or `jpeg` for bytes of JPEG files.
        way: an entry of `WAYS`.
        status: whether there are figures.
        reason: why there are none, or fewer than asked for.
        run: the run that counts; in `server` that of the highest rate that kept the limit, None if no rate did.
        limit_ms: of the 99th percentile of latency, in `server`.
        tried: every run of the search for the highest rate.
    """

    model: str
    format: str
    precision: str
    scenario: Literal["single-stream", "offline", "server"]
    source: Literal["tensors", "jpeg"]
    way: str
    status: Literal["measured", "unavailable", "failed"]
    reason: str = ""
    run: LoadRun | None = None
    limit_ms: float | None = None
    tried: tuple[LoadRun, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, str, str, str]:
        """What identifies a row across runs."""
        return self.model, self.format, self.precision, self.scenario, self.source, self.way

    @property
    def name(self) -> str:
        """Format and precision."""
        return f"{self.format} {self.precision}"

    @property
    def figure(self) -> float | None:
        """Milliseconds of the 90th percentile in `single-stream`, samples per second otherwise; None for no figure."""
        if self.status != "measured":
            return None
        if self.run is None:
            return 0.0
        if self.scenario == "single-stream":
            return self.run.p90_ms
        return self.run.samples_per_s if self.run.asked_per_s is None else self.run.asked_per_s


class ProfileLine(_Frozen):
    """Time of one stage and kind of operation, in milliseconds a call."""

    model: str
    format: str
    precision: str
    batch: int
    stage: str
    op: str
    ms: float


class Report(_Frozen):
    """One run.

    Attributes:
        created: UTC, ISO 8601.
        title: one line.
        settings: what was asked for.
        environment: what it ran on.
        machine: peaks; None when the run ended before they were measured.
        weights: model to where its weights are from.
        counts: model to graph (trained, merged, folded) to what it does for one image.
        baseline: the format that ratios are against.
        rows: one a thing that was to be measured.
        profile: time per stage and operation, where asked for.
        scenarios: one per way to run a format under a scenario, where asked for.
        notes: what a reader must know.
        interrupted: whether the run was cut short.
    """

    schema_version: Literal[1] = 1
    created: str
    title: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    machine: Machine | None
    weights: dict[str, str]
    counts: dict[str, dict[str, Counts]]
    baseline: str
    rows: tuple[Row, ...]
    profile: tuple[ProfileLine, ...] = ()
    scenarios: tuple[ScenarioRow, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    def to_json(self) -> str:
        """Return the file's text; every latency of every call is in it."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls.model_validate_json(text)


def load_report(path: Path) -> Report:
    """Read the report in a JSON file.

    Raises:
        InputError: it is not there, or is none.
    """
    try:
        return Report.from_json(read_text(path, _LARGEST_REPORT_BYTES))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        where, said = first_fault(error)
        raise InputError(
            f"{path} is no report of repmlp-bench (schema {SCHEMA}): {where or 'file'}: {said}; make one with --json"
        ) from None
    except ValueError as error:  # of which ValidationError is one
        raise InputError(f"{path} cannot be read: {error}") from None
