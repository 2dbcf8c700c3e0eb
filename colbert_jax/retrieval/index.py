"""A corpus encoded once: token embeddings in the host's memory or in files.

Only tokens that MaxSim may use are kept, document after document, as bfloat16, as int8 with a scale
for each token, or as float32. A shard holds `CHUNK` documents, in the order of their lengths, so
that a block to be scored is one contiguous piece of it. On disk a shard is a folder that appears
whole or not at all, and building goes on at the first that is missing.

Shape letters: M tokens of a shard, N documents of a shard, D embedding size.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Num

from colbert_jax.colbert import Params
from colbert_jax.errors import UserError
from colbert_jax.retrieval.encode import CHUNK, Block, Encoder, document_lengths
from colbert_jax.tokenization import ColbertTokenizer

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
}

Document = tuple[str, str]  # id, text

_PLAN = "index.json"
_FINISHED = "finished.json"
_FORMAT = 1


class Stored:
    """Rows of an array in a file, read when they are asked for.

    No file stays open, as a memory map's would: an index of millions of documents has more shards
    than a process may have files open.
    """

    def __init__(self, path: Path, dtype: Any):
        """Reads the file's header.

        Raises:
          ValueError: the file is damaged, or holds something else than `x[row, dim]` or `x[row]`.
          OSError: it cannot be read.
        """
        # NumPy's files know no bfloat16; its bits are kept.
        kept = np.dtype(np.uint16 if dtype == ml_dtypes.bfloat16 else dtype)
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except EOFError as error:
            raise ValueError(f"{path.name} is empty") from error
        if mapped.dtype != kept or mapped.ndim not in (1, 2):
            raise ValueError(f"{path.name} holds something else")
        self._path = path
        self._offset: int = mapped.offset
        self._kept = kept
        self.dtype = np.dtype(dtype)
        self.shape: tuple[int, ...] = mapped.shape

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of the whole array."""
        return math.prod(self.shape) * self._kept.itemsize

    def __getitem__(self, rows: slice) -> np.ndarray:
        begin, end, _ = rows.indices(len(self))
        of_row = math.prod(self.shape[1:])
        offset = self._offset + begin * of_row * self._kept.itemsize
        flat = np.fromfile(self._path, self._kept, (end - begin) * of_row, offset=offset)
        return flat.reshape(-1, *self.shape[1:]).view(self.dtype)


class Shard(NamedTuple):
    """Some documents' token embeddings; documents stand in the order of their lengths.

    Attributes:
      positions: each document's place in the corpus, ascending in length.
      lengths: tokens of each document.
      embeddings: `embeddings[token, dim]`, the tokens of all documents one after the other.
      scales: of int8 embeddings, what they are to be multiplied with.
      ids: the documents' ids, in corpus order.
      texts: reads the text of a document, by its place among the shard's in the corpus.
    """

    positions: Int[np.ndarray, "N"]
    lengths: Int[np.ndarray, "N"]
    embeddings: Num[np.ndarray, "M D"] | Stored
    scales: Float[np.ndarray, "M"] | Stored | None
    ids: list[str]
    texts: Callable[[int], str]


