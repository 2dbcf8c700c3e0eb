"""What a report shows of single queries."""

import base64
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_model import make_table, make_tokenizer, table_embed

from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.retrieval.examples import MEASURE, SHOWN, TEXT, describe_queries
from colbert_jax.retrieval.explain import explain
from colbert_jax.retrieval.metrics import evaluate_queries
from colbert_jax.retrieval.search import make_search
from colbert_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def collection(real_texts: list[str]) -> Collection:
    texts = [text for text in real_texts if len(text.split()) > 12][:30]
    documents = {f"d{i}": text for i, text in enumerate(texts)} | {"long": "word " * 1000}
    queries = {f"q{i}": " ".join(text.split()[:3]) for i, text in enumerate(texts[:12])}
    qrels: dict[str, dict[str, int]] = {f"q{i}": {f"d{i}": 1, "d29": 0} for i in range(12)}
    qrels["q3"] = {"nowhere": 1}  # judged, but not there, as in some of BEIR's
    qrels["q4"] = {"d20": 2, "d3": 1}
    return Collection("some", documents, queries, qrels)


@pytest.fixture(scope="module")
def described(
    tokenizer_file: Path, collection: Collection
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, float]]]]:
    tokenizer = make_tokenizer(tokenizer_file, query_length=8, document_length=20)
    mesh = make_mesh(devices=jax.devices()[:2])
    encoder = Encoder(table_embed, tokenizer, mesh, batch_size=8)
    params = encoder.place(make_table(tokenizer))
    search = make_search(encoder, params)
    model = search(collection.queries, collection.documents, 20)
    model["q5"] = {}
    worse = {q: dict(zip(hits, reversed(hits.values()), strict=True)) for q, hits in model.items()}
    runs = {"bm25": worse, "trained": model}

    def why(query: str, documents: Any) -> Any:
        return explain(encoder, params, query, documents)

    return describe_queries(collection, runs, why, count=4), runs


def test_it_is_plain_data(described: Any) -> None:
    assert json.loads(json.dumps(described[0], allow_nan=False)) == described[0]


def test_every_query_has_its_measure_in_every_system(described: Any, collection: Any) -> None:
    found, runs = described
    by_measure = found["queries_by_measure"]
    assert by_measure["measure"] == MEASURE
    for system, run in runs.items():
        expected = evaluate_queries(collection.qrels, run, MEASURE)
        assert {q: v[system] for q, v in by_measure["values"].items()} == expected


def test_the_best_and_the_worst_are_chosen_by_the_last_system(described: Any) -> None:
    found, _ = described
    values = found["queries_by_measure"]["values"]
    by_kind = {
        kind: [x["query_id"] for x in found["examples"] if x["kind"] == kind]
        for kind in ("best", "worst")
    }
    best, worst = by_kind["best"], by_kind["worst"]
    assert len(best) == len(worst) == 4 and not set(best) & set(worst)
    ordered = sorted(value["trained"] for value in values.values())
    assert [values[q]["trained"] for q in best] == ordered[::-1][:4]
    assert [values[q]["trained"] for q in worst] == ordered[:4]
    pairs = [(-values[q]["trained"], values[q]["bm25"]) for q in best]
    assert pairs == sorted(pairs)  # of equals those first that the baseline did worst


def test_a_ranking_shows_the_first_and_the_answer_that_they_lack(
    described: Any, collection: Collection
) -> None:
    found, runs = described
    kinds = set()
    for example in found["examples"]:
        query = example["query_id"]
        hits = runs["trained"][query]
        ids = [row["document_id"] for row in example["ranking"]]
        assert ids[: len(hits)][:SHOWN] == list(hits)[:SHOWN]
        relevant = {
            d for d, r in collection.qrels[query].items() if r > 0 and d in collection.documents
        }
        extra = ids[SHOWN:] if hits else ids
        assert len(extra) == bool(relevant - set(list(hits)[:SHOWN]))
        kinds.add(len(extra))
        for row in example["ranking"]:
            name = row["document_id"]
            rank = list(hits).index(name) + 1 if name in hits else None
            assert row["rank"] == rank
            assert row["relevance"] == collection.qrels[query].get(name)
            assert row["text"] == collection.documents[name][:TEXT]
            if name in hits:
                assert row["score"] == hits[name]
            shape = (len(row["query_tokens"]), len(row["document_tokens"]))
            heat = np.frombuffer(base64.b64decode(row["similarities"]), np.uint8).reshape(shape)
            cosines = heat / 127.5 - 1
            best = cosines.max(axis=1, initial=-1)
            assert best.sum() == pytest.approx(row["score"], abs=0.006 * shape[0])
            winners = np.take_along_axis(heat, np.array(row["winners"])[:, None], axis=1)[:, 0]
            assert (winners == heat.max(axis=1)).all()
    assert kinds == {0, 1}


def test_few_queries_and_one_system_are_enough(collection: Collection) -> None:
    few = Collection("few", collection.documents, {"q0": "x"}, {"q0": {"d0": 1}})
    found = describe_queries(few, {"trained": {"q0": {}}}, lambda q, d: [], count=0)
    assert found["examples"] == []
    assert found["queries_by_measure"]["values"] == {"q0": {"trained": 0.0}}
