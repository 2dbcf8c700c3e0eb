"""What the benchmarks share: flags, processes, alternating rounds, the report."""

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from colbert_jax.errors import UserError

HERE = Path(__file__).resolve().parent
WRONG_ARGUMENTS, FAILED = 2, 1
AGREEMENT = 1e-3  # relative, of the same number computed by two contestants in float32

# Prints PyLate's version without importing it, which takes many seconds.
ASK_VERSION = "import importlib.metadata as m; print(m.version('pylate'))"
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")


class Failure(Exception):
    """The benchmark cannot give numbers; the message is one sentence for the user."""


class Parser(argparse.ArgumentParser):
    """Flags with hyphens or underscores; a mistake is one sentence and status 2."""

    def __init__(self, description: str, peer: bool = True):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--rounds", type=positive, default=5, help="timed passes of each")
        self.add_argument("--json", action="store_true", help="print one JSON object, no table")
        if not peer:
            return
        self.add_argument(
            "--peer-python",
            metavar="PATH",
            help="an interpreter with PyLate 1.6; by default this one, if it has it",
        )
        self.add_argument(
            "--peer-score-mini-batch",
            type=positive,
            default=16,
            metavar="N",
            help="score_mini_batch_size of the tuned PyLate (default 16)",
        )

    def parse(self) -> argparse.Namespace:
        """The flags of the command line."""
        dashed = [_dashed(argument) for argument in sys.argv[1:]]
        return self.parse_args(dashed)

    def error(self, message: str) -> NoReturn:
        """Ends the program with one sentence."""
        print(f"error: {message}; see --help.", file=sys.stderr)
        sys.exit(WRONG_ARGUMENTS)


def _dashed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
    return value


def find_peer(parser: Parser, path: str | None) -> str | None:
    """The interpreter that PyLate runs in, or None, said on standard error."""
    if path is None:
        if _pylate_version(sys.executable):
            return sys.executable
        note("PyLate is left out: this interpreter does not have it, and no --peer-python is given")
        return None
    if not shutil.which(path):
        parser.error(f"--peer-python={path}: there is no such interpreter")
    if not _pylate_version(path):
        parser.error(f"--peer-python={path}: that interpreter does not have PyLate")
    return path


def _pylate_version(python: str) -> str:
    try:
        done = subprocess.run(
            [python, "-c", ASK_VERSION],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment() -> dict[str, str]:
    """The variables of a measured process: no network, and no memory taken in advance."""
    variables = {key: value for key, value in os.environ.items() if key not in HIDDEN}
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share one accelerator
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    } | variables


def note(text: str) -> None:
    """Says something beside the report."""
    print(text, file=sys.stderr, flush=True)


class Worker:
    """A contestant in a process of its own."""

    def __init__(self, name: str, python: str, program: str, setup: dict[str, Any]):
        """Starts the process; several can set themselves up at the same time."""
        self.name = name
        self.setup = setup
        self.error = ""
        self.seconds: list[float] = []
        self.numbers: dict[str, float] = {}
        # What it prints is kept aside, and shown only when it fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [python, str(HERE / program)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._send(json.dumps(setup))

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the process says about itself, waited for."""
        return self._answer()

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to a request; a failure is kept in `error` and answered by nothing."""
        _ = self.facts
        if self.error:
            return {}
        self._send(request)
        return self._answer()

    def _send(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the answer will say
            print(line, file=self._process.stdin, flush=True)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            line = json.dumps({"error": f"its process ended with status {self._process.wait()}"})
        answer = json.loads(line)
        if "error" in answer:
            self.error = answer["error"]
            note(f"{self.name} failed: {self.error}\n{self._last_lines()}")
            return {}
        return answer

    def run(self, timed: bool) -> None:
        """One pass, whose seconds are kept where it is `timed`."""
        numbers = self.ask("run")
        if numbers:
            took = numbers.pop("seconds")
            self.numbers = self.numbers or numbers  # of the first pass: later ones have learned
            if timed:
                self.seconds.append(took)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _last_lines(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-15:])


