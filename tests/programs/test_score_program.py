"""launch/score.py: a teacher's scores and imported ones, that they train, and what it refuses."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_model import lookup_table, make_model, save_model, table_scores
from tiny_run import printed_overrides, text_pairs, tiny_config, write_lines

from colbert_jax import huggingface
from colbert_jax.data.rows import read_rows
from colbert_jax.data.write import SUFFIXES
from colbert_jax.errors import UserError
from colbert_jax.export import read_run
from colbert_jax.metric_log import read_metrics
from colbert_jax.programs import score as program
from colbert_jax.programs.retriever import ModelRequest
from colbert_jax.programs.score import import_scores, score_with_teacher
from colbert_jax.run import run

ROOT = Path(__file__).parents[2]
SETTINGS = {"lookup": True, "embedding_size": 32, "do_query_expansion": False}
LONG = "list " + "word " * 100_000

pytestmark = pytest.mark.usefixtures("quick_compilation")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def teacher(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores a table of token embeddings gives, in float64."""
    return save_model(tmp_path_factory.mktemp("model") / "model", tokenizer_file, **SETTINGS)


@pytest.fixture(scope="module")
def rows(real_texts: list[str]) -> Rows:
    """8 queries with 5 candidates, one of them of 100,000 words."""
    pairs = text_pairs(real_texts, 20)
    pairs[3] = {"query": "a long list", "document": LONG}
    texts = [row["document"] for row in pairs]
    return [
        {"query": row["query"], "documents": [texts[i], *texts[i + 3 : i + 7]]}
        for i, row in enumerate(pairs[:8])
    ]


def request_of(teacher: Path | str) -> ModelRequest:
    return ModelRequest(str(teacher), batch_size=4)


def write_table(path: Path, records: Rows) -> str:
    """Records in the format that a name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return str(path)
    write_lines(path, records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return str(path)


def rows_of(path: Path | str) -> Rows:
    return [dict(row) for _, row in read_rows(path) if not isinstance(row, Exception)]


# --- a teacher's scores ---


def in_layouts(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row with its candidates as each of the layouts has them."""
    query, (first, *others) = row["query"], row["documents"]
    columns = {f"negative_{i}": text for i, text in enumerate(others)}
    return {
        "documents": row,
        "scored": row | {"scores": [0.0] * 5},
        "mined": {"query": query, "document": first, "negative": others},
        "columns": {"query": query, "document": first} | columns,
        "lists": {"query": query, "pos": [first, others[0]], "neg": others[1:]},
    }


