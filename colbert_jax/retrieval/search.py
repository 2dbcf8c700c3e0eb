"""Exact search: every query against every document, streamed block by block through the devices.

Each device scores its share of a block and keeps the k best documents that it has seen; the shares
meet once, at the end. So neither memory nor traffic grows with the corpus.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

from colbert_jax.colbert import Params
from colbert_jax.maxsim import maxsim_all_pairs
from colbert_jax.retrieval.encode import QUERY_CHUNK, Block, Encoder, Queries, pad_rows
from colbert_jax.sharding import (
    AXIS_RULES,
    batch_shards,
    put_batch,
    put_whole,
    replicated,
)

Run = dict[str, dict[str, float]]  # query id -> document id -> score

_NOBODY = np.iinfo(np.int32).max  # the rank of a place that no document has taken


def decode(
    embeddings: Num[Array, "B T D"], scales: Float[Array, "B T"] | None
) -> Float[Array, "B T D"]:
    """Kept embeddings as float32."""
    decoded = embeddings.astype(jnp.float32)
    return decoded if scales is None else decoded * scales[..., None]


def top_k(
    queries: Queries, blocks: Iterable[Block], ids: Sequence[str], k: int, mesh: Mesh
) -> list[dict[str, float]]:
    """The `k` best documents of each query by MaxSim.

    Args:
      queries: encoded queries.
      blocks: the encoded corpus; each document is in one of them.
      ids: the documents' ids, by position in the corpus.
      k: how many documents to find; of fewer, all are found.
      mesh: blocks are split over its `data` and `fsdp` axes.

    Returns:
      For each query `{document id: score}`, best first; of equal scores the lower id comes first,
      and the k-th place is given away by that order too. A score that is not a number is no hit.
    """
    k = min(k, len(ids))
    by_id = sorted(range(len(ids)), key=ids.__getitem__)
    ranks = np.empty(len(ids), np.int32)
    ranks[by_id] = np.arange(len(ids), dtype=np.int32)
    count = len(queries.embeddings)
    if not count:
        return []
    size = min(QUERY_CHUNK, count)
    chunks = [
        [put_whole(pad_rows(x[i : i + size], size), mesh) for x in queries]
        for i in range(0, count, size)
    ]
    shards = batch_shards(mesh)
    best = [
        (
            put_batch(np.full((shards, size, k), -np.inf, np.float32), mesh),
            put_batch(np.full((shards, size, k), _NOBODY, np.int32), mesh),
        )
        for _ in chunks
    ]
    update = _make_update(mesh, k)
    pending: collections.deque[Array] = collections.deque()
    for block in blocks:
        rank = np.full(len(block.embeddings), _NOBODY, np.int32)
        rank[: len(block.positions)] = ranks[block.positions]
        documents = (*(put_batch(x, mesh) for x in block[1:]), put_batch(rank, mesh))
        for index, chunk in enumerate(chunks):
            best[index] = update(*best[index], *chunk, *documents)
        # A host that runs ahead of its devices would fill their memory with blocks.
        pending.append(best[-1][0])
        if len(pending) > 2:
            pending.popleft().block_until_ready()
    merge = _make_merge(mesh, k)
    found: list[dict[str, float]] = []
    for scores, places in (jax.device_get(merge(*shares)) for shares in best):
        for row, places_of_row in zip(scores, places, strict=True):
            hits = zip(row.tolist(), places_of_row.tolist(), strict=True)
            found.append({ids[by_id[place]]: s for s, place in hits if place != _NOBODY})
    return found[:count]


@functools.lru_cache(maxsize=32)
def _make_update(mesh: Mesh, k: int) -> Callable[..., tuple[Array, Array]]:
    """The compiled step from the best so far and a block to the best, on each device's share."""

    def update(
        best_scores: Float[Array, "1 Q k"],
        best_ranks: Int[Array, "1 Q k"],
        queries: Float[Array, "Q S D"],
        query_mask: Bool[Array, "Q S"],
        embeddings: Num[Array, "B T D"],
        document_mask: Bool[Array, "B T"],
        scales: Float[Array, "B T"] | None,
        ranks: Int[Array, "B"],
    ) -> tuple[Float[Array, "1 Q k"], Int[Array, "1 Q k"]]:
        # What rounds products on an accelerator would order documents by chance.
        with jax.default_matmul_precision("float32"):
            documents = decode(embeddings, scales)
            scores = maxsim_all_pairs(queries, documents, query_mask, document_mask)
        hit = (ranks != _NOBODY) & ~jnp.isnan(scores)
        scores = jnp.concatenate([best_scores[0], jnp.where(hit, scores, -jnp.inf)], axis=1)
        ranks = jnp.concatenate([best_ranks[0], jnp.where(hit, ranks, _NOBODY)], axis=1)
        scores, ranks = _first(scores, ranks, k)
        return scores[None], ranks[None]

    split, whole = PartitionSpec(AXIS_RULES["batch"]), PartitionSpec()
    shared = jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(split, split, whole, whole, split, split, split, split),
        out_specs=(split, split),
        check_vma=False,
    )
    return jax.jit(shared)


@functools.lru_cache(maxsize=32)
def _make_merge(mesh: Mesh, k: int) -> Callable[..., tuple[Array, Array]]:
    """The compiled union of what the devices have found."""

    def merge(
        scores: Float[Array, "shards Q k"], ranks: Int[Array, "shards Q k"]
    ) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
        flat = [jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in (scores, ranks)]
        return _first(flat[0], flat[1], k)

    return jax.jit(merge, out_shardings=replicated(mesh))


def _first(
    scores: Float[Array, "Q N"], ranks: Int[Array, "Q N"], k: int
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The k highest scores of each row, highest first, equal ones by rank."""
    negated, ranks = jax.lax.sort((-scores, ranks), num_keys=2)
    return -negated[:, :k], ranks[:, :k]


def make_search(encoder: Encoder, params: Params) -> Callable[..., Run]:
    """Makes `search(queries, documents, k)`, which encodes documents and forgets them.

    Args:
      encoder: the model's; its compiled programs serve all searches.
      params: the model's.

    Returns:
      A function from `{id: text}` queries and `{id: text}` documents to each query's `k` best
      documents with their scores, as `top_k` orders them.
    """
    params = encoder.place(params)

    def search(queries: Mapping[str, str], documents: Mapping[str, str], k: int) -> Run:
        encoded = encoder.queries(params, list(queries.values()))
        blocks = encoder.documents(params, documents.values())
        found = top_k(encoded, blocks, list(documents), k, encoder.mesh)
        return dict(zip(queries, found, strict=True))

    return search
