"""The encoder gives Transformers' numbers, for every setting that published ModernBERTs use."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from colbert_jax import modernbert
from colbert_jax.colbert import ColbertConfig, DenseConfig, init_params, param_axes
from colbert_jax.huggingface import encoder_json, parse_encoder_config, set_path, weight_table
from colbert_jax.modernbert import ModernBert, ModernBertConfig, nnx

TOLERANCE = 1e-4
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
BASE = {"vocab_size": 211}  # all else as in ModernBERT-base


def random_state(config: ModernBertConfig) -> dict[str, np.ndarray]:
    """Every tensor by its name in a file, norms drawn too, so that each shows."""
    rng = np.random.default_rng(0)
    state = {}
    for weight in weight_table(config):
        noise = rng.standard_normal(weight.shape, np.float32)
        norm = noise.ndim == 1
        state[weight.name] = 1 + 0.2 * noise if norm else noise / noise.shape[1] ** 0.5
    return state


def torch_model(config: ModernBertConfig, attention: str) -> transformers.ModernBertModel:
    fields = encoder_json(config, cls=1, sep=2, pad=0)
    model, info = transformers.ModernBertModel.from_pretrained(
        None,
        config=transformers.ModernBertConfig.from_dict(fields),
        state_dict={k: torch.from_numpy(v) for k, v in random_state(config).items()},
        attn_implementation=attention,
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def our_params(config: ModernBertConfig) -> dict[str, Any]:
    state = random_state(config)
    params: dict[str, Any] = {}
    for weight in weight_table(config):
        set_path(params, weight.path, weight.to_ours(state[weight.name]))
    return params["encoder"]


def encode(
    config: ModernBertConfig,
    params: dict[str, Any],
    ids: np.ndarray,
    mask: np.ndarray,
    dtype: Any = jnp.float32,
) -> np.ndarray:
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ModernBert(config, rngs=nnx.Rngs(0))))
    run = jax.jit(lambda p, i, m: nnx.merge(graphdef, p)(i, m, dtype))
    return np.asarray(run(params, ids, mask).astype(jnp.float32))


def tokens(config: ModernBertConfig, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return rng.integers(0, config.vocab_size, mask.shape, np.int32), mask


def check_equal(config: ModernBertConfig, ids: np.ndarray, mask: np.ndarray) -> None:
    """Compares the last hidden state with that of both attention paths.

    Eager attention only at attended positions: in a local layer those further from the text than
    the window have nothing to look at, where SDPA (and ours) gives 0 and eager attention the mean
    of all values. Nothing attended to ever looks at them, but unattended expansion tokens score.
    """
    ours = encode(config, our_params(config), ids, mask)
    assert np.isfinite(ours).all()
    for attention, where in (("sdpa", np.ones_like(mask)), ("eager", mask)):
        with torch.no_grad():
            theirs = torch_model(config, attention)(
                input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
            ).last_hidden_state.numpy()
        assert theirs[where].std() > 0.5
        difference = np.abs(ours - theirs)[where].max()
        print(f"largest difference from {attention}: {difference:.1e}")
        assert difference <= TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"global_attn_every_n_layers": 1},
        {"global_attn_every_n_layers": 2},
        {"local_attention": 8},
        {"global_rope_theta": 500.0, "local_rope_theta": 160_000.0, "norm_eps": 1e-2},
        {"num_attention_heads": 2, "intermediate_size": 40},
    ],
    ids=["default", "all_global", "every_second", "narrow_window", "constants", "shapes"],
)
def test_small_encoder_equals_transformers(settings: dict[str, Any]) -> None:
    config = ModernBertConfig(**(SMALL | settings))
    ids, mask = tokens(config, [330, 17, 1, 200])
    check_equal(config, ids, mask)


@pytest.mark.parity
def test_mask_with_holes_equals_transformers() -> None:
    config = ModernBertConfig(**SMALL)
    ids, mask = tokens(config, [150, 150])
    mask &= np.random.default_rng(1).random(mask.shape) < 0.6
    check_equal(config, ids, mask)


@pytest.mark.parity
def test_base_encoder_equals_transformers() -> None:
    config = ModernBertConfig(**BASE)
    assert (config.num_hidden_layers, config.hidden_size) == (22, 768)
    ids, mask = tokens(config, [304, 60])
    check_equal(config, ids, mask)


@pytest.mark.parity
def test_weight_table_names_every_tensor_of_the_base_model() -> None:
    config = ModernBertConfig()
    table = weight_table(config)
    with torch.device("meta"):
        model = transformers.ModernBertModel(
            transformers.ModernBertConfig.from_dict(encoder_json(config, cls=1, sep=2, pad=0))
        )
    assert len(table) == 134
    assert {w.name: w.shape for w in table} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


@pytest.mark.parity
def test_defaults_are_those_of_transformers() -> None:
    assert (
        parse_encoder_config(transformers.ModernBertConfig().to_dict(), "it") == ModernBertConfig()
    )


def test_axes_have_the_structure_of_the_parameters() -> None:
    config = ColbertConfig(
        ModernBertConfig(**SMALL),
        (DenseConfig(64, 48, use_bias=True, use_residual=True), DenseConfig(48, 32)),
    )
    params = init_params(config, 0)
    axes = param_axes(config)
    jax.tree.map(lambda x, names: None, params, axes)  # raises where the structures differ
    flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for x, names in zip(jax.tree.leaves(params), flat, strict=True):
        assert len(names) == x.ndim


def test_fresh_weights_have_the_spread_of_the_config() -> None:
    config = ModernBertConfig(**(SMALL | {"vocab_size": 3000}))
    params = init_params(ColbertConfig(config, (DenseConfig(64, 128),)), 0)["encoder"]
    layer = params["layers"][1]
    # A normal cut at two standard deviations keeps 0.88 of its spread.
    for values, std in (
        (params["tok_embeddings"], 0.02),
        (layer["attn"]["qkv"], 0.02),
        (layer["mlp"]["wi"], 0.02),
        (layer["attn"]["out"], 0.02 / 8**0.5),
        (layer["mlp"]["wo"], 0.02 / 8**0.5),
    ):
        np.testing.assert_allclose(np.std(values), 0.88 * std, rtol=0.05)
        assert np.abs(values).max() <= 2 * std


def test_bfloat16_stays_near_float32() -> None:
    config = ModernBertConfig(**SMALL)
    params = our_params(config)
    ids, mask = tokens(config, [140, 30])
    full, half = (encode(config, params, ids, mask, d)[mask] for d in (jnp.float32, jnp.bfloat16))
    cosine = (full * half).sum(-1) / np.linalg.norm(full, axis=-1) / np.linalg.norm(half, axis=-1)
    assert cosine.min() > 0.99
    assert not np.array_equal(full, half)


def test_a_product_with_signs_turns_heads_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 64))
    for dtype in (jnp.float32, jnp.bfloat16):
        heads, angles = x.astype(dtype), modernbert.rotary_angles(9, 64, 1e4)
        expected = modernbert.rotate(heads, *angles)
        with monkeypatch.context() as patch:
            patch.setattr(modernbert, "platform", lambda: "tpu")
            np.testing.assert_array_equal(modernbert.rotate(heads, *angles), expected)


def test_gelu_is_the_exact_one_in_float32() -> None:
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(np.float64)]
    np.testing.assert_allclose(modernbert.gelu(jnp.asarray(x)), exact, atol=2e-6)


def test_layer_norm_with_a_large_mean_is_that_of_float64() -> None:
    x = np.random.default_rng(0).standard_normal((5, 256)) + np.array([[0], [1], [10], [-30], [3]])
    norm = modernbert.LayerNorm(256, 1e-5)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-3)


def test_fully_masked_rows_give_no_nan_gradient() -> None:
    config = ModernBertConfig(**SMALL)
    graphdef, state = nnx.split(ModernBert(config, rngs=nnx.Rngs(0)))
    ids, mask = tokens(config, [150, 3, 150])
    mask[2] = False

    def loss(params: Any) -> jax.Array:
        hidden = nnx.merge(graphdef, params)(ids, mask)
        return (jnp.where(mask[..., None], hidden, 0.0) ** 3).sum() + 1e-3 * (hidden**3).sum()

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(state))
    assert all(np.isfinite(g).all() for g in gradients)
    assert all(np.any(g) for g in gradients)
