"""Where the rows of a source come from, stretch by stretch: files, joined tables, or memory."""

import ast
import contextlib
import hashlib
import itertools
import json
import reprlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from colbert_jax.data.rows import (
    MAX_ROW_BYTES,
    Part,
    Row,
    RowError,
    check_scores,
    is_unicode,
    read_rows,
    read_table,
    require_columns,
    split_table,
)
from colbert_jax.errors import UserError, one_line

# Finest grain at which a file is cut: what is read again, at worst, to begin in its midst.
_MARK_ROWS = 10_000
_JOIN_ROWS = 256  # rows whose texts are looked up together


class Stretch(NamedTuple):
    """A part of one of a table's files, whose first row is the table's row `first` from 0."""

    file: int
    part: Part
    first: int


class Place(NamedTuple):
    """Where a row stands: its number in the table from 0, and in words."""

    ordinal: int
    name: str


class Table(Protocol):
    """The rows of one source, that any process can read a stretch of."""

    @property
    def description(self) -> dict[str, Any]:
        """What a manifest says of the files: names, sizes, digests or a revision."""

    def stretches(self) -> list[Stretch]:
        """All rows in order, cut finely."""

    def read(self, stretch: Stretch) -> Iterator[tuple[Place, Row | RowError]]:
        """The rows of a stretch, which may join several of `stretches()` in one file."""


@dataclass(frozen=True)
class FilesTable:
    """Rows of JSON-lines or Parquet files, one after another.

    Attributes:
      paths: where the files lie.
      names: what messages call them.
      columns: as in `read_rows`.
      description: for the manifest.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    columns: Mapping[str, str]
    description: dict[str, Any]

    def stretches(self) -> list[Stretch]:
        """All rows in order, cut at about every ten thousandth."""
        return _file_stretches(self.paths)

    def read(self, stretch: Stretch) -> Iterator[tuple[Place, Row | RowError]]:
        """The rows of a stretch."""
        file, part, first = stretch
        for number, row in read_rows(self.paths[file], self.columns, part):
            place = Place(first + number - 1 - part.start, f"{self.names[file]}, row {number}")
            yield place, row


@dataclass(frozen=True)
class JoinedTable:
    """Distillation rows whose texts lie in tables of their own, joined by id on disk.

    The table of rows has `query_id`, `document_ids` and `scores`; lists may be the text of one.

    Attributes:
      paths: the files of that table.
      names: what messages call them.
      texts: the database that `index_texts` made.
      description: for the manifest.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    texts: Path
    description: dict[str, Any]

    def stretches(self) -> list[Stretch]:
        """All rows in order, cut at about every ten thousandth."""
        return _file_stretches(self.paths)

    def read(self, stretch: Stretch) -> Iterator[tuple[Place, Row | RowError]]:
        """The rows of a stretch, with their texts."""
        file, part, first = stretch
        choose = require_columns("query_id", "document_ids", "scores")
        records = read_table(self.paths[file], choose, part)
        with contextlib.closing(
            sqlite3.connect(f"{self.texts.absolute().as_uri()}?mode=ro", uri=True)
        ) as texts:
            while block := list(_take(records, _JOIN_ROWS)):
                parsed = [(number, _parse_joined(record)) for number, record in block]
                known = _look_up(texts, [ids for _, ids in parsed if not isinstance(ids, RowError)])
                for number, ids in parsed:
                    name = f"{self.names[file]}, row {number}"
                    yield Place(first + number - 1 - part.start, name), _with_texts(ids, known)


@dataclass(frozen=True)
class RowsTable:
    """Rows in memory."""

    rows: tuple[Row, ...]
    description: dict[str, Any]

    def stretches(self) -> list[Stretch]:
        """All rows in one."""
        return [Stretch(0, Part(0, len(self.rows)), 0)]

    def read(self, stretch: Stretch) -> Iterator[tuple[Place, Row | RowError]]:
        """The rows of a stretch."""
        start, rows, _ = stretch.part
        stop = None if rows is None else start + rows
        for index, row in enumerate(self.rows[start:stop], start):
            yield Place(index, f"row {index + 1}"), row


