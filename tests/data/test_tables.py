"""Tables of rows: every row once, in place, whichever way and in whichever pieces it is read."""

import gzip
import hashlib
import json
import pickle
import sqlite3
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_jax.data import rows as rows_module
from colbert_jax.data import tables as tables_module
from colbert_jax.data.rows import Part, RowError
from colbert_jax.data.tables import (
    FilesTable,
    JoinedTable,
    RowsTable,
    SequentialReader,
    Stretch,
    describe_files,
    group_stretches,
    index_texts,
)
from colbert_jax.errors import UserError


def _write(path, records, row_group_size=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=row_group_size)
        return path
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text, 1) if path.suffix == ".gz" else text)
    return path


def _pairs(count, name="q"):
    return [{"query": f"{name} {i}", "document": f"document {i}"} for i in range(count)]


def _files(*paths, columns=None):
    return FilesTable(tuple(paths), tuple(path.name for path in paths), columns or {}, {})


def _comparable(placed):
    """What can be compared: errors are not equal to one another."""
    return [
        (place.ordinal, place.name, row.kind if isinstance(row, RowError) else row)
        for place, row in placed
    ]


def _counted(table):
    """A table that writes down what of it is opened."""
    opened = []

    class Counted:
        description = table.description
        stretches = table.stretches

        def read(self, stretch):
            opened.append(stretch)
            return table.read(stretch)

    return Counted(), opened


def _every_way(table, rows_at_least, finished=frozenset()):
    """Reads a table in all ways, checks that they agree, and returns its rows."""
    fine = table.stretches()
    # They cover all rows once, in order.
    first = 0
    for before, stretch in zip([None, *fine], fine, strict=False):
        assert stretch.first == first and stretch.part.rows > 0
        same = before is not None and before.file == stretch.file
        assert stretch.part.start == (before.part.start + before.part.rows if same else 0)
        first += stretch.part.rows
    merged = [s for group in group_stretches(fine, rows_at_least) for s in group]
    assert sum(s.part.rows for s in merged) == first

    expected = [row for s in fine for row in _comparable(table.read(s))]
    pieces = [_comparable(table.read(stretch)) for stretch in merged]
    assert [row for piece in pieces for row in piece] == expected
    ordinals = [ordinal for ordinal, _, _ in expected]
    assert ordinals == sorted(set(ordinals)) and all(0 <= o < first for o in ordinals)
    for stretch, piece in zip(merged, pieces, strict=True):
        stop = stretch.first + stretch.part.rows
        assert all(stretch.first <= ordinal < stop for ordinal, _, _ in piece)

    for stretches in (fine, merged):
        counted, opened = _counted(table)
        reader = SequentialReader(counted)
        in_turn = [(s, _comparable(reader.read(s))) for s in stretches]
        assert [row for _, piece in in_turn for row in piece] == expected
        assert [s.file for s in opened] == sorted({s.file for s in stretches})  # each once

    # A run that goes on leaves out what was finished before.
    counted, opened = _counted(table)
    reader, previous, runs = SequentialReader(counted), None, 0
    for index, (stretch, piece) in enumerate(zip(merged, pieces, strict=True)):
        if index in finished:
            continue
        assert _comparable(reader.read(stretch)) == piece
        runs += previous != index - 1 or merged[index - 1].file != stretch.file
        previous = index
    assert len(opened) == runs
    return expected


# --- files ---

_LINES = {
    "good": (b'{"query": "q%d", "document": "d"}', None),
    "good too": (b'{"query": "q%d", "document": "d", "negative": ["n"]}', None),
    "blank": (b"", "nothing"),
    "null": (b'{"query": null, "document": "d%d"}', "empty"),
    "broken": (b'{"query": "q%d', "undecodable"),
    "not utf-8": (b'{"query": "\xff%d"}', "undecodable"),
    "long": (b'{"query": "q%d", "document": "' + b"d" * 500 + b'"}', "too_long"),
}
_FILE = st.tuples(
    st.sampled_from(["jsonl", "jsonl.gz", "parquet"]),
    st.lists(st.sampled_from(sorted(_LINES)), max_size=10),
    st.booleans(),
)


