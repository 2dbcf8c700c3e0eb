"""Measures a model on test collections, for `launch/evaluate.py`."""

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from colbert_jax.errors import UserError, printable
from colbert_jax.huggingface.configs import write_json
from colbert_jax.programs.retriever import (
    ModelRequest,
    Retriever,
    open_output,
    open_retriever,
)
from colbert_jax.results import Results, results_table
from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.datasets import open_dataset
from colbert_jax.retrieval.evaluator import (
    Evaluation,
    average,
    evaluate,
    evaluate_bm25,
    write_trec_run,
)
from colbert_jax.retrieval.metrics import DEFAULT_METRICS, check_metrics
from colbert_jax.retrieval.search import make_search

logger = logging.getLogger(__name__)


def evaluate_model(
    request: ModelRequest,
    datasets: Sequence[str],
    split: str | None,
    output: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
    bm25: bool = False,
) -> Results:
    """Evaluates, writes `metrics.json` and a TREC run for each collection, and prints a table.

    Args:
      request: the model.
      datasets: as `open_dataset` takes them.
      split: which judgements; each data set's own by default.
      output: the folder to write to.
      metrics: names that ir_measures knows.
      bm25: whether BM25 is measured beside the model.

    Returns:
      System -> measure -> value, averaged as BEIR's tables have it.

    Raises:
      UserError: anything in model, data or output that the user has to mend.
    """
    check_metrics(metrics)
    if not datasets:
        raise UserError("--dataset is empty: name test collections, with commas between them.")
    collections = (c for name in datasets for c in open_dataset(name, split))
    first = [next(collections)]  # what is wrong with the data is said before a model is read
    folder = open_output(output)
    retriever = open_retriever(request)
    search = make_search(retriever.encoder, retriever.params)
    measured: dict[str, Results] = {}
    seen: list[Collection] = []
    facts: dict[str, dict[str, int]] = {}
    averages: Results = {}
    with contextlib.closing(collections):
        # One collection at a time is in memory, the first no longer than the others.
        while collection := first.pop() if first else next(collections, None):
            if collection.name in measured:
                raise UserError(
                    f"Two collections are called {collection.name!r}, and their results with "
                    "them: rename one of the folders."
                )
            began = time.perf_counter()
            runs: dict[str, Evaluation] = {}
            if bm25:
                runs["bm25"] = evaluate_bm25(collection, metrics)
            runs["model"] = evaluate(collection, search, metrics)
            for system, found in runs.items():
                _write_run(folder, collection, system, found)
            measured[collection.name] = {system: found.metrics for system, found in runs.items()}
            facts[collection.name] = describe(collection)
            seen.append(Collection(collection.name, {}, {}, {}, collection.group))
            averages = {
                system: average(seen, {name: by[system] for name, by in measured.items()})
                for system in runs
            }
            # After each, so that nothing is lost where a later one cannot be read.
            write_json(
                folder / "metrics.json",
                {
                    "model": retriever.name,
                    "split": split,
                    "metrics": averages,
                    "collections": {n: {**facts[n], "metrics": measured[n]} for n in measured},
                },
            )
            logger.info(
                "%s: %s queries, %s documents, %.1f s",
                collection.name,
                f"{len(collection.queries):,}",
                f"{len(collection.documents):,}",
                time.perf_counter() - began,
            )
    print(printable(report(retriever, measured, averages)))
    print(printable(f"\nWritten to {folder}: metrics.json and a TREC run for each collection"))
    return averages


def describe(collection: Collection) -> dict[str, int]:
    """Sizes of a collection."""
    return {
        "documents": len(collection.documents),
        "queries": len(collection.queries),
        "judgements": sum(map(len, collection.qrels.values())),
    }


def report(retriever: Retriever, measured: dict[str, Results], averages: Results) -> str:
    """A table of all collections, and of their average where there are several."""
    rows = {
        f"{name} {system}" if len(values) > 1 else name: metrics
        for name, values in measured.items()
        for system, metrics in values.items()
    }
    if len(measured) > 1:
        label = "average"
        rows |= {
            f"{label} {system}" if len(averages) > 1 else label: metrics
            for system, metrics in averages.items()
        }
    return f"{retriever.name}\n\n{results_table(rows)}"


def _write_run(folder: Path, collection: Collection, system: str, found: Evaluation) -> None:
    name = collection.name if system == "model" else f"{collection.name}.{system}"
    text = write_trec_run(found.run, system)
    (folder / f"{name}.run").write_text(text, encoding="utf-8")
