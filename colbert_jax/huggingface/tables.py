"""Tables that tie each tensor's name in a file to its place in our parameters, both ways."""

import dataclasses
from typing import Any

import numpy as np

from colbert_jax.colbert import DenseConfig, Params
from colbert_jax.modernbert import ModernBertConfig

EMBEDDINGS = ("encoder", "tok_embeddings")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor: its name and shape in a file, its path in our parameters, and our layout.

    The file's tensor reshaped to `factored` and transposed by `order` is ours.
    """

    name: str
    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    factored: tuple[int, ...]
    order: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A file's tensor in our layout, float32."""
        ours = tensor.reshape(self.factored).transpose(self.order)
        return np.ascontiguousarray(ours, dtype=np.float32)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array in the file's layout, float32."""
        theirs = array.transpose(np.argsort(self.order)).reshape(self.shape)
        return np.ascontiguousarray(theirs, dtype=np.float32)


def _vector(name: str, path: tuple[str | int, ...], size: int) -> Weight:
    return Weight(name, path, (size,), (size,), (0,))


def _transposed(name: str, path: tuple[str | int, ...], out: int, into: int) -> Weight:
    return Weight(name, path, (out, into), (out, into), (1, 0))


def weight_table(config: ModernBertConfig) -> list[Weight]:
    """Every tensor of an encoder (134 for ModernBERT-base), in the order of its layers."""
    hidden, width, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, size = config.num_attention_heads, config.head_size
    embeddings = "embeddings.tok_embeddings.weight"
    table = [
        Weight(embeddings, EMBEDDINGS, (vocab, hidden), (vocab, hidden), (0, 1)),
        _vector("embeddings.norm.weight", ("encoder", "embedding_norm", "scale"), hidden),
    ]
    for i in range(config.num_hidden_layers):
        name, path = f"layers.{i}", ("encoder", "layers", i)
        if i > 0:
            table.append(_vector(f"{name}.attn_norm.weight", (*path, "attn_norm", "scale"), hidden))
        table += [
            Weight(
                f"{name}.attn.Wqkv.weight",
                (*path, "attn", "qkv"),
                shape=(3 * hidden, hidden),
                factored=(3, heads, size, hidden),
                order=(3, 1, 0, 2),
            ),
            Weight(
                f"{name}.attn.Wo.weight",
                (*path, "attn", "out"),
                shape=(hidden, hidden),
                factored=(hidden, heads, size),
                order=(1, 2, 0),
            ),
            _vector(f"{name}.mlp_norm.weight", (*path, "mlp_norm", "scale"), hidden),
            Weight(
                f"{name}.mlp.Wi.weight",
                (*path, "mlp", "wi"),
                shape=(2 * width, hidden),
                factored=(2, width, hidden),
                order=(2, 0, 1),
            ),
            _transposed(f"{name}.mlp.Wo.weight", (*path, "mlp", "wo"), hidden, width),
        ]
    table.append(_vector("final_norm.weight", ("encoder", "final_norm", "scale"), hidden))
    return table


def dense_table(config: DenseConfig, index: int) -> list[Weight]:
    """Every tensor of one projection layer."""
    path = ("projection", index)
    out, into = config.out_features, config.in_features
    table = [_transposed("linear.weight", (*path, "kernel"), out, into)]
    if config.use_bias:
        table.append(_vector("linear.bias", (*path, "bias"), out))
    if config.use_residual and into != out:
        table.append(_transposed("residual.weight", (*path, "residual"), out, into))
    return table


def get_path(tree: Params, path: tuple[str | int, ...]) -> Any:
    """The entry of a nested dict."""
    for key in path:
        tree = tree[key]
    return tree


def set_path(tree: Params, path: tuple[str | int, ...], value: Any) -> None:
    """Puts an entry into a nested dict, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