def _drawn_file(folder, index, kind, names, ended):
    """Writes a file and returns `(path, rows it holds, {row from 0: the query or the error})`."""
    path = folder / f"{index}.{kind}"
    expected = {}
    if kind == "parquet":  # which holds no bad lines
        names = ["null" if _LINES[name][1] else name for name in names]
        records = [
            {"query": None if name == "null" else f"q{i}", "document": "d"}
            for i, name in enumerate(names)
        ]
        schema = pa.schema({"query": pa.string(), "document": pa.string()})
        pq.write_table(pa.Table.from_pylist(records, schema), path, row_group_size=2)
    else:
        lines = [_LINES[name][0].replace(b"%d", str(i).encode()) for i, name in enumerate(names)]
        text = b"\n".join(lines) + b"\n" * (ended and len(lines) > 0)
        path.write_bytes(gzip.compress(text, 1) if kind == "jsonl.gz" else text)
    for i, name in enumerate(names):
        if (kind_of_error := _LINES[name][1]) != "nothing":
            expected[i] = kind_of_error or f"q{i}"
    last_is_no_line = kind != "parquet" and names[-1:] == ["blank"] and not ended
    return path, len(names) - last_is_no_line, expected


@settings(max_examples=200, deadline=None)
@given(
    files=st.lists(_FILE, min_size=1, max_size=3).filter(
        lambda files: any("good" in names for _, names, _ in files)
    ),
    mark=st.integers(1, 4),
    merge=st.integers(1, 7),
    finished=st.frozensets(st.integers(0, 12)),
)
def test_rows_of_files_are_neither_lost_nor_doubled_however_they_are_read(
    files, mark, merge, finished
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_module, "_MARK_ROWS", mark)
        patch.setattr(rows_module, "MAX_ROW_BYTES", 300)
        patch.setattr(rows_module, "_PARQUET_BATCH_ROWS", 3)
        drawn = [_drawn_file(Path(folder), i, *file) for i, file in enumerate(files)]
        expected, first = [], 0
        for path, count, rows in drawn:
            expected += [(first + i, f"{path.name}, row {i + 1}", what) for i, what in rows.items()]
            first += count
        table = _files(*(path for path, _, _ in drawn))
        found = _every_way(table, merge, finished)
        assert [
            (ordinal, name, row if isinstance(row, str) else row["query"])
            for ordinal, name, row in found
        ] == expected
        assert sum(stretch.part.rows for stretch in table.stretches()) == first


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_files_are_cut_where_rows_are_many(tmp_path, suffix):
    paths = [
        _write(tmp_path / f"{i}.{suffix}", _pairs(rows), row_group_size=1000)
        for i, rows in enumerate((25_000, 10_000))
    ]
    stretches = _files(*paths).stretches()
    assert [(s.file, s.part.start, s.part.rows, s.first) for s in stretches] == [
        (0, 0, 10_000, 0),
        (0, 10_000, 10_000, 10_000),
        (0, 20_000, 5_000, 20_000),
        (1, 0, 10_000, 25_000),
    ]
    place, row = next(_files(*paths).read(stretches[2]))
    assert place == (20_000, f"0.{suffix}, row 20001") and row["query"] == "q 20000"


def test_groups_have_enough_rows_of_whichever_files_and_neighbours_are_joined():
    def stretch(file, start, rows, first):
        return Stretch(file, Part(start, rows, 10 * start), first)

    fine = [stretch(0, 10 * i, 10, 10 * i) for i in range(7)]
    fine += [stretch(1, 0, 10, 70), stretch(2, 0, 10, 80), stretch(2, 10, 3, 90)]
    assert group_stretches(fine, 25) == [
        (stretch(0, 0, 30, 0),),
        (stretch(0, 30, 30, 30),),
        (stretch(0, 60, 10, 60), stretch(1, 0, 10, 70), stretch(2, 0, 10, 80)),
        (stretch(2, 10, 3, 90),),
    ]
    assert group_stretches(fine, 30) == group_stretches(fine, 25)
    assert group_stretches(fine, 1) == [(one,) for one in fine]
    assert group_stretches([], 5) == []


