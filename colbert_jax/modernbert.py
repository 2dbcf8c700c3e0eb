"""ModernBERT (arXiv 2412.13663) in Flax NNX: token ids in, contextual vectors out.

Numbers follow Transformers' `ModernBertModel`. Shape letters: B batch, T token, E hidden size,
H heads, K head size, F intermediate size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from colbert_jax.attention import AttentionForm, attend
from colbert_jax.lookup import look_up
from colbert_jax.sharding import Axes, constrain, platform

# What the backward pass of a layer keeps where it computes the rest again: the results of matrix
# products, under the names that they have below. Attention's logits are not among them, which are
# little arithmetic and, a number for each pair of tokens, most of the memory.
PRODUCTS_KEPT = jax.checkpoint_policies.save_only_these_names("qkv", "attended", "out", "wi", "wo")


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """Shape and constants of an encoder; the defaults are ModernBERT-base's.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: E.
      intermediate_size: F, the width of the gated linear unit.
      num_hidden_layers: number of layers.
      num_attention_heads: H; the head size is E / H.
      global_attn_every_n_layers: layers 0, n, 2n, ... attend globally, the others locally.
      local_attention: width of the local window in tokens, half of it on either side.
      global_rope_theta: base of the rotary angles in global layers.
      local_rope_theta: base of the rotary angles in local layers.
      norm_eps: added to the variance in layer norms.
      max_position_embeddings: longest sequence in tokens that the weights were trained for.
      initializer_range: standard deviation of fresh weights.
      initializer_cutoff_factor: fresh weights are cut at this many standard deviations.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0

    @property
    def head_size(self) -> int:
        """K, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def is_global(self, layer: int) -> bool:
        """Whether this layer attends to the whole sequence."""
        return layer % self.global_attn_every_n_layers == 0

    @property
    def layer_groups(self) -> int:
        """How often the pattern (local, ..., local, global) repeats whole after layer 0."""
        return (self.num_hidden_layers - 1) // self.global_attn_every_n_layers


Angles = tuple[Float[Array, "T K"], Float[Array, "T K"]]  # cosines and sines of each token


def rotary_angles(length: int, head_size: int, theta: float) -> Angles:
    """Cosines and sines of the rotary position embedding, in float32 (arXiv 2104.09864).

    Constants of the program: XLA for CPU would put what computes them into each operation that
    rotates, and find them again for every text and head.
    """
    frequencies = np.float32(theta) ** (-np.arange(0, head_size, 2, dtype=np.float32) / head_size)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    angles = np.concatenate([angles, angles], axis=-1)
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def rotate(
    x: Float[Array, "B T H K"], cos: Float[Array, "T K"], sin: Float[Array, "T K"]
) -> Float[Array, "B T H K"]:
    """Turns each head by its position's angles, pairing element k with element k + K/2."""
    if platform() == "tpu":
        turned = _turn_by_product(x)
    else:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos[:, None] + turned * sin[:, None]).astype(x.dtype)


