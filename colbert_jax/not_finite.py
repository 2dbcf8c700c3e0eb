"""Numbers gone wrong: a step whose loss or gradient is not finite changes nothing and is counted.

Many in a row are no accident. The run then stops, and keeps what a later look needs: the batches of
these steps, where their rows came from, and the state, which all of them left as it was.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from colbert_jax.results import write_json

FOLDER = "not_finite"  # of a run, for what is kept
FACTS = "steps.json"

Batch = dict[str, Any]

logger = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Skipped:
    """Steps that changed nothing.

    Attributes:
      in_all: since the run began, int32.
      in_row: up to now without one that did, int32.
    """

    in_all: Int[Array, ""]
    in_row: Int[Array, ""]


def none_skipped() -> Skipped:
    """The count at step 0."""
    return Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    skipped: Skipped, loss: Float[Array, ""], grad_norm: Float[Array, ""], most: int
) -> tuple[Bool[Array, ""], Skipped]:
    """Whether a step may change parameters and moments, and the count with it.

    After `most` in a row none may, whatever its numbers: the host, which looks a step later, finds
    the state as they left it.

    Args:
      skipped: the count before the step.
      loss: of the step.
      grad_norm: of its whole gradient, not finite where any of that is not.
      most: `config.optimizer.max_skipped`.
    """
    usable = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (skipped.in_row < most)
    in_row = jnp.where(usable, 0, jnp.minimum(skipped.in_row + 1, most))
    return usable, Skipped(skipped.in_all + ~usable, in_row)


class NotFinite(Exception):
    """Too many steps in a row were skipped.

    Attributes:
      first: the first of them.
      last: the last; parameters and moments are those after the step before the first.
      values: loss and gradient norm of the last.
      state: the run's, as they left it.
    """

    def __init__(self, first: int, last: int, values: Mapping[str, float], state: Any):
        super().__init__(f"steps {first} to {last}: {values}")
        self.first, self.last, self.values, self.state = first, last, values, state


class Watch:
    """Looks at each step's numbers when the next one is under way, so that no device waits."""

    def __init__(self, source_of: Callable[[int], str]):
        """Watches from the next step on.

        Args:
          source_of: the name of the source that a step's batch came from.
        """
        self._source_of = source_of
        self._unseen: tuple[int, Mapping[str, Any]] | None = None

    def note(self, step: int, metrics: Mapping[str, Any], state: Any) -> None:
        """Takes a step's metrics, which may still be computed, and looks at those before it.

        Raises:
          NotFinite: the step before was one too many.
        """
        self.look(state)
        names = ("loss", "grad_norm", "skipped_in_row", "stop")
        self._unseen = step, {name: metrics[name] for name in names}

    def look(self, state: Any) -> None:
        """Looks at what was noted last; waits for it.

        Raises:
          NotFinite: it was one too many.
        """
        if self._unseen is None:
            return
        step, metrics = self._unseen
        self._unseen = None
        in_row = int(metrics["skipped_in_row"])
        if not in_row:
            return
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        logger.warning(
            "Step %d, a batch of %s, is skipped: its loss is %.4g and its gradient's norm %.4g.",
            step,
            self._source_of(step),
            values["loss"],
            values["grad_norm"],
        )
        if metrics["stop"]:
            raise NotFinite(step - in_row + 1, step, values, state)


class Rereadable(Protocol):
    """An input of which any step's batch can be had again."""

    def __next__(self) -> Batch:
        """This host's slice of the next global batch, as numpy."""
        ...

    def get_state(self) -> dict:
        """The position."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position."""
        ...

    def origin(self, index: int) -> tuple[str, list[int]]:
        """The source of a batch, counted from 0, and which of its rows this host's are."""
        ...


def keep_steps(failure: NotFinite, batches: Rereadable, folder: Path) -> None:
    """Keeps the batches of the skipped steps and where their rows are from; every host its own.

    Args:
      failure: which steps.
      batches: the run's input; it is left behind the last of them.
      folder: that is made; the first host writes `FACTS` there too.

    Raises:
      OSError: there is no room, say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host = jax.process_index()
    batches.set_state(batches.get_state() | {"next_index": failure.first - 1})
    steps = []
    for step in range(failure.first, failure.last + 1):
        source, rows = batches.origin(step - 1)
        steps.append({"step": step, "source": source})
        arrays: dict[str, Any] = flatten(next(batches)) | {"rows": np.asarray(rows, np.int64)}
        np.savez_compressed(folder / batch_file(step, host), **arrays)
    if host == 0:
        values = {name: str(value) for name, value in failure.values.items()}
        write_json(
            folder / FACTS, {"steps": steps, "hosts": jax.process_count(), "last step": values}
        )


def batch_file(step: int, host: int) -> str:
    """The name of the file with one host's part of a step's batch."""
    return f"batch-{step}-host-{host}.npz"


def flatten(batch: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """A batch's arrays by names such as "query/input_ids"."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            arrays |= flatten(value, f"{prefix}{name}/")
        else:
            arrays[f"{prefix}{name}"] = np.asarray(value)
    return arrays


def unflatten(arrays: Mapping[str, np.ndarray]) -> Batch:
    """The batch that `flatten` was given."""
    batch: Batch = {}
    for name, array in arrays.items():
        *sections, last = name.split("/")
        level = batch
        for section in sections:
            level = level.setdefault(section, {})
        level[last] = array
    return batch


def read_steps(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """What `keep_steps` noted: steps with their sources, and the number of hosts.

    Raises:
      OSError, ValueError, KeyError: the folder is not such a one, or damaged.
    """
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return [{"step": int(s["step"]), "source": str(s["source"])} for s in facts["steps"]], int(
        facts["hosts"]
    )


def read_batch(folder: Path, step: int, hosts: int) -> tuple[Batch, np.ndarray]:
    """The whole global batch of a step, all hosts' parts, and the rows' numbers in their source.

    Raises:
      OSError, ValueError, KeyError: a file is missing or damaged.
    """
    parts = []
    for host in range(hosts):
        with np.load(folder / batch_file(step, host), allow_pickle=False) as file:
            parts.append({name: file[name] for name in file.files})
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return unflatten({n: x for n, x in whole.items() if n != "rows"}), whole["rows"]
