"""Texts become the embeddings that the model gives each of them alone, whatever else there is."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_model import make_model, make_table, make_tokenizer, table_embed

from colbert_jax.colbert import make_embed
from colbert_jax.retrieval import encode
from colbert_jax.retrieval.encode import Encoder, document_lengths
from colbert_jax.sharding import make_mesh
from colbert_jax.tokenization import ColbertTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESHES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 2, 2)]


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    return make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> ColbertTokenizer:
    return make_tokenizer(tokenizer_file, query_length=10, document_length=30)


@pytest.fixture(scope="module")
def table(tokenizer: ColbertTokenizer) -> dict[str, np.ndarray]:
    return make_table(tokenizer)


def rows_of(table: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    rows = table["table"][ids].astype(np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize(("platform", "most"), [("cpu", 16), ("gpu", 8), ("tpu", 8)])
@pytest.mark.parametrize("longest", [4, 5, 7, 180, 8192])
def test_a_few_lengths_hold_every_document(
    longest: int, platform: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colbert_jax.retrieval.encode.platform", lambda: platform)
    lengths = document_lengths(longest)
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] == longest and lengths[0] >= 1
    assert len(lengths) == min(most, longest)
    assert max(np.diff([0, *lengths])) == -(-longest // most)  # no step is longer than the others


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("count", [1, 7, 40])
def test_queries_are_encoded_in_their_order(
    tokenizer: ColbertTokenizer,
    table: dict[str, np.ndarray],
    real_texts: list[str],
    shape: tuple[int, int, int],
    count: int,
) -> None:
    encoder = Encoder(table_embed, tokenizer, mesh_of(shape), batch_size=4)
    texts = real_texts[:count]
    found = encoder.queries(encoder.place(table), texts)
    batch = tokenizer.queries(texts)
    assert isinstance(found.embeddings, np.ndarray) and found.embeddings.dtype == np.float32
    assert found.mask.dtype == bool
    np.testing.assert_array_equal(found.mask, batch["scoring_mask"])
    np.testing.assert_allclose(found.embeddings, rows_of(table, batch["input_ids"]), atol=1e-6)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("chunk", [16, 23, 1000])
def test_every_document_is_in_one_block_with_its_own_embeddings(
    tokenizer: ColbertTokenizer,
    table: dict[str, np.ndarray],
    real_texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    chunk: int,
) -> None:
    monkeypatch.setattr(encode, "CHUNK", chunk)
    encoder = Encoder(table_embed, tokenizer, mesh_of(shape), batch_size=3)
    texts = real_texts[:50]
    seen = []
    for block in encoder.documents(encoder.place(table), iter(texts)):
        embeddings, mask = np.asarray(block.embeddings), np.asarray(block.mask)
        assert len(embeddings) == len(mask) <= encoder.block_size
        assert embeddings.shape[1] in encoder.lengths
        assert not mask[len(block.positions) :].any()  # padding
        for row, position in enumerate(block.positions):
            batch = tokenizer.documents([texts[position]])
            length = batch["input_ids"].shape[1]
            np.testing.assert_array_equal(mask[row][:length], batch["scoring_mask"][0])
            assert not mask[row][length:].any()
            expected = rows_of(table, batch["input_ids"][0])
            np.testing.assert_allclose(embeddings[row][:length], expected, atol=1e-6)
            seen.append(int(position))
    assert sorted(seen) == list(range(50))


def test_blocks_hold_documents_of_like_length(
    tokenizer: ColbertTokenizer, table: dict[str, np.ndarray], real_texts: list[str]
) -> None:
    encoder = Encoder(table_embed, tokenizer, mesh_of((1, 1, 1)), batch_size=8)
    sizes = list(map(len, tokenizer.document_ids(real_texts[:64])))
    blocks = list(encoder.documents(encoder.place(table), real_texts[:64]))
    assert len(blocks) == 8
    order = [sizes[position] for block in blocks for position in block.positions]
    assert order == sorted(sizes)
    widths = [np.asarray(block.mask).shape[1] for block in blocks]
    assert widths[0] < widths[-1] == 30


def test_a_corpus_is_read_as_it_is_encoded(
    tokenizer: ColbertTokenizer,
    table: dict[str, np.ndarray],
    real_texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode, "CHUNK", 10)
    encoder = Encoder(table_embed, tokenizer, mesh_of((1, 1, 1)), batch_size=10)
    read = []

    def texts() -> Any:
        for text in real_texts[:40]:
            read.append(text)
            yield text

    blocks = encoder.documents(encoder.place(table), texts())
    assert not read
    for count in (10, 20, 30, 40):
        next(blocks)
        assert len(read) == count
    assert next(blocks, None) is None


def test_nothing_to_encode_is_no_error(
    tokenizer: ColbertTokenizer, table: dict[str, np.ndarray]
) -> None:
    encoder = Encoder(table_embed, tokenizer, mesh_of((2, 1, 1)))
    assert len(encoder.queries(table, []).embeddings) == len(encoder.queries(table, []).mask) == 0
    assert list(encoder.documents(table, [])) == []


def test_programs_are_compiled_once(
    tokenizer: ColbertTokenizer, table: dict[str, np.ndarray], real_texts: list[str]
) -> None:
    traced = []

    def embed(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        traced.append(ids.shape)
        return table_embed(params, ids, mask)

    encoder = Encoder(embed, tokenizer, mesh_of((2, 1, 1)), batch_size=4)
    params = encoder.place(table)
    for count in (200, 150, 99):
        for _ in encoder.documents(params, real_texts[:count]):
            pass
    encoder.queries(params, real_texts[:33])
    # Those of sixteen lengths of documents that a block is as long as; 10 is the queries' too.
    lengths = (6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 30)
    assert sorted(traced) == [(8, length) for length in lengths]
    assert set(lengths) <= set(encoder.lengths)
    other = encoder.place({"table": table["table"] + 1})
    for count in (200, 150, 99):
        for _ in encoder.documents(other, real_texts[:count]):
            pass
        found = encoder.queries(other, real_texts[:count]).embeddings
    assert len(traced) == len(lengths)
    batch = tokenizer.queries(real_texts[:99])
    np.testing.assert_allclose(
        found, rows_of({"table": table["table"] + 1}, batch["input_ids"]), atol=1e-6
    )


def test_few_texts_are_not_padded_to_a_whole_block(
    tokenizer: ColbertTokenizer, table: dict[str, np.ndarray]
) -> None:
    encoder = Encoder(table_embed, tokenizer, mesh_of((2, 1, 1)), batch_size=64)
    params = encoder.place(table)
    rows = {}
    for count in (1, 2, 3, 5, 100, 128, 129):
        blocks = list(encoder.documents(params, ["word"] * count))
        rows[count] = [len(block.mask) for block in blocks]
    assert rows == {
        1: [2],
        2: [2],
        3: [4],
        5: [8],
        100: [128],
        128: [128],
        129: [128, 128],
    }


def test_the_model_encodes_a_text_alike_in_any_company(
    tokenizer_file: Path, real_texts: list[str]
) -> None:
    model, params = make_model(tokenizer_file)
    embed = make_embed(model.config)
    texts = real_texts[:20]
    batch = model.tokenizer.documents(texts, length=40)
    whole = np.asarray(jax.jit(embed)(params, batch["input_ids"], batch["attention_mask"]))
    encoder = Encoder(embed, model.tokenizer, mesh_of((2, 2, 2)), batch_size=2)
    for block in encoder.documents(encoder.place(params), texts):
        embeddings, mask = np.asarray(block.embeddings), np.asarray(block.mask)
        for row, position in enumerate(block.positions):
            expected = whole[position][batch["scoring_mask"][position]]
            np.testing.assert_allclose(embeddings[row][mask[row]], expected, atol=1e-5)


# --- parameters, wherever they are ---


@pytest.mark.parametrize("shape", MESHES)
def test_parameters_come_from_anywhere(
    tokenizer: ColbertTokenizer, table: dict[str, np.ndarray], shape: tuple[int, int, int]
) -> None:
    mesh = mesh_of(shape)
    encoder = Encoder(table_embed, tokenizer, mesh, batch_size=2)
    other = make_mesh(devices=jax.devices()[-1:])
    size = tokenizer.vocab_size
    whole = np.pad(table["table"], ((0, -size % 8), (0, 0)))  # divisible, to be split
    places: dict[str, Any] = {
        "host": whole,
        "uncommitted": jax.numpy.asarray(whole),
        "one device": jax.device_put(whole, jax.devices()[0]),
        "another mesh": jax.device_put(whole, NamedSharding(other, PartitionSpec())),
        "split": jax.device_put(whole, NamedSharding(mesh, PartitionSpec("fsdp"))),
        "split twice": jax.device_put(whole, NamedSharding(mesh, PartitionSpec("data", "tensor"))),
    }
    expected = encoder.queries(encoder.place({"table": whole}), ["copy a list"]).embeddings
    for name, value in places.items():
        params = encoder.place({"table": value})
        assert params["table"].sharding.is_fully_replicated, name
        assert params["table"].sharding.device_set == set(mesh.devices.flat), name
        np.testing.assert_array_equal(params["table"], whole, err_msg=name)
        found = encoder.queries(params, ["copy a list"]).embeddings
        np.testing.assert_array_equal(found, expected, err_msg=name)
        assert encoder.place(params) is params  # nothing is copied twice


# --- texts of every kind ---


def test_half_a_surrogate_pair_is_a_letter_like_another(
    tokenizer: ColbertTokenizer, table: dict[str, np.ndarray]
) -> None:
    encoder = Encoder(table_embed, tokenizer, mesh_of((1, 1, 1)), batch_size=4)
    broken, mended = "half \ud83d a pair\udc00", "half \ufffd a pair\ufffd"
    queries = encoder.queries(encoder.place(table), [broken, mended]).embeddings
    np.testing.assert_array_equal(queries[0], queries[1])
    (block,) = encoder.documents(encoder.place(table), [broken, mended])
    embeddings = np.asarray(block.embeddings)
    np.testing.assert_array_equal(embeddings[0], embeddings[1])


@pytest.mark.parametrize("lengths", [(4, 4), (4, 7), (9, 5), (9, 6)])
def test_short_lengths_work(
    tokenizer_file: Path, real_texts: list[str], lengths: tuple[int, int]
) -> None:
    names = ("query_length", "document_length")
    tokenizer = make_tokenizer(tokenizer_file, **dict(zip(names, lengths, strict=True)))
    params = make_table(tokenizer)
    encoder = Encoder(table_embed, tokenizer, mesh_of((1, 1, 1)), batch_size=8)
    assert encoder.queries(params, real_texts[:3]).embeddings.shape == (3, lengths[0], 8)
    widths = {np.asarray(b.mask).shape[1] for b in encoder.documents(params, real_texts[:16])}
    assert max(widths) == lengths[1]
