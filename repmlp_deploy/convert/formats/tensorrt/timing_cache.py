"""The timing cache: what a builder measured of kernels, kept between builds and shared by processes.

Builds run side by side; each reads the file when it begins and merges what it learned into it when it ends, under a
lock, by writing another file and renaming it. A file that is damaged or of another GPU or version is replaced, and the
report says so.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from repmlp_deploy.errors import OutputError
from repmlp_deploy.files import cache_folder, locked, replace_file

__all__ = ["TimingCache", "default_timing_cache"]


def default_timing_cache(module: str, version: str, capability: str) -> Path:
    """Return the file in the user's cache folder for one version and GPU."""
    return cache_folder() / f"{module}-{version}-sm{capability.replace('.', '')}.timing"


class TimingCache:
    """The file of one build, between its reading and its writing.

    Args:
        path: the file; its folder is made.

    Raises:
        OutputError: nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = "new"
        self._cache: Any = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path):
                pass
        except OSError as error:
            raise OutputError(f"--timing-cache {path}: {error.strerror or error}") from None

    def attach(self, config: Any) -> None:
        """Give the configuration what is known."""
        data = self._read()
        self._cache = _parsed(config, data)
        if data:
            self.state = "reused"
        if self._cache is None or not config.set_timing_cache(self._cache, False):
            self.state = "replaced: it was damaged, or of another GPU or version"
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, False)

    def save(self, config: Any) -> None:
        """Merge what the build learned into what others may have written meanwhile.

        Raises:
            OutputError: it could not be written.
        """
        learned = config.get_timing_cache()
        try:
            with locked(self.path):
                others = None if self.state.startswith("replaced") else _parsed(config, self._read())
                if others is not None:
                    learned.combine(others, False)
                replace_file(self.path, bytes(learned.serialize()))
        except OSError as error:
            raise OutputError(f"--timing-cache {self.path}: {error.strerror or error}") from None

    def _read(self) -> bytes:
        with suppress(FileNotFoundError):
            return self.path.read_bytes()
        return b""


def _parsed(config: Any, data: bytes) -> Any:
    """Read the cache in `data`; None if it holds none."""
    with suppress(TypeError, ValueError, RuntimeError):
        return config.create_timing_cache(data)
    return None
