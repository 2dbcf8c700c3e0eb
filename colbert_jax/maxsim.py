"""MaxSim, the score of late interaction (arXiv 2004.12832, equation 3).

One readable function scores one (query, document) pair; `jax.vmap` makes it all pairs of a batch
and all candidates of a query. `maxsim_all_pairs` is the same numbers in bounded memory, for
training. Shape letters: Q queries, N documents, C candidates of a query, S query tokens,
T document tokens, D embedding size.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from colbert_jax.sharding import AXIS_RULES, batch_shards

# Similarities held at a time. On CPU 4 MB of float32, which stay in the cache: forward and backward
# of 64 pairs took 70 ms, against 110 ms with 64 MB and 253 ms for all at once. A matrix unit wants
# larger products.
BLOCK_SIMILARITIES = {"cpu": 2**20, "gpu": 2**26, "tpu": 2**26}


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def maxsim_all_pairs(
    query_embeddings: Float[Array, "Q S D"],
    document_embeddings: Float[Array, "N T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "N T"],
    masked_similarity: float | None = None,
) -> Float[Array, "Q N"]:
    """`scores[query, document]` of every pair, a block of documents at a time.

    Arguments, result and gradient are those of `maxsim_all_pairs_reference`, except that where
    several document tokens tie for a query token the first of them takes the whole gradient.
    Memory grows with Q x N x S, one small integer each: which document token won.
    """
    return _forward(
        query_embeddings, document_embeddings, query_mask, document_mask, masked_similarity
    )[0]


def _forward(query_embeddings, document_embeddings, query_mask, document_mask, masked_similarity):
    """Scores, and what the backward pass needs: inputs and the winners."""
    count, length, _ = document_embeddings.shape
    blocks = _blocks(query_embeddings, document_embeddings)
    fill = -jnp.inf if masked_similarity is None else masked_similarity
    narrow = jnp.uint8 if length < 255 else jnp.uint16
    nobody = jnp.iinfo(narrow).max  # stands for a winner that is masked: it gets no gradient

    def score_block(block):
        documents, mask = block
        similarities = jnp.einsum(
            "qsd,ntd->qsnt", query_embeddings, documents, preferred_element_type=jnp.float32
        )
        similarities = jnp.where(mask, similarities, fill)
        winner = jnp.argmax(similarities, axis=-1)
        best = similarities.max(axis=-1)
        if masked_similarity is None:
            best = jnp.where(mask.any(axis=-1), best, 0.0)
        real = jnp.take_along_axis(mask[None, None], winner[..., None], axis=-1)[..., 0]
        scores = jnp.where(query_mask[:, :, None], best, 0.0).sum(axis=1)
        return scores, jnp.where(real, winner, nobody).astype(narrow)

    scores, winners = jax.lax.map(
        score_block, (_cut(document_embeddings, blocks), _cut(document_mask, blocks))
    )
    scores = jnp.moveaxis(scores, 0, 1).reshape(len(query_embeddings), -1)[:, :count]
    return scores, (query_embeddings, document_embeddings, query_mask, winners)


def _backward(masked_similarity, residuals, cotangent):
    """Each query token's gradient is a sum of winning document tokens, and the other way round."""
    del masked_similarity
    query_embeddings, document_embeddings, query_mask, winners = residuals
    count = len(document_embeddings)
    blocks = len(winners)
    nobody = jnp.iinfo(winners.dtype).max
    padded = jnp.pad(cotangent, ((0, 0), (0, -count % blocks)))
    cotangents = jnp.moveaxis(padded.reshape(len(cotangent), blocks, -1), 1, 0)

    def gradient_block(query_gradient, block):
        documents, winner, grad = block
        weight = jnp.where(query_mask[:, :, None] & (winner != nobody), grad[:, None, :], 0.0)
        winner = jnp.where(winner == nobody, 0, winner).astype(jnp.int32)
        # By the platform that is compiled for, which need not be the one that compiles.
        into_queries, into_documents = jax.lax.platform_dependent(
            query_embeddings, documents, winner, weight, cpu=_scatter, default=_one_hot
        )
        return query_gradient + into_queries, into_documents

    query_gradient, document_gradients = jax.lax.scan(
        gradient_block,
        jnp.zeros(query_embeddings.shape, jnp.float32),
        (_cut(document_embeddings, blocks), winners, cotangents),
    )
    document_gradient = document_gradients.reshape(-1, *document_embeddings.shape[1:])[:count]
    return (
        query_gradient.astype(query_embeddings.dtype),
        document_gradient.astype(document_embeddings.dtype),
        None,
        None,
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


maxsim_all_pairs.defvjp(_forward, _backward)


def maxsim_global(
    query_embeddings: Float[Array, "Q S D"],
    document_embeddings: Float[Array, "N T D"],
    query_mask: Bool[Array, "Q S"],
    document_mask: Bool[Array, "N T"],
    masked_similarity: float | None = None,
) -> Float[Array, "Q N"]:
    """`maxsim_all_pairs` of a batch that is split over the devices of the current mesh.

    Each device scores its own queries against all documents: one all-gather of the documents, and
    in the backward pass one reduce-scatter of their gradient. Without a mesh, or where the mesh
    does not divide the batch, it is `maxsim_all_pairs` itself.
    """
    shards = batch_shards()
    if shards == 1 or len(query_embeddings) % shards or len(document_embeddings) % shards:
        return maxsim_all_pairs(
            query_embeddings, document_embeddings, query_mask, document_mask, masked_similarity
        )
    axes = AXIS_RULES["batch"]
    split = PartitionSpec(axes)

    def score_own_queries(queries, documents, queries_mask, documents_mask):
        documents, documents_mask = (
            jax.lax.all_gather(x, axes, tiled=True) for x in (documents, documents_mask)
        )
        return maxsim_all_pairs(queries, documents, queries_mask, documents_mask, masked_similarity)

    return jax.shard_map(
        score_own_queries, in_specs=(split,) * 4, out_specs=split, check_vma=False
    )(query_embeddings, document_embeddings, query_mask, document_mask)


def _blocks(query_embeddings: Float[Array, "Q S D"], documents: Float[Array, "N T D"]) -> int:
    """Number of blocks of documents, so that a block's similarities fit the limit."""
    (queries, tokens, _), (count, length, _) = query_embeddings.shape, documents.shape
    limit = BLOCK_SIMILARITIES.get(jax.default_backend(), 2**26)
    each = max(1, limit // (queries * tokens * length))
    return -(-count // min(each, count))


def _cut(x: Array, blocks: int) -> Array:
    """`x[N, ...]` as `[blocks, ceil(N / blocks), ...]`, the last block filled with zeros."""
    missing = -len(x) % blocks
    x = jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:])))
    return x.reshape(blocks, -1, *x.shape[1:])
