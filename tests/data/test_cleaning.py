"""Cleaning: which rows are kept, and that repeated ones are found however many there are."""

import resource
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_jax.data import cleaning as cleaning_module
from colbert_jax.data.cleaning import REASONS, Cleaning, find_duplicates
from colbert_jax.data.rows import RowError
from colbert_jax.data.tables import Place


def _row(query, *documents, scores=None):
    return {"query": query, "documents": list(documents), "scores": scores}


def _placed(rows, ordinals=None):
    ordinals = range(len(rows)) if ordinals is None else ordinals
    return [(Place(i, f"row {i + 1}"), row) for i, row in zip(ordinals, rows, strict=True)]


ANYTHING = Cleaning(min_characters=0, min_documents=0)


def _found(folder, rows, cleaning=ANYTHING, **kwargs):
    placed = _placed(rows, **kwargs)
    count = placed[-1][0].ordinal + 1 if placed else 0
    scratch = Path(folder) / "digests"
    found = find_duplicates(iter(placed), cleaning, count, scratch)
    assert found.dtype == np.int64 and not scratch.exists()
    return found.tolist()


def _kind(row, **cleaning):
    try:
        Cleaning(**cleaning).apply(row)
    except RowError as reason:
        assert str(reason) and reason.kind in REASONS
        return reason.kind
    return None


# --- what a row must be like ---


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (_row("abc", "def"), None),
        (_row("ab", "def"), "too_short"),
        (_row("abc", "de"), "too_short"),
        (_row("abc", "def", "gh"), "too_short"),
        (_row("abc", "def", "ghi"), None),
        (_row(" ab\n", "def"), "too_short"),
        (_row("abc", "\t d e\u3000"), None),
        (_row("日本語", "def"), None),
        (_row("日本", "def"), "too_short"),
    ],
)
def test_every_text_has_enough_characters_white_space_at_its_ends_aside(row, kind):
    assert _kind(row, min_characters=3) == kind


def test_rows_have_enough_documents():
    row = _row("abc", "def", "ghi", scores=[1.0, 0.0])
    assert _kind(row, min_documents=2) is None
    assert _kind(row, min_documents=3) == "too_few_documents"
    assert _kind(_row("abc", "def")) is None


def test_the_lack_of_documents_is_told_before_that_of_characters():
    assert _kind(_row("a", "b"), min_documents=2, min_characters=2) == "too_few_documents"


def test_a_check_leaves_the_row_as_it_was():
    row = _row("  abc ", " def")
    Cleaning().apply(row)
    assert row == _row("  abc ", " def")


def test_rows_are_cut_to_their_first_documents_and_the_scores_of_these():
    row = _row("q", "a", "b", "c", scores=[3.0, 2.0, 1.0])
    assert Cleaning(min_characters=1, max_documents=2).apply(row) == _row(
        "q", "a", "b", scores=[3.0, 2.0]
    )
    assert (
        Cleaning(min_characters=1, max_documents=3).apply(row)
        == Cleaning(min_characters=1, max_documents=9).apply(row)
        == row
    )
    assert (
        Cleaning(min_characters=1).apply(row)
        == row
        == _row("q", "a", "b", "c", scores=[3.0, 2.0, 1.0])
    )
    assert Cleaning(min_characters=1, max_documents=1).apply(_row("q", "a", "b")) == _row("q", "a")


# --- duplicates ---


def test_the_first_of_equal_rows_is_kept(tmp_path):
    rows = [_row("q", "d"), _row("q", "e"), _row("q", "d"), _row("r", "d"), _row("q", "d")]
    assert _found(tmp_path, rows) == [2, 4]


def test_rows_are_equal_only_if_query_and_all_documents_are(tmp_path):
    rows = [
        _row("ab", "c"),
        _row("a", "bc"),
        _row("a", "b", "c"),
        _row("a", "c", "b"),
        _row("a", "b"),
        _row("", "abc"),
        _row("abc", ""),
        _row("abc"),
        _row("ab", "c "),
        _row("AB", "c"),
        _row("a", "b", ""),
        _row("é", "c"),
        _row("e\u0301", "c"),
        _row("ab", "c\0"),
    ]
    assert _found(tmp_path, rows) == []
    assert _found(tmp_path, rows + rows) == list(range(len(rows), 2 * len(rows)))


def test_no_length_of_one_text_makes_it_look_like_two(tmp_path):
    # Whatever stands between texts could stand within one.
    lengths = [(length).to_bytes(8, "big").decode() for length in (1, 2)]
    marks = ["\0", "\n", "\t", "\x1f", "\x1e", "\u0001", *lengths]
    rows = [_row("a", "b", "c")]
    rows += [row for mark in marks for row in (_row(f"a{mark}b", "c"), _row("a", f"b{mark}c"))]
    assert _found(tmp_path, rows) == []