def test_a_file_is_opened_anew_where_the_reader_was_left_in_the_midst(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "_MARK_ROWS", 5)
    table, opened = _counted(_files(_write(tmp_path / "a.jsonl.gz", _pairs(20))))
    stretches, reader = table.stretches(), SequentialReader(table)
    left = reader.read(stretches[0])
    assert [next(left)[0].ordinal for _ in range(3)] == [0, 1, 2]
    left.close()
    assert [p.ordinal for p, _ in reader.read(stretches[1])] == [5, 6, 7, 8, 9]
    assert [p.ordinal for p, _ in reader.read(stretches[0])] == [0, 1, 2, 3, 4]
    assert [p.ordinal for p, _ in reader.read(stretches[3])] == [15, 16, 17, 18, 19]
    assert len(opened) == 4
    assert [p.ordinal for p, _ in reader.read(stretches[0])] == [0, 1, 2, 3, 4]
    assert [p.ordinal for p, _ in reader.read(stretches[1])] == [5, 6, 7, 8, 9]
    assert len(opened) == 5


def test_a_file_that_fails_halfway_is_not_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "_MARK_ROWS", 2)
    path = _write(tmp_path / "a.jsonl", _pairs(6))
    table = _files(path)
    stretches, reader = table.stretches(), SequentialReader(table)
    read = tables_module.read_rows

    def failing(*arguments):
        for number, row in read(*arguments):
            if number == 4:
                raise UserError("row 4 cannot be read.")
            yield number, row

    monkeypatch.setattr(tables_module, "read_rows", failing)
    assert len(list(reader.read(stretches[0]))) == 2
    for _ in range(2):
        with pytest.raises(UserError, match="row 4"):
            list(reader.read(stretches[1]))
    assert [place.ordinal for place, _ in reader.read(stretches[2])] == [4, 5]


@pytest.mark.parametrize("text", [b"\n \n", b""])
def test_a_file_without_rows_does_no_harm_beside_others(tmp_path, text):
    first = _write(tmp_path / "first.jsonl", _pairs(3))
    last = _write(tmp_path / "last.jsonl", _pairs(2))
    (tmp_path / "blank.jsonl").write_bytes(text)
    table = _files(first, tmp_path / "blank.jsonl", last)
    found = _every_way(table, 10)
    assert [name for _, name, _ in found][2:4] == ["first.jsonl, row 3", "last.jsonl, row 1"]


def test_files_that_are_all_empty_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jsonl has no rows"):
        _files(tmp_path / "a.jsonl", tmp_path / "b.jsonl").stretches()


def test_columns_of_other_names_are_read(tmp_path):
    path = _write(tmp_path / "a.parquet", [{"question": "q", "document": "d"}])
    table = _files(path, columns={"query": "question"})
    ((place, row),) = table.read(table.stretches()[0])
    assert place == (0, "a.parquet, row 1") and row["query"] == "q"
    wrong = _files(path)
    with pytest.raises(UserError, match=r"a\.parquet.*question, document"):
        list(wrong.read(wrong.stretches()[0]))


def test_tables_cross_to_other_processes(tmp_path):
    path = _write(tmp_path / "a.jsonl", _pairs(3))
    row = {"query": "q", "documents": ["d"], "scores": None}
    for table in (_files(path), RowsTable((row,), {})):
        copy = pickle.loads(pickle.dumps(table))
        assert copy.stretches() == table.stretches()
        (stretch,) = copy.stretches()
        assert _comparable(copy.read(stretch)) == _comparable(table.read(stretch))


def test_rows_in_memory_are_read_like_those_of_files():
    rows = [{"query": f"q{i}", "documents": ["d"], "scores": None} for i in range(7)]
    table = RowsTable(tuple(rows), {"rows": 7})
    found = _every_way(table, 3)
    assert found == [(i, f"row {i + 1}", row) for i, row in enumerate(rows)]
    part = table.read(Stretch(0, Part(2, 3), 2))
    assert [(place.ordinal, row["query"]) for place, row in part] == [
        (2, "q2"),
        (3, "q3"),
        (4, "q4"),
    ]


