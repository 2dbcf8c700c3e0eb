import math

import pytest

from colbert_jax.errors import UserError
from colbert_jax.retrieval.metrics import evaluate_run

QRELS = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"d": 1}}


def test_measures_equal_a_hand_computation():
    run = {"q1": {"x": 9.0, "b": 8.0, "c": 7.5, "a": 7.0}, "q2": {"d": 1.0}}
    gain = 1 / math.log2(3) + 2 / math.log2(5)  # b at rank 2, a at rank 4
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    means = evaluate_run(QRELS, run, ("nDCG@10", "MRR@10", "Recall@100", "MAP", "Recall@2"))
    assert means == pytest.approx(
        {
            "nDCG@10": (gain / ideal + 1) / 2,
            "MRR@10": (1 / 2 + 1) / 2,
            "Recall@100": 1.0,
            "MAP": ((1 / 2 + 2 / 4) / 2 + 1) / 2,
            "Recall@2": (1 / 2 + 1) / 2,
        }
    )


def test_cutoffs_are_kept():
    scores = {f"x{rank}": float(-rank) for rank in range(10)}  # ranks 1 to 10
    at_11 = {"q2": {**scores, "d": -10.0}}
    at_10 = {"q2": {**scores, "d": -8.5}}
    qrels = {"q2": {"d": 1}}
    assert evaluate_run(qrels, at_11, ("nDCG@10", "MRR@10")) == {"nDCG@10": 0, "MRR@10": 0}
    assert evaluate_run(qrels, at_10, ("nDCG@10", "MRR@10")) == pytest.approx(
        {"nDCG@10": 1 / math.log2(11), "MRR@10": 1 / 10}
    )


@pytest.mark.parametrize("run", [{"q2": {"d": 1.0}}, {"q1": {}, "q2": {"d": 1.0}}])
def test_judged_queries_without_results_count_as_zero(run):
    assert evaluate_run(QRELS, run) == {"nDCG@10": 0.5, "MRR@10": 0.5, "Recall@100": 0.5}
    assert evaluate_run(QRELS, {}) == {"nDCG@10": 0, "MRR@10": 0, "Recall@100": 0}


def test_queries_without_judgements_do_not_count():
    run = {"q2": {"d": 1.0}, "unjudged": {"d": 1.0}}
    assert set(evaluate_run({"q2": {"d": 1}}, run).values()) == {1.0}


def test_a_query_with_nothing_relevant_counts_as_zero():
    qrels = {"q1": {"a": 0}, "q2": {"d": 1}}
    run = {"q1": {"a": 1.0}, "q2": {"d": 1.0}}
    assert set(evaluate_run(qrels, run).values()) == {0.5}


def test_every_measure_breaks_ties_by_document_id():
    # trec_eval alone would rank "b" first, and would not tell 1 from 1 + 1e-9.
    tied = {"q": {"b": 1.0, "a": 1.0}}
    close = {"q": {"b": 1.0, "a": 1.0 + 1e-9}}
    names = ("nDCG@1", "MRR@1", "Recall@1")
    assert set(evaluate_run({"q": {"a": 1}}, tied, names).values()) == {1.0}
    assert set(evaluate_run({"q": {"a": 1}}, close, names).values()) == {1.0}
    assert set(evaluate_run({"q": {"b": 1}}, tied, names).values()) == {0.0}


def test_nan_scores_count_as_not_found():
    run = {"q": {"a": math.nan, "b": 1.0}}
    assert set(evaluate_run({"q": {"a": 1}}, run).values()) == {0.0}
    assert set(evaluate_run({"q": {"b": 1}}, run).values()) == {1.0}


@pytest.mark.parametrize("name", ["bogus@10", "nDCG@", "MRR@x", ""])
def test_unknown_metrics_are_named(name):
    with pytest.raises(UserError, match=repr(name)):
        evaluate_run(QRELS, {}, (name,))


def test_no_judgements_is_the_users_error():
    with pytest.raises(UserError, match="no judgements"):
        evaluate_run({}, {})
