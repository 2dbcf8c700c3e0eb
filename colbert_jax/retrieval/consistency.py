"""Consistency filtering: pairs are kept whose document a model finds for their query.

As in the cleaning of nomic's pairs (arXiv 2402.01613, section 3.2): a pair stays if its document is
among the first k for its query, beside a sample of the source's documents.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.colbert import Embed, Params
from colbert_jax.data.rows import Row
from colbert_jax.maxsim import maxsim, maxsim_all_pairs
from colbert_jax.retrieval.encode import pad_rows
from colbert_jax.tokenization import ColbertTokenizer


def make_consistency_filter(
    embed: Embed,
    params: Params,
    tokenizer: ColbertTokenizer,
    sample: Sequence[str],
    top_k: int,
    block: int = 64,
) -> Callable[[Sequence[Row]], list[bool]]:
    """Makes `keep(rows)`, which says of each row whether its first document is consistent.

    Args:
      embed: tokens to token embeddings.
      params: the model's.
      tokenizer: the model's.
      sample: documents that a row's own must hold its place among; equal ones are no rivals.
      top_k: how far down the row's own document may stand.
      block: texts that are encoded at a time.
    """
    encode = jax.jit(embed)
    own_scores = jax.jit(jax.vmap(maxsim))
    all_scores = jax.jit(maxsim_all_pairs)
    longest = tokenizer.config.document_length

    def embeddings(tokens: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
        ids, attention, scoring = (
            jnp.asarray(pad_rows(tokens[name], block))
            for name in ("input_ids", "attention_mask", "scoring_mask")
        )
        return encode(params, ids, attention), scoring

    # bfloat16 halves what stays in memory, and is how the phases compute.
    rivals = [
        (jnp.asarray(vectors, jnp.bfloat16), mask)
        for start in range(0, len(sample), block)
        for vectors, mask in [
            embeddings(tokenizer.documents(sample[start : start + block], longest))
        ]
    ]
    texts = np.array(sample, object)

    def keep_block(rows: Sequence[Row]) -> list[bool]:
        queries, query_mask = embeddings(tokenizer.queries([row["query"] for row in rows]))
        positives = [row["documents"][0] for row in rows]
        documents, document_mask = embeddings(tokenizer.documents(positives, longest))
        # Rounded like the sample, or a document would differ from itself.
        documents = jnp.asarray(documents, jnp.bfloat16)
        own = np.asarray(own_scores(queries, documents, query_mask, document_mask))[: len(rows)]
        scores = np.concatenate(
            [np.asarray(all_scores(queries, d, query_mask, mask)) for d, mask in rivals], axis=1
        )[: len(rows), : len(texts)]
        better = (scores > own[:, None]) & (texts != np.array(positives, object)[:, None])
        return (better.sum(axis=1) < top_k).tolist()

    def keep(rows: Sequence[Row]) -> list[bool]:
        return [
            kept
            for start in range(0, len(rows), block)
            for kept in keep_block(rows[start : start + block])
        ]

    return keep
