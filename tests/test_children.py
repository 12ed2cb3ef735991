"""Child processes find the copy of the package that started them."""

import os
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

import repmlp_deploy
from repmlp_deploy import children
from repmlp_deploy.children import child_environment
from repmlp_deploy.evaluation import process_engine

PACKAGE = Path(repmlp_deploy.__file__).parent


def test_a_checkout_that_is_not_installed_is_what_its_children_import(tmp_path: Path) -> None:
    """A copy whose worker says where it is from, run from its own folder as `python -m repmlp_deploy` would."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    worker = tmp_path / PACKAGE.name / "bench" / "worker.py"
    worker.write_text("import json; input(); print(json.dumps({'value': __file__}), flush=True)")
    script = "from repmlp_deploy.bench.crew import Child\nwith Child(1) as child: print(child.ask('where'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == str(worker), done.stderr


def test_processes_of_a_job_get_the_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(_command: list[str], **how: dict[str, str]) -> SimpleNamespace:
        started.append(how["env"])
        raise InterruptedError

    monkeypatch.setattr(process_engine.subprocess, "Popen", start)
    with pytest.raises(InterruptedError):
        process_engine._Worker(SimpleNamespace(how={"threads": 3}), deque(), SimpleQueue())
    (environment,) = started
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(PACKAGE.parent)
    assert environment["OMP_NUM_THREADS"] == "3"


def test_what_is_installed_is_found_without_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "given")
    assert child_environment()["PYTHONPATH"] == f"{PACKAGE.parent}{os.pathsep}given"
    monkeypatch.setattr(children, "__file__", "/lib/site-packages/repmlp_deploy/children.py")
    assert child_environment(A="1") == {**os.environ, "A": "1"}
