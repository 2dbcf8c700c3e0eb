"""Training rows from JSON-lines and Parquet files, checked one by one."""

import functools
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from colbert_jax.errors import UserError, brief, one_line

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)

WANTED_COLUMNS = (
    "query, document (and negative, or negative_0, negative_1, ...); "
    "or query, documents, scores; or query, pos, neg (and pos_scores, neg_scores)"
)

OUR_COLUMNS = r"query|documents?|scores|negative(_\d+)?|(pos|neg)(_scores)?"

# A longer line is no training text, and holding it would be the end of flat memory.
MAX_ROW_BYTES = 8 << 20

# Wide enough for Arrow to be quick, narrow enough that long documents stay far from a gigabyte.
_PARQUET_BATCH_ROWS = 1024
_PARQUET_BUFFER_BYTES = 1 << 20

# Sets of columns that are remembered as fit; a file whose every row has its own would fill memory.
_KNOWN_LAYOUTS = 256
_LONGEST_NAMES = 1000  # characters; longer ones are not remembered

_FILE_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)
# Of values that Arrow has and Python has not: dates after the year 9999, time zones of no place.
_VALUE_ERRORS = (ValueError, OverflowError, LookupError)
_LARGEST_SCORE = 3e38  # beyond it a score is infinite in 32 bits


class Row(TypedDict):
    """One training example.

    In contrastive rows `scores` is None, the first document answers the query and the others are
    mined negatives. In distillation rows `documents` are the candidates and `scores` holds the
    teacher's score of each. In rows of tokens, arrays of ids stand in place of the texts.
    """

    query: Any  # str, or ids[token]
    documents: list[Any]
    scores: list[float] | None


def cut_documents(row: Row, chosen: int | Sequence[int]) -> Row:
    """A row with only its first documents, or those at the given places, and their scores."""
    places = range(chosen) if isinstance(chosen, int) else chosen
    scores = row["scores"]
    return Row(
        query=row["query"],
        documents=[row["documents"][i] for i in places],
        scores=None if scores is None else [scores[i] for i in places],
    )


class RowError(ValueError):
    """Why a row, or a set of columns, cannot be used; whoever knows the place adds it.

    Attributes:
      kind: what a count of such rows is kept under: "empty" (a blank or missing text),
        "undecodable" (no UTF-8, no JSON), "too_long" or "invalid" (another type, wrong scores).
    """

    def __init__(self, message: str, kind: str = "invalid"):
        super().__init__(message)
        self.kind = kind


class Part(NamedTuple):
    """A stretch of a file's rows.

    Attributes:
      start: rows (in JSON files: lines) before it.
      rows: how many it holds; None for all that follow.
      offset: bytes (of the text, where that is compressed) before it, in JSON files.
    """

    start: int = 0
    rows: int | None = None
    offset: int = 0


WHOLE = Part()


class _Layout(NamedTuple):
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Row]


def read_rows(
    path: str | Path, columns: Mapping[str, str] | None = None, part: Part = WHOLE
) -> Iterator[tuple[int, Row | RowError]]:
    """Yields `(row number, row)` of one file in order, holding only a small part of it in memory.

    Rows are counted from 1, in JSON files by line. One that cannot be used comes as the `RowError`
    that says why. The columns decide what a row is; other columns are ignored:

    - `query`, `document`: a pair;
    - the same with `negative` (a text or a list of texts) or `negative_0`, `negative_1`, ...:
      a pair with mined negatives (a null negative is no negative);
    - `query`, `documents`, `scores`: candidates with a teacher's scores;
    - `query`, `pos`, `neg` (lists, as FlagEmbedding writes them): with `pos_scores` and
      `neg_scores` these are candidates with a teacher's scores, positives first; without, a pair
      of the first positive with its negatives, since the other positives are no negatives.

    Args:
      path: a `.jsonl`, `.json` (one object a line), `.jsonl.gz`, `.json.gz` or `.parquet` file.
      columns: what the file calls the columns above, where it calls them otherwise: ours -> its.
      part: the rows to read, of those that `split_table` finds.

    Raises:
      UserError: the file cannot be read or has the wrong columns; the message names the file and,
        where there is one, the row.
    """
    names = tuple(sorted((columns or {}).items()))

    def choose(found: Collection[str]) -> Sequence[str]:
        return _find_layout(tuple(found), names).columns

    for number, record in read_table(path, choose, part):
        if isinstance(record, RowError):
            yield number, record
            continue
        try:
            row: Row | RowError = _find_layout(tuple(record), names).parse(record)
        except RowError as reason:
            row = reason
        yield number, row


