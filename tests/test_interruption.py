"""A run that is asked to stop saves, says so, and goes on; two runs never share a folder."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_processes import metrics, start, two_joined
from tiny_run import text_pairs, write_beir, write_lines

from colbert_jax.errors import UserError
from colbert_jax.interruption import hold_workdir, stop_notice

STEPS = 150  # more than are made before the notice comes
RUN: dict[str, Any] = {
    "total_steps": STEPS,
    "log_every_steps": 1,
    "export": True,
    "evals.every_steps": 0,
    "evals.best": "",
    "evals.baselines": False,
    "checkpoint.every_steps": 60,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Path:
    """Pairs, and beside them a BEIR folder."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = text_pairs(real_texts, 48)
    write_beir(folder / "beir", pairs, queries=1)
    return write_lines(folder / "pairs.jsonl", pairs)


def wait_for_steps(workdir: Path, count: int, processes: list[subprocess.Popen]) -> None:
    """Waits until a run has logged as many steps."""
    path = workdir / "metrics.jsonl"
    for _ in range(2400):
        if path.is_file() and path.read_text().count("\n") >= count:
            return
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)
    raise AssertionError(f"{workdir} has not come to step {count}")


def end(process: subprocess.Popen) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=240)
    return process.returncode, printed


def last_line(printed: str) -> str:
    return printed.strip().splitlines()[-1]


def training(workdir: Path) -> list[tuple[float, float, float]]:
    """Step, loss and gradient norm of every logged step, in the order of the log."""
    rows = [row for row in metrics(workdir) if "train/loss" in row]
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def interrupted(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that was asked to stop, with a second one tried meanwhile; then started again."""
    folder = tmp_path_factory.mktemp("runs")
    workdir = folder / "stopped"
    first = start(workdir, rows, 2, {}, **RUN)
    wait_for_steps(workdir, 3, [first])
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second has started
    second = end(start(workdir, rows, 2, {}, **RUN))
    still_going = first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    stopped = end(first)
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    logged = training(workdir)
    again = end(start(workdir, rows, 2, {}, **RUN))
    undisturbed = end(start(folder / "undisturbed", rows, 2, {}, **RUN))
    return {
        "second": second,
        "still_going": still_going,
        "stopped": stopped,
        "saved": saved,
        "logged": logged,
        "again": again,
        "undisturbed": undisturbed,
        "folder": folder,
    }


def test_a_second_run_in_the_same_folder_is_refused(interrupted: dict[str, Any]) -> None:
    status, printed = interrupted["second"]
    assert status == 2 and interrupted["still_going"]
    assert last_line(printed).startswith("error: ") and "is in use by a run" in last_line(printed)
    assert interrupted["undisturbed"][0] == 0  # and another folder is another matter


def test_a_run_that_is_asked_to_stop_saves_that_step_and_says_so(
    interrupted: dict[str, Any],
) -> None:
    status, printed = interrupted["stopped"]
    assert status == 75
    step = interrupted["saved"][-1]
    assert 3 <= step < STEPS and step == interrupted["logged"][-1][0]
    assert last_line(printed) == (
        f"Stopped after step {step} as asked, which is saved in "
        f"{interrupted['folder'] / 'stopped'}: start the same command to go on."
    )
    assert "Traceback" not in printed


def test_it_goes_on_as_if_it_had_not_stopped(interrupted: dict[str, Any]) -> None:
    status, printed = interrupted["again"]
    assert status == 0, printed[-2000:]
    assert f"going on after {interrupted['saved'][-1]}" in printed
    stopped, undisturbed = (interrupted["folder"] / name for name in ("stopped", "undisturbed"))
    assert [step for step, _, _ in training(stopped)] == list(range(1, STEPS + 1))
    assert training(stopped) == training(undisturbed)
    file = Path(f"export-{STEPS}") / "model.safetensors"
    ours, theirs = load_file(stopped / file), load_file(undisturbed / file)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            found += [child, *descendants(child)]
    return found


def command_of(process: int) -> str:
    """The command line of a process; empty where it has ended, reaped or not."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_a_notice_to_all_processes_of_a_job_reaches_readers_that_are_still_needed(
    rows: Path, tmp_path: Path
) -> None:
    """As Slurm sends it: to the processes that read and encode batches, too."""
    workdir = tmp_path / "run"
    process = start(workdir, rows, 1, {}, **RUN | {"total_steps": 20_000, "input.workers": 1})
    wait_for_steps(workdir, 3, [process])
    readers = descendants(process.pid)
    assert readers
    for reader in readers:
        os.kill(reader, signal.SIGTERM)
    before = len(metrics(workdir))
    wait_for_steps(workdir, before + 20, [process])  # the batches do not end
    process.send_signal(signal.SIGTERM)
    status, printed = end(process)
    assert status == 75, printed[-2000:]
    assert "\nStopped after step " in printed
    assert [command for reader in readers if (command := command_of(reader))] == []


def test_a_notice_to_one_of_two_processes_stops_both_after_the_same_step(
    rows: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "joined"
    # They need seconds to agree on a step, and so many steps that these last.
    settings = RUN | {"total_steps": 20_000, "checkpoint.every_steps": 0}
    both = [start(workdir, rows, 1, who, **settings) for who in two_joined()]
    wait_for_steps(workdir, 3, both)
    both[1].send_signal(signal.SIGTERM)
    ends = [end(process) for process in both]
    assert [status for status, _ in ends] == [75, 75], ends
    steps = {line for _, printed in ends for line in printed.splitlines() if "Stopped" in line}
    assert len(steps) == 1
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert f"Stopped after step {saved} as asked" in steps.pop()
    assert [row["step"] for row in metrics(workdir)] == list(range(1, saved + 1))


def test_a_notice_is_seen_once_it_came_and_the_handler_goes_away() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_notice() as asked:
        assert not asked(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked(2) and asked(3)
    assert signal.getsignal(signal.SIGTERM) == before
    with stop_notice() as asked:
        assert not asked(1)


def test_a_run_in_a_thread_can_be_made_too() -> None:
    found: list[bool] = []

    def work() -> None:
        with stop_notice() as asked:
            found.append(asked(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_folder_is_free_again_however_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError), hold_workdir(tmp_path):
        with pytest.raises(UserError, match="is in use by a run"), hold_workdir(tmp_path):
            pass
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with hold_workdir(tmp_path):  # another host of the same run
            pass
        raise RuntimeError
    monkeypatch.undo()
    with hold_workdir(tmp_path):
        pass


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any, timeout: float) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    reached = False
    with caplog.at_level("WARNING"), hold_workdir(tmp_path):
        reached = True
    assert reached and "cannot be locked (no flock)" in caplog.text


def test_what_is_saved_is_json_that_the_next_session_reads(interrupted: dict[str, Any]) -> None:
    record = json.loads((interrupted["folder"] / "stopped" / "run.json").read_text())
    assert [s["first_step"] for s in record["sessions"]] == [0, interrupted["saved"][-1]]
