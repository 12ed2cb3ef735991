"""Check what must not become slow again: `make budgets`.

A budget is a ratio to work that is timed beside it, turn by turn, so that it holds on slow and on busy machines alike.
Tests assert no times: they assert what causes them, such as modules that are imported and copies that are made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repmlp_deploy import Predictor, export, load_card, merge_branches
from repmlp_deploy.card import data_root
from repmlp_deploy.nets.families import build_network

DIGITS = data_root() / "weights" / "repmlp-digits.safetensors"

Work = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """What some work may cost.

    Attributes:
        name: what is done.
        work: does it once.
        beside: what it is compared with, done in turns with it.
        beside_name: what that is.
        limit: the largest ratio of the two, about three times what an idle machine needs.
        turns: of both; the fastest of each counts.
    """

    name: str
    work: Work
    beside: Work
    beside_name: str
    limit: float
    turns: int = 5


def measure(budget: Budget, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the ratio of the fastest turns."""
    works = (budget.work, budget.beside)
    seconds = [[_time(work, clock) for work in works] for _ in range(budget.turns)]
    return min(turn[0] for turn in seconds) / min(turn[1] for turn in seconds)


def _time(work: Work, clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def python(statement: str) -> Work:
    """Return work that runs a statement in a fresh interpreter."""
    command = [sys.executable, "-c", statement]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def merging() -> Budget:
    """Return the budget of merging B224: strided assignment, where convolving an identity takes seconds."""
    network = build_network(load_card("repmlpnet-b224"))
    weights = list(network.parameters())
    return Budget(
        "merge B224",
        lambda: merge_branches(network),
        lambda: [weight.detach().double().float() for weight in weights],
        "round its weights to float64 and back",
        limit=4.0,
    )


def exporting(folder: Path) -> Budget:
    """Return the budget of a whole export, beside the exporter of PyTorch that it calls."""
    network = merge_branches(build_network(load_card("repmlp-digits"))).eval()
    shape = (2, 3, *load_card("repmlp-digits").input_size)
    return Budget(
        "export the digits network to ONNX",
        lambda: export(DIGITS, out=folder / "digits", batch="1:4:16"),
        lambda: torch.onnx.export(network, (torch.zeros(shape),), dynamo=True, verbose=False),
        "torch.onnx.export of it",
        limit=6.0,
        turns=3,
    )


def pausing(folder: Path) -> tuple[Budget, Predictor]:
    """Return the budget of calls with pauses: threads that spin between calls cost a processor all the time."""
    predictor = Predictor(folder / "digits", format="onnx", threads=2)
    batch = np.zeros((1, *predictor.manifest.input.shape[1:]), np.float32)

    def call(pause: float) -> None:
        for _ in range(50):
            time.sleep(pause)
            predictor.logits(batch)

    what = Budget("processor time of calls with pauses", lambda: call(0.02), lambda: call(0), "without", limit=8.0)
    return what, predictor


def main() -> int:
    """Measure every budget and return how many are exceeded, at most 1."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    exceeded = 0
    with tempfile.TemporaryDirectory(prefix="repmlp-budgets-") as folder:
        imports = Budget("import repmlp_deploy", python("import repmlp_deploy"), python("pass"), "start Python", 4.0)
        shown = Budget(
            "repmlp-export --help",
            python(
                "import sys; sys.argv = ['repmlp-export', '-h']; "
                "from repmlp_deploy.cli.shared.entry import run; run('export')"
            ),
            python("import numpy, pydantic, typer, rich.table"),
            "import what it is made of",
            limit=3.0,
        )
        for budget in (imports, shown, merging(), exporting(Path(folder))):
            exceeded += report(budget, measure(budget))
        budget, predictor = pausing(Path(folder))
        with predictor:
            exceeded += report(budget, measure(budget, time.process_time))
    return min(1, exceeded)


def report(budget: Budget, ratio: float) -> bool:
    """Print a line and return whether the budget is exceeded."""
    exceeded = ratio > budget.limit
    verdict = "EXCEEDED" if exceeded else "ok"
    sys.stdout.write(f"{verdict:8}  {budget.name}: {ratio:.2f} times {budget.beside_name}; at most {budget.limit:g}\n")
    sys.stdout.flush()
    return exceeded


if __name__ == "__main__":
    raise SystemExit(main())
