"""Rows of data sets on the Hugging Face Hub, read file by file; no code of theirs is run."""

import ast
import contextlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from colbert_jax.data.rows import Row, RowError, check_scores, read_rows, read_table
from colbert_jax.errors import UserError

# The hub's client has changed its HTTP library between releases; this is whichever one's error,
# raised bare when there is no connection at all.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]  # type: ignore[assignment]

_DATA_FILE = re.compile(r"(?P<stem>[^/]+?)\.(?P<kind>parquet|jsonl|jsonl\.gz|json\.gz)$")
_SHARD = re.compile(r"-\d+-of-\d+.*$")
_NAMELESS = re.compile(r"(shard|part|chunk|file)?[-_.]?\d+", re.IGNORECASE)
_GENERIC_FOLDERS = ("data", "default")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hub:
    """The three questions asked of the hub.

    Attributes:
      endpoint: the hub's address; None for the one that the environment gives (`HF_ENDPOINT`).
      cache_dir: where downloads are kept; None for the usual place (`HF_HOME`).
    """

    endpoint: str | None = None
    cache_dir: str | Path | None = None

    def commit(self, dataset: str, revision: str | None) -> str:
        """Returns the commit that `revision` (None: the main branch) stands for."""
        with self._user_errors(dataset, revision):
            api = HfApi(endpoint=self.endpoint)
            sha = api.dataset_info(dataset, revision=revision).sha
        if not sha:
            raise UserError(f"The hub names no commit of {dataset}: give a revision.")
        return sha

    def files(self, dataset: str, commit: str) -> list[str]:
        """Returns the paths of the data set's files at `commit`."""
        with self._user_errors(dataset, commit):
            api = HfApi(endpoint=self.endpoint)
            return api.list_repo_files(dataset, revision=commit, repo_type="dataset")

    def fetch(self, dataset: str, commit: str, file: str) -> Path:
        """Downloads one file, unless it was before, and returns where it lies."""
        with self._user_errors(dataset, commit):
            return Path(
                hf_hub_download(
                    dataset,
                    file,
                    repo_type="dataset",
                    revision=commit,
                    endpoint=self.endpoint,
                    cache_dir=self.cache_dir,
                )
            )

    @contextlib.contextmanager
    def _user_errors(self, dataset: str, revision: str | None) -> Iterator[None]:
        endpoint = self.endpoint or constants.ENDPOINT
        try:
            yield
        except HFValidationError:
            raise UserError(
                f"{dataset!r} is no name of a data set: write it as owner/name."
            ) from None
        except RepositoryNotFoundError:
            raise UserError(
                f"{endpoint} has no data set {dataset} that you may read: check its name, and log "
                "in with `hf auth login` if it is private or gated."
            ) from None
        except RevisionNotFoundError:
            raise UserError(
                f"{dataset} has no revision {revision}: check it, or leave it out for the newest."
            ) from None
        except (_HTTP_ERROR, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"{dataset} could not be read from {endpoint} ({reason}): check the network and "
                "the disk and run it again, which keeps the files fetched so far."
            ) from None


