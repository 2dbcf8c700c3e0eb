"""The hub: which files make up a split, how tables are joined, and what failures say."""

import gzip
import hashlib
import http.server
import json
import logging
import shutil
import threading
import urllib.parse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from colbert_jax.data.hub import (
    Hub,
    hub_distillation_rows,
    hub_fingerprint,
    hub_rows,
    split_files,
)
from colbert_jax.errors import UserError

COMMIT = "c0ffee" * 6 + "beef"


class FolderHub:
    """A hub whose data sets are all one local folder."""

    def __init__(self, root):
        self.root = root
        self.fetched = []

    def commit(self, dataset, revision):
        return COMMIT

    def files(self, dataset, commit):
        return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()]

    def fetch(self, dataset, commit, file):
        self.fetched.append(file)
        return self.root / file


def _write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))


def _pairs(name, count):
    return [{"query": f"{name} {i}", "document": f"d {i}", "shard": 0} for i in range(count)]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (
            ["data/quora-00001-of-00002-ab12.parquet", "data/quora-00000-of-00002-cd34.parquet"],
            "quora",
            ["data/quora-00000-of-00002-cd34.parquet", "data/quora-00001-of-00002-ab12.parquet"],
        ),
        (
            ["data/yahoo_qa-00000-of-00001.parquet", "data/yahoo_qa_2-00000-of-00001.parquet"],
            "yahoo_qa",
            ["data/yahoo_qa-00000-of-00001.parquet"],
        ),
        (["cnn/0000.parquet", "npr/0000.parquet"], "npr", ["npr/0000.parquet"]),
        (
            [
                "data/cnn/shard-00000.jsonl.gz",
                "data/cnn/shard-00001.jsonl.gz",
                "data/npr/x.jsonl.gz",
            ],
            "cnn",
            ["data/cnn/shard-00000.jsonl.gz", "data/cnn/shard-00001.jsonl.gz"],
        ),
        (["cnn.jsonl", "npr.jsonl", "dataset_infos.json"], "cnn", ["cnn.jsonl"]),
        (
            ["train/a/0.parquet", "train/b/0.parquet"],
            "train",
            ["train/a/0.parquet", "train/b/0.parquet"],
        ),
        (["cnn/0.parquet", "cnn/0.jsonl.gz"], "cnn", ["cnn/0.parquet"]),
        (
            ["a/train-0-of-1.parquet", "b/train-0-of-1.parquet"],
            "b/train",
            ["b/train-0-of-1.parquet"],
        ),
        (
            ["data/train-0-of-1.parquet", "default/train/0.parquet"],
            "train",
            ["default/train/0.parquet"],
        ),
    ],
)
def test_the_files_of_a_split_are_found_however_they_are_laid_out(files, split, expected):
    assert split_files([*files, "README.md", ".gitattributes"], split, dataset="o/n") == expected


def test_a_split_that_is_missing_is_answered_with_those_there_are():
    files = [
        "data/cnn-00000-of-00001.parquet",
        "data/npr/shard-0.jsonl.gz",
        "quora.parquet",
        "a.md",
    ]
    with pytest.raises(UserError, match=r"no split c.*: choose one of cnn, npr, quora\."):
        split_files(files, "c", dataset="o/n")
    with pytest.raises(UserError, match="no Parquet"):
        split_files(["README.md"], "c", dataset="o/n")


def test_a_split_found_in_several_folders_is_not_mixed():
    for files in (
        ["a/train-0-of-1.parquet", "b/train-0-of-1.parquet"],
        ["a/train/0.parquet", "b/train/0.parquet"],
    ):
        with pytest.raises(UserError, match=r"several folders \(a, b\).*a/train"):
            split_files(files, "train", dataset="o/n")


