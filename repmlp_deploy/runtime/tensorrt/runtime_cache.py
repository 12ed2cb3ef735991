"""TensorRT-RTX's runtime cache on the disk: kernels compiled for this GPU, so that the next start is quick.

The file is one SHA-256 and the vendor's bytes. A file that is cut short, altered, or refused by TensorRT-RTX (another
GPU, driver or release) is started anew. Processes share it: it is replaced whole, under a lock.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from repmlp_deploy.files import locked, replace_file

__all__ = ["RuntimeCache"]

_DIGEST = hashlib.sha256().digest_size


class RuntimeCache:
    """The file of one engine on one kind of GPU.

    Args:
        path: the file; its folder is made when it is first written.

    Attributes:
        note: what became of it, for people.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note = "new"
        self._kept = b""

    def read(self) -> bytes | None:
        """Read the vendor's bytes; None if there are none, or they are not what was written."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.note = f"not read: {error.strerror}"
            return None
        digest, content = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            self.note = "started anew: the file was damaged"
            return None
        self._kept, self.note = content, "reused"
        return content

    def refused(self) -> None:
        """Discard what `read` returned: it is useless here."""
        self._kept, self.note = b"", "started anew: the file is of another GPU, driver or release"

    def write(self, content: bytes) -> None:
        """Keep `content`. A folder that cannot be written to costs time at the next start and changes nothing else."""
        if content == self._kept:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                replace_file(self.path, hashlib.sha256(content).digest(), content)
        except OSError as error:
            self.note = f"not written: {error.strerror or error}"
            return
        self._kept = content
