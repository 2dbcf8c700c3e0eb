"""MaxSim, the score of late interaction (arXiv 2004.12832, equation 3).

One readable function scores one (query, document) pair; `jax.vmap` makes it all pairs of a batch
and all candidates of a query. `maxsim_all_pairs` is the same numbers in bounded memory, for
training: by XLA, on TPU by the kernels of `maxsim_tpu.py`, or on GPU, where they are asked for, by
those of `maxsim_gpu.py`. Shape letters: Q queries, N documents, C candidates of a query, S query
tokens, T document tokens, D embedding size.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from colbert_jax import maxsim_gpu, maxsim_kernels, maxsim_tpu
from colbert_jax.sharding import platform

# Similarities held at a time. On CPU 4 MB of float32, which stay in the cache: forward and backward
# of 64 pairs took 70 ms, against 110 ms with 64 MB and 253 ms for all at once. A matrix unit wants
# larger products.
TILE_SIMILARITIES = {"cpu": 2**20, "gpu": 2**26, "tpu": 2**26}

# Which document token won is kept for the backward pass up to this many bytes, one or two for each
# query token and document; beyond, the backward pass finds the winners again.
KEPT_WINNERS = 2**30


def maxsim(
    query_embeddings: Float[Array, "S D"],
    document_embeddings: Float[Array, "T D"],
    query_mask: Bool[Array, "S"],
    document_mask: Bool[Array, "T"],
    masked_similarity: float | None = None,
) -> Float[Array, ""]:
    """Sum over query tokens of the largest dot product with any document token.

    Args:
      query_embeddings: `query_embeddings[query_token, dim]`.
      document_embeddings: `document_embeddings[document_token, dim]`.
      query_mask: `query_mask[query_token]`, True where a query token counts.
      document_mask: `document_mask[document_token]`, True where a document token may win.
      masked_similarity: None keeps masked document tokens from winning; a document with no token
        left then scores 0. A number is the similarity that masked tokens get instead: 0 is what
        PyLate's plain path does in training.

    Returns:
      The score, float32.
    """
    similarities = jnp.einsum(
        "sd,td->st", query_embeddings, document_embeddings, preferred_element_type=jnp.float32
    )
    fill = -jnp.inf if masked_similarity is None else masked_similarity
    best = jnp.where(document_mask, similarities, fill).max(axis=-1)
    if masked_similarity is None:
        best = jnp.where(document_mask.any(), best, 0.0)
    return jnp.where(query_mask, best, 0.0).sum()


def maxsim_all_pairs_reference(
    query_embeddings: Float[Array, "Q S D"],
    document_embeddings: Float[Array, "N T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "N T"],
    masked_similarity: float | None = None,
) -> Float[Array, "Q N"]:
    """`scores[query, document]` of every pair, `maxsim` vmapped twice: the definition.

    It holds all Q x N x S x T similarities; `maxsim_all_pairs` gives the same without.
    """
    score = functools.partial(maxsim, masked_similarity=masked_similarity)
    against_documents = jax.vmap(score, in_axes=(None, 0, None, 0))
    return jax.vmap(against_documents, in_axes=(0, None, 0, None))(
        query_embeddings, document_embeddings, query_mask, document_mask
    )


def maxsim_candidates(
    query_embeddings: Float[Array, "Q S D"],
    document_embeddings: Float[Array, "Q C T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "Q C T"],
    masked_similarity: float | None = None,
) -> Float[Array, "Q C"]:
    """`scores[query, candidate]` of every query against its own candidates, float32."""
    score = functools.partial(maxsim, masked_similarity=masked_similarity)
    against_candidates = jax.vmap(score, in_axes=(None, 0, None, 0))
    return jax.vmap(against_candidates)(
        query_embeddings, document_embeddings, query_mask, document_mask
    )


def maxsim_all_pairs(
    query_embeddings: Float[Array, "Q S D"],
    document_embeddings: Float[Array, "N T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "N T"],
    masked_similarity: float | None = None,
    keep_winners: bool | None = None,
    kernels: bool = False,
) -> Float[Array, "Q N"]:
    """`scores[query, document]` of every pair, a tile of queries and documents at a time.

    Arguments, result and gradient are those of `maxsim_all_pairs_reference`, except that where
    several document tokens tie for a query token the first of them takes the whole gradient.

    Args:
      query_embeddings: `query_embeddings[query, query_token, dim]`.
      document_embeddings: `document_embeddings[document, document_token, dim]`.
      query_mask: as in `maxsim`, for every query.
      document_mask: as in `maxsim`, for every document.
      masked_similarity: as in `maxsim`.
      keep_winners: whether the backward pass is handed the token that won for each query token and
        document (Q x S x N small integers) or finds it again, for a quarter more arithmetic. None
        keeps up to `KEPT_WINNERS` bytes.
      kernels: whether a GPU computes it by our kernels, where these take the embeddings. A TPU
        always does, and a CPU never.

    Returns:
      `scores[query, document]`, float32.
    """
    inputs = (query_embeddings, document_embeddings, query_mask, document_mask)
    inputs = _as_kernels_take_them(*inputs, masked_similarity, kernels)
    return _scores(*inputs, masked_similarity, keep_winners, (), "gather")


def maxsim_global(
    query_embeddings: Float[Array, "Q S D"],
    document_embeddings: Float[Array, "N T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "N T"],
    masked_similarity: float | None = None,
    axes: tuple[str, ...] = (),
    exchange: str = "gather",
    kernels: bool = False,
) -> Float[Array, "Q N_all"]:
    """Scores of this device's queries against the documents of all devices, inside a `shard_map`.

    Args:
      query_embeddings: as in `maxsim_all_pairs`, this device's share.
      document_embeddings: likewise.
      query_mask: likewise.
      document_mask: likewise.
      masked_similarity: as in `maxsim`.
      axes: the mesh axes that split the batch; none makes it `maxsim_all_pairs`.
      exchange: how documents travel. "gather": one all-gather, and in the backward pass one
        reduce-scatter of their gradient, in float32; every device holds all documents. "ring": each
        device hands its neighbour the documents that it has just seen, while it scores the next
        ones, and in the backward pass their gradient with them (as in Ring Attention, arXiv
        2310.01889); a device holds the documents of two.
      kernels: as in `maxsim_all_pairs`.

    Returns:
      `scores[query, document]`, float32, documents in the order of the devices.
    """
    inputs = (query_embeddings, document_embeddings, query_mask, document_mask)
    inputs = _as_kernels_take_them(*inputs, masked_similarity, kernels)
    return _scores(*inputs, masked_similarity, None, axes, exchange)


def _as_kernels_take_them(
    queries, documents, query_mask, document_mask, masked_similarity, kernels
):
    """For kernels, embeddings that need no masks, and None for these; else what it is given."""
    inputs = (queries, documents, query_mask, document_mask)
    used = platform() == "tpu" or (kernels and platform() == "gpu")
    if not used or not maxsim_kernels.takes(queries.dtype, documents.dtype, masked_similarity):
        return inputs
    return *_kernels().without_masks(*inputs, masked_similarity), None, None


def _kernels() -> Any:
    """The module whose kernels the platform runs."""
    return maxsim_tpu if platform() == "tpu" else maxsim_gpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _scores(
    queries, documents, query_mask, document_mask, masked_similarity, keep_winners, axes, exchange
):
    del keep_winners  # without a backward pass nobody asks for them
    inputs = (queries, documents, query_mask, document_mask)
    return _scores_forward(*inputs, masked_similarity, False, axes, exchange)[0]


def _scores_forward(
    queries, documents, query_mask, document_mask, masked_similarity, keep_winners, axes, exchange
):
    inputs = (queries, documents, query_mask, document_mask)
    if exchange == "ring" and axes:
        return _ring_scores(*inputs, masked_similarity, axes), (*inputs, None)
    if axes:
        documents, document_mask = (
            jax.lax.all_gather(x, axes, tiled=True) for x in (documents, document_mask)
        )
    inputs = (queries, documents, query_mask, document_mask)
    return _forward(*inputs, masked_similarity, keep_winners)


def _scores_backward(masked_similarity, keep_winners, axes, exchange, residuals, cotangent):
    """The gradient of the scores, in the dtypes of the embeddings."""
    del keep_winners
    queries, documents, _, _, _ = residuals
    if exchange == "ring" and axes:
        into_queries, into_documents = _ring_gradients(
            residuals, cotangent, masked_similarity, axes
        )
    else:
        into_queries, into_documents = _gradients(residuals, cotangent, masked_similarity)
        if axes:
            into_documents = jax.lax.psum_scatter(into_documents, axes, tiled=True)
    # Both or none: XLA could put off the one that is needed later, and keep all documents and
    # winners for it while the encoder's backward pass needs the memory.
    into_queries, into_documents = jax.lax.optimization_barrier((into_queries, into_documents))
    return into_queries.astype(queries.dtype), into_documents.astype(documents.dtype), None, None


_scores.defvjp(_scores_forward, _scores_backward)


def _forward(queries, documents, query_mask, document_mask, masked_similarity, keep_winners):
    """Scores, and what the backward pass needs: inputs and perhaps the winners."""
    (count, tokens, _), (total, length, _) = queries.shape, documents.shape
    if keep_winners is None:
        keep_winners = count * tokens * total * _nobody(length).itemsize <= KEPT_WINNERS
    if document_mask is None:
        scores, winners = _kernels().scores_and_winners(queries, documents, keep_winners)
        return scores, (queries, documents, query_mask, document_mask, winners)
    per_tile = _tile(queries.shape, documents.shape)
    document_tiles = tuple(_cut(x, per_tile[1]) for x in (documents, document_mask))

    def score_queries(query_tile):
        queries, query_mask = query_tile

        def score_tile(document_tile):
            documents, document_mask = document_tile
            scores, winner = _score(
                queries, documents, query_mask, document_mask, masked_similarity
            )
            return scores, winner if keep_winners else None

        scores, winners = jax.lax.map(score_tile, document_tiles)
        return jnp.moveaxis(scores, 0, 1).reshape(len(queries), -1), winners

    query_tiles = tuple(_cut(x, per_tile[0]) for x in (queries, query_mask))
    scores, winners = jax.lax.map(score_queries, query_tiles)
    scores = scores.reshape(-1, scores.shape[-1])[:count, :total]
    return scores, (queries, documents, query_mask, document_mask, winners)


def _score(queries, documents, query_mask, document_mask, masked_similarity):
    """One tile's `scores[q, n]`, and `winner[q, s, n]`: `_nobody(T)` stands for nobody."""
    nobody = _nobody(documents.shape[1])
    fill = -jnp.inf if masked_similarity is None else masked_similarity
    similarities = jnp.einsum(
        "qsd,ntd->qsnt", queries, documents, preferred_element_type=jnp.float32
    )
    similarities = jnp.where(document_mask, similarities, fill)
    winner = _first_largest(similarities) if platform() == "cpu" else similarities.argmax(axis=-1)
    best = similarities.max(axis=-1)
    if masked_similarity is None:
        best = jnp.where(document_mask.any(axis=-1), best, 0.0)
    real = jnp.take_along_axis(document_mask[None, None], winner[..., None], axis=-1)[..., 0]
    real &= query_mask[:, :, None]
    scores = jnp.where(query_mask[:, :, None], best, 0.0).sum(axis=1)
    return scores, jnp.where(real, winner, nobody).astype(nobody.dtype)


