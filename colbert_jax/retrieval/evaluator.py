"""How well a model, or BM25, ranks a collection."""

from collections.abc import Callable

from colbert_jax.colbert import Embed, Params
from colbert_jax.retrieval import bm25
from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.metrics import evaluate_run
from colbert_jax.retrieval.search import make_search
from colbert_jax.tokenization import ColbertTokenizer

DEPTH = 100  # documents ranked for a query: what Recall@100 looks at


def make_evaluator(
    collection: Collection, embed: Embed, tokenizer: ColbertTokenizer
) -> Callable[[Params], dict[str, float]]:
    """Makes `evaluator(params) -> {"nDCG@10": ..., "MRR@10": ..., "Recall@100": ...}`."""
    search = make_search(embed, tokenizer)

    def evaluator(params: Params) -> dict[str, float]:
        run = search(params, collection.queries, collection.documents, DEPTH)
        return evaluate_run(collection.qrels, run)

    return evaluator


def evaluate_bm25(collection: Collection) -> dict[str, float]:
    """The same measures of BM25, the baseline that costs nothing to train."""
    run = bm25.search(collection.documents, collection.queries, DEPTH)
    return evaluate_run(collection.qrels, run)
