"""A session: every row opened in a process of its own, checked, and timed in rounds with the others.

    targets → children → cold start → check against the trained network → rounds → rows → report

A row whose output differs from the trained network is not timed: the speed of a wrong answer is worth nothing.
"""

from __future__ import annotations

import datetime as dt
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from repmlp_deploy.bench.crew import Child, ChildFailed
from repmlp_deploy.bench.measure.machine import describe_machine, usable_cores
from repmlp_deploy.bench.measure.peaks import best_of, roofline
from repmlp_deploy.bench.measure.results import ColdStart, Error, Machine, Memory, ProfileLine, Report, Row
from repmlp_deploy.bench.measure.timing import Warmup, compare_rounds, summarize
from repmlp_deploy.bench.members import Member, Record
from repmlp_deploy.bench.scenarios import Scenarios
from repmlp_deploy.bench.settings import Settings
from repmlp_deploy.bench.subjects.table import SUBJECTS, chosen_rows, require_device, why_not
from repmlp_deploy.bench.targets import Target, Unavailable, counts_key, find_targets
from repmlp_deploy.convert.options import require_choice

__all__ = ["run_benchmark"]

MOST_ROUNDS, LEAST_ROUNDS = 10, 6  # fewer than six have no bootstrap, see `timing`

_LAST_SECONDS = 5  # for the report

Show = Callable[[str], None]


def run_benchmark(settings: Settings, show: Show) -> Report:
    """Measure everything that the settings ask for. Ctrl-C ends it early, with what was measured until then.

    Args:
        settings: what to measure.
        show: called with the current step.

    Raises:
        InputError: a model, checkpoint, bundle, format or precision is unusable.
        MissingDevice: it is to run on a GPU, and there is none.
    """
    session = _Session(settings, show)
    try:
        with tempfile.TemporaryDirectory(prefix="repmlp-bench-") as folder:
            session.run(Path(folder))
    except KeyboardInterrupt:
        session.interrupted = True
    return session.report()


