"""A folder for what runtimes compile or optimise, so that the next start is quick.

An entry is the SHA-256 of its content, then the content. One that was cut off, overwritten or is of something else is
no entry: it is made again. Entries run without another check, so the folder must belong to whoever runs the service.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from repmlp_deploy.errors import OutputError
from repmlp_deploy.files import replace_file

__all__ = ["Cache", "cache_key", "describe_processor"]

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_key(*parts: object) -> str:
    """Return one name for everything that a content depends on: file digests, versions, settings, the processor."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def describe_processor() -> str:
    """Return what the processor is and can do: code made for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return " ".join([platform.machine(), platform.processor(), *told])


class Cache:
    """Entries in `folder`, which is made where it is missing.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cache {folder}: {error.strerror or error}; name a folder that can be written") from None

    def load(self, key: str) -> bytes | None:
        """Return the content stored under `key`; None if there is none or it is damaged."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None

    def store(self, key: str, content: bytes) -> None:
        """Keep `content` under `key`; a reader sees all of it or nothing.

        Raises:
            OutputError: it cannot be written.
        """
        path = self._path(key)
        try:
            replace_file(path, hashlib.sha256(content).digest(), content)
        except OSError as error:
            raise OutputError(f"cache {path}: {error.strerror or error}; name a folder that can be written") from None

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.bin"
