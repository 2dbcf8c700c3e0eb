"""The benchmarks run at a tiny shape, keep their output's promise, and say what is wrong."""

import json
import math
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from reference.environment import pylate_python

from colbert_jax.ahead import check_topology, model_config
from colbert_jax.huggingface import read_model
from colbert_jax.run import check_settings
from colbert_jax.sharding import MESH_AXES
from colbert_jax.train import check_batch

ROOT = Path(__file__).resolve().parents[1]
TINY_STEP = (
    *("--layers=1", "--hidden=16", "--heads=2", "--intermediate=16", "--vocabulary=64"),
    *("--pairs=4", "--query-tokens=10", "--document-tokens=12", "--micro-batch=2", "--lengths=1"),
    "--scan-layers=0",
)
SHARED = {"seconds", "spread", "rounds", "pairs_per_second", "peak_memory_bytes", "shape"}


def program(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    # One device, and little time spent on optimising programs that are not to be fast here.
    variables = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags],
        env=variables | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def report(name: str, *flags: str) -> dict[str, Any]:
    done = program(name, "--rounds=2", "--json", *flags)
    assert done.returncode == 0, done.stderr
    assert "PyLate is left out" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    result = json.loads(done.stdout)
    ours = result["rows"][0]
    assert ours["name"] == "ours" and ours.keys() >= SHARED
    assert ours["spread"][0] <= ours["seconds"] <= ours["spread"][1] and ours["rounds"] == 2
    assert ours["peak_memory_bytes"] > 0
    assert result["ratios"]["speed_vs_pylate"] is None  # not measured, and not left out either
    return result


def test_maxsim_reports_rows_and_ratios() -> None:
    result = report("maxsim", "--pairs=16", "--query_tokens=8", "--document-tokens=24", "--dim=16")
    assert [row["name"] for row in result["rows"]] == ["ours", "naive"]
    assert result["shape"]["query_tokens"] == 8  # underscores are hyphens
    ours, naive = (row["temporary_bytes"] for row in result["rows"])
    assert result["ratios"]["memory_vs_naive"] == ours / naive
    assert result["ratios"]["speed_vs_naive"] > 0


def test_step_reports_rows_and_ratios() -> None:
    result = report("step", *TINY_STEP)
    ours, naive = result["rows"]
    assert naive["name"] == "naive" and naive["seconds"] is None  # compiled only
    ratio = ours["temporary_bytes"] / naive["temporary_bytes"]
    assert result["ratios"]["memory_vs_naive"] == ratio
    assert ours["tokens_per_second"] == pytest.approx(result["real_tokens"] / ours["seconds"])
    assert 0 < ours["real_token_share"] <= 1
    assert ours["loss"] > 0 and ours["grad_norm"] > 0
    asked = ours["model_flops"]
    assert ours["model_flops_per_second"] == pytest.approx(asked / ours["seconds"])
    assert ours["mfu"] == pytest.approx(ours["model_flops_per_second"] / ours["matmul_flops"])


@pytest.mark.parametrize(
    ("name", "flag", "said"),
    [
        ("maxsim", "--pairs=0", "0 is not a whole number of at least 1"),
        ("maxsim", "--no-such-flag", "--no-such-flag"),
        ("maxsim", "--peer-python=no/such/python", "there is no such interpreter"),
        ("maxsim", f"--peer-python={sys.executable}", "does not have PyLate"),
        ("step", "--micro-batch=5", "--micro-batch=5 does not divide --pairs=32"),
        ("step", "--real-text=no/such/file.jsonl", "there is no such file"),
        ("encode", "--document-tokens=7", "--document-tokens must be at least 8"),
    ],
)
def test_a_wrong_argument_gives_one_sentence_and_status_2(name: str, flag: str, said: str) -> None:
    done = program(name, flag)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (151.2, "151.200"),
        (4.8404, "4.840"),
        (0.1, "0.100"),
        (0.0213, "0.0213"),
        (0.00043931, "0.000439"),
        (0.000043931, "4.39e-05"),
    ],
)
def test_a_table_shows_no_duration_as_nothing(
    seconds: float,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = runpy.run_path(str(ROOT / "benchmarks" / "harness.py"))
    row = {"name": "ours", "seconds": seconds, "spread": [seconds, seconds]}
    row |= {"pairs_per_second": 1 / seconds, "peak_memory_bytes": 2**20}
    tables["print_table"]({"rows": [row], "ratios": {}})
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == [shown] * 3


# --- encode.py ---


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "encode.py")))


