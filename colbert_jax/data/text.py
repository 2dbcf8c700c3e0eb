"""Rows of a table as prepared text: cleaned, cut into shards."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from colbert_jax.data.builders import ShardedBuilder
from colbert_jax.data.cleaning import Cleaning, find_duplicates
from colbert_jax.data.rows import Part, Row, RowError
from colbert_jax.data.shards import Shard, Summary, Tick, write_durably
from colbert_jax.data.tables import Place, SequentialReader, Stretch, Table, group_stretches

# A source is cut in 16, within these: a stopped preparation loses at most the shard it was at, and
# all sources together stay within the thousand files that a process may have open.
_SHARDS, _FEWEST_ROWS, _MOST_ROWS = 16, 20_000, 500_000
_BLOCK_ROWS = 512  # rows that a filter is handed at a time

Keep = Callable[[Sequence[Row]], Sequence[bool]]  # says of each row whether it is kept


@dataclasses.dataclass(frozen=True)
class RowFilter:
    """A choice among rows that needs to know some of the source's documents.

    Attributes:
      name: what it is called in the manifest.
      sample: how many documents it wants to know.
      make: makes the choice, given these.
    """

    name: str
    sample: int
    make: Callable[[Sequence[str]], Keep]


class TextJob:
    """Rows of a table, cleaned, as records of text."""

    def __init__(
        self,
        table: Table,
        shards: Sequence[Shard],
        cleaning: Cleaning,
        duplicates: Path | None,
        keep: Keep | None,
    ):
        self.table = table
        self.shards = shards
        self.features = text_features()
        self._cleaning = cleaning
        self._duplicates = duplicates
        self._keep = keep
        self._reader: SequentialReader | None = None

    def examples(self, shard: Shard, summary: Summary) -> Iterator[dict[str, Any] | None]:
        """Yields the rows that are kept; None stands for one that is not."""
        if self._reader is None:
            self._reader = SequentialReader(self.table)
        repeated = self._repeated(shard)
        block: list[tuple[Place, Row]] = []
        for place, row in _read_all(self._reader, shard.stretches):
            summary.read += 1
            try:
                if isinstance(row, RowError):
                    raise row
                row = self._cleaning.apply(row)
                if place.ordinal in repeated:
                    raise RowError("it repeats a row before it", "duplicate")
            except RowError as reason:
                summary.drop(place.name, reason)
                yield None
                continue
            block.append((place, row))
            if self._keep is None or len(block) == _BLOCK_ROWS:
                yield from self._filtered(block, summary)
                block = []
        yield from self._filtered(block, summary)

    def _filtered(
        self, block: Sequence[tuple[Place, Row]], summary: Summary
    ) -> Iterator[dict[str, Any] | None]:
        rows = [row for _, row in block]
        kept = self._keep(rows) if self._keep is not None and rows else [True] * len(rows)
        for (place, row), keep in zip(block, kept, strict=True):
            if not keep:
                reason = "its document is not among the first for its query"
                summary.drop(place.name, RowError(reason, "inconsistent"))
                yield None
                continue
            summary.keep(len(row["documents"]), row["scores"] is not None, place.name)
            yield {**row, "scores": row["scores"] or []}

    def _repeated(self, shard: Shard) -> frozenset[int]:
        if self._duplicates is None:
            return frozenset()
        ordinals = np.load(self._duplicates, mmap_mode="r")
        first = shard.stretches[0].first
        ends = (first, first + shard.rows)
        start, stop = np.searchsorted(ordinals, ends)
        return frozenset(ordinals[start:stop].tolist())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}  # open files stay in their process


class TextBuilder(ShardedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Rows of text from a table, cleaned."""

    def __init__(
        self,
        *,
        data_dir: str | Path,
        config: Any = None,
        cleaning: Mapping[str, Any] | None = None,
        row_filter: RowFilter | None = None,
    ):
        """Describes what to prepare.

        Args:
          data_dir: where prepared corpora are kept.
          config: the source's name, or a `tfds.core.BuilderConfig`.
          cleaning: values of `Cleaning` that differ from the corpus's own; none takes what is
            prepared already, however it was cleaned.
          row_filter: chooses among the rows that cleaning leaves.
        """
        super().__init__(data_dir=data_dir, config=config)
        self._changes, self._row_filter = dict(cleaning or {}), row_filter

    def default_cleaning(self) -> Cleaning:
        """Which rows of this corpus are kept where nothing else is asked for."""
        return Cleaning()

    def get_features(self) -> tfds.features.FeaturesDict:
        """The columns of a record."""
        return text_features()

    def open_table(self) -> Table:
        """The rows; fetches what has to be fetched."""
        raise NotImplementedError

    def origin(self, resolved: bool) -> dict[str, Any]:
        """Where the rows come from, as part of `request`."""
        raise NotImplementedError

    def request(self, resolved: bool) -> dict[str, Any]:
        """As `ShardedBuilder.request`."""
        asked = self._changes or resolved
        return self.origin(resolved) | {
            "cleaning": dataclasses.asdict(self._cleaning()) if asked else None,
            "filter": self._row_filter.name if self._row_filter else None,
        }

    def _cleaning(self) -> Cleaning:
        return dataclasses.replace(self.default_cleaning(), **self._changes)

    def open_job(self) -> tuple[TextJob, dict[str, Any]]:
        """The shards; a first pass over the rows cuts them and finds repeated ones."""
        cleaning = self._cleaning()
        table = self.open_table()
        duplicates = self.unfinished / "duplicates.npy" if cleaning.deduplicate else None
        groups = self._read_plan(duplicates)
        if groups is None:
            groups = self._make_plan(table, cleaning, duplicates)
        shards = [Shard(number, group) for number, group in enumerate(groups)]
        keep = None
        if self._row_filter is not None:
            total = sum(shard.rows for shard in shards)
            with self.bar(total, ": draw a sample") as bar:
                every = _ticking(_read_whole(table, groups), bar.update)
                keep = self._row_filter.make(_sample(every, total, self._row_filter.sample))
        job = TextJob(table, shards, cleaning, duplicates, keep)
        return job, {"origin": table.description}

    @property
    def _plan(self) -> Path:
        return self.unfinished / "plan.json"

    def _read_plan(self, duplicates: Path | None) -> list[tuple[Stretch, ...]] | None:
        """What an earlier preparation planned, if nothing of it is lost."""
        if duplicates is not None and not duplicates.is_file():
            return None
        try:
            plan = json.loads(self._plan.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return [
            tuple(Stretch(file, Part(*part), first) for file, part, first in group)
            for group in plan
        ]

    def _make_plan(
        self, table: Table, cleaning: Cleaning, duplicates: Path | None
    ) -> list[tuple[Stretch, ...]]:
        """Which stretches make which shard, and which rows repeat one before them."""
        fine = table.stretches()
        total = sum(stretch.part.rows or 0 for stretch in fine)
        rows = min(max(total // _SHARDS, _FEWEST_ROWS), _MOST_ROWS)
        groups = group_stretches(fine, rows)
        if duplicates is not None:
            scratch = self.unfinished / "digests.npy"
            with self.bar(total, ": search duplicates") as bar:
                every = _ticking(_read_whole(table, groups), bar.update)
                np.save(duplicates, find_duplicates(every, cleaning, total, scratch))
        write_durably(self._plan, json.dumps(groups))
        return groups


def text_features() -> tfds.features.FeaturesDict:
    """A record of text: a query, its documents, and their scores if there are any."""
    return tfds.features.FeaturesDict(
        {
            "query": tfds.features.Text(),
            "documents": tfds.features.Sequence(tfds.features.Text()),
            "scores": tfds.features.Sequence(np.float32),
        }
    )


def _read_whole(
    table: Table, groups: Sequence[Sequence[Stretch]]
) -> Iterator[tuple[Place, Row | RowError]]:
    return _read_all(SequentialReader(table), itertools.chain.from_iterable(groups))


def _read_all(
    reader: SequentialReader, stretches: Iterable[Stretch]
) -> Iterator[tuple[Place, Row | RowError]]:
    for stretch in stretches:
        yield from reader.read(stretch)


def _sample(rows: Iterable[tuple[Place, Row | RowError]], total: int, count: int) -> list[str]:
    """First documents of about so many rows, evenly spaced."""
    wanted = {i * total // count for i in range(count)}
    return [
        row["documents"][0]
        for place, row in rows
        if place.ordinal in wanted and not isinstance(row, RowError)
    ]


def _ticking(items: Iterable[Any], tick: Tick) -> Iterator[Any]:
    for item in items:
        tick(1)
        yield item
