"""Mines hard negatives for pairs, for `launch/mine.py`."""

import dataclasses
import heapq
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from colbert_jax.data.cleaning import Cleaning
from colbert_jax.data.rows import MAX_ROW_BYTES, RowError, is_unicode, read_rows
from colbert_jax.data.write import check_output, open_writer
from colbert_jax.errors import UserError, printable
from colbert_jax.programs.retriever import ModelRequest, Retriever, open_retriever
from colbert_jax.retrieval.collection import read_documents
from colbert_jax.retrieval.encode import Queries
from colbert_jax.retrieval.index import Index, build_index
from colbert_jax.retrieval.mining import choose_negatives
from colbert_jax.retrieval.pairs import score_pairs
from colbert_jax.retrieval.search import top_k

logger = logging.getLogger(__name__)

# Queries that pass over the corpus together: each pass reads the whole index.
_QUERIES = 4096


@dataclasses.dataclass(frozen=True)
class Mining:
    """How to mine; the flags of `launch/mine.py` say what each means."""

    depth: int = 100
    negatives: int = 10
    margin: float = 0.95
    skip: int = 0
    dtype: str = "bfloat16"


@dataclasses.dataclass
class Pairs:
    """Pairs of texts, each text once.

    Attributes:
      documents: the texts to search.
      queries: the texts to search for.
      positives: for each query, the places of its documents, in the order of the rows.
    """

    documents: list[str]
    queries: list[str]
    positives: list[list[int]]


def mine(
    request: ModelRequest, files: Sequence[str], corpus: str | None, output: str, mining: Mining
) -> Counter[str]:
    """Writes rows of query, document and mined negatives, which phase 2 trains on as they are.

    Args:
      request: the model that mines.
      files: pairs, as any phase reads them.
      corpus: further documents to mine from, as BEIR's `corpus.jsonl`; the pairs' own always are.
      output: the file to write, JSON Lines or Parquet by its name.
      mining: how.

    Returns:
      How many rows were "written", and how many had "too_few" negatives and were left out.

    Raises:
      UserError: anything in model, data or output that the user has to mend.
    """
    if mining.skip + mining.negatives > mining.depth:
        raise UserError(
            f"--depth={mining.depth} documents cannot give --negatives={mining.negatives} after "
            f"--skip={mining.skip}: give a --depth of at least {mining.skip + mining.negatives}."
        )
    check_output(output)
    pairs = read_pairs(files, corpus)
    if mining.depth > len(pairs.documents):
        raise UserError(
            f"--depth={mining.depth} is more than the {len(pairs.documents):,} different documents "
            "there are: give a smaller one, or more documents with --corpus."
        )
    _check_row_size(pairs, output, mining.negatives)
    retriever = open_retriever(request)
    logger.info("%s queries, %s documents", f"{len(pairs.queries):,}", f"{len(pairs.documents):,}")
    index = _encode(retriever, pairs.documents, mining.dtype)
    counts: Counter[str] = Counter()
    with (
        open_writer(output) as write,
        tqdm(total=len(pairs.queries), desc="mine", unit="query", disable=None, leave=False) as bar,
    ):
        for row in _mined(retriever, index, pairs, mining, bar):
            if len(row["negative"]) < mining.negatives:
                counts["too_few"] += 1
                continue
            write(row)
            counts["written"] += 1
        if not counts["written"]:
            raise UserError(
                f"No query has {mining.negatives} negatives {_among(mining)}: give a larger "
                "--depth or --margin, or fewer --negatives."
            )
    print(printable(describe(counts, output, mining)))
    return counts


def describe(counts: Counter[str], output: str, mining: Mining) -> str:
    """What became of the rows, and how to train on them."""
    lines = [f"{output}: {counts['written']:,} rows with {mining.negatives} negatives each"]
    if counts["too_few"]:
        lines.append(f"{counts['too_few']:,} left out, which had fewer {_among(mining)}")
    lines.append(
        "Train on it with configs/supervised.py "
        f'--config.input.files="({output!r},)" '
        f"--config.input.max_documents={mining.negatives + 1}"
    )
    return "\n".join(lines)


def _among(mining: Mining) -> str:
    """Where negatives were looked for."""
    first = f"among the first {mining.depth} other documents"
    if mining.skip:
        first += f", of which the first {mining.skip} are passed over"
    if mining.margin == float("inf"):
        return first
    return f"below --margin={mining.margin} of their own document's score {first}"


