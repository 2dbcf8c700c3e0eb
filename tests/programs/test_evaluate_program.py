"""launch/evaluate.py: what it measures, what it writes, and what it says of bad input."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from tiny_model import save_model

from colbert_jax.errors import UserError
from colbert_jax.programs import evaluate as program
from colbert_jax.programs.evaluate import evaluate_model
from colbert_jax.programs.retriever import ModelRequest, open_retriever
from colbert_jax.retrieval.collection import Collection, read_beir
from colbert_jax.retrieval.evaluator import evaluate, evaluate_bm25
from colbert_jax.retrieval.metrics import DEFAULT_METRICS
from colbert_jax.retrieval.search import make_search

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    return save_model(folder, tokenizer_file, lookup=True)


def write_collection(folder: Path, texts: list[str], queries: int = 6) -> Path:
    """A query is the beginning of the document that answers it."""
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d {i}", "text": text} for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"_id": f"q{i}", "text": " ".join(texts[i].split()[1:4])} for i in range(queries)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td {i}\t1" for i in range(queries))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def folders(real_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection alone, and two that are parts of one."""
    root = tmp_path_factory.mktemp("collections")
    texts = [text for text in real_texts if len(text.split()) > 12][:90]
    write_collection(root / "alone", texts[:30])
    write_collection(root / "forums" / "a", texts[30:50])
    write_collection(root / "forums" / "b", texts[50:90], queries=9)
    return root


def request_of(model: Path) -> ModelRequest:
    return ModelRequest(str(model), batch_size=4)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


