"""Run pip again when an index or the network fails for a moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["run_pip"]

ATTEMPTS, PAUSE_SECONDS = 3, 5.0


def run_pip(*words: str | Path, python: str | Path = sys.executable, cwd: Path | None = None) -> None:
    """Run pip of an environment; after three failures the error is what pip said last.

    PYTHONPATH does not reach it: an environment shall have only what pip installs.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "-m", "pip", *map(str, words)]
    for attempt in range(ATTEMPTS):
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=400
        )
        if done.returncode == 0:
            return
        time.sleep(PAUSE_SECONDS * (attempt + 1))
    raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")
