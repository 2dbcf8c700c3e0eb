"""Hugging Face folders in and out: PyLate checkpoints, base encoders, exports.

Weights are read and written with safetensors alone. One table, `weight_table`, ties each tensor's
name in a file to its place in our parameters, for import and export both. A folder without its
weights is a model's *description* (configs and tokenizer); every work directory keeps one, so that
an export is the description plus the weights.
"""

import contextlib
import dataclasses
import json
import logging
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from colbert_jax.colbert import ColbertConfig, DenseConfig, Params
from colbert_jax.errors import UserError, brief, one_line
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.tokenization import (
    ColbertTokenizer,
    TokenizationConfig,
    load_tokenizer,
    whole,
)

logger = logging.getLogger(__name__)

TORCH_ACTIVATIONS = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "gelu": "torch.nn.modules.activation.GELU",
    "relu": "torch.nn.modules.activation.ReLU",
    "silu": "torch.nn.modules.activation.SiLU",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
}
# Weights of heads that a masked-language-model checkpoint carries and a retriever has no use for.
UNUSED_PREFIXES = ("head.", "decoder.", "classifier.", "cls.")
EMBEDDINGS = ("encoder", "tok_embeddings")
# Far beyond every model, and so small that nothing is made of an absurd size before it is refused.
LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 10_000


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


# ---------------------------------------------------------------------------------------------
# The table of weights.


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


# ---------------------------------------------------------------------------------------------
# Reading.


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file is missing, unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: this is not a complete model folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): replace the file.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object: replace the file.")
    return value


def parse_encoder_config(fields: dict[str, Any], where: str) -> ModernBertConfig:
    """Reads an encoder's `config.json`, of transformers 5 or older.

    Args:
      fields: the file's content.
      where: the file's name, for messages.

    Raises:
      UserError: another architecture, or a setting that this encoder does not have.
    """
    if fields.get("model_type") != "modernbert":
        raise UserError(
            f"{where} describes a {reprlib.repr(fields.get('model_type', 'nameless'))} model: only "
            "'modernbert' encoders can be loaded."
        )
    fixed = {
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "hidden_activation": "gelu",
    }
    for key, wanted in fixed.items():
        if fields.get(key, wanted) != wanted:
            raise UserError(
                f"{where} sets {key} to {reprlib.repr(fields[key])}: only {wanted!r} is supported, "
                "as in every published ModernBERT."
            )
    defaults = ModernBertConfig()
    known = {}
    for field in dataclasses.fields(ModernBertConfig):
        if (value := fields.get(field.name)) is not None:
            known[field.name] = _number(value, field.type, f"{where}: {field.name}")
    if known.get("num_hidden_layers", 0) > MOST_LAYERS:
        raise UserError(
            f"{where}: num_hidden_layers is {known['num_hidden_layers']}: no more than "
            f"{MOST_LAYERS} can be loaded."
        )
    rope = _object(fields.get("rope_parameters"), f"{where}: rope_parameters")
    for kind, old in (
        ("full_attention", "global_rope_theta"),
        ("sliding_attention", "local_rope_theta"),
    ):
        new = _object(rope.get(kind), f"{where}: rope_parameters of {kind}")
        if new.get("rope_type", "default") != "default":
            raise UserError(
                f"{where} asks for rope_type {reprlib.repr(new['rope_type'])}: only 'default' is "
                "supported."
            )
        theta = new.get("rope_theta", fields.get(old))
        theta = getattr(defaults, old) if theta is None else theta
        known[old] = _number(theta, float, f"{where}: the rope_theta of {kind}")
    config = ModernBertConfig(**known)
    if (types := fields.get("layer_types")) is not None:
        config = _with_layer_types(config, types, where)
    if config.hidden_size % config.num_attention_heads or config.head_size % 2:
        raise UserError(
            f"{where}: hidden_size {config.hidden_size} does not split into "
            f"{config.num_attention_heads} heads of an even size."
        )
    return config


def _number(value: Any, kind: Any, what: str) -> Any:
    """A size, or a number above 0; `kind` is int or float."""
    if kind is int:
        if type(value) is not int or not 0 < value <= LARGEST_SIZE:
            raise UserError(
                f"{what} is {reprlib.repr(value)}: it must be a whole number above 0 and below "
                f"{LARGEST_SIZE + 1}."
            )
        return value
    if type(value) not in (int, float) or not 0 < value <= 1e300:  # NaN is not
        raise UserError(f"{what} is {reprlib.repr(value)}: it must be a finite number above 0.")
    return float(value)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"{what} is {reprlib.repr(value)}, not an object: replace the file.")
    return value or {}


