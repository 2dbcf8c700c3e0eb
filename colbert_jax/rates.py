"""What the device at hand can do: published where its kind is known, and measured here.

The denominators of MFU and of a roofline (Williams et al., 2009). Rates are of one device.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from colbert_jax.cost import CHIPS

# bfloat16 FLOP/s without sparsity, by a part of `device_kind`, from NVIDIA's data sheets; the first
# that is found counts.
GPU_FLOPS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}

# A side of matrices large enough that their product, and not its start, takes the time; and
# elements to move, more than a cache holds.
MATRIX = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
MOVED = {"cpu": 2**25, "gpu": 2**28, "tpu": 2**28}
PASSES = 5  # the best counts: whatever disturbs makes it slower


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device can do.

    Attributes:
      flops: FLOP/s of a matrix product.
      bandwidth: bytes/s to and from memory; None where only `flops` was asked for.
      source: "published" or "measured".
    """

    flops: float
    bandwidth: float | None
    source: str


def peak_rates(dtype: str = "bfloat16") -> Rates:
    """The published peak of the device's kind; of another kind, a product in `dtype` is timed.

    Peaks are of bfloat16, whatever a run computes in. For processors, half a second.
    """
    kind = jax.devices()[0].device_kind
    known = {chip.kind: chip.flops for chip in CHIPS.values()}
    of_gpu = (flops for name, flops in GPU_FLOPS.items() if name in kind)
    flops = known.get(kind) or next(of_gpu, None)
    if flops is None:
        return Rates(measure_flops(dtype), None, "measured")
    return Rates(flops, None, "published")


def measure_rates(dtype: str) -> Rates:
    """Times a product of matrices and a pass over memory on the first device of this host."""
    return Rates(measure_flops(dtype), measure_bandwidth(), "measured")


def measure_flops(dtype: str) -> float:
    """FLOP/s of a product of two square matrices in `dtype`, accumulated as XLA chooses."""
    size = MATRIX[jax.default_backend()]
    x = jnp.full((size, size), 1 / size, dtype)
    return 2.0 * size**3 / _best_seconds(jax.jit(jnp.matmul), x, x)


def measure_bandwidth() -> float:
    """Bytes/s of reading an array and writing one of its size, both larger than any cache."""
    x = jnp.ones(MOVED[jax.default_backend()], jnp.float32)
    return 2.0 * x.nbytes / _best_seconds(jax.jit(lambda x: 2 * x), x)


def _best_seconds(function: Callable[..., jax.Array], *inputs: jax.Array) -> float:
    """Seconds of the fastest of a few calls, after one that compiles."""
    jax.block_until_ready(function(*inputs))
    taken = []
    for _ in range(PASSES):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        taken.append(time.perf_counter() - start)
    return min(taken)
