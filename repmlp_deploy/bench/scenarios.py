"""The scenarios of a session: every way to run every opened format, in turns, from the same samples.

Ways take turns run by run, and rate by rate in the search of `server`, so that whatever else keeps the machine busy
meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from repmlp_deploy.bench.crew import ChildFailed
from repmlp_deploy.bench.load.ways import (
    SCENARIOS,
    SOURCES,
    STEPS,
    WAYS,
    Plan,
    RateSearch,
    Scenario,
    Source,
    Way,
    why_no_way,
)
from repmlp_deploy.bench.measure.results import LoadRun, ScenarioRow
from repmlp_deploy.bench.members import Member, Record
from repmlp_deploy.bench.settings import Settings
from repmlp_deploy.bench.targets import Target

__all__ = ["Scenarios"]

Show = Callable[[str], None]


@dataclass
class _Entry:
    """One format in one way, and what was measured of it."""

    target: Target
    format: str
    precision: str
    source: Source
    way: str
    member: Member | None
    reason: str
    failed: bool = False
    late: bool = False
    runs: dict[Scenario, LoadRun] = field(default_factory=dict)
    search: RateSearch | None = None
    tried: list[LoadRun] = field(default_factory=list)

    @property
    def kind(self) -> Way:
        return WAYS[self.way]

    @property
    def runnable(self) -> bool:
        return not self.reason and not self.late

    def keeps(self, limit_ms: float) -> LoadRun | None:
        """Return the run of the highest rate that kept the limit."""
        kept = [run for run in self.tried if run.p99_ms <= limit_ms]
        return max(kept, key=lambda run: run.asked_per_s or 0.0, default=None)


class Scenarios:
    """The scenarios that the settings ask for; readable at any moment.

    Args:
        settings: of the session.
        threads: of one inference.
        show: called with the current step.
        in_time: whether another run may begin.
    """

    def __init__(self, settings: Settings, threads: int, show: Show, in_time: Callable[[], bool]) -> None:
        self._settings, self._threads = settings, threads
        self._show, self._in_time = show, in_time
        self._entries: list[_Entry] = []

    def measure(self, target: Target, members: Sequence[Member], records: Sequence[Record]) -> None:
        """Run every scenario on one target.

        Args:
            target: the network.
            members: its opened formats.
            records: its rows: those that no member is open for say why.
        """
        wanted = self._settings.scenario
        if not wanted:
            return
        entries = list(self._entries_of(target, members, records))
        self._entries += entries
        for scenario in SCENARIOS:
            if scenario in wanted or (scenario == "offline" and "server" in wanted):
                self._measure_scenario(scenario, entries)

    def rows(self) -> Iterator[ScenarioRow]:
        """Yield what is known now."""
        for scenario in (one for one in SCENARIOS if one in self._settings.scenario):
            for entry in self._entries:
                yield self._row(entry, scenario)

    def _entries_of(self, target: Target, members: Sequence[Member], records: Sequence[Record]) -> Iterator[_Entry]:
        opened = {(member.format, member.precision): member for member in members}
        reasons = {(r.format, r.precision): r.reason for r in records if r.target is target}
        sources: tuple[Source, ...] = tuple(SOURCES) if self._settings.end_to_end else ("tensors",)
        for source in sources:
            for (name, precision), closed in reasons.items():
                member = opened.get((name, precision))
                for way in WAYS:
                    reason = why_no_way(way, name, self._threads, self._settings.device) or ""
                    if member is None:
                        reason = closed
                    elif member.failed:
                        reason = member.failed
                    elif source == "jpeg":
                        reason = reason or target.no_pictures
                    yield _Entry(target, name, precision, source, way, member, reason)

    def _measure_scenario(self, scenario: Scenario, entries: Sequence[_Entry]) -> None:
        if scenario != "server":
            for entry in entries:
                if entry.runnable and (found := self._run(entry, scenario)) is not None:
                    entry.runs[scenario] = found
            return
        for entry in entries:
            if entry.runnable and "offline" in entry.runs:
                entry.search = RateSearch(entry.runs["offline"].samples_per_s)
        while searching := [e for e in entries if e.runnable and e.search is not None and not e.search.ended]:
            for entry in searching:
                self._search(entry)

    def _search(self, entry: _Entry) -> None:
        """Try the next rate."""
        search = entry.search
        if search is None:
            raise AssertionError("only entries with a search are searched")
        found = self._run(entry, "server", search.rate)
        if found is None:
            return
        entry.tried.append(found)
        search.tell(kept=found.p99_ms <= self._settings.p99_ms)

    def _run(self, entry: _Entry, scenario: Scenario, rate: float = 0.0) -> LoadRun | None:
        """Run the child once; None if that fails, with the reason in the entry."""
        if not self._in_time():
            entry.late = True
            return None
        member, target = entry.member, entry.target
        if member is None:
            raise AssertionError("only opened formats are run")
        at = f" at {rate:.4g}/s" if rate else ""
        self._show(f"{target.name}, {scenario}{at}: {entry.format} {entry.precision}, {entry.kind.title}")
        plan = asdict(Plan(scenario, self._settings.seconds, rate=rate, limit_ms=self._settings.p99_ms))
        given = {"probe": str(target.probe()), "smallest": target.batches.min, "largest": target.batches.max}
        try:
            found = member.child.ask("scenario", way=entry.way, source=entry.source, plan=plan, **given)
            return LoadRun.model_validate(found)
        except ChildFailed as failure:
            entry.failed, entry.reason = True, str(failure)
            return None

    def _row(self, entry: _Entry, scenario: Scenario) -> ScenarioRow:
        server = scenario == "server"
        limit_ms = self._settings.p99_ms
        run = entry.keeps(limit_ms) if server else entry.runs.get(scenario)
        measured = not entry.failed and (bool(entry.tried) if server else run is not None)
        reason = entry.reason or ("" if measured else "not reached")
        if entry.late and (not measured or server):
            reason = f"the limit of {self._settings.limit_seconds:g} s was reached: raise --limit"
            reason = f"the search ended after {len(entry.tried)} of {STEPS} rates: {reason}" if measured else reason
        elif server and measured and run is None:
            slowest = min(found.asked_per_s or 0.0 for found in entry.tried)
            reason = reason or f"not even {slowest:.3g} samples per second kept the limit"
        return ScenarioRow(
            model=entry.target.name,
            format=entry.format,
            precision=entry.precision,
            scenario=scenario,
            source=entry.source,
            way=entry.way,
            status="measured" if measured else "failed" if entry.failed else "unavailable",
            reason=reason,
            run=run,
            limit_ms=limit_ms if server else None,
            tried=tuple(entry.tried) if server else (),
        )
