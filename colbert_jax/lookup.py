"""Rows of an embedding table, with a gradient that is fast on every backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from colbert_jax.sharding import platform


@jax.custom_vjp
def look_up(table: Float[Array, "V E"], ids: Int[Array, "*texts"]) -> Float[Array, "*texts E"]:
    """The rows `table[ids]`; as in `jnp.take`, ids beyond the table give NaN.

    Its gradient adds up the rows of equal ids. On GPU that is no scatter-add, in which the tokens
    of a batch, of which many are the same, wait for each other (openxla/xla issue 46225: hundreds
    of times slower in jaxlib 0.10.2 to 0.11.0): there `add_rows` sorts them first.
    """
    return jnp.take(table, ids, axis=0)


def _forward(table, ids):
    # An empty array, for shape and dtype: the table itself is not needed.
    return jnp.take(table, ids, axis=0), (ids, jnp.zeros((len(table), 0), table.dtype))


def _backward(residuals, cotangent):
    ids, like = residuals
    ids = jnp.asarray(ids).reshape(-1)
    rows = cotangent.reshape(-1, cotangent.shape[-1]).astype(like.dtype)
    if platform() == "gpu":
        return add_rows(len(like), ids, rows), None
    table = jnp.zeros((len(like), rows.shape[-1]), like.dtype)
    return table.at[ids].add(rows), None


look_up.defvjp(_forward, _backward)


def add_rows(
    count: int, ids: Int[Array, "N"], rows: Float[Array, "N E"]
) -> Float[Array, "{count} E"]:
    """A table of `count` rows, each the sum of the `rows` whose id is its place.

    Rows are sorted by id and summed up within each run of equal ids (a segmented scan, Blelloch
    1990, section 1.5), the same way each time; then every id writes once.
    """
    order = jnp.argsort(ids)
    ids, rows = ids[order], rows[order]
    first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
    last = jnp.concatenate([ids[1:] != ids[:-1], jnp.ones(1, bool)])

    def add(left, right):
        (left_first, total), (right_first, row) = left, right
        return left_first | right_first, jnp.where(right_first, row, total + row)

    _, totals = jax.lax.associative_scan(add, (first[:, None], rows))
    # Those that are not the last of their run write nowhere, each to another place of it.
    places = jnp.where(last, ids, count + jnp.arange(len(ids)))
    table = jnp.zeros((count, rows.shape[-1]), rows.dtype)
    return table.at[places].set(totals, mode="drop", unique_indices=True)
