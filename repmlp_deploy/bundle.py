"""The bundle: a folder with the artifacts, `probe.npz` and, written last, `manifest.json`.

A bundle on disk is always complete. It is written to a hidden sibling folder, every file and the folder itself are
flushed to the disk, and only then it takes its place: by a rename where there was nothing, by the kernel's atomic
exchange of two folders where there was an earlier bundle. Killing the writer at any moment leaves the old bundle or
the new one, and at most a hidden sibling that the next writer removes.

On load the manifest's schema is checked, and the SHA-256 of a file before anything reads it.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.errors import BundleError, InputError, OutputError

__all__ = [
    "MANIFEST",
    "PROBE",
    "SCHEMA",
    "ArtifactEntry",
    "BatchRange",
    "Bundle",
    "FileEntry",
    "Hop",
    "Manifest",
    "Probe",
    "TensorSpec",
    "check_output_folder",
    "describe_file",
    "hash_file",
]

SCHEMA = 1
MANIFEST = "manifest.json"
PROBE = "probe.npz"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """A file of the bundle: a plain name inside it, its SHA-256 and its length."""

    path: FileName
    sha256: Digest
    bytes: Annotated[int, Field(ge=0)]


class ArtifactEntry(FileEntry):
    """One deployable artifact; what else a format records about itself stays beside these fields."""

    model_config = ConfigDict(frozen=True, extra="allow")

    precision: str
    companions: tuple[FileEntry, ...] = ()


class TensorSpec(_Frozen):
    """An input or output: `shape` has None for the batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class BatchRange(_Frozen):
    """Batch sizes that the artifacts serve, and the one they are best at."""

    min: Annotated[int, Field(gt=0)]
    opt: Annotated[int, Field(gt=0)]
    max: Annotated[int, Field(gt=0)]


class Hop(_Frozen):
    """One line of the certificate: what was compared with the trained network, and how close it came.

    Attributes:
        name: the step.
        batch: size of the batch it ran with; 0 when the samples ran one by one through all batch sizes.
        max_abs: largest absolute error against the trained network in float64.
        mean_abs: mean absolute error.
        max_rel: `max_abs` over the largest absolute reference.
        between: relative error of the differences between samples.
        cosine: smallest cosine of a sample.
        top1: share of samples with the same largest class.
        floor: noise floor, the trained network's own error in float32.
        allowed: largest `max_abs` that passes.
        passed: whether it did; None for the floor itself.
        note: anything a reader must know.
    """

    name: str
    batch: int
    max_abs: float
    mean_abs: float
    max_rel: float
    between: float | None
    cosine: float
    top1: float | None
    floor: float
    allowed: float
    passed: bool | None
    note: str = ""


