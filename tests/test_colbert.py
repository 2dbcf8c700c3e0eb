"""The model around the encoder: unit vectors, and micro-batches that change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax.colbert import (
    ColbertConfig,
    DenseConfig,
    init_params,
    make_embed,
    micro_batched,
)
from colbert_jax.maxsim import maxsim_all_pairs
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.sharding import global_batch, make_mesh

ENCODER = ModernBertConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    local_attention=8,
)
CONFIG = ColbertConfig(ENCODER, (DenseConfig(32, 16),))


def tokens(batch: int, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, length + 1, batch)
    mask = np.arange(length) < lengths[:, None]
    return rng.integers(0, 97, (batch, length), dtype=np.int32), mask


def loss_of(embed):
    def loss(params, ids, mask):
        embedded = embed(params, ids, mask)
        half = len(embedded) // 2
        scores = maxsim_all_pairs(embedded[:half], embedded[half:], mask[:half], mask[half:])
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores))

    return loss


def relative_difference(a, b) -> float:
    """|a - b| / |b| over the whole gradient.

    Tensor by tensor, the attention weights alone differ by up to 3e-5: their gradients are small
    differences of large terms, so float32's rounding shows there 50 times larger.
    """
    flat_a, flat_b = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(np.linalg.norm(flat_a - flat_b) / np.linalg.norm(flat_b))


def test_token_embeddings_have_length_one_at_masked_positions_too():
    embedded = make_embed(CONFIG)(init_params(CONFIG, 0), *tokens(5))
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=-1), 1.0, atol=1e-5)


def test_bfloat16_compute_leaves_embeddings_and_parameters_in_float32():
    params = init_params(CONFIG, 0)
    embedded = make_embed(CONFIG, "bfloat16")(params, *tokens(5))
    assert embedded.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("size", [1, 4, 7])
def test_micro_batches_give_the_whole_batch_s_loss_and_gradients(size):
    params, batch = init_params(CONFIG, 0), tokens(24)
    embed = make_embed(CONFIG)
    whole = jax.jit(jax.value_and_grad(loss_of(embed)))(params, *batch)
    cut = jax.jit(jax.value_and_grad(loss_of(micro_batched(embed, size))))(params, *batch)
    assert abs(cut[0] - whole[0]) <= 1e-5 * abs(whole[0])
    assert relative_difference(cut[1], whole[1]) <= 1e-5


def test_micro_batches_of_a_sharded_batch_move_no_text_between_devices():
    embed = micro_batched(make_embed(CONFIG), 1)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        batch = global_batch(tokens(32), mesh)
        program = jax.jit(embed).lower(init_params(CONFIG, 0), *batch).compile()
        embedded = embed(init_params(CONFIG, 0), *batch)
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    alone = make_embed(CONFIG)(init_params(CONFIG, 0), *tokens(32))
    np.testing.assert_allclose(embedded, alone, atol=1e-5)


def test_micro_batches_lower_the_memory_of_the_gradient():
    params, batch = init_params(CONFIG, 0), tokens(64)

    def temporary_bytes(embed) -> int:
        gradient = jax.jit(jax.grad(loss_of(embed)))
        return gradient.lower(params, *batch).compile().memory_analysis().temp_size_in_bytes

    embed = make_embed(CONFIG)
    assert temporary_bytes(micro_batched(embed, 8)) < 0.5 * temporary_bytes(embed)
