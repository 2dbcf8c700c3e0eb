"""Distillation rows, for `launch/score.py`: a teacher scores candidates, or scores are imported."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from colbert_jax.data.rows import RowError, check_scores, read_rows, read_table
from colbert_jax.data.write import check_output, open_writer
from colbert_jax.errors import UserError, printable
from colbert_jax.programs.retriever import ModelRequest, Retriever, open_retriever
from colbert_jax.retrieval.collection import read_documents
from colbert_jax.retrieval.index import build_index
from colbert_jax.retrieval.pairs import score_pairs

logger = logging.getLogger(__name__)

_ROWS = 256  # rows whose candidates are encoded together

Candidates = tuple[str, list[str]]  # query, documents
Scored = tuple[str, list[str], list[float]]  # query, documents, scores


def score_with_teacher(
    request: ModelRequest, files: Sequence[str], output: str, candidates: int = 0
) -> Counter[str]:
    """Writes rows of query, candidates and a model's scores, which phase 3 trains on as they are.

    Args:
      request: the teacher, any ColBERT.
      files: rows with candidates: query and documents, query, document and negative, or query, pos
        and neg.
      output: the file to write, JSON Lines or Parquet by its name.
      candidates: how many of each row to keep, its first; rows with fewer are left out. 0 keeps
        all.

    Returns:
      How many rows were "written" and how many had "too_few" candidates.

    Raises:
      UserError: anything in model, data or output that the user has to mend.
    """
    check_output(output)
    first = next(read_candidates(files), None)  # said before a model is read
    if first is None:
        raise UserError(f"{', '.join(files)}: there is no row to score.")
    retriever = open_retriever(request)
    rows = _scored(retriever, _keep(read_candidates(files), candidates))
    return write_rows(rows, output, candidates)


def import_scores(
    scores: Sequence[str],
    output: str,
    queries: str | None = None,
    documents: str | None = None,
    candidates: int = 0,
) -> Counter[str]:
    """Writes rows of query, candidates and scores that another program has made.

    Args:
      scores: JSON Lines or Parquet files. Either their rows hold texts (query, documents and
        scores, or query, pos, neg, pos_scores and neg_scores), or ids: query_id, document_ids and
        scores, or one judgement a row: query_id (or query-id), document_id (or corpus-id), score.
      output: the file to write.
      queries: where ids are given, the queries as in BEIR's `queries.jsonl`.
      documents: where ids are given, the documents as in BEIR's `corpus.jsonl`.
      candidates: how many of each row to keep, its best; rows with fewer are left out. 0 keeps all.

    Raises:
      UserError: anything in the files that the user has to mend.
    """
    check_output(output)
    if (queries is None) != (documents is None):
        missing = "--queries" if queries is None else "--documents"
        raise UserError(f"{missing} is missing: where scores come with ids, both files are needed.")
    if queries is None or documents is None:
        return write_rows(_best(_read_scored_texts(scores), candidates), output, candidates)
    texts_of_queries = dict(read_documents(queries))
    texts_of_documents = dict(read_documents(documents))
    rows = _with_texts(_read_scored_ids(scores), texts_of_queries, texts_of_documents)
    return write_rows(_best(rows, candidates), output, candidates)


def write_rows(rows: Iterable[Scored], output: str, candidates: int) -> Counter[str]:
    """Writes distillation rows, and prints what became of them."""
    counts: Counter[str] = Counter()
    fewest, most = 0, 0
    with open_writer(output) as write:
        for query, documents, scores in rows:
            if len(documents) < max(candidates, 1):
                counts["too_few"] += 1
                continue
            write({"query": query, "documents": documents, "scores": scores})
            counts["written"] += 1
            fewest = min(fewest or len(documents), len(documents))
            most = max(most, len(documents))
        if not counts["written"]:
            raise UserError(
                f"No row has {candidates or 1} candidates: give fewer --candidates."
                if counts["too_few"]
                else "There is no row to write: the files are empty."
            )
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    lines = [f"{output}: {counts['written']:,} rows with {each} scored candidates each"]
    if counts["too_few"]:
        lines.append(f"{counts['too_few']:,} left out, which had fewer than {candidates}")
    lines.append(
        "Train on it with configs/distill.py "
        f"--config.input.files=\"('{output}',)\" --config.input.max_documents={fewest}"
    )
    print(printable("\n".join(lines)))
    return counts


def read_candidates(files: Sequence[str]) -> Iterator[Candidates]:
    """Queries with the documents to score, of every layout that has some; scores are passed over.

    Raises:
      UserError: a file or a row that cannot be used.
    """
    for path in files:
        if _has_columns(path, {"query", "documents"}):
            for number, record in _table(path, ("query", "documents")):
                query, documents = record["query"], record["documents"]
                texts = [query, *documents] if isinstance(documents, list) else [None]
                if len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
                    raise UserError(
                        f"{path}, row {number}: query must be a text and documents a list of texts."
                    )
                yield query, documents
            continue
        for number, row in read_rows(path):
            if isinstance(row, RowError):
                raise UserError(f"{path}, row {number}: {row}.")
            yield row["query"], row["documents"]


def _keep(rows: Iterable[Candidates], candidates: int) -> Iterator[Candidates]:
    for query, documents in rows:
        different = list(dict.fromkeys(documents))
        yield query, different[: candidates or None]


def _scored(retriever: Retriever, rows: Iterable[Candidates]) -> Iterator[Scored]:
    """Adds the teacher's scores, a few hundred rows at a time."""
    pending: list[Candidates] = []
    with tqdm(desc="score", unit="row", disable=None, leave=False) as bar:
        for row in rows:
            pending.append(row)
            if len(pending) == _ROWS:
                yield from _score(retriever, pending)
                bar.update(len(pending))
                pending = []
        if pending:
            yield from _score(retriever, pending)


