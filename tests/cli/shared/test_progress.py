"""Progress says how far a command is and how long it will take, on a terminal; elsewhere it stays out of the way."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from repmlp_deploy import export
from repmlp_deploy.cli.shared import process
from repmlp_deploy.cli.shared import progress as module
from repmlp_deploy.cli.shared.console import run_command
from repmlp_deploy.cli.shared.progress import PHASES, Phases, _shares, counting, progress, spoken
from repmlp_deploy.convert.formats import FORMATS, Format


@pytest.mark.parametrize("formats", ["onnx", "torch", "onnx,openvino,torch,checkpoint"])
def test_phases_rise_to_the_last(formats: str, digits_checkpoint: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    phases = Phases(formats.split(","))
    export(
        digits_checkpoint,
        formats=formats,
        batch="2",
        out=tmp_path / "out",
        progress=lambda step: shown.append(phases.number(step)),
    )
    numbers = [int(re.fullmatch(rf"(\d) of {len(PHASES)}: .+", line).group(1)) for line in shown]
    assert numbers == sorted(numbers)
    assert shown[0] == "1 of 6: load"
    assert shown[-1] == "6 of 6: save"
    assert set(numbers) == ({1, 2, 3, 4, 6} if formats == "onnx" else {1, 2, 3, 4, 5, 6})
    assert phases.seconds_left() == pytest.approx(0, abs=1)
    if formats == "torch":
        assert "5 of 6: torch" in shown


def test_formats_of_a_plugin_are_parts_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a format is made of says where it belongs, not its name."""
    monkeypatch.setitem(FORMATS, "constants", Format("nowhere", "fp32", "constants"))
    monkeypatch.setitem(FORMATS, "trtis", Format("nowhere", "fp32", "no engine"))
    monkeypatch.setitem(FORMATS, "weights", Format("nowhere", "form", "made before the graph"))
    monkeypatch.setitem(FORMATS, "plan", Format("nowhere", "lowered", "an engine", engine=True))
    shares = _shares(["weights", "plan", "trtis", "constants"], "fp32")
    assert list(shares.items())[4:] == [("plan", 40), ("trtis", 10), ("constants", 10), ("save", 1)]
    phases = Phases(["weights", "constants"])
    steps = ("load", "probe", "merge", "weights", "trace", "constants", "save")
    assert [phases.number(step)[0] for step in steps] == [*"1233456"]


def test_merging_regions_is_merging() -> None:
    phases = Phases(["onnx"])
    assert [phases.number(step)[0] for step in ("load", "probe", "merge regions", "verify regions")] == [*"1233"]


def test_the_time_left_follows_the_clock_and_the_usual_shares() -> None:
    """An export whose parts take their usual shares is estimated rightly at every moment."""
    now = 0.0
    phases = Phases(["onnx", "openvino", "trt-rtx"], "int8", clock=lambda: now)
    parts = {
        "load": 5,
        "probe": 20,
        "merge": 30,
        "trace": 35,
        "calibrate": 30,
        "openvino": 60,
        "trt-rtx": 40,
        "save": 1,
    }
    whole = 2.0 * sum(parts.values())
    for step, share in parts.items():
        phases.number(step)
        for _ in range(4):
            expected = None if step == "load" else pytest.approx(whole - now)
            assert phases.seconds_left() == expected
            phases.number(f"verify {step}")
            now += 2.0 * share / 4
    now += 1000  # a part that takes longer than ever leaves no negative time
    assert phases.seconds_left() == 0


def test_a_part_that_is_slow_moves_the_end() -> None:
    now = 0.0
    phases = Phases(["onnx"], clock=lambda: now)
    for step, seconds in (("load", 5), ("probe", 20), ("merge", 300)):
        phases.number(step)
        now += seconds
    assert phases.seconds_left() == pytest.approx(36)
    phases.number("trace")
    assert phases.seconds_left() == pytest.approx(325 / 55 * 36)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "a few seconds"), (7.9, "a few seconds"), (8, "about 10 s"), (44, "about 40 s"), (94, "about 90 s"),
     (95, "about 2 min"), (3600, "about 60 min")],
)  # fmt: skip
def test_an_estimate_is_said_as_one(seconds: float, said: str) -> None:
    assert spoken(seconds) == said


def _on_a_terminal(work: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Return what a terminal of 80 columns gets on stderr from a command that does `work`."""
    ours, theirs = pty.openpty()
    said = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other end is closed
                return
            said.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        with pytest.raises(SystemExit, match="0"):
            run_command(work, words)
    reader.join(10)
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())


def test_a_terminal_shows_one_line_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with progress(left=lambda: 41.0) as show:
            show("1 of 6: load")
            show("2 of 6: probe")
            time.sleep(0.3)

    said = _on_a_terminal(work, monkeypatch)
    assert "2 of 6: probe, about 40 s left" in said
    assert said.count("\n") <= 1


def test_a_terminal_shows_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with counting() as count:
            for done in range(0, 40, 10):
                count(done, 40, "top1 97.00 %")
                time.sleep(0.2)

    said = _on_a_terminal(work, monkeypatch)
    assert re.search(r"top1 97\.00 % \S+ +30/40 0:00:0\d", said), said


def test_a_terminal_stays_empty_if_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with progress() as show, counting() as count:
            show("merge")
            count(1, 2, "")

    assert _on_a_terminal(work, monkeypatch, "--quiet") == ""


@pytest.mark.parametrize(("words", "lines"), [([], ["... 30 of 90, about 60 s left: 0 errors"]), (["-q"], [])])
def test_elsewhere_a_line_comes_every_half_minute(
    words: list[str], lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)

    def work() -> None:
        nonlocal now
        with counting() as count:
            for done in range(0, 50, 10):
                count(done, 90, "0 errors")
                now += 10

    with pytest.raises(SystemExit):
        run_command(work, words)
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("words", [[], ["--quiet"]])
def test_an_interruption_that_a_library_swallowed_ends_what_is_counted(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with counting() as count:
            monkeypatch.setattr(process, "_received", [signal.SIGINT])
            count(1, 2, "")
            sys.stdout.write("went on")

    with pytest.raises(SystemExit) as ended:
        run_command(work, words)
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: interrupted\n")


def test_a_pipe_gets_no_control_characters_and_no_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress(left=lambda: 41.0) as show:
            show("merge")

    with pytest.raises(SystemExit):
        run_command(work, [])
    assert capsys.readouterr().err == "... merge\n"
