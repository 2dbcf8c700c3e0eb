"""What the files in a run's folder say, read and checked once: a page is made of nothing else."""

import base64
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from colbert_jax.checkpoint import config_leaves, read_config
from colbert_jax.errors import UserError
from colbert_jax.metric_log import read_metrics
from colbert_jax.start import CONFIG_FILE, is_run

T = TypeVar("T")
Values = dict[str, float]  # measure, or system, -> value
Points = list[tuple[int, float]]  # step, value

AVERAGE = "average"  # what the log calls the mean over collections


@dataclasses.dataclass(frozen=True)
class Session:
    """One start of a run; it has another whenever it goes on."""

    started: str
    first_step: int
    command: list[str]
    backend: str | None
    device_kind: str | None
    devices: int | None
    processes: int | None
    python: str | None
    versions: dict[str, str]
    compiled_lengths: Any


@dataclasses.dataclass(frozen=True)
class Record:
    """`run.json`: on what a run ran, and on how much."""

    sessions: list[Session] = dataclasses.field(default_factory=list)
    parameters: int | None = None
    embedding_size: int | None = None
    sources: dict[str, int] = dataclasses.field(default_factory=dict)
    rows_per_epoch: int | None = None
    batches_per_epoch: int | None = None


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A document as it was ranked for a query.

    Attributes:
      rank: None where it was not found.
      score: MaxSim.
      relevance: None where it was not judged.
      winners: for each query token the document token that wins, None where there is none.
      similarities: a byte for each pair of tokens, row after row of the query; 0 is -1, 255 is 1.
    """

    rank: int | None
    document_id: str
    text: str
    score: float | None
    relevance: float | None
    query_tokens: list[str]
    document_tokens: list[str]
    winners: list[int | None]
    similarities: bytes

    def similarity(self, query_token: int, document_token: int) -> float:
        """The cosine of two tokens, to a 255th."""
        at = query_token * len(self.document_tokens) + document_token
        return self.similarities[at] / 255 * 2 - 1


@dataclasses.dataclass(frozen=True)
class Example:
    """A query that went well or badly, with what was found for it."""

    kind: str
    query_id: str
    query: str
    values: Values
    ranking: list[Ranked]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`evaluation/<collection>.json`: how well systems ranked one collection.

    `group` is the collection that this is a part of; parts count as one in averages.
    """

    collection: str
    group: str
    documents: int | None
    queries: int | None
    step: int | None
    systems: dict[str, Values]
    measure: str
    by_query: dict[str, Values]
    examples: list[Example]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that is known of a run.

    Attributes:
      name: what the page calls it.
      before: the run that it started from, if it is at hand.
    """

    workdir: Path
    name: str
    config: dict[str, Any]
    record: Record
    log: list[dict[str, Any]]
    results: dict[str, Values]
    evaluations: list[Evaluation]
    exports: list[str]
    before: Path | None

    def setting(self, name: str) -> Any:
        """A value of the config by its dotted name, None where it has none."""
        return self.settings.get(name)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The config's values by their dotted names."""
        return config_leaves(self.config)

    def number(self, name: str) -> float | None:
        """A number of the config, None where it has none by this name."""
        value = self.setting(name)
        return value if _is_number(value) else None

    @functools.cached_property
    def curves(self) -> dict[str, Points]:
        """What was logged under each name; a step logged twice counts as it was last."""
        found: dict[str, dict[int, float]] = collections.defaultdict(dict)
        for row in self.log:
            for name, value in row.items():
                if name != "step" and (value is None or _is_number(value)):
                    found[name][row["step"]] = _float(value)
        return {name: sorted(points.items()) for name, points in found.items()}

    @functools.cached_property
    def evaluated(self) -> dict[tuple[str, str], Points]:
        """The logged curves of each collection and measure; `AVERAGE` is that over several."""
        found = {}
        for name, points in self.curves.items():
            if name.startswith("eval/") and name.count("/") > 1:
                collection, _, measure = name.removeprefix("eval/").rpartition("/")
                found[collection, measure] = points
        return found

    @functools.cached_property
    def collections(self) -> set[str]:
        """The names of the collections that it was evaluated on."""
        logged = {collection for collection, _ in self.evaluated}
        if len(logged) > 1:  # the only collection may be called like that, too
            logged -= {AVERAGE}
        return logged | {evaluation.collection for evaluation in self.evaluations}

    @functools.cached_property
    def step(self) -> int:
        """How far the log goes."""
        return max((row["step"] for row in self.log), default=0)

    @functools.cached_property
    def trained_time(self) -> tuple[float, int]:
        """Seconds in training steps, and of how many steps the log knows it.

        A row's seconds a step are of all steps since the row before, or since its session began.
        """
        starts = {session.first_step for session in self.record.sessions}
        seconds, steps, last = 0.0, 0, 0
        for step, each in self.curves.get("time/step", []):
            first = max([last, *(start for start in starts if last < start < step)])
            if math.isfinite(each):
                seconds += each * (step - first)
                steps += step - first
            last = step
        return seconds, steps


