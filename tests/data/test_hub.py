"""The hub: which files make up a split, how they become tables, and what failures cost and say."""

import errno
import gzip
import hashlib
import http.server
import itertools
import json
import logging
import os
import random
import shutil
import socket
import struct
import threading
import urllib.parse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from colbert_jax.data import hub as hub_module
from colbert_jax.data.corpora import HubFiles, MsMarcoDistillation
from colbert_jax.data.hub import Hub, hub_fingerprint, split_files
from colbert_jax.data.rows import RowError
from colbert_jax.errors import UserError

COMMIT = "c0ffee" * 6 + "beef"


class FolderHub:
    """A hub whose data sets are all one local folder."""

    def __init__(self, root):
        self.root = root
        self.asked = []
        self.fetched = []

    def commit(self, dataset, revision):
        self.asked.append((dataset, revision))
        return COMMIT

    def files(self, dataset, commit):
        assert commit == COMMIT
        return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()]

    def fetch(self, dataset, commit, file):
        assert commit == COMMIT
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


# --- which files make up a split ---


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


# --- splits as tables ---


def _builder(cls, folder, **kwargs):
    """A builder that has done what comes before it opens its table."""
    builder = cls(data_dir=folder / "prepared", **kwargs)
    builder.request(resolved=True)
    builder.unfinished.mkdir(parents=True, exist_ok=True)
    return builder


def _read(table):
    return [
        (place.name, row.kind if isinstance(row, RowError) else row)
        for stretch in table.stretches()
        for place, row in table.read(stretch)
    ]


def test_rows_of_a_split_come_file_by_file_under_the_names_of_the_hub(tmp_path):
    for part in (1, 0):
        _write(tmp_path / f"hub/data/cnn-0000{part}-of-00002.parquet", _pairs(f"p{part}", 2))
    _write(tmp_path / "hub/data/npr-00000-of-00001.parquet", _pairs("n", 2))
    hub = FolderHub(tmp_path / "hub")
    table = _builder(HubFiles, tmp_path, dataset="o/n", split="cnn", hub=hub).open_table()
    names = [f"data/cnn-0000{part}-of-00002.parquet" for part in (0, 1)]
    assert hub.fetched == names
    assert [(name, row["query"]) for name, row in _read(table)] == [
        (f"{names[0]}, row 1", "p0 0"),
        (f"{names[0]}, row 2", "p0 1"),
        (f"{names[1]}, row 1", "p1 0"),
        (f"{names[1]}, row 2", "p1 1"),
    ]
    sizes = [(hub.root / name).stat().st_size for name in names]
    assert table.description == {
        "dataset": "o/n",
        "revision": COMMIT,
        "files": [
            {"name": Path(name).name, "bytes": size}
            for name, size in zip(names, sizes, strict=True)
        ],
    }


def test_rows_that_cannot_be_used_keep_their_place(tmp_path):
    _write(tmp_path / "hub/cnn.parquet", [*_pairs("p", 2), {"query": " ", "document": "d"}])
    hub = FolderHub(tmp_path / "hub")
    table = _builder(HubFiles, tmp_path, dataset="o/n", split="cnn", hub=hub).open_table()
    assert _read(table)[2] == ("cnn.parquet, row 3", "empty")


def test_a_split_may_have_columns_of_other_names(tmp_path):
    _write(tmp_path / "hub/cnn.jsonl.gz", [{"title": "q", "body": "d"}])
    columns = {"query": "title", "document": "body"}
    kwargs = {"dataset": "o/n", "split": "cnn", "hub": FolderHub(tmp_path / "hub")}
    table = _builder(HubFiles, tmp_path, columns=columns, **kwargs).open_table()
    assert _read(table)[0][1] == {"query": "q", "documents": ["d"], "scores": None}
    with pytest.raises(UserError, match="title, body"):
        _read(_builder(HubFiles, tmp_path, **kwargs).open_table())


