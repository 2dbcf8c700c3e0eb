"""Several programs for the same numbers, tried on the device at hand: the fastest that is right."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from colbert_jax.errors import brief

# Of a norm. Formats of tensor cores round, and between tokens of MaxSim that all but tie, rounding
# decides who takes the gradient.
AGREEMENT = 2e-2

ROUNDS = 5  # timed, after one that is not
CALLS = 10  # of a round, handed to the device at once, so that it never waits for the host


def fastest(what: str, runs: Mapping[str, Callable[[], Any]]) -> tuple[str, str]:
    """Runs all, and finds the fastest of those with the right numbers.

    Args:
      what: they compute, for the line.
      runs: by name, each to arrays of the same shapes. What the first gives, in full precision, is
        right; if it does not run, as it may for want of memory, what the next one gives.

    Returns:
      The name, the first if none runs, and a line that says how each has done.
    """
    expected: Any = None
    seconds: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, run in runs.items():
        try:
            if expected is None:
                with jax.default_matmul_precision("highest"):  # XLA may round float32 on the way
                    expected = jax.block_until_ready(run())
            if not all(jax.tree.leaves(jax.tree.map(_agree, run(), expected))):
                notes[name] = "gives other numbers here"
                continue
            seconds[name] = _seconds(run)
            notes[name] = f"{1e3 * seconds[name]:.2f} ms"
        except Exception as error:  # whatever a library, a compiler or a driver has against it
            notes[name] = f"does not run here ({_reasons(error)})"
    best = min(seconds or runs, key=lambda name: seconds.get(name, 0.0))
    return best, f"{what} by {best}: {', '.join(f'{name} {notes[name]}' for name in runs)}"


def _reasons(error: Exception) -> str:
    """What an error says, or each of a group, as a library with several kernels raises it."""
    if isinstance(error, ExceptionGroup):
        return "; ".join(map(_reasons, error.exceptions))
    return f"{type(error).__name__}: {brief(error)}"


def _agree(x: Array, y: Array) -> bool:
    """Whether one array is the other but for rounding; nothing agrees with what is no number."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return bool(jnp.linalg.norm((x - y).ravel()) <= AGREEMENT * jnp.linalg.norm(y.ravel()))


def _seconds(run: Callable[[], Any]) -> float:
    """Of a call: the median of some rounds."""
    taken = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(CALLS)])
        taken.append((time.perf_counter() - start) / CALLS)
    return float(np.median(taken[1:]))
