"""MaxSim of all pairs by Pallas kernels for TPU, and its gradient; `maxsim.py` calls them.

Similarities never leave the chip's vector memory (VMEM): a tile of them comes out of the matrix
unit, its maxima are taken at once, and what is written is a score for each pair and, for the
backward pass, the place of each winner. The gradient builds the one-hot of the winners again, tile
by tile, for two matrix products: no scatter, and the same order of sums every time.

Lanes are queries: similarities lie as `[document, document_token, query]`, so that the maximum over
a document's tokens is one elementwise maximum after the other.

Shape letters beside those of `maxsim.py`: P tiles of L lanes; R query tokens of a lane, K of them
in one matrix product.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
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

LANES = 128  # of a vector register
SUBLANES = 8  # its rows, of 32 bits
DOCUMENTS = 32  # of a block: a tile of 8-bit winners has as many rows
TOKENS = 4  # query tokens of a matrix product; with fewer the matrix unit waits in between
ROWS = 2048  # document tokens of a matrix product, at most

# A block holds as many tokens of a document, and of a lane, as have these bytes: two blocks of
# every operand and the tiles of a product must fit into 16 MiB of VMEM, which is all that v4 has.
DOCUMENT_BYTES = 192 * 128 * 2
LANE_BYTES = 48 * 128 * 2


def without_masks(
    queries: Float[Array, "Q S D"],
    documents: Float[Array, "N T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "N T"],
    masked_similarity: float | None,
) -> tuple[Float[Array, "Q S D"], Float[Array, "N T_padded D"]]:
    """`maxsim_kernels.without_masks`, with documents filled up to whole tiles."""
    length, dim = documents.shape[1:]
    parts = _parts_of_document(length, dim, documents.dtype)
    padded = parts * round_up(math.ceil(length / parts), 2 * SUBLANES)
    inputs = (queries, documents, query_mask, document_mask)
    return maxsim_kernels.without_masks(*inputs, masked_similarity, padded)


def scores_and_winners(
    queries: Float[Array, "Q S D"], documents: Float[Array, "N T D"], keep_winners: bool
) -> tuple[Float[Array, "Q N"], UInt[Array, "R N_padded P*L"] | None]:
    """Scores of every pair, and the document tokens that won.

    Args:
      queries: from `without_masks`, bfloat16 or float32.
      documents: likewise.
      keep_winners: whether to return the winners.

    Returns:
      `scores[query, document]`, float32, and the winners for `gradients`: uint8, or uint16 where a
      document has more than 256 tokens; None if they are not kept.
    """
    count, total = len(queries), len(documents)
    parts = _parts_of_query(queries.shape, queries.dtype)
    scores, *winners = _score(_to_lanes(queries), _whole_blocks(documents), keep_winners)
    scores = scores[:total, : parts * count].reshape(total, parts, count).sum(axis=1)
    return scores.T, winners[0] if keep_winners else None


def gradients(
    queries: Float[Array, "Q S D"],
    documents: Float[Array, "N T D"],
    winners: UInt[Array, "R N_padded P*L"] | None,
    cotangent: Float[Array, "Q N"],
) -> tuple[Float[Array, "Q S D"], Float[Array, "N T D"]]:
    """The gradient of the scores of `scores_and_winners`, float32.

    Args:
      queries: as there.
      documents: as there.
      winners: what it returned; None finds them again, some documents at a time.
      cotangent: of the scores.
    """
    lanes, blocks = _to_lanes(queries), _whole_blocks(documents)
    parts = _parts_of_query(queries.shape, queries.dtype)
    weights = jnp.tile(cotangent.T.astype(jnp.float32), (1, parts))
    weights = fill(fill(weights, 0, len(blocks)), 1, len(lanes) * LANES)
    if winners is not None:
        into_lanes = _into_lanes(lanes, blocks, winners, weights)
        into_documents = _into_documents(lanes, blocks, winners, weights)
    else:

        def add_documents(into_lanes: Array, some: tuple[Array, ...]) -> tuple[Array, Array]:
            blocks, weights = some
            _, winners = _score(lanes, blocks, True)
            into_lanes += _into_lanes(lanes, blocks, winners, weights)
            return into_lanes, _into_documents(lanes, blocks, winners, weights)

        size = _found_at_a_time(lanes, blocks)
        cut = tuple(x.reshape(-1, size, *x.shape[1:]) for x in (blocks, weights))
        nothing = jnp.zeros(jnp.swapaxes(lanes, 2, 3).shape, jnp.float32)
        into_lanes, into_documents = jax.lax.scan(add_documents, nothing, cut)
        into_documents = into_documents.reshape(blocks.shape)
    into_queries = _from_lanes(jnp.swapaxes(into_lanes, 2, 3), queries.shape, parts)
    return into_queries, into_documents[: len(documents)]


def moved_bytes(
    queries: tuple[int, int, int], documents: tuple[int, int, int], kept: bool
) -> float:
    """Bytes between a chip's memory and the kernels, forward and backward, in bfloat16.

    Args:
      queries: Q, S, D.
      documents: N, T, D.
      kept: whether winners are kept for the backward pass; else the scores' kernel runs again.
    """
    (count, tokens, dim), (total, length, _) = queries, documents
    lanes, pairs = float(count * tokens * dim), float(count * total)
    whole = float(total * length * dim)
    winners = pairs * tokens * winner_dtype(length).itemsize
    parts = _parts_of_query(queries, jnp.bfloat16)
    tiles, blocks = math.ceil(count * parts / LANES), math.ceil(total / DOCUMENTS)
    forward = 2 * lanes + tiles * 2 * whole + 4 * pairs + winners
    into_documents = 4 * whole + blocks * 2 * lanes + 4 * pairs + winners
    into_queries = 4 * lanes + tiles * 2 * whole + 4 * pairs + winners
    return (1 if kept else 2) * forward + into_documents + into_queries


# From queries to lanes and back.


def _parts_of_query(queries: tuple[int, ...], dtype: Any) -> int:
    """Into how many parts the tokens of each query are cut, every part a lane of its own.

    Few queries fill the lanes only in parts, and a lane has room for so many tokens. Chosen is what
    leaves the least to compute, filling included.
    """
    count, tokens, dim = queries
    most = max(LANE_BYTES // _embedding_bytes(dim, dtype), TOKENS)

    def computed(parts: int) -> int:
        return math.ceil(count * parts / LANES) * round_up(math.ceil(tokens / parts), TOKENS)

    return min(range(math.ceil(tokens / most), tokens + 1), key=computed)


def _to_lanes(queries: Float[Array, "Q S D"]) -> Float[Array, "P R/K K*L D"]:
    """Query tokens as the kernels take them: one token of all lanes, then the next token."""
    count, tokens, dim = queries.shape
    parts = _parts_of_query(queries.shape, queries.dtype)
    each = math.ceil(tokens / parts)
    lanes = fill(queries, 1, parts * each).reshape(count, parts, each, dim).swapaxes(0, 1)
    lanes = lanes.reshape(parts * count, each, dim)
    lanes = fill(fill(lanes, 0, round_up(len(lanes), LANES)), 1, round_up(each, TOKENS))
    lanes = lanes.reshape(-1, LANES, lanes.shape[1], dim).swapaxes(1, 2)
    return lanes.reshape(len(lanes), -1, TOKENS * LANES, dim)


def _from_lanes(
    lanes: Float[Array, "P R/K K*L D"], queries: tuple[int, ...], parts: int
) -> Float[Array, "Q S D"]:
    """What `_to_lanes` has made of queries of this shape, as it was."""
    count, tokens, dim = queries
    each = math.ceil(tokens / parts)
    lanes = lanes.reshape(len(lanes), -1, LANES, dim).swapaxes(1, 2)
    lanes = lanes.reshape(-1, lanes.shape[2], dim)[: parts * count, :each]
    return lanes.reshape(parts, count, each, dim).swapaxes(0, 1).reshape(count, -1, dim)[:, :tokens]


# The three kernels, and how each goes over its grid.


def _score(
    lanes: Float[Array, "P R/K K*L D"], documents: Float[Array, "N T D"], keep_winners: bool
) -> tuple[Array, ...]:
    """`scores[document, lane]` and, where they are kept, `winners[token, document, lane]`."""
    outputs: list[tuple[str, Any]] = [("pairs", jnp.float32)]
    if keep_winners:
        outputs.append(("winners", winner_dtype(documents.shape[1])))
    return _run(
        "maxsim_scores",
        functools.partial(_score_kernel, keep_winners=keep_winners),
        ("pn", "t"),
        lanes,
        documents,
        inputs={"lanes": lanes, "documents": documents},
        outputs=outputs,
        scratch=[jnp.float32] * len(outputs),
    )


def _score_kernel(lanes, documents, scores, *others, chunk, keep_winners):
    """Scores a block of documents, or a part of each.

    Args:
      lanes: `[step, token * lane, dim]`.
      documents: `[n, t, dim]`.
      scores: `[n, lane]`, written with the documents' last part.
      others: `winners[r, n, lane]`, written with the last part, and from part to part
        `best[r, n, lane]` and `place[r, n, lane]`, both float32; if winners are not kept, `best`.
      chunk: documents of a matrix product.
      keep_winners: whether to keep winners.
    """
    winners, best, place = others if keep_winners else (None, *others, None)
    part, last = pl.program_id(2), pl.num_programs(2) - 1
    length, dim = documents.shape[1:]
    before = (part * length).astype(jnp.float32)

    @pl.when(part == 0)
    def start():
        best[...] = jnp.full(best.shape, -jnp.inf, jnp.float32)
        if keep_winners:
            place[...] = jnp.zeros(place.shape, jnp.float32)

    @_for_each(documents.shape[0] // chunk)
    def score_chunk(index):
        at = _chunk_at(index, chunk)
        tokens = documents[at].reshape(chunk * length, dim)

        @_for_each(lanes.shape[0])
        def score_tokens(step):
            similarities = product(tokens, lanes[step], (1, 1))
            for token in range(TOKENS):
                tile = similarities[:, token * LANES : (token + 1) * LANES]
                tile = tile.reshape(chunk, length // SUBLANES, SUBLANES, LANES)
                highest, where = _largest(tile, keep_winners)
                r = step * TOKENS + token
                if keep_winners:
                    place[r, at] = jnp.where(highest > best[r, at], where + before, place[r, at])
                best[r, at] = jnp.maximum(best[r, at], highest)

    @pl.when(part == last)
    def finish():
        scores[...] = best[...].sum(axis=0)
        if keep_winners:
            winners[...] = place[...].astype(jnp.int32).astype(winners.dtype)


def _largest(tile, with_place):
    """Of `tile[n, t / 8, 8, lane]`, the largest `[n, lane]` and the first t where it stands.

    A comparison, a selection and a maximum for each register of similarities: one operation fewer
    than the maximum first and its place then. Places are float32, which has a minimum in one.
    """
    best, row = tile[:, 0], jnp.zeros(tile[:, 0].shape, jnp.float32)
    for index in range(1, tile.shape[1]):
        if with_place:
            row = jnp.where(tile[:, index] > best, float(index), row)
        best = jnp.maximum(best, tile[:, index])
    largest = best.max(axis=1)
    if not with_place:
        return largest, None
    sublane = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1).astype(jnp.float32)
    place = jnp.where(best == largest[:, None], row * SUBLANES + sublane, jnp.inf)
    return largest, place.min(axis=1)


def _into_documents(
    lanes: Float[Array, "P R/K K*L D"],
    documents: Float[Array, "N T D"],
    winners: UInt[Array, "R N P*L"],
    weights: Float[Array, "N P*L"],
) -> Float[Array, "N T D"]:
    """The weighted sum of the query tokens that each document token won, float32."""
    (into_documents,) = _run(
        "maxsim_into_documents",
        _into_documents_kernel,
        ("nt", "p"),
        lanes,
        documents,
        inputs={"winners": winners, "pairs": weights, "lanes": lanes},
        outputs=[("documents", jnp.float32)],
        scratch=[jnp.int32],
    )
    return into_documents


def _into_documents_kernel(winners, weights, lanes, into_documents, place, *, chunk):
    """Adds a tile of lanes to `into_documents[n, t, dim]`; the rest as in `_score_kernel`."""
    length, dim = into_documents.shape[1:]
    place[...] = winners[...].astype(jnp.int32) - pl.program_id(1) * length

    @pl.when(pl.program_id(2) == 0)
    def start():
        into_documents[...] = jnp.zeros(into_documents.shape, jnp.float32)

    @_for_each(into_documents.shape[0] // chunk)
    def add_chunk(index):
        at = _chunk_at(index, chunk)

        @_for_each(lanes.shape[0])
        def add_tokens(step):
            hot = _one_hot(place, weights[at], step, at, length, lanes.dtype)
            into_documents[at] += product(hot, lanes[step], (1, 0)).reshape(chunk, length, dim)


def _into_lanes(
    lanes: Float[Array, "P R/K K*L D"],
    documents: Float[Array, "N T D"],
    winners: UInt[Array, "R N P*L"],
    weights: Float[Array, "N P*L"],
) -> Float[Array, "P R/K D K*L"]:
    """The weighted sum of each query token's winners, float32 and transposed."""
    (into_lanes,) = _run(
        "maxsim_into_queries",
        _into_lanes_kernel,
        ("p", "nt"),
        lanes,
        documents,
        inputs={"winners": winners, "pairs": weights, "documents": documents},
        outputs=[("into_lanes", jnp.float32)],
        scratch=[jnp.int32],
    )
    return into_lanes


