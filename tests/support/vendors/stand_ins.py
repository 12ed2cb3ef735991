"""Empty shared objects with the names and the functions of TensorRT's libraries: the bindings load, nothing works."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from support.vendors.packages import cache_root

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")

FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""All that the bindings of 10.13 to 11.4 need to be loaded."""


@cache
def library_folder(major: int) -> Path:
    """Return a folder with the three libraries of a major version; skip the calling test without a C compiler."""
    compiler = c_compiler()
    folder = cache_root() / f"stand-ins-{major}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            for name in LIBRARIES:
                build_library(compiler, Path(work), f"{name}.so.{major}", FUNCTIONS)
            made = Path(work, "made")
            made.mkdir()
            for library in Path(work).glob("*.so.*"):
                library.rename(made / library.name)
            try:
                os.rename(made, folder)  # noqa: PTH104 - fails if another process was faster, as it should
            except OSError:
                assert folder.is_dir()
    return folder


def c_compiler() -> str:
    """Return the C compiler; skip the calling test without one."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler is here to build stand-ins of NVIDIA's libraries with")
    return compiler


def build_library(compiler: str, folder: Path, soname: str, functions: Iterable[str]) -> None:
    """Write a shared object of functions that do nothing."""
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions), "utf-8")
    command = [compiler, "-shared", "-fPIC", str(source), "-o", str(folder / soname), f"-Wl,-soname,{soname}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
