"""Check the size of rooms: modules per folder, lines per module and function, and a test for every module.

python tools/house.py --check
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "repmlp_deploy"

MOST_MODULES = 12
MOST_MODULE_LINES = 400
MOST_FUNCTION_LINES = 45  # of statements: an option per line, or a docstring, is no work to follow

COVERED_BY = {
    "repmlp_deploy.bench.targets": "bench/test_session.py",
    "repmlp_deploy.__main__": "cli/test_missing_packages.py",
    "repmlp_deploy.bench.measure.machine": "bench/test_session.py",
    "repmlp_deploy.bench.measure.profiling": "bench/test_subjects.py",
    "repmlp_deploy.bench.subjects.bundle": "bench/test_subjects.py",
    "repmlp_deploy.bench.subjects.openvino": "bench/test_subjects.py",
    "repmlp_deploy.cli.shared.description": "convert/source/test_description.py",
    "repmlp_deploy.convert.source.card_file": "convert/source/test_description.py",
    "repmlp_deploy.cli.shared.engine_report": "convert/formats/tensorrt/test_build.py",
    "repmlp_deploy.cli.shared.export_options": "cli/test_commands.py",
    "repmlp_deploy.convert.assembly": "convert/test_pipeline.py",
    "repmlp_deploy.convert.capture": "convert/graph/test_onnx_steps.py",
    "repmlp_deploy.convert.formats.checkpoint": "convert/formats/test_checkpoint_format.py",
    "repmlp_deploy.convert.formats.openvino_artifact": "convert/formats/test_openvino_export.py",
    "repmlp_deploy.convert.formats.tensorrt.artifact": "convert/formats/tensorrt/test_build.py",
    "repmlp_deploy.convert.formats.tensorrt.versions": "vendors/test_tensorrt_bindings.py",
    "repmlp_deploy.convert.formats.torch_program": "convert/test_pipeline.py",
    "repmlp_deploy.convert.graph.lowering.lowered": "convert/graph/lowering/test_lower.py",
    "repmlp_deploy.convert.graph.lowering.patterns": "convert/graph/lowering/test_lower.py",
    "repmlp_deploy.convert.graph.lowering.quantize": "convert/graph/lowering/test_lower.py",
    "repmlp_deploy.convert.memory": "convert/test_pipeline.py",
    "repmlp_deploy.convert.provenance": "convert/test_pipeline.py",
    "repmlp_deploy.convert.source.unpickle": "convert/source/test_checkpoint.py",
    "repmlp_deploy.nets.blocks.conv_bn": "nets/test_blocks.py",
    "repmlp_deploy.nets.blocks.fc3": "nets/test_blocks.py",
    "repmlp_deploy.nets.networks.input_size": "nets/test_networks_of_2021.py",
    "repmlp_deploy.nets.networks.mobilefacenet": "nets/test_task_networks.py",
    "repmlp_deploy.evaluation.process_worker": "evaluation/test_process_engine.py",
    "repmlp_deploy.cli.shared.serving.config": "serving/test_process.py",
    "repmlp_deploy.cli.shared.serving.on_ray": "serving/hosts/ray/test_settings.py",
    "repmlp_deploy.serving.hosts.ray.loopback": "serving/hosts/ray/test_process.py",
    "repmlp_deploy.serving.hosts.ray.replica": "serving/hosts/ray/test_process.py",
    "repmlp_deploy.serving.hosts.ray.services": "serving/hosts/ray/test_process.py",
    "repmlp_deploy.serving.hosts.bodies": "serving/hosts/test_http.py",
    "repmlp_deploy.serving.repository.choice": "serving/repository/test_repository.py",
    "repmlp_deploy.serving.repository.kserve": "serving/repository/test_repository.py",
    "repmlp_deploy.serving.repository.ovms": "serving/repository/test_repository.py",
    "repmlp_deploy.serving.repository.triton": "serving/repository/test_repository.py",
    "repmlp_deploy.serving.repository.writing": "serving/repository/test_repository.py",
    "repmlp_deploy.runtime.tensorrt.flavours": "runtime/tensorrt/test_engine.py",
    "repmlp_deploy.runtime.tensorrt.device_arrays": "runtime/tensorrt/test_runner.py",
}
"""Modules that no test file is named for or imports, to the file in `tests/` that runs them."""


def faults() -> Iterator[str]:
    """Yield one line per room that is too large and per module that no test names."""
    modules = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
    for folder, count in Counter(path.parent for path in modules).items():
        if count > MOST_MODULES:
            yield f"{folder.relative_to(ROOT)}: {count} modules; at most {MOST_MODULES}"
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for path in modules:
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(ROOT)
        if text.count("\n") > MOST_MODULE_LINES:
            yield f"{where}: {text.count(chr(10))} lines; at most {MOST_MODULE_LINES}"
        yield from _long_functions(where, ast.parse(text))
        tested, covered = _is_tested(path, tests), _dotted(path) in COVERED_BY
        if not tested and not covered:
            yield f"{where}: no test file has its name or imports it"
        if tested and covered:
            yield f"{where}: a test has its name or imports it, and it is in COVERED_BY; remove it there"


def _long_functions(where: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body if ast.get_docstring(node, clean=False) is None else node.body[1:]
            lines = (node.end_lineno or node.lineno) - body[0].lineno + 1 if body else 0
            if lines > MOST_FUNCTION_LINES:
                yield f"{where}:{node.lineno} {node.name}: {lines} lines; at most {MOST_FUNCTION_LINES}"


def _is_tested(path: Path, tests: str) -> bool:
    """Return whether a test file has the module's name, or a test names the module."""
    relative = path.relative_to(PACKAGE)
    if (ROOT / "tests" / relative.parent / f"test_{path.stem}.py").is_file():
        return True
    dotted = _dotted(path)
    parent, _, name = dotted.rpartition(".")
    return dotted in tests or any(f"from {parent} import {text}" in tests for text in (name, f"{name} "))


def _dotted(path: Path) -> str:
    return ".".join(("repmlp_deploy", *path.relative_to(PACKAGE).with_suffix("").parts))


def main() -> int:
    """Print every fault; return 1 if there is one."""
    found = list(faults())
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
