"""Rows to a batch of tokens: the last step of the input, on the host."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from colbert_jax.data.records import Source
from colbert_jax.data.rows import cut_documents
from colbert_jax.tokenization import ColbertTokenizer


def make_encode(tokenizer: ColbertTokenizer) -> Callable[[list[Any], int], dict[str, Any]]:
    """Makes `encode(rows, documents_per_query) -> batch`; rows hold texts, or their token ids.

    The batch is `{"query": {...[B, S]}, "document": {...[B, K, T]}}`, each with `input_ids` int32,
    `attention_mask` and `scoring_mask` bool, and `"scores"[B, K]` float32 where rows have them.
    Documents are padded to the full length: one static shape is one compiled program.
    """

    def encode(rows: list[Any], documents_per_query: int) -> dict[str, Any]:
        queries = [row["query"] for row in rows]
        documents = [text for row in rows for text in row["documents"]]
        if isinstance(queries[0], str):
            queries, documents = tokenizer.query_ids(queries), tokenizer.document_ids(documents)
        tokens = tokenizer.document_batch(documents, tokenizer.config.document_length)
        batch: dict[str, Any] = {
            "query": tokenizer.query_batch(queries),
            "document": {
                name: x.reshape(len(rows), documents_per_query, -1) for name, x in tokens.items()
            },
        }
        scores = [row["scores"] for row in rows]
        if all(s is not None for s in scores):
            batch["scores"] = np.array(scores, np.float32)
        return batch

    return encode


def sample_lengths(
    sources: Mapping[str, Source],
    encode: Callable[[list[Any], int], dict[str, Any]],
    max_documents: int,
    rows: int = 1024,
) -> dict[str, np.ndarray]:
    """Lengths in tokens of some texts, the same on every host: what static lengths are fitted to.

    Args:
      sources: rows by name; each gives its share of rows, from all over it.
      encode: what `make_encode` makes.
      max_documents: documents of a row that are used.
      rows: about how many rows are read.

    Returns:
      `{"query": lengths, "document": lengths}`: tokens up to the last that is looked at or scored.
    """
    found: dict[str, list[np.ndarray]] = {"query": [], "document": []}
    total = sum(len(source) for source in sources.values())
    for name in sorted(sources):
        source = sources[name]
        share = min(len(source), max(1, rows * len(source) // total))
        places = [int(i) for i in np.linspace(0, len(source) - 1, share)]
        documents = min(source.min_documents, max_documents)
        batch = encode(
            [cut_documents(row, documents) for row in source.__getitems__(places)], documents
        )
        for side, lengths in found.items():
            used = batch[side]["attention_mask"] | batch[side]["scoring_mask"]
            used = used.reshape(-1, used.shape[-1])
            lengths.append((used * np.arange(1, used.shape[1] + 1)).max(axis=1))
    return {side: np.concatenate(lengths) for side, lengths in found.items()}
