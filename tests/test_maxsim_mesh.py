"""MaxSim over a mesh: the same numbers, and no communication but what is meant."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from colbert_jax.maxsim import maxsim_all_pairs_reference, maxsim_global
from colbert_jax.sharding import AXIS_RULES, global_batch, make_mesh

EXCHANGES = ["gather", "ring"]
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


def over_the_mesh(exchange: str, masked_similarity: float | None = None):
    """`maxsim_global` from a whole batch to all scores."""
    axes = AXIS_RULES["batch"]
    split = PartitionSpec(axes)

    def score(*batch):
        return maxsim_global(*batch, masked_similarity, axes, exchange)

    return jax.shard_map(
        score, in_specs=(split,) * 4, out_specs=split, axis_names=set(axes), check_vma=False
    )


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("masked_similarity", [None, 0.0])
def test_scores_and_gradients_over_a_mesh_are_those_of_one_device(
    shape, exchange, masked_similarity
):
    batch = inputs()

    def reference(*batch):
        return maxsim_all_pairs_reference(*batch, masked_similarity)

    expected = reference(*batch)
    expected_gradients = jax.grad(loss(reference), argnums=(0, 1))(*batch)
    mesh = make_mesh(*shape)
    score = over_the_mesh(exchange, masked_similarity)
    with jax.set_mesh(mesh):
        placed = global_batch(batch, mesh)
        scores = jax.jit(score)(*placed)
        gradients = jax.jit(jax.grad(loss(score), argnums=(0, 1)))(*placed)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def collectives(program: str) -> list[tuple[str, str, int]]:
    """`(kind, dtype, elements)` of each; sums of scalars for the mean are not counted."""
    found = re.findall(
        r"(\w+)\[([\d,]+)\]\S* (all-gather|reduce-scatter|all-reduce|all-to-all|"
        r"collective-permute)\(",
        program,
    )
    moved = [
        (kind, dtype, int(np.prod([int(n) for n in dims.split(",")])))
        for dtype, dims, kind in found
    ]
    return sorted(entry for entry in moved if entry[2] > 16)


def compiled_gradient(shape: tuple[int, int, int], exchange: str) -> str:
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss(over_the_mesh(exchange)), argnums=(0, 1)))
        return gradient.lower(*global_batch(inputs(), mesh)).compile().as_text()


@pytest.mark.parametrize("shape", MESHES)
def test_documents_are_gathered_once_and_their_gradient_scattered_once(shape):
    moved = collectives(compiled_gradient(shape, "gather"))
    floats = [kind for kind, dtype, _ in moved if dtype == "f32"]
    assert floats == ["all-gather", "reduce-scatter"]
    assert all(kind == "all-gather" for kind, dtype, _ in moved if dtype != "f32")  # the mask


@pytest.mark.parametrize("shape", MESHES)
def test_a_ring_hands_on_one_device_s_documents_at_a_time_and_nothing_else(shape):
    text = compiled_gradient(shape, "ring")
    moved = collectives(text)
    devices = shape[0] * shape[1]
    share = 32 // devices * 11 * 16
    assert {kind for kind, _, _ in moved} == {"collective-permute"}
    assert {size for _, dtype, size in moved if dtype == "f32"} == {share}
    # No device ever holds all documents.
    assert "f32[32,11,16]" not in text and f"f32[{devices},{32 // devices},11,16]" not in text
