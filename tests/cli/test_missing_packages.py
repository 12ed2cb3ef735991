"""A missing package is exit 4 and the exact remedy, in every command and in the library."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import repmlp_deploy
from repmlp_deploy import Bundle
from repmlp_deploy.errors import EXTRAS, MissingDependency, missing_dependency, optional_imports
from support.commands import SAMPLES

pytestmark = pytest.mark.slow  # many exports, seconds each

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(repmlp_deploy.__file__).parent
ALWAYS_THERE = {"numpy", "PIL", "pydantic", "pydantic_core", "repmlp_deploy"}
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "cuda": "cuda-python",
    "google": "grpcio-health-checking",  # it brings protobuf
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    "tensorrt_rtx": "tensorrt-rtx-cu12",
    "markupsafe": "jinja2",  # jinja2 brings it
    "mlperf_loadgen": "mlcommons-loadgen",
    "ml_dtypes": "onnx",  # onnx brings it
    "torchvision": "timm",  # timm brings it
}


def run_without(package: str, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in an interpreter that cannot import the package."""
    start = f"from repmlp_deploy.cli.shared.entry import run; run({module!r})"
    script = f"import sys; sys.modules[{package!r}] = None; {start}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def places(bundle: Bundle, digits_checkpoint: Path, tmp_path: Path) -> dict[str, Path]:
    """Return what the commands of the table name."""
    data = tmp_path / "data" / "0"
    data.mkdir(parents=True)
    (data / SAMPLES[0].name).write_bytes(SAMPLES[0].read_bytes())
    (tmp_path / "data" / "1").mkdir()
    (tmp_path / "data" / "1" / SAMPLES[1].name).write_bytes(SAMPLES[1].read_bytes())
    return {
        "ckpt": digits_checkpoint,
        "out": tmp_path / "out",
        "bundle": bundle.folder,
        "image": SAMPLES[0],
        "data": data.parent,
    }


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        *((package, "export", "export --ckpt {ckpt} --out {out}") for package in ("torch", "onnx", "onnxscript")),
        ("safetensors", "export", "export --ckpt {ckpt} --out {out}"),
        ("onnxsim", "export", "export --ckpt {ckpt} --out {out}"),
        ("onnxruntime", "cpu", "export --ckpt {ckpt} --out {out}"),
        ("openvino", "openvino", "export --ckpt {ckpt} --out {out} --format openvino"),
        ("tensorrt_rtx", "rtx", "export --ckpt {ckpt} --out {out} --format trt-rtx"),
        ("torch", "export", "inspect {ckpt}"),
        ("safetensors", "export", "inspect {ckpt}"),
        ("tensorrt_rtx", "rtx", "build {bundle} --out {out}"),
        ("torch", "export", "build {bundle} --out {out} --refit-from {ckpt}"),
        ("onnx", "export", "build {bundle} --out {out} --refit-from {ckpt}"),
        ("torch", "export", "bench --models repmlp-digits --seconds 0.1 --formats onnx"),
        ("psutil", "bench", "bench --models repmlp-digits --seconds 0.1"),
        ("mlperf_loadgen", "bench", "bench --models repmlp-digits --scenario offline"),
        ("matplotlib", "bench", "bench --models repmlp-digits --html {out}.html"),
        ("jinja2", "bench", "bench --models repmlp-digits --html {out}.html"),
        ("torch", "export", "eval {bundle} --data {data} --ckpt {ckpt}"),
        ("onnxruntime", "cpu", "eval {bundle} --data {data} --format onnx"),
        ("onnxruntime", "cpu", "predict {bundle} {image}"),
        ("onnxruntime", "cpu", "verify {bundle} --format onnx"),
        ("torch", "export", "verify {bundle} --ckpt {ckpt}"),
        ("torch", "export", "verify {bundle} --ckpt {ckpt} --bisect"),
        *((name, "cli", f"{command} --help") for name in ("typer", "rich") for command in ("export", "predict")),
    ],
)
def test_a_command_names_the_extra_that_brings_what_is_missing(
    package: str, extra: str, command: str, places: dict[str, Path]
) -> None:
    name, *arguments = command.split()
    done = run_without(package, name, *(argument.format(**places) for argument in arguments))
    lines = done.stderr.splitlines()
    assert done.returncode == 4, done.stderr
    assert lines[-1].startswith("error: ")
    assert f'pip install "repmlp-deploy[{extra}]"' in lines[-1]
    assert "Traceback" not in done.stderr
    assert not places["out"].exists()


@pytest.mark.parametrize("name", ["get_model", "inference_model", "export", "merge_branches"])
def test_a_public_name_raises_it(name: str) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from repmlp_deploy.errors import MissingDependency\n"
        f"try:\n    from repmlp_deploy import {name}\n"
        "except MissingDependency as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == 'torch is not installed: pip install "repmlp-deploy[export]"', done.stderr


def test_a_copy_that_is_not_installed_names_its_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert str(MissingDependency("torch", "export")) == f'torch is not installed: pip install -e "{ROOT}[export]"'


def test_what_a_failed_import_means() -> None:
    broken = missing_dependency(ImportError("libgomp.so.1: cannot open shared object file", name="onnxruntime"))
    assert isinstance(broken, MissingDependency)
    assert "onnxruntime cannot be imported (libgomp.so.1: cannot open" in str(broken)
    inner = missing_dependency(ModuleNotFoundError("No module named 'sympy'", name="sympy"))
    assert str(inner) == "sympy is not installed: an installed package needs it, and `python -m pip check` says which"
    assert missing_dependency(ModuleNotFoundError("no", name="repmlp_deploy.gone")) is None
    assert missing_dependency(ImportError("without a name")) is None
    with pytest.raises(MissingDependency), optional_imports():
        raise ModuleNotFoundError("no", name="torch")
    with pytest.raises(ModuleNotFoundError), optional_imports():
        raise ModuleNotFoundError("no", name="repmlp_deploy.gone")


def imported_packages() -> set[str]:
    """Return the top-level names of everything that the package imports, outside type checking."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_every_optional_package_has_an_extra_that_brings_it() -> None:
    assert imported_packages() - ALWAYS_THERE <= set(EXTRAS), "add it to EXTRAS in errors.py"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for package, extra in EXTRAS.items():
        distribution = DISTRIBUTIONS.get(package, package.replace("_", "-"))
        assert any(line.startswith(distribution) for line in extras[extra]), f"{extra} does not bring {package}"
