"""What the peers share: arguments, the same network and inputs for all, and one JSON line as the answer."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MISSING = 4


def arguments(description: str) -> argparse.Namespace:
    """`--model`, `--batch`, `--seconds` and `--threads`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="repmlpnet-b224", help="a card of models/")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def images(batch: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return inputs, the same for every peer."""
    return np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)


def answer(peer: str, options: argparse.Namespace, call: Callable[[], object], setup_s: float) -> None:
    """Time `call` for the given seconds after three calls of warm-up, five calls at least; print one JSON line."""
    for _ in range(3):
        call()
    latencies: list[float] = []
    ends = time.perf_counter() + options.seconds
    while len(latencies) < 5 or time.perf_counter() < ends:  # noqa: PLR2004 - named in the docstring
        started = time.perf_counter()
        call()
        latencies.append(1e3 * (time.perf_counter() - started))
    line = {
        "peer": peer,
        "model": options.model,
        "batch": options.batch,
        "threads": options.threads,
        "calls": len(latencies),
        "p50_ms": statistics.median(latencies),
        "min_ms": min(latencies),
        "max_ms": max(latencies),
        "setup_s": setup_s,
    }
    sys.stdout.write(json.dumps(line) + "\n")


def missing(peer: str, package: str) -> None:
    """Say that a package is not installed, and end with 4."""
    sys.stdout.write(json.dumps({"peer": peer, "missing": package}) + "\n")
    raise SystemExit(MISSING)