def _with_layer_types(config: ModernBertConfig, types: Any, where: str) -> ModernBertConfig:
    """Turns transformers 5's list of layer kinds into our period."""
    count = config.num_hidden_layers
    types = types if isinstance(types, list) else []
    later = [i for i, kind in enumerate(types) if kind == "full_attention" and i > 0]
    period = later[0] if later else max(count, 1)
    expected = ["sliding_attention" if i % period else "full_attention" for i in range(count)]
    if types != expected:
        raise UserError(
            f"{where}: layer_types is not one global layer in every few, starting with the first: "
            "only that pattern is supported."
        )
    return dataclasses.replace(config, global_attn_every_n_layers=period)


def encoder_json(config: ModernBertConfig, *, cls: int, sep: int, pad: int) -> dict[str, Any]:
    """A `config.json` for an encoder of our own making, readable by transformers 4.48 to 5.

    Rope bases and layer kinds stand in it twice, under their older and their newer names; `cls`,
    `sep` and `pad` are ids of the tokenizer.
    """
    fields = dataclasses.asdict(config)
    kinds = [
        "full_attention" if config.is_global(i) else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    return fields | {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        "hidden_activation": "gelu",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": config.global_rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_theta},
        },
        "cls_token_id": cls,
        "sep_token_id": sep,
        "bos_token_id": cls,
        "eos_token_id": sep,
        "pad_token_id": pad,
    }


def parse_dense_config(fields: dict[str, Any], where: str) -> DenseConfig:
    """Reads a projection layer's `config.json`.

    Raises:
      UserError: an activation that is not known, or sizes that are no sizes.
    """
    activation = fields.get("activation_function", TORCH_ACTIVATIONS["identity"])
    name = activation.rsplit(".", 1)[-1] if isinstance(activation, str) else activation
    by_class = {full.rsplit(".", 1)[-1]: short for short, full in TORCH_ACTIVATIONS.items()}
    if not isinstance(name, str) or name not in by_class:
        raise UserError(
            f"{where} asks for the activation {reprlib.repr(name)}: known are "
            f"{', '.join(sorted(by_class))}."
        )
    return DenseConfig(
        in_features=_number(fields.get("in_features"), int, f"{where}: in_features"),
        out_features=_number(fields.get("out_features"), int, f"{where}: out_features"),
        use_bias=bool(fields.get("bias", True)),
        activation=by_class[name],
        use_residual=bool(fields.get("use_residual", False)),
    )


def find_folder(name_or_path: str, revision: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is, or a hub model downloaded (its configs and safetensors only).

    Args:
      name_or_path: the folder or the hub name.
      revision: the hub's revision, for a hub name.
      weights: whether the safetensors are wanted.

    Raises:
      UserError: neither a folder nor a model that the hub can deliver.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        folder = huggingface_hub.snapshot_download(
            name_or_path,
            revision=revision,
            allow_patterns=[
                f"{folder}*.{kind}"
                for folder in ("", "*/")
                for kind in ("json", *(["safetensors"] if weights else []))
            ],
        )
    except Exception as error:  # the hub client raises a dozen kinds; each means the same here
        raise UserError(
            f"{name_or_path!r} is neither a folder nor a model that could be fetched from the hub "
            f"({type(error).__name__}): check the name and the connection."
        ) from error
    return Path(folder)


def _module_folders(folder: Path) -> tuple[Path, list[Path]]:
    """The transformer's folder and the Dense layers' folders, from `modules.json`."""
    if not (folder / "modules.json").is_file():
        return folder, []
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [(str(m["type"]).rsplit(".", 1)[-1], str(m["path"])) for m in modules]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"{folder / 'modules.json'} is not a list of modules: replace it."
        ) from error
    for _, path in kinds:
        if not _is_inside(folder, path):
            raise UserError(
                f"{folder / 'modules.json'} names {reprlib.repr(path)}, outside of the folder."
            )
    transformers = [folder / path for kind, path in kinds if kind == "Transformer"]
    return (transformers or [folder])[0], [folder / p for kind, p in kinds if kind == "Dense"]


