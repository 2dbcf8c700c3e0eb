"""Files of rows: what is accepted, what every bad one says, and that parts add up to the whole."""

import gzip
import json
import random
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_jax.data import rows as rows_module
from colbert_jax.data.rows import (
    RowError,
    cut_documents,
    read_rows,
    read_table,
    require_columns,
    split_table,
)
from colbert_jax.errors import UserError

PAIR = {"query": "what is late interaction", "document": "a score for each pair of tokens"}
SCORED = {"query": "q", "documents": ["a", "b"], "scores": [1.5, -2]}
LINE = json.dumps(PAIR).encode()


def _write_bytes(path, data):
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def _write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
        return path
    return _write_bytes(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def _rows(path, columns=None):
    """Rows that can be used, of a file that has no others."""
    found = list(read_rows(path, columns))
    assert not any(isinstance(row, RowError) for _, row in found)
    return [row for _, row in found]


def _comparable(numbered):
    """What can be compared: errors are not equal to one another."""
    return [
        (number, (row.kind, str(row)) if isinstance(row, RowError) else row)
        for number, row in numbered
    ]


def _kinds(path, columns=None):
    """The kind of each row's error, None for a row that can be used."""
    found = read_rows(path, columns)
    return {number: row.kind if isinstance(row, RowError) else None for number, row in found}


def _error(path, columns=None):
    with pytest.raises(UserError) as caught:
        list(read_rows(path, columns))
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    return message


SUFFIXES = ["jsonl", "json", "jsonl.gz", "json.gz", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pairs_are_read_from_every_kind_of_file_and_counted_from_one(tmp_path, suffix):
    records = [{**PAIR, "query": f"q{i}", "shard": i} for i in range(5)]
    found = list(read_rows(_write(tmp_path / f"pairs.{suffix}", records)))
    assert [(number, row["query"]) for number, row in found] == [(i + 1, f"q{i}") for i in range(5)]
    assert all(row["documents"] == [PAIR["document"]] and row["scores"] is None for _, row in found)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_negatives_follow_the_positive_in_every_spelling(tmp_path, suffix):
    cases = {
        "list": [{**PAIR, "negative": ["n0", "n1"]}],
        "text": [{**PAIR, "negative": "n0"}],
        "columns": [{**PAIR, "negative_10": "n10", "negative_9": "n9", "negative_11": None}],
        "none": [{**PAIR, "negative": []}],
        "null": [{**PAIR, "negative": None}],
    }
    found = {
        name: _rows(_write(tmp_path / f"{name}.{suffix}", records))[0]["documents"][1:]
        for name, records in cases.items()
    }
    assert found == {
        "list": ["n0", "n1"],
        "text": ["n0"],
        "columns": ["n9", "n10"],
        "none": [],
        "null": [],
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_distillation_rows_keep_candidates_and_scores_together(tmp_path, suffix):
    (row,) = _rows(_write(tmp_path / f"scored.{suffix}", [SCORED]))
    assert row == {"query": "q", "documents": ["a", "b"], "scores": [1.5, -2.0]}


def test_flag_embedding_rows_with_scores_are_distillation_rows(tmp_path):
    record = {
        "query": "q",
        "pos": ["p"],
        "neg": ["n", "m"],
        "pos_scores": [9],
        "neg_scores": [2, 1],
    }
    (row,) = _rows(_write(tmp_path / "rows.jsonl", [{**record, "prompt": "x", "type": "y"}]))
    assert row == {"query": "q", "documents": ["p", "n", "m"], "scores": [9.0, 2.0, 1.0]}


def test_flag_embedding_rows_without_scores_never_take_a_positive_for_a_negative(tmp_path):
    record = {"query": "q", "pos": ["p", "another positive"], "neg": ["n"]}
    (row,) = _rows(_write(tmp_path / "rows.jsonl", [record]))
    assert row == {"query": "q", "documents": ["p", "n"], "scores": None}


def test_text_is_passed_on_as_it_is(tmp_path):
    text = "  {{x}} <s>[MASK]\u2028 $(rm) é\u0000 \\n "
    (row,) = _rows(_write(tmp_path / "rows.jsonl", [{"query": text, "document": text}]))
    assert row["query"] == text and row["documents"] == [text]


def test_documents_are_cut_together_with_their_scores():
    row = {"query": "q", "documents": ["a", "b", "c"], "scores": [3.0, 2.0, 1.0]}
    assert cut_documents(row, 2) == {"query": "q", "documents": ["a", "b"], "scores": [3.0, 2.0]}
    assert cut_documents(row, [2, 0]) == {
        "query": "q",
        "documents": ["c", "a"],
        "scores": [1.0, 3.0],
    }
    assert cut_documents({**row, "scores": None}, 1)["scores"] is None


# --- columns of other names ---


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_columns_are_read_under_the_names_that_the_file_gives_them(tmp_path, suffix):
    record = {"question": "q", "answer": "a", "wrong": ["w"], "document": "not this one"}
    path = _write(tmp_path / f"rows.{suffix}", [record, record])
    columns = {"query": "question", "document": "answer", "negative": "wrong"}
    expected = {"query": "q", "documents": ["a", "w"], "scores": None}
    assert _rows(path, columns) == [expected, expected]


def test_two_columns_can_swap_their_names(tmp_path):
    for suffix in ("jsonl", "parquet"):
        path = _write(tmp_path / f"rows.{suffix}", [{"query": "a", "document": "q"}])
        (row,) = _rows(path, {"query": "document", "document": "query"})
        assert (row["query"], row["documents"]) == ("q", ["a"])


def test_a_column_read_under_another_name_is_not_read_under_its_own_too(tmp_path):
    path = _write(tmp_path / "rows.jsonl", [{"query": "q", "document": "d", "negative": "n"}])
    (row,) = _rows(path, {"document": "negative"})
    assert row["documents"] == ["n"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_mapped_column_that_is_missing_is_named_beside_those_there_are(tmp_path, suffix):
    path = _write(tmp_path / f"rows.{suffix}", [{"question": "q", "document": "d"}])
    message = _error(path, {"query": "qestion"})
    assert "no column qestion" in message and "question, document" in message


def test_a_later_row_without_the_columns_is_the_rows_own_fault(tmp_path):
    mapped = [{"question": "q", "document": "d"}, {"document": "d"}, {"question": "q"}]
    path = _write(tmp_path / "rows.jsonl", [*mapped, mapped[0]])
    (_, first), (number, bad), (_, worse), (_, last) = read_rows(path, {"query": "question"})
    assert first == last and (number, bad.kind, worse.kind) == (2, "invalid", "invalid")
    assert "no column question" in str(bad)
    (_, _), (number, bad) = read_rows(_write(tmp_path / "rows.jsonl", [PAIR, {"query": "q"}]))
    assert (number, bad.kind) == (2, "invalid") and "columns found are query" in str(bad)
    # The first row says what kind of file it is.
    assert "row 1" in _error(_write(tmp_path / "rows.jsonl", [{"query": "q"}, PAIR]))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_wrong_columns_are_listed_beside_those_wanted(tmp_path, suffix):
    message = _error(_write(tmp_path / f"rows.{suffix}", [{"question": "q", "answer": "a"}]))
    assert "question, answer" in message and "query, document" in message


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_table_without_the_required_columns_is_refused(tmp_path, suffix):
    path = _write(tmp_path / f"rows.{suffix}", [{"id": 1, "text": "t"}])
    with pytest.raises(UserError, match="found are id, text; query_id, text are wanted"):
        list(read_table(path, require_columns("query_id", "text")))
    ((number, record),) = read_table(path, require_columns("text"))
    assert number == 1 and record["text"] == "t"


# --- files that cannot be used ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    assert "does not exist" in _error(path)
    with pytest.raises(UserError, match="does not exist"):
        split_table(path, 10)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("text", [b"", b"\n \r\n\n"])
def test_a_file_may_have_no_rows(tmp_path, name, text):
    path = _write_bytes(tmp_path / name, text)
    assert list(read_rows(path)) == []
    assert sum(part.rows for part in split_table(path, 2)) == text.count(b"\n")
    path.write_bytes(b"")
    assert list(read_rows(path)) == split_table(path, 2) == []


def test_a_parquet_file_may_have_no_rows_but_not_no_bytes(tmp_path):
    columns = {"query": pa.array([], "string"), "document": pa.array([], "string")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == []
    assert split_table(tmp_path / "a.parquet", 2) == []
    (tmp_path / "b.parquet").write_bytes(b"")
    assert "Parquet" in _error(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet"):
        split_table(tmp_path / "b.parquet", 2)


def test_a_folder_is_refused(tmp_path):
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / name).mkdir()
        assert "cannot be read" in _error(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            split_table(tmp_path / name, 10)


def test_another_kind_of_file_is_refused_with_the_kinds_there_are(tmp_path):
    (tmp_path / "rows.csv").write_text("query,document\n")
    assert ".jsonl.gz" in _error(tmp_path / "rows.csv")
    with pytest.raises(UserError, match=r"rows\.csv.*\.jsonl\.gz"):
        split_table(tmp_path / "rows.csv", 10)


def test_a_truncated_or_damaged_gzip_file_is_refused(tmp_path):
    whole = gzip.compress("".join(json.dumps({**PAIR, "n": i}) + "\n" for i in range(999)).encode())
    path = tmp_path / "rows.jsonl.gz"
    middle = len(whole) // 2
    for damaged in (whole[:-9], whole[:middle], b"plain text"):
        path.write_bytes(damaged)
        assert "gzip" in _error(path)
        with pytest.raises(UserError, match=r"rows\.jsonl\.gz.*gzip"):
            split_table(path, 10)
    path.write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    _error(path)
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz"):
        split_table(path, 10)


def test_rows_before_the_damage_are_not_taken_for_all(tmp_path):
    lines = b"".join(b'{"query": "q%d", "document": "d%d"}\n' % (i, i) for i in range(9999))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-1000])
    seen = 0
    with pytest.raises(UserError, match="truncated"):
        for _ in read_rows(path):
            seen += 1
    assert 0 < seen < 9999


def test_a_broken_parquet_file_is_refused(tmp_path):
    path = _write(tmp_path / "rows.parquet", [PAIR] * 50)
    whole = path.read_bytes()
    for broken in (whole[:-20], whole[: len(whole) // 2], b"PAR1"):
        path.write_bytes(broken)
        _error(path)
        with pytest.raises(UserError, match=r"rows\.parquet"):
            split_table(path, 10)
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])  # its footer is whole
    _error(path)


def test_reading_begins_before_the_file_is_read_whole(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    lines = b"".join(b'{"query": "q%d", "document": "d%d"}\n' % (i, i) for i in range(99_999))
    path.write_bytes(gzip.compress(lines)[:-1000])
    assert next(read_rows(path)) == (1, {"query": "q0", "documents": ["d0"], "scores": None})


# --- rows that cannot be used ---


def test_bad_lines_are_named_by_number_and_reading_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad_lines = {
        b'{"query": "q", ': ("not valid JSON", "undecodable"),
        b"[1, 2]": ("is a list", "invalid"),
        b"3": ("is a number", "invalid"),
        b"[" * 100_000: ("not valid JSON", "undecodable"),
        b'{"query": "\xff"}': ("not UTF-8", "undecodable"),
        LINE.decode().encode("utf-16"): ("not UTF-8", "undecodable"),
        b'{"query": 1' + b"0" * 5000 + b"}": ("not valid JSON", "undecodable"),
    }
    for line, (expected, kind) in bad_lines.items():
        assert b"\n" not in line
        path.write_bytes(LINE + b"\n" + LINE + b"\n" + line + b"\n" + LINE + b"\n")
        found = dict(read_rows(path))
        assert list(found) == [1, 2, 3, 4]
        assert expected in str(found[3]) and found[3].kind == kind
        assert all(found[number]["query"] == PAIR["query"] for number in (1, 2, 4))


BAD_ROWS = [
    ({**PAIR, "query": None}, "empty"),
    ({**PAIR, "query": " \n\t"}, "empty"),
    ({**PAIR, "query": 3}, "invalid"),
    ({**PAIR, "document": None}, "empty"),
    ({**PAIR, "document": ""}, "empty"),
    ({**PAIR, "document": ["a"]}, "invalid"),
    ({**PAIR, "document": "\ud800"}, "undecodable"),
    ({**PAIR, "negative": ["n", None]}, "empty"),
    ({**PAIR, "negative": {"a": 1}}, "invalid"),
    ({**PAIR, "negative": [" "]}, "empty"),
    ({**SCORED, "documents": [], "scores": []}, "empty"),
    ({**SCORED, "documents": ["a", None]}, "empty"),
    ({**SCORED, "documents": "ab"}, "invalid"),
    ({**SCORED, "scores": [1.0]}, "invalid"),
    ({**SCORED, "scores": [1.0, float("nan")]}, "invalid"),
    ({**SCORED, "scores": [1.0, float("-inf")]}, "invalid"),
    ({**SCORED, "scores": [1.0, 10**400]}, "invalid"),
    ({**SCORED, "scores": [1.0, 1e39]}, "invalid"),
    ({**SCORED, "scores": [1.0, None]}, "invalid"),
    ({**SCORED, "scores": [1.0, True]}, "invalid"),
    ({**SCORED, "scores": ["1", "2"]}, "invalid"),
    ({"query": "q", "pos": [], "neg": ["n"]}, "empty"),
    ({"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1, 2], "neg_scores": []}, "invalid"),
]


@pytest.mark.parametrize(("bad", "kind"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_told_and_the_next_is_read(tmp_path, bad, kind):
    found = dict(read_rows(_write(tmp_path / "rows.jsonl", [PAIR, bad, PAIR])))
    assert list(found) == [1, 2, 3]
    assert isinstance(found[2], RowError) and found[2].kind == kind
    assert "column" not in str(found[2]) and "\n" not in str(found[2])
    assert found[1] == found[3] and found[1]["query"] == PAIR["query"]


@pytest.mark.parametrize(
    "bad",
    [
        {**SCORED, "documents": None},
        {**SCORED, "scores": None},
        {"query": "q", "pos": None, "neg": ["n"]},
        {"query": "q", "pos": ["p"], "neg": None},
        {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1]},
        {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1], "neg_scores": None},
    ],
)
def test_a_null_list_is_a_missing_value(tmp_path, bad):
    path = _write(tmp_path / "rows.jsonl", [PAIR, bad, PAIR])
    assert _kinds(path) == {1: None, 2: "empty", 3: None}


def test_null_values_of_a_parquet_file_are_missing_values(tmp_path):
    records = [PAIR, {**PAIR, "query": None}, {**PAIR, "document": None}, PAIR]
    assert _kinds(_write(tmp_path / "rows.parquet", records)) == {
        1: None,
        2: "empty",
        3: "empty",
        4: None,
    }


def test_a_bad_parquet_row_is_told_by_its_number_in_the_file(tmp_path):
    records = [PAIR] * 3000 + [{**PAIR, "document": " "}, PAIR]
    kinds = _kinds(_write(tmp_path / "rows.parquet", records))
    assert len(kinds) == 3002
    assert {number: kind for number, kind in kinds.items() if kind} == {3001: "empty"}


@pytest.mark.parametrize("column", ["query", "negative", "dictionary"])
def test_parquet_text_that_is_not_utf8_spoils_only_its_row(tmp_path, column):
    values = pa.array([b"q0", b"q1", b"\xff\xfe", b"q3", b"\xc3"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), len(values), values.buffers())
    table = {"query": [f"q{i}" for i in range(5)], "document": [f"d{i}" for i in range(5)]}
    if column == "negative":
        broken = pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), broken)
        table["negative"] = broken
    elif column == "dictionary":
        indices = pa.array([3, 1, 2, 0, 4], pa.int32())
        table["query"] = pa.DictionaryArray.from_arrays(indices, broken)
    else:
        table["query"] = broken
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(table), path)
    found = list(read_rows(path))
    kinds = [row.kind if isinstance(row, RowError) else None for _, row in found]
    assert kinds == [None, None, "undecodable", None, "undecodable"]
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]
    assert found[3][1]["documents"][0] == "d3"


def test_parquet_bytes_are_no_text(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"query": pa.array([b"q"]), "document": ["d"]}), path)
    assert _kinds(path) == {1: "invalid"}


def test_parquet_texts_of_every_arrow_type_are_read(tmp_path):
    path = tmp_path / "rows.parquet"
    columns = {
        "query": pa.array(["q0", "q1"], pa.large_string()),
        "document": pa.array(["d", "d"]).dictionary_encode(),
        "negative": pa.array([["n0"], []], pa.large_list(pa.string())),
    }
    pq.write_table(pa.table(columns), path)
    assert [row["query"] for row in _rows(path)] == ["q0", "q1"]
    assert [row["documents"] for row in _rows(path)] == [["d", "n0"], ["d"]]


# --- lines: marks, blanks, and those that are too long ---


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_byte_order_mark_blank_lines_and_windows_line_ends_do_no_harm(tmp_path, suffix):
    data = b"\xef\xbb\xbf" + LINE + b"\r\n\n  \n\t\r\n" + LINE + b"\r\n" + LINE
    path = _write_bytes(tmp_path / f"rows.{suffix}", data)
    assert _kinds(path) == {1: None, 5: None, 6: None}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_of_ten_megabytes_is_left_out_and_the_next_is_read(tmp_path, suffix, end):
    long = json.dumps({**PAIR, "document": "x" * 10_000_000}).encode()
    path = _write_bytes(tmp_path / f"rows.{suffix}", LINE + b"\n" + long + b"\n" + LINE + end)
    found = dict(read_rows(path))
    assert list(found) == [1, 2, 3]
    assert found[2].kind == "too_long" and "8 MiB" in str(found[2])
    assert found[3]["query"] == PAIR["query"]
    _write_bytes(path, LINE + b"\n" + long + end)
    assert _kinds(path) == {1: None, 2: "too_long"}


def test_lines_up_to_the_limit_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 1000)

    def line(size):  # with the line's end
        empty = len(json.dumps({**PAIR, "document": ""})) + 1
        return json.dumps({**PAIR, "document": "x" * (size - empty)}).encode() + b"\n"

    sizes = [999, 1000, 1001, 1002, 2000, 2001, 2002, 5003, 200, 1000]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(map(line, sizes)))
    kinds = list(_kinds(path).values())
    assert kinds == [None if size <= 1000 else "too_long" for size in sizes]
    # The last may lack its end.
    path.write_bytes(line(1001)[:-1])
    assert _kinds(path) == {1: None}
    path.write_bytes(line(1002)[:-1])
    assert _kinds(path) == {1: "too_long"}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_line_however_long_is_never_held(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 1 << 16)
    long = json.dumps({**PAIR, "document": "x" * 20_000_000}).encode()
    path = _write_bytes(tmp_path / f"rows.{suffix}", LINE + b"\n" + long + b"\n" + LINE)
    del long

    def peak(work):
        tracemalloc.start()
        try:
            result = work()
            return result, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    kinds, read = peak(lambda: _kinds(path))
    parts, split = peak(lambda: split_table(path, 1))
    assert kinds == {1: None, 2: "too_long", 3: None} and len(parts) == 3
    assert max(read, split) < 2_000_000


