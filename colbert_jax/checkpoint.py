"""Orbax checkpoints of a run: parameters, optimiser state, step, input position and config.

This file is the only one that knows Orbax. A run (one phase) is one lineage of steps below
`<workdir>/checkpoints`. Parameters are an item of their own, so that the next phase or an export
reads them without the optimiser's two thirds.

A step is written to a folder of another name, hashed there (`manifest.py`), and renamed once all of
it is there: a kill at any moment leaves the step either unfinished, which no reader takes for a
checkpoint, or whole. Older steps are deleted only after that, and what is read is compared with the
manifest first, so that a step damaged later is passed over for an older one.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from colbert_jax import manifest
from colbert_jax.errors import UserError

# What a checkpoint is worth: its "value", higher is better, None where it was not measured, and
# what it is a value "of". Values of other things are not compared with each other. Under "manifest"
# it says that there is one, so that a manifest that went missing is missed.
_Worth = Mapping[str, Any]

_Read = TypeVar("_Read")

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # the system's number, in TensorStore's ValueError

_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX  # of a step's folder while it is written

logger = logging.getLogger(__name__)


def _is_for_users(record: logging.LogRecord) -> bool:
    """Orbax logs each failure several times, with tracebacks, and raises it too."""
    return record.levelno < logging.ERROR or not record.pathname.startswith(tuple(ocp.__path__))


def _is_no_write_that_failed(record: logging.LogRecord) -> bool:
    """Where several arrays of a save fail, Orbax awaits one; asyncio reports the rest, pages each.

    It does so when they are collected as garbage, which may be many steps later.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not _OS_ERROR.search(str(error))


# Orbax logs a dozen lines a save; what a user needs of it, the run says itself.
logging.getLogger("absl").setLevel(logging.WARNING)
logging.getLogger("absl").addFilter(_is_for_users)
logging.getLogger("asyncio").addFilter(_is_no_write_that_failed)


