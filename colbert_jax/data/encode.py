"""Rows to a batch of tokens: the last step of the input, on the host."""

from collections.abc import Callable
from typing import Any

import numpy as np

from colbert_jax.data.rows import Row
from colbert_jax.tokenization import ColbertTokenizer


def make_encode(tokenizer: ColbertTokenizer) -> Callable[[list[Row], int], dict[str, Any]]:
    """Makes `encode(rows, documents_per_query) -> batch`.

    The batch is `{"query": {...[B, S]}, "document": {...[B, K, T]}}`, each with `input_ids` int32,
    `attention_mask` and `scoring_mask` bool, and `"scores"[B, K]` float32 where rows have them.
    Documents are padded to the full length: one static shape is one compiled program.
    """

    def encode(rows: list[Row], documents_per_query: int) -> dict[str, Any]:
        texts = [text for row in rows for text in row["documents"]]
        tokens = tokenizer.documents(texts, length=tokenizer.config.document_length)
        batch: dict[str, Any] = {
            "query": tokenizer.queries([row["query"] for row in rows]),
            "document": {
                name: x.reshape(len(rows), documents_per_query, -1) for name, x in tokens.items()
            },
        }
        scores = [row["scores"] for row in rows]
        if all(s is not None for s in scores):
            batch["scores"] = np.array(scores, np.float32)
        return batch

    return encode
