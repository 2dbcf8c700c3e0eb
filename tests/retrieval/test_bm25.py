import math

import pytest

from colbert_jax.retrieval import bm25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("HTTPServer.read_line2", "http server read line 2"),
        ("getURL camelCase __init__", "get url camel case init"),
        ("Über-große Straße, naïve", "über große straße naïve"),
        ("a1b2 f(x)=3.14", "a 1 b 2 f x 3 14"),
        (" \n-", ""),
    ],
)
def test_tokenizer_takes_names_apart(text, words):
    assert bm25.tokenize(text) == words.split()


def test_scores_are_lucenes_bm25():
    documents = {"d1": "apple apple pear", "d2": "apple", "d3": "plum plum"}
    run = bm25.search(documents, {"q": "apple pear"}, k=10, k1=1.5, b=0.75)
    mean_length = 2.0

    def weight(frequency, length, containing):
        idf = math.log(1 + (3 - containing + 0.5) / (containing + 0.5))
        return idf * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * length / mean_length))

    assert run["q"] == pytest.approx(
        {"d1": weight(2, 3, 2) + weight(1, 3, 1), "d2": weight(1, 1, 2)}, rel=1e-5
    )
    assert list(run["q"]) == ["d1", "d2"]


@pytest.mark.parametrize("reverse", [False, True])
def test_equal_scores_are_ordered_and_cut_by_document_id(reverse):
    ids = sorted((f"d{number}" for number in range(20)), reverse=reverse)
    documents = dict.fromkeys(ids, "apple") | {"other": "pear", "best": "apple apple"}
    run = bm25.search(documents, {"q": "apple"}, k=4)
    assert list(run["q"]) == ["best", "d0", "d1", "d10"]


def test_queries_without_known_words_find_nothing():
    documents = {"d1": "apple", "d2": ""}
    queries = {"q1": "pear", "q2": "", "q3": "apple"}
    run = bm25.search(documents, queries, k=5)
    assert run["q1"] == {} and run["q2"] == {} and list(run["q3"]) == ["d1"]
    assert bm25.search({"d": "--"}, queries, k=5) == {"q1": {}, "q2": {}, "q3": {}}
    assert bm25.search({}, queries, k=5) == {"q1": {}, "q2": {}, "q3": {}}


def test_search_prints_nothing(capfd):
    bm25.search({"d1": "apple", "d2": "pear"}, {"q": "apple"}, k=1)
    assert capfd.readouterr() == ("", "")
