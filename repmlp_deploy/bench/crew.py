"""The parent's side of the child processes: start, ask, end."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any, Self

from repmlp_deploy.children import child_environment

__all__ = ["Child", "ChildFailed"]

TIMEOUT_SECONDS = 1800


class ChildFailed(Exception):  # noqa: N818 - an outcome that becomes a row's reason, not an error of the user's
    """A child could not do what it was told; the message is the reason."""


class Child:
    """A process that runs `repmlp_deploy.bench.worker`; a context manager that ends it.

    Args:
        threads: that every library in it may use.
    """

    def __init__(self, threads: int) -> None:
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "repmlp_deploy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=child_environment(**dict.fromkeys(limits, str(threads))),
            start_new_session=True,  # Ctrl-C is for the parent, which keeps what was measured
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command and return the child's reply.

        Raises:
            ChildFailed: it reports an error, died or hangs; the child is not usable after the latter two.
        """
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise AssertionError("both are pipes")
        try:
            process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], TIMEOUT_SECONDS)
            line = process.stdout.readline() if ready else None
        except OSError:
            line = b""
        if line is None:
            raise ChildFailed(f"no answer to {command} within {TIMEOUT_SECONDS} s")
        if not line:
            raise ChildFailed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise ChildFailed(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process, whatever it is doing, and wait for its end."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):  # bytes that a dead process will not read
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        how = f"died of signal {-code}" if code < 0 else f"ended with {code}"
        return f"its process {how}{f': {said[-1]}' if said else ''}"
