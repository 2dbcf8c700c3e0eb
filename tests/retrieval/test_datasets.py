"""Test collections by name, from folders and from the hub in all of its layouts."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colbert_jax.errors import UserError
from colbert_jax.retrieval import datasets
from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.datasets import NANO_BEIR, open_dataset

COMMIT = "c0ffee" * 6 + "beef"
CORPUS = [
    {"_id": "d1", "title": "Apples", "text": "grow on trees"},
    {"_id": "d2", "title": "", "text": "Pears do too."},
]
QUERIES = [{"_id": "q1", "text": "where do apples grow"}, {"_id": "q2", "text": "not judged"}]
JUDGED = [{"query-id": "q1", "corpus-id": "d1", "score": 2}]
DOCUMENTS = {"d1": "Apples grow on trees", "d2": "Pears do too."}
ASKED = {"q1": "where do apples grow"}
QRELS = {"q1": {"d1": 2}}


class Folders:
    """A hub whose data sets are folders, by their names."""

    def __init__(self, root: Path):
        self.root, self.fetched = root, []

    def commit(self, dataset: str, revision: str | None) -> str:
        if not (self.root / dataset).is_dir():
            raise UserError(f"the hub has no data set {dataset} that you may read: check its name.")
        return COMMIT

    def files(self, dataset: str, commit: str) -> list[str]:
        assert commit == COMMIT
        root = self.root / dataset
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]

    def fetch(self, dataset: str, commit: str, file: str) -> Path:
        self.fetched.append(f"{dataset}/{file}")
        return self.root / dataset / file


def write(path: Path, rows: list[dict[str, Any]] | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, str):
        path.write_bytes(rows.encode())
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        lines = ["query-id\tcorpus-id\tscore"]
        lines += ["\t".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def hub(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "hub")


def opened(name: str, split: str | None = None, hub: Any = None) -> list[Collection]:
    return list(open_dataset(name, split, hub))


# --- folders ---


def write_beir(folder: Path, split: str = "test") -> Path:
    write(folder / "corpus.jsonl", CORPUS)
    write(folder / "queries.jsonl", QUERIES)
    write(folder / "qrels" / f"{split}.tsv", JUDGED)
    return folder


def test_a_folder(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "fruit")
    assert opened(str(folder)) == [Collection("fruit", DOCUMENTS, ASKED, QRELS)]
    write(folder / "qrels" / "dev.tsv", [{"q": "q2", "d": "d2", "s": 1}])
    assert opened(str(folder), "dev")[0].qrels == {"q2": {"d2": 1}}
    with pytest.raises(UserError, match=r"train\.tsv cannot be read"):
        opened(str(folder), "train")


def test_a_folder_of_folders_counts_as_one(tmp_path: Path) -> None:
    for name in ("gaming", "android"):
        write_beir(tmp_path / "cqadupstack" / name)
    (tmp_path / "cqadupstack" / "notes").mkdir()
    write(tmp_path / "cqadupstack" / "README.md", "Forums.")
    found = opened(str(tmp_path / "cqadupstack"))
    assert [c.name for c in found] == ["cqadupstack-android", "cqadupstack-gaming"]
    assert {c.group for c in found} == {"cqadupstack"}
    assert all(c.documents == DOCUMENTS for c in found)


def test_a_folder_that_holds_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.jsonl cannot be read"):
        opened(str(tmp_path))
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "file"), str(tmp_path / "none"), "", " ", "scifact"):
        with pytest.raises(UserError, match="is no data set: give a folder in BEIR's layout"):
            opened(name)


# --- the hub ---

LAYOUTS = {
    "parquet": ("corpus/corpus-00000-of-00002.parquet", "queries/queries-00000-of-00001.parquet"),
    "nano": ("corpus/train-00000-of-00001.parquet", "queries/train-00000-of-00001.parquet"),
    "jsonl": ("corpus.jsonl", "queries.jsonl"),
    "gzip": ("corpus.jsonl.gz", "queries.jsonl.gz"),
    "data": ("data/corpus-00000-of-00001.parquet", "data/queries-00000-of-00001.parquet"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beir_by_name_in_each_layout(hub: Folders, layout: str) -> None:
    corpus, queries = LAYOUTS[layout]
    root = hub.root / "BeIR" / "scifact"
    write(root / corpus, CORPUS[:1] if layout == "parquet" else CORPUS)
    if layout == "parquet":
        write(root / corpus.replace("00000-of", "00001-of"), CORPUS[1:])
    write(root / queries, QUERIES)
    write(root / "README.md", "SciFact.")
    write(hub.root / "BeIR" / "scifact-qrels" / "test.tsv", JUDGED)
    write(hub.root / "BeIR" / "scifact-qrels" / "train.tsv", [{"q": "q2", "d": "d2", "s": 1}])
    for name in ("beir/scifact", "BEIR/SciFact"):
        assert opened(name, hub=hub) == [Collection("scifact", DOCUMENTS, ASKED, QRELS)]
    (train,) = opened("beir/scifact", "train", hub)
    assert train.qrels == {"q2": {"d2": 1}} and train.queries == {"q2": "not judged"}
    with pytest.raises(UserError, match=r"BeIR/scifact-qrels on the hub has no .* 'dev'"):
        opened("beir/scifact", "dev", hub)


def test_space_around_a_text_is_kept_where_pylate_keeps_it(hub: Folders, tmp_path: Path) -> None:
    """It drops it in BEIR's documents, but neither in queries nor in NanoBEIR."""
    corpus = [{"_id": "d1", "title": "", "text": "\n grow on trees "}]
    queries = [{"_id": "q1", "text": " where do apples grow"}]
    judged = [{"query-id": "q1", "corpus-id": "d1", "score": 1}]
    written = {
        tmp_path / "fruit": ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"),
        hub.root / "BeIR/scifact": ("corpus.jsonl", "queries.jsonl", "-"),
        hub.root / "BeIR/scifact-qrels": ("-", "-", "test.tsv"),
        hub.root / NANO_BEIR["NanoSciFact"]: tuple(
            f"{part}/train-00000-of-00001.parquet" for part in ("corpus", "queries", "qrels")
        ),
    }
    for folder, files in written.items():
        for file, rows in zip(files, (corpus, queries, judged), strict=True):
            if file != "-":
                write(folder / file, rows)
    for name in (str(tmp_path / "fruit"), "beir/scifact"):
        (found,) = opened(name, hub=hub)
        assert found.documents == {"d1": "grow on trees"}
        assert found.queries == {"q1": " where do apples grow"}
    (nano,) = opened("nanobeir/SciFact", hub=hub)
    assert nano.documents["d1"].endswith("\n grow on trees ")


