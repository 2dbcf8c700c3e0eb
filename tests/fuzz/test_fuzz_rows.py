"""Whatever a file of rows holds, it gives rows of the promised form or one sentence."""

import gzip
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_inputs import any_text, bounded, damage, edits, scalars, values
from fuzz_readers import check_rows_file, joined, scratch
from hypothesis import assume, given
from hypothesis import strategies as st

from colbert_jax.data.rows import RowError

VALID = (
    {"query": "what is it", "document": "it is this"},
    {"query": "q", "document": "d", "negative": ["n", "m"]},
    {"query": "q", "document": "d", "negative_0": "n", "negative_1": None},
    {"query": "q", "documents": ["a", "b"], "scores": [1.5, -2]},
    {"query": "q", "pos": ["a"], "neg": ["b"]},
    {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": [0.5]},
)
NAMES = sorted({name for row in VALID for name in row})


def lines_of(records: list[Any], ascii_only: bool = True) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
    return text.encode("utf-8", "surrogatepass")


def check_bytes(data: bytes, name: str = "rows.jsonl") -> list[tuple[int, Any]] | None:
    path = scratch() / name
    path.write_bytes(data)
    return check_rows_file(path)


# --- JSON lines ---

column = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(["negative_", "negative_00", "negative_\u0663", "negative_" + "1" * 5_000]),
    any_text,
)
value = st.one_of(
    st.sampled_from(["a text", ["a", "b"], [1.0, 2.0], [], [None], {}, [["a"]]]),
    st.lists(scalars, max_size=3),
    values(),
)
record = st.one_of(
    st.sampled_from(VALID),
    st.dictionaries(column, value, max_size=4),
    st.builds(
        lambda row, name, value: {**row, name: value},
        st.sampled_from(VALID),
        column,
        value,
    ),
)


@bounded(150)
@given(st.lists(st.one_of(record, values()), max_size=5), st.booleans())
def test_lines_of_any_json_give_rows_or_one_sentence(records: list[Any], ascii_only: bool) -> None:
    check_bytes(lines_of(records, ascii_only))


@bounded(100)
@given(record)
def test_a_bad_row_after_a_good_one_costs_no_other(row: Any) -> None:
    found = check_bytes(lines_of([VALID[0], row, VALID[1]]))
    assert found is not None and [number for number, _ in found] == [1, 2, 3]
    assert not isinstance(found[0][1], RowError) and not isinstance(found[2][1], RowError)


@bounded(150)
@given(st.lists(record, min_size=1, max_size=4), edits, st.booleans())
def test_damaged_lines_give_rows_or_one_sentence(
    records: list[Any], changes: list[tuple[str, float, int]], compressed: bool
) -> None:
    data = lines_of(records)
    check_bytes(damage(data, changes))
    if compressed:
        check_bytes(damage(gzip.compress(data, mtime=0), changes), "rows.jsonl.gz")
        check_bytes(gzip.compress(damage(data, changes), mtime=0), "rows.json.gz")


@bounded(60)
@given(st.binary(max_size=200), st.sampled_from(["rows.jsonl", "rows.json.gz", "rows.parquet"]))
def test_any_bytes_give_rows_or_one_sentence(data: bytes, name: str) -> None:
    check_bytes(data, name)


@pytest.mark.parametrize("depth", [100, 900, 980, 990, 995, 1_000, 5_000, 200_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
def test_however_deep_a_value_it_spoils_only_its_row(
    depth: int, opening: str, closing: str
) -> None:
    middle = opening * depth + "1" + closing * depth
    for bad in (
        middle,
        f'{{"query": {middle}, "document": "d"}}',
        f'{{"query": "q", "document": "d", "negative": {middle}}}',
        f'{{"query": "q", "documents": ["d"], "scores": {middle}}}',
    ):
        found = check_bytes(lines_of([VALID[0]]) + bad.encode() + b"\n" + lines_of([VALID[0]]))
        assert found is not None and len(found) == 3
        assert isinstance(found[1][1], RowError)


def test_the_last_of_doubled_keys_counts() -> None:
    found = check_bytes(b'{"query": 1, "document": "d", "query": "q"}\n')
    assert found == [(1, {"query": "q", "documents": ["d"], "scores": None})]


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_score_that_is_no_finite_number_spoils_its_row(score: str) -> None:
    data = f'{{"query": "q", "documents": ["d"], "scores": [{score}]}}\n'.encode()
    found = check_bytes(data)
    assert found is not None and "not finite" in str(found[0][1])


# --- Parquet ---

numbers = st.integers(-(2**63), 2**63 - 1)
small = st.integers(-100, 100)
# Types of a column of Arrow's, and what its values are drawn from.
TYPES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.string(), any_text.map(lambda text: text.encode("utf-8", "replace").decode())),
    (pa.string(), st.sampled_from(["a text", "another"])),
    (pa.large_string(), st.sampled_from(["a text", "another", ""])),
    (pa.string_view(), st.sampled_from(["a text", "another", ""])),
    (pa.binary(), st.binary(max_size=8)),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    (pa.int8(), small),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    (pa.decimal128(38, 2), st.decimals(-1000, 1000, places=2)),
    (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["a", "b"])),
    *((pa.timestamp(unit), numbers) for unit in ("s", "ms", "us", "ns")),
    *((pa.timestamp(unit, "Europe/Zurich"), numbers) for unit in ("s", "us")),
    (pa.timestamp("us", "No/Where"), small),
    (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.date64(), st.integers(-(2**36), 2**36).map(lambda day: day * 86_400_000)),
    (pa.time32("ms"), st.integers(-(2**31), 2**31 - 1)),
    (pa.time64("ns"), numbers),
    *((pa.duration(unit), numbers) for unit in ("s", "us", "ns")),
]
STORED = {"timestamp": 64, "date32": 32, "date64": 64, "time32": 32, "time64": 64, "duration": 64}


