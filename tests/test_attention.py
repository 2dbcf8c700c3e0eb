"""Every form of attention gives the numbers of a float64 one, forward and backward."""

import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokamax

from colbert_jax import attention
from colbert_jax.attention import attend
from colbert_jax.sharding import make_mesh

HEADS, SIZE = 2, 64  # of a head, as in every published ModernBERT
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def draw(batch: int, length: int, holes: bool = False) -> Arrays:
    """Queries, keys, values and a mask: the first text whole, the last empty."""
    rng = np.random.default_rng(length)
    shape = (batch, length, HEADS, SIZE)
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    lengths = np.array([length, *rng.integers(1, length + 1, batch - 2), 0])
    mask = np.arange(length) < lengths[:, None]
    if holes:
        mask &= rng.random(mask.shape) < 0.5
    return query, key, value, mask


def by_hand(arrays: Arrays, reach: int | None, weight: np.ndarray) -> tuple[np.ndarray, list]:
    """The result in float64, and the gradients of its product with `weight`."""
    query, key, value = (np.swapaxes(x, 1, 2).astype(np.float64) for x in arrays[:3])
    weight = np.swapaxes(weight, 1, 2).astype(np.float64)
    position = np.arange(query.shape[2])
    near = np.abs(position[:, None] - position) <= (len(position) if reach is None else reach)
    allowed = near & arrays[3][:, None, None, :]
    scale = SIZE**-0.5
    logits = np.where(allowed, query @ np.swapaxes(key, 2, 3) * scale, -np.inf)
    highest = np.where(allowed.any(-1, keepdims=True), logits.max(-1, keepdims=True), 0)
    exponents = np.exp(logits - highest)
    share = exponents / np.maximum(exponents.sum(-1, keepdims=True), 1e-300)
    of_share = weight @ np.swapaxes(value, 2, 3)
    of_logits = share * (of_share - (of_share * share).sum(-1, keepdims=True)) * scale
    gradients = of_logits @ key, np.swapaxes(of_logits, 2, 3) @ query
    gradients = (*gradients, np.swapaxes(share, 2, 3) @ weight)
    return np.swapaxes(share @ value, 1, 2), [np.swapaxes(x, 1, 2) for x in gradients]


def check(function: Any, arrays: Arrays, reach: int | None, dtype: Any, bound: float) -> None:
    """Compares values and gradients with those by hand."""
    weight = np.random.default_rng(1).standard_normal(arrays[0].shape).astype(np.float32)
    value, gradients = by_hand(arrays, reach, weight)

    def run(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        gathered = function(*inputs, arrays[3], reach)
        assert gathered.dtype == dtype
        gathered = gathered.astype(jnp.float32)
        return (gathered * weight).sum(), gathered

    inputs = [jnp.asarray(x, dtype) for x in arrays[:3]]
    (_, ours), of_inputs = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*inputs)
    for ours_, theirs in zip((ours, *of_inputs), (value, *gradients), strict=True):
        spread = max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(np.asarray(ours_, np.float64), theirs, atol=bound * spread)


def of_form(form: Any, *inputs: Any) -> jax.Array:
    """A form as `attend` calls it, whatever backend and length it is for."""
    query, key, value, mask, reach = inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_best_form", lambda *_: form)
        return attend(query, key, value, jnp.asarray(mask), reach)


