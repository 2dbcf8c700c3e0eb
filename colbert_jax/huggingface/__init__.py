"""Hugging Face folders in and out: PyLate checkpoints, base encoders, exports.

A folder without its weights is a model's *description* (configs and tokenizer); every work
directory keeps one, so that an export is the description plus the weights. `folders.py` finds the
files, `configs.py` reads and writes the JSON among them, `model.py` puts a description together,
`weights.py` reads and writes tensors by the names and layouts of `tables.py`, and `save.py` makes
a new folder of it all.
"""

from colbert_jax.huggingface.configs import encoder_json, parse_encoder_config, read_json
from colbert_jax.huggingface.folders import find_folder
from colbert_jax.huggingface.model import Model, has_projection, read_model, read_tokenizer
from colbert_jax.huggingface.save import new_folder, save_model, write_description
from colbert_jax.huggingface.tables import dense_table, get_path, set_path, weight_table
from colbert_jax.huggingface.weights import read_weights

__all__ = [
    "Model",
    "dense_table",
    "encoder_json",
    "find_folder",
    "get_path",
    "has_projection",
    "new_folder",
    "parse_encoder_config",
    "read_json",
    "read_model",
    "read_tokenizer",
    "read_weights",
    "save_model",
    "set_path",
    "weight_table",
    "write_description",
]
