"""Read from our sources what they ask of NVIDIA's packages: names, calls, and names that are compared as text.

Names and calls are read from the sources, so that nothing new goes unchecked. Signatures come from docstrings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import repmlp_deploy

PACKAGE = Path(repmlp_deploy.__file__).parent

RUNTIME = [
    file for file in sorted((PACKAGE / "runtime" / "tensorrt").glob("*.py")) if not file.stem.endswith("_memory")
]
BUILDERS = sorted((PACKAGE / "convert" / "formats" / "tensorrt").glob("*.py"))

CLASSES = {
    "trt": "",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "_cache": "IRuntimeCache",
    "strategies": "CudaGraphStrategy",
}
"""What a variable of this name holds in the runtime's sources."""

BUILDER_CLASSES = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
    "refitter": "Refitter",
}
"""The same in the builders' sources."""

OTHER_CLASSES: dict[str, dict[str, str]] = {
    "refit": {"runtime": "Runtime", "engine": "ICudaEngine", "config": "ISerializationConfig"},
    "timing_cache": {"learned": "ITimingCache", "_cache": "ITimingCache"},
    "network_types": {"tensor": "ITensor", "maker": "ILayer"},
    "marking": {"tensor": "ITensor", "engine": "ICudaEngine"},
}
"""Module to what its variables hold instead or as well."""


@dataclass(frozen=True)
class Use:
    """An attribute of one of NVIDIA's objects in our source; a call if `call` is set."""

    where: str
    owner: str
    names: tuple[str, ...]
    call: ast.Call | None

    def __str__(self) -> str:
        return f"{'.'.join((self.owner or 'module', *self.names))} at {self.where}"


def uses(files: list[Path], classes: dict[str, str]) -> Iterator[Use]:
    """Yield every use in these files of what a variable named in `classes` holds."""
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                chain = _chain(node)
                owners = [i for i, name in enumerate(chain[:-1]) if name in classes]
                if owners and not chain[-1].startswith("__"):
                    names = tuple(chain[owners[-1] + 1 :])
                    yield Use(f"{file.name}:{node.lineno}", classes[chain[owners[-1]]], names, calls.get(id(node)))


def _chain(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def uses_of(files: list[Path], classes: dict[str, str]) -> list[Use]:
    """Return the uses of several modules, each with the classes that its variables hold."""
    found: list[Use] = []
    for file in files:
        found += uses([file], classes | OTHER_CLASSES.get(file.stem, {}))
    return found


RUNTIME_USES = uses_of(RUNTIME, CLASSES)
BUILDER_USES = [
    use
    for use in uses_of(BUILDERS, BUILDER_CLASSES)
    if use.owner != "IOptimizationProfile" or use.names[0] not in {"min", "opt", "max"}  # our own BatchRange
]


def find(module: Any, use: Use) -> Any:
    """Return what is used. The bindings tell nothing of a property's value, so the search ends there with None."""
    value = module
    for name in ([use.owner] if use.owner else []) + list(use.names):
        value = getattr(value, name)
        if isinstance(value, property):
            return None
    return value


def signatures(function: Any) -> list[tuple[list[str], int]]:
    """Return (parameters without self, how many have no default) of every overload that a pybind11 docstring lists."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        match = re.match(r"(?:\d+\. )?\w+\((self: [\w.]+(?:, )?)?(.*)\) -> ", line)
        if match and "*args" not in match[2]:
            parts = [p for p in re.split(r", (?=\w+: )", match[2]) if p]
            found.append(([p.split(":")[0] for p in parts], sum(" = " not in p for p in parts)))
    return found


def accepts(overload: tuple[list[str], int], positional: int, keywords: set[str]) -> bool:
    """Tell whether a call with so many positional arguments and these keywords fits a signature."""
    names, required = overload
    given = set(names[:positional]) | keywords
    return positional <= len(names) and keywords <= set(names) and len(given) >= required


def fits(value: Any, call: ast.Call) -> bool:
    """Tell whether a call fits one of the signatures in a docstring; a call with *arguments cannot be told."""
    keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    return starred or any(accepts(overload, len(call.args), keywords) for overload in signatures(value))


def uses_in(source: str, classes: dict[str, str]) -> list[Use]:
    """Return the uses in a piece of source text."""

    class Text:
        name = "source"

        def read_text(self, encoding: str) -> str:
            assert encoding
            return source

    return list(uses([Text()], classes))  # type: ignore[list-item]