class Checkpoints:
    """Saves and restores the steps of one run; saving is asynchronous.

    With several hosts, all call each method alike; the folder is one that all of them see, and the
    first host hashes, checks, renames and removes for all.
    """

    def __init__(self, workdir: str | Path, *, every_steps: int = 0, max_to_keep: int = 3):
        """Opens `<workdir>/checkpoints`, making it if needed.

        Args:
          workdir: the run's folder.
          every_steps: save at multiples of this step; 0 leaves only the saves asked for.
          max_to_keep: how many of the newest checkpoints stay on disk, at least one. The one with
            the highest value that `save` was given stays beside them, and so do damaged ones.
        """
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.every_steps = every_steps
        self.max_to_keep = max(max_to_keep, 1)
        self._damaged: dict[int, str] = {}  # steps found to be so, and what is wrong
        self._saving: int | None = None  # the step under way
        self._error: Exception | None = None  # what ended it before it was under way
        self._failed: list[int] = []  # steps whose saves failed
        self._open()
        self._name_unfinished()

    def _open(self) -> None:
        """Makes Orbax's manager, which knows a folder as it was when it was made."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Preserve(self._kept),
            best_fn=lambda worth: worth["value"],  # without one, Orbax does not write the worth
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        # Saying what each item is lets a reader that never saved ask for an item's shapes.
        self._handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "input": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        self.manager = _Manager(
            self.folder,
            options=options,
            item_names=tuple(self._handlers),
            item_handlers=self._handlers,
        )
        # Kept here, because that of a step which is still being written cannot be read yet.
        self._worth: dict[int, _Worth | None] = {
            step: manifest.read_notes(self.folder / str(step)).get("worth")
            or self.manager.metrics(step)
            for step in self.manager.all_steps()
        }

    def _name_unfinished(self) -> None:
        """Says what a kill while saving left behind; the next save of that step replaces it."""
        newest = self.latest_step()
        for folder in self.folder.glob(f"*{_UNFINISHED}"):
            step = folder.name.removesuffix(_UNFINISHED)
            if step.isdecimal() and (newest is None or int(step) > newest):
                logger.warning(
                    "%s: step %s was never saved whole and is not used, unless another program is "
                    "saving it now.",
                    folder,
                    step,
                )

    def _steps(self) -> list[int]:
        """The steps that are not known to be damaged, oldest first."""
        return sorted(step for step in self.manager.all_steps() if step not in self._damaged)

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None; reading it may find that it is damaged."""
        return max(self._steps(), default=None)

    def best(self) -> tuple[int, float] | None:
        """The step with the highest value that `save` was given, and the value; the first such."""
        return _best({step: self._worth.get(step) for step in self._steps()})

    def is_best(self, value: float | None, config: Mapping[str, Any]) -> bool:
        """Whether a value is higher than that of every checkpoint so far.

        Args:
          value: as `save` takes it.
          config: the run's, which says what it is a value of.
        """
        worth = _worth(value, config)
        if worth["value"] is None:
            return False
        known = {step: self._worth.get(step) for step in self._steps()}
        best = _best({step: w for step, w in known.items() if w and w.get("of") == worth["of"]})
        return best is None or worth["value"] > best[1]

    def rate(self, step: int, value: float | None, config: Mapping[str, Any]) -> None:
        """Notes what a saved step is worth, where that was found out after it was saved.

        Args:
          step: whole, with a manifest.
          value: as `save` takes it; None changes nothing.
          config: likewise.
        """
        folder = self.folder / str(step)
        if value is None or step not in self._steps() or not manifest.is_sealed(folder):
            return
        self._worth[step] = worth = _worth(value, config)
        if jax.process_index() == 0:
            try:
                manifest.note(folder, {"worth": worth})
            except OSError as error:
                logger.warning("%s: its value cannot be noted (%s).", folder, error.strerror)

    def find_step(self, name: str) -> int:
        """The step that a name means: "latest", "best" or a number.

        The latest is the newest whose parameters are whole; whether another's are, reading it says.

        Raises:
          UserError: there is no such checkpoint, or none whose parameters are whole.
        """
        if name == "latest":
            return self._newest_whole(lambda step: self._verify(step, ("params",)))
        steps = self._steps()
        if not steps:
            raise self._no_checkpoint()
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
        if failure := self._settle():
            logger.warning("%s: make room there or see to the disk; training goes on.", failure)
        if step in self._steps():
            return
        self._remove_leftovers()  # once more: threads of a failed save may have gone on writing
        self._saving = step
        try:
            self._set_aside(step)
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
                force=True,  # also where a damaged step is newer
            )
        except Exception as error:
            if not _disk_error(error):
                raise
            self._error = error

    def restore(self, *, params: Any, optimizer: Any) -> tuple[Any, Any, dict]:
        """Restores the newest step that is whole; newer ones are named in the log and left alone.

        Args:
          params: tree of `jax.ShapeDtypeStruct` with the wanted shardings, whatever the mesh was
            that saved.
          optimizer: likewise.

        Returns:
          Parameters, optimiser tree, and the batch iterator's position.

        Raises:
          UserError: there is no checkpoint, none is whole, or its shapes are others.
        """
        self.wait()

        def read(step: int) -> Mapping[str, Any]:
            self._verify(step)
            return self._read(step, {"params": params, "optimizer": optimizer}, ("input",))

        restored = self._newest_whole(read)
        return restored["params"], restored["optimizer"], restored["input"]

    def restore_params(self, params: Any, step: int | None = None) -> Any:
        """Restores the parameters alone: one step's, or the newest that are whole, as `restore`.

        Raises:
          UserError: as `restore`, or the step that was asked for is damaged.
        """
        self.wait()

        def read(step: int) -> Any:
            self._verify(step, ("params",))
            return self._read(step, {"params": params})["params"]

        if step is None:
            return self._newest_whole(read)
        try:
            return read(step)
        except _Damaged as damage:
            raise UserError(
                f"{self.folder / str(step)} is damaged ({damage}): choose another step, or put a "
                "copy in its place."
            ) from damage

    def _newest_whole(self, read: Callable[[int], _Read]) -> _Read:
        """What `read` gives for the newest step for which it does not raise `_Damaged`."""
        if not self.manager.all_steps():
            raise self._no_checkpoint()
        for step in reversed(self._steps()):
            try:
                return read(step)
            except _Damaged as damage:
                self._damaged[step] = str(damage)
                logger.warning(
                    "%s is damaged (%s): step %d is passed over for an older one, and stays there.",
                    self.folder / str(step),
                    damage,
                    step,
                )
        found = ", ".join(f"step {step} ({what})" for step, what in sorted(self._damaged.items()))
        raise UserError(
            f"{self.folder} holds no whole checkpoint, but damaged ones, {found}: put a copy "
            "in place of one, or choose another --workdir to start anew."
        )

    def _no_checkpoint(self) -> UserError:
        return UserError(f"{self.folder} holds no checkpoint: train first, or name another run.")

    def _verify(self, step: int, items: Collection[str] | None = None) -> int:
        """Compares a step's files with its manifest, if it is not from before there were any.

        Args:
          step: the step, which is returned.
          items: those to look at; all, if None.

        Raises:
          _Damaged: on all hosts, though the first alone reads.
        """
        folder, began, wrong = self.folder / str(step), time.perf_counter(), ""
        if jax.process_index() == 0:
            if manifest.is_sealed(folder):
                wrong = manifest.find_damage(folder, items)
            elif (self._worth.get(step) or {}).get("manifest"):
                wrong = f"{manifest.MANIFEST} is missing"
            if (seconds := time.perf_counter() - began) > 1:
                logger.info("%s: compared with its manifest in %.1f s", folder, seconds)
        if wrong := _of_first_host(wrong):
            raise _Damaged(wrong)
        return step

    def _read(
        self, step: int, trees: Mapping[str, Any], json_items: Sequence[str] = ()
    ) -> Mapping[str, Any]:
        """Restores items of a step, trees in the shapes and shardings that are given."""
        args = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        args |= {name: ocp.args.JsonRestore() for name in json_items}
        try:
            for name, tree in trees.items():
                self._check(name, tree, step)
            return self.manager.restore(step, args=ocp.args.Composite(**args))
        except (UserError, RuntimeError, MemoryError):  # of other shapes, or from a device
            raise
        except Exception as error:  # Orbax and TensorStore raise all kinds
            if manifest.is_sealed(self.folder / str(step)):
                raise  # what was saved is there: whatever this is, it is no damage
            what = str(error).splitlines()[0][:200]
            raise _Damaged(f"it has no manifest, and cannot be read: {what}") from error

    def _check(self, item: str, wanted: Any, step: int) -> None:
        """Raises `UserError` if a step's item has other shapes than the wanted ones."""
        # Of this item alone: asked for a step's, Orbax would read all, among them damaged ones.
        described = self._handlers[item].metadata(self.manager.directory / str(step) / item)
        saved, ours = _shapes(described), _shapes(wanted)
        for name in sorted(saved.keys() | ours.keys()):
            if saved.get(name) != ours.get(name):
                raise UserError(
                    f"{self.folder}, step {step}: {name} has shape {saved.get(name, 'none')}, but "
                    f"this config makes it {ours.get(name, 'none')}: use the config that the run "
                    "was started with, or another --workdir."
                )

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          UserError: it could not be written.
        """
        if failure := self._settle():
            raise UserError(
                f"{failure}: make room there or see to the disk, and start the same command again."
            )

    def close(self) -> None:
        """Finishes saving, as `wait`, and frees the manager's threads."""
        try:
            self.wait()
        finally:
            self.manager.close()

    def _seal(self) -> None:
        """Orbax calls this on the first host when all hosts' files are there, before it renames."""
        manifest.seal(self.folder / f"{self._saving}{_UNFINISHED}", beside_items=False)

    def _settle(self) -> str:
        """Waits for the save under way; says on all hosts that it failed on any, or nothing.

        What a failed save has written is removed: it is in the way of the next where the disk is
        full. Orbax removes no older step before a newer one is whole. Where some hosts fail and
        others do not, those hear of it when Orbax waits for the rest no longer, after 20 minutes.
        """
        if self._saving is None:
            return ""
        step, error, self._error = self._saving, self._error, None
        try:
            self.manager.wait_until_finished()
        except Exception as raised:
            if not _disk_error(raised):
                raise
            error = error or raised
        finally:
            self._saving = None
        first = jax.process_index() == 0
        if not _on_any_host(error is not None):
            if first:  # what Orbax wrote last, of which nothing is read, so that no kill matters
                with contextlib.suppress(OSError, ValueError):
                    manifest.seal(self.folder / str(step), beside_items=True)
            return ""
        with contextlib.suppress(Exception):  # what ended the save is raised once more
            self.manager.close()
        self._failed.append(step)
        self._remove_leftovers()
        self._open()
        reason = _disk_error(error) or "another host says why"
        if step in self._steps():
            logger.warning(
                "%s: step %d is saved, but removing an older one failed (%s).",
                self.folder,
                step,
                reason,
            )
            return ""
        newest = self.latest_step()
        left = "nothing is" if newest is None else f"step {newest} is the newest that is"
        return f"Step {step} could not be saved in {self.folder} ({reason}), where {left} saved"

    def _remove_leftovers(self) -> None:
        if jax.process_index() == 0:
            for step in self._failed:
                shutil.rmtree(self.folder / f"{step}{_UNFINISHED}", ignore_errors=True)

    def _set_aside(self, step: int) -> None:
        """Renames damaged steps that a new one replaces or passes, so that none is written over."""
        replaced = [damaged for damaged in self._damaged if damaged <= step]
        if not replaced:
            return
        self.manager.close()
        for damaged in replaced:
            if jax.process_index() == 0:
                folder, number = self.folder / str(damaged), 1
                while (aside := folder.with_name(f"{damaged}.damaged-{number}")).exists():
                    number += 1
                folder.rename(aside)
                logger.warning("%s is damaged and now called %s", folder, aside.name)
            del self._damaged[damaged]
        multihost_utils.sync_global_devices("damaged steps are set aside")
        self._open()

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Of the steps on disk and the one being saved, those that stay."""
        whole = sorted(set(steps) - self._damaged.keys())
        best = _best({step: self._worth.get(step) for step in whole})
        newest = whole[-self.max_to_keep :]
        return {*self._damaged, *newest, *(best[:1] if best else ())}


class _Damaged(Exception):
    """A step is not as it was saved; the message is half a sentence that says what is wrong."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, which opens a folder also where a step's worth is damaged."""

    def metrics(self, step: int) -> _Worth | None:
        """A step's worth; None where there is none that can be read."""
        try:
            worth = super().metrics(step)
        except (OSError, ValueError):
            return None
        return worth if isinstance(worth, dict) else None


