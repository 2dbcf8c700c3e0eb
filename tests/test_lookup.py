"""The gradient of looking up rows is the sum over equal ids, with no colliding writes on GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax import lookup
from colbert_jax.lookup import add_rows, look_up


@pytest.mark.parametrize("ids", [[3], [5, 5, 5, 5], [0, 6, 2, 6, 0, 0, 3], list(range(7)) * 30])
def test_sorted_sums_are_those_of_float64(ids: list[int]) -> None:
    rows = np.random.default_rng(0).standard_normal((len(ids), 5)).astype(np.float32)
    expected = np.zeros((7, 5))
    np.add.at(expected, ids, rows.astype(np.float64))
    found = jax.jit(add_rows, static_argnums=0)(7, jnp.array(ids), rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["cpu", "gpu", "tpu"])
def test_gradient_of_every_backend_is_that_of_take(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "platform", lambda: kind)
    rng = np.random.default_rng(0)
    table, ids = rng.standard_normal((11, 4)).astype(np.float32), rng.integers(0, 11, (6, 9))
    weight = rng.standard_normal((6, 9, 4)).astype(np.float32)
    ours = jax.grad(lambda table: (look_up(table, ids) * weight).sum())
    theirs = jax.grad(lambda table: (jnp.take(table, ids, axis=0) * weight).sum())
    np.testing.assert_allclose(ours(table), theirs(table), atol=1e-5)
    np.testing.assert_array_equal(look_up(table, ids), table[ids])
    assert ("scatter-add" in str(jax.make_jaxpr(ours)(table))) == (kind != "gpu")
