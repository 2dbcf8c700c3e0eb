"""Files of rows: what is accepted, and what every bad one says."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colbert_jax.data.rows import read_rows
from colbert_jax.errors import UserError

PAIR = {"query": "what is late interaction", "document": "a score for each pair of tokens"}
SCORED = {"query": "q", "documents": ["a", "b"], "scores": [1.5, -2]}


def _write_lines(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(text.encode())
    return path


def _write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
        return path
    return _write_lines(path, records)


def _error(path):
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    return message


SUFFIXES = ["jsonl", "json", "jsonl.gz", "json.gz", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pairs_are_read_from_every_kind_of_file(tmp_path, suffix):
    records = [{**PAIR, "query": f"q{i}", "shard": i} for i in range(5)]
    rows = list(read_rows(_write(tmp_path / f"pairs.{suffix}", records)))
    assert [row["query"] for row in rows] == [f"q{i}" for i in range(5)]
    assert all(row["documents"] == [PAIR["document"]] and row["scores"] is None for row in rows)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_negatives_follow_the_positive_in_every_spelling(tmp_path, suffix):
    cases = {
        "list": [{**PAIR, "negative": ["n0", "n1"]}],
        "text": [{**PAIR, "negative": "n0"}],
        "columns": [{**PAIR, "negative_10": "n10", "negative_9": "n9", "negative_11": None}],
        "none": [{**PAIR, "negative": []}],
    }
    found = {
        name: next(iter(read_rows(_write(tmp_path / f"{name}.{suffix}", records))))["documents"][1:]
        for name, records in cases.items()
    }
    assert found == {"list": ["n0", "n1"], "text": ["n0"], "columns": ["n9", "n10"], "none": []}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_distillation_rows_keep_candidates_and_scores_together(tmp_path, suffix):
    (row,) = read_rows(_write(tmp_path / f"scored.{suffix}", [SCORED]))
    assert row == {"query": "q", "documents": ["a", "b"], "scores": [1.5, -2.0]}


def test_flag_embedding_rows_with_scores_are_distillation_rows(tmp_path):
    record = {
        "query": "q",
        "pos": ["p"],
        "neg": ["n", "m"],
        "pos_scores": [9],
        "neg_scores": [2, 1],
    }
    (row,) = read_rows(_write(tmp_path / "rows.jsonl", [{**record, "prompt": "x", "type": "y"}]))
    assert row == {"query": "q", "documents": ["p", "n", "m"], "scores": [9.0, 2.0, 1.0]}


def test_flag_embedding_rows_without_scores_never_take_a_positive_for_a_negative(tmp_path):
    record = {"query": "q", "pos": ["p", "another positive"], "neg": ["n"]}
    (row,) = read_rows(_write(tmp_path / "rows.jsonl", [record]))
    assert row == {"query": "q", "documents": ["p", "n"], "scores": None}


def test_text_is_passed_on_as_it_is(tmp_path):
    text = "  {{x}} <s>[MASK]\u2028 $(rm) é\u0000 \\n "
    (row,) = read_rows(_write(tmp_path / "rows.jsonl", [{"query": text, "document": text}]))
    assert row["query"] == text and row["documents"] == [text]


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\n  \n")
    assert len(list(read_rows(path))) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path, suffix):
    assert "does not exist" in _error(tmp_path / f"rows.{suffix}")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert "no rows" in _error(tmp_path / name)


def test_an_empty_parquet_file_is_refused(tmp_path):
    pq.write_table(
        pa.table({"query": pa.array([], "string"), "document": []}), tmp_path / "a.parquet"
    )
    assert "no rows" in _error(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"")
    assert "Parquet" in _error(tmp_path / "b.parquet")


def test_a_folder_is_refused(tmp_path):
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / name).mkdir()
        assert "cannot be read" in _error(tmp_path / name)


def test_another_kind_of_file_is_refused_with_the_kinds_there_are(tmp_path):
    (tmp_path / "rows.csv").write_text("query,document\n")
    assert ".jsonl.gz" in _error(tmp_path / "rows.csv")


def test_bad_lines_are_named_by_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(PAIR).encode() + b"\n"
    bad_lines = {
        b'{"query": "q", ': "not valid JSON",
        b"[1, 2]": "is a list",
        b"[" * 100_000: "not valid JSON",
        b'{"query": "\xff"}': "not UTF-8",
        b'{"query": 1' + b"0" * 5000 + b"}": "not valid JSON",
    }
    for line, expected in bad_lines.items():
        path.write_bytes(good + good + line + b"\n")
        message = _error(path)
        assert expected in message and "row 3" in message


def test_a_truncated_or_damaged_gzip_file_is_refused(tmp_path):
    whole = gzip.compress("".join(json.dumps({**PAIR, "n": i}) + "\n" for i in range(999)).encode())
    path = tmp_path / "rows.jsonl.gz"
    middle = len(whole) // 2
    for damaged in (whole[:-9], whole[:middle], b"plain text"):
        path.write_bytes(damaged)
        assert "gzip" in _error(path)
    path.write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    _error(path)


def test_a_broken_parquet_file_is_refused(tmp_path):
    path = _write(tmp_path / "rows.parquet", [PAIR] * 50)
    whole = path.read_bytes()
    for broken in (whole[:-20], b"PAR1", whole[:4] + bytes(60) + whole[64:]):
        path.write_bytes(broken)
        _error(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_wrong_columns_are_listed_beside_those_wanted(tmp_path, suffix):
    message = _error(_write(tmp_path / f"rows.{suffix}", [{"question": "q", "answer": "a"}]))
    assert "question, answer" in message and "query, document" in message


def test_columns_that_change_within_a_file_are_noticed(tmp_path):
    assert "row 2" in _error(_write(tmp_path / "rows.jsonl", [PAIR, {"query": "q"}]))


BAD_ROWS = [
    {**PAIR, "query": None},
    {**PAIR, "query": " \n\t"},
    {**PAIR, "query": 3},
    {**PAIR, "document": None},
    {**PAIR, "document": ""},
    {**PAIR, "document": ["a"]},
    {**PAIR, "document": "\ud800"},
    {**PAIR, "negative": ["n", None]},
    {**PAIR, "negative": {"a": 1}},
    {**PAIR, "negative": [" "]},
    {**SCORED, "documents": None},
    {**SCORED, "documents": [], "scores": []},
    {**SCORED, "documents": "ab"},
    {**SCORED, "scores": None},
    {**SCORED, "scores": [1.0]},
    {**SCORED, "scores": [1.0, float("nan")]},
    {**SCORED, "scores": [1.0, float("-inf")]},
    {**SCORED, "scores": [1.0, 10**400]},
    {**SCORED, "scores": [1.0, None]},
    {**SCORED, "scores": [1.0, True]},
    {**SCORED, "scores": ["1", "2"]},
    {"query": "q", "pos": [], "neg": ["n"]},
    {"query": "q", "pos": ["p"], "neg": None},
    {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1]},
    {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1, 2], "neg_scores": []},
]


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(tmp_path, bad):
    message = _error(_write(tmp_path / "rows.jsonl", [PAIR, bad]))
    assert "row 2" in message and "column" not in message


def test_a_bad_parquet_row_is_named_by_its_number_in_the_file(tmp_path):
    records = [PAIR] * 3000 + [{**PAIR, "document": " "}]
    assert "row 3001" in _error(_write(tmp_path / "rows.parquet", records))


def test_bad_rows_can_be_left_out_but_wrong_columns_cannot(tmp_path):
    errors = []
    path = _write(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "query": ""}, PAIR])
    assert len(list(read_rows(path, on_bad_row=errors.append))) == 2
    assert len(errors) == 1 and "row 2" in str(errors[0])
    with pytest.raises(UserError):
        list(read_rows(_write(path, [PAIR, {"text": "t"}]), on_bad_row=errors.append))


def test_reading_begins_before_the_file_is_read_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + "\nbroken\n")
    assert next(read_rows(path))["query"] == PAIR["query"]
