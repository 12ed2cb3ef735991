"""`--config FILE.toml`: a command's options, read from a file."""

from __future__ import annotations

from pathlib import Path

from repmlp_deploy.cli.shared.console import typer
from repmlp_deploy.errors import InputError
from repmlp_deploy.files import read_toml
from repmlp_deploy.text import printable

__all__ = ["read_config"]

_LARGEST_BYTES = 1 << 20
_NOT_IN_A_FILE = ("config", "debug", "version")  # read before the file is, or from the command line itself


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
    params = [one for one in context.command.params if one.name not in _NOT_IN_A_FILE]
    named = {option.lstrip("-"): one for one in params for option in (*one.opts, one.name)}
    defaults = {}
    for key, value in values.items():
        one = named.get(key.replace("_", "-"), named.get(key))
        if one is None:
            known = sorted(name.lstrip("-") for one in params for name in one.opts if len(name.lstrip("-")) > 1)
            raise InputError(f"--config {path}: no option {printable(key, 100)!r}; known: {', '.join(known)}")
        several = one.nargs == -1 or getattr(one, "multiple", False)
        defaults[one.name] = [value] if several and isinstance(value, str) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path
