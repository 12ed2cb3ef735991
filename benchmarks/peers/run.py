"""Every peer in turn, each in a process of its own, several rounds; one table with ratios against this project.

Rounds hit every peer with the same drift. A ratio is given with the smallest and the largest of its rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PEERS = ("ours.py", "naive_onnx.py", "torch_compile.py", "mmpretrain_inference.py")


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
    rounds: dict[str, list[float]] = {}
    for i in range(options.rounds):
        for script in PEERS:
            sys.stderr.write(f"... round {i + 1} of {options.rounds}: {script}\n")
            found = ask(options.python if script.startswith("mmpretrain") else sys.executable, script, options)
            if "missing" in found:
                sys.stderr.write(f"{found['peer']}: not run: {found['missing']}\n")
            else:
                rounds.setdefault(found["peer"], []).append(found["p50_ms"])
    if not rounds:
        raise SystemExit("no peer could run")
    ours = next(iter(rounds.values()))
    for peer, times in rounds.items():
        ratios = [theirs / mine for theirs, mine in zip(times, ours, strict=False)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        middle = statistics.median(times)
        sys.stdout.write(f"{peer:30} p50 {middle:9.2f} ms, {statistics.median(ratios):6.2f} times ours ({spread})\n")


if __name__ == "__main__":
    main()
