"""Schedule, clipping and the gradient's scale are those that the config names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from colbert_jax.errors import UserError
from colbert_jax.optimizer import build_optimizer

PLAIN: dict[str, Any] = {
    "learning_rate": 0.25,
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "gradient_of": "mean",
}
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}
GRADS = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # of norm 5
# With betas of 0 and a huge epsilon, AdamW divides by a constant: -update * EPS / rate is the
# gradient that reached it.
EPS = 2.0**40
TELLTALE = {"b1": 0.0, "b2": 0.0, "eps": EPS, "learning_rate": 1.0}


def build(total_steps: int = 100, batch_size: int = 1, **changes: Any) -> Any:
    return build_optimizer(PLAIN | changes, total_steps=total_steps, batch_size=batch_size)


def gradient_at_adam(**changes: Any) -> dict[str, np.ndarray]:
    """The gradient as it leaves the scaling and the clipping."""
    optimizer, _ = build(total_steps=10**9, **TELLTALE, **changes)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return jax.tree.map(lambda x: np.asarray(-x * EPS), updates)


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, Any], rtol: float = 1e-6) -> None:
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, err_msg=name)


# --- schedule ---


def test_without_warmup_the_rate_falls_in_a_line_from_peak_to_zero() -> None:
    _, schedule = build(total_steps=100)
    rates = [float(schedule(step)) for step in range(101)]
    np.testing.assert_allclose(rates, 0.25 * (1 - np.arange(101) / 100), atol=1e-8)
    assert rates[0] == 0.25 and rates[100] == 0.0 and float(schedule(150)) == 0.0


def test_warmup_rises_in_a_line_from_zero_to_peak_then_falls_to_zero() -> None:
    _, schedule = build(total_steps=100, warmup_steps=20)
    rates = [float(schedule(step)) for step in range(101)]
    rising, falling = np.arange(20) / 20, 1 - np.arange(81) / 80
    np.testing.assert_allclose(rates, 0.25 * np.concatenate([rising, falling]), atol=1e-8)
    assert rates[20] == 0.25 and rates[100] == 0.0


def test_the_optimizer_follows_the_schedule() -> None:
    optimizer, schedule = build(total_steps=4, b1=0.0, b2=0.0)
    state = optimizer.init(PARAMS)
    for step in range(5):
        updates, state = optimizer.update(GRADS, state, PARAMS)
        # Without memory, Adam's step is the sign of the gradient times the rate.
        np.testing.assert_allclose(
            np.asarray(updates["a"]), [-float(schedule(step)), 0.0], rtol=1e-6
        )


# --- AdamW ---


def test_adamw_gets_its_settings() -> None:
    settings = {"b1": 0.7, "b2": 0.8, "eps": 1e-3, "weight_decay": 0.1}
    optimizer, _ = build(total_steps=10**9, **settings)
    expected = optax.adamw(0.25, **settings)
    params, state, theirs = PARAMS, optimizer.init(PARAMS), expected.init(PARAMS)
    for factor in (1.0, -0.5, 2.0):
        grads = jax.tree.map(lambda g, f=factor: g * f, GRADS)
        ours, state = optimizer.update(grads, state, params)
        wanted, theirs = expected.update(grads, theirs, params)
        assert_equal(ours, wanted)
        params = optax.apply_updates(params, ours)


# --- clipping ---


def test_the_global_norm_is_clipped() -> None:
    clipped = gradient_at_adam(clip_norm=1.0)
    assert_equal(clipped, {"a": [0.6, 0.0], "b": [[0.8]]})


@pytest.mark.parametrize("clip_norm", [0.0, 5.5, 1e9])
def test_a_short_gradient_or_no_limit_clips_nothing(clip_norm: float) -> None:
    assert_equal(gradient_at_adam(clip_norm=clip_norm), GRADS)


# --- the gradient of the mean, or of the sum ---


@pytest.mark.parametrize("clip_norm", [0.0, 1e9])
def test_gradient_of_sum_is_the_means_times_the_batch(clip_norm: float) -> None:
    found = gradient_at_adam(gradient_of="sum", batch_size=16, clip_norm=clip_norm)
    assert_equal(found, jax.tree.map(lambda g: 16 * g, GRADS), rtol=0)


def test_the_sum_is_clipped_after_it_is_scaled() -> None:
    # The mean's norm of 5 is within the limit, the sum's of 80 is not.
    found = gradient_at_adam(gradient_of="sum", batch_size=16, clip_norm=8.0)
    assert_equal(found, jax.tree.map(lambda g: g * 8 / 5, GRADS))
    assert_equal(gradient_at_adam(gradient_of="mean", batch_size=16, clip_norm=8.0), GRADS)


@pytest.mark.parametrize("value", ["Sum", "", None, 1])
def test_another_gradient_is_the_users_error(value: Any) -> None:
    with pytest.raises(UserError, match=r"gradient_of is .*: choose 'mean' or 'sum'"):
        build(gradient_of=value)
