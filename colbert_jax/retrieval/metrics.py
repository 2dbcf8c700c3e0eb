"""Measures of a run against judgements, computed by ir_measures."""

import math
from collections.abc import Mapping, Sequence

import ir_measures

from colbert_jax.errors import UserError

DEFAULT_METRICS = ("nDCG@10", "MRR@10", "Recall@100", "MAP")


def evaluate_run(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Mapping[str, float]],
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> dict[str, float]:
    """Means over all judged queries.

    A judged query that the run does not have counts as 0; a query without judgements is left
    out. Documents are ranked by score, equal scores by document id; a document whose score is
    NaN counts as not found. nDCG has the relevance itself as gain, as in trec_eval. For the
    other measures, relevance 1 and more is relevant.

    Args:
      qrels: `qrels[query id][document id]`, the relevance.
      run: `run[query id][document id]`, the score; higher is better.
      metrics: names that ir_measures knows, such as `nDCG@10`, `MRR@10`, `Recall@100` or `MAP`.

    Returns:
      `means[name]` for each of `metrics`, 0 to 1.

    Raises:
      UserError: ir_measures does not know a metric, or there are no judgements.
    """
    if not qrels:
        raise UserError("there are no judgements to evaluate against; name a split that has some")
    measures = {name: _parse(name) for name in metrics}
    evaluator = ir_measures.evaluator(set(measures.values()), {q: dict(qrels[q]) for q in qrels})
    sums = dict.fromkeys(measures.values(), 0.0)
    ranked = {query_id: _by_rank(run[query_id]) for query_id in qrels if query_id in run}
    for value in evaluator.iter_calc(ranked):
        sums[value.measure] += value.value
    return {name: sums[measure] / len(qrels) for name, measure in measures.items()}


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises `UserError` where there is no metric, or one that cannot be computed here."""
    if not metrics:
        raise UserError("there is no metric to compute; name some, such as nDCG@10")
    for name in metrics:
        measure = _parse(name)
        try:  # some want a program that is not here, or an argument
            list(ir_measures.iter_calc([measure], {"q": {"d": 1}}, {"q": {"d": 1.0}}))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"the metric {name!r} cannot be computed here ({reason}); use another, such as "
                "nDCG@10"
            ) from error


def evaluate_queries(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]], metric: str
) -> dict[str, float]:
    """One measure of each judged query, as `evaluate_run` averages it: `values[query id]`."""
    measure = _parse(metric)
    evaluator = ir_measures.evaluator([measure], {q: dict(qrels[q]) for q in qrels})
    ranked = {query_id: _by_rank(run[query_id]) for query_id in qrels if query_id in run}
    values = dict.fromkeys(qrels, 0.0)
    return values | {value.query_id: value.value for value in evaluator.iter_calc(ranked)}


def _by_rank(scores: Mapping[str, float]) -> dict[str, float]:
    """Replaces scores by the negative of the rank.

    The programs behind ir_measures break ties in opposite ways (trec_eval by the highest document
    id, MS MARCO's script by the lowest), and trec_eval rounds scores to float32. Ranks have no
    ties and are not rounded, so each measure sees the same order.
    """
    found = [document_id for document_id, score in scores.items() if not math.isnan(score)]
    found.sort(key=lambda document_id: (-scores[document_id], document_id))
    return {document_id: -float(rank) for rank, document_id in enumerate(found)}


def _parse(name: str) -> ir_measures.Measure:
    try:
        measure = ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError) as error:
        raise UserError(
            f"the metric {name!r} is not known; use a name of ir_measures, such as nDCG@10, "
            "MRR@10, Recall@100 or MAP"
        ) from error
    cutoff = measure.params.get("cutoff", 1)
    if not isinstance(cutoff, int) or cutoff < 1:  # trec_eval would end the whole program
        raise UserError(f"the metric {name!r} looks at no document; give a whole number after @")
    return measure