def _is_inside(folder: Path, path: str) -> bool:
    try:
        (folder / path).stat()
    except FileNotFoundError:
        pass  # what is missing there is named when it is wanted
    except (OSError, ValueError):  # a zero byte, too long a name: nothing has it
        return False
    return (folder / path).resolve().is_relative_to(folder.resolve())


def has_projection(folder: Path) -> bool:
    """Whether a folder is a ColBERT's, and not that of a base encoder."""
    return bool(_module_folders(folder)[1]) or bool(_read_saved(folder))


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
    encoder_folder, dense_folders = _module_folders(folder)
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

    tokenization = _tokenization(encoder_folder, saved, overrides)
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


def _read_saved(folder: Path) -> dict[str, Any]:
    """What PyLate keeps of a model beside its weights; nothing, for a base encoder."""
    path = folder / "config_sentence_transformers.json"
    return read_json(path) if path.is_file() else {}


def _tokenization(
    encoder_folder: Path, saved: dict[str, Any], overrides: dict[str, Any] | None
) -> TokenizationConfig:
    where = "config_sentence_transformers.json"
    prompts = _object(saved.get("prompts"), f"{where}: prompts")
    saved = saved | {f"{side}_prompt": prompts.get(side) or "" for side in ("query", "document")}
    settings = {
        field.name: _setting(saved[field.name], field.default, f"{where}: {field.name}")
        for field in dataclasses.fields(TokenizationConfig)
        if saved.get(field.name) is not None
    }
    if (encoder_folder / "sentence_bert_config.json").is_file():
        sbert = read_json(encoder_folder / "sentence_bert_config.json")
        settings["do_lower_case"] = bool(sbert.get("do_lower_case", False))
    return TokenizationConfig(**{**settings, **(overrides or {})})


def _setting(value: Any, default: Any, what: str) -> Any:
    """A value of the default's type, where lists stand for tuples of texts."""
    if isinstance(default, tuple):
        fits, wanted = isinstance(value, list) and all(map(_is_text, value)), "a list of texts"
    elif isinstance(default, str):
        fits, wanted = _is_text(value), "a text"
    elif isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    else:
        fits, wanted = type(value) is int, "a whole number"
    if not fits:
        raise UserError(f"{what} is {reprlib.repr(value)}: it must be {wanted}.")
    return tuple(value) if isinstance(value, list) else value


def _is_text(value: Any) -> bool:
    # JSON can hold half of a surrogate pair, which no tokenizer takes.
    return isinstance(value, str) and whole(value) == value


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
    encoder_folder, _ = _module_folders(folder)
    saved = _read_saved(folder)
    tokenization = _tokenization(encoder_folder, saved, overrides)
    return ColbertTokenizer(load_tokenizer(encoder_folder), tokenization)


def read_weights(name_or_path: str, model: Model, seed: int, revision: str | None = None) -> Params:
    """Reads the weights of a folder into our layout, float32 numpy.

    Rows of the embedding table beyond the file's (the markers of a model that never had them) are
    drawn from a normal with the old rows' mean and covariance, and a missing projection from its
    own initialiser.

    Raises:
      UserError: a tensor that is missing, unknown or of another shape; no safetensors at all.
    """
    folder = find_folder(name_or_path, revision)
    encoder_folder, dense_folders = _module_folders(folder)
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
        shards = _object(read_json(index).get("weight_map"), f"{index}: weight_map")
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


# ---------------------------------------------------------------------------------------------
# Writing.


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
    _write_json(folder / "modules.json", modules)
    _write_json(
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
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "max_seq_length": tokenization.document_length - 1,
            "do_lower_case": tokenization.do_lower_case,
        },
    )
    changed: dict[str, Any] = {"vocab_size": config.encoder.vocab_size}
    # Transformers loads weights in the type named here, and ours are written in float32.
    changed |= {key: "float32" for key in ("dtype", "torch_dtype") if key in model.encoder_json}
    _write_json(folder / "config.json", model.encoder_json | changed)
    model.tokenizer.tokenizer.save_pretrained(str(folder))
    for i, dense in enumerate(config.projection, start=1):
        dense_folder = folder / f"{i}_Dense"
        dense_folder.mkdir()
        _write_json(
            dense_folder / "config.json",
            {
                "in_features": dense.in_features,
                "out_features": dense.out_features,
                "bias": dense.use_bias,
                "activation_function": TORCH_ACTIVATIONS[dense.activation],
                "use_residual": dense.use_residual,
            },
        )


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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
