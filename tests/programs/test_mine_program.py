"""launch/mine.py: which negatives it writes, that they train as they are, and what it refuses."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tiny_model import lookup_table, make_model, save_model, table_scores
from tiny_run import printed_overrides, text_pairs, tiny_config, write_lines

from colbert_jax import huggingface
from colbert_jax.data.rows import read_rows
from colbert_jax.data.write import SUFFIXES, open_writer
from colbert_jax.errors import UserError
from colbert_jax.export import read_run
from colbert_jax.metric_log import read_metrics
from colbert_jax.programs import mine as program
from colbert_jax.programs.mine import Mining, margin_value, mine
from colbert_jax.programs.retriever import ModelRequest
from colbert_jax.retrieval import index
from colbert_jax.run import run
from colbert_jax.tokenization import ColbertTokenizer

ROOT = Path(__file__).parents[2]
SETTINGS = {"lookup": True, "embedding_size": 32, "do_query_expansion": False}
LONG = "list " + "word " * 100_000

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Data(NamedTuple):
    """Pairs and a corpus, in files and as they are to be understood."""

    pairs: Path
    corpus: Path
    answers: dict[str, list[str]]  # query -> its documents
    documents: list[str]  # all, each once, in order


@pytest.fixture(scope="module")
def model(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores a table of token embeddings gives, in float64."""
    return save_model(tmp_path_factory.mktemp("model") / "model", tokenizer_file, **SETTINGS)


