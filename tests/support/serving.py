"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Server", "running_server"]

START_SECONDS = 60.0

ENGINE = os.environ.get("REPMLP_TEST_ENGINE", "").split()
"""Options for every server that a test starts: `--host-engine ray --replicas 2` runs the tests against Ray Serve."""


class Server:
    """A running `repmlp-serve`.

    Attributes:
        http: address of HTTP, as `http://127.0.0.1:1234`.
        grpc: address of gRPC, as `127.0.0.1:1234`; empty without.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.log = process, [""]
        self.http = self.grpc = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)

    @property
    def text(self) -> str:
        """Everything that the server logged so far."""
        return "".join(self.log)

    def wait_for_log(self, pattern: str, seconds: float = START_SECONDS) -> re.Match[str]:
        """Wait until the log has what the pattern says."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = re.search(pattern, self.text)
            if found:
                return found
            if self.process.poll() is not None:
                self._reader.join(5)
                found = re.search(pattern, self.text)
                if found:
                    return found
                break
            time.sleep(0.02)
        raise AssertionError(f"the server never logged {pattern!r}:\n{self.text}")

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until every model answers."""
        if "ray" in self.process.args:  # until then, Ray's proxies have an answer of their own
            self.wait_for_log("replicas ready", seconds)
        end = time.monotonic() + seconds
        while self.get("/v2/health/ready")[0] != 200:
            assert time.monotonic() < end, self.text
            time.sleep(0.02)

    def get(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Return the status and the JSON of a GET, or of a POST with a body."""
        request = urllib.request.Request(self.http + path, body, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def terminate(self, seconds: float = 30) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def running_server(
    *arguments: str | Path, grpc: bool = False, env: dict[str, str] | None = None, python: str | Path = sys.executable
) -> Iterator[Server]:
    """Start a server on free ports, and end it however the test ends.

    Args:
        arguments: of `repmlp-serve`.
        grpc: whether gRPC is served too.
        env: variables of the environment to set.
        python: of another environment, which then has its own copy of the package.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or python == sys.executable}
    ports: Sequence[str] = ("--port", "0", "--grpc-port", "0" if grpc else "-1")
    process = subprocess.Popen(
        [str(python), "-m", "repmlp_deploy", "serve", *map(str, arguments), *ports, *ENGINE],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=inherited | (env or {}),
    )
    server = Server(process)
    try:
        seconds = START_SECONDS * (4 if "ray" in process.args else 1)  # Ray starts seven processes
        server.http = server.wait_for_log(r"https?://127\.0\.0\.1:\d+", seconds).group()
        if grpc:
            server.grpc = server.wait_for_log(r"grpc\W+(127\.0\.0\.1:\d+)").group(1)
        yield server
    finally:
        process.kill()
        process.wait(10)
        server._reader.join(5)
        process.stderr.close()
