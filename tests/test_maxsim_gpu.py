"""MaxSim's kernels for GPU: their numbers, interpreted here, and when a run uses them."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec
from test_ahead import tiny
from test_maxsim_tpu import assert_close, draw, scores_and_gradients

from colbert_jax import maxsim as maxsim_module
from colbert_jax import maxsim_gpu, train
from colbert_jax.ahead import model_config
from colbert_jax.maxsim import maxsim_all_pairs, maxsim_all_pairs_reference, maxsim_global
from colbert_jax.maxsim_gpu import Sizes, chosen
from colbert_jax.sharding import AXIS_RULES, global_batch, make_mesh

KERNELS = ("maxsim_scores", "maxsim_into_documents", "maxsim_into_queries")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for GPU."""
    monkeypatch.setattr(maxsim_module, "platform", lambda: "gpu")
    monkeypatch.setattr(maxsim_gpu, "platform", lambda: "gpu")


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


def trial(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    score: Callable[..., jax.Array] = maxsim_all_pairs,
    masked: float | None = None,
    seconds: tuple[float, float] = (1.0, 1.0),
) -> tuple[bool, str]:
    """The choice with these seconds for kernels and XLA, and what is logged of it."""
    monkeypatch.setattr(maxsim_gpu, "TEXTS", (3, 5))
    monkeypatch.setattr(maxsim_gpu, "_seconds", lambda run, kernels, *_: seconds[not kernels])
    caplog.clear()
    with caplog.at_level(logging.INFO, "colbert_jax"), jax.set_mesh(make_mesh(2, 2, 2)):
        use = chosen(score, 4, 5, 8, "float32", masked)
    (record,) = caplog.records
    return use, record.getMessage()


@pytest.mark.usefixtures("tiny_tiles")
def test_the_faster_form_is_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = "for 3 x 5 texts"
    assert trial(monkeypatch, caplog, seconds=(0.0012, 0.0034)) == (
        True,
        f"MaxSim by our kernels, 1.20 ms against XLA's 3.40 {texts}",
    )
    assert trial(monkeypatch, caplog, seconds=(0.0034, 0.0012)) == (
        False,
        f"MaxSim by XLA, since our kernels take 3.40 ms against its 1.20 {texts}",
    )


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_kernels_with_other_numbers_are_not_used(
    wrong: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other scores, another gradient into queries, another into documents."""

    def steeper(x: jax.Array) -> jax.Array:
        """The same, with a tenth more gradient."""
        return x + 0.1 * (x - jax.lax.stop_gradient(x))

    def score(queries: jax.Array, documents: jax.Array, *others: Any) -> jax.Array:
        if not others[-1]:
            return maxsim_all_pairs(queries, documents, *others)
        queries = steeper(queries) if wrong == 1 else queries
        documents = steeper(documents) if wrong == 2 else documents
        scores = maxsim_all_pairs(queries, documents, *others)
        return scores + (0.1 * jax.lax.stop_gradient(scores) if wrong == 0 else 0.0)

    assert trial(monkeypatch, caplog, score, seconds=(0.0, 1.0)) == (
        False,
        "MaxSim by XLA, since our kernels give other numbers here",
    )


@pytest.mark.usefixtures("gpu")
def test_kernels_that_do_not_compile_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU they do not, unless they are interpreted."""
    score = functools.partial(maxsim_all_pairs)  # one that no other test has compiled
    use, line = trial(monkeypatch, caplog, score, seconds=(0.0, 1.0))
    assert not use
    assert line.startswith("MaxSim by XLA, since our kernels do not run here (ValueError: ")
    assert "interpret mode" in line


@pytest.mark.usefixtures("gpu")
def test_what_kernels_do_not_take_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    line = "MaxSim by XLA, since our kernels do not take what the run has"
    assert trial(monkeypatch, caplog, None, masked=-0.5) == (False, line)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cpu", "tpu"])
def test_nothing_is_tried_but_on_a_gpu(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(maxsim_gpu, "platform", lambda: kind)
    with caplog.at_level(logging.INFO, "colbert_jax"):
        assert not chosen(None, 4, 5, 8, "float32", None)  # type: ignore[arg-type]
    assert not caplog.records


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("host", [0, 1])
def test_on_several_hosts_the_first_ones_choice_counts(
    host: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def of_the_first(value: np.ndarray) -> np.ndarray:
        asked.append(bool(value))
        return np.asarray(True)

    monkeypatch.setattr(maxsim_gpu.multihost_utils, "broadcast_one_to_all", of_the_first)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: host)
    monkeypatch.setattr(maxsim_gpu, "_trial", lambda run, inputs: (False, "MaxSim by XLA"))
    monkeypatch.setattr(maxsim_gpu, "TEXTS", (3, 5))
    with caplog.at_level(logging.INFO, "colbert_jax"):
        assert chosen(maxsim_all_pairs, 4, 5, 8, "float32", None)
    assert asked == [False]
    assert len(caplog.records) == (host == 0)


def test_calls_are_timed_by_their_median_after_two_that_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    took = iter([90, 80, 1, 5, 2, 4, 70])
    clock = [0.0]
    monkeypatch.setattr(maxsim_gpu.time, "perf_counter", lambda: clock[0])

    def run(given: int) -> int:
        clock[0] += next(took)
        return given

    assert maxsim_gpu._seconds(run, 1) == 4
    assert next(took, None) is None


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("kind", ["contrastive", "distillation"])
def test_a_loss_is_built_with_the_choice_for_the_runs_lengths(
    use: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distillation scores each query's candidates only, which XLA does."""
    asked, given = [], []

    def choose(*arguments: Any) -> bool:
        asked.append(arguments)
        return use

    monkeypatch.setattr(train.maxsim_gpu, "chosen", choose)
    monkeypatch.setattr(train, "make_loss_fn", lambda *arguments: given.append(arguments[-1]))
    config = tiny()
    config["loss"]["kind"] = kind
    train.build_loss(config, model_config(config))
    if kind == "distillation":
        assert (asked, given) == ([], [False])
        return
    assert asked == [(maxsim_all_pairs, 8, 16, 16, "bfloat16", None)]
    assert given == [use]