class Index:
    """An encoded corpus.

    Attributes:
      ids: the documents' ids, by position in the corpus.
      shards: its parts.
      width: the most tokens that a document of the model has.
    """

    def __init__(self, shards: Sequence[Shard], width: int):
        self.shards = list(shards)
        self.width = width
        self.ids = [name for shard in self.shards for name in shard.ids]
        self._starts = np.cumsum([0, *(len(shard.ids) for shard in self.shards)])

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Number of tokens kept."""
        return sum(len(shard.embeddings) for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of embeddings and scales."""
        arrays = (x for s in self.shards for x in (s.embeddings, s.scales) if x is not None)
        return sum(x.nbytes for x in arrays)

    def text(self, position: int) -> str:
        """A document's text."""
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.shards[shard].texts(position - int(self._starts[shard]))

    def lengths_of(self, positions: np.ndarray) -> Int[np.ndarray, "P"]:
        """Tokens of chosen documents, by their places in the corpus."""
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        lengths = np.zeros(len(positions), np.int64)
        for owner in np.unique(owners):
            mine = owners == owner
            begin_end = self._places[owner][np.asarray(positions)[mine] - self._starts[owner]]
            lengths[mine] = begin_end[:, 1] - begin_end[:, 0]
        return lengths

    def blocks(self, size: int) -> Iterator[Block]:
        """The whole corpus in blocks of documents of like length, on the host.

        Args:
          size: documents of a block; the last ones are padded.
        """
        for shard in self.shards:
            ends = np.cumsum(shard.lengths, dtype=np.int64)
            for first in range(0, len(shard.lengths), size):
                last = min(first + size, len(shard.lengths))
                rows = slice(int(ends[first] - shard.lengths[first]), int(ends[last - 1]))
                yield self._block(
                    shard.positions[first:last],
                    shard.lengths[first:last],
                    shard.embeddings[rows],
                    None if shard.scales is None else shard.scales[rows],
                    size,
                )

    def take(self, positions: Sequence[int] | np.ndarray, size: int) -> Block:
        """Chosen documents as one block.

        Args:
          positions: places in the corpus, in any order; one may come twice.
          size: documents of the block, at least as many as are chosen.
        """
        positions = np.asarray(positions, np.int64)
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        parts, lengths = [], []
        for position, owner in zip(positions, owners, strict=True):
            begin, end = self._places[owner][position - self._starts[owner]]
            shard = self.shards[owner]
            scales = None if shard.scales is None else shard.scales[begin:end]
            parts.append((shard.embeddings[begin:end], scales))
            lengths.append(end - begin)
        scaled = parts[0][1] is not None
        return self._block(
            positions,
            np.asarray(lengths),
            np.concatenate([embeddings for embeddings, _ in parts]),
            np.concatenate([scales for _, scales in parts]) if scaled else None,
            size,
        )

    @functools.cached_property
    def _places(self) -> list[np.ndarray]:
        """For each shard, `[document, (begin, end)]` of its tokens, in corpus order."""
        places = []
        for shard, start in zip(self.shards, self._starts, strict=False):
            ends = np.cumsum(shard.lengths, dtype=np.int64)
            table = np.empty((len(ends), 2), np.int64)
            table[shard.positions - start] = np.stack([ends - shard.lengths, ends], axis=1)
            places.append(table)
        return places

    def _block(
        self,
        positions: np.ndarray,
        lengths: np.ndarray,
        embeddings: np.ndarray,
        scales: np.ndarray | None,
        size: int,
    ) -> Block:
        longest = int(lengths.max(initial=0))
        width = next(n for n in document_lengths(self.width) if n >= longest)
        mask = np.zeros((size, width), bool)
        mask[: len(lengths)] = np.arange(width) < lengths[:, None]
        padded = np.zeros((size, width, embeddings.shape[1]), embeddings.dtype)
        padded[mask] = embeddings
        padded_scales = None
        if scales is not None:
            padded_scales = np.zeros((size, width), np.float32)
            padded_scales[mask] = scales
        return Block(positions, padded, mask, padded_scales)


def build_index(
    encoder: Encoder,
    params: Params,
    documents: Iterable[Document],
    dtype: str = "bfloat16",
    progress: Callable[[int], object] = lambda count: None,
) -> Index:
    """Encodes a corpus into the host's memory.

    Args:
      encoder: the model's.
      params: the model's, from `encoder.place`.
      documents: `(id, text)`, read once.
      dtype: a key of `DTYPES`.
      progress: called with the number of documents that have been added.
    """
    shards: list[Shard] = []
    start = 0
    for chunk in _chunks(documents):
        shards.append(_encode_shard(encoder, params, chunk, start, dtype, progress))
        start += len(chunk)
    return Index(shards, encoder.tokenizer.config.document_length)


