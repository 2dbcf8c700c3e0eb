"""A trial picks the fastest program that runs and has the right numbers, and says how each did."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax import trial
from colbert_jax.trial import fastest

RIGHT = (np.array([3.0, 4.0], np.float32), np.array([[1.0, -2.0]], np.float32))


def giving(*arrays: Any) -> Callable[[], Any]:
    return lambda: tuple(jnp.asarray(x) for x in arrays)


def failing(message: str = "no kernel for sm_70") -> Callable[[], Any]:
    def run() -> None:
        raise NotImplementedError(message)

    return run


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """Seconds that a call of each program is to take."""
    seconds: dict[Any, float] = {}
    monkeypatch.setattr(trial, "_seconds", lambda run: seconds[run])
    return seconds


def timed(takes: dict[Any, float], runs: Mapping[str, tuple[Callable[[], Any], float]]) -> Any:
    takes.update({run: seconds for run, seconds in runs.values()})
    return fastest("sums of 2", {name: run for name, (run, _) in runs.items()})


@pytest.mark.parametrize(("ours", "best"), [(0.0012, "ours"), (0.0056, "xla")])
def test_the_fastest_is_taken(ours: float, best: str, takes: dict[Any, float]) -> None:
    runs = {"xla": (giving(*RIGHT), 0.0034), "ours": (giving(*RIGHT), ours)}
    line = f"sums of 2 by {best}: xla 3.40 ms, ours {1e3 * ours:.2f} ms"
    assert timed(takes, runs) == (best, line)


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("factor", [1.03, np.nan, -1.0])
def test_what_gives_other_numbers_is_never_taken(
    wrong: int, factor: float, takes: dict[Any, float]
) -> None:
    arrays = list(RIGHT)
    arrays[wrong] = arrays[wrong] * np.float32(factor)
    runs = {"xla": (giving(*RIGHT), 1.0), "ours": (giving(*arrays), 0.0)}
    line = "sums of 2 by xla: xla 1000.00 ms, ours gives other numbers here"
    assert timed(takes, runs) == ("xla", line)


def test_rounding_is_no_other_number(takes: dict[Any, float]) -> None:
    rounded = [x * np.float32(1.01) for x in RIGHT]
    runs = {"xla": (giving(*RIGHT), 1.0), "ours": (giving(*rounded), 0.5)}
    assert timed(takes, runs)[0] == "ours"


def test_what_does_not_run_is_passed_over_with_its_reason_in_one_line(
    takes: dict[Any, float],
) -> None:
    runs = {"xla": (giving(*RIGHT), 0.001), "ours": (failing("no kernel\n  for sm_70."), 0.0)}
    reason = "ours does not run here (NotImplementedError: no kernel for sm_70)"
    assert timed(takes, runs) == ("xla", f"sums of 2 by xla: xla 1.00 ms, {reason}")


def test_a_library_with_several_kernels_gives_a_reason_for_each(takes: dict[Any, float]) -> None:
    def run() -> None:
        reasons = [NotImplementedError("sm_70"), ValueError("no such mask")]
        raise ExceptionGroup("all implementations failed", reasons)

    _, line = timed(takes, {"xla": (giving(*RIGHT), 0.001), "ours": (run, 0.0)})
    assert line.endswith("here (NotImplementedError: sm_70; ValueError: no such mask)")


def test_where_the_first_does_not_run_the_next_one_says_what_is_right(
    takes: dict[Any, float],
) -> None:
    other = [2 * x for x in RIGHT]
    runs = {
        "xla": (failing("out of memory"), 0.0),
        "a": (giving(*RIGHT), 0.002),
        "b": (giving(*other), 0.001),
        "c": (giving(*RIGHT), 0.001),
    }
    best, line = timed(takes, runs)
    assert best == "c"
    assert "xla does not run here" in line and "b gives other numbers here" in line


def test_where_nothing_runs_the_first_is_left_to_say_why() -> None:
    best, line = fastest("sums of 2", {"xla": failing(), "ours": failing()})
    assert best == "xla"
    assert line.count("does not run here") == 2


def test_the_right_numbers_are_found_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run() -> Any:
        seen.append(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
        return giving(*RIGHT)()

    monkeypatch.setattr(trial, "_seconds", lambda run: 1.0)
    fastest("sums of 2", {"xla": run, "ours": run})
    assert seen == ["highest", None, None]


def test_a_call_is_timed_by_the_median_of_rounds_after_one_that_warms_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    took = iter([90, 1, 5, 2, 4, 70])
    clock = [0.0]
    calls = []
    monkeypatch.setattr(trial.time, "perf_counter", lambda: clock[0])

    def wait(results: list[Any]) -> None:
        calls.append(len(results))
        clock[0] += next(took)

    monkeypatch.setattr(trial.jax, "block_until_ready", wait)
    assert trial._seconds(lambda: 1) == 4 / trial.CALLS
    assert next(took, None) is None
    assert calls == [trial.CALLS] * (1 + trial.ROUNDS)
