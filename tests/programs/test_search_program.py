"""launch/search.py: what it prints, what it keeps, and what it says of what it cannot use."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_model

from colbert_jax.errors import UserError
from colbert_jax.programs import search as program
from colbert_jax.programs.retriever import ModelRequest, open_retriever
from colbert_jax.programs.search import SNIPPET, passage, search_corpus
from colbert_jax.retrieval.index import build_index
from colbert_jax.retrieval.search import make_search

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("quick_compilation")

DOCUMENTS = {
    "d1": "Return a copy of the list.",
    "d2": "Make a\tcopy  of\nthe file",
    "2": "Parse the arguments.",
    "10": "Parse the arguments.",
    "\u65e5\u672c": "nothing of it",
    "red\x1b[31m": "a \x1b[31mred\x07 list\x9b2J and a\u202eb",
    "long": "word " * 300 + "then a list of names " + "word " * 300,
    "none": "",
}


@pytest.fixture(scope="module")
def model(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that matches words that are the same, and no others."""
    folder = tmp_path_factory.mktemp("model") / "model"
    return save_model(
        folder,
        tokenizer_file,
        lookup=True,
        embedding_size=32,
        do_query_expansion=False,
        document_length=700,
    )


def write_corpus(path: Path, documents: dict[str, str] = DOCUMENTS) -> Path:
    text = "".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in documents.items()).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl")


def request_of(model: Path, **changes: Any) -> ModelRequest:
    return ModelRequest(str(model), batch_size=4, **changes)


def searched(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    corpus: Path,
    *queries: str,
    k: int | None = 3,
    interactive: bool = False,
    **rest: Any,
) -> str:
    search_corpus(request_of(model), str(corpus), queries, interactive, k, **rest)
    return capsys.readouterr().out


def hits_of(printed: str) -> list[tuple[int, float, str]]:
    """Rank, score and id of each passage that was printed."""
    found = re.findall(r"^ +(\d+)\. (-?\d+\.\d{3})  (.*)$", printed, re.MULTILINE)
    return [(int(rank), float(score), name) for rank, score, name in found]


# --- what is printed ---


def test_passages_are_ranked_as_the_search_ranks_them(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path
) -> None:
    queries = ("make a copy", "parse the arguments", "a list of names")
    retriever = open_retriever(request_of(model))
    search = make_search(retriever.encoder, retriever.params)
    found = search({q: q for q in queries}, DOCUMENTS, 5)
    printed = searched(capsys, model, corpus, *queries, k=5, index_dtype="float32")
    parts = re.split(r"^(?=\S)", printed.strip(), flags=re.MULTILINE)
    assert [p.split("   (")[0] for p in parts if p] == list(queries)
    for part, query in zip(filter(None, parts), queries, strict=True):
        assert "(8 documents, " in part.splitlines()[0]
        hits = hits_of(part)
        assert [rank for rank, _, _ in hits] == [1, 2, 3, 4, 5]
        names = [name.replace("\\x1b", "\x1b") for _, _, name in hits]
        assert names == list(found[query])
        for (_, score, _), expected in zip(hits, found[query].values(), strict=True):
            assert abs(score - expected) < 2e-3
    assert names[0] == "long"


def test_matched_words_are_marked(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path, monkeypatch: Any
) -> None:
    # At the start of a text "a" is another token than within it.
    printed = searched(capsys, model, corpus, "a copy of the list", k=1)
    assert hits_of(printed)[0][2] == "d1"
    assert printed.splitlines()[-1].strip() == "Return a [[copy]] [[of]] [[the]] [[list]]."
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    coloured = searched(capsys, model, corpus, "a copy of the list", k=1)
    assert "[[" not in coloured and "\x1b[1;33mcopy\x1b[0m" in coloured
    assert re.sub(r"\x1b\[(1;33|0)m", "", coloured).splitlines()[-1].strip() == DOCUMENTS["d1"]


def test_nothing_of_a_document_is_obeyed_by_a_terminal(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path
) -> None:
    printed = searched(capsys, model, corpus, "copy a list \x07", k=8)
    assert all(mark.isprintable() or mark == "\n" for mark in printed)
    assert "red\\x1b[31m" in printed and "\\x9b2J" in printed and "\\u202e" in printed
    assert "copy a list \\x07 " in printed
    assert "Make [[a]] [[copy]] of the file" in printed  # tabs and line ends are white space


