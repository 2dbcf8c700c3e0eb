"""FLOPs, bytes and times by shape, against XLA's count and against numbers by hand."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax.attention import BANDED_FROM
from colbert_jax.colbert import ColbertConfig, DenseConfig, make_embed, param_shapes
from colbert_jax.cost import (
    CHIPS,
    Work,
    blocks_from,
    encoder_flops,
    encoder_work,
    forward_flops,
    logits_of,
    maxsim_work,
    model_flops,
    network_bandwidth,
    parameter_count,
    recomputed_flops,
    roofline,
    step_work,
)
from colbert_jax.maxsim import maxsim_all_pairs_reference, maxsim_candidates
from colbert_jax.modernbert import ModernBertConfig

MODEL = ColbertConfig(
    ModernBertConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=32,
    ),
    (DenseConfig(128, 64, use_residual=True), DenseConfig(64, 32)),
)
SETTINGS = {"dtype": "float32", "micro_batch": 0, "remat": "full", "attention": "xla"}


def xla_flops(function: Any, *arguments: Any) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def pretrain() -> dict[str, Any]:
    file = Path(__file__).parents[1] / "configs" / "pretrain.py"
    return json.loads(runpy.run_path(str(file))["get_config"]().to_json())


@pytest.mark.parametrize("length", [48, 96])  # local layers whole, and in blocks of 3 x 16 keys
def test_encoder_is_xlas_count_without_what_is_no_product(length: int) -> None:
    texts = 8
    ids = jax.ShapeDtypeStruct((texts, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((texts, length), jnp.bool_)
    counted = xla_flops(make_embed(MODEL), param_shapes(MODEL), ids, mask)
    ours = forward_flops(MODEL, texts, length, in_blocks=length == 96)
    # Norms, softmax, GELU and rotary angles are the rest.
    assert ours < counted < 1.1 * ours


def test_backward_pass_is_two_forward_passes() -> None:
    texts, length = 8, 96
    ids, mask = jnp.zeros((texts, length), jnp.int32), jnp.ones((texts, length), bool)
    embed = make_embed(MODEL)

    def loss(params: Any) -> jax.Array:
        return jnp.square(embed(params, ids, mask)[:, :3]).sum()

    counted = xla_flops(jax.grad(loss), param_shapes(MODEL))
    ours = encoder_work(MODEL, texts, length, SETTINGS | {"remat": "none"})
    assert ours.hardware_flops == 3 * forward_flops(MODEL, texts, length, in_blocks=True)
    assert ours.hardware_flops < counted < 1.1 * ours.hardware_flops


@pytest.mark.parametrize(
    ("remat", "micro_batch", "lengths", "passes", "logits"),
    [
        ("full", 2, 1, 1, 1),
        ("full", 0, 4, 1, 1),
        ("full", 0, 1, 0, 1),
        ("names", 2, 4, 0, 1),
        ("none", 2, 4, 0, 0),
    ],
)
def test_what_is_computed_again(
    remat: str, micro_batch: int, lengths: int, passes: int, logits: int
) -> None:
    settings = {"remat": remat, "micro_batch": micro_batch}
    again = recomputed_flops(MODEL, 8, 96, settings, lengths, in_blocks=True)
    # Layers 0 and 3 see all 96 tokens, the two between three blocks of 16.
    of_logits = 8 * 2 * 128 * 96 * (2 * 96 + 2 * 48)
    assert again == passes * forward_flops(MODEL, 8, 96, True) + logits * of_logits


def test_maxsim_forward_is_xlas_count() -> None:
    queries, documents = (6, 8, 128), (10, 24, 128)
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (queries, documents)]
    masks = [jax.ShapeDtypeStruct(s[:2], jnp.bool_) for s in (queries, documents)]
    counted = xla_flops(maxsim_all_pairs_reference, *arguments, *masks)
    work = maxsim_work(queries, documents, kept=True, platform="gpu")
    forward = work.hardware_flops / 3
    assert forward == 2 * 6 * 10 * 8 * 24 * 128
    assert forward < counted < 1.1 * forward


def test_maxsim_with_winners_found_again_and_on_cpu() -> None:
    shapes = (6, 8, 128), (10, 24, 128)
    forward, sparse = 2 * 6 * 10 * 8 * 24 * 128, 4 * 6 * 10 * 8 * 128
    for kept, platform, expected in (
        (True, "gpu", 3 * forward),
        (True, "tpu", 3 * forward),
        (False, "tpu", 4 * forward),
        (True, "cpu", forward + sparse),
        (False, "cpu", 2 * forward + sparse),
    ):
        work = maxsim_work(*shapes, kept=kept, platform=platform)
        assert work.hardware_flops == expected


def count_by_hand(lengths: list[int]) -> int:
    """The encoder's forward pass, every allowed pair of tokens looked at."""
    token = 4 * (8 * 128**2 + 6 * 128 * 192) + 2 * (128 * 64 * 2 + 64 * 32)
    pairs = 0
    for length in lengths:
        for i in range(length):
            for j in range(length):
                pairs += 2 + 2 * (abs(i - j) <= 16)  # two global layers, two local ones
    return sum(lengths) * token + 4 * 128 * pairs


