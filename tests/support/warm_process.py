"""A process that has imported every command and traced a network once, and forks for each run: hundreds take a minute.

The fork has limits on processor seconds and memory of its own. The answer is what it wrote, how it ended, and its cost.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))  # where it runs as a script

from support.exporter import keep_functions  # noqa: E402

MODULES = (
    *(f"repmlp_deploy.cli.{name}" for name in ("export", "predict", "verify", "inspect", "eval", "build", "bench")),
    "repmlp_deploy.convert.pipeline",
    "repmlp_deploy.convert.rework.add_engine",
    "repmlp_deploy.convert.rework.derive",
    "repmlp_deploy.convert.rework.locate",
    "repmlp_deploy.convert.rework.refit",
    "repmlp_deploy.convert.graphs",
    "repmlp_deploy.convert.formats.onnx",
    "repmlp_deploy.convert.formats.openvino",
    "repmlp_deploy.convert.graph.calibrate",
    "repmlp_deploy.runtime.onnx.runner",
    "repmlp_deploy.runtime.openvino.runner",
    "torch.onnx._internal.exporter._core",
)
"""What the commands import late, so that no run pays for it."""

CPU_SECONDS = 60
WALL_SECONDS = 180
EXTRA_BYTES = 6 << 30  # of address space, which libraries reserve freely


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: the exit code, or minus the number of the signal that ended it.
        out: standard output.
        err: standard error.
        seconds: of processor time, its children's included.
        megabytes: of memory beyond what the warm process has.
    """

    code: int
    out: str
    err: str
    seconds: float
    megabytes: float


class WarmProcess:
    """The parent's side.

    Args:
        home: the home folder that libraries see.
        environment: variables beside the present ones.
    """

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "REPMLP_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **kept,
                "HOME": str(home),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "REPMLP_CACHE": str(Path(self._folder.name, "cache")),
                **(environment or {}),
            },
        )

    def run(  # noqa: PLR0913 - what a process has around it
        self,
        *arguments: object,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
        out: Path | None = None,
        script: str | None = None,
        kill_after: float | None = None,
    ) -> Ended:
        """Run `repmlp ARGUMENTS` in `folder`.

        Args:
            arguments: the words of the command line.
            folder: the working folder.
            environment: variables of this run alone.
            file_bytes: what a file may hold: more fails as on a full disk.
            out: where standard output goes instead of into the result.
            script: Python that runs instead of a command.
            kill_after: seconds after which the run, and every process that it started, gets SIGKILL.
        """
        files = [Path(self._folder.name, name) for name in ("out", "err")]
        wanted = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "environment": dict(environment or {}),
            "files": [str(out or files[0]), str(files[1])],
            "file_bytes": file_bytes,
            "script": script,
            "kill_after": kill_after,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the warm process died"
        texts = [file.read_bytes().decode("utf-8", "surrogateescape") for file in files]
        code, seconds, megabytes = json.loads(answer)
        return Ended(code, *texts, seconds, megabytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()


def serve() -> None:
    """Answer requests, one line of JSON each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in MODULES:
        import_module(name)
    _trace_once()
    base = _bytes_of("VmRSS")
    for line in sys.stdin:
        code, used = _in_a_fork(json.loads(line))
        seconds = used.ru_utime + used.ru_stime
        answers.write(json.dumps([code, seconds, (used.ru_maxrss * 1024 - base) / 1e6]) + "\n")
        answers.flush()


def _trace_once() -> None:
    """Export a small network: PyTorch loads most of its exporter at the first call, a second or two of every run."""
    import torch

    from repmlp_deploy.bundle import BatchRange
    from repmlp_deploy.convert.graph.export import export_graph, trace_network
    from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet, RepMLPNetSpec

    keep_functions()
    spec = RepMLPNetSpec(input_size=(16, 16), channels=(8,), depths=(1,), sharesets=(2,), classes=2)
    traced = trace_network(RepMLPNet(spec).eval(), [torch.zeros(1, 3, 16, 16)], BatchRange(min=1, opt=2, max=4))
    export_graph(traced, input_names=["images"], output_names=["logits"])


def _in_a_fork(wanted: dict[str, Any]) -> tuple[int, resource.struct_rusage]:
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _run(wanted)
        finally:
            os._exit(code)
    until = time.monotonic() + (wanted["kill_after"] or WALL_SECONDS)
    while time.monotonic() < until:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used
        select.select([], [], [], 0.002)
    os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used


def _run(wanted: dict[str, Any]) -> int:
    """Run one command in this process, which is a fork, and return its exit code."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    most = _bytes_of("VmSize") + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if wanted["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["file_bytes"],) * 2)
    os.chdir(wanted["folder"])
    os.environ.update(wanted["environment"])
    sys.path[:0] = wanted["environment"].get("PYTHONPATH", "").split(os.pathsep)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, file in enumerate(wanted["files"], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding=encoding, buffering=1) for number in (1, 2))
    sys.argv = ["repmlp", *wanted["arguments"]]
    from repmlp_deploy.cli.shared import entry

    code = 0
    try:
        if wanted["script"] is None:
            entry.main()
        else:
            exec(compile(wanted["script"], "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - as Python itself shows what nobody caught
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _bytes_of(what: str) -> int:
    """Return a figure of `/proc/self/status`, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{what}:")).split()[1])


if __name__ == "__main__":
    serve()
