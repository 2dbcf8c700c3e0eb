"""The JSON files of a model's folder: read into our configs, checked, and written."""

import dataclasses
import json
import reprlib
from pathlib import Path
from typing import Any

from colbert_jax.colbert import DenseConfig
from colbert_jax.errors import UserError
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.tokenization import TokenizationConfig, whole

TORCH_ACTIVATIONS = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "gelu": "torch.nn.modules.activation.GELU",
    "relu": "torch.nn.modules.activation.ReLU",
    "silu": "torch.nn.modules.activation.SiLU",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
}
# Far beyond every model, and so small that nothing is made of an absurd size before it is refused.
LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 10_000


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


def write_json(path: Path, value: Any) -> None:
    """Writes JSON for people to read, as PyLate and Transformers lay theirs out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    rope = as_object(fields.get("rope_parameters"), f"{where}: rope_parameters")
    for kind, old in (
        ("full_attention", "global_rope_theta"),
        ("sliding_attention", "local_rope_theta"),
    ):
        new = as_object(rope.get(kind), f"{where}: rope_parameters of {kind}")
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


def parse_tokenization(
    saved: dict[str, Any], sbert: dict[str, Any] | None, overrides: dict[str, Any] | None
) -> TokenizationConfig:
    """Reads how a model's texts become tokens.

    Args:
      saved: `config_sentence_transformers.json`, where PyLate keeps most of it.
      sbert: `sentence_bert_config.json`, where there is one: whether texts are put in lower case.
      overrides: `TokenizationConfig` fields that replace the files'.

    Raises:
      UserError: a value of another type.
    """
    where = "config_sentence_transformers.json"
    prompts = as_object(saved.get("prompts"), f"{where}: prompts")
    saved = saved | {f"{side}_prompt": prompts.get(side) or "" for side in ("query", "document")}
    settings = {
        field.name: _setting(saved[field.name], field.default, f"{where}: {field.name}")
        for field in dataclasses.fields(TokenizationConfig)
        if saved.get(field.name) is not None
    }
    if sbert is not None:
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


def as_object(value: Any, what: str) -> dict[str, Any]:
    """A JSON object, or an empty one for None; `UserError` for all else."""
    if not isinstance(value, dict | None):
        raise UserError(f"{what} is {reprlib.repr(value)}, not an object: replace the file.")
    return value or {}
