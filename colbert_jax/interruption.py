"""One run at a time in a folder, which stops when it is asked to and loses nothing.

Platforms send SIGTERM before they take a machine away. Where several hosts train together, a notice
to any of them reaches all through JAX's own service, and all stop after the same step.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from colbert_jax.errors import UserError

LOCK_FILE = "run.lock"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_notice() -> Iterator[Callable[[int], bool]]:
    """Watches for a notice to stop.

    Yields:
      `asked(step)`, which every host calls after every step, and which is true on all of them after
      the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python tells its main thread alone
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def hold_workdir(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of a folder until the end, however that comes.

    A file system that knows no locks is warned about and does no harm.

    Raises:
      UserError: another run is in it.
    """
    if jax.process_index() > 0:  # the first host speaks for all
        yield
        return
    lock = FileLock(workdir / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{workdir} is in use by a run that is still going: wait for it, stop it, or choose "
            "another --workdir."
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning(
            "%s cannot be locked (%s): take care that no second run uses it.", workdir, error
        )
    try:
        yield
    finally:
        lock.release()