def _into_lanes_kernel(winners, weights, documents, into_lanes, place, *, chunk):
    """Adds a block of documents to `into_lanes[step, dim, token * lane]`.

    Transposed, since then documents are turned once for all query tokens; otherwise the one-hot of
    each token would have to be.
    """
    length, dim = documents.shape[1:]
    place[...] = winners[...].astype(jnp.int32) - pl.program_id(2) * length

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def start():
        into_lanes[...] = jnp.zeros(into_lanes.shape, jnp.float32)

    @_for_each(documents.shape[0] // chunk)
    def add_chunk(index):
        at = _chunk_at(index, chunk)
        turned = documents[at].reshape(chunk * length, dim).T

        @_for_each(into_lanes.shape[0])
        def add_tokens(step):
            hot = _one_hot(place, weights[at], step, at, length, documents.dtype)
            into_lanes[step] += product(turned, hot, (1, 0))


def _one_hot(place, weights, step, at, length, dtype):
    """`hot[n * t, token * lane]`: the pair's weight where the document token won, 0 elsewhere."""
    row = jax.lax.broadcasted_iota(jnp.int32, (len(weights), length, LANES), 1)
    hot = [
        jnp.where(row == place[step * TOKENS + token, at][:, None], weights[:, None], 0.0)
        for token in range(TOKENS)
    ]
    rows = len(weights) * length
    return jnp.concatenate([x.astype(dtype).reshape(rows, LANES) for x in hot], axis=1)


def _for_each(count):
    """Decorates the body of a loop over `range(count)`, which then runs."""

    def run(body):
        jax.lax.fori_loop(0, count, lambda index, _: body(index), None)

    return run


def _chunk_at(index, chunk):
    return pl.ds(pl.multiple_of(index * chunk, chunk), chunk)


def _run(
    name: str,
    kernel: Callable[..., None],
    grid: tuple[str, str],
    lanes: Float[Array, "P R/K K*L D"],
    documents: Float[Array, "N T D"],
    inputs: Mapping[str, Array],
    outputs: Sequence[tuple[str, Any]],
    scratch: Sequence[Any],
) -> tuple[Array, ...]:
    """Runs a kernel over its grid, on each device.

    Args:
      name: as it stands in the compiled program.
      kernel: takes a block of each input and output, and the scratch.
      grid: its axes, those that the kernel sums or maximises over last: p, a tile of lanes; n, a
        block of documents; t, a part of each of these.
      lanes: their shape says how many there are, like that of documents.
      documents: likewise.
      inputs: arrays, by the kind that they are laid out as.
      outputs: kind and dtype of each.
      scratch: dtypes of arrays that hold a value for each query token of each pair of a block.

    Returns:
      The outputs.
    """
    (tiles, steps, wide, dim), (total, length, _) = lanes.shape, documents.shape
    parts = _parts_of_document(length, dim, documents.dtype)
    each, tokens = length // parts, steps * TOKENS
    # Of each kind the shape, that of a block, and the axes of the grid that its dimensions follow.
    kinds: dict[str, tuple[tuple[int, ...], tuple[int | None, ...], str]] = {
        "lanes": ((tiles, steps, wide, dim), (None, steps, wide, dim), "p---"),
        "into_lanes": ((tiles, steps, dim, wide), (None, steps, dim, wide), "p---"),
        "documents": ((total, length, dim), (DOCUMENTS, each, dim), "nt-"),
        "pairs": ((total, tiles * LANES), (DOCUMENTS, LANES), "np"),
        "winners": ((tokens, total, tiles * LANES), (tokens, DOCUMENTS, LANES), "-np"),
    }
    order = "".join(grid)
    sizes = {"p": tiles, "n": total // DOCUMENTS, "t": parts}

    def spec(kind: str) -> pl.BlockSpec:
        _, block, follows = kinds[kind]

        def at(*indices: Any) -> tuple[Any, ...]:
            return tuple(0 if axis == "-" else indices[order.index(axis)] for axis in follows)

        return pl.BlockSpec(block, at)

    def moved(kind: str, dtype: Any) -> int:
        """Bytes: a block is moved again when an axis further out steps on."""
        shape, _, follows = kinds[kind]
        out_to = max(order.index(axis) for axis in follows if axis != "-")
        times = math.prod(sizes[axis] for axis in order[:out_to] if axis not in follows)
        return math.prod(shape) * np.dtype(dtype).itemsize * times

    arrays = [(kind, x.dtype) for kind, x in inputs.items()] + list(outputs)
    chunk = DOCUMENTS
    while chunk > SUBLANES and chunk * each > ROWS:
        chunk //= 2
    call = pl.pallas_call(
        functools.partial(kernel, chunk=chunk),
        grid=tuple(sizes[axis] for axis in order),
        in_specs=[spec(kind) for kind in inputs],
        out_specs=[spec(kind) for kind, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(kinds[kind][0], dtype) for kind, dtype in outputs],
        scratch_shapes=[pltpu.VMEM((tokens, DOCUMENTS, LANES), dtype) for dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[pltpu.PARALLEL] * len(grid[0]) + [pltpu.ARBITRARY] * len(grid[1])
        ),
        # XLA plans by it what it sends meanwhile.
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(lanes.shape[:3]) * math.prod(documents.shape),
            bytes_accessed=sum(moved(*array) for array in arrays),
            transcendentals=0,
        ),
        name=name,
    )
    return tuple(on_every_device(call, *inputs.values()))


# Sizes.


def _embedding_bytes(dim: int, dtype: Any) -> int:
    """Bytes of VMEM that an embedding takes."""
    return round_up(dim, LANES) * np.dtype(dtype).itemsize


def _parts_of_document(length: int, dim: int, dtype: Any) -> int:
    """In how many parts a document's tokens go through VMEM."""
    rows = 2 * SUBLANES  # of a tile of bfloat16
    most = max(DOCUMENT_BYTES // _embedding_bytes(dim, dtype) // rows * rows, rows)
    return math.ceil(length / most)


def _found_at_a_time(lanes: Array, documents: Array) -> int:
    """Of how many documents winners are found again at a time; a divisor of their number."""
    blocks = len(documents) // DOCUMENTS
    of_block = math.prod(lanes.shape[:3]) * DOCUMENTS
    most = FOUND_WINNERS // (of_block * winner_dtype(documents.shape[1]).itemsize)
    most = max(min(most, blocks), 1)
    return DOCUMENTS * next(size for size in range(most, 0, -1) if blocks % size == 0)


def _whole_blocks(documents: Float[Array, "N T D"]) -> Float[Array, "N_padded T D"]:
    return fill(documents, 0, round_up(len(documents), DOCUMENTS))
