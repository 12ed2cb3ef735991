"""Patterns of --keep-fp32: which nodes a user keeps in float32. Needs no framework, so every format can use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from repmlp_deploy.errors import InputError

__all__ = ["match_patterns", "module_and_parents"]

_SHOWN = 4  # modules that the message names


def match_patterns(
    patterns: Sequence[str], nodes: Iterable[tuple[str, Iterable[str]]], modules: Iterable[str]
) -> dict[str, str]:
    """Return every node that a pattern matches, with the last such pattern.

    Args:
        patterns: as in a shell, of node names or of module names such as `stages.0.*`.
        nodes: (name, everything that a pattern may call it) of every node.
        modules: of the products, for the message; an empty name is left out.

    Raises:
        InputError: a pattern matches nothing.
    """
    known = [(name, tuple(names)) for name, names in nodes] if patterns else []
    kept: dict[str, str] = {}
    for pattern in patterns:
        found = [name for name, names in known if any(fnmatchcase(each, pattern) for each in names)]
        if not found:
            raise InputError(f"--keep-fp32 {pattern} matches no node{_modules_hint(modules)}")
        kept |= dict.fromkeys(found, pattern)
    return kept


def module_and_parents(module: str) -> list[str]:
    """Return the module and every module around it, the outermost first: `a`, `a.b`, `a.b.c`."""
    parts = module.split(".") if module else []
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _modules_hint(modules: Iterable[str]) -> str:
    names = sorted({module for module in modules if module})
    if len(names) > _SHOWN:
        return f"; modules are {', '.join(names[:_SHOWN])}, … {names[-1]}"
    return f"; modules are {', '.join(names)}" if names else ""
