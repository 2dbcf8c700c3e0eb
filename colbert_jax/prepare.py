"""Preparing corpora, source by source: text first, then tokens, and what became of the rows."""

import dataclasses
import logging
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colbert_jax.data.corpora import (
    CORPORA,
    docstring_builders,
    file_builder,
    find_corpus,
    hub_builders,
    source_names,
)
from colbert_jax.data.docstrings import DEFAULT_PACKAGES
from colbert_jax.data.records import TextSource
from colbert_jax.data.rows import OUR_COLUMNS, WANTED_COLUMNS
from colbert_jax.data.text import Keep, RowFilter, TextBuilder
from colbert_jax.data.tokens import TokenBuilder
from colbert_jax.errors import UserError, printable
from colbert_jax.tokenization import ColbertTokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Consistency filtering, if there is a model to filter with."""

    model: str | None = None
    top_k: int = 2
    sample: int = 4096


@dataclasses.dataclass(frozen=True)
class Request:
    """What to prepare; the flags of `launch/prepare.py` say what each means."""

    corpus: str | None
    sources: Sequence[str]
    output: str | None
    revision: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cleaning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    consistency: Consistency = dataclasses.field(default_factory=Consistency)
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    query_length: int = 39
    document_length: int | None = None
    beam_runner: str | None = None
    beam_options: str = ""


def prepare(request: Request) -> None:
    """Prepares the sources one after another, and prints what became of each.

    Raises:
      UserError: anything in the request or the data that the user has to mend.
    """
    if not request.corpus or not request.output:
        missing = "corpus" if not request.corpus else "output"
        raise UserError(f"--{missing} is missing: see launch/prepare.py --help.")
    if request.consistency.model and request.beam_runner:
        raise UserError(
            "--consistency_model needs this machine's devices: prepare without --beam_runner."
        )
    options = beam_options(request.beam_options) if request.beam_runner else None
    tokenizer = open_tokenizer(request) if request.tokenizer else None
    folder = Path(request.output).expanduser()
    builders = open_builders(request, folder)
    for name, builder in builders.items():
        began = time.perf_counter()
        known = builder.is_prepared()
        manifest = builder.prepare(request.beam_runner, options)
        print(printable(describe_text(name, manifest, builder, None if known else began)))
        if tokenizer is not None:
            began = time.perf_counter()
            tokens = TokenBuilder(TextSource(builder.folder), tokenizer, request.tokenizer or "")
            known = tokens.is_prepared()
            told = tokens.prepare(request.beam_runner, options)
            print(printable(describe_tokens(told, tokens, None if known else began)))
    print(printable(training_flags(request, list(builders))))


def open_builders(request: Request, folder: Path) -> dict[str, TextBuilder]:
    """The builders of the sources asked for, by name."""
    assert request.corpus is not None
    row_filter = open_filter(request.consistency) if request.consistency.model else None
    extra: dict[str, Any] = {"cleaning": request.cleaning, "row_filter": row_filter}
    if request.corpus == "files":
        if not request.sources:
            raise UserError("--source is missing: with --corpus=files it is a file's path.")
        extra["columns"] = request.columns
        names = source_names(request.sources)
        return {name: file_builder(path, folder, **extra) for name, path in names.items()}
    if request.corpus == "docstrings":
        if request.columns:
            raise UserError("The columns of docstrings are known: leave out --columns.")
        builders, _ = docstring_builders(request.sources, folder, **extra)
        for package in request.sources:
            if package not in builders:
                raise UserError(f"{package} has no docstrings to train on: name another package.")
        return dict(builders)
    if request.columns:
        extra["columns"] = request.columns
    return dict(hub_builders(request.corpus, request.sources, request.revision, folder, **extra))


def open_tokenizer(request: Request) -> ColbertTokenizer:
    """The tokenizer asked for, with the prompts and lengths asked for."""
    from colbert_jax.huggingface import read_tokenizer
    from colbert_jax.start import is_run

    assert request.tokenizer is not None
    name = request.tokenizer
    length = request.document_length
    if length is None:
        known = find_corpus(request.corpus or "")
        length = known.document_length if known else 512 + 7
    return read_tokenizer(
        str(Path(name) / "model") if is_run(name) else name,
        request.tokenizer_revision,
        {
            "query_prompt": request.query_prompt,
            "document_prompt": request.document_prompt,
            "query_length": request.query_length,
            "document_length": length,
        },
    )


def open_filter(consistency: Consistency) -> RowFilter:
    """The consistency filter; its model is read when a source is prepared."""

    def make(sample: Sequence[str]) -> Keep:
        from colbert_jax import huggingface
        from colbert_jax.colbert import make_embed
        from colbert_jax.retrieval.consistency import make_consistency_filter
        from colbert_jax.start import is_run

        name = consistency.model or ""
        if is_run(name):
            raise UserError(
                f"{name} is a run's folder: export it with launch/export.py, and give the export "
                "as --consistency_model."
            )
        model = huggingface.read_model(name)
        params = huggingface.read_weights(name, model, seed=0)
        embed = make_embed(model.config, "float32")
        logger.info("encoding a sample of %d documents with %s", len(sample), name)
        return make_consistency_filter(embed, params, model.tokenizer, sample, consistency.top_k)

    name = f"{consistency.model}, top {consistency.top_k} of {consistency.sample}"
    return RowFilter(name, consistency.sample, make)


def describe_text(
    name: str, manifest: Mapping[str, Any], builder: TextBuilder, began: float | None
) -> str:
    """A few lines on a prepared source."""
    revision = manifest["origin"].get("revision")
    lines = [
        f"{builder.name}/{name}" + (f", revision {revision}" if revision else ""),
        f"  {manifest['kept']:,} of {manifest['read']:,} rows kept, {_documents(manifest)}",
    ]
    for kind, count in manifest["dropped"].items():
        first = manifest["first_dropped"][kind]
        lines.append(f"  {count:,} dropped as {kind.replace('_', ' ')}; the first: {first:.200}")
    return "\n".join([*lines, _where(manifest, builder.folder, began)])


def _documents(manifest: Mapping[str, Any]) -> str:
    fewest, most = manifest["documents"]
    count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    documents = f"{count} document{'' if most == 1 else 's'} each"
    return f"{documents} with scores" if manifest["scored"] else documents


def _where(manifest: Mapping[str, Any], folder: Path, began: float | None) -> str:
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    shards = len(manifest["shards"])
    where = f"{folder}: {size:,.1f} MB in {shards} shard{'' if shards == 1 else 's'}"
    if began is None:
        return f"  was prepared before in {where}"
    seconds = time.perf_counter() - began
    return f"  written to {where}, in {seconds:,.1f} s ({manifest['read'] / seconds:,.0f} rows/s)"


def describe_tokens(manifest: Mapping[str, Any], builder: TokenBuilder, began: float | None) -> str:
    """A line or two on the tokens of a prepared source."""
    tokenizer = manifest["tokenizer"]
    return (
        f"  {manifest['tokens']:,} tokens of {tokenizer['name']} (at most "
        f"{tokenizer['query_length']} a query, {tokenizer['document_length']} a document; hash "
        f"{tokenizer['fingerprint'][:16]})\n{_where(manifest, builder.folder, began)}"
    )


def training_flags(request: Request, names: Sequence[str]) -> str:
    """How to train on what was prepared."""
    flags = {"cache_dir": request.output or ""}
    if request.corpus == "files":
        flags["files"] = repr(tuple(request.sources))
    else:
        flags |= {"corpus": request.corpus or "", "sources": repr(tuple(names))}
    if request.tokenizer:
        flags["tokenized"] = "True"
    return "Train on it with " + " ".join(
        f"--config.input.{key}={_quoted(value)}" for key, value in flags.items()
    )


def _quoted(text: str) -> str:
    """A word for a shell, in double quotes if need be: Python's tuples bring single ones."""
    if shlex.quote(text) == text or any(mark in text for mark in '"$`\\!'):
        return shlex.quote(text)
    return f'"{text}"'


