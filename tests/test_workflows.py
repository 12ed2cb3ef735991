"""The workflows of the repository are well formed, and run what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="the extra dev is not installed")

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def faults(workflow: dict[Any, Any]) -> list[str]:
    """Return what a server would refuse, or what would fail at the first run."""
    found = [f"no {key}" for key in ("name", "permissions", "jobs") if key not in workflow]
    if not {"push", "pull_request"} & set(workflow.get(True) or {}):  # YAML reads the key `on` as true
        found.append("starts by nothing")
    for name, job in (workflow.get("jobs") or {}).items():
        if not str(job.get("runs-on", "")).startswith("ubuntu-"):
            found.append(f"{name} runs on {job.get('runs-on')}")
        known = {f"matrix.{key}" for key in job.get("strategy", {}).get("matrix", {})}
        used = set(re.findall(r"\$\{\{\s*([\w.]+)\s*\}\}", str(job)))
        found += [f"{name} uses {one}, which it does not set" for one in sorted(used - known)]
        for step in job.get("steps") or [{}]:
            if ("run" in step) == ("uses" in step):
                found.append(f"{name}: a step either runs or uses: {step}")
            elif "uses" in step and not re.fullmatch(r"[\w-]+/[\w./-]+@v\d+", step["uses"]):
                found.append(f"{name} uses {step['uses']} without a version")
            else:
                found += [f"{name}: {line}" for line in step.get("run", "").splitlines() if not _runs(line)]
    return found


def _runs(line: str) -> bool:
    """Whether a line calls targets of the Makefile, with variables that it has."""
    program, *words = line.split()
    targets = [word for word in words if "=" not in word]
    return program == "make" and set(targets) <= TARGETS and {*words} - {*targets} <= {"PYTHON=python"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_exists(path: Path) -> None:
    assert faults(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


def test_the_checks_run_on_every_python_that_the_project_names() -> None:
    (checks,) = [path for path in WORKFLOWS if path.stem == "checks"]
    matrix = yaml.safe_load(checks.read_text(encoding="utf-8"))["jobs"]["test"]["strategy"]["matrix"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert matrix["python"] == named


def test_a_broken_workflow_is_noticed() -> None:
    text = WORKFLOWS[0].read_text(encoding="utf-8")
    for right, wrong, message in (
        ("make check test", "make cheque test", "cheque"),
        ("matrix.python", "matrix.pithon", "which it does not set"),
        ("checkout@v4", "checkout", "without a version"),
        ("permissions:\n", "", "no permissions"),
        ("      - run: make docs dist", "      - ran: make docs dist", "either runs or uses"),
    ):
        assert right in text
        broken = yaml.safe_load(text.replace(right, wrong))
        assert any(message in fault for fault in faults(broken)), message


def test_the_templates_of_issues_have_what_a_server_reads() -> None:
    for path in (FOLDER / "ISSUE_TEMPLATE").glob("*.md"):
        _, head, body = path.read_text(encoding="utf-8").split("---", 2)
        assert {"name", "about"} <= set(yaml.safe_load(head)), path.name
        assert body.strip()
    assert isinstance(yaml.safe_load((FOLDER / "ISSUE_TEMPLATE" / "config.yml").read_text(encoding="utf-8")), dict)
