"""Prepared corpora, opened: rows of text or of tokens that any batch can be read from at random."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds

from colbert_jax.data.rows import Row
from colbert_jax.errors import UserError

MANIFEST_FILE = "manifest.json"


@runtime_checkable
class Source(Protocol):
    """Rows that can be read in any order, from several threads at once.

    Texts are `str`; in a source of tokens they are arrays of ids, `query[token]` and
    `documents[i][token]`.
    """

    @property
    def min_documents(self) -> int:
        """The number of documents of the row that has fewest, at least 1."""

    @property
    def max_documents(self) -> int:
        """The number of documents of the row that has most."""

    @property
    def has_scores(self) -> bool:
        """Whether the rows (all of them, or none) carry a teacher's scores."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Row: ...

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Row]: ...


class ListSource:
    """A `Source` over rows in memory.

    Raises:
      UserError: there are no rows, or only some of them have scores.
    """

    def __init__(self, rows: Iterable[Row], name: str = "the rows given"):
        self._rows = list(rows)
        if not self._rows:
            raise UserError(f"{name}: there are no rows: give a source that has some.")
        counts = [len(row["documents"]) for row in self._rows]
        scored = [row["scores"] is not None for row in self._rows]
        if len(set(scored)) > 1:
            raise UserError(
                f"{name}: row {scored.index(not scored[0]) + 1} is "
                f"{'without' if scored[0] else 'with'} scores, unlike those before it: give all "
                "rows of a source scores, or none."
            )
        self.min_documents: int = min(counts)
        self.max_documents: int = max(counts)
        self.has_scores: bool = scored[0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self._rows[index]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Row]:
        return [self._rows[index] for index in indices]


class _Prepared:
    """A prepared folder; may be pickled, and shared between threads.

    `__getitems__` is the one to use; row by row is tens of times slower.

    Raises:
      UserError: the folder is missing, half-written or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.min_documents: int = self.manifest["documents"][0]
        self.max_documents: int = self.manifest["documents"][1]
        self.has_scores: bool = self.manifest["scored"]
        self.shard_lengths: list[int] = [shard["kept"] for shard in self.manifest["shards"]]
        try:
            self._records = tfds.builder_from_directory(self.folder).as_data_source("train")
        except Exception as error:  # TFDS raises a dozen kinds; each means the same here
            raise _damaged(self.folder, error) from None
        if len(self._records) != sum(self.shard_lengths):
            raise _damaged(self.folder, "its two descriptions do not agree")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Row]:
        """Returns the rows at `indices`, in that order, from one read.

        Raises:
          IndexError: an index is not in `[0, len(self))`.
          UserError: a file is damaged.
        """
        positions = [index.__index__() for index in indices]
        if positions and not 0 <= min(positions) <= max(positions) < len(self):
            raise IndexError(f"an index is outside the {len(self)} rows of {self.folder}")
        try:
            records = self._records.__getitems__(positions)
        except Exception as error:  # ArrayRecord, zstd and protocol buffers each raise their own
            raise _damaged(self.folder, error) from None
        return [self._to_row(record) for record in records]

    def _to_row(self, record: dict[str, Any]) -> Row:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"


class TextSource(_Prepared):
    """A `Source` of texts: the folder that a `TextBuilder` made."""

    def _to_row(self, record: dict[str, Any]) -> Row:
        return Row(
            query=record["query"].decode(),
            documents=[text.decode() for text in record["documents"]],
            scores=[float(score) for score in record["scores"]] if self.has_scores else None,
        )


class TokenSource(_Prepared):
    """A `Source` of token ids: the folder that a `TokenBuilder` made."""

    def _to_row(self, record: dict[str, Any]) -> Row:
        return Row(
            query=record["query"],
            documents=_split(record["documents"], record["lengths"]),
            scores=record["scores"].tolist() if self.has_scores else None,
        )


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return [ids] if len(lengths) == 1 else np.split(ids, np.cumsum(lengths)[:-1])


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a prepared folder says of itself, if all its files are as long as they were.

    Raises:
      UserError: the folder is missing, half-written or damaged.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        sizes = {folder / shard["name"]: shard["bytes"] for shard in manifest["shards"]}
        found = {path: path.stat().st_size for path in sizes}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} is not a whole prepared folder: remove it, so that it is prepared anew."
        ) from None
    for path, size in sizes.items():
        if found[path] != size:
            raise UserError(
                f"{path} has {found[path]} bytes where {size} were written: remove its folder, so "
                "that it is prepared anew."
            )
    return manifest


def _damaged(folder: Path, error: object) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(";")[0]
    return UserError(
        f"{folder} cannot be read ({reason:.200}): remove it, so that it is prepared anew."
    )
