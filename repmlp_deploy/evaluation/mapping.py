"""Predictions for any number of images, in a parquet file; a run that was killed goes on where it was.

Images are numbered in the order of their source, and cut into parts of a fixed number of them. A part is a file beside
the output, written whole or not at all. A run does the parts that are missing, then joins all of them, so every image
is in the output exactly once. The folder of parts names the job that it belongs to: bundle, artifact, options, images.
What is in memory does not depend on the number of images, except for the names of a folder, a glob or a list. An engine
says where parts are made: here (`filling`), or by other processes (`process_engine`, `ray_engine`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from repmlp_deploy.errors import InputError, OutputError
from repmlp_deploy.evaluation.filling import Parts, bundle_digest, fill_parts
from repmlp_deploy.evaluation.remote import is_uri
from repmlp_deploy.evaluation.sources import Source
from repmlp_deploy.evaluation.tables import count_errors, has_rows, merge_tables, read_job, result_schema
from repmlp_deploy.files import locked, put_file, read_text, replace_file
from repmlp_deploy.runtime.predictor import Predictor

__all__ = ["Engine", "Mapped", "Progress", "map_images"]

PART = 512  # images at most, rounded up to whole batches; what a killed run does again
_LEAST_PART = 32
_PARTS = 64  # or more, so that several processes end at about the same time
_LARGEST_JOB_BYTES = 1 << 16

Progress = Callable[[int, int, int], None]
"""(images done, images in all, errors of this run)."""


@dataclass(frozen=True)
class Mapped:
    """What a run did.

    Attributes:
        count: images in the output.
        resumed: of them, what earlier runs had done.
        errors: images of the output that have no prediction.
        new_errors: of them, those of this run.
    """

    count: int
    resumed: int
    errors: int
    new_errors: int


Engine = Callable[[Predictor, Source, Parts, Sequence[int]], Iterator[tuple[int, int]]]
"""Writes the missing parts, in any order; yields the number of each, and how many of its images have no prediction."""


def map_images(  # noqa: PLR0913 - what to run, on what, to where, and how
    predictor: Predictor,
    source: Source,
    out: Path,
    *,
    top: int = 5,
    batch: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Mapped:
    """Write the predictions for all images of a source to the parquet file `out`.

    Args:
        predictor: runs the bundle.
        source: the images.
        out: the file; until all is done, the parts are in the folder `out`.parts.
        top: how many classes a row names.
        batch: images the network gets at a time; by default the bundle's best.
        fresh: discard what earlier runs wrote, of whatever job; a file that no run wrote stays.
        progress: is called after every part.
        engine: makes the parts; by default this process.

    Raises:
        InputError: `out` is no table of this function, or it or its parts are of another job, or are damaged; or images
            have no prediction in the bundle's task.
        OutputError: it cannot be written.
    """
    manifest = predictor.manifest
    batch = batch or manifest.batch.opt
    digest = bundle_digest(manifest)
    size = _part_size(source.count, batch)
    about = [digest, predictor.format, top, batch, size, source.count, source.fingerprint]
    job = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    schema = result_schema(manifest.task, job)
    if is_uri(out):
        raise OutputError(f"--out {out} is a URI; expected a file of this machine: copy it to the store afterwards")
    if out.exists() and not out.is_file():
        kind = "a folder" if out.is_dir() else "no regular file"
        raise OutputError(f"--out {out} is {kind}; expected the name of a parquet file")
    folder = out.with_name(f"{out.name}.parts")
    parts = Parts(folder, job, digest, source.count, size, top, batch)
    try:
        _is_done(out, job, fresh=fresh)  # before anything is written
        with locked(folder / "job"):
            if _is_done(out, job, fresh=fresh):
                _discard(folder)
                return Mapped(source.count, source.count, count_errors(out), 0)
            _claim(folder, job, fresh=fresh)
            resumed, new_errors = _run(engine or fill_parts, predictor, source, parts, progress)
            merged = folder / "merged"
            errors = merge_tables([parts.path(i) for i in parts.numbers()], schema, merged)
            put_file(merged, out)
            _discard(folder)
    except (InputError, OutputError):
        raise
    except OSError as error:
        raise OutputError(f"--out {out} cannot be written: {error.strerror or error}") from None
    return Mapped(source.count, resumed, errors, new_errors)


def _part_size(count: int, batch: int) -> int:
    """Return how many images a part has: whole batches, at least one."""
    size = min(PART, max(_LEAST_PART, -(-count // _PARTS)))
    return -(-size // batch) * batch


def _is_done(out: Path, job: str, *, fresh: bool) -> bool:
    """Return whether `out` is the result of this job, and may stay.

    Raises:
        InputError: it is something else.
    """
    if not out.is_file() or not out.stat().st_size:  # an empty file, as mktemp makes it, holds nothing
        return False
    found = read_job(out)
    if found is None:
        raise InputError(f"--out {out} exists, and is no readable table of repmlp-map: name another file, or remove it")
    if found != job and not fresh:
        raise InputError(f"--out {out} exists, and is of another bundle, other images or other options: pass --fresh")
    return not fresh


def _claim(folder: Path, job: str, *, fresh: bool) -> None:
    """Make the folder of parts that of this job.

    Raises:
        InputError: it is another's.
    """
    name = folder / "job.json"
    try:
        said = json.loads(read_text(name, _LARGEST_JOB_BYTES)) if name.is_file() else None
    except ValueError:
        said = {}
    if said == {"job": job} and not fresh:
        return
    if said is not None and not fresh:
        raise InputError(f"{folder} is of another bundle, other images or other options: pass --fresh to discard it")
    for path in folder.glob("*.parquet"):
        path.unlink()
    replace_file(name, json.dumps({"job": job}).encode(), durable=True)


def _discard(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix != ".lock":  # last: whoever waits for the lock begins when it is gone
            with suppress(OSError):  # a folder of another program, or a file that a disk keeps
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _run(
    engine: Engine, predictor: Predictor, source: Source, parts: Parts, progress: Progress | None
) -> tuple[int, int]:
    """Have an engine write every part that is missing; return (images that were done before, errors of this run)."""
    missing = [i for i in parts.numbers() if not has_rows(parts.path(i), parts.images_of(i))]
    resumed = parts.count - sum(parts.images_of(i) for i in missing)
    done, errors = resumed, 0
    for part, failed in engine(predictor, source, parts, missing) if missing else ():
        done += parts.images_of(part)
        errors += failed
        if progress is not None:
            progress(done, parts.count, errors)
    return resumed, errors
