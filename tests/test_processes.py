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
    "evals.collections": "()",
    "compilation_cache": "",
    "checkpoint.every_steps": 2,
}


def start(
    workdir: Path, rows: Path, devices: int, joined: dict[str, str], **settings: Any
) -> subprocess.Popen:
    """One process of the real program."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **joined,
    }
    overrides = SETTINGS | {"input.files": f"('{rows}',)", "input.cache_dir": rows.parent}
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
    texts = [text for text in real_texts if len(text.split()) >= 8][:96]
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    pairs = [{"query": " ".join(text.split()[:4]), "document": text} for text in texts]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_two_processes_train_as_one_and_either_goes_on_from_the_other(
    rows: Path, tmp_path: Path
) -> None:
    alone, joined = tmp_path / "alone", tmp_path / "joined"
    finish([start(alone, rows, 4, {})])
    finish([start(joined, rows, 2, who) for who in two_joined()])
    expected, found = metrics(alone), metrics(joined)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for a, b in zip(found, expected, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)

    # On another number of processes, the run goes on with the batches that come next.
    finish([start(joined, rows, 4, {}, total_steps=6)])
    finish([start(alone, rows, 2, who, total_steps=6) for who in two_joined()])
    expected, found = metrics(alone), metrics(joined)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(found[4:], expected[4:], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