def test_a_teachers_scores_are_maxsim_in_float64(
    teacher: Path, tokenizer_file: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of candidates in every layout and format."""
    monkeypatch.setattr(program, "_ROWS", 13)  # rows of several batches
    tables = {name: [in_layouts(row)[name] for row in rows] for name in in_layouts(rows[0])}
    files = [
        write_table(tmp_path / f"{name}{suffix}", table)
        for name, table in tables.items()
        for suffix in SUFFIXES
    ]
    output = tmp_path / "output.jsonl"
    assert score_with_teacher(request_of(teacher), files, str(output)) == {"written": 8 * 15}
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [{"query": r["query"], "documents": r["documents"]} for r in written] == rows * 15
    described, params = make_model(tokenizer_file, **SETTINGS)
    for i, row in enumerate(rows):
        args = (described.tokenizer, [row["query"]], row["documents"])
        expected = table_scores(lookup_table(params), *args)[0]
        assert np.ptp(expected) > 0.1
        for same in written[i::8]:
            np.testing.assert_allclose(same["scores"], expected, atol=1e-5)


def test_candidates_are_the_first_that_differ(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates = [["a b", "a b", "b c", "c d", "d e"], ["a b", "c d"], ["a b", "a b"], ["a b"]]
    records = [{"query": "a", "documents": texts} for texts in candidates]
    file = write_table(tmp_path / "rows.jsonl", records)
    found = []
    for i, keep in enumerate((0, 2, 3)):
        output = str(tmp_path / f"{i}.jsonl")
        counts = score_with_teacher(request_of(teacher), [file], output, keep)
        documents = [row["documents"] for row in rows_of(output)]
        found.append((counts["written"], counts["too_few"], documents))
        assert f"{counts['too_few']} left out, which had fewer than" in capsys.readouterr().out
    assert found == [
        (2, 2, [["a b", "b c", "c d", "d e"], ["a b", "c d"]]),
        (2, 2, [["a b", "b c"], ["a b", "c d"]]),
        (1, 3, [["a b", "b c", "c d"]]),
    ]


# --- imported scores ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_scores_with_texts_are_imported(suffix: str, tmp_path: Path) -> None:
    plain = [{"query": "q", "query_id": 7, "documents": ["a", "b", "a"], "scores": [0.5, 2, 1]}]
    lists = {"query": "r", "pos": ["c"], "neg": ["d", "e"], "pos_scores": [-1.0]}
    files = [
        write_table(tmp_path / f"plain{suffix}", plain),
        write_table(tmp_path / f"lists{suffix}", [lists | {"neg_scores": [-2.5, -0.5]}]),
    ]
    outputs = [str(tmp_path / f"{i}{suffix}") for i in range(2)]
    assert import_scores(files, outputs[0]) == {"written": 2}
    assert rows_of(outputs[0]) == [  # of a text that comes twice the better score
        {"query": "q", "documents": ["a", "b"], "scores": [1.0, 2.0]},
        {"query": "r", "documents": ["c", "d", "e"], "scores": [-1.0, -2.5, -0.5]},
    ]
    assert import_scores(files, outputs[1], candidates=2) == {"written": 2}
    assert rows_of(outputs[1]) == [
        {"query": "q", "documents": ["a", "b"], "scores": [1.0, 2.0]},
        {"query": "r", "documents": ["e", "c"], "scores": [-0.5, -1.0]},
    ]


TEXTS = {
    "queries.jsonl": [{"_id": "1", "text": "one"}, {"_id": "2", "text": "two"}],
    "corpus.jsonl": [
        {"_id": "10", "title": "Ten", "text": "of it"},
        {"_id": "11", "text": "eleven"},
        {"_id": "12", "text": "twelve"},
        {"_id": "twin", "text": "twelve"},
        {"_id": "blank", "text": " "},
    ],
}


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    """The files of queries and of documents that ids are of."""
    queries, documents = (str(write_lines(tmp_path / name, TEXTS[name])) for name in TEXTS)
    return queries, documents


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_scores_with_ids_are_imported(texts: tuple[str, str], suffix: str, tmp_path: Path) -> None:
    whole = [
        {"query_id": 2, "document_ids": ["12", "10", "twin"], "scores": [1, 0.25, 3]},
        {"query_id": 1, "document_ids": ["11", "10"], "scores": [0, 1]},
    ]
    judged = [(1, 10, 1.0), (2, 12, -4.0), (1, 11, 0.5), (2, 11, 0.0), (1, 10, 0.75)]
    names = [("query_id", "document_id", "score"), ("query-id", "corpus-id", "score")]
    single: list[Rows] = [[dict(zip(n, row, strict=True)) for row in judged] for n in names]
    expected = {
        "whole": [
            ("two", ["twelve", "Ten of it"], [3, 0.25]),
            ("one", ["eleven", "Ten of it"], [0, 1]),
        ],
        "single": [
            ("one", ["Ten of it", "eleven"], [1, 0.5]),
            ("two", ["twelve", "eleven"], [-4, 0]),
        ],
    }
    for i, (kind, records) in enumerate([("whole", whole), *(("single", x) for x in single)]):
        file = write_table(tmp_path / f"scores-{i}{suffix}", records)
        output = str(tmp_path / f"{i}{suffix}")
        assert import_scores([file], output, *texts) == {"written": 2}
        found = [(r["query"], r["documents"], r["scores"]) for r in rows_of(output)]
        assert found == expected[kind]


# --- output that trains as it is ---


@pytest.mark.parametrize("imported", [False, True])
def test_the_distillation_phase_trains_on_the_output(
    teacher: Path,
    rows: Rows,
    imported: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In each format; a step takes its rows from one file, all of them, in whatever order."""
    outputs, found = [str(tmp_path / f"scored{suffix}") for suffix in SUFFIXES], []
    scored = [row | {"scores": [1.0, 0.5, 0.25, 0.125, 0.0]} for row in rows]
    file = write_table(tmp_path / "rows.jsonl", scored)
    for output in outputs:
        if imported:
            import_scores([file], output)
        else:
            score_with_teacher(request_of(teacher), [file], output)
        found.append(rows_of(output))
        given = printed_overrides(capsys.readouterr().out)
        assert given.pop("input.files") == (output,)
    # MaxSim is no number between 0 and 1, which the student's would be brought to.
    scale = {} if imported else {"loss.normalize_scores": False}
    assert given == {"input.max_documents": 5} | scale
    assert found == [found[0]] * 3 and any(LONG in row["documents"] for row in found[0])
    assert (found[0] == scored) == imported

    config = tiny_config("distill", teacher, outputs, tmp_path / "cache", total_steps=3)
    config.update_from_flattened_dict(given)
    run(config, tmp_path / "run")
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]

    trained = read_run(tmp_path / "run")[0]
    params = huggingface.read_weights(str(teacher), huggingface.read_model(str(teacher)), 0)
    each = []
    for row in found[0]:
        args = (trained.tokenizer, [row["query"]], row["documents"])
        student = table_scores(lookup_table(params), *args)[0]
        if imported:
            student = (student - student.min()) / np.ptp(student)
        logs = [x - np.log(np.exp(x).sum()) for x in (student, np.array(row["scores"]))]
        each.append((np.exp(logs[1]) * (logs[1] - logs[0])).sum())
    assert losses[0] == pytest.approx(np.mean(each), rel=1e-5)
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