class SequentialReader:
    """Reads the stretches of a table one after another without opening a file twice.

    Beginning in the midst of a compressed file means decompressing all before it.
    """

    def __init__(self, table: Table):
        self._table = table
        self._rows: Iterator[tuple[Place, Row | RowError]] = iter(())
        self._next = (-1, -1)  # file, row of it
        self._held: list[tuple[Place, Row | RowError]] = []

    def read(self, stretch: Stretch) -> Iterator[tuple[Place, Row | RowError]]:
        """The rows of a stretch, as `table.read` gives them."""
        file, part, first = stretch
        if self._next != (file, part.start):
            rest = Part(part.start, None, part.offset)
            self._rows, self._held = self._table.read(Stretch(file, rest, first)), []
        self._next = (-1, -1)  # until all of it was read
        stop = first + (part.rows or 0)
        held, self._held = self._held, []
        for place, row in itertools.chain(held, self._rows):
            if part.rows is not None and place.ordinal >= stop:
                self._held = [(place, row)]
                break
            yield place, row
        self._next = (file, part.start + (part.rows or 0))


def _file_stretches(paths: Sequence[Path]) -> list[Stretch]:
    stretches, first = [], 0
    for file, path in enumerate(paths):
        for part in split_table(path, _MARK_ROWS):
            stretches.append(Stretch(file, part, first))
            first += part.rows or 0
    if not stretches:
        raise UserError(f"{paths[0]} has no rows: give a file that has some, or leave it out.")
    return stretches


def group_stretches(stretches: Sequence[Stretch], rows: int) -> list[tuple[Stretch, ...]]:
    """Gathers stretches that follow one another until each group, but the last, has so many rows.

    Neighbours of one file are joined into one stretch.
    """
    groups: list[list[Stretch]] = []
    count = rows
    for stretch in stretches:
        if count >= rows:
            groups.append([])
            count = 0
        group, added = groups[-1], stretch.part.rows or 0
        if group and group[-1].file == stretch.file:
            joined = group[-1].part._replace(rows=(group[-1].part.rows or 0) + added)
            group[-1] = group[-1]._replace(part=joined)
        else:
            group.append(stretch)
        count += added
    return [tuple(group) for group in groups]


def describe_files(paths: Sequence[Path]) -> dict[str, Any]:
    """Sizes and SHA-256 of local files, for a manifest.

    Raises:
      UserError: a file cannot be read.
    """
    files = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    return {"files": files}


# --- joining ---


def index_texts(path: Path, tables: Mapping[str, Iterable[tuple[str, Path]]]) -> None:
    """Writes a database of texts by id, unless it is there; memory stays flat.

    Args:
      path: the database; appears only when it is whole.
      tables: for "queries" and "documents" the files, each with the name that messages call it,
        of rows with `query_id` or `document_id`, and `text`.

    Raises:
      UserError: a file cannot be read, or there is no room.
    """
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(partial)) as base:
            base.execute("PRAGMA journal_mode = OFF")  # it is thrown away if it is not finished
            base.execute("PRAGMA synchronous = OFF")
            for table, files in tables.items():
                base.execute(f"CREATE TABLE {table} (id TEXT, text TEXT)")
                for name, file in files:
                    rows = _texts(name, file, "query_id" if table == "queries" else "document_id")
                    base.executemany(f"INSERT INTO {table} VALUES (?, ?)", rows)
                # Made at the end, an index is sorted once; kept up row by row, it is slow on disk.
                base.execute(f"CREATE INDEX {table}_by_id ON {table} (id)")
            base.commit()
    except (sqlite3.Error, OSError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error}): make room there, or choose another folder."
        ) from None
    partial.rename(path)