def open_index(
    folder: str | Path,
    encoder: Encoder,
    params: Params,
    documents: Callable[[], Iterable[Document]],
    origin: Mapping[str, Any],
    dtype: str = "bfloat16",
    progress: Callable[[int], object] = lambda count: None,
) -> Index:
    """Opens an index on disk, after building what it lacks.

    Args:
      folder: the index's; it is made if it is not there.
      encoder: the model's.
      params: the model's, from `encoder.place`.
      documents: begins to read the corpus, `(id, text)`.
      origin: what tells this corpus and this model from others, as plain data.
      dtype: a key of `DTYPES`.
      progress: called with the number of documents that have been added, those of shards that were
        there before too.

    Raises:
      UserError: the folder holds something else, or an index of another model, corpus or dtype, or
        it cannot be written.
    """
    folder = Path(folder)
    width = encoder.tokenizer.config.document_length
    plan = {
        "format": _FORMAT,
        "dtype": dtype,
        "shard": CHUNK,
        "document_length": width,
        **origin,
    }
    _check_plan(folder, plan)
    if not is_finished(folder):
        start = count = 0
        for number, chunk in enumerate(_chunks(documents())):
            part = folder / _shard_name(number)
            if part.is_dir():
                progress(len(chunk))
            else:
                shard = _encode_shard(encoder, params, chunk, start, dtype, progress)
                with _said_of(folder):
                    _write_shard(part, shard, chunk)
            start += len(chunk)
            count += 1
        with _said_of(folder):
            _write_json(folder / _FINISHED, {"documents": start, "shards": count})
    try:
        finished = json.loads((folder / _FINISHED).read_text(encoding="utf-8"))
        starts = itertools.count(0, CHUNK)
        shards = [
            _read_shard(folder / _shard_name(i), dtype, start)
            for i, start in zip(range(finished["shards"]), starts, strict=False)
        ]
        if sum(len(shard.ids) for shard in shards) != finished["documents"]:
            raise ValueError("documents are missing")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(
            f"{folder} is a damaged index ({error}): remove the folder and build it again."
        ) from error
    return Index(shards, width)


def is_finished(folder: str | Path) -> bool:
    """Whether a folder is an index to which nothing is left to add."""
    return (Path(folder) / _FINISHED).is_file()


@contextlib.contextmanager
def _said_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): make room and start again, which goes "
            "on from here."
        ) from error


def fingerprint(params: Params, tokenizer: ColbertTokenizer) -> str:
    """SHA-256 of all that decides a document's embeddings."""
    digest = hashlib.sha256(tokenizer.fingerprint().encode())
    config = tokenizer.config
    decides = (config.document_length, list(config.skiplist_words))
    digest.update(json.dumps(decides).encode())
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8).data)
    return digest.hexdigest()


def quantize(
    embeddings: Float[np.ndarray, "M D"],
) -> tuple[Int[np.ndarray, "M D"], Float[np.ndarray, "M"]]:
    """Embeddings as int8 and what to multiply them with: the largest of a token becomes 127."""
    scales = np.abs(embeddings).max(axis=1, initial=0.0) / 127
    safe = np.where(scales > 0, scales, 1)
    return np.rint(embeddings / safe[:, None]).astype(np.int8), scales.astype(np.float32)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    documents = iter(documents)
    while chunk := list(itertools.islice(documents, CHUNK)):
        yield chunk