@pytest.fixture(scope="module")
def data(real_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Queries with one answer and with two, answers of two queries, repeated and odd texts."""
    folder = tmp_path_factory.mktemp("data")
    rows = text_pairs(real_texts, 40)
    asked, further = rows[:18], [row["document"] for row in rows[18:]]
    asked += [
        {"query": rows[0]["query"], "document": rows[5]["document"]},  # a second answer
        {"query": "of the list", "document": rows[1]["document"]},  # of another query too
        rows[2],  # again
        {"query": "a long list", "document": LONG},
    ]
    lines = [row | {"negative": ["never searched"]} for row in asked]
    pairs = write_lines(folder / "pairs.jsonl", lines)
    texts = [*further, "", " \n", ".", rows[3]["document"], further[0]]
    corpus = [{"_id": str(i), "text": text} for i, text in enumerate(texts)]
    corpus.append({"_id": "titled", "title": "Of the", "text": "long list"})
    write_lines(folder / "corpus.jsonl", corpus)
    answers: dict[str, list[str]] = {}
    for row in asked:
        own = answers.setdefault(row["query"], [])
        own += [row["document"]] if row["document"] not in own else []
    documents = dict.fromkeys([row["document"] for row in asked] + further)
    return Data(pairs, folder / "corpus.jsonl", answers, [*documents, "Of the long list"])


def request_of(model: Path | str) -> ModelRequest:
    return ModelRequest(str(model), batch_size=4)


def exact(scores_of: dict[str, float], own: list[str], document: str, mining: Mining) -> list[str]:
    """The negatives of a pair, by their definition."""
    others = sorted((t for t in scores_of if t not in own), key=lambda t: -scores_of[t])
    positive = scores_of[document]
    limit = math.inf if mining.margin == math.inf else mining.margin * positive
    assert positive > 0 and all(abs(scores_of[t] - limit) > 1e-5 for t in others)
    near = others[mining.skip : mining.depth]
    return [t for t in near if scores_of[t] <= limit][: mining.negatives]


# --- which negatives ---


@pytest.mark.parametrize(
    "mining",
    [
        Mining(depth=12, negatives=5, margin=0.75, skip=3, dtype="float32"),
        Mining(depth=41, negatives=5, margin=math.inf, skip=1, dtype="float32"),
    ],
)
def test_negatives_are_those_of_a_ranking_in_float64(
    model: Path,
    tokenizer_file: Path,
    data: Data,
    mining: Mining,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(program, "_QUERIES", 7)  # several passes over several shards
    monkeypatch.setattr(index, "CHUNK", 16)
    output = tmp_path / "mined.jsonl"
    args = ([str(data.pairs)], str(data.corpus), str(output), mining)
    counts = mine(request_of(model), *args)

    described, params = make_model(tokenizer_file, **SETTINGS)
    tokenizer: ColbertTokenizer = described.tokenizer
    scores = table_scores(lookup_table(params), tokenizer, list(data.answers), data.documents)
    expected, left_out = [], 0
    for (query, own), row in zip(data.answers.items(), scores, strict=True):
        scores_of = dict(zip(data.documents, row.tolist(), strict=True))
        for document in own:
            negatives = exact(scores_of, own, document, mining)
            if len(negatives) < mining.negatives:
                left_out += 1
            else:
                expected.append((query, document, [scores_of[text] for text in negatives]))
    assert counts == {"written": len(expected)} | ({"too_few": left_out} if left_out else {})
    assert len(expected) > 5

    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    for row, (query, document, best) in zip(written, expected, strict=True):
        assert list(row) == ["query", "document", "negative"]
        assert (row["query"], row["document"]) == (query, document)
        of_query = scores[list(data.answers).index(query)]
        found = [of_query[data.documents.index(text)] for text in row["negative"]]
        np.testing.assert_allclose(found, best, atol=1e-5)  # equal scores may change places
        assert len(set(row["negative"])) == mining.negatives
        assert not set(row["negative"]) & set(data.answers[query])


def test_the_words_of_the_documents_decide(model: Path, tmp_path: Path) -> None:
    """By eye: the answer, its unmarked twin, two that are hard and one that is not."""
    texts = [
        "make a copy of the list",
        "  make a copy of the list now",
        "copy of the list",
        "the list",
        "other things entirely",
    ]
    pairs = [
        {"query": "make a copy of the list", "document": texts[0]},
        *({"query": f"number {i}", "document": text} for i, text in enumerate(texts[1:])),
    ]
    file = write_lines(tmp_path / "pairs.jsonl", pairs)
    found = []
    for name, margin in (("near.jsonl", 0.95), ("all.jsonl", margin_value("none"))):
        mining = Mining(depth=5, negatives=2, margin=margin, dtype="float32")
        mine(request_of(model), [str(file)], None, str(tmp_path / name), mining)
        found.append(json.loads((tmp_path / name).read_text().splitlines()[0])["negative"])
    assert found == [texts[2:4], texts[1:3]]


# --- output that trains as it is ---


def test_the_supervised_phase_trains_on_the_output(
    model: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each format; a step takes its rows from one file, all of them, in whatever order."""
    few = tmp_path / "few.jsonl"
    chosen = data.pairs.read_text().splitlines(keepends=True)
    few.write_text("".join([*chosen[:7], chosen[-1]]))
    outputs, found = [str(tmp_path / f"mined{suffix}") for suffix in SUFFIXES], []
    mining = Mining(depth=20, negatives=3, margin=math.inf)
    for output in outputs:
        counts = mine(request_of(model), [str(few)], str(data.corpus), output, mining)
        assert counts == {"written": 8}
        found.append([row for _, row in read_rows(output) if isinstance(row, dict)])
        given = printed_overrides(capsys.readouterr().out)
        assert given == {"input.files": (output,), "input.max_documents": 4}
    rows = found[0]
    assert found == [rows] * 3 and any(LONG in row["documents"] for row in rows)
    assert len(os.listdir(tmp_path)) == 4

    config = tiny_config("supervised", model, outputs, tmp_path / "cache", total_steps=3)
    config.input.max_documents = given["input.max_documents"]
    run(config, tmp_path / "run")
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]

    trained = read_run(tmp_path / "run")[0]
    params = huggingface.read_weights(str(model), huggingface.read_model(str(model)), 0)
    documents = [text for row in rows for text in row["documents"]]
    queries = [row["query"] for row in rows]
    scores = table_scores(lookup_table(params), trained.tokenizer, queries, documents)
    logits = scores / config.loss.temperature
    own = logits[np.arange(8), 4 * np.arange(8)]
    expected = (np.log(np.exp(logits).sum(axis=1)) - own).mean()
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


