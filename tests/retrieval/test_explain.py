"""What is said of a score is what made it, and marks stand where the matched words stand."""

import itertools
import unicodedata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_model, make_table, make_tokenizer, table_embed

from colbert_jax.colbert import make_embed
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.retrieval.explain import MATCH, Explanation, explain, mark_words
from colbert_jax.retrieval.search import make_search
from colbert_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")


def encoder_of(embed: Any, tokenizer: Any) -> Encoder:
    return Encoder(embed, tokenizer, make_mesh(devices=jax.devices()[:2]), batch_size=4)


def by_hand(**changes: Any) -> Explanation:
    """Two words and a marker against three tokens of "heat flow", one of them the marker's."""
    fields: dict[str, Any] = {
        "query_tokens": ["[Q]", "heat", "flow"],
        "query_words": [False, True, True],
        "document_tokens": ["[D]", "heat", "flow"],
        "spans": [None, (0, 4), (5, 9)],
        "similarities": np.array([[0.9, 0.95, 0.1], [0.2, 1.0, 0.3], [0.1, 0.2, 0.8]]),
    }
    return Explanation(**fields | changes)


# --- an explanation ---


def test_winners_marks_and_score_by_hand() -> None:
    one = by_hand()
    assert one.winners.tolist() == [1, 1, 2]
    assert one.score == pytest.approx(0.95 + 1.0 + 0.8)
    assert one.matched() == [(0, 4), (5, 9)]
    # A marker's match marks nothing, nor does one below the line or one with a marker.
    assert by_hand(query_words=[True, False, False]).matched() == [(0, 4)]
    assert by_hand(query_words=[False, False, False]).matched() == []
    weak = np.array([[0.9, 0.1, 0.1], [0.0, MATCH, 0.0], [0.1, 0.0, MATCH - 1e-6]])
    assert by_hand(similarities=weak).matched() == [(0, 4)]
    with_marker = np.array([[0.9, 0.1, 0.1], [0.9, 0.1, 0.1], [0.9, 0.1, 0.1]])
    assert by_hand(similarities=with_marker).matched() == []


def test_a_span_matched_twice_is_marked_once_in_the_texts_order() -> None:
    similarities = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.9], [0.0, 0.0, 0.9]])
    assert by_hand(similarities=similarities).matched() == [(5, 9)]
    similarities = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.9], [0.0, 0.9, 0.0]])
    assert by_hand(similarities=similarities).matched() == [(0, 4), (5, 9)]


def test_a_document_without_tokens_scores_zero_and_matches_nothing() -> None:
    none = by_hand(document_tokens=[], spans=[], similarities=np.zeros((3, 0)))
    assert none.score == 0.0 and none.matched() == [] and none.winners.tolist() == []


def test_explanations_are_of_the_documents_in_their_order(
    tokenizer_file: Path, real_texts: list[str]
) -> None:
    tokenizer = make_tokenizer(tokenizer_file, query_length=12, document_length=25)
    encoder = encoder_of(table_embed, tokenizer)
    params = encoder.place(make_table(tokenizer))
    texts = [*real_texts[:20], "", "?!", real_texts[3]]
    query = " ".join(real_texts[3].split()[:4])
    found = explain(encoder, params, query, texts)
    assert len(found) == len(texts)
    batch = tokenizer.documents(texts)
    for row, (one, text) in enumerate(zip(found, texts, strict=True)):
        assert one.similarities.shape == (len(one.query_tokens), len(one.document_tokens))
        assert len(one.query_words) == len(one.query_tokens)
        assert len(one.spans) == len(one.document_tokens) == batch["scoring_mask"][row].sum()
        for label, span in zip(one.document_tokens, one.spans, strict=True):
            assert span is None or text[slice(*span)] == label
    (words,) = {tuple(one.query_words) for one in found}
    assert not words[0] and not words[1] and words[2]  # [CLS], the marker, the first word
    assert found[0].query_tokens[:2] == ["[CLS]", "[Q]"]
    assert found[0].query_tokens[-1] == "[MASK]" and not words[-1]  # expansion
    assert explain(encoder, params, query, []) == []


def test_the_very_words_of_the_query_are_marked(tokenizer_file: Path) -> None:
    tokenizer = make_tokenizer(tokenizer_file)
    encoder = encoder_of(table_embed, tokenizer)
    params = encoder.place(make_table(tokenizer, dim=64))
    text = "  return it, and also a\nsecond copy of the list!"
    (one,) = explain(encoder, params, "return copy", [text])
    marked = [piece for piece, is_marked in mark_words(text, one.matched()) if is_marked]
    assert marked == ["return", "copy"]
    (none,) = explain(encoder, params, "return copy", ["42 zebras"])
    assert none.matched() == []


def test_the_score_is_the_searchs(tokenizer_file: Path, real_texts: list[str]) -> None:
    model, params = make_model(tokenizer_file)
    encoder = encoder_of(make_embed(model.config), model.tokenizer)
    params = encoder.place(params)
    documents = {str(i): text for i, text in enumerate(real_texts[:12])} | {"none": ""}
    query = real_texts[2][:40]
    found = make_search(encoder, params)({"q": query}, documents, 100)["q"]
    explained = explain(encoder, params, query, list(documents.values()))
    scores = [one.score for one in explained]
    np.testing.assert_allclose(scores, [found[name] for name in documents], atol=1e-5)


# --- marks ---


@given(
    st.text(max_size=60),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda s: tuple(sorted(s)))),
)
def test_pieces_join_to_the_text_and_marks_are_whole_words(
    text: str, spans: list[tuple[int, int]]
) -> None:
    pieces = mark_words(text, spans)
    assert "".join(piece for piece, _ in pieces) == text
    assert all(piece for piece, _ in pieces)
    assert all(a[1] != b[1] for a, b in itertools.pairwise(pieces))
    marked = [is_marked for piece, is_marked in pieces for _ in piece]
    for place, mark in enumerate(text):
        if any(start <= place < end for start, end in spans):
            assert marked[place]
        beside = place + 1
        if beside < len(text) and _is_word(mark) and _is_word(text[beside]):
            assert marked[place] == marked[beside]  # a word is marked whole
        if marked[place] and not _is_word(mark):
            assert any(start <= place < end for start, end in spans)
    touched = any(start < end and start < len(text) for start, end in spans)
    assert any(marked) == touched


def _is_word(mark: str) -> bool:
    return mark.isalnum() or mark == "_" or unicodedata.category(mark)[0] == "M"


def test_marks_by_example() -> None:
    text = "Heat-flow, in ovens."
    assert mark_words(text, []) == [(text, False)]
    assert mark_words("", [(0, 3)]) == []
    assert mark_words(text, [(1, 2)]) == [("Heat", True), ("-flow, in ovens.", False)]
    assert mark_words(text, [(0, 9)]) == [("Heat-flow", True), (", in ovens.", False)]
    assert mark_words(text, [(17, 99)]) == [("Heat-flow, in ", False), ("ovens.", True)]
    assert mark_words("a", [(0, 1)]) == [("a", True)]
    for word in ("cafe\u0301", "\u0939\u093f\u0928\u094d\u0926\u0940"):  # with signs of their own
        assert mark_words(f"a {word} b", [(2, 3)]) == [("a ", False), (word, True), (" b", False)]
