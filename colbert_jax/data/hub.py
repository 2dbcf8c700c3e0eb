"""Files of data sets on the Hugging Face Hub; no code of theirs is ever run."""

import contextlib
import errno
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from colbert_jax.errors import UserError

# The hub's client has changed its HTTP library between releases; this is whichever one's error,
# raised bare when there is no connection at all.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]  # type: ignore[assignment]

_DATA_FILE = re.compile(r"(?P<stem>[^/]+?)\.(?P<kind>parquet|jsonl|jsonl\.gz|json\.gz)$")
_SHARD = re.compile(r"-\d+-of-\d+.*$")
_NAMELESS = re.compile(r"(shard|part|chunk|file)?[-_.]?\d+", re.IGNORECASE)
_GENERIC_FOLDERS = ("data", "default")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Seconds to wait before each further attempt at what may pass: a busy or failing server, a cut
# connection. The hub's client makes some attempts of its own within each.
_WAITS = (2.0, 8.0, 30.0)

_SILENCE = 60.0  # seconds that the hub may take to begin its answer

# hf_xet, which fetches most files, raises bare RuntimeErrors; a proxy's log-in page is no JSON.
_FAILURES = (_HTTP_ERROR, OSError, RuntimeError, json.JSONDecodeError)
_NETWORK = (
    None,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
)

_T = TypeVar("_T")

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
            sha = _patiently(
                lambda: api.dataset_info(dataset, revision=revision, timeout=_SILENCE).sha
            )
        if not sha:
            raise UserError(f"The hub names no commit of {dataset}: give a revision.")
        return sha

    def files(self, dataset: str, commit: str) -> list[str]:
        """Returns the paths of the data set's files at `commit`."""
        with self._user_errors(dataset, commit):
            api = HfApi(endpoint=self.endpoint)
            return _patiently(
                lambda: api.list_repo_files(dataset, revision=commit, repo_type="dataset")
            )

    def fetch(self, dataset: str, commit: str, file: str) -> Path:
        """Downloads one file, unless it was before, and returns where it lies."""
        with self._user_errors(dataset, commit, file):
            return Path(
                _patiently(
                    lambda: hf_hub_download(
                        dataset,
                        file,
                        repo_type="dataset",
                        revision=commit,
                        endpoint=self.endpoint,
                        cache_dir=self.cache_dir,
                    )
                )
            )

    @contextlib.contextmanager
    def _user_errors(
        self, dataset: str, revision: str | None, file: str | None = None
    ) -> Iterator[None]:
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
        except (*_FAILURES, EntryNotFoundError) as failure:
            error = _cause(failure)
            response = getattr(error, "response", None)
            if file and response is not None and response.status_code == 404:
                raise UserError(
                    f"{endpoint} no longer has {file} of {dataset} at {revision}: give another "
                    "revision."
                ) from None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            what = f"{file} of {dataset}" if file else dataset
            raise UserError(
                f"{what} could not be read from {endpoint} ({reason}): check the network and "
                "the disk and run it again, which keeps the files fetched so far."
            ) from None


def _patiently(ask: Callable[[], _T]) -> _T:
    """What `ask` returns; asked again, after a while, where the failure may pass."""
    for wait in _WAITS:
        try:
            return ask()
        except _FAILURES as failure:
            error = _cause(failure)
            if not _may_pass(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _logger.warning("%s; trying again in %.0f s", reason, wait)
        time.sleep(wait)
    return ask()


def _may_pass(error: BaseException) -> bool:
    if constants.HF_HUB_OFFLINE or isinstance(error, OfflineModeIsEnabled):
        return False
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    return getattr(error, "errno", None) in _NETWORK


def _cause(error: BaseException) -> BaseException:
    """What the client hides behind the file not being cached."""
    return error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error


def hub_fingerprint(dataset: str, revision: str | None = None, *, hub: Hub | None = None) -> str:
    """Returns the commit that `revision` stands for; a whole commit hash is returned unasked.

    Raises:
      UserError: the hub cannot be reached, or has no such data set or revision.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    return (hub or Hub()).commit(dataset, revision)


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