def _score(retriever: Retriever, rows: Sequence[Candidates]) -> Iterator[Scored]:
    places: dict[str, int] = {}
    for _, documents in rows:
        for text in documents:
            places.setdefault(text, len(places))
    named = ((str(place), text) for place, text in enumerate(places))
    index = build_index(retriever.encoder, retriever.params, named, "float32")
    queries = retriever.encoder.queries(retriever.params, [query for query, _ in rows])
    pairs = [(i, places[text]) for i, (_, documents) in enumerate(rows) for text in documents]
    scores = iter(score_pairs(queries, index, pairs, retriever.mesh).tolist())
    for query, documents in rows:
        yield query, documents, [next(scores) for _ in documents]


def _read_scored_texts(files: Sequence[str]) -> Iterator[Scored]:
    for path in files:
        for number, row in read_rows(path):
            if isinstance(row, RowError):
                raise UserError(f"{path}, row {number}: {row}.")
            if row["scores"] is None:
                raise UserError(
                    f"{path}, row {number}: it has no scores; let a model make them with --teacher."
                )
            yield row["query"], row["documents"], row["scores"]


def _read_scored_ids(files: Sequence[str]) -> Iterator[tuple[str, list[str], list[float], str]]:
    """`(query id, document ids, scores, where)`; single judgements are gathered by query."""
    gathered: dict[str, tuple[list[str], list[float], str]] = {}
    for path in files:
        if _has_columns(path, {"query_id", "document_ids", "scores"}):
            for number, record in _table(path, ("query_id", "document_ids", "scores")):
                ids, where = record["document_ids"], f"{path}, row {number}"
                if not isinstance(ids, list) or not isinstance(record["scores"], list):
                    raise UserError(f"{where}: document_ids and scores must be lists.")
                yield _name(record["query_id"]), list(map(_name, ids)), record["scores"], where
            continue
        query_id, document_id = _judgement_columns(path)
        for number, record in _table(path, (query_id, document_id, "score")):
            where = f"{path}, row {number}"
            ids, scores, _ = gathered.setdefault(_name(record[query_id]), ([], [], where))
            ids.append(_name(record[document_id]))
            scores.append(record["score"])
    for query, (ids, scores, where) in gathered.items():
        yield query, ids, scores, where


def _with_texts(
    rows: Iterable[tuple[str, list[str], list[float], str]],
    queries: dict[str, str],
    documents: dict[str, str],
) -> Iterator[Scored]:
    for query_id, ids, scores, where in rows:
        if query_id not in queries:
            raise UserError(f"{where}: the query {query_id!r} is not in --queries; add it.")
        for document_id in ids:
            if document_id not in documents:
                raise UserError(
                    f"{where}: the document {document_id!r} is not in --documents; add it."
                )
        try:
            checked = check_scores(scores, len(ids))
        except RowError as error:
            raise UserError(f"{where}: {error}.") from error
        yield queries[query_id], [documents[name] for name in ids], checked


def _best(rows: Iterable[Scored], candidates: int) -> Iterator[Scored]:
    for query, documents, scores in rows:
        if not candidates or len(documents) <= candidates:
            yield query, documents, scores
            continue
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:candidates]
        yield query, [documents[i] for i in order], [scores[i] for i in order]


def _judgement_columns(path: str) -> tuple[str, str]:
    for names in (("query_id", "document_id"), ("query-id", "corpus-id")):
        if _has_columns(path, {*names, "score"}):
            return names
    raise UserError(
        f"{path}: with --queries and --documents its columns must be query_id, document_ids and "
        "scores, or query_id, document_id and score."
    )


def _has_columns(path: str, wanted: set[str]) -> bool:
    found: list[set[str]] = []

    def look(names: Collection[str]) -> Sequence[str]:
        found.append(set(names))
        return list(names)

    next(iter(read_table(path, look)), None)
    return any(names >= wanted for names in found)


def _table(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    choose: Callable[[Collection[str]], Sequence[str]] = lambda found: columns  # noqa: E731
    for number, record in read_table(path, choose):
        if isinstance(record, RowError):
            raise UserError(f"{path}, row {number}: {record}.")
        lacking = [name for name in columns if record.get(name) is None]
        if lacking:
            raise UserError(f"{Path(path)}, row {number}: it has no {' and no '.join(lacking)}.")
        yield number, record


def _name(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
