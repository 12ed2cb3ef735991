"""Help texts and the documentation name the limits and the options that the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from repmlp_deploy.bench.settings import Settings
from repmlp_deploy.cli.bench import bench_command
from repmlp_deploy.cli.export import export_command
from repmlp_deploy.convert.options import CALIBRATION_METHODS, DEFAULT_OPSET, ENOUGH_SAMPLES, GRAPHS, OPSETS, SCORES

ROOT = Path(__file__).resolve().parents[2]


def helps(command: Any) -> dict[str, str]:
    """The help text of every option, by the parameter's name."""
    found = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        found[name] = next((info.help or "" for info in get_args(parameter.annotation)[1:]), "")
    return found


def option_names(command: Any) -> list[str]:
    names = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        info = get_args(parameter.annotation)[1]
        said = (info.default, *(info.param_decls or ()))  # in an annotation, the first word stands for the default
        given = [word.split("/")[0] for word in said if isinstance(word, str) and word.startswith("--")]
        names += given or [f"--{name.replace('_', '-')}"]
    return names


EXPORT_PAGE = ROOT / "docs" / "reference" / "export.md"


def test_every_option_of_an_export_is_explained() -> None:
    documents = "".join(path.read_text(encoding="utf-8") for path in (EXPORT_PAGE, ROOT / "docs" / "tensorrt.md"))
    missing = [name for name in option_names(export_command) if not re.search(rf"{name}\b", documents)]
    assert missing == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("calibration", (str(ENOUGH_SAMPLES),)),
        ("calibration_method", CALIBRATION_METHODS),
        ("graph", GRAPHS),
        ("opset", (str(OPSETS[0]), str(OPSETS[-1]))),
        ("scores", SCORES),
    ],
)
def test_the_help_of_an_export_names_what_the_code_accepts(option: str, words: tuple[str, ...]) -> None:
    text = helps(export_command)[option]
    assert all(word in text for word in words), text


def test_the_page_on_exports_names_the_limits_of_the_code() -> None:
    page = EXPORT_PAGE.read_text(encoding="utf-8")
    assert f"{ENOUGH_SAMPLES} or more" in page
    assert f"{OPSETS[0]} to {OPSETS[-1]}" in page
    assert f"default {DEFAULT_OPSET}" in page


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("models", "models"),
        ("precision", "precision"),
        ("batch", "batch"),
        ("seconds", "seconds"),
        ("limit", "limit_seconds"),
        ("baseline", "baseline"),
    ],
)
def test_the_help_of_the_benchmark_names_its_defaults(option: str, setting: str) -> None:
    default = Settings.model_fields[setting].default
    words = (
        ",".join(map(str, default))
        if isinstance(default, tuple)
        else f"{default:g}"
        if setting != "baseline"
        else default
    )
    assert f"default {words}" in helps(bench_command)[option]
