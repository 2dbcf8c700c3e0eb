"""What a training step costs, from shapes alone, and how long a chip needs for it at best.

A step's time is bounded by its arithmetic, by what it moves to and from memory, and by what it
sends (the roofline, Williams et al., 2009). FLOPs here are counted by shape, because XLA's
`cost_analysis()` counts the body of a loop once. Shape letters: S tokens of a query, T of a
document, Q queries and N documents of one device, D embedding size, E hidden size, F intermediate
size, H heads.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from colbert_jax import maxsim_tpu
from colbert_jax.attention import BANDED_FROM, PARTS_FROM, SPLASH_FROM
from colbert_jax.colbert import ColbertConfig, param_shapes
from colbert_jax.maxsim import KEPT_WINNERS, TILE_SIMILARITIES

Lengths = Num[Array, "..."] | Num[np.ndarray, "..."]  # of texts, in tokens


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do.

    Attributes:
      name: as in a topology, "v5e".
      flops: bfloat16 FLOP/s, at most.
      hbm_bytes: size of its memory.
      hbm_bandwidth: bytes/s to and from its memory.
      ici_bandwidth: bytes/s that it can send to its neighbours over all links together, in one
        direction; it can receive as much at the same time.
      dimensions: of the torus that chips of this kind form.
      chips: in the largest slice.
      kind: `device_kind` of its devices in JAX.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dimensions: int
    chips: int
    kind: str


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables "system architecture". ICI stands there
# for both directions together (400 and 800 GB/s for v5e and v6e) or in Gbit/s (2400 for v4, 4800
# for v5p).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2**30, 1228e9, 300e9, 3, 4096, "TPU v4"),
        Chip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, 2, 256, "TPU v5 lite"),
        Chip("v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 3, 8960, "TPU v5"),
        Chip("v6e", 918e12, 32 * 2**30, 1638e9, 400e9, 2, 256, "TPU v6 lite"),
    )
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does in a step.

    Attributes:
      hardware_flops: of forward and backward pass, with what is computed again, masked, or only for
        the sake of a matrix unit.
      memory_bytes: to and from memory, an estimate.
      score_flops: of the hardware FLOPs those of MaxSim, behind which a ring's handovers hide.
      model_flops: of a whole step, what `model_flops` says: what utilisation is measured by.
    """

    hardware_flops: float
    memory_bytes: float
    score_flops: float = 0.0
    model_flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both together."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(one + another for one, another in pairs))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step.

    Attributes:
      compute: of the hardware FLOPs at the chip's peak.
      memory: of the bytes to and from memory.
      network: of the bytes sent, as far as no arithmetic is made to hide them.
    """

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        """Arithmetic hides memory or the other way round; collectives are waited for."""
        return max(self.compute, self.memory) + self.network


def model_flops(model: ColbertConfig, kind: str, queries: Lengths, documents: Lengths) -> Any:
    """FLOPs that a training step on texts of these lengths asks for: the numerator of MFU.

    Products alone, 2 FLOPs a multiply-add, from the definition of the model and not from what a
    program does: no padding, no pair of tokens outside of a window, nothing twice. The backward
    pass of the encoder takes two products for each of the forward pass, that of MaxSim touches only
    winners: 2 S T D forward and 4 S D backward for a pair of texts.

    Args:
      model: the model's shape.
      kind: of the loss; "contrastive" scores all pairs of a batch, "distillation" those of a query
        with its K candidates.
      queries: `lengths[query]` in tokens.
      documents: `lengths[query, candidate]`.

    Returns:
      A scalar: float64 from numpy's arrays, float32 from JAX's.
    """
    queries, documents = queries.astype(float), documents.astype(float)
    encoder = encoder_flops(model, queries) + encoder_flops(model, documents)
    if kind == "contrastive":
        met = documents.sum()
        rivals = float(documents.size)
    else:
        met = documents.sum(axis=1)
        rivals = float(documents.shape[1])
    scores = (queries * (2 * met + 4 * rivals)).sum() * model.embedding_size
    return 3 * encoder + scores


def encoder_flops(model: ColbertConfig, lengths: Lengths) -> Any:
    """FLOPs of the encoder's forward pass over texts of these lengths, as `model_flops` counts.

    A token takes 2 E (3 E + E) for the attention's projections and 2 E 3 F for the gated MLP; a
    pair of tokens, of which one may look at the other, 4 E for logit and value.
    """
    encoder, reach = model.encoder, model.encoder.local_attention // 2
    near = (lengths - 1).clip(0, reach)
    in_window = lengths * (2 * near + 1) - near * (near + 1)
    everywhere = len([i for i in range(encoder.num_hidden_layers) if encoder.is_global(i)])
    pairs = everywhere * lengths**2 + (encoder.num_hidden_layers - everywhere) * in_window
    return (lengths * token_flops(model) + 4.0 * encoder.hidden_size * pairs).sum()


def token_flops(model: ColbertConfig) -> float:
    """FLOPs of the encoder's forward pass that each token takes, whatever stands beside it."""
    encoder = model.encoder
    hidden, width = encoder.hidden_size, encoder.intermediate_size
    projection = 0
    for dense in model.projection:
        widens = dense.use_residual and dense.in_features != dense.out_features
        projection += 2 * dense.in_features * dense.out_features * (2 if widens else 1)
    return float(encoder.num_hidden_layers * (8 * hidden**2 + 6 * hidden * width) + projection)


