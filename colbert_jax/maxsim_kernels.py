"""What MaxSim's kernels for TPU (`maxsim_tpu.py`) and GPU (`maxsim_gpu.py`) share.

No kernel knows masks: `without_masks` exchanges the embeddings of masked tokens for some that
change nothing. Shape letters as in `maxsim.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

# A backward pass that finds the winners again holds up to so many bytes of them at a time.
FOUND_WINNERS = 2**28


def takes(
    query_dtype: jnp.dtype, document_dtype: jnp.dtype, masked_similarity: float | None
) -> bool:
    """Whether the kernels compute MaxSim of such embeddings with such a similarity of masks."""
    known = query_dtype == document_dtype and document_dtype in (jnp.bfloat16, jnp.float32)
    return known and masked_similarity in (None, 0.0)


def without_masks(
    queries: Float[Array, "Q S D"],
    documents: Float[Array, "N T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "N T"],
    masked_similarity: float | None,
    padded: int,
) -> tuple[Float[Array, "Q S D"], Float[Array, "N T_padded D"]]:
    """Embeddings that score without masks what these score with them; gradients flow through it.

    A masked query token becomes 0, and with it all its similarities. A masked document token
    becomes 0 where its similarity is to be 0. Where it is not to win, it becomes a copy of the
    document's first token that counts: the maximum stays what it is, and if the copy is the first
    of those that tie, its gradient flows to the token that it was copied from. Documents are filled
    up to whole tiles with copies of their first token, which come too late to win.

    Args:
      queries: as in `maxsim.maxsim_all_pairs`.
      documents: likewise.
      query_mask: likewise.
      document_mask: likewise.
      masked_similarity: None or 0.0.
      padded: tokens to fill documents up to.
    """
    queries = jnp.where(query_mask[..., None], queries, 0)
    instead: Any = 0
    if masked_similarity is None:
        first = document_mask & (document_mask.cumsum(axis=1) == 1)
        instead = jnp.where(first[..., None], documents, 0).sum(axis=1, keepdims=True)
    documents = jnp.where(document_mask[..., None], documents, instead)
    copies = jnp.repeat(documents[:, :1], padded - documents.shape[1], axis=1)
    return queries, jnp.concatenate([documents, copies], axis=1)


def product(x: Array, y: Array, contracted: tuple[int, int]) -> Array:
    """A matrix product, summed in float32. Without `precision`, float32 would be rounded first."""
    return jax.lax.dot_general(
        x,
        y,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def on_every_device(call: Callable[..., Any], *arrays: Array) -> Any:
    """Has all devices along the mesh axes that no `shard_map` splits yet compute the same.

    XLA does not split a kernel over a mesh by itself; MaxSim is repeated over `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.empty or mesh.size == 1 or not left:
        return call(*arrays)
    whole = PartitionSpec()
    repeated = jax.shard_map(
        call, in_specs=whole, out_specs=whole, axis_names=left, check_vma=False
    )
    return repeated(*arrays)


def winner_dtype(length: int) -> jnp.dtype:
    """The smallest that holds a position among so many tokens."""
    return jnp.dtype(jnp.uint8 if length <= 2**8 else jnp.uint16)


def fill(x: Array, axis: int, size: int) -> Array:
    """`x` with zeros at the end of an axis, up to a size."""
    missing = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, missing)


def round_up(size: int, to: int) -> int:
    """The smallest multiple of `to` that is not below `size`."""
    return -(-size // to) * to