def read_runs(workdirs: Sequence[str | Path]) -> tuple[list[Run], list[Run]]:
    """Reads runs, and the runs that they started from.

    Args:
      workdirs: their folders.

    Returns:
      The runs; and all runs at hand, each after the one that it started from.

    Raises:
      UserError: a folder that is no run's or is named twice, or a file that cannot be read.
    """
    if not workdirs:
        raise UserError("There is no run to report on: name its folder with --workdir.")
    asked = [_folder(workdir) for workdir in workdirs]
    for path, written in zip(asked, workdirs, strict=True):
        if asked.count(path) > 1:
            raise UserError(f"--workdir={written} is named twice: name each run once.")
    order: list[Path] = []
    read: dict[Path, Run] = {}
    for path in asked:
        chain = []
        step: Path | None = path
        while step is not None and step not in chain:  # a run may come to have started from itself
            if step not in read:
                read[step] = _read_run(step)
            chain.append(step)
            step = read[step].before
        order += [step for step in reversed(chain) if step not in order]
    names = distinct_names(order)
    named = {
        path: dataclasses.replace(read[path], name=name)
        for path, name in zip(order, names, strict=True)
    }
    return [named[path] for path in asked], [named[path] for path in order]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell it from the others."""
    names = []
    for path in paths:
        for length in range(1, len(path.parts) + 1):
            name = path.parts[-length:]
            if sum(other.parts[-length:] == name for other in paths) == 1:
                break
        names.append("/".join(name).replace("//", "/"))
    return names


def differing(runs: Sequence[Run]) -> list[str]:
    """The dotted names of the values that are not the same in all runs' configs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    missing = object()
    return [
        name
        for name in names
        if any(
            run.settings.get(name, missing) != runs[0].settings.get(name, missing) for run in runs
        )
    ]


def _folder(workdir: str | Path) -> Path:
    path = Path(workdir)
    if not os.path.isfile(path / CONFIG_FILE):
        reason = f"it has no {CONFIG_FILE}" if os.path.isdir(path) else "there is no such folder"
        raise UserError(f"{path} is not the folder of a run ({reason}): name one with --workdir.")
    return path.resolve()


def _read_run(path: Path) -> Run:
    config = read_config(path / CONFIG_FILE)
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG_FILE} holds no config: {path} is not the folder of a run.")
    evaluations = [
        _read_json(file, _evaluation) for file in sorted((path / "evaluation").glob("*.json"))
    ]
    return Run(
        workdir=path,
        name=path.name,
        config=config,
        record=_optional(path / "run.json", _record, Record()),
        log=_read_log(path),
        results=_optional(path / "results.json", _systems, {}),
        evaluations=evaluations,
        exports=sorted(
            (p.name for p in path.glob("export-*") if re.fullmatch(r"export-\d+", p.name)),
            key=lambda name: int(name.removeprefix("export-")),
        ),
        before=_find_run(config.get("init_from"), path),
    )


def _find_run(init_from: Any, workdir: Path) -> Path | None:
    """The folder of the run that another started from.

    A relative path was written in a folder that nobody noted: it is looked for from here, then from
    each folder above the run's.
    """
    if not init_from or not isinstance(init_from, str) or "\0" in init_from:
        return None
    for base in (Path(), *workdir.parents):
        with contextlib.suppress(OSError):  # it is no name that a file can have
            if is_run(base / init_from):
                return (base / init_from).resolve()
    return None


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(path)
        for row in rows:
            if not isinstance(row, dict) or not 0 <= _take(row, "step", int) < 2**53:
                raise ValueError("a line has no step")
        return rows
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path / "metrics.jsonl", error) from error


def _optional(path: Path, parse: Callable[[Any], T], default: T) -> T:
    return _read_json(path, parse) if path.exists() else default


def _read_json(path: Path, parse: Callable[[Any], T]) -> T:
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        reason = "it is not JSON"
    return UserError(
        f"{path} cannot be read ({reason}): restore it, or move it away and write the report "
        "without it."
    )


