"""NVIDIA's load generator runs against the server, and reads the statistics that it asks for.

Its wheel needs glibc 2.38: docs/serving.md says how it runs on an older system. What it reads is also tested in
`hosts/test_http.py`, without it.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from support.serving import Server

ANALYZER = shutil.which("perf_analyzer")


@pytest.mark.slow
@pytest.mark.skipif(ANALYZER is None, reason="perf_analyzer is not on the PATH: pip install perf-analyzer==2.60.0")
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_measures_and_reads_the_statistics(protocol: str, server: Server) -> None:
    url = server.http.removeprefix("http://") if protocol == "http" else server.grpc
    command = [ANALYZER, "-m", "digits", "-i", protocol, "-u", url, "--request-count", "200"]
    done = subprocess.run(
        [*command, "--concurrency-range", "4"], capture_output=True, text=True, timeout=120, check=True
    )
    said = re.search(r"Successful request count: (\d+)", done.stdout)
    assert said is not None, done.stdout + done.stderr
    assert int(said.group(1)) >= 200
