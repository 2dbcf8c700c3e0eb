"""Search is exact: what it finds, and in which order, is what a float64 loop finds."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_model import make_model, make_table, make_tokenizer, table_embed, table_scores

from colbert_jax.colbert import make_embed
from colbert_jax.retrieval import encode, search
from colbert_jax.retrieval.encode import Block, Encoder, Queries
from colbert_jax.retrieval.search import make_search, top_k
from colbert_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESHES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 4, 1), (2, 2, 2)]


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    return make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])


class Encoded:
    """Queries and documents of whole numbers, whose scores are exact and often equal."""

    def __init__(self, queries: int, documents: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.queries = Queries(
            rng.integers(-2, 3, (queries, 3, 4)).astype(np.float32), rng.random((queries, 3)) < 0.8
        )
        self.documents = [
            rng.integers(-2, 3, (rng.integers(1, 7), 4)).astype(np.float32)
            for _ in range(documents)
        ]
        self.masks = [rng.random(len(x)) < 0.7 for x in self.documents]
        if documents > 3:
            self.masks[1][:] = False
            self.documents[3][:] = self.documents[2][:1]
        # Numbers that sort otherwise as strings, and other scripts.
        names = [str(i) for i in range(documents)]
        names[::7] = [f"\u6587{i}\U0001f600" for i in range(len(names[::7]))]
        names[3::7] = [f"\u00e9 {i}" for i in range(len(names[3::7]))]
        random.Random(seed).shuffle(names)
        self.ids = names

    def brute_force(self, k: int) -> list[list[tuple[str, float]]]:
        found = []
        for query, query_mask in zip(*self.queries, strict=True):
            scores = {}
            for name, document, mask in zip(self.ids, self.documents, self.masks, strict=True):
                kept = document[mask].astype(np.float64)
                products = query[query_mask].astype(np.float64) @ kept.T
                scores[name] = float(products.max(axis=1).sum()) if len(kept) else 0.0
            hits = [(name, score) for name, score in scores.items() if not math.isnan(score)]
            found.append(sorted(hits, key=lambda hit: (-hit[1], hit[0]))[:k])
        return found

    def blocks(self, size: int, seed: int = 0) -> Iterator[Block]:
        """The documents in any order; in the padding stands what would win if it were looked at."""
        order = np.random.default_rng(seed).permutation(len(self.ids))
        for start in range(0, len(order), size):
            positions = order[start : start + size]
            width = max(len(self.documents[p]) for p in positions)
            embeddings = np.full((size, width, 4), 99.0, np.float32)
            mask = np.zeros((size, width), bool)
            mask[len(positions) :] = True
            for row, position in enumerate(positions):
                length = len(self.documents[position])
                embeddings[row, :length] = self.documents[position]
                mask[row, :length] = self.masks[position]
            yield Block(positions, embeddings, mask)


def check(encoded: Encoded, size: int, k: int, mesh: Mesh, seed: int = 0) -> None:
    found = top_k(encoded.queries, encoded.blocks(size, seed), encoded.ids, k, mesh)
    assert [list(hits.items()) for hits in found] == encoded.brute_force(k)


@pytest.mark.parametrize("shape", MESHES)
def test_all_meshes_find_what_brute_force_finds(shape: tuple[int, int, int]) -> None:
    for k in (3, 1000):
        check(Encoded(5, 75), 8, k, mesh_of(shape))


@pytest.mark.parametrize("size", [2, 16, 128])
def test_blocks_of_any_size_and_order_give_the_same(size: int) -> None:
    encoded = Encoded(3, 75, seed=1)
    for seed in (1, 2):
        check(encoded, size, 7, mesh_of((2, 1, 1)), seed)


@pytest.mark.parametrize("chunk", [1, 4, 9, 1024])
def test_queries_of_any_number_are_scored(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "QUERY_CHUNK", chunk)
    check(Encoded(9, 40, seed=2), 16, 5, mesh_of((2, 1, 1)))


def test_equal_scores_give_the_last_place_to_the_lowest_id() -> None:
    """The same in every block, on every device and in both halves of the corpus."""
    names = [str(i) for i in range(64)]
    random.Random(0).shuffle(names)
    queries = Queries(np.ones((1, 1, 1), np.float32), np.ones((1, 1), bool))
    for mesh in map(mesh_of, [(1, 1, 1), (8, 1, 1), (2, 2, 2)]):
        blocks = [
            Block(np.arange(i, i + 8), np.ones((8, 1, 1), np.float32), np.ones((8, 1), bool))
            for i in range(0, 64, 8)
        ]
        for k in (3, 30):
            (hits,) = top_k(queries, blocks, names, k, mesh)
            assert list(hits) == sorted(names)[:k]  # "10" before "2"


def test_a_document_without_tokens_scores_zero_and_may_win() -> None:
    queries = Queries(np.ones((1, 2, 1), np.float32), np.ones((1, 2), bool))
    embeddings = np.array([[[-1.0]], [[5.0]], [[-0.5]]], np.float32)
    block = Block(np.arange(3), embeddings, np.array([[True], [False], [True]]))
    (hits,) = top_k(queries, [block], ["a", "b", "c"], 3, mesh_of((1, 1, 1)))
    assert list(hits.items()) == [("b", 0.0), ("c", -1.0), ("a", -2.0)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_score_that_is_no_number_is_no_hit(shape: tuple[int, int, int]) -> None:
    encoded = Encoded(4, 40, seed=3)
    for place in (0, 5, 6, 7, 39):
        encoded.documents[place][:] = np.nan
        encoded.masks[place][:] = True
    for k in (3, 40):
        check(encoded, 8, k, mesh_of(shape))
    assert all(len(hits) == 35 for hits in encoded.brute_force(40))
    encoded.queries.embeddings[1] = np.nan
    encoded.queries.mask[1] = True
    mesh = mesh_of(shape)
    found = top_k(encoded.queries, encoded.blocks(8), encoded.ids, 5, mesh)
    # Its products with documents that have no token are no numbers neither.
    assert set(found[1]) <= {
        encoded.ids[1],
        *(n for n, m in zip(encoded.ids, encoded.masks, strict=True) if not m.any()),
    }
    assert all(len(hits) == 5 for i, hits in enumerate(found) if i != 1)


def test_a_corpus_without_a_single_number_has_no_hits() -> None:
    encoded = Encoded(2, 16)
    for document, mask in zip(encoded.documents, encoded.masks, strict=True):
        document[:], mask[:] = np.nan, True
    encoded.queries.mask[:] = True
    found = top_k(encoded.queries, encoded.blocks(8), encoded.ids, 4, mesh_of((2, 1, 1)))
    assert found == [{}, {}]


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1)])
def test_next_to_nothing_is_searched_too(shape: tuple[int, int, int]) -> None:
    mesh = mesh_of(shape)
    check(Encoded(1, 1), 8, 5, mesh)
    check(Encoded(3, 2), 8, 1, mesh)
    one = Encoded(2, 1)
    none = Queries(one.queries.embeddings[:0], one.queries.mask[:0])
    assert top_k(none, one.blocks(8), one.ids, 5, mesh) == []
    assert top_k(one.queries, [], [], 5, mesh) == [{}, {}]


def test_programs_are_compiled_once_for_each_shape() -> None:
    mesh = mesh_of((2, 1, 1))
    encoded = Encoded(3, 30, seed=4)
    for document in encoded.documents:
        document.resize((4, 4), refcheck=False)
    encoded.masks = [np.resize(mask, 4) for mask in encoded.masks]
    check(encoded, 8, 6, mesh)
    programs = search._make_update(mesh, 6), search._make_merge(mesh, 6)
    sizes = [program._cache_size() for program in programs]
    assert sizes == [1, 1]
    for seed in (1, 2, 3):
        check(encoded, 8, 6, mesh, seed)
    assert (search._make_update(mesh, 6), search._make_merge(mesh, 6)) == programs
    assert [program._cache_size() for program in programs] == sizes


# --- from texts ---


@pytest.fixture(scope="module")
def texts(real_texts: list[str]) -> dict[str, str]:
    """Documents of all lengths, some of them the same, by ids in no order."""
    chosen = real_texts[:60] + [real_texts[7]] * 5 + ["", " ", ".", "?!"]
    names = [str(i) for i in range(len(chosen))]
    random.Random(1).shuffle(names)
    return dict(zip(names, chosen, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_texts_are_found_as_by_brute_force(
    tokenizer_file: Path,
    texts: dict[str, str],
    shape: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode, "CHUNK", 32)
    # Of a document of punctuation alone nothing is left to score.
    skipped = (*".?!", "[CLS]", "[SEP]", "[D] ")
    tokenizer = make_tokenizer(
        tokenizer_file, query_length=10, document_length=30, skiplist_words=skipped
    )
    assert not tokenizer.documents(["?!", ""])["scoring_mask"].any()
    table = make_table(tokenizer)
    queries = {f"q{i}": " ".join(t.split()[:4]) for i, t in enumerate(list(texts.values())[:6])}
    scores = table_scores(table, tokenizer, list(queries.values()), list(texts.values()))
    ranked = make_search(Encoder(table_embed, tokenizer, mesh_of(shape), batch_size=2), table)
    repeated = list(texts.values())[7]
    for k in (5, 1000):
        found = ranked(queries, texts, k)
        assert list(found) == list(queries)
        for query, row in zip(queries, scores, strict=True):
            hits = found[query]
            assert len(hits) == min(k, len(texts))
            expected = dict(zip(texts, row, strict=True))
            for name, score in hits.items():
                np.testing.assert_allclose(score, expected[name], atol=1e-5)
            assert min(hits.values()) >= np.sort(row)[-len(hits)] - 1e-5
            assert list(hits.items()) == sorted(hits.items(), key=lambda h: (-h[1], h[0]))
    for hits in found.values():
        # In blocks of other widths the last bit of the same text's score may differ.
        same = [score for name, score in hits.items() if texts[name] == repeated]
        assert len(same) == 6 and max(same) - min(same) < 1e-6
        assert all(hits[name] == 0 for name in texts if texts[name] in ("", " ", ".", "?!"))


def test_a_trained_models_scores_are_brute_forces_and_ties_are_ordered_by_id(
    tokenizer_file: Path, real_texts: list[str]
) -> None:
    model, params = make_model(tokenizer_file, query_length=14, document_length=20)
    embed = make_embed(model.config)
    texts = [*[t for t in real_texts if len(t.split()) > 12][:20], "short", "two words", "."]
    # The same text under many ids, which lie in different blocks of 8.
    documents = {f"d{i:02}": text for i, text in enumerate(texts)}
    documents |= {name: texts[3] for name in ("z", "a", "m")}
    queries = {f"q{i}": " ".join(text.split()[:5]) for i, text in enumerate(texts[:9])}
    mesh = mesh_of((2, 1, 1))
    ranked = make_search(Encoder(embed, model.tokenizer, mesh, batch_size=4), params)
    found = ranked(queries, documents, 10)

    both = jax.jit(embed)
    q = model.tokenizer.queries(list(queries.values()))
    d = model.tokenizer.documents(list(documents.values()), length=20)
    ours = np.asarray(both(params, q["input_ids"], q["attention_mask"]))
    theirs = np.asarray(both(params, d["input_ids"], d["attention_mask"]))
    similarities = np.einsum("qsd,ntd->qnst", ours, theirs)
    similarities = np.where(d["scoring_mask"][None, :, None], similarities, -np.inf)
    scores = (similarities.max(-1) * q["scoring_mask"][:, None]).sum(-1)
    assert list(found) == list(queries)
    for row, query in zip(scores, queries, strict=True):
        hits = found[query]
        expected = dict(zip(documents, row, strict=True))
        assert len(hits) == 10
        for document, score in hits.items():
            np.testing.assert_allclose(score, expected[document], atol=1e-4)
        assert min(hits.values()) >= np.sort(row)[-10] - 1e-4
        assert list(hits.values()) == sorted(hits.values(), reverse=True)
    everything = ranked(queries, documents, 1000)
    for hits in everything.values():
        assert set(hits) == set(documents)
        same = [name for name in hits if documents[name] == texts[3]]
        assert same == ["a", "d03", "m", "z"]
        assert len({hits[name] for name in same}) == 1


def test_equal_scores_of_documents_of_all_lengths_are_ordered_by_id(
    tokenizer_file: Path, real_texts: list[str]
) -> None:
    tokenizer = make_tokenizer(tokenizer_file, query_length=14, document_length=20)

    def embed(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.broadcast_to(params, (*ids.shape, 2))  # every token is the same

    # The longest text, which is encoded last, has the first id.
    texts = sorted(real_texts[:30], key=len, reverse=True)
    documents = {f"d{i:02}": text for i, text in enumerate(texts)}
    encoder = Encoder(embed, tokenizer, mesh_of((2, 1, 1)), batch_size=4)
    ranked = make_search(encoder, jnp.array([0.0, 1.0]))
    found = ranked({"q": "a query"}, documents, 12)["q"]
    assert list(found) == [f"d{i:02}" for i in range(12)]
    assert set(found.values()) == {14.0}  # one for each query token


def test_a_search_uses_the_parameters_that_it_was_made_with(tokenizer_file: Path) -> None:
    tokenizer = make_tokenizer(tokenizer_file, query_length=10, document_length=30)
    mesh = mesh_of((2, 2, 2))
    encoder = Encoder(table_embed, tokenizer, mesh, batch_size=2)
    queries, documents = {"q": "copy a list"}, {"a": "a list", "b": "parse", "c": "copy it"}
    size = tokenizer.vocab_size
    found = []
    for seed in (0, 1, 0):
        table = make_table(tokenizer, seed=seed)["table"]
        split = NamedSharding(mesh, PartitionSpec("fsdp" if size % 2 == 0 else None))
        ranked = make_search(encoder, {"table": jax.device_put(table, split)})
        found.append(ranked(queries, documents, 3)["q"])
        expected = table_scores(
            {"table": table}, tokenizer, *map(lambda x: list(x.values()), (queries, documents))
        )
        np.testing.assert_allclose([found[-1][n] for n in documents], expected[0], atol=1e-5)
    assert found[0] == found[2] != found[1]


def test_nothing_to_search_for_or_in(tokenizer_file: Path) -> None:
    tokenizer = make_tokenizer(tokenizer_file)
    encoder = Encoder(table_embed, tokenizer, mesh_of((2, 1, 1)))
    ranked = make_search(encoder, make_table(tokenizer))
    assert ranked({}, {"a": "text"}, 3) == {}
    assert ranked({"q": "text"}, {}, 3) == {"q": {}}
    assert list(ranked({"q": "text"}, {"a": ""}, 3)["q"]) == ["a"]
