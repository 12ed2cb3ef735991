"""Nothing that anyone sends makes a command crash, hang, execute code or lose a bundle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hostile import bundles, calibration, cards, checkpoints, images, mixtures, options
from hostile.case import Case, Kit
from support.warm_process import ROOT, Ended, WarmProcess

CASES = [
    case for kind in (checkpoints, cards, bundles, images, options, calibration, mixtures) for case in kind.cases()
]

SOME = [case for case in CASES if "\0" not in case.command][::70]
"""Some of every kind. A command line holds no NUL."""

MOST_SECONDS = 5
MOST_MEGABYTES = 1000
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]|\udc9b")
BESIDE = ("... ", "note: ", "warning: ")
"""How lines of stderr begin that are not the error."""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_manners(ended: Ended, case: Case) -> None:
    """The error is one plain line, the last, and it ended with the right code and within bounds."""
    assert ended.code == case.code, f"{ended.code}: {ended.err[-600:]}"
    lines = ended.err.splitlines()
    assert lines, "nothing on stderr"
    assert lines[-1].startswith("error: ")
    assert all(line.startswith(BESIDE) for line in lines[:-1]), ended.err[:600]
    assert "Traceback" not in ended.err
    assert "is a defect" not in ended.err
    assert len(lines[-1]) < 6000
    raw = RAW.search(ended.err) or RAW.search(ended.out)
    assert raw is None, f"raw {raw.group()!r}: {ended.err[:300]!r}"
    assert case.said in ended.err, ended.err[-600:]
    assert ended.seconds < MOST_SECONDS
    assert ended.megabytes < MOST_MEGABYTES


def prepared(case: Case, kit: Kit, tmp_path: Path) -> tuple[Path, Path]:
    """Return the folder with the case's inputs, and the empty one to work in."""
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    if case.make is not None:
        case.make(inputs, kit)
    return inputs, work


def check_traces(inputs: Path, work: Path, earlier: Path, before: dict[str, bytes]) -> None:
    """The run left the earlier bundle alone and nothing behind, and executed nothing."""
    assert content(earlier) == before, "the earlier bundle was changed"
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name], "litter beside the bundle"
    assert not list(work.iterdir()), "litter in the working folder"
    assert not (inputs / checkpoints.MARKER).exists()


def test_the_table_has_hundreds_of_cases_with_names_of_their_own() -> None:
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name.encode("ascii", "backslashreplace").decode())
def test_a_hostile_input_on_the_real_command_line(case: Case, kit: Kit, earlier: Path, tmp_path: Path) -> None:
    """Some of every kind in a process of their own, as users start it."""
    inputs, work = prepared(case, kit, tmp_path)
    before = content(earlier)
    command = [sys.executable, "-P", "-m", "repmlp_deploy", *case.words(inputs, kit, earlier)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, timeout=60, check=False)
    texts = (text.decode("utf-8", "surrogateescape") for text in (done.stdout, done.stderr))
    check_manners(Ended(done.returncode, *texts, seconds=0, megabytes=0), case)
    check_traces(inputs, work, earlier, before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.encode("ascii", "backslashreplace").decode())
def test_a_hostile_input(case: Case, kit: Kit, earlier: Path, warm: WarmProcess, tmp_path: Path) -> None:
    inputs, work = prepared(case, kit, tmp_path)
    before = content(earlier)
    ended = warm.run(*case.words(inputs, kit, earlier), folder=work)
    check_manners(ended, case)
    check_traces(inputs, work, earlier, before)
