"""Why a document scored as it did: every query token against every document token."""

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from colbert_jax.colbert import Params
from colbert_jax.retrieval.encode import Encoder

# From where on a document token counts as matched: what is less alike is the best of a bad lot.
MATCH = 0.5


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One query against one document; only tokens that MaxSim uses.

    Attributes:
      query_tokens: what each query token stands for.
      query_words: whether a query token is of the query's own text, and no marker or padding.
      document_tokens: what each document token stands for.
      spans: where each document token stands in the document's text, `(start, end)` in characters;
        None for tokens that are not of it.
      similarities: `similarities[query_token, document_token]`, cosines.
    """

    query_tokens: list[str]
    query_words: list[bool]
    document_tokens: list[str]
    spans: list[tuple[int, int] | None]
    similarities: Float[np.ndarray, "S T"]

    @property
    def winners(self) -> Int[np.ndarray, "S"]:
        """Which document token each query token matched best; nothing without tokens."""
        if not self.document_tokens:
            return np.zeros(0, np.int64)
        return self.similarities.argmax(axis=1)

    @property
    def score(self) -> float:
        """MaxSim, of these tokens."""
        return float(self.similarities.max(axis=1, initial=-np.inf).sum()) if self.spans else 0.0

    def matched(self) -> list[tuple[int, int]]:
        """Where in the document's text the query's words were found, in order."""
        spans = {
            span
            for query_token, winner in enumerate(self.winners)
            if self.query_words[query_token]
            and self.similarities[query_token, winner] >= MATCH
            and (span := self.spans[winner]) is not None
        }
        return sorted(spans)


def explain(
    encoder: Encoder, params: Params, query: str, documents: Sequence[str]
) -> list[Explanation]:
    """Compares a query with documents, token by token.

    Args:
      encoder: the model's.
      params: the model's, from `encoder.place`.
      query: its text.
      documents: their texts.
    """
    tokenizer = encoder.tokenizer
    queries = encoder.queries(params, [query])
    used = np.asarray(queries.mask[0])
    vectors = np.asarray(queries.embeddings[0])[used]
    pieces = tokenizer.query_pieces(query)
    padding = tokenizer.tokenizer.mask_token or ""
    labels = [pieces[i].label if i < len(pieces) else padding for i in np.flatnonzero(used)]
    words = [bool(i < len(pieces) and pieces[i].span) for i in np.flatnonzero(used)]
    found: dict[int, Explanation] = {}
    for block in encoder.documents(params, documents):
        embeddings, masks = jax.device_get((block.embeddings, block.mask))
        for row, position in enumerate(block.positions):
            kept = np.flatnonzero(masks[row])
            of_document = tokenizer.document_pieces(documents[position])
            found[int(position)] = Explanation(
                query_tokens=labels,
                query_words=words,
                document_tokens=[of_document[i].label for i in kept],
                spans=[of_document[i].span for i in kept],
                similarities=vectors @ embeddings[row][kept].T,
            )
    return [found[position] for position in range(len(documents))]


def mark_words(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Cuts a text into pieces that are marked or not; a span marks all of the words it touches."""
    marked = np.zeros(len(text) + 1, bool)
    for start, end in spans:
        marked[start:end] = True
    # Accents and vowel signs that stand as letters of their own are of the word before them.
    letters = text if text.isascii() else "".join(map(_as_letter, text))
    for word in re.finditer(r"\w+", letters):
        if marked[word.start() : word.end()].any():
            marked[word.start() : word.end()] = True
    edges = np.flatnonzero(marked[1:-1] != marked[:-2]) + 1 if text else np.zeros(0, np.int64)
    bounds = [0, *edges.tolist(), len(text)]
    return [
        (text[start:end], bool(marked[start]))
        for start, end in itertools.pairwise(bounds)
        if end > start
    ]


def _as_letter(mark: str) -> str:
    return "x" if unicodedata.category(mark).startswith("M") else mark