def test_files_are_described_by_size_and_digest(tmp_path):
    path = _write(tmp_path / "a.jsonl", _pairs(3))
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert describe_files([path]) == {
        "files": [{"name": "a.jsonl", "bytes": len(data), "sha256": digest}]
    }
    for missing in (tmp_path / "b.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"{missing.name} cannot be read"):
            describe_files([path, missing])


# --- joined tables ---

DOCUMENTS = [{"document_id": str(i), "text": f"document {i}"} for i in range(9)]
QUERIES = [{"query_id": str(i), "text": f"query {i}"} for i in range(3)]
GOOD = {"query_id": "0", "document_ids": ["0", "1"], "scores": [1.0, 0.0]}
GOOD_ROW = {"query": "query 0", "documents": ["document 0", "document 1"], "scores": [1.0, 0.0]}


def _joined(folder, *tables, queries=QUERIES, documents=DOCUMENTS, suffix="jsonl"):
    """A joined table whose rows lie in so many files."""
    paths = tuple(
        _write(folder / f"train{i}.{suffix}", records, row_group_size=2)
        for i, records in enumerate(tables)
    )
    sides = {
        "queries": [("q", _write(folder / f"queries.{suffix}", queries))],
        "documents": [("d", _write(folder / f"documents.{suffix}", documents))],
    }
    index_texts(folder / "texts.sqlite", sides)
    names = tuple(path.name for path in paths)
    return JoinedTable(paths, names, folder / "texts.sqlite", {})


def _read(table):
    return [row for stretch in table.stretches() for _, row in table.read(stretch)]


def _kinds(table):
    return [row.kind if isinstance(row, RowError) else None for row in _read(table)]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "parquet"])
@pytest.mark.parametrize("as_text", [None, str, json.dumps])
@pytest.mark.parametrize("ids", [int, str])
@pytest.mark.parametrize("their_ids", [int, str])
def test_rows_are_joined_with_their_texts_by_id(tmp_path, suffix, as_text, ids, their_ids):
    train = []
    for i in range(3):
        candidates, scores = [ids(i + j) for j in range(4)], [0.5 * j for j in range(4)]
        train.append(
            {
                "query_id": ids(i),
                "document_ids": as_text(candidates) if as_text else candidates,
                "scores": as_text(scores) if as_text else scores,
                "more": "columns",
            }
        )
    queries = [{**record, "query_id": their_ids(record["query_id"])} for record in QUERIES]
    documents = [{**one, "document_id": their_ids(one["document_id"])} for one in DOCUMENTS]
    table = _joined(tmp_path, train, queries=queries, documents=documents, suffix=suffix)
    assert _read(table) == [
        {
            "query": f"query {i}",
            "documents": [f"document {i + j}" for j in range(4)],
            "scores": [0.0, 0.5, 1.0, 1.5],
        }
        for i in range(3)
    ]


BAD_JOINED = [
    ({**GOOD, "query_id": "unknown"}, "no_text"),
    ({**GOOD, "document_ids": ["0", "unknown"]}, "no_text"),
    ({**GOOD, "document_ids": ["0", " 1"]}, "no_text"),
    ({**GOOD, "query_id": None}, "empty"),
    ({**GOOD, "query_id": 0.0}, "invalid"),
    ({**GOOD, "query_id": False}, "invalid"),
    ({**GOOD, "query_id": ["0"]}, "invalid"),
    ({**GOOD, "document_ids": None}, "empty"),
    ({**GOOD, "document_ids": [], "scores": []}, "empty"),
    ({**GOOD, "document_ids": ["0", None]}, "empty"),
    ({**GOOD, "document_ids": ["0", ["1"]]}, "invalid"),
    ({**GOOD, "document_ids": "0, 1"}, "invalid"),
    ({**GOOD, "document_ids": "['0', "}, "invalid"),
    ({**GOOD, "document_ids": '{"0": 1}'}, "invalid"),
    ({**GOOD, "document_ids": "('0', '1')"}, "invalid"),
    ({**GOOD, "document_ids": "[" * 100_000}, "invalid"),
    ({**GOOD, "document_ids": "[0, 1j]"}, "invalid"),
    ({**GOOD, "scores": None}, "empty"),
    ({**GOOD, "scores": [1.0]}, "invalid"),
    ({**GOOD, "scores": [1.0, 2.0, 3.0]}, "invalid"),
    ({**GOOD, "scores": [1.0, float("nan")]}, "invalid"),
    ({**GOOD, "scores": "[1.0, NaN]"}, "invalid"),
    ({**GOOD, "scores": "[1.0, inf]"}, "invalid"),
    ({**GOOD, "scores": "[1.0, 1e999]"}, "invalid"),
    ({**GOOD, "scores": ["1.0", "2.0"]}, "invalid"),
]