@pytest.mark.parity
def test_encode_measures_ours_and_pylate_on_the_same_embeddings() -> None:
    done = program(
        "encode",
        *("--layers=1", "--hidden=16", "--heads=2", "--intermediate=16", "--vocabulary=64"),
        *("--documents=20", "--document-tokens=12", "--batch-size=8", "--peer-batch-size=16"),
        *("--rounds=1", "--json", f"--peer-python={pylate_python()}"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ours, *peers = result["rows"]
    assert [row["name"] for row in peers] == ["pylate_default", "pylate_tuned"]
    assert [row["batch_size"] for row in result["rows"]] == [8, 32, 16]
    assert 8 * 20 <= result["real_tokens"] <= 12 * 20
    assert ours["real_token_share"] == result["real_tokens"] / ours["padded_tokens"] < 1
    for row in result["rows"]:
        assert row["peak_memory_bytes"] > 0 and row["first_seconds"] > 0
        assert row["documents_per_second"] * row["seconds"] == pytest.approx(20)
        taken = row["tokens_per_second"] * row["seconds"]
        assert taken == pytest.approx(result["real_tokens"])
    fastest = min(row["seconds"] for row in peers)
    assert result["ratios"]["speed_vs_pylate"] == fastest / ours["seconds"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda counts, sums: (counts, sums * 1.0001), ""),
        (lambda counts, sums: (counts + np.eye(3, dtype=int)[1], sums), "tokens of document 1"),
        (lambda counts, sums: (counts, sums[[0, 2, 1]]), "embed document 1"),
        (lambda counts, sums: (counts, sums * [[1.0], [1.0], [1.01]]), "embed document 2"),
        (lambda counts, sums: (counts, sums * [[1.0], [1.0], [np.nan]]), "embed document 2"),
    ],
)
def test_other_embeddings_than_ours_are_not_timed(
    encoding: Any, tmp_path: Path, change: Any, said: str
) -> None:
    counts = np.full(3, 5)
    sums = np.random.default_rng(0).standard_normal((3, 4))
    workers = []
    for name, given in (("ours", (counts, sums)), ("pylate", change(counts, sums))):
        output = str(tmp_path / f"{name}.npz")
        np.savez(output, counts=given[0], sums=given[1])
        workers.append(SimpleNamespace(name=name, error="", setup={"output": output}))
    with pytest.raises(encoding.Failure, match=said) if said else nullcontext():
        encoding.compare(workers)


@pytest.mark.parametrize("real", [False, True])
def test_made_up_documents_have_the_tokens_that_are_counted(
    encoding: Any, tmp_path: Path, real: bool
) -> None:
    from synthetic import prepare_documents  # the fixture lets it be found

    lines = [json.dumps({"query": "q", "document": "word " * n}) for n in (1, 9, 4, 500)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    args = SimpleNamespace(
        **{"layers": 1, "hidden": 16, "heads": 2, "intermediate": 16, "vocabulary": 64},
        **{"pairs": 4, "query_tokens": 8, "document_tokens": 30, "tokenizer": None},
        real_text=str(tmp_path / "pairs.jsonl") if real else None,
    )
    texts, lengths = prepare_documents(args, tmp_path / "model")
    tokenizer = read_model(tmp_path / "model").tokenizer
    assert [len(ids) for ids in tokenizer.document_ids(texts)] == lengths.tolist()
    if real:
        assert lengths[0] < lengths[2] < lengths[1] < lengths[3] == 30


# --- scaling.py ---


@pytest.fixture(scope="module")
def scaling() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "scaling.py")))


