"""The reference itself: PyLate's process answers, and what it answers is sound."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from reference.client import PyLateError, PyLateReference

pytestmark = pytest.mark.parity

LENGTHS = {"query_length": 16, "document_length": 40}
TEXTS = ["Return a copy of the list.", "parse", "It's (rather) long, isn't it? " * 20]


@pytest.fixture(scope="module")
def folder(
    pylate: PyLateReference, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    path = tmp_path_factory.mktemp("pylate") / "model"
    described = pylate.call(
        "make_model",
        folder=str(path),
        tokenizer_json=str(tokenizer_file),
        config={"local_attention": 8},
        dense=[
            {"in_features": 64, "out_features": 48, "activation": "GELU", "use_residual": True},
            {"in_features": 48, "out_features": 48, "bias": True, "use_residual": True},
            {"in_features": 48, "out_features": 32},
        ],
        prompts={"query": "search_query: ", "document": "search_document: "},
        seed=1,
        **LENGTHS,
    )
    assert described["parameters"]["1.residual.weight"] == (48, 64)
    assert described["query_prefix_id"] == described["tokens"] - 2
    return str(path)


def test_versions(pylate: PyLateReference) -> None:
    found = pylate.call("versions")
    assert found["pylate"] == "1.6.0"
    assert found["transformers"] == "5.3.0"
    assert found["sentence-transformers"] == "5.3.0"


def test_errors_carry_the_remote_traceback(pylate: PyLateReference) -> None:
    with pytest.raises(PyLateError, match="no function 'nonsense'"):
        pylate.call("nonsense")
    with pytest.raises(PyLateError, match=r"in describe[\s\S]*Error"):
        pylate.call("describe", folder="/nowhere/at/all")
    assert pylate.call("versions")["pylate"] == "1.6.0"


def test_the_virtual_devices_are_there() -> None:
    if jax.default_backend() == "cpu":
        assert jax.device_count() == 8


def test_scores_by_hand(pylate: PyLateReference) -> None:
    queries = np.array([[[1, 0], [0, 1]], [[2, 0], [1, 1]]], np.float32)
    documents = np.array([[[3, 1], [0, 5]], [[1, 2], [4, 4]]], np.float32)
    mask = np.array([[1, 0], [1, 1]], np.float32)
    # Query 0 and document 0: max(3, 0) + max(1, 5) = 8; with its second token masked 3 + 1 = 4.
    plain = pylate.call("colbert_scores", queries=queries, documents=documents)
    np.testing.assert_array_equal(plain, [[8, 8], [11, 16]])
    masked = pylate.call(
        "colbert_scores", queries=queries, documents=documents, documents_mask=mask
    )
    np.testing.assert_array_equal(masked, [[4, 8], [10, 16]])
    own = pylate.call("colbert_kd_scores", queries=queries[:1], documents=documents[None])
    np.testing.assert_array_equal(own, [[8, 8]])


def test_tokenize(pylate: PyLateReference, folder: str) -> None:
    described = pylate.call("describe", folder=folder)
    ids = described["special_ids"]
    queries = pylate.call("tokenize", folder=folder, texts=TEXTS, is_query=True)
    assert {array.shape for array in queries.values()} == {(3, 16)}
    assert (queries["input_ids"][:, 0] == ids["cls"]).all()
    assert (queries["input_ids"][:, 1] == described["query_prefix_id"]).all()
    assert (queries["input_ids"][queries["attention_mask"] == 0] == ids["mask"]).all()
    assert queries["scoring_mask"].all()
    documents = pylate.call("tokenize", folder=folder, texts=TEXTS, is_query=False)
    assert documents["input_ids"].shape == (3, 40)
    assert documents["scoring_mask"].sum() < documents["attention_mask"].sum()


@pytest.mark.parametrize("is_query", [True, False])
def test_encode(pylate: PyLateReference, folder: str, is_query: bool) -> None:
    tokens = pylate.call("tokenize", folder=folder, texts=TEXTS, is_query=is_query)
    encoded = pylate.call("encode", folder=folder, texts=TEXTS, is_query=is_query)
    whole = pylate.call(
        "token_embeddings",
        folder=folder,
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
    )
    for array, row, mask in zip(encoded, whole, tokens["scoring_mask"], strict=True):
        assert array.shape == (mask.sum(), 32)
        np.testing.assert_allclose(np.linalg.norm(array, axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(array, row[mask], atol=1e-5)


def test_roundtrip(pylate: PyLateReference, folder: str, tmp_path: Path) -> None:
    output = tmp_path / "again"
    before = pylate.call("describe", folder=folder)
    after = pylate.call("roundtrip", folder=folder, output=str(output))
    assert after == before
    for name in ("config_sentence_transformers.json", "2_Dense/config.json", "config.json"):
        assert json.loads((output / name).read_text()) == json.loads(
            (Path(folder) / name).read_text()
        )
    np.testing.assert_array_equal(
        pylate.call("encode", folder=str(output), texts=TEXTS, is_query=False)[2],
        pylate.call("encode", folder=folder, texts=TEXTS, is_query=False)[2],
    )


def test_encoders_agree(pylate: PyLateReference, folder: str, tokenizer_file: Path) -> None:
    tokens = pylate.call("tokenize", folder=folder, texts=TEXTS, is_query=False)
    batch = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    outputs = {
        attention: pylate.call("automodel", folder=folder, attention=attention, **batch)
        for attention in ("sdpa", "eager")
    }
    assert outputs["sdpa"]["missing_keys"] == outputs["sdpa"]["unexpected_keys"] == []
    attended = tokens["attention_mask"] == 1
    np.testing.assert_allclose(
        outputs["sdpa"]["last_hidden_state"][attended],
        outputs["eager"]["last_hidden_state"][attended],
        atol=1e-4,
    )


@pytest.mark.parametrize("cached", [False, True])
def test_contrastive(pylate: PyLateReference, folder: str, cached: bool) -> None:
    result = pylate.call(
        "contrastive",
        folder=folder,
        query_texts=["copy a list", "parse an argument"],
        document_texts=[[TEXTS[0], TEXTS[1]], ["The argument parser.", TEXTS[2]]],
        temperature=0.5,
        prompts={"query": "search_query: ", "document": "search_document: "},
        cached=cached,
        mini_batch_size=1,
    )
    logits = result["scores"] / 0.5
    picked = logits[[0, 1], [0, 2]]
    expected = np.mean(np.log(np.exp(logits - picked[:, None]).sum(axis=1)))
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-4)
    assert [batch["input_ids"].shape for batch in result["batches"]] == [(2, 16), (2, 40), (2, 40)]
    assert all(np.isfinite(gradient).all() for gradient in result["gradients"].values())
    assert all(gradient.any() for gradient in result["gradients"].values())


def test_distillation(pylate: PyLateReference, folder: str) -> None:
    teacher = np.array([[3.0, 1.0, 0.5], [0.1, 0.9, 0.2]], np.float32)
    result = pylate.call(
        "distillation",
        folder=folder,
        query_texts=["copy a list", "parse an argument"],
        documents_texts=[TEXTS, TEXTS[::-1]],
        scores=teacher,
    )
    low, high = (fold(result["scores"], axis=1, keepdims=True) for fold in (np.min, np.max))
    student = _log_softmax((result["scores"] - low) / (high - low + 1e-8))
    target = _log_softmax(teacher)
    expected = (np.exp(target) * (target - student)).sum() / 2
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-4)
    assert [batch["input_ids"].shape for batch in result["batches"]] == [(2, 16), (6, 40)]
    assert all(np.isfinite(gradient).all() for gradient in result["gradients"].values())


def test_evaluate(pylate: PyLateReference, folder: str, tmp_path: Path) -> None:
    prompts = {"query": "search_query: ", "document": "search_document: "}  # the folder's own
    documents = {"a": ("", TEXTS[0]), "b": ("A", "title"), "c": ("", "parse"), "d": (TEXTS[2], "")}
    queries = {"q": "copy a list", "r": "parse an argument", "unjudged": "long"}
    qrels = {"q": {"a": 2, "b": 1, "c": 0}, "r": {"c": 1}}
    (tmp_path / "qrels").mkdir()
    rows = [{"_id": name, "title": t, "text": text} for name, (t, text) in documents.items()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"_id": name, "text": text} for name, text in queries.items()]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    lines = [f"{query}\t{name}\t{r}\n" for query in qrels for name, r in qrels[query].items()]
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    found = pylate.call("evaluate", folder=folder, collection=str(tmp_path))

    def encode(side: str, text: str) -> np.ndarray:
        options = {"is_query": side == "query", "prompt": prompts[side]}
        return np.asarray(pylate.call("encode", folder=folder, texts=[text], **options)[0])

    encoded = {name: encode("document", " ".join(t).strip()) for name, t in documents.items()}
    values = {}
    for query, judged in qrels.items():
        asked = encode("query", queries[query])
        scores = {name: (asked @ d.T).max(axis=1).sum() for name, d in encoded.items()}
        ranking = sorted(scores, key=scores.__getitem__, reverse=True)
        assert [name for name, _ in found["rankings"][query]] == ranking
        assert dict(found["rankings"][query]) == pytest.approx(scores, rel=1e-5)
        gains = [[judged.get(name, 0) for name in ranking], sorted(judged.values(), reverse=True)]
        actual, ideal = (sum(g / np.log2(i + 2) for i, g in enumerate(gain)) for gain in gains)
        values[query] = actual / ideal
    assert found["ndcg@10_of_each"] == pytest.approx(values)
    assert found["ndcg@10"] == pytest.approx(sum(values.values()) / 2)
    assert found["rankings"].keys() == qrels.keys()


def test_real_texts(real_texts: list[str]) -> None:
    lengths = [len(text.split()) for text in real_texts]
    assert len(set(real_texts)) == len(real_texts) >= 1200
    assert min(lengths) == 0 and 500 < max(lengths) <= 1000
    assert sum(length == 1 for length in lengths) > 20
    assert sum(length > 200 for length in lengths) > 20


def _log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))