def hub_fingerprint(dataset: str, revision: str | None = None, *, hub: Hub | None = None) -> str:
    """Returns the commit that `revision` stands for; a whole commit hash is returned unasked.

    Raises:
      UserError: the hub cannot be reached, or has no such data set or revision.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    return (hub or Hub()).commit(dataset, revision)


def hub_rows(
    dataset: str, split: str, revision: str | None = None, *, hub: Hub | None = None
) -> Iterator[Row]:
    """Yields the rows of one split of a data set of pairs, downloading one file at a time.

    Rows that cannot be used, such as those with a blank text, are left out, and their number
    is logged at the end: whoever trains on a published set cannot mend them.

    Args:
      dataset: such as `nomic-ai/nomic-embed-unsupervised-data`.
      split: a folder's name, or what a file's name says before `-00000-of-00012`; or both, as in
        `folder/name`, where the name alone is found in several folders.
      revision: a branch, tag or commit; None for the main branch.
      hub: where to ask.

    Raises:
      UserError: the hub cannot be reached, there is no such data set, revision or split, or a
        file cannot be read.
    """
    hub = hub or Hub()
    commit = hub_fingerprint(dataset, revision, hub=hub)
    files = split_files(hub.files(dataset, commit), split, dataset=dataset)
    left_out = _LeftOut(f"{dataset}, {split}")
    for file in files:
        for row in read_rows(hub.fetch(dataset, commit, file), on_bad_row=left_out.add):
            left_out.kept += 1
            yield row
    left_out.report()


def hub_distillation_rows(
    dataset: str,
    revision: str | None = None,
    *,
    documents_per_query: int = 32,
    hub: Hub | None = None,
) -> Iterator[Row]:
    """Yields the rows of a data set that keeps ids and scores apart from the texts.

    It has three tables, each a split by `hub_rows`'s rules: `train` (`query_id`, `document_ids`,
    `scores`), `queries` (`query_id`, `text`) and `documents` (`document_id`, `text`). The texts
    are held in memory: about 5 GB for MS MARCO's 8.8 million passages. Rows with fewer candidates
    than asked for, or with a candidate that has no text, are left out, and their number is logged.

    Args:
      dataset: such as `lightonai/ms-marco-en-bge-gemma`.
      revision: a branch, tag or commit; None for the main branch.
      documents_per_query: the first so many candidates of each query are used.
      hub: where to ask.

    Raises:
      UserError: as `hub_rows` does.
    """
    hub = hub or Hub()
    commit = hub_fingerprint(dataset, revision, hub=hub)
    all_files = hub.files(dataset, commit)

    def read(table: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        others = {"train", "queries", "documents"} - {table}
        # Each table is a folder of files that are all called train, as the hub stores a data set
        # of several configurations.
        own = [file for file in all_files if not others.intersection(PurePosixPath(file).parts)]
        for file in split_files(own, table, dataset=dataset):
            path = hub.fetch(dataset, commit, file)
            for number, record in read_table(path, _require(columns)):
                yield f"{dataset}, {file}, row {number}", record

    queries = _texts_by_id(read("queries", ("query_id", "text")), "query_id")
    documents = _texts_by_id(read("documents", ("document_id", "text")), "document_id")
    left_out = _LeftOut(f"{dataset}, train")
    for place, record in read("train", ("query_id", "document_ids", "scores")):
        try:
            row = _join(record, queries, documents, documents_per_query)
        except RowError as reason:
            left_out.add(UserError(f"{place}: {reason}."))
        else:
            left_out.kept += 1
            yield row
    left_out.report()


def split_files(files: Collection[str], split: str, *, dataset: str) -> list[str]:
    """Returns the data files among `files` that make up `split`, sorted.

    A folder called so has precedence over files whose names begin so, because the hub calls the
    files of every configuration's folder `train-00000-of-...`.

    Raises:
      UserError: there are none (the message lists the splits there are), or the name is found in
        several folders.
    """
    parsed = {file: match for file in sorted(files) if (match := _match_data_file(file))}
    inside = [file for file in parsed if f"/{split}/" in f"/{file}"]
    named = [
        file
        for file, match in parsed.items()
        if split in (_file_split(match), str(PurePosixPath(file).with_name(_file_split(match))))
    ]
    chosen = inside or named
    if not chosen:
        names = ", ".join(sorted({_label(file, match) for file, match in parsed.items()}))
        raise UserError(
            f"{dataset} has no split {split}: choose one of {names}."
            if names
            else f"{dataset} has no Parquet or JSON-lines files: choose another data set."
        )
    roots = sorted({_root(file, split) if inside else _folder(file) for file in chosen})
    if len(roots) > 1:
        raise UserError(
            f"{dataset} has a split {split} in several folders ({', '.join(roots)}): write it "
            f"with the one wanted, as in {roots[0]}/{split}."
        )
    # The hub may hold the same rows in two formats; reading both would double them.
    parquet = [file for file in chosen if file.endswith(".parquet")]
    return parquet or chosen


def _match_data_file(file: str) -> re.Match[str] | None:
    return _DATA_FILE.fullmatch(PurePosixPath(file).name)


def _folder(file: str) -> str:
    return str(PurePosixPath(file).parent)


def _root(file: str, split: str) -> str:
    """Returns the folder that holds the folder called `split`."""
    return f"/{file}".partition(f"/{split}/")[0].lstrip("/") or "."


def _file_split(match: re.Match[str]) -> str:
    return _SHARD.sub("", match["stem"])


def _label(file: str, match: re.Match[str]) -> str:
    """Returns a name under which `split_files` finds this file, for the list of the splits."""
    folders = PurePosixPath(file).parts[:-1]
    if folders and (folders[-1] not in _GENERIC_FOLDERS or _NAMELESS.fullmatch(match["stem"])):
        return folders[-1]
    return _file_split(match)


def _require(columns: Sequence[str]) -> Callable[[Collection[str]], Sequence[str]]:
    def choose(found: Collection[str]) -> Sequence[str]:
        if not set(columns) <= set(found):
            raise RowError(
                f"the columns found are {', '.join(found)}; {', '.join(columns)} are wanted"
            )
        return columns

    return choose


def _texts_by_id(rows: Iterator[tuple[str, dict[str, Any]]], id_column: str) -> dict[str, str]:
    texts = {}
    for place, record in rows:
        text = record["text"]
        if isinstance(text, str) and text.strip():
            try:
                texts[_identifier(record[id_column])] = text
            except RowError as reason:
                raise UserError(f"{place}: {reason}.") from None
    return texts


def _identifier(value: Any) -> str:
    # The same id is a number in one table and a text in another.
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"{value!r:.40} is no id; a text or a whole number is wanted")
    return str(value)


def _join(
    record: dict[str, Any], queries: dict[str, str], documents: dict[str, str], count: int
) -> Row:
    query_id = _identifier(record["query_id"])
    ids = [_identifier(value) for value in _as_list(record["document_ids"], "document_ids")]
    values = _as_list(record["scores"], "scores")
    scores = check_scores(values, len(ids))
    if len(ids) < count:
        raise RowError(f"it has {len(ids)} candidates where {count} are wanted")
    if query_id not in queries:
        raise RowError(f"query {query_id} has no text")
    for document_id in ids[:count]:
        if document_id not in documents:
            raise RowError(f"document {document_id} has no text")
    return Row(
        query=queries[query_id],
        documents=[documents[document_id] for document_id in ids[:count]],
        scores=scores[:count],
    )


def _as_list(value: Any, name: str) -> list[Any]:
    """Returns a list that a table may hold as the text of a JSON or Python list."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                value = ast.literal_eval(value)
    if not isinstance(value, list):
        raise RowError(f'"{name}" is not a list')
    return value


class _LeftOut:
    """Counts the rows used and left out, to say so once."""

    def __init__(self, name: str):
        self.name = name
        self.kept = 0
        self.count = 0
        self.first: UserError | None = None

    def add(self, error: UserError) -> None:
        self.count += 1
        self.first = self.first or error

    def report(self) -> None:
        if self.count and not self.kept:
            raise UserError(
                f"{self.name}: none of {self.count} rows can be used; for the first, {self.first}"
            )
        if self.count:
            _logger.warning(
                "%s: %d rows used, %d left out because they cannot be; the first: %s",
                self.name,
                self.kept,
                self.count,
                self.first,
            )
