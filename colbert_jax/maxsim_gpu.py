"""MaxSim of all pairs by Pallas kernels for GPU, and its gradient; `maxsim.py` calls them.

Left to XLA, all similarities are written to memory before their maximum is taken. Here a tile of
them stays in registers, where the maxima are taken at once; what is written is a score for each
pair and, for the backward pass, the place of each winner. The gradient builds the one-hot of the
winners again, tile by tile, for two matrix products: no scatter and no atomics, hence the same
order of sums every time. Triton compiles the kernels; all its tiles have powers of two as sizes.

`forms.py` finds out on the device at hand whether they win.

Shape letters beside those of `maxsim.py`: B blocks of R rows; a row is a query token, and a block
holds G whole queries, or parts of queries where these are long.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, UInt

from colbert_jax import maxsim_kernels
from colbert_jax.maxsim_kernels import (
    FOUND_WINNERS,
    fill,
    on_every_device,
    product,
    round_up,
    winner_dtype,
)


class Sizes(NamedTuple):
    """What a kernel's tiles are like, and how Triton compiles it.

    Attributes:
      rows: query tokens of a tile.
      tokens: document tokens of a tile, at most.
      num_warps: of 32 threads, that share a tile.
      num_stages: tiles that are on their way from memory at a time.
    """

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


# By bytes of a number. Tensor cores take bfloat16; products of whole float32 are the plain units',
# which keep more of a tile in registers. Compiled for A100 and H100, no kernel of these sizes puts
# registers into memory.
SIZES = {2: Sizes(128, 64, 8, 3), 4: Sizes(32, 32, 4, 2)}
SMALLEST = 16  # side of a tile that tensor cores take

DOCUMENTS = 16  # scored by a program, one after the other, while its rows stay on the chip
PROGRAMS = 1024  # enough to keep all parts of any GPU at work


def without_masks(
    queries: Float[Array, "Q S D"],
    documents: Float[Array, "N T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "N T"],
    masked_similarity: float | None,
) -> tuple[Float[Array, "Q S D"], Float[Array, "N T_padded D"]]:
    """`maxsim_kernels.without_masks`, with documents filled up to whole tiles."""
    length = documents.shape[1]
    padded = round_up(length, _tile(length, documents.dtype))
    inputs = (queries, documents, query_mask, document_mask)
    return maxsim_kernels.without_masks(*inputs, masked_similarity, padded)


def scores_and_winners(
    queries: Float[Array, "Q S D"], documents: Float[Array, "N T D"], keep_winners: bool
) -> tuple[Float[Array, "Q N"], UInt[Array, "N B*R"] | None]:
    """Scores of every pair, and the document tokens that won.

    Args:
      queries: from `without_masks`, bfloat16 or float32.
      documents: likewise.
      keep_winners: whether to return the winners.

    Returns:
      `scores[query, document]`, float32, and the winners for `gradients`: uint8, or uint16 where a
      document has more than 256 tokens; None if they are not kept.
    """
    blocks = _blocks_of(queries)
    of_groups, winners = _score(_to_rows(queries, blocks), _wide(documents), blocks, keep_winners)
    count, total = len(queries), len(documents)
    scores = of_groups.reshape(total, blocks.number, -1)[:, :, : blocks.groups]
    scores = scores.reshape(total, -1)[:, : count * blocks.parts]
    scores = scores.reshape(total, count, blocks.parts).sum(axis=-1).T
    # A maximum on a GPU passes over what is not a number, which must not go unnoticed.
    finite = _finite(queries)[:, None] & _finite(documents)
    return jnp.where(finite, scores, jnp.nan), winners


def gradients(
    queries: Float[Array, "Q S D"],
    documents: Float[Array, "N T D"],
    winners: UInt[Array, "N B*R"] | None,
    cotangent: Float[Array, "Q N"],
) -> tuple[Float[Array, "Q S D"], Float[Array, "N T D"]]:
    """The gradient of the scores of `scores_and_winners`, float32.

    Args:
      queries: as there.
      documents: as there.
      winners: what it returned; None finds them again, some documents at a time.
      cotangent: of the scores.
    """
    blocks = _blocks_of(queries)
    rows, wide, total = _to_rows(queries, blocks), _wide(documents), len(documents)
    weights = _to_groups(cotangent.T.astype(jnp.float32), blocks)
    if winners is not None:
        into_rows = _into_rows(wide, winners, weights, blocks)
        into_documents = _into_documents(rows, wide, winners, weights, blocks)
    else:

        def add_documents(into_rows: Array, some: tuple[Array, ...]) -> tuple[Array, Array]:
            documents, weights = some
            _, winners = _score(rows, documents, blocks, True)
            assert winners is not None
            into_rows += _into_rows(documents, winners, weights, blocks)
            return into_rows, _into_documents(rows, documents, winners, weights, blocks)

        found = total * len(rows) * winner_dtype(documents.shape[1]).itemsize
        times = min(math.ceil(found / FOUND_WINNERS), total)
        size = math.ceil(total / times)
        whole = (fill(x, 0, times * size) for x in (wide, weights))
        cut = tuple(x.reshape(times, size, *x.shape[1:]) for x in whole)
        nothing = jnp.zeros(rows.shape, jnp.float32)
        into_rows, into_documents = jax.lax.scan(add_documents, nothing, cut)
        into_documents = into_documents.reshape(-1, *wide.shape[1:])[:total]
    dim = queries.shape[2]
    return _from_rows(into_rows, queries.shape, blocks), into_documents[:, :, :dim]


def _finite(x: Float[Array, "N T D"]) -> Bool[Array, "N"]:
    return jnp.isfinite(x).all(axis=(1, 2))


# From queries to blocks of rows and back.


class Blocks(NamedTuple):
    """How query tokens lie in blocks of rows.

    Attributes:
      rows: of a block; those behind its last group are 0.
      parts: that each query is cut into.
      each: tokens of a part.
      groups: parts in a block.
      number: of blocks.
    """

    rows: int
    parts: int
    each: int
    groups: int
    number: int

    @property
    def stored(self) -> int:
        """Groups of a block in memory."""
        return pl.next_power_of_2(self.groups)


def _blocks_of(queries: Float[Array, "Q S D"]) -> Blocks:
    """The fewest blocks, in few parts: two more are tried than long queries need."""
    count, tokens, _ = queries.shape
    rows = SIZES[queries.dtype.itemsize].rows

    def in_parts(parts: int) -> Blocks:
        each = math.ceil(tokens / parts)
        groups = rows // each
        return Blocks(rows, parts, each, groups, math.ceil(count * parts / groups))

    least = math.ceil(tokens / rows)
    tried = range(least, min(least + 2, tokens) + 1)
    return min((in_parts(parts) for parts in tried), key=lambda blocks: blocks.number)


def _to_rows(queries: Float[Array, "Q S D"], blocks: Blocks) -> Float[Array, "B*R D_padded"]:
    """Query tokens as the kernels take them."""
    rows, parts, each, groups, number = blocks
    x = _wide(fill(queries, 1, parts * each))
    x = fill(x.reshape(-1, each, x.shape[2]), 0, number * groups)
    return fill(x.reshape(number, groups * each, -1), 1, rows).reshape(number * rows, -1)


def _from_rows(
    x: Float[Array, "B*R D_padded"], queries: tuple[int, ...], blocks: Blocks
) -> Float[Array, "Q S D"]:
    """What `_to_rows` has made of queries of this shape, as it was."""
    count, tokens, dim = queries
    x = x.reshape(blocks.number, blocks.rows, -1)[:, : blocks.groups * blocks.each, :dim]
    x = x.reshape(-1, blocks.each, dim)[: count * blocks.parts]
    return x.reshape(count, -1, dim)[:, :tokens]


def _to_groups(weights: Float[Array, "N Q"], blocks: Blocks) -> Float[Array, "N B*G"]:
    """A query's value for each of its parts, as the groups lie in memory."""
    weights = jnp.repeat(weights, blocks.parts, axis=1)
    weights = fill(weights, 1, blocks.number * blocks.groups)
    weights = weights.reshape(len(weights), blocks.number, blocks.groups)
    return fill(weights, 2, blocks.stored).reshape(len(weights), -1)