def _texts(name: str, path: Path, id_column: str) -> Iterator[tuple[str, str]]:
    for number, record in read_table(path, require_columns(id_column, "text")):
        if isinstance(record, RowError):
            continue  # the row that wants this text is dropped, and counted
        text = record.get("text")
        if isinstance(text, str) and text.strip() and is_unicode(text):
            try:
                yield _identifier(record.get(id_column)), text
            except RowError as reason:
                raise UserError(f"{name}, row {number}: {reason}.") from None


_JoinedIds = tuple[str, list[str], list[float]]


def _parse_joined(record: dict[str, Any] | RowError) -> _JoinedIds | RowError:
    if isinstance(record, RowError):
        return record
    try:
        query_id = _identifier(record.get("query_id"))
        ids = [_identifier(value) for value in _as_list(record, "document_ids")]
        if not ids:
            raise RowError('"document_ids" is empty', "empty")
        return query_id, ids, check_scores(_as_list(record, "scores"), len(ids))
    except RowError as reason:
        return reason


def _look_up(
    base: sqlite3.Connection, rows: Sequence[_JoinedIds]
) -> tuple[dict[str, str], dict[str, str]]:
    return (
        _select(base, "queries", {query_id for query_id, _, _ in rows}),
        _select(base, "documents", {one for _, ids, _ in rows for one in ids}),
    )


def _select(base: sqlite3.Connection, table: str, ids: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    wanted = iter(sorted(ids))
    while block := list(_take(wanted, 500)):  # as many variables as every SQLite takes
        marks = ", ".join("?" * len(block))
        found.update(base.execute(f"SELECT id, text FROM {table} WHERE id IN ({marks})", block))
    return found


def _with_texts(
    ids: _JoinedIds | RowError, known: tuple[dict[str, str], dict[str, str]]
) -> Row | RowError:
    if isinstance(ids, RowError):
        return ids
    query_id, document_ids, scores = ids
    queries, documents = known
    if query_id not in queries:
        return RowError(f"query {one_line(query_id, 40)} has no text", "no_text")
    for document_id in document_ids:
        if document_id not in documents:
            return RowError(f"document {one_line(document_id, 40)} has no text", "no_text")
    return Row(
        query=queries[query_id],
        documents=[documents[document_id] for document_id in document_ids],
        scores=scores,
    )


def _identifier(value: Any) -> str:
    # The same id is a number in one table and a text in another.
    if isinstance(value, bool) or not isinstance(value, str | int):
        kind = "empty" if value is None else "invalid"
        raise RowError(f"{_shown(value)} is no id; a text or a whole number is wanted", kind)
    if isinstance(value, str) and not is_unicode(value):
        raise RowError("an id holds half of a surrogate pair", "undecodable")
    try:
        return str(value)
    except ValueError:  # Python writes no decimal digits of numbers that are very long
        raise RowError("an id has too many digits") from None


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)  # looks no deeper than it shows
    except ValueError:  # as in `_identifier`, somewhere within
        return f"a {type(value).__name__}"


def _as_list(record: dict[str, Any], name: str) -> list[Any]:
    """A list that a table may hold as the text of a JSON or Python list."""
    value = record.get(name)
    if isinstance(value, str):
        if len(value) > MAX_ROW_BYTES:  # parsed, it would take a hundred times its size
            raise RowError(f'"{name}" holds more than {MAX_ROW_BYTES >> 20} MiB', "too_long")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            with contextlib.suppress(
                ValueError, TypeError, SyntaxError, RecursionError, MemoryError
            ):
                value = ast.literal_eval(value)
    if not isinstance(value, list):
        raise RowError(f'"{name}" is not a list', "empty" if value is None else "invalid")
    return value


def _take(items: Iterator[Any], count: int) -> Iterator[Any]:
    for _, item in zip(range(count), items, strict=False):
        yield item
