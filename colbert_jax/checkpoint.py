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
          max_to_keep: how many of the newest checkpoints stay on disk.
        """
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.every_steps = every_steps
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, enable_async_checkpointing=True
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

    def due(self, step: int) -> bool:
        """Whether a step is one to save at."""
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(
        self, step: int, *, params: Any, optimizer: Any, input_state: dict, config: dict
    ) -> None:
        """Starts saving a step; the arrays are copied before this returns and written after.

        Args:
          step: number of updates made so far; a step that is saved already is left as it is.
          params: tree of arrays.
          optimizer: tree of arrays: the optimiser's state and the step.
          input_state: the batch iterator's position, a small JSON object.
          config: the run's config, a JSON object.
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

    def restore_params(self, params: Any) -> Any:
        """Restores the newest step's parameters alone; arguments and errors as in `restore`."""
        step = self._check("params", params)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(params))
        return self.manager.restore(step, args=args)["params"]

    def _check(self, item: str, wanted: Any) -> int:
        """The newest step, if its item has the wanted shapes."""
        step = self.latest_step()
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