def test_a_document_that_training_would_not_take_is_no_negative(
    model: Path, tmp_path: Path
) -> None:
    """A text of one character would cost the whole row."""
    pairs = [{"query": "x y", "document": "x y z"}, {"query": "a list", "document": "a list of x"}]
    file = write_lines(tmp_path / "pairs.jsonl", [*pairs, {"query": "one", "document": "x"}])
    corpus = write_lines(
        tmp_path / "corpus.jsonl", [{"_id": str(i), "text": t} for i, t in enumerate("xyz")]
    )
    mining = Mining(depth=3, negatives=1, margin=math.inf)
    mine(request_of(model), [str(file)], str(corpus), str(tmp_path / "mined.jsonl"), mining)
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [row["negative"] for row in rows[:2]] == [["a list of x"], ["x y z"]]
    assert len(rows) == 3


# --- what cannot be used ---


GOOD = '{"query": "a list", "document": "a list of names"}\n'


@pytest.mark.parametrize(
    "files, corpus, more, message",
    [
        ({}, None, {}, r"--pairs= holds no row to mine for: name other files\."),
        ({"pairs.jsonl": ""}, None, {}, r"pairs\.jsonl holds no row to mine for: name other"),
        ({"none.jsonl": None}, None, {}, r"none\.jsonl does not exist: check the path"),
        ({"pairs.csv": GOOD}, None, {}, r"pairs\.csv is not a kind of file that can be read"),
        ({"pairs.jsonl": '{"a": 1}\n'}, None, {}, r"row 1: the columns found are a; rename them"),
        ({"pairs.jsonl": GOOD + GOOD[:20]}, None, {}, r"pairs\.jsonl, row 2: it is not valid JSON"),
        ({"pairs.jsonl": '{"query": " ", "document": "x"}\n'}, None, {}, "row 1: .* blank text"),
        (
            {"pairs.jsonl": '{"query": "x", "documents": ["a", "b"], "scores": [1, 2]}\n'},
            None,
            {},
            r"row 1: it has candidates with scores, not a document .*: give pairs\.",
        ),
        ({"pairs.jsonl.gz": "x"}, None, {}, "truncated or damaged gzip file"),
        ({"pairs.parquet": "x"}, None, {}, "not a sound Parquet file"),
        ({"pairs.jsonl": GOOD}, "", {}, r"corpus\.jsonl is empty"),
        ({"pairs.jsonl": GOOD}, '{"text": "x"}\n', {}, r"corpus\.jsonl, line 1, has no id"),
        ({"pairs.jsonl": GOOD}, '{"_id": "d", "text": "\\ud800x"}\n', {}, "'d' holds half of a"),
        (
            {"pairs.jsonl": GOOD},
            '{"_id": "1", "text": ""}\n',
            {"depth": 2},
            r"--depth=2 is more than the 1 different documents there are: give a smaller",
        ),
        (
            {"pairs.jsonl": GOOD},
            None,
            {"depth": 5, "skip": 3, "negatives": 3},
            r"--depth=5 .* cannot give --negatives=3 after --skip=3: give a --depth of at least 6",
        ),
        ({"pairs.jsonl": GOOD}, None, {"output": "mined.json"}, "must end in one of .jsonl"),
        ({"pairs.jsonl": GOOD}, None, {"output": "pairs.jsonl"}, "exists: remove it, or choose"),
        ({"pairs.jsonl": GOOD}, None, {"output": "no/mined.jsonl"}, "there is no folder"),
        ({"pairs.jsonl": GOOD}, None, {}, "'no/model' is neither a folder nor a model"),
    ],
)
def test_what_cannot_be_used_is_said_before_any_work(
    files: dict[str, str | None],
    corpus: str | None,
    more: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    texts = {"corpus.jsonl": corpus} | files
    for name, text in texts.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    output = str(tmp_path / more.pop("output", "mined.jsonl"))
    place = None if corpus is None else str(tmp_path / "corpus.jsonl")
    mining = Mining(**{"depth": 1, "negatives": 1} | more)
    with pytest.raises(UserError, match=message) as caught:
        mine(request_of("no/model"), [str(tmp_path / n) for n in files], place, output, mining)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_longer_than_training_reads_are_foreseen(model: Path, tmp_path: Path) -> None:
    huge = [{"query": f"q {i}", "document": f"{i} " + "x" * (3 << 20)} for i in range(3)]
    lines = write_lines(tmp_path / "pairs.jsonl", huge)
    mining = Mining(depth=3, negatives=2, margin=math.inf)
    output = tmp_path / "mined.jsonl"
    with pytest.raises(UserError, match=r"longer than the 8 MiB .*; write \.parquet instead"):
        mine(request_of("no/model"), [str(lines)], None, str(output), mining)
    row = {"query": "q 0", "document": "é" * (4 << 20), "negative": []}
    message = r"row of the query 'q 0' is longer than the 8 MiB .*; write .parquet"
    with pytest.raises(UserError, match=message), open_writer(output) as write:
        write(row)
    assert os.listdir(tmp_path) == ["pairs.jsonl"]
    with open_writer(tmp_path / "mined.parquet") as write:
        write(row)
    assert [found for _, found in read_rows(tmp_path / "mined.parquet")] == [
        {"query": row["query"], "documents": [row["document"]], "scores": None}
    ]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "much", ""])
