"""Searches a corpus, for `launch/search.py`."""

import io
import logging
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from colbert_jax.errors import UserError, printable
from colbert_jax.programs.retriever import ModelRequest, Retriever, file_digest, open_retriever
from colbert_jax.retrieval.collection import read_documents
from colbert_jax.retrieval.explain import explain, mark_words
from colbert_jax.retrieval.index import Index, build_index, is_finished, open_index
from colbert_jax.retrieval.search import top_k

logger = logging.getLogger(__name__)

PASSAGES = 5  # that are printed where nobody says how many
SNIPPET = 600  # characters of a passage that are shown
_BOLD, _PLAIN = "\033[1;33m", "\033[0m"


def search_corpus(
    request: ModelRequest,
    corpus: str,
    queries: Sequence[str],
    interactive: bool,
    k: int | None = None,
    index: str | None = None,
    index_dtype: str = "bfloat16",
) -> None:
    """Prints the passages that answer each query best.

    Args:
      request: the model.
      corpus: a file in the layout of BEIR's `corpus.jsonl`, gzipped or not.
      queries: texts.
      interactive: whether queries are read from the user until he leaves.
      k: passages for each; None prints `PASSAGES`, or all of fewer documents.
      index: a folder that keeps the encoded corpus; None keeps it in memory.
      index_dtype: how embeddings are kept.

    Raises:
      UserError: anything in model, corpus or index that the user has to mend.
    """
    blank = [query for query in queries if not query.strip()]
    if blank or not (queries or interactive):
        raise UserError("--query is empty: write what to search for, or give --interactive.")
    if not Path(corpus).is_file():
        raise UserError(f"--corpus={corpus}: there is no such file.")
    # What is wrong with the file is said before a model is read and hours are spent on encoding.
    count = None
    if index is None or not is_finished(index):
        count = sum(1 for _ in read_documents(corpus))
        _check_k(k, count, corpus)
    retriever = open_retriever(request)
    found = load_index(retriever, corpus, index, index_dtype, count)
    _check_k(k, len(found), corpus)
    k = k or PASSAGES
    for query in queries:
        print_answer(retriever, found, query, k)
    if interactive:
        for query in ask():
            print_answer(retriever, found, query, k)


def _check_k(k: int | None, count: int, corpus: str) -> None:
    if k is not None and k > count:
        raise UserError(
            f"--k={k:,} is more than the {count:,} documents of --corpus={corpus}: ask for fewer."
        )


def load_index(
    retriever: Retriever,
    corpus: str,
    folder: str | None,
    dtype: str = "bfloat16",
    count: int | None = None,
) -> Index:
    """Encodes a corpus, of `count` documents, or opens what was encoded before."""
    began = time.perf_counter()
    with tqdm(total=count, desc="encode", unit="document", disable=None, leave=False) as bar:
        if folder is None:
            documents = read_documents(corpus)
            index = build_index(retriever.encoder, retriever.params, documents, dtype, bar.update)
        else:
            origin = {"model": retriever.fingerprint(), "corpus": file_digest(corpus)}
            index = open_index(
                folder,
                retriever.encoder,
                retriever.params,
                lambda: read_documents(corpus),
                origin,
                dtype,
                bar.update,
            )
    seconds = time.perf_counter() - began
    logger.info(
        "%s documents, %s tokens, %s as %s, in %.1f s%s",
        f"{len(index):,}",
        f"{index.tokens:,}",
        f"{index.nbytes / 1e6:,.1f} MB",
        dtype,
        seconds,
        f"; kept in {folder}" if folder else "",
    )
    return index


def ask() -> Iterator[str]:
    """Queries that the user types, until an empty line or the end of the input."""
    shown = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text is no reason to end
    while True:
        if shown:
            print("\nquery (empty to leave): ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def print_answer(retriever: Retriever, index: Index, query: str, k: int) -> None:
    """Prints the best passages with the matched words marked."""
    began = time.perf_counter()
    queries = retriever.encoder.queries(retriever.params, [query])
    blocks = index.blocks(retriever.encoder.block_size)
    (hits,) = top_k(queries, blocks, index.ids, k, retriever.mesh)
    seconds = time.perf_counter() - began
    places = {name: position for position, name in enumerate(index.ids) if name in hits}
    texts = [index.text(places[name]) for name in hits]
    explained = explain(retriever.encoder, retriever.params, query, texts)
    print(printable(f"\n{query}   ({len(index):,} documents, {seconds:.2f} s)"))
    colour = sys.stdout.isatty()
    for rank, (name, text, why) in enumerate(zip(hits, texts, explained, strict=True), 1):
        head = f"{rank:>3}. {hits[name]:.3f}  {printable(name)}"
        print(f"\n{head}\n{passage(text, why.matched(), colour)}")


def passage(text: str, spans: Sequence[tuple[int, int]], colour: bool) -> str:
    """The part of a text with the most marked words, wrapped and indented.

    Args:
      text: the whole.
      spans: what is marked, in characters.
      colour: whether marks are colours, or `[[ ]]`.
    """
    start = _densest(spans, len(text))
    shown = text[start : start + SNIPPET]
    inside = [(s - start, e - start) for s, e in spans if s >= start and e <= start + SNIPPET]
    before, after = (_BOLD, _PLAIN) if colour else ("[[", "]]")
    words: list[str] = []
    for piece, marked in mark_words(shown, inside):
        clean = printable(re.sub(r"\s+", " ", piece))
        words.append(f"{before}{clean}{after}" if marked and clean.strip() else clean)
    head = "… " if start else ""
    tail = " …" if start + SNIPPET < len(text) else ""
    joined = head + "".join(words) + tail
    return textwrap.fill(
        joined, 96, initial_indent="     ", subsequent_indent="     ", break_long_words=False
    )


def _densest(spans: Sequence[tuple[int, int]], length: int) -> int:
    """Where a stretch of `SNIPPET` characters holds the most spans; early rather than late."""
    if length <= SNIPPET or not spans or spans[-1][1] <= SNIPPET:
        return 0
    starts = [max(min(s - 40, length - SNIPPET), 0) for s, _ in spans]

    def held(start: int) -> int:
        return sum(s >= start and e <= start + SNIPPET for s, e in spans)

    return max([0, *starts], key=lambda start: (held(start), -start))
