"""Chosen pairs score what a loop over them scores."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_model import make_table, make_tokenizer, table_embed, table_scores

from colbert_jax.retrieval import encode, index, pairs
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.retrieval.index import DTYPES, build_index
from colbert_jax.retrieval.pairs import score_pairs
from colbert_jax.retrieval.search import top_k
from colbert_jax.sharding import make_mesh
from colbert_jax.tokenization import ColbertTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CHUNK", 16)
    monkeypatch.setattr(encode, "CHUNK", 16)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> ColbertTokenizer:
    return make_tokenizer(
        tokenizer_file,
        query_length=8,
        document_length=30,
        do_query_expansion=False,
        skiplist_words=(*".?!", "[CLS]", "[SEP]", "[D] "),
    )


@pytest.fixture(scope="module")
def documents(real_texts: list[str]) -> list[str]:
    return [*real_texts[:38], "", "?!"]


def encoder_of(tokenizer: ColbertTokenizer, shape: tuple[int, int, int]) -> Encoder:
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    return Encoder(table_embed, tokenizer, mesh, batch_size=4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_pairs_equal_brute_force(
    tokenizer: ColbertTokenizer,
    documents: list[str],
    shape: tuple[int, int, int],
    batch_size: int,
) -> None:
    encoder = encoder_of(tokenizer, shape)
    table = make_table(tokenizer)
    params = encoder.place(table)
    texts = [" ".join(text.split()[:5]) for text in documents[:7]]
    queries = encoder.queries(params, texts)
    one = build_index(encoder, params, enumerate_texts(documents), "float32")
    expected = table_scores(table, tokenizer, texts, documents)
    rng = np.random.default_rng(0)
    every = [(q, d) for q in range(len(texts)) for d in range(len(documents))]
    rng.shuffle(every)
    for chosen in (every[:50] + every[:20], every[:1], [(6, 39), (0, 38), (6, 39)], []):
        scores = score_pairs(queries, one, chosen, encoder.mesh, batch_size)
        assert scores.dtype == np.float32 and scores.shape == (len(chosen),)
        wanted = [expected[q, d] for q, d in chosen]
        np.testing.assert_allclose(scores, wanted, atol=1e-5)
    array = np.array(every[:9])
    np.testing.assert_array_equal(
        score_pairs(queries, one, array, encoder.mesh, batch_size),
        score_pairs(queries, one, every[:9], encoder.mesh, batch_size),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_score_as_the_search_does(
    tokenizer: ColbertTokenizer, documents: list[str], dtype: str
) -> None:
    encoder = encoder_of(tokenizer, (2, 1, 1))
    params = encoder.place(make_table(tokenizer))
    queries = encoder.queries(params, documents[:3])
    one = build_index(encoder, params, enumerate_texts(documents), dtype)
    found = top_k(queries, one.blocks(8), one.ids, len(documents), encoder.mesh)
    chosen = [(q, one.ids.index(name)) for q, hits in enumerate(found) for name in hits]
    scores = score_pairs(queries, one, chosen, encoder.mesh)
    searched = [score for hits in found for score in hits.values()]
    np.testing.assert_allclose(scores, searched, atol=1e-6)


def test_the_program_is_compiled_once_for_each_length(
    tokenizer: ColbertTokenizer, documents: list[str]
) -> None:
    encoder = encoder_of(tokenizer, (2, 1, 1))
    params: Any = encoder.place(make_table(tokenizer))
    queries = encoder.queries(params, documents[:9])
    one = build_index(encoder, params, enumerate_texts(documents), "bfloat16")
    rng = np.random.default_rng(0)
    pairs._make_score.cache_clear()
    for count in (200, 7, 90, 1):
        chosen = np.stack([rng.integers(0, 9, count), rng.integers(0, 40, count)], axis=1)
        score_pairs(queries, one, chosen, encoder.mesh, 8)
    assert pairs._make_score(encoder.mesh)._cache_size() <= len(encoder.lengths)


def enumerate_texts(texts: list[str]) -> list[tuple[str, str]]:
    return [(f"d{i}", text) for i, text in enumerate(texts)]
