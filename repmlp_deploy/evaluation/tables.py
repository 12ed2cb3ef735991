"""Parquet and Arrow files, read and written in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from repmlp_deploy.errors import InputError
from repmlp_deploy.text import first_line

__all__ = [
    "TABLE_SUFFIXES",
    "count_errors",
    "count_rows",
    "find_column",
    "has_rows",
    "merge_tables",
    "read_column",
    "read_job",
    "result_schema",
    "write_table",
]

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")

_COLUMNS = ("image", "bytes", "path")
_PARQUET = ".parquet"
_ROWS = 64  # images in memory at a time
_BUFFER_BYTES = 1 << 20  # of a column chunk, instead of all of it
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
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        return None
    return metadata[_JOB].decode(errors="replace") if _JOB in metadata else None


def _is_damage(error: Exception) -> bool:
    """Return whether an error says that a file is damaged, and not that the disk fails or memory is short."""
    return not isinstance(error, MemoryError) and getattr(error, "errno", None) is None


def write_table(rows: Sequence[Mapping[str, Any]], schema: Any, path: Path) -> None:
    """Write rows to a new file.

    Raises:
        OSError: it cannot be written.
    """
    pa.parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


def merge_tables(parts: Sequence[Path], schema: Any, path: Path) -> int:
    """Write the rows of all parts, in their order, to one file, and return how many of them have an error.

    One part is in memory at a time.

    Raises:
        OSError: it cannot be written.
        InputError: a part is damaged; it is removed.
    """
    errors = 0
    with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in parts:
            try:
                table = pa.parquet.read_table(part, schema=schema)
            except (pa.ArrowException, OSError) as error:
                if not _is_damage(error):
                    raise
                part.unlink(missing_ok=True)
                raise InputError(
                    f"{part} was damaged, and is removed ({first_line(error)}): run the same command to make it again"
                ) from None
            errors += _errors_of(table)
            writer.write_table(table)
    return errors


def count_errors(path: Path) -> int:
    """Return how many rows of a result have an error.

    Raises:
        InputError: it is damaged.
    """
    try:
        with pa.parquet.ParquetFile(path) as file:
            return sum(_errors_of(batch) for batch in file.iter_batches(columns=["error"]))
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        raise InputError(f"{path} is damaged ({first_line(error)}): pass --fresh to make it again") from None


def has_rows(path: Path, count: int) -> bool:
    """Return whether there is a parquet file of so many rows; its values are not read."""
    try:
        return bool(pa.parquet.read_metadata(path).num_rows == count)
    except FileNotFoundError:
        return False
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        return False


def _errors_of(rows: Any) -> int:
    return int(rows.num_rows - rows["error"].null_count)


def find_column(path: str, name: str | None, filesystem: Any = None) -> str:
    """Return the column of a table that holds images.

    Raises:
        InputError: there is no such column, or it can hold none.
    """
    schema = _opened(path, filesystem).schema
    found = name if name is not None else next((one for one in _COLUMNS if one in schema.names), None)
    if found is None or found not in schema.names:
        wanted = f"no column {name}" if name is not None else f"no column {' or '.join(_COLUMNS)}"
        raise InputError(f"--data {path} has {wanted}; it has {', '.join(schema.names)}: name one with --column")
    kind = schema.field(found).type
    if not (_is_text(kind) or _is_bytes(kind) or _is_both(kind)):
        raise InputError(
            f"--data {path}: column {found} is {kind}; expected encoded images, paths, or both (struct<bytes, path>)"
        )
    return found


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_both(kind: Any) -> bool:
    """Return whether a column holds structures with encoded images, paths, or both; one of them may be empty."""
    if not pa.types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    given = [
        (right, fields[name])
        for name, right in (("bytes", _is_bytes), ("path", _is_text))
        if name in fields and not pa.types.is_null(fields[name])
    ]
    return bool(given) and all(right(field) for right, field in given)


def count_rows(path: str, filesystem: Any = None) -> int:
    """Return how many rows a table has."""
    return int(_opened(path, filesystem).count_rows())


def read_column(path: str, name: str, first: int, filesystem: Any = None) -> Iterator[Any]:
    """Yield the values of a column from row `first` on; of a parquet file, row groups before it are not read."""
    seen = 0
    try:
        if path.lower().endswith(_PARQUET):
            skipped, batches = _after(path, name, first, filesystem)
        else:
            how = {"batch_size": _ROWS, "batch_readahead": 1, "fragment_readahead": 1, "use_threads": False}
            skipped, batches = 0, _opened(path, filesystem).to_batches(columns=[name], **how)
        seen = skipped
        for batch in batches:
            if seen + len(batch) > first:
                for value in batch.column(0)[max(0, first - seen) :]:
                    yield value.as_py()
            seen += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"--data {path} cannot be read after row {seen}: {error}") from None


def _after(path: str, name: str, first: int, filesystem: Any) -> tuple[int, Iterator[Any]]:
    """Return how many rows lie in the row groups before row `first`, and the batches of the others."""
    file = pa.parquet.ParquetFile(path, filesystem=filesystem, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    skipped, group = 0, 0
    while group < file.num_row_groups and skipped + file.metadata.row_group(group).num_rows <= first:
        skipped += file.metadata.row_group(group).num_rows
        group += 1
    groups = [*range(group, file.num_row_groups)]
    return skipped, file.iter_batches(_ROWS, row_groups=groups, columns=[name], use_threads=False)


def _opened(path: str, filesystem: Any) -> Any:
    kind = "parquet" if path.lower().endswith(_PARQUET) else "ipc"
    try:
        return pa.dataset.dataset(path, format=kind, filesystem=filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"--data {path} cannot be read as {kind}: {error}") from None
