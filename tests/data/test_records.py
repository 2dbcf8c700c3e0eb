"""Prepared folders, opened: rows come back as they were, and only from folders that are whole."""

import itertools
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from colbert_jax.data import tables
from colbert_jax.data import text as text_module
from colbert_jax.data.corpora import file_builder
from colbert_jax.data.records import ListSource, Source, TextSource, read_manifest
from colbert_jax.errors import UserError


def _rows(count, *, scores=False):
    return [
        {
            "query": f"query {i} é\u2028\x00",
            "documents": [f"document {i}\n{j}" for j in range(2 + i % 3)],
            "scores": [0.1 * i + j for j in range(2 + i % 3)] if scores else None,
        }
        for i in range(count)
    ]


def _prepare(folder, rows):
    """A prepared folder of these rows, in shards of twenty."""
    path = folder / "rows.jsonl"
    flat = [
        row
        if row["scores"] is not None
        else {
            "query": row["query"],
            "document": row["documents"][0],
            "negative": row["documents"][1:],
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in flat))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_module, "_FEWEST_ROWS", 20)
        patched.setattr(tables, "_MARK_ROWS", 10)
        builder = file_builder(str(path), folder / "prepared")
        builder.prepare()
    return builder.folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folders with and without scores, of a hundred rows; not to be changed."""
    return {
        scores: _prepare(tmp_path_factory.mktemp("rows"), _rows(100, scores=scores))
        for scores in (False, True)
    }


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(prepared[False], tmp_path / "copy")


@pytest.mark.parametrize("scores", [False, True])
def test_rows_come_back_as_they_were_in_the_order_asked_for(prepared, scores):
    rows = _rows(100, scores=scores)
    for row in rows if scores else ():
        row["scores"] = np.array(row["scores"], np.float32).tolist()
    source = TextSource(prepared[scores])
    indices = np.random.default_rng(0).permutation(100)
    assert source.__getitems__(indices) == [rows[i] for i in indices]
    assert source.__getitems__([5, 5, 99, 0]) == [rows[5], rows[5], rows[99], rows[0]]
    assert source.__getitems__([]) == []
    assert source.__getitems__(range(18, 43, 5)) == rows[18:43:5]
    assert source[np.int64(7)] == rows[7] and list(source) == rows
    assert (len(source), source.min_documents, source.max_documents) == (100, 2, 4)
    assert source.has_scores is scores
    assert source.shard_lengths == [20] * 5


def test_both_sources_keep_the_protocol(prepared):
    assert isinstance(TextSource(prepared[False]), Source)
    assert isinstance(ListSource(_rows(1)), Source)


def test_a_list_source_answers_as_a_text_source_does(prepared):
    on_disk, in_memory = TextSource(prepared[False]), ListSource(_rows(100))
    assert in_memory.__getitems__([3, 1]) == on_disk.__getitems__([3, 1])
    assert in_memory[4] == on_disk[4]
    for name in ("min_documents", "max_documents", "has_scores"):
        assert getattr(in_memory, name) == getattr(on_disk, name)
    assert len(in_memory) == len(on_disk)


def test_a_list_source_needs_rows_that_all_have_scores_or_none():
    with pytest.raises(UserError, match="no rows"):
        ListSource([])
    with pytest.raises(UserError, match="row 3"):
        ListSource(_rows(2) + _rows(1, scores=True))
    with pytest.raises(UserError, match="row 2 is without"):
        ListSource(_rows(1, scores=True) + _rows(1))


def test_an_index_outside_the_rows_is_refused(prepared):
    source = TextSource(prepared[False])
    for index in (-1, 100):
        with pytest.raises(IndexError):
            source.__getitems__([0, index])
        with pytest.raises(IndexError):
            source[index]


def test_one_source_may_be_read_from_many_threads(prepared):
    source, rows = TextSource(prepared[False]), _rows(100)

    def read(seed):
        generator = np.random.default_rng(seed)
        for _ in range(30):
            indices = generator.integers(0, 100, 40)
            if source.__getitems__(indices) != [rows[i] for i in indices]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_a_source_that_was_read_can_be_pickled(prepared):
    source = TextSource(prepared[False])
    first = source[0]
    assert pickle.loads(pickle.dumps(source))[0] == first == source[0]


# --- folders that are not whole ---


def test_every_truncation_of_a_description_is_noticed(folder):
    for name in ("manifest.json", "dataset_info.json", "features.json"):
        path = folder / name
        whole = path.read_bytes()
        end = len(whole.rstrip())  # without its last line break it is as good
        cuts = {0, 1, 2, end // 4, end // 2, 3 * end // 4, end - 2, end - 1}
        for cut in sorted(cuts | set(range(0, end, end // 40))):
            path.write_bytes(whole[:cut])
            with pytest.raises(UserError, match="remove it"):
                TextSource(folder)
        path.unlink()
        with pytest.raises(UserError, match="remove it"):
            TextSource(folder)
        path.write_bytes(whole)
    assert len(TextSource(folder)) == 100


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '"shards"', '{"shards": [{}]}'])
def test_a_manifest_of_something_else_is_noticed(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="not a whole prepared folder"):
        read_manifest(folder)
    with pytest.raises(UserError, match="not a whole prepared folder"):
        TextSource(folder)


def test_every_shard_must_be_there_and_as_long_as_it_was(folder):
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        path = folder / shard["name"]
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1, len(whole) + 1):
            path.write_bytes((whole + b"\0")[:size])
            with pytest.raises(UserError, match=f"{shard['name']} has {size} bytes where"):
                TextSource(folder)
        path.unlink()
        with pytest.raises(UserError, match="not a whole prepared folder"):
            TextSource(folder)
        path.write_bytes(whole)
    assert len(TextSource(folder)) == 100


def test_descriptions_that_do_not_agree_are_noticed(folder):
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    for lengths in (["20"] * 4 + ["19"], ["20"] * 4 + ["21"]):
        info["splits"][0]["shardLengths"] = lengths
        path.write_text(json.dumps(info))
        with pytest.raises(UserError, match="remove it"):
            TextSource(folder)


def test_a_damaged_record_is_never_taken_for_a_row(folder):
    shard = folder / json.loads((folder / "manifest.json").read_text())["shards"][1]["name"]
    whole, rows, noticed = shard.read_bytes(), _rows(100), 0
    positions = np.random.default_rng(0).integers(0, len(whole), 30)
    # Riegeli's blocks are filled up with zeros; the records lie at the front.
    for start in itertools.chain(range(64, 3000, 97), positions.tolist()):
        damaged = bytearray(whole)
        for place in range(start, min(start + 4, len(whole))):
            damaged[place] ^= 0x55
        shard.write_bytes(damaged)
        try:
            assert TextSource(folder).__getitems__(range(100)) == rows
        except UserError as error:
            assert "remove it" in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > 20


def test_a_folder_that_is_missing_says_so(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a whole prepared folder"):
        TextSource(tmp_path / "nowhere")


def test_a_shard_lost_after_opening_is_the_users_to_mend(folder):
    source = TextSource(folder)
    for shard in folder.glob("*array_record*"):
        os.unlink(shard)
    with pytest.raises(UserError, match="remove it"):
        source.__getitems__(range(100))