def test_the_same_rows_in_two_formats_are_read_once(hub: Folders) -> None:
    root = hub.root / "BeIR" / "scifact"
    for layout in ("parquet", "gzip"):
        for file, rows in zip(LAYOUTS[layout], (CORPUS, QUERIES), strict=True):
            write(root / file, rows)
    write(hub.root / "BeIR" / "scifact-qrels" / "test.tsv", JUDGED)
    write(hub.root / "BeIR" / "scifact-qrels" / "test-00000-of-00001.parquet", JUDGED)
    assert opened("beir/scifact", hub=hub)[0].documents == DOCUMENTS
    assert len(hub.fetched) == 3 and all(file.endswith(".parquet") for file in hub.fetched)


def test_ms_marcos_table_is_of_its_dev_split_and_touche_has_another_name(hub: Folders) -> None:
    for name, split in (("msmarco", "dev"), ("webis-touche2020", "test")):
        write(hub.root / "BeIR" / name / "corpus.jsonl.gz", CORPUS)
        write(hub.root / "BeIR" / name / "queries.jsonl.gz", QUERIES)
        write(hub.root / "BeIR" / f"{name}-qrels" / f"{split}.tsv", JUDGED)
    assert opened("beir/msmarco", hub=hub)[0].name == "msmarco"
    assert opened("beir/touche2020", hub=hub)[0].name == "touche2020"
    with pytest.raises(UserError, match="'test'"):
        opened("beir/msmarco", "test", hub)


def write_nano(root: Path) -> None:
    for file, rows in zip(LAYOUTS["nano"], (CORPUS, QUERIES), strict=True):
        write(root / file, rows)
    rows = [{key: row[key] for key in ("query-id", "corpus-id")} for row in JUDGED]
    write(root / "qrels" / "train-00000-of-00001.parquet", rows)


def test_nanobeir_is_thirteen_without_scores(hub: Folders) -> None:
    assert len(NANO_BEIR) == 13
    for dataset in NANO_BEIR.values():
        write_nano(hub.root / dataset)
    found = opened("nanobeir", hub=hub)
    assert [c.name for c in found] == list(NANO_BEIR) and {c.group for c in found} == {""}
    assert found[0].documents == DOCUMENTS and found[0].qrels == {"q1": {"d1": 1}}
    for name in ("nanobeir/SciFact", "NanoBEIR/scifact", "nanobeir/NanoSciFact"):
        assert [c.name for c in opened(name, hub=hub)] == ["NanoSciFact"]
    with pytest.raises(UserError, match=r"no part 'sci': choose one of ClimateFEVER, .*Touche2020"):
        opened("nanobeir/sci", hub=hub)


def test_collections_are_fetched_one_after_the_other(hub: Folders) -> None:
    for dataset in NANO_BEIR.values():
        write_nano(hub.root / dataset)
    found = open_dataset("nanobeir", hub=hub)
    assert not hub.fetched
    for count in (1, 2):
        next(found)
        assert len(hub.fetched) == 3 * count