def test_scores_make_no_difference(tmp_path):
    rows = [_row("q", "d", scores=[1.0]), _row("q", "d", scores=[2.0]), _row("q", "d")]
    assert _found(tmp_path, rows) == [1, 2]


def test_rows_dropped_for_another_reason_are_left_aside(tmp_path):
    good, short = _row("query", "document"), _row("q", "document")
    rows = [short, RowError("bad"), good, RowError("bad"), short, good, _row("x", "d"), good]
    assert _found(tmp_path, rows, Cleaning(min_characters=2)) == [5, 7]
    assert _found(tmp_path, rows, Cleaning(min_characters=2, min_documents=2)) == []


def test_documents_that_are_cut_off_make_no_difference(tmp_path):
    rows = [
        _row("query", "first", "second"),
        _row("query", "first", "another"),
        _row("query", "first"),
        _row("query", "first", ""),
        _row("query", "other", "second"),
    ]
    assert _found(tmp_path, rows, Cleaning(max_documents=1)) == [1, 2, 3]
    assert _found(tmp_path, rows, Cleaning(max_documents=2)) == []


def test_ordinals_may_have_gaps(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning_module, "_DIGESTS_AT_ONCE", 7)
    rows = [_row(name, "d") for name in "abacab"]
    assert _found(tmp_path, rows, ordinals=[3, 10, 11, 30, 44, 101]) == [11, 44, 101]


def test_a_table_without_rows_has_no_duplicates(tmp_path):
    assert _found(tmp_path, []) == []
    scratch = tmp_path / "digests"
    assert find_duplicates(iter(()), Cleaning(), 5, scratch).tolist() == []
    assert not scratch.exists()


_ROWS = st.lists(
    st.one_of(
        st.builds(_row, st.text("ab", max_size=2), st.text("ab", max_size=2)),
        st.builds(_row, st.text("a", max_size=1), st.just("a"), st.text("ab", max_size=1)),
        st.builds(RowError, st.just("bad")),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(
    rows=_ROWS,
    at_once=st.integers(1, 70),
    cleaning=st.builds(Cleaning, min_characters=st.integers(0, 2), min_documents=st.integers(0, 2)),
)
def test_repeated_rows_are_those_that_a_set_has_seen(rows, at_once, cleaning):
    seen, expected = set(), []
    for index, row in enumerate(rows):
        if isinstance(row, RowError):
            continue
        documents = row["documents"][: cleaning.max_documents]
        texts = (row["query"], *documents)
        if len(documents) < cleaning.min_documents:
            continue
        if any(len(text) < cleaning.min_characters for text in texts):
            continue
        if texts in seen:
            expected.append(index)
        seen.add(texts)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning_module, "_DIGESTS_AT_ONCE", at_once)
        assert _found(folder, rows, cleaning) == expected


def test_duplicates_are_found_wherever_they_stand_among_many(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning_module, "_DIGESTS_AT_ONCE", 500)
    names = np.random.default_rng(0).integers(0, 15_000, 20_000).tolist()
    _, first = np.unique(names, return_index=True)
    expected = sorted(set(range(len(names))) - set(first.tolist()))
    assert len(expected) > 5000
    assert _found(tmp_path, [_row(f"q{name}", "d") for name in names]) == expected


def test_memory_stays_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning_module, "_DIGESTS_AT_ONCE", 2000)
    count = 100_000
    rows = ((Place(i, ""), _row(f"q{i % (count - 3)}", "d")) for i in range(count))
    tracemalloc.start()
    try:
        found = find_duplicates(rows, ANYTHING, count, tmp_path / "digests")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tolist() == [count - 3, count - 2, count - 1]
    assert most < 8 * count // 2  # the digests of all rows are twice that


def test_the_scratch_file_is_removed_when_reading_fails(tmp_path):
    scratch = tmp_path / "digests"

    def failing():
        yield from _placed([_row("query", "document")])
        assert scratch.exists()
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        find_duplicates(failing(), Cleaning(), 3, scratch)
    assert list(tmp_path.iterdir()) == []


def test_the_scratch_file_is_removed_when_there_is_no_room_for_it(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            find_duplicates(iter(()), Cleaning(), 1 << 20, tmp_path / "digests")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_file_that_was_left_behind_does_no_harm(tmp_path):
    (tmp_path / "digests").write_bytes(b"\1" * 999)
    assert _found(tmp_path, [_row("q", "d"), _row("r", "d")]) == []
