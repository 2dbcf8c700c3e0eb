"""MaxSim against PyLate, and against a triple loop in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.client import PyLateReference

from colbert_jax import maxsim as maxsim_module
from colbert_jax.maxsim import (
    maxsim,
    maxsim_all_pairs,
    maxsim_all_pairs_reference,
    maxsim_candidates,
)

# Queries, documents, query tokens, document tokens, width.
SIZES = [(7, 13, 5, 11, 16), (1, 1, 1, 1, 8), (3, 2, 4, 6, 128), (48, 83, 33, 65, 24)]


class Inputs(NamedTuple):
    """Arguments of `maxsim_all_pairs`, in its order."""

    queries: np.ndarray
    documents: np.ndarray
    query_mask: np.ndarray
    document_mask: np.ndarray


def draw(
    queries: int, documents: int, tokens: int, length: int, width: int, seed: int = 0
) -> Inputs:
    """Unit vectors and masks; where there are several, the last query and document are masked."""
    rng = np.random.default_rng(seed)

    def unit(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    query_mask, document_mask = (
        rng.random(s) < 0.7 for s in ((queries, tokens), (documents, length))
    )
    query_mask[0], document_mask[0] = True, True
    query_mask[1:][-1:] = document_mask[1:][-1:] = False
    return Inputs(
        unit(queries, tokens, width), unit(documents, length, width), query_mask, document_mask
    )


def draw_clear_winners(*sizes: int) -> Inputs:
    """Like `draw`, where no other token comes within 1e-6 of a winner.

    Closer than float32 resolves, either token may win, and the gradient goes to that one.
    """
    for seed in range(20):
        inputs = draw(*sizes, seed)
        similarities = np.einsum(
            "qsd,ntd->qsnt", inputs.queries.astype(np.float64), inputs.documents
        )
        similarities = np.where(inputs.document_mask, similarities, -10.0)
        best = np.sort(similarities, axis=-1)[..., -2:]
        if sizes[3] == 1 or np.all((best[..., 1] - best[..., 0] > 1e-6) | (best[..., 1] == -10)):
            return inputs
    raise AssertionError("every draw has two tokens that nearly tie")


def as_candidates(inputs: Inputs) -> Inputs:
    """The same documents for every query, in the layout of `maxsim_candidates`."""
    count = len(inputs.queries)
    repeated = (np.repeat(x[None], count, axis=0) for x in (inputs.documents, inputs.document_mask))
    documents, mask = repeated
    return Inputs(inputs.queries, documents, inputs.query_mask, mask)


def by_hand(
    inputs: Inputs, masked: float | None, cotangent: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, and gradients of their product with `cotangent`, by loops in float64."""
    queries, documents = inputs.queries.astype(np.float64), inputs.documents.astype(np.float64)
    scores = np.zeros((len(queries), len(documents)))
    grads = np.zeros_like(queries), np.zeros_like(documents)
    for q, query in enumerate(queries):
        for d, document in enumerate(documents):
            for s in np.flatnonzero(inputs.query_mask[q]):
                real = inputs.document_mask[d]
                if masked is None and not real.any():
                    continue
                similarities = np.where(
                    real, document @ query[s], -np.inf if masked is None else masked
                )
                winner = similarities.argmax()
                scores[q, d] += similarities[winner]
                if real[winner] and cotangent is not None:
                    grads[0][q, s] += cotangent[q, d] * document[winner]
                    grads[1][d, winner] += cotangent[q, d] * query[s]
    return scores, *grads


# Against PyLate, which multiplies masked similarities by 0.