# From JSON to what the page is made of; what is not as it should be is a ValueError that says so.


def _record(value: Any) -> Record:
    sources = _take(value, "sources", dict, {})
    return Record(
        sessions=[_session(session) for session in _take(value, "sessions", list, [])],
        parameters=_take(value, "parameters", int, None),
        embedding_size=_take(value, "embedding_size", int, None),
        sources={name: _take(sources, name, int) for name in sources},
        rows_per_epoch=_take(value, "rows_per_epoch", int, None),
        batches_per_epoch=_take(value, "batches_per_epoch", int, None),
    )


def _session(value: Any) -> Session:
    versions = _take(value, "versions", dict, {})
    return Session(
        started=_take(value, "started", str, ""),
        first_step=_take(value, "first_step", int, 0),
        command=_strings(value, "command", []),
        backend=_take(value, "backend", str, None),
        device_kind=_take(value, "device_kind", str, None),
        devices=_take(value, "devices", int, None),
        processes=_take(value, "processes", int, None),
        python=_take(value, "python", str, None),
        versions={name: str(version) for name, version in versions.items()},
        compiled_lengths=_take(value, "compiled_lengths", object, None),
    )


def _evaluation(value: Any) -> Evaluation:
    queries = _take(value, "queries_by_measure", dict, {})
    by_query = _take(queries, "values", dict, {})
    return Evaluation(
        collection=_take(value, "collection", str),
        group=_take(value, "group", str, ""),
        documents=_take(value, "documents", int, None),
        queries=_take(value, "queries", int, None),
        step=_take(value, "step", int, None),
        systems=_systems(_take(value, "systems", dict, {})),
        measure=_take(queries, "measure", str, ""),
        by_query={str(name): _values(by_query, name) for name in by_query},
        examples=[_example(example) for example in _take(value, "examples", list, [])],
    )


def _example(value: Any) -> Example:
    return Example(
        kind=_take(value, "kind", str),
        query_id=_take(value, "query_id", str),
        query=_take(value, "query", str),
        values=_values(value, "values") if "values" in value else {},
        ranking=[_ranked(document) for document in _take(value, "ranking", list, [])],
    )


def _ranked(value: Any) -> Ranked:
    query, document = _strings(value, "query_tokens", []), _strings(value, "document_tokens", [])
    winners: list[int | None] = _take(value, "winners", list, [])
    if not document:  # nothing of it counts, and nothing can win
        winners = [None] * len(query)
    if len(winners) != len(query) or not all(
        winner is None or (_is_whole(winner) and 0 <= winner < len(document)) for winner in winners
    ):
        raise ValueError("winners do not name one document token for each query token")
    similarities = base64.b64decode(_take(value, "similarities", str, ""), validate=True)
    if len(similarities) != len(query) * len(document):
        raise ValueError("similarities are not one for each pair of tokens")
    return Ranked(
        rank=_take(value, "rank", int, None),
        document_id=_take(value, "document_id", str),
        text=_take(value, "text", str, ""),
        score=_take(value, "score", float, None),
        relevance=_take(value, "relevance", float, None),
        query_tokens=query,
        document_tokens=document,
        winners=winners,
        similarities=similarities,
    )


def _systems(value: Any) -> dict[str, Values]:
    if not isinstance(value, dict):
        raise ValueError("it holds no systems")
    return {system: _values(value, system) for system in value}


def _values(value: Mapping[str, Any], name: str) -> Values:
    values = _take(value, name, dict)
    return {key: _float(_take(values, key, float, None)) for key in values}


def _strings(value: Any, name: str, default: list[str]) -> list[str]:
    strings = _take(value, name, list, default)
    if not all(isinstance(string, str) for string in strings):
        raise ValueError(f"{name} holds something that is no text")
    return strings


_NEEDED: Any = object()


def _take(value: Any, name: str, kind: type, default: Any = _NEEDED) -> Any:
    """A value of an object, of one kind; what may be missing may be null too."""
    if not isinstance(value, dict):
        raise ValueError(f"where {name} should be is no object")
    found = value.get(name)
    if found is None and default is not _NEEDED:
        return default
    fits = {int: _is_whole, float: _is_number}.get(kind, lambda v: isinstance(v, kind))
    if not fits(found):
        raise ValueError(f"{name} is missing" if name not in value else f"{name} is no {_A[kind]}")
    return found


_A = {int: "whole number", float: "number", str: "text", list: "list", dict: "object"}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _float(value: float | None) -> float:
    """A number of JSON, where null stands for one that is none."""
    return math.nan if value is None else float(value)
