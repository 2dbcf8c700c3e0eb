"""A trained model, ready to encode: from a run, an exported folder or the hub."""

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh

from colbert_jax import huggingface
from colbert_jax.colbert import Params, make_embed
from colbert_jax.errors import UserError
from colbert_jax.export import read_run
from colbert_jax.huggingface import Model
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.retrieval.index import fingerprint
from colbert_jax.run import keep_compiled
from colbert_jax.sharding import make_mesh
from colbert_jax.start import is_run
from colbert_jax.tokenization import ColbertTokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelRequest:
    """Which model to open; the flags of `define_model_flags` say what each field means."""

    name: str
    revision: str | None = None
    step: str = "latest"
    query_length: int | None = None
    document_length: int | None = None
    dtype: str = "float32"
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class Retriever:
    """A model on the devices.

    Attributes:
      name: where it came from, with the step of a run.
      model: its description.
      encoder: encodes with it, on all devices.
      params: its parameters, whole on each device.
    """

    name: str
    model: Model
    encoder: Encoder
    params: Params

    @property
    def mesh(self) -> Mesh:
        """All devices; documents are split over them."""
        return self.encoder.mesh

    def fingerprint(self) -> str:
        """What tells this model's embeddings from another's."""
        return fingerprint(jax.device_get(self.params), self.encoder.tokenizer)


def define_model_flags(name: str, help_text: str) -> Callable[[], ModelRequest]:
    """Defines `--<name>` and the flags that go with it; returns what reads them."""
    model = flags.DEFINE_string(
        name, None, f"{help_text}: a run's folder, an exported folder or a hub name."
    )
    revision = flags.DEFINE_string("revision", None, "The hub's branch, tag or commit.")
    step = flags.DEFINE_string("step", "latest", "Of a run: latest, best or a step that it kept.")
    query_length = flags.DEFINE_integer(
        "query_length", None, "Tokens of a query; the model's own by default.", lower_bound=4
    )
    document_length = flags.DEFINE_integer(
        "document_length", None, "Tokens of a document; the model's own by default.", lower_bound=4
    )
    dtype = flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Of the encoder's arithmetic."
    )
    batch_size = flags.DEFINE_integer(
        "batch_size", 64, "Texts that each device encodes at a time.", lower_bound=1
    )
    return lambda: ModelRequest(
        name=model.value or "",
        revision=revision.value,
        step=step.value,
        query_length=query_length.value,
        document_length=document_length.value,
        dtype=dtype.value,
        batch_size=batch_size.value,
    )


def open_retriever(request: ModelRequest) -> Retriever:
    """Opens a model on all devices.

    Raises:
      UserError: no such model, one of another architecture, or a base encoder without projection.
    """
    if not request.name.strip():
        raise UserError("No model is named: give a run's folder, an exported folder or a hub name.")
    keep_compiled("~/.cache/colbert_jax/compiled")
    lengths = {
        key: value
        for key in ("query_length", "document_length")
        if (value := getattr(request, key)) is not None
    }
    mesh = make_mesh()
    label = request.name
    if is_run(request.name):
        model, params, step = read_run(request.name, request.step)
        label = f"{request.name}, step {step}"
    elif request.step != "latest":
        raise UserError(f"--step={request.step}: {request.name} is no run, and has one step alone.")
    else:
        folder = huggingface.find_folder(request.name, request.revision)
        if not huggingface.has_projection(folder):
            fields = folder / "config.json"
            huggingface.parse_encoder_config(huggingface.read_json(fields), str(fields))
            raise UserError(
                f"{request.name} is a base encoder without a projection, not a ColBERT: train one "
                f"from it with --config.init_from={request.name}."
            )
        model = huggingface.read_model(str(folder))
        params = huggingface.read_weights(str(folder), model, seed=0)
    longest = model.config.encoder.max_position_embeddings
    for key, value in lengths.items():
        if value > longest:
            raise UserError(f"--{key}={value} is more than the {longest} tokens of {request.name}.")
    tokenization = dataclasses.replace(model.tokenizer.config, **lengths)
    tokenizer = ColbertTokenizer(model.tokenizer.tokenizer, tokenization)
    embed = make_embed(model.config, request.dtype)
    encoder = Encoder(embed, tokenizer, mesh, request.batch_size)
    logger.info("%s on %d %s device(s)", label, mesh.size, jax.default_backend())
    return Retriever(label, model, encoder, encoder.place(params))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path.") from error


def open_output(folder: str | Path) -> Path:
    """Makes an output folder.

    Raises:
      UserError: it cannot be made, or nothing can be written to it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--output={folder} cannot be written to ({error.strerror}): choose another."
        ) from error
    return folder
