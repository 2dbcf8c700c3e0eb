"""Records on disk: rows come back as they were, and only from folders that are whole."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from colbert_jax.data.records import (
    ListSource,
    RecordSource,
    Source,
    cached_records,
    write_records,
)
from colbert_jax.errors import UserError


def _rows(count, *, scores=False):
    return [
        {
            "query": f"query {i} é\u2028",
            "documents": [f"document {i} {j}" for j in range(2 + i % 3)],
            "scores": [float(j) for j in range(2 + i % 3)] if scores else None,
        }
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "records", _rows(100), description={"from": "a test"})
    return tmp_path / "records"


@pytest.mark.parametrize("scores", [False, True])
def test_rows_come_back_as_they_were_in_the_order_asked_for(tmp_path, scores):
    rows = _rows(100, scores=scores)
    write_records(tmp_path / "records", iter(rows), description={})
    source = RecordSource(tmp_path / "records")
    indices = np.random.default_rng(0).permutation(100)
    assert source.__getitems__(indices) == [rows[i] for i in indices]
    assert source.__getitems__([5, 5]) == [rows[5], rows[5]]
    assert source.__getitems__([]) == []
    assert source[np.int64(7)] == rows[7] and list(source) == rows
    assert (len(source), source.min_documents, source.max_documents) == (100, 2, 4)
    assert source.has_scores is scores


def test_both_sources_keep_the_protocol(folder):
    assert isinstance(RecordSource(folder), Source) and isinstance(ListSource(_rows(1)), Source)


def test_a_list_source_answers_as_a_record_source_does(folder):
    on_disk, in_memory = RecordSource(folder), ListSource(_rows(100))
    assert in_memory.__getitems__([3, 1]) == on_disk.__getitems__([3, 1])
    assert in_memory.min_documents == on_disk.min_documents
    assert in_memory.has_scores == on_disk.has_scores
    assert len(in_memory) == len(on_disk)


def test_an_index_outside_the_rows_is_refused(folder):
    for index in (-1, 100):
        with pytest.raises(IndexError):
            RecordSource(folder).__getitems__([0, index])


def test_one_source_may_be_read_from_many_threads(folder):
    source, rows = RecordSource(folder), _rows(100)

    def read(seed):
        generator = np.random.default_rng(seed)
        for _ in range(30):
            indices = generator.integers(0, 100, 40)
            if source.__getitems__(indices) != [rows[i] for i in indices]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_a_source_that_was_read_can_be_pickled(folder):
    source = RecordSource(folder)
    first = source[0]
    assert pickle.loads(pickle.dumps(source))[0] == first == source[0]


class _CountedRow(dict):
    """A row that knows how many of its kind there are."""

    alive = most = 0

    def __init__(self, *args):
        super().__init__(*args)
        _CountedRow.alive += 1
        _CountedRow.most = max(_CountedRow.most, _CountedRow.alive)

    def __del__(self):
        _CountedRow.alive -= 1


def test_writing_holds_only_a_few_rows(tmp_path):
    rows = (_CountedRow(row) for row in _rows(500))
    write_records(tmp_path / "records", rows, description={})
    assert 1 <= _CountedRow.most < 5


def test_the_manifest_describes_the_rows_and_has_a_digest_of_them(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["description"] == {"from": "a test"} and manifest["count"] == 100
    write_records(tmp_path / "same", _rows(100), description={})
    write_records(tmp_path / "other", _rows(99), description={})
    digests = [
        json.loads((tmp_path / name / "manifest.json").read_text())["rows_sha256"]
        for name in ("same", "other")
    ]
    assert manifest["rows_sha256"] == digests[0] != digests[1]


def test_an_interrupted_writer_leaves_nothing_behind(tmp_path):
    def rows():
        yield from _rows(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path / "records", rows(), description={})
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_folder_is_not_taken_for_whole(folder):
    records, manifest = folder / "rows.array_record", folder / "manifest.json"
    whole = records.read_bytes()
    records.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="bytes"):
        RecordSource(folder)
    records.write_bytes(whole)
    text = manifest.read_text()
    for broken in (text[:-10], "[]", "{}"):
        manifest.write_text(broken)
        with pytest.raises(UserError, match="not a complete"):
            RecordSource(folder)
    manifest.unlink()
    with pytest.raises(UserError, match="not a complete"):
        RecordSource(folder)


def _folder_name(cache):
    other = cache / "other"
    cached_records(other, "set", "v1", lambda: _rows(4))
    return next(other.iterdir()).name


def test_a_writer_that_was_killed_does_not_stop_the_next(tmp_path):
    name = _folder_name(tmp_path)
    partial = tmp_path / f".{name}.0123456789ab.partial"
    partial.mkdir()
    (partial / "rows.array_record").write_bytes(b"half")
    assert len(cached_records(tmp_path, "set", "v1", lambda: _rows(4))) == 4


def test_a_damaged_record_is_noticed_when_it_is_read(folder):
    records = folder / "rows.array_record"
    damaged = bytearray(records.read_bytes())
    damaged[1000:1040] = bytes(40)
    records.write_bytes(damaged)
    with pytest.raises(UserError, match="remove it"):
        RecordSource(folder).__getitems__(range(100))


_FILL_THE_DISK = """
import os, resource, signal, sys
from colbert_jax.data.records import write_records
from colbert_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
row = lambda: {"query": os.urandom(99).hex(), "documents": ["d"], "scores": None}
try:
    write_records(sys.argv[1], (row() for _ in range(5000)), description={})
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_the_users_to_mend_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-c", _FILL_THE_DISK, str(tmp_path / "records")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "cannot be written" in result.stdout and "make room" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        write_records(tmp_path / "file" / "records", _rows(1), description={})


def test_a_folder_that_exists_is_never_written_over(folder):
    with pytest.raises(UserError, match="exists already"):
        write_records(folder, _rows(3), description={})
    assert len(RecordSource(folder)) == 100


def test_no_rows_make_no_folder(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        write_records(tmp_path / "records", [], description={})
    with pytest.raises(UserError, match="no rows"):
        ListSource([])
    assert list(tmp_path.iterdir()) == []


def test_rows_with_and_without_scores_do_not_mix(tmp_path):
    rows = _rows(2) + _rows(1, scores=True)
    with pytest.raises(UserError, match="row 3"):
        write_records(tmp_path / "records", rows, description={})
    with pytest.raises(UserError, match="row 3"):
        ListSource(rows)


def test_a_cache_is_built_once_for_each_fingerprint(tmp_path):
    built = []

    def build(version, count):
        def make_rows():
            built.append(version)
            return _rows(count)

        return cached_records(tmp_path / "cache", "my/set: A", version, make_rows)

    assert len(build("v1", 3)) == 3
    assert len(build("v1", 5)) == 3
    assert len(build("v2", 5)) == 5
    assert built == ["v1", "v2"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_names_that_look_alike_as_folders_have_folders_of_their_own(tmp_path):
    assert len(cached_records(tmp_path, "a/b", "v", lambda: _rows(1))) == 1
    assert len(cached_records(tmp_path, "a_b", "v", lambda: _rows(2))) == 2


def _build(cache, barrier, results):
    def make_rows():
        barrier.wait()  # neither has finished when the other begins
        return _rows(20)

    results.put(cached_records(cache, "set", "v", make_rows)[19]["query"])


def test_two_processes_may_build_the_same_records_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path, barrier, results)
    processes = [context.Process(target=_build, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    queries = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert queries == [_rows(20)[19]["query"]] * 2
    assert len(list(tmp_path.iterdir())) == 1
