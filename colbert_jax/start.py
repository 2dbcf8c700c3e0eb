"""Where a run's model comes from: nothing, another run, or a Hugging Face folder."""

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

from colbert_jax import huggingface
from colbert_jax.checkpoint import Checkpoints, read_config
from colbert_jax.colbert import ColbertConfig, DenseConfig, Params, init_params
from colbert_jax.data.inputs import Corpus
from colbert_jax.errors import UserError
from colbert_jax.huggingface import Model
from colbert_jax.modernbert import ModernBertConfig
from colbert_jax.sharding import replicated
from colbert_jax.tokenization import ColbertTokenizer, TokenizationConfig, train_tokenizer
from colbert_jax.train_state import TrainState, init_state, place_state

logger = logging.getLogger(__name__)

CONFIG_FILE = "train_config.json"  # its presence is what makes a folder a run's


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run's."""
    return (Path(folder) / CONFIG_FILE).is_file()


def open_model(config: dict[str, Any], workdir: Path, corpus: Corpus, fresh: bool) -> Model:
    """The description of the model, kept in `<workdir>/model` for resumption and export.

    Args:
      config: the run's.
      workdir: the run's folder.
      corpus: what a new tokenizer is trained on.
      fresh: whether the run starts now; otherwise the description is read back.

    Raises:
      UserError: a starting point that cannot be used.
    """
    settings = dict(config["model"])
    fields = TokenizationConfig.__dataclass_fields__
    tokenization = {k: v for k, v in settings.items() if k in fields and v is not None}
    folder = workdir / "model"
    if not fresh:
        return huggingface.read_model(str(folder), overrides=tokenization)
    if init_from := config["init_from"]:
        model = huggingface.read_model(
            str(Path(init_from) / "model") if is_run(init_from) else init_from,
            revision=config["init_revision"] or None,
            overrides=tokenization,
            embedding_size=settings["embedding_size"],
        )
    else:
        model = new_model(settings, TokenizationConfig(**tokenization), corpus.texts())
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that stopped before it saved anything
        with huggingface.new_folder(folder) as building:
            huggingface.write_description(building, model)
    multihost_utils.sync_global_devices("the model's description is written")
    return model


def new_model(
    settings: Mapping[str, Any], tokenization: TokenizationConfig, texts: Iterable[str]
) -> Model:
    """A model from nothing: a tokenizer trained on texts and the encoder that fits it."""
    new_shape(settings, settings.get("vocab_size", 0))  # what is wrong with it, before any work
    logger.info("training a tokenizer of %d tokens on the corpus", settings["vocab_size"])
    hf_tokenizer = train_tokenizer(texts, settings["vocab_size"], words_only=True)
    # Read before ColbertTokenizer makes [MASK] what texts are padded with: an encoder that took it
    # for padding would not train its row in PyTorch.
    special = {
        "cls": hf_tokenizer.cls_token_id,
        "sep": hf_tokenizer.sep_token_id,
        "pad": hf_tokenizer.pad_token_id,
    }
    tokenizer = ColbertTokenizer(hf_tokenizer, tokenization)
    shape = new_shape(settings, tokenizer.vocab_size)
    fields = huggingface.encoder_json(shape.encoder, **special)
    return Model(shape, tokenizer, fields, "random weights")


def new_shape(settings: Mapping[str, Any], vocab_size: int) -> ColbertConfig:
    """The shape of a model from nothing.

    Args:
      settings: `config.model`.
      vocab_size: of its tokenizer.

    Raises:
      UserError: there is no encoder in the settings, or none that can be.
    """
    if "encoder" not in settings:
        raise UserError(
            "config.init_from is empty, but this config does not describe an encoder to start from "
            "nothing with: name a run, a folder or a hub model, or use configs/quickstart.py."
        )
    encoder = ModernBertConfig(vocab_size=vocab_size, **settings["encoder"])
    if encoder.hidden_size % (2 * encoder.num_attention_heads):
        raise UserError(
            f"config.model.encoder.hidden_size={encoder.hidden_size} does not split into "
            f"{encoder.num_attention_heads} heads of an even size: change one of the two."
        )
    projection = DenseConfig(encoder.hidden_size, settings["embedding_size"])
    return ColbertConfig(encoder, (projection,))


def start_state(
    config: dict[str, Any], model: Model, optimizer: optax.GradientTransformation, like: TrainState
) -> TrainState:
    """The state at step 0, laid out like `like`, from the run's starting point."""
    init_from, seed = config["init_from"], config["seed"]

    def loss_params() -> Params:
        if not config["loss"]["learn_temperature"]:
            return {}
        return {"log_temperature": jnp.log(jnp.float32(config["loss"]["temperature"]))}

    if not init_from:
        return init_state(
            lambda: {"model": init_params(model.config, seed), "loss": loss_params()},
            optimizer,
            like,
        )
    if is_run(init_from):
        params, _ = load_run_params(init_from, like.params["model"])
    else:
        revision = config["init_revision"] or None
        params = huggingface.read_weights(init_from, model, seed, revision=revision)
    return place_state({"model": params, "loss": loss_params()}, optimizer, like)


def load_run_params(workdir: str | Path, like: Params, step: str = "latest") -> tuple[Params, int]:
    """A run's parameters at one step in the layout of `like`, and the step's number.

    A temperature that was learned there is left behind.
    """
    with_loss: Params = {"model": like, "loss": {}}
    if read_config(Path(workdir) / CONFIG_FILE)["loss"]["learn_temperature"]:
        whole = replicated(jax.tree.leaves(like)[0].sharding.mesh)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        with_loss["loss"] = {"log_temperature": scalar}
    checkpoints = Checkpoints(workdir)
    try:
        number = checkpoints.find_step(step)
        return checkpoints.restore_params(with_loss, number)["model"], number
    finally:
        checkpoints.close()