def _wide(x: Float[Array, "N T D"]) -> Float[Array, "N T D_padded"]:
    """Embeddings with zeros up to a size that tensor cores and Triton take; 128 is one."""
    return fill(x, 2, max(pl.next_power_of_2(x.shape[2]), SMALLEST))


def _tile(length: int, dtype: Any) -> int:
    """Document tokens of a tile."""
    most = SIZES[jnp.dtype(dtype).itemsize].tokens
    return min(max(pl.next_power_of_2(length), SMALLEST), most)


# The three kernels. `n` is a document, `t` a tile of its tokens.


def _score(
    rows: Float[Array, "B*R D"],
    documents: Float[Array, "N T D"],
    blocks: Blocks,
    keep_winners: bool,
) -> tuple[Float[Array, "N B*G"], UInt[Array, "N B*R"] | None]:
    """Scores of every group, and, where they are kept, `winners[document, row]`."""
    total, length, dim = documents.shape
    shapes = [jax.ShapeDtypeStruct((total, blocks.number * blocks.stored), jnp.float32)]
    wide = [blocks.stored]
    if keep_winners:
        shapes.append(jax.ShapeDtypeStruct((total, len(rows)), winner_dtype(length)))
        wide.append(blocks.rows)
    scores, *winners = _call(
        functools.partial(
            _maxsim_scores,
            total=total,
            length=length,
            tile=_tile(length, rows.dtype),
            blocks=blocks,
        ),
        rows.dtype,
        grid=(blocks.number, math.ceil(total / DOCUMENTS)),
        in_specs=[
            pl.BlockSpec((blocks.rows, dim), lambda b, i: (b, 0)),
            pl.BlockSpec((DOCUMENTS * length, dim), lambda b, i: (i, 0)),
        ],
        out_specs=[pl.BlockSpec((DOCUMENTS, size), lambda b, i: (i, b)) for size in wide],
        out_shape=shapes,
    )(rows, documents.reshape(-1, dim))
    return scores, winners[0] if keep_winners else None