@pytest.mark.parametrize("kind", ["contrastive", "distillation"])
def test_model_flops_count_every_pair_that_the_model_is_defined_by(kind: str) -> None:
    queries, documents = [5, 1, 17], [[40, 3], [18, 16], [1, 60]]
    flat = [length for row in documents for length in row]
    encoder = count_by_hand(queries) + count_by_hand(flat)
    scores = 0
    for i, query in enumerate(queries):
        met = flat if kind == "contrastive" else documents[i]
        scores += sum(2 * query * length * 32 + 4 * query * 32 for length in met)
    expected = 3 * encoder + scores
    found = model_flops(MODEL, kind, np.array(queries), np.array(documents))
    assert found == expected
    traced = jax.jit(lambda q, d: model_flops(MODEL, kind, q, d))
    assert traced(jnp.array(queries), jnp.array(documents)) == pytest.approx(expected, rel=1e-6)


def test_no_length_asks_for_more_than_is_computed() -> None:
    for length in range(1, 200):
        asked = encoder_flops(MODEL, np.array([length]))
        assert asked <= forward_flops(MODEL, 1, length, in_blocks=True)


def test_local_layers_are_counted_as_each_platform_computes_them() -> None:
    base = ColbertConfig(ModernBertConfig(), (DenseConfig(768),))
    from_ = {(p, a): blocks_from(base, p, a) for p in BANDED_FROM for a in ("auto", "xla")}
    assert from_["cpu", "auto"] == from_["cpu", "xla"] == 384
    assert (from_["tpu", "auto"], from_["tpu", "xla"]) == (512, 1024)
    # 8 of 22 layers see all; the others, where not in blocks, compute all and mask.
    assert logits_of(base, 300, in_blocks=False) == 22 * 300**2
    assert logits_of(base, 300, in_blocks=True) == 8 * 300**2 + 14 * 300 * 192
    settings = SETTINGS | {"remat": "none", "attention": "auto"}
    flops = {
        p: encoder_work(base, 1, 400, settings, platform=p).hardware_flops for p in BANDED_FROM
    }
    assert flops["tpu"] > flops["cpu"] == flops["gpu"]


def test_candidates_are_differentiated_by_two_products() -> None:
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((6, 8, 128), (6, 4, 24, 128))]
    masks = [jnp.ones((6, 8), bool), jnp.ones((6, 4, 24), bool)]

    def loss(*embeddings: jax.Array) -> jax.Array:
        return maxsim_candidates(*embeddings, *masks).sum()

    counted = xla_flops(jax.value_and_grad(loss, argnums=(0, 1)), *arguments)
    forward = 2 * 6 * 4 * 8 * 24 * 128
    assert 3 * forward < counted < 3.5 * forward


def test_step_splits_over_chips_except_for_the_documents_that_a_chip_meets() -> None:
    config = pretrain()
    model = ColbertConfig(ModernBertConfig(), (DenseConfig(768),))
    one = step_work(config, model, {"data": 1, "fsdp": 1, "tensor": 1}, platform="tpu")
    for sizes in ((16, 1, 1), (4, 4, 1)):
        mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        share = step_work(config, model, mesh, platform="tpu")
        assert share.model_flops * 16 == pytest.approx(one.model_flops)
    # 110 M parameters behind the table, 6 FLOPs a parameter and token, and attention.
    tokens = 16_384 * (39 + 187)
    products = parameter_count(model) - 50368 * 768
    assert one.model_flops > 6 * tokens * products
    assert one.model_flops < 1.3 * 6 * tokens * products


def test_one_more_pass_for_what_does_not_fit() -> None:
    config = pretrain()
    model = ColbertConfig(ModernBertConfig(), (DenseConfig(768),))
    mesh = {"data": 16, "fsdp": 1, "tensor": 1}
    gathered = step_work(config, model, mesh, platform="tpu")
    config["loss"]["exchange"] = "ring"
    config["model"]["remat"] = "none"
    ring = step_work(config, model, mesh, platform="tpu")
    assert ring.model_flops == gathered.model_flops
    assert ring.hardware_flops < gathered.hardware_flops


@pytest.mark.parametrize(
    ("kind", "extents", "gigabytes"),
    [
        ("v5e", (1, 1), 50),
        ("v5e", (2, 2), 100),
        ("v5e", (16, 16), 200),
        ("v5e", (4, 16), 150),
        ("v5p", (2, 2, 2), 300),
        ("v5p", (4, 4, 4), 600),
        ("v5p", (2, 4, 4), 300),
    ],
)
def test_links_that_a_slice_has(kind: str, extents: tuple[int, ...], gigabytes: float) -> None:
    assert network_bandwidth(CHIPS[kind], extents) == pytest.approx(gigabytes * 1e9)


def test_roofline_adds_the_network_to_the_longer_of_the_other_two() -> None:
    sent = {"all-gather": 100e9, "collective-permute": 50e9}
    seconds = roofline(Work(394e12, 819e9), sent, CHIPS["v5e"], (2, 2))
    assert dataclasses.astuple(seconds) == pytest.approx((2.0, 1.0, 2.0))
    assert seconds.step == pytest.approx(4.0)


def test_handovers_hide_behind_maxsim() -> None:
    work = Work(394e12, 819e9, score_flops=0.6 * 197e12)
    seconds = roofline(work, {"collective-permute": 50e9}, CHIPS["v5e"], (2, 2))
    assert seconds.network == pytest.approx(0.4)
    assert roofline(work, {"collective-permute": 5e9}, CHIPS["v5e"], (2, 2)).network == 0