def test_every_row_of_the_scaling_tables_is_a_step_that_its_slice_can_take(scaling: Any) -> None:
    for _, name, topology, overrides in scaling.ROWS:
        config = scaling.plain_config(name, overrides)  # refuses a key that there is not
        check_settings(config)
        model_config(config)
        _, extents = check_topology(topology)
        chips = math.prod(extents)
        sizes = config["mesh"]
        asked = math.prod(sizes.values())
        data = sizes["data"] if asked > 0 else chips // (sizes["fsdp"] * sizes["tensor"])
        assert data * sizes["fsdp"] * sizes["tensor"] <= chips
        check_batch(config, AbstractMesh((data, sizes["fsdp"], sizes["tensor"]), MESH_AXES))


def test_a_row_that_is_kept_is_not_compiled_again(scaling: Any, tmp_path: Path) -> None:
    row = scaling.ROWS[0][1:]
    kept = {"command": scaling.command_line(*row), "printed": "a table"}
    (tmp_path / "row-0.json").write_text(json.dumps(kept))
    assert scaling.kept_or_compiled(0, row, tmp_path) == "a table"


def test_the_summary_has_what_each_row_printed(scaling: Any) -> None:
    printed = "memory                   12.56 GiB of 16.00\n  memory    1 s\npairs/s     519\n"
    lines = scaling.summary([printed, *["no table"] * 9]).splitlines()
    assert lines[2] == "| Phase 1, one v5e chip | 12.56 GiB of 16.00 | - | 519 | - | - |"
    assert len(lines) == 2 + len(scaling.ROWS)


def test_formulas_stand_beside_what_programs_send(scaling: Any) -> None:
    printed = "topology  v5e:4x4, mesh data 16, fsdp 1, tensor 1\nall-gather sent  704.0 MiB\n"
    printed += "".join(f"{kind} sent  0.0 MiB\n" for kind in ("reduce-scatter", "all-reduce"))
    printed += "collective-permute sent  0.0 MiB\n"
    text = scaling.comparison(["no table", "no table", printed, *["no table"] * 7])
    (line,) = [line for line in text.splitlines() if "Phase 1, 16 v5e chips" in line]
    # 16,384 documents of 187 tokens and 128 bfloat16, but for the sixteenth that a chip has.
    assert f"{16_384 * 187 * 128 * 2 * 15 / 16 / 2**20:,.1f} / 704.0" in line


def test_predicted_efficiency_starts_at_one_and_is_drawn(scaling: Any, tmp_path: Path) -> None:
    for kind in ("v5e", "v5p"):
        chips, values = scaling.efficiency(kind, 16_384, "gather")
        assert chips[0] == 8 and values[0] == 1.0
        assert all(0 < value < 1.3 for value in values)
        assert chips == sorted(chips)
    scaling.draw_curves(tmp_path / "scaling.svg")
    drawing = (tmp_path / "scaling.svg").read_text()
    assert "<svg" in drawing and drawing.count('id="line2d') > 8


def test_input_reports_pairs_per_second_of_tokens_and_of_text() -> None:
    done = program("input", "--pairs=600", "--batch=100", "--rounds=2", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    result = json.loads(done.stdout)
    tokens, text = result["rows"]
    assert (tokens["name"], text["name"]) == ("tokens", "text")
    assert result["pairs_per_second"] == tokens["pairs_per_second"] > 0
    assert result["text_pairs_per_second"] == text["pairs_per_second"] > 0
    pairs = result["shape"]["pairs"]
    assert 500 < pairs <= 600  # repeated pairs are dropped
    for row in result["rows"]:
        assert row["spread"][0] <= row["seconds"] <= row["spread"][1] and row["rounds"] == 2
        taken = row["pairs_per_second"] * row["seconds"]
        assert taken == pytest.approx(pairs // 100 * 100)
        # Whole texts of at least [CLS], marker, prompt and [SEP] on either side, cut to 39 and 187.
        assert 8 * taken < row["tokens_per_second"] * row["seconds"] < (39 + 187) * taken


def test_input_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    done = program("input", f"--real-text={tmp_path / 'bad.jsonl'}")
    assert done.returncode == 2 and "bad.jsonl" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    done = program("input", "--pairs=64", "--batch=100")
    assert done.returncode == 2 and "100 rows of a global batch" in done.stderr
