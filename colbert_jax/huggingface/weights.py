"""Weights between safetensors and our parameters; nothing else is read, since pickles run code."""

import dataclasses
import reprlib
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from colbert_jax.colbert import ColbertConfig, DenseConfig, Params
from colbert_jax.errors import UserError, brief, one_line
from colbert_jax.huggingface.configs import as_object, read_json
from colbert_jax.huggingface.folders import find_folder, module_folders
from colbert_jax.huggingface.model import Model
from colbert_jax.huggingface.tables import (
    EMBEDDINGS,
    Weight,
    dense_table,
    get_path,
    set_path,
    weight_table,
)

# Weights of heads that a masked-language-model checkpoint carries and a retriever has no use for.
UNUSED_PREFIXES = ("head.", "decoder.", "classifier.", "cls.")


def read_weights(name_or_path: str, model: Model, seed: int, revision: str | None = None) -> Params:
    """Reads the weights of a folder into our layout, float32 numpy.

    Rows of the embedding table beyond the file's (the markers of a model that never had them) are
    drawn from a normal with the old rows' mean and covariance, and a missing projection from its
    own initialiser.

    Raises:
      UserError: a tensor that is missing, unknown or of another shape; no safetensors at all.
    """
    folder = find_folder(name_or_path, revision)
    encoder_folder, dense_folders = module_folders(folder)
    tensors = _read_tensors(encoder_folder)
    params: Params = {}
    table = weight_table(model.config.encoder)
    _check_names(tensors, table, encoder_folder)
    for weight in table:
        tensor = _take(tensors, weight.name, encoder_folder)
        if weight.path == EMBEDDINGS:
            rows: int = model.encoder_json.get("vocab_size") or (*tensor.shape, 0)[0]
            stored = dataclasses.replace(weight, shape=(rows, *weight.shape[1:]))
            _check_shape(tensor, stored, encoder_folder)
            tensor = _resize_rows(tensor, weight.shape[0], seed)
        _check_shape(tensor, weight, encoder_folder)
        set_path(params, weight.path, weight.to_ours(tensor))
    if not dense_folders:
        params["projection"] = {0: {"kernel": _draw_projection(model.config.projection[0], seed)}}
        return params
    for index, (dense, dense_folder) in enumerate(
        zip(model.config.projection, dense_folders, strict=True)
    ):
        tensors = _read_tensors(dense_folder)
        _check_names(tensors, dense_table(dense, index), dense_folder)
        for weight in dense_table(dense, index):
            tensor = _take(tensors, weight.name, dense_folder)
            _check_shape(tensor, weight, dense_folder)
            set_path(params, weight.path, weight.to_ours(tensor))
    return params


def _draw_projection(dense: DenseConfig, seed: int) -> np.ndarray:
    bound = dense.in_features**-0.5  # PyTorch's default for a linear layer
    shape = (dense.in_features, dense.out_features)
    return np.random.default_rng(seed).uniform(-bound, bound, shape).astype(np.float32)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors, without the `model.` prefix and without heads."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        shards = as_object(read_json(index).get("weight_map"), f"{index}: weight_map")
        files = sorted({str(name) for name in shards.values()})
    else:
        raise UserError(
            f"{folder} has no model.safetensors: convert its weights to safetensors (pickled "
            "PyTorch files are not read, since loading one can run code)."
        )
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{index} names {reprlib.repr(name)}, outside of the folder.")
        key = ""
        try:
            name.encode()  # over half of a surrogate pair, older versions of safetensors panic
            with safe_open(folder / name, framework="flax") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    short = key.removeprefix("model.")
                    if not short.startswith(UNUSED_PREFIXES):
                        # by way of jax, because numpy itself has no bfloat16
                        tensors[short] = np.asarray(file.get_tensor(key)).astype(np.float32)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{one_line(str(folder / name))} cannot be read ({brief(error)}): it is damaged "
                "or cut short; fetch it again."
            ) from error
        except (AttributeError, TypeError, OverflowError) as error:  # of safetensors and numpy
            raise UserError(
                f"{folder / name}: {one_line(key)} is of a type or shape that cannot be read: "
                "convert it to float32, float16 or bfloat16."
            ) from error
    return tensors


def _take(tensors: dict[str, np.ndarray], name: str, folder: Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{folder} lacks the tensor {name}: the weights are not complete.")
    return tensors[name]


def _check_names(tensors: dict[str, np.ndarray], table: list[Weight], folder: Path) -> None:
    known = {weight.name for weight in table}
    if unknown := sorted(name for name in tensors if name not in known):
        raise UserError(f"{folder} holds a tensor of no known use: {one_line(unknown[0])}.")


def _check_shape(tensor: np.ndarray, weight: Weight, folder: Path) -> None:
    if tensor.shape != weight.shape:
        raise UserError(
            f"{folder}: {weight.name} has shape {list(tensor.shape)}, but the folder's config.json "
            f"makes it {list(weight.shape)}: weights and config do not belong together."
        )


def _resize_rows(table: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Cuts an embedding table or adds rows drawn around the mean of the old ones.

    New rows follow N(mean, 1e-9 covariance), as Transformers' `resize_token_embeddings` does.
    """
    missing = rows - table.shape[0]
    if missing <= 0:
        return table[:rows]
    mean = table.mean(axis=0, dtype=np.float64)
    centred = table - mean
    # A draw from the covariance is a random combination of the centred rows: no decomposition.
    mix = np.random.default_rng(seed).standard_normal((missing, table.shape[0]))
    drawn = mean + np.sqrt(1e-9 / table.shape[0]) * (mix @ centred)
    return np.concatenate([table, drawn.astype(np.float32)])


def write_weights(folder: Path, params: Params, config: ColbertConfig) -> None:
    """Writes `model.safetensors` and each Dense layer's, float32."""
    _write_tensors(folder, params, weight_table(config.encoder))
    for i, dense in enumerate(config.projection):
        _write_tensors(folder / f"{i + 1}_Dense", params, dense_table(dense, i))


def _write_tensors(folder: Path, params: Params, table: list[Weight]) -> None:
    tensors = {
        w.name: w.to_theirs(np.asarray(jax.device_get(get_path(params, w.path)))) for w in table
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
