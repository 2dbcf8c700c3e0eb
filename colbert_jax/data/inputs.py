"""What a run trains on: from the input section of its config to sources of rows."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from colbert_jax.data.corpora import (
    HeldOut,
    docstring_builders,
    file_builder,
    hub_builders,
    source_names,
)
from colbert_jax.data.records import MANIFEST_FILE, Source, TextSource
from colbert_jax.data.text import TextBuilder
from colbert_jax.data.tokens import open_source_tokens
from colbert_jax.errors import UserError
from colbert_jax.tokenization import ColbertTokenizer


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
    """Opens the corpus of `config.input`, and prepares first what of it is not.

    Args:
      config: `files` (local JSON Lines or Parquet, or folders that `launch/prepare.py` made, each a
        source) go before `corpus`, which is one of `CORPORA`, "docstrings", or the hub name of
        another data set; `sources` are then the corpus's sources (none: all), the packages, or the
        set's splits, and `revision` is the hub's. Prepared corpora lie in `cache_dir`.

    Raises:
      UserError: a file or row that cannot be used, or a hub that cannot be reached.
    """
    folder = Path(config["cache_dir"]).expanduser()
    if config["files"]:
        names = source_names(config["files"])
        return Corpus({name: _open_file(path, folder) for name, path in names.items()})
    if config["corpus"] == "docstrings":
        return _open_docstrings(config, folder)
    if not config["corpus"]:
        raise UserError("There is nothing to train on: set config.input.files or .corpus.")
    builders = hub_builders(config["corpus"], config["sources"], config["revision"], folder)
    return Corpus({name: _prepared(builder) for name, builder in builders.items()})


def open_tokens(corpus: Corpus, tokenizer: ColbertTokenizer) -> Corpus:
    """The same corpus in tokens, where it was prepared with this tokenizer.

    Raises:
      UserError: a source has no tokens, those of another tokenizer or prompt, or cut too short.
    """
    sources: dict[str, Source] = {}
    for name, source in corpus.sources.items():
        assert isinstance(source, TextSource)
        sources[name] = open_source_tokens(name, source, tokenizer)
    return dataclasses.replace(corpus, sources=sources)


def _open_file(path: str, folder: Path) -> Source:
    if Path(path).expanduser().is_dir():
        return TextSource(prepared_folder(Path(path).expanduser()))
    return _prepared(file_builder(path, folder))


def prepared_folder(folder: Path) -> Path:
    """A prepared source's folder, given that or one around it that holds just one version."""
    if not (folder / MANIFEST_FILE).is_file():
        versions = [path.parent for path in folder.glob(f"*/{MANIFEST_FILE}")]
        if len(versions) == 1:
            return versions[0]
    return folder


def _open_docstrings(config: Mapping[str, Any], folder: Path) -> Corpus:
    builders, held_out = docstring_builders(config["sources"], folder)
    return Corpus({name: _prepared(builder) for name, builder in builders.items()}, held_out)


def _prepared(builder: TextBuilder) -> Source:
    builder.prepare(wait=True, show_after_seconds=1.0)
    return TextSource(builder.folder)