class _Session:
    """The state of a run, readable at any moment it is interrupted."""

    def __init__(self, settings: Settings, show: Show) -> None:
        self.settings = settings
        self.threads = settings.threads or usable_cores()
        self.chosen = chosen_rows(settings.formats, settings.precision, settings.device)
        require_choice("--baseline", settings.baseline, tuple(SUBJECTS))
        require_device(settings.device)
        if settings.scenario:  # a missing package is told before minutes of measuring, not after
            import_module("repmlp_deploy.bench.load.generator")
        self.environment = describe_machine()  # before anything of ours is a load
        self.started = time.monotonic()
        self.created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.targets: list[Target] = []
        self.records: list[Record] = []
        self.profile: list[ProfileLine] = []
        self.scenarios = Scenarios(settings, self.threads, show, self._in_time)
        self.machine: Machine | None = None
        self.notes: list[str] = []
        self.interrupted = False
        self._show = show
        self._groups_left = 0
        self._gauge: Child | None = None

    def run(self, folder: Path) -> None:
        """Measure; files are made in `folder`."""
        self._show("preparing weights")
        self.targets = find_targets(self.settings, folder)
        self.records = [
            Record(target, name, precision, batch, mode)
            for target in self.targets
            for batch in self.settings.batch
            for mode in self._modes()
            for name, precision in self.chosen
        ]
        self._groups_left = len(self.targets) * len(self.settings.batch) * len(self._modes())
        with Child(self.threads) as self._gauge:
            self._measure_peaks()
            for target in self.targets:
                with ExitStack() as children:
                    self._measure_target(target, children)

    def report(self) -> Report:
        """Return what is known now."""
        rows = tuple(self._rows())
        above = [row.name for row in rows if row.roofline is not None and (row.roofline.share or 0) > 1]
        if above:
            self.notes.append(
                f"{', '.join(dict.fromkeys(above))} lie above the roof: the machine was busier while its peaks were "
                "measured than while these ran, so shares of the roof are too high"
            )
        return Report(
            created=self.created,
            title=f"{', '.join(t.name for t in self.targets)} on {self._where()}",
            settings={**self.settings.model_dump(mode="json"), "threads": self.threads},
            environment=self.environment,
            machine=self.machine,
            weights={target.name: target.weights for target in self.targets},
            counts={target.name: target.counts for target in self.targets},
            baseline=self.settings.baseline,
            rows=rows,
            profile=tuple(self.profile),
            scenarios=tuple(self.scenarios.rows()),
            notes=(*self.notes, *(note for target in self.targets for note in target.notes)),
            interrupted=self.interrupted,
        )

    def _where(self) -> str:
        on_cpu = f"{self.environment['cpu']}, {self.threads} threads"
        return str(self.environment["gpu"]) if self.settings.device == "cuda" else on_cpu

    def _in_time(self) -> bool:
        """Return whether another step may begin; one that has begun is finished."""
        return time.monotonic() - self.started < self.settings.limit_seconds

    def _modes(self) -> list[str]:
        extra = {"idle": self.settings.idle_ms is not None, "end-to-end": self.settings.end_to_end}
        return ["steady", *(mode for mode, wanted in extra.items() if wanted)]

    def _measure_peaks(self) -> None:
        """Measure the roof: once before everything and once in the last group, the better one counts."""
        if self._gauge is None:
            return
        self._show("measuring what the machine can do")
        try:
            found = Machine.model_validate(self._gauge.ask("peaks", threads=self.threads, device=self.settings.device))
        except ChildFailed as failure:
            self.notes.append(f"no further measurement of the roof: {failure}")
            self._gauge = None
            return
        self.machine = found if self.machine is None else best_of(self.machine, found)

    def _measure_target(self, target: Target, children: ExitStack) -> None:
        if self._in_time():
            self._show(f"{target.name}: counting")
            target.count_networks()
        members = [
            member
            for name, precision in self.chosen
            if (member := self._opened(target, name, precision, children)) is not None
        ]
        for batch in self.settings.batch:
            for mode in self._modes():
                records = [
                    record
                    for member in members
                    for record in self.records
                    if (record.target, record.batch, record.mode) == (target, batch, mode) and record.member is member
                ]
                self._time_group(records, f"{target.name}, batch {batch}, {mode}")
                self._groups_left -= 1
            if self.settings.profile:
                self._profile(target, members, batch)
        self.scenarios.measure(target, members, self.records)

    def _opened(self, target: Target, name: str, precision: str, children: ExitStack) -> Member | None:
        """Start the row's child, cold, and check it; return None if that fails, with the reason in its records."""
        records = [r for r in self.records if (r.target, r.format, r.precision) == (target, name, precision)]
        refused = why_not(name, precision, self.settings.device)
        if refused is None and not self._in_time():
            refused = f"the limit of {self.settings.limit_seconds:g} s was reached before it was made: raise --limit"
        if refused is not None:
            for record in records:
                record.reason = refused
            return None
        try:
            job = target.job(name, precision, self.threads, self._show)
            probe = target.probe()
            self._show(f"{target.name}: opening {name} {precision}")
            child = children.enter_context(Child(self.threads))
            smallest = min(self.settings.batch)
            opened = child.ask("load", job=job.model_dump(mode="json"), shape=target.shape, batch=smallest)
            error = Error.model_validate(child.ask("check", probe=str(probe)))
        except (Unavailable, ChildFailed) as why:
            for record in records:
                record.reason = str(why)
                record.status = "failed" if isinstance(why, ChildFailed) else "unavailable"
            return None
        member = Member(
            name,
            precision,
            child,
            ColdStart.model_validate(opened["cold"]),
            opened["imports_bytes"],
            opened["proof"],
            error,
        )
        for record in records:
            if record.mode == "end-to-end" and target.no_pictures:
                record.reason = target.no_pictures
                continue
            record.member = member
            if error.allowed is not None and error.max_abs > error.allowed:
                record.status = "failed"
                record.reason = (
                    f"differs from the trained network by {error.max_abs:.2e}; {precision} allows "
                    f"{error.allowed:.2e}: not timed"
                )
        return None if records and records[0].status == "failed" else member

    def _time_group(self, records: list[Record], what: str) -> None:
        """Warm up and time rows that are compared with one another."""
        for record in records:
            self._warm(record, what)
        running = [record for record in records if record.status != "failed"]
        if not running:
            return
        slowest = max(record.call_seconds for record in running)
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(self.settings.seconds / max(1e-6, slowest))))
        seconds = self.settings.seconds / rounds
        a_round = sum(max(seconds, record.call_seconds * self._least_calls(record)) for record in running)
        ends = self._group_end()
        for r in range(rounds):
            if r and time.monotonic() + a_round / 2 > ends:
                self.notes.append(f"{what}: the time limit ended it after {r} of {rounds} rounds")
                break
            left = min((rounds - r) * a_round + self._later_seconds(len(records)), self._seconds_left())
            self._show(f"{what}: round {r + 1} of {rounds}, about {int(left // 60)}:{int(left % 60):02d} left")
            for record in running[r % len(running) :] + running[: r % len(running)]:
                self._time_slice(record, seconds)
            running = [record for record in running if record.status != "failed"]
            if not running:
                break
            if r == rounds // 2 and self._groups_left == 1:  # once more, in the last group
                self._measure_peaks()
        for record in running:
            self._keep_memory(record)

    def _warm(self, record: Record, what: str) -> None:
        """Warm up, and note the seconds that a call takes."""
        member = record.member
        if member is None:
            raise AssertionError("only opened rows are timed")
        if member.failed:
            record.status, record.reason = "failed", member.failed
            return
        self._show(f"{what}: warming up {record.format} {record.precision}")
        seconds = self.settings.seconds / 2
        ran = record.batch == member.cold.batch and record.mode == "steady"
        if ran and member.cold.first_ms / 1e3 >= seconds:  # the first inference took all the time there is for it
            seconds = 0.0
        try:
            answer = member.child.ask(
                "warm", batch=record.batch, mode=record.mode, seconds=seconds, gap_ms=self._gap(record)
            )
        except ChildFailed as failure:
            member.failed = str(failure)
            record.status, record.reason = "failed", member.failed
            return
        warmup = Warmup.model_validate(answer)
        record.warmup = warmup.model_copy(update={"calls": warmup.calls + ran})
        record.call_seconds = warmup.seconds / warmup.calls if warmup.calls else member.cold.first_ms / 1e3

    def _least_calls(self, record: Record) -> int:
        """Time the calls of a slice; the first finds the caches full of another row's data."""
        return 2 if record.call_seconds < self.settings.seconds / 2 else 1

    def _time_slice(self, record: Record, seconds: float) -> None:
        if record.member is None or record.member.failed:
            return
        try:
            latencies = record.member.child.ask(
                "time",
                batch=record.batch,
                mode=record.mode,
                seconds=seconds,
                gap_ms=self._gap(record),
                least=self._least_calls(record),
            )
        except ChildFailed as failure:
            record.member.failed = str(failure)
            record.status, record.reason = "failed", record.member.failed
            return
        record.rounds.append(latencies)
        record.status, record.reason = "measured", ""

    def _keep_memory(self, record: Record) -> None:
        if record.member is None or record.member.failed:
            return
        try:
            peak = record.member.child.ask("memory")
            record.on_device = record.member.child.ask("device", batch=record.batch)
        except ChildFailed as failure:
            record.member.failed = str(failure)
            return
        record.memory = Memory(peak_bytes=peak, imports_bytes=record.member.imports_bytes)

    def _profile(self, target: Target, members: list[Member], batch: int) -> None:
        for member in members:
            if not SUBJECTS[member.format].profiles or member.failed:
                continue
            self._show(f"{target.name}, batch {batch}: profiling {member.format} {member.precision}")
            try:
                lines = [ProfileLine.model_validate(line) for line in member.child.ask("profile", batch=batch)]
            except ChildFailed as failure:
                self.notes.append(f"{target.name}: no profile of {member.format} {member.precision}: {failure}")
                continue
            self.profile += [line.model_copy(update={"model": target.name, "batch": batch}) for line in lines]

    def _gap(self, record: Record) -> float:
        return (self.settings.idle_ms or 0.0) if record.mode == "idle" else 0.0

    def _seconds_left(self) -> float:
        return max(0.0, self.started + self.settings.limit_seconds - _LAST_SECONDS - time.monotonic())

    def _group_end(self) -> float:
        """Return when this group's share of the remaining time ends."""
        return time.monotonic() + self._seconds_left() / max(1, self._groups_left)

    def _later_seconds(self, rows: int) -> float:
        return (self._groups_left - 1) * rows * 1.3 * self.settings.seconds

    def _rows(self) -> Iterator[Row]:
        for record in self.records:
            yield self._row(record)

    def _row(self, record: Record) -> Row:
        member, rounds = record.member, tuple(tuple(calls) for calls in record.rounds)
        measured = record.status == "measured"
        summary = summarize(rounds, record.batch) if measured else None
        base = self._baseline(record)
        counts = record.target.counts.get(counts_key(record.format))
        ratio = None
        if measured and base is not None and base is not record:
            ratio = compare_rounds(tuple(tuple(calls) for calls in base.rounds), rounds)
        roof = None
        if summary is not None and counts is not None and record.mode == "steady":
            roof = roofline(counts, record.batch, record.precision, summary.p50_ms, self.machine)
        return Row.model_validate(
            {
                "model": record.target.name,
                "format": record.format,
                "precision": record.precision,
                "batch": record.batch,
                "mode": record.mode,
                "title": SUBJECTS[record.format].title,
                "graph": counts_key(record.format),
                "status": record.status,
                "reason": record.reason,
                "rounds": rounds,
                "warmup": record.warmup,
                "summary": summary,
                "ratio": ratio,
                "cold": None if member is None else member.cold,
                "memory": record.memory,
                "error": None if member is None else member.error,
                "roofline": roof,
                "proof": {} if member is None else member.proof | record.on_device,
            }
        )

    def _baseline(self, record: Record) -> Record | None:
        """Return the row that this one is compared with: the baseline's first precision, or the first measured."""
        group = [
            other
            for other in self.records
            if (other.target, other.batch, other.mode) == (record.target, record.batch, record.mode)
            and other.status == "measured"
        ]
        wanted = [other for other in group if other.format == self.settings.baseline]
        return next(iter(wanted or group), None)
