"""Which rows of a raw corpus are kept: readable, long enough, the first of their kind."""

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from colbert_jax.data.rows import Row, RowError, cut_documents
from colbert_jax.data.tables import Place

# Why a row is dropped, in the order in which it is found out.
REASONS = (
    "undecodable",
    "too_long",
    "empty",
    "invalid",
    "no_text",
    "too_few_documents",
    "too_short",
    "duplicate",
    "inconsistent",
)

# Digests that are sorted at a time while duplicates are searched: 32 MB, four times that to sort.
_DIGESTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Cleaning:
    """What a row must be like, to be kept.

    Attributes:
      min_characters: of its query and of each document, white space at the ends aside.
      min_documents: how many documents (positive and negatives, or candidates) it has.
      max_documents: how many of them are kept, the first; None keeps all.
      deduplicate: whether only the first of rows with the same query and documents is kept.
    """

    min_characters: int = 2
    min_documents: int = 1
    max_documents: int | None = None
    deduplicate: bool = True

    def apply(self, row: Row) -> Row:
        """The row as it is kept, with at most `max_documents` documents.

        Raises:
          RowError: of kind "too_few_documents" or "too_short".
        """
        if len(row["documents"]) < self.min_documents:
            raise RowError(
                f"it has {len(row['documents'])} documents where {self.min_documents} are wanted",
                "too_few_documents",
            )
        if self.max_documents is not None and len(row["documents"]) > self.max_documents:
            row = cut_documents(row, self.max_documents)
        for text in (row["query"], *row["documents"]):
            if len(text.strip()) < self.min_characters:
                raise RowError(
                    f"a text has fewer than {self.min_characters} characters", "too_short"
                )
        return row


def find_duplicates(
    rows: Iterable[tuple[Place, Row | RowError]], cleaning: Cleaning, count: int, scratch: Path
) -> np.ndarray:
    """The rows that are, word for word, like one before them.

    Rows that are dropped for another reason are left aside. Memory stays flat: 64 bits a row lie
    in a file, and are sorted range by range. (Of 66 million different rows, two have the same 64
    bits with a probability of 1 in 8,000.)

    Args:
      rows: all rows of a table in order.
      cleaning: what else a row must be like.
      count: how many places the table has.
      scratch: a file for the digests; removed at the end.

    Returns:
      The ordinals of the repeated rows, ascending, int64.
    """
    if not count:
        return np.zeros(0, np.int64)
    digests = None
    try:
        with scratch.open("wb") as file:  # written, since a full disk kills who maps into a hole
            for start in range(0, count, _DIGESTS_AT_ONCE):
                file.write(bytes(8 * min(_DIGESTS_AT_ONCE, count - start)))
        digests = np.memmap(scratch, np.uint64, "r+")
        for place, row in rows:
            with contextlib.suppress(RowError):  # what is dropped is nobody's first
                if not isinstance(row, RowError):
                    digests[place.ordinal] = _digest(cleaning.apply(row))
        ranges = -(-count // _DIGESTS_AT_ONCE)
        found = [_repeated(digests, index, ranges) for index in range(ranges)]
    finally:
        del digests
        scratch.unlink(missing_ok=True)
    return np.sort(np.concatenate(found))


def _digest(row: Row) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for text in (row["query"], *row["documents"]):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)  # the length keeps texts apart
    return int.from_bytes(digest.digest(), "big") or 1  # 0 stands for no row


def _repeated(digests: np.ndarray, index: int, ranges: int) -> np.ndarray:
    """Ordinals of the later ones of equal digests, in one of so many ranges of digests."""
    places, values = [], []
    for start in range(0, len(digests), _DIGESTS_AT_ONCE):
        block = np.asarray(digests[start : start + _DIGESTS_AT_ONCE])
        mine = np.flatnonzero((block != 0) & (block % np.uint64(ranges) == index))
        places.append(mine + start)
        values.append(block[mine])
    ordinals, found = np.concatenate(places), np.concatenate(values)
    _, first = np.unique(found, return_index=True)
    later = np.ones(len(found), bool)
    later[first] = False
    return ordinals[later]
