"""TFDS builders of prepared corpora: ArrayRecord shards, written one by one and never twice.

A prepared source is a TFDS folder, `<data_dir>/<corpus>/<source>/<version>`, with a manifest beside
TFDS's own files. Shards that were finished before a program was stopped wait next to it, and are
not made again. A folder appears under its name only when it is whole.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from array_record.python.array_record_module import ArrayRecordWriter
from filelock import FileLock, Timeout
from google.protobuf import json_format
from tqdm import tqdm

from colbert_jax.data.cleaning import REASONS, Cleaning, find_duplicates
from colbert_jax.data.records import MANIFEST_FILE, TextSource, read_manifest
from colbert_jax.data.rows import Part, Row, RowError
from colbert_jax.data.tables import (
    Place,
    SequentialReader,
    Stretch,
    Table,
    merge_stretches,
)
from colbert_jax.errors import UserError
from colbert_jax.tokenization import ColbertTokenizer

_logger = logging.getLogger(__name__)

# A source is cut in 16, within these: a stopped preparation loses at most the shard it was at, and
# all sources together stay within the thousand files that a process may have open.
_SHARDS, _FEWEST_ROWS, _MOST_ROWS = 16, 20_000, 500_000
_BLOCK_ROWS = 512  # rows that a filter or a tokenizer is handed at a time
# One row a group, or reading one row would mean decompressing its neighbours.
_WRITER_OPTIONS = "group_size:1,zstd:1"

Keep = Callable[[Sequence[Row]], Sequence[bool]]  # says of each row whether it is kept
Tick = Callable[[int], object]


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


class Shard(NamedTuple):
    """A shard to write: the stretch of the table that it is made of."""

    number: int
    stretch: Stretch


class Job(Protocol):
    """What a builder's shards are made of; crosses to other processes."""

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards, in order."""

    @property
    def features(self) -> tfds.features.FeaturesDict:
        """The columns of an example."""

    def examples(self, shard: Shard, summary: "Summary") -> Iterator[tuple[dict[str, Any], int]]:
        """Yields `(example, rows read for it)`, and puts down what it dropped."""


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


class _OwnInfo(tfds.core.DatasetInfo):
    """TFDS's description of a data set, of which nobody else keeps another."""

    def initialize_from_bucket(self) -> None:
        """Asks nobody; TFDS would leave an empty temporary folder behind each time."""


class ShardedBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder whose finished shards outlive a kill, with Beam or without."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data_dir: str | Path, config: Any = None):
        try:
            with _quiet():
                super().__init__(data_dir=str(data_dir), config=config, file_format="array_record")
        except json_format.ParseError as error:
            name = config if isinstance(config, str) else config.name
            raise UserError(
                f"{Path(data_dir) / self.name / name} is damaged ({error}): remove it, so that it "
                "is prepared anew."
            ) from None
        self.folder = Path(self.data_dir)
        self._show_after_seconds = 0.0
        self.unfinished = self.folder.parent / f".{self.folder.name}.unfinished"

    def _info(self) -> tfds.core.DatasetInfo:
        return _OwnInfo(builder=self, features=self.get_features())

    def get_features(self) -> tfds.features.FeaturesDict:
        """The columns of a record."""
        raise NotImplementedError

    def request(self, resolved: bool) -> dict[str, Any]:
        """What is asked for: what finished shards, or a prepared folder, must have been made of.

        Args:
          resolved: whether every value is wanted; otherwise those that are left open are None.
        """
        raise NotImplementedError

    def open_job(self) -> tuple[Job, dict[str, Any]]:
        """The shards to write, and what the manifest says beside their sums."""
        raise NotImplementedError

    def prepare(
        self,
        beam_runner: str | None = None,
        beam_options: Any = None,
        *,
        wait: bool = False,
        show_after_seconds: float = 0.0,
    ) -> dict[str, Any]:
        """Prepares the folder, unless it is there; goes on where an earlier preparation stopped.

        Args:
          beam_runner: a Beam runner's name; None writes the shards in this process.
          beam_options: Beam's `PipelineOptions`, for a runner.
          wait: whether to wait for another preparation of the folder to end.
          show_after_seconds: how long no progress bar is drawn.

        Returns:
          The manifest.

        Raises:
          UserError: data that cannot be read, a folder that cannot be written, another preparation
            of it under way, or one that was asked for otherwise.
        """
        self._show_after_seconds = show_after_seconds
        if self.is_prepared():
            self._tidy()  # in vain where the disk cannot be written
            return self._checked_manifest()
        lock = FileLock(self.folder.parent / ".lock")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise
                _logger.info("waiting for another preparation of %s", self.folder)
                lock.acquire()
            try:
                if not self.is_prepared():  # by the one that was waited for
                    self.download_and_prepare(
                        download_config=tfds.download.DownloadConfig(
                            beam_runner=beam_runner, beam_options=beam_options
                        )
                    )
            finally:
                lock.release()
        except Timeout:
            raise UserError(
                f"Another preparation of {self.folder.parent} is under way: wait for it, or choose "
                "another folder."
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror or error}): make room there, or "
                "choose another folder."
            ) from error
        return read_manifest(self.folder)

    def download_and_prepare(self, **kwargs: Any) -> None:
        """TFDS's own way to prepare; `prepare` says in one sentence what goes wrong."""
        with _quiet():
            super().download_and_prepare(**{"download_dir": str(self.unfinished)} | kwargs)
        self._tidy()

    def _tidy(self) -> None:
        """Removes what killed programs left of a source that is prepared now."""
        for stale in [*self.folder.parent.glob("incomplete.*"), self.unfinished]:
            if stale.exists():
                shutil.rmtree(stale, ignore_errors=True)

    def _checked_manifest(self) -> dict[str, Any]:
        manifest = read_manifest(self.folder)
        _check_same(manifest["request"], self.request(resolved=False), self.folder)
        return manifest

    def is_prepared(self) -> bool:
        """Whether the folder is there, and whole."""
        return (self.folder / MANIFEST_FILE).is_file()

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        request = self.request(resolved=True)
        self._open_unfinished(request)
        job, told = self.open_job()
        todo = [shard for shard in job.shards if _finished(self.unfinished, shard) is None]
        if len(todo) < len(job.shards):
            _logger.info(
                "going on: %d of %d shards are written",
                len(job.shards) - len(todo),
                len(job.shards),
            )
        if download_config is not None and download_config.beam_runner:
            _write_with_beam(job, todo, self.unfinished, download_config)
        else:
            self._write_here(job, todo)
        self._publish(job, request, told)

    def _open_unfinished(self, request: dict[str, Any]) -> None:
        """Keeps what an earlier preparation of the same finished, and throws away all else."""
        note = self.unfinished / "request.json"
        kept = None
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(note.read_text(encoding="utf-8"))
        if kept != json.loads(json.dumps(request)):
            if self.unfinished.exists():
                shutil.rmtree(self.unfinished)
            self.unfinished.mkdir(parents=True)
            _write_durably(note, json.dumps(request))

    def _write_here(self, job: Job, todo: Sequence[Shard]) -> None:
        total = sum(shard.stretch.part.rows or 0 for shard in job.shards)
        done = total - sum(shard.stretch.part.rows or 0 for shard in todo)
        with self.bar(total, initial=done) as bar:
            for shard in todo:
                write_shard(job, shard, self.unfinished, bar.update)

    def label(self) -> str:
        """What the source is called on the screen."""
        return f"{self.name}/{self.builder_config.name}"

    def bar(self, rows: int, what: str = "", initial: int = 0) -> tqdm:
        """A progress bar over rows."""
        return tqdm(
            total=rows,
            initial=initial,
            desc=f"{self.label()}{what}",
            unit="row",
            unit_scale=True,
            dynamic_ncols=True,
            delay=self._show_after_seconds,
        )

    def _publish(self, job: Job, request: dict[str, Any], told: dict[str, Any]) -> None:
        """Moves the shards into TFDS's folder, which is still under another name, and sums up."""
        total, shards = Summary(), []
        for shard in job.shards:
            summary = _finished(self.unfinished, shard)
            assert summary is not None
            total.add(summary, f"{self.folder}, shard {shard.number}")
            if summary["kept"]:
                shards.append((shard, summary))
        if not shards:
            why = "; ".join(f"{place}" for place in total.first_dropped.values())
            raise UserError(
                f"{self.folder}: none of {total.read} rows can be used"
                + (f" (the first: {why})." if why else ": give a source that has some.")
            )
        template = self._get_filename_template(split_name="train")
        files = []
        for index, (shard, summary) in enumerate(shards):
            path = Path(template.sharded_filepath(shard_index=index, num_shards=len(shards)))
            _link(_shard_path(self.unfinished, shard), path)
            about = {key: summary[key] for key in ("kept", "bytes", "sha256", "rows_sha256")}
            files.append({"name": path.name} | about)
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[file["kept"] for file in files],
            num_bytes=sum(file["bytes"] for file in files),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.splits.SplitDict([split]))
        manifest = total.to_json() | told | {"request": request, "shards": files}
        _write_durably(Path(self.data_dir) / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")

    def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
        raise NotImplementedError  # TFDS's way, which would begin anew after a kill


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

    def examples(self, shard: Shard, summary: Summary) -> Iterator[tuple[dict[str, Any], int]]:
        """Yields the rows that are kept; an empty example stands for one that is not."""
        if self._reader is None:
            self._reader = SequentialReader(self.table)
        repeated = self._repeated(shard.stretch)
        block: list[tuple[Place, Row]] = []
        for place, row in self._reader.read(shard.stretch):
            summary.read += 1
            try:
                if isinstance(row, RowError):
                    raise row
                row = self._cleaning.apply(row)
                if place.ordinal in repeated:
                    raise RowError("it repeats a row before it", "duplicate")
            except RowError as reason:
                summary.drop(place.name, reason)
                yield {}, 1
                continue
            block.append((place, row))
            if self._keep is None or len(block) == _BLOCK_ROWS:
                yield from self._filtered(block, summary)
                block = []
        yield from self._filtered(block, summary)

    def _filtered(
        self, block: Sequence[tuple[Place, Row]], summary: Summary
    ) -> Iterator[tuple[dict[str, Any], int]]:
        rows = [row for _, row in block]
        kept = self._keep(rows) if self._keep is not None and rows else [True] * len(rows)
        for (place, row), keep in zip(block, kept, strict=True):
            if not keep:
                reason = "its document is not among the first for its query"
                summary.drop(place.name, RowError(reason, "inconsistent"))
                yield {}, 1
                continue
            summary.keep(len(row["documents"]), row["scores"] is not None, place.name)
            yield {**row, "scores": row["scores"] or []}, 1

    def _repeated(self, stretch: Stretch) -> frozenset[int]:
        if self._duplicates is None:
            return frozenset()
        ordinals = np.load(self._duplicates, mmap_mode="r")
        ends = (stretch.first, stretch.first + (stretch.part.rows or 0))
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
        plan, duplicates = self.unfinished / "plan.json", self.unfinished / "duplicates.npy"
        try:
            stretches = [
                Stretch(file, Part(*part), first)
                for file, part, first in json.loads(plan.read_text(encoding="utf-8"))
            ]
        except (OSError, ValueError):
            fine = table.stretches()
            total = sum(stretch.part.rows or 0 for stretch in fine)
            rows = min(max(total // _SHARDS, _FEWEST_ROWS), _MOST_ROWS)
            stretches = merge_stretches(fine, rows)
            if cleaning.deduplicate:
                scratch = self.unfinished / "digests.npy"
                with self.bar(total, ": search duplicates") as bar:
                    every = _ticking(_read_all(table, stretches), bar.update)
                    np.save(duplicates, find_duplicates(every, cleaning, total, scratch))
            _write_durably(plan, json.dumps(stretches))
        shards = [Shard(index, stretch) for index, stretch in enumerate(stretches)]
        found = duplicates if cleaning.deduplicate else None
        keep = None
        if self._row_filter is not None:
            total = sum(stretch.part.rows or 0 for stretch in stretches)
            with self.bar(total, ": draw a sample") as bar:
                every = _ticking(_read_all(table, stretches), bar.update)
                keep = self._row_filter.make(_sample(every, total, self._row_filter.sample))
        job = TextJob(table, shards, cleaning, found, keep)
        return job, {"origin": table.description}


class TokenJob:
    """Records of text as records of token ids."""

    def __init__(self, source: TextSource, tokenizer: ColbertTokenizer):
        self.source = source
        self.tokenizer = tokenizer
        self.features = token_features(tokenizer.vocab_size, source.has_scores)
        self.shards, first = [], 0
        for index, rows in enumerate(source.shard_lengths):
            self.shards.append(Shard(index, Stretch(0, Part(first, rows), first)))
            first += rows

    def examples(self, shard: Shard, summary: Summary) -> Iterator[tuple[dict[str, Any], int]]:
        """Yields the tokens of each row, cut to the tokenizer's lengths."""
        first, count = shard.stretch.first, shard.stretch.part.rows or 0
        for start in range(first, first + count, _BLOCK_ROWS):
            rows = self.source.__getitems__(range(start, min(start + _BLOCK_ROWS, first + count)))
            queries = self.tokenizer.query_ids([row["query"] for row in rows])
            documents = iter(
                self.tokenizer.document_ids([text for row in rows for text in row["documents"]])
            )
            for number, (row, query) in enumerate(zip(rows, queries, strict=True), start + 1):
                own = [next(documents) for _ in row["documents"]]
                scored = row["scores"] is not None
                summary.read += 1
                summary.tokens += len(query) + sum(map(len, own))
                summary.keep(len(own), scored, f"row {number}")
                example: dict[str, Any] = {
                    "query": query,
                    "documents": list(itertools.chain.from_iterable(own)),
                    "lengths": [len(ids) for ids in own],
                }
                if scored:
                    example["scores"] = row["scores"]
                arrays = {
                    key: np.array(value, self.features[key].np_dtype)
                    for key, value in example.items()
                }
                yield arrays, 1


class TokenBuilder(ShardedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Token ids of a prepared source, in a folder within it, for one tokenizer and its prompts."""

    name = "tokens"

    def __init__(self, source: TextSource, tokenizer: ColbertTokenizer, tokenizer_name: str = ""):
        self._source, self._tokenizer, self._tokenizer_name = source, tokenizer, tokenizer_name
        config = tfds.core.BuilderConfig(name=token_folder(tokenizer), version=self.VERSION)
        super().__init__(data_dir=source.folder, config=config)

    def label(self) -> str:
        """What is tokenized, on the screen."""
        return f"{'/'.join(self._source.folder.parts[-3:-1])}: tokens"

    def get_features(self) -> tfds.features.FeaturesDict:
        """The columns of a record."""
        return token_features(self._tokenizer.vocab_size, self._source.has_scores)

    def request(self, resolved: bool) -> dict[str, Any]:
        """As `ShardedBuilder.request`."""
        config = self._tokenizer.config
        return {
            "fingerprint": self._tokenizer.fingerprint(),
            "query_length": config.query_length,
            "document_length": config.document_length,
            "text": [shard["rows_sha256"] for shard in self._source.manifest["shards"]],
        }

    def open_job(self) -> tuple[TokenJob, dict[str, Any]]:
        """One shard for each of the text."""
        config = self._tokenizer.config
        told = {
            "tokenizer": {
                "name": self._tokenizer_name,
                "fingerprint": self._tokenizer.fingerprint(),
                "vocab_size": self._tokenizer.vocab_size,
                "query_prompt": config.query_prompt,
                "document_prompt": config.document_prompt,
                "query_length": config.query_length,
                "document_length": config.document_length,
            }
        }
        return TokenJob(self._source, self._tokenizer), told


def text_features() -> tfds.features.FeaturesDict:
    """A record of text: a query, its documents, and their scores if there are any."""
    return tfds.features.FeaturesDict(
        {
            "query": tfds.features.Text(),
            "documents": tfds.features.Sequence(tfds.features.Text()),
            "scores": tfds.features.Sequence(np.float32),
        }
    )


def token_features(vocab_size: int, scored: bool) -> tfds.features.FeaturesDict:
    """A record of tokens: ids of the query, ids of all documents in a row, and their lengths."""

    def vector(dtype: Any) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes")

    ids = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    features = {"query": vector(ids), "documents": vector(ids), "lengths": vector(np.uint32)}
    return tfds.features.FeaturesDict(features | ({"scores": vector(np.float32)} if scored else {}))


def token_folder(tokenizer: ColbertTokenizer) -> str:
    """What the tokens of a tokenizer are called, within a prepared source's `tokens`."""
    return tokenizer.fingerprint()[:16]


def _read_all(table: Table, stretches: Sequence[Stretch]) -> Iterator[tuple[Place, Row | RowError]]:
    reader = SequentialReader(table)
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


def write_shard(job: Job, shard: Shard, folder: Path, tick: Tick = lambda rows: None) -> None:
    """Writes one shard and, when it is whole, what is told of it.

    Raises:
      UserError: there is no room, or what the job's examples raise.
    """
    path, summary = _shard_path(folder, shard), Summary()
    partial = path.with_suffix(".partial")
    features = job.features
    content = hashlib.sha256()
    writer = ArrayRecordWriter(os.fspath(partial), _WRITER_OPTIONS)
    try:
        for example, rows in job.examples(shard, summary):
            tick(rows)
            if example:
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
    _write_durably(path.with_suffix(".json"), json.dumps(told))


def _canonical(example: Mapping[str, Any]) -> bytes:
    """An example as bytes that are always the same; a protocol buffer's are not."""
    text = json.dumps(example, sort_keys=True, default=lambda array: array.tolist())
    return f"{text}\n".encode()


def _write_with_beam(job: Job, todo: Sequence[Shard], folder: Path, config: Any) -> None:
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
    except (RuntimeError, ValueError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"Beam's {config.beam_runner} failed ({lines[-1]}): see its log; the shards that it "
            "finished are kept."
        ) from error


def _shard_path(folder: Path, shard: Shard) -> Path:
    return folder / f"shard-{shard.number:05d}.array_record"


def _finished(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """What is told of a shard, if it is whole."""
    path = _shard_path(folder, shard)
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return told if path.stat().st_size == told["bytes"] else None
    except (OSError, ValueError):
        return None


def _link(path: Path, to: Path) -> None:
    """A second name for a file, so that it outlives a failure of what comes next."""
    try:
        to.hardlink_to(path)
    except OSError:  # some file systems have no such names
        path.rename(to)


def _checked(path: Path, write: Callable[..., object], *record: bytes) -> None:
    try:
        write(*record)
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"{path} cannot be written ({reason}): make room there, or choose another folder."
        ) from None


def _check_same(was: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    asked = json.loads(json.dumps(asked))
    for key in sorted(was.keys() | asked.keys()):
        if was.get(key) != asked.get(key) and asked.get(key) is not None:
            raise UserError(
                f"{folder} was prepared with {key}={was.get(key)!r}, not {asked.get(key)!r}: "
                "remove it, or choose another folder."
            )


def _write_durably(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's own announcements off the screen; what a user needs is said here."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
