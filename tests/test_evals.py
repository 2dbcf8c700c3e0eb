"""Evaluators in training: measured when asked, at no cost to the run, and the best step is kept."""

import contextlib
import copy
import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto import event_pb2
from tiny_model import save_model
from tiny_run import read_strictly, text_pairs, tiny_config, write_beir, write_lines

from colbert_jax import evals as evals_module
from colbert_jax import huggingface
from colbert_jax import run as run_module
from colbert_jax.checkpoint import Checkpoints
from colbert_jax.colbert import make_embed
from colbert_jax.data.inputs import Corpus
from colbert_jax.errors import Interrupted, UserError
from colbert_jax.evals import Evals, check_evals, evaluation_path, open_collections
from colbert_jax.export import export_run, read_run, results_at
from colbert_jax.metric_log import MetricLog, read_metrics
from colbert_jax.retrieval.collection import Collection, read_beir
from colbert_jax.retrieval.encode import Encoder
from colbert_jax.retrieval.evaluator import Evaluation, evaluate, evaluate_bm25
from colbert_jax.retrieval.search import make_search
from colbert_jax.run import run
from colbert_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEASURES = ("nDCG@10", "MRR@10", "Recall@100", "MAP")
ODD = "odd näme #1"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # once for each program, kept or not


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evals")


@pytest.fixture(scope="module")
def pairs(real_texts: list[str]) -> list[dict[str, str]]:
    return text_pairs(real_texts, 48)


@pytest.fixture(scope="module")
def collections(pairs: list[dict[str, str]], folder: Path) -> tuple[str, str]:
    """Two BEIR folders of one size and different texts, one of an odd name."""
    return (
        str(write_beir(folder / "plain", pairs[:16], 8)),
        str(write_beir(folder / ODD, pairs[16:32], 8)),
    )


@pytest.fixture(scope="module")
def config(
    pairs: list[dict[str, str]], folder: Path, tokenizer_file: Path, collections: tuple[str, str]
) -> ConfigDict:
    """A run of 5 steps that evaluates two collections at every other step."""
    model = save_model(folder / "model", tokenizer_file, query_length=12, document_length=20)
    files = [write_lines(folder / "pairs.jsonl", pairs)]
    changed = tiny_config("pretrain", model, files, folder / "cache", total_steps=5)
    changed.evals.collections = collections
    changed.evals.every_steps = 2
    changed.evals.baselines = True
    return changed