def test_the_commit_is_asked_for_once_and_only_where_it_is_needed(tmp_path):
    hub = FolderHub(tmp_path)
    builder = HubFiles(dataset="o/n", split="cnn", hub=hub, data_dir=tmp_path)
    assert builder.request(resolved=False)["revision"] is None and hub.asked == []
    assert builder.request(resolved=True)["revision"] == COMMIT
    builder.request(resolved=True)
    assert hub.asked == [("o/n", None)]
    tagged = HubFiles(dataset="o/n", split="cnn", revision="v1", hub=hub, data_dir=tmp_path)
    assert tagged.request(resolved=False)["revision"] == COMMIT
    assert hub.asked[1:] == [("o/n", "v1")]
    given = HubFiles(dataset="o/n", split="cnn", revision="f" * 40, hub=hub, data_dir=tmp_path)
    assert given.request(resolved=True)["revision"] == "f" * 40 and len(hub.asked) == 2


# --- joined tables ---

SHARDS = "{table}/train-00000-of-00001.parquet"


def _write_tables(root, *, as_text=False, ids=str, layout=SHARDS):
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


JOINED = [
    {
        "query": f"query {i}",
        "documents": [f"document {i + j}" for j in range(4)],
        "scores": [0.0, 0.5, 1.0, 1.5],
    }
    for i in range(3)
]


def _ms_marco(tmp_path):
    hub = FolderHub(tmp_path / "hub")
    return _builder(MsMarcoDistillation, tmp_path, config="train", hub=hub)


@pytest.mark.parametrize(
    "layout", [SHARDS, "{table}.parquet", "data/{table}-00000-of-00001.parquet"]
)
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("ids", [int, str])
def test_the_three_tables_are_found_and_joined(tmp_path, as_text, ids, layout):
    _write_tables(tmp_path / "hub", as_text=as_text, ids=ids, layout=layout)
    table = _ms_marco(tmp_path).open_table()
    file = layout.format(table="train")
    assert _read(table) == [(f"{file}, row {i + 1}", row) for i, row in enumerate(JOINED)]
    assert table.description["dataset"] == "lightonai/ms-marco-en-bge-gemma"
    assert table.description["revision"] == COMMIT
    assert len(table.description["files"]) == 3


def test_a_default_training_table_beside_named_ones_is_found(tmp_path):
    _write_tables(tmp_path / "hub")
    shutil.move(tmp_path / "hub/train", tmp_path / "hub/data")
    assert [row for _, row in _read(_ms_marco(tmp_path).open_table())] == JOINED


@pytest.mark.parametrize("folder", ["train", "data"])
def test_scores_from_before_they_were_normalised_are_left_alone(tmp_path, folder):
    _write_tables(tmp_path / "hub")
    (tmp_path / "hub/train").rename(tmp_path / "hub" / folder)
    other = tmp_path / "hub/train_unormalized/train-00000-of-00001.parquet"
    _write(other, [{"query_id": "0", "document_ids": ["0"], "scores": [99.0]}])
    builder = _ms_marco(tmp_path)
    assert [row for _, row in _read(builder.open_table())] == JOINED
    assert len(builder._hub.fetched) == 3


def test_joined_rows_without_a_text_or_with_wrong_scores_are_told(tmp_path):
    _write_tables(tmp_path / "hub")
    good = {"query_id": "0", "document_ids": ["0", "1"], "scores": [1.0, 0.0]}
    bad = {
        "no_text": {**good, "document_ids": ["0", "unknown"]},
        "empty": {**good, "query_id": None},
        "invalid": {**good, "scores": [1.0, float("nan")]},
    }
    _write(tmp_path / "hub" / SHARDS.format(table="train"), [good, *bad.values(), good])
    kinds = [row for _, row in _read(_ms_marco(tmp_path).open_table())]
    assert kinds[1:-1] == list(bad) and kinds[0] == kinds[-1] != "no_text"


def test_queries_with_fewer_candidates_than_the_recipe_wants_are_dropped_by_default(tmp_path):
    cleaning = _ms_marco(tmp_path).default_cleaning()
    row = {"query": "query", "documents": ["text"] * 31, "scores": [0.0] * 31}
    with pytest.raises(RowError) as caught:
        cleaning.apply(row)
    assert caught.value.kind == "too_few_documents"
    cleaning.apply({**row, "documents": ["text"] * 32})