def test_a_row_group_is_never_held_whole(tmp_path):
    path, rows = tmp_path / "rows.parquet", 20_000
    text = random.Random(0).randbytes(rows * 500).hex()
    documents = [text[i * 1000 : (i + 1) * 1000] for i in range(rows)]
    table = pa.table({"query": ["q"] * rows, "document": documents})
    pq.write_table(table, path, row_group_size=rows, compression="none")
    del text, documents, table
    before, count, most = pa.total_allocated_bytes(), 0, 0
    for _ in read_rows(path):
        count += 1
        most = max(most, pa.total_allocated_bytes() - before)
    assert count == rows and most < 10_000_000  # of 20 MB


# --- parts ---


def _parts_add_up(path, rows, columns=None):
    """Checks that parts are the whole file, whichever of them is read first."""
    parts = split_table(path, rows)
    whole = _comparable(read_rows(path, columns))
    pieces = [_comparable(read_rows(path, columns, part)) for part in reversed(parts)][::-1]
    assert [row for piece in pieces for row in piece] == whole
    for part, piece in zip(parts, pieces, strict=True):
        assert all(part.start < number <= part.start + part.rows for number, _ in piece)
    starts = [part.start for part in parts]
    assert starts == [sum(part.rows for part in parts[:i]) for i in range(len(parts))]
    # From the start of each on, all that follow are read too.
    for index, part in enumerate(parts):
        rest = _comparable(read_rows(path, columns, part._replace(rows=None)))
        assert rest == [row for piece in pieces[index:] for row in piece]
    # Neighbours can be read as one.
    if len(parts) > 1:
        pair = parts[0]._replace(rows=parts[0].rows + parts[1].rows)
        assert _comparable(read_rows(path, columns, pair)) == pieces[0] + pieces[1]
    return parts


