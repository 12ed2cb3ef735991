"""Parquet and Arrow files, read and written in parts. The only module that needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from repmlp_deploy.errors import InputError

__all__ = [
    "TABLE_SUFFIXES",
    "count_rows",
    "find_column",
    "merge_tables",
    "read_column",
    "read_job",
    "result_schema",
    "write_table",
]

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")

_COLUMNS = ("image", "bytes", "path")
_ROWS = 64  # images in memory at a time
_JOB = b"repmlp-map"

_ANSWERS: Mapping[str, Mapping[str, Any]] = {
    "classify": {
        "index": pa.int32(),
        "label": pa.string(),
        "score": pa.float32(),
        "top_indices": pa.list_(pa.int32()),
        "top_scores": pa.list_(pa.float32()),
    },
    "segment": {"mask": pa.binary()},
    "embed": {"embedding": pa.list_(pa.float32())},
}


def result_schema(task: str, job: str) -> Any:
    """Return the columns of a result; `job` is kept in the file's metadata.

    Raises:
        InputError: images have no prediction in this task.
    """
    if task not in _ANSWERS:
        raise InputError(f"the bundle's task is {task}; repmlp-map knows {', '.join(_ANSWERS)}")
    columns = {"row": pa.int64(), "key": pa.string(), **_ANSWERS[task], "bundle": pa.string(), "error": pa.string()}
    return pa.schema(list(columns.items()), metadata={_JOB: job.encode()})


def read_job(path: Path) -> str | None:
    """Return the job that a result is of; None if the file is no result.

    Raises:
        OSError: it cannot be read.
    """
    try:
        metadata = pa.parquet.read_schema(path).metadata or {}
    except pa.ArrowInvalid:
        return None
    return metadata[_JOB].decode(errors="replace") if _JOB in metadata else None


def write_table(rows: Sequence[Mapping[str, Any]], schema: Any, path: Path) -> None:
    """Write rows to a new file.

    Raises:
        OSError: it cannot be written.
    """
    pa.parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


def merge_tables(parts: Sequence[Path], schema: Any, path: Path) -> None:
    """Write the rows of all parts, in their order, to one file; one part is in memory at a time.

    Raises:
        OSError: it cannot be written, or a part cannot be read.
    """
    with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(pa.parquet.read_table(part, schema=schema))


def find_column(path: Path, name: str | None) -> str:
    """Return the column of a table that holds images.

    Raises:
        InputError: there is no such column, or it can hold none.
    """
    schema = _opened(path).schema
    found = name if name is not None else next((one for one in _COLUMNS if one in schema.names), None)
    if found is None or found not in schema.names:
        wanted = f"no column {name}" if name is not None else f"no column {' or '.join(_COLUMNS)}"
        raise InputError(f"--data {path} has {wanted}; it has {', '.join(schema.names)}: name one with --column")
    kind = schema.field(found).type
    types = pa.types
    text = types.is_string(kind) or types.is_large_string(kind)
    if not (text or types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)):
        raise InputError(f"--data {path}: column {found} is {kind}; expected encoded images, paths, or both")
    return found


def count_rows(path: Path) -> int:
    """Return how many rows a table has."""
    return int(_opened(path).count_rows())


def read_column(path: Path, name: str, first: int) -> Iterator[Any]:
    """Yield the values of a column from row `first` on."""
    seen = 0
    how = {"batch_size": _ROWS, "batch_readahead": 1, "fragment_readahead": 1, "use_threads": False}
    try:
        for batch in _opened(path).to_batches(columns=[name], **how):
            if seen + len(batch) > first:
                for value in batch.column(0)[max(0, first - seen) :]:
                    yield value.as_py()
            seen += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"--data {path} cannot be read after row {seen}: {error}") from None


def _opened(path: Path) -> Any:
    kind = "parquet" if path.suffix.lower() == ".parquet" else "ipc"
    try:
        return pa.dataset.dataset(path, format=kind)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"--data {path} cannot be read as {kind}: {error}") from None
