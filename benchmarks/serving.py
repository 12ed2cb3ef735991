"""Measure `repmlp-serve` under load, beside the bare `Predictor` and two other servers of the same ONNX file.

python benchmarks/serving.py BUNDLE [--format onnx] [--connections 16] [--requests 100] [--rounds 3] [--no-peers]
python benchmarks/serving.py BUNDLE --soak 100000      memory of the server while it answers so many requests
python benchmarks/serving.py BUNDLE --starts 5         from the start of the process, after a kill -9, to readiness

Every request is a sample of its own, and every answer is compared with the Predictor's. Servers, load and Predictor run
one at a time on the same cores, in rounds; the table gives medians over the rounds. The load costs CPU time too, which
the bare Predictor does not pay. MLServer and KServe's server run in an environment of their own, made on the first run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from repmlp_deploy import Bundle
from repmlp_deploy.bench.measure.machine import describe_machine
from repmlp_deploy.runtime.predictor import Predictor
from support.clients.environment import environment_python
from support.load import Load, Outcome, load_grpc, load_http
from support.serving import Server, running_server

PEERS = Path(__file__).resolve().parent / "peers" / "serving"
PEER_PACKAGES = {
    "mlserver": ("mlserver==1.7.1", "onnxruntime==1.32.0"),
    "kserve": ("kserve==0.21.0", "onnxruntime==1.32.0", "protobuf<7"),
}
HTTP_PORT, GRPC_PORT = 18080, 18081
START_SECONDS = 120


@dataclass
class Row:
    """One subject: its outcomes, and executions of the network where they are known."""

    name: str
    rates: list[float]
    p50: list[float]
    p99: list[float]
    executions: list[float]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--format", default="onnx")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--requests", type=int, default=100, help="of every connection")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--soak", type=int, metavar="REQUESTS")
    parser.add_argument("--starts", type=int, metavar="TIMES")
    given = parser.parse_args()
    bundle = Bundle.load(given.bundle)
    if given.starts:
        return _starts(bundle, given)
    if given.soak:
        return _soak(bundle, given)
    return _compare(bundle, given)


def _starts(bundle: Bundle, given: argparse.Namespace) -> None:
    """Print how long a killed server takes to be ready again."""
    seconds = []
    for _ in range(given.starts):
        start = time.perf_counter()
        with running_server(bundle.folder, "--format", given.format, grpc=True) as server:
            server.wait_until_ready()
            seconds.append(time.perf_counter() - start)
            server.process.kill()
    print(f"{bundle.manifest.name}, {given.format}: ready after {', '.join(f'{s:.2f}' for s in seconds)} s")


def _soak(bundle: Bundle, given: argparse.Namespace) -> None:
    """Print the server's memory after every tenth of the requests, half of them over gRPC."""
    load = _load(bundle, given)
    count = len(load.inputs)
    with running_server(bundle.folder, "--format", given.format, grpc=True) as server:
        server.wait_until_ready()
        process, sent, shown = psutil.Process(server.process.pid), 0, 0
        while sent < given.soak:
            for outcome in (asyncio.run(load_http(server.http, load)), asyncio.run(load_grpc(server.grpc, load))):
                if outcome.wrong or outcome.failed:
                    raise SystemExit(f"{len(outcome.wrong)} wrong answers, {len(outcome.failed)} requests failed")
                sent += count
            if sent >= shown * given.soak / 10:
                print(f"{sent:>8} requests: {process.memory_info().rss / 1e6:.1f} MB", flush=True)
                shown += 1


def _compare(bundle: Bundle, given: argparse.Namespace) -> None:
    """Print the table of all subjects."""
    load = _load(bundle, given)
    subjects = _subjects(bundle, given, load)
    rows = {name: Row(name, [], [], [], []) for name in subjects}
    for turn in range(given.rounds):
        for name, measure in subjects.items():
            sys.stderr.write(f"round {turn + 1} of {given.rounds}: {name}\n")
            measure(rows[name])
    _print(bundle, given, list(rows.values()))


def _load(bundle: Bundle, given: argparse.Namespace) -> Load:
    """Return distinct samples with the Predictor's own answers."""
    spec, count = bundle.manifest.inputs[0], given.connections * given.requests
    inputs = np.random.default_rng(0).standard_normal((count, *spec.shape[1:]), np.float32)
    with Predictor(bundle, format=given.format) as predictor:
        expected = predictor.logits(inputs)
    # batches of other sizes round otherwise; a swapped answer differs by far more
    distance = np.abs(np.diff(expected, axis=0)).max(axis=1).min()
    return Load(bundle.manifest.name, inputs, expected, spec.name, given.connections, float(distance) / 4)