class Manifest(_Frozen):
    """`manifest.json`.

    `input` and `output` are the only ones, or the first of several; then `inputs` and `outputs` hold them all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    name: str
    family: str
    task: str
    graph: str
    input: TensorSpec
    output: TensorSpec
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    batch: BatchRange
    artifacts: dict[str, ArtifactEntry]
    probe: FileEntry
    certificate: tuple[Hop, ...]
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Probe:
    """Seeded inputs and what the trained network answers to them.

    Attributes:
        inputs: (n, C, H, W) float32.
        reference: (n, classes) float64, from the trained network in float64.
        float32: (n, classes) float32, the same network in float32.
        further_inputs: of a network with several inputs, those behind the first.
        further_answers: of a network with several outputs, `reference` and `float32` of those behind the first.
    """

    inputs: NDArray[np.float32]
    reference: NDArray[np.float64]
    float32: NDArray[np.float32]
    further_inputs: tuple[NDArray[Any], ...] = ()
    further_answers: tuple[tuple[NDArray[np.float64], NDArray[np.float32]], ...] = ()

    def answers(self) -> list[tuple[NDArray[np.float64], NDArray[np.float32]]]:
        """(reference, float32) of every output."""
        return [(self.reference, self.float32), *self.further_answers]

    def to_bytes(self) -> bytes:
        """The content of `probe.npz`."""
        buffer = io.BytesIO()
        arrays = {"inputs": self.inputs, "reference": self.reference, "float32": self.float32}
        arrays |= {f"inputs.{i}": value for i, value in enumerate(self.further_inputs, 1)}
        for i, (reference, float32) in enumerate(self.further_answers, 1):
            arrays |= {f"reference.{i}": reference, f"float32.{i}": float32}
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Probe:
        """The probe in the content of a `probe.npz`.

        Raises:
            BundleError: it holds something else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                further = sum(name.startswith("reference.") for name in arrays.files)
                return cls(
                    arrays["inputs"],
                    arrays["reference"],
                    arrays["float32"],
                    tuple(arrays[f"inputs.{i}"] for i in range(1, sum(n.startswith("inputs") for n in arrays.files))),
                    tuple((arrays[f"reference.{i}"], arrays[f"float32.{i}"]) for i in range(1, further + 1)),
                )
        except (KeyError, ValueError, OSError, EOFError, BadZipFile) as error:
            raise BundleError(f"{PROBE} is not a probe: {error}") from None

    def batch(self, size: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Inputs and references of a batch of `size`, cycling through the samples."""
        order = np.arange(size) % len(self.inputs)
        return self.inputs[order], self.reference[order]

    def batches(self, size: int) -> tuple[list[NDArray[Any]], list[NDArray[np.float64]]]:
        """Every input and every reference of a batch of `size`, cycling through the samples."""
        order = np.arange(size) % len(self.inputs)
        inputs = [value[order] for value in (self.inputs, *self.further_inputs)]
        return inputs, [reference[order] for reference, _ in self.answers()]


@dataclass(frozen=True)
class Bundle:
    """A manifest and its files, in memory before `save`, on disk after `load`.

    Attributes:
        manifest: what `manifest.json` says.
        folder: where the files are; None before they are saved.
        contents: file name to content, for what is not saved yet.
    """

    manifest: Manifest
    folder: Path | None = None
    contents: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """The bundle in `folder`, its manifest checked; files are checked when they are read.

        Raises:
            BundleError: there is none, or it is of another schema, or a file is missing or of another length.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; make one with repmlp-export --ckpt FILE")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BundleError(f"{path} is not JSON: {error}") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise BundleError(f"{path} has schema {schema!r}; this version reads {SCHEMA}: export the checkpoint again")
        try:
            manifest = Manifest.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise BundleError(f"{path}: {where}: {first['msg']}") from None
        for entry in _files(manifest):
            file = folder / entry.path
            if file.is_symlink() or not file.is_file():
                raise BundleError(f"{folder} has no file {entry.path}; export the checkpoint again")
            if file.stat().st_size != entry.bytes:
                raise BundleError(f"{file} has {file.stat().st_size} bytes; the manifest says {entry.bytes}")
        return cls(manifest, folder)

    def read(self, entry: FileEntry) -> bytes:
        """The content of a file, its SHA-256 checked.

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
            raise BundleError(f"{self.folder / entry.path} was changed: its sha256 is not the manifest's; export again")
        return data

    def files(self) -> list[FileEntry]:
        """Every file but the manifest."""
        return _files(self.manifest)

    def artifact(self, artifact_format: str) -> ArtifactEntry:
        """The entry of one format.

        Raises:
            BundleError: the bundle has no such artifact.
        """
        try:
            return self.manifest.artifacts[artifact_format]
        except KeyError:
            have = ", ".join(self.manifest.artifacts)
            raise BundleError(f"{self.manifest.name} has no {artifact_format} artifact; it has {have}") from None

    def probe(self) -> Probe:
        """The probe, checked."""
        return Probe.from_bytes(self.read(self.manifest.probe))

    def save(self, out: str | Path) -> Bundle:
        """Write everything to `out`, replacing an earlier bundle only by this complete one.

        Raises:
            InputError: `out` is a file or a folder that is no bundle.
            OutputError: it could not be written; what was there is untouched.
        """
        out = Path(out)
        check_output_folder(out)
        # resolved, so that a bundle behind a link is replaced where it lies
        target = out.resolve()
        partial = target.parent / f".{target.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            _remove_abandoned(target)
            partial.mkdir()
            for name, content in self.contents.items():
                _write(partial / name, content)
            _write(partial / MANIFEST, self.manifest.to_json().encode())
            for name in (*self.contents, MANIFEST):  # behind all writes: the disk has been at work since the first
                _flush(partial / name)
            _flush(partial)
            _take_place(partial, target)
            _flush(target.parent)
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
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")
    try:
        foreign = _foreign_files(out) if out.is_dir() else []
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"could not write {out}: {error.strerror or error}") from None
    if foreign:
        raise InputError(f"--out {out} holds files of others ({', '.join(foreign[:3])}); name another folder")
    if not os.access(out.resolve().parent, os.W_OK | os.X_OK):
        raise OutputError(f"could not write {out}: no permission to write in {out.resolve().parent}")


def describe_file(path: str, content: bytes) -> FileEntry:
    """The entry of a file with this content."""
    return FileEntry(path=path, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(manifest: Manifest) -> list[FileEntry]:
    artifacts = manifest.artifacts.values()
    return [*artifacts, *(c for entry in artifacts for c in entry.companions), manifest.probe]


def _foreign_files(folder: Path) -> list[str]:
    """The names in `folder` that its manifest does not account for."""
    names = {path.name for path in folder.iterdir()}
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = [*data["artifacts"].values(), data["probe"]]
        own = {e["path"] for e in entries} | {c["path"] for e in entries for c in e.get("companions", ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return sorted(names)
    return sorted(names - own - {MANIFEST})


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if sys.platform == "win32" and path.is_dir():  # there, folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(partial: Path, target: Path) -> None:
    """Put the folder `partial` where `target` is; afterwards `partial` is gone or holds what was there."""
    if not target.is_dir() or not any(target.iterdir()):
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    elif not _exchange(partial, target):
        # No atomic exchange on this system: for an instant the old bundle has another name.
        aside = target.parent / f"{partial.name}-old"
        target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    swap, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0)


def _remove_abandoned(target: Path) -> None:
    """Remove siblings that killed writers of `target` left."""
    name = re.compile(rf"\.{re.escape(target.name)}\.partial-(\d+)-[0-9a-f]{{8}}")
    for path in target.parent.iterdir():
        match = name.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # there, signal 0 is a real one
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
