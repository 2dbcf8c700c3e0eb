"""Models that are made in a moment, for tests of what is done with a model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from colbert_jax import huggingface
from colbert_jax.colbert import ColbertConfig, DenseConfig, Params, init_params
from colbert_jax.huggingface import Model
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}


def make_tokenizer(tokenizer_file: Path, **settings: Any) -> ColbertTokenizer:
    """A ColBERT tokenizer from a tokenizer.json; `settings` are of `TokenizationConfig`."""
    backend = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), **SPECIAL)
    return ColbertTokenizer(backend, TokenizationConfig(**settings))


def table_embed(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """A token's embedding is its row of a table, scaled to length 1, wherever it stands."""
    del mask
    rows = params["table"][ids]
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def make_table(tokenizer: ColbertTokenizer, dim: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of `table_embed`."""
    rng = np.random.default_rng(seed)
    return {"table": rng.standard_normal((tokenizer.vocab_size, dim)).astype(np.float32)}


def table_scores(
    params: Params, tokenizer: ColbertTokenizer, queries: list[str], documents: list[str]
) -> np.ndarray:
    """`scores[query, document]` of `table_embed`, one pair at a time in float64."""
    table = np.asarray(params["table"], np.float64)
    table = table / np.linalg.norm(table, axis=-1, keepdims=True)
    asked, found = tokenizer.queries(queries), tokenizer.documents(documents)
    scores = np.zeros((len(queries), len(documents)))
    for i in range(len(queries)):
        query = table[asked["input_ids"][i][asked["scoring_mask"][i]]]
        for j in range(len(documents)):
            document = table[found["input_ids"][j][found["scoring_mask"][j]]]
            if len(document):
                scores[i, j] = (query @ document.T).max(axis=1).sum()
    return scores


def lookup_table(params: Params) -> dict[str, np.ndarray]:
    """What `table_scores` takes, of a model made with `lookup`: each token's row in float64."""
    x = np.asarray(params["encoder"]["tok_embeddings"], np.float64)
    for norm in ("embedding_norm", "final_norm"):
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
        x = x * np.asarray(params["encoder"][norm]["scale"], np.float64)
    return {"table": x @ np.asarray(params["projection"][0]["kernel"], np.float64)}


def make_model(
    tokenizer_file: Path,
    seed: int = 0,
    embedding_size: int = 16,
    lookup: bool = False,
    **settings: Any,
) -> tuple[Model, Params]:
    """A ModernBERT ColBERT of one small layer with random weights.

    Args:
      tokenizer_file: its tokenizer.json.
      seed: of the weights.
      embedding_size: D.
      lookup: whether a token's embedding is to be the same in every text.
      **settings: of `TokenizationConfig`.
    """
    tokenizer = make_tokenizer(
        tokenizer_file, **{"query_length": 12, "document_length": 40} | settings
    )
    encoder = ModernBertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = ColbertConfig(encoder, (DenseConfig(32, embedding_size),))
    hf = tokenizer.tokenizer
    pad = hf.convert_tokens_to_ids("[PAD]")
    fields = huggingface.encoder_json(encoder, cls=hf.cls_token_id, sep=hf.sep_token_id, pad=pad)
    params = jax.tree.map(np.array, init_params(config, seed))
    if lookup:
        layer = params["encoder"]["layers"][0]
        for part in (layer["attn"]["out"], layer["mlp"]["wo"]):
            part[...] = 0
    return Model(config, tokenizer, fields, "random weights"), params


def save_model(folder: Path, tokenizer_file: Path, seed: int = 0, **settings: Any) -> Path:
    """The same as an exported folder."""
    model, params = make_model(tokenizer_file, seed, **settings)
    huggingface.save_model(folder, model, params, "# A model\n")
    return folder
