"""A run's report: what it shows, what it refuses, and that nothing in a run can break out of it."""

import base64
import collections
import hashlib
import html.parser
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import (
    HOSTILE,
    MEASURES,
    QUERY,
    TEXTS,
    hostile_run,
    make_config,
    make_document,
    make_evaluation,
    make_example,
    make_log,
    make_record,
    make_results,
    write_run,
    write_whole_run,
)

from colbert_jax.errors import UserError
from colbert_jax.report import numbers, rankings, write_report
from colbert_jax.report.curves import BUCKETS, Axis, thin
from colbert_jax.report.runs import distinct_names, read_runs
from colbert_jax.report.sections import quoted

PROGRAM = Path(__file__).parents[1] / "launch" / "report.py"

# A page, read back.

VOID = {"meta", "br", "hr"}


class Page(html.parser.HTMLParser):
    """Checks a page's form while reading it, and keeps what the tests ask for."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.source = text
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.blocks: list[Any] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.code = {"style": "", "script": ""}
        self.feed(text)
        self.close()
        assert self.stack == [], f"not closed: {self.stack}"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        assert len(found) == len(attributes), f"an attribute twice: {attributes}"
        self.elements.append((name, found))
        if name in VOID:
            return
        self.stack.append(name)
        if "id" in found:
            self.ids.append(str(found["id"]))
        if re.fullmatch("h[1-6]", name):
            self.headings.append(int(name[1]))
        if name == "tr":
            self.rows.append([])
        if name in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.stack and self.stack[-1] == name, f"</{name}> in {self.stack}"
        self.stack.pop()

    def handle_data(self, text: str) -> None:
        holder = self.stack[-1] if self.stack else ""
        if holder == "script" and self.elements[-1][1].get("type") == "application/json":
            self.blocks.append(json.loads(text))
        elif holder in self.code:
            self.code[holder] += text
        else:
            self.texts.append(text)
            if {"th", "td"} & set(self.stack):
                self.rows[-1][-1] += text
            if holder == "b" and "td" in self.stack:
                self.bold.append(text)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def row(self, name: str) -> list[str]:
        """The cells of the first row that begins with a name."""
        return next(row[1:] for row in self.rows if row and row[0] == name)

    def names(self, prefix: str) -> list[str]:
        """The first cells of rows that begin with a prefix."""
        return [row[0] for row in self.rows if row and row[0].startswith(prefix)]


def read_page(path: Path) -> Page:
    """Reads a page; every page of every test has to be well formed, alone, and quiet."""
    source = path.read_bytes().decode("utf-8")  # as it is, without translating line ends
    page = Page(source)
    names = [name for name, _ in page.elements]
    assert source.startswith('<!doctype html>\n<html lang="en">')
    assert names.count("title") >= 1 and names.count("h1") == 1
    assert len(page.ids) == len(set(page.ids)), collections.Counter(page.ids).most_common(3)
    for above, below in zip([0, *page.headings], page.headings, strict=False):
        assert below <= above + 1, f"h{below} after h{above}"
    for name, attributes in page.elements:
        # Nothing that loads, sends or runs.
        assert name not in {"img", "link", "iframe", "object", "embed", "base", "form", "image"}
        assert not {"src", "srcset", "style", "action", "data"} & attributes.keys()
        assert not [key for key in attributes if key.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
        if name == "th":
            assert attributes["scope"] in ("row", "col")
        if name == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        target = attributes.get("aria-labelledby") or (attributes.get("href") or "#")[1:]
        assert not target or target in page.ids
    assert "http:" not in source and "https:" not in source
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", source)
    metas = [attributes for name, attributes in page.elements if name == "meta"]
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for name in ("script", "style"):
        digest = hashlib.sha256(page.code[name].encode()).digest()
        assert rules[f"{name}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert len(rules) == 6
    return page


def report_of(*workdirs: Path, output: Path | None = None) -> Page:
    return read_page(write_report(workdirs, output))


# What it shows.


def test_a_run_is_shown_whole(tmp_path: Path) -> None:
    page = report_of(write_whole_run(tmp_path / "quickstart"))
    assert (tmp_path / "quickstart" / "report.html").is_file()
    assert "contrastive on docstrings; step 40 of 40; starts from random weights." in page.text
    for name, value in {
        "Parameters": "1,483,904",
        "Queries a step": "64",
        "Queries seen": "2,560",
        "Epochs": "0.256",
        "Time in training steps": "20 s",
        "Pairs/s (median)": "190",
        "Devices": "1 × cpu",
        "Packages": "jax 0.10.2, flax 0.12.8",
    }.items():
        assert f"{name}{value}" in page.text
    assert page.row("numpy") == ["6,000", "60%"] and page.row("all") == ["10,000", "100%"]
    assert "2026-11-26 08:00 UTC: started" in page.text
    assert "2026-11-26 09:30 UTC: went on after step 20, with the same command" in page.text
    assert page.text.count("python launch/train.py --config=configs/quickstart.py") == 1
    assert '"masked_similarity": null' in page.text  # of the whole config
    assert page.row("BM25") == ["0.583"] * 3 and page.row("untrained") == ["0.300"] * 3
    assert page.row("quickstart") == ["0.600"] * 3
    assert page.bold == ["10,000", "100%", *["0.600"] * 3]
    for title in ("Loss", "In-batch accuracy", "Gradient norm", "Learning rate", "nDCG@10", "MAP",
                  "Pairs a second", "Tokens a second", "Padding", "Waiting for data"):  # fmt: skip
        drawn = [a["aria-label"] for n, a in page.elements if n == "svg" and "aria-label" in a]
        assert any(title in str(label) for label in drawn) == (title != "MAP")
    assert "Nothing" not in page.text


def test_the_rankings_say_in_words_what_is_relevant(tmp_path: Path) -> None:
    page = report_of(write_whole_run(tmp_path / "run"))
    assert "nDCG@10: BM25 0.000, trained 1.000" in page.text
    for words in ("rank 1✓ relevant", "rank 2not judged", "not found✓ relevant"):
        assert words in page.text
    assert "rank 1not relevant" in page.text  # the worst query's
    best, worst = (page.text.index(f"{kind} queries", page.text.index("Open a query"))
                   for kind in ("Best", "Worst"))  # fmt: skip
    assert best < page.text.index("best-1") < worst < page.text.index("worst-1")
    for text in TEXTS:
        assert text in page.text


def test_of_a_long_text_the_beginning_is_shown_first(tmp_path: Path) -> None:
    texts = ["word " * 200, "\n".join("abcdefghij"), "a\nb"]
    ranking = [make_document(i, None, text) for i, text in enumerate(texts, 1)]
    evaluation = make_evaluation(examples=[make_example("best", ranking=ranking)])
    page = report_of(write_run(tmp_path / "run", evaluations=[evaluation]))
    shown = [text for text in page.texts if text.startswith(("word word", "a\n"))]
    assert shown == [texts[0][:279] + "…", texts[0], "a\nb\nc\nd\ne\nf…", texts[1], texts[2]]


def test_a_heat_maps_data_are_the_runs(tmp_path: Path) -> None:
    page = report_of(write_whole_run(tmp_path / "run"))
    ranked = make_example("best")["ranking"] + make_example("worst")["ranking"]
    assert len(page.blocks) == len(ranked)
    for block, document in zip(page.blocks, ranked, strict=True):
        assert block == {
            "query": document["query_tokens"],
            "document": document["document_tokens"],
            "winners": document["winners"],
            "similarities": document["similarities"],
        }
    first = ranked[0]
    cosines = np.frombuffer(base64.b64decode(first["similarities"]), np.uint8)
    cosines = cosines.reshape(len(QUERY), -1) / 255 * 2 - 1
    pairs = [
        [token, first["document_tokens"][j], str(j + 1), f"{cosines[i, j]:.2f}"]
        for i, (token, j) in enumerate(zip(QUERY, first["winners"], strict=True))
    ]
    start = page.rows.index(pairs[0])
    assert page.rows[start : start + len(pairs)] == pairs


def test_the_evaluation_of_a_run_without_files_of_it_comes_from_its_log(tmp_path: Path) -> None:
    page = report_of(write_whole_run(tmp_path / "run", evaluations=None))
    assert page.row("BM25") == ["0.583"] * 3
    assert "BM25 (dashed): 0.583" in page.text
    assert "No rankings have been kept yet." in page.text


def test_bm25_is_a_dashed_line_of_each_evaluation_curve(tmp_path: Path) -> None:
    page = report_of(write_whole_run(tmp_path / "run"))
    assert page.text.count("BM25 (dashed): 0.583") == len(MEASURES)
    lines = [a for n, a in page.elements if n == "path" and a.get("class") == "reference"]
    assert len(lines) == len(MEASURES) + 1  # and the diagonal of the queries' picture
    assert "stroke-dasharray" in re.search(r"\.reference {[^}]*}", page.code["style"]).group()


def test_the_logs_average_is_no_collection(tmp_path: Path) -> None:
    log = [
        {"step": 0, "eval/a/MAP": 0.1, "eval/b/MAP": 0.3, "eval/average/MAP": 0.2},
        {"step": 40, "eval/a/MAP": 0.5, "eval/b/MAP": 0.7, "eval/average/MAP": 0.6},
    ]
    results = {"bm25": {"MAP": 0.25}, "untrained": {"MAP": 0.2}, "trained": {"MAP": 0.6}}
    evaluations = [
        make_evaluation(name, systems={"trained": {"MAP": 0.5}}, group=group, examples=[])
        for name, group in (("a", "forums"), ("b", ""))
    ]
    run = write_run(tmp_path / "run", log=log, results=results, evaluations=evaluations)
    page = report_of(run)
    captions = [text for text in page.texts if text in ("a", "b", "average", "Average")]
    assert captions.count("average") == 1  # where its curves are; its table is the results'
    assert "Averageover 2 collections, where the parts of forums count as one" in page.text
    assert page.text.count("BM25 (dashed): 0.250") == 1
    alone = [{"step": 40, "eval/average/MAP": 0.6}]
    page = report_of(write_run(tmp_path / "alone", log=alone, results=results))
    assert page.row("BM25") == ["0.250"] and page.row("alone") == ["0.600"]


def test_padding_and_waiting_are_shares(tmp_path: Path) -> None:
    row = {"step": 3, "train/real_tokens": 0.9, "time/step": 0.5, "time/data_wait": 0.01}
    page = report_of(write_run(tmp_path / "run", log=[row]))
    assert "Padding share of processed tokensonly 10%, at 3" in page.text
    assert "Waiting for data share of the step timeonly 2%, at 3" in page.text
    assert "Padding (median)10%" in page.text


def test_each_query_is_compared_with_bm25(tmp_path: Path) -> None:
    values = {"a": {"bm25": 0.5, "trained": 1.0}, "b": {"bm25": 0.5, "trained": 0.2},
              "c": {"bm25": 1.0, "trained": 1.0}, "d": {"trained": 1.0},
              "e": {"bm25": 0.1, "trained": 0.4}}  # fmt: skip
    by_measure = {"measure": "nDCG@10", "values": values}
    run = write_whole_run(
        tmp_path / "run", evaluations=[make_evaluation(queries_by_measure=by_measure)]
    )
    said = "Of 4 queries run ranks 2 better than BM25, 1 worse, and 1 equally well."
    assert said in report_of(run).text


def test_the_best_value_of_a_column_is_bold_as_it_is_shown(tmp_path: Path) -> None:
    systems = {
        "bm25": {"a": 0.1, "b": 0.70004, "c": math.nan},
        "trained": {"a": 0.2, "b": 0.70001, "c": 0.3, "d": 0.9},
    }
    run = write_run(tmp_path / "run", evaluations=[make_evaluation(systems=systems, examples=[])])
    page = report_of(run)
    assert page.row("BM25") == ["0.100", "0.700", "–", "–"]
    assert page.bold == ["0.700", "0.200", "0.700", "0.300", "0.900"]


def test_a_run_that_has_logged_nothing(tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path / "run"))
    assert "nothing logged yet, step 0 of 40" in page.text
    for words in (
        "Nothing has been logged yet.",
        "Nothing has been evaluated yet.",
        "No rankings have been kept yet.",
        "no run.json that says when",
    ):
        assert words in page.text


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    results = {k: v for k, v in make_results().items() if k != "trained"}
    log = [row for row in make_log() if row["step"] <= 30]
    run = write_run(
        tmp_path / "run",
        log=log,
        results=results,
        evaluations=[make_evaluation(systems=results, step=None, examples=[])],
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "train/lo')  # as a kill leaves it
    page = report_of(run)
    assert "step 30 of 40, so it is still going or was stopped" in page.text
    assert page.row("run, step 20 so far") == ["0.450"] * 3


def test_the_time_of_a_resumed_run_counts_no_step_twice(tmp_path: Path) -> None:
    # Stopped after step 25, of which nothing was logged since 20.
    rows = [{"step": step, "time/step": 1.0} for step in (10, 20, 30, 40)]
    again = make_record()["sessions"][0] | {"first_step": 25}
    record = make_record()
    record["sessions"] = [record["sessions"][0], again]
    page = report_of(write_run(tmp_path / "run", record=record, log=rows))
    assert "Time in training steps35 s (35 of 40 steps)" in page.text


# Phases and comparisons.


def make_phases(root: Path) -> tuple[Path, Path, Path]:
    paths = tuple(root / "runs" / name for name in ("pretrain", "supervised", "distill"))
    for i, path in enumerate(paths):
        trained = 0.6 + 0.1 * i
        systems = make_results(trained)
        systems["untrained"] = {m: trained - 0.1 if i else 0.2 for m in MEASURES}
        before = f"runs/{paths[i - 1].name}" if i else ""
        write_whole_run(
            path,
            config=make_config(init_from=before, optimizer__learning_rate=10.0 ** -(3 + i)),
            results=systems,
            evaluations=[make_evaluation(systems=systems, examples=[])],
        )
    return paths  # type: ignore[return-value]


def test_the_phases_of_a_run_stand_side_by_side(tmp_path: Path) -> None:
    page = report_of(make_phases(tmp_path)[2])  # its init_from was written two folders above it
    assert page.rows[0][1:] == ["pretrain", "supervised", "distill"]
    assert page.row("Peak learning rate") == ["0.001", "0.0001", "1e-5"]
    results = page.rows[page.rows.index(["", *MEASURES]) + 1 :]
    # BM25 once, and what a phase began with only where no phase before it ended with that.
    assert [row[:2] for row in results] == [
        ["BM25", "0.583"],
        ["untrained", "0.200"],
        ["pretrain", "0.600"],
        ["supervised", "0.700"],
        ["distill", "0.800"],
    ]
    assert page.headings.count(1) == 1 and "distill, report" in page.texts


def test_what_a_run_began_with_is_shown_where_no_phase_ended_with_it(tmp_path: Path) -> None:
    config = make_config(init_from="lightonai/a-model")
    page = report_of(write_whole_run(tmp_path / "run", config=config))
    assert page.row("run, at its start") == ["0.300"] * 3
    report_of(write_run(tmp_path / "b", config=make_config(init_from="x" * 300)))
    assert "lightonai/a-model, which is no run's folder here" in page.text


def test_runs_that_started_from_each_other_are_shown_once(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", config=make_config(init_from=str(tmp_path / "b")))
    b = write_run(tmp_path / "b", config=make_config(init_from=str(tmp_path / "a")))
    asked, known = read_runs([a])
    assert [run.name for run in asked] == ["a"] and [run.name for run in known] == ["b", "a"]
    write_run(tmp_path / "c", config=make_config(init_from=str(tmp_path / "c")))
    assert len(read_runs([tmp_path / "c"])[1]) == 1
    asked, known = read_runs([b, a])
    assert [run.name for run in asked] == ["b", "a"] and len(known) == 2
    report_of(a)


def test_runs_are_compared(tmp_path: Path) -> None:
    one = write_whole_run(tmp_path / "x" / "run")
    other = write_whole_run(
        tmp_path / "y" / "run",
        config=make_config(optimizer__learning_rate=5e-4, input__files=["a.jsonl"]),
        results=make_results(0.7),
        evaluations=[make_evaluation(systems=make_results(0.7))],
    )
    page = report_of(one, other, output=tmp_path / "both.html")
    assert "x/run and y/run, compared" in page.texts
    assert page.rows[0][1:] == ["x/run", "y/run"]
    assert page.row("optimizer.learning_rate") == ["0.002", "0.0005"]
    assert page.row("input.files") == ["[]", '["a.jsonl"]']
    assert page.names("input.") == ["input.files"]
    assert page.row("Pairs/s (median)") == ["190", "190"]
    assert page.row("x/run") == ["0.600"] * 3 and page.row("y/run") == ["0.700"] * 3
    assert page.bold[-3:] == ["0.700"] * 3
    assert page.names("BM25") == ["BM25"]
    letters = [a for n, a in page.elements if n == "text" and "letter" in str(a.get("class"))]
    assert {str(a["class"]) for a in letters} == {"letter l0", "letter l1"}
    dashes = re.findall(r"\.line\.l[1-5] {[^}]*stroke-dasharray: ([^;]*);", page.code["style"])
    assert len(set(dashes)) == 5
    assert "A: first" in page.text and "B: first" in page.text
    assert "Of 50 queries y/run ranks 0 better than x/run, 0 worse, and 50 equally" in page.text
    assert not page.blocks and "has its best and worst queries" in page.text


def test_runs_with_the_same_config_and_another_in_one(tmp_path: Path) -> None:
    runs = [write_whole_run(tmp_path / name) for name in "ab"]
    assert "None: their configs are the same." in report_of(*runs, output=tmp_path / "c.html").text


def test_runs_are_drawn_over_what_they_have_in_common(tmp_path: Path) -> None:
    steps = write_run(tmp_path / "a", log=make_log())
    larger = write_run(tmp_path / "b", log=make_log(), config=make_config(input__batch_size=128))
    longer = write_run(tmp_path / "c", log=make_log(2000, 100))
    page = report_of(steps, larger, output=tmp_path / "1.html")
    assert "queries seen" in page.text and "step, " not in page.text
    assert re.search(r"A: first [\d.]+, last 0.2, lowest .* at 2,\d60", page.text)
    page = report_of(steps, longer, output=tmp_path / "2.html")
    assert "% of a run's own steps" in page.text and "queries seen" not in page.text


def test_other_collections_of_the_same_name_are_not_put_in_one_table(tmp_path: Path) -> None:
    one = write_whole_run(tmp_path / "a")
    other = write_whole_run(tmp_path / "b", evaluations=[make_evaluation(documents=2001)])
    page = report_of(one, other, output=tmp_path / "c.html")
    assert "held_out is not the same collection in all runs" in page.text
    assert page.names("BM25") == ["BM25"] * 3  # in a table each, and on average
    more = [make_evaluation(), make_evaluation("scifact")]
    third = write_whole_run(tmp_path / "d", evaluations=more)
    page = report_of(one, third, output=tmp_path / "e.html")
    assert "their averages cannot be compared" in page.text
    assert "over 2 collections" in report_of(third).text


def test_baselines_that_differ_say_whose_they_are(tmp_path: Path) -> None:
    one = write_whole_run(tmp_path / "a")
    systems = make_results(bm25=0.5)
    other = write_whole_run(
        tmp_path / "b", results=systems, evaluations=[make_evaluation(systems=systems)]
    )
    page = report_of(one, other, output=tmp_path / "c.html")
    assert page.names("BM25") == ["BM25 (a)", "BM25 (b)"]
    assert page.names("untrained") == ["untrained"]


def test_names_take_as_much_of_the_path_as_they_need() -> None:
    paths = [Path("/a/x/run"), Path("/b/x/run"), Path("/b/other"), Path("/run")]
    assert distinct_names(paths) == ["a/x/run", "b/x/run", "other", "/run"]


# Hostile content.


def test_nothing_in_a_run_is_taken_for_markup(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "a<b onload=alert(1)>&\"'\u202e")
    page = report_of(run)  # no element, attribute or reference that is not ours
    shown = "</script><img src=x onerror=alert(1)>\"'&amp;\u2028]]>␀␛[31m\ufffd שלום 🦜"
    assert page.text.count(shown) > 20
    assert "a<b onload=alert(1)>&\"'\ufffd" in page.text
    assert "<img" not in page.source and "\u202e" not in page.source
    copy = hostile_run(tmp_path / "<other>")
    (copy / "train_config.json").write_text(json.dumps(make_config(seed=HOSTILE)))
    assert report_of(run, copy, output=tmp_path / "<b>.html").row("seed") == ["0", shown]


def test_embedded_json_says_what_the_run_said(tmp_path: Path) -> None:
    page = report_of(hostile_run(tmp_path / "run"))
    hostile = page.blocks[-1]  # after those of the worst queries, a kind that we know
    assert hostile["query"] == [HOSTILE[:30], "ok"]
    assert hostile["document"] == ["a", HOSTILE[:30]]
    raw = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.source)
    assert len(raw) == len(page.blocks) and not set("<>&") & set("".join(raw))


def test_the_script_makes_no_markup(tmp_path: Path) -> None:
    page = report_of(write_whole_run(tmp_path / "run"))
    script = page.code["script"]
    assert "textContent" in script
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(",
                 "fetch(", "XMLHttpRequest", "import("):  # fmt: skip
        assert word not in script
    assert "</" not in script and "</" not in page.code["style"]


def test_long_words_are_cut(tmp_path: Path) -> None:
    word = "x" * 100_000
    document = make_document(1, 1, word, query_tokens=[word], document_tokens=["a", word])
    example = make_example("best", query=word, query_id=word, ranking=[document])
    run = write_whole_run(
        tmp_path / "run",
        record=make_record(sources={word: 1}),
        evaluations=[make_evaluation(examples=[example])],
    )
    page = report_of(run)
    assert len(page.source) < 150_000
    assert page.blocks[0]["query"] == ["x" * 39 + "…"]


# Curves.


def test_thinning_keeps_extremes_and_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[77_777], values[12_345] = 40.0, -50.0
    buckets = thin(list(enumerate(values.tolist(), 1)))
    assert len(buckets) <= BUCKETS
    assert max(b.high for b in buckets) == 40.0 and min(b.low for b in buckets) == -50.0
    means = [b.mean for b in buckets if b.mean is not None]
    assert np.isclose(np.mean(means), values.mean(), atol=1e-3)
    assert all(b.low <= (b.mean or 0.0) <= b.high for b in buckets)
    few = [(1, 2.0), (5, 3.0)]
    assert [(b.x, b.mean, b.low, b.high) for b in thin(few)] == [(1, 2, 2, 2), (5, 3, 3, 3)]
    assert thin([]) == []
    long = write_run(tmp_path / "long", log=make_log(4000, 10))
    assert "(here up to 400)" in report_of(long).text
    short = report_of(write_run(tmp_path / "short", log=make_log())).text
    assert "is drawn in as many stretches" not in short


def test_a_thinned_curves_extremes_are_in_the_drawing(tmp_path: Path) -> None:
    rows = [{"step": step, "train/odd": 100.0 if step == 3000 else 0.0} for step in range(1, 5001)]
    page = report_of(write_run(tmp_path / "run", log=rows))
    band = next(a for n, a in page.elements if n == "path" and a.get("class") == "band l0")
    heights = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", str(band["d"]))]
    assert min(heights) < 25 and max(heights) > 160  # from the top to the foot
    assert "highest 100 at 3,000" in page.text


def test_values_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": 1.0 + step % 2} for step in range(1, 12)]
    rows[4]["train/loss"], rows[7]["train/loss"], rows[8]["train/loss"] = math.nan, math.inf, 1e308
    rows[5]["train/loss"] = None  # type: ignore[typeddict-item]
    page = report_of(write_run(tmp_path / "run", log=rows))
    assert "4 values are no number that can be drawn (× at the foot)" in page.text
    drawn = [a for n, a in page.elements if n in ("path", "circle", "text")]
    assert not re.search("nan|inf", json.dumps(drawn), re.IGNORECASE)
    lines = [str(a["d"]) for n, a in page.elements if a.get("class") == "line l0"]
    assert [len(line.split()) // 2 for line in lines] == [4, 2]
    marks = [a for n, a in page.elements if a.get("class") == "unusable"]
    assert len(marks) == 4
    alone = [{"step": 1, "train/loss": math.nan}]
    page = report_of(write_run(tmp_path / "alone", log=alone))
    assert "1 value is no number that can be drawn" in page.text
    assert "Nothing here can be drawn." in page.text


def test_a_single_point_is_marked(tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path / "run", log=[{"step": 7, "train/loss": 2.5}]))
    assert [a["class"] for n, a in page.elements if n == "circle"] == ["point l0"]
    assert "only 2.5, at 7" in page.text


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3, 3), (0, 0), (1e-300, 2e-300), (-5e299, 5e299), (0.1, 250.0)]
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_axes_have_round_ticks_within_them(low: float, high: float, logarithmic: bool) -> None:
    if logarithmic and not (low > 0 and high / low > 30):
        return
    axis = Axis.fit(low, high, 0.0, 100.0, logarithmic=logarithmic)
    assert 0 <= axis.place(low) <= axis.place(high) <= 100
    ticks = axis.ticks(5)
    assert 1 <= len(ticks) <= 7
    assert all(-1e-6 <= axis.place(value) <= 100 + 1e-6 for value in ticks)
    assert all(len(numbers.tick(value)) <= 8 for value in ticks)


def test_numbers_are_written_short() -> None:
    assert [numbers.short(x) for x in (0.94579, 12.34, 1234.5, 2e-5, 0.0)] == [
        "0.946", "12.3", "1,234", "2e-5", "0",
    ]  # fmt: skip
    assert [numbers.percent(x) for x in (0.4669, 1.0, 0.99999)] == ["46.7%", "100%", ">99.9%"]
    assert [numbers.duration(x) for x in (0.34, 25, 3599, 8000, 100_000)] == [
        "0.34 s", "25 s", "59 min 59 s", "2 h 13 min", "1 d 3 h",
    ]  # fmt: skip
    assert [numbers.tick(x) for x in (0.5, 20_000, 1.5e6, -0.0)] == ["0.5", "20k", "1.5M", "0"]


def test_commands_can_be_typed_again() -> None:
    arguments = ["launch/train.py", "--config.input.sources=('a b',)", "--x='$HOME'", "a b", "--y="]
    assert shlex.split(" ".join(map(quoted, arguments))) == arguments
    assert quoted(arguments[1]) == "--config.input.sources=\"('a b',)\""


# Size.


def test_the_page_of_a_large_run_stays_small(tmp_path: Path) -> None:
    sessions = [make_record()["sessions"][0] | {"first_step": i} for i in range(50)]
    run = write_whole_run(
        tmp_path / "run", log=make_log(30_000, 1), record=make_record(sessions=sessions)
    )
    assert (run / "metrics.jsonl").stat().st_size > 7_000_000
    assert len(report_of(run).source) < 500_000


def test_heat_maps_stop_at_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankings, "HEAT_MAP_BUDGET", 1000)
    page = report_of(write_whole_run(tmp_path / "run"))
    documents = 6
    assert 0 < len(page.blocks) < documents
    left_out = documents - len(page.blocks)
    assert f"{left_out} heat maps are left out" in page.text
    heads = [row for row in page.rows if row[:1] == ["query token"]]
    assert len(heads) == documents  # the winning pairs are all there


# What it refuses.


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"it has no train_config.json"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="there is no such folder"):
        write_report(["x" * 300])
    with pytest.raises(UserError, match="--workdir"):
        write_report([])


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="named twice"):
        write_report([run, tmp_path / "run" / ".." / "run"], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        write_report([run], tmp_path / "nowhere" / "page.html")
    with pytest.raises(UserError, match="is a folder"):
        write_report([run], tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / ("x" * 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


CORRUPT: list[tuple[str, Any]] = [
    ("train_config.json", "{"),
    ("train_config.json", "[]"),
    ("run.json", "{"),
    ("run.json", b"\xff\xfe"),
    ("run.json", {"sessions": 3}),
    ("run.json", {"sessions": ["x"]}),
    ("run.json", {"sources": {"a": "many"}}),
    ("run.json", {"parameters": 10**400}),
    ("results.json", [1]),
    ("results.json", {"bm25": {"nDCG@10": "high"}}),
    ("results.json", "[" * 100_000),
    ("metrics.jsonl", b"\xff\xfe{}\n"),
    ("metrics.jsonl", "3\n"),
    ("metrics.jsonl", '{"train/loss": 1}\n'),
    ("metrics.jsonl", '{"step": -1}\n'),
    ("evaluation/a.json", "nothing"),
    ("evaluation/a.json", {"documents": 3}),
    ("evaluation/a.json", {"collection": "a", "examples": [{"kind": "best"}]}),
]


@pytest.mark.parametrize(("name", "content"), CORRUPT)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: Any) -> None:
    run = write_run(tmp_path / "run")
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=re.escape(str(path))) as raised:
        write_report([run])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"winners": [0]},
        {"winners": [0, 0, 0, 0, 0, 99]},
        {"winners": [0, 0, 0, 0, 0, -1]},
        {"similarities": "AAAA"},
        {"similarities": "not base64"},
        {"query_tokens": [1, 2, 3, 4, 5, 6]},
        {"relevance": "yes"},
        {"rank": "first"},
        {"document_id": None},
    ],
)
def test_a_ranking_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    document = make_document(1, 1, TEXTS[0]) | changes
    evaluation = make_evaluation(examples=[make_example("best", ranking=[document])])
    run = write_run(tmp_path / "run", evaluations=[evaluation])
    with pytest.raises(UserError, match=r"evaluation/0.json cannot be read"):
        write_report([run])


def test_a_token_without_a_winner_is_shown(tmp_path: Path) -> None:
    document = make_document(1, 1, TEXTS[0])
    document["winners"][1] = None
    evaluation = make_evaluation(examples=[make_example("best", ranking=[document])])
    page = report_of(write_run(tmp_path / "run", evaluations=[evaluation]))
    assert page.row("parse") == ["none", "", ""]


def test_a_document_without_tokens_is_shown(tmp_path: Path) -> None:
    empty = {"document_tokens": [], "winners": [], "similarities": ""}
    document = make_document(None, 1, "...") | empty
    evaluation = make_evaluation(examples=[make_example("best", ranking=[document])])
    page = report_of(write_run(tmp_path / "run", evaluations=[evaluation]))
    assert page.row("parse") == ["none", "", ""] and not page.blocks


def test_a_broken_phase_before_is_named_too(tmp_path: Path) -> None:
    before = write_run(tmp_path / "before")
    (before / "run.json").write_text("{")
    run = write_run(tmp_path / "run", config=make_config(init_from=str(before)))
    with pytest.raises(UserError, match=re.escape(str(before / "run.json"))):
        write_report([run])


# How it is written.


def test_the_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    path = write_report([run])
    first = path.read_bytes()
    write_report([run])
    assert path.read_bytes() == first  # nothing but the files decides what it says
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    before = sorted(run.iterdir())

    def fail(self: Path, text: str, **options: Any) -> None:
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(UserError, match="No space left on device"):
        write_report([run])
    assert path.read_bytes() == first and sorted(run.iterdir()) == before


def run_program(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # A platform that is nowhere: a report asks for no device.
    environment = os.environ | {"JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(PROGRAM.parents[1])}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *flags],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
    )


def test_the_program(tmp_path: Path) -> None:
    one, other = (write_whole_run(tmp_path / name) for name in "ab")
    done = run_program(f"--workdir={one}", f"--workdir={other}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The report: comparison.html\n"
    assert "a and b, compared" in read_page(tmp_path / "comparison.html").texts


def test_the_program_ends_with_status_2(tmp_path: Path) -> None:
    done = run_program("--workdir=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is not the folder of a run")
    assert done.stderr.count("\n") == 1 and not done.stdout
