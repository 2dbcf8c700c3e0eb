"""A run's checkpoint as a folder for PyLate and Transformers."""

import logging
from pathlib import Path

import jax

from colbert_jax import huggingface
from colbert_jax.checkpoint import read_config
from colbert_jax.colbert import Params, param_axes, param_shapes
from colbert_jax.huggingface import Model
from colbert_jax.metric_log import read_metrics
from colbert_jax.model_card import model_card
from colbert_jax.results import Results, read_results
from colbert_jax.sharding import make_mesh, tree_shardings
from colbert_jax.start import CONFIG_FILE, load_run_params

logger = logging.getLogger(__name__)


def export_run(workdir: str | Path, output: str | Path, step: str = "latest") -> None:
    """Writes a run's checkpoint as a Hugging Face folder.

    Args:
      workdir: the run's folder.
      output: a folder that does not exist yet, or is empty.
      step: "latest", "best" or the number of a step that was kept.

    Raises:
      UserError: no run, no such checkpoint, or an output folder that holds something.
    """
    workdir = Path(workdir)
    config = read_config(workdir / CONFIG_FILE)
    model, params, number = read_run(workdir, step)
    card = model_card(model, config, number, results_at(workdir, number))
    huggingface.save_model(output, model, params, card)
    logger.info("%s, step %d: exported to %s", workdir, number, output)


def read_run(workdir: str | Path, step: str = "latest") -> tuple[Model, Params, int]:
    """A run's model, its parameters at one step, on one device, and the step.

    Args:
      workdir: the run's folder.
      step: "latest", "best" or the number of a step that was kept.

    Raises:
      UserError: no run, or no such checkpoint.
    """
    model = huggingface.read_model(str(Path(workdir) / "model"))
    mesh = make_mesh(devices=jax.devices()[:1])
    shapes, axes = param_shapes(model.config), param_axes(model.config)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        tree_shardings(axes, shapes, mesh),
    )
    params, number = load_run_params(workdir, like, step)
    return model, params, number


def results_at(workdir: Path, step: int) -> Results:
    """A run's results, with those of the model at one step, if it was measured there.

    `results.json` has the last step's alone, and an earlier one may be exported.
    """
    results = {name: found for name, found in read_results(workdir).items() if name != "trained"}
    measured: dict[str, dict[str, float]] = {}
    for row in read_metrics(workdir):
        for key in row if row["step"] == step else ():
            if key.startswith("eval/"):
                name, measure = key.removeprefix("eval/").rsplit("/", 1)
                measured.setdefault(name, {})[measure] = row[key]
    found = measured.get("average") or next(iter(measured.values()), None)
    return results | {"trained": found} if found else results
