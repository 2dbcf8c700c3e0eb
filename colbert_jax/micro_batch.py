"""Encoding a batch a few texts at a time, short texts at short lengths, inside one program.

Embeddings of the whole batch are kept, an encoder's activations only of one micro-batch: GradCache
(arXiv 2101.06983) without its second program, and with the gradient of the whole batch. Texts are
sorted by length first, so that a micro-batch is padded to its own longest text and not to the
batch's. Shape letters: B texts of this device, P micro-batches, M texts of a micro-batch, T token,
D embedding size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from colbert_jax.colbert import Embed, Params

Tokens = dict[str, Array]  # input_ids[B, T] int32, attention_mask[B, T], scoring_mask[B, T] bool
Encode = Callable[..., tuple[Float[Array, "B T D"], Int[Array, ""]]]


def make_encode(
    embed: Embed,
    micro_batch: int = 0,
    lengths: int | Sequence[int] = 1,
    recompute: bool = True,
    dtype: jnp.dtype | str = jnp.float32,
) -> Encode:
    """Makes the function that embeds one device's share of a batch.

    Args:
      embed: parameters and tokens to token embeddings.
      micro_batch: texts that are encoded at a time; 0, or more than there are, encodes all at once.
        The last micro-batch is filled up with texts of one token.
      lengths: the static lengths that sorted texts are encoded in, or how many, which are then
        spread evenly; 1 encodes all at full length. Each is one more copy of the encoder in the
        program.
      recompute: whether the backward pass encodes each micro-batch again, or is handed the
        activations of all texts, with room for every length.
      dtype: of the embeddings that are kept; that of the encoder's arithmetic loses nothing
        that it had.

    Returns:
      `encode(params, tokens, axes=()) -> (token_embeddings, processed)`: `token_embeddings[B, T,
      D]` in the order of the texts, 0 beyond the length that a text was encoded in, and the number
      of tokens that the encoder has worked on, padding included. `axes` names the mesh axes that
      split the batch, where it runs inside a `shard_map`.
    """

    def encode(
        params: Params, tokens: Tokens, axes: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
        count, longest = tokens["input_ids"].shape
        size = min(micro_batch or count, count)
        tokens = jax.tree.map(lambda x: jnp.pad(x, ((0, -count % size), (0, 0))), tokens)
        ids, mask, used = tokens["input_ids"], tokens["attention_mask"], used_lengths(tokens)
        if isinstance(lengths, int):
            choices = static_lengths(longest, lengths)
        else:
            choices = tuple(sorted({min(length, longest) for length in lengths} | {longest}))
        order = jnp.argsort(used) if len(choices) > 1 else jnp.arange(len(used))
        longest_of_part = used[order].reshape(-1, size).max(axis=1)
        if axes:
            # All devices take the same length: they step together anyway, and where the model is
            # split, they must meet in the same collectives.
            longest_of_part = jax.lax.pmax(longest_of_part, axes)
        choice = jnp.searchsorted(jnp.asarray(choices), longest_of_part).astype(jnp.int32)

        encoders = [_at_length(embed, length, longest, dtype) for length in choices]
        parts = (ids[order].reshape(-1, size, longest), mask[order].reshape(-1, size, longest))
        if recompute and (size < count or len(choices) > 1):
            embedded = _recomputing(encoders)(params, *parts, choice)
        else:
            embedded = _keeping(encoders)(params, *parts, choice)
        embedded = embedded.reshape(len(used), longest, -1)
        if len(choices) > 1:
            embedded = _reorder(embedded, jnp.argsort(order), order)
        return embedded[:count], size * jnp.asarray(choices)[choice].sum()

    return encode


def static_lengths(longest: int, count: int) -> tuple[int, ...]:
    """Up to `count` lengths in tokens, evenly spread up to `longest`, multiples of 4 below it."""
    spread = (-(-longest * i // (4 * count)) * 4 for i in range(1, count + 1))
    return tuple(sorted({min(length, longest) for length in spread}))


def fit_lengths(sample: Sequence[int], longest: int, count: int) -> tuple[int, ...]:
    """The `count` lengths with the least padding for texts like those of a sample.

    Args:
      sample: lengths of texts in tokens, at most `longest`.
      longest: the length of the arrays, always the last of the result.
      count: how many at most.

    Returns:
      Lengths in tokens, rising, multiples of 4 but for the last.
    """
    ends = [*range(4, longest, 4), longest]
    below = np.searchsorted(np.sort(np.asarray(sample)), ends, side="right")  # texts that fit
    padded = np.asarray(ends) * below.astype(np.float64)  # tokens, with one length so far
    previous: list[np.ndarray] = []
    for _ in range(min(count, len(ends)) - 1):
        # cost[i, j]: the best up to ends[i], and ends[j] for the texts between the two.
        cost = padded[:, None] + np.asarray(ends) * (below[None, :] - below[:, None])
        cost = np.where(np.tri(len(ends), k=-1, dtype=bool).T, cost, np.inf)
        previous.append(np.where(padded <= cost.min(axis=0), -1, np.argmin(cost, axis=0)))
        padded = np.minimum(padded, cost.min(axis=0))
    chosen = [len(ends) - 1]
    for best in reversed(previous):
        if best[chosen[-1]] >= 0:
            chosen.append(int(best[chosen[-1]]))
    return tuple(ends[i] for i in reversed(chosen))


def used_lengths(tokens: Tokens) -> Int[Array, "*texts"]:
    """Tokens of each text up to the last that is looked at or scored, at least 1."""
    used = tokens["attention_mask"] | tokens["scoring_mask"]
    return jnp.where(used, jnp.arange(1, used.shape[-1] + 1), 1).max(axis=-1)


def _at_length(embed: Embed, length: int, longest: int, dtype: Any) -> Embed:
    """`embed` of the first `length` tokens, with zeros up to `longest`."""

    def encode(params, ids, mask):
        embedded = embed(params, ids[:, :length], mask[:, :length]).astype(dtype)
        return jnp.pad(embedded, ((0, 0), (0, longest - length), (0, 0)))

    return encode


def _keeping(encoders: list[Embed]) -> Callable:
    """Micro-batches in turn, differentiated by JAX, which keeps their activations."""

    def encode_parts(params, ids, mask, choice):
        def encode_part(part):
            ids, mask, choice = part
            return jax.lax.switch(choice, encoders, params, ids, mask)

        return jax.lax.map(encode_part, (ids, mask, choice))

    return encode_parts


def _recomputing(encoders: list[Embed]) -> Callable:
    """Micro-batches in turn, each encoded again in the backward pass.

    Written out instead of left to `jax.checkpoint`, which keeps the activations of every branch of
    a `switch` at once; here a micro-batch is encoded and differentiated inside its branch.
    """

    @jax.custom_vjp
    def encode_parts(params, ids, mask, choice):
        return _keeping(encoders)(params, ids, mask, choice)

    def forward(params, ids, mask, choice):
        return encode_parts(params, ids, mask, choice), (params, ids, mask, choice)

    def backward(residuals, cotangents):
        params, ids, mask, choice = residuals

        def gradient_of(encoder):
            def gradient(params, ids, mask, cotangent):
                return jax.vjp(lambda p: encoder(p, ids, mask), params)[1](cotangent)[0]

            return gradient

        gradients = [gradient_of(encoder) for encoder in encoders]

        def add_part(total, part):
            ids, mask, choice, cotangent = part
            gradient = jax.lax.switch(choice, gradients, params, ids, mask, cotangent)
            return jax.tree.map(jnp.add, total, gradient), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add_part, zeros, (ids, mask, choice, cotangents))
        return total, None, None, None

    encode_parts.defvjp(forward, backward)
    return encode_parts


@jax.custom_vjp
def _reorder(x: Array, order: Array, inverse: Array) -> Array:
    """`x[order]`, whose gradient is a gather too and not a scatter-add."""
    return x[order]


_reorder.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, cotangent: (cotangent[inverse], None, None),
)
