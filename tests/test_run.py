"""Whole runs, from a config to an export: three phases, quickstart, and what users do wrong."""

import copy
import gzip
import json
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from reference.client import PyLateReference
from safetensors.numpy import load_file

from colbert_jax import huggingface
from colbert_jax import run as run_module
from colbert_jax.colbert import make_embed
from colbert_jax.errors import UserError
from colbert_jax.export import export_run as export
from colbert_jax.metric_log import read_metrics
from colbert_jax.prepare import Request, prepare
from colbert_jax.run import run

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = {"query": "search_query: ", "document": "search_document: "}
MEASURES = {"nDCG@10", "MRR@10", "Recall@100", "MAP"}
STEPS = 2


pytestmark = pytest.mark.usefixtures("quick_compilation")


def get_config(name: str, changes: dict[str, Any]) -> ConfigDict:
    """A real config with some values changed, as by overrides."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config.compilation_cache = ""
    config.update(changes)
    return config


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def pairs(real_texts: list[str]) -> list[dict[str, Any]]:
    texts = [text for text in real_texts if len(text.split()) > 12][:60]
    return [{"query": " ".join(t.split()[:5]), "document": t} for t in texts]


@pytest.fixture(scope="module")
def data(pairs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of each kind of row: pairs (gzip), mined negatives (Parquet), scored candidates."""
    folder = tmp_path_factory.mktemp("data")
    documents = [row["document"] for row in pairs]
    mined = [
        row | {"negative": [documents[i - 1], documents[i - 2]]} for i, row in enumerate(pairs)
    ]
    scored = [
        {
            "query": row["query"],
            "documents": [row["document"], *(documents[i - j] for j in (1, 2, 3))],
            "scores": [4.0, 1.0, float(i % 3), -1.5],
        }
        for i, row in enumerate(pairs)
    ]
    pq.write_table(pa.Table.from_pylist(mined), folder / "mined.parquet")
    return {
        "pairs": write_lines(folder / "pairs.jsonl.gz", pairs),
        "mined": str(folder / "mined.parquet"),
        "scored": write_lines(folder / "scored.jsonl", scored),
    }


