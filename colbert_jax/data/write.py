"""Training rows into a file that any phase reads: JSON Lines, gzipped or not, or Parquet."""

import contextlib
import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from colbert_jax.data.rows import MAX_ROW_BYTES
from colbert_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

_BATCH_ROWS = 1024

# Known by name, since a column of nothing but empty lists, or of whole numbers, tells too little.
_TYPES = {
    "query": pa.string(),
    "document": pa.string(),
    "negative": pa.list_(pa.string()),
    "documents": pa.list_(pa.string()),
    "scores": pa.list_(pa.float64()),
}


@contextlib.contextmanager
def open_writer(path: str | Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Opens a file to write rows to, which appears whole or not at all.

    Args:
      path: ends in one of `SUFFIXES`; it must not exist.

    Yields:
      `write(row)`; all rows must have the same columns, of those that training rows have.

    Raises:
      UserError: the file exists, cannot be written or is of another kind, or a row is too long.
    """
    path = Path(path)
    check_output(path)
    partial = path.with_name(f".{path.name}.unfinished")
    try:
        with (_write_parquet if path.suffix == ".parquet" else _write_lines)(
            partial, path
        ) as write:
            yield write
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): mend that and run it again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # what cannot be written now may never have been there
            partial.unlink(missing_ok=True)


def check_output(path: str | Path) -> None:
    """Raises `UserError` where `open_writer` would, before any work is done."""
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"--output={path}: its name must end in one of {', '.join(SUFFIXES)}.")
    try:
        exists = path.exists()
    except OSError as error:
        raise UserError(
            f"--output={path} cannot be written ({error.strerror}): choose another name."
        ) from error
    if exists:
        raise UserError(f"--output={path} exists: remove it, or choose another name.")
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: there is no folder {path.parent}; make it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--output={path}: you may not write to {path.parent}; choose another folder."
        )


@contextlib.contextmanager
def _write_lines(partial: Path, path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    with gzip.open(partial, "wb") if path.suffix == ".gz" else partial.open("wb") as file:

        def write(row: dict[str, Any]) -> None:
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            if len(line) > MAX_ROW_BYTES:  # training would pass over it
                raise UserError(
                    f"--output={path}: the row of the query {row['query'][:80]!r} is longer than "
                    f"the {MAX_ROW_BYTES >> 20} MiB that a line may have; write .parquet instead."
                )
            file.write(line)

        yield write


@contextlib.contextmanager
def _write_parquet(partial: Path, path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    del path
    rows: list[dict[str, Any]] = []
    writer: pq.ParquetWriter | None = None

    def flush() -> None:
        nonlocal writer
        schema = pa.schema([(name, _TYPES[name]) for name in rows[0]] if rows else [])
        if writer is None:
            writer = pq.ParquetWriter(partial, schema)
        writer.write_table(pa.Table.from_pylist(rows, schema))
        rows.clear()

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == _BATCH_ROWS:
            flush()

    try:
        yield write
        if rows or writer is None:
            flush()
    finally:
        if writer is not None:
            writer.close()
