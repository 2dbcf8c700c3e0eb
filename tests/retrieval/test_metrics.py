import math
import re

import pytest

from colbert_jax.errors import UserError
from colbert_jax.retrieval.metrics import (
    DEFAULT_METRICS,
    check_metrics,
    evaluate_queries,
    evaluate_run,
)

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
    assert evaluate_run(QRELS, run) == dict.fromkeys(DEFAULT_METRICS, 0.5)
    assert evaluate_run(QRELS, {}) == dict.fromkeys(DEFAULT_METRICS, 0.0)


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


@pytest.mark.parametrize("name", ["bogus@10", "nDCG@", "MRR@x", "", "nDCG@0", "P@1.5", "nDCG@-1"])
def test_unknown_metrics_are_named(name):
    for use in (
        lambda: evaluate_run(QRELS, {}, (name,)),
        lambda: evaluate_queries(QRELS, {}, name),
        lambda: check_metrics(["nDCG@10", name]),
    ):
        with pytest.raises(UserError, match=f"metric {re.escape(repr(name))}") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["alpha_nDCG@10", "NERR8@10"])
def test_metrics_that_need_what_is_not_here_are_named(name):
    with pytest.raises(UserError, match=f"metric '{name}' cannot be computed here") as caught:
        check_metrics([name])
    assert "\n" not in str(caught.value)


def test_metrics_are_checked_without_a_word():
    assert check_metrics([*DEFAULT_METRICS, "P@5", "Recall@1000", "Rprec", "AP(rel=2)@3"]) is None
    with pytest.raises(UserError, match="no metric"):
        check_metrics([])


def test_map_counts_what_is_not_found():
    run = {"q1": {"a": 3.0, "x": 2.0}, "q2": {"x": 1.0}}
    assert evaluate_run(QRELS, run, ("MAP",)) == {"MAP": (1 / 2 + 0) / 2}


def test_no_judgements_is_the_users_error():
    with pytest.raises(UserError, match="no judgements"):
        evaluate_run({}, {})
