"""Micro-batches, static lengths and recomputation change memory and time, never the numbers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from colbert_jax.colbert import (
    ColbertConfig,
    DenseConfig,
    init_params,
    make_embed,
    scanned_params,
)
from colbert_jax.maxsim import maxsim_all_pairs
from colbert_jax.micro_batch import (
    fit_lengths,
    make_encode,
    static_lengths,
    used_lengths,
)
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.sharding import make_mesh

CONFIG = ColbertConfig(
    ModernBertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        local_attention=8,
    ),
    (DenseConfig(32, 16),),
)
EMBED = make_embed(CONFIG)


def tokens(batch: int, length: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, length + 1, batch)
    attended = np.arange(length) < lengths[:, None]
    return {
        "input_ids": rng.integers(0, 97, (batch, length), dtype=np.int32),
        "attention_mask": attended,
        "scoring_mask": attended & (rng.random((batch, length)) < 0.8),
    }


def loss_of(encode):
    def loss(params, batch):
        embedded, _ = encode(params, batch)
        scoring = batch["scoring_mask"]
        half = len(embedded) // 2
        scores = maxsim_all_pairs(embedded[:half], embedded[half:], scoring[:half], scoring[half:])
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores))

    return loss


def relative_difference(a, b) -> float:
    """|a - b| / |b| over the whole gradient.

    Tensor by tensor, the attention weights alone differ by up to 3e-5: their gradients are small
    differences of large terms, so float32's rounding shows there 50 times larger.
    """
    flat_a, flat_b = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(np.linalg.norm(flat_a - flat_b) / np.linalg.norm(flat_b))


@pytest.fixture(scope="module")
def whole():
    return jax.jit(jax.value_and_grad(loss_of(make_encode(EMBED))))(
        init_params(CONFIG, 0), tokens(24)
    )


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("size", "lengths"), [(4, 1), (6, 3), (0, 3)])
def test_the_loss_and_gradients_are_those_of_the_whole_batch(
    whole, size, lengths, recompute, keep_products
):
    embed = make_embed(CONFIG, scan_layers=False, keep_products=keep_products)
    encode = make_encode(embed, size, lengths, recompute)
    cut = jax.jit(jax.value_and_grad(loss_of(encode)))(init_params(CONFIG, 0), tokens(24))
    assert abs(cut[0] - whole[0]) <= 1e-5 * abs(whole[0])
    assert relative_difference(cut[1], whole[1]) <= 1e-5


def test_texts_come_back_in_their_own_order():
    params, batch = init_params(CONFIG, 0), tokens(24)
    embedded, _ = make_encode(EMBED, 4, 3)(params, batch)
    expected = EMBED(params, batch["input_ids"], batch["attention_mask"])
    used = batch["attention_mask"][..., None]
    np.testing.assert_allclose(embedded * used, expected * used, atol=1e-5)


def test_tokens_that_score_without_being_looked_at_are_encoded_too():
    batch = tokens(6)
    batch["attention_mask"] = np.broadcast_to(np.arange(24) < 5, (6, 24))
    batch["scoring_mask"] = np.broadcast_to(np.arange(24) < 15, (6, 24))  # an expanded query
    params = init_params(CONFIG, 0)
    embedded, processed = make_encode(EMBED, 3, 3)(params, batch)
    expected = EMBED(params, batch["input_ids"], batch["attention_mask"])
    np.testing.assert_allclose(embedded[:, :15], expected[:, :15], atol=1e-5)
    assert list(used_lengths(batch)) == [15] * 6
    assert processed == 6 * 16


def test_processed_tokens_count_the_padding_of_each_micro_batch():
    batch = tokens(6)
    lengths = np.array([2, 24, 7, 8, 9, 1])
    batch["attention_mask"] = batch["scoring_mask"] = np.arange(24) < lengths[:, None]
    params = init_params(CONFIG, 0)
    assert make_encode(EMBED)(params, batch)[1] == 6 * 24
    # Sorted in threes: 1, 2, 7 and 8, 9, 24, in lengths of 8, 16 and 24; in twos: 2, 8, 24.
    assert make_encode(EMBED, 3, 3)(params, batch)[1] == 3 * (8 + 24)
    assert make_encode(EMBED, 2, 3)(params, batch)[1] == 2 * (8 + 8 + 24)


def test_static_lengths_are_few_even_and_reach_the_longest():
    assert static_lengths(187, 8) == (24, 48, 72, 96, 120, 144, 164, 187)
    assert static_lengths(187, 1) == (187,)
    assert static_lengths(3, 8) == (3,)
    assert static_lengths(39, 4) == (12, 20, 32, 39)


def test_fitted_lengths_pad_least_of_all_choices():
    rng = np.random.default_rng(0)
    sample = np.minimum(rng.geometric(0.08, 300), 39)

    def padded(lengths) -> int:
        return int(np.asarray(lengths)[np.searchsorted(lengths, sample)].sum())

    ends = [*range(4, 39, 4)]
    for count in (1, 2, 4):
        fitted = fit_lengths(sample, 39, count)
        every_choice = [(*c, 39) for c in itertools.combinations(ends, count - 1)]
        assert len(fitted) == count and fitted[-1] == 39
        assert padded(fitted) == min(map(padded, every_choice))
    assert fit_lengths([39, 39], 39, 8) == (39,)
    assert fit_lengths(sample, 3, 8) == (3,)


def test_nine_tenths_of_the_tokens_are_real_on_real_text(real_texts):
    # Passages of one to eight texts; words stand for tokens: the spread of lengths is what counts.
    rng = np.random.default_rng(0)
    words = np.array([len(text.split()) for text in real_texts])
    passages = [rng.choice(words, rng.integers(1, 9)).sum() for _ in range(2048)]
    lengths = np.minimum(np.array(passages) + 3, 187)
    mask = np.arange(187) < lengths[:, None]
    batch = {"input_ids": mask.astype(np.int32), "attention_mask": mask, "scoring_mask": mask}
    nothing = lambda params, ids, mask: jnp.zeros((*ids.shape, 1))  # noqa: E731
    fitted = fit_lengths(lengths[::2], 187, 8)
    assert len(fitted) == 8
    _, processed = make_encode(nothing, 32, fitted)({}, batch)
    _, padded = make_encode(nothing, 32, 1)({}, batch)
    assert mask.sum() / padded < 0.7  # it is no test if all texts are long
    assert mask.sum() / processed >= 0.9


@pytest.mark.parametrize("scan_layers", [False, True])
def test_micro_batches_and_kept_products_lower_the_memory_of_the_gradient(scan_layers):
    config = dataclasses.replace(
        CONFIG, encoder=dataclasses.replace(CONFIG.encoder, num_hidden_layers=7)
    )
    params, batch = init_params(config, 0), tokens(64)

    def temporary_bytes(keep_products: bool, *settings) -> int:
        embed = make_embed(config, "float32", scan_layers, keep_products)
        loss = loss_of(make_encode(embed, *settings))
        arrange = functools.partial(scanned_params, config) if scan_layers else lambda p: p
        gradient = jax.jit(jax.grad(lambda params, batch: loss(arrange(params), batch)))
        return gradient.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    whole = temporary_bytes(False)
    none = temporary_bytes(False, 8, 1, False)
    names = temporary_bytes(True, 8, 1, False)
    full = temporary_bytes(True, 8, 1, True)
    assert full < names < none
    assert full < 0.5 * whole
    if scan_layers:
        # Within a micro-batch too; where layers are one by one, XLA for CPU sees through it and
        # keeps everything.
        assert temporary_bytes(True, 32, 1, True) < 0.8 * temporary_bytes(False, 32, 1, True)
    # Other lengths are other branches of one program: they share their memory.
    assert temporary_bytes(True, 8, 4, True) < 1.5 * full


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("lengths", [1, 3])
def test_a_last_micro_batch_is_filled_up_and_changes_nothing(whole, lengths):
    encode = make_encode(EMBED, 7, lengths)
    params, batch = init_params(CONFIG, 0), tokens(24)
    embedded, processed = encode(params, batch)
    assert embedded.shape == (24, 24, 16)
    if lengths == 1:
        assert processed == 28 * 24
    cut = jax.jit(jax.value_and_grad(loss_of(encode)))(params, batch)
    assert abs(cut[0] - whole[0]) <= 1e-5 * abs(whole[0])
    assert relative_difference(cut[1], whole[1]) <= 1e-5


def test_every_device_of_a_mesh_takes_the_same_length():
    batch = tokens(16)
    lengths = np.array([2] * 8 + [23] * 8)
    batch["attention_mask"] = batch["scoring_mask"] = np.arange(24) < lengths[:, None]
    encode = make_encode(EMBED, 1, 3)
    params = init_params(CONFIG, 0)
    split = PartitionSpec("data")

    def processed(params, batch):
        return encode(params, batch, ("data",))[1][None]

    with jax.set_mesh(make_mesh()):
        counts = jax.jit(
            jax.shard_map(
                processed, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
            )
        )(params, batch)
    assert list(counts) == [2 * 24] * 8
