"""Hard negatives: documents that a model ranks high for a query and that do not answer it."""

import math
from collections.abc import Collection, Sequence

Hit = tuple[int, float]  # place in the corpus, score


def choose_negatives(
    hits: Sequence[Hit],
    positives: Collection[int],
    positive_score: float,
    margin: float,
    count: int,
) -> list[int]:
    """The best-ranked documents that are no answers, as far as one can tell.

    What scores more than a fraction of the query's own document is likely an answer that nobody
    has marked (positive-aware mining, TopK-PercPos in NV-Retriever, arXiv 2407.15831).

    Args:
      hits: a query's best documents, best first.
      positives: its own documents, and those that hold the same text.
      positive_score: the score of its own document.
      margin: the fraction of `positive_score` that a negative may reach, such as 0.95; infinity
        takes all.
      count: how many to choose at most.

    Returns:
      Places in the corpus, hardest first.
    """
    limit = math.inf
    if math.isfinite(margin):
        # Below 0 a fraction would be the larger number.
        limit = positive_score - (1 - margin) * abs(positive_score)
    chosen = [place for place, score in hits if place not in positives and score <= limit]
    return chosen[:count]
