"""From the input section of a config to sources of rows: files, a hub data set, or docstrings."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from colbert_jax.data import docstrings
from colbert_jax.data.hub import hub_distillation_rows, hub_fingerprint, hub_rows
from colbert_jax.data.records import ListSource, Source, cached_records
from colbert_jax.data.rows import Row, read_rows
from colbert_jax.errors import UserError

_logger = logging.getLogger(__name__)

HeldOut = tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run trains on.

    Attributes:
      sources: rows by the source's name.
      held_out: documents, queries and judgements that were kept out of the sources, if the corpus
        brings its own evaluation.
    """

    sources: dict[str, Source]
    held_out: HeldOut | None = None

    def texts(self, most_rows: int = 100_000) -> Iterator[str]:
        """Queries and documents of evenly spaced rows, as a tokenizer's training wants them."""
        stride = max(1, sum(len(source) for source in self.sources.values()) // most_rows)
        for source in self.sources.values():
            for start in range(0, len(source), 1024 * stride):
                # a block at a time: single reads of a record file are a hundred times slower
                stop = min(start + 1024 * stride, len(source))
                for row in source.__getitems__(range(start, stop, stride)):
                    yield row["query"]
                    yield from row["documents"]


def open_corpus(config: Mapping[str, Any]) -> Corpus:
    """Opens the corpus of `config.input`.

    Args:
      config: `files` (local JSON Lines or Parquet, each a source) go before `corpus`, which is
        "docstrings" or the hub name of a data set; `sources` are then the set's splits (or the
        packages), `revision` its revision, and `joined_tables` says that texts and scores lie in
        tables of their own. `cache_dir` keeps what was read once.

    Raises:
      UserError: a file or row that cannot be used, or a hub that cannot be reached.
    """
    cache = Path(config["cache_dir"]).expanduser()
    if config["files"]:
        names = [_source_name(path) for path in config["files"]]
        # Files of one name, from different folders, are told apart by their whole paths.
        names = [
            name if names.count(name) == 1 else path
            for name, path in zip(names, config["files"], strict=True)
        ]
        return Corpus(
            {name: _open_file(p, cache) for name, p in zip(names, config["files"], strict=True)}
        )
    if config["corpus"] == "docstrings":
        return _open_docstrings(config, cache)
    if not config["corpus"]:
        raise UserError("There is nothing to train on: set config.input.files or .corpus.")
    return Corpus(_open_hub(config, cache))


def _source_name(path: str) -> str:
    return Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]


def _open_file(path: str, cache: Path) -> Source:
    file = Path(path).expanduser().absolute()
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check config.input.files."
        ) from error
    fingerprint = f"{file} {stat.st_size} {stat.st_mtime_ns}"
    return cached_records(cache, _source_name(path), fingerprint, lambda: read_rows(file))


def _open_hub(config: Mapping[str, Any], cache: Path) -> dict[str, Source]:
    dataset, revision = config["corpus"], config["revision"] or None
    commit = hub_fingerprint(dataset, revision)
    limit = config["max_documents"]
    if config["joined_tables"]:
        name = dataset.rsplit("/", 1)[-1]

        def joined() -> Iterator[Row]:
            return hub_distillation_rows(dataset, commit, documents_per_query=limit)

        return {name: cached_records(cache, name, f"{dataset} {commit} {limit}", joined)}
    sources: dict[str, Source] = {}
    for split in config["sources"]:

        def rows(split: str = split) -> Iterator[Row]:
            return hub_rows(dataset, split, commit)

        sources[split] = cached_records(cache, split, f"{dataset} {split} {commit}", rows)
    return sources


def _open_docstrings(config: Mapping[str, Any], cache: Path) -> Corpus:
    packages = config["sources"] or docstrings.DEFAULT_PACKAGES
    with tqdm(desc="read docstrings", unit="file", dynamic_ncols=True, delay=1) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        pairs = docstrings.load_or_collect(cache, packages, progress=show)
    train, held_out = docstrings.split(pairs)
    rows: dict[str, list[Row]] = {}
    for pair in train:
        row = Row(query=pair.query, documents=[pair.document], scores=None)
        rows.setdefault(pair.source, []).append(row)
    _logger.info("%d docstring pairs to train on, %d held out", len(train), len(held_out))
    return Corpus(
        {name: ListSource(some, name) for name, some in rows.items()},
        docstrings.held_out_collection(held_out),
    )
