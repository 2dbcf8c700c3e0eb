"""Attention of an encoder's layers: every text for itself, over all of it or inside a window.

One signature, `attend`, and one set of numbers, those of `_plain`; what computes them depends on
the backend and on the length. Shape letters: B batch, T token, H heads, K head size.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

from colbert_jax.sharding import on_each_device, platform

logger = logging.getLogger(__name__)

# What computes attention, to choose from in a config: "auto" is the fused kernel where the backend
# has one for the length, and plain XLA elsewhere; "xla" never uses a kernel.
ATTENTION = ("auto", "xla")


class ByReach(NamedTuple):
    """Names out of `GPU_FORMS` for the two kinds of layers.

    Attributes:
      everywhere: for layers that look at the whole text, or have a window that holds it.
      local: for layers with a window.
    """

    everywhere: str
    local: str


AttentionForm = str | ByReach  # a name counts for all layers

# From this many window reaches on, XLA computes local layers in blocks. On CPU measured, forward
# and backward; on TPU by XLA's own estimate for v5e, by which blocks cost more than they save
# before. docs/performance.md has the figures.
BANDED_FROM = {"cpu": 6, "gpu": 4, "tpu": 16}

# From this many tokens on, CPUs compute a few texts at a time, of about so many logits (3 MiB),
# which then stay in their caches from one operation to the next. Both measured.
PARTS_FROM = 128
LOGITS_OF_PART = 3 * 2**18

# From this many tokens on, TPUs get the kernel. Below, by the same estimate, moving heads to where
# it wants them and filling up its tiles costs more than the logits that it spares memory.
SPLASH_FROM = 512
LANES = 128
SPLASH_BLOCK = 512  # tokens of a tile, at most; of local layers half of it

Form = Callable[..., Float[Array, "B T H K"]]


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H K"],
    attention_mask: Bool[Array, "B T"],
    reach: int | None = None,
    attention: AttentionForm = "auto",
) -> Float[Array, "B T H K"]:
    """Softmax attention, normalised in float32 (arXiv 1706.03762, equation 1).

    A token with nothing to look at gets 0, as PyTorch's `scaled_dot_product_attention` has it. Such
    tokens are padding or, in queries longer than the window's reach, expansion tokens, which score.

    Args:
      query: `query[batch, token, head, head_size]`, rotated, not scaled.
      key: likewise.
      value: likewise.
      attention_mask: `attention_mask[batch, token]`, True where a token may be looked at.
      reach: tokens on either side that a token may look at; None is all of them.
      attention: one of `ATTENTION`, or what `forms.py` has chosen.

    Returns:
      `gathered[batch, token, head, head_size]` in the dtype of `value`.
    """
    reach = needed_reach(query.shape[1], reach)
    if isinstance(attention, ByReach):
        attention = attention.everywhere if reach is None else attention.local
    form = _named_form(attention, query.shape[1], query.dtype, reach)
    if form is None and platform() == "cpu" and query.shape[1] >= PARTS_FROM:
        form = _in_parts
    if form is None:
        gathered = _by_xla(query, key, value, attention_mask, reach)
    else:
        # Neither a kernel nor a loop over texts is split by the compiler: each device runs its own,
        # on its texts and heads.
        axes = ("batch", "seq", "heads", None)
        gathered = on_each_device(
            functools.partial(form, reach=reach), (axes, axes, axes, ("batch", "seq")), axes
        )(query, key, value, attention_mask)
    return jnp.where(_sees_any(attention_mask, reach)[:, :, None, None], gathered, 0)


def needed_reach(length: int, reach: int | None) -> int | None:
    """The reach of a window over texts of a length; None where it holds the whole text."""
    return None if reach is None or length <= reach + 1 else reach


def _sees_any(attention_mask: Bool[Array, "B T"], reach: int | None) -> Bool[Array, "B #T"]:
    """Whether there is anything that a token may look at."""
    if reach is None:
        return attention_mask.any(axis=1, keepdims=True)
    length = attention_mask.shape[1]
    up_to = jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32)
    padded = jnp.pad(jnp.pad(up_to, ((0, 0), (0, reach)), "edge"), ((0, 0), (reach + 1, 0)))
    return padded[:, 2 * reach + 1 :] > padded[:, :length]


def _visible(attention_mask, reach):
    """Who may look at whom, `[batch, 1, #token, token]`; both ends of the window are included."""
    mask = attention_mask[:, None, None, :]
    if reach is None:
        return mask
    position = jnp.arange(attention_mask.shape[1])
    return mask & (jnp.abs(position[:, None] - position) <= reach)


def _by_xla(query, key, value, attention_mask, reach):
    in_blocks = reach and query.shape[1] >= BANDED_FROM[platform()] * reach
    form = _banded if in_blocks else _plain
    return form(query, key, value, attention_mask, reach)


def _in_parts(query, key, value, attention_mask, reach):
    """As `_by_xla`, a few texts after the other, backward too.

    Left to XLA, each operation on the logits of all texts, of which a softmax has several, fetches
    them from memory and writes them there.
    """
    count, length, heads, _ = query.shape
    most = max(round(LOGITS_OF_PART / (heads * length**2)), 1)
    size = next(size for size in range(min(most, count), 0, -1) if count % size == 0)
    arrays = (query, key, value, attention_mask)
    parts = tuple(x.reshape(count // size, size, *x.shape[1:]) for x in arrays)

    @jax.checkpoint  # the backward pass is handed no logits either: it finds those of a part again
    def attend_part(part):
        query, key, value, attention_mask = part
        return _by_xla(query, key, value, attention_mask, reach)

    return jax.lax.map(attend_part, parts).reshape(query.shape)


def _plain(query, key, value, attention_mask, reach):
    """All pairs of tokens: the definition, and the fastest where texts are short."""
    mask = _visible(attention_mask, reach)
    # Heads before tokens: both products are then plain batched matrix products, a third faster
    # on CPU than the same einsum over strided heads.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bhqk,bhtk->bhqt", query * scale, key, preferred_element_type=jnp.float32)
    weights = _softmax(logits, mask).astype(value.dtype)
    return jnp.swapaxes(jnp.einsum("bhqt,bhtk->bhqk", weights, value), 1, 2)


def _banded(query, key, value, attention_mask, reach):
    """Blocks of queries, each with its own block of keys and the two beside it: linear in length.

    As in Longformer (arXiv 2004.05150, appendix A), with blocks as long as the window reaches.
    """
    length = query.shape[1]

    def blocks(x):
        return x.reshape(x.shape[0], -1, reach, *x.shape[2:])

    def with_neighbours(x):
        x = jnp.pad(blocks(x), ((0, 0), (1, 1), *((0, 0) for _ in x.shape[1:])))
        return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

    query, key, value, seen = _pad_tokens(reach, query, key, value, attention_mask)
    # A query at place i of its block sees the keys at places i to i + 2 reach of three blocks.
    offset = jnp.arange(3 * reach) - jnp.arange(reach)[:, None]
    near = (offset >= 0) & (offset <= 2 * reach)
    mask = near & with_neighbours(seen)[:, :, None, None, :]
    query, key, value = blocks(query), with_neighbours(key), with_neighbours(value)
    query, key, value = (jnp.swapaxes(x, 2, 3) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bnhqk,bnhtk->bnhqt", query * scale, key, preferred_element_type="float32")
    weights = _softmax(logits, mask).astype(value.dtype)
    gathered = jnp.swapaxes(jnp.einsum("bnhqt,bnhtk->bnhqk", weights, value), 2, 3)
    return gathered.reshape(gathered.shape[0], -1, *gathered.shape[3:])[:, :length]


def _softmax(logits, mask):
    """Weights in float32."""
    # A finite lowest logit keeps NaN from rows that see nothing, which would poison the gradient of
    # every parameter.
    return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)


def _named_form(name: str, length: int, dtype: jnp.dtype, reach: int | None) -> Form | None:
    """A form by its name in `ATTENTION` or `GPU_FORMS`; None for plain XLA."""
    if name == "auto":
        return _best_form(length, dtype, reach)
    return GPU_FORMS[name]


def _best_form(length: int, dtype: jnp.dtype, reach: int | None) -> Form | None:
    """The backend's fused kernel for texts of a length; None where plain XLA does as well."""
    kind = platform()
    if kind == "tpu" and length >= SPLASH_FROM:
        return _splash
    if kind == "gpu":
        return _gpu_form(jnp.dtype(dtype).itemsize == 2)
    return None


