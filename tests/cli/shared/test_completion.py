"""Completion scripts know every command and every option."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from repmlp_deploy.cli.shared import entry
from repmlp_deploy.cli.shared.completion import SHELLS, completion_script

BASH = shutil.which("bash")


def completed(*words: str) -> list[str]:
    """What bash offers for the last word."""
    given = " ".join(f'"{word}"' for word in words)
    script = f"COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _repmlp; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    command = [str(BASH), "-c", f"{completion_script('bash')}\n{script}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(BASH is None, reason="no bash to complete in")
def test_bash_completes_commands_and_their_options() -> None:
    assert completed("repmlp", "ex") == ["export"]
    assert {*entry.COMMANDS} < {*completed("repmlp", "")}
    assert completed("repmlp", "export", "--keep") == ["--keep-fp32"]
    assert completed("/usr/bin/repmlp-verify", "bundle", "--bi") == ["--bisect"]
    assert completed("repmlp-export", "model") == [], "files are the shell's to complete"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_every_command_and_an_option(shell: str) -> None:
    script = completion_script(shell)
    assert all(name in script for name in entry.COMMANDS)
    assert "keep-fp32" in script


def test_the_script_is_printed_and_another_shell_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["repmlp", "--completion", "fish"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == completion_script("fish")
    monkeypatch.setattr("sys.argv", ["repmlp", "--completion", "tcsh"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --completion takes the name of a shell: bash, zsh, fish\n"


@pytest.mark.parametrize("asked", [["--version"], ["--help"], ["--completion", "bash"], ["inspect", "--help"]])
def test_a_full_disk_is_one_line_and_a_reader_that_left_is_none(asked: list[str]) -> None:
    command = [sys.executable, "-m", "repmlp_deploy", *asked]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    assert (done.returncode, done.stderr) == (5, "error: output: No space left on device\n")
    end, left = os.pipe()
    os.close(end)
    done = subprocess.run(command, stdout=left, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    os.close(left)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_output_is_one_that_nobody_reads() -> None:
    for asked in ("--version", "inspect nothing.pth"):
        script = f"{sys.executable} -m repmlp_deploy {asked} >&-"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == (0 if asked == "--version" else 2)
        assert done.stderr.count("\n") == (0 if asked == "--version" else 1)


def test_a_command_whose_packages_are_missing_is_completed_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "repmlp_deploy.cli.verify", None)
    script = completion_script("bash")
    assert "verify) words='' ;;" in script
    assert "--bisect" not in script
