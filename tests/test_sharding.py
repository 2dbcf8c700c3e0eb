"""A run is the same on any mesh, and the mesh really splits what it should."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from colbert_jax import maxsim
from colbert_jax.colbert import (
    ColbertConfig,
    DenseConfig,
    init_params,
    make_embed,
    scanned_params,
)
from colbert_jax.errors import UserError
from colbert_jax.micro_batch import make_encode
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.optimizer import build_optimizer
from colbert_jax.sharding import (
    AXIS_RULES,
    MESH_AXES,
    constrain,
    global_batch,
    make_mesh,
    partition_spec,
    replicated,
)
from colbert_jax.train import Batch, make_loss_fn, make_train_step
from colbert_jax.train_state import TrainState, abstract_state, init_state

MODEL = ColbertConfig(
    ModernBertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        local_attention=8,
        global_attn_every_n_layers=2,
    ),
    (DenseConfig(32, 16),),
)
OPTIMIZER = {
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-6,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "gradient_of": "mean",
}
LOSS = {
    "kind": "contrastive",
    "temperature": 0.5,
    "normalize_scores": True,
    "masked_similarity": None,
    "exchange": "gather",
}
SHAPES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Most of a tiny model's time goes to optimising its program, which is not at test here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def tokens(rng: np.random.Generator, *shape: int) -> dict[str, np.ndarray]:
    lengths = rng.integers(4, shape[-1] + 1, shape[:-1])
    attended = np.arange(shape[-1]) < lengths[..., None]
    return {
        "input_ids": rng.integers(0, 96, shape, dtype=np.int32),
        "attention_mask": attended,
        "scoring_mask": attended & (rng.random(shape) < 0.9),
    }


def a_batch() -> Batch:
    rng = np.random.default_rng(0)
    return {"query": tokens(rng, 8, 12), "document": tokens(rng, 8, 2, 20)}


def a_step(cut: bool) -> tuple[Any, Any]:
    """A training step and its optimiser.

    `cut` encodes sorted micro-batches in three lengths with a loop over layers, and hands documents
    round a ring.
    """
    optimizer, schedule = build_optimizer(OPTIMIZER, total_steps=10, batch_size=8)
    encode = make_encode(make_embed(MODEL, scan_layers=cut), *((2, 3) if cut else ()))
    loss_fn = make_loss_fn(
        LOSS | {"exchange": "ring" if cut else "gather"},
        encode,
        encode,
        (lambda params: scanned_params(MODEL, params)) if cut else None,
    )
    return make_train_step(
        loss_fn, optimizer, schedule, lambda _: jnp.float32(0), max_skipped=3
    ), optimizer


def two_steps(
    shape: tuple[int, int, int], cut: bool = False
) -> tuple[TrainState, list[dict[str, float]]]:
    """The state after two updates, and their metrics."""
    mesh = mesh_of(shape)
    step, optimizer = a_step(cut)
    like = abstract_state(MODEL, optimizer, mesh)
    with jax.set_mesh(mesh):
        state = init_state(lambda: {"model": init_params(MODEL, 0), "loss": {}}, optimizer, like)
        metrics = []
        for _ in range(2):
            state, values = step(state, global_batch(a_batch(), mesh))
            metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


@pytest.fixture(scope="module")
def alone() -> tuple[TrainState, list[dict[str, float]]]:
    return two_steps((1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        *((shape, False) for shape in SHAPES[1:]),
        *((shape, True) for shape in [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 4, 1), (2, 2, 2)]),
    ],
)
def test_training_is_the_same_on_every_mesh_however_the_step_is_cut(
    alone: tuple[TrainState, list[dict[str, float]]], shape: tuple[int, int, int], cut: bool
) -> None:
    state, metrics = two_steps(shape, cut)
    expected, expected_metrics = alone
    for ours, theirs in zip(metrics, expected_metrics, strict=True):
        for name in ("loss", "grad_norm", "accuracy", "tokens", "learning_rate"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(expected.params)]
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True)
    for name, (ours, theirs) in zip(names, pairs, strict=True):
        assert ours.dtype == jnp.float32
        apart = np.linalg.norm(np.asarray(ours) - np.asarray(theirs))
        assert apart <= 1e-5 * np.linalg.norm(np.asarray(theirs)), name


@pytest.mark.parametrize("cut", [False, True], ids=["gather", "ring"])
def test_the_compiled_step_holds_no_similarities_of_all_pairs_and_sends_what_is_meant(
    cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(maxsim.TILE_SIMILARITIES, "cpu", 16 * 12 * 20)
    mesh = mesh_of((8, 1, 1))
    step, optimizer = a_step(cut)
    batch = {"query": tokens(np.random.default_rng(0), 64, 12)}
    batch["document"] = tokens(np.random.default_rng(1), 64, 1, 20)
    like = abstract_state(MODEL, optimizer, mesh)
    with jax.set_mesh(mesh):
        text = step.lower(like, global_batch(batch, mesh)).compile().as_text()
    sizes = [
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"(?:f32|bf16|s32|u8|u16|pred)\[([\d,]+)\]", text)
    ]
    # A device's 8 queries against 64 documents; its own documents alone are a tenth of it.
    assert max(sizes) < 8 * 64 * 12 * 20 / 2

    sent = re.findall(
        r"= \(?(\w+)\[([\d,]*)\][^=\n]* (all-gather|reduce-scatter|all-reduce|all-to-all|"
        r"collective-permute)\(",
        text,
    )
    large = [kind for dtype, dims, kind in sent if dtype == "f32" and dims.count(",") == 2]
    if cut:  # documents there; documents and their gradients back, and the gradient's way home
        assert set(large) == {"collective-permute"} and len(large) == 4
    else:
        assert sorted(large) == ["all-gather", "reduce-scatter"]
    # All else is the sum of the parameters' gradient and the agreed lengths.
    kinds = set(re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text))
    assert kinds == ({"all-reduce"} if cut else {"all-gather", "reduce-scatter", "all-reduce"})


def test_parameters_and_moments_are_split_over_fsdp_and_tensor() -> None:
    mesh = mesh_of((2, 2, 2))
    optimizer, _ = build_optimizer(OPTIMIZER, total_steps=10, batch_size=8)
    like = abstract_state(MODEL, optimizer, mesh)
    make = lambda: {"model": init_params(MODEL, 0), "loss": {}}  # noqa: E731
    with jax.set_mesh(mesh):
        state = init_state(make, optimizer, like)

    def held(x: jax.Array) -> tuple[int, ...]:
        shapes = {shard.data.shape for shard in x.addressable_shards}
        assert len(shapes) == 1 and len(x.addressable_shards) == 8
        return shapes.pop()

    encoder = state.params["model"]["encoder"]
    layer = encoder["layers"][1]
    assert held(encoder["tok_embeddings"]) == (96, 16)  # embed over fsdp
    assert held(layer["attn"]["qkv"]) == (16, *_halved_heads(layer["attn"]["qkv"].shape[1:]))
    assert held(layer["mlp"]["wo"]) == (24, 16)  # mlp over tensor, embed over fsdp
    assert held(state.params["model"]["projection"][0]["kernel"]) == (16, 16)
    assert held(state.step) == ()
    # A device holds a quarter, or half where only one of the two axes applies.
    whole = sum(x.size for x in jax.tree.leaves(state.params))
    mine = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.params))
    assert mine < 0.3 * whole
    moments = [s for s in jax.tree.leaves(state.opt_state) if s.shape == (96, 32)]
    assert len(moments) == 2 and all(held(m) == (96, 16) for m in moments)


def _halved_heads(shape: tuple[int, ...]) -> tuple[int, ...]:
    assert 4 in shape
    return tuple(2 if size == 4 else size for size in shape)


def test_random_parameters_do_not_depend_on_the_mesh() -> None:
    optimizer, _ = build_optimizer(OPTIMIZER, total_steps=10, batch_size=8)

    def draw(shape: tuple[int, int, int]) -> list[np.ndarray]:
        like = abstract_state(MODEL, optimizer, mesh_of(shape))
        state = init_state(lambda: {"model": init_params(MODEL, 3), "loss": {}}, optimizer, like)
        return [np.asarray(x) for x in jax.tree.leaves(state.params)]

    for one, other in zip(draw((1, 1, 1)), draw((2, 2, 2)), strict=True):
        np.testing.assert_array_equal(one, other)


# --- the mesh ---


def test_minus_one_takes_the_devices_that_are_left() -> None:
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(devices=jax.devices()[:1]).size == 1
    assert make_mesh(2, 4, 1).axis_names == MESH_AXES


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"data": 16},
        {"fsdp": 3},
        {"fsdp": 16},
        {"fsdp": 0},
        {"data": 0},
        {"data": -2, "fsdp": -4},
        {"data": -1, "tensor": -8},
    ],
)
def test_sizes_that_do_not_fit_are_the_users_error(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"config\.mesh sizes whose product is 8"):
        make_mesh(**sizes)


# --- logical axes ---


def test_logical_axes_lie_on_the_mesh_as_the_table_says() -> None:
    mesh = mesh_of((2, 2, 2))
    spec = partition_spec(("batch", "embed"), (8, 32), mesh)
    assert spec == PartitionSpec(("data", "fsdp"), ("fsdp",))
    spec = partition_spec(("mlp", "embed"), (96, 32), mesh)
    assert spec == PartitionSpec(("tensor",), ("fsdp",))
    assert partition_spec(("proj", "seq", None), (8, 8, 8), mesh) == PartitionSpec(None, None, None)
    assert set(AXIS_RULES) >= {"batch", "vocab", "embed", "heads", "mlp", "proj", None}


def test_an_axis_that_cannot_be_divided_stays_whole() -> None:
    mesh = mesh_of((2, 2, 2))
    assert partition_spec(("mlp", "embed"), (97, 32), mesh) == PartitionSpec(None, ("fsdp",))
    assert partition_spec(("batch",), (6,), mesh) == PartitionSpec(None)
    assert partition_spec(("batch",), (1,), mesh) == PartitionSpec(None)


def test_mesh_axes_of_one_device_split_nothing() -> None:
    mesh = mesh_of((8, 1, 1))
    assert partition_spec(("mlp", "embed"), (96, 32), mesh) == PartitionSpec(None, None)
    assert partition_spec(("batch", "seq"), (8, 4), mesh) == PartitionSpec(("data",), None)
    assert replicated(mesh).is_fully_replicated


def test_a_name_too_many_or_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        partition_spec(("batch",), (8, 4), mesh_of((8, 1, 1)))


def test_a_global_batch_is_split_by_rows_and_keeps_their_order() -> None:
    batch: dict[str, Any] = {
        "query": {"input_ids": np.arange(32, dtype=np.int32).reshape(16, 2)},
        "scores": np.arange(16, dtype=np.float32),
    }
    placed = global_batch(batch, mesh_of((2, 2, 2)))
    ids = placed["query"]["input_ids"]
    assert ids.dtype == jnp.int32 and placed["scores"].dtype == jnp.float32
    np.testing.assert_array_equal(ids, batch["query"]["input_ids"])
    np.testing.assert_array_equal(placed["scores"], batch["scores"])
    # Four parts of four rows; the two devices of a tensor pair hold the same rows.
    starts = sorted(int(shard.data[0, 0]) for shard in ids.addressable_shards)
    assert {shard.data.shape for shard in ids.addressable_shards} == {(4, 2)}
    assert starts == [0, 0, 8, 8, 16, 16, 24, 24]


def test_constrain_pins_a_layout_inside_a_mesh_only() -> None:
    x = jnp.arange(32.0).reshape(8, 4)
    assert constrain(x, "batch", "embed") is x

    def pinned(x: jax.Array) -> jax.Array:
        return constrain(x * 1.0, "batch", "seq")

    assert jax.jit(pinned)(x).sharding.is_fully_replicated
    mesh = mesh_of((8, 1, 1))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: pinned(x))(x)
    assert {shard.data.shape for shard in split.addressable_shards} == {(1, 4)}
    np.testing.assert_array_equal(split, x)
