"""Orbax checkpoints of a run: parameters, optimiser state, step, input position and config.

This file is the only one that knows Orbax. A run (one phase) is one lineage of steps below
`<workdir>/checkpoints`. Parameters are an item of their own, so that the next phase or an export
reads them without the optimiser's two thirds.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from colbert_jax.errors import UserError

# What a checkpoint is worth: its "value", higher is better, None where it was not measured, and
# what it is a value "of". Values of other things are not compared with each other.
_Worth = Mapping[str, Any]

# Orbax logs a dozen lines a save; what a user needs of it, the run says itself.
logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """Saves and restores the steps of one run; saving is asynchronous."""

    def __init__(self, workdir: str | Path, *, every_steps: int = 0, max_to_keep: int = 3):
        """Opens `<workdir>/checkpoints`, making it if needed.

        Args:
          workdir: the run's folder.
          every_steps: save at multiples of this step; 0 leaves only the saves asked for.
          max_to_keep: how many of the newest checkpoints stay on disk, at least one. The one with
            the highest value that `save` was given stays beside them.
        """
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.every_steps = every_steps
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(max_to_keep),
            best_fn=lambda worth: worth["value"],  # without one, Orbax does not write the worth
            enable_async_checkpointing=True,
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
        # Kept here, because that of a step which is still being written cannot be read yet.
        self._worth = {step: self.manager.metrics(step) for step in self.manager.all_steps()}

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self.manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """The step with the highest value that `save` was given, and the value; the first such."""
        return _best({step: self._worth.get(step) for step in self.manager.all_steps()})

    def is_best(self, value: float | None, config: Mapping[str, Any]) -> bool:
        """Whether a value is higher than that of every checkpoint so far.

        Args:
          value: as `save` takes it.
          config: the run's, which says what it is a value of.
        """
        worth = _worth(value, config)
        if worth["value"] is None:
            return False
        known = {step: self._worth.get(step) for step in self.manager.all_steps()}
        best = _best({step: w for step, w in known.items() if w and w.get("of") == worth["of"]})
        return best is None or worth["value"] > best[1]

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
        if not name.isdecimal() or int(name) not in steps:
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
            What is not finite counts as not measured.
        """
        if step in self.manager.all_steps():
            return
        self._worth[step] = _worth(value, config)
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                input=ocp.args.JsonSave(input_state),
                config=ocp.args.JsonSave(config),
            ),
            metrics=self._worth[step],
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


class _NewestAndBest:
    """Which checkpoints stay, as Orbax asks for it."""

    def __init__(self, newest: int):
        self.newest = max(newest, 1)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, oldest first, whether it stays."""
        del context
        best = _best({info.step: info.metrics for info in checkpoints})
        kept = {info.step for info in checkpoints[-self.newest :]} | ({best[0]} if best else set())
        return [info.step in kept for info in checkpoints]


def _worth(value: float | None, config: Mapping[str, Any]) -> _Worth:
    """A value with what it is of: a run may go on with other collections or another measure."""
    evals = config.get("evals", {})
    known = value if value is not None and math.isfinite(value) else None
    return {"value": known, "of": [evals.get("best", ""), *evals.get("collections", ())]}


def _best(worth: Mapping[int, _Worth | None]) -> tuple[int, float] | None:
    """The first step of the highest value, among those of what was measured last."""
    measured = {s: w for s, w in sorted(worth.items()) if w and w.get("value") is not None}
    if not measured:
        return None
    of = measured[max(measured)].get("of")
    values = {step: w["value"] for step, w in measured.items() if w.get("of") == of}
    step = max(values, key=values.__getitem__)
    return step, values[step]


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


def config_leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested config by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        leaves |= config_leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return leaves
