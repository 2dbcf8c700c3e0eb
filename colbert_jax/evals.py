"""How well a run's model ranks: before, while and after it trains."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colbert_jax.colbert import Params
from colbert_jax.data.inputs import Corpus
from colbert_jax.errors import UserError
from colbert_jax.metric_log import MetricLog
from colbert_jax.results import Results, read_results, write_json
from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.datasets import open_dataset
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.retrieval.evaluator import Evaluation, average, evaluate, evaluate_bm25
from colbert_jax.retrieval.examples import describe_queries
from colbert_jax.retrieval.explain import explain
from colbert_jax.retrieval.metrics import DEFAULT_METRICS
from colbert_jax.retrieval.search import make_search

logger = logging.getLogger(__name__)


class Evals:
    """The evaluators of a run; `config.evals` says which, when, and by what the best is kept.

    Results are kept in `<workdir>/results.json`, averaged over collections, and in
    `<workdir>/evaluation/<collection>.json`, with what the report shows of single queries.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        collections: Sequence[Collection],
        encoder: Encoder,
        workdir: Path,
        log: MetricLog,
        resumed: bool,
    ):
        """Measures nothing yet.

        Args:
          settings: `config.evals`.
          collections: from `open_collections`.
          encoder: the model's.
          workdir: the run's folder.
          log: takes every measure.
          resumed: whether the run goes on; otherwise what lies in its folder is not read.
        """
        self.settings = settings
        self.collections = collections
        self.encoder = encoder
        self.workdir = workdir
        self.log = log
        self.results: Results = read_results(workdir) if resumed else {}
        self._bm25: dict[str, Evaluation] = {}

    def start(self, params: Params) -> None:
        """Measures BM25 and the model as it is now, where the config asks for it."""
        if not (self.collections and self.settings["baselines"]):
            return
        logger.info("measuring BM25 and the untrained model")
        bm25 = {c.name: self._rank_by_bm25(c).metrics for c in self.collections}
        self.results["bm25"] = average(self.collections, bm25)
        untrained = self._measure(0, params)
        metrics = {name: found.metrics for name, found in untrained.items()}
        self.results["untrained"] = average(self.collections, metrics)
        for collection in self.collections:
            systems = {"bm25": bm25[collection.name], "untrained": metrics[collection.name]}
            self._write(collection, {"step": 0, "systems": systems})
        write_json(self.workdir / "results.json", self.results)

    def during(self, step: int, params: Params, last: bool) -> float | None:
        """Measures where a step is one to measure at.

        Returns:
          What the best checkpoint is chosen by; None where nothing was measured, or nothing is
          chosen.
        """
        every = self.settings["every_steps"]
        if not self.collections or not (last or (every and step % every == 0)):
            return None
        values = self.finish(step, params) if last else self._means(step, params)
        value = values.get(self.settings["best"])
        return value if value is not None and math.isfinite(value) else None

    def finish(self, step: int, params: Params) -> dict[str, float]:
        """Measures the trained model, and looks into single queries."""
        logger.info("measuring the trained model")
        found = self._measure(step, params)
        metrics = {name: evaluation.metrics for name, evaluation in found.items()}
        self.results["trained"] = average(self.collections, metrics)
        placed = self.encoder.place(params)
        for collection in self.collections:
            runs = {"trained": found[collection.name].run}
            systems = {"trained": metrics[collection.name]}
            if self.settings["baselines"]:
                ranked = self._rank_by_bm25(collection)
                runs = {"bm25": ranked.run, **runs}
                systems = {"bm25": ranked.metrics, **systems}
            described = describe_queries(
                collection, runs, lambda q, texts: explain(self.encoder, placed, q, texts)
            )
            self._write(collection, {"step": step, "systems": systems, **described})
        write_json(self.workdir / "results.json", self.results)
        return self.results["trained"]

    def forget_trained(self) -> None:
        """Drops the result of a run that is now to be trained for longer."""
        if self.results.pop("trained", None):
            write_json(self.workdir / "results.json", self.results)

    def _means(self, step: int, params: Params) -> dict[str, float]:
        found = self._measure(step, params)
        return average(self.collections, {name: e.metrics for name, e in found.items()})

    def _measure(self, step: int, params: Params) -> dict[str, Evaluation]:
        search = make_search(self.encoder, params)
        found = {c.name: evaluate(c, search) for c in self.collections}
        values = {
            f"eval/{name}/{measure}": value
            for name, evaluation in found.items()
            for measure, value in evaluation.metrics.items()
        }
        if len(found) > 1:
            means = average(self.collections, {n: e.metrics for n, e in found.items()})
            values |= {f"eval/average/{measure}": value for measure, value in means.items()}
        self.log.write(step, values)
        return found

    def _rank_by_bm25(self, collection: Collection) -> Evaluation:
        if collection.name not in self._bm25:
            self._bm25[collection.name] = evaluate_bm25(collection)
        return self._bm25[collection.name]

    def _write(self, collection: Collection, found: Mapping[str, Any]) -> None:
        folder = self.workdir / "evaluation"
        folder.mkdir(exist_ok=True)
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', collection.name)}.json"
        known = {
            "collection": collection.name,
            "group": collection.group,
            "documents": len(collection.documents),
            "queries": len(collection.queries),
        }
        systems = {**_read_systems(path), **found["systems"]}
        write_json(path, {**known, **found, "systems": systems})


def open_collections(names: Sequence[str], corpus: Corpus) -> list[Collection]:
    """The evaluation collections: the corpus's own held-out part, BEIR folders, or the hub's.

    Raises:
      UserError: there is no such collection, two have one name, or one has no queries.
    """
    collections: list[Collection] = []
    for name in names:
        if name != "held_out":
            collections += open_dataset(name)
            continue
        if corpus.held_out is None:
            raise UserError(
                "config.evals.collections names 'held_out', but only the docstring corpus "
                "keeps a part out: name BEIR folders, nanobeir or beir/NAME instead."
            )
        collections.append(Collection(name, *corpus.held_out))
    for collection in collections:
        if sum(other.name == collection.name for other in collections) > 1:
            raise UserError(
                f"Two collections of config.evals.collections are called {collection.name!r}, and "
                "their results with them: rename one of the folders."
            )
        if not collection.queries:
            raise UserError(
                f"The collection {collection.name!r} has no query: give the corpus more text, or "
                "leave it out of config.evals.collections."
            )
    return collections


def check_evals(settings: Mapping[str, Any]) -> None:
    """Raises `UserError` where the best checkpoint is to be chosen by what is not measured."""
    best = settings["best"]
    if best and best not in DEFAULT_METRICS:
        raise UserError(
            f"config.evals.best is {best!r}: choose one of {', '.join(DEFAULT_METRICS)}, or '' to "
            "keep the newest checkpoints alone."
        )
    if best and not settings["collections"]:
        raise UserError(
            f"config.evals.best is {best!r}, but config.evals.collections names nothing to measure "
            "it on: name BEIR folders, nanobeir or beir/NAME, or set config.evals.best=''."
        )


def _read_systems(path: Path) -> dict[str, Any]:
    """What an earlier session has measured."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["systems"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