def corpora_table() -> str:
    """All corpora and sources, with rows and licences."""
    lines = []
    for name, corpus in CORPORA.items():
        total = sum(source.rows for source in corpus.sources)
        lines += [f"{name}: {corpus.dataset} on the Hugging Face Hub, {total:,} rows", ""]
        width = max(len(source.name) for source in corpus.sources)
        for source in corpus.sources:
            lines.append(f"  {source.name:<{width}}  {source.rows:>11,}  {source.licence}")
        lines.append("")
    packages = ", ".join(DEFAULT_PACKAGES)
    lines += [
        "docstrings: of installed Python packages; each package's own licence",
        "",
        f"  {packages}",
        "",
        "files: your own JSON Lines or Parquet files",
        "OWNER/NAME: any data set of the hub with such rows; its splits are the sources",
        "",
        "Rows are as published, before cleaning. Licences are those of the texts, as far as they "
        "could be found out, in short and without warranty: ask the owners before passing data on.",
    ]
    return "\n".join(lines)


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Reads `query=question,document=answer`.

    Raises:
      UserError: it is not written so.
    """
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise UserError(f"--columns: {pair!r} is not of the form query=question.")
        if not re.fullmatch(OUR_COLUMNS, ours):
            raise UserError(
                f"--columns: {ours!r} is none of our columns, which are {WANTED_COLUMNS}."
            )
        columns[ours] = theirs
    return columns


def beam_options(text: str) -> Any:
    """Beam's options from the text of a command line.

    Raises:
      UserError: Beam is not installed.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("Apache Beam is not installed: pip install 'colbert_jax[beam]'.") from None
    return PipelineOptions(shlex.split(text))
