"""ColBERT (arXiv 2004.12832): an encoder, a projection, and unit-length token embeddings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from colbert_jax.attention import AttentionForm
from colbert_jax.modernbert import (
    ModernBert,
    ModernBertConfig,
    init_weight,
    project,
    stack_layers,
)

Params = dict[Any, Any]  # nested dict of arrays, named as the modules are; lists by number
Embed = Callable[[Params, Int[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T D"]]

ACTIVATIONS: dict[str, Callable] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """One layer of the projection, as PyLate's `Dense` has it.

    Attributes:
      in_features: width of its input.
      out_features: width of its output.
      use_bias: whether a bias is added.
      activation: a key of `ACTIVATIONS`.
      use_residual: whether the input is added to the output (through a matrix of its own where
        the widths differ).
    """

    in_features: int
    out_features: int = 128
    use_bias: bool = False
    activation: str = "identity"
    use_residual: bool = False


@dataclasses.dataclass(frozen=True)
class ColbertConfig:
    """An encoder and the projection layers behind it."""

    encoder: ModernBertConfig
    projection: tuple[DenseConfig, ...]

    @property
    def embedding_size(self) -> int:
        """D, the width of a token embedding."""
        return self.projection[-1].out_features


class Dense(nnx.Module):
    """`activation(x W + b)`, plus the input where the layer is residual."""

    def __init__(self, config: DenseConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.in_features, config.out_features)
        # The standard deviation of PyTorch's default for a linear layer, which PyLate leaves as is.
        std = (3.0 * config.in_features) ** -0.5
        self.kernel = init_weight(rngs, shape, std, 2.0, ("embed", "proj"))
        bias = nnx.Param(jnp.zeros((config.out_features,), jnp.float32), axes=("proj",))
        self.bias = bias if config.use_bias else None
        widens = config.use_residual and config.in_features != config.out_features
        self.residual = init_weight(rngs, shape, std, 2.0, ("embed", "proj")) if widens else None

    def __call__(self, x: Float[Array, "B T _"]) -> Float[Array, "B T _"]:
        """Projects every token."""
        y = project(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        y = ACTIVATIONS[self.config.activation](y)
        if self.config.use_residual:
            y = y + (x if self.residual is None else project(x, self.residual[...]))
        return y


def normalize(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Scales vectors to length 1 in float32; a vector shorter than 1e-12 is left short."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


class Colbert(nnx.Module):
    """Token ids to token embeddings; queries and documents go the same way."""

    def __init__(
        self,
        config: ColbertConfig,
        scan_layers: bool = False,
        keep_products: bool = False,
        attention: AttentionForm = "auto",
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder = ModernBert(config.encoder, scan_layers, keep_products, attention, rngs=rngs)
        self.projection = nnx.List([Dense(dense, rngs=rngs) for dense in config.projection])

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        dtype: jnp.dtype = jnp.float32,
    ) -> Float[Array, "B T D"]:
        """Embeds every token.

        Args:
          input_ids: `input_ids[batch, token]`, int32.
          attention_mask: `attention_mask[batch, token]`, True where a token may be looked at
            (not the same as which tokens are scored).
          dtype: compute dtype of encoder and projection.

        Returns:
          `token_embeddings[batch, token, dim]`, float32 and of length 1, at masked positions too.
        """
        x = self.encoder(input_ids, attention_mask, dtype)
        with jax.named_scope("projection"):
            for dense in self.projection:
                x = dense(x)
            return normalize(x)


def init_params(config: ColbertConfig, seed: int | jax.Array) -> Params:
    """Draws fresh float32 parameters from a seed; traceable, so that they can be born sharded."""
    model = Colbert(config, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _split(config: ColbertConfig, *settings: Any) -> tuple[Any, Any]:
    def make() -> Colbert:
        return Colbert(config, *settings, rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(make))


def param_axes(config: ColbertConfig) -> Params:
    """The tree of logical axis names, one tuple a parameter, in the structure of the parameters."""
    variables = _split(config)[1]
    axes = jax.tree.map(
        lambda v: v.get_metadata("axes"), variables, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    return nnx.to_pure_dict(axes)


def param_shapes(config: ColbertConfig) -> Params:
    """The tree of `jax.ShapeDtypeStruct` of the parameters; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, 0))


def scanned_params(config: ColbertConfig, params: Params) -> Params:
    """Parameters as a `make_embed(..., scan_layers=True)` takes them."""
    return params | {"encoder": stack_layers(config.encoder, params["encoder"])}


def make_embed(
    config: ColbertConfig,
    dtype: jnp.dtype | str = jnp.float32,
    scan_layers: bool = False,
    keep_products: bool = False,
    attention: AttentionForm = "auto",
) -> Embed:
    """Makes the pure function `embed(params, input_ids, attention_mask) -> token_embeddings`.

    The module tree is split here, once; what is jitted sees only pytrees, so that a step costs
    no Python time for module bookkeeping.

    Args:
      config: the model's.
      dtype: of the arithmetic; the embeddings are float32.
      scan_layers: whether layers are repeated by a loop, compiled once, and not one by one. The
        function then takes `scanned_params`.
      keep_products: whether the backward pass is handed only the matrix products of a layer and
        computes the rest of it again, or is handed everything.
      attention: as in `attend`: "auto" takes the backend's fused kernel, "xla" never does.
    """
    graphdef, _ = _split(config, scan_layers, keep_products, attention)
    dtype = jnp.dtype(dtype)

    def embed(
        params: Params, input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        return nnx.merge(graphdef, params)(input_ids, attention_mask, dtype)

    return embed