@functools.cache
def _gpu_form(half: bool) -> Form | None:
    """The fused kernel for GPU where none was tried; why it is not the first is logged once."""
    if importlib.util.find_spec("tokamax") is not None:
        return _tokamax_if_it_can
    if half:
        logger.info("attention by cuDNN: for faster local layers, pip install tokamax")
        return _cudnn
    logger.info(
        "attention by XLA, since cuDNN takes no float32: pip install tokamax, or use "
        "config.model.dtype=bfloat16"
    )
    return None


def _tokamax(query, key, value, attention_mask, reach):
    """The flash attention of tokamax, which skips keys outside of the window."""
    import tokamax  # here, since only GPUs need it

    # Where absl has not read the command line, it does, and ends over flags that it does not know.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return tokamax.dot_product_attention(
        query,
        key,
        value,
        mask=attention_mask[:, None, None, :],
        local_window_size=reach,
        implementation=("mosaic", "triton"),
    )


def _tokamax_if_it_can(query, key, value, attention_mask, reach):
    """`_tokamax`, or plain attention on a GPU that it has no kernel for."""
    try:
        return _tokamax(query, key, value, attention_mask, reach)
    except (NotImplementedError, ExceptionGroup) as error:
        logger.info("attention by XLA: tokamax has no kernel for it here (%s)", error)
        return _plain(query, key, value, attention_mask, reach)


