"""Measure the batcher alone: the highest Poisson rate that keeps a limit, with a network that only sleeps.

python benchmarks/batching.py [--batch-ms 6] [--sample-ms 7.8] [--largest 8] [--limit-ms 100] [--seconds 12]

A batch of n takes batch-ms + n · sample-ms, whatever else keeps the machine busy. The defaults are those of a network
that takes 14 ms for one sample and 68 ms for eight. Ways take turns, rate by rate; MLCommons' load generator decides
when samples arrive.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bench.load.generator import complete, generate_load
from repmlp_deploy.bench.load.system import Service, System
from repmlp_deploy.bench.load.ways import WAYS, Plan, RateSearch

SAMPLES = 64


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-ms", type=float, default=6.0)
    parser.add_argument("--sample-ms", type=float, default=7.8)
    parser.add_argument("--largest", type=int, default=8)
    parser.add_argument("--limit-ms", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=12.0)
    given = parser.parse_args()
    ways = {name: way for name, way in WAYS.items() if not way.streams}
    best = {way: given.largest if WAYS[way].gathers else 1 for way in ways}
    highest = {way: 1000 * size / (given.batch_ms + size * given.sample_ms) for way, size in best.items()}
    searches = {way: RateSearch(rate) for way, rate in highest.items()}
    while not all(search.ended for search in searches.values()):
        for way, search in searches.items():
            service = Service(
                run=_sleeper(given.batch_ms / 1000, given.sample_ms / 1000),
                prepare=lambda _: np.zeros((1, 1), np.float32),
                finish=lambda _: None,
                largest=best[way],
                workers=1,
                decoders=0,
                target=given.limit_ms / 1000 if WAYS[way].targets else None,
            )
            search.tell(kept=_late_ms(service, search.rate, given) <= given.limit_ms)
    print(f"| | samples/s with 99 % within {given.limit_ms:g} ms | ratio |\n|---|--:|--:|")
    one = searches["single"].low
    for way, search in searches.items():
        ratio = f"{search.low / one:.2f}×" if one else "–"
        print(f"| {WAYS[way].title} | {search.low:.1f} | {ratio} |")


def _late_ms(service: Service, rate: float, given: argparse.Namespace) -> float:
    """Return the 99th percentile of latency at a rate."""
    system = System(service, complete)
    try:
        plan = Plan("server", given.seconds, SAMPLES, rate, given.limit_ms)
        return generate_load(system.issue, plan).p99_ms
    finally:
        system.close()


def _sleeper(batch: float, sample: float) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    def run(values: NDArray[Any]) -> NDArray[np.float32]:
        time.sleep(batch + sample * len(values))
        return values

    return run


if __name__ == "__main__":
    main()