def _turn_by_product(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """The halves of each head swapped, the first negated, in float32: exact, by a matrix of signs.

    Halves of 32 elements lie across the lanes of a TPU, where to move them costs more than a
    product: by XLA's own estimate for v5e, attention to 187 tokens takes 3.3 million cycles forward
    with slices, and 2.3 with this.
    """
    half = x.shape[-1] // 2
    signs = np.kron(np.array([[0, 1], [-1, 0]]), np.eye(half))
    return jnp.einsum(
        "bthk,kj->bthj",
        x,
        jnp.asarray(signs, x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def project(x: Float[Array, "B T E"], weight: Float[Array, "E *out"]) -> Float[Array, "B T *out"]:
    """`x` times a weight cast to its dtype, as one product of two matrices.

    Written as an einsum over batch and token, the weight's gradient contracts two axes at once,
    which XLA's CPU backend does at half the speed.
    """
    flat = x.reshape(-1, x.shape[-1]) @ weight.reshape(weight.shape[0], -1).astype(x.dtype)
    return flat.reshape(*x.shape[:-1], *weight.shape[1:])


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU (arXiv 1606.08415), computed in float32 as PyTorch does.

    `jax.nn.gelu` takes erfc, which is more exact far below 0, where the result is next to nothing,
    and twice as much arithmetic.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


def init_weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], std: float, cutoff: float, axes: Axes
) -> nnx.Param:
    """A fresh float32 parameter from a normal cut at `cutoff` standard deviations."""
    values = jax.random.truncated_normal(rngs.params(), -cutoff, cutoff, shape, jnp.float32)
    return nnx.Param(values * std, axes=axes)


class LayerNorm(nnx.Module):
    """Layer norm with a scale and no bias, computed in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Normalises the last axis."""
        y = x.astype(jnp.float32)
        # Both sums in one pass; subtracting the mean first would take another over the array.
        mean = y.mean(axis=-1, keepdims=True)
        variance = jnp.maximum(jnp.square(y).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0)
        return ((y - mean) * jax.lax.rsqrt(variance + self.eps) * self.scale[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with rotary positions and no biases."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_size
        std, cutoff = config.initializer_range, config.initializer_cutoff_factor
        self.qkv = init_weight(
            rngs, (hidden, heads, 3, size), std, cutoff, ("embed", "heads", None, None)
        )
        # Weights that write to the residual stream start smaller the deeper the network is.
        out_std = std / (2.0 * config.num_hidden_layers) ** 0.5
        self.out = init_weight(
            rngs, (heads, size, hidden), out_std, cutoff, ("heads", None, "embed")
        )

    def __call__(
        self,
        x: Float[Array, "B T E"],
        attention_mask: Bool[Array, "B T"],
        angles: Angles,
        reach: int | None,
        attention: AttentionForm,
    ) -> Float[Array, "B T E"]:
        """Lets every token gather from those that it may look at, as `attend` has it."""
        # Heads are the outermost of the merged axes, so that splitting them over `tensor` survives
        # the reshape.
        qkv = self.qkv[...]
        query, key, value = (checkpoint_name(project(x, qkv[:, :, i]), "qkv") for i in range(3))
        query, key = rotate(query, *angles), rotate(key, *angles)
        gathered = attend(query, key, value, attention_mask, reach, attention)
        gathered = checkpoint_name(gathered.reshape(*x.shape[:2], -1), "attended")
        out = self.out[...]
        return checkpoint_name(project(gathered, out.reshape(-1, out.shape[-1])), "out")


class GatedMlp(nnx.Module):
    """GeGLU (arXiv 2002.05202) with the exact GELU on the first half."""

    def __init__(self, config: ModernBertConfig, rngs: nnx.Rngs):
        hidden, width = config.hidden_size, config.intermediate_size
        std, cutoff = config.initializer_range, config.initializer_cutoff_factor
        self.wi = init_weight(rngs, (hidden, 2, width), std, cutoff, ("embed", None, "mlp"))
        out_std = std / (2.0 * config.num_hidden_layers) ** 0.5
        self.wo = init_weight(rngs, (width, hidden), out_std, cutoff, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Transforms each token on its own."""
        wi = self.wi[...]
        gate, up = (checkpoint_name(project(x, wi[:, half]), "wi") for half in (0, 1))
        gated = gelu(gate) * up
        return checkpoint_name(project(gated, self.wo[...]), "wo")


class Layer(nnx.Module):
    """Attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: ModernBertConfig, index: int, rngs: nnx.Rngs):
        # The embedding norm comes right before layer 0, whose own norm is the identity.
        norm: Callable = lambda: LayerNorm(config.hidden_size, config.norm_eps)  # noqa: E731
        self.attn_norm = norm() if index > 0 else None
        self.attn = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = GatedMlp(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        attention_mask: Bool[Array, "B T"],
        angles: Angles,
        reach: int | None,
        attention: AttentionForm,
    ) -> Float[Array, "B T E"]:
        """Refines every token's vector once."""
        with jax.named_scope("attention_global" if reach is None else "attention_local"):
            normed = x if self.attn_norm is None else self.attn_norm(x)
            x = x + self.attn(normed, attention_mask, angles, reach, attention)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


class ModernBert(nnx.Module):
    """The encoder: embedding, norm, layers, norm.

    With `scan_layers`, the layers after layer 0 (which alone has no norm of its own) are one group
    (local, ..., local, global) that `jax.lax.scan` repeats over parameters that `stack_layers` has
    stacked; those that make no whole group follow. A group is compiled once. With `keep_products`,
    the backward pass finds all but a layer's matrix products again from its input. `attention` is
    as in `attend`.
    """

    def __init__(
        self,
        config: ModernBertConfig,
        scan_layers: bool = False,
        keep_products: bool = False,
        attention: AttentionForm = "auto",
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.keep_products = keep_products
        self.attention = attention
        self.tok_embeddings = init_weight(
            rngs,
            (config.vocab_size, config.hidden_size),
            config.initializer_range,
            config.initializer_cutoff_factor,
            ("vocab", "embed"),
        )
        self.embedding_norm = LayerNorm(config.hidden_size, config.norm_eps)
        period, groups = config.global_attn_every_n_layers, config.layer_groups
        grouped = groups * period if scan_layers else 0
        self.layers = nnx.List(
            [Layer(config, index, rngs) for index in range(config.num_hidden_layers - grouped)]
        )
        self.group = nnx.List([Layer(config, 1, rngs) for _ in range(period)]) if grouped else None
        self.final_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        dtype: jnp.dtype = jnp.float32,
    ) -> Float[Array, "B T E"]:
        """Encodes token ids.

        Args:
          input_ids: `input_ids[batch, token]`, int32.
          attention_mask: `attention_mask[batch, token]`, True where a token may be looked at.
          dtype: compute dtype; parameters stay float32 and are cast where they are used.

        Returns:
          `hidden[batch, token, hidden_size]` in `dtype`, also at masked positions.
        """
        config = self.config
        length = input_ids.shape[1]
        global_angles = rotary_angles(length, config.head_size, config.global_rope_theta)
        local_angles = rotary_angles(length, config.head_size, config.local_rope_theta)
        with jax.named_scope("embedding"):
            x = look_up(self.tok_embeddings[...], input_ids).astype(dtype)
            x = self.embedding_norm(constrain(x, "batch", "seq", None))

        def apply(layer: Layer, index: int, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
            everywhere = config.is_global(index)
            reach = None if everywhere else config.local_attention // 2
            angles = global_angles if everywhere else local_angles

            graphdef, params = nnx.split(layer)
            return _refine(
                params,
                x,
                attention_mask,
                angles,
                graphdef=graphdef,
                reach=reach,
                attention=self.attention,
                keep_products=self.keep_products,
            )

        x = apply(self.layers[0], 0, x)
        grouped = 0
        if self.group is not None:
            graphdef: Any
            graphdef, stacked = nnx.split(self.group)
            grouped = len(self.group) * config.layer_groups

            def apply_group(x, params):
                layers: Any = nnx.merge(graphdef, params)
                for index, layer in enumerate(layers, start=1):
                    x = apply(layer, index, x)
                return x, None

            x, _ = jax.lax.scan(apply_group, x, stacked)
        for index, layer in enumerate(self.layers[1:], start=1 + grouped):
            x = apply(layer, index, x)
        return self.final_norm(x)


@functools.partial(jax.jit, static_argnames=("graphdef", "reach", "attention", "keep_products"))
def _refine(
    params: nnx.State,
    x: Float[Array, "B T E"],
    attention_mask: Bool[Array, "B T"],
    angles: Angles,
    *,
    graphdef: nnx.GraphDef[Layer],
    reach: int | None,
    attention: AttentionForm,
    keep_products: bool,
) -> Float[Array, "B T E"]:
    """Applies a layer; a function of its own, so that JAX traces layers that are alike once.

    They are traced and differentiated once for the forward pass, for the one that the backward pass
    makes again, and for all layers of a kind.
    """

    def refine(params: nnx.State, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        x = nnx.merge(graphdef, params)(x, attention_mask, angles, reach, attention)
        return constrain(x, "batch", "seq", None)

    if keep_products:
        # Inside the loop over layers: around it, all would be found again at once.
        refine = jax.checkpoint(refine, policy=PRODUCTS_KEPT)
    return refine(params, x)


def stack_layers(config: ModernBertConfig, params: dict[Any, Any]) -> dict[Any, Any]:
    """An encoder's parameters as `ModernBert(config, scan_layers=True)` takes them.

    Args:
      config: the encoder's.
      params: with `params["layers"][index]` for every layer.

    Returns:
      The same with `layers` only for those outside whole groups, numbered from 0, and `group`: for
      each layer of a group, its arrays `x[group, ...]` stacked over the groups.
    """
    period, groups = config.global_attn_every_n_layers, config.layer_groups
    if not groups:
        return params
    layers = params["layers"]
    group = {
        place: jax.tree.map(
            lambda *x: jnp.stack(x), *(layers[1 + place + period * g] for g in range(groups))
        )
        for place in range(period)
    }
    outside = [0, *range(1 + period * groups, config.num_hidden_layers)]
    return params | {"layers": {i: layers[j] for i, j in enumerate(outside)}, "group": group}