class Watched:
    """What a run did.

    Attributes:
      workdir: its folder.
      results: what `run` returned.
      compiled: how often its step was compiled.
      lowered: for each evaluation, its step and the programs that were lowered for it.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        self.workdir = workdir
        self.compiled = 0
        self.lowered: list[tuple[int, int]] = []
        counted = 0

        def count(event: str, duration: float, **more: Any) -> None:
            nonlocal counted
            counted += event == LOWERED
            self.compiled += event == LOWERED and more["fun_name"] == "jit(train_step)"

        measure = Evals._measure

        def noting_measure(evals: Evals, step: int, params: Any) -> Any:
            before = counted
            found = measure(evals, step, params)
            self.lowered.append((step, counted - before))
            return found

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Evals, "_measure", noting_measure)
            jax.monitoring.register_event_duration_secs_listener(count)
            try:
                self.results = run(config, workdir)
            finally:
                jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture(scope="module")
def watched(config: ConfigDict, folder: Path) -> Watched:
    return Watched(config, folder / "watched")


@pytest.fixture(scope="module")
def unwatched(config: ConfigDict, folder: Path) -> Watched:
    """The same run without evaluators."""
    without = copy.deepcopy(config)
    without.evals.collections = ()
    without.evals.baselines = False
    return Watched(without, folder / "unwatched")


# --- what is measured, and where it is written ---


def measured(workdir: Path) -> dict[int, dict[str, float]]:
    rows = [row for row in read_metrics(workdir) if any(key.startswith("eval/") for key in row)]
    assert len({row["step"] for row in rows}) == len(rows)  # each step once
    return {row["step"]: {k: v for k, v in row.items() if k != "step"} for row in rows}


def test_every_collection_is_measured_at_the_start_every_n_steps_and_at_the_end(
    watched: Watched,
) -> None:
    found = measured(watched.workdir)
    assert list(found) == [0, 2, 4, 5]
    names = {f"eval/{c}/{m}" for c in ("plain", ODD, "average") for m in MEASURES}
    for values in found.values():
        assert set(values) == names
        for measure in MEASURES:
            mean = (values[f"eval/plain/{measure}"] + values[f"eval/{ODD}/{measure}"]) / 2
            assert values[f"eval/average/{measure}"] == pytest.approx(mean, abs=1e-12)
    assert len({json.dumps(values) for values in found.values()}) > 1  # training changes them


def test_what_is_measured_is_the_model_of_that_step(
    watched: Watched, collections: tuple[str, str]
) -> None:
    model, params, step = read_run(watched.workdir)
    assert step == 5
    encoder = Encoder(make_embed(model.config), model.tokenizer, make_mesh())
    search = make_search(encoder, jax.tree.map(np.asarray, params))
    for path in collections:
        collection = read_beir(path)
        for measure, value in evaluate(collection, search).metrics.items():
            logged = measured(watched.workdir)[5][f"eval/{collection.name}/{measure}"]
            assert logged == pytest.approx(value, abs=1e-9)


def events(workdir: Path) -> dict[tuple[str, int], float]:
    """TensorBoard's scalars, by name and step."""
    found = {}
    for path in (workdir / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # length, its checksum, the record, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            data = data[16 + length :]
    return found


def test_tensorboard_has_the_same_values(watched: Watched) -> None:
    shown = events(watched.workdir)
    for step, values in measured(watched.workdir).items():
        for name, value in values.items():
            tag = re.sub(r"[^-/\w.]", "_", name)  # its own way with odd names
            assert shown[tag, step] == pytest.approx(value, abs=1e-6)


def test_results_are_the_means_over_collections(
    watched: Watched, collections: tuple[str, str]
) -> None:
    results = read_strictly(watched.workdir / "results.json")
    assert results == watched.results
    assert list(results) == ["bm25", "untrained", "trained"]
    found = measured(watched.workdir)
    bm25 = [evaluate_bm25(read_beir(path)).metrics for path in collections]
    for measure in MEASURES:
        assert results["untrained"][measure] == found[0][f"eval/average/{measure}"]
        assert results["trained"][measure] == found[5][f"eval/average/{measure}"]
        assert results["bm25"][measure] == pytest.approx(np.mean([b[measure] for b in bm25]))


def test_each_collection_has_a_file_with_systems_queries_and_examples(watched: Watched) -> None:
    files = sorted((watched.workdir / "evaluation").iterdir())
    assert len(files) == 2 and all(path.suffix == ".json" for path in files)
    by_name = {(found := read_strictly(path))["collection"]: found for path in files}
    assert set(by_name) == {"plain", ODD}
    for name, found in by_name.items():
        assert evaluation_path(watched.workdir, name) in files
        assert list(found) == [
            "collection",
            "group",
            "documents",
            "queries",
            "step",
            "systems",
            "queries_by_measure",
            "examples",
        ]
        assert (found["documents"], found["queries"], found["step"]) == (16, 8, 5)
        assert list(found["systems"]) == ["bm25", "untrained", "trained"]
        logged = measured(watched.workdir)
        for measure in MEASURES:
            for system, step in (("untrained", 0), ("trained", 5)):
                value = logged[step][f"eval/{name}/{measure}"]
                assert found["systems"][system][measure] == value
        by_query = found["queries_by_measure"]
        assert by_query["measure"] == "nDCG@10"
        assert set(by_query["values"]) == {f"q{i}" for i in range(8)}
        for system in ("bm25", "trained"):
            mean = np.mean([values[system] for values in by_query["values"].values()])
            assert mean == pytest.approx(found["systems"][system]["nDCG@10"])
        kinds = [example["kind"] for example in found["examples"]]
        assert kinds == ["best"] * 5 + ["worst"] * 3
        for example in found["examples"]:
            assert example["values"] == by_query["values"][example["query_id"]]
            assert example["ranking"][0]["rank"] == 1


# --- what it costs the run ---


def test_evaluators_do_not_change_the_training(watched: Watched, unwatched: Watched) -> None:
    losses = [
        [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows]
        for rows in (
            [row for row in read_metrics(w.workdir) if "train/loss" in row]
            for w in (watched, unwatched)
        )
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    params = [read_run(w.workdir)[1] for w in (watched, unwatched)]
    for one, other in zip(jax.tree.leaves(params[0]), jax.tree.leaves(params[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert unwatched.lowered == [] and unwatched.results == {}
    assert not (unwatched.workdir / "results.json").exists()
    assert not (unwatched.workdir / "evaluation").exists()


def test_the_step_is_compiled_once(watched: Watched, unwatched: Watched) -> None:
    assert (watched.compiled, unwatched.compiled) == (1, 1)


def test_later_evaluations_use_the_programs_of_the_first(watched: Watched) -> None:
    steps, lowered = zip(*watched.lowered, strict=True)
    assert steps == (0, 2, 4, 5)
    assert lowered[0] > 0 and lowered[1:] == (0, 0, 0)


@pytest.fixture
def make_evals(
    config: ConfigDict, tmp_path: Path
) -> Callable[..., tuple[Evals, huggingface.Model, Any]]:
    """Makes evaluators by themselves, with the model they measure and its parameters."""
    settings = {"every_steps": 1, "best": "", "baselines": False}

    def make(
        collections: list[Collection], resumed: bool = False, **changed: Any
    ) -> tuple[Evals, huggingface.Model, Any]:
        model = huggingface.read_model(config.init_from)
        params = huggingface.read_weights(config.init_from, model, 0)
        log = MetricLog(tmp_path)
        encodes = (make_embed(model.config), model.tokenizer, make_mesh())
        evals = Evals(settings | changed, collections, encodes, tmp_path, log, resumed)
        return evals, model, params

    return make


def test_collections_of_one_size_share_programs(
    make_evals: Callable[..., Any], collections: tuple[str, str]
) -> None:
    first, second = map(read_beir, collections)
    evals, _, params = make_evals([first])
    evals.during(1, params, last=False)
    lowered = []

    def count(event: str, duration: float, **more: Any) -> None:
        if event == LOWERED:
            lowered.append(event)

    evals.collections = [second]
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        evals.during(2, params, last=False)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert lowered == []


# --- odd models, names and processes ---


def test_a_model_that_diverged_is_written_as_json_that_anyone_reads(
    make_evals: Callable[..., Any], collections: tuple[str, str], tmp_path: Path
) -> None:
    evals, _, params = make_evals([read_beir(collections[0])], best="nDCG@10", baselines=True)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    value = evals.during(3, broken, last=True)
    assert value == 0.0  # nothing is found
    for path in (tmp_path / "results.json", evaluation_path(tmp_path, "plain")):
        read_strictly(path)
    ranking = read_strictly(evaluation_path(tmp_path, "plain"))["examples"][0]["ranking"]
    assert ranking[0]["rank"] is None and ranking[0]["score"] is None


def test_values_that_are_no_numbers_are_never_best(
    make_evals: Callable[..., Any],
    collections: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evals, _, params = make_evals([read_beir(collections[0])], best="MAP")

    def fake(collection: Collection, search: Any) -> Evaluation:
        return Evaluation(dict.fromkeys(MEASURES, math.nan) | {"nDCG@10": 1.0}, {})

    monkeypatch.setattr(evals_module, "evaluate", fake)
    assert evals.during(1, params, last=False) is None


def test_measured_only_when_due_and_valued_only_when_asked(
    make_evals: Callable[..., Any],
    collections: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []

    def fake(collection: Collection, search: Any) -> Evaluation:
        called.append(collection.name)
        return Evaluation(dict.fromkeys(MEASURES, 0.5) | {"MAP": 0.25}, {})

    monkeypatch.setattr(evals_module, "evaluate", fake)
    monkeypatch.setattr(evals_module, "describe_queries", lambda *args: {})
    both = list(map(read_beir, collections))
    for every, best, expected in (
        (2, "MAP", [None, 0.25, None, 0.25, 0.25]),
        (0, "MAP", [None, None, None, None, 0.25]),
        (2, "", [None] * 5),
        (10, "nDCG@10", [None, None, None, None, 0.5]),
    ):
        called.clear()
        evals, _, params = make_evals(both, every_steps=every, best=best)
        found = [evals.during(step, params, last=step == 5) for step in range(1, 6)]
        assert found == expected
        assert len(called) == 2 * {2: 3, 0: 1, 10: 1}[every]
    called.clear()
    nothing, _, params = make_evals([], every_steps=1)
    assert nothing.during(1, params, last=True) is None and called == []


def test_no_two_names_have_one_file(tmp_path: Path) -> None:
    names = ["a", "a b", "a_b", "a/b", "a\\b", "ä", "ö", "..", ".", "x" * 300, "x" * 301, "日本"]
    paths = [evaluation_path(tmp_path, name) for name in names]
    assert len(set(paths)) == len(names)
    assert paths[0].name == "a.json" and paths[2].name == "a_b.json"
    for path in paths:
        assert path.parent == tmp_path / "evaluation" and len(path.name) < 200
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")


def test_a_name_with_slashes_is_measured_and_written(
    make_evals: Callable[..., Any], pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    name = "beir/../odd/\u2028name"
    documents = {f"d{i}": row["document"] for i, row in enumerate(pairs[:16])}
    queries = {f"q{i}": row["query"] for i, row in enumerate(pairs[:8])}
    judged = {f"q{i}": {f"d{i}": 1} for i in range(8)}
    evals, _, params = make_evals([Collection(name, documents, queries, judged, "group")])
    evals.during(1, params, last=True)
    (path,) = (tmp_path / "evaluation").iterdir()
    found = read_strictly(path)
    assert found["collection"] == name and found["group"] == "group"
    assert list(found["systems"]) == ["trained"]
    assert list(results_at(tmp_path, 1)["trained"]) == list(MEASURES)
    again, _, _ = make_evals(evals.collections, resumed=True)
    assert again.results == evals.results


def test_a_later_process_writes_nothing(
    make_evals: Callable[..., Any],
    collections: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "results.json").write_text('"of the first process"')
    evals, _, params = make_evals([read_beir(collections[0])], baselines=True)
    evals.log.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    evals, _, params = make_evals([read_beir(collections[0])], baselines=True)
    assert evals.before(None, 9, params) is None
    evals.finish(1, params)
    evals.before(1, 9, params)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- going on ---


def test_what_is_known_of_all_collections_alone_is_compared(
    make_evals: Callable[..., Any],
    collections: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A run that goes on with one more collection has no untrained model to compare with."""
    first, second = map(read_beir, collections)
    values = iter((0.1, 0.2, 0.3, 0.4))

    def fake(collection: Collection, search: Any) -> Evaluation:
        return Evaluation(dict.fromkeys(MEASURES, next(values)), {})

    monkeypatch.setattr(evals_module, "evaluate", fake)
    evals, _, params = make_evals([first], baselines=True)
    assert evals.before(None, 9, params) is None
    evals.finish(1, params)
    assert [evals.results[s]["MAP"] for s in ("untrained", "trained")] == [0.1, 0.2]
    # All three are read back by a run that goes on, and nothing by one that starts.
    resumed, _, _ = make_evals([first], resumed=True)
    assert resumed.results == evals.results and "bm25" in resumed.results
    more, _, _ = make_evals([first, second], resumed=True, baselines=True)
    assert more.results == {}
    more.finish(2, params)
    assert list(more.results) == ["bm25", "trained"]
    assert more.results["trained"]["MAP"] == pytest.approx(0.35)
    assert read_strictly(tmp_path / "results.json") == more.results
    alone, _, _ = make_evals([first], resumed=True, every_steps=0)
    assert alone.before(2, 2, params) is None  # it has made its last step
    assert list(alone.results) == ["bm25", "untrained", "trained"]
    assert alone.before(2, 9, params) is None
    assert list(read_strictly(tmp_path / "results.json")) == ["bm25", "untrained"]
    left = read_strictly(evaluation_path(tmp_path, "plain"))
    assert list(left["systems"]) == ["bm25", "untrained"]
    assert "examples" not in left and "queries_by_measure" not in left
    fresh, _, _ = make_evals([first])
    assert fresh.results == {} and not (tmp_path / "results.json").exists()
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"systems": 3}', '{"systems": {"trained": {"MAP": 1}}}']
)
def test_a_damaged_file_counts_as_nothing(
    text: str, make_evals: Callable[..., Any], collections: tuple[str, str], tmp_path: Path
) -> None:
    collection = read_beir(collections[0])
    (tmp_path / "evaluation").mkdir()
    evaluation_path(tmp_path, collection.name).write_text(text)
    (tmp_path / "results.json").write_text(text)
    evals, _, params = make_evals([collection], resumed=True)
    assert evals.results == {}
    evals.finish(1, params)
    assert list(read_strictly(tmp_path / "results.json")) == ["trained"]


# --- the best checkpoint ---


class Stopped(Exception):
    """What a kill looks like from inside."""


class Scripted:
    """Has evaluations give values by step, and can stop a run while it measures."""

    def __init__(self, patched: pytest.MonkeyPatch, values: dict[int, float], stop: int = 0):
        self.seen: list[int] = []
        self.results: list[Any] = []  # of results.json, as each evaluation found it
        measure = Evals._measure

        def noting(evals: Evals, step: int, params: Any) -> Any:
            self.step = step
            self.seen.append(step)
            path = evals.workdir / "results.json"
            self.results.append(read_strictly(path) if path.exists() else {})
            return measure(evals, step, params)

        def fake(collection: Collection, search: Any) -> Evaluation:
            if self.step == stop:
                raise Stopped
            value = values[self.step]
            return Evaluation(dict.fromkeys(MEASURES, 0.0) | {"nDCG@10": value, "MAP": -value}, {})

        patched.setattr(Evals, "_measure", noting)
        patched.setattr(evals_module, "evaluate", fake)


def kept(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def best(workdir: Path) -> tuple[int, float] | None:
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.best()
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def scripted_config(config: ConfigDict, collections: tuple[str, str]) -> ConfigDict:
    changed = copy.deepcopy(config)
    changed.total_steps = 6
    changed.checkpoint.update({"every_steps": 3, "max_to_keep": 1})
    changed.evals.update({"every_steps": 1, "best": "nDCG@10", "baselines": False})
    changed.evals.collections = collections[:1]
    return changed


VALUES = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.1, 5: math.nan, 6: 0.4, 7: 0.45, 8: 0.3}


@pytest.fixture(scope="module")
def chosen(scripted_config: ConfigDict, folder: Path) -> Iterator[Path]:
    """A run whose second step was the best, which none of its regular saves is of."""
    workdir = folder / "chosen"
    with pytest.MonkeyPatch.context() as patched:
        Scripted(patched, VALUES)
        run(scripted_config, workdir)
    yield workdir


def test_the_best_checkpoint_stays_beside_the_newest(chosen: Path) -> None:
    assert kept(chosen) == [2, 6] and best(chosen) == (2, 0.5)
    assert read_strictly(chosen / "results.json")["trained"]["nDCG@10"] == 0.4


def test_a_stopped_run_keeps_its_best_and_goes_on_from_the_newest(
    chosen: Path, scripted_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        Scripted(patched, VALUES, stop=5)
        with pytest.raises(Stopped):
            run(scripted_config, workdir)
    assert kept(workdir) == [2, 3]
    seen = Scripted(monkeypatch, VALUES)
    run(scripted_config, workdir)
    assert seen.seen == [4, 5, 6]
    assert kept(workdir) == [2, 6] and best(workdir) == (2, 0.5)
    for step in ("best", "latest"):
        ours, theirs = (read_run(folder, step) for folder in (workdir, chosen))
        assert ours[2] == theirs[2]
        for one, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert [row["step"] for row in read_metrics(workdir) if "train/loss" in row] == [*range(1, 7)]
    assert list(measured(workdir)) == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(
    chosen: Path, scripted_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is asked to stop after the very step that would have been its best."""
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        script = Scripted(patched, VALUES)
        notice = contextlib.nullcontext(lambda step: step == 2)
        patched.setattr(run_module, "stop_notice", lambda: notice)
        with pytest.raises(Interrupted):
            run(scripted_config, workdir)
    assert script.seen == [1] and best(workdir) == (1, 0.2)
    script = Scripted(monkeypatch, VALUES)
    run(scripted_config, workdir)
    assert script.seen == [2, 3, 4, 5, 6]
    assert kept(workdir) == [2, 6] and best(workdir) == (2, 0.5)
    assert list(measured(workdir)) == list(measured(chosen)) == [1, 2, 3, 4, 5, 6]
    read_run(workdir, "best")  # whole, though its value was noted after it was saved


def test_a_run_may_go_on_for_longer_and_by_another_measure(
    scripted_config: ConfigDict, chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(chosen, tmp_path / "run")
    longer = copy.deepcopy(scripted_config)
    longer.total_steps = 8
    with monkeypatch.context() as patched:
        script = Scripted(patched, VALUES)
        results = run(longer, tmp_path / "run")
    assert script.seen == [7, 8]
    assert script.results == [{}, {}]  # what the six steps gave was dropped at once
    assert results["trained"]["nDCG@10"] == 0.3
    assert kept(tmp_path / "run") == [2, 8] and best(tmp_path / "run") == (2, 0.5)

    # By MAP, which is negative here, all values before are worth nothing.
    other = copy.deepcopy(longer)
    other.total_steps = 10
    other.evals.best = "MAP"
    with monkeypatch.context() as patched:
        Scripted(patched, VALUES | {9: 0.1, 10: 0.3})
        run(other, tmp_path / "run")
    assert kept(tmp_path / "run") == [9, 10] and best(tmp_path / "run") == (9, -0.1)
    sessions = read_strictly(tmp_path / "run" / "run.json")["sessions"]
    assert [session["first_step"] for session in sessions] == [0, 6, 8]


def test_a_step_is_exported_by_name(chosen: Path, tmp_path: Path) -> None:
    """The card has the results of the step that is exported, not of the last."""
    weights = {}
    for name, step, value in (("best", 2, "0.500"), ("latest", 6, "0.400"), ("2", 2, "0.500")):
        export_run(chosen, tmp_path / name, name)
        card = (tmp_path / name / "README.md").read_text()
        assert f"| Updates | {step} of 8 queries each |" in card
        assert f"| trained | {value} |" in card
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["best"] == weights["2"] != weights["latest"]


@pytest.mark.parametrize("step", ["nonsense", "3", "02x", "-2", "2.0", "²", "", "Best", "1e1"])
def test_a_step_that_is_not_there_is_the_users_error(
    step: str, chosen: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no step .*choose latest, best or one of 2, 6\."):
        export_run(chosen, tmp_path / "model", step)
    assert not (tmp_path / "model").exists()


def test_a_run_that_was_not_evaluated_has_no_best(unwatched: Watched, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no best checkpoint, .*: set config\.evals\.best and"):
        export_run(unwatched.workdir, tmp_path / "model", "best")
    assert not (tmp_path / "model").exists()


def test_what_an_earlier_attempt_left_is_not_taken_for_this_runs(
    scripted_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped before its first checkpoint starts anew, and so do its results."""
    first = copy.deepcopy(scripted_config)
    first.evals.baselines = True
    with monkeypatch.context() as patched:
        Scripted(patched, VALUES | {0: 0.9}, stop=1)
        with pytest.raises(Stopped):
            run(first, tmp_path / "run")
    assert list(read_strictly(tmp_path / "run" / "results.json")) == ["bm25", "untrained"]
    second = copy.deepcopy(scripted_config)
    second.total_steps = 1
    with monkeypatch.context() as patched:
        Scripted(patched, VALUES)
        assert list(run(second, tmp_path / "run")) == ["trained"]
    found = read_strictly(evaluation_path(tmp_path / "run", "plain"))
    assert list(found["systems"]) == ["trained"]
    assert len(read_strictly(tmp_path / "run" / "run.json")["sessions"]) == 1


# --- what users do wrong ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"best": "nDCG"}, r"config\.evals\.best is 'nDCG': choose one of nDCG@10, MRR@10, Rec"),
        ({"best": "ndcg@10"}, r"is 'ndcg@10': choose one of"),
        ({"best": "MAP", "collections": ()}, r"names nothing to measure it on: name BEIR folders"),
        ({"collections": ("no/such/folder",)}, r"'no/such/folder' is no data set"),
    ],
)
def test_evaluators_that_cannot_be_are_the_users_error_before_any_work(
    settings: dict[str, Any], message: str, config: ConfigDict, tmp_path: Path
) -> None:
    wrong = copy.deepcopy(config)
    wrong.evals.update(settings)
    wrong.init_from = str(tmp_path / "none")  # comes later
    with pytest.raises(UserError, match=message):
        run(wrong, tmp_path / "run")
    assert not list(tmp_path.rglob("*.json*")) and not list(tmp_path.rglob("checkpoints"))


def test_the_measures_to_choose_from_are_those_that_are_measured() -> None:
    for best in ("", *MEASURES):
        check_evals({"best": best, "collections": ("somewhere",)})


def test_names_that_would_be_mixed_up_are_the_users_error(
    pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    names = [write_beir(tmp_path / p / "same", pairs[:2], 1) for p in ("a", "b")]
    mean = write_beir(tmp_path / "average", pairs[:2], 1)
    with pytest.raises(UserError, match=r"Two collections .* are called 'same'"):
        open_collections(list(map(str, names)), Corpus({}))
    with pytest.raises(UserError, match=r"is called 'average', as is the mean"):
        open_collections([str(mean), str(names[0])], Corpus({}))
    assert [c.name for c in open_collections([str(mean)], Corpus({}))] == ["average"]
    assert open_collections([], Corpus({})) == []


def test_a_held_out_part_without_a_query_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"only the docstring corpus keeps a part out"):
        open_collections(["held_out"], Corpus({}))
    empty = Corpus({}, ({"d": "a text"}, {}, {}))
    with pytest.raises(UserError, match=r"'held_out' has no query: give the corpus more text"):
        open_collections(["held_out"], empty)
