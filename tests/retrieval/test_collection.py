import gzip

import pytest

from colbert_jax.errors import UserError
from colbert_jax.retrieval.collection import Collection, read_beir, read_documents

CORPUS = """\
{"_id": "d1", "title": "Apples", "text": "grow on trees"}
{"_id": "d2", "title": "", "text": "Pears do too."}

{"_id": "d3", "text": "No title, and a line separator: \u2028."}
"""
QUERIES = """\
{"_id": "q1", "text": "where do apples grow"}
{"_id": "q2", "text": "is not judged"}
"""
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "fruit"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(CORPUS, encoding="utf-8")
    (folder / "queries.jsonl").write_text(QUERIES, encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(QRELS, encoding="utf-8")
    return folder


def test_read_beir_joins_titles_and_keeps_judged_queries_only(folder):
    assert read_beir(folder) == Collection(
        name="fruit",
        documents={
            "d1": "Apples grow on trees",
            "d2": "Pears do too.",
            "d3": "No title, and a line separator: \u2028.",
        },
        queries={"q1": "where do apples grow"},
        qrels={"q1": {"d1": 2, "d3": 0}},
    )


def test_read_beir_reads_the_split_asked_for(folder):
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\r\nq2\td2\t1\r\n")
    assert read_beir(folder, split="dev").qrels == {"q2": {"d2": 1}}


@pytest.mark.parametrize("path", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_missing_and_empty_files_are_named(folder, path):
    (folder / path).write_text("\n")
    with pytest.raises(UserError, match=path):
        read_beir(folder)
    (folder / path).unlink()
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        read_beir(folder)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("corpus.jsonl", CORPUS + "{", "corpus.jsonl, line 5, is not valid JSON"),
        ("corpus.jsonl", CORPUS + "[1]", "corpus.jsonl, line 5, is not a JSON object"),
        ("corpus.jsonl", '{"text": "x"}', 'corpus.jsonl, line 1, has no id; give it an "_id"'),
        ("corpus.jsonl", '{"_id": 7, "text": "x"}', "corpus.jsonl, line 1, has no id"),
        ("corpus.jsonl", '{"_id": "7"}', "corpus.jsonl, line 1, has no text"),
        ("queries.jsonl", QUERIES + QUERIES, "queries.jsonl, line 3, has the .* 'q1'"),
        ("qrels/test.tsv", "q1\td1\t1\n", "test.tsv, line 1, is not a header"),
        ("qrels/test.tsv", QRELS + "q1 d1 1\n", "test.tsv, line 4, is not a judgement"),
        ("qrels/test.tsv", QRELS + "q1\td1\tyes\n", "test.tsv, line 4, is not a judgement"),
        ("qrels/test.tsv", QRELS + "q9\td1\t1\n", "line 4, judges the query 'q9'"),
        ("qrels/test.tsv", QRELS + "q1\td9\t1\n", "line 4, judges the document 'd9'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv has no judgements"),
    ],
)
def test_malformed_files_are_named_with_the_line(folder, path, text, message):
    (folder / path).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_beir(folder)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_the_users_error(folder):
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "1", "text": "\xe9"}')
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 1"):
        read_beir(folder)


def test_json_without_end_is_the_users_error(folder):
    (folder / "corpus.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 1, is not valid JSON"):
        read_beir(folder)


# --- documents alone ---


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz", "some.text"])
def test_documents_are_read_line_by_line(tmp_path, name):
    path = tmp_path / name
    data = (CORPUS + "{").encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    documents = read_documents(path)
    assert next(documents) == ("d1", "Apples grow on trees")
    assert next(documents) == ("d2", "Pears do too.")
    assert next(documents)[0] == "d3"
    with pytest.raises(UserError, match=f"{name}, line 5, is not valid JSON"):
        next(documents)


def test_damaged_gzip_is_the_users_error(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    for data in (b"no gzip", gzip.compress(CORPUS.encode())[:-20]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="truncated or damaged gzip"):
            list(read_documents(path))


def test_texts_of_every_kind_are_read(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"_id": " a ", "text": ""}\r\n'
        b'{"_id": "\\u65e5", "title": null, "text": "\\ud83d and \\n"}\n'
        b'{"_id": "c", "title": "T", "text": "", "url": 3}'
    )
    assert list(read_documents(path)) == [(" a ", ""), ("\u65e5", "\ud83d and \n"), ("c", "T ")]


def test_a_folder_or_nothing_is_no_file_of_documents(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match="cannot be read"):
            list(read_documents(path))
