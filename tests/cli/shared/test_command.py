"""What all commands have in common: groups of options, examples, the version, and silence on demand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import pytest

from repmlp_deploy import __version__
from repmlp_deploy.cli.shared import entry
from repmlp_deploy.cli.shared.command import EXAMPLES, GROUPS, OTHERS, as_command, group_of
from repmlp_deploy.cli.shared.completion import command_of
from repmlp_deploy.cli.shared.console import run_command, typer
from repmlp_deploy.cli.shared.entry import COMMANDS, STAGES
from repmlp_deploy.cli.shared.progress import progress
from repmlp_deploy.errors import InputError


def help_of(name: str, columns: int = 80) -> list[str]:
    environment = os.environ | {"COLUMNS": str(columns)}
    script = f"from repmlp_deploy.cli.shared.entry import run; run({name!r})"
    command = [sys.executable, "-c", script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_stands_in_a_group(name: str) -> None:
    command = command_of(name)
    context = command.make_context("x", [], resilient_parsing=True)
    grouped = dict(command.grouped(context))
    assert OTHERS not in grouped, "add the option to GROUPS in cli/shared/command.py"
    options = [one for one in command.get_params(context) if one.param_type_name == "option"]
    assert sum(map(len, grouped.values())) == len(options)


def test_no_option_stands_in_two_groups() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    assert group_of("keep-fp32") == "Precision"
    assert group_of("unheard-of") == OTHERS


def test_a_help_has_its_groups_in_order_and_ends_with_examples() -> None:
    lines = help_of("export")
    titles = [line.rstrip(":") for line in lines if line and not line.startswith((" ", "Usage")) and line.endswith(":")]
    assert titles == [
        "Input", "Images and classes", "Artifacts", "Precision", "TensorRT", "Output", "Report", "Examples",
    ]  # fmt: skip
    assert [line.strip() for line in lines[-len(EXAMPLES["export"]) :]] == list(EXAMPLES["export"])


def test_a_help_fits_80_columns_and_uses_more_where_there_are_more() -> None:
    assert max(map(len, help_of("export"))) <= 80
    wide = help_of("export", 110)
    assert 80 < max(map(len, wide)) <= 110
    assert len(wide) < len(help_of("export"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_with_options_that_it_has(name: str) -> None:
    known = {
        word for one in command_of(name).get_params(command_of(name).make_context("x", [], resilient_parsing=True))
        for word in (*one.opts, *one.secondary_opts)
    }  # fmt: skip
    for example in EXAMPLES[name]:
        program, *words = example.split()
        assert program == f"repmlp-{name}"
        assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("given", ["", "onnx,", ",onnx", "onnx, ,trt"])
@pytest.mark.parametrize("name", ["export", "predict", "verify", "eval", "map", "serve", "pack", "build"])
def test_an_empty_word_of_a_list_is_refused_by_name(name: str, given: str) -> None:
    command = command_of(name)
    with command.make_context("x", ["--format", given], resilient_parsing=True) as context:
        context.resilient_parsing = False
        said = "has an empty word: leave out its comma" if given else "names nothing"
        with pytest.raises(InputError, match=re.escape(f"--format is {given!r}, which {said}")):
            command.invoke(context)


def test_every_command_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    def nothing(needed: Annotated[str, typer.Option(help="Is needed.")]) -> None:
        raise AssertionError(needed)

    with pytest.raises(SystemExit) as ended:
        run_command(nothing, ["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"repmlp-deploy {__version__}\n")


def test_the_options_of_every_command_do_not_reach_the_function() -> None:
    seen = {}

    def take(size: Annotated[int, typer.Option(help="Of it.")] = 3) -> None:
        seen["size"] = size

    as_command(take).main(["--size", "5", "--quiet"], standalone_mode=False)
    assert seen == {"size": 5}


@pytest.mark.parametrize(("words", "said"), [(["-q"], ""), ([], "... merge\n"), (["--quiet"], "")])
def test_a_quiet_command_prints_no_progress(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress() as show:
            show("merge")

    with pytest.raises(SystemExit):
        run_command(work, words)
    assert capsys.readouterr().err == said


def test_a_usage_line_has_the_name_that_was_called() -> None:
    command = [sys.executable, "-m", "repmlp_deploy", "doctor", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]).stdout
    assert text.startswith("Usage: python -m repmlp_deploy doctor [OPTIONS] [bundle]\n")


def test_every_command_is_a_program_that_starts_it() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    programs = {f"repmlp-{name}": f"{entry.__name__}:{name}" for name in COMMANDS}
    assert project["scripts"] == {"repmlp": f"{entry.__name__}:main"} | programs
    assert [getattr(entry, name).args for name in COMMANDS] == [(name,) for name in COMMANDS]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        entry.nothing()


def test_the_map_names_every_command_once_and_fits_80_columns() -> None:
    command = [sys.executable, "-m", "repmlp_deploy", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]).stdout
    assert max(map(len, text.splitlines())) <= 80
    for name, about in COMMANDS.items():
        assert sum(line.split()[:1] == [name] and about in line for line in text.splitlines()) == 1
        assert sum(name in names for names in STAGES.values()) == 1
