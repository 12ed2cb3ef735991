"""One hostile input: what to make, what to run on it, and how that must end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

USAGE, FAILED, MISSING, UNWRITTEN = 2, 3, 4, 5


@dataclass(frozen=True)
class Kit:
    """Good files, from which hostile ones are made.

    Attributes:
        checkpoint: trained weights.
        bundle: a bundle of them, which nobody may change.
        image: a picture.
    """

    checkpoint: Path
    bundle: Path
    image: Path

    def copy_bundle(self, folder: Path) -> Path:
        """Copy the bundle to `folder`/bundle."""
        return Path(shutil.copytree(self.bundle, folder / "bundle"))


Make = Callable[[Path, Kit], object]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: unique.
        command: words of the command line. `{x}` is the folder that `make` filled, `{ckpt}`, `{image}` and `{bundle}`
            are good files, `{earlier}` is a bundle that must stay as it is.
        make: fills the folder.
        code: the exit code.
        said: what the error must contain.
    """

    name: str
    command: str
    make: Make | None = None
    code: int = USAGE
    said: str = ""

    def words(self, folder: Path, kit: Kit, earlier: Path) -> list[str]:
        """Return the command line."""
        places = {"x": folder, "ckpt": kit.checkpoint, "image": kit.image, "bundle": kit.bundle, "earlier": earlier}
        return [word.format(**places) for word in self.command.split(" ")]


EXPORT = "export --ckpt {x}/%s --out {earlier}"
INSPECT = "inspect {x}/%s"


def checkpoint_cases(name: str, file: str, make: Make, code: int = USAGE) -> Iterator[Case]:
    """Yield the cases of a checkpoint: it is exported, and inspected."""
    yield Case(f"export {name}", EXPORT % file, make, code)
    yield Case(f"inspect {name}", INSPECT % file, make, code)
