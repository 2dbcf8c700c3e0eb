"""Distillation rows, for `launch/score.py`: a teacher scores candidates, or scores are imported."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from colbert_jax.data.rows import RowError, check_scores, is_unicode, read_rows, read_table
from colbert_jax.data.write import check_output, open_writer
from colbert_jax.errors import UserError, printable
from colbert_jax.programs.retriever import ModelRequest, Retriever, open_retriever
from colbert_jax.retrieval.collection import read_documents
from colbert_jax.retrieval.index import build_index
from colbert_jax.retrieval.pairs import score_pairs

logger = logging.getLogger(__name__)

_ROWS = 256  # rows whose candidates are encoded together

_FEWEST = 2  # candidates of a row: one alone has nothing to be compared with

Candidates = tuple[str, list[str]]  # query, documents
Scored = tuple[str, list[str], list[float]]  # query, documents, scores


class Judged(NamedTuple):
    """Scores by id, as a row of a file has them.

    Attributes:
      query: its id.
      documents: their ids.
      scores: as they stand in the file, unchecked.
      whole: whether these are all of the query's candidates.
      where: the file and the row.
    """

    query: str
    documents: list[str]
    scores: list[Any]
    whole: bool
    where: str


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
    _check_candidates(candidates)
    # All rows are checked before the first is scored: a bad one at the end would cost the work.
    counts = [len(documents) for _, documents in _keep(read_candidates(files), candidates)]
    if not counts:
        raise UserError(f"--rows={','.join(files)} holds no row to score: name other files.")
    if max(counts) < (fewest := max(candidates, _FEWEST)):
        raise UserError(
            f"No row of --rows={','.join(files)} has {fewest} different candidates: "
            f"{_mended(candidates)}."
        )
    retriever = open_retriever(request)
    rows = _scored(retriever, _keep(read_candidates(files), candidates), len(counts))
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

    Of a document that comes twice in a row, the better score counts.

    Raises:
      UserError: anything in the files that the user has to mend.
    """
    check_output(output)
    _check_candidates(candidates)
    if (queries is None) != (documents is None):
        missing = "--queries" if queries is None else "--documents"
        raise UserError(f"{missing} is missing: where scores come with ids, both files are needed.")
    if queries is None or documents is None:
        return write_rows(_best(_read_scored_texts(scores), candidates), output, candidates)
    texts_of_queries = dict(read_documents(queries))
    texts_of_documents = dict(read_documents(documents))
    rows = _with_texts(_read_judged(scores), texts_of_queries, texts_of_documents)
    return write_rows(_best(rows, candidates), output, candidates)


def write_rows(rows: Iterable[Scored], output: str, candidates: int) -> Counter[str]:
    """Writes distillation rows, and prints what became of them."""
    counts: Counter[str] = Counter()
    fewest, most = 0, 0
    fewest_wanted = max(candidates, _FEWEST)
    scaled = True
    with open_writer(output) as write:
        for query, documents, scores in rows:
            if len(documents) < fewest_wanted:
                counts["too_few"] += 1
                continue
            write({"query": query, "documents": documents, "scores": scores})
            counts["written"] += 1
            fewest = min(fewest or len(documents), len(documents))
            most = max(most, len(documents))
            scaled = scaled and min(scores) >= 0 and max(scores) <= 1
        if not counts["written"]:
            raise UserError(
                f"No row has {fewest_wanted} different candidates: {_mended(candidates)}."
                if counts["too_few"]
                else "--scores hold no row to write: name other files."
            )
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    lines = [f"{output}: {counts['written']:,} rows with {each} scored candidates each"]
    if counts["too_few"]:
        lines.append(f"{counts['too_few']:,} left out, which had fewer than {fewest_wanted}")
    command = (
        "Train on it with configs/distill.py "
        f'--config.input.files="({output!r},)" --config.input.max_documents={fewest}'
    )
    if not scaled:  # the student's, brought to 0 to 1, could never come near them
        command += " --config.loss.normalize_scores=False"
    print(printable("\n".join([*lines, command])))
    return counts


def _check_candidates(candidates: int) -> None:
    if 0 < candidates < _FEWEST:
        raise UserError(
            f"--candidates={candidates}: a candidate alone teaches nothing; give at least "
            f"{_FEWEST}, or 0 for all."
        )


def _mended(candidates: int) -> str:
    return "give fewer --candidates" if candidates > _FEWEST else "give rows with more"


def read_candidates(files: Sequence[str]) -> Iterator[Candidates]:
    """Queries with the documents to score, of every layout that has some; scores are passed over.

    Raises:
      UserError: a file or a row that cannot be used.
    """
    for path in files:
        layouts = (("query", "documents"), ("query", "pos", "neg"))
        layout = next((names for names in layouts if _has_columns(path, set(names))), None)
        if layout is not None:
            yield from _read_lists(path, *layout)
            continue
        for number, row in read_rows(path):
            if isinstance(row, RowError):
                raise UserError(f"{path}, row {number}: {row}.")
            yield row["query"], row["documents"]


