"""A model without its weights, as a PyLate ColBERT's or a base encoder's folder describes it."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from colbert_jax.colbert import ColbertConfig, DenseConfig
from colbert_jax.errors import UserError
from colbert_jax.huggingface.configs import (
    parse_dense_config,
    parse_encoder_config,
    parse_tokenization,
    read_json,
)
from colbert_jax.huggingface.folders import find_folder, module_folders
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig, load_tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without its weights.

    Attributes:
      config: shapes of encoder and projection.
      tokenizer: its texts-to-ids side, markers included.
      encoder_json: the encoder's `config.json` as it was read, written back on export with only
        the vocabulary size and the type of the weights changed.
      source: where it came from, for the model card and the log.
      settings_json: `config_sentence_transformers.json` as it was read; what this project has no
        use for, such as further named prompts, is written back on export.
    """

    config: ColbertConfig
    tokenizer: ColbertTokenizer
    encoder_json: dict[str, Any]
    source: str
    settings_json: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    overrides: dict[str, Any] | None = None,
    embedding_size: int = 128,
) -> Model:
    """Reads the description of a PyLate ColBERT or of a base encoder.

    Args:
      name_or_path: a folder or a hub name.
      revision: the hub's revision, for a hub name.
      overrides: `TokenizationConfig` fields that replace the folder's.
      embedding_size: D of the projection that a base encoder gets.

    Raises:
      UserError: anything in the folder that cannot be used, named.
    """
    folder = find_folder(name_or_path, revision)
    encoder_folder, dense_folders = module_folders(folder)
    fields = read_json(encoder_folder / "config.json")
    encoder = parse_encoder_config(fields, str(encoder_folder / "config.json"))

    saved = _read_saved(folder)
    if not dense_folders and (saved.get("model_type") == "ColBERT" or "query_prefix" in saved):
        raise UserError(
            f"{folder} calls itself a ColBERT but modules.json lists no Dense layer: its "
            "projection is lost; use a complete copy of the model."
        )
    projection = tuple(
        parse_dense_config(read_json(f / "config.json"), str(f / "config.json"))
        for f in dense_folders
    )
    widths = [encoder.hidden_size, *(dense.out_features for dense in projection)]
    for folder_, dense, width in zip(dense_folders, projection, widths, strict=False):
        if dense.in_features != width:
            raise UserError(
                f"{folder_ / 'config.json'}: in_features is {dense.in_features}, but the layer "
                f"before it gives {width}."
            )
    if not projection:
        logger.info(
            "%s is a base encoder without a projection: a new one (%d -> %d) is drawn.",
            folder,
            encoder.hidden_size,
            embedding_size,
        )
        projection = (DenseConfig(encoder.hidden_size, embedding_size),)

    tokenization = _read_tokenization(encoder_folder, saved, overrides)
    hf_tokenizer = load_tokenizer(encoder_folder)
    if len(hf_tokenizer) > encoder.vocab_size:
        raise UserError(
            f"{encoder_folder / 'tokenizer.json'} has {len(hf_tokenizer)} ids, more than the "
            f"{encoder.vocab_size} rows (vocab_size) of the embedding in config.json: it belongs "
            "to another model; use this model's own."
        )
    tokenizer = ColbertTokenizer(hf_tokenizer, tokenization)
    # PyLate sizes the embedding table to the tokenizer when it loads a model; so do we.
    encoder = dataclasses.replace(encoder, vocab_size=tokenizer.vocab_size)
    return Model(ColbertConfig(encoder, projection), tokenizer, fields, str(name_or_path), saved)


def read_tokenizer(
    name_or_path: str, revision: str | None = None, overrides: dict[str, Any] | None = None
) -> ColbertTokenizer:
    """Reads the tokenizer of a model without its weights, as `read_model` reads it.

    Args:
      name_or_path: a folder or a hub name.
      revision: the hub's revision, for a hub name.
      overrides: `TokenizationConfig` fields that replace the folder's.

    Raises:
      UserError: anything in the folder that cannot be used, named.
    """
    folder = find_folder(name_or_path, revision, weights=False)
    encoder_folder, _ = module_folders(folder)
    tokenization = _read_tokenization(encoder_folder, _read_saved(folder), overrides)
    return ColbertTokenizer(load_tokenizer(encoder_folder), tokenization)


def has_projection(folder: Path) -> bool:
    """Whether a folder is a ColBERT's, and not that of a base encoder."""
    return bool(module_folders(folder)[1]) or bool(_read_saved(folder))


def _read_saved(folder: Path) -> dict[str, Any]:
    """What PyLate keeps of a model beside its weights; nothing, for a base encoder."""
    path = folder / "config_sentence_transformers.json"
    return read_json(path) if path.is_file() else {}


def _read_tokenization(
    encoder_folder: Path, saved: dict[str, Any], overrides: dict[str, Any] | None
) -> TokenizationConfig:
    path = encoder_folder / "sentence_bert_config.json"
    return parse_tokenization(saved, read_json(path) if path.is_file() else None, overrides)