def test_rows_of_a_split_are_streamed_file_by_file(tmp_path):
    for part in range(2):
        _write(tmp_path / f"data/cnn-0000{part}-of-00002.parquet", _pairs(f"p{part}", 3))
    hub = FolderHub(tmp_path)
    rows = hub_rows("o/n", "cnn", hub=hub)
    assert next(rows)["query"] == "p0 0" and len(hub.fetched) == 1
    assert [row["query"] for row in rows] == ["p0 1", "p0 2", "p1 0", "p1 1", "p1 2"]


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path, caplog):
    _write(tmp_path / "cnn.parquet", [*_pairs("p", 3), {"query": " ", "document": "d"}])
    with caplog.at_level(logging.WARNING):
        assert len(list(hub_rows("o/n", "cnn", hub=FolderHub(tmp_path)))) == 3
    assert "3 rows used, 1 left out" in caplog.text and "row 4" in caplog.text


def test_a_split_without_a_usable_row_is_refused(tmp_path):
    _write(tmp_path / "cnn.parquet", [{"query": " ", "document": "d"}])
    with pytest.raises(UserError, match="none of 1 rows"):
        list(hub_rows("o/n", "cnn", hub=FolderHub(tmp_path)))


def _write_tables(root, *, as_text, ids=str, layout="{table}/train-00000-of-00001.parquet"):
    documents = [{"document_id": str(i), "text": f"document {i}"} for i in range(9)]
    train = []
    for i in range(3):
        candidates, scores = [ids(i + j) for j in range(4)], [0.5 * j for j in range(4)]
        train.append(
            {
                "query_id": ids(i),
                "document_ids": str(candidates) if as_text else candidates,
                "scores": str(scores) if as_text else scores,
            }
        )
    queries = [{"query_id": str(i), "text": f"query {i}"} for i in range(3)]
    for table, records in {"train": train, "queries": queries, "documents": documents}.items():
        _write(root / layout.format(table=table), records)


@pytest.mark.parametrize("layout", ["{table}/train-00000-of-00001.parquet", "{table}.parquet"])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("ids", [int, str])
def test_tables_are_joined_by_id_and_cut_to_the_first_candidates(tmp_path, as_text, ids, layout):
    _write_tables(tmp_path, as_text=as_text, ids=ids, layout=layout)
    rows = list(hub_distillation_rows("o/n", documents_per_query=3, hub=FolderHub(tmp_path)))
    assert rows == [
        {
            "query": f"query {i}",
            "documents": [f"document {i + j}" for j in range(3)],
            "scores": [0.0, 0.5, 1.0],
        }
        for i in range(3)
    ]


def test_a_default_training_table_beside_named_ones_is_found(tmp_path):
    _write_tables(tmp_path, as_text=False)
    shutil.move(tmp_path / "train", tmp_path / "data")
    assert (
        len(list(hub_distillation_rows("o/n", documents_per_query=4, hub=FolderHub(tmp_path)))) == 3
    )


def test_queries_with_too_few_or_unknown_candidates_are_left_out(tmp_path, caplog):
    _write_tables(tmp_path, as_text=False)
    good = {"query_id": "0", "document_ids": ["0", "1"], "scores": [1.0, 0.0]}
    bad = [
        {**good, "document_ids": ["0"], "scores": [1.0]},
        {**good, "document_ids": ["0", "unknown"]},
        {**good, "query_id": "unknown"},
        {**good, "query_id": None},
        {**good, "scores": [1.0, float("nan")]},
        {**good, "scores": [1.0]},
        {**good, "document_ids": None},
    ]
    _write(tmp_path / "train/train-00000-of-00001.parquet", [good, *bad])
    with caplog.at_level(logging.WARNING):
        rows = list(hub_distillation_rows("o/n", documents_per_query=2, hub=FolderHub(tmp_path)))
    assert len(rows) == 1 and "7 left out" in caplog.text


def test_list_texts_are_never_run_as_code(tmp_path, caplog):
    _write_tables(tmp_path, as_text=False)
    danger = f"[open({str(tmp_path / 'made')!r}, 'w')]"
    _write(
        tmp_path / "train/train-00000-of-00001.parquet",
        [{"query_id": "0", "document_ids": danger, "scores": "[1.0]"}],
    )
    with pytest.raises(UserError, match="not a list"):
        list(hub_distillation_rows("o/n", documents_per_query=1, hub=FolderHub(tmp_path)))
    assert not (tmp_path / "made").exists()