def test_all_are_shown_of_fewer_than_one_shows(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "two.jsonl", {"a": "a list", "b": "a copy"})
    for index in (None, str(tmp_path / "index")):
        printed = searched(capsys, model, corpus, "of the list", k=None, index=index)
        assert [name for _, _, name in hits_of(printed)] == ["a", "b"]


def test_more_than_there_are_is_refused_before_and_after_the_index_is_there(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "two.jsonl", {"a": "a list", "b": "a copy"})
    index = str(tmp_path / "index")
    refused = r"--k=3 is more than the 2 documents of --corpus=.*two\.jsonl: ask for fewer\."
    with pytest.raises(UserError, match=refused):  # before the model is looked for
        search_corpus(ModelRequest("no/model"), str(corpus), ["list"], False, 3, index)
    assert not Path(index).exists()
    searched(capsys, model, corpus, "list", k=2, index=index)
    with pytest.raises(UserError, match=refused):
        search_corpus(ModelRequest(str(model)), str(corpus), ["list"], False, 3, index)


def test_equal_documents_stand_in_the_order_of_their_ids(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path
) -> None:
    printed = searched(capsys, model, corpus, "parse the arguments", k=2)
    assert [name for _, _, name in hits_of(printed)] == ["10", "2"]


def test_a_long_passage_is_cut_where_it_matches(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path
) -> None:
    printed = searched(capsys, model, corpus, "then list of names", k=1)
    assert hits_of(printed)[0][2] == "long"
    shown = " ".join(printed.split("long\n")[1].split())
    assert "[[list]] [[of]] [[names]]" in shown
    assert shown.startswith("…") and shown.endswith("…") and len(shown) < SNIPPET + 60
    assert max(map(len, printed.splitlines())) <= 96


# --- queries from the user ---


