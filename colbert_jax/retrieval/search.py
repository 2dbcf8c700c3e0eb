"""Exact search: every query against every document, streamed block by block.

Documents are sorted by length and encoded in blocks of a few static shapes; each block is scored
against all queries and forgotten, so memory does not grow with the corpus.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from colbert_jax.colbert import Embed, Params
from colbert_jax.maxsim import maxsim
from colbert_jax.tokenization import ColbertTokenizer

Run = dict[str, dict[str, float]]  # query id -> document id -> score


def score_block(
    embed: Embed,
    params: Params,
    query_embeddings: Float[Array, "Q S D"],
    query_mask: Bool[Array, "Q S"],
    input_ids: Int[Array, "N T"],
    attention_mask: Bool[Array, "N T"],
    scoring_mask: Bool[Array, "N T"],
) -> Float[Array, "Q N"]:
    """Encodes a block of documents and scores every query against it.

    Queries go a few at a time: all pairs of similarities at once would fill the memory that the
    block was cut to spare.
    """
    documents = embed(params, input_ids, attention_mask)
    against = jax.vmap(maxsim, in_axes=(None, 0, None, 0))
    return jax.lax.map(
        lambda query: against(query[0], documents, query[1], scoring_mask),
        (query_embeddings, query_mask),
        batch_size=16,
    )


def encode_queries(
    embed: Embed, params: Params, tokenizer: ColbertTokenizer, texts: list[str], batch_size: int
) -> tuple[Float[Array, "Q S D"], Bool[Array, "Q S"]]:
    """Token embeddings and scoring masks of all queries, in their order."""
    tokens = tokenizer.queries(texts)
    blocks = []
    for start in range(0, len(texts), batch_size):
        ids, mask = (
            pad_rows(tokens[key][start : start + batch_size], batch_size)
            for key in ("input_ids", "attention_mask")
        )
        blocks.append(embed(params, jnp.asarray(ids), jnp.asarray(mask)))
    return jnp.concatenate(blocks)[: len(texts)], jnp.asarray(tokens["scoring_mask"])


def make_search(
    embed: Embed, tokenizer: ColbertTokenizer, *, batch_size: int = 64
) -> Callable[..., Run]:
    """Makes `search(params, queries, documents, k)`; its compiled programs are kept between calls.

    Args:
      embed: tokens to token embeddings.
      tokenizer: the model's.
      batch_size: documents of a block.

    Returns:
      A function from parameters, `{id: text}` queries and `{id: text}` documents to each query's
      `k` best documents with their scores; equal scores are ordered by document id.
    """
    embed_queries = jax.jit(embed)
    score = jax.jit(functools.partial(score_block, embed))
    longest = tokenizer.config.document_length
    # Four static lengths: each costs a compilation, and more would spare little padding.
    lengths = sorted({-(-longest * quarter // 4) for quarter in (1, 2, 3, 4)})

    def search(
        params: Params, queries: Mapping[str, str], documents: Mapping[str, str], k: int
    ) -> Run:
        tokens = tokenizer.documents(list(documents.values()))
        sizes = tokens["attention_mask"].sum(axis=1)
        ids = np.array(list(documents))
        order = np.lexsort((ids, sizes))
        query_embeddings, query_mask = encode_queries(
            embed_queries, params, tokenizer, list(queries.values()), batch_size
        )
        best = _Best(len(queries), min(k, len(documents)))

        def rank(rows: np.ndarray, scores: Float[Array, "Q N"]) -> None:
            best.add(ids[rows], np.asarray(scores)[:, : len(rows)])

        pending: Any = None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = next(length for length in lengths if length >= sizes[rows].max())
            block = [
                pad_rows(_fit(tokens[key][rows], width), batch_size)
                for key in ("input_ids", "attention_mask", "scoring_mask")
            ]
            scores = score(params, query_embeddings, query_mask, *block)
            if pending is not None:  # the device works on this block while the last is ranked
                rank(*pending)
            pending = (rows, scores)
        if pending is not None:
            rank(*pending)
        return dict(zip(queries, best.rankings(), strict=True))

    return search


class _Best:
    """The k best documents of every query so far."""

    def __init__(self, queries: int, k: int):
        self.k = k
        self.scores = np.zeros((queries, 0), np.float32)
        self.ids = np.zeros((queries, 0), dtype="U1")

    def add(self, ids: np.ndarray, scores: np.ndarray) -> None:
        """Takes a block's ids `[N]` and scores `[Q, N]`."""
        every_id = np.broadcast_to(ids, scores.shape)
        self.ids = np.concatenate([self.ids, every_id], axis=1)
        self.scores = np.concatenate([self.scores, scores], axis=1)
        order = np.lexsort((self.ids, -self.scores), axis=1)[:, : self.k]
        self.ids = np.take_along_axis(self.ids, order, axis=1)
        self.scores = np.take_along_axis(self.scores, order, axis=1)

    def rankings(self) -> list[dict[str, float]]:
        """One `{document id: score}` a query, best first."""
        return [
            dict(zip(ids.tolist(), scores.tolist(), strict=True))
            for ids, scores in zip(self.ids, self.scores, strict=True)
        ]


def _fit(x: np.ndarray, width: int) -> np.ndarray:
    """Columns cut or padded with zeros to `width`."""
    return np.pad(x[:, :width], ((0, 0), (0, max(width - x.shape[1], 0))))


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Rows padded with zeros to a static number."""
    return np.pad(x, ((0, rows - len(x)), (0, 0)))
