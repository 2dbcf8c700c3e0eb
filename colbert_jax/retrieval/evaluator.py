"""How well a model, or BM25, ranks a collection."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from colbert_jax.retrieval import bm25
from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.metrics import DEFAULT_METRICS, evaluate_run
from colbert_jax.retrieval.search import Run

DEPTH = 100  # documents ranked for a query: what Recall@100 and BEIR's MAP look at

# Queries and documents by id, and a depth, to each query's best documents.
Search = Callable[[Mapping[str, str], Mapping[str, str], int], Run]


class Evaluation(NamedTuple):
    """What a ranking is worth.

    Attributes:
      metrics: `metrics[name]`, means over the judged queries.
      run: `run[query id][document id]`, the score, best first.
    """

    metrics: dict[str, float]
    run: Run


def evaluate(
    collection: Collection, search: Search, metrics: Sequence[str] = DEFAULT_METRICS
) -> Evaluation:
    """Ranks a collection's documents for its queries, and measures the ranking.

    A query that is itself a document of the collection (the same id, and its text in the
    document's, as in ArguAna) does not find itself, as in BEIR's own evaluation.
    """
    documents = collection.documents
    stripped = {q: text.strip() for q, text in collection.queries.items()}  # as documents are
    own = {q for q, text in stripped.items() if text and text in documents.get(q, "")}
    run = search(collection.queries, documents, DEPTH + bool(own))
    for query_id in run:
        hits = run[query_id].items()
        hits_of_others = [(d, s) for d, s in hits if d != query_id or query_id not in own]
        run[query_id] = dict(hits_of_others[:DEPTH])
    return Evaluation(evaluate_run(collection.qrels, run, metrics), run)


def evaluate_bm25(collection: Collection, metrics: Sequence[str] = DEFAULT_METRICS) -> Evaluation:
    """The same of BM25, the baseline that costs nothing to train."""
    return evaluate(
        collection, lambda queries, documents, k: bm25.search(documents, queries, k), metrics
    )


def average(
    collections: Iterable[Collection], measured: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """The mean of each measure as BEIR's tables have it: parts of a collection count as one.

    Args:
      collections: those measured.
      measured: `measured[collection name][measure]`.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    for collection in collections:
        groups.setdefault(collection.group or collection.name, []).append(measured[collection.name])
    names = list(next(iter(measured.values())))
    means = [
        {m: np.mean([values[m] for values in group]) for m in names} for group in groups.values()
    ]
    return {m: float(np.mean([mean[m] for mean in means])) for m in names}


def write_trec_run(run: Run, tag: str) -> str:
    """A run in TREC's format, a line a hit: query id, Q0, document id, rank, score, tag.

    The format knows no quoting: white space in ids is written as in URLs.
    """

    def word(name: str) -> str:
        return "".join(quote(c) if c.isspace() or c == "%" else c for c in name)

    def plain(name: str) -> str:
        return word(name) if any(c.isspace() for c in name) else name

    return "".join(
        f"{plain(query_id)} Q0 {plain(document_id)} {rank} {score!r} {word(tag)}\n"
        for query_id, hits in run.items()
        for rank, (document_id, score) in enumerate(hits.items(), 1)
    )
