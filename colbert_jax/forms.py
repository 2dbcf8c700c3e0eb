"""Which forms of attention and MaxSim a run computes by: on a GPU, those that are best in a trial.

On CPU and TPU the backend and the length decide (`attention.py`, `maxsim.py`). A GPU has several
kernels to choose from, and which is fastest, or runs at all, depends on the chip, its driver, the
libraries and the lengths. So all are tried, forward and backward, on what the run will compute;
each trial takes seconds and is a line of the log. The run keeps what was found: one that goes on
has to round as it did before.
"""

import functools
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from colbert_jax.attention import GPU_FORMS, AttentionForm, ByReach, attend, needed_reach
from colbert_jax.colbert import ColbertConfig
from colbert_jax.maxsim import maxsim_all_pairs
from colbert_jax.maxsim_kernels import takes
from colbert_jax.results import write_json
from colbert_jax.sharding import make_mesh, platform
from colbert_jax.trial import fastest

logger = logging.getLogger(__name__)

FORMS_FILE = "forms.json"
LIBRARIES = ("jaxlib", "tokamax")

MAXSIM = "MaxSim"
MAXSIM_FORMS = ("xla", "kernels")
MAXSIM_TEXTS = (64, 1024)  # queries and documents of its trial
MOST_LOGITS = 2**28  # of attention's: 1 GiB where they are written to memory

Runs = dict[str, Callable[[], Any]]


class Forms(NamedTuple):
    """What `build_loss` is to compute by.

    Attributes:
      query_attention: the encoder's, for queries.
      document_attention: likewise, for documents.
      maxsim_kernels: whether MaxSim of all pairs is computed by our kernels on a GPU.
    """

    query_attention: AttentionForm
    document_attention: AttentionForm
    maxsim_kernels: bool


class Trial(NamedTuple):
    """Something that can be computed in several ways.

    Attributes:
      names: of the ways.
      prepare: makes inputs, and returns how to run each.
    """

    names: tuple[str, ...]
    prepare: Callable[[], Runs]


def untried(config: Mapping[str, Any]) -> Forms:
    """The forms where nothing is tried."""
    attention = config["model"]["attention"]
    return Forms(attention, attention, False)


def choose_forms(
    config: Mapping[str, Any], model: ColbertConfig, folder: Path | None = None, keep: bool = True
) -> Forms:
    """The forms for a run on the devices that are compiled for: those of the current mesh, if any.

    On several hosts the first one's choice counts for all.

    Args:
      config: the run's, as plain values.
      model: the model's shape.
      folder: a run's; what it has kept counts, if it was found by the same libraries on such a
        device for the same settings.
      keep: whether the folder is to keep what is found now.
    """
    if not _gpu_at_hand():
        return untried(config)
    trials = _trials(config, model)
    not_taken = config["loss"]["kind"] == "contrastive" and MAXSIM not in trials
    if not_taken and jax.process_index() == 0:
        logger.info("MaxSim by XLA, since our kernels do not take what the run has")
    if not trials:
        return untried(config)
    found = np.zeros(len(trials), np.int32)
    if jax.process_index() == 0:
        names = _found(trials, _conditions(config), folder and folder / FORMS_FILE, keep)
        found[:] = [trial.names.index(names[what]) for what, trial in trials.items()]
    if jax.process_count() > 1:
        found = np.asarray(multihost_utils.broadcast_one_to_all(found))
    names = {what: trial.names[i] for (what, trial), i in zip(trials.items(), found, strict=True)}

    def attention(side: str) -> AttentionForm:
        if config["model"]["attention"] != "auto":
            return config["model"]["attention"]
        length = config["model"][f"{side}_length"]
        reaches = None, _reaches(model, length)[-1]
        return ByReach(*(names[_attention_to(length, reach)] for reach in reaches))

    return Forms(attention("query"), attention("document"), names.get(MAXSIM) == "kernels")


def _gpu_at_hand() -> bool:
    """Whether a GPU is compiled for and here; ahead of time it may be one that is not."""
    return platform() == "gpu" and jax.default_backend() == "gpu"


def _found(
    trials: Mapping[str, Trial], conditions: dict[str, Any], file: Path | None, keep: bool
) -> dict[str, str]:
    """The best name of each trial: what a file has kept, or what is found now."""
    if file and (kept := _read(file, trials, conditions)):
        logger.info("attention and MaxSim by what %s has kept", file)
        return kept
    names = {}
    # The run's mesh may span devices that are not this host's.
    with jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])):
        for what, trial in trials.items():
            names[what], line = fastest(what, trial.prepare())
            logger.info("%s", line)
    if file and keep:
        write_json(file, {"for": conditions, "fastest": names})
    return names


