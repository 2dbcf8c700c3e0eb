"""BM25, the baseline that needs no training."""

import logging
import re
from collections.abc import Mapping

import numpy as np

# A new word starts where a capital follows a small letter or a digit (`camel|Case`), and at the
# last capital of a run that a small letter follows (`HTTP|Server`).
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W\d_]+|\d+")


def tokenize(text: str) -> list[str]:
    """Splits text into lower-case words, and names of code into the words they are made of.

    Words are runs of letters (of any alphabet) or of digits; camelCase is taken apart, and so is
    snake_case. `HTTPServer.read_line2` gives `http server read line 2`. Nothing is stemmed and no
    word is left out.
    """
    return _WORD.findall(_CAMEL_CASE.sub(" ", text).lower())


def search(
    documents: Mapping[str, str],
    queries: Mapping[str, str],
    k: int,
    *,
    k1: float = 1.5,
    b: float = 0.75,
) -> dict[str, dict[str, float]]:
    """Finds the `k` best documents of each query by BM25 as Lucene computes it.

    The variant is the one that Kamphuis et al., "Which BM25 Do You Mean?" (ECIR 2020), call
    Lucene (accurate); the program is bm25s (arXiv 2407.03618).

    Args:
      documents: `documents[document id]`, the text.
      queries: `queries[query id]`, the text.
      k: documents for each query at most.
      k1: how soon more of the same word stop counting.
      b: how much long documents are held back, 0 to 1.

    Returns:
      `run[query id][document id]`, the score (unitless, above 0), best first; equal scores are
      ordered by document id, and the k-th place is given away by that order too. Documents that
      share no word with the query are left out, so a query may have fewer than `k`, or none.
    """
    # Here, because importing it touches JAX's devices, before which processes must have joined.
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it announces each step of indexing
    document_ids = np.array(sorted(documents), dtype=object)
    corpus = [tokenize(documents[document_id]) for document_id in document_ids]
    run: dict[str, dict[str, float]] = {query_id: {} for query_id in queries}
    if not any(corpus):
        return run  # bm25s cannot index a corpus without words
    index = bm25s.BM25(method="lucene", k1=k1, b=b)
    index.index(corpus, show_progress=False)
    for query_id, query in queries.items():
        words = index.get_tokens_ids(tokenize(query))
        if words:
            scores = index.get_scores_from_ids(words)
            best = _best(scores, k)
            run[query_id] = dict(zip(document_ids[best], map(float, scores[best]), strict=True))
    return run


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the `k` highest scores above 0, highest first, equal ones by position."""
    positions = np.flatnonzero(scores > 0)
    if len(positions) > k:
        # Sorting a million documents for each query would take longer than scoring them.
        lowest = np.partition(scores[positions], len(positions) - k)[len(positions) - k]
        positions = positions[scores[positions] >= lowest]
    return positions[np.argsort(-scores[positions], kind="stable")][:k]