def read_pairs(files: Sequence[str], corpus: str | None = None) -> Pairs:
    """Reads pairs; a query's documents are all its rows' documents, mined negatives aside.

    Raises:
      UserError: a file that cannot be read, a row that cannot be used, or no row at all.
    """
    documents: dict[str, int] = {}
    queries: dict[str, dict[int, None]] = {}
    for path in files:
        for number, row in read_rows(path):
            if isinstance(row, RowError):
                raise UserError(f"{path}, row {number}: {row}.")
            if row["scores"] is not None:
                raise UserError(
                    f"{path}, row {number}: it has candidates with scores, not a document that "
                    "answers the query: give pairs."
                )
            place = documents.setdefault(row["documents"][0], len(documents))
            queries.setdefault(row["query"], {})[place] = None
    if not queries:
        raise UserError(f"--pairs={','.join(files)} holds no row to mine for: name other files.")
    if corpus is not None:
        for name, text in read_documents(corpus):
            if not is_unicode(text):
                raise UserError(
                    f"{corpus}: the document {name!r} holds half of a surrogate pair; mend it."
                )
            if _is_trainable(text):  # BEIR's corpora have blank ones
                documents.setdefault(text, len(documents))
    return Pairs(list(documents), list(queries), [list(places) for places in queries.values()])


def _is_trainable(text: str) -> bool:
    """Whether training keeps a row that holds this text among its negatives."""
    return len(text.strip()) >= Cleaning.min_characters


def _check_row_size(pairs: Pairs, output: str, negatives: int) -> None:
    """Raises `UserError` where a row may be too long for a line, before hours of work find it."""
    if output.endswith(".parquet"):
        return
    sizes = (len(text.encode()) for text in pairs.documents)
    if sum(heapq.nlargest(negatives + 1, sizes)) > MAX_ROW_BYTES:
        raise UserError(
            f"--output={output}: a row of the longest documents would be longer than the "
            f"{MAX_ROW_BYTES >> 20} MiB that a line may have; write .parquet instead."
        )


def _encode(retriever: Retriever, documents: Sequence[str], dtype: str) -> Index:
    with tqdm(
        total=len(documents), desc="encode", unit="document", disable=None, leave=False
    ) as bar:
        # Ties go to the text that came first.
        named = ((f"{place:012d}", text) for place, text in enumerate(documents))
        return build_index(retriever.encoder, retriever.params, named, dtype, bar.update)


def _mined(
    retriever: Retriever, index: Index, pairs: Pairs, mining: Mining, bar: tqdm
) -> Iterator[dict]:
    """One row for each pair, in order."""
    mesh, size = retriever.mesh, retriever.encoder.block_size
    for start in range(0, len(pairs.queries), _QUERIES):
        texts = pairs.queries[start : start + _QUERIES]
        queries: Queries = retriever.encoder.queries(retriever.params, texts)
        # As many more as a query has answers of its own, which are passed over.
        most = max(map(len, pairs.positives[start : start + _QUERIES]))
        depth = min(mining.depth + most, len(index))
        found = top_k(queries, index.blocks(size), index.ids, depth, mesh)
        own = [(i, place) for i, _ in enumerate(texts) for place in pairs.positives[start + i]]
        scores = dict(zip(own, score_pairs(queries, index, own, mesh).tolist(), strict=True))
        for i, (text, hits) in enumerate(zip(texts, found, strict=True)):
            positives = pairs.positives[start + i]
            if not all(math.isfinite(scores[i, place]) for place in positives):
                raise UserError(
                    f"The model {retriever.name} gives {text[:80]!r} and its document a score that "
                    "is no number: use another model, or another of its checkpoints."
                )
            ranked = [(int(name), score) for name, score in hits.items()]
            others = [
                hit
                for hit in ranked
                if hit[0] not in positives and _is_trainable(pairs.documents[hit[0]])
            ][: mining.depth]
            for place in positives:
                chosen = choose_negatives(
                    others[mining.skip :],
                    positives,
                    scores[i, place],
                    mining.margin,
                    mining.negatives,
                )
                yield {
                    "query": text,
                    "document": pairs.documents[place],
                    "negative": [pairs.documents[negative] for negative in chosen],
                }
            bar.update()


def margin_value(text: str) -> float:
    """Reads `--margin`: a number above 0, or `none`.

    Raises:
      UserError: it is something else.
    """
    if text.lower() == "none":
        return float("inf")
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not 0 < value < np.inf:
        raise UserError(f"--margin={text} is no fraction: give one such as 0.95, or none.")
    return value