def _maxsim_scores(rows, documents, scores, *winners, total, length, tile, blocks):
    """Scores a block of rows and some documents.

    Args:
      rows: `[r, dim]`.
      documents: `[n * t, dim]`.
      scores: `[n, group]`, written.
      winners: `[n, r]`, written, if they are kept.
      total: documents in all, of which the last program may have fewer.
      length: tokens of a document.
      tile: those of a tile.
      blocks: how the rows lie.
    """
    queries = rows[...]
    start = jnp.full((blocks.rows, tile), -jnp.inf, jnp.float32)
    column = jax.lax.broadcasted_iota(jnp.int32, start.shape, 1)
    group = jax.lax.broadcasted_iota(jnp.int32, (blocks.stored, blocks.rows), 0)
    row = jax.lax.broadcasted_iota(jnp.int32, (blocks.stored, blocks.rows), 1)
    of_group = jax.lax.div(row, jnp.int32(blocks.each)) == group

    def score_document(n, _):
        def score_tile(t, carry):
            best, where = carry
            tokens = documents[pl.ds(n * length + t * tile, tile), :]
            similarities = product(queries, tokens, (1, 1))
            if winners:
                where = jnp.where(similarities > best, t, where)
            return jnp.maximum(best, similarities), where

        # Elementwise from tile to tile; across a tile only once, for its tokens are in many
        # threads.
        carry = (start, jnp.zeros(start.shape, jnp.int32) if winners else None)
        best, where = jax.lax.fori_loop(0, length // tile, score_tile, carry)
        largest = best.max(axis=1)
        scores[n, :] = jnp.where(of_group, largest[None, :], 0.0).sum(axis=1)
        if winners:
            place = jnp.where(best == largest[:, None], where * tile + column, length)
            winners[0][n, :] = place.min(axis=1).astype(winners[0].dtype)
        return None

    count = jnp.minimum(DOCUMENTS, total - pl.program_id(1) * DOCUMENTS)
    jax.lax.fori_loop(0, count, score_document, None)


def _into_documents(
    rows: Float[Array, "B*R D"],
    documents: Float[Array, "N T D"],
    winners: UInt[Array, "N B*R"],
    weights: Float[Array, "N B*G"],
    blocks: Blocks,
) -> Float[Array, "N T D"]:
    """The weighted sum of the query tokens that each document token won, float32."""
    total, length, dim = documents.shape
    tile = _tile(length, rows.dtype)
    return _call(
        functools.partial(_maxsim_into_documents, blocks=blocks),
        rows.dtype,
        grid=(total, length // tile),
        in_specs=[
            pl.BlockSpec((None, winners.shape[1]), lambda n, t: (n, 0)),
            pl.BlockSpec((None, weights.shape[1]), lambda n, t: (n, 0)),
            pl.BlockSpec(rows.shape, lambda n, t: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, tile, dim), lambda n, t: (n, t, 0)),
        out_shape=jax.ShapeDtypeStruct(documents.shape, jnp.float32),
    )(winners, weights, rows)


def _maxsim_into_documents(winners, weights, rows, into_documents, *, blocks):
    """Sums all rows into a tile of a document.

    Args:
      winners: of the document, `[block * r]`.
      weights: of its pairs, `[block * group]`.
      rows: `[block * r, dim]`.
      into_documents: `[t, dim]`, written.
      blocks: how the rows lie.
    """
    tile, dim = into_documents.shape
    token = jax.lax.broadcasted_iota(jnp.int32, (tile, blocks.rows), 0) + pl.program_id(1) * tile
    group = _group_of_row(blocks)

    def add_block(b, total):
        at = pl.ds(b * blocks.rows, blocks.rows)
        won = winners[at].astype(jnp.int32)[None, :] == token
        hot = jnp.where(won, weights[b * blocks.stored + group][None, :], 0.0).astype(rows.dtype)
        return total + product(hot, rows[at, :], (1, 0))

    nothing = jnp.zeros((tile, dim), jnp.float32)
    into_documents[...] = jax.lax.fori_loop(0, blocks.number, add_block, nothing)


def _into_rows(
    documents: Float[Array, "N T D"],
    winners: UInt[Array, "N B*R"],
    weights: Float[Array, "N B*G"],
    blocks: Blocks,
) -> Float[Array, "B*R D"]:
    """The weighted sum of each query token's winners, float32.

    Few queries have too few blocks for the chip: each then sums stretches of the documents, and
    XLA the stretches.
    """
    total, length, dim = documents.shape
    wanted = min(math.ceil(PROGRAMS / blocks.number), math.ceil(total / DOCUMENTS))
    size = math.ceil(total / wanted)
    stretches = math.ceil(total / size)
    sums = _call(
        functools.partial(
            _maxsim_into_queries,
            total=total,
            size=size,
            length=length,
            tile=_tile(length, documents.dtype),
            blocks=blocks,
        ),
        documents.dtype,
        grid=(blocks.number, stretches),
        in_specs=[
            pl.BlockSpec((total, blocks.rows), lambda b, s: (0, b)),
            pl.BlockSpec((total, blocks.stored), lambda b, s: (0, b)),
            pl.BlockSpec((total * length, dim), lambda b, s: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, blocks.rows, dim), lambda b, s: (s, b, 0)),
        out_shape=jax.ShapeDtypeStruct((stretches, winners.shape[1], dim), jnp.float32),
    )(winners, weights, documents.reshape(-1, dim))
    return sums.sum(axis=0)


def _maxsim_into_queries(
    winners, weights, documents, into_rows, *, total, size, length, tile, blocks
):
    """Sums a stretch of the documents into a block of rows.

    Args:
      winners: `[n, r]` of all documents.
      weights: `[n, group]`, likewise.
      documents: `[n * t, dim]`, all of them.
      into_rows: `[r, dim]`, written.
      total: documents in all.
      size: those of a stretch, of which the last may have fewer.
      length: tokens of a document.
      tile: those of a tile.
      blocks: how the rows lie.
    """
    tiles = length // tile
    column = jax.lax.broadcasted_iota(jnp.int32, (blocks.rows, tile), 1)
    group = _group_of_row(blocks)

    # One loop over documents and their tiles, so that the next tile is always on its way.
    def add_tile(index, total):
        n, t = jax.lax.div(index, jnp.int32(tiles)), jax.lax.rem(index, jnp.int32(tiles))
        won = winners[n, :].astype(jnp.int32)[:, None] - t * tile == column
        hot = jnp.where(won, weights[n, group][:, None], 0.0).astype(documents.dtype)
        return total + product(hot, documents[pl.ds(index * tile, tile), :], (1, 0))

    first = pl.program_id(1) * size
    last = jnp.minimum(first + size, total)
    nothing = jnp.zeros(into_rows.shape, jnp.float32)
    into_rows[...] = jax.lax.fori_loop(first * tiles, last * tiles, add_tile, nothing)


def _group_of_row(blocks):
    """Where a row's weight lies; of rows behind the last group, any that there is."""
    row = jax.lax.iota(jnp.int32, blocks.rows)
    return jnp.minimum(jax.lax.div(row, jnp.int32(blocks.each)), blocks.groups - 1)


def _call(kernel: functools.partial[None], dtype: Any, **options: Any) -> Callable[..., Any]:
    """A kernel for embeddings of a dtype, over its grid, on each device, by Triton."""
    sizes = SIZES[jnp.dtype(dtype).itemsize]
    call = pl.pallas_call(
        kernel,
        compiler_params=plgpu.CompilerParams(
            num_warps=sizes.num_warps, num_stages=sizes.num_stages
        ),
        name=kernel.func.__name__.strip("_"),
        **options,
    )
    return functools.partial(on_every_device, call)
