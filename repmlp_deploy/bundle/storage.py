"""The bundle: a folder with the artifacts, `probe.npz` and, written last, `manifest.json`.

A bundle on disk is always complete. It is written to a hidden sibling folder, every file and the folder itself are
flushed to the disk, and only then it takes its place: by a rename where there was nothing, by the kernel's atomic
exchange of two folders where there was an earlier bundle. Killing the writer at any moment leaves the old bundle or
the new one, and at most a hidden sibling that the next writer removes. A mounted volume cannot be exchanged: there the
files get their names one by one, the manifest last.

On load the manifest's schema is checked, and the SHA-256 of a file before anything reads it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from repmlp_deploy.bundle.manifest import MANIFEST, SCHEMA, ArtifactEntry, FileEntry, Manifest
from repmlp_deploy.bundle.probe import PROBE, Probe
from repmlp_deploy.errors import BundleError, InputError, OutputError
from repmlp_deploy.files import (
    can_be_replaced,
    flush,
    is_part,
    move_into,
    read_json,
    remove_abandoned,
    take_place,
    write_new,
)
from repmlp_deploy.text import first_fault

__all__ = ["Bundle", "check_output_folder", "describe_file", "hash_file"]

_LARGEST_MANIFEST_BYTES = 16 << 20
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Bundle:
    """A manifest and its files, in memory before `save`, on disk after `load`.

    Attributes:
        manifest: what `manifest.json` says.
        folder: where the files are; None before they are saved.
        contents: file name to content, for what is not saved yet.
        ahead: file name to a content that a thread reads and checks, see `reading_ahead`.
    """

    manifest: Manifest
    folder: Path | None = None
    contents: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    ahead: Mapping[str, Future[memoryview]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """Open the bundle in `folder` and check its manifest; files are checked when they are read.

        Raises:
            BundleError: there is none, or it is of another schema, or a file is missing or of another length.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            there = path.is_file()
            data = read_json(path, _LARGEST_MANIFEST_BYTES) if there else None
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:  # too deep, too large, or a number that no manifest has
            raise BundleError(f"{path} is not JSON: {error}") from None
        if not there:
            raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; make one with repmlp-export --ckpt FILE")
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise BundleError(f"{path} has schema {schema!r}; this version reads {SCHEMA}: export the checkpoint again")
        try:
            manifest = Manifest.model_validate(data)
        except ValidationError as error:
            where, said = first_fault(error)
            raise BundleError(f"{path}: {where}: {said}") from None
        for entry in _files(manifest):
            file = folder / entry.path
            try:  # a link is followed: caches of model hubs are links, and what is read has a digest
                size = file.stat().st_size if file.is_file() else None
            except OSError as error:
                raise BundleError(f"{file}: {error.strerror or error}") from None
            if size is None:
                raise BundleError(f"{folder} has no file {entry.path}; export the checkpoint again")
            if size != entry.bytes:
                raise BundleError(f"{file} has {size} bytes; the manifest says {entry.bytes}")
        return cls(manifest, folder)

    def read(self, entry: FileEntry) -> bytes:
        """Read a file and check its SHA-256.

        Raises:
            BundleError: it is not the content that was verified.
        """
        if self.folder is None:
            return self.contents[entry.path]
        try:
            data = (self.folder / entry.path).read_bytes()
        except OSError as error:
            raise BundleError(f"{self.folder / entry.path}: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _changed(self.folder / entry.path)
        return data

    def view(self, entry: FileEntry) -> memoryview:
        """Return a file's content as `read` does, in memory that a runtime may share with nobody else.

        It is not a mapped file: a file that somebody overwrites later must not change the weights of a running service.
        It can be written to, except where the bundle is in memory. A thread hashes it while the rest is read.

        Raises:
            BundleError: it is not the content that was verified.
        """
        if entry.path in self.ahead:
            return self.ahead[entry.path].result()
        if self.folder is None:
            return memoryview(self.contents[entry.path])
        return _read_checked(self.folder / entry.path, entry)

    @contextmanager
    def reading_ahead(self, entries: Sequence[FileEntry]) -> Iterator[Bundle]:
        """Lend a bundle whose `view` of these files a thread reads and checks meanwhile; leaving waits for the thread.

        Nothing is trusted sooner: `view` returns, or raises, when the file's SHA-256 is known.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            yield replace(self, ahead={entry.path: pool.submit(self.view, entry) for entry in entries})

    def files(self) -> list[FileEntry]:
        """Return every file but the manifest."""
        return _files(self.manifest)

    def artifact(self, artifact_format: str) -> ArtifactEntry:
        """Return the entry of one format.

        Raises:
            BundleError: the bundle has no such artifact.
        """
        try:
            return self.manifest.artifacts[artifact_format]
        except KeyError:
            have = ", ".join(self.manifest.artifacts)
            raise BundleError(f"{self.manifest.name} has no {artifact_format} artifact; it has {have}") from None

    def probe(self) -> Probe:
        """Read the probe and check it."""
        probe = Probe.from_bytes(self.read(self.manifest.probe))
        _require_fit(probe, self.manifest)
        return probe

    def save(self, out: str | Path) -> Bundle:
        """Write everything to `out`, replacing an earlier bundle only by this complete one.

        Raises:
            InputError: `out` is a file or a folder that is no bundle.
            OutputError: it could not be written; what was there is untouched.
        """
        out = Path(out)
        check_output_folder(out)
        # resolved, so that a linked bundle is replaced where it lies
        target = out.resolve()
        exchanged = can_be_replaced(target)
        beside = target.parent if exchanged else Path(tempfile.gettempdir())
        partial = beside / f".{target.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            remove_abandoned(beside / target.name)
            partial.mkdir()
            for name, content in self.contents.items():
                write_new(partial / name, content)
            write_new(partial / MANIFEST, self.manifest.to_json().encode())
            for name in (*self.contents, MANIFEST):  # after all writes: the disk has been at work since the first
                flush(partial / name)
            flush(partial)
            if exchanged:
                exchanged = _took_place(partial, target)
            if not exchanged:
                move_into(partial, target, last=MANIFEST)
            flush(target.parent)
        except OSError as error:
            raise OutputError(
                f"could not write {out}: {error.strerror or error}; what was there is untouched"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Bundle(self.manifest, out)


def check_output_folder(out: Path) -> None:
    """Raise unless a bundle can be written to `out`; makes the parent folder.

    Raises:
        InputError: `out` is a file, or a folder with files that are no bundle's.
        OutputError: its parent cannot be written to.
    """
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file; name a folder")
        foreign = _foreign_files(out) if out.is_dir() else []
        target = out.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        here = Path.cwd()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise OutputError(f"could not write {out}: {getattr(error, 'strerror', None) or error}") from None
    if target == here or target in here.parents:
        raise InputError(f"--out {out} is the working folder, or lies around it; name a folder inside it")
    if foreign:
        raise InputError(f"--out {out} holds other files ({', '.join(foreign[:3])}); name another folder")
    written = target if target.is_dir() and not can_be_replaced(target) else target.parent
    try:
        tempfile.TemporaryFile(dir=written).close()  # tried: to root, permissions say yes where the file system says no
    except OSError as error:
        raise OutputError(f"could not write {out}: {error.strerror or error} in {written}") from None


def describe_file(path: str, content: bytes) -> FileEntry:
    """Return the entry of a file with this content."""
    return FileEntry(path=path, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_checked(path: Path, entry: FileEntry) -> memoryview:
    """Return a file's content if it has the entry's length and SHA-256; pieces are hashed while others are read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1, thread_name_prefix="sha256") as hashing:
            if os.fstat(file.fileno()).st_size != entry.bytes:  # before memory is asked for
                raise _changed(path)
            content, filled = np.empty(entry.bytes, np.uint8).data, 0  # not zeroed, which takes as long as reading
            while count := file.readinto(content[filled : filled + _PIECE_BYTES]):
                hashing.submit(digest.update, content[filled : filled + count])
                filled += count
            more = file.read(1)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    if filled != entry.bytes or more or digest.hexdigest() != entry.sha256:
        raise _changed(path)
    return content


