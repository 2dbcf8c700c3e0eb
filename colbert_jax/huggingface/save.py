"""A folder that PyLate and Transformers load: the description of a model, and its weights."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colbert_jax.colbert import Params
from colbert_jax.errors import UserError
from colbert_jax.huggingface.configs import TORCH_ACTIVATIONS, write_json
from colbert_jax.huggingface.model import Model
from colbert_jax.huggingface.weights import write_weights


def save_model(output: str | Path, model: Model, params: Params, card: str) -> None:
    """Writes a folder that PyLate and Transformers load, with its model card.

    Args:
      output: a folder that does not exist yet, or is empty.
      model: the description.
      params: the weights in our layout.
      card: the text of `README.md`.

    Raises:
      UserError: `output` already holds something.
    """
    with new_folder(output) as folder:
        write_description(folder, model)
        write_weights(folder, params, model.config)
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_description(folder: Path, model: Model) -> None:
    """Writes everything of a saved model but its weights, in PyLate's layout."""
    tokenization, config = model.tokenizer.config, model.config
    prompts = (model.settings_json.get("prompts") or {}) | {
        "query": tokenization.query_prompt,
        "document": tokenization.document_prompt,
    }
    dense_type = "pylate.models.Dense.Dense"
    modules = [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers.models.Transformer",
        }
    ]
    for i in range(1, len(config.projection) + 1):
        modules.append({"idx": i, "name": str(i), "path": f"{i}_Dense", "type": dense_type})
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "ColBERT",
            "__version__": {"sentence_transformers": "5.3.0", "pylate": "1.6.0"},
            "prompts": prompts,
            "default_prompt_name": model.settings_json.get("default_prompt_name"),
            "similarity_fn_name": "MaxSim",
            "query_prefix": tokenization.query_prefix,
            "document_prefix": tokenization.document_prefix,
            "query_length": tokenization.query_length,
            "document_length": tokenization.document_length,
            "attend_to_expansion_tokens": tokenization.attend_to_expansion_tokens,
            "skiplist_words": list(tokenization.skiplist_words),
            "do_query_expansion": tokenization.do_query_expansion,
        },
    )
    write_json(
        folder / "sentence_bert_config.json",
        {
            "max_seq_length": tokenization.document_length - 1,
            "do_lower_case": tokenization.do_lower_case,
        },
    )
    changed: dict[str, Any] = {"vocab_size": config.encoder.vocab_size}
    # Transformers loads weights in the type named here, and ours are written in float32.
    changed |= {key: "float32" for key in ("dtype", "torch_dtype") if key in model.encoder_json}
    write_json(folder / "config.json", model.encoder_json | changed)
    model.tokenizer.tokenizer.save_pretrained(str(folder))
    for i, dense in enumerate(config.projection, start=1):
        dense_folder = folder / f"{i}_Dense"
        dense_folder.mkdir()
        write_json(
            dense_folder / "config.json",
            {
                "in_features": dense.in_features,
                "out_features": dense.out_features,
                "bias": dense.use_bias,
                "activation_function": TORCH_ACTIVATIONS[dense.activation],
                "use_residual": dense.use_residual,
            },
        )


@contextlib.contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder that appears at `output` whole, or not at all.

    Raises:
      UserError: `output` is a file or a folder that already holds something.
    """
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(
            f"{output} already holds something: choose another --output or empty it yourself."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        building.chmod(0o755)
        yield building
        os.replace(building, output)  # over an empty folder too
    finally:
        shutil.rmtree(building, ignore_errors=True)
