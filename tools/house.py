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
        if not _is_tested(path, tests):
            yield f"{where}: no test file has its name or imports it"


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
    dotted = ".".join(("repmlp_deploy", *relative.with_suffix("").parts))
    parent, _, name = dotted.rpartition(".")
    return dotted in tests or any(f"from {parent} import {text}" in tests for text in (name, f"{name} "))


def main() -> int:
    """Print every fault; return 1 if there is one."""
    found = list(faults())
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