@pytest.mark.parametrize("wrong", ["train", "queries", "documents"])
def test_a_table_with_wrong_columns_is_named(tmp_path, wrong):
    _write_tables(tmp_path / "hub")
    _write(tmp_path / "hub" / SHARDS.format(table=wrong), [{"id": "1", "content": "t"}])
    with pytest.raises(UserError, match=rf"{wrong}.*found are id, content"):
        _read(_ms_marco(tmp_path).open_table())


def test_a_data_set_that_lacks_a_table_is_named(tmp_path):
    _write_tables(tmp_path / "hub")
    shutil.rmtree(tmp_path / "hub/queries")
    with pytest.raises(UserError, match="lightonai/ms-marco-en-bge-gemma has no"):
        _ms_marco(tmp_path).open_table()


def test_texts_are_indexed_once_for_a_preparation_that_goes_on(tmp_path):
    _write_tables(tmp_path / "hub")
    builder = _ms_marco(tmp_path)
    texts = builder.open_table().texts
    assert texts.parent == builder.unfinished
    before = texts.stat()
    again = _ms_marco(tmp_path).open_table()
    assert (again.texts, texts.stat().st_mtime_ns) == (texts, before.st_mtime_ns)
    assert [row for _, row in _read(again)] == JOINED


# --- over HTTP ---


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, or fails as it was told to.

    `server.faults` holds, for "HEAD" or "GET" and a kind of address, what goes wrong at each
    request in turn: a status (and headers), or a body that is cut (the connection closed),
    reset (torn down) or short (whole as far as HTTP can tell). So many times as `server.stores`
    says, a file is said to lie in a store of chunks, as the hub's large files do, which fails.
    """

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        root: Path = self.server.root
        self.server.seen.append((self.command, path, self.headers.get("Range")))
        if path in ("/api/datasets/owner/set", "/api/datasets/owner/set/revision/v1"):
            self._answer("commit", json.dumps({"id": "owner/set", "sha": COMMIT}).encode())
        elif path.startswith("/api/datasets/owner/set/revision/"):
            self._send(b"", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/datasets/owner/set/tree/{COMMIT}":
            files = [path for path in root.rglob("*") if path.is_file()]
            entries = [
                {"type": "file", "path": str(p.relative_to(root)), "size": 1, "oid": "0"}
                for p in files
            ]
            self._answer("tree", json.dumps(entries).encode())
        elif path.startswith(f"/datasets/owner/set/resolve/{COMMIT}/"):
            file = root / path.split(COMMIT + "/", 1)[1]
            if not file.exists():
                return self._send(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
            data = file.read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
            if self.server.stores > 0:
                self.server.stores -= 1
                base = f"http://127.0.0.1:{self.server.server_port}"
                headers |= {"X-Xet-Hash": "b" * 64, "X-Xet-Refresh-Route": f"{base}/token"}
            self._answer("file", data, headers)
        elif path == "/token":
            headers = {
                "X-Xet-Cas-Url": f"http://127.0.0.1:{self.server.server_port}/store",
                "X-Xet-Access-Token": "token",
                "X-Xet-Token-Expiration": str(1 << 40),
            }
            self._send(b"", headers=headers)
        elif path.startswith("/store/"):
            self._send(b"", status=503)
        else:
            self._send(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})

    def _answer(self, kind, body, headers=None):
        fault = next(self.server.faults.get((self.command, kind), iter(())), None)
        if isinstance(fault, int):
            return self._send(b"not now", status=fault)
        if isinstance(fault, bytes):
            return self._send(fault)
        range_ = self.headers.get("Range")
        status, start, headers = 200, 0, dict(headers or {})
        if range_ and self.server.ranges:
            start = int(range_.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status = 206
        rest = body[start:]
        if fault is None:
            return self._send(rest, status=status, headers=headers)
        how, size = fault
        if how == "short":
            return self._send(rest[:size], status=status, headers=headers)
        self._send(rest, status=status, headers=headers, only=size)
        self.close_connection = True
        if how == "reset":
            # Closed so, the client is told that the connection broke, not that it ended.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _send(self, body, *, status=200, headers=None, only=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:only])

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch):
    """Lets the client speak to this machine even where the environment keeps it offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def waits(monkeypatch):
    """How long was waited, by the client or by us; nobody really waits."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


@pytest.fixture
def served(tmp_path, online):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.handle_error = lambda *_: None  # of clients that hung up
    server.root, server.seen, server.faults = tmp_path / "served", [], {}
    server.ranges, server.stores = True, 0
    server.root.mkdir()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server, Hub(f"http://127.0.0.1:{server.server_port}", cache_dir=tmp_path / "cache")
    server.shutdown()
    thread.join()
    server.server_close()


FILE = "data/cnn-00000-of-00001.parquet"
CALLS = {
    "commit": lambda hub: hub.commit("owner/set", None),
    "files": lambda hub: hub.files("owner/set", COMMIT),
    "fetch": lambda hub: hub.fetch("owner/set", COMMIT, FILE).read_bytes(),
}
# What each of them asks for, and how.
REQUESTS = {
    "commit": ("GET", "commit"),
    "files": ("GET", "tree"),
    "head": ("HEAD", "file"),
    "body": ("GET", "file"),
}


def _call(hub, request):
    return CALLS["fetch" if request in ("head", "body") else request](hub)


def _serve(server, size=1000):
    """Puts the file there, and returns the answer to each of the requests."""
    data = random.Random(size).randbytes(size)
    (server.root / "data").mkdir(exist_ok=True)
    (server.root / FILE).write_bytes(data)
    return {"commit": COMMIT, "files": [FILE], "head": data, "body": data}


def _count(server, command):
    return sum(seen == command for seen, _, _ in server.seen)


def _user_error(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_tables_come_over_http_and_files_are_fetched_once(tmp_path, served):
    server, hub = served
    _write(server.root / FILE, _pairs("p", 3))
    _write(server.root / "data/npr-00000-of-00001.parquet", _pairs("n", 2))
    for _ in range(2):
        builder = _builder(
            HubFiles, tmp_path, dataset="owner/set", split="cnn", revision="v1", hub=hub
        )
        rows = [row for _, row in _read(builder.open_table())]
        assert [row["query"] for row in rows] == ["p 0", "p 1", "p 2"]
    gets = [path for command, path, _ in server.seen if command == "GET" and "/resolve/" in path]
    assert gets == [f"/datasets/owner/set/resolve/{COMMIT}/{FILE}"]
    asked = len(server.seen)
    hub.fetch("owner/set", COMMIT, FILE)
    assert len(server.seen) == asked


def test_a_fingerprint_is_the_commit_and_costs_nothing_if_that_is_given(served):
    server, hub = served
    assert hub_fingerprint("owner/set", hub=hub) == COMMIT
    assert hub_fingerprint("owner/set", "v1", hub=hub) == COMMIT
    asked = len(server.seen)
    assert hub_fingerprint("owner/set", COMMIT, hub=hub) == COMMIT
    assert len(server.seen) == asked


# --- failures that pass ---


STATUSES = [408, 429, 500, 502, 503, 504]
CUTS = [("cut", 0), ("cut", 10), ("reset", 0), ("reset", 10)]
PASSING = [
    pytest.param(request, fault, id=f"{request}-{fault}")
    for request in REQUESTS
    for fault in STATUSES + (CUTS if request != "head" else [])  # a head has no body to cut
]


@pytest.mark.parametrize(("request_", "fault"), PASSING)
def test_what_may_pass_is_waited_for(served, waits, request_, fault):
    server, hub = served
    expected = _serve(server)[request_]
    server.faults[REQUESTS[request_]] = iter([fault] * 3)
    assert _call(hub, request_) == expected
    assert next(server.faults[REQUESTS[request_]], None) is None
    assert len(waits) >= 2 and all(wait > 0 for wait in waits)


@pytest.mark.parametrize("request_", ["commit", "body"])  # which the client itself asks for once
def test_the_waits_are_as_long_as_they_are_said_to_be(served, waits, request_, caplog):
    server, hub = served
    expected = _serve(server)[request_]
    server.faults[REQUESTS[request_]] = iter([500] * len(hub_module._WAITS))
    with caplog.at_level(logging.WARNING, "colbert_jax"):
        assert _call(hub, request_) == expected
    assert waits == list(hub_module._WAITS) and sum(waits) >= 30
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("colbert_jax")]
    assert [message.rpartition(" in ")[2] for message in messages] == [
        f"{wait:.0f} s" for wait in hub_module._WAITS
    ]
    assert all("500" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(("request_", "fault"), PASSING)
def test_what_never_passes_is_told_in_one_line_with_file_and_address(
    served, waits, request_, fault
):
    server, hub = served
    _serve(server)
    server.faults[REQUESTS[request_]] = itertools.repeat(fault)
    message = _user_error(_call, hub, request_)
    assert f"owner/set could not be read from http://127.0.0.1:{server.server_port} (" in message
    assert (f"{FILE} of owner/set" in message) == (request_ in ("head", "body"))
    if isinstance(fault, int):
        assert str(fault) in message  # or nobody can tell what to do
    assert set(hub_module._WAITS) <= set(waits)
    # Once it works again, so do we.
    server.faults.clear()
    assert _call(hub, request_) == _serve(server)[request_]


def test_a_hub_that_cannot_be_reached_says_so(tmp_path, waits, monkeypatch, online):
    hub = Hub("http://127.0.0.1:9", cache_dir=tmp_path)
    for call in CALLS.values():
        message = _user_error(call, hub)
        assert "could not be read from http://127.0.0.1:9 (" in message and "network" in message
    assert len(waits) >= 3 * len(hub_module._WAITS)
    waits.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in CALLS.values():
        assert "could not be read" in _user_error(call, hub)
    assert waits == []  # nothing will change while it is off


@pytest.fixture
def impatient_store(monkeypatch):
    """Lets the client of the hub's store of chunks give up soon; it waits outside of Python."""
    pytest.importorskip("hf_xet")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_DURATION", "1s")
    monkeypatch.setenv("HF_XET_TELEMETRY_ENABLED", "false")


