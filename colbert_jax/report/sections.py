"""What was run, what came of it, and how it went: the parts of a page that compare runs.

A page on one run compares it with those that it started from.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from colbert_jax.report import numbers
from colbert_jax.report.curves import BUCKETS, STYLES, Line, Panel, legend, picture, scatter
from colbert_jax.report.markup import Child, Html, cut, fold, foreign, join, table, tag
from colbert_jax.report.runs import AVERAGE, Evaluation, Points, Run, Values, differing

NOTHING = "–"


# What was run.


def opening(runs: Sequence[Run]) -> Html:
    """What and how far: the first lines of a page."""
    return tag(
        "header",
        tag("p", "colbert_jax, report of a run" if len(runs) == 1 else "colbert_jax, comparison"),
        tag(
            "h1",
            *(
                part
                for i, run in enumerate(runs)
                for part in (" and " if i == len(runs) - 1 > 0 else ", " if i else None,
                             foreign(run.name, 300))
            ),
        ),
        *(tag("p", _in_short(run, named=len(runs) > 1), class_="short") for run in runs),
    )  # fmt: skip


def _in_short(run: Run, named: bool) -> Html:
    total = run.number("total_steps")
    of = f" of {numbers.count(total)}" if total is not None else ""
    if not run.log:
        state = f"nothing logged yet{of and ', step 0' + of}"
    else:
        state = f"step {numbers.count(run.step)}{of}"
        if total is not None and run.step < total:
            state += ", so it is still going or was stopped"
    trained_on = run.setting("input.corpus")
    if files := run.setting("input.files"):
        trained_on = ", ".join(str(name) for name in files) if isinstance(files, list) else files
    kind = run.setting("loss.kind")
    return join(
        [
            foreign(run.name + ": ") if named else None,
            foreign(str(kind) if kind is not None else "an unknown loss"),
            " on ",
            foreign(str(trained_on) if trained_on is not None else "an unknown corpus", 300),
            f"; {state}; starts from ",
            foreign(str(run.setting("init_from") or "random weights"), 300),
            ".",
        ]
    )


def what_was_run(asked: Sequence[Run], known: Sequence[Run]) -> Html:
    """Facts of all runs side by side, then data, sessions and configs."""
    several = len(known) > 1
    facts = [[name, *map(find, known)] for name, find in _FACTS]
    facts = [row for row in facts if any(cell not in ("", None) for cell in row[1:])]
    parts: list[Child] = [tag("h2", "What was run", id="what")]
    if len(asked) == 1 and several:
        parts.append(
            tag("p", "The run started from another one's weights; the phases stand side by side.")
        )
    lost = [run for run in asked if run.setting("init_from") and run.before is None]
    for run in lost:
        parts.append(
            tag(
                "p",
                foreign(run.name),
                " started from ",
                foreign(str(run.setting("init_from"))),
                ", which is no run's folder here; earlier phases, if there were any, are not "
                "shown.",
            )
        )
    if several:
        parts.append(table("The runs", ["", *_names(known)], facts, numbers=False))
    else:
        pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
        parts.append(tag("dl", *pairs, class_="list"))
    if len(asked) > 1:
        parts += [tag("h3", "Settings that differ"), _differences(asked)]
    parts += [tag("h3", "Data"), *_data(known)]
    parts += [tag("h3", "Sessions"), *(_sessions(run, several) for run in known)]
    parts += [tag("h3", "Configs"), *(_config(run, several) for run in known)]
    return tag("section", *parts, aria_labelledby="what")


def _names(runs: Sequence[Run]) -> list[Html]:
    return [foreign(run.name, 200) for run in runs]


def _queries(run: Run) -> float | None:
    batch = run.number("input.batch_size")
    return None if batch is None else run.step * batch


def _epochs(run: Run) -> str | None:
    queries, batches = _queries(run), run.record.batches_per_epoch
    if batches:
        return numbers.short(run.step / batches)
    if queries is None or not run.record.rows_per_epoch:
        return None
    return numbers.short(queries / run.record.rows_per_epoch)


def _time(run: Run) -> str | None:
    seconds, steps = run.trained_time
    if not steps:
        return None
    of = "" if steps >= run.step else f" ({steps:,} of {run.step:,} steps)"
    return numbers.duration(seconds) + of


def _of_session(find: Callable[[Any], Any]) -> Callable[[Run], str | None]:
    """What a fact was in each session, said once where it stayed the same."""

    def found(run: Run) -> str | None:
        values = [find(session) for session in run.record.sessions]
        return ", then ".join(dict.fromkeys(str(v) for v in values if v is not None)) or None

    return found


def _setting(name: str) -> Callable[[Run], str | None]:
    def found(run: Run) -> str | None:
        value = run.setting(name)
        return None if value is None or value == "" else _value(value)

    return found


def _value(value: Any) -> str:
    """A config's value, as one would write it on the command line."""
    if isinstance(value, str):
        return value or "“”"
    if isinstance(value, float):
        return numbers.short(value) if float(numbers.short(value).replace(",", "")) == value else (
            repr(value)
        )  # fmt: skip
    return json.dumps(value, ensure_ascii=False)


