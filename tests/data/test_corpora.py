"""Corpora by name: which rows of which files they hold, as TFDS and as this project read them."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from colbert_jax.data import builders, docstrings, tables
from colbert_jax.data import text as text_module
from colbert_jax.data.corpora import (
    CORPORA,
    Docstrings,
    HubCorpus,
    HubFiles,
    MsMarcoDistillation,
    NomicSupervised,
    NomicUnsupervised,
    PublicSource,
    docstring_builders,
    file_builder,
    hub_builders,
    safe_name,
    source_name,
)
from colbert_jax.data.hub import Hub
from colbert_jax.data.inputs import Corpus, open_corpus
from colbert_jax.data.records import ListSource, TextSource
from colbert_jax.data.text import RowFilter, TextBuilder
from colbert_jax.errors import UserError

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["colbert_jax.prepare", "colbert_jax.cli", "colbert_jax.start", "pyarrow.parquet", "pytest"]
)

ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" * 6 + "beef"
CONFIG = {"files": (), "corpus": "", "sources": (), "revision": ""}


@dataclasses.dataclass
class FolderHub:
    """A hub whose data sets are all one local folder."""

    root: Path
    head: str = COMMIT
    asked: int = 0

    def commit(self, dataset, revision):
        self.asked += 1
        return self.head

    def files(self, dataset, commit):
        assert commit == self.head
        return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()]

    def fetch(self, dataset, commit, file):
        return self.root / file


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(text_module, "_FEWEST_ROWS", 20)
    monkeypatch.setattr(tables, "_MARK_ROWS", 10)


def _write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=9)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _pairs(count, name="p"):
    return [{"query": f"query {name} {i} é", "document": f"document {i}"} for i in range(count)]


def _expected(records):
    return [{"query": r["query"], "documents": [r["document"]], "scores": None} for r in records]


def _all(builder):
    source = TextSource(builder.folder)
    return source.__getitems__(range(len(source)))


def _by_plain_tfds(folder):
    """The rows of a folder as those read it who know nothing of this project."""
    found = tfds.builder_from_directory(folder).as_data_source("train")
    return [
        {
            "query": row["query"].decode(),
            "documents": [text.decode() for text in row["documents"]],
            "scores": list(row["scores"]) or None,
        }
        for row in (found[i] for i in range(len(found)))
    ]


def _names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- files ---


def test_a_prepared_file_is_a_tfds_folder(tmp_path):
    records = _pairs(70)
    path = _write(tmp_path / "my pairs.jsonl", records)
    builder = file_builder(str(path), tmp_path / "out")
    manifest = builder.prepare()
    parent = builder.folder.parent
    assert builder.folder.name == "1.0.0" and parent.parent == tmp_path / "out" / "files"
    assert parent.name.startswith("my_pairs-") and len(parent.name) == len("my_pairs-") + 8
    assert _by_plain_tfds(builder.folder) == _all(builder) == _expected(records)
    info = tfds.builder_from_directory(builder.folder).info
    assert info.splits["train"].num_examples == 70
    assert info.splits["train"].shard_lengths == [20, 20, 20, 10]
    assert info.splits["train"].num_bytes == sum(shard["bytes"] for shard in manifest["shards"])


def test_scores_reach_plain_tfds_too(tmp_path):
    records = [
        {"query": f"query {i}", "documents": ["one", "two", "three"], "scores": [i, -0.5, 1e-3]}
        for i in range(25)
    ]
    builder = file_builder(str(_write(tmp_path / "rows.parquet", records)), tmp_path / "out")
    manifest = builder.prepare()
    assert (manifest["documents"], manifest["scored"]) == ([3, 3], True)
    for row, ours, record in zip(
        _by_plain_tfds(builder.folder), _all(builder), records, strict=True
    ):
        assert row["documents"] == ours["documents"] == record["documents"]
        wanted = np.array(record["scores"], np.float32).tolist()
        assert np.array(row["scores"]).tolist() == ours["scores"] == wanted


def test_tfds_own_entry_prepares_too(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(45))
    builder = file_builder(str(path), tmp_path / "out")
    builder.download_and_prepare()
    assert _by_plain_tfds(builder.folder) == _all(builder) == _expected(_pairs(45))
    builder.download_and_prepare()  # as TFDS has it, nothing is done again
    assert file_builder(str(path), tmp_path / "out").prepare()["kept"] == 45


def test_tfds_own_entry_leaves_no_scratch_files(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(45))
    file_builder(str(path), tmp_path / "out").download_and_prepare()
    assert not [name for name in _names(tmp_path / "out") if "unfinished" in name]


def test_preparing_leaves_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    path = _write(tmp_path / "rows.jsonl", _pairs(45))
    file_builder(str(path), tmp_path / "out").prepare()
    assert _names(tmp_path / "scratch") == []


def test_a_file_that_changes_is_another_source(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(10))
    first = file_builder(str(path), tmp_path / "out")
    first.prepare()
    _write(path, _pairs(12))
    second = file_builder(str(path), tmp_path / "out")
    assert second.folder != first.folder and second.prepare()["kept"] == 12
    assert len(_all(first)) == 10


def test_columns_are_read_under_the_names_that_a_file_has(tmp_path):
    records = [{"question": f"question {i}", "text": f"text {i}", "query": i} for i in range(30)]
    path = _write(tmp_path / "rows.parquet", records)
    columns = {"query": "question", "document": "text"}
    builder = file_builder(str(path), tmp_path / "out", columns=columns)
    builder.prepare()
    assert [row["query"] for row in _all(builder)] == [record["question"] for record in records]
    assert [row["documents"] for row in _all(builder)] == [[r["text"]] for r in records]
    with pytest.raises(UserError, match=r"rows\.parquet.*no column title to read query from"):
        file_builder(str(path), tmp_path / "other", columns={"query": "title"}).prepare()


def test_what_was_prepared_with_other_column_names_is_what_training_opens(tmp_path):
    records = [{"question": f"question {i}", "text": f"text {i}"} for i in range(30)]
    path = _write(tmp_path / "rows.jsonl", records)
    columns = {"query": "question", "document": "text"}
    folder = tmp_path / "out"
    file_builder(str(path), folder, columns=columns).prepare()
    corpus = open_corpus(CONFIG | {"files": (str(path),), "cache_dir": folder})
    assert [len(source) for source in corpus.sources.values()] == [30]


def test_a_set_of_the_hub_prepared_with_other_column_names_is_what_training_opens(tmp_path):
    _write(
        tmp_path / "hub" / "train-00000-of-00001.parquet",
        [{"question": f"question {i}", "text": f"text {i}"} for i in range(30)],
    )
    columns = {"query": "question", "document": "text"}
    given = {"dataset": "owner/set", "split": "train", "data_dir": tmp_path / "out"}
    HubFiles(**given, columns=columns, hub=FolderHub(tmp_path / "hub")).prepare()
    corpus = open_corpus(
        CONFIG | {"corpus": "owner/set", "sources": ("train",), "cache_dir": tmp_path / "out"}
    )
    assert [len(source) for source in corpus.sources.values()] == [30]


@pytest.mark.parametrize(
    "name",
    [
        "spaces and 'quotes'.jsonl",
        "[x]*?.jsonl",
        "日本 $(touch made) `x` %s {0}.jsonl",
        "-n..jsonl",
        "..jsonl",
        "x" * 200 + ".jsonl",
        "\udcff.jsonl",
    ],
)
def test_any_name_of_a_file_makes_a_folder_within_the_output(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path / "in" / name, _pairs(3))
    builder = file_builder(str(path), tmp_path / "out")
    builder.prepare()
    assert len(_all(builder)) == 3 and _by_plain_tfds(builder.folder) == _all(builder)
    assert builder.folder.parents[1] == tmp_path / "out" / "files"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    corpus = open_corpus(CONFIG | {"files": (str(path),), "cache_dir": tmp_path / "out"})
    assert [len(source) for source in corpus.sources.values()] == [3]


def test_names_of_folders_and_sources_are_plain():
    assert safe_name("../../etc/passwd") == "etc_passwd" and safe_name("...") == "source"
    assert source_name("a/b/pairs.jsonl.gz") == "pairs" and source_name("data/*.parquet") == "data"


def test_files_of_a_pattern_are_one_source_and_a_pattern_without_a_file_says_so(tmp_path):
    for i in range(3):
        _write(tmp_path / f"part-{i}.jsonl", _pairs(5, str(i)))
    builder = file_builder(f"{tmp_path}/part-[0-9].jsonl", tmp_path / "out")
    builder.prepare()
    assert _all(builder) == _expected([*_pairs(5, "0"), *_pairs(5, "1"), *_pairs(5, "2")])
    with pytest.raises(UserError, match=r"none-\*\.jsonl matches no file: check the pattern"):
        file_builder(f"{tmp_path}/none-*.jsonl", tmp_path / "out")
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        file_builder(f"{tmp_path}/none.jsonl", tmp_path / "out")


# --- the hub ---


def test_a_source_of_a_known_corpus_is_prepared_under_its_name(tmp_path):
    records = _pairs(50)
    _write(tmp_path / "hub/data/squad-00000-of-00002.parquet", records[:30])
    _write(tmp_path / "hub/data/squad-00001-of-00002.parquet", records[30:])
    _write(tmp_path / "hub/data/quora-00000-of-00001.parquet", _pairs(7, "quora"))
    hub = FolderHub(tmp_path / "hub")
    builder = NomicUnsupervised(config="squad", data_dir=tmp_path / "out", hub=hub)
    manifest = builder.prepare()
    assert builder.folder == tmp_path / "out" / "nomic_unsupervised" / "squad" / "1.0.0"
    assert _by_plain_tfds(builder.folder) == _all(builder) == _expected(records)
    assert manifest["origin"]["dataset"] == "nomic-ai/nomic-embed-unsupervised-data"
    assert manifest["origin"]["revision"] == COMMIT
    assert [file["name"] for file in manifest["origin"]["files"]] == [
        "squad-00000-of-00002.parquet",
        "squad-00001-of-00002.parquet",
    ]
    assert manifest["request"]["split"] == "squad"
    assert (
        len(tfds.data_source("nomic_unsupervised/squad", data_dir=tmp_path / "out")["train"]) == 50
    )


def test_what_is_prepared_needs_no_hub(tmp_path):
    _write(tmp_path / "hub/squad.parquet", _pairs(5))
    given = {"config": "squad", "data_dir": tmp_path / "out"}
    NomicUnsupervised(**given, hub=FolderHub(tmp_path / "hub")).prepare()
    silent = FolderHub(tmp_path / "nowhere")
    assert NomicUnsupervised(**given, hub=silent).prepare()["kept"] == 5
    assert NomicUnsupervised(**given, hub=silent, revision=COMMIT).prepare()["kept"] == 5
    assert silent.asked == 0
    corpus = open_corpus(
        CONFIG
        | {"corpus": "nomic_unsupervised", "sources": ("squad",), "cache_dir": tmp_path / "out"}
    )
    assert len(corpus.sources["squad"]) == 5
    other = "0" * 40
    with pytest.raises(UserError, match=f"revision='{COMMIT}', not '{other}'"):
        NomicUnsupervised(**given, hub=silent, revision=other).prepare()


def test_shards_of_an_older_revision_are_thrown_away(tmp_path, monkeypatch):
    given = {"config": "squad", "data_dir": tmp_path / "out"}
    write = builders.write_shard

    def stopped(job, shard, *arguments):
        if shard.number == 2:
            raise KeyboardInterrupt
        return write(job, shard, *arguments)

    _write(tmp_path / "old/squad.jsonl", _pairs(70, "old"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(builders, "write_shard", stopped)
        NomicUnsupervised(**given, hub=FolderHub(tmp_path / "old")).prepare()
    _write(tmp_path / "new/squad.jsonl", _pairs(70, "new"))
    builder = NomicUnsupervised(**given, hub=FolderHub(tmp_path / "new", head="f" * 40))
    assert builder.prepare()["origin"]["revision"] == "f" * 40
    assert _all(builder) == _expected(_pairs(70, "new"))


def test_a_corpus_of_ones_own_takes_a_few_lines(tmp_path):
    class MyOwnQuestions(HubCorpus):
        """Questions of mine."""

        dataset = "me/questions"
        sources = (PublicSource("train", 40, "mine"), PublicSource("dev", 3, "mine"))
        columns = {"query": "question", "document": "answer"}  # noqa: RUF012

    rows = [{"question": f"question {i}", "answer": f"answer {i}"} for i in range(43)]
    _write(tmp_path / "hub/train-00000-of-00001.parquet", rows[:40])
    _write(tmp_path / "hub/dev-00000-of-00001.parquet", rows[40:])
    hub = FolderHub(tmp_path / "hub")
    for split, wanted in (("train", rows[:40]), ("dev", rows[40:])):
        builder = MyOwnQuestions(config=split, data_dir=tmp_path / "out", hub=hub)
        builder.prepare()
        assert builder.folder == tmp_path / "out" / "my_own_questions" / split / "1.0.0"
        assert [row["documents"] for row in _by_plain_tfds(builder.folder)] == [
            [row["answer"]] for row in wanted
        ]


def test_any_set_of_the_hub_may_be_prepared(tmp_path):
    rows = [{"question": f"question {i}", "answer": f"answer {i}"} for i in range(30)]
    _write(tmp_path / "hub/my split/0000.parquet", rows)
    hub = FolderHub(tmp_path / "hub")
    columns = {"query": "question", "document": "answer"}
    given = {"dataset": "o-w/n.e", "split": "my split", "data_dir": tmp_path / "out", "hub": hub}
    builder = HubFiles(**given, columns=columns)
    manifest = builder.prepare()
    assert builder.folder == tmp_path / "out" / "hub" / "o_w_n_e-my_split" / "1.0.0"
    assert [row["query"] for row in _by_plain_tfds(builder.folder)] == [
        row["question"] for row in rows
    ]
    assert manifest["request"]["columns"] == columns
    with pytest.raises(UserError, match=r"columns=.*'question'.*, not .*'title'"):
        HubFiles(**given, columns={"query": "title", "document": "answer"}).prepare()


def test_pairs_of_the_second_phase_keep_ten_negatives(tmp_path):
    rows = [
        {"query": f"query {i}", "document": "positive", "negative": [f"n{j}" for j in range(i)]}
        for i in range(15)
    ]
    _write(tmp_path / "hub/reddit_triples.jsonl", rows)
    given = {"data_dir": tmp_path / "out", "hub": FolderHub(tmp_path / "hub")}
    builder = NomicSupervised(config="reddit_triples", **given)
    assert builder.prepare()["documents"] == [1, 11]
    assert [row["documents"] for row in _all(builder)] == [
        ["positive", *row["negative"][:10]] for row in rows
    ]


def test_builders_of_a_corpus_are_found_by_name(tmp_path):
    every = hub_builders("nomic_supervised", (), "", tmp_path)
    assert list(every) == [source.name for source in NomicSupervised.sources]
    assert all(type(builder) is NomicSupervised for builder in every.values())
    some = hub_builders("nomic_unsupervised", ("squad", "npr"), "", tmp_path)
    assert {name: builder.split for name, builder in some.items()} == {
        "squad": "squad",
        "npr": "npr",
    }
    (other,) = hub_builders("owner/set", ("train",), "", tmp_path, columns={"query": "q"}).values()
    assert isinstance(other, HubFiles) and isinstance(other, TextBuilder)
    for corpus, sources, message in (
        ("nomic_supervised", ("squad",), r"no source squad: choose one of medi_sts_wiki_rephras"),
        ("nomic", (), r"no corpus nomic: choose one of nomic_unsupervised, nomic_supervised, "),
        ("a/b/c", ("train",), r"no corpus a/b/c"),
        ("owner/set", (), r"splits of owner/set is meant"),
    ):
        with pytest.raises(UserError, match=message):
            hub_builders(corpus, sources, "", tmp_path)
    with pytest.raises(UserError, match="columns of nomic_supervised are known"):
        hub_builders("nomic_supervised", (), "", tmp_path, columns={"query": "q"})


def test_the_known_corpora_are_those_of_the_configs_and_the_papers():
    assert [len(corpus.sources) for corpus in CORPORA.values()] == [29, 10, 1]
    total = sum(source.rows for source in NomicUnsupervised.sources)
    assert total == 238_998_494
    for name, corpus in (
        ("pretrain", NomicUnsupervised),
        ("supervised", NomicSupervised),
        ("distill", MsMarcoDistillation),
    ):
        config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]().input
        assert config.corpus in (corpus.name, corpus.dataset)
        assert set(config.sources or ()) <= {source.name for source in corpus.sources}
    for corpus in CORPORA.values():
        assert all(source.licence and source.rows for source in corpus.sources)


# --- joined tables ---


def _write_tables(
    root, count=50, candidates=32, extra=(), layout="{}/train-00000-of-00001.parquet"
):
    rows = [
        {
            "query_id": str(i),
            "document_ids": [str((i + j) % 90) for j in range(candidates)],
            "scores": [j / 7 - i for j in range(candidates)],
        }
        for i in range(count)
    ]
    rows[len(rows) // 2 : len(rows) // 2] = extra
    _write(root / layout.format("train"), rows)
    queries = [{"query_id": i, "text": f"query {i}"} for i in range(count)]
    documents = [{"document_id": i, "text": f"document {i}"} for i in range(90)]
    _write(root / layout.format("queries"), [*queries, {"query_id": 777, "text": " "}])
    _write(root / layout.format("documents"), [*documents, {"document_id": 888, "text": None}])
    _write(root / layout.format("train_unormalized"), [{"query_id": "9", "document_ids": ["9"]}])
    return [
        {
            "query": f"query {row['query_id']}",
            "documents": [f"document {i}" for i in row["document_ids"]],
            "scores": np.array(row["scores"], np.float32).tolist(),
        }
        for row in rows
        if row not in list(extra)
    ]


def test_three_tables_are_joined_and_rows_that_lack_something_are_counted(tmp_path):
    full = {"query_id": "1", "document_ids": ["3"] * 32, "scores": [0.5] * 32}
    extra = [
        full | {"document_ids": ["3"] * 31, "scores": [0.5] * 31},
        full | {"query_id": "unknown"},
        full | {"query_id": "777"},
        full | {"document_ids": ["3"] * 31 + ["unknown"]},
        full | {"document_ids": ["888"] + ["3"] * 31},
        full | {"scores": [0.5] * 31},
        full | {"scores": [0.5] * 31 + [float("nan")]},
        full | {"query_id": None},
        full | {"document_ids": []},
    ]
    wanted = _write_tables(tmp_path / "hub", extra=extra)
    hub = FolderHub(tmp_path / "hub")
    builder = MsMarcoDistillation(config="train", data_dir=tmp_path / "out", hub=hub)
    manifest = builder.prepare()
    assert _all(builder) == wanted and len(wanted) == 50
    assert manifest["dropped"] == {
        "empty": 2,
        "invalid": 2,
        "no_text": 4,
        "too_few_documents": 1,
    }
    assert manifest["read"] == 59 and len(manifest["shards"]) > 1
    assert (manifest["documents"], manifest["scored"]) == ([32, 32], True)
    assert manifest["first_dropped"]["no_text"].startswith(
        "train/train-00000-of-00001.parquet, row 27: "
    )
    assert "31 documents where 32" in manifest["first_dropped"]["too_few_documents"]
    assert len(manifest["origin"]["files"]) == 3
    assert not [name for name in _names(tmp_path / "out") if "sqlite" in name]


def test_the_number_of_candidates_may_be_lowered(tmp_path):
    _write_tables(tmp_path / "hub", candidates=4, layout="{}.parquet")
    given = {"config": "train", "hub": FolderHub(tmp_path / "hub"), "data_dir": tmp_path / "out"}
    with pytest.raises(UserError, match=r"none of 50 rows.*4 documents where 32"):
        MsMarcoDistillation(**given).prepare()
    builder = MsMarcoDistillation(**given, cleaning={"min_documents": 4})
    assert builder.prepare()["kept"] == 50 == len(_all(builder))
    with pytest.raises(UserError, match=r"'min_documents': 4.*'min_documents': 3"):
        MsMarcoDistillation(**given, cleaning={"min_documents": 3}).prepare()
    assert MsMarcoDistillation(**given).prepare()["kept"] == 50


def test_candidates_may_be_cut_to_fewer(tmp_path):
    wanted = _write_tables(tmp_path / "hub")
    given = {"config": "train", "hub": FolderHub(tmp_path / "hub"), "data_dir": tmp_path / "out"}
    builder = MsMarcoDistillation(**given, cleaning={"max_documents": 16})
    assert builder.prepare()["documents"] == [16, 16]
    assert [row["documents"] for row in _all(builder)] == [row["documents"][:16] for row in wanted]


@pytest.mark.parametrize("name", ["a?b", "a#b", "50%25", "spaces 'and' \"quotes\""])
def test_tables_are_joined_in_a_folder_of_any_name(tmp_path, name):
    wanted = _write_tables(tmp_path / "hub")
    hub = FolderHub(tmp_path / "hub")
    builder = MsMarcoDistillation(config="train", data_dir=tmp_path / name, hub=hub)
    builder.prepare()
    assert _all(builder) == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"hub", name}


def test_texts_of_tables_are_never_run_or_used_as_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = "x'); DROP TABLE queries; --"
    _write(
        tmp_path / "hub/train/train-00000-of-00001.parquet",
        [
            {"query_id": "0", "document_ids": "[open('made', 'w')]", "scores": "[1.0]"},
            {"query_id": hostile, "document_ids": f"[{hostile!r}]", "scores": "[2.5]"},
            {"query_id": "../../x", "document_ids": '["{0.__class__}"]', "scores": "[3.0]"},
        ],
    )
    names = [hostile, "../../x", "{0.__class__}"]
    _write(
        tmp_path / "hub/queries/train-00000-of-00001.parquet",
        [{"query_id": name, "text": f"query {name}"} for name in names],
    )
    _write(
        tmp_path / "hub/documents/train-00000-of-00001.parquet",
        [{"document_id": name, "text": f"document {name} $(touch made)"} for name in names],
    )
    builder = MsMarcoDistillation(
        config="train",
        data_dir=tmp_path / "out",
        hub=FolderHub(tmp_path / "hub"),
        cleaning={"min_documents": 1},
    )
    manifest = builder.prepare()
    assert manifest["dropped"] == {"invalid": 1}
    assert [row["query"] for row in _all(builder)] == [f"query {hostile}", "query ../../x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]


def _join_where(folder, act, argument):
    """Joins the tables in a process whose disk is full, or that is killed."""
    text_module._FEWEST_ROWS, tables._MARK_ROWS = 20, 10
    hub = FolderHub(folder / "hub")
    builder = MsMarcoDistillation(config="train", data_dir=folder / "out", hub=hub)
    act(argument)
    try:
        builder.prepare()
    except UserError as error:
        os._exit(7 if "cannot be written" in str(error) and "make room" in str(error) else 8)


def _limit_files(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _die_before(change):
    number = itertools.count()

    def hook(event, arguments):
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        changes = event in ("os.rename", "os.remove", "sqlite3.connect")
        if (writes or changes) and next(number) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _die_at_text(number):
    """Is killed while the database of texts is half written."""
    texts = tables._texts

    def counted(*arguments):
        for i, text in enumerate(texts(*arguments)):
            if arguments[2] == "document_id" and i == number:
                os.kill(os.getpid(), signal.SIGKILL)
            yield text

    tables._texts = counted


def _inside(folder):
    return [f"{folder.name}/{name}" for name in _names(folder)]


def _run(target, *arguments):
    process = _FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(100)
    return process.exitcode


def test_a_join_that_found_the_disk_full_or_was_killed_is_finished_by_the_next(tmp_path):
    wanted = _write_tables(tmp_path / "hub")
    exits = [_run(_join_where, tmp_path, _limit_files, size) for size in (600, 5_000, 12_000)]
    assert exits == [7, 7, 7]
    assert _run(_join_where, tmp_path, _die_at_text, 70) == -signal.SIGKILL
    exits = [_run(_join_where, tmp_path, _die_before, change) for change in range(1, 9)]
    assert exits == [-signal.SIGKILL] * 8
    hub = FolderHub(tmp_path / "hub")
    builder = MsMarcoDistillation(config="train", data_dir=tmp_path / "out", hub=hub)
    builder.prepare()
    assert _all(builder) == wanted
    assert _names(builder.folder.parent) == sorted([".lock", "1.0.0", *_inside(builder.folder)])


# --- docstrings ---


def _write_package(root, name, count=30):
    for i in range(count):
        path = root / name / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'def function{i}():\n    """Returns what number {i} of {name} is.\n\n    More."""\n'
        )


def test_docstrings_are_prepared_package_by_package_without_those_held_out(tmp_path, monkeypatch):
    for name in ("onepackage", "another_package"):
        _write_package(tmp_path / "site", name)
    monkeypatch.setattr(docstrings, "site_packages", lambda: (tmp_path / "site",))
    found, held_out = docstring_builders(("onepackage", "another_package"), tmp_path / "out")
    assert list(found) == ["onepackage", "another_package"]
    train, held = [], set(held_out[1].values())
    for name, builder in found.items():
        assert isinstance(builder, Docstrings)
        builder.prepare()
        parent = builder.folder.parent
        assert parent.parent == tmp_path / "out" / "docstrings"
        assert parent.name.startswith(f"{name}-")
        assert _by_plain_tfds(builder.folder) == _all(builder)
        train += [row["query"] for row in _all(builder)]
    assert len(train) + len(held) == 60 and len(held) > 0 and not held & set(train)
    given = {"corpus": "docstrings", "sources": ("onepackage", "another_package")}
    corpus = open_corpus(CONFIG | given | {"cache_dir": tmp_path / "out"})
    assert list(corpus.sources) == ["onepackage", "another_package"]
    assert corpus.held_out == held_out


def test_another_version_of_a_package_is_another_source(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "site_packages", lambda: (tmp_path / "site",))
    folders = []
    for count in (20, 25):
        _write_package(tmp_path / "site", "package", count)
        found, _ = docstring_builders(("package",), tmp_path / "out")
        found["package"].prepare()
        folders.append(found["package"].folder)
    assert folders[0] != folders[1]
    with pytest.raises(UserError, match="no docstrings were found for the packages nothing_such"):
        docstring_builders(("nothing_such",), tmp_path / "out")


# --- a run's corpus ---


def test_files_of_one_name_are_two_sources(tmp_path):
    first = _write(tmp_path / "a" / "rows.jsonl", _pairs(5, "a"))
    second = _write(tmp_path / "b" / "rows.jsonl", _pairs(6, "b"))
    other = _write(tmp_path / "b" / "other.jsonl", _pairs(7, "c"))
    files = (str(first), str(second), str(other))
    corpus = open_corpus(CONFIG | {"files": files, "cache_dir": tmp_path / "out"})
    assert {name: len(source) for name, source in corpus.sources.items()} == {
        str(first): 5,
        str(second): 6,
        "other": 7,
    }


def test_a_prepared_folder_is_a_source_wherever_it_was_moved(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(25))
    builder = file_builder(str(path), tmp_path / "out", cleaning={"min_characters": 3})
    builder.prepare()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    path.unlink()
    folder = next(moved.glob("files/*/1.0.0"))
    for given in (folder, folder.parent):
        config = CONFIG | {"files": (str(given),), "cache_dir": tmp_path / "unused"}
        (source,) = open_corpus(config).sources.values()
        assert source.__getitems__(range(25)) == _expected(_pairs(25))
    assert not (tmp_path / "unused").exists()
    with pytest.raises(UserError, match="not a whole prepared folder"):
        open_corpus(CONFIG | {"files": (str(tmp_path),), "cache_dir": tmp_path / "unused"})


def test_a_corpus_that_is_not_named_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"set config\.input\.files or \.corpus"):
        open_corpus(CONFIG | {"cache_dir": tmp_path})


def test_a_run_prepares_what_is_missing_and_passes_on_what_cannot_be_read(tmp_path, monkeypatch):
    _write(tmp_path / "hub/squad.parquet", _pairs(5))
    for name in ("commit", "files", "fetch"):
        method = getattr(FolderHub, name)
        root = FolderHub(tmp_path / "hub")
        monkeypatch.setattr(Hub, name, lambda _, *a, method=method, root=root: method(root, *a))
    given = {"corpus": "nomic-ai/nomic-embed-unsupervised-data", "cache_dir": str(tmp_path / "out")}
    corpus = open_corpus(CONFIG | given | {"sources": ("squad",)})
    assert corpus.held_out is None and list(corpus.sources["squad"]) == _expected(_pairs(5))
    assert (tmp_path / "out/nomic_unsupervised/squad/1.0.0/manifest.json").is_file()
    with pytest.raises(UserError, match="no split npr: choose one of squad"):
        open_corpus(CONFIG | given | {"sources": ("npr",)})


def test_texts_for_a_tokenizer_come_from_all_over_all_sources(tmp_path):
    path = _write(tmp_path / "rows.jsonl", _pairs(3000, "disk"))
    source = TextSource(_prepared(path, tmp_path / "out"))
    memory = ListSource(
        {"query": f"m {i}", "documents": ["a", "b"], "scores": None} for i in range(1000)
    )
    corpus = Corpus({"disk": source, "memory": memory})
    assert len(list(corpus.texts())) == 2 * 3000 + 3 * 1000
    some = list(corpus.texts(most_rows=400))
    places = [int(text.split()[2]) for text in some if text.startswith("query disk")]
    assert places == list(range(0, 3000, 10))
    assert [text for text in some if text.startswith("m ")] == [
        f"m {i}" for i in range(0, 1000, 10)
    ]
    assert len(some) == 2 * 300 + 3 * 100


def _prepared(path, folder):
    builder = file_builder(str(path), folder)
    builder.prepare()
    return builder.folder


def test_a_filter_of_a_corpus_is_named_in_its_manifest(tmp_path):
    _write(tmp_path / "hub/squad.parquet", _pairs(30))
    row_filter = RowFilter("odd ones", 5, lambda sample: lambda rows: [True] * len(rows))
    given = {"config": "squad", "data_dir": tmp_path / "out", "hub": FolderHub(tmp_path / "hub")}
    NomicUnsupervised(**given, row_filter=row_filter).prepare()
    assert NomicUnsupervised(**given).prepare()["request"]["filter"] == "odd ones"
    with pytest.raises(UserError, match="filter='odd ones', not 'even ones'"):
        even = dataclasses.replace(row_filter, name="even ones")
        NomicUnsupervised(**given, row_filter=even).prepare()


def test_a_hub_that_fails_is_not_taken_for_a_disk_that_fails(tmp_path, monkeypatch):
    def fails(*_):
        raise UserError("the hub is away")

    hub = FolderHub(tmp_path)
    monkeypatch.setattr(hub, "fetch", fails)
    _write(tmp_path / "squad.parquet", _pairs(3))
    with pytest.raises(UserError, match="the hub is away"):
        NomicUnsupervised(config="squad", data_dir=tmp_path / "out", hub=hub).prepare()
