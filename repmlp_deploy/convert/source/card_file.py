"""Write a card as a TOML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repmlp_deploy.card import ModelCard
from repmlp_deploy.errors import InputError, MissingDependency, OutputError
from repmlp_deploy.text import printable

try:
    import tomli_w
except ImportError:
    raise MissingDependency("tomli_w", "export") from None

__all__ = ["write_card_file"]


def write_card_file(card: ModelCard, path: Path, assumed: Sequence[str] = ()) -> None:
    """Write `card` to a new file, for a user to complete; `load_card` reads it.

    Args:
        card: what is known and what is assumed.
        path: of the file.
        assumed: what a reader should correct, one line each; they become comments at the top.

    Raises:
        InputError: the file exists, or is not called `.toml`.
        OutputError: it cannot be written.
    """
    if path.suffix != ".toml":
        raise InputError(f"--write-card {path}: a card ends in .toml")
    content = card.model_dump(mode="json", exclude_none=True, exclude={"weights", "published"})
    content["network"] = {key: value for key, value in card.network.items() if value is not None}  # TOML has no null
    head = (
        ["# Correct this card before you use it:", *(f"# - {printable(line)}" for line in assumed), ""]
        if assumed
        else []
    )
    text = "\n".join([*head, tomli_w.dumps(content)])
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"--write-card {path}: the file exists; name another, or remove it") from None
    except OSError as error:
        path.unlink(missing_ok=True)  # a part of a card is worse than none
        raise OutputError(f"{path}: {error.strerror or error}") from None