def _encode_shard(
    encoder: Encoder,
    params: Params,
    chunk: Sequence[Document],
    start: int,
    dtype: str,
    progress: Callable[[int], object],
) -> Shard:
    texts = [text for _, text in chunk]
    positions, lengths, kept, scales = [], [], [], []
    for block in encoder.documents(params, texts):
        count = len(block.positions)
        mask = np.asarray(block.mask)[:count]
        embeddings = np.asarray(block.embeddings)[:count][mask]
        if dtype == "int8":
            embeddings, scale = quantize(embeddings)
            scales.append(scale)
        kept.append(embeddings.astype(DTYPES[dtype]))
        positions.append(block.positions)
        lengths.append(mask.sum(axis=1))
        progress(count)
    # Without what never scores, lengths are no longer quite in order.
    of_documents = np.concatenate(lengths)
    order = np.argsort(of_documents, kind="stable")
    flat = np.concatenate(kept)
    rows = _rows_of(of_documents, order)
    return Shard(
        positions=np.concatenate(positions)[order] + start,
        lengths=of_documents[order].astype(np.int32),
        embeddings=flat[rows],
        scales=np.concatenate(scales)[rows] if scales else None,
        ids=[name for name, _ in chunk],
        texts=texts.__getitem__,
    )


def _rows_of(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows of tokens that put documents, one after the other, into another order."""
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = (ends - lengths)[order]
    new_begins = np.cumsum(lengths[order], dtype=np.int64) - lengths[order]
    return np.arange(lengths.sum()) + np.repeat(begins - new_begins, lengths[order])


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _write_shard(folder: Path, shard: Shard, chunk: Sequence[Document]) -> None:
    building = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    embeddings = shard.embeddings[:]
    if embeddings.dtype == ml_dtypes.bfloat16:
        embeddings = embeddings.view(np.uint16)
    np.save(building / "embeddings.npy", embeddings)
    if shard.scales is not None:
        np.save(building / "scales.npy", shard.scales[:])
    np.save(building / "positions.npy", shard.positions)
    np.save(building / "lengths.npy", shard.lengths)
    encoded = [text.encode("utf-8", "surrogatepass") for _, text in chunk]
    (building / "texts.bin").write_bytes(b"".join(encoded))
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    np.save(building / "text_ends.npy", ends)
    _write_json(building / "ids.json", shard.ids)
    building.rename(folder)


def _read_shard(folder: Path, dtype: str, start: int) -> Shard:
    def load(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", allow_pickle=False)

    embeddings = Stored(folder / "embeddings.npy", DTYPES[dtype])
    scales = Stored(folder / "scales.npy", np.float32) if dtype == "int8" else None
    ends = load("text_ends")
    shard = Shard(
        positions=load("positions"),
        lengths=load("lengths"),
        embeddings=embeddings,
        scales=scales,
        ids=json.loads((folder / "ids.json").read_text(encoding="utf-8")),
        texts=functools.partial(_read_text, folder / "texts.bin", ends),
    )
    count = len(shard.ids)
    whole = (
        len(shard.positions) == len(shard.lengths) == len(ends) - 1 == count
        and len(embeddings) == shard.lengths.sum()
        and (scales is None or len(scales) == len(embeddings))
        and (folder / "texts.bin").stat().st_size == ends[-1]
        and np.array_equal(np.sort(shard.positions), np.arange(start, start + count))
    )
    if not whole:
        raise ValueError(f"{folder.name} does not fit together")
    return shard


def _read_text(path: Path, ends: np.ndarray, place: int) -> str:
    with path.open("rb") as file:
        file.seek(int(ends[place]))
        return file.read(int(ends[place + 1] - ends[place])).decode("utf-8", "surrogatepass")


def _check_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Makes the index's folder, or makes sure that it is one of the same plan."""
    path = folder / _PLAN
    try:
        begun = f"{_PLAN}.partial"  # all that there is where the first file was being written
        if folder.is_dir() and any(item.name != begun for item in folder.iterdir()):
            was = json.loads(path.read_text(encoding="utf-8"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(path, plan)
            return
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds something that is no index: choose another folder."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be used ({error}): choose another folder.") from error
    for key in plan:
        if not isinstance(was, dict) or was.get(key) != plan[key]:
            raise UserError(
                f"{folder} is an index of another {key}: choose another folder, or remove it."
            )


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(partial, path)
