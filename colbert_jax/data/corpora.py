"""The corpora that are known by name, as TFDS builders.

A corpus of the hub is a class of a few lines: see `NomicSupervised`.
"""

import dataclasses
import glob
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tqdm import tqdm

from colbert_jax.data import docstrings
from colbert_jax.data.cleaning import Cleaning
from colbert_jax.data.hub import Hub, hub_fingerprint, split_files
from colbert_jax.data.rows import Row
from colbert_jax.data.tables import (
    FilesTable,
    JoinedTable,
    RowsTable,
    Table,
    describe_files,
    index_texts,
)
from colbert_jax.data.text import TextBuilder
from colbert_jax.errors import UserError

_logger = logging.getLogger(__name__)

HeldOut = tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]
_REDDIT = "Reddit's terms"
_S2ORC = "ODC-BY 1.0, non-commercial; papers their own"
_YAHOO = "Yahoo's terms, academic use only"
_AMAZON = "Amazon's terms"
_STACK_EXCHANGE = "CC BY-SA"
_WIKIPEDIA = "CC BY-SA"
_UNKNOWN = "none stated"


@dataclasses.dataclass(frozen=True)
class PublicSource:
    """A source of a public corpus.

    Attributes:
      name: as the hub calls its split.
      rows: as published, before any cleaning; 0 if not known.
      licence: of the texts, in short, as far as it could be found out; no legal advice.
    """

    name: str
    rows: int
    licence: str


