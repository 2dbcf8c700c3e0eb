"""Evaluation: what is left out of a ranking, what is averaged, and what other programs read."""

import math
import random
from pathlib import Path

import ir_measures
import numpy as np
import pytest

from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.evaluator import (
    DEPTH,
    average,
    evaluate,
    evaluate_bm25,
    write_trec_run,
)
from colbert_jax.retrieval.metrics import DEFAULT_METRICS, evaluate_queries, evaluate_run


def collection_of(
    documents: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, int]]
) -> Collection:
    return Collection("some", documents, queries, qrels)


def ranks_all(asked: list[int]):
    """A search that finds every document, the first best, and notes how many were wanted."""

    def search(queries, documents, k):
        asked.append(k)
        ranked = {name: -float(place) for place, name in enumerate(documents)}
        return {query: dict(list(ranked.items())[:k]) for query in queries}

    return search


# --- what is left out ---


def test_a_query_that_is_a_document_does_not_find_itself() -> None:
    documents = {f"d{i}": f"text {i}" for i in range(150)}
    documents = {"a1": "A title and the whole argument.", **documents}
    queries = {"a1": "the whole argument.", "q2": "the whole argument."}
    qrels = {"a1": {"d0": 1}, "q2": {"a1": 1}}
    asked: list[int] = []
    found = evaluate(collection_of(documents, queries, qrels), ranks_all(asked))
    assert asked == [DEPTH + 1]
    assert list(found.run["a1"]) == [f"d{i}" for i in range(100)]
    assert list(found.run["q2"]) == ["a1", *(f"d{i}" for i in range(99))]
    assert found.metrics["nDCG@10"] == found.metrics["MRR@10"] == 1.0


def test_a_query_is_known_as_a_document_that_lost_the_space_around_it() -> None:
    documents = {"a1": "the whole argument.", "d0": "another"}
    found = evaluate(
        collection_of(documents, {"a1": " the whole argument.\n"}, {"a1": {"d0": 1}}), ranks_all([])
    )
    assert list(found.run["a1"]) == ["d0"]


