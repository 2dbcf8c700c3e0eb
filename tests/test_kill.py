"""A run that is killed, whenever that is, goes on as if it had not been; one that lost a host ends.

SIGKILL is what the system sends when it is out of memory, and what a machine that vanishes comes
to: nothing of the process runs any more, and what it was writing stays as it is.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_checkpoint import everything, without_times
from test_interruption import last_line
from test_processes import metrics, start, two_joined
from tiny_run import text_pairs, write_beir, write_lines

from colbert_jax.checkpoint import _UNFINISHED
from colbert_jax.interruption import LOCK_FILE
from colbert_jax.run import open_workdir
from colbert_jax.sessions import read_sessions
from colbert_jax.start import CONFIG_FILE

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("KILL_SEED", time.time_ns() % 2**32))  # other moments every time
PATIENCE = 900  # seconds for what takes ten on an idle machine
STEPS, EVERY, EVALUATED = 160, 8, [60, 120, 160]
RUN: dict[str, Any] = {
    "total_steps": STEPS,
    "log_every_steps": 1,
    "export": True,
    "checkpoint.every_steps": EVERY,
    "evals.every_steps": 60,
    "evals.best": "nDCG@10",
    "evals.baselines": False,
    "model.encoder.num_hidden_layers": 1,
}
# JAX keeps programs that took a second to compile. None does here, but together they take several.
QUICK = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}

# When to kill a process that is about to start: what has to be seen first, and the seconds then.
Moment = tuple[Callable[[], bool], float]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Path:
    """Pairs, and beside them a BEIR folder."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = text_pairs(real_texts, 48)
    write_beir(folder / "beir", pairs, queries=8)
    return write_lines(folder / "pairs.jsonl", pairs)


# --- how far a run is, seen from outside ---


def logged(workdir: Path) -> int:
    """The last step in the log."""
    path = workdir / "metrics.jsonl"
    steps = re.findall(rb'"step": (\d+),', path.read_bytes()[-2000:] if path.is_file() else b"")
    return int(steps[-1]) if steps else 0


