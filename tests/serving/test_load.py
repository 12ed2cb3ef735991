"""Under load nothing is lost and nothing wrong, whatever happens to the bundles meanwhile."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from repmlp_deploy.runtime.predictor import Predictor
from support.load import Load, load_grpc, load_http
from support.serving import Server, running_server

CONNECTIONS, EACH = 16, 100


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(CONNECTIONS * EACH, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(inputs: np.ndarray, predictor: Predictor) -> np.ndarray:
    return predictor.logits(inputs)


def _metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(server.http + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return float(re.search(rf"^{re.escape(name)}(?:\{{.*?\}})? (\S+)$", text, re.MULTILINE).group(1))


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_many_connections_get_their_own_answers(
    transport: str, server: Server, inputs: np.ndarray, expected: np.ndarray
) -> None:
    before = _metric(server, "repmlp_batch_samples_count")
    load = load_http(server.http, Load("digits", inputs, expected)) if transport == "http" else None
    outcome = asyncio.run(load or load_grpc(server.grpc, Load("digits", inputs, expected)))
    assert (outcome.wrong, outcome.failed) == ([], [])
    assert len(outcome.latencies) == CONNECTIONS * EACH
    assert _metric(server, "repmlp_batch_samples_count") - before < CONNECTIONS * EACH  # batches formed


def test_twenty_swaps_under_load_lose_nothing(
    bundle_folder: Path, tmp_path: Path, inputs: np.ndarray, expected: np.ndarray
) -> None:
    """Two good versions and a damaged one take turns in the watched folder, by renames, as an export does."""
    library, spare = tmp_path / "library", tmp_path / "spare"
    library.mkdir()
    second = Path(shutil.copytree(bundle_folder, tmp_path / "second"))
    manifest = second / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"notes": [', '"notes": [\n"another version",', 1))
    bad = Path(shutil.copytree(bundle_folder, tmp_path / "bad"))
    data = bytearray((bad / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bad / "model.onnx").write_bytes(data)
    (bad / "manifest.json").write_text((bad / "manifest.json").read_text() + " ")
    shutil.copytree(bundle_folder, library / "digits")
    done = threading.Event()

    def swap() -> None:
        for turn in range(20):
            shutil.rmtree(spare, ignore_errors=True)
            source = bad if turn % 5 == 4 else (second, bundle_folder)[turn % 2]
            shutil.copytree(source, tmp_path / "next")
            (library / "digits").rename(spare)
            (tmp_path / "next").rename(library / "digits")
            time.sleep(0.25)
        done.set()

    with running_server("--watch", library, "--watch-seconds", "0.05", "--format", "onnx") as server:
        server.wait_until_ready()
        thread = threading.Thread(target=swap)
        thread.start()
        outcomes = []
        while not done.is_set():
            outcomes.append(asyncio.run(load_http(server.http, Load("digits", inputs, expected))))
        thread.join(60)
        assert [(o.wrong, o.failed) for o in outcomes] == [([], [])] * len(outcomes)
        assert _metric(server, 'repmlp_loads_total{model="digits",outcome="ok"}') >= 8
        assert _metric(server, 'repmlp_loads_total{model="digits",outcome="refused"}') >= 3
