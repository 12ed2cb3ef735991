"""The server as a process: when it is ready, how it stops, and what it refuses to start with."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import urlsplit

import numpy as np
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from repmlp_deploy import export
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.serving import process
from repmlp_deploy.serving.logs import configure_logging
from support.pip import run_pip
from support.serving import Server, running_server

ROOT = Path(__file__).resolve().parents[2]
RAW = {"Inference-Header-Content-Length": "0"}


def _batch(samples: int = 1) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(samples, 3, 32, 32)).astype(np.float32)


def test_a_server_starts_answers_and_stops(bundle_folder: Path, predictor: Predictor) -> None:
    with running_server(bundle_folder, "--format", "onnx", "--log-format", "json", "--log-requests") as server:
        server.wait_until_ready()
        batch = _batch(3)
        status, answer = server.get("/v2/models/repmlp-digits/infer", batch.tobytes(), RAW)
        assert status == 200
        assert (np.array(answer["outputs"][0]["data"], np.float32).reshape(3, 10) == predictor.logits(batch)).all()
        assert server.terminate() == 0
        lines = [json.loads(line) for line in server.text.splitlines()]
        said = [line["message"] for line in lines]
        assert said[0] == "listening"
        assert said[-3:] == ["stopping", "model unloaded", "stopped"]
        request = next(line for line in lines if line["message"] == "request" and line["status"] == 200)
        assert {"time", "level", "id", "method", "path", "seconds"} <= set(request)


def test_requests_with_a_target_are_all_answered_rightly(bundle_folder: Path, predictor: Predictor) -> None:
    batch = _batch(256)
    with running_server(bundle_folder, "--format", "onnx", "--target-ms", "200") as server:
        server.wait_until_ready()

        def ask(row: np.ndarray) -> np.ndarray:
            status, answer = server.get("/v2/models/repmlp-digits/infer", row.tobytes(), RAW)
            assert status == 200
            return np.array(answer["outputs"][0]["data"], np.float32)

        with ThreadPoolExecutor(32) as pool:
            answers = np.stack(list(pool.map(ask, batch)))
        (stats,) = server.get("/v2/models/repmlp-digits/stats")[1]["model_stats"]
        assert server.terminate() == 0
    np.testing.assert_allclose(answers, predictor.logits(batch), rtol=0, atol=1e-4)
    assert stats["inference_count"] == len(batch)


def test_what_is_under_way_is_answered_after_sigterm(bundle_folder: Path) -> None:
    """A body that arrives slowly is a request under way: it is answered, and only then the process ends."""
    with running_server(bundle_folder, "--format", "onnx") as server:
        server.wait_until_ready()
        host, port = server.http.removeprefix("http://").split(":")
        body = _batch().tobytes()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST /v2/models/repmlp-digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Inference-Header-Content-Length: 0\r\n\r\n".encode())
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log("stopping")
            connection.sendall(body)
            answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert server.process.wait(30) == 0


def test_a_request_in_the_network_is_answered_after_sigterm(bundle_folder: Path) -> None:
    with running_server(bundle_folder, "--format", "onnx") as server:
        server.wait_until_ready()
        statuses: list[int] = []
        many = _batch(2000).tobytes()  # takes the network a while

        def ask() -> None:
            statuses.append(server.get("/v2/models/repmlp-digits/infer", many, RAW)[0])

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.15)
        assert server.terminate() == 0
        thread.join(30)
        assert statuses == [200]


def test_a_request_that_takes_longer_than_the_drain_is_told_so(bundle_folder: Path) -> None:
    with running_server(bundle_folder, "--format", "onnx", "--drain", "1") as server:
        server.wait_until_ready()
        host, port = server.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v2/models/repmlp-digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.2)
            assert server.terminate() == 0
            answer = connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 503"), answer
    assert answer.endswith(b'{"error":"the server stops"}'), answer
    assert "Traceback" not in server.text


def test_a_second_signal_ends_the_process_at_once(bundle_folder: Path) -> None:
    with running_server(bundle_folder, "--format", "onnx") as server:
        server.wait_until_ready()
        host, port = server.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v2/models/repmlp-digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log("stopping")
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 143


def test_a_damaged_bundle_is_never_ready_and_the_server_says_why(bundle_folder: Path) -> None:
    data = bytearray((bundle_folder / "model.onnx").read_bytes())
    data[1000] ^= 1
    (bundle_folder / "model.onnx").write_bytes(data)
    with running_server(bundle_folder, "--format", "onnx") as server:
        server.wait_for_log("bundle refused")
        assert server.get("/v2/health/live")[0] == 200
        status, said = server.get("/v2/health/ready")
        assert status == 503
        assert "model.onnx was changed" in said["models"]["repmlp-digits"]
        with urllib.request.urlopen(server.http, timeout=10) as page:
            assert "model.onnx was changed" in page.read().decode()


def test_a_killed_server_is_ready_again_soon(bundle_folder: Path) -> None:
    for _ in range(2):
        start = time.monotonic()
        with running_server(bundle_folder, "--format", "onnx") as server:
            server.wait_until_ready()
            took = time.monotonic() - start
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(10)
    assert took < 30, took  # 1 to 2 s on a quiet machine: benchmarks/serving.py measures it


def test_tls_is_served(bundle_folder: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(chain)
    issued.private_key_pem.write_to_path(key)
    options = ("--format", "onnx", "--tls-certificate", chain, "--tls-key", key)
    with running_server(bundle_folder, *options) as server:
        assert server.http.startswith("https://")
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with urllib.request.urlopen(f"{server.http}/v2/health/live", timeout=10, context=context) as answer:
            assert answer.status == 200


def test_nothing_is_written_and_no_home_is_needed(bundle_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    before = {path: path.stat().st_mtime_ns for path in bundle_folder.rglob("*")}
    with running_server(bundle_folder, "--format", "onnx", env={"HOME": str(home), "REPMLP_CACHE": ""}) as server:
        server.wait_until_ready()
        assert server.terminate() == 0
    assert list(home.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in bundle_folder.rglob("*")} == before


def test_an_encrypted_key_is_refused_instead_of_asked_about(bundle_folder: Path, tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    plain = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    key.write_bytes(
        plain.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret"))
    )
    code, said = _run(bundle_folder, "--port", "0", "--tls-certificate", chain, "--tls-key", key)
    assert code == 2
    assert "the key is encrypted; write it without a pass phrase" in said
    assert "pass phrase:" not in said


def _run(*arguments: str | Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "repmlp_deploy", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to serve"),
        (("none",), "none is no bundle"),
        (("{b}", "{b}"), "two bundles are named repmlp-digits"),
        (("a/b={b}",), "model name 'a/b'"),
        (("{b}", "--port", "70000"), "--port is 70000; expected 0 to 65535"),
        (("{b}", "--port", "{taken}"), "cannot listen on 127.0.0.1:{taken}: Address already in use"),
        (("{b}", "--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid:8000"),
        (("{b}", "--workers", "0"), "--workers is 0"),
        (("{b}", "--timeout", "nan"), "--timeout is nan"),
        (("{b}", "--log-format", "xml"), "expected text or json"),
        (("{b}", "--tls-key", "k"), "belong together"),
        (("{b}", "--tls-certificate", "c", "--tls-key", "k", "--port", "0"), "TLS: cannot use c and k"),
        (("--watch", "none"), "--watch none is no folder"),
        (("{b}", "--config", "none.toml"), "--config none.toml: no such file"),
        (("{b}", "--config", "{b}"), "it is not a regular file"),
        (("{b}", "--config", "{bad}"), "no option 'colour'; known: body-mb, bundles, cache, connections,"),
        (("{b}", "--config", "{bad}"), ", grpc-port, host, host-engine,"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_2(
    bundle: object, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('colour = "red"\n')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"b": str(bundle.folder), "taken": str(taken.getsockname()[1]), "bad": str(bad)}
        code, said = _run(*(argument.format(**places) for argument in arguments))
    assert (code, said.count("\n")) == (2, 1), said
    assert message.format(**places) in said


def test_options_come_from_a_file_and_the_line_wins(bundle_folder: Path, tmp_path: Path) -> None:
    shutil.move(bundle_folder, tmp_path / "b")
    config = tmp_path / "serve.toml"
    config.write_text(f'bundles = "mine={tmp_path / "b"}"\nformat = "onnx"\nbody_mb = 1\nlog-format = "text"\n')
    with running_server("--config", config, "--log-format", "json") as server:
        server.wait_until_ready()
        assert json.loads(server.text.splitlines()[0])["message"] == "listening"
        assert _slowly(server, (1 << 20) + 1).startswith(b"HTTP/1.1 413")


def _slowly(server: Server, size: int) -> bytes:
    """Return the answer to a body that is sent in pieces, by a client that reads only afterwards."""
    with socket.create_connection(("127.0.0.1", urlsplit(server.http).port or 0), timeout=10) as connection:
        head = f"POST /v2/models/mine/infer HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        for start in range(0, size, 1 << 18):
            time.sleep(0.05)
            connection.sendall(bytes(min(1 << 18, size - start)))
        return connection.recv(1 << 16)


@pytest.mark.slow
def test_the_serve_extra_and_a_runtime_are_enough(tmp_path: Path, digits_checkpoint: Path) -> None:
    """In an environment that has nothing else, torch least of all."""
    export(digits_checkpoint, formats="onnx,openvino", batch="1:4:16", out=tmp_path / "digits")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run_pip("install", "--quiet", "-c", ROOT / "constraints.txt", f"{ROOT}[serve,openvino]", python=python)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    have = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False, env=environment)
    assert have.returncode != 0
    with running_server(tmp_path / "digits", grpc=True, python=python) as server:
        server.wait_until_ready()
        assert "openvino on cpu" in server.text
        assert server.get("/v2/models/repmlp-digits/infer", _batch().tobytes(), RAW)[0] == 200
        assert server.terminate() == 0


STUCK = """
import sys, threading, time
from repmlp_deploy.serving.models import Models
from repmlp_deploy.serving.process import ServerOptions, serve
from repmlp_deploy.serving.served_model import ModelOptions
from repmlp_deploy.serving.watch import Library

