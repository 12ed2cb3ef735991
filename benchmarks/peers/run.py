"""Every peer in turn, each in a process of its own, several rounds; one table with ratios against this project.

Rounds hit every peer with the same drift. A ratio is given with the smallest and the largest of its rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
OURS = "ours.py"
PEERS = (OURS, "naive_onnx.py", "torch_compile.py", "mmpretrain_inference.py")


def ask(python: str, script: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the peer's JSON line, or why there is none."""
    model = options.mmpretrain_model if script.startswith("mmpretrain") else options.model
    command = [python, str(FOLDER / script), "--model", model]
    for name in ("batch", "seconds", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        said = done.stderr.strip().splitlines() or ["no message"]
        return {"peer": script, "missing": f"failed with {done.returncode}: {said[-1]}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def summary(theirs: Mapping[int, float], ours: Mapping[int, float]) -> str:
    """Return the median of a peer's milliseconds, and its ratio to ours over the rounds that both have."""
    middle = f"p50 {statistics.median(theirs.values()):9.2f} ms"
    ratios = [theirs[i] / ours[i] for i in theirs if i in ours]
    if not ratios:
        return f"{middle}, no ratio: this project ran in none of its rounds"
    return f"{middle}, {statistics.median(ratios):6.2f} times ours ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="repmlpnet-b224")
    parser.add_argument("--mmpretrain-model", default="repmlp-base_3rdparty_8xb64_in1k")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="interpreter for the mmpretrain peer")
    options = parser.parse_args()
    times: dict[str, dict[int, float]] = {}
    names: dict[str, str] = {}
    for i in range(options.rounds):
        for script in PEERS:
            sys.stderr.write(f"... round {i + 1} of {options.rounds}: {script}\n")
            found = ask(options.python if script.startswith("mmpretrain") else sys.executable, script, options)
            if "missing" in found:
                sys.stderr.write(f"{found['peer']}: not run: {found['missing']}\n")
            else:
                names[script] = found["peer"]
                times.setdefault(script, {})[i] = found["p50_ms"]
    if not times:
        raise SystemExit("no peer could run")
    for script in (one for one in PEERS if one in times):
        sys.stdout.write(f"{names[script]:30} {summary(times[script], times.get(OURS, {}))}\n")


if __name__ == "__main__":
    main()
