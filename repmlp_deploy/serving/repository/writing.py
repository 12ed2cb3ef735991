"""Write a model repository that a server may be watching.

A version becomes visible whole: it is written to a folder whose name is no number, which servers ignore, and renamed.
Other models and other versions in the repository stay as they are, and nothing that exists is replaced, except that the
same configuration may be written again.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from repmlp_deploy.errors import InputError, OutputError
from repmlp_deploy.files import flush, replace_file, take_place, write_new
from repmlp_deploy.serving.repository.choice import Packed

__all__ = ["write_packed"]


def write_packed(packed: Packed, out: Path) -> None:
    """Write the files of a model version into the repository `out`, which may exist.

    Raises:
        InputError: the version is there already, or a file beside it is another.
        OutputError: it cannot be written; no version became visible then.
    """
    version = out / packed.model / packed.version
    inside = f"{packed.model}/{packed.version}/"
    beside = {path: data for path, data in packed.files.items() if not path.startswith(inside)}
    try:
        if version.exists():
            raise InputError(f"{version} exists: give another --model-version, or remove it")
        for path, data in beside.items():
            if (out / path).exists() and (out / path).read_bytes() != data:
                raise InputError(f"{out / path} exists and is another: give another --name, or remove it")
        version.parent.mkdir(parents=True, exist_ok=True)
        staged = version.parent / f".{packed.version}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            staged.mkdir()
            for path, data in packed.files.items():
                if path.startswith(inside):
                    write_new(staged / path.removeprefix(inside), data)
                    flush(staged / path.removeprefix(inside))
            for path, data in beside.items():
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                replace_file(out / path, data, durable=True)
            take_place(staged, version)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        flush(version.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"could not write {out}: {error.strerror or error}") from None
