"""`--config FILE.toml`: a command's options, read from a file."""

from __future__ import annotations

from pathlib import Path

from repmlp_deploy.cli.shared.console import typer
from repmlp_deploy.errors import InputError
from repmlp_deploy.files import read_toml
from repmlp_deploy.text import printable

__all__ = ["read_config"]

_LARGEST_BYTES = 1 << 20


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command's options; called before they are read.

    Args:
        context: of the command line.
        path: of the file, or None.

    Raises:
        InputError: it cannot be read, or names an option that the command does not have.
    """
    if path is None:
        return None
    try:
        values = read_toml(path, _LARGEST_BYTES)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"--config {path}: {error}") from None
    names = {option.lstrip("-"): p.name for p in context.command.params for option in (*p.opts, p.name)}
    defaults = {}
    for key, value in values.items():
        name = names.get(key.replace("_", "-"), names.get(key))
        if name in (None, "config", "debug"):
            known = ", ".join(sorted(set(names) - {"config", "debug"} - set(names.values())))
            raise InputError(f"--config {path}: no option {printable(key, 100)!r}; known: {known}")
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path
