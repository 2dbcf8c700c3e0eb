"""MaxSim over a mesh: the same numbers, and no communication but what is meant."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax.maxsim import maxsim_all_pairs_reference, maxsim_global
from colbert_jax.sharding import global_batch, make_mesh

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]


def inputs(queries: int = 16, documents: int = 32):
    rng = np.random.default_rng(0)
    embedded = [
        rng.standard_normal((n, tokens, 16)).astype(np.float32)
        for n, tokens in ((queries, 5), (documents, 11))
    ]
    embedded = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in embedded]
    masks = [rng.random(x.shape[:2]) < 0.7 for x in embedded]
    masks[1][3] = False  # a document without any scoring token
    return (*embedded, *masks)


def loss(score):
    def of(query, document, query_mask, document_mask):
        scores = score(query, document, query_mask, document_mask)
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - scores[:, 0])

    return of


@pytest.mark.parametrize("shape", MESHES)
def test_scores_and_gradients_over_a_mesh_are_those_of_one_device(shape):
    batch = inputs()
    expected = maxsim_all_pairs_reference(*batch)
    expected_gradients = jax.grad(loss(maxsim_all_pairs_reference), argnums=(0, 1))(*batch)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = global_batch(batch, mesh)
        scores = jax.jit(maxsim_global)(*placed)
        gradients = jax.jit(jax.grad(loss(maxsim_global), argnums=(0, 1)))(*placed)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_a_batch_that_the_mesh_does_not_divide_is_scored_all_the_same():
    batch = inputs(queries=5, documents=13)
    with jax.set_mesh(make_mesh(8, 1, 1)):
        scores = jax.jit(maxsim_global)(*batch)
    np.testing.assert_allclose(scores, maxsim_all_pairs_reference(*batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", MESHES)
def test_documents_are_gathered_once_and_their_gradient_scattered_once(shape):
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = global_batch(inputs(), mesh)
        gradient = jax.jit(jax.grad(loss(maxsim_global), argnums=(0, 1)))
        text = gradient.lower(*placed).compile().as_text()
    # Operands with more than one axis; sums of scalars for the mean are not what is counted.
    moved = re.findall(
        r"= (\w+)\[(\d+(?:,\d+)+)\]\S* (all-gather|reduce-scatter|all-reduce|all-to-all|"
        r"collective-permute)\(",
        text,
    )
    floats = sorted(kind for dtype, _, kind in moved if dtype == "f32")
    assert floats == ["all-gather", "reduce-scatter"]
    assert all(kind == "all-gather" for dtype, _, kind in moved if dtype != "f32")  # the mask
