"""Steps that stopped a run, computed again: which texts, parameters and numbers went wrong.

`run.py` keeps the batches and the state (`not_finite.py`); here they meet the run's own loss once
more, as its config has it or with other settings.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from colbert_jax import huggingface
from colbert_jax.checkpoint import Checkpoints
from colbert_jax.colbert import Params, make_embed
from colbert_jax.errors import UserError, printable
from colbert_jax.forms import Forms, choose_forms, untried
from colbert_jax.huggingface import Model
from colbert_jax.micro_batch import used_lengths
from colbert_jax.not_finite import FACTS, read_batch, read_steps
from colbert_jax.retrieval.encode import pad_rows
from colbert_jax.run import check_settings, keep_compiled
from colbert_jax.sharding import global_batch, make_mesh
from colbert_jax.train import Batch, build_loss, check_batch
from colbert_jax.train_state import abstract_state

STILL_WRONG_STATUS = 1
SHOWN = 5  # texts and parameters that are named
TEXT_WIDTH = 60  # characters of a text


class Numbers(NamedTuple):
    """What a step comes to.

    Attributes:
      loss: of the batch.
      grad_norm: of its gradient.
      parameters: names of those whose gradient is not finite.
    """

    loss: float
    grad_norm: float
    parameters: list[str]

    @property
    def finite(self) -> bool:
        """Whether the step would have been used."""
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))

    def __str__(self) -> str:
        return f"loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}"


def replay(config: ConfigDict, folder: str | Path) -> bool:
    """Computes the steps of a folder again and prints what is not finite; nothing is changed.

    Args:
      config: the run's, or with other settings, to see whether those do better.
      folder: `<workdir>/not_finite/step-N`. One process reads what several hosts left.

    Returns:
      Whether all numbers are finite now.

    Raises:
      UserError: the folder is not such a one, or the config is not one for its model.
    """
    plain, folder = json.loads(config.to_json()), Path(folder)
    keep_compiled(plain["compilation_cache"])
    check_settings(plain)
    try:
        steps, hosts = read_steps(folder)
        batches = [read_batch(folder, step["step"], hosts) for step in steps]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--replay={folder} cannot be read ({FACTS} and its batches): give a folder that a run "
            "left in <workdir>/not_finite."
        ) from error
    mesh, workdir = make_mesh(**plain["mesh"]), folder.parents[1]
    check_batch(plain, mesh)
    model = huggingface.read_model(str(workdir / "model"))
    like = abstract_state(
        model.config, optax.identity(), mesh, plain["loss"]["learn_temperature"]
    ).params
    sample = {
        side: np.concatenate([np.asarray(used_lengths(b[side])).ravel() for b, _ in batches])
        for side in ("query", "document")
    }
    with jax.set_mesh(mesh):
        params = Checkpoints(folder).restore_params(like)
        wrong = [name for name, bad in _named(params) if bad]
        print(f"{folder}: {len(steps)} step(s), parameters not finite: {_some(wrong)}")
        forms = choose_forms(plain, model.config, workdir, keep=False)
        compute = make_compute(plain, model, mesh, sample, forms)
        exact = None
        if plain["model"]["dtype"] != "float32":
            in_float32 = plain | {"model": plain["model"] | {"dtype": "float32"}}
            exact = make_compute(in_float32, model, mesh, sample, untried(plain))
        wrong_texts = make_wrong_texts(plain, model, forms)
        finite = True
        for step, (batch, rows) in zip(steps, batches, strict=True):
            found = compute(params, batch)
            print(f"\nstep {step['step']}, a batch of {step['source']}: {found}")
            if not found.finite:
                finite = False
                _print_wrong(found, batch, rows, lambda tokens: wrong_texts(params, tokens), model)
                if exact is not None:
                    print(f"  in float32: {exact(params, batch)}")
    return finite


def _print_wrong(
    found: Numbers,
    batch: Batch,
    rows: np.ndarray,
    wrong_texts: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    model: Model,
) -> None:
    """Prints which texts of a batch and which gradients are not finite."""
    for side in ("query", "document"):
        bad = wrong_texts(batch[side])
        per_row = len(bad) // len(rows)
        print(f"  {side} embeddings: {int(bad.sum())} of {len(bad)} texts not finite")
        ids = batch[side]["input_ids"].reshape(len(bad), -1)
        seen = batch[side]["attention_mask"].reshape(len(bad), -1)
        for i in np.flatnonzero(bad)[:SHOWN]:
            text = str(model.tokenizer.tokenizer.decode(ids[i][seen[i]].tolist()))
            print(f"    row {rows[i // per_row]}: {printable(text)[:TEXT_WIDTH]}")
    print(f"  gradient not finite in: {_some(found.parameters)}")


def make_compute(
    config: dict[str, Any],
    model: Model,
    mesh: Mesh,
    sample: Mapping[str, np.ndarray],
    forms: Forms,
) -> Callable[[Params, Batch], Numbers]:
    """Makes the function to loss and gradient of a batch, as a step of the run has them."""
    loss_fn = build_loss(config, model.config, sample, forms)

    @jax.jit
    def numbers(params: Params, batch: Batch) -> tuple[Any, Any, Any]:
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        return loss, optax.tree.norm(grads), jax.tree.map(_not_finite, grads)

    def compute(params: Params, batch: Batch) -> Numbers:
        loss, grad_norm, wrong = numbers(params, global_batch(batch, mesh))
        return Numbers(float(loss), float(grad_norm), [n for n, bad in _flags(wrong) if bad])

    return compute


def make_wrong_texts(
    config: dict[str, Any], model: Model, forms: Forms
) -> Callable[[Params, Mapping[str, np.ndarray]], np.ndarray]:
    """Makes `wrong_texts(params, tokens)`: for each text whether its embeddings went wrong.

    That is, whether one that MaxSim may use is not finite, bool `[texts]`.
    """
    settings = config["model"]
    embed = make_embed(model.config, settings["dtype"], attention=forms.document_attention)

    @jax.jit
    def wrong(params: Params, ids: Any, attended: Any, scored: Any) -> Any:
        finite = jnp.isfinite(embed(params, ids, attended)).all(axis=-1)
        return (~finite & scored).any(axis=-1)

    def wrong_texts(params: Params, tokens: Mapping[str, np.ndarray]) -> np.ndarray:
        names = ("input_ids", "attention_mask", "scoring_mask")
        flat = [tokens[name].reshape(-1, tokens[name].shape[-1]) for name in names]
        count = len(flat[0])
        size = min(settings["micro_batch"] or count, count)
        found = [
            np.asarray(wrong(params["model"], *(pad_rows(x[i : i + size], size) for x in flat)))
            for i in range(0, count, size)
        ]
        return np.concatenate(found)[:count]

    return wrong_texts


def _not_finite(x: jax.Array) -> jax.Array:
    return ~jnp.isfinite(x).all()


def _named(tree: Any) -> list[tuple[str, bool]]:
    """Names of a tree's leaves and whether each holds something that is not finite."""
    return _flags(jax.jit(lambda tree: jax.tree.map(_not_finite, tree))(tree))


def _flags(tree: Any) -> list[tuple[str, bool]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="."), bool(x)) for p, x in leaves]


def _some(names: list[str]) -> str:
    """The first names, and how many there are beside them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