def measure(workers: Sequence[Worker], rounds: int, check: Callable[[], None]) -> None:
    """Warms every worker up, checks what they computed, and times them in turn.

    All stay alive; those that do not run wait. Each round begins with another one, so that none is
    always measured first.

    Args:
      workers: the contestants.
      rounds: timed passes of each.
      check: called after the first pass of all; raises `Failure` where they disagree.
    """
    for worker in workers:
        worker.run(timed=False)
    check()
    for worker in workers:
        worker.ask("mark")
    for turn in range(rounds):
        first = turn % len(workers)
        for worker in [*workers[first:], *workers[:first]]:
            worker.run(timed=True)
        note(f"round {turn + 1} of {rounds} done")


def check_agreement(workers: Sequence[Worker], name: str, bound: float = AGREEMENT) -> None:
    """Raises `Failure` where a number of the first pass is not the same for all workers."""
    values = {w.name: w.numbers[name] for w in workers if name in w.numbers}
    middle = statistics.median(values.values()) if values else 0.0
    if any(not abs(value - middle) <= bound * abs(middle) for value in values.values()):
        listed = ", ".join(f"{key} {value:.6g}" for key, value in values.items())
        raise Failure(f"the contestants do not compute the same {name}: {listed}.")


def check_platforms(workers: Sequence[Worker]) -> None:
    """Raises `Failure` where contestants stand on different kinds of device, or ours has failed."""
    for worker in workers:
        _ = worker.facts
    if workers[0].error:
        raise Failure(f"our own program does not run: {workers[0].error}.")
    found = {w.name: w.facts["platform"] for w in workers if not w.error}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} on {platform}" for name, platform in found.items())
        raise Failure(f"the contestants run on different kinds of device ({listed}).")


def make_row(worker: Worker, shape: dict[str, Any]) -> dict[str, Any]:
    """A contestant's row of the report."""
    row: dict[str, Any] = {"name": worker.name} | worker.facts
    if worker.error or not worker.seconds:
        return row | {"seconds": None, "error": worker.error, "shape": shape}
    median = statistics.median(worker.seconds)
    return row | {
        "seconds": median,
        "spread": [min(worker.seconds), max(worker.seconds)],
        "rounds": len(worker.seconds),
        "pairs_per_second": shape["pairs"] / median,
        "peak_memory_bytes": worker.ask("memory").get("peak"),
        "shape": shape,
        **worker.numbers,
    }


def ratios_of(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """How much faster ours is than each other row; against PyLate, than its fastest set-up."""
    seconds = {row["name"]: row["seconds"] for row in rows if row.get("seconds")}
    if "ours" not in seconds:
        raise Failure("our own program failed, see above.")
    own = seconds.pop("ours")
    ratios: dict[str, float | None] = {f"speed_vs_{k}": v / own for k, v in seconds.items()}
    peers = [row for row in rows if row["name"] in seconds and row["name"].startswith("pylate")]
    ratios["speed_vs_pylate"] = min((r["seconds"] for r in peers), default=0.0) / own or None
    least = min((r["peak_memory_bytes"] for r in peers), default=None)
    ratios["memory_vs_pylate"] = rows[0]["peak_memory_bytes"] / least if least else None
    return ratios


def in_seconds(duration: float) -> str:
    """A duration for a table: milliseconds, and three digits of what takes only a few of them."""
    return f"{duration:.3f}" if duration >= 0.1 else f"{duration:.3g}"


def print_table(result: dict[str, Any]) -> None:
    """The report for people."""
    print(f"{'':16}{'median s':>10}{'min':>9}{'max':>9}{'pairs/s':>10}{'peak MB':>10}")
    for row in result["rows"]:
        if not row.get("seconds"):
            print(f"{row['name']:16}{row.get('error') or 'compiled only'}")
            continue
        median, low, high = map(in_seconds, (row["seconds"], *row["spread"]))
        print(
            f"{row['name']:16}{median:>10}{low:>9}{high:>9}"
            f"{row['pairs_per_second']:10.1f}{(row['peak_memory_bytes'] or 0) / 2**20:10,.0f}"
        )
    print()
    for name, ratio in result["ratios"].items():
        print(f"{name:28}{'not measured' if ratio is None else f'{ratio:.3f}'}")


def run_program(
    main: Callable[[], dict[str, Any]],
    as_json: bool,
    show: Callable[[dict[str, Any]], None] = print_table,
) -> None:
    """Runs a benchmark, prints its report, and turns failures into one sentence."""
    try:
        result = main()
    except UserError as error:
        note(f"error: {error}")
        sys.exit(WRONG_ARGUMENTS)
    except Failure as error:
        note(f"error: {error}")
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