def _first_largest(x: Float[Array, "... T"]) -> Int[Array, "..."]:
    """The argmax by two plain reductions.

    XLA's CPU backend takes argmax one element at a time, for twice as long as the products that the
    similarities come from; these it vectorises.
    """
    position = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.where(x >= x.max(axis=-1, keepdims=True), position, position[-1]).min(axis=-1)


def _gradients(residuals, cotangent, masked_similarity):
    """Each query token's gradient is a sum of winning document tokens, and the other way round.

    Returns `into_queries[Q, S, D]` and `into_documents[N, T, D]`, float32.
    """
    queries, documents, query_mask, document_mask, winners = residuals
    if document_mask is None:
        return _kernels().gradients(queries, documents, winners, cotangent)
    (count, tokens, dim), (total, length, _) = queries.shape, documents.shape
    nobody = _nobody(length)
    per_tile = _tile(queries.shape, documents.shape)
    document_tiles = tuple(_cut(x, per_tile[1]) for x in (documents, document_mask))
    cotangent = jnp.pad(cotangent, ((0, 0), (0, -total % per_tile[1])))

    def add_queries(into_documents, query_tile):
        queries, query_mask, cotangent, winners = query_tile
        cotangents = cotangent.reshape(len(queries), -1, per_tile[1]).swapaxes(0, 1)

        def add_tile(carry, document_tile):
            into_queries, into_documents = carry
            index, documents, document_mask, grad, winner = document_tile
            if winner is None:
                winner = _score(queries, documents, query_mask, document_mask, masked_similarity)[1]
            weight = jnp.where(winner != nobody, grad[:, None, :], 0.0)
            winner = jnp.where(winner == nobody, 0, winner).astype(jnp.int32)
            product = _scatter if platform() == "cpu" else _one_hot
            to_queries, to_documents = product(queries, documents, winner, weight)
            return (into_queries + to_queries, into_documents.at[index].add(to_documents)), None

        start = (jnp.zeros(queries.shape, jnp.float32), into_documents)
        index = jnp.arange(len(into_documents))
        tiles = (index, *document_tiles, cotangents, winners)
        (into_queries, into_documents), _ = jax.lax.scan(add_tile, start, tiles)
        return into_documents, into_queries

    into_documents = jnp.zeros(document_tiles[0].shape, jnp.float32)
    query_tiles = tuple(_cut(x, per_tile[0]) for x in (queries, query_mask, cotangent))
    into_documents, into_queries = jax.lax.scan(
        add_queries, into_documents, (*query_tiles, winners)
    )
    return (
        into_queries.reshape(-1, tokens, dim)[:count],
        into_documents.reshape(-1, length, dim)[:total],
    )


