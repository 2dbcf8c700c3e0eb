"""What steps gave and took, by the clock: logged, and shown while they run."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

from colbert_jax.metric_log import MetricLog


class Meter:
    """Logs and shows the metrics of steps, and how fast they are made.

    The clock runs inside `running`, but not inside `paused`.

    Attributes:
      every_steps: metrics are fetched, logged and shown at multiples of it; 0 leaves only the last
        step's.
      peak_flops: FLOP/s of all devices, what `train/mfu` is a share of.
    """

    def __init__(self, log: MetricLog, every_steps: int, peak_flops: float):
        """A meter that writes to a log; the rest as the attributes."""
        self.every_steps = every_steps
        self.peak_flops = peak_flops
        self._log = log

    @contextlib.contextmanager
    def running(self, step: int, total_steps: int) -> Iterator[None]:
        """Starts the clock after a step, and shows a bar until the block is left."""
        self._total_steps = total_steps
        self._since, self._waited, self._last = time.perf_counter(), 0.0, step
        with tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            desc="train",
            disable=jax.process_index() > 0,
            dynamic_ncols=True,
        ) as self._bar:
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as waiting for input."""
        since = time.perf_counter()
        yield
        self._waited += time.perf_counter() - since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the block: it is no part of training."""
        since = time.perf_counter()
        yield
        self._since += time.perf_counter() - since

    def due(self, step: int) -> bool:
        """Whether a step's metrics are to be noted."""
        every = self.every_steps
        return step == self._total_steps or (every > 0 and step % every == 0)

    def note(self, step: int, metrics: Mapping[str, Any], pairs: int) -> None:
        """Waits for a step to end, and logs and shows what it gave.

        Args:
          step: which.
          metrics: of `train_step`, on the devices.
          pairs: in the global batch.
        """
        values = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
        del values["train/skipped_in_row"], values["train/stop"]  # for whoever stops the run
        steps, now = step - self._last, time.perf_counter()
        seconds = (now - self._since) / steps
        values |= {
            "train/pairs_per_second": pairs / seconds,
            "train/tokens_per_second": values.pop("train/tokens") / seconds,
            "train/mfu": values.pop("train/model_flops") / seconds / self.peak_flops,
            "time/step": seconds,
            "time/data_wait": self._waited / steps,
        }
        self._log.write(step, values)
        self._bar.update(steps)
        self._bar.set_postfix_str(progress_text(values))
        self._since, self._waited, self._last = time.perf_counter(), 0.0, step


def progress_text(values: Mapping[str, float]) -> str:
    """The right end of the progress bar; the time left is the bar's own."""
    return (
        f"loss {values['train/loss']:.3f}, accuracy {values['train/accuracy']:.1%}, "
        f"{values['train/pairs_per_second']:,.0f} pairs/s"
    )
