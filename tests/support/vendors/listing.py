"""Print what a module offers, as JSON. Run as a script in a process that can import the module.

Every name maps to its kind, its docstring, its signature where Python knows one, and its members if it is a class.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any


def describe(value: Any, *, deep: bool = True) -> dict[str, Any]:
    """Describe one object; a class with its members."""
    entry: dict[str, Any] = {"kind": kind_of(value), "doc": inspect.getdoc(value) or ""}
    if callable(value):
        try:
            entry["signature"] = [
                [p.name, p.kind.name, p.default is not p.empty] for p in inspect.signature(value).parameters.values()
            ]
        except (TypeError, ValueError):
            entry["signature"] = None
    if hasattr(value, "__int__") and not inspect.isclass(value):
        entry["value"] = int(value)
    if inspect.isclass(value) and deep:
        enum = getattr(value, "__members__", {})
        names = sorted({*dir(value), *enum})
        members = {n: inspect.getattr_static(value, n, None) for n in names if not n.startswith("_") or n == "__init__"}
        entry["members"] = {
            name: describe(found if isinstance(found, property) else getattr(value, name), deep=inspect.isclass(found))
            for name, found in members.items()
            if name not in ("mro", "__class__")
        }
    return entry


def kind_of(value: Any) -> str:
    """Return `class`, `property`, `function` or `value`."""
    if inspect.isclass(value):
        return "class"
    if isinstance(value, property) or inspect.isgetsetdescriptor(value) or inspect.ismemberdescriptor(value):
        return "property"
    return "function" if callable(value) else "value"


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    public = [name for name in dir(module) if not name.startswith("_") and not inspect.ismodule(getattr(module, name))]
    found = {name: describe(getattr(module, name)) for name in public}
    print(json.dumps({"version": getattr(module, "__version__", ""), "names": found}))  # noqa: T201 - its purpose