FORMS = {
    "plain": attention._plain,
    "banded": attention._banded,
    "splash": functools.partial(attention._splash, interpret=True),
}
DTYPES = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reach", [None, 5, 64])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_numbers_of_float64(form: str, reach: int | None, dtype: str) -> None:
    if form == "banded" and reach is None:
        reach = 17
    run = functools.partial(of_form, FORMS[form])
    check(run, draw(3, 187), reach, jnp.dtype(dtype), DTYPES[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_masks_with_holes_and_tiles_that_see_nothing(form: str) -> None:
    run = functools.partial(of_form, FORMS[form])
    check(run, draw(3, 300, holes=True), 9, jnp.dtype("float32"), 1e-5)


@pytest.mark.parametrize("length", [1, 8, 9, 40, 47, 48, 65])
def test_long_texts_are_computed_in_blocks_and_short_ones_whole(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for name in ("_plain", "_banded"):
        real = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *a, real=real, name=name: (used.append(name), real(*a))[1]
        )
    check(attend, draw(3, length), 8, jnp.dtype("float32"), 1e-5)
    assert set(used) == {"_banded" if length >= 48 else "_plain"}


@pytest.mark.parametrize("reach", [None, 64, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpus_get_the_same_numbers_a_few_texts_at_a_time(reach: int | None, dtype: str) -> None:
    """Parts of 2, 1 and 3 texts; windows as a mask and in blocks."""
    for length, batch in ((187, 8), (300, 3), (128, 9)):
        arrays = draw(batch, length)
        check(attend, arrays, reach, jnp.dtype(dtype), DTYPES[dtype])


def test_parts_are_whole_and_as_large_as_their_logits_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    plain = attention._plain

    def noting(query: jax.Array, *rest: Any) -> jax.Array:
        seen.append(len(query))
        return plain(query, *rest)

    monkeypatch.setattr(attention, "_plain", noting)
    for batch in (1, 7, 32, 48):  # of some 20 KiB of logits each
        monkeypatch.setattr(attention, "LOGITS_OF_PART", 9 * HEADS * 130**2)
        query, key, value, mask = draw(max(batch, 2), 130)
        attend(query[:batch], key[:batch], value[:batch], jnp.asarray(mask[:batch]))
    assert seen == [1, 7, 8, 8]


@pytest.mark.parametrize("length", [127, 128])
def test_the_backward_pass_is_handed_no_logits_of_long_texts(length: int) -> None:
    query, key, value, mask = draw(64, length)
    _, back = jax.vjp(lambda *x: attend(*x, jnp.asarray(mask)), query, key, value)
    kept = sum(x.size for x in jax.tree.leaves(back))
    assert (kept < 6 * query.size) == (length >= 128)


def test_blocks_cost_no_more_than_linear_in_the_length() -> None:
    def flops(length: int) -> float:
        x = jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)
        run = jax.jit(lambda q, k, v, m: attend(q, k, v, m, 64))
        return run.lower(x, x, x, mask).compile().cost_analysis()["flops"]

    assert flops(4096) < 4.2 * flops(1024)


def test_a_kernel_runs_on_each_device_with_its_texts_and_heads() -> None:
    arrays = draw(4, 140)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    seen = []

    def form(query: jax.Array, *rest: Any, reach: int | None) -> jax.Array:
        seen.append(query.shape)
        return attention._plain(query, *rest, reach)

    with jax.set_mesh(mesh):
        check(functools.partial(of_form, form), arrays, 30, jnp.dtype("float32"), 1e-5)
    assert seen[-1] == (1, 140, HEADS // 2, SIZE)


def test_tpus_get_the_kernel_for_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    chosen = [attention._best_form(n, jnp.dtype("bfloat16"), 64) for n in (39, 187, 511, 512)]
    assert chosen == [None, None, None, attention._splash]


# GPU: what is handed to the libraries means what we take it for. Their kernels run on GPUs alone;
# the same call is computed here by their XLA forms, and lowered for GPU.


@pytest.mark.parametrize("reach", [None, 30])
@pytest.mark.parametrize("form", ["_tokamax", "_cudnn"])
def test_gpu_libraries_are_asked_for_the_same_numbers(
    form: str, reach: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tokamax if form == "_tokamax" else jax.nn
    real = library.dot_product_attention

    def by_xla(*inputs: Any, implementation: Any, **settings: Any) -> jax.Array:
        if form == "_cudnn":
            assert implementation == "cudnn"
            assert inputs[0].shape[1] % 2 == 0  # with a mask, it differentiates no other
        else:
            assert implementation == ("mosaic", "triton")
        return real(*inputs, implementation="xla", **settings)

    monkeypatch.setattr(library, "dot_product_attention", by_xla)
    run = functools.partial(of_form, getattr(attention, form))
    check(run, draw(3, 101), reach, jnp.dtype("float32"), 1e-5)


def test_gpu_takes_the_best_library_that_is_there_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose = attention._gpu_form.__wrapped__
    caplog.set_level("INFO", "colbert_jax")
    assert choose(True) is attention._tokamax_if_it_can
    assert not caplog.messages
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    assert choose(True) is attention._cudnn
    assert choose(False) is None
    assert ["cuDNN" in message for message in caplog.messages] == [True, True]


def test_a_gpu_that_the_library_has_no_kernel_for_gets_plain_attention(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ExceptionGroup("all implementations failed", [NotImplementedError("sm_70")])

    caplog.set_level("INFO", "colbert_jax")
    monkeypatch.setattr(tokamax, "dot_product_attention", refuse)
    run = functools.partial(of_form, attention._tokamax_if_it_can)
    check(run, draw(3, 100), 30, jnp.dtype("float32"), 1e-5)
    assert "tokamax has no kernel" in caplog.text


# TPU: compiled by libtpu, which is not on this machine's chip but compiles for any.

COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from colbert_jax.ahead import topology_devices
from colbert_jax.attention import attend
from colbert_jax.sharding import make_mesh

mesh = make_mesh(data=2, tensor=2, devices=topology_devices(f"{sys.argv[1]}:2x2"))
for reach, length in ((None, 512), (64, 1000)):
    split = NamedSharding(mesh, P("data", None, "tensor", None))
    x = jax.ShapeDtypeStruct((8, length, 12, 64), jnp.bfloat16, sharding=split)
    mask = NamedSharding(mesh, P("data", None))
    mask = jax.ShapeDtypeStruct((8, length), jnp.bool_, sharding=mask)
    def loss(q, k, v, m):
        return attend(q, k, v, m, reach).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, mask).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    print(text.count("tpu_custom_call"))
"""


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_splash_kernels_compile_for_tpu_split_over_texts_and_heads(chip: str) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, chip],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls = [int(line) for line in done.stdout.split()]
    assert len(calls) == 2 and min(calls) >= 3  # forward, and two kernels backward