def _read_lists(path: str, query: str, *lists: str) -> Iterator[Candidates]:
    """Rows whose candidates stand in lists, of which the first must hold some."""
    for number, record in _table(path, (query, *lists)):
        found = [record[name] for name in lists]
        if not all(isinstance(texts, list) for texts in found) or not found[0]:
            raise UserError(f"{path}, row {number}: {lists[0]} must be a list of texts.")
        documents = [text for texts in found for text in texts]
        if not all(map(_is_text, (record[query], *documents))):
            raise UserError(
                f"{path}, row {number}: {query} must be a text and {' and '.join(lists)} must hold "
                "texts, none of them blank."
            )
        yield record[query], documents


def _keep(rows: Iterable[Candidates], candidates: int) -> Iterator[Candidates]:
    for query, documents in rows:
        different = list(dict.fromkeys(documents))
        yield query, different[: candidates or None]


def _scored(retriever: Retriever, rows: Iterable[Candidates], total: int) -> Iterator[Scored]:
    """Adds the teacher's scores, a few hundred rows at a time."""
    pending: list[Candidates] = []
    with tqdm(total=total, desc="score", unit="row", disable=None, leave=False) as bar:
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
        of_row = [next(scores) for _ in documents]
        if not all(map(math.isfinite, of_row)):
            raise UserError(
                f"The teacher {retriever.name} gives {query[:80]!r} a score that is no number: use "
                "another model, or another of its checkpoints."
            )
        yield query, documents, of_row


def _read_scored_texts(files: Sequence[str]) -> Iterator[Scored]:
    for path in files:
        ids = _has_columns(path, {"query_id"}) or _has_columns(path, {"query-id"})
        if ids and not _has_columns(path, {"query"}):
            raise UserError(
                f"{path} holds ids, no texts: name the files that have these with --queries and "
                "--documents."
            )
        for number, row in read_rows(path):
            if isinstance(row, RowError):
                raise UserError(f"{path}, row {number}: {row}.")
            if row["scores"] is None:
                raise UserError(
                    f"{path}, row {number}: it has no scores; let a model make them with --teacher."
                )
            yield row["query"], row["documents"], row["scores"]


def _read_judged(files: Sequence[str]) -> Iterator[Judged]:
    for path in files:
        if _has_columns(path, {"query_id", "document_ids", "scores"}):
            for number, record in _table(path, ("query_id", "document_ids", "scores")):
                ids, scores, where = record["document_ids"], record["scores"], f"row {number}"
                if not isinstance(ids, list) or not isinstance(scores, list):
                    raise UserError(f"{path}, {where}: document_ids and scores must be lists.")
                names = [str(name) for name in ids]
                yield Judged(str(record["query_id"]), names, scores, True, f"{path}, {where}")
            continue
        query_id, document_id = _judgement_columns(path)
        for number, record in _table(path, (query_id, document_id, "score")):
            names = [str(record[document_id])]
            where = f"{path}, row {number}"
            yield Judged(str(record[query_id]), names, [record["score"]], False, where)


def _with_texts(
    rows: Iterable[Judged], queries: Mapping[str, str], documents: Mapping[str, str]
) -> Iterator[Scored]:
    """Checks ids and scores, and puts texts in their place; single judgements come last."""
    gathered: dict[str, tuple[list[str], list[float]]] = {}
    for row in rows:
        _check_text(row.query, "query", queries, row.where)
        for name in row.documents:
            _check_text(name, "document", documents, row.where)
        try:
            scores = check_scores(row.scores, len(row.documents))
        except RowError as error:
            raise UserError(f"{row.where}: {error}.") from error
        if row.whole:
            yield queries[row.query], [documents[name] for name in row.documents], scores
        else:
            ids, of_query = gathered.setdefault(row.query, ([], []))
            ids += row.documents
            of_query += scores
    for query, (ids, of_query) in gathered.items():
        yield queries[query], [documents[name] for name in ids], of_query


def _check_text(name: str, kind: str, texts: Mapping[str, str], where: str) -> None:
    flag = {"query": "--queries", "document": "--documents"}[kind]
    if name not in texts:
        raise UserError(f"{where}: the {kind} {name!r} is not in {flag}; add it.")
    if not _is_text(texts[name]):
        raise UserError(f"{where}: the {kind} {name!r} has no text in {flag}; give it one.")


def _is_text(value: Any) -> bool:
    """Whether a row may hold it."""
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def _best(rows: Iterable[Scored], candidates: int) -> Iterator[Scored]:
    for query, documents, scores in rows:
        best: dict[str, float] = {}
        for text, score in zip(documents, scores, strict=True):
            best[text] = max(score, best.get(text, score))
        kept = list(best)
        if candidates and len(kept) > candidates:
            kept = sorted(kept, key=lambda text: -best[text])[:candidates]
        yield query, kept, [best[text] for text in kept]


def _judgement_columns(path: str) -> tuple[str, str]:
    for names in (("query_id", "document_id"), ("query-id", "corpus-id")):
        if _has_columns(path, {*names, "score"}):
            return names
    number, first = next(iter(read_table(path, list)), (0, None))
    if first is None:
        raise UserError(f"{path} holds no row: name another file.")
    if isinstance(first, RowError):
        raise UserError(f"{path}, row {number}: {first}.")
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
