"""The model around the encoder: unit vectors, and a loop over layers that changes nothing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax import modernbert
from colbert_jax.colbert import (
    ColbertConfig,
    DenseConfig,
    init_params,
    make_embed,
    scanned_params,
)
from colbert_jax.modernbert import ModernBertConfig

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


def test_token_embeddings_have_length_one_at_masked_positions_too():
    embedded = make_embed(CONFIG)(init_params(CONFIG, 0), *tokens(5))
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=-1), 1.0, atol=1e-5)


def test_bfloat16_compute_leaves_embeddings_and_parameters_in_float32():
    params = init_params(CONFIG, 0)
    embedded = make_embed(CONFIG, "bfloat16")(params, *tokens(5))
    assert embedded.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize(("layers", "every"), [(7, 3), (9, 3), (3, 1), (2, 3), (1, 3), (5, 2)])
def test_a_loop_over_layers_gives_the_numbers_of_layers_one_by_one(layers, every):
    encoder = dataclasses.replace(
        ENCODER, num_hidden_layers=layers, global_attn_every_n_layers=every
    )
    config = dataclasses.replace(CONFIG, encoder=encoder)
    params = init_params(config, 0)
    scanned = make_embed(config, scan_layers=True)
    weights = jax.random.normal(jax.random.key(1), (5, 12, 16))

    def loss(embed, arrange):
        return lambda params: (embed(arrange(params), *tokens(5)) * weights).sum()

    one_by_one = jax.value_and_grad(loss(make_embed(config), lambda p: p))(params)
    looped = jax.value_and_grad(loss(scanned, lambda p: scanned_params(config, p)))(params)
    assert abs(looped[0] - one_by_one[0]) <= 1e-5 * abs(one_by_one[0])
    for ours, theirs in zip(*map(jax.tree.leaves, (looped[1], one_by_one[1])), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_a_loop_over_layers_makes_a_smaller_program():
    encoder = dataclasses.replace(ENCODER, num_hidden_layers=22)
    config = dataclasses.replace(CONFIG, encoder=encoder)
    params = init_params(config, 0)
    looped = make_embed(config, scan_layers=True)
    sizes = [
        len(jax.jit(embed).lower(p, *tokens(5)).compile().as_text() or "")
        for embed, p in (
            (make_embed(config), params),
            (looped, scanned_params(config, params)),
        )
    ]
    assert 0 < sizes[1] < 0.4 * sizes[0]


def test_layers_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A global and a local layer, and layer 0, which has no norm: not each of 22, nor once more."""
    traced: list[int | None] = []
    attend = modernbert.attend

    def counted(query: Any, key: Any, value: Any, mask: Any, reach: int | None, kind: str) -> Any:
        traced.append(reach)
        return attend(query, key, value, mask, reach, kind)

    monkeypatch.setattr(modernbert, "attend", counted)
    encoder = dataclasses.replace(ENCODER, num_hidden_layers=22, norm_eps=1.5e-5)  # not traced yet
    embed = make_embed(dataclasses.replace(CONFIG, encoder=encoder))
    params = init_params(dataclasses.replace(CONFIG, encoder=encoder), 0)

    def loss(params: Any) -> jax.Array:
        return embed(params, *tokens(5)).sum()

    jax.jit(loss).lower(params)
    jax.jit(jax.grad(loss)).lower(params)
    assert sorted(traced, key=str) == [encoder.local_attention // 2, None, None]