def read_table(
    path: str | Path,
    choose_columns: Callable[[Collection[str]], Sequence[str]],
    part: Part = WHOLE,
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yields `(row number from 1, {column: value})` of a JSON-lines or Parquet file.

    A line that is no JSON object, or lacks columns that the file's first has, comes as the
    `RowError` that says why.

    Args:
      path: the file; its suffix says what it is.
      choose_columns: called with the names of the columns found, returns those to read (JSON
        records come whole), and raises `RowError` if they will not do.
      part: the rows to read.

    Raises:
      UserError: the file is missing, broken or of another kind, or has wrong columns.
    """
    path = Path(path)
    records = (_read_parquet if _is_parquet(path) else _read_json_lines)(path, choose_columns, part)
    try:
        yield from records
    except _FILE_ERRORS as error:
        raise _file_error(path, error) from None


def require_columns(*columns: str) -> Callable[[Collection[str]], Sequence[str]]:
    """A `choose_columns` for `read_table` that wants just these."""

    def choose(found: Collection[str]) -> Sequence[str]:
        if not set(columns) <= set(found):
            raise RowError(
                f"the columns found are {one_line(', '.join(found))}; {', '.join(columns)} are "
                "wanted"
            )
        return columns

    return choose


def split_table(path: str | Path, rows: int) -> list[Part]:
    """Cuts a file into parts of about so many rows (Parquet: whole row groups).

    A Parquet file tells its rows at once; a JSON-lines file is read through, line by line.

    Raises:
      UserError: the file cannot be read.
    """
    path = Path(path)
    try:
        if _is_parquet(path):
            return _split_parquet(path, rows)
        return _split_json_lines(path, rows)
    except _FILE_ERRORS as error:
        raise _file_error(path, error) from None


def _is_parquet(path: Path) -> bool:
    if path.name.endswith(PARQUET_SUFFIXES):
        return True
    if path.name.endswith(JSON_SUFFIXES):
        return False
    suffixes = ", ".join(JSON_SUFFIXES + PARQUET_SUFFIXES)
    raise UserError(f"{path} is not a kind of file that can be read: give one of {suffixes}.")


def _file_error(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist: check the path.")
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return UserError(
            f"{path} is a truncated or damaged gzip file ({error}): copy or download it again."
        )
    if isinstance(error, pa.ArrowException | UnicodeDecodeError):
        return UserError(
            f"{path} is not a sound Parquet file ({brief(error)}): write or download it again."
        )
    return UserError(
        f"{path} cannot be read ({brief(error)}): check that it is a sound file and "
        "that you may read it."
    )


def _read_json_lines(
    path: Path, choose_columns: Callable[[Collection[str]], Sequence[str]], part: Part
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    accepted: set[tuple[str, ...]] = set()
    of_this_kind = bool(part.start)
    with _open_bytes(path) as file:
        if part.offset:
            file.seek(part.offset)
        for number, (_, line) in enumerate(_lines(file), start=part.start + 1):
            if part.rows is not None and number > part.start + part.rows:
                return
            if line is None:
                reason = f"it is longer than {MAX_ROW_BYTES >> 20} MiB; cut or remove it"
                yield number, RowError(reason, "too_long")
                continue
            if not line.strip():
                continue
            try:
                record = _decode_json_object(line)
            except RowError as reason:
                yield number, reason
                continue
            if (names := tuple(record)) not in accepted:
                try:
                    choose_columns(names)
                except RowError as reason:
                    if not of_this_kind:
                        raise UserError(f"{path}, row {number}: {reason}.") from None
                    yield number, reason
                    continue
                of_this_kind = True
                if len(accepted) < _KNOWN_LAYOUTS and _are_short(names):
                    accepted.add(names)
            yield number, record


def _split_json_lines(path: Path, rows: int) -> list[Part]:
    parts: list[Part] = []
    start = offset = position = number = 0
    with _open_bytes(path) as file:
        for number, (size, _) in enumerate(_lines(file), start=1):
            position += size
            if number - start == rows:
                parts.append(Part(start, rows, offset))
                start, offset = number, position
    return parts if number == start else [*parts, Part(start, number - start, offset)]


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yields `(bytes, line)`; None stands for a line that is too long to be held."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        size, whole = len(line), line if len(line) <= MAX_ROW_BYTES else None
        while not line.endswith(b"\n") and (line := file.readline(MAX_ROW_BYTES)):
            size += len(line)
        yield size, whole


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _decode_json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))  # some editors begin files with a BOM
    except UnicodeDecodeError as error:
        raise RowError(
            f"it is not UTF-8 ({error.reason}); save the file as UTF-8", "undecodable"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"it is not valid JSON ({error}); write one JSON object on each line", "undecodable"
        ) from None
    if not isinstance(record, dict):
        raise RowError(f"it is {_kind(record)}; write one JSON object on each line")
    return record


def _read_parquet(
    path: Path, choose_columns: Callable[[Collection[str]], Sequence[str]], part: Part
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    # Column chunks are streamed through a small buffer; a row group would be held whole otherwise.
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
        try:
            columns = list(choose_columns(file.schema_arrow.names))
        except RowError as reason:
            raise UserError(f"{path}: {reason}.") from None
        number, before = part.start, 0
        groups = []
        for index in range(file.num_row_groups):
            if part.start <= before and (part.rows is None or before < part.start + part.rows):
                groups.append(index)
            before += file.metadata.row_group(index).num_rows
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=columns):
            for record in _records(batch):
                number += 1
                yield number, record


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    try:
        records = batch.to_pylist()
    except _VALUE_ERRORS:
        for index in range(batch.num_rows):
            yield _record(batch.slice(index, 1))
    else:
        yield from records


def _record(row: pa.RecordBatch) -> dict[str, Any] | RowError:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:  # Parquet does not check what it is told is UTF-8
        reason = f"a text is not UTF-8 ({error.reason}); mend the file"
        return RowError(reason, "undecodable")
    except _VALUE_ERRORS as error:
        return RowError(f"a value cannot be read ({brief(error)}); mend or remove the row")


def _split_parquet(path: Path, rows: int) -> list[Part]:
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    parts: list[Part] = []
    start = count = 0
    for group in groups:
        count += group
        if count >= rows:
            parts.append(Part(start, count))
            start, count = start + count, 0
    return [*parts, Part(start, count)] if count else parts


def _find_layout(names: tuple[str, ...], renamed: tuple[tuple[str, str], ...] = ()) -> _Layout:
    """What a row of these columns is, and which of them it is read from."""
    return (_remembered_layout if _are_short(names) else _work_out_layout)(names, renamed)


def _are_short(names: tuple[str, ...]) -> bool:
    return sum(map(len, names)) <= _LONGEST_NAMES


def _work_out_layout(names: tuple[str, ...], renamed: tuple[tuple[str, str], ...]) -> _Layout:
    theirs = dict(renamed)
    for ours, name in theirs.items():
        if name not in names:
            shown = one_line(", ".join(names)) or "none"
            raise RowError(f"there is no column {name} to read {ours} from, but {shown}")
    # A column that is read under another name is not read under its own.
    own = {name: name for name in names if name not in theirs.values()}
    layout = _known_layout(tuple(own | theirs))
    columns = tuple((own | theirs)[name] for name in layout.columns)
    if not renamed:
        return layout

    def parse(record: dict[str, Any]) -> Row:
        values = zip(layout.columns, columns, strict=True)
        return layout.parse({name: record.get(column) for name, column in values})

    return _Layout(columns, parse)


_remembered_layout = functools.lru_cache(maxsize=_KNOWN_LAYOUTS)(_work_out_layout)


def _known_layout(names: tuple[str, ...]) -> _Layout:
    found = set(names)
    if found >= {"query", "documents", "scores"}:
        return _Layout(("query", "documents", "scores"), _parse_distillation)
    if found >= {"query", "pos", "neg"}:
        optional = tuple(name for name in ("pos_scores", "neg_scores") if name in found)
        return _Layout(("query", "pos", "neg", *optional), _parse_flag_embedding)
    if found >= {"query", "document"}:
        # Python reads no number of thousands of digits, and no table has so many columns.
        negatives = tuple(name for name in names if re.fullmatch(r"negative(_\d{1,9})?", name))
        negatives = tuple(sorted(negatives, key=lambda name: int(name[9:] or -1)))
        parse = functools.partial(_parse_contrastive, negative_columns=negatives)
        return _Layout(("query", "document", *negatives), parse)
    shown = one_line(", ".join(names)) or "none"
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
        raise RowError('"documents" is empty; give the row documents or remove it', "empty")
    return Row(query=query, documents=documents, scores=_scores(record, "scores", documents))


def _parse_flag_embedding(record: dict[str, Any]) -> Row:
    query = _text(record["query"], "query")
    positives = _texts(record["pos"], "pos")
    negatives = _texts(record["neg"], "neg")
    if not positives:
        raise RowError('"pos" is empty; give the row a positive document or remove it', "empty")
    if record.get("pos_scores") is None and record.get("neg_scores") is None:
        return Row(query=query, documents=positives[:1] + negatives, scores=None)
    scores = _scores(record, "pos_scores", positives) + _scores(record, "neg_scores", negatives)
    return Row(query=query, documents=positives + negatives, scores=scores)


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, list):
        kind = "empty" if values is None else "invalid"
        reason = f'"{name}" is {_kind(values)}; make it a list of texts or remove the row'
        raise RowError(reason, kind)
    return [_text(value, name) for value in values]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        kind = "empty" if value is None else "invalid"
        raise RowError(f'"{name}" holds {_kind(value)}; put a text there or remove the row', kind)
    if not value.strip():
        raise RowError(f'"{name}" holds a blank text; put words there or remove the row', "empty")
    if len(value) > MAX_ROW_BYTES:
        reason = f'"{name}" holds more than {MAX_ROW_BYTES >> 20} MiB; cut or remove it'
        raise RowError(reason, "too_long")
    if not value.isascii() and not is_unicode(value):
        raise RowError(
            f'"{name}" holds half of a surrogate pair; mend the text or remove the row',
            "undecodable",
        )
    return value


def is_unicode(text: str) -> bool:
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
            f'"{name}" is {_kind(values)}; make it a list with one number for each document',
            "empty" if values is None else "invalid",
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
            raise RowError(f'"{name}" holds a number that is not finite; remove the row')
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
