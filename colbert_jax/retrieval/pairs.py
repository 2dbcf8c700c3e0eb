"""Scores of chosen query-document pairs: a query's own document, a teacher's candidates."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Num

from colbert_jax.maxsim import maxsim
from colbert_jax.retrieval.encode import Queries, pad_rows
from colbert_jax.retrieval.index import Index
from colbert_jax.retrieval.search import decode
from colbert_jax.sharding import AXIS_RULES, batch_shards, put_batch, replicated


def score_pairs(
    queries: Queries,
    index: Index,
    pairs: Sequence[tuple[int, int]] | np.ndarray,
    mesh: Mesh,
    batch_size: int = 64,
) -> Float[np.ndarray, "P"]:
    """MaxSim of each pair.

    Args:
      queries: encoded queries, on the host.
      index: the documents.
      pairs: `pairs[pair, (query, document)]`, places in both.
      mesh: pairs are split over its `data` and `fsdp` axes.
      batch_size: pairs that each device scores at a time.

    Returns:
      `scores[pair]`, float32.
    """
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    size = batch_size * batch_shards(mesh)
    score = _make_score(mesh)
    # Documents of like length together, for the least padding.
    order = np.argsort(index.lengths_of(pairs[:, 1]), kind="stable")
    scores = np.zeros(len(pairs), np.float32)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        block = index.take(pairs[chosen, 1], size)
        mine = (pad_rows(x[pairs[chosen, 0]], size) for x in queries)
        inputs = (put_batch(x, mesh) for x in (*mine, *block[1:]))
        scores[chosen] = jax.device_get(score(*inputs))[: len(chosen)]
    return scores


@functools.lru_cache(maxsize=8)
def _make_score(mesh: Mesh) -> Callable[..., Float[Array, "P"]]:
    def score(
        queries: Float[Array, "P S D"],
        query_mask: Bool[Array, "P S"],
        embeddings: Num[Array, "P T D"],
        document_mask: Bool[Array, "P T"],
        scales: Float[Array, "P T"] | None,
    ) -> Float[Array, "P"]:
        with jax.default_matmul_precision("float32"):
            documents = decode(embeddings, scales)
            return jax.vmap(maxsim)(queries, documents, query_mask, document_mask)

    split = PartitionSpec(AXIS_RULES["batch"])
    shared = jax.shard_map(score, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return jax.jit(shared, out_shardings=replicated(mesh))
