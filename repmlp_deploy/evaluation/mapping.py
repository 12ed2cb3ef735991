"""Predictions for any number of images, in a parquet file; a run that was killed goes on where it was.

Images are numbered in the order of their source, and cut into parts of a fixed number of them. A part is a file beside
the output, written whole or not at all. A run does the parts that are missing, then joins all of them, so every image
is in the output exactly once. The folder of parts names the job that it belongs to: bundle, artifact, options, images.
Threads decode the next images while the network runs. What is in memory does not depend on the number of images, except
for the paths of a folder, a glob or a list. An engine says where parts are made: here, or by other processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from repmlp_deploy.bundle import Manifest
from repmlp_deploy.errors import ImageError, InputError, OutputError
from repmlp_deploy.evaluation.sources import Item, Source
from repmlp_deploy.evaluation.tables import merge_tables, read_job, result_schema, write_table
from repmlp_deploy.files import locked, put_file, read_text, replace_file
from repmlp_deploy.runtime.decoding import Decoder
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.runtime.tasks import Embedding, Prediction, Segmentation, find_task
from repmlp_deploy.text import printable

__all__ = ["Engine", "Mapped", "Parts", "Progress", "bundle_digest", "fill_parts", "map_images"]

PART = 512  # images; what a killed run does again
_LONGEST_ERROR = 500
_LARGEST_JOB_BYTES = 1 << 16

Progress = Callable[[int, int, int], None]
"""(images done, images in all, errors of this run)."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Mapped:
    """What a run did.

    Attributes:
        count: images in the output.
        resumed: of them, what earlier runs had done.
        errors: images of this run that have no prediction.
    """

    count: int
    resumed: int
    errors: int


