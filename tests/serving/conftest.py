"""Fixtures: a served digits network, and an HTTP client that talks to its application."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from repmlp_deploy import Bundle
from repmlp_deploy.card import data_root
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.serving.hosts.http import HttpOptions, create_app
from repmlp_deploy.serving.inference import Inference
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.served_model import ModelOptions
from repmlp_deploy.serving.watch import Library
from support.serving import Server, running_server


@pytest.fixture(scope="module")
def predictor(_exported: Path) -> Iterator[Predictor]:
    with Predictor(_exported, format="onnx") as made:
        yield made


@pytest.fixture(scope="module")
def digit_files() -> list[Path]:
    return sorted((data_root() / "samples" / "digits").glob("*.png"))


@pytest.fixture(scope="module")
def server(_exported: Path) -> Iterator[Server]:
    """A process that serves the digits network over HTTP and gRPC."""
    with running_server(f"digits={_exported}", "--format", "onnx", grpc=True) as made:
        made.wait_until_ready()
        yield made


@pytest.fixture
def models(bundle: Bundle) -> Iterator[Models]:
    """The digits network, loaded and ready."""
    made = Models(ModelOptions("onnx"))
    made.add("digits", bundle.folder)
    Library(made).look()
    yield made
    made.close()


@pytest.fixture
def inference(models: Models) -> Iterator[Inference]:
    made = Inference(models)
    yield made
    made.close()


@pytest.fixture
def client(inference: Inference) -> TestClient:
    app = create_app(inference, Library(inference.models), HttpOptions(body_limit=1 << 20, control=True))
    return TestClient(app, raise_server_exceptions=False)