# --- what cannot be used ---


ROW = '{"query": "q", "documents": ["a b", "c d"]}\n'
SCORED = '{"query": "q", "documents": ["a", "b"], "scores": [1, 2]}\n'
IDS = '{"query_id": "1", "document_ids": ["10", "11"], "scores": [1, 2]}\n'


def refused(folder: Path, message: str, attempt: Any) -> None:
    """Checks that an attempt ends with a sentence and leaves the folder as it was."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "name, text, more, message",
    [
        ("rows.jsonl", "", {}, r"--rows=.*rows\.jsonl holds no row to score: name other files\."),
        ("rows.jsonl", None, {}, r"rows\.jsonl does not exist: check the path"),
        ("rows.tsv", ROW, {}, "not a kind of file that can be read: give one of"),
        ("rows.parquet", "x", {}, "not a sound Parquet file"),
        ("rows.jsonl.gz", "x", {}, "truncated or damaged gzip"),
        ("rows.jsonl", '{"a": 1}\n', {}, "row 1: the columns found are a; rename them to query"),
        ("rows.jsonl", ROW * 400 + ROW[:9], {}, r"row 401: it is not valid JSON"),
        ("rows.jsonl", ROW + '{"query": "q"}\n', {}, "row 2: it has no documents"),
        (
            "rows.jsonl",
            ROW.replace("a b", " "),
            {},
            "row 1: .* must hold texts, none of them blank",
        ),
        (
            "rows.jsonl",
            '{"query": "q", "documents": "a"}\n',
            {},
            "documents must be a list of text",
        ),
        ("rows.jsonl", '{"query": "q", "pos": [], "neg": ["x"]}\n', {}, "pos must be a list of te"),
        (
            "rows.jsonl",
            '{"query": "q", "document": "a"}\n',
            {},
            r"No row of --rows=.* has 2 different candidates: give rows with more\.",
        ),
        ("rows.jsonl", ROW, {"candidates": 3}, "has 3 different candidates: give fewer --candid"),
        ("rows.jsonl", ROW, {"candidates": 1}, "--candidates=1: a candidate alone teaches nothing"),
        ("rows.jsonl", ROW, {"output": "scored.txt"}, "its name must end in one of"),
        ("rows.jsonl", ROW, {"output": "rows.jsonl"}, "exists: remove it, or choose another"),
        ("rows.jsonl", ROW, {}, "'no/model' is neither a folder nor a model"),
    ],
)
def test_rows_that_cannot_be_scored_are_said_before_any_work(
    name: str, text: str | None, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    output = str(tmp_path / more.get("output", "scored.jsonl"))
    args = (request_of("no/model"), [str(tmp_path / name)], output, more.get("candidates", 0))
    refused(tmp_path, message, lambda: score_with_teacher(*args))


@pytest.mark.parametrize(
    "text, with_ids, message",
    [
        ("", False, "--scores hold no row to write: name other files"),
        ("", True, r"scores\.jsonl holds no row: name another file"),
        (ROW, False, "row 1: the columns found are query, documents; rename them"),
        ('{"query": "q", "document": "a"}\n', False, "row 1: it has no scores; let a model make"),
        (SCORED + SCORED.replace("1,", ""), False, "row 2: .* 1 numbers for 2 documents"),
        (SCORED.replace("1", "NaN"), False, "row 1: .* not finite; remove the row"),
        (SCORED.replace("1", '"1"'), False, 'row 1: "scores" holds a text; put a number there'),
        (SCORED.replace('["a", "b"]', '["a", "a"]'), False, "No row has 2 different candidates"),
        (IDS, False, "holds ids, no texts: name the files that have these with --queries and"),
        (SCORED, True, "its columns must be query_id, document_ids and scores, or"),
        (IDS[:20], True, "row 1: it is not valid JSON"),
        (IDS + IDS.replace('"11"', '"99"'), True, "row 2: the document '99' is not in --documents"),
        (IDS.replace('"1"', '"3"'), True, "row 1: the query '3' is not in --queries; add it"),
        (IDS.replace("11", "blank"), True, "the document 'blank' has no text in --documents; give"),
        (IDS.replace("[1, 2]", "[1, null]"), True, 'row 1: "scores" holds null'),
        (IDS.replace("[1, 2]", "1"), True, "row 1: document_ids and scores must be lists"),
        (IDS.replace('"1"', "null"), True, "row 1: it has no query_id"),
    ],
)
def test_scores_that_cannot_be_used(
    texts: tuple[str, str], text: str, with_ids: bool, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "scores.jsonl"
    file.write_text(text)
    args = ([str(file)], str(tmp_path / "out.parquet"), *(texts if with_ids else ()))
    refused(tmp_path, message, lambda: import_scores(*args))


def test_ids_need_both_files(texts: tuple[str, str], tmp_path: Path) -> None:
    file = write_table(tmp_path / "scores.jsonl", [json.loads(IDS)])
    for given, flag in (({"queries": texts[0]}, "documents"), ({"documents": texts[1]}, "queries")):
        args = ([file], str(tmp_path / "out.jsonl"))
        refused(tmp_path, f"--{flag} is missing", lambda a=args, g=given: import_scores(*a, **g))


def test_a_teacher_that_diverged_is_named(tokenizer_file: Path, rows: Rows, tmp_path: Path) -> None:
    described, params = make_model(tokenizer_file, **SETTINGS)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    huggingface.save_model(tmp_path / "broken", described, broken, "")
    (tmp_path / "rows").mkdir()
    file = write_table(tmp_path / "rows" / "rows.jsonl", rows)
    args = (request_of(tmp_path / "broken"), [file], str(tmp_path / "rows" / "scored.jsonl"))
    message = "The teacher .*broken gives .* a score that is no number: use another model"
    refused(tmp_path / "rows", message, lambda: score_with_teacher(*args))


# --- the program ---


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled"),
    }
    command = [sys.executable, str(ROOT / "launch" / "score.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def test_the_program_scores(teacher: Path, rows: Rows, tmp_path: Path) -> None:
    write_table(tmp_path / "rows.jsonl", rows)
    flags = ["--rows=rows.jsonl", "--output=scored.parquet", "--candidates=3", "--batch_size=4"]
    ran = launch(f"--teacher={teacher}", *flags, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "scored.parquet: 8 rows with 3 scored candidates each" in ran.stdout
    assert [row["documents"] for row in rows_of(tmp_path / "scored.parquet")] == [
        row["documents"][:3] for row in rows
    ]


def test_the_program_ends_with_one_sentence(texts: tuple[str, str], tmp_path: Path) -> None:
    write_table(tmp_path / "scores.jsonl", [json.loads(IDS.replace("11", "99"))])
    flags = ["--queries=queries.jsonl", "--documents=corpus.jsonl", "--output=out.jsonl"]
    ran = launch("--scores=scores.jsonl", *flags, cwd=tmp_path)
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line == ("error: scores.jsonl, row 1: the document '99' is not in --documents; add it.")
    assert not list(tmp_path.glob("*out*"))
