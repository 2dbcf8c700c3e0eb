"""Orbax checkpoints of a run: parameters, optimiser state, step, input position and config.

This file is the only one that knows Orbax. A run (one phase) is one lineage of steps below
`<workdir>/checkpoints`. Parameters are an item of their own, so that the next phase or an export
reads them without the optimiser's two thirds.
"""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from colbert_jax.errors import UserError

# Orbax logs a dozen lines a save; what a user needs of it, the run says itself.
logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """Saves and restores the steps of one run; saving is asynchronous."""

    def __init__(self, workdir: str | Path, *, every_steps: int = 0, max_to_keep: int = 3):
        """Opens `<workdir>/checkpoints`, making it if needed.

        Args:
          workdir: the run's folder.
          every_steps: save at multiples of this step; 0 leaves only the saves asked for.
          max_to_keep: how many of the newest checkpoints stay on disk. The one with the highest
            value that `save` was given stays beside them.
        """
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.every_steps = every_steps
        keep = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(max_to_keep),
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics["value"],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, enable_async_checkpointing=True
        )
        # Saying what each item is lets a reader that never saved ask for an item's shapes.
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "input": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=tuple(handlers), item_handlers=handlers
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self.manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """The step with the highest value that `save` was given, and the value; the first such."""
        values = {
            step: metrics["value"]
            for step in self.manager.all_steps()
            if (metrics := self.manager.metrics(step))
        }
        if not values:
            return None
        step = max(sorted(values), key=values.__getitem__)
        return step, values[step]

    def is_best(self, value: float | None) -> bool:
        """Whether a value is higher than that of every checkpoint so far."""
        if value is None:
            return False
        best = self.best()
        return best is None or value > best[1]

    def find_step(self, name: str) -> int:
        """The step that a name means: "latest", "best" or a number.

        Raises:
          UserError: there is no such checkpoint.
        """
        steps = sorted(self.manager.all_steps())
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint: train first, or name another run.")
        if name == "latest":
            return steps[-1]
        best = self.best()
        if name == "best" and best is not None:
            return best[0]
        if name == "best":
            raise UserError(
                f"{self.folder} has no best checkpoint, since the run was not evaluated while it "
                "trained: set config.evals.best and config.evals.every_steps."
            )
        if not name.isdigit() or int(name) not in steps:
            raise UserError(
                f"{self.folder} has no step {name!r}: choose latest, best or one of "
                f"{', '.join(map(str, steps))}."
            )
        return int(name)

    def due(self, step: int) -> bool:
        """Whether a step is one to save at."""
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(
        self,
        step: int,
        *,
        params: Any,
        optimizer: Any,
        input_state: dict,
        config: dict,
        value: float | None = None,
    ) -> None:
        """Starts saving a step; the arrays are copied before this returns and written after.

        Args:
          step: number of updates made so far; a step that is saved already is left as it is.
          params: tree of arrays.
          optimizer: tree of arrays: the optimiser's state and the step.
          input_state: the batch iterator's position, a small JSON object.
          config: the run's config, a JSON object.
          value: how good the parameters were found to be, if they were measured; higher is better.
        """
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                input=ocp.args.JsonSave(input_state),
                config=ocp.args.JsonSave(config),
            ),
            metrics=None if value is None else {"value": value},
        )

    def restore(self, *, params: Any, optimizer: Any) -> tuple[Any, Any, dict]:
        """Restores the newest step whole.

        Args:
          params: tree of `jax.ShapeDtypeStruct` with the wanted shardings, whatever the mesh was
            that saved.
          optimizer: likewise.

        Returns:
          Parameters, optimiser tree, and the batch iterator's position.

        Raises:
          UserError: there is no checkpoint, or its shapes are others.
        """
        step = self._check("params", params)
        self._check("optimizer", optimizer)
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                optimizer=ocp.args.StandardRestore(optimizer),
                input=ocp.args.JsonRestore(),
            ),
        )
        return restored["params"], restored["optimizer"], restored["input"]

    def restore_params(self, params: Any, step: int | None = None) -> Any:
        """Restores one step's parameters alone, by default the newest's; otherwise as `restore`."""
        step = self._check("params", params, step)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(params))
        return self.manager.restore(step, args=args)["params"]

    def _check(self, item: str, wanted: Any, step: int | None = None) -> int:
        """The step, by default the newest, if its item has the wanted shapes."""
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self.folder} holds no checkpoint: train first, or name another run.")
        saved = _shapes(self.manager.item_metadata(step)[item])
        ours = _shapes(wanted)
        for name in sorted(saved.keys() | ours.keys()):
            if saved.get(name) != ours.get(name):
                raise UserError(
                    f"{self.folder}, step {step}: {name} has shape {saved.get(name, 'none')}, but "
                    f"this config makes it {ours.get(name, 'none')}: use the config that the run "
                    "was started with, or another --workdir."
                )
        return step

    def wait(self) -> None:
        """Blocks until every started save is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finishes saving and frees the manager's threads."""
        self.manager.wait_until_finished()
        self.manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Leaf path -> shape; Orbax gives tuples back as lists and drops what is empty."""
    tree = getattr(tree, "tree", tree)
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [
        ".".join(str(getattr(e, "key", getattr(e, "idx", getattr(e, "name", e)))) for e in path)
        for path, _ in leaves
    ]
    return {name: tuple(leaf.shape) for name, (_, leaf) in zip(names, leaves, strict=True)}


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads the config that a run keeps in its folder.

    Raises:
      UserError: the file is not there or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {Path(path).parent} is not the folder of a run."
        ) from error
