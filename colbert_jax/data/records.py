"""Rows kept as ArrayRecord files, so that any batch of them can be read at random."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from colbert_jax.data.rows import Row
from colbert_jax.errors import UserError

RECORD_FILE = "rows.array_record"
MANIFEST_FILE = "manifest.json"

# One row a group, or reading one row would mean decompressing its neighbours.
_WRITER_OPTIONS = "group_size:1,zstd:1"
# Read-ahead would fetch neighbours that a shuffled order does not want.
_READER_OPTIONS = "readahead_buffer_size:0"
_READER_BUFFER_BYTES = 32768
_LOG_EVERY_ROWS = 1_000_000

_logger = logging.getLogger(__name__)


@runtime_checkable
class Source(Protocol):
    """Rows that can be read in any order, from several threads at once."""

    @property
    def min_documents(self) -> int:
        """The number of documents of the row that has fewest, at least 1."""

    @property
    def has_scores(self) -> bool:
        """Whether the rows (all of them, or none) carry a teacher's scores."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Row: ...

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Row]: ...


class ListSource:
    """A `Source` over rows in memory.

    Raises:
      UserError: there are no rows, or only some of them have scores.
    """

    def __init__(self, rows: Iterable[Row], name: str = "the rows given"):
        self._rows = list(rows)
        summary = _Summary(name)
        for row in self._rows:
            summary.add(row)
        summary.check_not_empty()
        self.min_documents: int = summary.min_documents
        self.has_scores: bool = summary.has_scores

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self._rows[index]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Row]:
        return [self._rows[index] for index in indices]


class RecordSource:
    """A `Source` over a folder that `write_records` made.

    It may be pickled, and shared between threads: ArrayRecord's batched read keeps no position in
    the file. `__getitems__` is the one to use; row by row is tens of times slower.

    Raises:
      UserError: the folder is missing, half-written or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self._count: int = manifest["count"]
        self.min_documents: int = manifest["min_documents"]
        self.max_documents: int = manifest["max_documents"]
        self.has_scores: bool = manifest["has_scores"]
        self.description: dict[str, Any] = manifest["description"]
        self._reader: ArrayRecordReader | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Row]:
        """Returns the rows at `indices`, in that order, from one read.

        Raises:
          IndexError: an index is not in `[0, len(self))`.
          UserError: the file is damaged.
        """
        positions = [index.__index__() for index in indices]
        if not positions:
            return []
        if min(positions) < 0 or max(positions) >= self._count:
            raise IndexError(f"an index is outside the {self._count} rows of {self.folder}")
        try:
            records = self._open_reader().read(positions)
        except RuntimeError as error:
            reason = str(error).partition(";")[0]
            raise UserError(
                f"{self.folder} cannot be read ({reason}): remove it, so that it is written anew."
            ) from None
        return [json.loads(record) for record in records]

    def _open_reader(self) -> ArrayRecordReader:
        with self._lock:
            if self._reader is None:
                self._reader = ArrayRecordReader(
                    os.fspath(self.folder / RECORD_FILE),
                    options=_READER_OPTIONS,
                    file_reader_buffer_size=_READER_BUFFER_BYTES,
                )
            return self._reader

    def __getstate__(self) -> dict[str, Any]:
        # Neither crosses to another process, which opens the file itself.
        return {**self.__dict__, "_reader": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"RecordSource({str(self.folder)!r})"


def write_records(folder: str | Path, rows: Iterable[Row], *, description: dict[str, Any]) -> None:
    """Writes `rows` to a new `folder` that `RecordSource` reads, holding one row at a time.

    All is written to a folder beside it that takes its name when complete. If another process has
    made `folder` by then, that one is kept.

    Args:
      folder: must not exist.
      rows: all with scores or all without.
      description: where the rows come from, for the manifest; JSON-serialisable.

    Raises:
      UserError: `folder` exists or cannot be written, there are no rows, or only some of them have
        scores.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or choose another folder.")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}): choose another folder."
        ) from None
    try:
        manifest = _write_rows(partial / RECORD_FILE, rows, name=str(folder))
        manifest["description"] = description
        _write_durably(partial / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cached_records(
    cache_dir: str | Path, name: str, fingerprint: str, make_rows: Callable[[], Iterable[Row]]
) -> RecordSource:
    """Returns the records of `fingerprint`, which it first writes if they are not in `cache_dir`.

    Processes that build the same records at once do double work, but each ends with a whole copy.

    Args:
      cache_dir: holds one folder for each name and fingerprint; made if missing.
      name: what the rows are called, which begins the folder's name.
      fingerprint: changes whenever the rows would, such as a file's digest or a commit.
      make_rows: called only if the rows must be written.

    Raises:
      UserError: as `write_records` and `RecordSource` do.
    """
    digest = hashlib.sha256(json.dumps([name, fingerprint]).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:80]}-{digest}"
    if not folder.exists():
        _logger.info("writing the rows of %s to %s", name, folder)
        write_records(folder, make_rows(), description={"name": name, "fingerprint": fingerprint})
    return RecordSource(folder)


class _Summary:
    """What a manifest says of the rows, gathered as they go by."""

    def __init__(self, name: str):
        self.name = name
        self.count = 0
        self.min_documents = 0
        self.max_documents = 0
        self.has_scores = False

    def add(self, row: Row) -> None:
        count, scored = len(row["documents"]), row["scores"] is not None
        if self.count == 0:
            self.min_documents, self.has_scores = count, scored
        elif scored != self.has_scores:
            raise UserError(
                f"{self.name}: row {self.count + 1} is {'with' if scored else 'without'} scores "
                "unlike those before it: give all rows of a source scores, or none."
            )
        self.count += 1
        self.min_documents = min(self.min_documents, count)
        self.max_documents = max(self.max_documents, count)

    def check_not_empty(self) -> None:
        if self.count == 0:
            raise UserError(f"{self.name}: there are no rows: give a source that has some.")


def _write_rows(path: Path, rows: Iterable[Row], *, name: str) -> dict[str, Any]:
    summary = _Summary(name)
    digest = hashlib.sha256()
    writer = ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
    try:
        for row in rows:
            summary.add(row)
            record = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
            # Of the rows as they pass, since a digest of the file would mean reading it again.
            digest.update(record + b"\n")
            _checked_write(name, writer.write, record)
            if summary.count % _LOG_EVERY_ROWS == 0:
                _logger.info("%s: %d rows written", name, summary.count)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error is the one to report
            writer.close()
        raise
    _checked_write(name, writer.close)
    summary.check_not_empty()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {
        "count": summary.count,
        "min_documents": summary.min_documents,
        "max_documents": summary.max_documents,
        "has_scores": summary.has_scores,
        "rows_sha256": digest.hexdigest(),
        "file_bytes": path.stat().st_size,
    }


def _checked_write(name: str, write: Callable[..., None], *record: bytes) -> None:
    try:
        write(*record)
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"{name} cannot be written ({reason}): make room there, or choose another folder."
        ) from None


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # A folder that is not empty cannot be replaced: another process was first.
        if not (folder / MANIFEST_FILE).is_file():
            raise
        _logger.info("%s was written by another process meanwhile; that one is kept", folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        written, found = manifest["file_bytes"], (folder / RECORD_FILE).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} is not a complete folder of records: remove it, so that it is written anew."
        ) from None
    if found != written:
        raise UserError(
            f"{folder / RECORD_FILE} has {found} bytes where {written} were written: remove its "
            "folder, so that it is written anew."
        )
    return manifest
