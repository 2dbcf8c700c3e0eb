"""Several processes joined over loopback are one run: the same numbers, one log, one checkpoint."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "total_steps": 4,
    "log_every_steps": 1,
    "export": False,
    "input.batch_size": 16,
    "model.vocab_size": 600,
    "loss.temperature": 1.0,  # at 0.05 the loss is soon 0, and a relative difference of it nothing
    "model.query_length": 16,
    "model.document_length": 24,
    "model.encoder.num_hidden_layers": 2,
    "model.encoder.hidden_size": 32,
    "model.encoder.intermediate_size": 48,
    "evals.every_steps": 1,
    "evals.best": "nDCG@10",
    "compilation_cache": "",
    "checkpoint.every_steps": 2,
}


def start(
    workdir: Path,
    rows: Path,
    devices: int,
    joined: dict[str, str],
    *,
    session: bool = False,
    **settings: Any,
) -> subprocess.Popen:
    """One process of the real program, in a session of its own if all of it is to be killed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **joined,
    }
    overrides = SETTINGS | {
        "input.files": f"('{rows}',)",
        "input.cache_dir": rows.parent,
        "evals.collections": f"('{rows.parent / 'beir'}',)",
    }
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            f"--config={ROOT / 'configs' / 'quickstart.py'}",
            f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in (overrides | settings).items()),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=session,
    )


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed[-3000:]


def metrics(workdir: Path) -> list[dict[str, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def two_joined() -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    return [dict(zip(names, (address, "2", str(i)), strict=True)) for i in range(2)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Path:
    """Pairs, and beside them a BEIR folder."""
    texts = [text for text in real_texts if len(text.split()) >= 8][:96]
    folder = tmp_path_factory.mktemp("rows")
    pairs = [{"query": " ".join(text.split()[:4]), "document": text} for text in texts]
    write_lines(folder / "pairs.jsonl", pairs)
    (folder / "beir" / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "text": row["document"]} for i, row in enumerate(pairs)]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(pairs[:30])]
    write_lines(folder / "beir" / "corpus.jsonl", documents)
    write_lines(folder / "beir" / "queries.jsonl", queries)
    judged = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(30))]
    (folder / "beir" / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n")
    return folder / "pairs.jsonl"


def write_lines(path: Path, values: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.fixture(scope="module")
def both(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a run in one process, and of the same run in two."""
    folder = tmp_path_factory.mktemp("runs")
    finish([start(folder / "alone", rows, 4, {})])
    finish([start(folder / "joined", rows, 2, who) for who in two_joined()])
    return folder / "alone", folder / "joined"


def files(workdir: Path) -> list[str]:
    """What lies in a run's folder, TensorBoard's aside: its name holds the time."""
    found = [str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()]
    shown = ("run.json", "results.json", "metrics.jsonl", "evaluation", "train_config", "model/")
    return sorted(path for path in found if path.startswith(shown))


def measured(workdir: Path) -> list[dict[str, float]]:
    """The evaluations of a run, in the order of the log."""
    return [row for row in metrics(workdir) if "eval/beir/nDCG@10" in row]


def trained(workdir: Path) -> list[dict[str, float]]:
    return [row for row in metrics(workdir) if "train/loss" in row]


def test_two_processes_train_as_one(both: tuple[Path, Path]) -> None:
    expected, found = map(trained, both)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for a, b in zip(found, expected, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_two_processes_evaluate_as_one_and_only_the_first_writes(
    both: tuple[Path, Path],
) -> None:
    alone, joined = both
    # Once each: a second process that wrote too would be seen in the log.
    assert [row["step"] for row in measured(joined)] == [0, 1, 2, 3, 4]
    assert measured(joined) == measured(alone)
    assert 0 < measured(alone)[0]["eval/beir/nDCG@10"] < 1
    assert files(joined) == files(alone)
    read = [json.loads((folder / "results.json").read_text()) for folder in both]
    assert read[0] == read[1] and list(read[0]) == ["bm25", "untrained", "trained"]
    described = [json.loads((folder / "evaluation" / "beir.json").read_text()) for folder in both]
    assert described[0]["queries_by_measure"] == described[1]["queries_by_measure"]
    for one, other in zip(described[0]["examples"], described[1]["examples"], strict=True):
        assert one["query_id"] == other["query_id"]
        assert [d["document_id"] for d in one["ranking"]] == [
            d["document_id"] for d in other["ranking"]
        ]
    sessions = json.loads((joined / "run.json").read_text())["sessions"]
    assert len(sessions) == 1 and sessions[0]["processes"] == 2 and sessions[0]["devices"] == 4


def test_two_processes_keep_the_best_checkpoint(both: tuple[Path, Path]) -> None:
    kept = [sorted(int(p.name) for p in (f / "checkpoints").iterdir()) for f in both]
    assert kept[0] == kept[1]
    values = {row["step"]: row["eval/beir/nDCG@10"] for row in measured(both[1]) if row["step"]}
    best = max(values, key=values.__getitem__)
    assert best in kept[1] and 4 in kept[1]


def test_either_goes_on_from_the_other(both: tuple[Path, Path], rows: Path) -> None:
    alone, joined = both
    # On another number of processes, the run goes on with the batches that come next.
    finish([start(joined, rows, 4, {}, total_steps=6)])
    finish([start(alone, rows, 2, who, total_steps=6) for who in two_joined()])
    expected, found = trained(alone), trained(joined)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(found[4:], expected[4:], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    assert [row["step"] for row in measured(alone)] == list(range(7))
    for workdir, processes in ((joined, [2, 1]), (alone, [1, 2])):
        sessions = json.loads((workdir / "run.json").read_text())["sessions"]
        assert [session["processes"] for session in sessions] == processes
        assert [session["first_step"] for session in sessions] == [0, 4]