def array_of(kind: pa.DataType, drawn: list[Any]) -> pa.Array:
    """An array; of times, the values are what is stored, in or out of what Python can hold."""
    bits = STORED.get(str(kind).split("[")[0])
    if bits is None:
        return pa.array(drawn, kind)
    return pa.array(drawn, pa.int32() if bits == 32 else pa.int64()).view(kind)


@st.composite
def arrays(draw: st.DrawFn, length: int) -> pa.Array:
    wrapped = draw(
        st.sampled_from(["", "", "", "list", "list", "large", "fixed", "struct", "deep"])
    )
    kind, value = draw(st.sampled_from(TYPES))
    if wrapped in ("", "struct"):
        array = array_of(kind, draw(st.lists(st.none() | value, min_size=length, max_size=length)))
        return pa.StructArray.from_arrays([array], ["inner"]) if wrapped else array
    if wrapped == "fixed":
        inner = array_of(kind, draw(st.lists(value, min_size=2 * length, max_size=2 * length)))
        return pa.FixedSizeListArray.from_arrays(inner, 2)
    counts = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    offsets = [sum(counts[:i]) for i in range(length + 1)]
    inner = array_of(kind, draw(st.lists(value, min_size=offsets[-1], max_size=offsets[-1])))
    if wrapped == "large":
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), inner)
    outer = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner)
    if wrapped == "deep":
        return pa.ListArray.from_arrays(pa.array(range(length + 1), pa.int32()), outer)
    return outer


@st.composite
def parquet_tables(draw: st.DrawFn) -> pa.Table:
    shapes = [list(row) for row in VALID] + [["query.a", "query", "document"]]
    names = draw(st.sampled_from(shapes))
    names += draw(st.lists(column, max_size=2))
    names = [name.encode("utf-8", "replace").decode() for name in names]
    length = draw(st.integers(0, 4))
    return pa.table([draw(arrays(length)) for _ in names], names=names)


def written(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink, **options)
    except (pa.ArrowException, ValueError):  # Parquet has no such type
        assume(False)
    return sink.getvalue().to_pybytes()


@bounded(200)
@given(parquet_tables())
def test_tables_of_any_types_give_rows_or_one_sentence(table: pa.Table) -> None:
    check_bytes(written(table), "rows.parquet")


SOUND = [
    written(pa.Table.from_pylist([row] * 3), compression=compression, row_group_size=2)
    for row in VALID
    for compression in ("NONE", "SNAPPY", "ZSTD", "GZIP")
]


@bounded(200)
@given(st.sampled_from(SOUND), edits)
def test_damaged_tables_give_rows_or_one_sentence(
    data: bytes, changes: list[tuple[str, float, int]]
) -> None:
    check_bytes(damage(data, changes), "rows.parquet")


@bounded(100)
@given(st.sampled_from(SOUND), edits)
def test_damaged_footers_give_rows_or_one_sentence(
    data: bytes, changes: list[tuple[str, float, int]]
) -> None:
    size = int.from_bytes(data[-8:-4], "little") + 8
    footer = damage(data[-size:-8], changes)
    check_bytes(data[:-size] + footer + len(footer).to_bytes(4, "little") + b"PAR1", "rows.parquet")


# --- tables joined by id ---

listed = st.one_of(
    values(),
    st.builds(repr, values()),
    st.builds(json.dumps, values()),
    st.sampled_from(["[0x" + "f" * 5_000 + "]", "[[0x" + "f" * 5_000 + "]]", "1" * 5_000]),
    st.sampled_from(["[" * 300, "-" * 5_000, "[1", "['1', '2']", "[1, 2]", "[1+2j]", "[b'1']"]),
    st.sampled_from(["{1}", "[...]", "['\\d']", "\0"]),
)


@bounded(150)
@given(
    st.lists(
        st.fixed_dictionaries({"query_id": listed, "document_ids": listed, "scores": listed}),
        min_size=1,
        max_size=3,
    )
)
def test_joined_tables_give_rows_or_one_sentence(records: list[Any]) -> None:
    joined(lines_of(records))


@pytest.mark.parametrize("depth", [50, 90, 100, 500, 900, 950, 960, 970, 980, 990, 5_000, 100_000])
@pytest.mark.parametrize("quoted", [False, True])
def test_however_deep_an_id_it_spoils_only_its_row(depth: int, quoted: bool) -> None:
    nested = "[" * depth + "1" + "]" * depth
    ids = f'"{nested}"' if quoted else nested
    joined(f'{{"query_id": "1", "document_ids": {ids}, "scores": [1.0]}}\n'.encode())
    joined(f'{{"query_id": {ids}, "document_ids": ["1"], "scores": [1.0]}}\n'.encode())
    joined(f'{{"query_id": "1", "document_ids": ["1"], "scores": {ids}}}\n'.encode())
