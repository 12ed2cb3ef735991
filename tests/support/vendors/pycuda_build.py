"""Build PyCUDA without a CUDA toolkit: headers from published wheels, and an empty stand-in of the driver's library.

It takes one and a half minutes of processor time once; the result is kept in the cache folder. The extension is linked
against a `libcuda.so.1` that has every function which PyCUDA asks the driver for, and in which none of them works.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from repmlp_deploy.files import locked
from support.vendors.packages import cache_root, unpacked
from support.vendors.stand_ins import build_library, c_compiler

VERSION = "2026.1"
HEADERS = ("nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-profiler-api-cu12==12.9.79")
TOOLS = ("numpy", "setuptools", "wheel", "pytools", "platformdirs", "mako")


@dataclass(frozen=True)
class PyCuda:
    """A built PyCUDA.

    Attributes:
        folder: holds the package `pycuda`.
        libraries: holds the stand-in of the driver's library.
        python: an interpreter that has what PyCUDA imports.
    """

    folder: Path
    libraries: Path
    python: Path


@cache
def built_pycuda() -> PyCuda:
    """Return PyCUDA, built if it is not in the cache; skip the calling test if it cannot be built here."""
    compiler = c_compiler()
    root = cache_root() / f"pycuda-{VERSION}-{sys.implementation.cache_tag}"
    root.parent.mkdir(parents=True, exist_ok=True)
    made = PyCuda(root / "package", root / "lib", root / "venv" / "bin" / "python")
    with locked(root):
        if not made.folder.is_dir():
            _build(root, made, compiler)
    return made


def _build(root: Path, made: PyCuda, compiler: str) -> None:
    run(sys.executable, "-m", "venv", str(root / "venv"))
    run(str(made.python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *TOOLS)
    with tempfile.TemporaryDirectory(dir=root) as work:
        folder = Path(work)
        command = ["-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
        run(str(made.python), *command, "--no-binary", "pycuda", "-d", work, f"pycuda=={VERSION}")
        with tarfile.open(next(folder.glob("pycuda*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = next(path for path in folder.iterdir() if (path / "configure.py").is_file())
        made.libraries.mkdir(exist_ok=True)
        build_library(compiler, made.libraries, "libcuda.so.1", sorted(set(driver_functions(source))))
        (made.libraries / "libcuda.so").unlink(missing_ok=True)
        (made.libraries / "libcuda.so").symlink_to("libcuda.so.1")
        includes = [str(next(unpacked(*HEADERS).rglob(name)).parent) for name in ("cuda.h", "cudaProfiler.h")]
        configure = ["configure.py", "--no-cuda-enable-curand", f"--cuda-inc-dir={','.join(includes)}"]
        run(str(made.python), *configure, f"--cudadrv-lib-dir={made.libraries}", cwd=source)
        run(str(made.python), "setup.py", "-q", "build", "-j2", "--build-lib", str(folder / "built"), cwd=source)
        (folder / "built").rename(made.folder)


def driver_functions(source: Path) -> Iterator[str]:
    """Yield the driver's functions that PyCUDA's sources name, under every name that the headers give them."""
    for file in (source / "src").rglob("*.?pp"):
        for name in re.findall(r"\bcu[A-Z]\w+", file.read_text("utf-8", "replace")):
            yield from (f"{name}{suffix}" for suffix in ("", "_v2", "_v3", "_v4"))


def run(*command: str, cwd: Path | None = None) -> None:
    """Run a command; skip the calling test with what it said last if it fails."""
    environment = {**os.environ, "CFLAGS": "-O0 -w"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=540)
    if done.returncode:
        said = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"PyCUDA cannot be built here: {Path(command[0]).name} {' '.join(command[1:4])}: {said}")