def saved(workdir: Path) -> int:
    """The newest checkpoint."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def states(workdir: Path, pattern: str) -> set[tuple[str, int, int]]:
    """Files and folders, and what changes when one is written anew."""
    found = set()
    for path in workdir.glob(pattern):
        try:
            found.add((path.name, path.stat().st_ino, path.stat().st_ctime_ns))
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def changes(workdir: Path, pattern: str) -> Callable[[], set[str]]:
    """Gives the names of files and folders that were written since this was called."""
    before = states(workdir, pattern)
    return lambda: {name for name, *_ in states(workdir, pattern) - before}


# --- moments ---


def while_starting(workdir: Path, rng: random.Random, step: int) -> Moment:
    return lambda: True, rng.uniform(0.2, 6)


def in_a_step(workdir: Path, rng: random.Random, step: int) -> Moment:
    """In that step, or where the run is if that is further."""
    begun = changes(workdir, "metrics.jsonl")
    return lambda: bool(begun()) and logged(workdir) >= step, rng.uniform(0, 0.03)


def in_a_save(workdir: Path, rng: random.Random, step: int) -> Moment:
    """In the first save that begins after that step, or the next if the run is further."""
    begun, after = changes(workdir, f"checkpoints/*{_UNFINISHED}"), max(saved(workdir), step)
    return (
        lambda: any(int(name.removesuffix(_UNFINISHED)) > after for name in begun()),
        rng.uniform(0, 0.05),
    )


def in_the_last_evaluation(workdir: Path, rng: random.Random, step: int) -> Moment:
    begun = changes(workdir, "metrics.jsonl")
    return lambda: bool(begun()) and logged(workdir) == STEPS, rng.uniform(0, 0.1)


def in_the_last_save(workdir: Path, rng: random.Random, step: int) -> Moment:
    written = changes(workdir, "results.json")
    return lambda: bool(written()), rng.uniform(0, 0.1)


def in_the_export(workdir: Path, rng: random.Random, step: int) -> Moment:
    begun = changes(workdir, f".export-{STEPS}-*")
    return lambda: bool(begun()), rng.uniform(0, 0.02)


def plan(rng: random.Random) -> list[tuple[Callable[[Path, random.Random, int], Moment], int]]:
    """Twenty moments: before there is any checkpoint, anywhere, and after the last step.

    Those within the run are drawn one from each stretch of two saves, to fall all over it.
    """
    anywhere = [while_starting] * 5 + [in_a_step] * 3 + [in_a_save] * 6
    rng.shuffle(anywhere)
    stretches = iter(range(EVERY, STEPS - EVERY, 2 * EVERY))
    early = rng.randint(1, EVERY - 3)  # before the first save
    return [
        *((while_starting, 0), (in_a_step, early), (while_starting, 0)),
        *(
            (kind, 0 if kind is while_starting else next(stretches) + rng.randrange(2 * EVERY))
            for kind in anywhere
        ),
        *((in_the_last_evaluation, 0), (in_the_last_save, 0), (in_the_export, 0)),
    ]


# --- the run ---


@contextlib.contextmanager
def running(*arguments: Any, **settings: Any) -> Iterator[subprocess.Popen]:
    """As `start`, and leaves nothing behind."""
    process = start(*arguments, session=True, **settings)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def end(process: subprocess.Popen) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, printed


def kill_at(process: subprocess.Popen, moment: Moment) -> None:
    """Waits for a moment and kills the process, which must not have ended before."""
    reached, delay = moment
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.002)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    status, printed = end(process)
    assert status == -signal.SIGKILL, f"ended with {status} by itself:\n{printed[-3000:]}"


@pytest.fixture(scope="module")
def killed(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that was killed twenty times and went on each time, and one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    workdir, undisturbed = folder / "killed", folder / "undisturbed"
    settings = RUN | {"compilation_cache": folder / "compiled"}
    # It saves little, and so says too that saving changes nothing.
    saving = {"checkpoint.every_steps": 0}
    with running(undisturbed, rows, 1, QUICK, **settings | saving) as process:
        status, printed = end(process)
        assert status == 0, printed[-3000:]
    settings |= {"input.cache_dir": folder / "corpus"}  # so that its corpus is prepared anew
    rng = random.Random(SEED)
    kills: list[tuple[str, int, int, set[str]]] = []
    for choose, step in plan(rng):
        unfinished = changes(workdir, f"checkpoints/*{_UNFINISHED}")
        moment = choose(workdir, rng, step)
        with running(workdir, rows, 1, QUICK, **settings) as process:
            try:
                kill_at(process, moment)
            except AssertionError as error:
                told = f"KILL_SEED={SEED}, {choose.__name__}, after {kills}"
                raise AssertionError(f"{told}: {error}") from None
        kills.append((choose.__name__, logged(workdir), saved(workdir), unfinished()))
    with running(workdir, rows, 1, QUICK, **settings) as process:
        last = end(process)
    return {"undisturbed": undisturbed, "workdir": workdir, "kills": kills, "last": last}


def told(killed: dict[str, Any]) -> str:
    lines = [f"{name}: logged {a}, saved {b}, in {c or '-'}" for name, a, b, c in killed["kills"]]
    return "\n".join([f"KILL_SEED={SEED}", *lines, killed["last"][1][-2000:]])


def test_the_kills_fell_everywhere_and_each_lost_little(killed: dict[str, Any]) -> None:
    kills = killed["kills"]
    newest = [newest for _, _, newest, _ in kills]
    assert len(kills) == 20, told(killed)
    assert newest == sorted(newest), told(killed)  # no kill took a checkpoint away
    assert newest[:3] == [0] * 3 and newest[-1] == STEPS, told(killed)
    assert sum(bool(unfinished) for *_, unfinished in kills) >= 5, told(killed)
    assert len(set(newest)) >= 8, told(killed)  # the run got on between kills
    sessions = read_sessions(killed["workdir"])
    first = [session["first_step"] for session in sessions]
    assert first == sorted(first) and set(first) <= {0, *newest}, told(killed)


def test_after_twenty_kills_the_same_command_ends_well(killed: dict[str, Any]) -> None:
    status, printed = killed["last"]
    assert status == 0 and f"going on after {STEPS}" in printed, told(killed)
    assert "Traceback" not in printed


def test_the_log_has_every_step_once_with_the_same_numbers(killed: dict[str, Any]) -> None:
    expected = without_times(metrics(killed["undisturbed"]))
    trained = [row["step"] for row in expected if "train/loss" in row]
    assert trained == list(range(1, STEPS + 1))
    assert [row["step"] for row in expected if "eval/beir/nDCG@10" in row] == EVALUATED
    assert {"train/grad_norm", "train/accuracy", "train/learning_rate"} <= expected[0].keys()
    assert without_times(metrics(killed["workdir"])) == expected, told(killed)


def test_weights_moments_and_position_are_the_same_bits(killed: dict[str, Any]) -> None:
    ours, theirs = killed["workdir"], killed["undisturbed"]
    file = Path(f"export-{STEPS}") / "model.safetensors"
    exported = load_file(theirs / file)
    assert exported.keys() == load_file(ours / file).keys()
    for name, array in load_file(ours / file).items():
        np.testing.assert_array_equal(array, exported[name], err_msg=f"{name}\n{told(killed)}")
    kept = everything(theirs, STEPS)
    assert any("opt" in name for name in kept)
    for name, array in everything(ours, STEPS).items():
        np.testing.assert_array_equal(array, kept.pop(name), err_msg=f"{name}\n{told(killed)}")
    assert not kept
    position = Path("checkpoints") / str(STEPS) / "input" / "metadata"
    assert (ours / position).read_text() == (theirs / position).read_text()


def test_what_kills_left_of_checkpoints_is_gone(killed: dict[str, Any]) -> None:
    found = {path.name for path in (killed["workdir"] / "checkpoints").iterdir()}
    best = max(
        (row["eval/beir/nDCG@10"], -row["step"])
        for row in metrics(killed["workdir"])
        if "eval/beir/nDCG@10" in row
    )
    assert found == {str(STEPS), str(STEPS - EVERY), str(-best[1])}, told(killed)


def test_a_folder_that_a_kill_left_without_a_config_is_taken_up(tmp_path: Path) -> None:
    # What there is for some milliseconds of a first start, too few for a kill to be aimed at them.
    (tmp_path / LOCK_FILE).touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / f"{CONFIG_FILE}.partial").write_text('{"seed')
    assert open_workdir(tmp_path) == tmp_path


# --- one of two processes ---


JOINED: dict[str, Any] = {
    "total_steps": 360,
    "checkpoint.every_steps": 120,
    "evals.every_steps": 0,
    "evals.best": "",
    "evals.baselines": False,
    "model.encoder.num_hidden_layers": 1,
}
SENTENCE = re.compile(
    r"error: another host of this run is gone \(.+\): end those that are left, and start the same "
    r"command on all again, to go on from the newest checkpoint\."
)
# Of JAX's own service, whose thread may be the first to notice, and ends the process at once.
OF_JAX = "Terminating process because the JAX distributed service detected fatal errors"


@contextlib.contextmanager
def running_both(*arguments: Any, **settings: Any) -> Iterator[list[subprocess.Popen]]:
    workdir, rows = arguments
    with contextlib.ExitStack() as both:
        yield [
            both.enter_context(running(workdir, rows, 1, QUICK | who, **settings))
            for who in two_joined()
        ]


def between_saves(workdir: Path) -> Moment:
    """When some steps after a checkpoint are in the log, and no save is going on."""
    begun, after = changes(workdir, "metrics.jsonl"), saved(workdir)

    def reached() -> bool:
        going_on = any(workdir.glob(f"checkpoints/*{_UNFINISHED}"))
        return bool(begun()) and not going_on and logged(workdir) > saved(workdir) + 2 > after + 2

    return reached, 0.0


@pytest.fixture(scope="module")
def bereft(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two processes that lost the second, went on, lost the first, and went on."""
    folder = tmp_path_factory.mktemp("joined")
    workdir, undisturbed = folder / "bereft", folder / "undisturbed"
    settings = JOINED | {"compilation_cache": folder / "compiled"}
    with running_both(undisturbed, rows, **settings) as both:
        ends = [end(process) for process in both]
        assert [status for status, _ in ends] == [0, 0], ends
    found: dict[str, Any] = {"workdir": workdir, "undisturbed": undisturbed}
    for lost, left in ((1, 0), (0, 1)):
        moment = between_saves(workdir)
        with running_both(workdir, rows, **settings) as both:
            kill_at(both[lost], moment)
            began = time.monotonic()
            found[f"lost {lost}"] = *end(both[left]), time.monotonic() - began
    with running_both(workdir, rows, **settings) as both:
        found["last"] = [end(process) for process in both]
    return found


def test_a_run_that_loses_a_host_says_so_and_ends(bereft: dict[str, Any]) -> None:
    status, printed, seconds = bereft["lost 1"]
    assert status == 69 and SENTENCE.fullmatch(last_line(printed)), printed[-3000:]
    assert "Traceback" not in printed and seconds < 60


def test_a_run_that_loses_its_first_host_says_so_and_ends(bereft: dict[str, Any]) -> None:
    status, printed, seconds = bereft["lost 0"]
    assert seconds < 60
    if status == -signal.SIGABRT:
        assert OF_JAX in printed
    else:
        assert status == 69 and SENTENCE.search(printed), printed[-3000:]


def test_what_lost_hosts_goes_on_as_if_it_had_not(bereft: dict[str, Any]) -> None:
    ends = bereft["last"]
    assert [status for status, _ in ends] == [0, 0], ends
    expected = without_times(metrics(bereft["undisturbed"]))
    trained = [row["step"] for row in expected if "train/loss" in row]
    assert trained == list(range(1, JOINED["total_steps"] + 1))
    assert without_times(metrics(bereft["workdir"])) == expected
    first = [session["first_step"] for session in read_sessions(bereft["workdir"])]
    assert len(first) == 3 and 0 < first[1] < first[2], first