@pytest.mark.parametrize(("bad", "kind"), BAD_JOINED)
def test_a_joined_row_that_cannot_be_used_is_told_and_the_next_is_read(tmp_path, bad, kind):
    table = _joined(tmp_path, [GOOD, bad, GOOD])
    rows = _read(table)
    assert rows[0] == rows[2] == GOOD_ROW
    assert isinstance(rows[1], RowError) and rows[1].kind == kind and str(rows[1])


@pytest.mark.parametrize(
    "text",
    [
        "{[]}",  # a set of a list, which cannot be: TypeError
        "{[1]: 2}",
        "[0x" + "f" * 5000 + ", 1]",  # an integer that Python will not write in decimal digits
        "\0",
        "[" + "(" * 500 + ")" * 500 + "]",
        "'\ud800'",
    ],
)
@pytest.mark.parametrize("column", ["document_ids", "scores"])
def test_no_text_of_a_list_stops_the_reading(tmp_path, column, text):
    table = _joined(tmp_path, [GOOD, {**GOOD, column: text}, GOOD])
    assert _kinds(table) == [None, "invalid", None]


def test_half_a_surrogate_pair_in_an_id_or_a_text_drops_the_row(tmp_path):
    broken = {"document_id": "2", "text": "half of a pair \ud800"}
    train = [
        GOOD,
        {**GOOD, "document_ids": ["0", "2"]},
        {**GOOD, "query_id": "\ud800"},
        {**GOOD, "document_ids": ["0", "\udc00"]},
        GOOD,
    ]
    table = _joined(tmp_path, train, documents=[*DOCUMENTS[:2], broken])
    rows = _read(table)
    assert rows[0] == rows[4] == GOOD_ROW
    assert all(isinstance(row, RowError) for row in rows[1:4])


def test_lines_that_cannot_be_read_keep_their_place_among_joined_rows(tmp_path):
    table = _joined(tmp_path, [GOOD])
    good = json.dumps(GOOD).encode()
    table.paths[0].write_bytes(b"\n".join([good, b"{", b"", b'{"\xff": 1}', good]))
    found = [(p.ordinal, p.name, row) for s in table.stretches() for p, row in table.read(s)]
    assert [(o, n) for o, n, _ in found] == [
        (i, f"train0.jsonl, row {i + 1}") for i in (0, 1, 3, 4)
    ]
    assert _kinds(table) == [None, "undecodable", "undecodable", None]
    assert found[3][2] == GOOD_ROW


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    bad=st.frozensets(st.integers(0, 20)),
    mark=st.integers(1, 4),
    merge=st.integers(1, 7),
    block=st.integers(1, 4),
    finished=st.frozensets(st.integers(0, 12)),
    suffix=st.sampled_from(["jsonl.gz", "parquet"]),
)
def test_joined_rows_are_neither_lost_nor_doubled_however_they_are_read(
    counts, bad, mark, merge, block, finished, suffix
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_module, "_MARK_ROWS", mark)
        patch.setattr(tables_module, "_JOIN_ROWS", block)
        total = sum(counts)
        train = [
            {
                "query_id": "none" if i in bad else str(i % 3),
                "document_ids": [str((i + j) % 9) for j in range(1 + i % 4)],
                "scores": [float(i)] * (1 + i % 4),
            }
            for i in range(total)
        ]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        split = [train[start : start + n] for start, n in zip(starts, counts, strict=True)]
        found = _every_way(_joined(Path(folder), *split, suffix=suffix), merge, finished)
        assert [ordinal for ordinal, _, _ in found] == list(range(total))
        for i, (_, _, row) in enumerate(found):
            assert row == (
                "no_text"
                if i in bad
                else {
                    "query": f"query {i % 3}",
                    "documents": [f"document {(i + j) % 9}" for j in range(1 + i % 4)],
                    "scores": [float(i)] * (1 + i % 4),
                }
            )


