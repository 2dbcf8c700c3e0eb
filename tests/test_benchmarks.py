"""The benchmarks run at a tiny shape, keep their output's promise, and say what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize(
    ("name", "flag", "said"),
    [
        ("maxsim", "--pairs=0", "0 is not a whole number of at least 1"),
        ("maxsim", "--no-such-flag", "--no-such-flag"),
        ("maxsim", "--peer-python=no/such/python", "there is no such interpreter"),
        ("maxsim", f"--peer-python={sys.executable}", "does not have PyLate"),
        ("step", "--micro-batch=5", "--micro-batch=5 does not divide --pairs=32"),
        ("step", "--real-text=no/such/file.jsonl", "there is no such file"),
    ],
)
def test_a_wrong_argument_gives_one_sentence_and_status_2(name: str, flag: str, said: str) -> None:
    done = program(name, flag)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