def _scatter(
    queries: Float[Array, "Q S D"],
    documents: Float[Array, "N T D"],
    winner: Int[Array, "Q S N"],
    weight: Float[Array, "Q S N"],
) -> tuple[Float[Array, "Q S D"], Float[Array, "N T D"]]:
    """Gradients by gather and scatter-add, the least arithmetic: for CPU."""
    rows = jnp.arange(documents.shape[0])
    won = documents[rows[None, None], winner].astype(jnp.float32)
    into_queries = jnp.einsum("qsn,qsnd->qsd", weight, won)
    given = weight[..., None] * queries[:, :, None, :].astype(jnp.float32)
    into_documents = jnp.zeros(documents.shape, jnp.float32)
    return into_queries, into_documents.at[rows[None, None], winner].add(given)


def _one_hot(
    queries: Float[Array, "Q S D"],
    documents: Float[Array, "N T D"],
    winner: Int[Array, "Q S N"],
    weight: Float[Array, "Q S N"],
) -> tuple[Float[Array, "Q S D"], Float[Array, "N T D"]]:
    """Gradients by two matrix products with the weighted one-hot winners.

    For accelerators: deterministic, made for matrix units, and free of the fp32 scatter-add that
    XLA runs hundreds of times too slowly on GPU (openxla/xla issue 46225).
    """
    hot = winner[..., None] == jnp.arange(documents.shape[1])
    spread = jnp.where(hot, weight[..., None], 0.0).astype(queries.dtype)
    into_queries = jnp.einsum("qsnt,ntd->qsd", spread, documents, preferred_element_type="float32")
    into_documents = jnp.einsum("qsnt,qsd->ntd", spread, queries, preferred_element_type="float32")
    return into_queries, into_documents