@pytest.mark.parity
@pytest.mark.parametrize("masks", ["none", "documents", "both"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scores_equal_pylate(
    pylate: PyLateReference, sizes: tuple[int, int, int, int, int], masks: str
) -> None:
    inputs = draw(*sizes)
    if masks == "none":
        inputs = inputs._replace(document_mask=np.ones_like(inputs.document_mask))
    if masks != "both":
        inputs = inputs._replace(query_mask=np.ones_like(inputs.query_mask))
    # Candidates that differ from query to query, so that a mix-up of the two axes would show.
    candidates = as_candidates(inputs)
    scales = np.linspace(0.5, 1, sizes[0], dtype=np.float32)[:, None, None, None]
    candidates = candidates._replace(documents=candidates.documents * scales)
    for name, given_, ours in (
        ("colbert_scores", inputs, maxsim_all_pairs(*inputs, 0.0)),
        ("colbert_scores", inputs, each_pair(inputs, 0.0)),
        ("colbert_kd_scores", candidates, maxsim_candidates(*candidates, 0.0)),
    ):
        theirs = pylate.call(
            name,
            queries=given_.queries,
            documents=given_.documents,
            queries_mask=given_.query_mask.astype(np.float32) if masks == "both" else None,
            documents_mask=given_.document_mask.astype(np.float32) if masks != "none" else None,
        )
        assert ours.dtype == jnp.float32
        print(f"largest difference from {name}: {np.abs(ours - theirs).max():.1e}")
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


# Against loops in float64.


@pytest.mark.parametrize("masked", [None, 0.0])
@pytest.mark.parametrize("sign", [1, -1], ids=["any", "all_negative"])
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_scores_equal_loops(
    sizes: tuple[int, int, int, int, int], sign: int, masked: float | None
) -> None:
    inputs = draw(*sizes)
    if sign < 0:  # every similarity is below 0, where masking by 0 and by -inf differ most
        inputs = inputs._replace(
            queries=np.abs(inputs.queries), documents=-np.abs(inputs.documents)
        )
    expected, _, _ = by_hand(inputs, masked)
    for ours in (
        maxsim_all_pairs(*inputs, masked),
        each_pair(inputs, masked),
        maxsim_candidates(*as_candidates(inputs), masked),
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    if len(expected) > 1:
        assert not expected[-1].any() and not expected[:, -1].any()  # nothing there scores


@settings(max_examples=12, deadline=None)
@given(
    queries=st.integers(1, 4),
    documents=st.integers(1, 5),
    tokens=st.integers(1, 4),
    length=st.integers(1, 6),
    masked=st.sampled_from([None, 0.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_loops(
    queries: int, documents: int, tokens: int, length: int, masked: float | None, seed: int
) -> None:
    inputs = draw(queries, documents, tokens, length, 4, seed)
    cotangent = np.random.default_rng(seed).standard_normal((queries, documents))
    expected = by_hand(inputs, masked, cotangent)
    ours = scores_and_gradients(inputs, masked, cotangent)
    for ours_, expected_ in zip(ours, expected, strict=True):
        np.testing.assert_allclose(ours_, expected_, atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [None, 0.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_equal_loops(sizes: tuple[int, int, int, int, int], masked: float | None) -> None:
    inputs = draw_clear_winners(*sizes)
    cotangent = np.random.default_rng(1).standard_normal(sizes[:2])
    for name, ours, expected in zip(
        ("scores", "queries", "documents"),
        scores_and_gradients(inputs, masked, cotangent),
        by_hand(inputs, masked, cotangent),
        strict=True,
    ):
        difference = np.abs(ours - expected).max() / max(np.abs(expected).max(), 1)
        print(f"largest relative difference of {name}: {difference:.1e}")
        assert difference <= 1e-5


@pytest.mark.parametrize("masked", [None, 0.0])
def test_all_pairs_and_candidates_have_the_same_gradients(masked: float | None) -> None:
    inputs = draw(*SIZES[0])
    cotangent = np.random.default_rng(1).standard_normal(SIZES[0][:2])
    candidates = as_candidates(inputs)

    def product(queries: jax.Array, documents: jax.Array) -> jax.Array:
        scores = maxsim_candidates(queries, documents, *candidates[2:], masked)
        return (scores * cotangent).sum()

    queries, documents = jax.grad(product, (0, 1))(*candidates[:2])
    _, *expected = scores_and_gradients(inputs, masked, cotangent)
    np.testing.assert_allclose(queries, expected[0], atol=1e-5)
    np.testing.assert_allclose(documents.sum(axis=0), expected[1], atol=1e-5)


@pytest.mark.parametrize("masked", [None, 0.0])
def test_gradient_equals_finite_difference(masked: float | None) -> None:
    inputs = draw(*SIZES[0])
    cotangent = np.random.default_rng(1).standard_normal(SIZES[0][:2])
    rng = np.random.default_rng(2)
    _, *gradients = scores_and_gradients(inputs, masked, cotangent)
    for name, gradient in zip(("queries", "documents"), gradients, strict=True):
        x = getattr(inputs, name).astype(np.float64)
        step = 1e-6 * rng.standard_normal(x.shape)  # too small for another token to win
        ends = [
            (by_hand(inputs._replace(**{name: x + way * step}), masked)[0] * cotangent).sum()
            for way in (1, -1)
        ]
        assert (ends[0] - ends[1]) / 2 == pytest.approx((gradient * step).sum(), rel=1e-4)


@pytest.mark.parametrize("masked", [None, 0.0])
def test_nothing_to_score_gives_no_nan_and_no_gradient(masked: float | None) -> None:
    inputs = draw(*SIZES[0])
    inputs = inputs._replace(document_mask=np.zeros_like(inputs.document_mask))
    ours = scores_and_gradients(inputs, masked, np.ones(SIZES[0][:2]))
    for array in ours:
        np.testing.assert_array_equal(array, np.zeros_like(array))
    candidates = as_candidates(inputs)
    gradients = jax.grad(lambda *x: maxsim_candidates(*x, *candidates[2:], masked).sum(), (0, 1))
    for array in gradients(*candidates[:2]):
        np.testing.assert_array_equal(array, np.zeros_like(array))


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    inputs = draw(5, 6, 32, 20, 256)
    half = inputs._replace(
        queries=jnp.asarray(inputs.queries, jnp.bfloat16),
        documents=jnp.asarray(inputs.documents, jnp.bfloat16),
    )
    exact = inputs._replace(
        queries=np.asarray(half.queries, np.float32),
        documents=np.asarray(half.documents, np.float32),
    )
    expected, _, _ = by_hand(exact, None)
    for ours in (
        maxsim_all_pairs(*half),
        each_pair(half, None),
        maxsim_candidates(*as_candidates(half)),
    ):
        assert ours.dtype == jnp.float32
        # One rounding of a similarity to bfloat16 would cost a hundred times this.
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    gradients = jax.grad(lambda *x: maxsim_all_pairs(*x, *half[2:]).sum(), (0, 1))(*half[:2])
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)
    summed = by_hand(exact, None, np.ones((5, 6)))[1:]
    for ours, expected in zip(gradients, summed, strict=True):
        difference = np.abs(np.asarray(ours, np.float32) - expected).max() / np.abs(expected).max()
        assert difference <= 2**-8  # the result's own rounding, not that of its terms


def each_pair(inputs: Inputs, masked: float | None) -> np.ndarray:
    """`maxsim` of one pair at a time."""
    score = jax.jit(maxsim, static_argnums=4)
    rows = zip(inputs.queries, inputs.query_mask, strict=True)
    return np.array(
        [
            [
                score(query, document, query_mask, document_mask, masked)
                for document, document_mask in zip(
                    inputs.documents, inputs.document_mask, strict=True
                )
            ]
            for query, query_mask in rows
        ]
    )


def scores_and_gradients(
    inputs: Inputs, masked: float | None, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`maxsim_all_pairs` and the gradients of its product with `cotangent`."""

    def product(queries: jax.Array, documents: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = maxsim_all_pairs(queries, documents, *inputs[2:], masked)
        return (scores * cotangent).sum(), scores

    gradients, scores = jax.grad(product, (0, 1), has_aux=True)(*inputs[:2])
    return tuple(np.asarray(x) for x in (scores, *gradients))


def test_of_tokens_that_tie_the_first_takes_the_whole_gradient():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 3, 4)).astype(np.float32)
    documents = rng.normal(size=(2, 5, 4)).astype(np.float32)
    documents[0, 3] = documents[0, 1]
    documents[0, [0, 2, 4]] = 0.0
    queries = np.abs(queries) * np.sign(documents[0, 1])  # token 1, and its double 3, always win
    masks = np.ones((2, 3), bool), np.ones((2, 5), bool)
    for keep_winners in (True, False):

        def of_first(documents, keep=keep_winners):
            return maxsim_all_pairs(queries, documents, *masks, None, keep)[:, 0].sum()

        into = jax.grad(of_first)(documents)
        np.testing.assert_allclose(into[0, 1], queries.sum(axis=(0, 1)), rtol=1e-6)
        assert not np.any(into[0, [0, 2, 3, 4]])


@pytest.mark.parametrize("masked", [None, 0.0])
@pytest.mark.parametrize("keep_winners", [True, False])
def test_what_gpus_run_has_the_numbers_of_the_definition(
    masked: float | None, keep_winners: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Argmax, one-hot products and square tiles, which this machine would not choose."""
    monkeypatch.setattr(maxsim_module, "platform", lambda: "gpu")
    monkeypatch.setitem(maxsim_module.TILE_SIMILARITIES, "gpu", 300)  # tiles of 2 x 3 of 5 x 7
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(5, 6, 8)), rng.normal(size=(7, 8, 8))
    queries, documents = (x.astype(np.float32) for x in embeddings)
    masks = rng.random((5, 6)) < 0.8, rng.random((7, 8)) < 0.7
    weights = rng.normal(size=(5, 7)).astype(np.float32)

    def gradients(score, *settings):
        def weighted(queries, documents):
            scores = score(queries, documents, *masks, masked, *settings)
            return (scores * weights).sum(), scores

        return jax.value_and_grad(weighted, (0, 1), has_aux=True)(queries, documents)

    ours = gradients(maxsim_all_pairs, keep_winners)
    expected = gradients(maxsim_all_pairs_reference)
    for x, y in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
