"""Training rows from JSON-lines and Parquet files, checked one by one."""

import functools
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from colbert_jax.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)

WANTED_COLUMNS = (
    "query, document (and negative, or negative_0, negative_1, ...); "
    "or query, documents, scores; or query, pos, neg (and pos_scores, neg_scores)"
)

# Wide enough for Arrow to be quick, narrow enough that long documents stay far from a gigabyte.
_PARQUET_BATCH_ROWS = 1024
_PARQUET_BUFFER_BYTES = 1 << 20

_LARGEST_SCORE = 3e38  # beyond it a score is infinite in 32 bits


class Row(TypedDict):
    """One training example.

    In contrastive rows `scores` is None, the first document answers the query and the others are
    mined negatives. In distillation rows `documents` are the candidates and `scores` holds the
    teacher's score of each.
    """

    query: str
    documents: list[str]
    scores: list[float] | None


def cut_documents(row: Row, documents: int) -> Row:
    """A row with only its first documents, and their scores."""
    scores = row["scores"]
    return Row(
        query=row["query"],
        documents=row["documents"][:documents],
        scores=None if scores is None else scores[:documents],
    )


class RowError(ValueError):
    """Why a row, or a set of columns, cannot be used; whoever knows the place adds it."""


class _Layout(NamedTuple):
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Row]


def read_rows(
    path: str | Path, *, on_bad_row: Callable[[UserError], None] | None = None
) -> Iterator[Row]:
    """Yields the rows of one file in order, holding only a small part of it in memory.

    The columns decide what a row is; other columns are ignored:

    - `query`, `document`: a pair;
    - the same with `negative` (a text or a list of texts) or `negative_0`, `negative_1`, ...:
      a pair with mined negatives (a null negative is no negative);
    - `query`, `documents`, `scores`: candidates with a teacher's scores;
    - `query`, `pos`, `neg` (lists, as FlagEmbedding writes them): with `pos_scores` and
      `neg_scores` these are candidates with a teacher's scores, positives first; without, a pair
      of the first positive with its negatives, since the other positives are no negatives.

    Args:
      path: a `.jsonl`, `.json` (one object a line), `.jsonl.gz`, `.json.gz` or `.parquet` file.
      on_bad_row: what to do with the error of a row whose texts or scores cannot be used, which
        is then left out; None raises it. Wrong columns and broken files are raised either way.

    Raises:
      UserError: the file cannot be read, has no row or the wrong columns, or a row cannot be
        used; the message names the file and the row, counted from 1 (in JSON files: the line).
    """
    path = Path(path)
    for number, record in read_table(path, lambda names: _find_layout(tuple(names)).columns):
        try:
            row = _find_layout(tuple(record)).parse(record)
        except RowError as reason:
            error = UserError(f"{path}, row {number}: {reason}.")
            if on_bad_row is None:
                raise error from None
            on_bad_row(error)
        else:
            yield row