def _cudnn(query, key, value, attention_mask, reach):
    """The flash attention of cuDNN, which takes masks only where the number of tokens is even.

    The window goes in as a mask: JAX hands cuDNN no window that reaches to the right (jax-ml/jax
    issue 39576).
    """
    length = query.shape[1]
    query, key, value, attention_mask = _pad_tokens(2, query, key, value, attention_mask)
    mask = jnp.broadcast_to(
        _visible(attention_mask, reach), (len(query), 1, query.shape[1], query.shape[1])
    )
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    return attended[:, :length]


# What a GPU may compute attention by; `forms.py` finds out which is best. None is plain XLA.
GPU_FORMS: dict[str, Form | None] = {"xla": None, "tokamax": _tokamax, "cudnn": _cudnn}


def _pad_tokens(multiple, *arrays):
    """Arrays `x[batch, token, ...]` with zeros up to a multiple of tokens."""
    missing = -arrays[0].shape[1] % multiple
    return [jnp.pad(x, ((0, 0), (0, missing), *((0, 0) for _ in x.shape[2:]))) for x in arrays]


def _splash(query, key, value, attention_mask, reach, interpret=False):
    """JAX's splash attention, a Pallas kernel for TPU that skips tiles outside of the window."""
    length, heads = query.shape[1:3]
    scale = query.shape[-1] ** -0.5
    query, key, value, seen = _pad_tokens(LANES, query * scale, key, value, attention_mask)
    # Everybody looks, padding and expansion tokens too; only segment 1 is looked at.
    segments = splash.SegmentIds(jnp.ones(seen.shape, jnp.int32), seen.astype(jnp.int32))
    kernel = _splash_kernel(seen.shape[1], heads, reach, interpret)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    gathered = jax.vmap(kernel)(*heads_first, segments)
    return jnp.swapaxes(gathered, 1, 2)[:, :length]


def _splash_kernel(length, heads, reach, interpret):
    shape = (length, length)
    mask: splash_mask.Mask = splash_mask.FullMask(shape)
    if reach is not None:
        mask = splash_mask.LocalMask(shape, (reach, reach), 0)
    most = SPLASH_BLOCK if reach is None else SPLASH_BLOCK // 2
    block = next(size for size in range(min(most, length), 0, -LANES) if length % size == 0)
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