def test_more_texts_are_looked_up_than_a_statement_takes(tmp_path):
    documents = [{"document_id": i, "text": f"document {i}"} for i in range(5000)]
    counts = [(3000, 5000), (0, 2000), (0, 300_000)]
    train = [
        {"query_id": 0, "document_ids": list(range(*ids)), "scores": [0.0] * (ids[1] - ids[0])}
        for ids in counts
    ]
    first, second, beyond = _read(_joined(tmp_path, train, documents=documents))
    assert first["documents"] == [f"document {i}" for i in range(3000, 5000)]
    assert second["documents"] == [f"document {i}" for i in range(2000)]
    assert beyond.kind == "no_text"


def test_texts_are_joined_as_they_are(tmp_path):
    texts = [
        "  spaces  ",
        "nul \0 inside",
        "é\u2028 \U0001f600",
        "'; DROP TABLE documents; --",
        "1",
    ]
    documents = [{"document_id": f"id {i}'\0?", "text": text} for i, text in enumerate(texts)]
    train = [
        {
            "query_id": "0",
            "document_ids": [document["document_id"] for document in documents],
            "scores": [0.0] * len(texts),
        }
    ]
    (row,) = _read(_joined(tmp_path, train, documents=documents))
    assert row["documents"] == texts


def test_a_query_and_a_document_may_share_an_id_and_ids_are_not_numbers(tmp_path):
    documents = [{"document_id": "0", "text": "zero"}, {"document_id": "00", "text": "two zeros"}]
    table = _joined(tmp_path, [{**GOOD, "document_ids": ["00", "0"]}], documents=documents)
    (row,) = _read(table)
    assert (row["query"], row["documents"]) == ("query 0", ["two zeros", "zero"])


@pytest.mark.parametrize("text", [None, "", " \n", 3])
def test_a_text_that_is_none_drops_the_rows_that_want_it(tmp_path, text):
    documents = [*DOCUMENTS[:2], {"document_id": "2", "text": text}]
    train = [GOOD, {**GOOD, "document_ids": ["0", "2"]}]
    assert _kinds(_joined(tmp_path, train, documents=documents)) == [None, "no_text"]


def test_a_line_of_texts_that_cannot_be_read_drops_the_rows_that_want_it(tmp_path):
    documents = _write(tmp_path / "documents.jsonl", DOCUMENTS[:2])
    documents.write_bytes(documents.read_bytes() + b'{"document_id": "2", "text": "\xff"}\n')
    queries = _write(tmp_path / "queries.jsonl", QUERIES)
    texts = tmp_path / "texts.sqlite"
    index_texts(texts, {"queries": [("q", queries)], "documents": [("d", documents)]})
    train = _write(tmp_path / "train.jsonl", [GOOD, {**GOOD, "document_ids": ["0", "2"]}])
    assert _kinds(JoinedTable((train,), ("train",), texts, {})) == [None, "no_text"]


def test_texts_that_lie_in_several_files_are_all_found(tmp_path):
    halves = [
        (name, _write(tmp_path / f"{name}.parquet", half))
        for name, half in (("one", DOCUMENTS[:1]), ("two", DOCUMENTS[1:]))
    ]
    queries = [("q", _write(tmp_path / "queries.parquet", QUERIES))]
    index_texts(tmp_path / "texts.sqlite", {"queries": queries, "documents": halves})
    train = _write(tmp_path / "train.jsonl", [GOOD])
    assert _read(JoinedTable((train,), ("t",), tmp_path / "texts.sqlite", {})) == [GOOD_ROW]