def test_a_margin_is_a_fraction_or_none(text: str) -> None:
    with pytest.raises(UserError, match=rf"--margin={text} is no fraction: give one such as 0.95"):
        margin_value(text)
    assert (margin_value("0.9"), margin_value("None")) == (0.9, math.inf)


def test_no_negatives_at_all_is_said_and_leaves_nothing(
    model: Path, data: Data, tmp_path: Path
) -> None:
    output = str(tmp_path / "mined.parquet")
    mining = Mining(depth=3, negatives=3, margin=0.01)
    message = r"No query has 3 negatives below --margin=0\.01 .*: give a larger --depth or"
    with pytest.raises(UserError, match=message):
        mine(request_of(model), [str(data.pairs)], None, output, mining)
    assert os.listdir(tmp_path) == []


def test_a_model_that_diverged_is_named(data: Data, tokenizer_file: Path, tmp_path: Path) -> None:
    described, params = make_model(tokenizer_file, **SETTINGS)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    huggingface.save_model(tmp_path / "broken", described, broken, "")
    for margin in (0.95, math.inf):
        mining = Mining(depth=3, negatives=1, margin=margin)
        output = str(tmp_path / "mined.jsonl")
        with pytest.raises(UserError, match=r"broken gives .* a score that is no number: use"):
            mine(request_of(tmp_path / "broken"), [str(data.pairs)], None, output, mining)
    assert os.listdir(tmp_path) == ["broken"]


# --- the program ---


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled"),
    }
    command = [sys.executable, str(ROOT / "launch" / "mine.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def test_the_program_mines(model: Path, data: Data, tmp_path: Path) -> None:
    flags = ["--depth=20", "--negatives=4", "--margin=0.8", "--skip=1", "--index_dtype=int8"]
    files = [f"--pairs={data.pairs}", f"--corpus={data.corpus}", "--output=mined.jsonl.gz"]
    ran = launch(f"--model={model}", *files, *flags, "--batch_size=4", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    rows = [row for _, row in read_rows(tmp_path / "mined.jsonl.gz")]
    assert f"mined.jsonl.gz: {len(rows)} rows with 4 negatives each" in ran.stdout
    assert all(isinstance(row, dict) and len(row["documents"]) == 5 for row in rows)


def test_the_program_ends_with_one_sentence(model: Path, data: Data, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "bert")
    fields = json.loads((model / "config.json").read_text()) | {"model_type": "bert"}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(fields))
    files = [f"--pairs={data.pairs}", "--output=mined.jsonl", "--depth=10"]
    ran = launch("--model=bert", *files, cwd=tmp_path)
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: bert") and "config.json" in line
    assert not list(tmp_path.glob("*mined*"))
