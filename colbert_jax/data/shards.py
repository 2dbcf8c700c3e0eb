"""Shards of a prepared corpus: written one by one, each whole or not at all, here or by Beam."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from colbert_jax.data.cleaning import REASONS
from colbert_jax.data.rows import RowError
from colbert_jax.data.tables import Stretch
from colbert_jax.errors import UserError

# One row a group, or reading one row would mean decompressing its neighbours.
_WRITER_OPTIONS = "group_size:1,zstd:1"
Tick = Callable[[int], object]


class Shard(NamedTuple):
    """A shard to write: its number, and the stretches of the table that it is made of."""

    number: int
    stretches: tuple[Stretch, ...]

    @property
    def rows(self) -> int:
        """How many rows it is made of, those included that will be dropped."""
        return sum(stretch.part.rows or 0 for stretch in self.stretches)


class Summary:
    """What is told of the rows of a shard, or of all of them."""

    def __init__(self) -> None:
        self.read = 0
        self.kept = 0
        self.documents: tuple[int, int] | None = None  # fewest and most of a row
        self.scored: bool | None = None
        self.tokens = 0
        self.dropped: Counter[str] = Counter()
        self.first_dropped: dict[str, str] = {}

    def drop(self, place: str, reason: RowError) -> None:
        """Counts a row that is left out."""
        self.dropped[reason.kind] += 1
        self.first_dropped.setdefault(reason.kind, f"{place}: {reason}")

    def keep(self, documents: int, scored: bool, place: str) -> None:
        """Counts a row that is kept; raises `UserError` if it alone has scores, or none."""
        self.kept += 1
        fewest, most = self.documents or (documents, documents)
        self.documents = min(fewest, documents), max(most, documents)
        if self.scored not in (None, scored):
            raise UserError(
                f"{place} is {'with' if scored else 'without'} scores, unlike those before it: "
                "give all rows of a source scores, or none."
            )
        self.scored = scored

    def to_json(self) -> dict[str, Any]:
        """What a manifest holds of it."""
        return {
            "read": self.read,
            "kept": self.kept,
            "documents": self.documents,
            "scored": self.scored,
            "tokens": self.tokens,
            "dropped": {kind: self.dropped[kind] for kind in REASONS if self.dropped[kind]},
            "first_dropped": self.first_dropped,
        }

    def add(self, other: Mapping[str, Any], place: str) -> None:
        """Adds a later shard's, as `to_json` gave it."""
        self.read += other["read"]
        self.tokens += other["tokens"]
        self.dropped.update(other["dropped"])
        self.first_dropped = other["first_dropped"] | self.first_dropped
        if other["kept"]:
            kept = self.kept + other["kept"]
            for documents in other["documents"]:
                self.keep(documents, other["scored"], place)
            self.kept = kept


class Job(Protocol):
    """What a builder's shards are made of; crosses to other processes."""

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards, in order."""

    @property
    def features(self) -> tfds.features.FeaturesDict:
        """The columns of an example."""

    def examples(self, shard: Shard, summary: Summary) -> Iterator[dict[str, Any] | None]:
        """Yields an example for each row; None for one that was dropped, and put down."""


def write_shard(job: Job, shard: Shard, folder: Path, tick: Tick = lambda rows: None) -> None:
    """Writes one shard and, when it is whole, what is told of it.

    Raises:
      UserError: there is no room, or what the job's examples raise.
    """
    path, summary = shard_path(folder, shard), Summary()
    partial = path.with_suffix(".partial")
    features = job.features
    content = hashlib.sha256()
    writer = ArrayRecordWriter(os.fspath(partial), _WRITER_OPTIONS)
    try:
        for example in job.examples(shard, summary):
            tick(1)
            if example is not None:
                content.update(_canonical(example))
                _checked(path, writer.write, features.serialize_example(example))
        _checked(path, writer.close)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error is the one to report
            writer.close()
        partial.unlink(missing_ok=True)
        raise
    with partial.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    told = summary.to_json() | {
        "bytes": partial.stat().st_size,
        "sha256": digest,
        "rows_sha256": content.hexdigest(),
    }
    partial.rename(path)
    write_durably(path.with_suffix(".json"), json.dumps(told))


def write_with_beam(job: Job, todo: Sequence[Shard], folder: Path, config: Any) -> None:
    """Writes shards with a Beam runner.

    Args:
      job: crosses to the runner's workers.
      todo: the shards to write.
      folder: where they are kept; all workers must see it.
      config: TFDS's `DownloadConfig`, with the runner and its options.

    Raises:
      UserError: Beam is not installed, or the runner failed.
    """
    try:
        import apache_beam as beam
    except ImportError:
        raise UserError("Apache Beam is not installed: pip install 'colbert_jax[beam]'.") from None

    try:
        with beam.Pipeline(runner=config.beam_runner, options=config.beam_options) as pipeline:
            _ = (
                pipeline
                | "Shards" >> beam.Create(list(todo))
                | "Spread" >> beam.Reshuffle()
                | "Write" >> beam.Map(lambda shard: write_shard(job, shard, folder))
            )
    except (UserError, OSError):
        raise
    except Exception as error:  # each runner has its own, and wraps a worker's as it likes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"Beam's {config.beam_runner} failed ({lines[-1]}): see its log; the shards that it "
            "finished are kept."
        ) from error


def finished(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """What is told of a shard, if it is whole."""
    path = shard_path(folder, shard)
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return told if path.stat().st_size == told["bytes"] else None
    except (OSError, ValueError):
        return None


def shard_path(folder: Path, shard: Shard) -> Path:
    """Where a shard lies until all are finished."""
    return folder / f"shard-{shard.number:05d}.array_record"


def write_durably(path: Path, text: str) -> None:
    """Writes a file that is there whole, on the disk, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _canonical(example: Mapping[str, Any]) -> bytes:
    """An example as bytes that are always the same; a protocol buffer's are not."""
    text = json.dumps(example, sort_keys=True, default=lambda array: array.tolist())
    return f"{text}\n".encode()


def _checked(path: Path, write: Callable[..., object], *record: bytes) -> None:
    try:
        write(*record)
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"{path} cannot be written ({reason}): make room there, or choose another folder."
        ) from None
