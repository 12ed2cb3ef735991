"""The report on a terminal: a few lines, colours only where they are shown, and tables that fit 80 columns."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.cli.shared.bundle_report import print_details, print_summary


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal of 80 columns that has colours shows."""
    shown = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", shown)
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", "80")
        print_details(bundle)
        print_summary(bundle)
    return shown.getvalue()


def test_the_summary_is_a_few_lines_with_the_next_command(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(bundle)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 + len(bundle.manifest.artifacts)
    assert lines[0].startswith("repmlp-digits: equal to the trained network, in ")
    assert lines[1].startswith("closest to its limit: ")
    assert "the same class for 100 % of the probe" in lines[2]
    assert lines[-1] == f"next: repmlp-predict {bundle.folder} IMAGE"


def test_the_next_command_can_be_pasted(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(Bundle(bundle.manifest, Path("my artifacts/$x")))
    assert capsys.readouterr().out.splitlines()[-1] == "next: repmlp-predict 'my artifacts/$x' IMAGE"


def test_the_summary_says_what_was_merged_by_structure(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    said = "regions: 22 merged; products 45 -> 23"
    noted = Bundle(bundle.manifest.model_copy(update={"notes": ("other", said)}), bundle.folder)
    print_summary(noted)
    lines = capsys.readouterr().out.splitlines()
    assert said in lines
    assert "other" not in lines


def test_a_bundle_that_failed_is_not_called_equal(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    hops = tuple(hop.model_copy(update={"passed": False}) for hop in bundle.manifest.certificate)
    failed = Bundle(bundle.manifest.model_copy(update={"certificate": hops}), bundle.folder)
    print_summary(failed)
    assert "NOT equal to the trained network" in capsys.readouterr().out


def test_a_bundle_of_a_merged_checkpoint_is_compared_with_the_merged_network(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    provenance = {**bundle.manifest.provenance, "checkpoint": {"merged": True}}
    print_summary(Bundle(bundle.manifest.model_copy(update={"provenance": provenance}), bundle.folder))
    assert "equal to the merged network" in capsys.readouterr().out


def test_verdicts_have_colours_on_a_terminal_and_tables_fit_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = on_terminal(bundle, monkeypatch)
    assert "\x1b[32mequal" in text
    assert "\x1b[32mrepmlp-digits: equal" in text
    assert "max error" in text
    assert "1 - cos" not in text, "a column of wide terminals"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(len(line) for line in plain.splitlines() if line.startswith("│")) <= 80


def test_no_colour_where_it_is_not_wanted(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in on_terminal(bundle, monkeypatch)


def test_a_pipe_gets_every_column_and_no_colour(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    print_details(bundle)
    text = capsys.readouterr().out
    assert "1 - cos" in text
    assert "\x1b" not in text