@pytest.fixture(scope="module")
def collection(pairs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder."""
    folder = tmp_path_factory.mktemp("beir") / "tinybeir"
    (folder / "qrels").mkdir(parents=True)
    chosen = pairs[:20]
    write_lines(
        folder / "corpus.jsonl",
        [{"_id": f"d{i}", "title": "", "text": r["document"]} for i, r in enumerate(chosen)],
    )
    write_lines(
        folder / "queries.jsonl",
        [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(chosen)],
    )
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(chosen)))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def encoder(
    pylate: PyLateReference, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A base encoder as the hub has it: with its MLM head, without a projection or markers."""
    folder = tmp_path_factory.mktemp("base") / "encoder"
    pylate.call(
        "make_encoder",
        folder=str(folder),
        tokenizer_json=str(tokenizer_file),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        masked_lm=True,
    )
    return folder


def phase_config(name: str, init_from: Path, files: str, cache: Path, **changes: Any) -> ConfigDict:
    config = get_config(
        name,
        {
            "total_steps": STEPS,
            "init_from": str(init_from),
            "log_every_steps": 1,
            "input": {"files": (files,), "batch_size": 8, "cache_dir": str(cache), "threads": 1},
            "model": {"dtype": "float32", "query_length": 14, "document_length": 20},
            "checkpoint": {"every_steps": 0},
        },
    )
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def phases(
    encoder: Path,
    data: dict[str, str],
    collection: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The recipe's three configs, one after the other, and the parameters each started from."""
    folder = tmp_path_factory.mktemp("phases")
    started: dict[str, Any] = {}
    start_state = run_module.start_state
    with pytest.MonkeyPatch.context() as patched:

        def noting(*args: Any) -> Any:
            state = start_state(*args)
            started[name] = jax.tree.map(np.array, state.params["model"])
            return state

        patched.setattr(run_module, "start_state", noting)
        before = encoder
        for name, rows in (("pretrain", "pairs"), ("supervised", "mined"), ("distill", "scored")):
            config = phase_config(name, before, data[rows], folder / "cache")
            if name == "supervised":
                config.evals.collections = (str(collection),)
                config.evals.every_steps = 1
            run(config, folder / name)
            before = folder / name
    return {"folder": folder, "started": started}


def exported(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors") | load_file(
        folder / "1_Dense" / "model.safetensors"
    )


def in_files(params: Any, folder: Path) -> dict[str, np.ndarray]:
    """Parameters by the names that they have in an export."""
    config = huggingface.read_model(str(folder)).config
    table = huggingface.weight_table(config.encoder)
    table += huggingface.dense_table(config.projection[0], 0)
    return {w.name: w.to_theirs(huggingface.get_path(params, w.path)) for w in table}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# --- the three phases ---


def test_phase_1_starts_from_the_base_encoder(phases: dict[str, Any], encoder: Path) -> None:
    base = {
        k.removeprefix("model."): v for k, v in load_file(encoder / "model.safetensors").items()
    }
    ours = in_files(phases["started"]["pretrain"], phases["folder"] / "pretrain" / "model")
    embeddings = "embeddings.tok_embeddings.weight"
    rows = len(base[embeddings])
    assert len(ours[embeddings]) == rows + 2  # the markers
    np.testing.assert_array_equal(ours[embeddings][:rows], base[embeddings])
    for name in ours:
        if name not in (embeddings, "linear.weight"):
            np.testing.assert_array_equal(ours[name], base[name], err_msg=name)
    assert ours["linear.weight"].shape == (128, 32)


@pytest.mark.parametrize("before, after", [("pretrain", "supervised"), ("supervised", "distill")])
def test_each_phase_starts_exactly_where_the_one_before_ended(
    before: str, after: str, phases: dict[str, Any]
) -> None:
    ended = exported(phases["folder"] / before / f"export-{STEPS}")
    assert_same(in_files(phases["started"][after], phases["folder"] / after / "model"), ended)
    trained = exported(phases["folder"] / after / f"export-{STEPS}")
    assert any(np.any(trained[name] != ended[name]) for name in trained)


def test_each_phase_leaves_metrics_curves_config_and_export(phases: dict[str, Any]) -> None:
    for name in ("pretrain", "supervised", "distill"):
        workdir = phases["folder"] / name
        steps = [row["step"] for row in read_metrics(workdir) if "train/loss" in row]
        assert steps == [1, 2]
        assert (workdir / "curves.png").stat().st_size > 5000
        assert json.loads((workdir / "train_config.json").read_text())["total_steps"] == STEPS
        described = json.loads(
            (workdir / f"export-{STEPS}" / "config_sentence_transformers.json").read_text()
        )
        assert described["prompts"] == PROMPTS
        assert (described["query_length"], described["document_length"]) == (14, 20)
        card = (workdir / f"export-{STEPS}" / "README.md").read_text()
        assert 'prompt_name="query"' in card and f"{STEPS} of 8 queries each" in card


def test_the_last_phases_report_shows_all_three(phases: dict[str, Any]) -> None:
    page = (phases["folder"] / "distill" / "report.html").read_text()
    for name in ("pretrain", "supervised", "distill"):
        assert f">{name}</bdi></th>" in page
    measured = json.loads((phases["folder"] / "supervised" / "results.json").read_text())
    assert f">{measured['trained']['nDCG@10']:.3f}</" in page


@pytest.mark.parametrize("name, rows", [("pretrain", "pairs"), ("distill", "scored")])
def test_tokens_train_as_the_text_they_were_made_of(
    name: str, rows: str, phases: dict[str, Any], encoder: Path, data: dict, tmp_path: Path
) -> None:
    before = encoder if name == "pretrain" else phases["folder"] / "supervised"
    request = Request(
        corpus="files",
        sources=(data[rows],),
        output=str(tmp_path / "prepared"),
        tokenizer=str(before),
        query_prompt=PROMPTS["query"],
        document_prompt=PROMPTS["document"],
        query_length=20,
        document_length=33,
    )
    prepare(request)
    config = phase_config(name, before, data[rows], tmp_path / "prepared")
    config.input.tokenized = True
    config.input.workers = 1
    run(config, tmp_path / "run")
    whole = phases["folder"] / name
    assert_same(exported(tmp_path / "run" / f"export-{STEPS}"), exported(whole / f"export-{STEPS}"))
    losses = [
        [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]
        for folder in (tmp_path / "run", whole)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_tokens_of_another_prompt_or_none_are_refused(
    encoder: Path, data: dict[str, str], tmp_path: Path
) -> None:
    config = phase_config("pretrain", encoder, data["pairs"], tmp_path / "prepared")
    config.input.tokenized = True
    with pytest.raises(UserError, match=r"pairs.*has no tokens: run launch/prepare.py"):
        run(config, tmp_path / "run")
    request = Request(
        corpus="files",
        sources=(data["pairs"],),
        output=str(tmp_path / "prepared"),
        tokenizer=str(encoder),
        query_prompt="query: ",
        document_prompt=PROMPTS["document"],
    )
    prepare(request)
    with pytest.raises(
        UserError, match=r"tokenized for .*'query: '.*but the run's .*'search_query: '"
    ):
        run(config, tmp_path / "run")


def test_pylate_loads_the_last_export_and_gives_our_vectors(
    phases: dict[str, Any], pylate: PyLateReference, real_texts: list[str]
) -> None:
    folder = phases["folder"] / "distill" / f"export-{STEPS}"
    model = huggingface.read_model(str(folder))
    params = huggingface.read_weights(str(folder), model, 0)
    texts = [text for text in real_texts if text.strip()][:6]
    tokens = model.tokenizer.queries(texts)
    ours = jax.jit(make_embed(model.config))(params, tokens["input_ids"], tokens["attention_mask"])
    theirs = pylate.call(
        "encode",
        folder=str(folder),
        texts=texts,
        is_query=True,
        options={"prompt_name": "query"},
    )
    assert len(theirs) == len(texts)
    for i, vectors in enumerate(theirs):
        np.testing.assert_allclose(np.asarray(vectors), np.asarray(ours[i]), atol=1e-4)


def test_a_collection_is_evaluated_during_training(phases: dict[str, Any]) -> None:
    workdir = phases["folder"] / "supervised"
    measured = [row for row in read_metrics(workdir) if "eval/tinybeir/nDCG@10" in row]
    assert [row["step"] for row in measured] == [1, 2]
    results = json.loads((workdir / "results.json").read_text())
    assert set(results) == {"trained"} and set(results["trained"]) == MEASURES
    last = {name: measured[-1][f"eval/tinybeir/{name}"] for name in MEASURES}
    assert results["trained"] == last
    assert not (phases["folder"] / "distill" / "results.json").exists()


# --- starting points ---


def started_from(init_from: Path | str, workdir: Path, data: str, cache: Path) -> Any:
    config = phase_config("distill", Path(init_from), data, cache)
    seen = []

    class Seen(Exception):
        pass

    start_state = run_module.start_state

    def noting(*args: Any) -> Any:
        seen.append(jax.tree.map(np.array, start_state(*args).params["model"]))
        raise Seen

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "start_state", noting)
        with pytest.raises(Seen):
            run(config, workdir)
    return in_files(seen[0], workdir / "model")


@pytest.mark.parametrize("kind", ["run", "export", "pylate"])
def test_a_run_an_export_and_a_pylate_folder_are_starting_points(
    kind: str,
    phases: dict[str, Any],
    pylate: PyLateReference,
    data: dict[str, str],
    tmp_path: Path,
) -> None:
    folder = phases["folder"] / "supervised"
    source = folder if kind == "run" else folder / f"export-{STEPS}"
    if kind == "pylate":
        source = tmp_path / "saved_by_pylate"
        pylate.call("roundtrip", folder=str(folder / f"export-{STEPS}"), output=str(source))
    ours = started_from(source, tmp_path / "run", data["scored"], phases["folder"] / "cache")
    assert_same(ours, exported(folder / f"export-{STEPS}"))


def test_a_learned_temperature_stays_behind_when_its_run_is_exported_or_built_on(
    phases: dict[str, Any], data: dict[str, str], tmp_path: Path
) -> None:
    base = phases["folder"] / "pretrain"
    cache = phases["folder"] / "cache"
    config = phase_config(
        "pretrain", base, data["pairs"], cache, total_steps=1, loss={"learn_temperature": True}
    )
    run(config, tmp_path / "learned")
    ours = started_from(tmp_path / "learned", tmp_path / "next", data["scored"], cache)
    assert_same(ours, exported(tmp_path / "learned" / "export-1"))
    card = (tmp_path / "learned" / "export-1" / "README.md").read_text()
    assert "| Temperature | learned, from 0.02 |" in card


@pytest.mark.parametrize(
    "init_from, message",
    [
        ("no/such/folder", "neither a folder nor a model that could be fetched"),
        ("", "config.init_from is empty"),
    ],
)
def test_a_missing_starting_point_is_the_users_error(
    init_from: str, message: str, data: dict[str, str], tmp_path: Path
) -> None:
    config = phase_config("pretrain", Path("x"), data["pairs"], tmp_path / "cache")
    config.init_from = init_from
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")


def test_a_run_without_a_checkpoint_is_no_starting_point(
    phases: dict[str, Any], data: dict[str, str], tmp_path: Path
) -> None:
    cache = phases["folder"] / "cache"
    started_from(phases["folder"] / "pretrain", tmp_path / "stopped", data["scored"], cache)
    config = phase_config("distill", tmp_path / "stopped", data["scored"], cache)
    with pytest.raises(UserError, match="holds no checkpoint"):
        run(config, tmp_path / "run")


# --- the quickstart ---


@pytest.fixture(scope="module")
def quick_config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    return get_config(
        "quickstart",
        {
            "total_steps": 3,
            "log_every_steps": 1,
            "next_command": "try this",
            "input": {
                "sources": ("tqdm", "absl"),
                "batch_size": 8,
                "cache_dir": str(tmp_path_factory.mktemp("docstrings")),
            },
            "model": {
                "embedding_size": 16,
                "query_length": 12,
                "document_length": 24,
                "vocab_size": 600,
                "encoder": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                },
            },
            "optimizer": {"warmup_steps": 1},
            "checkpoint": {"every_steps": 2},
        },
    )


@pytest.fixture(scope="module")
def quick(quick_config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished work directory of a tiny quickstart."""
    workdir = tmp_path_factory.mktemp("quick") / "runs" / "quickstart"
    run(quick_config, workdir)
    return workdir


def test_the_quickstart_writes_results_metrics_curves_and_an_export(quick: Path) -> None:
    results = json.loads((quick / "results.json").read_text())
    assert list(results) == ["bm25", "untrained", "trained"]
    for measures in results.values():
        assert set(measures) == MEASURES
        assert all(0 <= value <= 1 for value in measures.values())
    assert results["bm25"]["nDCG@10"] > 0.2
    rows = read_metrics(quick)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
    measured = [row for row in rows if "eval/held_out/nDCG@10" in row]
    assert [row["step"] for row in measured] == [0, 3]
    assert measured[0]["eval/held_out/MRR@10"] == results["untrained"]["MRR@10"]
    assert measured[1]["eval/held_out/MRR@10"] == results["trained"]["MRR@10"]
    assert (quick / "curves.png").read_bytes()[:4] == b"\x89PNG"
    files = {path.name for path in (quick / "export-3").iterdir()}
    assert {"README.md", "modules.json", "model.safetensors", "tokenizer.json"} <= files
    card = (quick / "export-3" / "README.md").read_text()
    assert "| bm25 |" in card and "| trained |" in card


def test_the_quickstart_ends_with_a_report_of_what_it_measured(quick: Path) -> None:
    page = (quick / "report.html").read_text()
    results = json.loads((quick / "results.json").read_text())
    for measures in results.values():
        for value in measures.values():
            assert f">{value:.3f}</" in page
    (evaluation,) = [json.loads(f.read_text()) for f in (quick / "evaluation").glob("*.json")]
    for example in evaluation["examples"]:
        for document in example["ranking"]:
            assert document["similarities"] in page  # a heat map of each
    assert "Best queries" in page and "Worst queries" in page
    text = re.sub("<[^>]*>", "", page)
    assert "export-3" in text and "tqdm" in text
    assert "contrastive on docstrings; step 3 of 3; starts from random weights." in text


def contents(folder: Path, *left_out: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not set(path.relative_to(folder).parts) & set(left_out)
    }


def test_a_second_call_shows_the_results_and_changes_nothing(
    quick: Path, quick_config: ConfigDict, capsys: pytest.CaptureFixture[str]
) -> None:
    # TensorBoard begins a file of its own, and the picture is drawn anew from the same numbers.
    before = contents(quick, "tensorboard", "curves.png")
    results = run(quick_config, quick)
    after = contents(quick, "tensorboard", "curves.png")
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []
    printed = capsys.readouterr().out
    for name in ("bm25", "untrained", "trained", "nDCG@10", "MRR@10", "Recall@100", "MAP"):
        assert name in printed
    for measures in results.values():
        assert f"{measures['nDCG@10']:.3f}" in printed
    assert "metrics.jsonl" in printed and "export-3" in printed and "Next: try this" in printed
    assert f"Report: {quick / 'report.html'}\n" in printed


def test_more_steps_go_on_from_the_last_and_measure_again(
    quick: Path, quick_config: ConfigDict
) -> None:
    longer = copy.deepcopy(quick_config)
    longer.total_steps = 4
    old = json.loads((quick / "results.json").read_text())
    first = contents(quick / "export-3")
    results = run(longer, quick)
    rows = read_metrics(quick)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/held_out/nDCG@10" in row] == [0, 3, 4]
    assert results["trained"]["nDCG@10"] == rows[-1]["eval/held_out/nDCG@10"]
    assert results["untrained"] == old["untrained"] and list(results)[-1] == "trained"
    assert contents(quick / "export-3") == first and (quick / "export-4").is_dir()


def test_held_out_is_only_there_for_docstrings(data: dict[str, str], tmp_path: Path) -> None:
    config = phase_config("pretrain", Path("x"), data["pairs"], tmp_path / "cache")
    with pytest.raises(UserError, match="only the docstring corpus keeps a part out"):
        run_module.open_collections(["held_out"], run_module.open_corpus(config.input))
    with pytest.raises(UserError, match="none' is no data set: give a folder in BEIR's layout"):
        run_module.open_collections([str(tmp_path / "none")], run_module.open_corpus(config.input))


# --- what users do wrong ---


def test_a_folder_that_is_no_run_is_left_alone(data: dict[str, str], tmp_path: Path) -> None:
    config = phase_config("pretrain", tmp_path / "none", data["pairs"], tmp_path / "cache")
    for name in ("notes.txt", "model/weights.bin", "checkpoints/7/state"):
        folder = tmp_path / name.split("/")[0].split(".")[0]
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text("precious")
        (folder / "model").mkdir(exist_ok=True)
        before = contents(folder)
        with pytest.raises(UserError, match="holds something that is no run"):
            run(config, folder)
        assert contents(folder) == before
    file = tmp_path / "file"
    file.write_text("precious")
    for workdir in (file, file / "below"):
        with pytest.raises(UserError, match="choose another --workdir"):
            run(config, workdir)
    assert file.read_text() == "precious"


def test_a_run_that_failed_early_can_be_started_again(
    encoder: Path, data: dict[str, str], tmp_path: Path
) -> None:
    config = phase_config("pretrain", tmp_path / "none", data["pairs"], tmp_path / "cache")
    with pytest.raises(UserError, match="neither a folder"):
        run(config, tmp_path / "run")
    config.init_from = str(encoder)
    config.total_steps = 1
    config.export = False
    run(config, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert kept["init_from"] == str(encoder)


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("distill", "pairs", "Source pairs has no teacher's scores"),
        ("pretrain", "scored", "Source scored has candidates with scores, not positives"),
    ],
)
def test_rows_that_the_loss_cannot_use_are_the_users_error(
    name: str, rows: str, message: str, data: dict[str, str], tmp_path: Path
) -> None:
    config = phase_config(name, tmp_path / "none", data[rows], tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"rows\.jsonl cannot be read \(No such file or directory\)"),
        ("", r"rows\.jsonl has no rows"),
        ('{"query": "a"}\n', r"rows\.jsonl.*columns found"),
        ('{"query": "a", "document": ""}\n', r'rows\.jsonl, row 1: "document" holds a blank'),
        ('{"query": "a", "document": "b"}\n{', r"rows\.jsonl.*row 2"),
    ],
)
def test_files_that_cannot_be_used_are_the_users_error(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    path = str(tmp_path / "rows.jsonl")
    config = phase_config("pretrain", tmp_path / "none", path, tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("input", "batch_size", 1024, "No source has the 1024 rows of a global batch"),
        ("input", "batch_size", 1001, "does not split over 8 devices .*: the nearest .* is 1000"),
        (
            "input",
            "batch_size",
            1000,
            "=64 does not divide the 125 queries .*: the .* is 25",
        ),
        ("loss", "exchange", "rong", "config.loss.exchange is 'rong': choose one of gather, ring"),
        ("model", "remat", "all", "config.model.remat is 'all': choose one of full, names, none"),
        ("loss", "kind", "contrastiv", "config.loss.kind is 'contrastiv': choose one of"),
        ("model", "dtype", "bf16", "config.model.dtype is 'bf16': choose one of"),
        ("mesh", "fsdp", 3, "does not fit 8 device"),
        ("optimizer", "gradient_of", "max", "choose 'mean' or 'sum'"),
        ("model", "query_length", 2, "at least 4 tokens"),
    ],
)
def test_values_that_cannot_be_used_are_the_users_error(
    section: str, key: str, value: Any, message: str, encoder: Path, data: dict, tmp_path: Path
) -> None:
    config = phase_config("pretrain", encoder, data["pairs"], tmp_path / "cache")
    config[section][key] = value
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")


def test_files_of_one_name_are_all_used(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    files = (
        write_lines(tmp_path / "a" / "rows.jsonl", pairs[:10]),
        write_lines(tmp_path / "b" / "rows.jsonl", pairs[10:30]),
        write_lines(tmp_path / "other.jsonl", pairs[30:35]),
    )
    config = phase_config("pretrain", tmp_path, files[0], tmp_path / "cache")
    config.input.files = files
    sources = run_module.open_corpus(json.loads(config.to_json())["input"]).sources
    assert sorted(len(source) for source in sources.values()) == [5, 10, 20]
    assert "other" in sources


def test_a_changed_file_is_read_anew(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    lengths = []
    for count in (10, 12):
        path = write_lines(tmp_path / "rows.jsonl", pairs[:count])
        config = phase_config("pretrain", tmp_path, path, tmp_path / "cache")
        sources = run_module.open_corpus(json.loads(config.to_json())["input"]).sources
        lengths.append(len(sources["rows"]))
    assert lengths == [10, 12]


def test_an_export_never_writes_over_anything(phases: dict[str, Any], tmp_path: Path) -> None:
    workdir = phases["folder"] / "pretrain"
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="already holds something"):
        export(workdir, output)
    assert contents(tmp_path) == {"output/notes.txt": b"precious"}
    export(workdir, tmp_path / "new" / "model")
    assert_same(exported(tmp_path / "new" / "model"), exported(workdir / f"export-{STEPS}"))


def test_only_runs_are_exported(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for folder in (tmp_path / "folder", tmp_path / "none"):
        with pytest.raises(UserError, match="is not the folder of a run"):
            export(folder, tmp_path / "output")
    assert contents(tmp_path) == {} and not (tmp_path / "output").exists()