_LINES = {
    "good": LINE,
    "other": json.dumps({"query": "é\u2028", "document": "d"}, ensure_ascii=False).encode(),
    "blank": b"",
    "spaces": b" \t ",
    "null": b'{"query": null, "document": "d"}',
    "broken": b'{"query": "q", ',
    "not utf-8": b'{"query": "\xff\xfe", "document": "d"}',
    "long": json.dumps({**PAIR, "document": "x" * 400}).encode(),
}

_EXPECTED = {
    "good": None,
    "other": None,
    "null": "empty",
    "broken": "undecodable",
    "not utf-8": "undecodable",
    "long": "too_long",
}


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(st.sampled_from(sorted(_LINES)), min_size=1, max_size=14),
    rows=st.integers(1, 6),
    suffix=st.sampled_from(["jsonl", "jsonl.gz"]),
    mark=st.booleans(),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    ended=st.booleans(),
)
def test_parts_of_lines_read_one_after_another_are_the_whole_file(
    lines, rows, suffix, mark, line_end, ended
):
    text = line_end.join(_LINES[name] for name in lines) + line_end * ended
    mark = mark and lines[0] not in ("blank", "spaces")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "MAX_ROW_BYTES", 256)
        path = _write_bytes(Path(folder) / f"rows.{suffix}", b"\xef\xbb\xbf" * mark + text)
        parts = _parts_add_up(path, rows)
        count = len(lines) - (lines[-1] == "blank" and not ended)
        assert [part.rows for part in parts] == [
            min(rows, count - start) for start in range(0, count, rows)
        ]
        assert _kinds(path) == {
            number: _EXPECTED[name] for number, name in enumerate(lines, 1) if name in _EXPECTED
        }


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    rows=st.integers(1, 7),
    batch=st.integers(1, 4),
)
def test_parts_of_parquet_are_whole_row_groups_and_add_up(groups, rows, batch):
    schema = pa.schema({"query": pa.string(), "document": pa.string()})
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_PARQUET_BATCH_ROWS", batch)
        path, count = Path(folder) / "rows.parquet", 0
        with pq.ParquetWriter(path, schema) as writer:
            for size in groups:
                records = [
                    {"query": None if i % 4 == 3 else f"q{i}", "document": f"d{i}"}
                    for i in range(count, count + size)
                ]
                writer.write_table(pa.Table.from_pylist(records, schema))
                count += size
        parts = _parts_add_up(path, rows, {"query": "query"})
        ends = {sum(groups[: i + 1]) for i in range(len(groups))}
        assert all(part.start + part.rows in ends for part in parts)
        assert all(part.rows >= rows for part in parts[:-1])
        assert sum(part.rows for part in parts) == count
        numbers = [number for number, _ in read_rows(path)]
        assert numbers == list(range(1, count + 1))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_parts_have_about_as_many_rows_as_asked_for(tmp_path, suffix):
    path = _write(tmp_path / f"rows.{suffix}", [PAIR] * 100)
    assert [part.rows for part in split_table(path, 30)] == [30, 30, 30, 10]
    assert [part.rows for part in split_table(path, 1000)] == [100]