def _middle(name: str, write: Callable[[float], str]) -> Callable[[Run], str | None]:
    """The median of what was logged, which slow first steps hardly move."""

    def found(run: Run) -> str | None:
        values = sorted(y for _, y in run.curves.get(name, []) if numbers.usable(y))
        return write(values[len(values) // 2]) if values else None

    return found


def _devices(session: Any) -> str | None:
    if session.devices is None:
        return None
    kind = session.device_kind or session.backend or "device"
    return f"{session.devices} × {kind}"


_FACTS: list[tuple[str, Callable[[Run], str | None]]] = [
    ("Starts from", lambda run: cut(str(run.setting("init_from") or "random weights"), 300)),
    ("Loss", _setting("loss.kind")),
    ("Parameters", lambda run: numbers.count(run.record.parameters)),
    ("Token embedding", lambda run: numbers.count(run.record.embedding_size)),
    ("Compute dtype", _setting("model.dtype")),
    ("Rows an epoch", lambda run: numbers.count(run.record.rows_per_epoch
                                       or sum(run.record.sources.values()) or None)),
    ("Queries a step", lambda run: numbers.count(run.number("input.batch_size"))),
    ("Documents a query", lambda run: numbers.count(run.number("input.max_documents"))),
    ("Steps", lambda run: f"{run.step:,}"),
    ("Queries seen", lambda run: numbers.count(_queries(run))),
    ("Epochs", _epochs),
    ("Peak learning rate", _setting("optimizer.learning_rate")),
    ("Temperature", lambda run: None if run.setting("loss.kind") == "distillation"
     else _setting("loss.temperature")(run)),
    ("Time in training steps", _time),
    ("Time a step (median)", _middle("time/step", numbers.duration)),
    ("Pairs/s (median)", _middle("train/pairs_per_second", numbers.count)),
    ("Tokens/s (median)", _middle("train/tokens_per_second", numbers.count)),
    ("MFU (median)", _middle("train/mfu", numbers.percent)),
    ("Padding (median)", _middle("train/real_tokens", lambda y: numbers.percent(1 - y))),
    ("Devices", _of_session(_devices)),
    ("Processes", _of_session(lambda session: session.processes)),
    ("Compiled lengths", _of_session(lambda session: None if session.compiled_lengths is None
                                     else cut(json.dumps(session.compiled_lengths), 200))),
    ("Python", _of_session(lambda session: session.python)),
    ("Packages", _of_session(lambda session: ", ".join(
        f"{name} {version}" for name, version in session.versions.items()) or None)),
    ("Exported", lambda run: ", ".join(run.exports) or None),
]  # fmt: skip


def _differences(runs: Sequence[Run]) -> Html:
    names = differing(runs)
    if not names:
        return tag("p", "None: their configs are the same.")
    rows = [
        [
            tag("code", name),
            *(
                foreign(_value(run.settings[name]), 300) if name in run.settings else "not there"
                for run in runs
            ),
        ]
        for name in names
    ]
    return table(
        "Config values that are not the same in all runs", ["", *_names(runs)], rows, numbers=False
    )


def _data(runs: Sequence[Run]) -> list[Child]:
    """A table of sources for each run, or for all runs that have the same."""
    parts: list[Child] = []
    shown: list[dict[str, int]] = []
    for run in runs:
        sources = run.record.sources
        if not sources or sources in shown:
            continue
        shown.append(sources)
        of = [other.name for other in runs if other.record.sources == sources]
        total = sum(sources.values())
        rows: list[list[Child]] = [
            [foreign(name, 200), numbers.count(n), numbers.percent(n / total if total else 0)]
            for name, n in sorted(sources.items(), key=lambda item: -item[1])
        ]
        rows.append([tag("b", "all"), tag("b", numbers.count(total)), tag("b", "100%")])
        many = f"{len(sources):,} sources" if len(sources) > 1 else "1 source"
        title = f"{many}, {total:,} rows" + (f": {', '.join(of)}" if len(runs) > 1 else "")
        parts.append(
            fold(
                tag("bdi", cut(title, 400)),
                table("Rows by source", ["source", "rows", "share"], rows),
                open_=len(sources) <= 12,
            )
        )
    return parts or [tag("p", "There is no run.json that says what was read.", class_="empty")]


def _sessions(run: Run, named: bool) -> Html:
    name = tag("h4", foreign(run.name)) if named else None
    if not run.record.sessions:
        return join([name, tag("p", "There is no run.json that says when.", class_="empty")])
    items = []
    before: list[str] = []
    for session in run.record.sessions:
        first = session.first_step
        began = f"went on after step {first:,}" if first else "started"
        same = session.command == before
        items.append(
            tag(
                "li",
                foreign(numbers.date(session.started) or "at an unknown time"),
                f": {began}",
                ", with the same command" if same and session.command else None,
                _command(session.command) if session.command and not same else None,
            )
        )
        before = session.command
    listed = tag("ol", *items, class_="sessions")
    if len(items) > 6:
        listed = fold(f"{len(items):,} sessions", listed)
    return join([name, listed])


def _command(arguments: Sequence[str]) -> Html:
    """A command as one types it; a line breaks between its arguments."""
    written = [quoted(cut(argument, 2000)) for argument in arguments]
    if written[0].endswith(".py"):
        written.insert(0, "python")
    pieces = [piece for one in written for piece in (" ", tag("span", one, class_="argument"))]
    return tag("pre", tag("code", *pieces[1:]), tabindex="0")


def quoted(argument: str) -> str:
    """An argument in quotes where a shell needs them, after the `=` of a flag."""
    if argument == shlex.quote(argument):
        return argument
    flag, value = "", argument
    if found := re.fullmatch(r"(--[\w.]+=)(.*)", argument, re.DOTALL):
        flag, value = found.groups()
    if "'" in value and not set(value) & set('"$`\\!'):
        return f'{flag}"{value}"'
    return flag + shlex.quote(value)


def _config(run: Run, named: bool) -> Html:
    written = cut(json.dumps(run.config, indent=2, ensure_ascii=False), 100_000)
    title = join(["The whole config", *([" of ", foreign(run.name)] if named else [])])
    return fold(title, tag("pre", tag("code", written), tabindex="0"))


# What came of it.


@dataclasses.dataclass
class _Row:
    """A system of a table of results.

    Attributes:
      order: where it stands.
      run: the run that says so.
      name: what it is called.
      values: its values.
      start: whether it is what the run began with.
    """

    order: int
    run: str
    name: str
    values: Values
    start: bool = False


def results(asked: Sequence[Run], known: Sequence[Run]) -> Html:
    """Tables of all systems, collection by collection and on average."""
    parts: list[Child] = [tag("h2", "Results", id="results")]
    groups = _collections(known)
    for (collection, documents, queries), entries in groups.items():
        rows = [row for run, evaluation in entries for row in _rows(run, evaluation, known)]
        size = None
        if documents is not None and queries is not None:
            size = f"{queries:,} queries, {documents:,} documents"
        parts.append(_measures(collection, rows, size))
    names = [name for name, _, _ in groups]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        parts.append(
            tag(
                "p",
                foreign(name),
                " is not the same collection in all runs: its sizes differ, and so it has a table "
                "for each.",
            )
        )
    parts += _averages(known, len(groups))
    if len(parts) == 1:
        parts.append(tag("p", "Nothing has been evaluated yet.", class_="empty"))
    else:
        parts.insert(1, tag("p", "The best value of each column is in bold."))
    parts += _query_by_query(asked)
    return tag("section", *parts, aria_labelledby="results")


_Key = tuple[str, int | None, int | None]  # collection, documents, queries


def _collections(runs: Sequence[Run]) -> dict[_Key, list[tuple[Run, Evaluation]]]:
    """What each run has on each collection; collections of one name but other sizes are others.

    A run that has no file on a collection may have it in its log.
    """
    groups: dict[_Key, list[tuple[Run, Evaluation]]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            key = (evaluation.collection, evaluation.documents, evaluation.queries)
            groups.setdefault(key, []).append((run, evaluation))
    for run in runs:
        there = {evaluation.collection for evaluation in run.evaluations}
        for collection in sorted(run.collections - there):
            key = next((key for key in groups if key[0] == collection), (collection, None, None))
            # The average over one collection is that collection's.
            systems = run.results if len(run.collections) == 1 else {}
            evaluation = Evaluation(collection, "", None, None, None, systems, "", {}, [])
            groups.setdefault(key, []).append((run, evaluation))
    return groups


def _rows(run: Run, evaluation: Evaluation, runs: Sequence[Run]) -> list[_Row]:
    """What an evaluation holds; what it lacks of the trained model, the log may hold."""
    rows = _system_rows(run, evaluation.systems, runs, evaluation.step)
    if "trained" not in evaluation.systems:
        logged = {m: p for (c, m), p in run.evaluated.items() if c == evaluation.collection}
        last = max((points[-1][0] for points in logged.values()), default=0)
        total = run.number("total_steps")
        if last > 0 or "untrained" not in evaluation.systems:
            values = {m: p[-1][1] for m, p in logged.items() if p[-1][0] == last}
            so_far = f", step {last:,}" + (" so far" if total is not None and last < total else "")
            if values:
                place = runs.index(run)
                rows.append(_Row(2 + place, run.name, run.name + so_far, values))
    return rows


def _system_rows(
    run: Run, systems: dict[str, Values], runs: Sequence[Run], step: int | None = None
) -> list[_Row]:
    total, place = run.number("total_steps"), runs.index(run)
    rows = []
    for system, values in systems.items():
        if system == "bm25":
            rows.append(_Row(0, run.name, "BM25", values))
        elif system == "untrained" and not run.setting("init_from"):
            rows.append(_Row(1, run.name, "untrained", values))
        elif system == "untrained":
            rows.append(_Row(2 + place, run.name, f"{run.name}, at its start", values, True))
        elif system == "trained":
            at = "" if step is None or step == total else f", step {step:,}"
            rows.append(_Row(2 + place, run.name, run.name + at, values))
        else:
            rows.append(_Row(2 + place, run.name, f"{run.name}, {system}", values))
    return rows


def _measures(caption: str, rows: list[_Row], note: str | None) -> Html:
    """A table of systems.

    What several runs say alike of BM25 stands once, and so does what a run began with, where
    another one ended with it.
    """
    kept: list[_Row] = []
    for row in sorted(rows, key=lambda row: row.order):
        alike = [other for other in kept if _shown(other) == _shown(row)]
        baseline = row.order < 2 and any(other.order == row.order for other in alike)
        if not baseline and not (row.start and any(other.order > 1 for other in alike)):
            kept.append(row)
    called = [row.name for row in kept]
    kept = [
        dataclasses.replace(row, name=f"{row.name} ({row.run})") if called.count(row.name) > 1
        else row
        for row in kept
    ]  # fmt: skip
    names = list(dict.fromkeys(name for row in kept for name in row.values))
    best = {
        name: max((v for row in kept if (v := _rounded(row, name)) is not None), default=None)
        for name in names
    }
    cells: list[list[Child]] = []
    for row in kept:
        line: list[Child] = [foreign(row.name, 300)]
        for name in names:
            value = _rounded(row, name)
            if value is None:
                line.append(NOTHING)
            elif value == best[name] and len(kept) > 1:
                line.append(tag("b", numbers.measure(value)))
            else:
                line.append(numbers.measure(value))
        cells.append(line)
    return table(caption, ["", *(foreign(name, 60) for name in names)], cells, note=note)


def _shown(row: _Row) -> dict[str, float | None]:
    return {name: _rounded(row, name) for name in row.values}


def _rounded(row: _Row, name: str) -> float | None:
    """A value as it is shown, so that what looks the same is the same."""
    value = row.values.get(name)
    return round(value, 3) if value is not None and numbers.usable(value) else None


def _averages(runs: Sequence[Run], collections: int) -> list[Child]:
    """The averages of each run, where there is more to average than one collection."""
    measured = [run for run in runs if run.results]
    if not measured or collections == 1:
        return []
    over = {tuple(sorted(run.collections)) for run in measured}
    rows = [row for run in measured for row in _system_rows(run, run.results, runs)]
    alike = len(over) == 1
    number = len(next(iter(over)))
    parts_of = {e.group for run in measured for e in run.evaluations if e.group}
    note = f"over {number:,} collections" if alike and number else None
    if note and parts_of:
        note += f", where the parts of {', '.join(sorted(parts_of))} count as one"
    parts: list[Child] = [_measures("Average", rows, note)]
    if not alike:
        parts.append(
            tag(
                "p",
                "The runs were not evaluated on the same collections; their averages cannot be "
                "compared.",
            )
        )
    return parts


def _query_by_query(runs: Sequence[Run]) -> list[Child]:
    """Each query's value in two systems: trained and BM25, or the first two runs' trained."""
    parts: list[Child] = []
    if len(runs) == 1:
        for evaluation in runs[0].evaluations:
            for other, name in (("bm25", "BM25"), ("untrained", "untrained")):
                first = {q: v[other] for q, v in evaluation.by_query.items() if other in v}
                second = _trained(evaluation)
                if drawn := _against(evaluation, first, second, name, runs[0].name):
                    parts.append(drawn)
                    break
    elif len(runs) == 2:
        one, two = runs
        for mine in one.evaluations:
            for yours in two.evaluations:
                same = (mine.collection, mine.documents, mine.queries, mine.measure)
                if same == (yours.collection, yours.documents, yours.queries, yours.measure):
                    drawn = _against(mine, _trained(mine), _trained(yours), one.name, two.name)
                    parts += [drawn] if drawn else []
    if parts:
        parts = [tag("h3", "Query by query"), tag("div", *parts, class_="scatters")]
    return parts


def _trained(evaluation: Evaluation) -> Values:
    return {q: v["trained"] for q, v in evaluation.by_query.items() if "trained" in v}


def _against(
    evaluation: Evaluation, first: Values, second: Values, one: str, two: str
) -> Html | None:
    both = [(first[q], second[q]) for q in first if q in second]
    both = [(x, y) for x, y in both if 0 <= x <= 1 and 0 <= y <= 1]
    if not both:
        return None
    better = sum(y > x for x, y in both)
    worse = sum(y < x for x, y in both)
    return tag(
        "figure",
        scatter(both, one, two, evaluation.measure),
        tag(
            "figcaption",
            tag("b", foreign(evaluation.collection, 200)),
            tag("span", " ", foreign(evaluation.measure, 60), class_="unit"),
            tag(
                "p",
                f"Of {len(both):,} queries ",
                foreign(two, 200),
                f" ranks {better:,} better than ",
                foreign(one, 200),
                f", {worse:,} worse, and {len(both) - better - worse:,} equally well. The area of "
                "a disc is the number of queries there.",
            ),
        ),
    )


# How it went.

_TRAINING = {
    "train/loss": Panel("Loss", logarithmic=True),
    "train/accuracy": Panel("In-batch accuracy", form="percent"),
    "train/grad_norm": Panel("Gradient norm", "before clipping", logarithmic=True),
    "train/learning_rate": Panel("Learning rate", zero=True),
    "train/temperature": Panel("Temperature", "learned"),
}
_SPEED = {
    "train/pairs_per_second": Panel("Pairs a second", zero=True),
    "train/tokens_per_second": Panel("Tokens a second", "without padding", zero=True),
    "train/mfu": Panel("MFU", "share of the devices' peak", form="percent", zero=True),
    "padding": Panel("Padding", "share of processed tokens", form="percent", zero=True),
    "waiting": Panel("Waiting for data", "share of the step time", form="percent", zero=True),
    "time/step": Panel("Time a step", form="seconds", zero=True),
}
_DRAWN_OTHERWISE = {"train/real_tokens", "time/data_wait"}


def curves(runs: Sequence[Run]) -> Html:
    """Everything that was logged, over what the runs have in common."""
    steps, scales = _common_axis(runs)

    def lines(find: Callable[[Run], Points]) -> list[Line]:
        return [
            Line(
                run.name,
                [(x * scale, y) for x, y in find(run)],
                i % STYLES,
                chr(ord("A") + i) if i < 26 else str(i + 1),
            )
            for i, (run, scale) in enumerate(zip(runs, scales, strict=True))
        ]

    def draw(
        panel: Panel, find: Callable[[Run], Points], references: Sequence[tuple[str, float]] = ()
    ) -> Html | None:
        found = lines(find)
        if not any(line.points for line in found):
            return None
        return picture(dataclasses.replace(panel, steps=steps), found, references)

    def named(name: str) -> Callable[[Run], Points]:
        return lambda run: _shares(run).get(name) or run.curves.get(name, [])

    parts: list[Child] = [tag("h2", "Curves", id="curves")]
    if not any(run.log for run in runs):
        parts.append(tag("p", "Nothing has been logged yet.", class_="empty"))
        return tag("section", *parts, aria_labelledby="curves")
    longest = max((len(points) for run in runs for points in run.curves.values()), default=0)
    if longest > BUCKETS:
        parts.append(
            tag(
                "p",
                f"A curve of more than {BUCKETS} points (here up to {longest:,}) is drawn in as "
                "many stretches at most: the line is the mean of each, the shade goes from its "
                "smallest value to its largest.",
            )
        )
    if len(runs) > 1:
        parts.append(legend(lines(lambda run: [])))
    known = {*_TRAINING, *_SPEED, *_DRAWN_OTHERWISE}
    others = sorted({
        name for run in runs for name in run.curves
        if name not in known and not name.startswith("eval/")
    })  # fmt: skip
    training = [draw(panel, named(name)) for name, panel in _TRAINING.items()]
    training += [draw(Panel(cut(name, 60)), named(name)) for name in others[:20]]
    speed = [draw(panel, named(name)) for name, panel in _SPEED.items()]
    for title, drawn in (("Training", training), ("Speed", speed)):
        if any(drawn):
            parts += [tag("h3", title), tag("div", *drawn, class_="curves")]
        else:
            parts += [tag("h3", title), tag("p", "Nothing has been logged yet.", class_="empty")]
        if title == "Training":
            parts += [tag("h3", "Evaluation"), *_evaluation_curves(runs, draw)]
    return tag("section", *parts, aria_labelledby="curves")


def _common_axis(runs: Sequence[Run]) -> tuple[str, list[float]]:
    """What runs are drawn over, and by how much a step of each counts.

    Steps; queries where a step of one has more than another's; but percent of a run's own steps
    where a short run would be a mere line at the side of a long one.
    """
    batches = [run.number("input.batch_size") or 0 for run in runs]
    name, scales = "step", [1.0 for _ in runs]
    if len(set(batches)) > 1 and all(batches):
        name, scales = "queries seen", [float(batch) for batch in batches]
    lengths = [run.step * scale for run, scale in zip(runs, scales, strict=True) if run.step]
    if lengths and max(lengths) > 20 * min(lengths):
        return "% of a run's own steps", [100 / (run.step or 1) for run in runs]
    return name, scales


def _shares(run: Run) -> dict[str, Points]:
    """Shares that follow from what was logged."""
    waits, times = dict(run.curves.get("time/data_wait", [])), run.curves.get("time/step", [])
    return {
        "padding": [(step, 1 - y) for step, y in run.curves.get("train/real_tokens", [])],
        "waiting": [(step, waits[step] / y) for step, y in times if step in waits and y],
    }


def _evaluation_curves(runs: Sequence[Run], draw: Callable[..., Html | None]) -> list[Child]:
    """A picture for each measure of each collection; many collections are folded away."""
    collections = sorted({collection for run in runs for collection, _ in run.evaluated})
    if len(collections) > 1 and AVERAGE in collections:
        collections = [AVERAGE, *(name for name in collections if name != AVERAGE)]
    if not collections:
        return [tag("p", "Nothing has been evaluated yet.", class_="empty")]
    parts: list[Child] = []
    for i, collection in enumerate(collections):
        measures = dict.fromkeys(m for run in runs for c, m in run.evaluated if c == collection)
        drawn = []
        for name in measures:
            baselines = {_bm25(run, collection, name) for run in runs}
            drawn.append(
                draw(
                    Panel(cut(name, 60), cut(collection, 60), form="measure"),
                    lambda run, key=(collection, name): run.evaluated.get(key, []),
                    [("BM25", value) for value in baselines if value is not None],
                )
            )
        grid = tag("div", *drawn, class_="curves")
        if len(collections) == 1:
            parts.append(grid)
        else:
            parts.append(fold(foreign(collection, 200), grid, open_=i == 0))
    return parts


def _bm25(run: Run, collection: str, name: str) -> float | None:
    """BM25's value on a collection; on the only one it is that of the average."""
    for evaluation in run.evaluations:
        if evaluation.collection == collection:
            return evaluation.systems.get("bm25", {}).get(name)
    mean = collection == AVERAGE or run.collections == {collection}
    return run.results.get("bm25", {}).get(name) if mean else None
