"""MaxSim's kernels for GPU: their numbers, interpreted here, and those of a trial of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec
from test_maxsim_tpu import assert_close, draw, scores_and_gradients

from colbert_jax import forms, maxsim_gpu, trial
from colbert_jax import maxsim as maxsim_module
from colbert_jax.maxsim import maxsim_all_pairs, maxsim_all_pairs_reference, maxsim_global
from colbert_jax.maxsim_gpu import Sizes
from colbert_jax.sharding import AXIS_RULES, global_batch, make_mesh

KERNELS = ("maxsim_scores", "maxsim_into_documents", "maxsim_into_queries")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for GPU."""
    monkeypatch.setattr(maxsim_module, "platform", lambda: "gpu")


@pytest.fixture
def kernels(gpu: None, quick_compilation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, interpreted here."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    product = maxsim_gpu.product

    def without_bfloat16(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
        """The same numbers; XLA for CPU lacks some products of bfloat16 that are float32."""
        return product(x.astype(jnp.float32), y.astype(jnp.float32), contracted)

    monkeypatch.setattr(maxsim_gpu, "product", without_bfloat16)


@pytest.fixture
def tiny_tiles(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 rows; tiles of 16 tokens; programs of 4 documents, winners of a few found again."""
    monkeypatch.setattr(maxsim_gpu, "SIZES", dict.fromkeys((2, 4), Sizes(8, 16, 4, 2)))
    monkeypatch.setattr(maxsim_gpu, "DOCUMENTS", 4)
    monkeypatch.setattr(maxsim_gpu, "PROGRAMS", 12)
    monkeypatch.setattr(maxsim_gpu, "FOUND_WINNERS", 512)


def by_kernels(*inputs: Any, masked: float | None = None, keep: bool | None = None) -> jax.Array:
    """`maxsim_all_pairs` by the kernels."""
    return maxsim_all_pairs(*inputs, masked, keep, kernels=True)


# Queries, documents, tokens of each: queries in parts and documents of several tiles; several
# queries a block and documents of one; more queries than documents.
IN_PARTS, IN_GROUPS, MANY = (5, 10, 11, 37), (3, 9, 3, 5), (19, 3, 4, 20)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(
    ("sizes", "masked", "keep_winners"),
    [
        (IN_PARTS, None, True),
        (IN_PARTS, 0.0, False),
        (IN_GROUPS, None, False),
        (IN_GROUPS, 0.0, True),
        (MANY, None, True),
        (MANY, None, False),
    ],
)
def test_kernels_have_the_numbers_of_the_definition(
    sizes: tuple[int, int, int, int], masked: float | None, keep_winners: bool
) -> None:
    inputs = draw(*sizes)
    run = scores_and_gradients(functools.partial(by_kernels, masked=masked, keep=keep_winners))
    ours = run(*inputs)
    assert_close(ours, scores_and_gradients(maxsim_all_pairs_reference, masked)(*inputs), 1e-5)
    for x, y in zip(ours, run(*inputs), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("tokens", "length"), [(39, 70), (130, 300)])
def test_tiles_as_on_a_chip_in_bfloat16(tokens: int, length: int) -> None:
    """Documents of up to 256 tokens and longer ones, whose winners are of other dtypes."""
    inputs = draw(4, 3, tokens, length, dim=24)
    half = (*(jnp.asarray(x, jnp.bfloat16) for x in inputs[:2]), *inputs[2:])
    rounded = (*(np.asarray(x, np.float32) for x in half[:2]), *inputs[2:])
    ours = scores_and_gradients(by_kernels)(*half)
    expected = scores_and_gradients(maxsim_all_pairs_reference)(*rounded)
    assert_close(ours[:1], expected[:1], 1e-5)  # similarities are not rounded
    assert_close(ours, expected, 2e-2)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("masked", [None, 0.0])
def test_of_tokens_that_tie_the_first_takes_the_whole_gradient(masked: float | None) -> None:
    """Whole numbers tie often, within and across the tiles of a document, and sum exactly."""
    *embeddings, query_mask, document_mask = draw(5, 9, 3, 37)
    queries, documents = (np.sign(np.round(x)) for x in embeddings)
    similarities = np.einsum("qsd,ntd->qnst", queries, documents)
    fill = -np.inf if masked is None else masked
    similarities = np.where(document_mask[:, None], similarities, fill)
    winner = similarities.argmax(axis=-1)  # the first, says NumPy
    counts = query_mask[:, None] & document_mask[np.arange(9)[:, None], winner]
    hot = (winner[..., None] == np.arange(37)) & counts[..., None]
    expected = np.einsum("qnst,ntd->qsd", hot, documents), np.einsum("qnst,qsd->ntd", hot, queries)

    def total(queries: jax.Array, documents: jax.Array) -> jax.Array:
        return by_kernels(queries, documents, query_mask, document_mask, masked=masked).sum()

    ours = jax.jit(jax.grad(total, (0, 1)))(queries, documents)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("tiny_tiles")
def test_what_is_not_a_number_scores_none() -> None:
    queries, documents, *_ = draw(2, 3, 4, 37)
    documents[1, 20] = np.nan
    masks = np.ones((2, 4), bool), np.ones((3, 37), bool)
    scores = jax.jit(by_kernels)(queries, documents, *masks)
    np.testing.assert_array_equal(np.isnan(scores), [[False, True, False]] * 2)


def test_a_gpu_leaves_to_xla_what_kernels_do_not_take_and_what_is_not_asked_of_them(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl, "pallas_call", None)
    inputs = draw(2, 3, 4, 5)
    mixed = (inputs[0], jnp.asarray(inputs[1], jnp.bfloat16), *inputs[2:])
    for given, masked, asked in ((inputs, -0.5, True), (mixed, None, True), (inputs, None, False)):
        score = functools.partial(maxsim_all_pairs, kernels=asked)
        ours = scores_and_gradients(score, masked)(*given)
        expected = scores_and_gradients(maxsim_all_pairs_reference, masked)(*given)
        assert_close(ours, expected, 1e-2 if given is mixed else 1e-5)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_kernels_run_in_a_shard_map_and_are_repeated_over_tensor(exchange: str) -> None:
    axes = AXIS_RULES["batch"]
    split = PartitionSpec(axes)
    over_the_mesh = jax.shard_map(
        lambda *inputs: maxsim_global(*inputs, None, axes, exchange, True),
        in_specs=(split,) * 4,
        out_specs=split,
        axis_names=set(axes),
        check_vma=False,
    )
    inputs = draw(8, 12, 4, 5)
    expected = scores_and_gradients(maxsim_all_pairs_reference)(*inputs)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        ours = scores_and_gradients(over_the_mesh)(*global_batch(inputs, mesh))
    assert_close(ours, expected, 1e-5)


# What goes to XLA for GPUs that are not here.


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_are_lowered_for_gpus_without_scatter_and_without_all_similarities(
    dtype: str,
) -> None:
    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    queries, documents = (64, 39), (1024, 187)
    loss = jax.value_and_grad(lambda *inputs: by_kernels(*inputs).sum(), (0, 1))
    program = jax.jit(loss).trace(
        *(of((*x, 128), dtype) for x in (queries, documents)),
        *(of(x, jnp.bool_) for x in (queries, documents)),
    )
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "triton" in line and "custom_call" in line]
    for kernel in KERNELS:
        assert sum(f"_{kernel}" in line or f'"{kernel}' in line for line in calls) == 1
    assert "scatter" not in str(program.jaxpr)
    assert "stablehlo.scatter" not in text and "atomic" not in text
    largest = max(np.prod(x.aval.shape) for eqn in _equations(program.jaxpr) for x in eqn.outvars)
    assert largest <= 1024 * 192 * 128  # the documents, and not 64 x 39 x 1024 x 187


def _equations(jaxpr: Any) -> list[Any]:
    """Those of a program and of all that it calls."""
    inner = [sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return [*jaxpr.eqns, *(eqn for sub in inner for eqn in _equations(sub))]


# The trial.


@pytest.fixture
def few_texts(tiny_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a trial."""
    monkeypatch.setattr(forms, "MAXSIM_TEXTS", (3, 5))
    monkeypatch.setattr(trial, "CALLS", 1)
    forms._maxsim_both_ways.clear_cache()  # other tests have compiled it for other backends


@pytest.mark.usefixtures("few_texts")
def test_a_trial_finds_the_same_numbers_by_kernels_and_by_xla() -> None:
    runs = forms.maxsim_runs(4, 5, 8, "float32", None)
    best, line = trial.fastest("MaxSim", runs)
    assert best in ("xla", "kernels")
    assert [name in line for name in ("xla", "kernels")] == [True, True]
    assert line.count(" ms") == 2  # a form that fails has no time


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize("wrong", ["scores", "queries", "documents"])
def test_kernels_with_other_scores_or_gradients_fail_their_trial(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steeper(x: jax.Array) -> jax.Array:
        """The same, with a tenth more gradient."""
        return x + 0.1 * (x - jax.lax.stop_gradient(x))

    def score(queries: jax.Array, documents: jax.Array, *others: Any) -> jax.Array:
        if not others[-1]:
            return maxsim_all_pairs(queries, documents, *others)
        queries = steeper(queries) if wrong == "queries" else queries
        documents = steeper(documents) if wrong == "documents" else documents
        scores = maxsim_all_pairs(queries, documents, *others)
        return scores + (0.1 * jax.lax.stop_gradient(scores) if wrong == "scores" else 0.0)

    monkeypatch.setattr(forms, "maxsim_all_pairs", score)
    best, line = trial.fastest("MaxSim", forms.maxsim_runs(4, 5, 8, "float32", None))
    assert best == "xla"
    assert line.endswith("kernels gives other numbers here")


@pytest.mark.usefixtures("gpu", "few_texts")
def test_kernels_that_do_not_compile_fail_their_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they do not, unless they are interpreted."""
    monkeypatch.setattr(
        pl,
        "pallas_call",
        functools.partial(pl.pallas_call.func, interpret=False),  # type: ignore[attr-defined]
    )
    best, line = trial.fastest("MaxSim", forms.maxsim_runs(4, 5, 8, "float32", None))
    assert best == "xla"
    assert "kernels does not run here (ValueError: " in line and "interpret mode" in line