class HubCorpus(TextBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A data set of the Hugging Face Hub: a source is one of its splits.

    Attributes:
      dataset: its name there.
      sources: its splits.
      columns: what it calls the columns of `rows.read_rows`, where it calls them otherwise.
      document_length: tokens of a document that the recipe trains on, for `prepare`.
    """

    dataset: ClassVar[str] = ""
    sources: ClassVar[Sequence[PublicSource]] = ()
    columns: ClassVar[Mapping[str, str]] = {}
    document_length: ClassVar[int] = 180 + 7

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=s.name) for s in cls.sources]

    @property
    def split(self) -> str:
        """The hub's split."""
        return self.builder_config.name

    def __init__(self, *, revision: str | None = None, hub: Hub | None = None, **kwargs: Any):
        """Describes what to prepare.

        Args:
          revision: a branch, tag or commit; None takes what is prepared already, or the newest.
          hub: where to ask.
          **kwargs: as of `TextBuilder`.
        """
        self._revision, self._hub, self._commit = revision, hub or Hub(), ""
        super().__init__(**kwargs)

    def origin(self, resolved: bool) -> dict[str, Any]:
        """The data set, the split and the commit."""
        if self._commit == "" and (resolved or self._revision):
            self._commit = hub_fingerprint(self.dataset, self._revision, hub=self._hub)
        return {
            "dataset": self.dataset,
            "split": self.split,
            "columns": dict(self.columns) if self.columns or resolved else None,
            "revision": self._commit or None,
        }

    def open_table(self) -> Table:
        """Fetches the split's files."""
        files = self._hub.files(self.dataset, self._commit)
        names = split_files(files, self.split, dataset=self.dataset)
        paths = self.fetch(names)
        return FilesTable(tuple(paths), tuple(names), dict(self.columns), self.describe(paths))

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Downloads files that were not before."""
        label = f"{self.name}/{self.builder_config.name}: fetch"
        with tqdm(names, desc=label, unit="file", dynamic_ncols=True, delay=1) as bar:
            return [self._hub.fetch(self.dataset, self._commit, name) for name in bar]

    def describe(self, paths: Sequence[Path]) -> dict[str, Any]:
        """What the manifest says of the files."""
        return {
            "dataset": self.dataset,
            "revision": self._commit,
            "files": [{"name": path.name, "bytes": path.stat().st_size} for path in paths],
        }


class NomicUnsupervised(HubCorpus):
    """Pairs of phase 1: 239 million, from 29 sources (arXiv 2402.01613)."""

    dataset = "nomic-ai/nomic-embed-unsupervised-data"
    sources = (
        PublicSource("reddit_title_body", 66_204_599, _REDDIT),
        PublicSource("amazon_reviews", 39_357_860, _AMAZON),
        PublicSource("paq", 53_874_545, "CC BY-SA 3.0"),
        PublicSource("s2orc_citation_titles", 7_722_225, _S2ORC),
        PublicSource("s2orc_title_abstract", 36_051_582, _S2ORC),
        PublicSource("s2orc_abstract_citation", 7_639_890, _S2ORC),
        PublicSource("s2orc_abstract_body", 6_550_431, _S2ORC),
        PublicSource("wikianswers", 10_087_503, _UNKNOWN),
        PublicSource("wikipedia", 6_198_049, _WIKIPEDIA),
        PublicSource("gooaq", 1_281_138, "Apache-2.0; snippets of third parties"),
        PublicSource("codesearch", 864_023, "each repository's own"),
        PublicSource("yahoo_title_answer", 276_726, _YAHOO),
        PublicSource("agnews", 420_288, "research use only"),
        PublicSource("amazonqa", 226_137, _AMAZON),
        PublicSource("yahoo_qa", 143_477, _YAHOO),
        PublicSource("yahoo_title_question", 213_320, _YAHOO),
        PublicSource("ccnews", 353_670, "the publishers' copyright"),
        PublicSource("npr", 365_075, "NPR's copyright"),
        PublicSource("eli5", 106_781, _REDDIT),
        PublicSource("cnn", 293_521, "CNN's and Daily Mail's copyright"),
        PublicSource("stackexchange_duplicate_questions", 73_210, _STACK_EXCHANGE),
        PublicSource("stackexchange_title_body", 80_695, _STACK_EXCHANGE),
        PublicSource("stackexchange_body_body", 65_689, _STACK_EXCHANGE),
        PublicSource("sentence_compression", 173_604, _UNKNOWN),
        PublicSource("wikihow", 96_029, "CC BY-NC-SA 3.0"),
        PublicSource("altlex", 110_708, _WIKIPEDIA),
        PublicSource("quora", 44_885, "Quora's terms, non-commercial"),
        PublicSource("simplewiki", 97_717, _WIKIPEDIA),
        PublicSource("squad", 25_117, "CC BY-SA 4.0"),
    )


class NomicSupervised(HubCorpus):
    """Pairs of phase 2 with mined negatives: 1.7 million, from ten sources (arXiv 2402.01613)."""

    dataset = "nomic-ai/nomic-embed-supervised-data"
    sources = (
        PublicSource("medi_sts_wiki_rephrasal", 25_000, _WIKIPEDIA),
        PublicSource("fever_hn_mine", 140_085, "CC BY-SA 3.0"),
        PublicSource(
            "msmarco_distillation_simlm_rescored_reranked_min15", 485_721, "non-commercial research"
        ),
        PublicSource("reddit_triples", 200_000, _REDDIT),
        PublicSource("medi_sts_flickr_sampled", 51_186, "non-commercial research"),
        PublicSource("nq_cocondensor_hn_mine_reranked_min15", 70_002, "CC BY-SA 3.0"),
        PublicSource("nli_simcse_50negs_fixed", 275_595, "CC BY-SA 4.0 and others"),
        PublicSource("medi_supernli_sampled", 177_639, "Apache-2.0; each task's own"),
        PublicSource("hotpotqa_hn_mine_shuffled", 170_000, "CC BY-SA 4.0"),
        PublicSource("medi_sts_stackexchange_dupe", 100_591, _STACK_EXCHANGE),
    )
    document_length = 512 + 7

    def default_cleaning(self) -> Cleaning:
        """The recipe uses ten negatives at most; some rows have fifty."""
        return Cleaning(max_documents=1 + 10)


class MsMarcoDistillation(HubCorpus):
    """MS MARCO queries of phase 3, each with 32 candidates that a cross-encoder scored.

    Rows, queries and documents lie in tables of their own, and are joined by id on disk.
    """

    dataset = "lightonai/ms-marco-en-bge-gemma"
    sources = (PublicSource("train", 640_000, "non-commercial research"),)
    document_length = 512 + 7
    _TABLES = ("train", "queries", "documents")
    # The same scores before they were normalised lie beside the table of rows.
    _UNUSED = ("train_unormalized",)

    def default_cleaning(self) -> Cleaning:
        """A query with fewer candidates would cut those of all others."""
        return Cleaning(min_documents=32)

    def open_table(self) -> Table:
        """Fetches the three tables and indexes the texts."""
        files = self._hub.files(self.dataset, self._commit)
        names = {table: self._table_files(files, table) for table in self._TABLES}
        paths = {table: self.fetch(names[table]) for table in self._TABLES}
        texts = self.unfinished / "texts.sqlite"
        sides = ("queries", "documents")
        _logger.info("indexing the texts of %s by id", self.dataset)
        index_texts(texts, {t: list(zip(names[t], paths[t], strict=True)) for t in sides})
        everything = [path for table in self._TABLES for path in paths[table]]
        description = self.describe(everything)
        return JoinedTable(tuple(paths["train"]), tuple(names["train"]), texts, description)

    def _table_files(self, files: Sequence[str], table: str) -> list[str]:
        others = {*self._TABLES, *self._UNUSED} - {table}
        # Each table is a folder of files that are all called train, as the hub stores a data set
        # of several configurations.
        own = [file for file in files if not others.intersection(PurePosixPath(file).parts)]
        return split_files(own, table, dataset=self.dataset)


class Docstrings(TextBuilder):
    """First sentences of docstrings and the definitions they document, of an installed package."""

    def __init__(self, *, package: str, pairs: Sequence[docstrings.Pair], **kwargs: Any):
        """Describes what to prepare.

        Args:
          package: the package's name.
          pairs: what was collected from it, the held-out files left out.
          **kwargs: as of `TextBuilder`.
        """
        self._pairs = pairs
        digest = hashlib.sha256()
        for pair in pairs:
            digest.update(f"{len(pair.query)} {pair.query} {pair.document}\n".encode())
        self._digest = digest.hexdigest()
        # Another version of a package is another source.
        super().__init__(config=_config(f"{safe_name(package)}-{self._digest[:8]}"), **kwargs)

    def default_cleaning(self) -> Cleaning:
        """Queries are unique already."""
        return Cleaning(deduplicate=False)

    def origin(self, resolved: bool) -> dict[str, Any]:
        """A digest of the pairs."""
        return {"pairs": self._digest}

    def open_table(self) -> Table:
        """The pairs as rows."""
        rows = [Row(query=p.query, documents=[p.document], scores=None) for p in self._pairs]
        return RowsTable(tuple(rows), {"rows": len(rows)})


class Files(TextBuilder):
    """A user's own JSON-lines or Parquet files."""

    def __init__(
        self,
        *,
        paths: Sequence[Path],
        name: str,
        columns: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        """Describes what to prepare.

        Args:
          paths: the files, whose rows make one source.
          name: what the source is called.
          columns: as in `rows.read_rows`.
          **kwargs: as of `TextBuilder`.

        Raises:
          UserError: a file is not there.
        """
        self._paths, self._columns = paths, dict(columns or {})
        stats = [(str(path.resolve()), *_file_stat(path)) for path in paths]
        self._stats = hashlib.sha256(repr(stats).encode()).hexdigest()
        # A file that changes, or another of its name, is another source.
        folder = f"{safe_name(name)}-{self._stats[:8]}"
        super().__init__(config=_config(folder), **kwargs)

    def origin(self, resolved: bool) -> dict[str, Any]:
        """The files' paths, sizes and times."""
        columns = self._columns if self._columns or resolved else None
        return {"state": self._stats, "columns": columns}

    def open_table(self) -> Table:
        """The files as they are."""
        names = tuple(str(path) for path in self._paths)
        return FilesTable(tuple(self._paths), names, self._columns, describe_files(self._paths))


class HubFiles(HubCorpus, skip_registration=True):  # type: ignore[call-arg]
    """Any data set of the hub whose rows are pairs, triples or scored candidates."""

    name = "hub"

    def __init__(
        self, *, dataset: str, split: str, columns: Mapping[str, str] | None = None, **kwargs: Any
    ):
        """Describes what to prepare; arguments as of `HubCorpus` and `rows.read_rows`."""
        self.dataset, self.columns = dataset, dict(columns or {})  # type: ignore[misc]
        self._split = split
        config = _config(f"{safe_name(dataset)}-{safe_name(split)}")
        super().__init__(config=config, **kwargs)

    @property
    def split(self) -> str:
        """The hub's split."""
        return self._split


CORPORA: dict[str, type[HubCorpus]] = {
    cls.name: cls for cls in (NomicUnsupervised, NomicSupervised, MsMarcoDistillation)
}


def find_corpus(name: str) -> type[HubCorpus] | None:
    """The corpus of a name, ours or the hub's, if it is known."""
    return next((cls for cls in CORPORA.values() if name in (cls.name, cls.dataset)), None)


def hub_builders(
    corpus: str, sources: Sequence[str], revision: str | None, folder: Path, **kwargs: Any
) -> dict[str, HubCorpus]:
    """The builders of a corpus's sources, by name.

    Args:
      corpus: one of `CORPORA`, by its name or the hub's, or the hub name of another data set.
      sources: which of its sources; none are all, where they are known.
      revision: the hub's; None or "" is the one that is prepared, or the newest.
      folder: where prepared corpora are kept.
      **kwargs: as of `HubCorpus`; `columns` for another data set.

    Raises:
      UserError: there is no such corpus or source.
    """
    kwargs |= {"data_dir": folder, "revision": revision or None}
    if (known := find_corpus(corpus)) is not None:
        names = [source.name for source in known.sources]
        for name in sources:
            if name not in names:
                raise UserError(f"{corpus} has no source {name}: choose one of {', '.join(names)}.")
        if kwargs.pop("columns", None):
            raise UserError(f"The columns of {corpus} are known: leave out the mapping.")
        return {name: known(config=name, **kwargs) for name in sources or names}
    if corpus.count("/") != 1:
        raise UserError(
            f"There is no corpus {corpus}: choose one of {', '.join(CORPORA)}, docstrings, files, "
            "or a data set of the hub as owner/name."
        )
    if not sources:
        raise UserError(f"Which of the splits of {corpus} is meant? Name it as the source.")
    return {name: HubFiles(dataset=corpus, split=name, **kwargs) for name in sources}


def file_builder(pattern: str, folder: Path, **kwargs: Any) -> Files:
    """The builder of a file, or of the files that match a pattern, as one source.

    Raises:
      UserError: there is no such file.
    """
    path = Path(pattern).expanduser()
    paths = [path]
    if not path.exists() and any(mark in pattern for mark in "*?["):
        paths = sorted(Path(found) for found in glob.glob(str(path)))
    if not paths:
        raise UserError(f"{pattern} matches no file: check the pattern.")
    return Files(paths=paths, name=source_name(pattern), data_dir=folder, **kwargs)


def docstring_builders(
    packages: Sequence[str], folder: Path, **kwargs: Any
) -> tuple[dict[str, Docstrings], HeldOut]:
    """The builders of packages' docstrings, by package, and what of them is held out.

    Raises:
      UserError: there is no docstring in them.
    """
    with tqdm(desc="read docstrings", unit="file", dynamic_ncols=True, delay=1) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        pairs = docstrings.load_or_collect(
            folder, packages or docstrings.DEFAULT_PACKAGES, progress=show
        )
    train, held_out = docstrings.split(pairs)
    _logger.info("%d docstring pairs to train on, %d held out", len(train), len(held_out))
    own: dict[str, list[docstrings.Pair]] = {}
    for pair in train:
        own.setdefault(pair.source, []).append(pair)
    builders = {
        name: Docstrings(package=name, pairs=some, data_dir=folder, **kwargs)
        for name, some in own.items()
    }
    return builders, docstrings.held_out_collection(held_out)


def source_names(paths: Sequence[str]) -> dict[str, str]:
    """Files by what their sources are called; those of one name by their whole paths."""
    names = [source_name(path) for path in paths]
    return {
        name if names.count(name) == 1 else path: path
        for name, path in zip(names, paths, strict=True)
    }


def source_name(path: str) -> str:
    """What a source is called whose rows come from a file, or from all that match a pattern."""
    name = Path(path).name.removesuffix(".gz")
    name = name.rsplit(".", 1)[0] if Path(name).suffix in (".jsonl", ".json", ".parquet") else name
    return name.strip("*?.-_") or Path(path).parent.name


def _config(name: str) -> tfds.core.BuilderConfig:
    return tfds.core.BuilderConfig(name=name, version=TextBuilder.VERSION)


def safe_name(name: str) -> str:
    """A name for a folder, out of a name that a user or a data set gave."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:80] or "source"


def _file_stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    return stat.st_size, stat.st_mtime_ns