def test_a_store_that_fails_is_waited_for(served, waits, impatient_store):
    server, hub = served
    expected = _serve(server)["body"]
    server.stores = 2
    assert CALLS["fetch"](hub) == expected
    assert any(path.startswith("/store/") for _, path, _ in server.seen)
    assert waits == list(hub_module._WAITS[:2])


def test_a_store_that_never_works_is_told_in_one_line(served, waits, impatient_store):
    server, hub = served
    _serve(server)
    server.stores = 100
    message = _user_error(CALLS["fetch"], hub)
    assert f"{FILE} of owner/set" in message and f"127.0.0.1:{server.server_port}" in message
    assert "503" in message and waits == list(hub_module._WAITS)


# --- failures that stay ---


@pytest.mark.parametrize("request_", ["commit", "files", "head", "body"])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_will_not_pass_is_said_at_once(served, waits, request_, status):
    server, hub = served
    _serve(server)
    server.faults[REQUESTS[request_]] = itertools.repeat(status)
    message = _user_error(_call, hub, request_)
    assert f"127.0.0.1:{server.server_port}" in message and "owner/set" in message
    assert (FILE in message) == (request_ in ("head", "body"))
    assert waits == []
    command, _ = REQUESTS[request_]
    assert _count(server, command) == 1


def test_a_file_that_is_gone_is_named_at_once(served, waits):
    server, hub = served
    message = _user_error(CALLS["fetch"], hub)
    assert f"no longer has {FILE} of owner/set" in message and COMMIT in message
    assert waits == [] and len(server.seen) == 1