@pytest.mark.parametrize("text", ["the list\n  a copy \n\nnever\n", "the list\na copy"])
def test_queries_are_read_until_an_empty_line_or_the_end(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    printed = searched(capsys, model, corpus, "of the file", k=1, interactive=True)
    asked = re.findall(r"^(\S.*)   \(8 documents", printed, re.MULTILINE)
    assert asked == ["of the file", "the list", "a copy"]
    assert "query (empty to leave)" not in printed  # nobody to ask


def test_the_corpus_is_encoded_once_for_all_queries(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    monkeypatch.setattr(program, "build_index", lambda *a: built.append(a) or build_index(*a))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    searched(capsys, model, corpus, "three", "four", interactive=True)
    assert len(built) == 1


def test_bytes_that_are_no_text_are_searched_for_as_they_are(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9 list\nthe list\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    # A shell hands such bytes on as halves of surrogate pairs.
    printed = searched(capsys, model, corpus, "caf\udce9 list", k=1, interactive=True)
    assert len(hits_of(printed)) == 3


# --- the index ---


def test_an_index_is_built_once_and_gives_the_same(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = str(tmp_path / "some" / "index")
    timed = re.compile(r", \d+\.\d\d s\)")
    plain = searched(capsys, model, corpus, "make a copy", index_dtype="int8")
    kept = searched(capsys, model, corpus, "make a copy", index=index, index_dtype="int8")
    assert timed.sub("", kept) == timed.sub("", plain)
    files = {p: p.stat().st_mtime_ns for p in Path(index).rglob("*")}
    monkeypatch.setattr(
        "colbert_jax.retrieval.index._encode_shard", lambda *a: pytest.fail("encoded again")
    )
    again = searched(capsys, model, corpus, "make a copy", index=index, index_dtype="int8")
    assert timed.sub("", again) == timed.sub("", plain)
    assert {p: p.stat().st_mtime_ns for p in Path(index).rglob("*")} == files


def test_an_index_of_something_else_is_refused(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path, tmp_path: Path
) -> None:
    index = str(tmp_path / "index")
    searched(capsys, model, corpus, "a list", index=index)
    with pytest.raises(UserError, match="is an index of another dtype"):
        searched(capsys, model, corpus, "a list", index=index, index_dtype="int8")
    with pytest.raises(UserError, match="is an index of another document_length"):
        request = request_of(model, document_length=50)
        search_corpus(request, str(corpus), ["a list"], False, 1, index)
    other = write_corpus(tmp_path / "other.jsonl", DOCUMENTS | {"new": "x"})
    with pytest.raises(UserError, match="is an index of another corpus"):
        searched(capsys, model, other, "a list", index=index)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something that is no index"):
        searched(capsys, model, corpus, "a list", index=str(tmp_path / "foreign"))
    assert (tmp_path / "foreign" / "notes.txt").read_text() == "precious"


def test_gzipped_corpora_are_searched_too(
    capsys: pytest.CaptureFixture[str], model: Path, corpus: Path, tmp_path: Path
) -> None:
    packed = write_corpus(tmp_path / "corpus.jsonl.gz")
    assert hits_of(searched(capsys, model, packed, "a list")) == hits_of(
        searched(capsys, model, corpus, "a list")
    )


# --- what cannot be used, said before a model is read ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"text": "x"}\n', "line 1, has no id"),
        ('{"_id": 3, "text": "x"}\n', "line 1, has no id"),
        ('{"_id": "a"}\n', "line 1, has no text"),
        ('{"_id": "a", "text": "x"}\n' * 2, "line 2, has the"),
        ('{"_id": "a", "text": "x"}\n{"_id"', "line 2, is not valid JSON"),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_a_corpus_that_cannot_be_used(tmp_path: Path, text: str, message: str, kept: bool) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(text)
    index = str(tmp_path / "index") if kept else None
    with pytest.raises(UserError, match=message):
        search_corpus(ModelRequest("no/model"), str(corpus), ["x"], False, 1, index)
    assert not (tmp_path / "index").exists()


def test_arguments_that_cannot_be_used(corpus: Path, tmp_path: Path) -> None:
    for queries in ([], [""], ["x", "  "]):
        with pytest.raises(UserError, match="--query is empty"):
            search_corpus(ModelRequest("no/model"), str(corpus), queries, False, 1)
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="there is no such file"):
            search_corpus(ModelRequest("no/model"), str(path), ["x"], False, 1)
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="truncated or damaged gzip"):
        search_corpus(ModelRequest("no/model"), str(damaged), ["x"], False, 1)
    with pytest.raises(UserError, match="neither a folder nor a model"):
        search_corpus(ModelRequest("no/model"), str(corpus), ["x"], False, 1)


# --- a passage ---


def test_passages_by_example() -> None:
    assert passage("", [], False) == ""
    assert passage("Heat flow.", [(0, 4)], False) == "     [[Heat]] flow."
    assert passage("Heat  \n\tflow.", [(0, 13)], False) == "     [[Heat flow.]]"
    text = "x " * 1000
    assert passage(text, [], False).endswith("…") and not passage(text, [], False).startswith("…")
    for spans in ([(1000, 1001)], [(0, 1), (1000, 1001), (1004, 1005)], [(1998, 1999)]):
        shown = passage(text, spans, False)
        assert "[[x]]" in shown and "… " in shown
        assert sum(mark == "[" for mark in shown) == 2 * (2 if len(spans) == 3 else 1)
    assert passage(text, [(1998, 1999)], False).endswith("[[x]]")


# --- the program ---


def run(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled"),
        "PYTHONIOENCODING": "utf-8",
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "search.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
        **options,
    )


def test_the_program_answers(model: Path, corpus: Path) -> None:
    ran = run(
        f"--model={model}",
        "--corpus=corpus.jsonl",
        "--query=a copy of the list",
        "--query=parse the arguments",
        "--interactive",
        "--index=index",
        "--k=2",
        "--batch_size=4",
        cwd=corpus.parent,
        input="of the file\n",
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr and "8 documents, " in ran.stderr
    names = [name for _, _, name in hits_of(ran.stdout)]
    assert len(names) == 6 and names[0] == "d1" and names[2:4] == ["10", "2"]
    assert "[[copy]]" in ran.stdout and "\x1b" not in ran.stdout
    assert (corpus.parent / "index" / "finished.json").is_file()


def test_the_program_ends_with_one_sentence(corpus: Path) -> None:
    ran = run("--model=no/model", "--corpus=corpus.jsonl", "--query=x", cwd=corpus.parent)
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: 'no/model' is neither a folder nor a model")
