"""How well a run's model ranks: before, while and after it trains."""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from colbert_jax.colbert import Embed, Params
from colbert_jax.data.inputs import Corpus
from colbert_jax.errors import UserError
from colbert_jax.metric_log import MetricLog, read_metrics
from colbert_jax.results import Results, write_json
from colbert_jax.retrieval.collection import Collection
from colbert_jax.retrieval.datasets import open_dataset
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.retrieval.evaluator import Evaluation, average, evaluate, evaluate_bm25
from colbert_jax.retrieval.examples import describe_queries
from colbert_jax.retrieval.explain import explain
from colbert_jax.retrieval.metrics import DEFAULT_METRICS
from colbert_jax.retrieval.search import make_search
from colbert_jax.sharding import make_mesh
from colbert_jax.tokenization import ColbertTokenizer

logger = logging.getLogger(__name__)

SYSTEMS = ("bm25", "untrained", "trained")


class Evals:
    """The evaluators of a run; `config.evals` says which, when, and by what the best is kept.

    Results are kept in `<workdir>/results.json`, averaged over collections, and in
    `<workdir>/evaluation/<collection>.json`, with what the report shows of single queries.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        collections: Sequence[Collection],
        model: tuple[Embed, ColbertTokenizer, Mesh],
        workdir: Path,
        log: MetricLog,
        resumed: bool,
    ):
        """Measures nothing yet.

        Args:
          settings: `config.evals`.
          collections: from `open_collections`.
          model: how it encodes, its tokenizer, and the mesh that it runs on.
          workdir: the run's folder.
          log: takes every measure.
          resumed: whether the run goes on; otherwise what lies in its folder is not read.
        """
        self.settings = settings
        self.collections = collections
        embed, tokenizer, mesh = model
        self.encoder = self._explainer = Encoder(embed, tokenizer, mesh)
        if jax.process_count() > 1:
            # A host can look only into what its own devices hold, and one is enough for that.
            alone = make_mesh(devices=jax.local_devices()[:1])
            self._explainer = Encoder(embed, tokenizer, alone)
        self.workdir = workdir
        self.log = log
        self._bm25: dict[str, Evaluation] = {}
        if not resumed and jax.process_index() == 0:  # of a run that stopped before it saved
            (workdir / "results.json").unlink(missing_ok=True)
            shutil.rmtree(workdir / "evaluation", ignore_errors=True)
        self._systems: dict[str, Results] = {
            c.name: _read_systems(evaluation_path(workdir, c.name)) if resumed else {}
            for c in collections
        }

    @property
    def results(self) -> Results:
        """What is known of each system that was measured on all collections, averaged over them."""
        known = list(self._systems.values())
        return {
            system: average(self.collections, {n: s[system] for n, s in self._systems.items()})
            for system in SYSTEMS
            if known and all(system in systems for systems in known)
        }

    def before(self, resumed: int | None, total_steps: int, params: Params) -> float | None:
        """Measures what is due before a run trains: at its start, or where a stop left it out.

        Args:
          resumed: the step that the run goes on from; None at its start.
          total_steps: the last step.
          params: the model's, as they are now.

        Returns:
          What the step is worth to the choice of the best checkpoint; None where nothing was
          measured, or nothing is chosen.
        """
        if resumed is None:
            self._start(params)
            return None
        if resumed >= total_steps:
            return None
        self._forget_trained()
        return self._make_up(resumed, params)

    def _start(self, params: Params) -> None:
        """Measures BM25 and the model as it is now, where the config asks for it."""
        if not (self.collections and self.settings["baselines"]):
            return
        logger.info("measuring BM25 and the untrained model")
        untrained = self._measure(0, params)
        for collection in self.collections:
            bm25 = self._rank_by_bm25(collection)
            measured = {"bm25": bm25.metrics, "untrained": untrained[collection.name].metrics}
            self._write(collection, 0, measured)
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

    def _make_up(self, step: int, params: Params) -> float | None:
        """Measures a resumed run's step where that was due, and the run was asked to stop there.

        Returns:
          As `during`.
        """
        rows = read_metrics(self.workdir) if jax.process_index() == 0 else []
        done = any(row["step"] == step and any(n.startswith("eval/") for n in row) for row in rows)
        if multihost_utils.broadcast_one_to_all(np.asarray(done)):
            return None
        return self.during(step, params, last=False)

    def finish(self, step: int, params: Params) -> dict[str, float]:
        """Measures the trained model, and looks into single queries."""
        logger.info("measuring the trained model")
        found = self._measure(step, params)
        explained = self._explainer.place(self._here(params))
        for collection in self.collections:
            runs = {"trained": found[collection.name]}
            if self.settings["baselines"]:
                runs = {"bm25": self._rank_by_bm25(collection), **runs}
            with jax.set_mesh(self._explainer.mesh):
                described = describe_queries(
                    collection,
                    {system: evaluation.run for system, evaluation in runs.items()},
                    lambda q, texts: explain(self._explainer, explained, q, texts),
                )
            measured = {system: evaluation.metrics for system, evaluation in runs.items()}
            self._write(collection, step, measured, described)
        write_json(self.workdir / "results.json", self.results)
        return self.results["trained"]

    def _forget_trained(self) -> None:
        """Drops the results of a run that is now to be trained for longer."""
        if not any("trained" in systems for systems in self._systems.values()):
            return
        for collection in self.collections:
            self._systems[collection.name].pop("trained", None)
            self._write(collection, 0, {})
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

    def _here(self, params: Params) -> Params:
        """Parameters that the explainer can place."""
        if self._explainer is self.encoder:
            return params
        return jax.tree.map(np.asarray, self.encoder.place(params))

    def _rank_by_bm25(self, collection: Collection) -> Evaluation:
        if collection.name not in self._bm25:
            self._bm25[collection.name] = evaluate_bm25(collection)
        return self._bm25[collection.name]

    def _write(
        self,
        collection: Collection,
        step: int,
        measured: Results,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds systems to what is known of a collection, and writes it down."""
        known = self._systems[collection.name] | measured
        self._systems[collection.name] = {name: known[name] for name in SYSTEMS if name in known}
        path = evaluation_path(self.workdir, collection.name)
        if jax.process_index() == 0:
            path.parent.mkdir(exist_ok=True)
        facts = {
            "collection": collection.name,
            "group": collection.group,
            "documents": len(collection.documents),
            "queries": len(collection.queries),
            "step": step,
            "systems": self._systems[collection.name],
        }
        write_json(path, _finite({**facts, **(described or {})}))


def evaluation_path(workdir: Path, name: str) -> Path:
    """Where the results on a collection are kept; no two names have one path."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    if plain != name:
        plain += f"-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return workdir / "evaluation" / f"{plain}.json"


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
        if collection.name == "average" and len(collections) > 1:
            raise UserError(
                "A collection of config.evals.collections is called 'average', as is the mean of "
                "all of them in the metrics: rename its folder."
            )
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


def _read_systems(path: Path) -> Results:
    """What earlier sessions have measured; a file that cannot be read counts as nothing."""
    try:
        systems = json.loads(path.read_text(encoding="utf-8"))["systems"]
        return {
            name: {measure: float(systems[name][measure]) for measure in DEFAULT_METRICS}
            for name in SYSTEMS
            if name in systems
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _finite(value: Any) -> Any:
    """Plain data with null for what is no number: JSON knows no NaN, a model that diverged does."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