def test_list_texts_are_never_run_as_code(tmp_path):
    made = tmp_path / "made"
    for danger in (
        f"[open({str(made)!r}, 'w')]",
        f"[__import__('pathlib').Path({str(made)!r}).touch()]",
        f"(lambda: open({str(made)!r}, 'w'))()",
    ):
        for column in ("document_ids", "scores"):
            table = _joined(tmp_path, [{**GOOD, column: danger}])
            assert _kinds(table) == ["invalid"]
            assert not made.exists()


@pytest.mark.parametrize("wrong", ["train", "queries", "documents"])
def test_a_table_with_wrong_columns_is_named(tmp_path, wrong):
    tables = {"train": [GOOD], "queries": QUERIES, "documents": DOCUMENTS}
    tables[wrong] = [{"id": "1", "content": "t"}]
    with pytest.raises(UserError) as caught:
        _read(_joined(tmp_path, *[tables.pop("train")], **tables))
    assert wrong in str(caught.value) and "id, content" in str(caught.value)
    assert ("document_ids" if wrong == "train" else "text") in str(caught.value)
    assert not (tmp_path / "texts.sqlite").exists() or wrong == "train"


def test_a_text_whose_id_is_none_is_named_by_file_and_row(tmp_path):
    with pytest.raises(UserError, match=r"d, row 2: 1\.5 is no id"):
        _joined(tmp_path, [GOOD], documents=[DOCUMENTS[0], {"document_id": 1.5, "text": "t"}])


def test_a_database_that_was_half_written_is_not_taken_for_whole(tmp_path):
    files = {
        "queries": [("q", _write(tmp_path / "queries.jsonl", QUERIES))],
        "documents": [
            ("good", _write(tmp_path / "good.jsonl", DOCUMENTS)),
            ("bad", tmp_path / "bad.jsonl"),
        ],
    }
    texts, bad = tmp_path / "texts.sqlite", tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"other": 1}\n' + json.dumps({"document_id": "x", "text": "t"}).encode())
    with pytest.raises(UserError, match=r"bad\.jsonl, row 1"):
        index_texts(texts, files)
    assert not texts.exists()
    # What a killed program left, whole or torn, is thrown away.
    for leftover in (None, b"torn", b""):
        if leftover is not None:
            (tmp_path / "texts.sqlite.partial").write_bytes(leftover)
        bad.write_bytes(json.dumps({"document_id": "x", "text": "t"}).encode())
        texts.unlink(missing_ok=True)
        index_texts(texts, files)
        assert sorted(path.name for path in tmp_path.glob("texts*")) == ["texts.sqlite"]
        train = _write(tmp_path / "train.jsonl", [GOOD, {**GOOD, "document_ids": ["x", "8"]}])
        rows = _read(JoinedTable((train,), ("t",), texts, {}))
        assert [row["documents"] for row in rows] == [GOOD_ROW["documents"], ["t", "document 8"]]


def test_texts_are_indexed_once(tmp_path):
    table = _joined(tmp_path, [GOOD])
    before = table.texts.read_bytes()
    missing = [("gone", tmp_path / "gone.jsonl")]
    index_texts(table.texts, {"queries": missing, "documents": missing})
    assert table.texts.read_bytes() == before and _read(table) == [GOOD_ROW]


def test_a_database_that_cannot_be_written_says_so(tmp_path):
    sides = {"queries": [("q", _write(tmp_path / "queries.jsonl", QUERIES))], "documents": []}
    with pytest.raises(UserError, match=r"texts\.sqlite cannot be written.*make room"):
        index_texts(tmp_path / "nowhere" / "texts.sqlite", sides)


@pytest.mark.parametrize("name", ["with spaces", "100%25", "what?", "a#b", "é"])
def test_a_folder_of_any_name_can_hold_the_texts(tmp_path, name):
    assert _read(_joined(tmp_path / name, [GOOD])) == [GOOD_ROW]
    (copy,) = pickle.loads(pickle.dumps([_joined(tmp_path / name, [GOOD])]))
    assert _read(copy) == [GOOD_ROW]


def test_a_database_that_is_gone_is_not_made_anew(tmp_path):
    table = _joined(tmp_path, [GOOD])
    table.texts.unlink()
    with pytest.raises((sqlite3.Error, UserError)):
        _read(table)
    assert not table.texts.exists()