def blocks_from(model: ColbertConfig, platform: str, attention: str) -> int:
    """From how many tokens on local layers leave out keys that are too far away.

    Args:
      model: the model's shape.
      platform: "cpu", "gpu" or "tpu".
      attention: `config.model.attention`.
    """
    if platform == "tpu" and attention == "auto":
        return SPLASH_FROM
    return BANDED_FROM[platform] * (model.encoder.local_attention // 2)


def logits_of(model: ColbertConfig, length: int, in_blocks: bool) -> float:
    """Pairs of tokens that all layers together compute a logit for, in a text of a length.

    Args:
      model: the model's shape.
      length: tokens of the text.
      in_blocks: whether local layers compute three blocks of keys for a block of queries, or all
        pairs, and mask them.
    """
    encoder, reach = model.encoder, model.encoder.local_attention // 2
    everywhere = len([i for i in range(encoder.num_hidden_layers) if encoder.is_global(i)])
    seen = min(3 * reach, length) if in_blocks else length
    return float(length * (everywhere * length + (encoder.num_hidden_layers - everywhere) * seen))


def forward_flops(model: ColbertConfig, texts: int, length: int, in_blocks: bool) -> float:
    """FLOPs of the encoder's forward pass over `ids[texts, length]` as it is computed."""
    logits = 4.0 * model.encoder.hidden_size * logits_of(model, length, in_blocks)
    return texts * (length * token_flops(model) + logits)


def recomputed_flops(
    model: ColbertConfig,
    texts: int,
    length: int,
    settings: Mapping[str, Any],
    lengths: int,
    in_blocks: bool,
) -> float:
    """FLOPs that the backward pass of an encoder spends on its forward pass, by `remat`."""
    if settings["remat"] == "none":
        return 0.0
    # Of a layer, the logits: all other products are kept.
    again = texts * 2.0 * model.encoder.hidden_size * logits_of(model, length, in_blocks)
    in_parts = 0 < settings["micro_batch"] < texts or lengths > 1
    if settings["remat"] == "full" and in_parts:
        again += forward_flops(model, texts, length, in_blocks)
    return again


@functools.cache
def parameter_count(model: ColbertConfig) -> int:
    """Numbers in all parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(model)))


def encoder_work(
    model: ColbertConfig,
    texts: int,
    length: int,
    settings: Mapping[str, Any],
    lengths: int = 1,
    platform: str = "cpu",
) -> Work:
    """Forward and backward pass of the encoder over one device's texts, at full length.

    The backward pass takes twice the forward pass's FLOPs: each product has two gradients.

    Bytes, an estimate: a layer's arrays are written once and read once in the forward pass, and
    twice as much happens in the backward pass. For each token these are qkv, rotated queries and
    keys, attended, out, residuals and norms (11 E), gate, up and their product (3 F), and, where
    they do not stay on the chip, logits in float32 and weights. Parameters are read (float32) by
    each pass over each micro-batch, and where there are several, the sum of gradients is read and
    written and the new part written.

    Args:
      model: the model's shape.
      texts: of this device.
      length: tokens of a text.
      settings: `config.model`.
      lengths: static lengths that texts are encoded in.
      platform: "cpu", "gpu" or "tpu": what computes attention, and whether logits stay on the chip.
    """
    encoder, attention = model.encoder, settings["attention"]
    in_blocks = length >= blocks_from(model, platform, attention)
    if platform == "cpu":
        on_chip = length >= PARTS_FROM
    else:
        on_chip = attention == "auto" and (platform == "gpu" or length >= SPLASH_FROM)
    forward = forward_flops(model, texts, length, in_blocks)
    again = recomputed_flops(model, texts, length, settings, lengths, in_blocks)
    passes = 3 + (1 if again >= forward else 0)
    item = jnp.dtype(settings["dtype"]).itemsize
    values = 11 * encoder.hidden_size + 3 * encoder.intermediate_size
    logits = 0.0 if on_chip else encoder.num_attention_heads * logits_of(model, length, in_blocks)
    each = encoder.num_hidden_layers * length * values * item + logits * (4 + item)
    activations = texts * 2.0 * each * passes
    parts = math.ceil(texts / min(settings["micro_batch"] or texts, texts))
    table = encoder.vocab_size * encoder.hidden_size  # a text reads few of its rows
    products = 4.0 * (parameter_count(model) - table)
    gradients = 4.0 * parameter_count(model) * (3 if parts > 1 else 1)
    weights = parts * ((passes - 1) * products + gradients)
    return Work(3 * forward + again, activations + weights)


def maxsim_work(
    queries: tuple[int, int, int], documents: tuple[int, int, int], kept: bool, platform: str
) -> Work:
    """MaxSim of all pairs, forward and backward.

    The forward pass takes 2 Q N S T D FLOPs. The gradient needs only the winners: 4 Q N S D. On
    accelerators it is two products with one-hot winners, 2 x 2 Q N S T D, and where winners are not
    kept, they are found again by the forward pass's product.

    Bytes, an estimate: similarities stay on the chip (XLA fuses the maximum into the product), so
    that each tile moves its queries and documents, their float32 gradients, and its winners. The
    kernels for TPU move one side once, and the other for each block of the first.

    Args:
      queries: Q, S, D.
      documents: N, T, D; those that the queries meet.
      kept: whether winners are kept for the backward pass.
      platform: "cpu", or "gpu" and "tpu", where gradients are products of matrices.
    """
    (count, tokens, dim), (total, length, _) = queries, documents
    forward = 2.0 * count * total * tokens * length * dim
    sparse = 4.0 * count * total * tokens * dim
    backward = sparse if platform == "cpu" else 2 * forward
    again = 0 if kept else 1
    hardware = (1 + again) * forward + backward
    if platform == "tpu":
        return Work(
            hardware, maxsim_tpu.moved_bytes(queries, documents, kept), score_flops=hardware
        )
    pairs = max(1, TILE_SIMILARITIES["tpu"] // (tokens * length))
    across = min(math.isqrt(pairs), count) or 1
    per_tile = across * tokens * dim + math.ceil(pairs / across) * length * dim
    tiles = count * total / pairs
    moved = tiles * per_tile * (2 * (2 + again) + 8) + 3.0 * count * tokens * total
    return Work(hardware, moved, score_flops=hardware)


def candidates_work(queries: tuple[int, int, int], documents: tuple[int, int, int]) -> Work:
    """MaxSim of queries with their own candidates; JAX differentiates it by two dense products.

    Similarities in float32 are written and read in both passes.

    Args:
      queries: Q, S, D.
      documents: C, T, D, for each query.
    """
    (count, tokens, dim), (total, length, _) = queries, documents
    forward = 2.0 * count * total * tokens * length * dim
    return Work(3 * forward, 16.0 * count * total * tokens * length)


def optimizer_work(model: ColbertConfig, parameter_shards: int) -> Work:
    """Adam in float32: reads parameter, gradient and two moments, writes all but the gradient."""
    return Work(0.0, 7 * 4.0 * parameter_count(model) / parameter_shards)


def step_work(
    config: Mapping[str, Any], model: ColbertConfig, mesh: Mapping[str, int], platform: str
) -> Work:
    """The work of one chip in a training step, documents of full length assumed.

    Over `tensor` the encoder is split and MaxSim repeated.

    Args:
      config: the run's, as plain values.
      model: the model's shape.
      mesh: sizes of `data`, `fsdp` and `tensor`.
      platform: "cpu", "gpu" or "tpu".
    """
    settings, loss = config["model"], config["loss"]
    shards, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
    queries = config["input"]["batch_size"] // shards
    documents = queries * config["input"]["max_documents"]
    short, long, dim = settings["query_length"], settings["document_length"], model.embedding_size
    query_lengths = 1 if settings["do_query_expansion"] else settings["lengths"]
    encoder = encoder_work(model, queries, short, settings, query_lengths, platform)
    encoder += encoder_work(model, documents, long, settings, settings["lengths"], platform)
    encoder = Work(*(value / tensor for value in dataclasses.astuple(encoder)))
    if loss["kind"] == "contrastive":
        met = documents * shards
        item = 1 if long <= 255 else 2
        kept = queries * short * met * item <= KEPT_WINNERS
        kept = kept and (loss["exchange"] == "gather" or shards == 1)
        score = maxsim_work((queries, short, dim), (met, long, dim), kept, platform)
    else:
        candidates = config["input"]["max_documents"]
        score = candidates_work((queries, short, dim), (candidates, long, dim))
    work = encoder + score + optimizer_work(model, mesh["fsdp"] * tensor)
    full = np.full(queries * shards, short), np.full((queries * shards, documents // queries), long)
    asked = float(model_flops(model, loss["kind"], *full)) / (shards * tensor)
    return dataclasses.replace(work, model_flops=asked)


def step_traffic(
    config: Mapping[str, Any], model: ColbertConfig, mesh: Mapping[str, int]
) -> dict[str, float]:
    """Bytes that one chip sends in a step, by kind and from shapes; for `tensor` of 1.

    Documents go round in the arithmetic's dtype and their gradient comes back in float32; the
    gradient of the parameters is summed in float32. With "ring" both travel a step at a time, and
    the documents twice: the backward pass meets them again. With `fsdp` parameters are gathered and
    their gradient is scattered along it. Masks and metrics are left out.

    Args:
      config: the run's, as plain values.
      model: the model's shape.
      mesh: sizes of `data`, `fsdp` and `tensor`.
    """
    settings, loss = config["model"], config["loss"]
    data, fsdp = mesh["data"], mesh["fsdp"]
    shards = data * fsdp
    documents = config["input"]["batch_size"] * config["input"]["max_documents"]
    values = float(documents * settings["document_length"] * model.embedding_size)
    item = jnp.dtype(settings["dtype"]).itemsize
    share, others = values / shards, (shards - 1) / shards
    parameters = 4.0 * parameter_count(model)
    sent = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0, "collective-permute": 0.0}
    if loss["kind"] == "contrastive" and shards > 1 and loss["exchange"] == "ring":
        sent["collective-permute"] = share * (2 * shards * item + (shards + 1) * 4)
    elif loss["kind"] == "contrastive" and shards > 1:
        sent["all-gather"] += values * item * others
        sent["reduce-scatter"] += values * 4 * others
    sent["all-gather"] += parameters * (fsdp - 1) / fsdp
    sent["reduce-scatter"] += parameters * (fsdp - 1) / fsdp
    sent["all-reduce"] += 2 * parameters / fsdp * (data - 1) / data
    return sent


def network_bandwidth(chip: Chip, extents: Sequence[int]) -> float:
    """Bytes/s that a chip can send while all do the same, by the shape of the slice.

    Each dimension has two links a chip. They form a ring where the dimension wraps around (v5e and
    v6e: at 16; v4 and v5p: at multiples of 4, in slices of at least 4 x 4 x 4), and a line
    otherwise, whose ends have but one.

    Args:
      chip: its kind.
      extents: chips along each dimension of the slice.
    """
    link = link_bandwidth(chip)
    if chip.dimensions == 2:
        wraps = [extent == 16 for extent in extents]
    else:
        whole = len(extents) == 3 and all(extent % 4 == 0 for extent in extents)
        wraps = [whole] * len(extents)
    links = sum(
        (2 if wrap else 1) for extent, wrap in zip(extents, wraps, strict=True) if extent > 1
    )
    return link * max(links, 1)


def link_bandwidth(chip: Chip) -> float:
    """Bytes/s over one link in one direction: what a handover to a neighbour can use."""
    return chip.ici_bandwidth / (2 * chip.dimensions)


def roofline(work: Work, sent: Mapping[str, float], chip: Chip, extents: Sequence[int]) -> Roofline:
    """Seconds of a step at the chip's peaks.

    A float32 product counts as one bfloat16 pass, which is what TPUs make of it by default. Each
    handover of a ring is sent while the documents that came before are scored: only what takes
    longer than MaxSim counts. All other transfers are waited for.

    Args:
      work: of one chip.
      sent: bytes that it sends, by kind of collective.
      chip: its kind.
      extents: chips along each dimension of the slice.
    """
    network = network_bandwidth(chip, extents)
    handed_on = sent.get("collective-permute", 0.0)
    exposed = max(handed_on / link_bandwidth(chip) - work.score_flops / chip.flops, 0.0)
    seconds = exposed + (sum(sent.values()) - handed_on) / network
    return Roofline(
        work.hardware_flops / chip.flops, work.memory_bytes / chip.hbm_bandwidth, seconds
    )
