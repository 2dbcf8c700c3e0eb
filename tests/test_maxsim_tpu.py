"""MaxSim's kernels for TPU: their numbers, interpreted here, and what XLA for TPU makes of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from colbert_jax import maxsim as maxsim_module
from colbert_jax import maxsim_tpu
from colbert_jax.ahead import topology_devices
from colbert_jax.maxsim import maxsim_all_pairs, maxsim_all_pairs_reference, maxsim_global
from colbert_jax.sharding import AXIS_RULES, global_batch, make_mesh


@pytest.fixture
def kernels(quick_compilation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for TPU, interpreted here."""
    monkeypatch.setattr(maxsim_module, "platform", lambda: "tpu")
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    product = maxsim_tpu.product

    def without_bfloat16(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
        """The same numbers; XLA for CPU lacks some products of bfloat16 that are float32."""
        return product(x.astype(jnp.float32), y.astype(jnp.float32), contracted)

    monkeypatch.setattr(maxsim_tpu, "product", without_bfloat16)


@pytest.fixture
def tiny_tiles(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 lanes; blocks of 16 documents and 16 of their tokens; winners of one block found again."""
    sizes = {"LANES": 8, "DOCUMENTS": 16, "TOKENS": 2, "ROWS": 128, "FOUND_WINNERS": 1}
    sizes |= {"DOCUMENT_BYTES": 16 * 8 * 4, "LANE_BYTES": 4 * 8 * 4}
    for name, size in sizes.items():
        monkeypatch.setattr(maxsim_tpu, name, size)


def draw(queries: int, documents: int, tokens: int, length: int, dim: int = 8) -> tuple:
    """Arguments of `maxsim_all_pairs`.

    In the first document the first tokens are masked, in the last and the last query all.
    """
    rng = np.random.default_rng(0)
    embeddings = (
        rng.standard_normal((queries, tokens, dim)),
        rng.standard_normal((documents, length, dim)),
    )
    masks = rng.random((queries, tokens)) < 0.8, rng.random((documents, length)) < 0.7
    masks[0][-1:] = masks[1][-1:] = False
    masks[1][0] = np.arange(length) > length // 2
    return *(x.astype(np.float32) for x in embeddings), *masks


def scores_and_gradients(score: Callable, *settings: Any) -> Callable[..., list[np.ndarray]]:
    """Makes the function to scores, and the gradients of their product with fixed weights."""

    @jax.jit
    def run(queries: jax.Array, documents: jax.Array, *masks: jax.Array) -> tuple:
        scores, back = jax.vjp(lambda *x: score(*x, *masks, *settings), queries, documents)
        weights = np.random.default_rng(1).standard_normal(scores.shape)
        return scores, *back(jnp.asarray(weights, jnp.float32))

    return lambda *inputs: [np.asarray(x, np.float32) for x in run(*inputs)]


def assert_close(ours: list[np.ndarray], expected: list[np.ndarray], relative: float) -> None:
    for x, y in zip(ours, expected, strict=True):
        assert np.abs(x - y).max() <= relative * max(np.abs(y).max(), 1)


# Queries, documents, tokens of each: in parts of a query and of a document; in several tiles.
IN_PARTS, IN_TILES = (5, 19, 7, 37), (19, 3, 4, 5)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(
    ("sizes", "masked", "keep_winners"),
    [
        (IN_PARTS, None, True),
        (IN_PARTS, 0.0, False),
        (IN_TILES, None, False),
        (IN_TILES, 0.0, True),
    ],
)
def test_kernels_have_the_numbers_of_the_definition(
    sizes: tuple[int, int, int, int], masked: float | None, keep_winners: bool
) -> None:
    inputs = draw(*sizes)
    run = scores_and_gradients(maxsim_all_pairs, masked, keep_winners)
    ours = run(*inputs)
    assert_close(ours, scores_and_gradients(maxsim_all_pairs_reference, masked)(*inputs), 1e-5)
    for x, y in zip(ours, run(*inputs), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("queries", [3, 130])
def test_tiles_as_on_a_chip_hold_few_and_many_queries_in_bfloat16(queries: int) -> None:
    inputs = draw(queries, 3, 2, 5)
    half = (*(jnp.asarray(x, jnp.bfloat16) for x in inputs[:2]), *inputs[2:])
    rounded = (*(np.asarray(x, np.float32) for x in half[:2]), *inputs[2:])
    ours = scores_and_gradients(maxsim_all_pairs)(*half)
    expected = scores_and_gradients(maxsim_all_pairs_reference)(*rounded)
    assert_close(ours[:1], expected[:1], 1e-5)  # similarities are not rounded
    assert_close(ours, expected, 2e-2)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("masked", [None, 0.0])
def test_of_tokens_that_tie_the_first_takes_the_whole_gradient(masked: float | None) -> None:
    """Whole numbers tie often, within and across the parts of a document, and sum exactly."""
    *embeddings, query_mask, document_mask = draw(5, 19, 3, 37)
    queries, documents = (np.sign(np.round(x)) for x in embeddings)
    similarities = np.einsum("qsd,ntd->qnst", queries, documents)
    fill = -np.inf if masked is None else masked
    similarities = np.where(document_mask[:, None], similarities, fill)
    winner = similarities.argmax(axis=-1)  # the first, says NumPy
    counts = query_mask[:, None] & document_mask[np.arange(19)[:, None], winner]
    hot = (winner[..., None] == np.arange(37)) & counts[..., None]
    expected = np.einsum("qnst,ntd->qsd", hot, documents), np.einsum("qnst,qsd->ntd", hot, queries)
    masks = query_mask, document_mask

    def total(queries: jax.Array, documents: jax.Array) -> jax.Array:
        return maxsim_all_pairs(queries, documents, *masks, masked, True).sum()

    ours = jax.jit(jax.grad(total, (0, 1)))(queries, documents)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kept", [True, False])
def test_the_bytes_foretold_are_those_that_the_kernels_announce(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, announced = pl.pallas_call, []

    def noting(*args: Any, **options: Any) -> Any:
        announced.append(options["cost_estimate"].bytes_accessed)
        return call(*args, **options)

    monkeypatch.setattr(pl, "pallas_call", noting)
    queries = jax.ShapeDtypeStruct((512, 40, 128), jnp.bfloat16)
    documents = jax.ShapeDtypeStruct((1024, 192, 128), jnp.bfloat16)

    def both(queries: jax.Array, documents: jax.Array) -> Any:
        scores, winners = maxsim_tpu.scores_and_winners(queries, documents, kept)
        return maxsim_tpu.gradients(queries, documents, winners, scores)

    # Winners that are found again are so in one piece here, as the estimate has it.
    monkeypatch.setattr(maxsim_tpu, "FOUND_WINNERS", 2**40)
    jax.eval_shape(both, queries, documents)
    assert len(announced) == (3 if kept else 4)
    foretold = maxsim_tpu.moved_bytes(queries.shape, documents.shape, kept)
    assert sum(announced) == pytest.approx(foretold, rel=0.05)


@pytest.mark.usefixtures("tiny_tiles")
def test_what_is_not_a_number_scores_none() -> None:
    queries, documents, *_ = draw(2, 3, 4, 37)
    documents[1, 20] = np.nan
    masks = np.ones((2, 4), bool), np.ones((3, 37), bool)
    scores = jax.jit(maxsim_all_pairs)(queries, documents, *masks)
    np.testing.assert_array_equal(np.isnan(scores), [[False, True, False]] * 2)


def test_what_kernels_do_not_take_is_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxsim_module, "platform", lambda: "tpu")
    monkeypatch.setattr(pl, "pallas_call", None)
    inputs = draw(2, 3, 4, 5)
    mixed = (inputs[0], jnp.asarray(inputs[1], jnp.bfloat16), *inputs[2:])
    for given, masked in ((inputs, -0.5), (mixed, None)):
        ours = scores_and_gradients(maxsim_all_pairs, masked)(*given)
        expected = scores_and_gradients(maxsim_all_pairs_reference, masked)(*given)
        assert_close(ours, expected, 1e-5 if masked else 1e-2)


def over_the_mesh(exchange: str, dtype: Any = jnp.float32) -> Callable:
    """Scores of a whole batch, of which every device has its queries and documents."""
    axes = AXIS_RULES["batch"]
    split = PartitionSpec(axes)

    def score(queries: jax.Array, documents: jax.Array, *masks: jax.Array) -> jax.Array:
        embeddings = queries.astype(dtype), documents.astype(dtype)
        return maxsim_global(*embeddings, *masks, None, axes, exchange)

    return jax.shard_map(
        score, in_specs=(split,) * 4, out_specs=split, axis_names=set(axes), check_vma=False
    )


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_kernels_run_in_a_shard_map_and_are_repeated_over_tensor(exchange: str) -> None:
    inputs = draw(8, 12, 4, 5)
    expected = scores_and_gradients(maxsim_all_pairs_reference)(*inputs)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        ours = scores_and_gradients(over_the_mesh(exchange))(*global_batch(inputs, mesh))
    assert_close(ours, expected, 1e-5)


# Compiled for TPUs that are not here.


@pytest.mark.parametrize(
    ("topology", "shape"), [("v5e:2x2", {"data": 2, "tensor": 2}), ("v6e:2x2", {"fsdp": 4})]
)
def test_kernels_compile_for_tpus_in_memory_far_below_the_similarities(
    topology: str, shape: dict[str, int]
) -> None:
    devices = topology_devices(topology)
    mesh = make_mesh(**({"data": 1} | shape), devices=devices)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    queries, documents = (64 * shares, 39), (1024, 187)  # 64 queries a chip

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        split = NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    with jax.set_mesh(mesh):
        score = over_the_mesh("gather", jnp.bfloat16)
        program = (
            jax.jit(jax.value_and_grad(lambda *inputs: score(*inputs).sum(), (0, 1)))
            .lower(
                *(of((*x, 128), jnp.bfloat16) for x in (queries, documents)),
                *(of(x, jnp.bool_) for x in (queries, documents)),
            )
            .compile()
        )
    text = program.as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    for kernel in ("maxsim_scores", "maxsim_into_documents", "maxsim_into_queries"):
        assert sum(kernel in line for line in calls) == 1
    similarities = 64 * 39 * 1024 * 187 * 4
    assert program.memory_analysis().temp_size_in_bytes < similarities / 10