def test_an_unknown_data_set_revision_or_name_says_so_at_once(served, waits):
    server, hub = served
    with pytest.raises(UserError, match="no data set owner/other"):
        hub_fingerprint("owner/other", hub=hub)
    with pytest.raises(UserError, match="no revision v9"):
        hub_fingerprint("owner/set", "v9", hub=hub)
    with pytest.raises(UserError, match="no data set owner/other"):
        hub.fetch("owner/other", COMMIT, FILE)
    assert len(server.seen) == 3
    with pytest.raises(UserError, match="owner/name"):
        hub_fingerprint("not/a/name", hub=hub)
    assert waits == []


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM"])
def test_a_disk_that_cannot_be_written_is_told_at_once(served, waits, monkeypatch, code):
    _, hub = served
    asked = []

    def refuse(*_, **__):
        asked.append(1)
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(hub_module, "hf_hub_download", refuse)
    message = _user_error(CALLS["fetch"], hub)
    assert os.strerror(getattr(errno, code)) in message and FILE in message
    assert waits == [] and len(asked) == 1


def test_a_cache_that_is_no_folder_is_told_at_once(tmp_path, served, waits):
    server, hub = served
    _serve(server)
    (tmp_path / "cache").write_text("a file")
    assert FILE in _user_error(CALLS["fetch"], hub)
    assert waits == []