def _read(
    file: Path, trials: Mapping[str, Trial], conditions: dict[str, Any]
) -> dict[str, str] | None:
    """What was found under the same conditions; a file that cannot be read counts as none."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        names = kept["fastest"]
        known = all(names[what] in trial.names for what, trial in trials.items())
        return names if known and kept["for"] == conditions else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _conditions(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial's outcome depends on, in a run whose model stays what it is."""
    return {
        "device": jax.local_devices()[0].device_kind,
        "tensor": config["mesh"]["tensor"],
        "masked_similarity": config["loss"]["masked_similarity"],
        **{name: config["model"][name] for name in ("dtype", "micro_batch")},
        **{name: package_version(name) for name in LIBRARIES},
    }


def package_version(name: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # some vendors' builds go by another name
        return None


def _trials(config: Mapping[str, Any], model: ColbertConfig) -> dict[str, Trial]:
    """What a run computes that can be tried; all hosts have the same."""
    settings, loss = config["model"], config["loss"]
    lengths = settings["query_length"], settings["document_length"]
    trials = {}
    if settings["attention"] == "auto":
        for length in lengths:
            for reach in _reaches(model, length):
                prepare = functools.partial(_attention_runs, config, model, length, reach)
                trials[_attention_to(length, reach)] = Trial(tuple(GPU_FORMS), prepare)
    dtype, masked = jnp.dtype(settings["dtype"]), loss["masked_similarity"]
    if loss["kind"] == "contrastive" and takes(dtype, dtype, masked):
        prepare = functools.partial(maxsim_runs, *lengths, model.embedding_size, dtype, masked)
        trials[MAXSIM] = Trial(MAXSIM_FORMS, prepare)
    return trials


# Attention.


def _attention_to(length: int, reach: int | None) -> str:
    """Names a trial."""
    where = "" if reach is None else f", {reach} on either side"
    return f"attention to {length} tokens{where}"


def _reaches(model: ColbertConfig, length: int) -> list[int | None]:
    """Of the layers: all of a text, and a window, unless that holds all of it."""
    reach = needed_reach(length, model.encoder.local_attention // 2)
    return [None] if reach is None else [None, reach]


def _attention_runs(
    config: Mapping[str, Any], model: ColbertConfig, length: int, reach: int | None
) -> Runs:
    """Attention of a layer to a micro-batch, and its gradients."""
    encoder = model.encoder
    heads = encoder.num_attention_heads // config["mesh"]["tensor"]
    texts = config["model"]["micro_batch"] or config["input"]["batch_size"]
    texts = max(min(texts, MOST_LOGITS // (heads * length**2)), 1)
    keys = jax.random.split(jax.random.key(0), 4)
    shape, dtype = (texts, length, heads, encoder.head_size), config["model"]["dtype"]
    arrays = [jax.random.normal(key, shape, dtype) for key in keys]
    # Padding, as texts have it: the shortest is half as long as the longest.
    mask = jnp.arange(length) < jnp.linspace(length / 2, length, texts)[:, None]
    return {
        name: functools.partial(_attention_both_ways, name, reach, *arrays, mask)
        for name in GPU_FORMS
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention_both_ways(form, reach, query, key, value, weights, mask):
    """What is gathered, and the gradients of its product with weights; of padding, nothing."""
    real = mask[:, :, None, None]

    def gather(query, key, value):
        return jnp.where(real, attend(query, key, value, mask, reach, form), 0)

    gathered, back = jax.vjp(gather, query, key, value)
    return gathered, *back(weights)


# MaxSim.


def maxsim_runs(
    query_length: int,
    document_length: int,
    dim: int,
    dtype: Any,
    masked_similarity: float | None,
) -> Runs:
    """MaxSim of all pairs of some texts, and its gradients.

    Args:
      query_length: tokens of a query.
      document_length: tokens of a document.
      dim: size of an embedding.
      dtype: of the embeddings.
      masked_similarity: as in `maxsim.maxsim`.
    """
    # Embeddings of unit length, and masks that leave four tokens of five.
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shapes = list(zip(MAXSIM_TEXTS, (query_length, document_length), strict=True))
    embeddings = [jax.random.normal(next(keys), (*shape, dim)) for shape in shapes]
    norms = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in embeddings]
    embeddings = [(x / n).astype(dtype) for x, n in zip(embeddings, norms, strict=True)]
    masks = [jax.random.bernoulli(next(keys), 0.8, shape) for shape in shapes]
    weights = jax.random.normal(next(keys), MAXSIM_TEXTS)
    inputs = (*embeddings, *masks, weights)
    return {
        name: functools.partial(_maxsim_both_ways, masked_similarity, name == "kernels", *inputs)
        for name in MAXSIM_FORMS
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _maxsim_both_ways(
    masked_similarity, kernels, queries, documents, query_mask, document_mask, weights
):
    """Scores, and the gradients of their product with weights."""

    def scores(queries, documents):
        masks = (query_mask, document_mask)
        return maxsim_all_pairs(queries, documents, *masks, masked_similarity, None, kernels)

    found, back = jax.vjp(scores, queries, documents)
    return found, *back(weights)