class Loading(Library):
    def look(self):
        print("loading", flush=True)
        time.sleep(120)

models = Models(ModelOptions())
serve(models, Loading(models), ServerOptions(http_port=0, grpc_port=None, drain=0.5))
"""


def test_a_load_does_not_keep_the_server_from_ending() -> None:
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "loading\n"
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        _, text = server.communicate(timeout=60)
    assert server.returncode == 128 + signal.SIGTERM
    assert 2 < time.monotonic() - start < 30
    assert "Traceback" not in text


@pytest.mark.parametrize("error", [None, socket.gaierror(socket.EAI_NONAME, "Name or service not known")])
def test_a_host_that_is_none_is_one_line(error: OSError | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label of more than 63 letters cannot be asked for; of another name a server says that it is none."""
    if error is not None:
        monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=error))
    with pytest.raises(InputError, match=r"cannot listen on a+\.com:0: (Name or|.*label)"):
        process._listen("a" * 70 + ".com", 0)


def test_logs_are_json_whatever_the_margin(capsys: pytest.CaptureFixture[str]) -> None:
    """A network of whole numbers may have no error at all."""
    root, ours = logging.getLogger(), logging.getLogger("repmlp")
    before = (list(root.handlers), root.level, ours.level)
    try:
        configure_logging(as_json=True)
        logging.getLogger("repmlp.serve").info("model ready", extra={"margin": math.inf, "seconds": 0.5})
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        ours.setLevel(before[2])
    line = json.loads(capsys.readouterr().err, parse_constant=pytest.fail)
    assert (line["margin"], line["seconds"]) == (None, 0.5)