@pytest.mark.parametrize("request_", ["commit", "files"])
def test_an_answer_that_is_not_the_hubs_is_a_users_error(served, waits, request_):
    server, hub = served
    server.faults[REQUESTS[request_]] = itertools.repeat(b"<html>Please log in</html>")
    message = _user_error(_call, hub, request_)
    assert f"127.0.0.1:{server.server_port}" in message and "owner/set" in message


# --- downloads that are cut ---


@pytest.mark.parametrize("how", ["cut", "reset", "short"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_after_a_cut_byte_for_byte(served, waits, monkeypatch, how, ranges):
    server, hub = served
    data = _serve(server, size=4_000_003)["body"]
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is kept at a time
    server.ranges = ranges
    server.faults["GET", "file"] = iter([(how, 2_500_000), (how, 1_000_001), (how, 3)])
    assert CALLS["fetch"](hub) == data
    assert len(waits) == 3 and _count(server, "GET") == 4
    resumed = [int(r[6:-1]) for command, _, r in server.seen if command == "GET" and r]
    assert all(0 < start < len(data) for start in resumed)
    assert resumed or how != "cut"


def test_a_download_of_more_than_the_client_holds_goes_on_after_a_cut(served, waits):
    server, hub = served
    size = constants.DOWNLOAD_CHUNK_SIZE
    data = _serve(server, size=size + 2_000_000)["body"]
    server.faults["GET", "file"] = iter([("cut", size + 1_000_000), ("reset", 5), ("cut", 7)])
    assert CALLS["fetch"](hub) == data


@pytest.mark.parametrize("how", ["cut", "reset", "short"])
def test_a_failed_download_is_never_taken_for_a_whole_file(tmp_path, served, waits, how):
    server, hub = served
    data = _serve(server, size=3_000_000)["body"]
    server.faults["GET", "file"] = itertools.repeat((how, 1_500_000))
    server.ranges = False  # or each attempt would come further
    assert FILE in _user_error(CALLS["fetch"], hub)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name == Path(FILE).name]
    assert left == []
    failed = _count(server, "GET")
    server.faults.clear()
    assert CALLS["fetch"](hub) == data
    assert _count(server, "GET") == failed + 1


def test_what_was_fetched_before_a_failure_is_kept(tmp_path, served, waits):
    server, hub = served
    for part in range(3):
        _write(server.root / f"data/cnn-0000{part}-of-00003.parquet", _pairs(f"p{part}", 2))
    builder = _builder(HubFiles, tmp_path, dataset="owner/set", split="cnn", hub=hub)
    broken = itertools.repeat(503)
    server.faults["GET", "file"] = itertools.chain([None, None], broken)
    assert "data/cnn-00002-of-00003.parquet" in _user_error(builder.open_table)
    server.faults.clear()
    before = _count(server, "GET")
    queries = [row["query"] for _, row in _read(builder.open_table())]
    assert queries == ["p0 0", "p0 1", "p1 0", "p1 1", "p2 0", "p2 1"]
    gets = [path for command, path, _ in server.seen[:] if command == "GET"][before:]
    assert [path.rpartition("/")[2] for path in gets if "/resolve/" in path] == [
        "cnn-00002-of-00003.parquet"
    ]
