"""Ray Serve: two replicas answer as one server does, whatever becomes of a replica or of a bundle meanwhile.

Every test shares one cluster. With `REPMLP_TEST_ENGINE="--host-engine ray --replicas 2"`, the tests of the local server
run against Ray Serve, too.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.serving.hosts.messages import SERVICE, message
from repmlp_deploy.serving.served_model import version_name
from support.load import Load, Outcome, load_grpc, load_http
from support.serving import Server, running_server

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CONNECTIONS, EACH, SECONDS = 4, 30, 180.0
RAW = {"Inference-Header-Content-Length": "0"}


@pytest.fixture(scope="module")
def library(_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A watched folder with one bundle, and beside it another version and a damaged one."""
    top = tmp_path_factory.mktemp("ray")
    shutil.copytree(_exported, top / "library" / "digits")
    second = Path(shutil.copytree(_exported, top / "second")) / "manifest.json"
    second.write_text(second.read_text().replace('"notes": [', '"notes": [\n"another version",', 1))
    bad = Path(shutil.copytree(_exported, top / "bad"))
    data = bytearray((bad / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bad / "model.onnx").write_bytes(data)
    (bad / "manifest.json").write_text((bad / "manifest.json").read_text() + " ")
    return top / "library"


@pytest.fixture(scope="module")
def served(library: Path) -> Iterator[Server]:
    options = ("--host-engine", "ray", "--replicas", "2", "--format", "onnx", "--body-mb", "1", "--log-format", "json")
    with running_server("--watch", library, "--watch-seconds", "0.2", *options, grpc=True) as made:
        made.wait_until_ready(SECONDS)
        yield made


@pytest.fixture(scope="module")
def load(predictor: Predictor) -> Load:
    inputs = np.random.default_rng(1).normal(size=(CONNECTIONS * EACH, 3, 32, 32)).astype(np.float32)
    return Load("digits", inputs, predictor.logits(inputs), connections=CONNECTIONS)


def _processes(server: Server, name: str = "") -> list[psutil.Process]:
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _replicas(server: Server) -> list[psutil.Process]:
    return _processes(server, "ray::ServeReplica")


class _Asking:
    """Load in a thread, until it is told to stop."""

    def __init__(self, server: Server, load: Load) -> None:
        self.outcomes: list[Outcome] = []
        self._server, self._load, self._done = server, load, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: Exception | None = None

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                self.outcomes.append(asyncio.run(load_http(self._server.http, self._load)))
        except Exception as error:  # noqa: BLE001 - raised again by the test
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    @property
    def answered(self) -> int:
        assert self._thread.is_alive(), self._error
        return sum(len(outcome.latencies) for outcome in self.outcomes)

    @property
    def failed(self) -> int:
        return sum(len(outcome.failed) for outcome in self.outcomes)

    @property
    def wrong(self) -> int:
        return sum(len(outcome.wrong) for outcome in self.outcomes)


def _wait_for(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _events(server: Server, text: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in server.text.splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == text]


def test_both_transports_give_what_the_predictor_gives(served: Server, load: Load) -> None:
    assert len(_replicas(served)) == 2
    for outcome in (asyncio.run(load_http(served.http, load)), asyncio.run(load_grpc(served.grpc, load))):
        assert (outcome.wrong, outcome.failed, len(outcome.latencies)) == ([], [], CONNECTIONS * EACH)


def test_errors_and_health_are_those_of_the_local_server(served: Server) -> None:
    assert served.get("/v2/health/live") == (200, {"live": True})
    assert served.get("/v2/models/none/infer", b"{}")[0] == 404
    assert served.get("/v2/models/digits/infer", b"x", RAW)[0] == 400
    assert served.get("/v2/models/digits/infer", bytes(2 << 20), RAW)[0] == 413
    assert served.get("/v2/repository/models/digits/unload", b"")[0] == 403
    with grpc.insecure_channel(served.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer", lambda m: m.SerializeToString())
        for name, data, code in (
            ("none", b"", "NOT_FOUND"),
            ("digits", b"1", "INVALID_ARGUMENT"),
            ("digits", bytes(2 << 20), "RESOURCE_EXHAUSTED"),
        ):
            tensor = {"name": "images", "datatype": "FP32", "shape": [1, 3, 32, 32]}
            request = message("ModelInferRequest")(model_name=name, inputs=[tensor], raw_input_contents=[data])
            with pytest.raises(grpc.RpcError) as caught:
                call(request, timeout=60)
            assert caught.value.code().name == code, caught.value.details()
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE, "digits"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        assert next(stub.Watch(health_pb2.HealthCheckRequest(service="digits"), timeout=60)).status == 1


def test_it_listens_on_loopback_only_and_asks_for_a_token(served: Server) -> None:
    listening = set()
    for process in [psutil.Process(served.process.pid), *_processes(served)]:
        listening |= {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    (raylet,) = [process for process in _processes(served) if process.name() == "raylet"]
    assert raylet.environ()["RAY_AUTH_MODE"] == "token"


def test_a_killed_replica_costs_no_wrong_answer_and_is_replaced(served: Server, load: Load) -> None:
    before = {process.pid for process in _replicas(served)}
    victim = min(before)
    with _Asking(served, load) as asking:
        _wait_for(lambda: asking.answered > 0)
        psutil.Process(victim).send_signal(signal.SIGKILL)
        _wait_for(lambda: len({process.pid for process in _replicas(served)} - {victim}) == 2)
        answered = asking.answered
        _wait_for(lambda: asking.answered > answered)
    assert asking.wrong == 0
    assert asking.failed <= 2 * CONNECTIONS  # what the killed replica was at; the rest went to the other one


def test_a_new_bundle_takes_over_under_load_and_a_damaged_one_does_not(
    served: Server, library: Path, load: Load
) -> None:
    top = library.parent

    def take_place(source: str) -> None:
        shutil.copytree(top / source, top / "next")
        (library / "digits").rename(top / "spare")
        (top / "next").rename(library / "digits")
        shutil.rmtree(top / "spare")

    second = version_name(top / "second")
    assert served.get("/v2/models/digits")[1]["versions"] != [second]
    with _Asking(served, load) as asking:
        _wait_for(lambda: asking.answered > 0)
        take_place("second")
        served.wait_for_log(f"replicas ready.*{second}", SECONDS)
        _wait_for(lambda: served.get("/v2/models/digits")[1]["versions"] == [second])
        take_place("bad")
        served.wait_for_log("bundles refused", SECONDS)
        assert served.get("/v2/models/digits")[1]["versions"] == [second]
        take_place("second")
        _wait_for(lambda: len(_events(served, "replicas ready")) == 3)
    assert (asking.wrong, asking.failed) == (0, 0)
    assert "model.onnx was changed" in _events(served, "bundles refused")[0]["reason"]


def test_sigterm_ends_everything_and_exits_0(served: Server) -> None:
    processes = _processes(served)
    assert processes
    assert served.terminate(SECONDS) == 0
    assert [process for process in processes if process.is_running() and process.status() != "zombie"] == []