def _ring_scores(queries, documents, query_mask, document_mask, masked_similarity, axes):
    """`scores[Q, N_all]`; after k handovers a device holds the documents of the k-th before it."""

    def score_visitors(visiting, _):
        # Sent on before it is used, so that the transfer overlaps with the arithmetic.
        arriving = _hand_on(visiting, axes)
        documents, document_mask = visiting
        inputs = (queries, documents, query_mask, document_mask)
        return arriving, _forward(*inputs, masked_similarity, False)[0]

    devices = jax.lax.axis_size(axes)
    _, scores = jax.lax.scan(score_visitors, (documents, document_mask), length=devices)
    scores = scores[(jax.lax.axis_index(axes) - jnp.arange(devices)) % devices]
    return jnp.moveaxis(scores, 0, 1).reshape(len(queries), -1)


def _ring_gradients(residuals, cotangent, masked_similarity, axes):
    """Gradients as `_gradients` returns them, of this device's queries and documents."""
    queries, documents, query_mask, document_mask, _ = residuals
    devices = jax.lax.axis_size(axes)
    cotangents = jnp.moveaxis(cotangent.reshape(len(queries), devices, -1), 1, 0)
    cotangents = cotangents[(jax.lax.axis_index(axes) - jnp.arange(devices)) % devices]

    def add_visitors(carry, grad):
        visiting, left_behind, into_queries = carry
        # Neither transfer waits for this device's arithmetic: a gradient follows its documents one
        # step later.
        arriving = _hand_on(visiting, axes)
        earlier = _hand_on(left_behind, axes)
        documents, document_mask = visiting
        inputs = (queries, documents, query_mask, document_mask, None)
        to_queries, to_documents = _gradients(inputs, grad, masked_similarity)
        return (arriving, earlier + to_documents, into_queries + to_queries), None

    nothing = jnp.zeros(documents.shape, jnp.float32), jnp.zeros(queries.shape, jnp.float32)
    (_, into_documents, into_queries), _ = jax.lax.scan(
        add_visitors, ((documents, document_mask), *nothing), cotangents
    )
    return into_queries, _hand_on(into_documents, axes)  # the last step of the way home


