"""Rates by the clock: what counts as training, what as waiting, and what is no part of either."""

import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from colbert_jax import meter as meter_module
from colbert_jax.meter import Meter
from colbert_jax.metric_log import MetricLog, read_metrics

METRICS = {
    **{name: jnp.float32(1) for name in ("loss", "accuracy", "skipped")},
    **{name: jnp.float32(0) for name in ("skipped_in_row", "stop")},
    "tokens": jnp.float32(600),
    "model_flops": jnp.float32(3e6),
}


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    return clock


def test_rates_are_of_the_time_that_was_not_paused(clock: Clock, tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    meter = Meter(log, every_steps=2, peak_flops=1e7)
    with meter.running(step=2, total_steps=6):
        with meter.waiting():
            clock.now += 1
        clock.now += 3  # a step
        with meter.paused():
            clock.now += 1000  # an evaluation
        clock.now += 4  # another
        meter.note(4, METRICS, pairs=40)
        with meter.paused():
            clock.now += 1000
        with meter.waiting():
            clock.now += 2
        clock.now += 1
        meter.note(5, METRICS, pairs=40)
    log.close()

    two, one = read_metrics(tmp_path)
    assert (two["step"], two["time/step"], two["time/data_wait"]) == (4, 4.0, 0.5)
    assert two["train/pairs_per_second"] == 10 and two["train/tokens_per_second"] == 150
    assert math.isclose(two["train/mfu"], 3e6 / 4 / 1e7)
    # What came before the last note counts no more.
    assert (one["step"], one["time/step"], one["time/data_wait"]) == (5, 3.0, 2.0)
    assert one["train/loss"] == 1 and "train/stop" not in one


@pytest.mark.parametrize(
    ("every", "due"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])]
)
def test_the_last_step_is_always_due(every: int, due: list[int], tmp_path: Path) -> None:
    meter = Meter(MetricLog(tmp_path), every, peak_flops=1.0)
    with meter.running(step=0, total_steps=5):
        assert [step for step in range(1, 6) if meter.due(step)] == due


def test_the_bar_shows_steps_done_and_how_they_go(
    clock: Clock,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("COLUMNS", "LINES"):  # of a terminal that is wide enough
        monkeypatch.setenv(name, "200")
    meter = Meter(MetricLog(tmp_path), every_steps=1, peak_flops=1.0)
    with meter.running(step=1, total_steps=4):
        clock.now += 2
        meter.note(3, METRICS, pairs=2000)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "3/4" in shown and "loss 1.000, accuracy 100.0%, 2,000 pairs/s" in shown
