"""Measure a bundle from the start of a process to its first answer, and where the time goes.

python benchmarks/startup.py BUNDLE[:FORMAT] … [--rounds 7] [--image FILE] [--cache FOLDER] [--against CHECKOUT]

Every measurement is a fresh process, with its files in the system's cache. Bundles take turns, so that what else keeps
the machine busy meets all of them. `whole` is a program of three lines, as a user has it. The other rows are another
process that does one thing after the other: nothing overlaps there, so their sum may be more than the whole.
CPU seconds are of all threads of the process. `--against` measures another checkout of this project, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from repmlp_deploy.bench.measure.machine import describe_machine
from repmlp_deploy.runtime.cpus import usable_cpus

ROOT = Path(__file__).resolve().parents[1]

WHOLE = """
from repmlp_deploy import Predictor
predictor = Predictor(folder, format=artifact, cache=cache)
predictor(image)
"""

APART = """
import importlib
from repmlp_deploy import Bundle, Predictor
step("start Python, import")
from repmlp_deploy.runtime.runner import RUNNERS
importlib.import_module(RUNNERS[artifact].opens.partition(":")[0])
step("import the runtime")
bundle = Bundle.load(folder)
step("manifest")
entry = bundle.artifact(artifact)
taken = getattr(bundle, "view", bundle.read)  # an earlier version has no view
contents = {file.path: taken(file) for file in (entry, *entry.companions)}
step("read and check the files")
class Known(Bundle):
    def read(self, file):
        return contents.pop(file.path) if file.path in contents else super().read(file)
    def view(self, file):
        if file.path in self.ahead:
            return self.ahead[file.path].result()
        return contents.pop(file.path) if file.path in contents else super().view(file)
predictor = Predictor(Known(bundle.manifest, bundle.folder), format=artifact, cache=cache)
step("load, compile")
predictor(image)
step("first answer")
"""

FRAME = """
import sys, time
began, folder, artifact, cache, image = float(sys.argv[1]), *(word or None for word in sys.argv[2:])
steps, last = [], [began, 0.0]
def step(name):
    now = [time.monotonic(), time.process_time()]
    steps.append([name, now[0] - last[0], now[1] - last[1]])
    last[:] = now
{program}
if not steps:
    step("whole")
import json
print(json.dumps(steps), flush=True)
import os
os._exit(0)
"""


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[:FORMAT]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--image", type=Path, help="default: a gray JPEG file of 500x375 pixels")
    parser.add_argument("--cache", default="", help="folder; the first process fills it and does not count")
    parser.add_argument("--against", type=Path, help="another checkout, whose figures stand beside ours")
    given = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['cpu']}, {usable_cpus()} cores, flags {', '.join(machine['cpu_flags'])}")
    print(f"Python {platform.python_version()}, load average when it began {os.getloadavg()[0]:.1f}\n")
    roots = {"here": ROOT} | ({"there": given.against.resolve()} if given.against else {})
    with tempfile.TemporaryDirectory() as folder:
        image = given.image or _gray(Path(folder))
        seen: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
        for i in range(given.rounds + 1):  # the first round fills the caches
            for bundle in given.bundles:
                for where, root in roots.items():
                    for program in (WHOLE, APART):
                        steps = _measured(program, root, bundle, given.cache, image)
                        if i:
                            _add(seen.setdefault((bundle, where), {}), steps)
    for (bundle, where), rows in seen.items():
        _print(bundle, where if given.against else "", rows)


def _gray(folder: Path) -> Path:
    path = folder / "gray.jpg"
    Image.new("RGB", (500, 375), (128, 128, 128)).save(path)
    return path


def _measured(program: str, root: Path, bundle: str, cache: str, image: Path) -> list[tuple[str, float, float]]:
    """Run a program in a fresh process; return the wall and CPU seconds of its steps."""
    folder, _, artifact = bundle.partition(":")
    artifact = artifact or _only_format(folder)
    environment = os.environ | {"PYTHONPATH": str(root)}
    code = FRAME.replace("{program}", program)
    command = [sys.executable, "-c", code, str(time.monotonic()), folder, artifact, cache, str(image)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return [(name, wall, cpu) for name, wall, cpu in json.loads(done.stdout.splitlines()[-1])]


def _only_format(folder: str) -> str:
    made: dict[str, Any] = json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))["artifacts"]
    if len(made) > 1:
        sys.exit(f"{folder} has {', '.join(made)}: name one, {folder}:{next(iter(made))}")
    return next(iter(made))


def _add(rows: dict[str, list[tuple[float, float]]], steps: list[tuple[str, float, float]]) -> None:
    for name, wall, cpu in steps:
        rows.setdefault(name, []).append((wall, cpu))


def _print(bundle: str, where: str, rows: dict[str, list[tuple[float, float]]]) -> None:
    print(f"{Path(bundle).name}{', ' if where else ''}{where}\n")
    print("| | wall s | range | CPU s | range |\n|---|--:|--:|--:|--:|")
    for name, seen in rows.items():
        cells = (f"{statistics.median(s):.2f} | {min(s):.2f} to {max(s):.2f}" for s in zip(*seen, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")
    print(flush=True)


if __name__ == "__main__":
    main()