def _hand_on(x, axes):
    """Each device's `x` to the next device of the ring."""
    devices = jax.lax.axis_size(axes)
    return jax.lax.ppermute(x, axes, [(i, (i + 1) % devices) for i in range(devices)])


def _nobody(length: int) -> np.unsignedinteger:
    """The largest value of the smallest dtype that holds token positions and one value more."""
    return np.uint8(2**8 - 1) if length < 2**8 else np.uint16(2**16 - 1)


def _tile(queries: tuple[int, ...], documents: tuple[int, ...]) -> tuple[int, int]:
    """How many queries and documents a tile has: as many of each as its similarities allow."""
    (count, tokens, _), (total, length, _) = queries, documents
    kind = platform()
    pairs = max(1, TILE_SIMILARITIES.get(kind, 2**26) // (tokens * length))
    # A CPU is fastest with one document against many queries; a matrix unit does not mind, and a
    # square tile reads the least.
    wanted = pairs if kind == "cpu" else math.isqrt(pairs)
    per_query_tile = _even(count, max(wanted, pairs // total, 1))
    return per_query_tile, _even(total, max(pairs // per_query_tile, 1))


def _even(count: int, most: int) -> int:
    """The largest size up to `most` that divides `count`, which then needs no padding.

    Where none is near, `most`: a tile partly of zeros costs less than many small ones.
    """
    most = min(count, most)
    divisor = next(size for size in range(most, 0, -1) if count % size == 0)
    return divisor if 2 * divisor > most else most


def _cut(x: Array, size: int) -> Array:
    """`x[N, ...]` as `[ceil(N / size), size, ...]`, the last block filled with zeros."""
    missing = -len(x) % size
    x = jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:])))
    return x.reshape(-1, size, *x.shape[1:])
