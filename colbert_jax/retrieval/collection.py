"""A test collection: documents, queries and the judgements which document answers which query."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colbert_jax.data.rows import is_unicode
from colbert_jax.errors import UserError
from colbert_jax.tokenization import whole


@dataclass(frozen=True)
class Collection:
    """What a model is evaluated on; all ids are strings."""

    name: str
    documents: dict[str, str]
    """`documents[document id]`, the text."""
    queries: dict[str, str]
    """`queries[query id]`, the text; every query has judgements."""
    qrels: dict[str, dict[str, int]]
    """`qrels[query id][document id]`, the relevance: 0 is judged not relevant, more is better."""
    group: str = ""
    """The collection that this is a part of, as are CQADupStack's forums; parts count as one."""


def read_beir(folder: str | os.PathLike[str], split: str = "test") -> Collection:
    """Reads a collection in BEIR's layout (https://github.com/beir-cellar/beir).

    `corpus.jsonl` has a line `{"_id": ..., "title": ..., "text": ...}` for each document, the title
    being optional; `queries.jsonl` has `{"_id": ..., "text": ...}`; `qrels/SPLIT.tsv` has a header
    line and then query id, document id and relevance, with tabs between them. A document's text
    is its title, a space and its text, without white space around them, as in BEIR's and PyLate's
    evaluations: a prompt would not end in the same tokens before a space. Queries keep theirs, as
    there. Queries without judgements in this split are left out.

    Args:
      folder: holds the three files; its name becomes the collection's.
      split: names the file of judgements: `test`, `dev` or `train` in most collections.

    Raises:
      UserError: a file is missing, empty or malformed, an id is used twice, or a judgement names
        a document or query that is not there.
    """
    folder = Path(folder)
    documents = {
        document_id: whole(text.strip())
        for document_id, text in read_documents(folder / "corpus.jsonl")
    }
    queries = {name: whole(text) for name, text in read_documents(folder / "queries.jsonl")}
    qrels = _read_qrels(folder / "qrels" / f"{split}.tsv", documents, queries)
    return Collection(
        name=folder.resolve().name,
        documents=documents,
        queries={query_id: text for query_id, text in queries.items() if query_id in qrels},
        qrels=qrels,
    )


def read_documents(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Reads `(id, text)` from a file of BEIR's layout, a line at a time.

    Args:
      path: JSON Lines, `{"_id": ..., "title": ..., "text": ...}` with or without a title; gzipped
        if its name ends in `.gz`.

    Raises:
      UserError: the file is missing, empty or malformed, or an id is used twice.
    """
    path = Path(path)
    seen: set[str] = set()
    for where, line in _lines(path):
        row = _parse_row(where, line)
        row_id, title, text = row.get("_id"), row.get("title") or "", row.get("text")
        if not isinstance(row_id, str) or not row_id:
            raise UserError(f'{where} has no id; give it an "_id" that is a string')
        if not is_unicode(row_id):
            raise UserError(f'{where} has half of a surrogate pair in its "_id"; mend the id')
        if not isinstance(text, str) or not isinstance(title, str):
            raise UserError(f'{where} has no text; give it a "text" that is a string')
        if row_id in seen:
            shown = f"{row_id[:80]!r}"
            raise UserError(f'{where} has the "_id" {shown} of an earlier line; ids must differ')
        seen.add(row_id)
        yield row_id, f"{title} {text}" if title else text
    if not seen:
        raise UserError(f"{path} is empty; it must have one JSON object on each line")


def _parse_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise UserError(
            f'{where} is not a JSON object; it must look like {{"_id": "1", "text": …}}'
        )
    return row


def _read_qrels(
    path: Path, documents: dict[str, str], queries: dict[str, str]
) -> dict[str, dict[str, int]]:
    lines = _lines(path)
    where, header = next(lines, (f"{path}, line 1,", b""))
    if header.count(b"\t") != 2 or _is_integer(header.split(b"\t")[2]):
        raise UserError(
            f"{where} is not a header; the file must start with the line "
            "query-id, corpus-id, score, with tabs between the names"
        )
    qrels: dict[str, dict[str, int]] = {}
    for where, line in lines:
        fields = line.split(b"\t")
        if len(fields) != 3 or not _is_integer(fields[2]):
            raise UserError(
                f"{where} is not a judgement; it must have a query id, a document id and a whole "
                "number of no more than 32 bits, with tabs between them"
            )
        query_id, document_id = (field.decode("utf-8", "replace").strip() for field in fields[:2])
        if query_id not in queries:
            raise UserError(
                f"{where} judges the query {query_id[:80]!r}, which queries.jsonl does not have; "
                "add the query or remove the line"
            )
        if document_id not in documents:
            raise UserError(
                f"{where} judges the document {document_id[:80]!r}, which corpus.jsonl does not "
                "have; add the document or remove the line"
            )
        qrels.setdefault(query_id, {})[document_id] = int(fields[2])
    if not qrels:
        raise UserError(f"{path} has no judgements after its header; name a split that has some")
    return qrels


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("FILE, line N,", line) of each line that is not blank."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number},", line.rstrip(b"\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a truncated or damaged gzip file; copy it again") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); "
            "a BEIR folder has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"
        ) from error


def _is_integer(field: bytes) -> bool:
    try:
        return abs(int(field)) < 1 << 31  # what trec_eval can hold
    except ValueError:
        return False