def _changed(path: Path) -> BundleError:
    return BundleError(f"{path} was changed: its sha256 is not the manifest's; export again")


def _files(manifest: Manifest) -> list[FileEntry]:
    artifacts = manifest.artifacts.values()
    return [*artifacts, *(c for entry in artifacts for c in entry.companions), manifest.probe]


def _foreign_files(folder: Path) -> list[str]:
    """Return the names in `folder` that are no part of a bundle: all of them, unless its manifest is a bundle's."""
    lost_and_found = {"lost+found"} if os.path.ismount(folder) else set()
    names = {path.name for path in folder.iterdir() if not is_part(path.name)} - lost_and_found
    files = {name for name in names if (folder / name).is_file()}
    try:
        manifest = Manifest.model_validate(read_json(folder / MANIFEST, _LARGEST_MANIFEST_BYTES))
    except (OSError, ValueError):
        return sorted(names)
    own = {entry.path for entry in _files(manifest)} | {MANIFEST}
    return sorted(names - (own & files))


def _took_place(partial: Path, target: Path) -> bool:
    """Exchange the folders; return False where the system tells only now that it cannot, as for a bind mount."""
    try:
        take_place(partial, target)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV) and target.is_dir():
            return False
        raise
    return True


def _require_fit(probe: Probe, manifest: Manifest) -> None:
    """Raise BundleError unless the probe has the shapes and types that the manifest states."""
    inputs = (probe.inputs, *probe.further_inputs)
    outputs = tuple(reference for reference, _ in probe.outputs())
    for what, arrays, specs in (("inputs", inputs, manifest.inputs), ("outputs", outputs, manifest.outputs)):
        if len(arrays) != len(specs):
            raise BundleError(f"{PROBE} has {len(arrays)} {what}; the manifest states {len(specs)}")
        for array, spec in zip(arrays, specs, strict=True):
            if array.shape[1:] != spec.shape[1:]:
                raise BundleError(f"{PROBE}: {spec.name} has shape {array.shape}; the manifest states {spec.shape}")
    for array, spec in zip(inputs, manifest.inputs, strict=True):
        if array.dtype.name != spec.dtype:
            raise BundleError(f"{PROBE}: {spec.name} is {array.dtype}; the manifest states {spec.dtype}")