def test_cqadupstack_is_twelve_forums_that_count_as_one(hub: Folders) -> None:
    for forum in datasets._FORUMS:
        root = hub.root / "mteb" / f"cqadupstack-{forum}"
        write(root / "corpus" / "corpus-00000-of-00001.parquet", CORPUS)
        write(root / "queries" / "queries-00000-of-00001.parquet", QUERIES)
        write(root / "default" / "test-00000-of-00001.parquet", [JUDGED[0] | {"score": 1.0}])
    found = opened("beir/CQADupStack", hub=hub)
    assert len(found) == 12 and {c.group for c in found} == {"cqadupstack"}
    assert found[0].name == "cqadupstack-android" and found[0].qrels == {"q1": {"d1": 1}}


def write_scifact(hub: Folders, **changes: Any) -> None:
    """BEIR's SciFact, with some files' rows changed."""
    rows: dict[str, Any] = {"corpus": CORPUS, "queries": QUERIES, "test": JUDGED} | changes
    for part, where in (
        ("corpus", "BeIR/scifact/corpus.jsonl"),
        ("queries", "BeIR/scifact/queries.jsonl"),
        ("test", "BeIR/scifact-qrels/test.tsv"),
    ):
        if rows[part] is not None:
            write(hub.root / where, rows[part])
        else:
            (hub.root / where).parent.mkdir(parents=True, exist_ok=True)


HEADER = "query-id\tcorpus-id\tscore\n"


def test_judgements_of_what_is_not_there_do_no_harm(
    hub: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    """NFCorpus judges a query that it does not have, others documents."""
    write_scifact(hub, test=f"{HEADER}q9\td1\t1\nq1\td1\t1\nq1\td9\t1\r\n\n")
    (found,) = opened("beir/scifact", hub=hub)
    assert found.qrels == {"q1": {"d1": 1, "d9": 1}} and found.queries == ASKED
    assert "judges the query 'q9'" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": None}, "BeIR/scifact on the hub has no corpus as Parquet or JSON Lines"),
        ({"queries": None}, "BeIR/scifact on the hub has no queries as Parquet"),
        ({"test": None}, "BeIR/scifact-qrels on the hub has no judgements of the split 'test'"),
        ({"test": HEADER}, "has no judgements of the split 'test'"),
        ({"test": ""}, r"scifact-qrels, test\.tsv: the columns found are .*query-id"),
        ({"test": "q1\td1\t1\n"}, r"test\.tsv: the columns found are q1, d1, 1; query-id"),
        ({"test": f"{HEADER}q1\td1\n"}, r"test\.tsv, line 2, is not a judgement"),
        ({"test": f"{HEADER}q1 d1 1\n"}, r"test\.tsv, line 2, is not a judgement"),
        ({"test": f"{HEADER}q1\td1\tyes\n"}, r"test\.tsv has the relevance 'yes'"),
        ({"test": f"{HEADER}q1\td1\t0.5\n"}, r"test\.tsv has the relevance '0.5'"),
        ({"test": f"{HEADER}q9\td1\t1\n"}, "has no judgements of the split 'test'"),
        ({"corpus": [{"id": "d1", "text": "x"}]}, "the columns found are id, text; _id and text"),
        ({"corpus": [{"_id": None, "text": "x"}]}, "corpus has a row without an id or a text"),
        ({"corpus": [{"_id": "d1", "text": None}]}, "corpus has a row without an id or a text"),
        ({"queries": "{"}, r"queries\.jsonl"),
    ],
)
def test_what_cannot_be_used_is_named(hub: Folders, changes: dict[str, Any], message: str) -> None:
    write_scifact(hub, **changes)
    with pytest.raises(UserError, match=message) as caught:
        opened("beir/scifact", hub=hub)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("score", [None, 0.5, "high", float("nan"), float("inf")])
def test_a_relevance_that_is_no_whole_number_is_named(hub: Folders, score: Any) -> None:
    write_scifact(hub, test=None)
    rows = [JUDGED[0] | {"score": score}]
    write(hub.root / "BeIR" / "scifact-qrels" / "test-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match=r"relevance .*, which is no whole number"):
        opened("beir/scifact", hub=hub)


def test_names_that_the_hub_does_not_have(hub: Folders) -> None:
    for name in ("beir/nothing", "beir/", "beir/cqadupstack", "nanobeir"):
        with pytest.raises(UserError, match="no data set"):
            opened(name, hub=hub)


def test_the_real_hub_out_of_reach_is_one_sentence() -> None:
    with pytest.raises(UserError, match="check the network") as caught:
        opened("beir/scifact")  # the tests run offline
    assert "\n" not in str(caught.value)


def test_ids_are_texts_whatever_the_files_hold(hub: Folders) -> None:
    root = hub.root / "BeIR" / "scifact"
    write(root / "corpus.parquet", [{"_id": 1, "title": None, "text": "x"}])
    write(root / "queries.parquet", [{"_id": 7, "text": "y"}])
    rows = [{"query-id": 7, "corpus-id": 1, "score": 1}]
    write(hub.root / "BeIR" / "scifact-qrels" / "test.parquet", rows)
    (found,) = opened("beir/scifact", hub=hub)
    assert (found.documents, found.queries, found.qrels) == (
        {"1": "x"},
        {"7": "y"},
        {"7": {"1": 1}},
    )