def test_a_table_with_wrong_columns_is_named(tmp_path):
    _write_tables(tmp_path, as_text=False)
    _write(tmp_path / "queries/train-00000-of-00001.parquet", [{"id": "1", "text": "t"}])
    with pytest.raises(UserError, match=r"found are id, text; query_id, text are wanted"):
        list(hub_distillation_rows("o/n", hub=FolderHub(tmp_path)))


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: a data set's commit, its file tree, and its files."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        root: Path = self.server.root
        self.server.seen.append((self.command, path))
        if path in ("/api/datasets/owner/set", "/api/datasets/owner/set/revision/v1"):
            self._send(json.dumps({"id": "owner/set", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/datasets/owner/set/revision/"):
            self._send(b"", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/datasets/owner/set/tree/{COMMIT}":
            files = [path for path in root.rglob("*") if path.is_file()]
            entries = [
                {"type": "file", "path": str(p.relative_to(root)), "size": 1, "oid": "0"}
                for p in files
            ]
            self._send(json.dumps(entries).encode())
        elif path.startswith(f"/datasets/owner/set/resolve/{COMMIT}/"):
            data = (root / path.split(COMMIT + "/", 1)[1]).read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            self._send(data, headers={"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        else:
            self._send(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})

    def _send(self, body, *, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch):
    """Lets the client speak to this machine even where the environment keeps it offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def served(tmp_path, online):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.seen = tmp_path / "served", []
    server.root.mkdir()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server, Hub(f"http://127.0.0.1:{server.server_port}", cache_dir=tmp_path / "cache")
    server.shutdown()
    thread.join()
    server.server_close()


def test_rows_come_over_http_and_files_are_fetched_once(served):
    server, hub = served
    _write(server.root / "data/cnn-00000-of-00001.parquet", _pairs("p", 3))
    _write(server.root / "data/npr-00000-of-00001.parquet", _pairs("n", 2))
    for _ in range(2):
        rows = list(hub_rows("owner/set", "cnn", "v1", hub=hub))
        assert [row["query"] for row in rows] == ["p 0", "p 1", "p 2"]
    gets = [path for command, path in server.seen if command == "GET" and "/resolve/" in path]
    assert gets == [f"/datasets/owner/set/resolve/{COMMIT}/data/cnn-00000-of-00001.parquet"]


def test_a_fingerprint_is_the_commit_and_costs_nothing_if_that_is_given(served):
    server, hub = served
    assert hub_fingerprint("owner/set", hub=hub) == COMMIT
    assert hub_fingerprint("owner/set", "v1", hub=hub) == COMMIT
    asked = len(server.seen)
    assert hub_fingerprint("owner/set", COMMIT, hub=hub) == COMMIT
    assert len(server.seen) == asked


def test_an_unknown_data_set_revision_or_name_says_so(served):
    _, hub = served
    with pytest.raises(UserError, match="no data set owner/other"):
        hub_fingerprint("owner/other", hub=hub)
    with pytest.raises(UserError, match="no revision v9"):
        hub_fingerprint("owner/set", "v9", hub=hub)
    with pytest.raises(UserError, match="owner/name"):
        hub_fingerprint("not/a/name", hub=hub)


def test_a_hub_that_cannot_be_reached_says_so(tmp_path, monkeypatch, online):
    hub = Hub("http://127.0.0.1:9", cache_dir=tmp_path)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits longer at each attempt
    for call in (
        lambda: hub.commit("owner/set", None),
        lambda: hub.files("owner/set", COMMIT),
        lambda: hub.fetch("owner/set", COMMIT, "a.parquet"),
    ):
        with pytest.raises(
            UserError, match=r"could not be read from http://127.0.0.1:9 \(.*network"
        ):
            call()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be read"):
        hub.commit("owner/set", None)