def test_ids_that_coincide_by_chance_are_kept() -> None:
    """As in Cranfield, whose queries and documents are both numbered from 1."""
    documents = {str(i): f"text {i}" for i in range(150)}
    queries = {"0": "something else", "1": "another", "2": "", "3": " "}
    qrels = {query: {query: 1} for query in queries}
    asked: list[int] = []
    found = evaluate(collection_of(documents, queries, qrels), ranks_all(asked))
    assert asked == [DEPTH]
    assert all(list(hits) == [str(i) for i in range(100)] for hits in found.run.values())
    assert found.metrics["MRR@10"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_the_query_that_finds_itself_costs_the_others_nothing() -> None:
    """A document missing at the end of a ranking of one more stays 100 deep."""
    documents = {f"d{i}": f"text {i}" for i in range(150)} | {"a1": "argument"}
    qrels = {"a1": {"d99": 1}, "q2": {"d99": 1}, "q3": {"d100": 1}}
    queries = {"a1": "argument", "q2": "x", "q3": "y"}
    found = evaluate(collection_of(documents, queries, qrels), ranks_all([]), ("Recall@100",))
    assert {q: len(hits) for q, hits in found.run.items()} == dict.fromkeys(queries, 100)
    assert found.metrics["Recall@100"] == pytest.approx(2 / 3)


def test_map_looks_at_a_hundred_documents() -> None:
    documents = {f"d{i}": f"text {i}" for i in range(150)}
    qrels = {"q": {"d0": 1, "d99": 1, "d100": 1}}
    found = evaluate(collection_of(documents, {"q": "x"}, qrels), ranks_all([]))
    assert tuple(found.metrics) == DEFAULT_METRICS
    assert found.metrics["MAP"] == pytest.approx((1 + 2 / 100) / 3)
    assert found.metrics["Recall@100"] == pytest.approx(2 / 3)


def test_bm25_is_measured_alike() -> None:
    documents = {"d1": "heat flow in ovens", "d2": "the list of words", "q": "heat flow"}
    collection = collection_of(documents, {"q": "heat flow"}, {"q": {"d1": 1}})
    found = evaluate_bm25(collection, ("nDCG@10",))
    assert found.metrics == {"nDCG@10": 1.0} and next(iter(found.run["q"])) == "d1"
    assert "q" not in found.run["q"]


# --- averages ---


def test_parts_of_a_collection_count_as_one() -> None:
    groups = {"scifact": "", "android": "cqadupstack", "gaming": "cqadupstack", "nfcorpus": ""}
    collections = [Collection(name, {}, {}, {}, group) for name, group in groups.items()]
    values = {"scifact": 0.9, "android": 0.2, "gaming": 0.4, "nfcorpus": 0.3}
    measured = {name: {"nDCG@10": v, "MAP": v / 2} for name, v in values.items()}
    means = average(collections, measured)
    assert means == pytest.approx({"nDCG@10": (0.9 + 0.3 + 0.3) / 3, "MAP": 0.25})
    assert average(collections[1:2], measured)["nDCG@10"] == pytest.approx(0.2)
    assert average(collections[1:3], measured)["nDCG@10"] == pytest.approx(0.3)
    assert all(type(value) is float for value in means.values())


# --- single queries ---


@pytest.mark.parametrize("metric", [*DEFAULT_METRICS, "Recall@2", "P@5"])
def test_the_queries_values_average_to_the_runs(metric: str) -> None:
    rng = random.Random(0)
    names = [str(i) for i in range(30)]
    qrels = {f"q{i}": {d: rng.randint(0, 3) for d in rng.sample(names, 6)} for i in range(9)}
    run = {
        f"q{i}": {d: rng.choice([0.5, rng.random()]) for d in rng.sample(names, 20)}
        for i in range(2, 12)  # two are not answered, three not judged
    }
    run["q5"] = dict.fromkeys(names, math.nan)
    values = evaluate_queries(qrels, run, metric)
    assert list(values) == list(qrels)
    assert values["q0"] == values["q1"] == values["q5"] == 0.0
    assert np.mean(list(values.values())) == pytest.approx(
        evaluate_run(qrels, run, [metric])[metric]
    )
    for query in qrels:
        alone = evaluate_run({query: qrels[query]}, run, [metric])[metric]
        assert values[query] == pytest.approx(alone)


# --- TREC's format ---


def test_a_written_run_gives_the_same_measures_when_it_is_read(tmp_path: Path) -> None:
    rng = random.Random(1)
    names = [f"doc-{i}" for i in range(50)] + ["<dbpedia:A%20B>", "日本", "a'b\"c"]
    run = {}
    for i in range(12):
        scores = {name: float(np.float32(rng.uniform(-5, 40))) for name in rng.sample(names, 30)}
        run[f"q{i}"] = dict(sorted(scores.items(), key=lambda hit: (-hit[1], hit[0])))
    qrels = {q: {d: rng.randint(0, 2) for d in rng.sample(names, 9)} for q in run}
    path = tmp_path / "some.run"
    path.write_text(write_trec_run(run, "model"), encoding="utf-8")
    read = list(ir_measures.read_trec_run(str(path)))
    assert {(x.query_id, x.doc_id, x.score) for x in read} == {
        (q, d, score) for q, hits in run.items() for d, score in hits.items()
    }
    measures = [ir_measures.parse_measure(name) for name in DEFAULT_METRICS]
    theirs = ir_measures.calc_aggregate(measures, qrels, read)
    ours = evaluate_run(qrels, run)
    assert ours == pytest.approx({n: theirs[m] for n, m in zip(ours, measures, strict=True)})


def test_lines_have_six_fields_whatever_the_ids_are() -> None:
    run = {"q 1": {"a b": 1.5, "50%": 1.0, "x\u2003y": 0.25, "a\tb": -1e-9}, "q2": {}}
    lines = write_trec_run(run, "my model").splitlines()
    assert [line.split() for line in lines] == [
        ["q%201", "Q0", "a%20b", "1", "1.5", "my%20model"],
        ["q%201", "Q0", "50%", "2", "1.0", "my%20model"],
        ["q%201", "Q0", "x%E2%80%83y", "3", "0.25", "my%20model"],
        ["q%201", "Q0", "a%09b", "4", "-1e-09", "my%20model"],
    ]
    assert write_trec_run({}, "model") == ""
