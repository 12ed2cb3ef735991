"""A public fuzzer reads what the server says of its endpoints, and finds no answer that is not as described."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from repmlp_deploy.serving.hosts.http import HttpOptions, _Host
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.watch import Library
from support.serving import Server, running_server

CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance"


def test_every_endpoint_is_described(client: TestClient, inference: Inference) -> None:
    described = client.get("/openapi.json").json()["paths"]
    routes = _Host(inference, Library(inference.models), HttpOptions()).routes()
    pages = {"/", "/page.js", "/page.css", "/openapi.json"}
    assert {route.path: route.methods - {"HEAD"} for route in routes if route.path not in pages} == {
        path: {verb.upper() for verb in verbs} for path, verbs in described.items()
    }


@pytest.fixture(scope="module")
def server(_exported: Path) -> Iterator[Server]:
    with running_server(f"repmlp-digits={_exported}", "--format", "onnx", "--control") as made:
        made.wait_until_ready()
        yield made


@pytest.mark.slow
def test_a_fuzzer_finds_no_fault(server: Server, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.http}/openapi.json", "--checks", CHECKS),
        *("--max-examples", "10", "--seed", "1", "--no-color", "--exclude-path-regex", "load$"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]
    assert server.process.poll() is None
    assert "defect" not in server.text