def test_a_part_may_have_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + b"\n\n\n")
    assert [len(list(read_rows(path, None, part))) for part in split_table(path, 1)] == [1, 0, 0]


def test_wrong_columns_are_a_rows_own_fault_in_a_later_part_too(tmp_path):
    path = _write(tmp_path / "rows.jsonl", [PAIR, PAIR, {"text": "t"}, PAIR])
    last = split_table(path, 2)[1]
    (number, bad), (_, row) = read_rows(path, None, last)
    assert (number, bad.kind) == (3, "invalid") and row["query"] == PAIR["query"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_text_of_several_megabytes_is_too_long_for_a_row(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 100)
    records = [{"query": "q", "document": "d" * 50}, {"query": "q", "document": "d" * 101}]
    (_, row), (number, bad) = read_rows(_write(tmp_path / f"rows.{suffix}", records))
    assert len(row["documents"][0]) == 50 and (number, bad.kind) == (2, "too_long")


def test_a_part_is_read_without_what_stands_before_it(tmp_path):
    path = _write(tmp_path / "rows.jsonl", [{**PAIR, "query": f"q{i}"} for i in range(1000)])
    part = split_table(path, 10)[50]
    data = path.read_bytes()
    path.write_bytes(b"\xff" * part.offset + data[part.offset :])
    (number, row), *others = read_rows(path, None, part)
    assert (number, row["query"], len(others)) == (501, "q500", 9)
