"""Texts to token embeddings on the devices: queries at once, documents in length-sorted blocks.

Shape letters: Q queries, S query tokens, B documents of a block, T document tokens, D embedding
size.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Num

from colbert_jax.colbert import Embed, Params
from colbert_jax.sharding import batch_shards, platform, put_batch, replicated
from colbert_jax.tokenization import ColbertTokenizer

# Documents that are sorted by length together: enough for blocks of texts of like length, few
# enough that the tokens of a corpus are never in memory all at once.
CHUNK = 8192

LENGTHS, LENGTHS_ON_CPU = 8, 16  # static ones of documents

QUERY_CHUNK = 1024  # queries that are scored against a block at a time


class Queries(NamedTuple):
    """Encoded queries, on the host.

    Attributes:
      embeddings: `embeddings[query, query_token, dim]`, float32.
      mask: `mask[query, query_token]`, True where a token counts.
    """

    embeddings: Float[np.ndarray, "Q S D"]
    mask: Bool[np.ndarray, "Q S"]


class Block(NamedTuple):
    """Encoded documents of about the same length, on the host or split over the devices.

    Attributes:
      positions: places in the corpus of the N <= B documents; the other rows are padding.
      embeddings: `embeddings[document, token, dim]`.
      mask: `mask[document, token]`, True where a token may win.
      scales: what int8 embeddings are to be multiplied with, `scales[document, token]`.
    """

    positions: np.ndarray
    embeddings: Num[Array | np.ndarray, "B T D"]
    mask: Bool[Array | np.ndarray, "B T"]
    scales: Float[np.ndarray, "B T"] | None = None


def document_lengths(longest: int) -> tuple[int, ...]:
    """The static lengths that documents are padded to, rising, the last the longest.

    Each costs a compilation, when a text first needs it, and saves padding, which on a CPU takes
    longer: of texts half as long as the longest, 8 lengths pad by 9 % and 16 by 5 %.
    """
    count = LENGTHS_ON_CPU if platform() == "cpu" else LENGTHS
    return tuple(sorted({-(-longest * i // count) for i in range(1, count + 1)}))


class Encoder:
    """Encodes texts with compiled programs that are kept between calls.

    Params go in with every call, since they change while a model is trained; `place` them first.
    """

    def __init__(self, embed: Embed, tokenizer: ColbertTokenizer, mesh: Mesh, batch_size: int = 64):
        """Compiles nothing yet.

        Args:
          embed: tokens to token embeddings.
          tokenizer: the model's.
          mesh: documents are split over its `data` and `fsdp` axes.
          batch_size: texts that each device encodes at a time.
        """
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.block_size = batch_size * batch_shards(mesh)
        self.lengths = document_lengths(tokenizer.config.document_length)
        self._embed = jax.jit(embed)
        self._whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))

    def place(self, params: Params) -> Params:
        """Parameters as every call wants them: whole on every device."""
        wanted = replicated(self.mesh)
        if all(
            isinstance(x, jax.Array) and x.sharding.is_equivalent_to(wanted, x.ndim)
            for x in jax.tree.leaves(params)
        ):
            return params

        def movable(x: Any) -> Any:
            # No program takes arrays of other devices, such as a checkpoint's, read on the first.
            here = isinstance(x, jax.Array) and x.sharding.device_set == wanted.device_set
            return x if here else np.asarray(x)

        with jax.set_mesh(self.mesh):
            return self._whole(jax.tree.map(movable, params))

    def queries(self, params: Params, texts: Sequence[str]) -> Queries:
        """Encodes queries, in their order.

        Returns:
          Embeddings and masks on the host, float32 and bool.
        """
        tokens = self.tokenizer.queries(texts)
        size = self._rows(len(texts))
        parts = []
        for start in range(0, len(texts), size):
            names = ("input_ids", "attention_mask")
            rows = [pad_rows(tokens[name][start : start + size], size) for name in names]
            parts.append(np.asarray(self._whole(self._encode(params, *rows))))
        empty = np.zeros((0, *tokens["input_ids"].shape[1:], 0), np.float32)
        embeddings = np.concatenate(parts)[: len(texts)] if parts else empty
        return Queries(embeddings, tokens["scoring_mask"])

    def documents(self, params: Params, texts: Iterable[str]) -> Iterator[Block]:
        """Encodes documents in blocks of texts of like length, split over the devices.

        Args:
          params: from `place`.
          texts: the corpus, read `CHUNK` texts at a time.

        Yields:
          Blocks of `block_size` documents, or of fewer where the texts are few, whose positions
          say where in `texts` they stand.
        """
        texts = iter(texts)
        start = 0
        while chunk := list(itertools.islice(texts, CHUNK)):
            yield from self._chunk(params, chunk, start)
            start += len(chunk)

    def _chunk(self, params: Params, texts: Sequence[str], start: int) -> Iterator[Block]:
        ids = self.tokenizer.document_ids(texts)
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        order = np.argsort(sizes, kind="stable")
        size = self._rows(len(order))
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            width = next(length for length in self.lengths if length >= sizes[rows].max())
            tokens = self.tokenizer.document_batch([ids[row] for row in rows], width)
            names = ("input_ids", "attention_mask", "scoring_mask")
            arrays = [pad_rows(tokens[name], size) for name in names]
            embeddings = self._encode(params, *arrays[:2])
            yield Block(rows + start, embeddings, put_batch(arrays[2], self.mesh))

    def _rows(self, count: int) -> int:
        """Texts that are encoded at a time, the padding of a few kept small.

        One query, or the passages of an answer, need not cost what a whole block does; each size is
        a compilation, so that there are few of them.
        """
        shards = batch_shards(self.mesh)
        each = max(-(-count // shards), 1)
        return min(self.block_size, shards * 2 ** (each - 1).bit_length())

    def _encode(self, params: Params, ids: np.ndarray, attention: np.ndarray) -> Any:
        with jax.set_mesh(self.mesh):
            return self._embed(params, *(put_batch(x, self.mesh) for x in (ids, attention)))


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Rows padded with zeros to a static number."""
    return np.pad(x, ((0, rows - len(x)), *((0, 0) for _ in x.shape[1:])))
