"""Consistency filtering: which pairs stay, against the definition, whatever the block's size."""

import numpy as np
import pytest
from jax import numpy as jnp
from transformers import PreTrainedTokenizerFast

from colbert_jax.colbert import ColbertConfig, DenseConfig, init_params, make_embed
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.retrieval.consistency import make_consistency_filter
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(tokenizer_file):
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), **names)
    tokenizer = ColbertTokenizer(
        hf_tokenizer, TokenizationConfig(query_length=12, document_length=20)
    )
    encoder = ModernBertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    config = ColbertConfig(encoder, (DenseConfig(32, 16),))
    return make_embed(config), init_params(config, 0), tokenizer


@pytest.fixture(scope="module")
def rows(real_texts):
    texts = [text for text in real_texts if len(text.split()) > 8][:60]
    halves = [(" ".join(t.split()[:4]), " ".join(t.split()[4:])) for t in texts]
    return [{"query": q, "documents": [d], "scores": None} for q, d in halves]


def _rivals_above(model, rows, sample):
    """How many documents of the sample score higher than each row's own, one pair at a time."""
    embed, params, tokenizer = model

    def encode(tokens):
        vectors = embed(params, tokens["input_ids"], tokens["attention_mask"])
        return np.asarray(vectors, np.float64), tokens["scoring_mask"]

    queries, query_mask = encode(tokenizer.queries([row["query"] for row in rows]))
    texts = [row["documents"][0] for row in rows] + list(sample)
    documents, masks = encode(tokenizer.documents(texts, 20))
    documents = np.asarray(jnp.asarray(documents, jnp.bfloat16), np.float64)

    def score(i, j):
        similarities = queries[i][query_mask[i]] @ documents[j][masks[j]].T
        return similarities.max(axis=1).sum() if masks[j].any() else 0.0

    counts = []
    for i in range(len(rows)):
        others = [score(i, len(rows) + j) for j, text in enumerate(sample) if text != texts[i]]
        gaps = np.array(others) - score(i, i)
        assert np.abs(gaps).min() > 1e-5, "two scores are closer than float32 tells apart"
        counts.append(int((gaps > 0).sum()))
    return counts


@pytest.mark.parametrize("top_k", [1, 3, 10])
@pytest.mark.parametrize("block", [7, 64])
def test_pairs_stay_whose_document_is_among_the_first(model, rows, top_k, block):
    sample = [row["documents"][0] for row in rows[::2]]
    keep = make_consistency_filter(*model, sample, top_k, block)
    counts = _rivals_above(model, rows, sample)
    assert keep(rows) == [count < top_k for count in counts]
    assert 0 < sum(keep(rows)) < len(rows)


def test_a_document_is_no_rival_of_itself(model, rows):
    row = rows[0]
    keep = make_consistency_filter(*model, row["documents"] * 5, 1, 4)
    assert keep([row]) == [True] and keep([]) == []


def test_only_the_first_document_of_a_row_counts(model, rows):
    sample = [row["documents"][0] for row in rows]
    mined = [row | {"documents": [*row["documents"], rows[0]["documents"][0]]} for row in rows]
    keep = make_consistency_filter(*model, sample, 2)
    assert keep(mined) == keep(rows)