@pytest.fixture(scope="module")
def several(
    model: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """What a call with BM25 and several collections wrote and returned."""
    output = tmp_path_factory.mktemp("output") / "results" / "here"
    names = [str(folders / "alone"), str(folders / "forums")]
    return output, evaluate_model(request_of(model), names, None, str(output), bm25=True)


def test_it_writes_measures_and_runs(several: Any, model: Path, folders: Path) -> None:
    output, _ = several
    written = json.loads((output / "metrics.json").read_text())
    assert written["model"] == str(model) and written["split"] is None
    assert list(written["collections"]) == ["alone", "forums-a", "forums-b"]
    sizes = {"documents": 40, "queries": 9, "judgements": 9}
    found = written["collections"]["forums-b"]
    assert {key: found[key] for key in sizes} == sizes
    names = [f"{c}{s}.run" for c in ("alone", "forums-a", "forums-b") for s in ("", ".bm25")]
    assert sorted(contents(output)) == sorted(["metrics.json", *names])

    retriever = open_retriever(request_of(model))
    search = make_search(retriever.encoder, retriever.params)
    collection = read_beir(folders / "alone")
    expected = {
        "bm25": evaluate_bm25(collection).metrics,
        "model": evaluate(collection, search).metrics,
    }
    assert written["collections"]["alone"]["metrics"] == expected
    assert 0 < expected["model"]["nDCG@10"] <= 1


def test_its_runs_give_its_measures(several: Any, folders: Path) -> None:
    output, _ = several
    written = json.loads((output / "metrics.json").read_text())["collections"]["alone"]
    qrels = {
        query: {name.replace(" ", "%20"): r for name, r in judged.items()}
        for query, judged in read_beir(folders / "alone").qrels.items()
    }
    measures = [ir_measures.parse_measure(name) for name in DEFAULT_METRICS]
    for system, name in (("model", "alone.run"), ("bm25", "alone.bm25.run")):
        read = list(ir_measures.read_trec_run(str(output / name)))
        assert {hit.query_id for hit in read} == set(qrels)
        theirs = ir_measures.calc_aggregate(measures, qrels, read)
        ours = written["metrics"][system]
        assert ours == pytest.approx({n: theirs[m] for n, m in zip(ours, measures, strict=True)})


def test_parts_count_as_one_in_the_average(several: Any) -> None:
    output, returned = several
    written = json.loads((output / "metrics.json").read_text())
    assert returned == written["metrics"]
    for system in ("bm25", "model"):
        for measure in DEFAULT_METRICS:
            one, a, b = (c["metrics"][system][measure] for c in written["collections"].values())
            assert returned[system][measure] == pytest.approx((one + (a + b) / 2) / 2)


def test_it_prints_a_table(
    model: Path, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = evaluate_model(
        request_of(model), [str(folders / "alone")], "test", str(tmp_path), ["P@5", "MRR@10"]
    )
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == str(model)
    (row,) = [line for line in printed.splitlines() if line.startswith("alone")]
    assert row.split()[1:] == [f"{values['model'][m]:.3f}" for m in ("P@5", "MRR@10")]
    assert "average" not in printed and "bm25" not in printed
    assert f"Written to {tmp_path}" in printed
    assert sorted(contents(tmp_path)) == ["alone.run", "metrics.json"]
    assert json.loads((tmp_path / "metrics.json").read_text())["split"] == "test"


def test_one_collection_at_a_time_is_in_memory(
    model: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, measured = [], []

    def open_two(name: str, split: str | None) -> Iterator[Collection]:
        for part in ("a", "b"):
            read.append(part)
            yield read_beir(folders / "forums" / part)

    def measure(collection: Collection, search: Any, metrics: Any) -> Any:
        measured.append(len(read))
        return evaluate(collection, search, metrics)

    monkeypatch.setattr(program, "open_dataset", open_two)
    monkeypatch.setattr(program, "evaluate", measure)
    evaluate_model(request_of(model), ["x"], None, str(tmp_path))
    assert measured == [1, 2]


def test_what_was_measured_is_kept_where_a_later_collection_fails(
    model: Path, folders: Path, tmp_path: Path
) -> None:
    names = [str(folders / "alone"), str(tmp_path / "none")]
    with pytest.raises(UserError, match="is no data set"):
        evaluate_model(request_of(model), names, None, str(tmp_path / "output"))
    written = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert list(written["collections"]) == ["alone"] and written["metrics"]["model"]
    assert (tmp_path / "output" / "alone.run").is_file()


def test_two_collections_of_one_name_are_refused(
    model: Path, folders: Path, tmp_path: Path
) -> None:
    names = [str(folders / "forums" / "a")] * 2
    with pytest.raises(UserError, match=r"Two collections are called 'a'.*rename"):
        evaluate_model(request_of(model), names, None, str(tmp_path))


# --- what is said before a model is read ---


def refused(tmp_path: Path, datasets: list[str], **changes: Any) -> str:
    arguments: dict[str, Any] = {"split": None, "output": str(tmp_path / "output")} | changes
    with pytest.raises(UserError) as caught:
        evaluate_model(ModelRequest("no/model"), datasets, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_asked_for_is_checked_first(folders: Path, tmp_path: Path) -> None:
    alone = str(folders / "alone")
    for metrics, said in (
        (["nDCG@10", "bogus"], "metric 'bogus' is not known"),
        (["alpha_nDCG@10"], "cannot be computed here"),
        (["nDCG@0"], "looks at no document"),
        ([], "no metric"),
    ):
        assert said in refused(tmp_path, [alone], metrics=metrics)
    assert "--dataset is empty" in refused(tmp_path, [])
    for name in ("", "none", str(tmp_path / "none")):
        assert "is no data set" in refused(tmp_path, [name])
    assert "dev.tsv cannot be read" in refused(tmp_path, [alone], split="dev")
    assert not (tmp_path / "output").exists()
    (tmp_path / "file").write_text("precious")
    for output in ("file", "file/below"):
        said = refused(tmp_path, [alone], output=str(tmp_path / output))
        assert said.startswith(f"--output={tmp_path / output} cannot be written to")
    assert (tmp_path / "file").read_text() == "precious"
    assert "neither a folder nor a model" in refused(tmp_path, [alone])


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq0\tnone\t1\n",
            "judges the document 'none'",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nnone\td 0\t1\n", "judges the query 'none'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "has no judgements"),
        ("queries.jsonl", "", "queries.jsonl is empty"),
        ("corpus.jsonl", "{", "line 1, is not valid JSON"),
    ],
)
def test_collections_that_cannot_be_used(
    real_texts: list[str], tmp_path: Path, file: str, text: str, said: str
) -> None:
    folder = write_collection(tmp_path / "some", real_texts[:8])
    (folder / file).write_text(text)
    assert said in refused(tmp_path, [str(folder)])


# --- the program ---


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled"),
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
    )


def test_the_program_measures(model: Path, folders: Path, tmp_path: Path) -> None:
    ran = run(
        f"--model={model}",
        f"--dataset={folders / 'alone'},{folders / 'forums'}",
        "--output=results",
        "--metrics=nDCG@10,P@5",
        "--bm25",
        "--batch_size=4",
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    written = json.loads((tmp_path / "results" / "metrics.json").read_text())
    rows = {line.split("  ")[0]: line.split()[-2:] for line in ran.stdout.splitlines() if line}
    for system in ("bm25", "model"):
        values = written["metrics"][system]
        assert rows[f"average {system}"] == [f"{values[m]:.3f}" for m in ("nDCG@10", "P@5")]


def test_the_program_ends_with_one_sentence(folders: Path, tmp_path: Path) -> None:
    ran = run(
        "--model=no/model",
        f"--dataset={folders / 'alone'}",
        "--output=results",
        "--metrics=nDCG@0",
        cwd=tmp_path,
    )
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: the metric 'nDCG@0'")