class _Preserve:
    """Which checkpoints stay, as Orbax asks for it."""

    def __init__(self, kept: Callable[[Sequence[int]], set[int]]):
        self.kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint whether it stays."""
        del context
        kept = self.kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


def _disk_error(error: BaseException | None) -> str:
    """What the system said when a file could not be written; empty if that is not what happened.

    TensorStore, which writes the arrays, raises ValueError with the system's number in the text; on
    several hosts the error may be that one waited in vain for another which had this one.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if number := _OS_ERROR.search(str(error)):
            return os.strerror(int(number[1]))
        error = error.__cause__ or error.__context__
    return ""


def _on_any_host(flag: bool) -> bool:
    """Whether a flag is set on any host, on all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _of_first_host(text: str) -> str:
    """The first host's text, cut to 400 bytes, on all of them."""
    if jax.process_count() == 1:
        return text
    line = np.frombuffer(text.encode()[:400].ljust(400), np.uint8)
    line = multihost_utils.broadcast_one_to_all(line)
    return np.asarray(line, np.uint8).tobytes().decode(errors="ignore").rstrip()


def _worth(value: float | None, config: Mapping[str, Any]) -> _Worth:
    """A value with what it is of: a run may go on with other collections or another measure."""
    evals = config.get("evals", {})
    known = value if value is not None and math.isfinite(value) else None
    of = [evals.get("best", ""), *evals.get("collections", ())]
    return {"value": known, "of": of, "manifest": True}


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
