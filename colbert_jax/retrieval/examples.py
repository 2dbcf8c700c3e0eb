"""The queries that a model answers best and worst, with why: for a run's report."""

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.explain import Explanation
from colbert_jax.retrieval.metrics import evaluate_queries
from colbert_jax.retrieval.search import Run

MEASURE = "nDCG@10"
SHOWN = 5  # documents of a ranking
TEXT = 1500  # characters of a document

Explain = Callable[[str, Sequence[str]], list[Explanation]]


def describe_queries(
    collection: Collection, runs: Mapping[str, Run], explain: Explain, count: int = 5
) -> dict[str, Any]:
    """Each query's measure, and the best and worst queries with their rankings.

    Args:
      collection: what was searched.
      runs: `runs[system]`; the queries are chosen by the last one.
      explain: compares a query with documents.
      count: how many of the best, and of the worst.

    Returns:
      Plain data: `queries_by_measure` and `examples`, the heat maps as base64 of
      `uint8[query_token, document_token]`, where 0 is a cosine of -1 and 255 one of 1.
    """
    by_system = {
        system: evaluate_queries(collection.qrels, run, MEASURE) for system, run in runs.items()
    }
    values = {q: {s: by_system[s][q] for s in runs} for q in collection.queries}
    *others, system = runs
    baseline = others[0] if others else None

    def rank(query_id: str) -> tuple[float, float, str]:
        # Of equally good answers those tell most that the baseline did not find.
        mine = values[query_id]
        return (-mine[system], mine[baseline] if baseline else 0.0, query_id)

    ordered = sorted(values, key=rank)
    best = ordered[:count]
    worst = [query_id for query_id in reversed(ordered) if query_id not in best][:count]
    examples = [
        _example(kind, query_id, collection, runs[system], values[query_id], explain)
        for kind, chosen in (("best", best), ("worst", worst))
        for query_id in chosen
    ]
    return {
        "queries_by_measure": {"measure": MEASURE, "values": values},
        "examples": examples,
    }


def _example(
    kind: str,
    query_id: str,
    collection: Collection,
    run: Run,
    values: Mapping[str, float],
    explain: Explain,
) -> dict[str, Any]:
    query, judged = collection.queries[query_id], collection.qrels[query_id]
    hits = run.get(query_id, {})
    ranks = {document_id: rank for rank, document_id in enumerate(hits, 1)}
    shown = list(hits)[:SHOWN]
    relevant = [
        d
        for d, relevance in judged.items()
        # BEIR judges some documents that it does not have.
        if relevance > 0 and d not in shown and d in collection.documents
    ]
    # The best-placed answer that the first places lack, or one that was not found at all.
    shown += sorted(relevant, key=lambda d: (ranks.get(d, len(ranks) + 1), d))[:1]
    texts = [collection.documents[document_id] for document_id in shown]
    ranking = []
    for document_id, text, why in zip(shown, texts, explain(query, texts), strict=True):
        heat = np.rint((why.similarities.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        ranking.append(
            {
                "rank": ranks.get(document_id),
                "document_id": document_id,
                "text": text[:TEXT],
                "score": hits.get(document_id, float(why.score)),
                "relevance": judged.get(document_id),
                "query_tokens": why.query_tokens,
                "document_tokens": why.document_tokens,
                "winners": why.winners.tolist(),
                "similarities": base64.b64encode(heat.tobytes()).decode("ascii"),
            }
        )
    return {
        "kind": kind,
        "query_id": query_id,
        "query": query,
        "values": dict(values),
        "ranking": ranking,
    }