def _subjects(bundle: Bundle, given: argparse.Namespace, load: Load) -> dict[str, Callable[[Row], None]]:
    subjects: dict[str, Callable[[Row], None]] = {
        "Predictor, batched": lambda row: _bare(row, bundle, given, load, bundle.manifest.batch.max),
        "Predictor, one at a time": lambda row: _bare(row, bundle, given, load, 1),
        "repmlp-serve, HTTP": lambda row: _ours(row, bundle, given, load, grpc=False),
        "repmlp-serve, gRPC": lambda row: _ours(row, bundle, given, load, grpc=True),
    }
    if not given.no_peers:
        subjects["MLServer, gRPC"] = lambda row: _peer(row, _mlserver(bundle), load)
        subjects["KServe, gRPC"] = lambda row: _peer(row, _kserve(bundle), load)
    return subjects


def _bare(row: Row, bundle: Bundle, given: argparse.Namespace, load: Load, batch: int) -> None:
    with Predictor(bundle, format=given.format) as predictor:
        predictor.warm_up()
        start, latencies = time.perf_counter(), []
        for i in range(0, len(load.inputs), batch):
            begun = time.perf_counter()
            predictor.logits(load.inputs[i : i + batch])
            latencies.append(time.perf_counter() - begun)
        _record(row, Outcome(time.perf_counter() - start, latencies), rate=len(load.inputs))
        row.executions.append(len(latencies))


def _ours(row: Row, bundle: Bundle, given: argparse.Namespace, load: Load, *, grpc: bool) -> None:
    with running_server(bundle.folder, "--format", given.format, "--queue", "4096", grpc=True) as server:
        server.wait_until_ready()
        before = _executions(server)
        _record(row, asyncio.run(load_grpc(server.grpc, load) if grpc else load_http(server.http, load)))
        row.executions.append(_executions(server) - before)


def _executions(server: Server) -> float:
    with urllib.request.urlopen(f"{server.http}/metrics") as answer:
        text = answer.read().decode()
    return float(re.search(r"^repmlp_batch_samples_count\{.*\} (\S+)$", text, re.MULTILINE).group(1))


def _peer(row: Row, command: list[str | Path], load: Load) -> None:
    with _running(command):
        _record(row, asyncio.run(load_grpc(f"127.0.0.1:{GRPC_PORT}", load)))


@contextmanager
def _running(command: list[str | Path]) -> Iterator[None]:
    """Start a peer, wait until it is ready, and end it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{HTTP_PORT}/v2/health/ready", timeout=2):
                    break
            except OSError:
                if time.monotonic() > end or process.poll() is not None:
                    raise SystemExit(f"{command[0]} did not start") from None
                time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def _mlserver(bundle: Bundle) -> list[str | Path]:
    folder = Path(tempfile.mkdtemp(prefix="mlserver-"))
    (folder / "onnx_for_mlserver.py").write_text((PEERS / "onnx_for_mlserver.py").read_text())
    settings = {"http_port": HTTP_PORT, "grpc_port": GRPC_PORT, "metrics_port": HTTP_PORT + 2, "parallel_workers": 0}
    model = {"name": bundle.manifest.name, "implementation": "onnx_for_mlserver.OnnxModel", "max_batch_time": 0.005}
    model |= {"max_batch_size": bundle.manifest.batch.max, "parameters": {"uri": str(_onnx(bundle))}}
    (folder / "settings.json").write_text(json.dumps(settings | {"host": "127.0.0.1"}))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [environment_python("mlserver", PEER_PACKAGES["mlserver"]).parent / "mlserver", "start", folder]


def _kserve(bundle: Bundle) -> list[str | Path]:
    python = environment_python("kserve", PEER_PACKAGES["kserve"])
    script = PEERS / "onnx_with_kserve.py"
    return [python, script, bundle.manifest.name, _onnx(bundle), str(HTTP_PORT), str(GRPC_PORT)]


def _onnx(bundle: Bundle) -> Path:
    return (bundle.folder / bundle.artifact("onnx").path).resolve()


def _record(row: Row, outcome: Outcome, rate: int | None = None) -> None:
    if outcome.wrong or outcome.failed:
        raise SystemExit(f"{row.name}: {len(outcome.wrong)} wrong answers, {len(outcome.failed)} requests failed")
    row.rates.append(outcome.rate if rate is None else rate / outcome.seconds)
    row.p50.append(outcome.percentile(50))
    row.p99.append(outcome.percentile(99))


def _print(bundle: Bundle, given: argparse.Namespace, rows: list[Row]) -> None:
    base = statistics.median(rows[0].rates)
    machine = describe_machine()
    amx = "with AMX" if "amx_int8" in machine["cpu_flags"] else "without AMX"
    print(f"{bundle.manifest.name}, {given.format}; {machine['cpu']} {amx}, {machine['cores_usable']} cores")
    print(f"{given.connections} connections, {given.requests} requests each, {given.rounds} rounds\n")
    print("| | samples a second | of the Predictor | p50, ms | p99, ms | executions |\n|---|--:|--:|--:|--:|--:|")
    for row in rows:
        rate, p50, p99 = (statistics.median(values) for values in (row.rates, row.p50, row.p99))
        runs = f"{statistics.median(row.executions):.0f}" if row.executions else ""
        print(f"| {row.name} | {rate:.1f} | {rate / base:.0%} | {p50:.1f} | {p99:.1f} | {runs} |")


if __name__ == "__main__":
    main()