@dataclass(frozen=True)
class Parts:
    """The parts of a job, and what their rows hold.

    Attributes:
        folder: where they are.
        job: hash of what the rows depend on.
        bundle: digest of the bundle that makes them.
        count: images in all.
        size: images of a part; the last may have fewer.
        top: how many classes a row names.
        batch: images the network gets at a time.
    """

    folder: Path
    job: str
    bundle: str
    count: int
    size: int
    top: int
    batch: int

    def path(self, part: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"{part * self.size:012d}.parquet"

    def images_of(self, part: int) -> int:
        """Return how many images a part has."""
        return min(self.size, self.count - part * self.size)

    def numbers(self) -> range:
        """Return the numbers of all parts."""
        return range(-(-self.count // self.size))


Engine = Callable[[Predictor, Source, Parts, Sequence[int]], Iterator[tuple[int, int]]]
"""Writes the missing parts, in any order; yields the number of each, and how many of its images have no prediction."""


def bundle_digest(manifest: Manifest) -> str:
    """Return the SHA-256 of a manifest, which names the SHA-256 of every file of its bundle."""
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()


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
        fresh: discard what earlier runs wrote, of whatever job.
        progress: is called after every part.
        engine: makes the parts; by default this process.

    Raises:
        InputError: `out` or its parts are of another job; or images have no prediction in the bundle's task.
        OutputError: it cannot be written.
    """
    manifest = predictor.manifest
    batch = batch or manifest.batch.opt
    digest = bundle_digest(manifest)
    about = [digest, predictor.format, top, batch, PART, source.count, source.fingerprint]
    job = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    schema = result_schema(manifest.task, job)
    if out.is_dir():
        raise OutputError(f"--out {out} is a folder; expected the name of a parquet file")
    folder = out.with_name(f"{out.name}.parts")
    parts = Parts(folder, job, digest, source.count, PART, top, batch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "job"):
            if out.is_file() and not fresh and _is_done(out, job):
                _discard(folder)
                return Mapped(source.count, source.count, 0)
            _claim(folder, job, fresh=fresh)
            found = _run(engine or fill_parts, predictor, source, parts, progress)
            merged = folder / "merged"
            merge_tables([parts.path(i) for i in parts.numbers()], schema, merged)
            put_file(merged, out)
            _discard(folder)
    except InputError:
        raise
    except OSError as error:
        raise OutputError(f"--out {out} cannot be written: {error.strerror or error}") from None
    return found


def _is_done(out: Path, job: str) -> bool:
    """Return whether `out` is the result of this job.

    Raises:
        InputError: it is something else.
    """
    if read_job(out) == job:
        return True
    raise InputError(f"--out {out} exists, and is of another bundle, other images or other options: pass --fresh")


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
    shutil.rmtree(folder, ignore_errors=True)


def _run(engine: Engine, predictor: Predictor, source: Source, parts: Parts, progress: Progress | None) -> Mapped:
    """Have an engine write every part that is missing."""
    missing = [i for i in parts.numbers() if not parts.path(i).is_file()]
    resumed = parts.count - sum(parts.images_of(i) for i in missing)
    done, errors = resumed, 0
    for part, failed in engine(predictor, source, parts, missing) if missing else ():
        done += parts.images_of(part)
        errors += failed
        if progress is not None:
            progress(done, parts.count, errors)
    return Mapped(parts.count, resumed, errors)


def fill_parts(predictor: Predictor, source: Source, parts: Parts, missing: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Write parts in this process, in their order: the engine `local`. See `Engine`.

    Raises:
        InputError: the bundle is not that of the parts, or the source has fewer images than it had.
    """
    if bundle_digest(predictor.manifest) != parts.bundle:
        raise InputError("the bundle changed during the run; run again with --fresh")
    schema = result_schema(predictor.manifest.task, parts.job)
    rows = _rows(predictor, _wanted(source, missing, parts.size), parts)
    for part in missing:
        some = list(islice(rows, parts.images_of(part)))
        if len(some) != parts.images_of(part):
            raise InputError(f"the images changed during the run: {parts.count} were expected; pass --fresh")
        partial = parts.folder / f"{uuid.uuid4().hex}.new"
        write_table(some, schema, partial)
        put_file(partial, parts.path(part))
        yield part, sum(row["error"] is not None for row in some)


def _wanted(source: Source, missing: Sequence[int], size: int) -> Iterator[tuple[int, Item]]:
    """Yield the images of the missing parts, with their numbers."""
    first, wanted = missing[0] * size, {*missing}
    for number, item in enumerate(source.items(first), first):
        if number // size > missing[-1]:
            return
        if number // size in wanted:
            yield number, item


def _rows(predictor: Predictor, numbered: Iterator[tuple[int, Item]], parts: Parts) -> Iterator[Row]:
    """Yield one row per image, in order; the images of the next batch are decoded while one runs."""
    decoder, how, batch = Decoder(), predictor.manifest.preprocessing, parts.batch
    ahead: deque[tuple[int, Item, Future[Any] | None]] = deque()
    try:
        for number, item in numbered:
            future = None if isinstance(item.content, ImageError) else decoder.submit(item.content, how)
            ahead.append((number, Item(item.key, item.content if future is None else b""), future))
            if len(ahead) >= 2 * batch:
                yield from _answered(predictor, [ahead.popleft() for _ in range(batch)], parts)
        while ahead:
            yield from _answered(predictor, [ahead.popleft() for _ in range(min(batch, len(ahead)))], parts)
    finally:
        for _, _, future in ahead:
            if future is not None:
                future.cancel()
        decoder.close()


def _answered(predictor: Predictor, some: Sequence[tuple[int, Item, Future[Any] | None]], parts: Parts) -> list[Row]:
    """Return the rows of one batch."""
    manifest = predictor.manifest
    rows, good, inputs, sizes = list[Row](), list[Row](), list[Any](), list[tuple[int, int]]()
    for number, item, future in some:
        row: Row = {"row": number, "key": _stored(item.key), "bundle": parts.bundle, "error": None}
        rows.append(row)
        try:
            if future is None:
                raise item.content if isinstance(item.content, ImageError) else ImageError("there is no image")
            values, size = future.result()
        except ImageError as error:
            row["error"] = printable(error, _LONGEST_ERROR)
        else:
            good.append(row)
            inputs.append(values)
            sizes.append(size)
    if good:
        outputs = predictor.logits(np.stack(inputs))
        answers = find_task(manifest.task).answer(outputs, sizes, manifest.labels, manifest.scores)
        for row, answer in zip(good, answers, strict=True):
            row.update(_columns(answer, parts.top))
    return rows


def _stored(key: str) -> str:
    """Return a key as it stands in a table: unchanged, except that bytes of a name that are no UTF-8 are escaped."""
    return key.encode("utf-8", "backslashreplace").decode()


def _columns(answer: Any, top: int) -> Row:
    """Return what a row says of an answer."""
    if isinstance(answer, Prediction):
        best = answer.top(top)
        return {
            "index": answer.pred_label,
            "label": answer.pred_class,
            "score": answer.pred_score,
            "top_indices": [index for index, _ in best],
            "top_scores": [score for _, score in best],
        }
    if isinstance(answer, Segmentation):
        return {"mask": answer.mask_png()}
    if isinstance(answer, Embedding):
        return {"embedding": answer.vector.tolist()}
    raise InputError(f"an answer is a {type(answer).__name__}; expected one that a table can hold")
