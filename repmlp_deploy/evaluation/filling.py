"""Parts of a job, and how one process makes them: images in, rows out.

Threads read, decode and preprocess the images of the next batch while the network runs the present one. A batch never
crosses from one part to another, so a part holds the same bits, whichever process makes it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Manifest
from repmlp_deploy.card import Preprocessing
from repmlp_deploy.errors import ImageError, InputError, OutputError
from repmlp_deploy.evaluation.sources import Item, Source
from repmlp_deploy.evaluation.tables import result_schema, write_table
from repmlp_deploy.files import put_file
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.images import network_input
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.runtime.tasks import Embedding, Prediction, Segmentation, find_task
from repmlp_deploy.text import printable

__all__ = ["Parts", "bundle_digest", "chunks_of", "fill_parts"]

_LONGEST_ERROR = 500
_MOST_READERS = 16

Row = dict[str, Any]


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


@dataclass(frozen=True)
class _Read:
    """An image as the network takes it with its (height, width), or why there is none."""

    number: int
    key: str
    values: NDArray[Any] | None = None
    size: tuple[int, int] = (0, 0)
    error: str = ""


def bundle_digest(manifest: Manifest) -> str:
    """Return the SHA-256 of a manifest, which names the SHA-256 of every file of its bundle."""
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()


def chunks_of(missing: Sequence[int], count: int) -> deque[deque[int]]:
    """Cut the missing parts into at most `count` runs of neighbours: a chunk is read in one go."""
    size = -(-len(missing) // count)
    return deque(deque(missing[start : start + size]) for start in range(0, len(missing), size))


def fill_parts(
    predictor: Predictor, source: Source, parts: Parts, missing: Sequence[int], *, readers: int | None = None
) -> Iterator[tuple[int, int]]:
    """Write parts in this process, in their order; yield each with how many of its images have no prediction.

    Args:
        predictor: runs the bundle.
        source: the images.
        parts: of the job.
        missing: the parts to write, in ascending order.
        readers: threads that read and decode; by default what the source and the CPUs call for.

    Raises:
        InputError: the bundle is not that of the parts, or the source has fewer images than it had.
        OutputError: a part cannot be written.
    """
    if bundle_digest(predictor.manifest) != parts.bundle:
        raise InputError("the bundle changed during the run; run again with --fresh")
    schema = result_schema(predictor.manifest.task, parts.job)
    threads = max(readers or min(usable_cpus(), _MOST_READERS), source.readers)
    rows: list[Row] = []
    waiting = deque(missing)
    for read in _batches(source, parts, missing, predictor.manifest.preprocessing, threads):
        rows += _answered(predictor, read, parts)
        if len(rows) == parts.images_of(waiting[0]):
            _write(rows, schema, parts.path(waiting[0]))
            yield waiting.popleft(), sum(row["error"] is not None for row in rows)
            rows = []
    if waiting:
        raise InputError(f"the images changed during the run: {parts.count} were expected; pass --fresh")


def _write(rows: Sequence[Row], schema: Any, path: Path) -> None:
    """Write a part, whole or not at all."""
    partial = path.with_name(f"{uuid.uuid4().hex}.new")
    try:
        write_table(rows, schema, partial)
        put_file(partial, path)
    except OSError as error:  # here: it may be raised in a process of its own
        raise OutputError(f"{path.parent} cannot be written: {error.strerror or error}") from None


def _batches(
    source: Source, parts: Parts, missing: Sequence[int], how: Preprocessing, threads: int
) -> Iterator[list[_Read]]:
    """Yield the images of the missing parts, one batch at a time; the next one is read meanwhile.

    A thread gets a slice of a batch at a time: handing over every image by itself costs more than decoding a small one.
    """
    items = _wanted(source, missing, parts.size)
    ahead: deque[list[Future[list[_Read]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for part in missing:
                left = parts.images_of(part)
                while some := list(islice(items, min(parts.batch, left))):
                    left -= len(some)
                    size = -(-len(some) // threads)
                    slices = [some[start : start + size] for start in range(0, len(some), size)]
                    ahead.append([pool.submit(_read, few, how) for few in slices])
                    if len(ahead) > 1:
                        yield _finished(ahead.popleft())
            while ahead:
                yield _finished(ahead.popleft())
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()


def _finished(futures: Sequence[Future[list[_Read]]]) -> list[_Read]:
    return [read for future in futures for read in future.result()]


def _wanted(source: Source, missing: Sequence[int], size: int) -> Iterator[tuple[int, Item]]:
    """Yield the images of the missing parts, with their numbers."""
    first, wanted = missing[0] * size, {*missing}
    for number, item in enumerate(source.items(first), first):
        if number // size > missing[-1]:
            return
        if number // size in wanted:
            yield number, item


def _read(numbered: Sequence[tuple[int, Item]], how: Preprocessing) -> list[_Read]:
    """Return images as the network takes them."""
    found = []
    for number, item in numbered:
        try:
            values, size = network_input(item.encoded(), how)
        except ImageError as error:
            found.append(_Read(number, item.key, error=printable(error, _LONGEST_ERROR)))
        else:
            found.append(_Read(number, item.key, values, size))
    return found


def _answered(predictor: Predictor, read: Sequence[_Read], parts: Parts) -> list[Row]:
    """Return the rows of one batch."""
    manifest = predictor.manifest
    rows: list[Row] = [
        {"row": one.number, "key": _stored(one.key), "bundle": parts.bundle, "error": one.error or None} for one in read
    ]
    good = [(row, one) for row, one in zip(rows, read, strict=True) if one.values is not None]
    if good:
        outputs = predictor.logits(np.stack([one.values for _, one in good]))  # type: ignore[misc] # none is None
        sizes = [one.size for _, one in good]
        answers = find_task(manifest.task).answer(outputs, sizes, manifest.labels, manifest.scores)
        for (row, _), answer in zip(good, answers, strict=True):
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