def read_table(
    path: str | Path, choose_columns: Callable[[Collection[str]], Sequence[str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields `(row number from 1, {column: value})` of a JSON-lines or Parquet file.

    Args:
      path: the file; its suffix says what it is.
      choose_columns: called with the names of the columns found, returns those to read (JSON
        records come whole), and raises `RowError` if they will not do.

    Raises:
      UserError: the file is missing, empty, broken or of another kind, or has wrong columns.
    """
    path = Path(path)
    if path.name.endswith(PARQUET_SUFFIXES):
        records = _read_parquet(path, choose_columns)
    elif path.name.endswith(JSON_SUFFIXES):
        records = _read_json_lines(path, choose_columns)
    else:
        suffixes = ", ".join(JSON_SUFFIXES + PARQUET_SUFFIXES)
        raise UserError(f"{path} is not a kind of file that can be read: give one of {suffixes}.")
    empty = True
    try:
        for record in records:
            empty = False
            yield record
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is a truncated or damaged gzip file ({error}): copy or download it again."
        ) from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a sound Parquet file ({_first_line(error)}): write or download it "
            "again."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({_first_line(error)}): check that it is a sound file and "
            "that you may read it."
        ) from None
    if empty:
        raise UserError(f"{path} has no rows: give a file that has some, or leave it out.")


def _read_json_lines(
    path: Path, choose_columns: Callable[[Collection[str]], Sequence[str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    accepted: set[tuple[str, ...]] = set()
    with _open_bytes(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = _decode_json_object(line)
                if (names := tuple(record)) not in accepted:
                    choose_columns(names)
                    accepted.add(names)
            except RowError as reason:
                raise UserError(f"{path}, row {number}: {reason}.") from None
            yield number, record


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _decode_json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))  # some editors begin files with a BOM
    except UnicodeDecodeError as error:
        raise RowError(f"it is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"it is not valid JSON ({error}); write one JSON object on each line"
        ) from None
    if not isinstance(record, dict):
        raise RowError(f"it is {_kind(record)}; write one JSON object on each line")
    return record


def _read_parquet(
    path: Path, choose_columns: Callable[[Collection[str]], Sequence[str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    # Column chunks are streamed through a small buffer; a row group would be held whole otherwise.
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
        try:
            columns = choose_columns(file.schema_arrow.names)
        except RowError as reason:
            raise UserError(f"{path}: {reason}.") from None
        number = 0
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=list(columns)):
            for record in batch.to_pylist():
                number += 1
                yield number, record


@functools.lru_cache(maxsize=256)
def _find_layout(names: tuple[str, ...]) -> _Layout:
    found = set(names)
    if found >= {"query", "documents", "scores"}:
        return _Layout(("query", "documents", "scores"), _parse_distillation)
    if found >= {"query", "pos", "neg"}:
        optional = tuple(name for name in ("pos_scores", "neg_scores") if name in found)
        return _Layout(("query", "pos", "neg", *optional), _parse_flag_embedding)
    if found >= {"query", "document"}:
        negatives = tuple(name for name in names if re.fullmatch(r"negative(_\d+)?", name))
        negatives = tuple(sorted(negatives, key=lambda name: int(name[9:] or -1)))
        parse = functools.partial(_parse_contrastive, negative_columns=negatives)
        return _Layout(("query", "document", *negatives), parse)
    shown = ", ".join(names) or "none"
    raise RowError(f"the columns found are {shown}; rename them to {WANTED_COLUMNS}")


def _parse_contrastive(record: dict[str, Any], *, negative_columns: Sequence[str]) -> Row:
    documents = [_text(record["document"], "document")]
    for name in negative_columns:
        value = record[name]
        if isinstance(value, list):
            documents += _texts(value, name)
        elif value is not None:
            documents.append(_text(value, name))
    return Row(query=_text(record["query"], "query"), documents=documents, scores=None)


def _parse_distillation(record: dict[str, Any]) -> Row:
    query = _text(record["query"], "query")
    documents = _texts(record["documents"], "documents")
    if not documents:
        raise RowError('"documents" is empty; give the row documents or remove it')
    return Row(query=query, documents=documents, scores=_scores(record, "scores", documents))


def _parse_flag_embedding(record: dict[str, Any]) -> Row:
    query = _text(record["query"], "query")
    positives = _texts(record["pos"], "pos")
    negatives = _texts(record["neg"], "neg")
    if not positives:
        raise RowError('"pos" is empty; give the row a positive document or remove it')
    if record.get("pos_scores") is None and record.get("neg_scores") is None:
        return Row(query=query, documents=positives[:1] + negatives, scores=None)
    scores = _scores(record, "pos_scores", positives) + _scores(record, "neg_scores", negatives)
    return Row(query=query, documents=positives + negatives, scores=scores)


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list):
        raise RowError(f'"{name}" is {_kind(values)}; make it a list of texts or remove the row')
    return [_text(value, name) for value in values]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f'"{name}" holds {_kind(value)}; put a text there or remove the row')
    if not value.strip():
        raise RowError(f'"{name}" holds a blank text; put words there or remove the row')
    if not value.isascii() and not _is_unicode(value):
        raise RowError(f'"{name}" holds half of a surrogate pair; mend the text or remove the row')
    return value


def _is_unicode(text: str) -> bool:
    """Whether `text` has a UTF-8 form; JSON can hold half of a surrogate pair, which has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _scores(record: dict[str, Any], name: str, documents: list[str]) -> list[float]:
    values = record.get(name)
    if not isinstance(values, list):
        raise RowError(
            f'"{name}" is {_kind(values)}; make it a list with one number for each document'
        )
    return check_scores(values, len(documents), name)


def check_scores(values: Sequence[Any], count: int, name: str = "scores") -> list[float]:
    """Returns `values` as floats.

    Raises:
      RowError: they are not `count` finite numbers; `name` is the column named in the message.
    """
    if len(values) != count:
        raise RowError(
            f'"{name}" has {len(values)} numbers for {count} documents; give one for each'
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RowError(f'"{name}" holds {_kind(value)}; put a number there or remove the row')
        if not abs(value) <= _LARGEST_SCORE:
            raise RowError(f'"{name}" holds {value!r:.20}, not a finite number; remove the row')
    return [float(value) for value in values]


def _kind(value: Any) -> str:
    kinds = {
        bool: "a truth value",
        bytes: "bytes",
        dict: "an object",
        float: "a number",
        int: "a number",
        list: "a list",
        str: "a text",
        type(None): "null",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
